"""Rank maps: the rank of every layer, and whether it has gates or shares its factors. A policy makes one.

y = W x + b + s B diag(gates) A x with s = alpha / r or alpha / sqrt(r). r is the layer's own rank (as with PEFT's
rank_pattern), and alpha its own where the map gives one (PEFT's alpha_pattern). The layers of a share hold the very
same parameters of the roles in `Factors.shared` (A and B); a gain m and gates stay each layer's own.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.disk import read_json, write_json
from loralab.errors import UserError
from loralab.methods.base import Factors
from loralab.methods.lora import LoRA
from loralab.methods.tokens import Tokens
from loralab.schema import listed

FORMAT = "loralab rank map"


@dataclass(frozen=True)
class LayerRank:
    """The rank of one layer, and what else the map gives it."""

    rank: int
    """Rank r of the layer; 0 leaves the layer without an adapter."""
    share: str | None = None
    """Layers of the same share have one A and one B (superlora: one group); None keeps them the layer's own."""
    gates: tuple[float, ...] | None = None
    """One factor from 0 to 1 for every row of A; they do not learn. None is no gates, which is all ones."""
    alpha: float | None = None
    """Scaling numerator of the layer; None is the method's own. PEFT's alpha_pattern."""
    tokens: tuple[int, ...] | None = None
    """The tokens of an embedding, or an output layer, whose vectors alone learn, instead of the method; sorted."""
    vocabulary: int | None = None
    """Number of tokens of that layer."""
    rows: bool | None = None
    """Whether the tokens are the rows of its weight (out, in), as in an output layer, and not the columns."""


