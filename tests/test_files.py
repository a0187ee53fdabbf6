"""Adapter folders: strict, complete, never half-written, and any damage to them is named."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from archs import build, rows, shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import loralab
from loralab import disk
from loralab.files import HEADER, TENSORS, FolderNote, adapter_name, read, sealed
from loralab.hashes import tensor_sha256
from loralab.peft_format import HEADER as PEFT_HEADER

OLD = Path(__file__).parent / "fixtures/v1"
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path):
    adapters = loralab.attach(
        build("bert"), "lora", name="mrpc", rank=3, alpha=5, head=True, labels=["no", "yes", "so"]
    )
    shake(adapters, "mrpc")
    return adapters.save(tmp_path / "adapter")


def spoil(folder, change):
    """Change the tensors of a folder behind the header's back."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def forge(folder, change):
    """Change the header of a folder, with checksums that fit: what damage cannot do, but malice can."""
    header = json.loads((folder / HEADER).read_text())
    change(header)
    (folder / HEADER).write_text(json.dumps(sealed(header)))


def record(folder):
    """Let the header of a folder record the tensors that are there now."""
    tensors, headers = load_file(folder / TENSORS), disk.tensor_headers(folder / TENSORS)

    def change(header):
        header["roles"] = {key: header["roles"].get(key, "A") for key in tensors}
        header["tensors"] = {
            key: {"dtype": h.dtype, "shape": list(h.shape), "sha256": tensor_sha256(tensors[key])}
            for key, h in headers.items()
        }

    forge(folder, change)


def refusal(folder, **given):
    """The message with which a folder is refused, by `load`, which leaves the model as it was, and without a model."""
    model = build("bert")
    before = {key: (t.clone(), t.dtype, t.requires_grad) for key, t in model.named_parameters()}
    modules = [type(m) for m in model.modules()]
    with pytest.raises(loralab.UserError) as caught:
        loralab.load(model, folder, **given)
    assert "\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == modules
    assert not hasattr(model, "_loralab")
    for key, t in model.named_parameters():
        assert torch.equal(t, before[key][0])
        assert (t.dtype, t.requires_grad) == before[key][1:]
    return str(caught.value)


# ---- what is in a folder ---------------------------------------------------------------------------------------------


