"""Objectives: the laws that a run of every kind of task keeps, and what each kind computes, against slow oracles."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, Largest, train_on_two_processes
from safetensors.torch import load_file
from sklearn import metrics as sklearn
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
    XLNetConfig,
)

import loralab
from loralab import models as named_models
from loralab import objectives
from loralab.cli import main
from loralab.data.batches import IGNORED, LONGEST, collate, cut_at, longest, sorted_batches
from loralab.data.metrics import upward
from loralab.errors import UserError
from loralab.objectives import Encoding, generation, ragged, tagging, vocabulary
from loralab.run import Settings, train, train_together
from loralab.run.estimate import EstimateSettings, estimate
from loralab.run.fit import fit
from loralab.run.setup import prepare, selected_by
from loralab.run.tune import tune
from loralab.study import estimate as study_estimate
from loralab.study import search
from loralab.study.bar import StudyBar
from loralab.study.run_study import run_study
from loralab.study.runners import runner
from loralab.study.statistics.resample import by_rows, resampled
from loralab.study.statistics.table import comparisons, places, summaries
from loralab.study.toml import define

ADJECTIVES = ["red", "blue", "big", "small"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


# ---- a small file of each kind ---------------------------------------------------------------------------------------


def rows_of(kind: str, count: int, seed: int) -> list[dict]:
    """Rows that a small model can learn something of."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        animal, extra = random.choice(["cat", "dog"]), list(random.choice(ADJECTIVES, random.integers(0, 5)))
        words = ["the", *extra, animal, "sees"]
        text, score = " ".join(words), float(len(extra)) + 0.5
        found = sorted({str(word) for word in extra})
        made.append(
            {
                "classification": {"text": text, "label": str(animal)},
                "regression": {"text": text, "label": score},
                "multi-label": {"text": text, "labels": found},
                "tagging": {
                    "tokens": words,
                    "tags": ["B-ADJ" if w in ADJECTIVES else "B-CAT" if w == "cat" else "O" for w in words],
                },
                "multiple-choice": {
                    "question": text,
                    "choices": ["a cat", "a dog", "the big"][: 2 + len(extra) % 2],
                    "answer": ["cat", "dog"].index(animal),
                },
                "similarity": {"sentence1": text, "sentence2": f"a {animal}", "score": len(extra) / 4},
                "triplets": {
                    "anchor": text,
                    "positive": f"a {animal} likes",
                    "negative": f"a {'dog' if animal == 'cat' else 'cat'} likes",
                },
                "pairs": {"anchor": text, "positive": f"a {animal} {' '.join(extra)}"},
                "chat": {
                    "messages": [
                        {"role": "user", "content": text},
                        {"role": "assistant", "content": f"a {animal}"},
                        {"role": "user", "content": "likes"},
                        {"role": "assistant", "content": f"the {animal} likes"},
                    ]
                },
                "completion": {"prompt": text, "completion": f" a {animal} likes the {animal}"},
                "text": {"text": text},
                "instruction": {"instruction": f"a {animal}", "input": " ".join(extra), "output": f"a {animal} sees"},
                "sharegpt": {
                    "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": f"a {animal}"}]
                },
                "seq2seq": {"source": text, "target": f"a {animal} {' '.join(reversed(extra))}"},
            }[kind]
        )
    return made


MODEL_OBJECTIVE = {
    "regression": "classification", "triplets": "similarity", "pairs": "similarity", "chat": "causal",
    "completion": "causal", "text": "causal", "instruction": "causal", "sharegpt": "causal",
}  # fmt: skip
CAUSAL = ("chat", "completion", "text", "instruction", "sharegpt")
MODEL = {**dict.fromkeys(CAUSAL, "llama"), "seq2seq": "t5"}
KINDS = [
    "classification", "regression", "multi-label", "tagging", "multiple-choice", "similarity", "triplets", "pairs",
    *CAUSAL, "seq2seq",
]  # fmt: skip
SOME = ("multi-label", "tagging", "multiple-choice", "similarity", "chat", "seq2seq")  # one of each objective
DIVIDED = [kind for kind in KINDS if kind != "pairs"]  # the others' steps cannot be divided


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 37}
T5 = {"d_model": 24, "d_kv": 7, "d_ff": 37, "num_layers": 2, "num_heads": 3, "dropout_rate": 0}
BASES = {  # kind -> class of transformers, and a config without dropout
    "bert": (
        AutoModel,
        BertConfig(**SIZES, max_position_embeddings=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
    ),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=64)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(**T5)),
}


