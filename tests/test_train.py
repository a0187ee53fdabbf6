"""Runs: they learn, repeat bit for bit, go on after an interruption, and take the same step on many processes."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from archs import CONFIGS, SIZES
from conftest import tiny_model, train_on_two_processes
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    EsmConfig,
    LongformerConfig,
    OPTConfig,
    XLMRobertaConfig,
)

import loralab
from loralab import UserError, models, objectives
from loralab.data.batches import epoch_batches, longest, sorted_batches
from loralab.disk import read_header
from loralab.recipe import NAMED
from loralab.run import Settings, train
from loralab.run.folder import changed
from loralab.run.setup import prepare


def settings(tiny, own, out, kind="class", **given) -> Settings:
    defaults = {"lr": 2e-2, "epochs": 2, "batch_size": 20, "method": "lora", "rank": 3, "max_length": 32}
    if given.get("method") in ("full", "head"):
        del defaults["rank"]
    return Settings(
        task=str(own[kind]), model=str(tiny), text=("sentence",), label="label", out=out, **{**defaults, **given}
    )


def tensors(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter.safetensors")


def metrics(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(result):
    return {key: value for key, value in result.items() if key not in ("time", "memory")}


@pytest.mark.few(5)
@pytest.mark.parametrize("method", NAMED)
def test_a_run_learns_and_writes_what_the_contract_says(tiny, own, tmp_path, method):
    r = NAMED[method][0]
    learns = r.factors is not None or r.learn_base == "all"  # a head, or biases, on random features need not
    for i, (factor, epochs) in enumerate(((10, 6), (2.5, 12), (40, 6), (10, 20))):  # a tiny model, short runs
        folder = tmp_path / str(i)
        given = {"method": method, "rank": None, "epochs": epochs, "lr": factor * r.lr}
        result = train(settings(tiny, own, folder, **given))
        if result["metric"]["selected"] > 0.9 or not learns:
            break
    else:
        raise AssertionError(f"{method} does not learn in any of four runs")
    assert result == json.loads((folder / "result.json").read_text())
    assert result["metric"]["name"] == "accuracy"
    history = metrics(folder)
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    held_out = [row["held_out"]["accuracy"] for row in history]
    assert result["selected_epoch"] == 1 + held_out.index(max(held_out))
    assert result["metric"]["last"] == history[-1]["validation"]["accuracy"]
    assert result["metric"]["best_on_validation"] == max(row["validation"]["accuracy"] for row in history)
    rows = result["protocol"]["train"], result["protocol"]["held_out"]
    assert (sum(rows), rows[1]) == (192, pytest.approx(19.2, abs=1))
    assert result["protocol"]["selection"] == "held-out"
    assert not result["protocol"]["optimistic"]
    assert not (folder / "checkpoint").exists()
    assert read_header(folder / "adapter/adapter.json")["labels"] == ["cat", "dog"]
    said = load_file(folder / "predictions.safetensors")  # of the selected epoch
    right = said["validation/logits"].argmax(-1) == said["validation/labels"]
    assert right.double().mean().item() == pytest.approx(result["metric"]["selected"], abs=1e-12)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "bert"])
def test_every_architecture_trains_from_a_folder(own, tmp_path, kind):
    result = train(settings(tiny_model(tmp_path / kind, kind), own, tmp_path / "run", epochs=12, lr=5e-3))
    assert result["metric"]["selected"] > 0.9
    assert any(key.endswith(".B") for key in tensors(tmp_path / "run"))


def test_regression_learns(tiny, own, tmp_path):
    result = train(settings(tiny, own, tmp_path / "r", "value", epochs=8))
    assert result["metric"]["name"] == "pearson"
    assert result["metric"]["selected"] > 0.8


@pytest.mark.few(1)
@pytest.mark.parametrize("given", [{"dropout": 0.3}, {"dtype": "bfloat16"}, {"store": "bfloat16"}, {"accumulate": 3}])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tiny, own, tmp_path, given):
    results = [train(settings(tiny, own, tmp_path / str(i), seed=i // 2, **given)) for i in range(3)]
    assert timeless(results[0]) == timeless(results[1])
    first, again, other = (tensors(tmp_path / str(i)) for i in range(3))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("every", [0, 4])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tiny, own, tmp_path, cut_off, every):
    given = {"epochs": 3, "dropout": 0.3, "schedule": "cosine", "checkpoint_every": every}
    whole = train(settings(tiny, own, tmp_path / "whole", **given))
    with cut_off(17), pytest.raises(KeyboardInterrupt):  # the last but second step of the second epoch
        train(settings(tiny, own, tmp_path / "cut", **given))
    assert not (tmp_path / "cut/result.json").exists()
    torch.manual_seed(12345)  # what the process did meanwhile must not matter
    resumed = train(settings(tiny, own, tmp_path / "cut", resume=True, **given))
    assert timeless(resumed) == timeless(whole)
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (load_file(tmp_path / name / "predictions.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert train(settings(tiny, own, tmp_path / "cut", resume=True, **given)) == resumed  # finished: nothing runs


def test_parts_of_a_batch_take_the_step_of_the_whole(tiny, own, tmp_path):
    for parts in (1, 3):
        train(settings(calm(tiny, tmp_path), own, tmp_path / str(parts), accumulate=parts, dtype="float32"))
    a, b = tensors(tmp_path / "1"), tensors(tmp_path / "3")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-4)


def test_the_loss_reported_is_the_mean_over_the_rows(tiny, own, tmp_path):
    """At a vanishing learning rate the loss of an epoch is that of the model as it began."""
    given = {"lr": 1e-30, "epochs": 1, "dtype": "float32", "weight_decay": 0.0}
    run = prepare(settings(calm(tiny, tmp_path), own, tmp_path / "x", **given))
    losses = []
    for row in range(len(run.train)):
        batch = {key: torch.tensor([column[row]]) for key, column in run.train.columns.items()}
        with torch.no_grad():
            logits = run.model(**batch).logits[0]
        losses.append(float(logits.logsumexp(0) - logits[run.train.labels[row]]))
    train(settings(tmp_path / "calm", own, tmp_path / "r", **given))
    assert metrics(tmp_path / "r")[0]["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def calm(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model without dropout, whose masks would depend on how rows are divided."""
    folder = tmp_path / "calm"
    folder.mkdir(exist_ok=True)
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    return folder