def test_the_header_says_all_that_the_adapter_needs(folder):
    header = json.loads((folder / HEADER).read_text())
    assert header["version"] == 2
    assert header["scaling"] == 5 / 3
    assert header["labels"] == ["no", "yes", "so"]
    assert header["head"] == ["classifier"]
    assert header["coverage"]["all-linear"][0] == QUERY
    assert set(header["roles"].values()) == {"A", "B", "head"}
    assert len(header["base"].pop("sha256")) == 64
    assert header["base"] == {
        "name": "BertForSequenceClassification",
        "model_type": "bert",
        "class": "BertForSequenceClassification",
        "task_type": "SEQ_CLS",
    }
    assert header["tensors"].keys() == header["roles"].keys() == load_file(folder / TENSORS).keys()
    assert header["tensors"][f"{QUERY}.A"]["shape"] == [3, 24]
    assert header["sha256"].keys() == header.keys() - {"sha256"}
    assert {file.name for file in folder.iterdir()} == {HEADER, TENSORS, "README.md"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_come_back_bit_for_bit_in_their_dtype(tmp_path, dtype):
    adapters = loralab.attach(build("bert").to(dtype), "lora", rank=2, head=True)
    shake(adapters, "default")
    adapters.save(tmp_path)
    held = read(tmp_path).tensors
    assert {key: t.dtype for key, t in held.items()} == {key: t.dtype for key, t in adapters.state().items()}
    again = loralab.load(build("bert").to(dtype), tmp_path).state()
    assert all(torch.equal(t, again[key]) for key, t in adapters.state().items())


def test_a_causal_model_has_no_labels_and_an_unknown_class_no_task(tmp_path):
    sizes = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1}
    causal = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    loralab.attach(causal, "lora", rank=2, targets="attention-qv").save(tmp_path / "causal")
    file = read(tmp_path / "causal")
    assert file.labels == []
    assert (file.base["class"], file.base["task_type"]) == ("LlamaForCausalLM", "CAUSAL_LM")

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertModel(BertConfig(num_attention_heads=2, **sizes))

    loralab.attach(Own(), "lora", rank=2, targets=["query"]).save(tmp_path / "own")
    base = read(tmp_path / "own").base
    assert (base["class"], base["task_type"]) == ("Own", None)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_problem_is_named_at_once_and_the_model_stays(folder):
    def change(tensors):
        del tensors["bert.pooler.dense.A"]
        tensors["stray.A"] = torch.zeros(2)
        tensors["bert.pooler.dense.B"] = torch.zeros(7, 2)
        tensors["classifier.bias"][0] = torch.nan

    spoil(folder, change)
    message = refusal(folder)
    for part in (
        "missing tensors: bert.pooler.dense.A",
        "unexpected tensors: stray.A",
        "(7, 2), expected (24, 3)",
        "not finite",
    ):
        assert part in message


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_the_tensors_is_named(folder):
    path = folder / TENSORS
    size = path.stat().st_size
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for bit in range(start * 8, size * 8, (size - start) * 8 // 200 + 1):  # 200 of them, over all tensors
        flip(path, bit)
        with pytest.raises(loralab.UserError, match="changed since the adapter was saved: "):
            read(folder)
        flip(path, bit)
    read(folder)


def test_swapped_tensors_and_another_dtype_are_named(folder):
    whole = load_file(folder / TENSORS)
    A, other = f"{QUERY}.A", "bert.encoder.layer.1.attention.self.query.A"
    spoil(folder, lambda t: t.update({A: whole[other], other: whole[A]}))
    message = refusal(folder)
    assert "tensors changed since the adapter was saved: " in message
    assert A in message
    assert other in message
    spoil(folder, lambda t: t.update(whole))
    for dtype in (torch.int32, torch.float64, torch.bfloat16):
        spoil(folder, lambda t, d=dtype: t.update({A: whole[A].to(d)}))
        assert f"{A} is " in refusal(folder)
        assert "expected F32" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("labels", lambda h: h["labels"].reverse()),
        ("recipe", lambda h: h["recipe"]["factors"].update(alpha=6)),
        ("coverage", lambda h: h["coverage"].update(more=[])),
        ("head", lambda h: h["head"].clear()),
        ("base", lambda h: h["base"].update(name="another")),
        ("name", lambda h: h.update(name="rte")),
        ("tensors", lambda h: h["tensors"].pop("classifier.bias")),
        ("counts", lambda h: h["sha256"].pop("counts")),
        ("constants", lambda h: h["sha256"].update(constants="0" * 64)),
    ],
)
def test_an_edited_field_is_named(folder, field, change):
    header = json.loads((folder / HEADER).read_text())
    change(header)
    (folder / HEADER).write_text(json.dumps(header))
    assert f"{HEADER}: {field} changed since the adapter was saved" in refusal(folder)


def test_the_layout_of_the_header_is_free(folder):
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header, indent=7))
    assert read(folder).name == "mrpc"


def test_a_wrong_base_is_refused_and_the_right_one_in_bfloat16_is_not(folder):
    with pytest.raises(loralab.UserError, match="trained on another base"):
        loralab.load(build("bert", seed=5), folder)
    loralab.load(build("bert", seed=5), folder, check_base=False)
    half = loralab.load(build("bert").to(torch.bfloat16), folder)
    assert half.names == ["mrpc"]
    with pytest.raises(loralab.UserError, match=r"the model has no bert\.encoder"):
        loralab.load(build("mpnet"), folder)


def test_the_hash_is_that_of_the_base_before_training_and_storing():
    hashes = set()
    for method, given in (("lora", {}), ("lora", {"store": "bfloat16"}), ("full", {}), ("head", {})):
        model = build("bert")
        adapters = loralab.attach(model, method, head=True, **given)
        optimizer = torch.optim.SGD(adapters.parameter_groups(lr=0.1))
        model(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        optimizer.step()
        hashes.add(adapters.base_sha256)
    assert len(hashes) == 1


def test_two_adapters_of_different_label_counts_load_beside_each_other(folder, tmp_path):
    other = loralab.attach(build("bert"), "rslora", name="rte", rank=2, head=True, labels=["a", "b"])
    shake(other, "rte")
    other.save(tmp_path / "rte")
    model, batch = build("bert"), rows()
    loralab.load(model, folder)
    adapters = loralab.load(model, tmp_path / "rte")
    assert adapters.names == ["mrpc", "rte"]
    assert adapters.active.names == ("rte",)
    assert torch.equal(model(**batch).logits, other.model(**batch).logits)
    with adapters.use("mrpc"):
        assert model(**batch).logits.shape == (5, 3)
    with pytest.raises(loralab.UserError, match="there already"):
        loralab.load(model, folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / HEADER).unlink(), "no adapter folder"),
        (lambda f: (f / HEADER).write_text("{"), "cannot be read"),
        (lambda f: (f / HEADER).write_text("[]"), "expected a JSON object"),
        (lambda f: (f / HEADER).write_text("{}"), "format None"),
        (lambda f: (f / TENSORS).write_bytes(b"\x10" * 40), "cannot be read"),
        (lambda f: (f / TENSORS).unlink(), "cannot be read"),
        (lambda f: forge(f, lambda h: h["recipe"]["factors"].update(kind="lara")), "newer"),
        (lambda f: forge(f, lambda h: h["recipe"]["factors"].update(rank=-3)), "rank=-3"),
        (lambda f: forge(f, lambda h: h.update(version=3)), "version 3"),
        (lambda f: forge(f, lambda h: h.update(extra=3)), "extra unknown here; it may come from a newer version"),
    ],
)
def test_a_spoiled_folder_is_one_line(folder, damage, message):
    damage(folder)
    assert message in refusal(folder)


