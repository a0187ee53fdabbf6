"""Rows of many adapters in one batch are the rows alone: in the library, from a pool, on the command line."""

import copy
import csv
import dataclasses
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from archs import alone, assert_rows, build, labelled, rank_map, rows, shake
from test_cli import adapter, cli, refused  # noqa: F401  (fixtures)

import loralab
from loralab import models
from loralab.fast import prepare, put_back
from loralab.layer import Adapted
from loralab.recipe import NAMED
from loralab.serve import Answer, Pool, Predictor, Request, adapter_folders

ADAPTS = [name for name, (row, _) in NAMED.items() if row.factors is not None]
EQUAL = [("ab", [0, 0, 1, 1]), ("ba", [0, 0, 1, 1]), ("a", [0] * 4), ("ab", [1] * 4)]
WORDS = ["the", "a", "red", "blue", "cat", "dog", "sees", "likes", "big", "small"]


def settings(method, model):
    row = NAMED[method][0]
    allowed = vars(row.factors)
    given = {key: value for key, value in {"rank": 3, "alpha": 5.0}.items() if key in allowed}
    return given | ({"ranks": rank_map(model)} if row.policy else {})


# ---- the library -----------------------------------------------------------------------------------------------------


@pytest.mark.few(25)
@pytest.mark.parametrize("store", [None, "int8", "nf4"])
@pytest.mark.parametrize("method", ADAPTS)
def test_a_row_of_a_mixed_batch_is_the_row_alone(method, store):
    if (own := NAMED[method][0].store) is not None and store is not None:
        pytest.skip(f"{method} says itself that its base is kept in {own}")
    if store == "nf4" or own:
        pytest.importorskip("bitsandbytes")
    model, batch, ids = build("bert"), rows(), [1, 0, 2, 1, 0]
    stored = {"store": own or store}
    first = settings(method, model) | ({} if own else stored)
    adapters = loralab.attach(model, method, name="a", head=True, batches=[labelled()], **first)
    adapters.add("b", rank=5, targets="attention-qv", head=True, labels=["x", "y"], **stored)
    adapters.add("c", "dora", rank=2, targets="mlp", head=True, labels=["score"], **stored)
    for seed, name in enumerate("abc"):
        shake(adapters, name, seed, 0.1)
    expected = list(alone(model, adapters, "abc", ids, batch))
    for quick in (False, True):
        if quick:
            prepare(model)
        for grad in (torch.enable_grad, torch.no_grad, torch.no_grad, torch.inference_mode, torch.no_grad):
            with grad(), adapters.use(list("abc"), ids):
                assert_rows(model(**batch).logits, expected)
            with grad(), adapters.use(list("cab"), [2, 1, 0, 2, 1]):
                assert_rows(model(**batch).logits, expected)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("names", "ids"), [("ab", [0, 0, 1, 1]), ("ba", [0, 0, 1, 1]), ("a", [0] * 4), ("ab", [1] * 4)]
)
def test_equal_parts_in_order_are_rows_too(quick, names, ids):
    model, batch = build("mpnet"), rows(4)
    adapters = loralab.attach(model, "dora", name="a", rank=3, head=True)
    adapters.add("b", rank=2, head=True)
    shake(adapters, "a"), shake(adapters, "b", 5)
    expected = list(alone(model, adapters, names, ids, batch))
    if quick:
        prepare(model)
    with torch.no_grad(), adapters.use(list(names), ids):
        assert_rows(model(**batch).logits, expected)


@pytest.mark.parametrize("quick", [False, True])
def test_dylora_at_a_chosen_rank_in_a_mixed_batch(quick):
    model, batch, ids = build("bert"), rows(), [1, 0, 0, 1, 0]
    adapters = loralab.attach(model, "dylora", name="a", rank=6, head=True)
    adapters.add("b", "dylora", rank=5, head=True)
    shake(adapters, "a"), shake(adapters, "b", 5)
    if quick:
        prepare(model)
    seen = []
    for rank in (2, 5, None, 2):
        expected = list(alone(model, adapters, "ab", ids, batch, rank=rank))
        with torch.no_grad(), adapters.use(["a", "b"], ids, rank=rank):
            assert_rows(model(**batch).logits, expected)
        seen.append(torch.stack(expected))
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def in_place(adapters, key):
    with torch.no_grad():
        adapters.state("a")[key].mul_(-1.5)


def new_data(adapters, key):
    tensor = adapters.state("a")[key]
    tensor.data = tensor.data * -1.5


