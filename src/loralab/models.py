"""Models by name: a model argument is resolved to a folder, and a folder loaded as a classifier or for another task.

An argument is an alias (`minilm`, `mpnet`, `smollm2`), a local folder, or a hub name. Only a hub name uses the network.
Only classes of transformers are loaded, and only from safetensors or GGUF files: no code that a folder brings is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loralab.disk import read_json, sha256
from loralab.errors import OtherKind, UserError
from loralab.kinds import loaded
from loralab.model_names import ALIASES, alias_hint, not_reached, place_of, require, unreachable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # a base and its tokenizer; no pickles, no code
NOT_WANTED = ["*/*", "consolidated*"]  # other formats and second copies of the weights
AUTO_CLASSES = {  # PEFT's task type -> transformers' class that loads a checkpoint for it, and what errors call it
    "SEQ_CLS": ("AutoModelForSequenceClassification", "a classifier"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "a tagger"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "a model that answers questions"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "a sequence-to-sequence model"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "a causal language model"),
    "FEATURE_EXTRACTION": ("AutoModel", "a model without a head"),
}


def resolve(name: str) -> Path | str:
    """The folder of an alias or a local folder, checked; another well-formed name is a hub name, returned as it is.

    Raises UserError as `place_of` does, and for a folder that no base can be read from.
    """
    place = place_of(name)
    if place is None:
        return name
    return _of_alias(name, place) if name in ALIASES else _checked(place)


class Pretrained(NamedTuple):
    """A model of a checkpoint, in eval mode, and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    drawn: list[str]  # tensors of the head that the checkpoint lacks, or has in another size: drawn from the seed


def classifier(
    name: str, num_labels: int, regression: bool, dtype: torch.dtype, seed: int, attention: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load the named model under a new head, and its tokenizer; the head depends on the seed and its shape alone.

    A head that the checkpoint brings is not kept: all runs of a comparison start alike. The model is in eval mode.
    `attention` is transformers' `attn_implementation`. Raises UserError for a model that cannot be loaded.
    """
    if num_labels < 1 or regression != (num_labels == 1):
        kind = "regression" if regression else "classification"
        raise UserError(
            f"{num_labels} labels for a {kind}: expected 1 for a regression, 2 or more for a classification"
        )
    return fresh(name, "SEQ_CLS", num_labels, dtype, seed, attention)


def fresh(
    name: str, task: str, outputs: int | None, dtype: torch.dtype, seed: int, attention: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load the named model for a task, one of AUTO_CLASSES, as a run begins with it, and its tokenizer.

    With `outputs` its head is new and depends on the seed and its shape alone; without, it is the model's own, and a
    checkpoint that lacks it is refused. The model is in eval mode. Raises UserError for a model that cannot be loaded.
    """
    model, words, drawn = pretrained(name, task, outputs, dtype, seed, attention)
    if outputs is not None:
        with _from_seed(seed):
            _new_head(model, dtype)
    elif drawn:
        raise OtherKind(
            f"{name} has no {drawn[0]}, so it is not {AUTO_CLASSES[task][1]} yet: choose a model that is one"
        )
    return model, words


def pretrained(
    name: str,
    task: str,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str | None = None,
) -> Pretrained:
    """Load the named checkpoint for a task, one of AUTO_CLASSES, with the head that it brings.

    `num_labels` is the number of outputs of a head that has labels, by default the checkpoint's. What the checkpoint
    lacks of the head is drawn from `seed`. Raises UserError for a model that cannot be loaded, or lacks weights of its
    base.
    """
    folder = _folder(name)
    import transformers  # slow to import

    auto_class, kind = AUTO_CLASSES[task]
    head: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if num_labels is not None:
        head["num_labels"] = num_labels
    if num_labels is not None and task == "SEQ_CLS":
        head["problem_type"] = "regression" if num_labels == 1 else "single_label_classification"
    with _from_seed(seed), _quiet(), _without_bar(folder), _one_line(name, kind):
        words = _tokenizer(folder)
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=attention,
            **head,
            **_source(folder),
        )
    loaded.open_whole(model)
    drawn = _complete(name, model, report)
    if task != "FEATURE_EXTRACTION" or words.pad_token is None:
        _pad(name, model, words)
    return Pretrained(model, words, drawn)


def architecture(name: str) -> str | None:
    """The model class that a checkpoint says it was saved from; None if it does not say."""
    folder = _folder(name)
    if not _has_safetensors(folder):
        return None
    found = read_json(folder / "config.json").get("architectures")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else None


def config(name: str) -> "PretrainedConfig":
    """The config of the named checkpoint, without reading its weights. Raises UserError."""
    folder = _folder(name)
    from transformers import AutoConfig

    with _quiet(), _one_line(name, "a model"):
        return AutoConfig.from_pretrained(folder, **_source(folder))


def _folder(name: str) -> Path:
    """The folder of a model argument; a hub name is fetched, if it is not in the cache."""
    found = resolve(name)
    return found if isinstance(found, Path) else _checked(_download(found))


def tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model on this machine, without reading its weights. Raises UserError for a hub name."""
    found = resolve(name)
    if not isinstance(found, Path):
        raise UserError(f"no folder {name!r}: expected a local folder or one of {', '.join(ALIASES)}")
    with _quiet(), _one_line(name, "a tokenizer"):
        return _tokenizer(found)


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **_source(folder))


def gguf_file(name: str) -> Path | None:
    """The GGUF file of a model that has no safetensors, or None. Raises UserError as `resolve` does."""
    folder = _folder(name)
    found = _gguf(folder)
    return folder / found["gguf_file"] if found else None


def _source(folder: Path) -> dict[str, Any]:
    """The arguments with which transformers reads a folder: no network, no code of the folder's own."""
    return {"local_files_only": True, "trust_remote_code": False, **_gguf(folder)}


def blank(name: str, num_labels: int | None, task: str = "SEQ_CLS") -> "PreTrainedModel":
    """Make the model of a name for a task without reading its weights; under a FakeTensorMode it takes no memory."""
    found = resolve(name)
    require(name)
    import transformers

    source: dict[str, Any] = _gguf(found) if isinstance(found, Path) else {"local_files_only": bool(unreachable())}
    head: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    auto_class, kind = AUTO_CLASSES[task]
    with _quiet(), _one_line(name, kind):
        config = transformers.AutoConfig.from_pretrained(found, trust_remote_code=False, **head, **source)
        return getattr(transformers, auto_class).from_config(config, dtype=torch.float32)


def _of_alias(name: str, folder: Path) -> Path:
    alias = ALIASES[name]
    weights = folder / alias.weights
    got = sha256(weights) if weights.is_file() else "no such file"
    if got != alias.sha256:
        raise UserError(f"{weights}: sha256 {got}, expected {alias.sha256}: remove it and get it again: {alias.get}")
    return _checked(folder)


def _checked(folder: Path) -> Path:
    """The folder, if a base can be read from it without running code that it brings."""
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if _has_safetensors(folder) or len(ggufs) == 1:
        return folder
    if ggufs:
        raise UserError(f"model folder {folder} has {len(ggufs)} GGUF files, expected one: {', '.join(ggufs)}")
    wanted = ("config.json", "model.safetensors")
    problems = [f"no {file}" for file in wanted if not (folder / file).is_file()]
    if any(folder.glob("*.bin")):
        problems.append("its *.bin files are not read, they are pickles and can run code when they are loaded")
    raise UserError(f"model folder {folder}: {'; '.join(problems)}: expected what save_pretrained writes, or one .gguf")


def _has_safetensors(folder: Path) -> bool:
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / file).is_file() for file in weights)


def _gguf(folder: Path) -> dict[str, str]:
    if _has_safetensors(folder):
        return {}
    if find_spec("gguf") is None:
        raise UserError(f"{folder} holds a GGUF model, which needs the package gguf: pip install 'loralab[gguf]'")
    return {"gguf_file": next(folder.glob("*.gguf")).name}


def _download(name: str) -> Path:
    """The hub's folder, from its cache where the hub cannot be reached; only what `_checked` accepts is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    why = unreachable()
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=HUB_FILES, ignore_patterns=NOT_WANTED, local_files_only=why is not None
            )
        )
    except LocalEntryNotFoundError as error:
        raise not_reached(name, why or _first_line(error)) from error
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        what = f"no folder {name!r}{alias_hint(name)} and the hub does not give it ({_first_line(error)})"
        raise UserError(f"{what}: check the name, pass a local folder, or one of {', '.join(ALIASES)}") from error


def _complete(name: str, model: "PreTrainedModel", report: dict[str, Any]) -> list[str]:
    """Tensors of the head that are not the checkpoint's. Raises UserError if any of the base is not.

    A pooler may be new: many checkpoints have none.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name} is an adapter, expected a base: name the model that it was trained on")
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    absent = [key for key in report["missing_keys"] if not key.startswith(f"{prefix}pooler.")]
    new = sorted(absent + [key for key, *_ in report["mismatched_keys"]])
    wrong = [key for key in new if key.startswith(prefix)]
    if wrong:
        named = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(f"the weights of {name} do not fit its config.json: {named} missing or of another shape")
    return new


@torch.no_grad()
def _new_head(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Draw everything outside the base anew, in float32, so that it is the same head in every dtype up to rounding."""
    for name, module in model.named_children():
        if name == model.base_model_prefix:  # one child, in each of the 120 classifiers of transformers 5.23 tried
            continue
        for tensor in module.parameters():
            tensor._is_hf_initialized = False  # transformers leaves a marked tensor as it is
        module.float().apply(model._init_weights).to(dtype)


def _pad(name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a decoder without a pad token pad with its end of text; what is padding, the attention mask says."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has neither a pad nor an end-of-text token: set one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@contextmanager
def _from_seed(seed: int) -> Iterator[None]:
    """Draw on the CPU from the seed inside the block; the generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of a new head and its bar; `_complete` raises for what the report would warn of."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _without_bar(folder: Path) -> Iterator[None]:
    """Keep the bar of a GGUF file from stderr: it is tqdm's own, which no switch of transformers turns off."""
    with redirect_stderr(StringIO()) if _gguf(folder) else nullcontext():
        yield


@contextmanager
def _one_line(name: str, kind: str) -> Iterator[None]:
    """Turn what transformers raises about a folder that it cannot use into a UserError of one line."""
    try:
        yield
    except Exception as error:  # of many types; whatever it is, the folder is the cause
        raise OtherKind(f"model {name!r} cannot be loaded as {kind}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
