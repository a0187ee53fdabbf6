"""Generation: a row gets the answer that it gets alone, whatever shares its batch; PEFT and a merge give the same."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import WORDS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import loralab
from loralab import model_names, objectives
from loralab.cli import demo, main
from loralab.data import chats, records, tables
from loralab.errors import UserError
from loralab.objectives import generation
from loralab.objectives.generation import Decoding
from loralab.run import Settings, train
from loralab.run.settings import GenerateMetric
from loralab.serve import BASE, Generator, Pool, adapter_folders
from loralab.serve.generation import Request

SPECIAL = ["[PAD]", "[UNK]", "</s>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LIMIT = 64  # tokens that the model takes
ADAPTERS = {  # name -> method and its settings: with and without a gain, of other layers and ranks
    "A": ("lora", {"rank": 3, "alpha": 24}),
    "B": ("lora", {"rank": 5, "alpha": 40, "targets": "attention"}),
    "C": ("dora", {"rank": 2, "alpha": 16}),
}
PROMPTS = ["the cat sees", "a", "the big red dog likes a small blue cat", "dog dog", "the small cat likes the"]
WAYS = {
    "greedy": Decoding(max_new_tokens=9),
    "beams": Decoding(max_new_tokens=9, num_beams=3),
    "answers": Decoding(max_new_tokens=9, num_beams=3, num_return_sequences=2),
    "sampled": Decoding(max_new_tokens=9, temperature=0.7, top_k=9, top_p=0.9, num_return_sequences=2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small llama with random weights, large enough that adapters change its answers."""
    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, intermediate_size=37, max_position_embeddings=LIMIT, initializer_range=0.5,
        pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> dict[str, Path]:
    """An adapter folder of each of ADAPTERS, with random values, and the same as PEFT writes it."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (method, settings)) in enumerate(ADAPTERS.items()):
        handle = loralab.attach(AutoModelForCausalLM.from_pretrained(base), method, name=name, seed=seed, **settings)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, tensor in handle.state(name).items():
                if key.endswith((".A", ".B")):
                    tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.4)
        handle.save(root / name)
        handle.export(root / f"peft-{name}")
    return {path.name: path for path in root.iterdir()}


def generator(base: Path, folders: dict[str, Path], decoding: Decoding, **more) -> Generator:
    _, tokenizer = loralab_base(base)
    entries = [f"{name}={folders[name]}" for name in ADAPTERS]
    pool = Pool(lambda: loralab_base(base)[0], heads=False)
    return Generator(pool, tokenizer, adapter_folders(entries), decoding, **more)


def loralab_base(base: Path):
    from loralab import models as named

    return named.fresh(str(base), "CAUSAL_LM", None, torch.float32, seed=0)


def test_a_wrong_or_missing_base_says_which_is_wanted(base, folders, monkeypatch, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({key: t + 1e-2 for key, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_names, "unreachable", lambda: "no network")
    name = next(iter(ADAPTERS))
    argv = ["generate", "--adapters", str(folders[name]), "--prompt", "a b", "--max-new-tokens", "2"]
    digest = json.loads((folders[name] / "adapter.json").read_text())["base"]["sha256"][:12]
    for more, told in (["--model", str(other)], "was trained on another base"), ([], "no network"):
        assert main([*argv, *more]) == 2
        err = capsys.readouterr().err
        assert told in err, err
        assert f"the adapter wants the base {base.name} (sha256 of its tensors {digest}): " in err


def requests() -> list[Request]:
    """Every prompt with every adapter and the base, in turn."""
    names = [*ADAPTERS, BASE]
    return [Request(names[(i + j) % 4], (text,)) for i in range(4) for j, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("way", ["greedy", "beams", "answers"])
def test_a_row_gets_in_a_mixed_batch_what_it_gets_alone(base, folders, way):
    """And what PEFT gives with the exported adapter, and a merged model: rows of any length, padded or not."""
    decoding = WAYS[way]
    asked = requests()
    mixed = generator(base, folders, decoding, batch_size=7).answer(asked)
    alone = generator(base, folders, decoding, batch_size=1)
    assert mixed == [alone.answer([request])[0] for request in asked]
    assert {len(texts) for texts in mixed} == {decoding.num_return_sequences}
    plain, tokenizer = loralab_base(base)
    for name in ADAPTERS:
        model, _ = loralab_base(base)
        peft = PeftModel.from_pretrained(model, folders[f"peft-{name}"]).eval()
        merged = loralab.load(loralab_base(base)[0], folders[name]).merge().eval()
        for request, texts in zip(asked, mixed, strict=True):
            if request.adapter == name:
                ids = tokenizer.apply_chat_template(
                    [{"role": "user", "content": request.prompt[0]}], add_generation_prompt=True, return_dict=True,
                    return_tensors="pt",
                )  # fmt: skip
                for other in (peft, merged):
                    got = other.generate(**ids, **decoding.arguments(plain, tokenizer))
                    assert texts == tokenizer.batch_decode(
                        got[:, ids["input_ids"].shape[1] :], skip_special_tokens=True
                    )
    different = {name: [texts for r, texts in zip(asked, mixed, strict=True) if r.adapter == name] for name in ADAPTERS}
    assert len(set(map(str, different.values()))) == len(ADAPTERS)  # else all of this says nothing of adapters


def test_what_a_sample_is(base, folders):
    """The seed decides it; other seeds give other answers; torch's own generator is left alone."""

    def made(seed: int) -> list:
        way = Decoding(max_new_tokens=9, temperature=2.0, num_return_sequences=2, seed=seed)
        return generator(base, folders, way).answer([Request("A", (text,)) for text in PROMPTS])

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert made(0) == made(0) != made(1)
    assert any(first != second for first, second in made(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_text_that_stops_an_answer_ends_it(base, folders):
    request = Request("A", ("the cat sees",))
    (whole,) = generator(base, folders, Decoding(max_new_tokens=9)).answer([request])[0]
    words = whole.split()
    stop = next(word for word in words[1:] if word not in words[:1])
    (cut,) = generator(base, folders, Decoding(max_new_tokens=9, stop=(stop,))).answer([request])[0]
    assert cut.split() == words[: words.index(stop)]


def test_how_a_prompt_is_read_follows_the_training(base, folders, tmp_path):
    """A text is a turn of the user, or as it is where the adapter learned texts; a chat is never a text."""
    maker = generator(base, folders, WAYS["greedy"])
    chat, text = chats.open_chat([{"role": "user", "content": "a cat"}]), ("a cat",)
    assert maker.tokens(Request("A", text)) == maker.tokens(Request("A", chat))
    bare = maker.tokenizer("a cat")["input_ids"]
    assert generator(base, folders, WAYS["greedy"], as_it_is=True).tokens(Request("A", text)) == bare
    known = {"objective": "causal", "task": "x", "columns": ["prompt", "completion"]}
    (folders["A"] / "task.json").write_text(json.dumps(known))
    try:
        maker = generator(base, folders, WAYS["greedy"])
        assert maker.tokens(Request("A", text)) == maker.tokens(Request(BASE, text)) == bare
        assert maker.tokens(Request("B", text)) == maker.tokens(Request("A", chat)) != bare
        template = "{% for m in messages %}the {{ m['content'] }}{% endfor %}"
        known = {**known, "columns": ["messages"], "options": {"template": template}}
        (folders["A"] / "task.json").write_text(json.dumps(known))
        maker = generator(base, folders, WAYS["greedy"])
        assert maker.tokens(Request("A", text)) == maker.tokenizer("the a cat")["input_ids"]
    finally:
        (folders["A"] / "task.json").unlink()


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_an_adapter_of_chats_asks_and_ends_as_it_learned(base, column, tmp_path, capsys):
    """A text is a turn of the user where the rows were chats, whatever the columns are called, and an answer ends with
    the token that was learned behind answers, though the tokenizer's end token is another; both are in task.json."""
    template = TEMPLATE.replace("</s>", "<system>")
    (tmp_path / "t.jinja").write_text(template)
    turns = [[{"role": "user", "content": f"the {w}"}, {"role": "assistant", "content": "a cat"}] for w in WORDS]
    rows = {"messages": turns} if column == "messages" else {"prompt": [t[:1] for t in turns], "completion": [
        t[1:] for t in turns]}  # fmt: skip
    tables.write(rows, tmp_path / "rows.jsonl")
    words = loralab_base(base)[1]
    words.add_special_tokens({"additional_special_tokens": ["<system>"]})
    own = shutil.copytree(base, tmp_path / "own")
    words.save_pretrained(own)
    how = {"epochs": 60, "lr": 0.02, "batch_size": 8, "rank": 5, "max_length": 24, "dtype": "float32"}
    how |= {"template": tmp_path / "t.jinja", "selection": "last", "generate_metric": "exact"}
    result = train(Settings(task=str(tmp_path / "rows.jsonl"), model=str(own), out=tmp_path / "run", **how))
    assert result["metrics"]["exact"] == 1
    folder = tmp_path / "run/adapter"
    known = json.loads((folder / "task.json").read_text())
    assert (known["chats"], known["end"]) == (True, "<system>")
    ask = loralab.pipeline(folder, str(own), max_new_tokens=20)
    end, asked = words.convert_tokens_to_ids("<system>"), f"<user> the {WORDS[0]} <system> <assistant>"
    assert ask._prompt((f"the {WORDS[0]}",)) == words(asked)["input_ids"]
    assert ask(f"the {WORDS[0]}") == {"answer": "a cat"}
    flags = ["--adapters", f"new={folder}", "--model", own, "--max-new-tokens", 20]
    assert run(capsys, "generate", *flags, "--prompt", f"the {WORDS[0]}")[:2] == (0, "a cat\n")
    maker = Generator(ask_pool(own), words, adapter_folders([f"new={folder}", f"old={copy_without(folder, tmp_path)}"]),
                      Decoding(max_new_tokens=20), template=template)  # fmt: skip
    assert (maker.ends["new"], maker.ends["old"]) == ((end,), ())
    asked = [Request(name, (("user", f"the {WORDS[0]}"),)) for name in ("old", "new", "old")]
    mixed = maker.answer(asked)
    assert mixed == [maker.answer([request])[0] for request in asked]
    assert mixed[1] == ["a cat"] != mixed[0]


def ask_pool(folder: Path) -> Pool:
    return Pool(lambda: loralab_base(folder)[0], heads=False)


def copy_without(folder: Path, root: Path) -> Path:
    """Copy an adapter folder of a run as versions before wrote it: nothing is said of chats or their end."""
    old = shutil.copytree(folder, root / "old")
    known = json.loads((old / "task.json").read_text())
    (old / "task.json").write_text(json.dumps({key: x for key, x in known.items() if key not in ("chats", "end")}))
    return old


def test_draws_of_batches_go_on(base, folders):
    """Equal prompts get answers of their own in every batch and every call; a new start repeats them all."""
    asked, way = [Request("A", ("the cat sees",))] * 12, Decoding(max_new_tokens=9, temperature=2.0, seed=3)
    found = {}
    for batch_size in (1, 5, 12):
        maker = generator(base, folders, way, batch_size=batch_size)
        first, second = maker.answer(asked), maker.answer(asked)
        assert len({texts for (texts,) in first}) > 6
        assert first != second
        found[batch_size] = first, second
        again = generator(base, folders, way, batch_size=batch_size)
        assert (again.answer(asked), again.answer(asked)) == found[batch_size]
    ask = loralab.pipeline(folders["A"], str(base), temperature=2.0, max_new_tokens=9, batch_size=1)
    assert len({one["answer"] for one in ask(["the cat sees"] * 12)}) > 6
    assert len({ask("the cat sees")["answer"] for _ in range(6)}) > 3


# ---- the command -----------------------------------------------------------------------------------------------------


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def entries(folders: dict[str, Path]) -> list[str]:
    return [f"{name}={folders[name]}" for name in ADAPTERS]


ROWS = {
    "messages": lambda text: [{"role": "user", "content": text}],
    "conversations": lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "dog"}],
    "prompt": lambda text: text,
    "instruction": lambda text: text,
    "text": lambda text: text,
}


