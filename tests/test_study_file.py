"""A study's file: every wrong type of every key is named, all at once, and nothing that is right gets lost."""

import copy
import datetime
import math
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from loralab import UserError, options
from loralab.cli import main
from loralab.recipe import NAMED
from loralab.run import Settings
from loralab.study.definition import OF_RUN
from loralab.study.toml import FREE, HINTS, OF_METHOD, OF_TASK, TOP, converted, define, method_types, read

# ---- wrong types -----------------------------------------------------------------------------------------------------

VALUES = {  # of every type that TOML has
    "text": "words",
    "empty text": "",
    "whole": 3,
    "negative": -3,
    "number": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "truth": True,
    "date": datetime.date(2020, 1, 2),
    "time": datetime.time(3, 4),
    "texts": ["words", "other"],
    "whole numbers": [3, 5],
    "numbers": [0.5, 0.25],
    "mixed": ["words", 3, True],
    "empty list": [],
    "nested": [["words"]],
    "table": {"odd": 1},
    "tables": [{"odd": 1}],
}
WHOLE = {
    "name": "whole", "about": "all that a file can hold", "seeds": [3, 4], "data": "glue", "store": "mine",
    "adapters": False, "packed": True, "registered": True, "models": ["minilm", "./own"],
    "tasks": ["rte", {"task": "a.csv", "name": "mine", "text": ["x", "y"], "label": "z", "validation": "b.csv",
                      "problem_type": "classification", "epochs": 4}],
    "protocol": {"batch_size": 8, "warmup": 0.1, "schedule": "cosine"},
    "methods": ["full", {"name": "delta {wait}", "method": "delta-lora", "follow": 1.5, "gain": False,
                         "each": {"wait": [5, 7]}, "tune": {"lr_times": [0.5, 2.0], "dropout": [0.0]}}],
    "tune": {"search": "grid", "trials": 3, "seed": 77, "weight_decay": [0.0, 0.1]},
    "compare": {"alpha": 0.1, "against": "full", "margin": {"accuracy": 0.02, "default": 0.03}, "reference": "full",
                "family": "by task", "endpoints": ["selected", "accuracy"], "sd": 0.02},
}  # fmt: skip
ACCEPTED = {  # place -> names of VALUES that are right there; places that are not here take none
    ("name",): {"text"}, ("about",): {"text", "empty text"}, ("seeds",): {"whole numbers"}, ("data",): {"text"},
    ("store",): {"text"}, ("adapters",): {"truth"}, ("packed",): {"truth"}, ("registered",): {"truth"},
    ("models",): {"text", "texts"},
    ("tasks",): {"text", "texts"}, ("methods",): {"texts"}, ("protocol",): set(), ("tune",): set(), ("compare",): set(),
    ("tasks", 1): {"text"}, ("tasks", 1, "task"): {"text"}, ("tasks", 1, "name"): {"text"},
    ("tasks", 1, "text"): {"text", "empty text", "texts", "empty list"}, ("tasks", 1, "label"): {"text", "empty text"},
    ("tasks", 1, "problem_type"): set(), ("tasks", 1, "validation"): {"text"}, ("tasks", 1, "epochs"): {"whole"},
    ("protocol", "batch_size"): {"whole"}, ("protocol", "warmup"): {"number"}, ("protocol", "schedule"): set(),
    ("methods", 0): {"text", "empty text"}, ("methods", 1): {"text", "empty text"}, ("methods", 1, "gain"): {"truth"},
    ("methods", 1, "method"): set(),
    ("methods", 1, "name"): {"text"},
    ("methods", 1, "follow"): {"whole", "negative", "number"}, ("methods", 1, "each"): set(),
    ("methods", 1, "each", "wait"): {"whole numbers"}, ("methods", 1, "tune"): set(),
    ("methods", 1, "tune", "lr_times"): {"whole numbers", "numbers"},
    ("methods", 1, "tune", "dropout"): {"numbers", "whole numbers"},
    ("tune", "search"): set(), ("tune", "trials"): {"whole"}, ("tune", "seed"): {"whole"},
    ("tune", "weight_decay"): {"whole numbers", "numbers"},
    ("compare", "alpha"): {"number"}, ("compare", "against"): set(), ("compare", "reference"): set(),
    ("compare", "family"): set(),
    ("compare", "endpoints"): set(), ("compare", "margin"): {"whole", "number"}, ("compare", "sd"): {"whole", "number"},
    ("compare", "margin", "accuracy"): {"whole", "number"}, ("compare", "margin", "default"): {"whole", "number"},
}  # fmt: skip


