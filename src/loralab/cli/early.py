"""What can be told of a command within a second, before torch is imported: paths that are not there, models that cannot
be had.

The commands check the same again, with more knowledge; this is for the user who waits.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from loralab import model_names
from loralab.errors import UserError

PATHS = {  # command -> its flags whose values are files or folders that must be there (tests/test_wrong_commands.py)
    "train": ("--data", "--validation", "--template", "--ranks", "--from-adapter", "--label-map"),
    "plan": ("--ranks",),
    "study": ("", "--data"),
    "report": ("", "--published"),
    "rerun": ("--store", "--data"),
    "judge": ("",),
    "bench": ("--data",),
    "inspect": ("", "--against"),
    "verify": ("",),
    "evaluate": ("", "--data"),
    "predict": ("--adapters", "--input"),
    "generate": ("--adapters", "--input", "--template"),
    "merge": ("",),
    "combine": ("",),
    "extract": (),
    "export": ("", "--base"),
    "push": ("",),
}
TASKS = {"train": ("--task",), "evaluate": ("--task",)}  # a file of one's own, or a name
MODELS = ("--model", "--models")
MANY = ("--adapters", "--models")  # flags of these that take several values
NAMED = ("--adapters",)  # values that may be NAME=FOLDER


def check(words: Sequence[str]) -> None:
    """Raise UserError for a path or a model among the words of a command line that is not there."""
    command = words[0] if words else ""
    wrong, models = [], []
    given = [*values(words[1:])]
    for flag, value in given:
        if flag in MODELS:
            models.append(value)
        if flag in PATHS.get(command, ()):
            value = value.rpartition("=")[2] if flag in NAMED else value
            wrong += absent(flag, value)
        elif flag in TASKS.get(command, ()) and Path(value).suffix:
            wrong += absent(flag, value)
    if wrong:
        raise UserError("; ".join(wrong))
    for model in models:
        model_names.require(model)
    if "--data" not in {flag for flag, _ in given}:
        for flag, value in given:
            if flag in TASKS.get(command, ()) and (task := model_names.glue_task(value)):
                model_names.require_glue(task)


def values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) for each value of a command line; the flag of a word before all flags is empty."""
    flag: str | None = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if equals:
                yield flag, value
        elif not word.startswith("-") and flag is not None:
            yield flag, word
            flag = flag if flag in MANY else None  # another word may be a value of a list, or too much


def absent(flag: str, value: str) -> list[str]:
    """What to say of a path that is not there, with the nearest name that is."""
    path = Path(value).expanduser()
    if path.exists() or not value:
        return []
    folder = path.parent
    if not folder.is_dir():
        missing = next(p for p in (folder, *folder.parents) if not p.exists() and p.parent.is_dir())
        return [f"{flag} {value} does not exist: there is no folder {missing}".strip()]
    near = difflib.get_close_matches(path.name, [other.name for other in folder.iterdir()], 1)
    hint = f" (did you mean {str(folder / near[0])!r}?)" if near else ""
    return [f"{flag} {value} does not exist{hint}: check the path".strip()]