def new_parameter(adapters, key):
    path, _, role = key.rpartition(".")
    held = adapters.heads[path].copies["a"] if path in adapters.heads else adapters.layers[path].adapters["a"]
    setattr(held, role, torch.nn.Parameter(adapters.state("a")[key].detach() * -1.5))


def trained(adapters, key):
    """A loop that writes into t.data, which leaves no trace, but trains."""
    with adapters.use("a"):
        adapters.model(**rows()).logits.sum().backward()
    adapters.state("a")[key].data.mul_(-1.5)


def another_trained(adapters, key):
    """The loop trains an adapter that has no part in the layer of `key`."""
    adapters.add("c", targets="attention-qv", rank=2, head=True)
    with adapters.use("c"):
        adapters.model(**rows()).logits.sum().backward()
    adapters.state("a")[key].data.mul_(-1.5)


def anew(adapters, key):
    tensors = {k: t.detach().clone() for k, t in adapters.state("a").items()}
    with adapters.use(None):
        adapters.remove("a")
    adapters.add("a", "dora", rank=3, head=True)
    with torch.no_grad():
        for k, t in adapters.state("a").items():
            t.copy_(tensors[k] * (-1.5 if k == key else 1))


@pytest.mark.few(8)
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("change", [in_place, new_data, new_parameter, trained, another_trained, anew])
@pytest.mark.parametrize("key", ["bert.encoder.layer.1.output.dense.B", "classifier.bias"])
def test_a_changed_tensor_is_never_served_stale(quick, change, key):
    model, batch, ids = build("bert"), rows(), [1, 0, 0, 1, 0]
    adapters = loralab.attach(model, "dora", name="a", rank=3, head=True)
    adapters.add("b", rank=2, head=True)
    shake(adapters, "a"), shake(adapters, "b", 5)
    if quick:
        prepare(model)

    def outputs():
        with torch.no_grad(), adapters.use(["a", "b"], ids):
            mixed = model(**batch).logits
        with torch.no_grad(), adapters.use("a"):
            return mixed, model(**batch).logits

    before = outputs()
    change(adapters, key)
    for mixed, single in (outputs(), outputs()):
        assert_rows(mixed, list(alone(model, adapters, "ab", ids, batch)))
        assert_rows(single, list(alone(model, adapters, "a", [0] * 5, batch)))
        assert (single - before[1]).abs().max() > 1e-3


@torch.no_grad()
def test_an_update_is_lowered_once_where_a_loop_keeps_it(monkeypatch):
    model, calls = build("bert"), []
    adapters = loralab.attach(model, "dora", name="a", rank=3, head=True)
    adapters.add("b", rank=2, head=True)
    lower = Adapted.lower
    monkeypatch.setattr(Adapted, "lower", lambda layer, *given: calls.append(given) or lower(layer, *given))
    with adapters.caching():
        for names, ids in (("ab", [0, 1, 1, 0, 0]), ("ab", [0, 1, 1, 0, 0]), ("ba", [0, 0, 0, 0, 1]), ("b", [0] * 5)):
            with adapters.use(list(names), ids):
                model(**rows())
    assert len(calls) == 2 * len(adapters.layers)


def test_an_adapter_on_more_layers_than_the_fast_path_knew_is_not_ignored():
    model, batch = build("bert"), rows()
    adapters = loralab.attach(model, name="a", targets="attention-qv", rank=3)
    prepare(model)
    adapters.add("b", targets="mlp", rank=3)
    shake(adapters, "b")
    with torch.no_grad(), adapters.use("b"):
        fast = model(**batch).logits
        put_back(model)
        torch.testing.assert_close(fast, model(**batch).logits)
    with torch.no_grad(), adapters.use(None):
        assert (model(**batch).logits - fast).abs().max() > 1e-3


# ---- a pool ----------------------------------------------------------------------------------------------------------

KINDS = {  # name -> (method, labels, settings): what one base wears at once
    "pets": ("lora", ["cat", "dog"], {"rank": 3}),
    "size": ("dora", ["big", "small", "other"], {"rank": 2, "targets": "attention-qv"}),
    "score": ("vera", ["score"], {"rank": 7}),
    "many": ("dylora", ["x", "y"], {"rank": 4}),
    "delta": ("delta-lora", ["u", "v", "w", "z"], {"rank": 3}),
    "dense": ("superlora", ["no", "yes"], {}),
    "eight": ("lora", ["l", "r"], {"rank": 3, "store": "int8"}),
    "bias": ("bitfit", ["m", "n"], {}),
    "head": ("head", ["p", "q"], {}),
}


