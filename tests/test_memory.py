"""Memory: each storage is counted once, and an estimate is what a step really takes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from archs import build, rows
from torch import nn

import loralab
from loralab import models
from loralab.cli import main
from loralab.cli.plan import _verdict
from loralab.data.batches import batch_width
from loralab.fast import heap
from loralab.recipe import NAMED
from loralab.run import Settings, train
from loralab.run.estimate import BlankStep, EstimateSettings, Meter, estimate, largest_batch
from loralab.run.memory import PURPOSES, by_layer, held, layer_of, ledger, of_adapter, saved_by_layer, tensor_bytes

CASES = {
    "lora": {},
    "dora": {"method": "dora"},
    "vera": {"method": "vera"},
    "full": {"method": "full"},
    "lora-fa": {"method": "lora-fa"},
    "superlora": {"method": "superlora"},
    "int8": {"store": "int8"},
    "nf4": {"store": "nf4"},
    "nf4-dq": {"store": "nf4-dq"},
    "plain path": {"speed": "off"},
    "bfloat16": {"dtype": "bfloat16"},
    "checkpointing": {"checkpointing": True},
} | {method: {"method": method} for method in NAMED}


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The tiny model without dropout, whose words are drawn outside torch."""
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


class ByAddress(Meter):
    """Weights that lie side by side are read through a storage of their own, which takes no memory."""

    def key(self, storage):
        return storage.data_ptr()


def real(settings):
    """(bytes by layer, peak of the tensors) of a real step, the second."""
    model, _ = models.classifier(settings.model, settings.labels, False, torch.float32, seed=0)
    step = BlankStep(model, settings, settings.recipe())
    step(settings)
    layers = by_layer(model, held(model), step.learned, step.optimizer, step.activations)
    with ByAddress() as meter:
        for t in [*(t for _, t in held(model)), *(t for s in step.optimizer.state.values() for t in s.values())]:
            meter.count(t)
        step(settings)
    return layers, meter.most


@pytest.mark.few(12)
@pytest.mark.parametrize("name", CASES)
def test_an_estimate_is_what_a_step_takes(plain, name):
    usual = {"model": plain, "dtype": "float32", "batch_size": 5, "max_length": 11}
    settings = EstimateSettings(**{**usual, **CASES[name]})
    estimated = estimate(settings)
    layers, most = real(settings)
    assert layers == estimated.layers
    assert estimated.tensors == pytest.approx(most, rel=0.01)


@pytest.mark.parametrize("method", ["dylora", "frozen-dylora"])
def test_of_many_ranks_the_largest_is_estimated(plain, method):
    largest = estimate(EstimateSettings(model=plain, method="lora", rank=5, batch_size=3, max_length=7, speed="off"))
    assert estimate(replace(largest.settings, method=method)).products == largest.products


def test_an_estimate_leaves_no_trace(plain):
    """Constants that an estimate asks for first have values afterwards, and the random numbers go on as before."""
    before = torch.get_rng_state()
    estimate(EstimateSettings(model=plain, method="vera", store="nf4-dq", rank=3, batch_size=2, max_length=5))
    assert torch.equal(before, torch.get_rng_state())
    model, _ = models.classifier(plain, 2, False, torch.float32, seed=0)
    loralab.attach(model, "vera", rank=3, store="nf4-dq", head=True)
    out = model(input_ids=torch.ones(2, 5, dtype=torch.long)).logits
    assert type(out) is torch.Tensor
    assert out.isfinite().all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_never_needs_less(plain, method):
    settings = EstimateSettings(model=plain, method=method, batch_size=3, max_length=7)
    of = lambda **more: estimate(replace(settings, **more))  # noqa: E731
    for grown in ([{"batch_size": n} for n in (2, 5)], [{"max_length": n} for n in (6, 9)]):
        found = [of(**more) for more in grown]
        assert [e.tensors for e in found] == sorted(e.tensors for e in found)
        assert [e.ledger["activations"] for e in found] == sorted({e.ledger["activations"] for e in found})
    assert of(checkpointing=True).tensors < of(speed="off").tensors


