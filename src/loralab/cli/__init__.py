"""The command line: `main` parses, calls a command's function, and turns a user's error into one line and exit code 2.

Nothing slow is imported before a command is known.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import CoercionError, MissingArgumentError, UnknownCommandError, UnusedCliTokensError

from loralab.cli import early
from loralab.cli.headings import Headed
from loralab.cli.wording import kind, spelled
from loralab.errors import UserError, hint, near, printable

COMMANDS = {  # name -> (help, example); loralab.cli.NAME:NAME is imported when it is called
    "demo": (
        "Fine-tune a small encoder on an embedded task with three methods and write their report. Works offline.",
        "loralab demo",
    ),
    "train": (
        "Fine-tune one model on one task with one method.",
        "loralab train --task reviews.csv --text title body --label stars --out runs/reviews",
    ),
    "plan": (
        "Estimate the memory of a training step without loading weights, and what would reduce it.",
        "loralab plan --model minilm --method lora --batch-size 32 --max-length 64 --memory 1GB",
    ),
    "study": (
        "Run many trainings that answer one question and compare them with corrected tests.",
        "loralab study studies/utaustin.toml --model minilm --data DIR",
    ),
    "report": (
        "Write the page, pictures and tables of a study or a folder of runs.",
        "loralab report runs",
    ),
    "rerun": (
        "Repeat one run that is on record, and compare the two.",
        "loralab rerun 0062adca69bef8f2 --store studies/results/store --data DIR",
    ),
    "judge": (
        "Test which methods of a table of results differ from one of them, corrected for multiple comparisons.",
        "loralab judge results.csv --method method --score accuracy --seed seed --task task",
    ),
    "bench": (
        "Measure time and memory of training, PEFT and loralab alternating.",
        "loralab bench --methods lora dora --lengths 16 64 --repeats 5",
    ),
    "methods": (
        "List the methods: equation, what is trained, number of parameters.",
        "loralab methods --json",
    ),
    "inspect": (
        "Show what an adapter folder contains and what the adapter learned.",
        "loralab inspect runs/reviews/adapter",
    ),
    "verify": (
        "Check that an adapter folder is complete and fits a base model.",
        "loralab verify runs/reviews/adapter --model minilm",
    ),
    "evaluate": (
        "Score an adapter on a file with labels: metrics overall and for each class or type.",
        "loralab evaluate runs/reviews/adapter --task test.csv --label stars",
    ),
    "predict": (
        "Predict the rows of a file with one adapter, or each row with its own.",
        "loralab predict --adapters runs/*/adapter --input rows.csv --adapter-column task --out answers.csv",
    ),
    "generate": (
        "Let a decoder answer prompts, the rows of a file or a chat, with one adapter, several, or one a row.",
        "loralab generate --adapters runs/json/adapter --input rows.jsonl --out answers.jsonl",
    ),
    "merge": (
        "Write a plain model with an adapter merged into its weights.",
        "loralab merge runs/reviews/adapter --model minilm --out merged",
    ),
    "combine": (
        "Combine adapters into one: sum, difference, TIES, DARE; or resize one.",
        "loralab combine runs/a/adapter runs/b/adapter --weights 0.7 0.3 --out both",
    ),
    "extract": (
        "Write what a full fine-tuning changed as a LoRA of a rank, with its error by layer.",
        "loralab extract tuned --model minilm --rank 16 --out extracted",
    ),
    "export": (
        "Write an adapter in PEFT's layout, or as a GGUF file for llama.cpp.",
        "loralab export runs/reviews/adapter --model minilm --out exported",
    ),
    "push": (
        "Upload an adapter folder with its model card to the hub.",
        "loralab push runs/reviews/adapter --repo me/reviews --dry-run",
    ),
}
STOPPED = {  # command -> how to go on after an interrupt
    "train": "; --resume continues the run from its last checkpoint",
    "study": "; the same command continues the study",
}
DOING = {  # command that takes long -> what it does first
    "demo": "loads the model and an embedded task, then trains",
    "train": "reads the data and loads the model, then trains",
    "study": "checks every run of the study, then trains those that are not done",
    "rerun": "reads the recorded run, then trains it again",
    "bench": "loads the models, then measures",
    "evaluate": "loads the adapter and its base, then scores the rows",
    "predict": "loads the adapters and their base, then answers the rows",
    "generate": "loads the model, then writes",
}
SILENCE = 0.6  # seconds after which DOING is said
CHATTY = ("bitsandbytes", "transformers")  # libraries that log at import and while loading


def app() -> App:
    """The parser of all commands."""
    flags = Parameter(negative="", consume_multiple=True, show_default=_shown)
    top = App(
        name="loralab", help="One equation, every LoRA, and comparisons that are evidence.", version=_version,
        default_parameter=flags, help_formatter=Headed(), config=_whole_numbers,
        result_action="return_value", suppress_keyboard_interrupt=False,
    )  # fmt: skip
    top["--help"].help, top["--version"].help = "Show this list, or the flags of a command.", "Show the version."
    for place, (name, (text, example)) in enumerate(COMMANDS.items()):
        path = f"loralab.cli.{name}:{name}"
        top.command(path, name=name, help=text, help_epilogue=f"Example: {example}", sort_key=place)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: done; 1: the reader of stdout went away; 2: a user's error, in one line on stderr; 130: interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    _quiet()
    told = _told(words) if argv is None else nullcontext()
    try:
        if words[:1] and words[0] in COMMANDS and not {"--help", "-h"} & {*words}:
            early.check(words)
        with told:
            app()(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `loralab methods --json | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, CycloptsError, OSError) as error:
        message = spelled(_message(error, words), words[0] if words else "")
        print(f"loralab: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"loralab: stopped{STOPPED.get(words[0], '') if words else ''}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _told(words: Sequence[str]) -> Iterator[None]:
    """Say on stderr what a command does if nothing has ended it after a moment: its imports alone take seconds."""
    doing = DOING.get(words[0] if words else "")
    timer = threading.Timer(SILENCE, lambda: print(f"loralab {words[0]} {doing} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    if doing and not {"--help", "-h"} & {*words}:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _quiet() -> None:
    """Keep other libraries from writing to stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers reads it when it is imported
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _shown(default: Any) -> Any:
    """The default as help shows it: not that a flag is off or a list empty."""
    if default is False or default in ((), ""):
        return None
    return " ".join(map(str, default)) if isinstance(default, tuple) else default