def test_answers_are_counted_without_a_terminal(base, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loralab.run.bar.Pulse.every", 0.0)
    tables.write({"prompt": PROMPTS}, tmp_path / "in.jsonl")
    given = ["--input", tmp_path / "in.jsonl", "--model", base, "--max-new-tokens", 3, "--batch-size", 2]
    code, _, err = run(capsys, "generate", *given, "--adapters", f"A={folders['A']}", "--side-by-side", "--json")
    counted = [line for line in err.splitlines() if f"of {2 * len(PROMPTS)} rows" in line]
    assert (code, len(counted)) == (0, len(PROMPTS))
    assert counted[-1].startswith(f"{2 * len(PROMPTS)} of")


@pytest.mark.parametrize(("column", "kind"), [*((c, ".jsonl") for c in ROWS), *(("prompt", k) for k in tables.WRITERS)])
def test_a_file_in_a_file_out(base, folders, tmp_path, capsys, column, kind):
    """All columns stay; each form of file asks the same; rows name their adapters, or are answered side by side."""
    rows = {column: [ROWS[column](text) for text in PROMPTS], "who": ["A", BASE, "B", "C", str(folders["A"])]}
    tables.write(rows, tmp_path / f"in{kind}")
    maker = generator(base, folders, WAYS["greedy"])
    given = ["--input", tmp_path / f"in{kind}", "--model", base, "--max-new-tokens", 9, "--adapters", *entries(folders)]
    given[-3] = folders["A"]  # which has a name of its own, A
    code, _, err = run(capsys, "generate", *given, "--adapter-column", "who", "--out", tmp_path / f"out{kind}")
    assert (code, err) == (0, "")
    found = tables.read_all(tmp_path / f"out{kind}")
    wanted = maker.answer([Request(n, (t,)) for n, t in zip(["A", BASE, "B", "C", "A"], PROMPTS, strict=True)])
    assert found == tables.read_all(tmp_path / f"in{kind}") | {"answer": [texts[0] for texts in wanted]}
    code, out, err = run(capsys, "generate", *given, "--side-by-side", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [list(row) for row in found] == [[column, "who", BASE, "A", "B", "C"]] * len(PROMPTS)
    for name in (BASE, *ADAPTERS):
        wanted = maker.answer([Request(name, (text,)) for text in PROMPTS])
        assert [row[name] for row in found] == [texts[0] for texts in wanted]


def test_prompts_of_the_command_line(base, folders, capsys):
    """One is printed as it is written, several are shown with their answers; several answers are a list."""
    maker = generator(base, folders, WAYS["greedy"])
    (wanted,) = maker.answer([Request("A", (PROMPTS[0],))])[0]
    flags = ["--adapters", folders["A"], "--model", base, "--max-new-tokens", 9]
    assert run(capsys, "generate", "--prompt", PROMPTS[0], *flags) == (0, wanted + "\n", "")
    code, out, _ = run(capsys, "generate", "--prompt", *PROMPTS[:2], *flags)
    assert code == 0
    assert wanted in " ".join(out.split())
    code, out, _ = run(capsys, "generate", "--prompt", *PROMPTS[:2], *flags, "--json", "--num-beams", 2,
                       "--num-return-sequences", 2)  # fmt: skip
    assert [len(row["answer"]) for row in json.loads(out)] == [2, 2]


def test_a_chat_at_the_terminal(base, folders, capsys, monkeypatch):
    """What was said is part of the next question until /reset; a bad line is one line, and the chat goes on."""
    maker = generator(base, folders, WAYS["greedy"])

    def said(name: str, *turns: tuple[str, str]) -> str:
        return maker.answer([Request(name, turns)])[0][0]

    first = said("A", ("user", "the cat"))
    second = said("C", ("user", "the cat"), ("assistant", first), ("user", "a dog"))
    third = said("C", ("user", "a dog"))
    lines = ["the cat", "/adapter D", "/adaptor C", "/adapter C", "a dog", "", "/reset", "a dog", "cat " * LIMIT]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    flags = ["--adapters", *entries(folders), "--max-new-tokens", 9, "--model", base]
    flags[1:4] = flags[2:4] + flags[1:2]  # the last one begins
    code, out, err = run(capsys, "generate", "--chat", *flags)
    assert code == 0
    answers = [text for line in out.split("\n") if (text := re.sub("^(> )+", "", line))]
    assert answers == [text for text in (first, second, third) if text]
    assert second != third
    assert [line.split(":")[1][:13] for line in err.splitlines()] == [" no adapter '", " no command /", " a prompt of "]


LONG = "cat " * LIMIT
BAD = {  # flags -> what the one line says
    ("--prompt", "a"): "no base",
    ("--model", "BASE"): "nothing given to answer",
    ("--model", "BASE", "--prompt", "a", "--chat"): "--prompt and --chat given",
    ("--model", "BASE", "--prompt", "a", "--side-by-side"): "--side-by-side compares adapters",
    ("--model", "BASE", "--prompt", "a", "--adapters", "A", "B"): "2 adapters: add --side-by-side",
    ("--model", "BASE", "--prompt", "a", "--adapters", "base=A"): "an adapter is called base",
    ("--model", "BASE", "--prompt", "a", "--adapters", "nowhere"): "nowhere",
    ("--model", "BASE", "--prompt", "a", "--adapter-column", "who"): "--adapter-column names a column of --input",
    ("--model", "BASE", "--prompt", "a", "--temperature", "0"): "--temperature 0.0: expected above 0",
    ("--model", "BASE", "--prompt", "a", "--top-p", "1.5"): "--top-p 1.5: expected a share",
    ("--model", "BASE", "--prompt", "a", "--top-k", "0"): "--top-k 0: expected 1 or more",
    ("--model", "BASE", "--prompt", "a", "--num-return-sequences", "2"): "greedy answers are all the same",
    ("--model", "BASE", "--prompt", "a", "--max-new-tokens", "0"): "--max-new-tokens 0: expected 1 or more",
    ("--model", "BASE", "--prompt", "a", "--batch-size", "0"): "--batch-size 0: expected 1 or more",
    ("--model", "BASE", "--prompt", ""): "--prompt: empty",
    ("--model", "BASE", "--max-new-tokens", "9", "--prompt", "a", LONG): (
        "--prompt: row 2: a prompt of 67 tokens and an answer of up to 9 are more than the 64"
    ),
    ("--model", "BASE", "--input", "ROWS", "--adapter-column", "who", "--max-new-tokens", "4"): (
        "2 rows (2, 3): no adapter 'X'; row 4: a message without role and content"
    ),
    ("--model", "BASE", "--input", "ROWS", "--adapter-column", "whom"): "no column 'whom'",
    ("--model", "BASE", "--input", "OTHER"): "no column to answer among question, answer",
    ("--model", "BASE", "--input", "TAKEN"): "column answer is there already; --prefix renames",
    ("--model", "BASE", "--input", "TAKEN", "--out", "rows.xlsx"): "a name ending in",
    ("--model", "BASE", "--chat", "--plain"): "leave --plain out",
    ("--model", "BASE", "--chat", "--keep-going", "--prefix", "x"): "--prefix would do nothing with --chat",
    ("--model", "BASE", "--prompt", "a", "--template", "nowhere"): "--template nowhere does not exist",
}


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: " ".join(flags)[:60])
def test_bad_input_is_one_line(base, folders, tmp_path, capsys, flags):
    ask = [{"role": "user", "content": "a cat"}]
    tables.write({"messages": [ask, ask, ask, [{"role": "user"}]], "who": [BASE, "X", "X", BASE]}, tmp_path / "r.jsonl")
    tables.write({"question": ["a"], "answer": ["b"]}, tmp_path / "o.jsonl")
    tables.write({"prompt": ["a"], "answer": ["b"]}, tmp_path / "t.jsonl")
    places = {"BASE": base, "ROWS": tmp_path / "r.jsonl", "OTHER": tmp_path / "o.jsonl", "TAKEN": tmp_path / "t.jsonl"}
    places |= {**folders, "base=A": f"base={folders['A']}"}
    code, out, err = run(capsys, "generate", *(places.get(flag, flag) for flag in flags))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert BAD[flags] in err


def test_rows_that_can_be_answered_are(base, folders, tmp_path, capsys):
    tables.write({"prompt": ["a cat", LONG, "the dog"]}, tmp_path / "in.csv")
    flags = ["--input", tmp_path / "in.csv", "--model", base, "--max-new-tokens", 3, "--out", tmp_path / "out.jsonl"]
    assert run(capsys, "generate", *flags, "--keep-going")[0] == 0
    found = tables.read_all(tmp_path / "out.jsonl")
    assert [answer is None for answer in found["answer"]] == [False, True, False]
    assert [error is None for error in found["error"]] == [True, False, True]


def test_a_tokenizer_without_a_template_takes_prompts_as_they_are(base, tmp_path, capsys):
    model, tokenizer = loralab_base(base)
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bare")
    capsys.readouterr()
    flags = ["--prompt", PROMPTS[2], "--max-new-tokens", 9, "--model"]
    _, plain, err = run(capsys, "generate", *flags, base, "--plain")
    assert err == ""
    code, bare, err = run(capsys, "generate", *flags, tmp_path / "bare")
    assert (code, bare) == (0, plain)
    assert err == "note: the tokenizer has no chat template, so prompts are taken as they are\n"
    code, _, err = run(capsys, "generate", "--chat", "--model", tmp_path / "bare")
    assert (code, err.count("\n")) == (2, 1)


# ---- what an answer is worth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ('{"a": 1, "b": [true, null]}', 1),
        ('{"b": [true, null], "a": 1.0}', 1),
        ('Here it is:\n```json\n{"a": 1, "b": [true, null]}\n```', 1),
        ('{"a": 1, "b": [1, null]}', 0),  # 1 is not true
        ('{"a": "1", "b": [true, null]}', 0),
        ('{"a": 1}', 0),
        ('{"a": 1, "b": [true, null]', 0),
        ('{x} {"a": 1, "b": [true, null]}', 1),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_is_compared_by_what_it_says(answer, worth):
    assert generation.same_json(answer, '{"a": 1, "b": [true, null]}') == worth


def test_exact_and_rouge():
    assert generation.exact(" a cat\n", "a cat") == 1 != generation.exact("a Cat", "a cat")
    try:
        import rouge_score  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"loralab\[rouge\]"):
            generation.rouge_l("a", "b")
    else:
        assert generation.rouge_l("the cat sees", "the dog sees") == pytest.approx(2 / 3)