def test_two_processes_give_the_numbers_of_one(tiny, own, tmp_path):
    model = calm(tiny, tmp_path)
    one = train(settings(model, own, tmp_path / "one", dtype="float32"))  # auto is measured, in each process
    s = settings(model, own, tmp_path / "two")
    flags = ["--dtype", "float32"]
    flags += ["--task", s.task, "--model", s.model, "--text", "sentence", "--label", "label", "--out", str(s.out)]
    flags += ["--lr", "0.02", "--epochs", "2", "--batch-size", "20", "--rank", "3", "--max-length", "32"]
    train_on_two_processes(flags)
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert two["metrics"].keys() == one["metrics"].keys()
    histories = [metrics(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*histories, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)
        assert b["validation"] == pytest.approx(a["validation"], abs=1e-6)
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-4)


def test_patience_stops_early_and_selection_last_takes_the_last(tiny, own, tmp_path):
    early = train(settings(tiny, own, tmp_path / "a", lr=1e-9, epochs=6, patience=2))
    assert len((tmp_path / "a/metrics.jsonl").read_text().splitlines()) == 3
    assert early["selected_epoch"] == 1
    last = train(settings(tiny, own, tmp_path / "b", selection="last"))
    assert (last["selected_epoch"], last["protocol"]["held_out"], last["protocol"]["train"]) == (2, 0, 192)
    assert train(settings(tiny, own, tmp_path / "c", selection="validation"))["protocol"]["optimistic"]


