"""Coverage: every parameter of the backbone as adapted, left alone (why) or unreachable (why), by kind and share."""

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from loralab import kinds
from loralab.reach import MATRIX, STACK, VECTORS, Part

ADAPTED, LEFT, UNREACHABLE = "adapted", "left alone", "unreachable"
ENOUGH = 0.5  # share of the linear values: below it, all-linear warns


class Row(NamedTuple):
    """What is alike in the coverage of a model."""

    state: str  # ADAPTED, LEFT or UNREACHABLE
    kind: str
    why: str
    values: int
    share: float  # of the values of the backbone
    paths: list[str]


@dataclass(frozen=True)
class Coverage:
    """What of a model the targets of an adapter matched, and what not, for which reason."""

    matched: dict[str, list[str]]
    """Target pattern -> paths of the adapted layers."""
    left: list[str]
    """Paths of the linear layers left alone."""
    parts: tuple[Part, ...] = ()
    """All parameters of the backbone, as `reach.parts` lists them."""
    why: Mapping[str, str] = field(default_factory=dict)
    """Path of a layer left alone -> the reason, where it is no other than that no target means it."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Path of a layer that is too small for the rank asked for -> the rank it has."""

    tokens: Mapping[str, int] = field(default_factory=dict)
    """Path of a layer of which single tokens learn -> how many of its values do."""

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers."""
        return list(dict.fromkeys(path for paths in self.matched.values() for path in paths))

    @property
    def size(self) -> int:
        """Values of the backbone."""
        return sum(part.values for part in self.parts)

    @property
    def unreached(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of each matrix, or stack of them, that no target reaches."""
        return {part.path: part.shape for part in self.parts if part.obstacle is not None}

    @property
    def unreached_values(self) -> int:
        """How many values no target reaches."""
        return sum(part.values for part in self.parts if part.obstacle is not None)

    def keep(self, paths: Container[str], why: str = "rank 0 in the rank map") -> "Coverage":
        """Without the matched layers that are not in `paths`, which count as left alone, for the reason `why`."""
        matched = {pattern: [p for p in found if p in paths] for pattern, found in self.matched.items()}
        gone = [path for path in self.paths if path not in paths]
        return replace(
            self,
            matched={pattern: found for pattern, found in matched.items() if found},
            left=[*self.left, *gone],
            why={**self.why, **dict.fromkeys(gone, why)},
        )

    def rows(self) -> list[Row]:
        """Every value of the backbone once, by state, kind and reason."""
        groups: dict[tuple[str, str, str], list[Part]] = {}
        adapted = set(self.paths)
        for part in self.parts:
            if (learned := self.tokens.get(part.path)) is not None and part.path in adapted:
                rest = (LEFT, part.kind, "of other tokens")
                groups.setdefault((ADAPTED, part.kind, "single tokens"), []).append(replace(part, values=learned))
                groups.setdefault(rest, []).append(replace(part, values=max(part.values - learned, 0)))
                continue
            groups.setdefault(self._state(part, adapted), []).append(part)
        rows = []
        for (state, kind, why), found in sorted(groups.items(), key=lambda group: _ORDER.index(group[0][0])):
            values = sum(part.values for part in found)
            rows.append(Row(state, kind, why, values, values / max(self.size, 1), [part.path for part in found]))
        return rows

    def _state(self, part: Part, adapted: Container[str]) -> tuple[str, str, str]:
        """(state, kind, reason) of one part."""
        if part.path in adapted:
            return ADAPTED, part.kind, ""
        if part.obstacle is not None:
            return UNREACHABLE, part.kind, part.obstacle
        if part.shared is not None and part.path not in self.why:
            return LEFT, part.kind, f"shared with {part.shared}"
        if part.kind == VECTORS:
            return LEFT, part.kind, "norms, scales and biases, which methods that train biases reach"
        return LEFT, part.kind, self.why.get(part.path, "no target names it")

    def share(self, state: str, kinds: Container[str] | None = None) -> float:
        """Share of the values (of those kinds, by default all) in one state."""
        rows = [row for row in self.rows() if kinds is None or row.kind in kinds]
        return sum(row.values for row in rows if row.state == state) / max(sum(row.values for row in rows), 1)

    def little(self) -> str | None:
        """A warning where less than half of the linear values is adapted, with the reasons; else None."""
        share = self.share(ADAPTED, PRODUCTS)
        if share >= ENOUGH or not self.parts:
            return None
        rest = sorted((r for r in self.rows() if r.kind in PRODUCTS and r.state != ADAPTED), key=lambda r: -r.values)
        return f"adapts {share:.1%} of the values of linear layers, less than half: {_words(rest)}"

    def note(self) -> str | None:
        """What no target reaches, in words; None if there is nothing."""
        rows = [row for row in self.rows() if row.state == UNREACHABLE]
        if not rows:
            return None
        count = self.unreached_values
        return (
            f"not adapted, whatever the targets: {count:,} values, {count / max(self.size, 1):.1%} of the backbone "
            f"({_words(rows)})"
        )

    def __str__(self) -> str:
        """On one line: what is adapted and at which rank if not that asked for, what is left alone, and the rest."""
        texts = [f"{pattern}: {summary(paths)}" for pattern, paths in self.matched.items()]
        if self.parts:
            texts.append(f"{self.share(ADAPTED):.1%} of the values of the backbone")
        for rank in sorted(set(self.ranks.values())):
            small = [path for path, own in self.ranks.items() if own == rank]
            texts.append(f"rank {rank}, the most they can have: {summary(small)}")
        texts.append(f"left alone: {self._left() or 'none'}")
        return "; ".join([*texts, *([] if (note := self.note()) is None else [note])])

    def _left(self) -> str:
        rows = [row for row in self.rows() if row.state == LEFT]
        return _words(rows) if rows else summary(self.left)


_ORDER = (ADAPTED, LEFT, UNREACHABLE)
PRODUCTS = (kinds.LINEAR.name, kinds.EXPERTS.name, MATRIX, STACK)  # kinds whose values are multiplied with an input


def _words(rows: Sequence[Row]) -> str:
    """Rows as: 30.1% embedding, no target means it (embeddings.word_embeddings (1)); ..."""
    return "; ".join(f"{row.share:.1%} {row.kind}, {row.why} ({summary(row.paths)})" for row in rows)


# ---- paths -----------------------------------------------------------------------------------------------------------


def folded(path: str) -> str:
    """A path with its numbers as *: encoder.layer.3.attention.self.query -> encoder.layer.*.attention.self.query."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def summary(paths: Sequence[str]) -> str:
    """Folded paths with counts: encoder.layer.*.attention.self.query (12), ..."""
    return ", ".join(f"{path} ({count})" for path, count in Counter(map(folded, paths)).items())


def kind(path: str) -> str:
    """What a layer is in its block: encoder.layer.3.attention.self.query -> attention.self.query."""
    return folded(path).rpartition("*.")[2]
