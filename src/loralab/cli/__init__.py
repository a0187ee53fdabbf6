"""The command line: `main` parses, calls one function, and turns a user's error into one line and exit code 2."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnusedCliTokensError

from loralab.cli.headings import Headed
from loralab.errors import UserError, hint, near

COMMANDS = {  # name -> what it does, an example; loralab.cli.NAME:NAME is imported when it is called
    "demo": (
        "Fine-tune a real small encoder on an embedded task: full, head-only and LoRA. Offline.",
        "loralab demo",
    ),
    "train": (
        "Fine-tune one model on one task with one method.",
        "loralab train --task reviews.csv --text title body --label stars --out runs/reviews",
    ),
    "plan": (
        "What a training step needs in memory, without loading weights, and what would make it need less.",
        "loralab plan --model minilm --method lora --batch-size 32 --max-length 64 --memory 1GB",
    ),
    "study": (
        "Many runs that answer one question, compared with corrected tests.",
        "loralab study studies/utaustin.toml --model minilm --data DIR",
    ),
    "report": (
        "The page, pictures and tables of a study or a folder of runs.",
        "loralab report runs",
    ),
    "bench": (
        "Time and memory of training, PEFT and loralab turn and turn about.",
        "loralab bench --methods lora dora --lengths 16 64 --repeats 5",
    ),
    "methods": (
        "The table of methods: equation, what learns, how many values.",
        "loralab methods --json",
    ),
    "inspect": (
        "What an adapter folder holds, and what it learned.",
        "loralab inspect runs/reviews/adapter",
    ),
    "verify": (
        "Check an adapter folder, and that it fits a base.",
        "loralab verify runs/reviews/adapter --model minilm",
    ),
    "predict": (
        "Answer the rows of a file with one adapter, or each row with its own.",
        "loralab predict --adapters runs/*/adapter --input rows.csv --adapter-column task --out answers.csv",
    ),
    "merge": (
        "Write a plain model with an adapter merged in.",
        "loralab merge runs/reviews/adapter --model minilm --out merged",
    ),
    "export": (
        "Write an adapter in PEFT's layout.",
        "loralab export runs/reviews/adapter --model minilm --out exported",
    ),
}
STOPPED = {  # what to say when the user stops it
    "train": "; the run goes on from its last checkpoint with --resume",
    "study": "; the same command goes on where it was",
}
CHATTY = ("bitsandbytes", "transformers")  # they log about themselves at import and while loading


def app() -> App:
    flags = Parameter(negative="", consume_multiple=True, show_default=_shown)
    top = App(
        name="loralab", help="One equation, every LoRA, and comparisons that are evidence.", version=_version,
        default_parameter=flags, help_formatter=Headed(), config=_whole_numbers,
        result_action="return_value", suppress_keyboard_interrupt=False,
    )  # fmt: skip
    top["--help"].help, top["--version"].help = "This list, or the flags of a command.", "The version."
    for place, (name, (told, example)) in enumerate(COMMANDS.items()):
        path = f"loralab.cli.{name}:{name}"
        top.command(path, name=name, help=told, help_epilogue=f"Example: {example}", sort_key=place)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 if nobody read on, 2 for a user's error, 130 when interrupted."""
    given = sys.argv[1:] if argv is None else list(argv)
    _quiet()
    try:
        app()(given, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `loralab methods --json | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, CycloptsError, OSError) as error:
        print(f"loralab: {' '.join(_told(error, given).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"loralab: stopped{STOPPED.get(given[0], '') if given else ''}", file=sys.stderr)
        return 130
    return 0


def _quiet() -> None:
    """Leaves stderr to this project's own words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported; the level is for when it was
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _shown(default: Any) -> Any:
    """What help tells of a default; that a flag is off or a list empty goes without saying."""
    return None if default is False or default in ((), "") else default


def _whole_numbers(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuses 8.5 where a whole number belongs; cyclopts would round it."""
    for argument in arguments:
        if argument.hint in (int, int | None):
            for token in argument.tokens:
                if "." in token.value:
                    raise UserError(f"{token.keyword} {token.value}: expected a whole number")


def _told(error: Exception, given: Sequence[str]) -> str:
    """What was wrong, and what to do; cyclopts' own words where they say it."""
    if isinstance(error, UnknownCommandError):
        meant = hint(given[0], COMMANDS)
        return f"no command {given[0]!r}{meant}: there are {', '.join(COMMANDS)}; loralab --help tells what they do"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        wrong = near(name, [t for t in given if t.startswith("-")])
        needs = f"{given[0]} needs {name}" + (f", not {wrong}" if wrong else "")
        needs = f"{name} needs a value" if name in given else needs
        return f"{needs}; see loralab {given[0]} --help"
    if isinstance(error, UnusedCliTokensError):
        return f"{given[0]} cannot use {' '.join(error.unused_tokens or ())!r}; see loralab {given[0]} --help"
    if isinstance(error, OSError):
        return f"{error.filename or 'cannot read or write'}: {error.strerror or error}"
    return str(error)


def _version() -> str:
    from loralab import __version__

    return __version__