# ---- a folder whose parts do not fit, though its checksums do --------------------------------------------------------


def twice(header):
    header["head"] *= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(head="classifier"), "head='classifier': expected a list"),
        (lambda h: h.update(labels=[1, 2, 3]), "labels[0]=1: expected a text"),
        (lambda h: h.update(labels=["no", "no", "so"]), "labels gives no twice"),
        (twice, "head gives classifier twice"),
        (lambda h: h["coverage"]["all-linear"].append(QUERY), "gives " + QUERY + " twice"),
        (lambda h: h.update(name=""), "no name"),
        (lambda h: h["recipe"].update(lr="fast"), "recipe.lr='fast': expected a number"),
        (lambda h: h["recipe"].update(gain=1), "recipe.gain=1: expected true or false"),
        (lambda h: h["recipe"].update(lr=1e400), "recipe.lr=inf: expected a number"),
        (lambda h: h["recipe"]["factors"].update(alpha=10**400), "a number beyond 64 bits"),
        (lambda h: h["recipe"]["factors"].update(rank=True), "rank=True: expected a whole number"),
        (lambda h: h["recipe"]["factors"].update(rank=10**8), "rank 100000000: no side of a tensor"),
        (lambda h: h["recipe"]["factors"].update(rank=4), "is (3, 24), expected (4, 24)"),
        (lambda h: h["recipe"].update(gain=True), f"missing tensors: {QUERY[:10]}"),
        (lambda h: h["recipe"].update(factors=None), "adapts no layer"),
        (lambda h: h["recipe"].update(ranks={"x": {"rank": 2, "share": ["s"]}}), "share=a list of 1"),
        (lambda h: h["recipe"].update(ranks={"x": 2}), "rank map and list of layers differ"),
        (lambda h: h["recipe"].pop("train"), "recipe.train missing"),
        (lambda h: h["recipe"].update(colour="red"), "recipe.colour unknown"),
        (lambda h: h["base"].update(sha256=7), "base.sha256=7"),
        (lambda h: h.update(head=["classifier", "bert"]), "inside a module of the head"),
        (lambda h: h.update(head=["classifier", "bert.pooler.dense"]), "both adapted and a module of the head"),
        (lambda h: h.update(head=[""]), "0 characters"),
        (lambda h: h["coverage"].update({"all-linear": []}), "adapts layers, and it lists none"),
        (lambda h: h["coverage"]["all-linear"].append("nowhere"), "missing tensors: nowhere.A"),
        (lambda h: h["tensors"]["classifier.bias"].update(shape="wide"), "shape='wide'"),
    ],
)
def test_a_header_that_cannot_be_is_refused(folder, change, message):
    forge(folder, change)
    assert message in refusal(folder)
    with pytest.raises(loralab.UserError):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.B"), f"missing tensors: {QUERY}.B"),
        (lambda t: t.update({f"{QUERY}.m": torch.ones(24)}), f"unexpected tensors: {QUERY}.m"),
        (lambda t: t.update({f"{QUERY}.B": torch.ones(24, 2)}), f"{QUERY}.B is (24, 2), expected (24, 3)"),
        (lambda t: t.update({f"{QUERY}.B": torch.ones(24)}), "expected two dimensions"),
        (lambda t: t.update({f"{QUERY}.B": torch.full((24, 3), torch.nan)}), "not finite"),
        (lambda t: t.update({f"{QUERY}.B": torch.ones(24, 3, dtype=torch.int32)}), "is int32, expected float32"),
        (lambda t: t.update({f"{QUERY}.B": torch.ones(24, 3).to(torch.float8_e4m3fn)}), "is float8_e4m3fn, expected"),
        (lambda t: [t.pop(f"classifier.{key}") for key in ("weight", "bias")], "no tensors of the head classifier"),
    ],
)
def test_tensors_that_cannot_be_are_refused_without_a_model(folder, change, message):
    spoil(folder, change)
    record(folder)
    assert message in refusal(folder)
    with pytest.raises(loralab.UserError) as caught:
        read(folder)
    assert message in str(caught.value)