def places(value, at=()):
    """Every key and table of a file."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, x in items:
        if isinstance(x, dict) or (isinstance(x, list) and any(isinstance(y, dict) for y in x)):
            yield from places(x, (*at, key))
        if isinstance(value, dict) or isinstance(x, dict):
            yield (*at, key)


def replaced(table, place, value):
    table = copy.deepcopy(table)
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return table


def test_the_places_are_all_there_are():
    assert set(places(WHOLE)) <= ACCEPTED.keys()
    assert set(TOP) == set(WHOLE)


def test_a_file_of_everything_is_read_and_nothing_is_lost(tmp_path):
    d = define(copy.deepcopy(WHOLE), "x", tmp_path)
    assert (d.name, d.seeds, d.data, str(d.store), d.adapters, d.packed, d.registered, d.compare.sd) == (
        "whole", (3, 4), tmp_path / "glue", "mine", False, True, True, 0.02,
    )  # fmt: skip
    assert d.models == ("minilm", str(tmp_path / "own"))
    assert [t.label for t in d.tasks] == ["rte", "mine"]
    assert d.tasks[1].settings == {
        "task": str(tmp_path / "a.csv"), "text": ("x", "y"), "label": "z", "problem_type": "classification",
        "validation": tmp_path / "b.csv", "epochs": 4,
    }  # fmt: skip
    assert [m.label for m in d.methods] == ["full", "delta 5", "delta 7"]
    assert d.methods[2].settings == {"method": "delta-lora", "follow": 1.5, "gain": False, "wait": 7}
    assert d.methods[2].grid == {"lr_times": [0.5, 2.0], "dropout": [0.0]}
    assert (d.tune.search, d.tune.trials, d.tune.seed, d.tune.grid) == ("grid", 3, 77, {"weight_decay": [0.0, 0.1]})
    assert (d.compare.alpha, d.compare.against, dict(d.compare.margin)) == (
        0.1, "full", {"accuracy": 0.02, "default": 0.03},
    )  # fmt: skip


@hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_types_are_named_all_at_once(data):
    """Any values of wrong types at any places: one UserError of one line, and every one of them is in it."""
    spots = data.draw(st.lists(st.sampled_from(sorted(ACCEPTED, key=str)), min_size=1, max_size=3, unique=True))
    spots = [p for p in spots if not any(p != q and p[: len(q)] == q for q in spots)]  # none inside another
    table = copy.deepcopy(WHOLE)
    wrong = {}
    for place in spots:
        kind = data.draw(st.sampled_from(sorted(VALUES.keys() - ACCEPTED[place])))
        wrong[place] = VALUES[kind]
        table = replaced(table, place, VALUES[kind])
    with pytest.raises(UserError) as caught:
        define(table, "x", Path())
    message = str(caught.value)
    assert "\n" not in message
    for place in wrong:
        key = next(part for part in reversed(place) if isinstance(part, str))
        assert key in message, (place, message)


@pytest.mark.parametrize("name", FREE)
def test_no_setting_takes_a_value_of_another_type(name):
    kind = HINTS.get(name) or method_types()[name]
    right = set()
    for label, value in VALUES.items():
        try:
            got = converted(value, kind, Path())
        except TypeError:
            continue
        right.add(label)
        assert got in (value, tuple(value) if isinstance(value, list) else (value,), Path(str(value)))
    numbers, texts = {"whole", "negative"}, {"text", "empty text"}
    families = [set(), {"truth"}, numbers, numbers | {"number"}, {"text"}, texts, texts | {"texts", "empty list"}]
    assert right in families


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ('[tune]\nlr_times = ["0.3", 1.0, 3.0]', "tune lr_times: '0.3': expected a number"),
        ('[tune]\nlr_times = ["0.3"]', "tune lr_times: '0.3': expected a number"),
        ("[tune]\nlr_times = [true]", "tune lr_times: True: expected a number"),
        ("[tune]\nlr = [1e-3, 1e-3]", "lr=[0.001, 0.001] has a value twice"),
        ("[tune]\nlr = {low = 1, high = 0.1}", "expected low below high"),
        ("[tune]\nlr = {low = 0, high = 1, log = true}", "expected above 0"),
        ('[tune]\nlr = {low = "1", high = 1}', "tune lr low: '1': expected a number"),
        ("[tune]\nmethod = {low = 1, high = 2}", "the setting is no number"),
        ("[tune]\nseed = 99999999999", "tune seed: 99999999999: expected a whole number, 0 to"),
        ("[tune]\nseed = 4294967295\nsearch = 'halving'\nlr = [1, 2, 3]", "expected a whole number, 0 to 4294967294"),
        ("[compare]\nmargin = inf", "margin: default=inf"),
    ],
)
def test_what_a_grid_cannot_be(tmp_path, capsys, tune, message):
    file = tmp_path / "s.toml"
    file.write_text(f'tasks = ["minimal-pairs"]\nmethods = ["lora"]\n{tune}\n')
    assert main(["study", str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("seeds", "tune", "shared"),
    [
        ([0, 1], {"seed": 0, "lr": [1e-3]}, "0"),
        ([1000, 1001], {"search": "halving", "lr_times": [1, 2, 3]}, "1000, 1001"),
        ([3, 1001], {"search": "halving", "lr_times": [1, 2, 3]}, "1001"),
        ([3, 1001], {"lr": [1e-3]}, None),
        ([0, 1], {"seed": 0}, None),
    ],
)
def test_a_seed_of_tuning_is_none_of_a_reported_run(seeds, tune, shared):
    """Else the run that won is reported: its luck chose it."""
    table = {"tasks": ["cola"], "methods": ["lora"], "seeds": seeds, "tune": tune}
    if shared is None:
        assert define(table, "x", Path()).seeds == tuple(seeds)
        return
    for file, flags in ((table, {}), (table | {"seeds": [7]}, {"seeds": tuple(seeds)})):
        with pytest.raises(UserError, match=f"seeds: {shared} of tuning too"):
            define(copy.deepcopy(file), "x", Path(), **flags)
    own = {"seed": tune["seed"]} if "seed" in tune else {}
    methods = [{"method": "lora", "tune": {"lr": [1e-3, 2e-3, 3e-3]}}]
    kept = {key: x for key, x in tune.items() if key == "search"}
    with pytest.raises(UserError, match=f"seeds: {shared} of tuning too"):
        define(table | {"methods": methods, "tune": own | kept}, "x", Path())


@pytest.mark.parametrize(
    ("name", "words"),
    [("{nope}", "'nope' is not among method, lr"), ("{lr:d}", "Unknown format code"), ("100% {", "Single '{'"),
     ("a}", "Single '}'"), ("{}", "Replacement index 0"), ("{lr.x}", "{lr.x} is no setting"),
     ("{lr[0]}", "{lr[0]} is no setting"), ("{lr:>9999999999}", "not a short one"), ("{lr:{lr}}", "not a short one")],
)  # fmt: skip
def test_a_name_that_cannot_be_made_says_why(name, words):
    table = {"tasks": ["cola"], "methods": [{"method": "lora", "name": name, "lr": 0.1}]}
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        define(table, "x", Path())
    assert ("is not among" in str(caught.value)) == (name == "{nope}")
    assert define(table | {"methods": [{"name": "{{{lr}}}", "lr": 0.1}]}, "x", Path()).methods[0].label == "{0.1}"


def test_a_study_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "s.toml").write_text('tasks = ["cola"]\nmethods = ["lora"]\n', encoding="utf-8-sig")
    assert read(tmp_path / "s.toml").tasks[0].label == "cola"


def test_a_dry_run_counts_as_people_do(tmp_path, capsys):
    (tmp_path / "s.toml").write_text('tasks = ["minimal-pairs"]\nmethods = ["head"]\nseeds = [0]\n')
    for seeds, words in ((["0"], "1 run, 0 done"), (["0", "1"], "2 runs, 0 done")):
        assert main(["study", str(tmp_path / "s.toml"), "--dry-run", "--seeds", *seeds]) == 0
        assert words in capsys.readouterr().out


def test_a_table_where_none_belongs_and_none_where_one_does(tmp_path, capsys):
    file = tmp_path / "s.toml"
    file.write_text('tune = 5\ncompare = 6\nprotocol = "x"\ntasks = ["minimal-pairs"]\nmethods = ["lora"]\n')
    assert main(["study", str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert all(
        part in error for part in ("tune: 5: expected a table", "compare: 6: expected", "protocol: 'x': expected")
    )
    file.write_text("a = " + "[" * 5000 + "]" * 5000)
    assert main(["study", str(file), "--dry-run"]) == 2
    assert "nested too deeply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "twice"),
    [
        (("rte", "o/rte.csv"), "rte"),
        (("a/b.csv", "c/b.tsv"), "b"),
        (("sst2", "sst2"), "sst2"),
        (("own", "own.tsv"), "own"),
    ],
)
def test_tasks_of_flags_have_names_of_their_own(flags, twice):
    """Two data sets under one name would be one cell."""
    table = {"tasks": ["rte", {"task": "mine.csv", "name": "own"}], "methods": ["lora"]}
    with pytest.raises(UserError, match=f"tasks: {twice} named twice"):
        define(copy.deepcopy(table), "x", Path(), tasks=flags)
    assert [t.label for t in define(table, "x", Path(), tasks=("o/rte.csv", "own")).tasks] == ["rte", "own"]


# ---- settings of methods by their own names --------------------------------------------------------------------------


def study_of(text):
    return define(tomllib.loads(text), "x", Path())


def settings_of(d):
    return [d.settings(d.tasks[0], "minilm", m, 0, {}) for m in d.methods]


def test_settings_of_a_method_are_spelled_by_their_own_names_everywhere():
    d = study_of(
        'tasks = ["rte"]\n[[methods]]\nmethod = "delta-lora"\nfollow = 3\neach = {wait = [10, 20]}\n'
        '[[methods]]\nname = "tuned {start}"\nmethod = "delta-lora"\nwait = 5\nstart = "gaussian"\n'
        "tune = {follow = [1, 2]}\n"
    )
    assert [m.label for m in d.methods] == ["delta-lora wait=10", "delta-lora wait=20", "tuned gaussian"]
    assert [(s.recipe().factors.wait, s.recipe().factors.follow) for s in settings_of(d)] == [(10, 3), (20, 3), (5, 2)]
    assert settings_of(d)[2].recipe().start == "gaussian"
    tuned = d.settings(d.tasks[0], "minilm", d.methods[2], 0, {"follow": 1.0})
    assert tuned.recipe().factors.follow == 1
    assert tuned.set == ("follow=1.0", "start=gaussian", "wait=5")  # in one order, however the file has them


def test_every_setting_of_every_method_can_be_written_in_a_file():
    """The value of its default, or another, as TOML has it, comes out as the recipe's."""
    for method in NAMED:
        for name, option in options.options(method).items():
            if option.default is None:
                continue
            value = list(option.default) if isinstance(option.default, tuple) else option.default
            table = {"tasks": ["rte"], "methods": [{"method": method, name: value}]}
            (found,) = settings_of(define(table, "x", Path()))
            recipe = found.recipe()
            inner = getattr(recipe.factors, name, None) if hasattr(recipe.factors, name) else getattr(recipe, name)
            assert inner == option.default, (method, name)