# ---- the metric of a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def completions(tmp_path) -> Path:
    rows = [{"prompt": f"the {size} cat", "completion": f" {size} dog"} for size in ["red", "blue", "big", "small"] * 8]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_metric_of_a_run_is_what_its_adapter_writes(base, completions, tmp_path, capsys):
    """It is taken with the selected adapter, on at most so many rows, and is what `loralab generate` would give."""
    given = {"task": str(completions), "model": str(base), "rank": 8, "lr": 2e-2, "epochs": 6, "batch_size": 5}
    given["max_length"] = 16
    results = {}
    for rows in (3, 100):
        settings = Settings(**given, generate_metric="exact", generate_rows=rows, out=tmp_path / f"run{rows}")
        results[rows] = train(settings)["metrics"]
    plain = train(Settings(**given, out=tmp_path / "plain"))["metrics"]
    assert {key: value for key, value in results[100].items() if key != "exact"} == plain
    task = objectives.load(str(completions))
    asked = task.validation["validation"].texts
    entry = f"run={tmp_path / 'run100' / 'adapter'}"
    pool = Pool(lambda: loralab_base(base)[0], heads=False)
    maker = Generator(pool, loralab_base(base)[1], adapter_folders([entry]), Decoding(max_new_tokens=40))
    texts = maker.answer([Request("run", row[:1]) for row in asked])
    right = [text.strip() == row[1].strip() for (text,), row in zip(texts, asked, strict=True)]
    assert results[100]["exact"] == pytest.approx(sum(right) / len(right))
    assert results[100]["exact"] > 0.5  # else it would say little
    assert results[3]["exact"] * 3 == pytest.approx(round(results[3]["exact"] * 3))
    rows = [dict(zip(("prompt", "completion"), row, strict=True)) for row in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["evaluate", entry.removeprefix("run="), "--task", str(tmp_path / "asked.jsonl"), "--json"]
    assert main([*argv, "--generate-metric", "exact"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["exact"] == results[100]["exact"]
    assert main([*argv, "--generate-rows", "3"]) == 2
    assert "--generate-rows: no --generate-metric" in capsys.readouterr().err


def test_evaluate_lets_the_adapter_write_at_the_rank_that_is_asked_for(
    base, completions, tmp_path, capsys, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        "loralab.objectives.generation.in_batches",
        lambda model, *rest: seen.append(loralab.adapters.of(model).active.chosen) or [("",)] * len(rest[1]),
    )
    common = {"task": str(completions), "model": str(base), "max_length": 16, "out": tmp_path / "run"}
    train(Settings(**common, method="dylora", rank=3, epochs=2, batch_size=5))
    argv = ["evaluate", str(tmp_path / "run/adapter"), "--task", str(completions), "--generate-metric", "exact"]
    assert main([*argv, "--rank", "2"]) == 0
    assert [2 in chosen.values() for chosen in seen] == [True]


@pytest.mark.parametrize(
    ("rows", "metric", "says"),
    [
        ([{"text": "the cat"}, {"text": "the dog"}] * 5, "exact", "rows of plain text ask nothing"),
        ([{"prompt": "the cat", "completion": "a"}] * 9, "json", "the answer 'a' is no JSON: choose exact"),
        (
            [{"prompt": "cat " * (LIMIT - 4), "completion": "a"}] * 9,
            "exact",
            "are more than the 64",
        ),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 9, "exact", "rows has no answers to write"),
    ],
)
def test_a_metric_that_cannot_be_taken_is_refused_before_training(base, tmp_path, rows, metric, says):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"text": ("text",), "label": "label"} if "label" in rows[0] else {}
    settings = {"task": str(path), "model": str(base), "max_length": LIMIT, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=says):
        train(Settings(**settings, **columns, generate_metric=metric))
    assert not (tmp_path / "run").exists()


def test_every_metric_is_a_setting():
    assert {*get_args(GenerateMetric)} == {*generation.METRICS}


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_of_a_decoder_shows_answers_before_and_after(base, tmp_path, capsys, monkeypatch):
    model, tokenizer = loralab_base(base)
    model.config.max_position_embeddings = 256
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "longer")
    monkeypatch.setattr(demo, "DECODER", demo.DECODER | {"train_rows": 8, "validation_rows": 4})
    given = ("demo", "--decoder", "--model", tmp_path / "longer", "--out", tmp_path / "demo")
    code, out, _ = run(capsys, *given)
    assert code == 0
    shown = records.load().validation["validation"].texts
    told = " ".join(out.split())
    assert sum(row[0][1].removeprefix(records.QUESTION) in told for row in shown) == demo.SHOWN
    code, out, _ = run(capsys, *given, "--json")  # in the place of the first
    found = json.loads(out)
    assert found["right"] == {"base": 0.0, "lora": 0.0}
    assert [list(row) for row in found["answers"]] == [["question", "right", "base", "lora"]] * demo.SHOWN
    assert any(row["base"] != row["lora"] for row in found["answers"])
    (tmp_path / "demo" / "records" / "run.json").unlink()
    assert "is not a run of loralab" in run(capsys, *given)[2]


def test_a_demo_without_its_model_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORALAB_MODELS", str(tmp_path))
    code, out, err = run(capsys, "demo", "--decoder", "--out", tmp_path / "demo")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the model smollm2 is not on this machine: `make models`" in err
