"""`loralab generate`: a language model writes answers, with one adapter, several side by side, or one a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from torch import nn

from loralab import models
from loralab.cli import base
from loralab.cli.predict import ERROR, check_new, refuse, unknown
from loralab.cli.show import Json, as_bytes, note, pairs
from loralab.data import chats, checks, tables
from loralab.data.reading import Reading
from loralab.errors import UserError
from loralab.objectives import OBJECTIVES
from loralab.objectives.generation import Decoding
from loralab.objectives.objective import WRITTEN
from loralab.objectives.templates import template_of
from loralab.run.bar import rows_bar
from loralab.serve import BASE, AdapterFolder, Generator, Pool, adapter_folders
from loralab.serve.generation import Request
from loralab.serve.loading import Device, present, shared, torch_device

GREEDY = Decoding()

Prompt = chats.Row | UserError  # a row to answer, or what is wrong with it
Texts = str | list[str] | UserError


def generate(
    *,
    prompt: list[str] | None = None,
    input: Path | None = None,
    chat: bool = False,
    adapters: list[str] | None = None,
    side_by_side: bool = False,
    adapter_column: str | None = None,
    out: Path | None = None,
    model: str | None = None,
    decoding: Annotated[Decoding, Parameter(name="*")] = GREEDY,
    template: Path | None = None,
    plain: bool = False,
    batch_size: int = 8,
    rank: int | None = None,
    memory: str | None = None,
    keep_going: bool = False,
    prefix: str = "",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Let a language model write answers: to prompts of the command line, to the rows of a file, or in a chat.

    Chats go through the chat template. So does a prompt that is a text, as one turn of the user, unless its adapter was
    trained on texts as they are. Without adapters the base answers.

    Parameters
    ----------
    prompt: list[str]
        Texts to answer. The answer to a single one is printed while it is written.
    input: Path
        Rows to answer: a CSV, TSV, JSON, JSONL or parquet file with a column messages, conversations, prompt,
        instruction or text.
    chat: bool
        Talk at the terminal. /reset forgets what was said, /adapter NAME changes the adapter, Ctrl-D ends.
    adapters: list[str]
        Adapter folders of one base, or NAME=FOLDER.
    side_by_side: bool
        Answer with the base and with each adapter, in a column each.
    adapter_column: str
        Column with each row's adapter: its name, its folder as given, or base.
    out: Path
        File to write, with all columns of the input and the answers; must not exist. By default answers are printed.
    model: str
        The base: a local folder, a hub name, or an alias; by default the one the adapters name.
    template: Path
        Chat template (a Jinja file); by default the adapter's or the tokenizer's.
    plain: bool
        Take texts as they are, without the chat template.
    batch_size: int
        Rows of a batch; rows of different adapters share one.
    rank: int
        Rank to evaluate at, for adapters trained for many.
    memory: str
        Most that loaded adapters may take, as in 2GB; the least recently used is dropped first.
    keep_going: bool
        Answer what can be answered; the other rows carry an error.
    prefix: str
        What the new columns' names begin with.
    device: Device
        Where it runs: a GPU if there is one, cpu or cuda.
    """
    idle = {"side_by_side": side_by_side, "keep_going": keep_going, "prefix": bool(prefix), "json": json}
    _check(prompt, input, chat, plain, adapter_column, out, {"batch_size": batch_size, "rank": rank}, idle)
    torch_device(device)
    folders = adapter_folders(adapters or [])
    names = _names(folders, side_by_side)
    given = None if template is None else template_of(template)
    how: dict[str, Any] = {"decoding": decoding, "batch_size": batch_size, "rank": rank}
    how |= {"as_it_is": plain, "template": given}
    generator = _generator(model, folders, device, as_bytes(memory), **how)
    if chat:
        _talk(generator, names[-1])
        return
    columns, prompts = _prompts(prompt or [], input, keep_going)
    if adapter_column is not None:
        tables.require(input, list(columns), [adapter_column])
        wanted = {WRITTEN: [_adapter(cell) for cell in columns[adapter_column]]}
    elif len(names) > 1 and not side_by_side:
        raise UserError(f"{len(names)} adapters: add --side-by-side, or name each row's in a column (--adapter-column)")
    else:
        wanted = {name if side_by_side else WRITTEN: [name] * len(prompts) for name in names}
    check_new(input or Path("--prompt"), columns, [prefix + name for name in wanted], prefix, keep_going)
    _note_plain(generator, prompts)
    if out is None and not json and input is None and len(prompts) == len(wanted) == 1 and _can_stream(decoding):
        _stream(generator, prompts[0], names[0])
        return
    found = _answers(generator, prompts, wanted)
    faults = [next((texts for texts in row if isinstance(texts, UserError)), None) for row in zip(*found.values())]  # noqa: B905
    asked = [name for names in wanted.values() for i, name in enumerate(names) if not isinstance(prompts[i], UserError)]
    help = unknown([BASE, *folders], asked)
    refuse(input or Path("--prompt"), [fault or {} for fault in faults], keep_going, help)
    added = {prefix + name: [None if isinstance(x, UserError) else x for x in texts] for name, texts in found.items()}
    errors = {prefix + ERROR: [fault and str(fault) for fault in faults]} if keep_going else {}
    _deliver({**columns, **added, **errors}, list(added), input, out, json)


