"""Rank maps: layer -> its own or shared factors, of which rank, with which gates. A policy returns one.

y = W x + b + s B diag(gates) A x with s = alpha / r or alpha / sqrt(r), r the layer's own rank (as PEFT's rank_pattern
does), and alpha its own where the map says so (PEFT's alpha_pattern). Layers of one share hold the very same parameters
of the roles that the method says (`Factors.shared`: A and B); a gain m and gates stay each layer's own.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.errors import UserError
from loralab.methods.base import Factors
from loralab.methods.lora import LoRA

FORMAT = "loralab rank map"


@dataclass(frozen=True)
class LayerRank:
    """What one layer gets."""

    rank: int
    """Rank r of the layer; 0 leaves the layer without an adapter."""
    share: str | None = None
    """Layers of the same share have one A and one B (superlora: one group); None keeps them the layer's own."""
    gates: tuple[float, ...] | None = None
    """One factor from 0 to 1 for every row of A; they do not learn. None is no gates, which is all ones."""
    alpha: float | None = None
    """Scaling numerator of the layer; None is the method's own. PEFT's alpha_pattern."""


@dataclass(frozen=True, init=False)
class RankMap:
    """Layer path -> LayerRank, or just a rank: `RankMap({"encoder.layer.0.attention.self.query": 4, ...})`."""

    layers: Mapping[str, LayerRank]

    def __init__(self, layers: Mapping[str, LayerRank | int]) -> None:
        parts = {path: part if isinstance(part, LayerRank) else LayerRank(part) for path, part in layers.items()}
        if wrong := _problems(parts):
            raise UserError("rank map: " + "; ".join(wrong))
        object.__setattr__(self, "layers", parts)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.layers.items(), key=lambda item: item[0])))

    def __str__(self) -> str:
        """31 of 37 layers, ranks 2 to 8, 21 of them in 5 shares."""
        ranks = [part.rank for part in self.adapted.values()]
        low, high = min(ranks), max(ranks)
        parts = [
            f"{len(ranks)} of {len(self.layers)} layers",
            f"rank {low}" if low == high else f"ranks {low} to {high}",
        ]
        if shares := self.shares:
            parts.append(f"{sum(map(len, shares.values()))} of them in {len(shares)} share" + "s" * (len(shares) > 1))
        return ", ".join(parts)

    @property
    def adapted(self) -> dict[str, LayerRank]:
        """The layers that get an adapter."""
        return {path: part for path, part in self.layers.items() if part.rank}

    @property
    def shares(self) -> dict[str, list[str]]:
        """Share -> its layers."""
        out: dict[str, list[str]] = {}
        for path, part in self.adapted.items():
            if part.share is not None:
                out.setdefault(part.share, []).append(path)
        return out

    def to_json(self) -> dict[str, Any]:
        """Path -> what differs from the defaults."""
        return {
            path: {key: value for key, value in dataclasses.asdict(part).items() if value is not None}
            for path, part in self.layers.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RankMap":
        """The inverse of `to_json`; a bare number is a rank. Raises UserError for anything else."""
        try:
            parts = {path: LayerRank(p) if isinstance(p, int) else LayerRank(**_tuples(p)) for path, p in data.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"rank map: {error}; expected layer -> rank, or -> rank, share, gates, alpha") from error
        return cls(parts)

    def save(self, file: Path | str) -> Path:
        file = Path(file)
        try:
            file.write_text(json.dumps({"format": FORMAT, "version": 1, "layers": self.to_json()}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the rank map to {file}: {error.strerror or error}") from error
        return file

    @classmethod
    def load(cls, file: Path | str) -> "RankMap":
        try:
            data = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"rank map {file} cannot be read: {error}") from error
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, 1):
            raise UserError(f"rank map {file}: expected a file of format {FORMAT!r}, version 1")
        return cls.from_json(data.get("layers", {}))


def _tuples(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if key == "gates" else value for key, value in part.items()}


def _problems(parts: Mapping[str, LayerRank]) -> list[str]:
    wrong: list[str] = []
    ranks: dict[str, tuple[str, int]] = {}  # share -> its first layer and that one's rank
    for path, part in parts.items():
        if type(part.rank) is not int or part.rank < 0:
            wrong.append(f"rank={part.rank!r} for {path}: expected a whole number, 0 or more")
            continue
        if part.gates is not None:
            if len(part.gates) != part.rank:
                wrong.append(f"{len(part.gates)} gates for {path}: expected one for each of its {part.rank} ranks")
            if out := [gate for gate in part.gates if not (_number(gate) and 0 <= gate <= 1)]:
                wrong.append(f"gates out of range for {path}: {out[0]!r}, expected 0 to 1")
        if part.alpha is not None and not (_number(part.alpha) and part.alpha > 0):
            wrong.append(f"alpha={part.alpha!r} for {path}: expected above 0")
        if part.share is not None:
            first = ranks.setdefault(part.share, (path, part.rank))
            if part.rank == 0 or first[1] != part.rank:
                told = f"{path} has rank {part.rank}, {first[0]} has rank {first[1]}"
                wrong.append(f"share {part.share!r}: {told}; expected one rank, 1 or more")
    return wrong if any(part.rank for part in parts.values() if type(part.rank) is int) or wrong else ["no layer in it"]


def _number(gate: Any) -> bool:
    return isinstance(gate, float | int) and math.isfinite(gate)


def own(factors: Factors, ranks: RankMap | None, path: str) -> Factors:
    """The factors of one layer: those of the recipe at the layer's own rank and alpha, and its place in its share."""
    if ranks is None:
        return factors
    part = ranks.layers[path]
    if part.share is None:
        return sized(factors, part)
    layers = sorted(ranks.shares[part.share], key=in_order)  # maps that are equal may list them in other orders
    return sized(factors, part).placed(layers.index(path), len(layers))


def sized(factors: Factors, part: LayerRank) -> Factors:
    """The factors at the rank and alpha of a layer."""
    return replace(factors, rank=part.rank, **({} if part.alpha is None else {"alpha": part.alpha}))  # type: ignore


def in_order(path: str) -> str:
    """What sorts paths with their numbers as numbers: layer.2 before layer.10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), path)


def problems(factors: Factors, ranks: RankMap | None) -> list[str]:
    """Why a method cannot take a map, whatever the model, one phrase each."""
    if ranks is None:
        return []
    if not isinstance(ranks, RankMap):
        return [f"ranks={ranks!r}: expected a RankMap"]
    rank, name = getattr(factors, "rank", None), type(factors).__name__
    if rank is None:
        return [f"ranks with {name}: it has no rank"]
    wrong: dict[str, None] = {}
    parts = ranks.adapted.values()
    if _one_rank(factors) and (others := {part.rank for part in parts} - {rank}):
        wrong[f"ranks with {name}: its layers have one rank, {rank}, not {min(others)}; 0 leaves a layer out"] = None
    if ranks.shares and not factors.shared:
        wrong[f"shares with {name}: it has no A and B of its own, its roles are {', '.join(factors.roles)}"] = None
    elif ranks.shares and type(factors).memory is not Factors.memory:
        wrong[f"shares with {name}: it decides layer by layer, so each needs its own A and B"] = None
    if any(part.gates for part in parts) and (type(factors).lower is not LoRA.lower or "gates" in factors.roles):
        wrong[f"gates with {name}: only s B A, one gate for a row of A, takes gates from a map"] = None
    if any(part.alpha is not None for part in parts) and not hasattr(factors, "alpha"):
        wrong[f"alpha of a layer with {name}: it has no alpha"] = None
    for k in sorted({part.rank for part in parts}):
        wrong |= dict.fromkeys(replace(factors, rank=k).problems())  # type: ignore[call-arg]
    return list(wrong)


def _one_rank(factors: Factors) -> bool:
    """Whether something is made for all layers together, or done in each step, at the one rank of the method."""
    return factors.stepped or type(factors).constants is not Factors.constants


def example(shares: bool, rank: int) -> RankMap:
    """A map as a policy makes them, with or without shares, to see before it runs whether a method can take one."""
    shared = {"a": LayerRank(rank, "a"), "b": LayerRank(rank, "a")}
    return RankMap(shared if shares else {"a": rank, "b": rank + 1, "c": 0})


def misfits(ranks: RankMap, shapes: Mapping[str, tuple[int, int]], left: Iterable[str]) -> list[str]:
    """Why a map does not fit the layers that the targets give, path -> (out, in); `left` are the other layers."""
    spare = set(left)
    missing = [path for path in shapes if path not in ranks.layers]
    unknown = [p for p, part in ranks.layers.items() if p not in shapes and not (part.rank == 0 and p in spare)]
    wrong = []
    if missing:
        wrong.append(f"it says nothing of {_some(missing)}, which targets match: give a rank, 0 for no adapter")
    if unknown:
        wrong.append(f"targets do not match {_some(unknown)}")
    for share, paths in ranks.shares.items():
        if len({shapes[path] for path in paths if path in shapes}) > 1:
            sizes = ", ".join(f"{path} ({shapes[path][0]} x {shapes[path][1]})" for path in paths if path in shapes)
            wrong.append(f"share {share!r} needs layers of one shape, got {sizes}")
    return wrong


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (f" ... ({len(paths)} layers)" if len(paths) > 4 else "")