def test_a_run_can_take_a_part_of_the_rows_the_same_for_every_seed(tiny, own, tmp_path):
    results = [
        train(settings(tiny, own, tmp_path / str(i), seed=i, epochs=1, train_rows=61, validation_rows=17))
        for i in range(2)
    ]
    assert [r["protocol"]["train"] for r in results] == [61, 61]
    assert "train: 61 of 173 rows, drawn by the data's hash" in results[0]["notes"]
    said = [load_file(tmp_path / str(i) / "predictions.safetensors")["validation/labels"] for i in range(2)]
    assert len(said[0]) == 17
    assert torch.equal(*said)
    shares = [said[0].double().mean(), 0.5]
    assert abs(shares[0] - shares[1]) < 0.2  # stratified
    whole = train(settings(tiny, own, tmp_path / "whole", epochs=1, train_rows=10**6, validation_rows=10**5))
    assert whole["protocol"]["train"] == 173
    assert "train: all 173 rows that there are, fewer than the 1000000 asked for" in whole["notes"]
    assert "validation: all 48 rows that there are, fewer than the 100000 asked for" in whole["notes"]
    exact = train(settings(tiny, own, tmp_path / "exact", epochs=1, train_rows=173))
    assert not [note for note in exact["notes"] if "asked for" in note]


def test_one_training_of_many_ranks_is_evaluated_at_each(tiny, own, tmp_path):
    s = settings(tiny, own, tmp_path / "run", "value", method="dylora", rank=3, epochs=1, dtype="float32")
    result = train(s)
    assert list(result["by_rank"]) == ["1", "2", "3"]
    assert result["by_rank"]["3"] == result["metrics"]  # training is evaluated at the full rank
    rows = prepare(s).validation["validation"]
    model, _ = models.classifier(str(tiny), 1, True, torch.float32, 0)
    adapters = loralab.load(model.eval(), tmp_path / "run" / "adapter")
    said = []
    for i in range(len(rows.labels)):  # a row at a time, by the adapter as it was saved
        row = {key: torch.tensor([values[i]]) for key, values in rows.columns.items()}
        with torch.no_grad(), adapters.use(adapters.names[0], rank=2):
            said.append(float(model(**row).logits))
    at_two = result["by_rank"]["2"]["pearson"]
    assert at_two == pytest.approx(np.corrcoef(said, rows.labels.numpy())[0, 1], abs=1e-5)
    assert abs(at_two - result["by_rank"]["3"]["pearson"]) > 1e-2