def _check(
    prompt: Sequence[str] | None,
    input: Path | None,
    chat: bool,
    plain: bool,
    adapter_column: str | None,
    out: Path | None,
    counts: Mapping[str, int | None],
    idle: Mapping[str, bool],
) -> None:
    given = {"--prompt": bool(prompt), "--input": input is not None, "--chat": chat}
    if sum(given.values()) != 1:
        both = " and ".join(flag for flag, there in given.items() if there)
        raise UserError(f"{both or 'nothing'} given to answer: give one of {', '.join(given)}")
    if adapter_column is not None and input is None:
        raise UserError("--adapter-column names a column of --input: give a file, or one adapter")
    if chat and plain:
        raise UserError("--chat goes through the chat template: leave --plain out")
    if chat:
        base.check_idle(idle, "with --chat, which answers one at a time")
    if chat and out is not None:
        raise UserError("--chat answers at the terminal: leave --out out")
    base.check_counts(**counts)
    base.check_out(out)


def _names(folders: Mapping[str, AdapterFolder], side_by_side: bool) -> list[str]:
    """Return what is asked: the adapters by name, or the base, or with --side-by-side both."""
    of_folder: dict[Path, str] = {}
    for name, folder in folders.items():  # a folder's own name comes before its path
        of_folder.setdefault(folder.folder, name)
    adapters = list(of_folder.values())
    if BASE in folders:
        raise UserError(f"an adapter is called {BASE}, as the base itself is: give it another name with NAME=FOLDER")
    if side_by_side and not adapters:
        raise UserError("--side-by-side compares adapters with their base: name them with --adapters")
    return [BASE, *adapters] if side_by_side or not adapters else adapters


def _adapter(cell: Any) -> str:
    return "" if cell is None else checks.literal(cell)


def _generator(
    model: str | None,
    folders: Mapping[str, AdapterFolder],
    device: str,
    budget: int | None,
    **how: Any,
) -> Generator:
    if model is None and not folders:
        raise UserError("no base: name it with --model, or give --adapters")
    if silent := [f"{f.name} ({f.objective})" for f in folders.values() if not OBJECTIVES[f.objective].own_words]:
        raise UserError(f"adapter {', '.join(dict.fromkeys(silent))} writes no texts: use loralab predict")
    name, place = shared(model, folders.values()), torch_device(device)
    present(name, folders.values())
    task_type = "SEQ_2_SEQ_LM" if models.config(name).is_encoder_decoder else "CAUSAL_LM"

    def load() -> tuple[Any, Any]:
        made, words = models.fresh(name, task_type, None, torch.float32, seed=0)
        return made.to(place), words

    first, tokenizer = load()
    spare: list[nn.Module] = [first]

    def new_base() -> nn.Module:
        return spare.pop() if spare else load()[0]

    pool = Pool(new_base, budget, heads=False)
    return Generator(pool, tokenizer, folders, task_type=task_type, **how)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _prompts(texts: Sequence[str], path: Path | None, keep_going: bool) -> tuple[tables.Columns, list[Prompt]]:
    """Return the columns of the input, and the prompt of each row."""
    if path is None:
        return {"prompt": list(texts)}, [_prompt(chats.prompt, text) for text in texts]
    columns, broken = tables.read_to_answer(path, Reading(), keep_going)
    form = next((form for form in chats.PROMPTS if {*form.columns} <= columns.keys()), None)
    if form is None:
        there = ", ".join(map(checks.one_line, columns))
        wanted = ", ".join(form.columns[0] for form in chats.PROMPTS)
        raise UserError(f"{path}: no column to answer among {there}: name one of them {wanted}")
    used = [name for name in (*form.columns, *form.optional) if name in columns]
    rows = enumerate(zip(*(columns[name] for name in used), strict=True))
    return columns, [UserError(broken[i]) if i in broken else _prompt(form.row, *cells) for i, cells in rows]


