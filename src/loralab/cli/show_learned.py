"""What a model learned, as tables: by class or type, which classes it confuses, and how sure it is."""

from collections.abc import Mapping
from typing import Any

from loralab.cli.show import table

SHOWN = 30  # classes or types in a table
WIDE = 12  # classes up to which the whole confusion is printed; of more, the most frequent mistakes


def show(learned: Mapping[str, Any]) -> None:
    """Print what there is."""
    if parts := learned.get("parts"):
        heads = list(next(iter(parts.values())))
        lines = [(key, *(_number(head, row[head]) for head in heads)) for key, row in list(parts.items())[:SHOWN]]
        more = f", the first {SHOWN} of {len(parts)}" if len(parts) > SHOWN else ""
        print()
        table(f"by class or type{more}", ("", *heads), lines)
    if (confusion := learned.get("confusion")) is not None:
        print()
        _confusion(confusion["labels"], confusion["counts"])
    if (calibration := learned.get("calibration")) is not None:
        print(f"\ncalibration error {calibration['error']:.4f}\n{_sureness(calibration['bins'])}")


def _confusion(labels: list[str], counts: list[list[int]]) -> None:
    if len(labels) <= WIDE:
        table(
            "confusion: a row a label, a column an answer",
            ("", *labels),
            [(label, *map(str, row)) for label, row in zip(labels, counts, strict=True)],
        )
        return
    cells = [(count, labels[i], labels[j]) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j]
    worst = sorted((cell for cell in cells if cell[0]), key=lambda cell: -cell[0])[:WIDE]
    table("most frequent mistakes", ("label", "answered", "rows"), [(a, b, str(count)) for count, a, b in worst])


def _sureness(bins: list[dict[str, Any]]) -> str:
    """What the highest bin of probabilities says, and how often that is right."""
    top = bins[-1]
    surest = f"The surest {top['answers']} answers have a mean probability of {top['probability']:.0%}"
    return f"{surest}; {top['right']:.0%} of them are right."


def _number(head: str, value: float) -> str:
    return f"{value:,.0f}" if head in ("rows", "spans") else f"{value:.4f}"