def test_a_setting_that_is_not_there_names_the_nearest_and_all_there_are():
    with pytest.raises(UserError, match=r"no 'wiat' \(did you mean 'wait'\?\)"):
        study_of('tasks = ["rte"]\nmethods = [{method = "delta-lora", wiat = 3}]')
    with pytest.raises(UserError, match="no 'qqqqqq': there are .*epochs.*, wait"):
        study_of('tasks = ["rte"]\nmethods = [{method = "delta-lora", qqqqqq = 3}]')
    with pytest.raises(UserError, match=r"method 'lora' has no setting 'wait'.*there are rank, alpha") as caught:
        study_of('tasks = ["rte"]\nmethods = [{method = "lora", wait = 3}]')
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no 'set': write the setting itself"):
        study_of('tasks = ["rte"]\nmethods = [{method = "lora", set = ["start=eva"]}]')
    with pytest.raises(UserError, match="wait='20': expected a whole number"):
        study_of('tasks = ["rte"]\nmethods = [{method = "delta-lora", wait = "20"}]')


def test_settings_of_runs_and_of_methods_are_apart():
    """A name is one thing: what a run has by that name is what a method has by it, or only one of them has it."""
    shared = {name for name in options.names() if name in OF_RUN}
    assert shared == {"rank", "alpha", "store", "lr", "lr_ratio", "dropout", "policy"}
    assert not set(OF_METHOD) & set(OF_TASK)
    assert set(HINTS) == set(Settings.__dataclass_fields__)
