"""What an adapter was trained to do: `task.json` in its folder, written by a run and read by predict and evaluate."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loralab import schema
from loralab.data import Split, Task, chats
from loralab.disk import read_json, write_json
from loralab.errors import UserError
from loralab.files import TASK
from loralab.objectives import OBJECTIVES, templates

FILE = TASK
TEXTS = (["prompt"], ["prompt", "completion"], ["text"])  # columns of texts, for a file that does not say it
OF_TYPE = {  # PEFT's task type -> the objective of an adapter that does not say it
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "tagging",
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "seq2seq",
    "FEATURE_EXTRACTION": "similarity",
}


@dataclass(frozen=True)
class Saved:
    """The task of a run, without its rows."""

    objective: str
    task: str
    columns: list[str] = field(default_factory=list)  # of the file that a row's input is read from
    labels: list[str] | None = None
    metrics: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None  # tokens
    written: dict[str, str] = field(default_factory=dict)  # separator and encoding of the file that it learned from
    base: str | None = None  # an alias, a hub name, or the last part of a folder's
    data: str | None = None  # sha256 of the rows that it learned from
    label: str | None = None  # column of labels of the file, where one was named
    chats: bool | None = None  # whether the rows were chats, where the model writes; an older file does not say it
    end: str | None = None  # special token by which an answer to a chat ends

    @property
    def writes(self) -> bool:
        """Whether an answer is a text that the model writes."""
        return OBJECTIVES[self.objective].writes(self.labels)

    @property
    def template(self) -> str | None:
        """The chat template that it was trained with, where that is not the tokenizer's."""
        return self.options.get("template")

    @property
    def takes_texts(self) -> bool:
        """Whether a text to answer is given as it is, as the rows of its training were."""
        return self.labels is not None or (self.columns in TEXTS if self.chats is None else not self.chats)

    def ends(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the token by which an answer ends, besides those of the model, where the tokenizer has it."""
        found = None if self.end is None else tokenizer.convert_tokens_to_ids(self.end)
        return () if found is None or tokenizer.convert_ids_to_tokens(found) != self.end else (found,)

    def of(self, rows: Split) -> Task:
        """Return a task of rows that have no labels, for their encoding."""
        labels = None if self.labels is None else tuple(self.labels)
        return Task(self.task, labels, tuple(self.metrics), rows, {}, "", (), self.objective, self.options)


def save(folder: Path, task: Task, max_length: int, tokenizer: Any, base: str | None = None) -> None:
    """Write the file into an adapter folder; `base` is the name by which another machine gets the base."""
    labels = None if task.labels is None else list(task.labels)
    written = {} if task.reading is None else task.reading.main
    parts: tuple[Any, ...] = (list(task.columns), labels, list(task.metrics), dict(task.options), max_length, written)
    parts += (base, task.sha256, task.label, *_of_chats(task, tokenizer))
    saved = Saved(task.objective, task.name, *parts)
    write_json(folder / FILE, asdict(saved))


def _of_chats(task: Task, tokenizer: Any) -> tuple[bool | None, str | None]:
    """Return whether the rows of a model that writes are chats, and the special token by which their answers end."""
    if not OBJECTIVES[task.objective].writes(task.labels):
        return None, None
    end = templates.end_of(task.train.texts, tokenizer, task.options)
    return all(map(chats.is_chat, task.train.texts)), None if end is None else tokenizer.convert_ids_to_tokens(end)


def read(folder: Path, task_type: str | None = None) -> Saved:
    """Read the file of an adapter folder; without one, what the adapter's task type says. Raises UserError."""
    path = folder / FILE
    if not path.exists():
        return Saved(OF_TYPE.get(task_type or "", "classification"), folder.resolve().name)
    content: dict[str, Any] = read_json(path)
    optional = {field.name for field in fields(Saved)} - {"objective", "task"}
    problems = schema.field_problems(content, schema.fields_of(Saved), optional=optional)
    known = ", ".join(OBJECTIVES)
    if not problems and content["objective"] not in OBJECTIVES:
        problems.append(
            f"objective {schema.shown(content['objective'])}: there are {known}; it may be of a newer version"
        )
    if not problems and (most := content.get("max_length")) is not None and most < 1:
        problems.append(f"max_length={most}: expected 1 or more")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return Saved(**content)
