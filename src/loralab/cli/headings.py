"""A command with many flags shows them under headings; which flags there are comes from the settings alone."""

from typing import Any

from cyclopts.help import DefaultFormatter, HelpPanel
from rich.console import Console, ConsoleOptions

HEADINGS = {
    "Task, data and model": "task data text label problem-type validation train-rows validation-rows max-length model",
    "Method": "method set rank alpha targets ranks policy keep rounds span dropout lr-ratio store",
    "Optimization": "epochs batch-size accumulate lr head-lr weight-decay schedule warmup clip",
    "Protocol": "selection patience seed",
    "Run": "out resume checkpoint-every dtype speed attention threads track json",
}
MANY = 15  # flags


class Headed(DefaultFormatter):
    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Prints one panel, or several if it holds many flags; a flag of no heading comes last."""
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