def _whole_numbers(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuse 8.5 for a whole number, which cyclopts would round. Raises UserError."""
    for argument in arguments:
        if argument.hint in (int, int | None):
            for token in argument.tokens:
                if "." in token.value:
                    raise UserError(f"{token.keyword} {token.value}: expected a whole number")


def _message(error: Exception, words: Sequence[str]) -> str:
    """What was wrong and what to do, in cyclopts' own words where they are clear."""
    if isinstance(error, UnknownCommandError):
        meant = hint(words[0], COMMANDS)
        return f"no command {words[0]!r}{meant}: there are {', '.join(COMMANDS)}; see loralab --help"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        wrong = near(name, [t for t in words if t.startswith("-")])
        needs = f"{words[0]} needs {name}" + (f", not {wrong}" if wrong else "")
        needs = f"{name} needs a value" if name in words else needs
        if wrong is None and name not in words and "" not in early.PATHS.get(words[0], ()):
            bare = next((word for word in words[1:2] if not word.startswith("-")), None)
            needs += f" (did you mean {name} {bare}?)" if bare else ""
        return f"{needs}; see loralab {words[0]} --help"
    if isinstance(error, CoercionError) and error.token is not None and error.target_type in (int, float):
        return f"{error.token.keyword} {error.token.value}: expected {kind(error.target_type)}"
    if isinstance(error, UnusedCliTokensError):
        return f"{words[0]} cannot use {' '.join(error.unused_tokens or ())!r}; see loralab {words[0]} --help"
    if isinstance(error, OSError):
        return f"{error.filename or 'cannot read or write'}: {error.strerror or error}"
    return str(error)


def _version() -> str:
    from loralab import __version__

    return __version__