def fresh(tiny):
    return models.classifier(str(tiny), 2, False, torch.float32, seed=0)[0]


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """One adapter folder of each kind."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, (name, (method, labels, given)) in enumerate(KINDS.items()):
        adapters = loralab.attach(fresh(tiny), method, name=name, labels=labels, head=True, **given)
        shake(adapters, name, seed)
        with torch.no_grad():
            for role, tensor in adapters.tensors(name).values():
                if role == "head":
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
        adapters.save(place / name)
    return {name: place / name for name in KINDS}


@pytest.fixture
def predictor(tiny, folders):
    tokenizer = models.classifier(str(tiny), 2, False, torch.float32, seed=0)[1]

    def make(budget=None, fast=True, given=folders, **more):
        return Predictor(
            Pool(lambda: fresh(tiny), budget, fast), tokenizer, adapter_folders(list(map(str, given.values()))), **more
        )

    return make


def some_rows(count, names=tuple(KINDS), seed=3):
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 9))) for _ in range(count)]
    return [Request(chance.choice(names), (text, "a cat") if chance.random() < 0.2 else (text,)) for text in texts]


@torch.no_grad()
def literal(tiny, folders, row):
    """One adapter on a model of its own, one row."""
    model, tokenizer = models.classifier(str(tiny), 2, False, torch.float32, seed=9)
    loralab.load(model, folders[row.adapter])
    logits = model.eval()(**tokenizer(*row.texts, return_tensors="pt")).logits[0]
    labels = KINDS[row.adapter][1]
    shares = dict(zip(labels, logits.softmax(0).tolist(), strict=True))
    return Answer(float(logits[0]), None) if len(labels) == 1 else Answer(max(shares, key=shares.get), shares)


def assert_same(ours, theirs, tolerance=1e-5):
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine, Answer)
        if other.probabilities is None:
            assert mine.probabilities is None
            assert mine.label == pytest.approx(other.label, abs=10 * tolerance)
        else:
            assert mine.probabilities == pytest.approx(other.probabilities, abs=tolerance)
            assert mine.label == max(mine.probabilities, key=mine.probabilities.get)


@pytest.mark.parametrize("quick", [False, True])
def test_answers_are_those_of_one_adapter_and_one_row(tiny, folders, predictor, quick):
    asked = some_rows(40)
    assert {row.adapter for row in asked} == set(KINDS)
    assert_same(predictor(fast=quick, batch_size=7).answer(asked), [literal(tiny, folders, row) for row in asked])


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_a_budget_is_kept_and_changes_no_answer(predictor, monkeypatch, share):
    asked = some_rows(60)
    free = predictor(batch_size=7)
    expected = free.answer(asked)
    sizes = [each.size for each in free.pool.loaded.values()]
    assert len(sizes) == len(KINDS)
    budget = max(max(sizes), int(share * sum(sizes)))
    tight, seen = predictor(budget, batch_size=7), []
    forward = Predictor._forward
    monkeypatch.setattr(
        Predictor, "_forward", lambda self, *given: seen.append(self.pool.used) or forward(self, *given)
    )
    for part in (asked[:25], asked[25:]):
        got = tight.answer(part)
        assert tight.pool.used <= budget
        assert_same(got, expected[:25] if part[0] is asked[0] else expected[25:])
    assert max(seen) <= budget
    assert tight.pool.count > len(KINDS)  # some were dropped and loaded again
    on_models = [name for kind in tight.pool.models for name in tight.pool.handle(kind).names if tight.pool.loaded]
    assert sorted(on_models) == sorted(each.slot for each in tight.pool.loaded.values())


def test_the_least_recently_used_goes_first(predictor, folders):
    names = ["pets", "size", "many"]
    sizes = {}
    for name in names:
        free = predictor()
        sizes[name] = free.pool.admit(folders[name]).size
    pool = predictor(sum(sizes.values()) - 1).pool
    for name in ("pets", "size", "pets", "many"):
        pool.admit(folders[name])
    assert list(pool.loaded) == [folders["pets"], folders["many"]]
    assert pool.admit(folders["size"], beside=[folders["pets"], folders["many"]]) is None
    with pytest.raises(loralab.UserError, match="more than the budget of 10"):
        predictor(10).pool.admit(folders["pets"])
    assert predictor(10).pool.used == 0


def test_the_size_of_an_adapter_is_that_of_its_tensors(predictor, folders):
    """Tensors that the update is lowered to count too, and what several layers share counts once."""
    free = predictor()
    for name in ("pets", "score", "dense", "delta"):
        loaded = free.pool.admit(folders[name])
        handle = free.pool.handle(loaded.kind)
        own = sum(t.numel() * t.element_size() for _, t in handle.tensors(loaded.slot).values())
        lowered = [handle.layers[p].lower(loaded.slot) for p in handle.specs[loaded.slot].paths]
        more = sum(t.numel() * t.element_size() for u in lowered for t in u if t is not None)
        assert own < loaded.size <= own + more


def test_every_fault_of_every_row_and_the_good_rows_answered(tiny, folders, predictor, tmp_path):
    given = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    header = json.loads((given["many"] / "adapter.json").read_text())
    header["base"]["sha256"] = "0" * 64
    (given["many"] / "adapter.json").write_text(json.dumps(header))
    asked = [
        Request("pets", ("a cat",)),
        Request("nobody", ("a cat",)),
        Request("many", ("a dog",)),
        Request("size", ("red",)),
        Request("pets", (" ",)),
        Request("pets", (None,)),
        Request("many", ("",)),
        Request("score", ("", " ")),
        Request("pets", ("the dog",)),
        Request("pets", ("a \ud83d dog",)),
        Request("pets", (7,)),
        Request("pets", ("a cat", "sees", "the dog")),
        Request("pets", ("a new199",)),
    ]
    predictor = predictor(given=given)
    predictor.tokenizer = copy.deepcopy(predictor.tokenizer)
    predictor.tokenizer.add_tokens([f"new{i}" for i in range(200)])  # the model has no embedding of the last
    shutil.rmtree(given["size"])
    answers = predictor.answer(asked)
    messages = {1: "no adapter 'nobody'", 2: "wants the base", 3: "size is no adapter folder", 4: "no text",
            5: "no text", 6: "another base", 7: "no text", 9: "half of a surrogate pair",
            10: "number instead of text", 11: "3 texts: give one or two",
            12: "a token that the model does not know"}  # fmt: skip
    for i, answer in enumerate(answers):
        assert isinstance(answer, loralab.UserError) == (i in messages), i
        assert messages.get(i, "") in str(answer)
    assert "no text" in str(answers[6])
    assert_same([answers[0], answers[8]], [literal(tiny, folders, asked[i]) for i in (0, 8)])


def test_a_row_has_as_many_texts_as_its_adapter_learned_from(predictor):
    asked = predictor()
    pets = asked.adapters["pets"]
    for columns, texts, fault in (
        (("title", "body"), ("a cat",), "1 given, and the adapter learned from 2: title, body"),
        (("title",), ("a cat", "sees"), "2 given, and the adapter learned from 1: title"),
        (("title", "body"), ("a cat", "sees"), None),
        ((), ("a cat", "sees"), None),  # the folder does not say
    ):
        asked.adapters = {**asked.adapters, "pets": dataclasses.replace(pets, text=columns)}
        (answer,) = asked.answer([Request("pets", texts)])
        assert isinstance(answer, loralab.UserError) == (fault is not None)
        assert (fault or "") in str(answer)


def test_a_rank_is_refused_for_the_rows_that_have_none(predictor):
    answers = predictor(rank=2).answer(
        [Request("many", ("a cat",)), Request("pets", ("a cat",)), Request("head", ("a cat",))]
    )
    assert isinstance(answers[0], Answer)
    assert "rank=2" in str(answers[1])
    assert "no rank" in str(answers[2])
    full = predictor().answer([Request("many", ("a cat",))])
    assert full[0].probabilities != pytest.approx(answers[0].probabilities, abs=1e-4)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path):
    """Rows as columns, with a column of numbers that must come back as they are."""
    some = [row for row in some_rows(12) if len(row.texts) == 1]
    return {"id": [f"{i:03}" for i in range(len(some))], "who": [row.adapter for row in some],
            "text": [row.texts[0] for row in some]}  # fmt: skip


def written(columns, path):
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_back(path):
    if path.suffix == ".parquet":
        return pa.parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with path.open(newline="") as stream:
            return list(csv.DictReader(stream))
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(folders, tiny, path, *more):
    return ["predict", "--adapters", *folders.values(), "--input", path, "--model", tiny, *more]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_comes_back_with_label_and_probabilities(cli, tiny, folders, asked, tmp_path, suffix):  # noqa: F811
    path, out = written(asked, tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}"
    code, printed, err = cli(*command(folders, tiny, path, "--adapter-column", "who", "--out", out, "--memory", "1MB"))
    assert (code, printed) == (0, "")
    assert f"{len(asked['id'])} rows" in err
    for i, row in enumerate(read_back(out)):
        assert {key: row[key] for key in asked} == {key: column[i] for key, column in asked.items()}
        assert int(row["row"]) == i + 1
        expected = literal(tiny, folders, Request(asked["who"][i], (asked["text"][i],)))
        if expected.probabilities is None:
            assert float(row["label"]) == pytest.approx(expected.label, abs=1e-4)
            continue
        shares = dict(json.loads(row["probabilities"]) if suffix == ".csv" else row["probabilities"])
        assert shares == pytest.approx(expected.probabilities, abs=1e-5)
        assert row["label"] == max(shares, key=shares.get)


def test_a_column_of_row_numbers_stays_as_it_is(cli, tiny, folders, asked, tmp_path):  # noqa: F811
    path = written({"row": [f"r{i}" for i in range(len(asked["text"]))], "text": asked["text"]}, tmp_path / "in.csv")
    out = cli(*command({"pets": folders["pets"]}, tiny, path))[1]
    assert [line.split(",")[0] for line in out.splitlines()[:3]] == ["row", "r0", "r1"]


def test_a_device_that_is_not_there_is_told_by_each_command(cli, tiny, folders, asked, tmp_path):  # noqa: F811
    path, cuda = written(asked, tmp_path / "in.csv"), torch.cuda.is_available()
    commands = [
        command({"pets": folders["pets"]}, tiny, path),
        ["evaluate", folders["pets"], "--task", path, "--model", tiny],
        ["generate", "--prompt", "a cat", "--model", tiny],
    ]
    assert cli(*commands[0], "--device", "cpu")[0] == 0
    for words in commands if not cuda else ():
        code, _, err = cli(*words, "--device", "cuda")
        assert (code, "--device cuda: torch finds no GPU" in err) == (2, True), err


def test_one_adapter_needs_no_column(cli, tiny, folders, asked, tmp_path):  # noqa: F811
    path = written(asked, tmp_path / "in.csv")
    one = {"pets": folders["pets"]}
    code, out, _ = cli(*command(one, tiny, path, "--json"))
    assert code == 0
    records = json.loads(out)
    assert [record["label"] for record in records] == [
        literal(tiny, folders, Request("pets", (text,))).label for text in asked["text"]
    ]
    assert cli(*command(one, tiny, path))[1].splitlines()[0] == "row,id,who,text,label,probabilities"


def test_an_adapter_of_a_run_knows_its_columns_and_its_base(cli, tiny, own, adapter, tmp_path):  # noqa: F811
    code, out, _ = cli("predict", "--adapters", adapter, "--input", own["class"], "--prefix", "our_", "--json")
    assert code == 0
    records = json.loads(out)
    assert {"our_row", "sentence", "label", "our_label", "our_probabilities"} == set(records[0])
    model, tokenizer = models.classifier(str(tiny), 2, False, torch.float32, seed=9)
    loralab.load(model, adapter)
    with torch.no_grad():
        for record in records[:20]:
            expected = model.eval()(**tokenizer(record["sentence"], return_tensors="pt")).logits.softmax(-1)[0]
            torch.testing.assert_close(torch.tensor([record["our_probabilities"][k] for k in ("cat", "dog")]), expected)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"who": {0: "nobody", 2: "nobody", 3: "nobody"}}, (), "3 rows (1, 3, 4): no adapter 'nobody'"),
        ({"text": {1: ""}, "who": {2: "x"}}, (), "row 2: no text; row 3: no adapter 'x'"),
        ({}, ("--rank", "2"), "--rank 2"),
        ({}, ("--memory", "2 boxes"), "expected a size such as"),
        ({}, ("--memory", "1kB"), "more than the budget of 1,000"),
        ({}, ("--batch-size", "0"), "expected 1 or more"),
        ({}, ("--text", "txet"), "no column 'txet'"),
        ({}, ("--text", "id", "text", "who"), "one column or two"),
        ({}, ("--out", "in.csv"), "exists"),
        ({}, ("--out", "answers.doc"), "a name ending in"),
        ({}, ("--adapters", "nowhere"), "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(refused, tiny, folders, asked, tmp_path, change, more, message):  # noqa: F811
    for column, values in change.items():
        for row, value in values.items():
            asked[column][row] = value
    path = written(asked, tmp_path / "in.csv")
    assert message in refused(*command(folders, tiny, path, "--adapter-column", "who", *more))


def test_other_mistakes_are_one_line(refused, tiny, folders, asked, tmp_path):  # noqa: F811
    path = written(asked, tmp_path / "in.csv")
    assert f"{len(KINDS)} adapters: name the column" in refused(*command(folders, tiny, path))
    assert "no column 'whom'" in refused(*command(folders, tiny, path, "--adapter-column", "whom"))
    twice = {"a": folders["pets"], "b": f"x={folders['pets']}", "c": f"x={folders['size']}"}
    assert "x given twice" in refused(*command(twice, tiny, path, "--adapter-column", "who"))
    labelled = written({**asked, "label": asked["id"]}, tmp_path / "labelled.csv")
    assert "--prefix" in refused(*command(folders, tiny, labelled, "--adapter-column", "who"))
    nothing = written({"words": asked["text"]}, tmp_path / "words.csv")
    assert "name it with --text: words" in refused(*command({"pets": folders["pets"]}, tiny, nothing))


def test_keep_going_answers_the_rest_and_names_the_error(cli, tiny, folders, asked, tmp_path):  # noqa: F811
    asked["who"][1], asked["text"][4] = "nobody", " "
    path, out = written(asked, tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    given = command(folders, tiny, path, "--adapter-column", "who", "--keep-going", "--out", out)
    code, _, err = cli(*given)
    assert code == 0
    assert "row 2: no adapter 'nobody'; row 5: no text" in err
    for i, row in enumerate(read_back(out)):
        assert (row["label"] is None) == (row["error"] is not None) == (i in (1, 4))


def test_unknown_adapters_are_few_kinds_and_the_known_ones_are_named(cli, refused, tiny, folders, asked, tmp_path):  # noqa: F811
    wrong = {**asked, "who": [f"a {i}" for i in range(len(asked["who"]))]}
    path = written(wrong, tmp_path / "in.csv")
    told = refused(*command(folders, tiny, path, "--adapter-column", "who"))
    assert f"row 5: no adapter 'a 4'; {len(asked['who']) - 5} more kinds of fault; adapters that there are: " in told
    assert all(f"{name}" in told for name in ("pets", "size"))
    code, _, err = cli(*command(folders, tiny, path, "--adapter-column", "who", "--keep-going"))
    assert code == 0
    assert f"{len(asked['who'])} rows, 0 adapters" in err


@pytest.mark.parametrize(("name", "content", "bad"), [
    ("in.csv", "text,who\na cat,pets\nb\na dog,pets\n", "1 cells where 2 were expected"),
    ("in.jsonl", '{"text": "a cat", "who": "pets"}\n{bad\n{"text": "a dog", "who": "pets"}\n', "not JSON"),
])  # fmt: skip
def test_keep_going_answers_beside_rows_that_cannot_be_read(cli, refused, tiny, folders, tmp_path, name, content, bad):  # noqa: F811
    path, out = tmp_path / name, tmp_path / "out.jsonl"
    path.write_text(content)
    given = command(folders, tiny, path, "--adapter-column", "who", "--out", out)
    assert f"{bad} in row 2; mend or remove these rows, or answer the others with --keep-going" in refused(*given)
    code, _, err = cli(*given, "--keep-going")
    assert code == 0
    assert f"no answer for row 2: {bad}" in err
    assert "left out" not in err
    rows = read_back(out)
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert [row["label"] is None for row in rows] == [bool(row["error"]) for row in rows] == [False, True, False]


def test_a_column_that_is_taken_is_found_before_rows_are_answered(refused, tiny, folders, asked, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Predictor, "answer", None)
    given = ("--adapter-column", "who")
    for taken in ("label", "probabilities", "error"):
        path = written({**asked, taken: asked["id"]}, tmp_path / f"{taken}.csv")
        more = ("--keep-going",) * (taken == "error")
        assert f"column {taken} is there already" in refused(*command(folders, tiny, path, *given, *more))


@pytest.mark.parametrize("quick", [False, True])
def test_a_step_of_fused_adamw_between_two_evaluations_is_seen(quick):
    """It writes in place and leaves the version of a tensor as it was."""
    model = build("bert")
    adapters = loralab.attach(model, "lora", rank=3, head=True)
    shake(adapters, "default")
    if quick:
        prepare(model)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=0.1), fused=True)
    model(**rows()).logits.square().sum().backward()
    with torch.no_grad():
        before = model(**rows()).logits
        optimizer.step()
        after, merged = model(**rows()).logits, adapters.merge()(**rows()).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, merged, rtol=0, atol=1e-4)