def test_activations_are_counted_once_where_they_are_kept():
    model = nn.ModuleDict({"a": nn.Linear(7, 11, bias=False), "b": nn.Linear(7, 3)})
    x = torch.ones(5, 7)
    with saved_by_layer(model) as saved:
        model["b"](x)
        model["a"](x).square()
    assert saved == {"b": 4 * 5 * 7, "outside the layers": 4 * 5 * 11}  # x; then the square's input, kept outside
    with saved_by_layer(model, on=False) as saved:
        model["a"](x)
    assert saved == {}


def test_every_byte_of_a_model_is_in_one_layer():
    model = build("bert")
    adapters = loralab.attach(model, "vera", head=True, rank=5)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-3))
    model(**rows()).logits.sum().backward()
    optimizer.step()
    learned = [p for p in model.parameters() if p.requires_grad]
    layers = by_layer(model, held(model), learned, optimizer, {"classifier": 3})
    constants = [t for layer in adapters.layers.values() for t in layer.constants["default"].values()]
    assert ledger(layers)["weights"] == tensor_bytes([*model.parameters(), *model.buffers(), *constants])
    assert ledger(layers)["gradients"] == tensor_bytes(p.grad for p in learned)
    assert ledger(layers)["optimizer"] == tensor_bytes(t for s in optimizer.state.values() for t in s.values())
    assert ledger(layers)["activations"] == 3
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1", "bert.embeddings", "classifier"} <= set(layers)
    assert layer_of("bert.encoder.layer.1.output.dense.weight", model) == "bert.encoder.layer.1"
    some = learned[0]
    kept = of_adapter(model, "default", without=[some])
    without = ledger(by_layer(model, kept, learned, optimizer, {}))
    assert without["weights"] == ledger(layers)["weights"] - tensor_bytes([some])
    assert without["gradients"] == ledger(layers)["gradients"] - tensor_bytes([some])
    own = ledger(by_layer(model, of_adapter(model, "another", without=[]), learned, optimizer, {}))
    assert own["weights"] == ledger(layers)["weights"] - tensor_bytes(constants)


def test_a_run_reports_its_memory_by_layer(tiny, own, tmp_path, capsys):
    settings = Settings(
        task=str(own["class"]), model=str(tiny), out=tmp_path / "run", text=("sentence",), label="label",
        epochs=1, batch_size=16, max_length=40, dtype="float32",
    )  # fmt: skip
    memory = train(settings)["memory"]
    assert memory["ledger"] == {purpose: sum(x[purpose] for x in memory["layers"].values()) for purpose in PURPOSES}
    lengths = {batch_width(n) for n in range(4, 10)}  # of the first batch it is one
    estimates = [
        estimate(
            EstimateSettings(model=str(tiny), batch_size=16, max_length=n, dtype="float32", targets=settings.targets)
        )
        for n in lengths
    ]
    weights = [{k: v["weights"] for k, v in layers.items()} for layers in (memory["layers"], estimates[0].layers)]
    assert weights[0] == weights[1]
    assert min(abs(memory["ledger"]["activations"] / e.ledger["activations"] - 1) for e in estimates) < 0.02
    main(["inspect", str(tmp_path / "run"), "--memory", "--json"])
    assert json.loads(capsys.readouterr().out)["layers"] == memory["layers"]
    main(["inspect", str(tmp_path / "run" / "adapter"), "--memory"])
    assert "all layers" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("events", [[(1, 5 << 20), (2, 3 << 20), (1, 0), (3, 4 << 20)]])
def test_the_heap_holds_at_least_what_lives(events, kept):
    most = heap.resident(events, kept)
    if most is None:
        pytest.skip("not the GNU C library")
    assert most >= 8 << 20  # 1 and 2, then 3 in the hole of 1
    assert most < 12 << 20
    assert heap.resident([(i, 1 << 20) for i in range(20)], kept) == pytest.approx(20 << 20, rel=0.02)