def made_base(folder: Path, kind: str, model_class, config, **changed) -> Path:
    """A model folder, its weights random; the tokenizer marks the ends of a text as BERT's or T5's does, or not."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "<user>", "<assistant>", "<system>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if kind == "t5":
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **(names | changed))
    tokenizer.chat_template = TEMPLATE if kind == "llama" else None
    tokenizer.save_pretrained(folder)
    config.vocab_size, config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 31, 0, 4, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A model folder of each architecture, without dropout, its weights random."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: made_base(root / kind, kind, *copy.deepcopy(base)) for kind, base in BASES.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rows")
    for kind in KINDS:
        lines = [json.dumps(row) for row in rows_of(kind, 90, 3)]
        (root / f"{kind}.jsonl").write_text("\n".join(lines))
    return {kind: root / f"{kind}.jsonl" for kind in KINDS}


def settings(kind, bases, files, out, **changed) -> Settings:
    usual = {"batch_size": 12, "max_length": 40, "rank": 3, "lr": 0.02, "epochs": 2, "dtype": "float32"}
    base = bases[MODEL.get(kind, "bert")]
    return Settings(task=str(files[kind]), model=str(base), out=out, **(usual | changed))


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter.safetensors")


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_the_base_does_not(kind, bases, files, tmp_path):
    s = settings(kind, bases, files, tmp_path / "run", epochs=12, batch_size=8, lr=0.003, rank=6, selection="last")
    before = {key: t.clone() for key, t in prepare(s).model.state_dict().items() if "lora" not in key}
    train(s)
    losses = [record["train_loss"] for record in history(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]  # the base is random and frozen
    again = prepare(dataclasses.replace(s, out=tmp_path / "again")).model.state_dict()
    assert all(torch.equal(t, again[key]) for key, t in before.items())
    assert any(t.abs().sum() > 0 for key, t in adapter(tmp_path / "run").items() if key.endswith("B"))


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", DIVIDED)
def test_a_step_is_the_same_however_its_rows_are_divided(kind, bases, files, tmp_path):
    for parts in (1, 3, 5):
        train(settings(kind, bases, files, tmp_path / str(parts), accumulate=parts))
    whole = history(tmp_path / "1")
    for parts in ("3", "5"):
        for a, b in zip(whole, history(tmp_path / parts), strict=True):
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        for key, t in adapter(tmp_path / "1").items():
            if kind == "multiple-choice" and t.shape == (1,):
                continue  # the bias of the score: the same for all choices, so its gradient is rounding alone
            torch.testing.assert_close(adapter(tmp_path / parts)[key], t, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["completion", *(pytest.param(k, marks=pytest.mark.slow) for k in ("tagging", "seq2seq"))]
)
def test_two_processes_take_the_step_of_one(kind, bases, files, tmp_path):
    s = settings(kind, bases, files, tmp_path / "one")
    train(s)
    flags = ["--task", s.task, "--model", s.model, "--out", str(tmp_path / "two"), "--dtype", "float32"]
    flags += ["--lr", "0.02", "--epochs", "2", "--batch-size", "12", "--rank", "3", "--max-length", "40"]
    train_on_two_processes(flags)
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["validation"] == pytest.approx(a["validation"], abs=1e-3)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [k if k in SOME else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_runs_in_one_pass_are_the_runs_alone(kind, bases, files, tmp_path):
    changed = ({"lr": 0.02}, {"lr": 0.01, "rank": 2, "seed": 4}, {"method": "vera", "rank": 8, "lr": 0.03})
    many = [settings(kind, bases, files, tmp_path / f"pass-{i}", **more) for i, more in enumerate(changed)]
    assert all(isinstance(outcome, dict) for outcome in train_together(many))
    for i, more in enumerate(changed):
        train(settings(kind, bases, files, tmp_path / f"alone-{i}", **more))
        for a, b in zip(history(tmp_path / f"alone-{i}"), history(tmp_path / f"pass-{i}"), strict=True):
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(kind, bases, files, tmp_path, cut_off):
    changed = {"eval_every": 4, "checkpoint_every": 3}
    whole = train(settings(kind, bases, files, tmp_path / "whole", **changed))
    with cut_off(6), pytest.raises(KeyboardInterrupt):
        train(settings(kind, bases, files, tmp_path / "parts", **changed))
    parts = train(settings(kind, bases, files, tmp_path / "parts", resume=True, **changed))
    assert parts["metrics"] == whole["metrics"]
    a, b = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_predicts_what_the_run_did(kind, bases, files, tmp_path):
    s = settings(kind, bases, files, tmp_path / "run")
    result = train(s)
    run = prepare(s)
    objective, rows = run.objective, run.validation["validation"]
    base = named_models.pretrained(s.model, objective.task_type, objective.outputs(run.task)).model
    handle = loralab.load(base, tmp_path / "run/adapter")
    parts, order = [], []
    with torch.no_grad():
        for chosen in sorted_batches(rows.lengths, 7):
            batch = collate(rows, chosen, run.tokenizer, torch.device("cpu"))
            out = objective.forward(handle.model, batch)
            out = out.view(len(chosen), -1, *out.shape[1:]).squeeze(1) if rows.sequences > 1 else out
            parts.append(objective.predict(out, batch.get("labels", rows.labels[chosen])).numpy())
            order += chosen
    found = ragged(parts)[np.argsort(order)]
    kept = load_file(tmp_path / "run/predictions.safetensors")
    np.testing.assert_allclose(found, kept["validation/logits"].numpy(), atol=2e-4)
    scores = objective.score(run.task, found, rows.labels.numpy())
    assert scores == pytest.approx(result["metrics"], abs=1e-3)


GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 37, "n_positions": 64}
OPT = {"hidden_size": 24, "ffn_dim": 37, "num_hidden_layers": 2, "num_attention_heads": 3, "word_embed_proj_dim": 24}
BART = {"d_model": 24, "max_position_embeddings": 64, "dropout": 0} | {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 3), ("ffn_dim", 37))
}
XLNET = {"d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 37, "dropout": 0}
SIDED = {  # name -> its base, and the kinds of rows that it is tried with
    "gpt2": ("llama", AutoModelForCausalLM, GPT2Config(**GPT2, bos_token_id=4), ("completion", "chat")),
    "opt": ("llama", AutoModelForCausalLM, OPTConfig(**OPT, max_position_embeddings=64, dropout=0), ("text",)),
    "gpt2 without a head": (
        "llama",
        AutoModel,
        GPT2Config(**GPT2, bos_token_id=4),
        ("classification", "multi-label", "multiple-choice", "similarity", "tagging"),
    ),
    "bert": ("bert", *BASES["bert"], ("classification", "tagging", "triplets")),
    "t5": ("t5", *BASES["t5"], ("seq2seq",)),
    "bart": ("t5", AutoModelForSeq2SeqLM, BartConfig(**BART), ("seq2seq",)),
    "xlnet": ("t5", AutoModel, XLNetConfig(**XLNET), ("tagging", "similarity")),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SIDED)
def test_the_loss_of_a_row_does_not_depend_on_the_rows_beside_it(name, side, files, tmp_path):
    """Whichever side a tokenizer pads on: left padding moved absolute positions, and the words of tags."""
    kind, model_class, config, tasks = SIDED[name]
    base = made_base(tmp_path / "base", kind, model_class, copy.deepcopy(config), padding_side=side)
    for task in tasks:
        run = prepare(settings(task, {MODEL.get(task, "bert"): base}, files, tmp_path / task))
        with torch.no_grad():
            for p in run.model.parameters():
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))

        def made(chosen, run=run):
            batch = collate(run.train, chosen, run.tokenizer, torch.device("cpu"))
            with torch.no_grad():
                outputs = objectives.by_row(run.objective.forward(run.model, batch), len(chosen))
            labels = batch.get("labels", run.train.labels[chosen])
            return run.objective.loss(outputs, labels), run.objective.predict(outputs, labels).numpy()

        chosen = list(range(16))
        assert len(set(run.train.lengths[chosen])) > 1
        whole, predictions = made(chosen)
        torch.testing.assert_close(whole, torch.cat([made([i])[0] for i in chosen]), rtol=1e-4, atol=1e-4)
        if task == "tagging":  # a row's tags stand where its labels do
            truth = run.train.labels[chosen].numpy()[:, : predictions.shape[1]]
            assert ((predictions == IGNORED)[:, : truth.shape[1]] == (truth == IGNORED)).all()


def test_a_head_that_reads_padding_is_refused(files, tmp_path):
    """XLNet's reads the last token of a batch: what it said of a short row depended on the rows beside it."""
    base = made_base(tmp_path / "base", "t5", *copy.deepcopy(SIDED["xlnet"][1:3]))
    with pytest.raises(UserError, match="its head reads the last token"):
        prepare(settings("classification", {"bert": base}, files, tmp_path / "run"))