def _prompt(make: Any, *cells: Any) -> Prompt:
    try:
        row: chats.Row = make(*cells)
    except ValueError as fault:
        return UserError(str(fault))
    return row


def _note_plain(generator: Generator, prompts: Sequence[Prompt]) -> None:
    texts = any(not isinstance(row, UserError) and not chats.is_chat(row) for row in prompts)
    decoder = generator.task_type == "CAUSAL_LM"  # an encoder-decoder has no chats
    if decoder and texts and not generator.as_it_is and not generator.shows_chats():
        note("the tokenizer has no chat template, so prompts are taken as they are")


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answers(
    generator: Generator, prompts: Sequence[Prompt], wanted: Mapping[str, Sequence[str]]
) -> dict[str, list[Texts]]:
    """Return the answers to each row, by column; rows of all columns share batches."""
    asked = [
        (column, row, Request(name, prompt))
        for column, names in wanted.items()
        for row, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        if not isinstance(prompt, UserError)
    ]
    found: dict[str, list[Any]] = {column: list(prompts) for column in wanted}
    with rows_bar("answers", len(asked)) as done:
        answers = generator.answer([request for *_, request in asked], done=done)
    for (column, row, _), texts in zip(asked, answers, strict=True):
        one = generator.decoding.num_return_sequences == 1
        found[column][row] = texts[0] if one and not isinstance(texts, UserError) else texts
    return found


def _can_stream(decoding: Decoding) -> bool:
    return decoding.copies == 1 and not decoding.stop  # a stream would show the text that stops it


def _stream(generator: Generator, prompt: Prompt, name: str) -> str:
    """Print an answer while it is written, and return it. Raises UserError."""
    from transformers import TextStreamer

    if isinstance(prompt, UserError):
        raise UserError(f"--prompt: {prompt}")
    streamer = TextStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (texts,) = generator.answer([Request(name, prompt)], streamer)
    if isinstance(texts, UserError):
        raise texts
    return texts[0]


def _deliver(columns: tables.Columns, new: Sequence[str], path: Path | None, out: Path | None, json: bool) -> None:
    if out is not None:
        tables.write(columns, out)
    if out is None and path is None and not json:
        for row, prompt in enumerate(columns["prompt"]):
            pairs(f"> {prompt}", {name: _shown(columns[name][row]) for name in new})
    elif out is None or json:
        suffix = ".json" if json or path is None else path.suffix.lower()
        print(tables.render(columns, suffix if suffix in tables.WRITERS else ".jsonl"), end="")


def _shown(texts: str | list[str] | None) -> str:
    return "\n".join(texts) if isinstance(texts, list) else texts or ""


# ---- a chat ----------------------------------------------------------------------------------------------------------


def _talk(generator: Generator, name: str) -> None:
    """Talk at the terminal until its end (Ctrl-D)."""
    if generator.task_type != "CAUSAL_LM":
        raise UserError("--chat: an encoder-decoder reads one text: give it with --prompt or --input")
    if not generator.shows_chats():
        raise UserError("--chat: the tokenizer has no chat template: give one with --template FILE (Jinja)")
    said: tuple[chats.Message, ...] = ()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        word, _, rest = line.partition(" ")
        try:
            if word == "/reset":
                said = ()
            elif word == "/adapter":
                name = _known(generator, rest.strip())
            elif word.startswith("/"):
                raise UserError(f"no command {word}: there are /reset and /adapter NAME; Ctrl-D ends")
            elif line:
                asked = (*said, ("user", line))
                said = (*asked, ("assistant", _said(generator, asked, name)))
        except UserError as problem:
            note(" ".join(str(problem).split()), "loralab")


def _said(generator: Generator, asked: chats.Row, name: str) -> str:
    if _can_stream(generator.decoding):
        return _stream(generator, asked, name)
    (texts,) = generator.answer([Request(name, asked)])
    if isinstance(texts, UserError):
        raise texts
    print(_shown(texts))
    return str(texts[0])


def _known(generator: Generator, name: str) -> str:
    if name != BASE and name not in generator.adapters:
        raise UserError(f"no adapter {name!r}: there are {', '.join([BASE, *generator.adapters])}")
    return name