@dataclass(frozen=True, init=False)
class RankMap:
    """Layer path -> LayerRank, or just a rank: `RankMap({"encoder.layer.0.attention.self.query": 4, ...})`."""

    layers: Mapping[str, LayerRank]

    def __init__(self, layers: Mapping[str, LayerRank | int]) -> None:
        full = {path: row if isinstance(row, LayerRank) else LayerRank(row) for path, row in layers.items()}
        if wrong := _problems(full):
            raise UserError("rank map: " + "; ".join(wrong))
        object.__setattr__(self, "layers", full)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.layers.items(), key=lambda item: item[0])))

    def __str__(self) -> str:
        """A summary such as "31 of 37 layers, ranks 2 to 8, 21 of them in 5 shares"."""
        ranks = [layer.rank for layer in self.adapted.values()]
        low, high = min(ranks), max(ranks)
        phrases = [
            f"{len(ranks)} of {len(self.layers)} layers",
            f"rank {low}" if low == high else f"ranks {low} to {high}",
        ]
        if shares := self.shares:
            phrases.append(f"{sum(map(len, shares.values()))} of them in {len(shares)} share" + "s" * (len(shares) > 1))
        return ", ".join(phrases)

    @property
    def adapted(self) -> dict[str, LayerRank]:
        """The layers that get an adapter."""
        return {path: layer for path, layer in self.layers.items() if layer.rank}

    @property
    def even(self) -> bool:
        """Whether every layer has the same rank and factors of its own, as without a map."""
        return len(set(self.layers.values())) == 1 and not self.shares and not next(iter(self.layers.values())).gates

    @property
    def shares(self) -> dict[str, list[str]]:
        """Share -> its layers."""
        out: dict[str, list[str]] = {}
        for path, layer in self.adapted.items():
            if layer.share is not None:
                out.setdefault(layer.share, []).append(path)
        return out

    def to_json(self) -> dict[str, Any]:
        """Path -> what differs from the defaults."""
        return {
            path: {key: value for key, value in dataclasses.asdict(layer).items() if value is not None}
            for path, layer in self.layers.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RankMap":
        """The inverse of `to_json`; a bare number is a rank. Raises UserError for anything else."""
        try:
            rows = {path: LayerRank(p) if isinstance(p, int) else LayerRank(**_tuples(p)) for path, p in data.items()}
            return cls(rows)
        except UserError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"rank map: {error}; expected layer -> rank, or -> rank, share, gates, alpha") from error

    def save(self, file: Path | str) -> Path:
        """Write the map as JSON. Raises UserError if the file cannot be written."""
        file = Path(file)
        try:
            write_json(file, {"format": FORMAT, "version": 1, "layers": self.to_json()})
        except OSError as error:
            raise UserError(f"cannot write the rank map to {file}: {error.strerror or error}") from error
        return file

    @classmethod
    def load(cls, file: Path | str) -> "RankMap":
        """Read a map that `save` wrote. Raises UserError for any other file."""
        try:
            data = read_json(Path(file))
        except UserError as error:
            raise UserError(f"rank map {error}") from error
        if (data.get("format"), data.get("version")) != (FORMAT, 1):
            raise UserError(f"rank map {file}: expected a file of format {FORMAT!r}, version 1")
        return cls.from_json(data.get("layers", {}))


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer, with gates and tokens as tuples, as JSON has lists only."""
    return {key: tuple(value) if key in ("gates", "tokens") else value for key, value in row.items()}


def _problems(layers: Mapping[str, LayerRank]) -> list[str]:
    """What is wrong with a map, whatever the method and the model."""
    wrong: list[str] = []
    ranks: dict[str, tuple[str, int]] = {}  # share -> its first layer and that one's rank
    for path, layer in layers.items():
        if type(layer.rank) is not int or layer.rank < 0:
            wrong.append(f"rank={layer.rank!r} for {path}: expected a whole number, 0 or more")
            continue
        if layer.gates is not None:
            if len(layer.gates) != layer.rank:
                wrong.append(f"{len(layer.gates)} gates for {path}: expected one for each of its {layer.rank} ranks")
            if out := [gate for gate in layer.gates if not (_number(gate) and 0 <= gate <= 1)]:
                wrong.append(f"gates out of range for {path}: {out[0]!r}, expected 0 to 1")
        if (tokens := layer.tokens) is not None and not _whole(tokens, layer):
            wrong.append(f"tokens={tokens} for {path}: expected different numbers from 0 to {layer.vocabulary}, sorted")
        if layer.alpha is not None and not (_number(layer.alpha) and layer.alpha > 0):
            wrong.append(f"alpha={layer.alpha!r} for {path}: expected above 0")
        if layer.share is not None:
            first = ranks.setdefault(layer.share, (path, layer.rank))
            if layer.rank == 0 or first[1] != layer.rank:
                both = f"{path} has rank {layer.rank}, {first[0]} has rank {first[1]}"
                wrong.append(f"share {layer.share!r}: {both}; expected one rank, 1 or more")
    if not wrong and not any(layer.rank for layer in layers.values()):
        return ["no layer in it"]
    return wrong


def _whole(tokens: Any, layer: LayerRank) -> bool:
    """Whether the tokens of a layer are what a layer can have."""
    if not isinstance(tokens, tuple) or not all(type(n) is int for n in (*tokens, layer.vocabulary)):
        return False
    return (
        list(tokens) == sorted(set(tokens)) and bool(tokens) and 0 <= tokens[0] <= tokens[-1] < (layer.vocabulary or 0)
    )


def _number(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def own(factors: Factors, ranks: RankMap | None, path: str) -> Factors:
    """The factors of one layer: those of the recipe, at the layer's own rank and alpha and its place in its share."""
    if ranks is None:
        return factors
    layer = ranks.layers[path]
    if layer.tokens is not None:
        return Tokens(layer.tokens, layer.vocabulary or 0, bool(layer.rows))
    if layer.share is None:
        return sized(factors, layer)
    paths = sorted(ranks.shares[layer.share], key=natural)  # equal maps may list them in different orders
    return sized(factors, layer).placed(paths.index(path), len(paths))


def sized(factors: Factors, layer: LayerRank) -> Factors:
    """The factors at the rank and alpha of a layer."""
    return replace(factors, rank=layer.rank, **({} if layer.alpha is None else {"alpha": layer.alpha}))  # type: ignore