LARGE_OUTPUT = """
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import loralab
from loralab.objectives import vocabulary

sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=49_152, **sizes))
vocabulary.prepare(model)
adapters = loralab.attach(model, "lora", targets="all-linear")
adapters.fast("bfloat16")
optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-3))
resident = []
for step in range(16):
    ids = torch.randint(49_152, (4, 130 + 37 * step % 90))
    wanted = 40 + 13 * step % 50  # tokens of a row that are learned
    at = torch.arange(4).repeat_interleave(wanted), torch.arange(wanted).repeat(4)
    nll, _ = vocabulary.likelihoods(model, {"input_ids": ids}, at, ids[:, 1 : wanted + 1].flatten())
    nll.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
print(resident[-1] - resident[8])
"""


@pytest.mark.slow
@pytest.mark.skipif(heap.problem() is not None, reason=str(heap.problem()))
def test_a_large_output_layer_does_not_make_the_heap_grow():
    """Steps that differ in how many tokens are learned: kept whole, the heap grows by 100 MB with each of these."""
    out = subprocess.run([sys.executable, "-c", LARGE_OUTPUT], capture_output=True, text=True, check=True).stdout
    assert int(out.splitlines()[-1]) < 200e6


@pytest.mark.skipif(heap.problem() is not None, reason=str(heap.problem()))
def test_freed_memory_that_is_kept_is_not_asked_for_again():
    code = """
import resource, sys, torch
from loralab.fast import heap
if sys.argv[1] == "kept": heap.keep()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(12):
    if i == 4: before = faults()  # the first find their places between small blocks
    torch.full((80, 1 << 20), 1, dtype=torch.uint8)
print(faults() - before)
"""

    def asked(how):
        return int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)

    assert asked("kept") * 4 < asked("default")


def test_the_largest_batch_fits_and_a_larger_one_does_not(plain):
    found = estimate(EstimateSettings(model=plain, batch_size=2, max_length=32))
    room = found.peak + 3_000_000
    most = largest_batch(found, room)
    assert estimate(replace(found.settings, batch_size=most)).peak <= room
    assert estimate(replace(found.settings, batch_size=most * 5 // 4)).peak > room
    assert largest_batch(found, 1000) == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--memory", "24 boxes"], "--memory 24 boxes: expected a size such as"),
        (["--memory", "0GB"], "--memory 0GB: expected"),
        (["--method", "lroa"], "lroa"),
        (["--model", "./nowhere"], "no folder './nowhere'"),
        (["--max-length", "99"], "--max-length 99: .* takes 40 tokens"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--store", "int3"], "int3"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(plain, capsys, argv, told):
    assert main(["plan", *argv] if "--model" in argv else ["plan", "--model", plain, *argv]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(told, err)


@pytest.mark.slow
def test_the_command_says_what_fits_and_what_to_change(plain, capsys):
    def said(*argv):
        assert main(["plan", "--model", plain, "--batch-size", "30", "--max-length", "32", *argv]) == 0
        return capsys.readouterr().out

    data = json.loads(said("--json", "--memory", "30 MB"))
    assert (data["memory"], data["fits"]) == (30_000_000, True)
    assert sum(map(sum, (x.values() for x in data["layers"].values()))) == sum(data["ledger"].values())
    tight = said("--memory", f"{data['peak'] // 1000 - 100}kB").splitlines()[-1]
    assert "It does not fit" in tight
    assert "--accumulate 2" in tight


def test_the_verdict_is_one_sentence_for_each_case(plain):
    found, least = (estimate(EstimateSettings(model=plain, batch_size=n, max_length=9)) for n in (40, 1))
    changes = {"--a": least}
    assert "It fits" in _verdict(found, found.peak, 40, changes)
    assert _verdict(found, found.peak - 1, 20, changes).endswith(
        "--a, or --batch-size 20, which in a run is --accumulate 2."
    )
    assert "nor a batch of 1" in _verdict(found, least.peak - 1, 0, changes)


def test_importing_the_replay_needs_no_torch():
    code = f"import sys, runpy; runpy.run_path({heap.__file__!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