def test_a_model_that_sets_no_limit_takes_rows_of_any_length(files, tmp_path):
    """XLNet's config has -1 where others have the most tokens that a model takes."""
    base = made_base(tmp_path / "base", "t5", *copy.deepcopy(SIDED["xlnet"][1:3]))
    train(settings("tagging", {"bert": base}, files, tmp_path / "run", epochs=1))
    model = AutoModel.from_pretrained(base)
    assert longest(model) is None
    assert (cut_at(700, model), cut_at(None, model)) == (700, LONGEST)


@pytest.mark.parametrize("name", ["xlnet", "bert"])
def test_a_model_that_reads_what_it_is_to_predict_is_refused(name, files, tmp_path):
    """transformers gives one to a causal model's class: it learned to copy the next token."""
    base = made_base(tmp_path / "base", "llama", AutoModelForCausalLM, copy.deepcopy(SIDED[name][2]))
    with pytest.raises(UserError, match="depends on the tokens after it"):
        prepare(settings("chat", {"llama": base}, files, tmp_path / "run"))


def test_a_step_whose_rows_are_each_others_negatives_is_not_divided(bases, files, tmp_path):
    with pytest.raises(UserError, match="cannot be divided"):
        train(settings("pairs", bases, files, tmp_path, accumulate=2))


@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_rows_have_the_losses_of_rows_alone(kind, bases, files, tmp_path):
    s = settings(kind, bases, files, tmp_path, pack=True)
    run = prepare(s)
    rows = run.train
    assert rows.packed
    chosen = list(range(17))
    batch = collate(rows, chosen, run.tokenizer, torch.device("cpu"))
    assert len(batch["input_ids"]) < 12
    with torch.no_grad():
        for name, t in run.model.named_parameters():
            if name.endswith("B"):
                t.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        packed = run.objective.forward(run.model, batch)
        plain = dataclasses.replace(rows, packed=False)
        for i in chosen:
            alone = run.objective.forward(run.model, collate(plain, [i], run.tokenizer, torch.device("cpu")))
            torch.testing.assert_close(packed[i], alone[0], rtol=1e-4, atol=1e-4)
    assert packed[:, 1].long().tolist() == rows.weights[chosen].tolist()


def test_a_packed_run_is_the_run_up_to_rounding_and_others_refuse_to_pack(bases, files, tmp_path):
    for pack in (False, True):
        train(settings("chat", bases, files, tmp_path / str(pack), pack=pack, max_length=60))
    for a, b in zip(history(tmp_path / "False"), history(tmp_path / "True"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
    with pytest.raises(UserError, match="--pack"):
        train(settings("tagging", bases, files, tmp_path / "other", pack=True))


HEADS = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64}
STATES = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}
PACKED = {  # name -> a config, and whether rows of up to 40 tokens can be packed
    "gpt2": (GPT2Config(**GPT2, bos_token_id=4), True),
    "a window that no row reaches": (MistralConfig(**HEADS, sliding_window=48), True),
    "a window": (MistralConfig(**HEADS, sliding_window=8), False),
    "a window in some layers": (Gemma2Config(**HEADS, head_dim=8, sliding_window=8), False),
    "positions from the mask": (BloomConfig(hidden_size=24, n_layer=2, n_head=3), False),
    "a state": (Mamba2Config(**STATES, num_heads=6, head_dim=8, n_groups=1, chunk_size=8, bos_token_id=4), False),
    "a state that knows no mask of pairs": (MambaConfig(**STATES), False),
    "a convolution": (Lfm2Config(**HEADS, layer_types=["conv", "full_attention"], initializer_range=0.3), False),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_model_packs_rows_as_they_are_alone_or_refuses_to(name, files, tmp_path):
    config, able = PACKED[name]
    base = made_base(tmp_path / "base", "llama", AutoModelForCausalLM, copy.deepcopy(config))
    s = settings("chat", {"llama": base}, files, tmp_path / "run", pack=True)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    if not able:
        with pytest.raises(UserError, match=r"--pack: .* was tried with rows of 21, 17, 17 tokens in a pass, .*leave"):
            prepare(s)
        assert torch.equal(before, torch.random.get_rng_state())
        return
    run, chosen = prepare(s), list(range(17))
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        packed, alone = (
            run.objective.forward(run.model, collate(rows, chosen, run.tokenizer, torch.device("cpu")))
            for rows in (run.train, dataclasses.replace(run.train, packed=False))
        )
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [{"method": "eva"}, {"method": "lora-ga"}, {"policy": "drop"}, {"method": "alora"}, {"policy": "groups"}],
    ids=str,
)
def test_starts_and_policies_take_packed_rows_of_a_language_model(more, bases, files, tmp_path):
    result = train(settings("chat", bases, files, tmp_path / "r", pack=True, epochs=1, **{"lr": 0.003, **more}))
    assert np.isfinite(result["metric"]["selected"])


