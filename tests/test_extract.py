"""`loralab extract`: what the command writes is the tuned model on its base, and what it tells is what it lacks."""

import json

import pytest
import torch
from archs import rows
from test_cli import cli, refused  # noqa: F401 (fixtures)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import loralab

RANK = 3


@pytest.fixture
def tuned(tiny, tmp_path):
    """A classifier whose query and value weights moved by a matrix of rank 3, with a head and labels of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny, id2label={0: "bad", 1: "so-so", 2: "good"}, label2id={"bad": 0, "so-so": 1, "good": 2}
    ).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("query.weight", "value.weight")):
                p += (
                    0.1
                    * torch.randn(len(p), RANK, generator=generator)
                    @ torch.randn(RANK, p.shape[1], generator=generator)
                )
            if key.startswith("classifier"):
                p += torch.randn(p.shape, generator=generator)
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "tuned")
    return model


def logits(model):
    batch = {key: t % 14 for key, t in rows().items()}
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_a_change_of_low_rank_comes_whole_with_head_and_labels(tuned, tiny, cli, tmp_path):  # noqa: F811
    code, out, _ = cli("extract", "tuned", "--model", tiny, "--rank", RANK, "--targets", "attention-qv", "--out", "ex")
    assert code == 0
    assert "a LoRA of rank 3 on 4 layers" in out
    assert "changed too" not in out
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    loralab.load(base, tmp_path / "ex")
    torch.testing.assert_close(logits(base), logits(tuned), rtol=0, atol=1e-4)
    assert base.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    plain = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    assert (logits(plain) - logits(tuned)).abs().max() > 0.1
    assert cli("verify", "ex", "--model", tiny)[0] == 0


def test_json_has_the_error_of_each_layer_and_what_else_changed(tuned, tiny, cli, tmp_path):  # noqa: F811
    with torch.no_grad():
        tuned.bert.embeddings.LayerNorm.weight += 0.25
    tuned.save_pretrained(tmp_path / "tuned")
    given = ("--model", tiny, "--rank", 2, "--targets", ".*query", "--json", "--name", "mine")
    code, out, _ = cli("extract", "tuned", *given, "--out", "ex")
    told = json.loads(out)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    assert (code, len(told["layers"])) == (0, 2)
    for path, error in told["layers"].items():
        D = (after[f"{path}.weight"] - before[f"{path}.weight"]).detach().double()
        values = torch.linalg.svdvals(D)
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    norm = "bert.embeddings.LayerNorm.weight"
    changed = {norm, *(f"bert.encoder.layer.{i}.attention.self.value.weight" for i in range(2))}
    assert told["left"].keys() == changed
    assert told["left"][norm] == pytest.approx(float(0.25 * len(before[norm]) ** 0.5 / before[norm].norm()), rel=1e-4)
    assert loralab.adapters.read(tmp_path / "ex").name == "mine"


def test_models_of_other_shapes_are_refused(tiny, bert_of_another_size, refused):  # noqa: F811
    told = refused("extract", bert_of_another_size, "--model", tiny, "--out", "ex")
    assert "they are not of one base" in told
    assert "--rank 0: expected 1 or more" in refused("extract", tiny, "--model", tiny, "--rank", 0, "--out", "ex")


@pytest.fixture
def bert_of_another_size(tiny, tmp_path):
    from transformers import AutoModel, BertConfig

    config = BertConfig(vocab_size=14, hidden_size=12, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20)
    AutoModel.from_config(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "other")
    return tmp_path / "other"
