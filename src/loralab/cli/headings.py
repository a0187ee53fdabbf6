"""Help of a command with many flags, under headings."""

from typing import Any

from cyclopts.help import DefaultFormatter, HelpPanel
from rich.console import Console, ConsoleOptions

FIRST = "What everyone needs"  # the panel that opens the help of a command with many flags
HEADINGS = {  # heading -> flags; every setting of a run is under one (tests/test_cli.py)
    FIRST: "task text label model out",
    "Task and data": "tasks data objective problem-type validation separator encoding skip-bad-rows label-map "
    "train-rows rows validation-rows max-length lengths template loss-on pack models",
    "Method": "method methods from-adapter set rank alpha targets exclude ranks layers policy keep rounds span dropout "
    "lr-ratio store",
    "Optimization": "epochs max-steps max-time batch-size accumulate lr head-lr weight-decay schedule warmup clip "
    "class-weights",
    "Protocol": "tune generate-metric generate-rows selection select-by held-out eval-every patience seed",
    "Measurement": "learns allocator epoch together cost mixed loaded profile roofline repeats",
    "Prompts and adapters": "prompt input chat adapters side-by-side adapter-column plain prefix keep-going",
    "Decoding": "max-new-tokens temperature top-p top-k num-beams num-return-sequences stop",
    "Run": "memory show-rows resume licence "
    "checkpoint-every device dtype dtypes speed checkpointing attention threads track markdown json",
}
MANY = 15  # flags


class Headed(DefaultFormatter):
    """cyclopts' help, with a panel for each heading where a command has many flags."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one panel, or several if it holds many flags; flags without a heading come last."""
        rest = list(panel.entries)
        for heading, names in HEADINGS.items() if len(rest) > MANY else ():
            flags = [f"--{name}" for name in names.split()]
            under = sorted((entry for entry in rest if _flag(entry) in flags), key=lambda e: flags.index(_flag(e)))
            rest = [entry for entry in rest if entry not in under]
            super().__call__(console, options, panel.copy(title=heading, entries=under))
        if rest:
            super().__call__(console, options, panel.copy(entries=rest))


def _flag(entry: Any) -> str:
    return str(entry.names[0]) if entry.names else ""
