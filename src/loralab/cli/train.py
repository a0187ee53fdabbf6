"""`loralab train`: one run."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, Any

from accelerate import PartialState
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from loralab.cli.show import Json, as_bytes, as_json, clean, note, pairs, table
from loralab.cli.show_learned import show
from loralab.cli.wording import spelled
from loralab.data.batches import Rows
from loralab.disk import size_text
from loralab.errors import UserError
from loralab.inputs import IGNORED
from loralab.run import Settings
from loralab.run import train as run
from loralab.run.bar import Bar, rate
from loralab.run.fit import began_with, fit
from loralab.run.folder import WRONG
from loralab.run.setup import training_rows
from loralab.run.tune import Tried, metric_of
from loralab.run.tune import tune as try_rates

TUNE = """Try several learning rates in shared passes, those given or four around the method's own, and take the run
that held-out rows choose."""

ROWS = """Print so many training rows as the model gets them, what is learned of them marked, and end: no weights are
read and nothing is trained."""


MEMORY = """Keep within so much memory, as 2GB: the batch is taken in parts, then activations are recomputed, then
weights are stored in fewer bits, until an estimate of the step fits. The line that says so has the numbers."""


def train(
    settings: Annotated[Settings, Parameter(name="*")],
    *,
    tune: Annotated[tuple[float, ...] | None, Parameter(help=TUNE)] = None,
    memory: Annotated[str | None, Parameter(help=MEMORY)] = None,
    show_rows: Annotated[int, Parameter(help=ROWS)] = 0,
    json: Json = False,
) -> None:
    """Fine-tune one model on one task with one method.

    Writes a run folder: run.json, metrics.jsonl, adapter/ and, last, result.json.
    """
    if show_rows < 0:
        raise UserError(f"--show-rows {show_rows}: expected 0 or more")
    if show_rows:
        rows, tokenizer, notes = training_rows(settings)
        for text in notes:
            note(spelled(text, "train"))
        _show_rows(rows, tokenizer, show_rows)
        return
    if memory is not None:
        settings = _within(settings, as_bytes(memory) or 0, tuned=tune is not None)
    tried: list[Tried] = []
    if tune is not None:
        tried, best = try_rates(settings, tune, SpelledBar())
        settings = replace(settings, out=best.folder, lr=best.lr, resume=True)  # the run that is finished there
    result = run(settings, SpelledBar())
    if not PartialState().is_main_process:
        return
    if json:
        as_json(result)
    else:
        if tried:
            _show_rates(tried, best)
        pairs(f"{result['task']}, {result['model']}, {result['method']}, seed {result['seed']}", summary(result))
        show(result["learned"])
        if (wrong := settings.folder / WRONG).is_file():
            print(f"rows that are most wrong: {wrong}")
        print(f"run folder: {settings.folder}")


def _within(settings: Settings, room: int, tuned: bool) -> Settings:
    """Return the settings that keep within `room` bytes, and say what they are."""
    if tuned:
        raise UserError("--memory with --tune: what several runs need together is not estimated, leave one out")
    if (before := began_with(settings)) is not None:
        return replace(settings, **before)
    tried = fit(settings, room)
    first, chosen = tried[0].estimate.peak, tried[-1]
    text = f"memory: {chosen}: a step takes about {size_text(chosen.estimate.peak)} of {size_text(room)}"
    text += f", as given {size_text(first)}" * (len(tried) > 1)
    SpelledBar().say(text + "; weights in fewer bits change the result" * ("store" in chosen.changes))
    return replace(settings, **chosen.settings)


class SpelledBar(Bar):
    """A bar whose notes name settings as flags."""

    def say(self, text: str) -> None:
        """Print a note in the words of the command line."""
        super().say(spelled(text, "train"))


def summary(result: dict[str, Any]) -> dict[str, str]:
    """Return what is printed of a result: name and text of each line."""
    metric, counts, time, protocol = result["metric"], result["counts"], result["time"], result["protocol"]
    others = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items() if name != metric["name"])
    chosen = f"epoch {result['selected_epoch']}, by {protocol['selection']}" + " (optimistic)" * protocol["optimistic"]
    return {
        metric["name"]: f"{metric['selected']:.4f}  ({chosen})",
        **_by_epoch(metric),
        **({"other metrics": others} if others else {}),
        "values that learn": f"{counts['adapter']:,} adapter + {counts['head']:,} head; base {counts['base']:,}",
        "training": f"{time['train_s']:.1f} s, {rate(time['examples_per_s'])}",
        "peak memory": f"{size_text(result['memory']['peak_bytes'])} above what the imports take",
    }


def _by_epoch(metric: dict[str, Any]) -> dict[str, str]:
    """Return the lines of the last and the best epoch, where the validation split was read after each."""
    if metric["best_on_validation"] is None:
        return {}
    return {
        "  last epoch": f"{metric['last']:.4f}",
        "  best epoch": f"{metric['best_on_validation']:.4f}  (optimistic: selected on validation)",
    }


def _show_rates(tried: Sequence[Tried], best: Tried) -> None:
    """Print the table of rates with their held-out scores."""
    rows = [
        (f"{x.lr:g}", "" if x.held_out is None else f"{x.held_out:.4f}", "chosen" if x is best else x.why or "")
        for x in tried
    ]
    table("learning rates", ("rate", f"held-out {metric_of(best)}", ""), rows)
    print()


def _show_rows(rows: Rows, tokenizer: Any, count: int) -> None:
    """Print the first rows as texts. Tokens that are learned are green at a terminal, and between « and » elsewhere."""
    console = Console(highlight=False, markup=False, emoji=False)
    for place in rows.places(range(min(count, len(rows)))):
        ids = rows.columns["input_ids"][place]
        labels = rows.columns["labels"][place] if "labels" in rows.columns else [IGNORED] * len(ids)
        text = Text(f"row {place // rows.sequences + 1}: ", style="bold")
        for taken, group in groupby(zip(ids, labels, strict=False), key=lambda pair: pair[1] != IGNORED):
            part = clean(tokenizer.decode([i for i, _ in group], skip_special_tokens=False))
            part = f"«{part}»" if taken and not console.is_terminal else part
            text.append(part, style="bold green" if taken else "dim")
        if "labels" not in rows.columns:
            text.append(f" -> {rows.labels[place // rows.sequences].tolist()}", style="bold green")
        console.print(text, soft_wrap=True)