def test_a_layer_of_another_size_is_refused_by_the_model(folder):
    spoil(folder, lambda t: t.update({f"{QUERY}.B": torch.ones(25, 3)}))
    record(folder)
    read(folder)
    assert f"{QUERY}.B is (25, 3), expected (24, 3)" in refusal(folder)


def test_a_projection_of_a_huge_rank_is_refused_before_it_is_drawn(tmp_path):
    loralab.attach(build("bert"), "vera", rank=5, targets="attention-qv").save(tmp_path)
    forge(tmp_path, lambda h: h["recipe"]["factors"].update(rank=10**8))  # 48 GiB and more
    assert "rank 100000000" in refusal(tmp_path)


def test_modules_that_loralab_put_in_are_no_layers_of_the_model(folder):
    model = build("bert")
    loralab.load(model, folder)
    forge(folder, lambda h: h["coverage"].update({"all-linear": [f"{QUERY}.base"]}))
    with pytest.raises(loralab.UserError):
        loralab.load(model, folder, name="other")


def test_a_stored_base_stays_as_it_was_when_a_load_fails(tmp_path):
    loralab.attach(build("bert"), "lora", rank=2, store="int8", head=True).save(tmp_path)
    spoil(tmp_path, lambda t: t.update({"classifier.bias": torch.ones(4)}))
    record(tmp_path)
    assert "classifier.bias is (4,), expected (3,)" in refusal(tmp_path)


# ---- folders of 0.1.0 ------------------------------------------------------------------------------------------------


def fixed_model():
    """The model on which loralab 0.1.0 made the fixtures: every weight is decided by its place, the same everywhere.

    Their tensors are off their starts, and expected.json holds what 0.1.0 answered to IDS.
    """
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 8}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((((torch.arange(p.numel()) * 37 + 11 * i) % 101 - 50) / 128).view_as(p))
    return model


IDS = torch.tensor([[2, 5, 7, 3], [2, 9, 4, 3]])