def natural(path: str) -> str:
    """A key that sorts paths with their numbers as numbers: layer.2 before layer.10."""
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
    layers = [layer for layer in ranks.adapted.values() if layer.tokens is None]
    if len(layers) < len(ranks.adapted) and (factors.stepped or type(factors).placed is not Factors.placed):
        wrong[f"tokens with {name}: it acts on all layers at every step, or together"] = None
    if _one_rank(factors) and (others := {layer.rank for layer in layers} - {rank}):
        wrong[f"ranks with {name}: its layers have one rank, {rank}, not {min(others)}; 0 leaves a layer out"] = None
    shared = any(layer.share is not None for layer in layers)
    if shared and not factors.shared:
        wrong[f"shares with {name}: it has no A and B of its own, its roles are {', '.join(factors.roles)}"] = None
    elif shared and type(factors).memory is not Factors.memory:
        wrong[f"shares with {name}: it decides layer by layer, so each needs its own A and B"] = None
    if factors.one_alpha and (both := _other_alphas(layers)):
        wrong[f"share {both[0].share!r} with {name}: alpha {both[0].alpha} and {both[1].alpha}; expected one"] = None
    if any(layer.gates for layer in layers) and (type(factors).lower is not LoRA.lower or "gates" in factors.roles):
        wrong[f"gates with {name}: only s B A, one gate for a row of A, takes gates from a map"] = None
    if any(layer.alpha is not None for layer in layers) and not hasattr(factors, "alpha"):
        wrong[f"alpha of a layer with {name}: it has no alpha"] = None
    for k in sorted({layer.rank for layer in layers}):
        wrong |= dict.fromkeys(replace(factors, rank=k).problems())  # type: ignore[call-arg]
    return list(wrong)


def _other_alphas(layers: Iterable[LayerRank]) -> tuple[LayerRank, LayerRank] | None:
    """Two layers of one share whose alphas are not the same, if there are such."""
    first: dict[str, LayerRank] = {}
    shared = [layer for layer in layers if layer.share is not None]
    pairs = ((first.setdefault(str(layer.share), layer), layer) for layer in shared)
    return next((pair for pair in pairs if pair[0].alpha != pair[1].alpha), None)


def _one_rank(factors: Factors) -> bool:
    """Whether the method needs one rank in all layers: for shared constants, or for its work at each step."""
    return factors.stepped or type(factors).constants is not Factors.constants


def example(shares: bool, rank: int) -> RankMap:
    """A map like those of a policy, with or without shares, to check early whether a method can take one."""
    shared = {"a": LayerRank(rank, "a"), "b": LayerRank(rank, "a")}
    return RankMap(shared if shares else {"a": rank, "b": rank + 1, "c": 0})


def misfits(ranks: RankMap, shapes: Mapping[str, tuple[int, int]], left: Iterable[str]) -> list[str]:
    """Why a map does not fit a model, one phrase each.

    `shapes` maps the layers that the targets match to (out, in); `left` are the model's other linear layers.
    """
    others = set(left)
    missing = [path for path in shapes if path not in ranks.layers]
    unknown = [p for p, row in ranks.layers.items() if p not in shapes and not (row.rank == 0 and p in others)]
    wrong = []
    if missing:
        wrong.append(f"it has no {listed(missing)}, which targets match: give a rank, 0 for no adapter")
    if unknown:
        wrong.append(f"targets do not match {listed(unknown)}")
    for share, paths in ranks.shares.items():
        of_tokens = ranks.layers[paths[0]].tokens is not None  # of an embedding and, turned, of an output layer
        if len({shapes[path] for path in paths if path in shapes}) > 1 and not of_tokens:
            sizes = ", ".join(f"{path} ({shapes[path][0]} x {shapes[path][1]})" for path in paths if path in shapes)
            wrong.append(f"share {share!r} needs layers of one shape, got {sizes}")
    return wrong
