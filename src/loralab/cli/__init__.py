"""The command line: `main` parses, calls one function, and turns a user's error into one line and exit code 2."""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from loralab.errors import UserError

COMMANDS = {  # name -> what it does; loralab.cli.NAME:NAME is imported when it is called
    "demo": "Fine-tune a real small encoder on an embedded task: full, head-only and LoRA. Offline.",
    "train": "Fine-tune one model on one task with one method.",
    "methods": "The table of methods: equation, what learns, how many values.",
    "inspect": "What an adapter folder holds.",
    "verify": "Check an adapter folder, and that it fits a base.",
    "merge": "Write a plain model with an adapter merged in.",
    "export": "Write an adapter in PEFT's layout.",
}


def app() -> App:
    top = App(
        name="loralab", help="One equation, every LoRA, and comparisons that are evidence.", version=_version,
        result_action="return_value",
    )  # fmt: skip
    for name, told in COMMANDS.items():
        top.command(f"loralab.cli.{name}:{name}", name=name, help=told)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for a user's error, 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()(sys.argv[1:] if argv is None else list(argv), exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        print(f"loralab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loralab: stopped; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


def _version() -> str:
    from loralab import __version__

    return __version__