@pytest.mark.parametrize("name", sorted(path.name for path in OLD.iterdir()))
def test_a_folder_of_0_1_0_loads_with_a_note_and_the_same_outputs(name, tmp_path):
    model, plain = fixed_model(), fixed_model()
    with pytest.warns(FolderNote, match="without checksums"):
        adapters = loralab.load(model, OLD / name)
    expected = torch.tensor(json.loads((OLD / name / "expected.json").read_text()))
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(plain(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    adapters.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loralab.load(plain, tmp_path)
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)


def test_a_folder_of_0_1_0_is_checked_for_what_it_records(tmp_path):
    for file in (OLD / "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    key = QUERY + ".B"
    spoil(tmp_path, lambda t: t.update({key: (t[key] * 1e6).to(torch.int32)}))
    with pytest.raises(loralab.UserError, match=f"{key} is int32, expected float32"):
        loralab.load(fixed_model(), tmp_path)


# ---- one folder, one adapter -----------------------------------------------------------------------------------------


def test_save_and_export_never_share_a_folder(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    adapters.export(tmp_path / "peft")
    with pytest.raises(loralab.UserError, match="holds an adapter in another layout"):
        adapters.save(tmp_path / "peft")
    with pytest.raises(loralab.UserError, match="holds an adapter in another layout"):
        adapters.export(folder)
    assert not (tmp_path / "peft" / HEADER).exists()
    assert not (folder / PEFT_HEADER).exists()
    for file in folder.iterdir():
        (tmp_path / "peft" / file.name).write_bytes(file.read_bytes())
    assert "holds two adapters" in refusal(tmp_path / "peft")


def test_saving_again_replaces_the_adapter(folder):
    adapters = loralab.load(build("bert"), folder)
    shake(adapters, "mrpc", seed=4)
    adapters.save(folder)
    again = loralab.load(build("bert"), folder)
    assert all(torch.equal(t, again.state()[key]) for key, t in adapters.state().items())


def test_values_that_are_not_finite_are_not_written(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    with torch.no_grad():
        adapters.state()[f"{QUERY}.B"][0, 0] = torch.inf
    for write in (adapters.save, adapters.export):
        with pytest.raises(loralab.UserError, match="not finite"):
            write(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_a_user_error(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(loralab.UserError, match="cannot write"):
        adapters.save(tmp_path / "file" / "adapter")


def test_peft_folders_with_what_is_not_read_here_are_refused(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    adapters.export(tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    with pytest.raises(loralab.UserError, match="lora_bias=True"):
        loralab.load(build("bert"), tmp_path / "peft")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mrpc", "mrpc"),
        ("lora-v1.0", "lora-v1_0"),
        ("qwen2.5 run", "qwen2_5_run"),
        ("keys", "keys_"),
        ("forward", "forward_"),
        ("...", "adapter"),
        ("", "adapter"),
        ("größe", "gr_e"),
    ],
)
def test_any_text_becomes_a_name_that_an_adapter_can_have(text, name, folder):
    assert adapter_name(text) == name
    assert loralab.load(build("bert"), folder, name=name).names == [name]


def test_an_own_folder_with_a_name_that_no_adapter_can_have_loads_under_the_nearest(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    adapters.save(tmp_path / "other", saved_as="sst-2 v1.5")
    assert loralab.load(build("bert"), tmp_path / "other").names == ["sst-2_v1_5"]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 1}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "deeper than 64 levels"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deeper than 64 levels"),
        (b'{"a": ' + b"[" * 200_000, "deeper than 64 levels"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read"),
        (b'{"a": "\\ud800"}', "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b'"a"', "expected a JSON object, got str"),
        (b"7", "expected a JSON object, got int"),
        (b" " * (disk.MAX_JSON + 1), "larger than"),
    ],
    ids=range(11),
)
def test_json_is_read_within_limits(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(loralab.UserError) as caught:
        disk.read_json(path)
    assert message in str(caught.value)
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert disk.read_json(path) == {"a": "\N{GRINNING FACE}"}


def test_only_regular_files_are_read(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "folder"):
        for read_one in (disk.read_json, disk.read_tensors):
            with pytest.raises(loralab.UserError, match="no regular file"):
                read_one(place)
    for name in (HEADER, TENSORS):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        assert "no regular file" in refusal(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(whole)
    moved = tmp_path / "elsewhere"  # as in the cache of the hub
    (folder / TENSORS).rename(moved)
    (folder / TENSORS).symlink_to(moved)
    read(folder)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 8, "no safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "no safetensors file"),
        (safetensors([1]), "expected a JSON object"),
        (safetensors({"a": 1}), "is not described by"),
        (safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"0000"), "does not take"),
        (safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"0000"), "not whole numbers"),
        (safetensors({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, b"0000"), "not whole numbers"),
        (safetensors({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000"), "has dtype"),
        (safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"00000000"), "the file has 8"),
        (
            safetensors({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"0000"),
            "overlap or leave a gap",
        ),
        (
            b'\x70\0\0\0\0\0\0\0{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": '
            b'{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}00',
            "cannot be read",
        ),
    ],
    ids=range(12),
)
def test_a_safetensors_file_is_checked_before_anything_is_allocated(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(loralab.UserError) as caught:
        disk.read_tensors(path)
    assert message in str(caught.value)


def test_what_safetensors_writes_is_what_the_headers_say(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.ones((), dtype=torch.int64), "c": torch.empty(0, 4).bfloat16()}
    disk.write_tensors(tmp_path / "x", tensors, {"labels": "[]"})
    assert disk.tensor_headers(tmp_path / "x") == {"a": ("F32", (3, 5)), "b": ("I64", ()), "c": ("BF16", (0, 4))}
    assert disk.read_metadata(tmp_path / "x") == {"labels": "[]"}
    assert all(torch.equal(t, tensors[key]) for key, t in disk.read_tensors(tmp_path / "x").items())


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "out"
    (tmp_path / "a/out.partial").mkdir(parents=True)
    (tmp_path / "a/out.partial/left").write_text("by a killed process")

    def fill():
        with disk.new_folder(out) as folder:
            (folder / "one").write_text("1")
            assert not out.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list((tmp_path / "a").iterdir()) == []
    with disk.new_folder(out) as folder:
        (folder / "in").mkdir()
        (folder / "in/one").write_text("1")
    assert [path.name for path in out.rglob("*")] == ["in", "one"]
    assert list((tmp_path / "a").iterdir()) == [out]
    with pytest.raises(OSError, match="."), disk.new_folder(out) as folder:
        (folder / "two").write_text("2")
    assert [path.name for path in out.rglob("*")] == ["in", "one"]
