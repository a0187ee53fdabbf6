"""A recipe is a point on the axes; a published name is a row of NAMED, and any other point works too."""

import dataclasses
import difflib
from dataclasses import dataclass, field, replace
from typing import Any

from loralab.bases import STORES
from loralab.errors import UserError
from loralab.factors import FACTORS, Factors
from loralab.factors.delta import DeltaLoRA
from loralab.factors.dylora import DyLoRA
from loralab.factors.lora import LoRA
from loralab.factors.precond import PreconditionedLoRA
from loralab.factors.vera import VeRA

BASE_ROLES = ("bias", "all")  # tensors of the base that can learn in place: every bias, or everything


@dataclass(frozen=True)
class Recipe:
    factors: Factors | None = field(default_factory=LoRA)
    """Where A and B come from; None adapts no layer."""
    gain: bool = False
    """DoRA: also learn the length of each row of the weight."""
    exact_gain: bool = False
    """Let gradients through the norm of a gain; the paper holds it constant."""
    store: str | None = None
    """How the frozen weight is kept; None leaves it as the model has it."""
    train: tuple[str, ...] | None = None
    """Roles that learn: A, B, ..., or of the base: bias, all. None means those of the factors."""
    lr: float = 1e-3
    """Learning rate that learns at the default rank; tune it on a held-out split for real comparisons."""
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in training."""

    @property
    def learn(self) -> tuple[str, ...]:
        """Roles of the adapted layers that learn."""
        own = () if self.factors is None else (*self.factors.learn, *(["m"] if self.gain else []))
        return own if self.train is None else tuple(role for role in self.train if role not in BASE_ROLES)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that a layer holds."""
        return () if self.factors is None else (*self.factors.roles, *(["m"] if self.gain else []))

    @property
    def learn_base(self) -> str | None:
        """Which tensors of the base learn in place: None, "bias" or "all"."""
        return next((role for role in self.train or () if role in BASE_ROLES), None)

    def count(self, out_features: int, in_features: int) -> int:
        """Values of one adapted layer that learn, in closed form."""
        sizes = {"m": out_features} | ({} if self.factors is None else self.factors.sizes(out_features, in_features))
        return sum(sizes[role] for role in self.learn)


NAMED: dict[str, tuple[Recipe, str]] = {
    "lora": (Recipe(), "W x + b + (alpha/r) B A x"),
    "rslora": (Recipe(factors=LoRA(stabilized=True)), "W x + b + (alpha/sqrt(r)) B A x"),
    "dora": (Recipe(gain=True), "m / |W + s B A| * (W x + s B A x) + b"),
    "vera": (Recipe(factors=VeRA(), lr=1e-2), "W x + b + diag(b) B diag(d) A x"),
    "lora-fa": (Recipe(train=("B",)), "W x + b + s B A x, A frozen"),
    "lora-fa-precond": (Recipe(factors=PreconditionedLoRA()), "lora-fa, g_B <- g_B (A A^T)^-1 / s^2"),
    "lora+": (Recipe(lr=5e-4, lr_ratio=16.0), "W x + b + s B A x, B learns 16 times faster"),
    "dylora": (Recipe(factors=DyLoRA()), "W x + b + (alpha/k) B[:, :k] A[:k] x, k drawn each step"),
    "frozen-dylora": (Recipe(factors=DyLoRA(frozen=True)), "dylora, only row and column k learn"),
    "delta-lora": (Recipe(factors=DeltaLoRA()), "W x + b + s B A x + follow s (B A - B0 A0) x"),
    "bitfit": (Recipe(factors=None, train=("bias",)), "every bias learns"),
    "full": (Recipe(factors=None, train=("all",), lr=1e-4), "every tensor learns"),
    "head": (Recipe(factors=None, train=(), lr=1e-3), "only the classification head learns"),
}


def recipe(method: "str | Recipe", **settings: Any) -> Recipe:
    """The recipe of a name, with settings changed by their own names: `recipe("lora", rank=4, dropout=0.1)`.

    A setting belongs to the recipe or to its factors. Raises UserError for an unknown name, setting or combination.
    """
    if isinstance(method, Recipe):
        base = method
    elif method in NAMED:
        base = NAMED[method][0]
    else:
        near = difflib.get_close_matches(str(method), NAMED, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"method {method!r} is unknown{hint}: choose one of {', '.join(NAMED)}")
    own = {f.name for f in dataclasses.fields(Recipe)}
    of_factors = set() if base.factors is None else {f.name for f in dataclasses.fields(base.factors)}
    if unknown := sorted(set(settings) - own - of_factors):
        allowed = ", ".join(sorted(own | of_factors))
        raise UserError(f"method {method!r} has no setting {', '.join(map(repr, unknown))}: it has {allowed}")
    inner = {key: value for key, value in settings.items() if key in of_factors}
    changed = replace(base, **{key: value for key, value in settings.items() if key in own})
    if inner and changed.factors is not None:
        changed = replace(changed, factors=replace(changed.factors, **inner))
    return check(changed)


def check(r: Recipe) -> Recipe:
    """The recipe itself, or one UserError with every problem and both fields of a nonsense combination."""
    problems = []
    if r.store is not None and r.store not in STORES:
        problems.append(f"store={r.store!r}: choose one of {', '.join(STORES)}")
    if not 0 <= r.dropout < 1:
        problems.append(f"dropout={r.dropout}: expected 0 <= dropout < 1")
    if not r.lr > 0 or not r.lr_ratio > 0:
        problems.append(f"lr={r.lr}, lr_ratio={r.lr_ratio}: expected both above 0")
    if r.learn_base and r.store:
        problems.append(f"train={r.learn_base!r} with store={r.store!r}: a stored weight is frozen")
    if r.factors is None and (r.dropout or r.learn or r.gain):
        given = f"dropout={r.dropout}, gain={r.gain}, train={r.train}"
        problems.append(f"factors=None with {given}: no layer is adapted")
    if r.exact_gain and not r.gain:
        problems.append(f"exact_gain={r.exact_gain} with gain={r.gain}: there is no norm")
    if r.factors is not None:
        problems += r.factors.problems()
        if strange := sorted(set(r.learn) - set(r.roles)):
            roles = ", ".join(r.roles)
            problems.append(
                f"train={r.train} with {name_of(r.factors)}: its roles are {roles}, not {', '.join(strange)}"
            )
    if problems:
        raise UserError("; ".join(problems))
    return r


def name_of(factors: Factors) -> str:
    return next(name for name, kind in FACTORS.items() if kind is type(factors))


def to_json(r: Recipe) -> dict[str, Any]:
    factors = None if r.factors is None else {"kind": name_of(r.factors), **dataclasses.asdict(r.factors)}
    return {**{f.name: getattr(r, f.name) for f in dataclasses.fields(r)}, "factors": factors}


def from_json(data: dict[str, Any]) -> Recipe:
    """The inverse of `to_json`; raises UserError for what this version does not know."""
    try:
        data = dict(data)
        if (factors := data["factors"]) is not None:
            factors = dict(factors)
            data["factors"] = FACTORS[factors.pop("kind")](**factors)
        data["train"] = None if data["train"] is None else tuple(data["train"])
        return check(Recipe(**data))
    except (KeyError, TypeError) as error:
        raise UserError(f"recipe {data}: {error} is not known here; it may come from a newer version") from error
