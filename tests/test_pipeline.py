"""`loralab.pipeline`: a folder as a function from rows to answers, whatever it learned; `Predictor.open` for many."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_cli import adapter, cli, flags  # noqa: F401  (fixtures)
from test_objectives import KINDS, MODEL, MODEL_OBJECTIVE, bases, files, rows_of, run_json, settings  # noqa: F401
from transformers import AutoModelForCausalLM

import loralab
from loralab import UserError, objectives
from loralab.cli import main
from loralab.objectives import saved
from loralab.objectives.generation import Decoding
from loralab.objectives.objective import WRITTEN
from loralab.run import Settings, train
from loralab.serve import Predictor, Request
from loralab.serve.prompts import prompt_tokens

COLUMNS = {  # kind -> the columns of its file that a row to answer has
    "classification": ["text"], "regression": ["text"], "multi-label": ["text"], "tagging": ["tokens"],
    "multiple-choice": ["question", "choices"], "similarity": ["sentence1", "sentence2"],
    "triplets": ["anchor", "positive"], "pairs": ["anchor", "positive"], "chat": ["messages"],
    "completion": ["prompt"], "text": ["text"], "seq2seq": ["source"], "instruction": ["instruction", "input"],
    "sharegpt": ["conversations"],
}  # fmt: skip
WRITES = tuple(MODEL)


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_answers_as_the_command_does_whatever_it_learned(kind, bases, files, tmp_path, capsys):  # noqa: F811
    train(settings(kind, bases, files, tmp_path / "run", epochs=1))
    folder = tmp_path / "run/adapter"
    rows = [{name: row[name] for name in COLUMNS[kind]} for row in rows_of(kind, 9, 5)]
    answer = loralab.pipeline(folder, batch_size=4, **({"max_new_tokens": 4} if kind in WRITES else {}))
    cells = [tuple(row.values()) for row in rows]
    found = answer(cells)
    known = answer.known
    said = (WRITTEN,) if known.writes else objectives.OBJECTIVES[known.objective].gives(cells[0])
    assert all({*one} <= {*said} for one in found)
    assert len(found) == len(rows)
    assert answer(rows) == found == [answer(row) for row in rows] or kind not in WRITES
    for name, written in (("bare", rows), ("whole", rows_of(kind, 9, 5))):  # right answers beside them change nothing
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    if kind in WRITES:
        more = ("--max-new-tokens", 4, "--prefix", "own ", "--json")
        for name in ("bare", "whole"):
            theirs = run_json(capsys, "predict", "--adapters", folder, "--input", tmp_path / f"{name}.jsonl", *more)
            assert [row["own answer"] for row in theirs] == [row["answer"] for row in found], name
    command = ("generate", "--max-new-tokens", 4) if kind in WRITES else ("predict",)
    expected = run_json(capsys, *command, "--adapters", folder, "--input", tmp_path / "bare.jsonl", "--json")
    assert all(set(one) == {"answer"} and isinstance(one["answer"], str) for one in found) or kind not in WRITES
    for mine, theirs in zip(found, expected, strict=True):
        assert {name: approx(value) for name, value in mine.items()} == {name: theirs[name] for name in mine}


def test_an_adapter_of_labels_as_completions_answers_with_its_labels(bases, tmp_path, capsys):  # noqa: F811
    """As evaluate compares them: by their likelihoods, after the prompt that it was trained on."""
    rows = rows_of("classification", 90, 3)
    for split, part in (("train", rows[:60]), ("validation", rows[60:])):
        folder = tmp_path / "glue/SST-2"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{row['text']}\t{['cat', 'dog'].index(row['label'])}" for row in part]
        (folder / f"{'dev' if split == 'validation' else split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    s = dataclasses.replace(settings("chat", bases, {"chat": "sst2"}, tmp_path / "run", epochs=4), objective="causal")
    train(dataclasses.replace(s, data=tmp_path / "glue"))
    folder, given = tmp_path / "run/adapter", ("--data", tmp_path / "glue", "--json")
    scores = run_json(capsys, "evaluate", folder, "--task", "sst2", *given)["metrics"]
    sentences = [row["text"] for row in rows[60:]]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"sentence": text}) for text in sentences))
    found = run_json(capsys, "predict", "--adapters", folder, "--input", tmp_path / "in.jsonl", "--json")
    truth = [{"cat": "negative", "dog": "positive"}[row["label"]] for row in rows[60:]]
    assert np.mean([row["label"] == label for row, label in zip(found, truth, strict=True)]) == scores["accuracy"]
    answer = loralab.pipeline(folder)
    assert [one["label"] for one in answer(sentences)] == [row["label"] for row in found]
    asked = (answer.adapters.model, answer.tokenizer, Decoding(max_new_tokens=1))
    assert (
        prompt_tokens((sentences[0],), saved.read(folder), *asked)
        == answer.tokenizer(f"{sentences[0]}\nLabel:")["input_ids"]
    )


def test_predict_lets_an_encoder_decoder_write(bases, files, tmp_path, capsys):  # noqa: F811
    """Each source with its own adapter or all with one, by beams too; cut where training did."""
    for name, rate in (("one", 3e-3), ("two", 3e-2)):
        train(settings("seq2seq", bases, files, tmp_path / name, epochs=2, lr=rate, max_length=9))
    folders = [tmp_path / "one/adapter", tmp_path / "two/adapter"]
    sources = [row["source"] * times for times, row in enumerate(rows_of("seq2seq", 6, 5), 1)]  # the last ones are cut
    rows = [{"source": text, "which": folders[i % 2].parent.name} for i, text in enumerate(sources)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = [f"one={folders[0]}", f"two={folders[1]}"]
    shared = ("--adapters", *both, "--adapter-column", "which", "--input", tmp_path / "in.jsonl", "--json")
    predicted = [row["answer"] for row in run_json(capsys, "predict", *shared)]
    alone = [loralab.pipeline(folder)(sources) for folder in folders]
    assert predicted == [alone[i % 2][i]["answer"] for i in range(len(sources))]
    assert alone[0] != alone[1]
    for beams in (1, 3):
        how = ("--num-beams", beams, "--max-new-tokens", 5)
        written = [row["answer"] for row in run_json(capsys, "generate", *shared, *how)]
        alone = [loralab.pipeline(folder, num_beams=beams, max_new_tokens=5)(sources) for folder in folders]
        assert written == [alone[i % 2][i]["answer"] for i in range(len(sources))]


def approx(value):
    if isinstance(value, dict):
        return {key: approx(x) for key, x in value.items()}
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def test_the_folder_alone_is_enough_where_the_base_is_known(adapter, tiny, tmp_path):  # noqa: F811
    """Copied away from its run it has labels, columns and length; the base is found by its name, or given."""
    copied = shutil.copytree(adapter, tmp_path / "copied")
    answer = loralab.pipeline(copied, str(tiny))
    assert (answer.known.columns, answer.known.labels, answer.known.max_length) == (["sentence"], ["cat", "dog"], 32)
    assert answer(["the cat sees"])[0]["label"] in ("cat", "dog")
    assert answer({"sentence": "the cat sees"}) == answer("the cat sees") == answer([("the cat sees",)])[0]


def test_a_row_has_as_many_texts_as_the_adapter_learned_from(tiny, tmp_path, capsys):
    """One of two columns was answered without a word, and other columns than it learned from were read; a lone tuple
    was two rows."""
    rows = [{"title": row["text"], "body": "a cat", "label": row["label"]} for row in rows_of("classification", 40, 3)]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    s = Settings(task=str(tmp_path / "two.jsonl"), model=str(tiny), text=("title", "body"), label="label", epochs=1,
                 out=tmp_path / "run", max_length=32, dtype="float32")  # fmt: skip
    train(s)
    folder = tmp_path / "run/adapter"
    answer = loralab.pipeline(folder)
    both = ("the cat sees", "a cat")
    assert answer(both) == answer([both])[0] == answer(dict(zip(("title", "body"), both, strict=True)))
    assert answer(("", "a cat"))["label"] in ("cat", "dog")
    lack = "given, and the adapter learned from 2: title, body"
    for wrong in ("the cat", [("the cat",)], [("a", "b", "c")]):
        with pytest.raises(UserError, match=lack):
            answer(wrong)
    for name in ("text", "title"):
        (tmp_path / f"{name}.csv").write_text(f"{name},note\na cat,x\n")
    given = ["predict", "--adapters", str(folder), "--input"]
    assert main([*given, str(tmp_path / "text.csv")]) == 2
    assert lack in capsys.readouterr().err
    assert main([*given, str(tmp_path / "title.csv"), "--text", "title"]) == 2
    assert lack in capsys.readouterr().err


def test_a_usual_column_that_is_read_in_place_of_the_adapters_is_told(adapter, tiny, tmp_path, capsys):  # noqa: F811
    (tmp_path / "in.csv").write_text("text,note\na cat,x\n")
    assert main(["predict", "--adapters", str(adapter), "--input", str(tmp_path / "in.csv"), "--model", str(tiny)]) == 0
    assert "in.csv has no sentence, from which" in capsys.readouterr().err


def test_settings_of_a_pipeline_are_those_that_it_takes(adapter, base_that_writes, tiny):  # noqa: F811
    with pytest.raises(UserError, match="max_new_tokens would do nothing: the adapter writes no texts, leave it out"):
        loralab.pipeline(adapter, str(tiny), max_new_tokens=3)
    with pytest.raises(UserError, match=r"no setting 'max_new_token' \(did you mean 'max_new_tokens'\?\)"):
        loralab.pipeline(*base_that_writes, max_new_token=3)


@pytest.fixture
def base_that_writes(bases, tmp_path):  # noqa: F811
    """An adapter of a model that writes, and its base."""
    handle = loralab.attach(AutoModelForCausalLM.from_pretrained(bases["llama"]), "lora", rank=2)
    handle.save(tmp_path / "writes")
    return tmp_path / "writes", str(bases["llama"])


def test_rows_that_cannot_be_answered_are_named(adapter, tiny):  # noqa: F811
    answer = loralab.pipeline(adapter, str(tiny))
    with pytest.raises(UserError, match=r"empty in 2 rows \(2, 4\)"):
        answer(["the cat", "", "a dog", " "])
    with pytest.raises(UserError, match="a row without sentence: the adapter learned from sentence"):
        answer({"text": "the cat"})
    assert answer([]) == []


def test_another_base_is_refused(adapter, tmp_path, tiny):  # noqa: F811
    other = shutil.copytree(tiny, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    save_file({key: t + 1 for key, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="base"):
        loralab.pipeline(adapter, str(other))


def test_a_predictor_opens_folders(adapter, tiny, tmp_path):  # noqa: F811
    other = shutil.copytree(adapter, tmp_path / "copy")
    predictor = Predictor.open([f"one={adapter}", f"two={other}"], str(tiny))
    answers = predictor.answer([Request("one", ("the cat sees",)), Request("two", ("the cat sees",))])
    assert answers[0] == answers[1]
    alone = loralab.pipeline(adapter, str(tiny))("the cat sees")
    assert answers[0].label == alone["label"]
    assert answers[0].probabilities == approx(alone["probabilities"])