def test_a_policy_that_needs_the_models_own_loss_says_where_there_is_none(bases, files, tmp_path):
    with pytest.raises(UserError, match="policy='alora' with objective multiple-choice"):
        train(settings("multiple-choice", bases, files, tmp_path, method="alora"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_may_name_every_metric_of_a_task(kind, files):
    """As an endpoint, with a margin of its own, and as what epochs are selected by."""
    task = objectives.load(str(files[kind]))
    metrics = [*task.metrics, *objectives.of(task).metrics(task)]
    assert metrics
    compare = {"reference": "lora", "endpoints": list(dict.fromkeys(metrics)), "margin": dict.fromkeys(metrics, 0.5)}
    table = {"tasks": ["cola"], "methods": ["lora", "head"], "compare": compare}
    made = define(table, "x", Path())
    assert made.compare.endpoints == tuple(dict.fromkeys(metrics))
    assert made.compare.margin.items() >= dict.fromkeys(metrics, 0.5).items()


@pytest.mark.parametrize("metric", generation.METRICS)
def test_a_study_may_name_a_metric_of_written_answers(metric):
    table = {"tasks": ["cola"], "methods": ["lora"], "compare": {"reference": "lora", "endpoints": [metric]}}
    assert define(table, "x", Path()).compare.endpoints == (metric,)


# ---- steps, time and evaluation within an epoch ----------------------------------------------------------------------


def test_a_run_evaluates_within_epochs_and_ends_at_its_last_step(bases, files, tmp_path):
    s = settings("chat", bases, files, tmp_path / "a", eval_every=2, max_steps=7, epochs=5)
    result = train(s)
    rows = history(tmp_path / "a")
    steps_an_epoch = -(-result["protocol"]["train"] // s.batch_size)
    assert [row["step"] for row in rows] == sorted(
        {2, 4, 6, 7, steps_an_epoch} - ({8} if steps_an_epoch > 7 else set())
    )
    assert rows[0]["epoch"] == pytest.approx(2 / steps_an_epoch, abs=1e-3)
    best = min(range(len(rows)), key=lambda i: rows[i]["held_out"]["loss"])
    assert result["selected_epoch"] == rows[best]["epoch"]
    assert result["metric"]["best_on_validation"] == min(row["validation"]["loss"] for row in rows)


def test_a_run_ends_when_its_time_is_over(bases, files, tmp_path):
    train(settings("text", bases, files, tmp_path / "a", epochs=500, max_time="0.4s"))
    assert 1 <= history(tmp_path / "a")[-1]["step"] < 500


@pytest.mark.parametrize("text", ["", "5", "0s", "-3m", "1e3s", "2 h", "h", "1d"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="max_time"):
        Settings(task="cola", max_time=text)


# ---- what each kind computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("learns", [True, False, "bias"])
def test_likelihoods_are_those_of_all_logits(bases, plain, learns, monkeypatch):
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 4 * 31 * 5)  # five tokens at a time
    monkeypatch.setattr(vocabulary, "CACHE_BYTES", 4 * 31 * 2)  # two of these, two, and one
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.lm_head.weight.requires_grad_(learns is True)
    if learns == "bias":  # of bitfit, over a frozen weight: it had no gradient
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 31))
    if plain:
        vocabulary.prepare(model)
        assert vocabulary._PLAIN[model]
    ids = torch.randint(4, 31, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    weights = torch.tensor([0.3, 1.7, -0.6])
    logits = model(input_ids=ids, attention_mask=mask).logits
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED).sum(1)
    learned = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((nll * weights).sum(), learned)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    outputs = objectives.OBJECTIVES["causal"].forward(model, batch)
    torch.testing.assert_close(outputs[:, 0], nll)
    assert outputs[:, 1].tolist() == (labels[:, 1:] != IGNORED).sum(1).tolist()
    for found, right in zip(torch.autograd.grad((outputs[:, 0] * weights).sum(), learned), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        hits = objectives.OBJECTIVES["causal"].forward(model, batch)[:, 2]
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum(1)
    assert hits.tolist() == right.tolist()


@pytest.mark.parametrize("learns", [True, False])
def test_likelihoods_have_a_right_second_derivative_or_none(bases, learns):
    """The pieces of a frozen output layer keep a gradient and no graph of it: a product with the Hessian was zero."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], attn_implementation="eager").double()
    model.lm_head.weight.requires_grad_(learns)
    vocabulary.prepare(model)
    ids = torch.randint(4, 31, (3, 11), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    weight = model.model.norm.weight

    def slope(loss):
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    loss = objectives.OBJECTIVES["causal"].forward(model, batch)[:, 0].sum()
    if learns:
        torch.testing.assert_close(slope(loss), slope(model(**batch).loss * 30))
    else:
        with pytest.raises(UserError, match="no second derivative"):
            slope(loss)


def test_a_model_that_changes_its_logits_is_not_taken_for_plain(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    inner = model.forward

    @functools.wraps(inner)
    def capped(**inputs):
        out = inner(**inputs)
        out.logits = out.logits.tanh() * 3
        return out

    model.forward = capped
    vocabulary.prepare(model)
    assert not vocabulary._PLAIN[model]


def test_a_model_that_takes_only_the_number_of_its_logits_gives_them_all(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    inner = model.forward

    @functools.wraps(inner)
    def numbered(logits_to_keep=0, **inputs):
        return inner(logits_to_keep=int(logits_to_keep), **inputs)

    model.forward = numbered
    vocabulary.prepare(model)
    assert not vocabulary._PLAIN[model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["learn", "evaluate", "generate"])
def test_no_row_gets_an_output_layer_of_its_own(what, dtype):
    """torch copies a frozen weight for each row of a slice, as hidden[:, -1:] is: a quarter of a step of smollm2."""
    sizes = {"hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=997, **sizes, **ends)).to(dtype)
    vocabulary.prepare(model)
    adapters = loralab.attach(model, "lora", targets=["q_proj"])
    ids = torch.randint(4, 997, (5, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with Largest() as largest, torch.set_grad_enabled(what == "learn"), adapters.use("default"):
        if what == "generate":
            tokenizer = SimpleNamespace(
                pad_token_id=1, eos_token_id=None, batch_decode=lambda rows, **_: [""] * len(rows)
            )
            prompts = [row[: 3 + i % 2].tolist() for i, row in enumerate(ids)]
            generation.answers(model, tokenizer, prompts, generation.Decoding(max_new_tokens=3), torch.Generator())
        else:
            loss = objectives.OBJECTIVES["causal"].forward(model, batch)[:, 0].sum()
        if what == "learn":
            loss.backward()
    assert largest.values <= model.lm_head.weight.numel()


def seqeval_spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """Spans by conlleval's table of chunk starts and ends, written out."""
    found, begin, kind_before, mark_before = set(), 0, "", "O"
    for i, tag in enumerate([*tags, "O"]):
        mark, kind = (tag, "") if tag == "O" else tag.split("-", 1)
        ends = mark_before in ("E", "S") or (mark_before in ("B", "I") and mark in ("B", "S", "O"))
        ends = ends or (mark_before != "O" and kind_before != kind)
        starts = mark in ("B", "S") or (mark_before in ("E", "S", "O") and mark in ("E", "I"))
        starts = starts or (mark != "O" and kind_before != kind)
        if ends and mark_before != "O":
            found.add((kind_before, begin, i - 1))
        if starts:
            begin = i
        mark_before, kind_before = mark, kind
    return found


def test_spans_are_those_of_conlleval():
    random = np.random.default_rng(0)
    tags = ["O", *[f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC")]]
    for _ in range(3000):
        row = list(random.choice(tags, random.integers(1, 9)))
        assert set(tagging.spans(row)) == seqeval_spans(row), row


def test_words_are_cut_into_tokens_and_the_first_has_the_tag(minilm):
    tokenizer = named_models.tokenizer(str(minilm))
    words = ("Zürich", "unbelievably", "rains", ",", "said", "O'Neill-Smith")
    split = objectives.data.Split([words], [[0, 1, 2, 3, 4, 5]])
    task = objectives.data.Task("t", tuple("abcdef"), ("accuracy",), split, {"validation": split}, "")
    rows = tagging.encode(task, split, tokenizer, Encoding(64, True))
    pieces = tokenizer(list(words), is_split_into_words=True)
    expected, before = [], None
    for word in pieces.word_ids():
        expected.append(IGNORED if word is None or word == before else word)
        before = word
    assert rows.columns["input_ids"][0] == pieces["input_ids"]
    assert rows.columns["labels"][0] == expected


def test_predictions_of_other_tokens_than_the_labels_are_refused():
    """As where one of the two is padded on the left: each word had the tag of another."""
    tags = np.array([[IGNORED, 0, 1, IGNORED], [1, 0, 1, 0]])
    task = objectives.data.Task("t", ("a", "b"), ("accuracy",), None, {}, "", objective="tagging")
    moved = np.array([[IGNORED, IGNORED, 0, 1], [1, 0, 1, 0]])
    assert tagging.score(task, tags, tags)["accuracy"] == 1
    for what in (tagging.score, tagging.confusion, tagging.wrong, tagging.parts):
        with pytest.raises(ValueError, match="predictions of other tokens"):
            what(task, moved, tags)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["classification", "multi-label", "tagging", "similarity", "seq2seq"])
def test_a_row_is_cut_at_its_end(kind, side, files, tmp_path):
    """Whichever side the tokenizer cuts: answers gave the tags of the last words to the first."""
    name = MODEL.get(kind, "bert")
    base = made_base(tmp_path / "base", name, *copy.deepcopy(BASES[name]), truncation_side=side)
    task, tokenizer = objectives.load(str(files[kind])), named_models.tokenizer(str(base))
    whole, cut = (objectives.of(task).encode(task, task.train, tokenizer, Encoding(most, False)) for most in (40, 5))
    for long, short in zip(whole.columns["input_ids"], cut.columns["input_ids"], strict=True):
        assert short[:-1] == long[: len(short) - 1]
    assert tokenizer.truncation_side == side
    if kind == "tagging":
        for row, tags, found in zip(task.train.texts, task.train.labels, cut.labels.numpy(), strict=True):
            names = [task.labels[tag] for tag in tags]
            assert tagging.answer(task, row, found)["tags"] == [*names[:3], *[None] * (len(row) - 3)]


ENDED = {"t5": [[9, 13, 4], [4]], "llama": [[9, 13, 4], [4]], "bert": [[2, 9, 13, 3, 4], [2, 3, 4]]}


@pytest.mark.parametrize("ends", ENDED)
def test_a_target_ends_with_the_end_token_and_counts(ends, tmp_path):
    """Where the tokenizer added none a model did not learn to stop, and a target of no tokens weighed nothing."""
    base = made_base(tmp_path / "base", ends, *copy.deepcopy(BASES["t5"]))
    tokenizer, encode = named_models.tokenizer(str(base)), objectives.OBJECTIVES["seq2seq"].encode
    task = objectives.data.Task("t", None, ("loss",), None, {}, "", objective="seq2seq")
    split = objectives.data.Split([("the cat", "a dog"), ("the cat", "")], [None, None])
    rows = encode(task, split, tokenizer, Encoding(40, True))
    assert rows.columns["labels"] == ENDED[ends]
    assert rows.weights.tolist() == [len(ids) for ids in ENDED[ends]]
    tokenizer.eos_token = None
    if ends == "llama":
        with pytest.raises(UserError, match="no end-of-text token"):
            encode(task, split, tokenizer, Encoding(40, True))
    else:  # it ends texts in its own way
        assert encode(task, split, tokenizer, Encoding(40, True)).columns["labels"][0][-1] == {"t5": 4, "bert": 3}[ends]


# ---- what a user runs afterwards -------------------------------------------------------------------------------------


def run_json(capsys, *words) -> dict:
    assert main([*map(str, words)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_gives_the_metrics_of_the_run_and_predict_the_answers(
    kind, bases, files, tmp_path, capsys, monkeypatch
):
    other = tmp_path / "other.jsonl"
    rows = rows_of(kind, 25, 8)
    other.write_text("\n".join(map(json.dumps, rows)))
    result = train(settings(kind, bases, files, tmp_path / "run", validation=other, epochs=4, lr=0.003))
    folder = tmp_path / "run/adapter"
    found = run_json(capsys, "evaluate", folder, "--task", other, "--json", "--batch-size", 7)
    assert (found["rows"], found["objective"]) == (25, MODEL_OBJECTIVE.get(kind, kind))
    assert found["metrics"] == pytest.approx(result["metrics"], abs=1e-3)
    if kind in MODEL:
        short = ("--max-new-tokens", 3, "--prefix", "own ", "--json")
        answers = run_json(capsys, "predict", "--adapters", folder, "--input", other, *short)
        assert len(answers) == 25
        assert all(isinstance(a["own answer"], str) for a in answers)
        monkeypatch.setattr("loralab.cli.base.load", None)  # it is refused before anything is loaded
        assert main(["evaluate", str(folder), "--task", str(other), "--out", str(tmp_path / "answers.csv")]) == 2
        assert "has no answer for each row" in capsys.readouterr().err
        return
    assert main(["predict", "--adapters", str(folder), "--input", str(other), "--max-new-tokens", "3"]) == 2
    assert "--max-new-tokens would do nothing" in capsys.readouterr().err
    wanted = ("sentence1", "sentence2", "anchor", "positive", "text", "tokens", "question", "choices")
    bare = [{key: value for key, value in row.items() if key in wanted} for row in rows]
    (tmp_path / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    answers = run_json(capsys, "predict", "--adapters", folder, "--input", tmp_path / "bare.jsonl", "--json")
    assert len(answers) == 25
    expected = found["metrics"].get("accuracy")
    if kind == "classification":
        assert np.mean([a["label"] == r["label"] for a, r in zip(answers, rows, strict=True)]) == pytest.approx(
            expected
        )
    if kind == "multiple-choice":
        right = [a["answer"] == r["choices"][r["answer"]] for a, r in zip(answers, rows, strict=True)]
        assert np.mean(right) == pytest.approx(expected)
    if kind == "tagging":
        pairs = [(x, y) for a, r in zip(answers, rows, strict=True) for x, y in zip(a["tags"], r["tags"], strict=True)]
        assert np.mean([x == y for x, y in pairs]) == pytest.approx(expected)
    if kind == "multi-label":
        right = [set(a["labels"]) == set(r["labels"]) for a, r in zip(answers, rows, strict=True)]
        assert np.mean(right) == pytest.approx(found["metrics"]["exact"])
    if kind in ("similarity", "pairs", "triplets"):
        assert all(-1.001 <= a["similarity"] <= 1.001 for a in answers)


BAD = {  # file -> words of the error
    "two kinds": ([{"text": "the", "label": "a", "tokens": ["the"], "tags": ["O"]}], ("fit", "--objective")),
    "no kind": ([{"words": "the", "y": 1}], ("fit no objective", "prompt+completion", "--text and --label")),
    "roles": (
        [{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}],
        ("row 1", "user was expected"),
    ),
    "the user ends": ([{"messages": [{"role": "user", "content": "a"}]}], ("ends with the user", "row 1")),
    "no turns": ([{"messages": []}], ("without turns", "row 1")),
    "an unknown role": ([{"messages": [{"role": "bot", "content": "a"}]}], ("'bot'", "row 1")),
    "no content": ([{"messages": [{"role": "user"}]}], ("without role and content", "row 1")),
    "an empty message": ([{"messages": [{"role": "user", "content": " "}]}], ("empty message", "row 1")),
    "an empty completion": ([{"prompt": "a", "completion": " "}] * 9, ("empty", "9 rows")),
    "a number for a prompt": ([{"prompt": 3, "completion": "b"}], ("number instead of text", "row 1")),
    "tags that do not align": ([{"tokens": ["the", "cat"], "tags": ["O"]}], ("2 words but 1 tags", "row 1")),
    "an answer that is none": ([{"question": "a", "choices": ["the", "cat"], "answer": 2}], ("none of its 2", "row 1")),
    "one choice": ([{"question": "a", "choices": ["the"], "answer": 0}], ("at least two choices", "row 1")),
    "a label twice": ([{"text": "the", "labels": ["a", "a"]}], ("twice", "row 1")),
    "one label": ([{"text": "the", "labels": ["a"]}] * 9, ("at least two different ones",)),
    "scores that are one": ([{"sentence1": "a", "sentence2": "the", "score": 1}] * 9, ("all scores are 1.0",)),
    "a long prompt": (
        [{"prompt": "the cat " * 40, "completion": "a"}] * 9,
        ("before anything to learn", "--max-length"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line(case, bases, tmp_path, capsys):
    rows, words = BAD[case]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = bases["llama" if {"messages", "prompt"} & rows[0].keys() else "bert"]
    flags = ["--task", tmp_path / "bad.jsonl", "--model", base, "--out", tmp_path / "run", "--max-length", 32]
    assert main(["train", *map(str, flags)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.count("\n") <= 2
    assert not (tmp_path / "run/result.json").exists()


def test_labels_unknown_at_evaluation_are_named(bases, files, tmp_path, capsys):
    train(settings("tagging", bases, files, tmp_path / "run", epochs=1))
    (tmp_path / "new.jsonl").write_text(json.dumps({"tokens": ["the", "cat"], "tags": ["O", "B-DOG"]}))
    assert main(["evaluate", str(tmp_path / "run/adapter"), "--task", str(tmp_path / "new.jsonl")]) == 2
    assert "new tag 'B-DOG'" in capsys.readouterr().err


def test_rows_are_shown_as_they_are_learned(bases, files, tmp_path, capsys):
    flags = ["train", "--model", str(bases["llama"]), "--max-length", "40", "--out", str(tmp_path / "run"), "--task"]
    assert main([*flags, str(files["chat"]), "--show-rows", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("row 1: <user>")
    assert "<assistant>« a" in first.replace("«a", "« a")
    assert first.count("«") == second.count("«") == 2
    assert main([*flags[:2], str(bases["bert"]), *flags[3:], str(files["classification"]), "--show-rows", "1"]) == 0
    assert capsys.readouterr().out.rstrip()[-4:] in ("-> 0", "-> 1")
    assert not (tmp_path / "run").exists()
    assert main([*flags, str(files["chat"]), "--show-rows", "-1"]) == 2


@pytest.mark.parametrize(
    "change",
    [{"objective": "poetry"}, {"objective": 3}, {"max_length": 0}, {"columns": "text"}, {"options": {"template": 1}},
     {"labels": [1]}, {"new": 1}],
    ids=str,
)  # fmt: skip
def test_a_task_file_that_is_wrong_is_one_line(change, bases, files, tmp_path, capsys):
    train(settings("tagging", bases, files, tmp_path / "run", epochs=1))
    file = tmp_path / "run/adapter/task.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for words in (["evaluate", str(file.parent), "--task"], ["predict", "--adapters", str(file.parent), "--input"]):
        assert main([*words, str(files["tagging"])]) == 2
        said = capsys.readouterr().err
        assert "task.json" in said
        assert said.count("\n") == 1


def test_a_conll_file_is_read_as_words_and_tags(bases, files, tmp_path):
    lines = []
    for row in rows_of("tagging", 90, 3):
        lines += [*(f"{w} X {t}" for w, t in zip(row["tokens"], row["tags"], strict=True)), ""]
    (tmp_path / "rows.conll").write_text("-DOCSTART- -X- O\n\n" + "\n".join(lines))
    found = objectives.load(str(tmp_path / "rows.conll"))
    same = objectives.load(str(files["tagging"]))
    assert (found.train, found.labels, found.objective) == (same.train, same.labels, "tagging")


def test_entities_of_a_text_become_tags(tmp_path):
    row = {
        "text": "Anna Bell likes Rome.",
        "entities": [{"start": 0, "end": 9, "label": "PER"}, {"start": 16, "end": 20, "label": "LOC"}],
    }
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 9))
    task = objectives.load(str(tmp_path / "rows.jsonl"))
    words, tags = task.train.texts[0], [task.labels[i] for i in task.train.labels[0]]
    assert list(zip(words, tags, strict=True)) == [
        ("Anna", "B-PER"), ("Bell", "I-PER"), ("likes", "O"), ("Rome", "B-LOC"), (".", "O")
    ]  # fmt: skip


@pytest.mark.parametrize("cells", [["red;big", "", "big"], ['["red","big"]', "[]", '["big"]'], None])
def test_labels_of_a_csv_are_lists_names_or_columns(cells, tmp_path):
    if cells is None:
        text = "text,red,big\nthe cat,1,1\na dog,0,false\nthe dog,0,TRUE\n"
        flags = {"label": "red,big", "text": "text"}
    else:
        text = "text,labels\n" + "".join(
            f'{t},"{c.replace(chr(34), chr(34) * 2)}"\n'
            for t, c in zip(("the cat", "a dog", "the dog"), cells, strict=True)
        )
        flags = {}
    (tmp_path / "rows.csv").write_text(text)
    task = objectives.load(str(tmp_path / "rows.csv"), objective="multi-label", whole=True, **flags)
    named = [{task.labels[i] for i, yes in enumerate(row) if yes} for row in task.train.labels]
    assert named == [{"red", "big"}, set(), {"big"}]


# ---- studies: a loss is better where it is lower ---------------------------------------------------------------------


def test_tuning_takes_the_rate_of_the_lowest_held_out_loss(bases, files, tmp_path):
    tried, best = tune(settings("completion", bases, files, tmp_path / "t", lr=None, epochs=3), [1e-6, 1e-2, 1e-5])
    losses = {found.lr: found.held_out for found in tried}
    assert best.lr == 1e-2 == min(losses, key=losses.__getitem__)


def test_a_study_of_a_language_model_calls_the_lower_loss_better(bases, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = {
        "models": [str(bases["llama"])], "tasks": [{"task": str(files["chat"]), "name": "chat"}], "seeds": [0, 1, 2],
        "protocol": {"epochs": 3, "batch_size": 12, "max_length": 40, "rank": 3, "dtype": "float32", "eval_every": 4},
        "methods": [{"method": "lora", "lr": 0.01}, {"method": "lora", "lr": 1e-6, "name": "slow"}],
        "compare": {"reference": "slow", "margin": {"default": 0.001}},
    }  # fmt: skip
    done = run_study(define(table, "chats", Path()), Path("out"), runner("in-turn"), StudyBar())
    loss = {cell.key[2]: np.mean([run.selected for run in cell.runs]) for cell in done.cells().values()}
    assert loss["lora"] < loss["slow"] - 0.05
    (found,) = comparisons(done)
    assert found.verdict == ("better" if found.a == "lora" else "worse")
    assert found.rows == len(done.cells()[("chat", *next(iter(done.cells()))[1:])].runs[0].reported.labels)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_study_compares_methods_on_the_rows_of_every_kind(kind, bases, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = {
        "models": [str(bases[MODEL.get(kind, "bert")])], "tasks": [{"task": str(files[kind]), "name": kind}],
        "seeds": [0, 1], "protocol": {"epochs": 4, "batch_size": 12, "max_length": 40, "rank": 3, "dtype": "float32"},
        "methods": [{"method": "lora", "lr": 0.02}, {"method": "lora", "lr": 1e-3, "name": "slow"}],
        "compare": {"reference": "slow", "margin": {"default": 0.01}},
    }  # fmt: skip
    done = run_study(define(table, "all", Path()), Path("out"), runner("in-turn"), StudyBar())
    first = next(iter(done.cells().values())).runs[0]
    metric, rows = first.result["metric"]["name"], len(first.reported.labels)
    for cells, resamples in places(done):
        runs = [run for cell in cells for run in cell.runs]
        scores = resamples.of(runs)  # (times, runs)
        sd = scores.std(0)
        assert np.all(np.abs(scores.mean(0) - [run.selected for run in runs]) < 0.1 + 2 * sd), metric
        assert np.all(sd < 0.6)
    assert {summary.rows for summary in summaries(done)} == {rows}
    assert main(["report", "out"]) == 0, capsys.readouterr().err


def test_a_metric_of_some_rows_is_that_of_their_sums():
    """Against sklearn, loops and seqeval's spans on the rows that were drawn."""
    random = np.random.default_rng(5)
    n, names = 40, ("O", "B-PER", "I-PER", "B-LOC")
    labels = random.integers(0, 2, (n, 5))
    logits = np.where(random.random((n, 5)) < 0.7, labels, 1 - labels) - 0.5
    tags = random.integers(0, 4, (n, 7))
    tags[random.random((n, 7)) < 0.2] = IGNORED
    found = np.where(random.random((n, 7)) < 0.6, tags, random.integers(0, 4, (n, 7)))
    choices = np.stack([random.integers(0, 3, n), np.full(n, 3)], 1)
    scores, nan = random.random((n, 3)), np.full(n, np.nan)

    def span_f1(take):
        pairs = []
        for i in take:
            words = tags[i] != IGNORED
            pairs.append([seqeval_spans([names[t] for t in row[i][words]]) for row in (found, tags)])
        hits = sum(len(a & b) for a, b in pairs)
        return 2 * hits / sum(len(a) + len(b) for a, b in pairs)

    def of_words(score):
        def scored(take):
            there = tags[take] != IGNORED
            return score(tags[take][there], found[take][there])

        return scored

    def macro(truth, mine):
        return sklearn.f1_score(truth, mine, average="macro")

    def micro(truth, mine):
        return sklearn.f1_score(truth, mine, average="micro")

    wide = ragged([found, found[:0].repeat(2, 1)])
    cases = [  # objective, metric, predictions, labels, rows -> the metric
        ("multi-label", "f1_micro", logits, labels, lambda t: micro(labels[t], logits[t] > 0)),
        ("multi-label", "f1_macro", logits, labels, lambda t: macro(labels[t], logits[t] > 0)),
        ("multi-label", "exact", logits, labels, lambda t: sklearn.accuracy_score(labels[t], logits[t] > 0)),
        ("tagging", "span_f1", wide, tags, span_f1),
        ("tagging", "accuracy", wide, tags, of_words(sklearn.accuracy_score)),
        ("tagging", "f1_macro", wide, tags, of_words(macro)),
        ("multiple-choice", "accuracy", scores, choices, lambda t: np.mean(scores[t].argmax(1) == choices[t, 0])),
        ("similarity", "accuracy", scores[:, :2], nan, lambda t: np.mean([scores[i, 0] > scores[i, 1] for i in t])),
    ]  # fmt: skip
    for objective, metric, predictions, truth, slow in cases:
        sums = objectives.OBJECTIVES[objective].sums(metric, predictions, truth, names)
        for take in (np.arange(n), random.integers(0, n, n), random.integers(0, n, n)):
            weights = np.bincount(take, minlength=n).astype(float)
            assert float(sums.score(weights @ sums.parts)) == pytest.approx(slow(take)), (objective, metric)
        assert objectives.OBJECTIVES[objective].sums("auc", predictions, truth, names) is None


def test_rows_whose_kind_is_not_known_are_not_resampled():
    """A run of an older version does not say its objective: its interval is over seeds, not over rows read wrongly."""
    for metric, labels in (
        ("accuracy", np.full(5, np.nan)),
        ("f1_micro", np.ones((5, 3))),
        ("accuracy", np.ones((5, 2), int)),
    ):
        assert not by_rows(metric, labels), metric
    for metric, labels in (
        ("accuracy", np.arange(5)),
        ("loss", np.ones(5)),
        ("spearman", np.ones(5)),
        ("auc", np.ones(5)),
    ):
        assert by_rows(metric, labels), metric


def test_resampled_losses_are_those_of_the_rows(bases):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 9, 40).astype(float)
    runs = [np.stack([random.random(40) * tokens, tokens, random.integers(0, 2, 40)], 1) for _ in range(3)]
    for metric in ("loss", "perplexity", "token_accuracy"):
        scores = resampled(metric, runs, tokens, 4000, np.random.default_rng(1))
        task = objectives.data.Task("t", None, ("loss",), None, {}, "", objective="causal")
        whole = [objectives.of(task).score(task, run, tokens)[metric] for run in runs]
        np.testing.assert_allclose(scores.mean(0), whole, rtol=0.02)
        rows = random.integers(0, 40, (4000, 40))
        slow = np.array([objectives.of(task).score(task, runs[0][i], tokens[i])[metric] for i in rows])
        assert scores[:, 0].std() == pytest.approx(slow.std(), rel=0.1)


def test_every_objective_tells_one_answer_for_all_rows_from_answers():
    labels = np.linspace(0.0, 1.0, 9, dtype=np.float32)
    classes, tags = np.arange(9) % 3, np.tile(np.arange(4) % 2, (9, 1))
    turned = np.eye(3, dtype=np.float32)[classes]  # (rows, outputs), whose largest is now this one and now that
    nan = np.full(9, np.nan, dtype=np.float32)
    noise = np.array([1, -1, -1, 1, 0, 1, -1, -1, 1], dtype=np.float32)  # of no slope over the labels
    cases = {  # objective -> (predictions that are the same for all rows, others, labels)
        "classification": [
            (turned[:1].repeat(9, 0), turned, classes),
            (0.5 + 1e-3 * noise[:, None], labels[:, None], labels),
        ],
        "multiple-choice": [(turned[:1].repeat(9, 0), turned, classes)],
        "multi-label": [(turned[:1].repeat(9, 0) - 0.5, turned - 0.5, turned)],
        "tagging": [(np.zeros((9, 4), dtype=int), tags, tags)],
        "similarity": [
            (0.9 + 1e-3 * noise[:, None], 0.9 + 0.05 * labels[:, None], labels),
            (np.full((9, 2), 0.7, dtype=np.float32), turned[:, :2], nan),
        ],
    }
    for name, rows in cases.items():
        for same, others, given in rows:
            collapsed = objectives.OBJECTIVES[name].collapsed
            assert collapsed(same, given), name
            assert not collapsed(others, given), name


# ---- the metric that selects -----------------------------------------------------------------------------------------


def told_optuna(record: dict, metric: str) -> float:
    """What a trial is told of an epoch."""
    values = []
    trial = SimpleNamespace(report=lambda value, epoch: values.append(value), should_prune=lambda: False)
    search.report(trial, {**record, "epoch": 1}, 1, metric)
    return values[0]


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CAUSAL or kind == "completion"])
def test_the_metric_that_selects_changes_no_score_and_is_the_one_reported(kind, bases, files, tmp_path):
    usual = prepare(settings(kind, bases, files, tmp_path / "usual", max_steps=1, epochs=1))
    results = [train(usual.settings)]
    for metric in usual.task.metrics:
        s = dataclasses.replace(usual.settings, select_by=metric, out=tmp_path / metric)
        results.append(train(s))
        assert results[-1]["metric"]["name"] == metric
        record = history(s.folder)[-1]
        scores = record["held_out"] or record["validation"]
        assert told_optuna(record, metric) == upward(metric, scores[metric])
        task = selected_by(usual.task, metric)
        assert task.metrics[0] == metric
        assert usual.objective.whole(task) == usual.objective.whole(usual.task)
    assert all(result["metrics"] == results[0]["metrics"] for result in results)


def test_runs_of_one_process_select_each_by_its_own_metric(bases, files, tmp_path):
    metrics = ("accuracy", "f1_macro", None, "matthews_correlation")
    many = [settings("classification", bases, files, tmp_path / str(m), select_by=m, epochs=1) for m in metrics]
    outcomes = train_together(many)
    assert [o["metric"]["name"] for o in outcomes] == [m or outcomes[2]["metric"]["name"] for m in metrics]
    assert len({o["metric"]["name"] for o in outcomes}) == 3


# ---- the memory of a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_step_of_every_objective_can_be_estimated(name, outputs, bases):
    base = bases[{"causal": "llama", "seq2seq": "t5"}.get(name, "bert")]
    sizes = {"batch_size": 6, "max_length": 16, "dtype": "float32", "rank": 3}
    peaks = [
        estimate(EstimateSettings(model=str(base), objective=name, labels=outputs, **sizes | more)).peak
        for more in ({}, {"batch_size": 1}, {"batch_size": 24})
    ]
    assert peaks[1] < peaks[0] < peaks[2]


@pytest.mark.parametrize("kind", ["multiple-choice", "multi-label", "triplets", "tagging"])
def test_a_study_and_a_run_that_is_to_fit_estimate_the_same_step(kind, bases, files, tmp_path):
    s = settings(kind, bases, files, tmp_path / "run", train_rows=60)
    tried = fit(s, 10**10)
    assert [rung.parts for rung in tried] == [1]
    assert study_estimate.estimate_run(s).peak_bytes == pytest.approx(tried[0].estimate.peak, rel=0.02)