@pytest.mark.parametrize("kind", ["class", "noise"])
def test_a_run_that_ends_at_one_answer_for_all_rows_says_so(tiny, own, tmp_path, kind):
    texts = [line.rpartition(",")[0] for line in own["class"].read_text().splitlines()[1:]]
    values = np.random.default_rng(5).normal(size=len(texts))  # no text tells its value
    noise = tmp_path / "noise.csv"
    noise.write_text("sentence,label\n" + "".join(f"{t},{v:.3f}\n" for t, v in zip(texts, values, strict=True)))
    result = train(settings(tiny, own | {"noise": noise}, tmp_path / "r", kind, lr=1e-9, epochs=1, dtype="float32"))
    assert result["collapsed"]
    assert result["collapsed_held_out"]
    assert len(result["warnings"]) == 1
    assert "did not learn" in result["warnings"][0]


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint(tiny, own, tmp_path, monkeypatch):
    row = objectives.OBJECTIVES["classification"]

    def burst(logits, labels):
        burst.calls += 1
        return row.loss(logits, labels) * (float("nan") if burst.calls == 12 else 1.0)

    burst.calls = 0
    monkeypatch.setitem(objectives.OBJECTIVES, "classification", dataclasses.replace(row, loss=burst))
    with pytest.raises(
        UserError, match=r"loss is nan at step 12 \(epoch 2\), lr .*last good checkpoint is .*checkpoint"
    ):
        train(settings(tiny, own, tmp_path / "r"))
    assert not (tmp_path / "r/result.json").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_length": 41}, "takes 40 tokens at most"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"accumulate": 33}, "empty parts"),
        ({"rank": 99}, "rank 99"),
        ({"targets": "nothing"}, "match no layer"),
        ({"method": "loras"}, "did you mean 'lora'"),
        ({"label": "lable"}, "lable"),
        ({"model": "./nowhere"}, "nowhere"),
    ],
)
def test_mistakes_write_nothing(tiny, own, tmp_path, given, told):
    with pytest.raises(UserError) as caught:
        train(Settings(**{"task": str(own["class"]), "model": str(tiny), "text": ("sentence",), "label": "label",
                          "max_length": 32, "out": tmp_path / "r", **given}))  # fmt: skip
    assert told in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_folder_of_another_run_is_left_alone(tiny, own, tmp_path):
    train(settings(tiny, own, tmp_path / "r", epochs=1))
    with pytest.raises(UserError, match="holds another run"):
        train(settings(tiny, own, tmp_path / "r", epochs=1))
    with pytest.raises(UserError, match="epochs was 1, now 2"):
        train(settings(tiny, own, tmp_path / "r", epochs=2, resume=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        train(settings(tiny, own, tmp_path / "mine"))


HEADS = {"num_hidden_layers": 1, "num_attention_heads": 3}
OFFSETS = {  # tables of positions that begin after a padding row, or with an offset, and some that do not
    **{kind: config for kind, config in CONFIGS.items() if kind != "llama"},  # rotary positions have no end
    "xlm-roberta": XLMRobertaConfig(**SIZES, pad_token_id=1),
    "longformer": LongformerConfig(**SIZES, pad_token_id=1, attention_window=8),
    "esm": EsmConfig(**SIZES, pad_token_id=1, mask_token_id=4, position_embedding_type="absolute"),
    "opt": OPTConfig(vocab_size=101, hidden_size=24, word_embed_proj_dim=24, ffn_dim=37, pad_token_id=1, **HEADS),
    "bart": BartConfig(
        vocab_size=101, d_model=24, encoder_ffn_dim=37, decoder_ffn_dim=37, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=3, decoder_attention_heads=3, pad_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFFSETS)
def test_a_model_takes_its_longest_row_and_no_longer_one(kind):
    config = copy.deepcopy(OFFSETS[kind])
    config.max_position_embeddings = 40
    model = AutoModelForSequenceClassification.from_config(config).eval()

    def take(tokens):
        ids = torch.randint(5, 100, (2, tokens))
        ids[:, -1] = 2  # the end of a text, where a model looks for it
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    assert take(longest(model)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        take(longest(model) + 1)


def test_long_rows_are_cut_and_counted(tiny, own, tmp_path):
    result = train(settings(tiny, own, tmp_path / "r", max_length=5, epochs=1))
    assert any("rows are longer than 5 tokens and were cut; the longest has " in note for note in result["notes"])


def test_batches_hold_every_row_once_in_an_order_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(3, 50, 1237)
    batches = epoch_batches(lengths, 16, seed=1, epoch=2)
    assert sorted(row for batch in batches for row in batch) == list(range(1237))
    assert batches == epoch_batches(lengths, 16, seed=1, epoch=2)
    assert batches != epoch_batches(lengths, 16, seed=1, epoch=3)
    assert batches != epoch_batches(lengths, 16, seed=2, epoch=2)
    padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
    assert padded < 1.1 * lengths.sum()
    assert sorted(row for batch in sorted_batches(lengths, 16) for row in batch) == list(range(1237))


def test_a_run_of_an_older_version_goes_on_with_settings_it_did_not_know():
    now = json.loads(json.dumps(Settings(task="cola").to_json()))
    before = {key: value for key, value in now.items() if key != "set"}
    before["plan"] = before.pop("policy")
    assert changed({"settings": before}, now) == []
    assert changed({"settings": before}, now | {"set": ["dropout=0.1"]}) == ["set"]
    assert changed({"settings": before | {"plan": "drop"}}, now) == ["policy"]
