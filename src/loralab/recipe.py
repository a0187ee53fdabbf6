"""A recipe is a point on the axes; a published name is a row of NAMED, and any other point works too."""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator
from torch.utils._python_dispatch import _disable_current_modes

from loralab import policies
from loralab.errors import UserError, hint
from loralab.methods import starts
from loralab.methods.adalora import AdaLoRA
from loralab.methods.base import Factors, Roles
from loralab.methods.delta import DeltaLoRA
from loralab.methods.dylora import DyLoRA
from loralab.methods.gain import gain
from loralab.methods.lora import LoRA
from loralab.methods.precond import PreconditionedLoRA
from loralab.methods.superlora import SuperLoRA
from loralab.methods.vera import VeRA
from loralab.policies import POLICIES
from loralab.rankmap import RankMap, example, own, sized
from loralab.rankmap import problems as rank_problems
from loralab.stores import STORES
from loralab.update import Dense, Update

OLD_FIELDS = {"plan": "policy"}  # fields of 0.1.0 that have another name now
BASE_ROLES = ("bias", "all")  # tensors of the base that can learn in place: every bias, or everything


@dataclass(frozen=True)
class Recipe:
    factors: Factors | None = field(default_factory=LoRA)
    """Where A and B come from; None adapts no layer."""
    start: str = "kaiming"
    """How A and B begin: kaiming, gaussian, orthogonal, pissa, pissa-fast, olora, loftq or eva."""
    gain: bool = False
    """DoRA: also learn the length of each row of the weight."""
    exact_gain: bool = False
    """Let gradients through the norm of a gain; the paper holds it constant."""
    store: str | None = None
    """How the frozen weight is kept; None leaves it as the model has it."""
    train: tuple[str, ...] | None = None
    """Roles that learn: A, B, ..., or of the base: bias, all. None means those of the factors."""
    lr: float = 1e-3
    """Learning rate, of a named method from a small search (docs/methods.md); a real comparison tunes its own."""
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in training."""
    ranks: RankMap | None = None
    """Rank, share and gates of every layer; None gives each layer its own factors of the method's rank."""
    policy: str | None = None
    """What makes the rank map before a run, one of POLICIES; without a run, `ranks` must hold the map."""

    @property
    def learn(self) -> tuple[str, ...]:
        """Roles of the adapted layers that learn."""
        own = () if self.factors is None else (*self.factors.learn, *(["m"] if self.gain else []))
        return own if self.train is None else tuple(role for role in self.train if role not in BASE_ROLES)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that a layer holds."""
        if self.factors is None:
            return ()
        return (*self.factors.roles, *starts.added(self.start), *(["m"] if self.gain else []))

    @property
    def low_rank(self) -> bool:
        """Whether the update of a layer is a low-rank product, with a gain or not, which other tools can read."""
        return self.factors is not None and self.factors.low_rank

    @property
    def learn_base(self) -> str | None:
        """Which tensors of the base learn in place: None, "bias" or "all"."""
        return next((role for role in self.train or () if role in BASE_ROLES), None)

    def lower(self, p: Roles, base: Any, drawn: Any = None) -> Update | Dense:
        """The update of one layer with parameters `p` over `base`: the axes meet here, and nowhere else.

        Beside the roles of its factors a layer may hold m (a gain), gates (r,) on the rows of A, and A0, B0: what a
        start off zero must take away, so that the base keeps its own W and the adapter is portable. `drawn` is what
        the method drew for this training step.
        """
        assert self.factors is not None
        u: Update | Dense
        if self.factors.low_rank:
            u = self.lower_low_rank(p, drawn)
        else:
            u = Dense(self.factors.dense(p, base.out_features, base.in_features, drawn))
        return u._replace(gain=gain(p["m"], base, u, self.exact_gain)) if "m" in p else u

    def lower_low_rank(self, p: Roles, drawn: Any = None) -> Update:
        """The update of one layer without its gain, which needs no base."""
        assert self.factors is not None
        A, B = self.factors.lower(p, drawn)  # (..., r, in), (..., out, r)
        if "gates" in p:
            A = p["gates"].unsqueeze(-1) * A
        if "A0" in p:
            A, B = torch.cat([A, p["A0"]], -2), torch.cat([B, -p["B0"]], -1)  # (..., 2r, in), (..., out, 2r)
        return Update(A, B)

    def at(self, path: str) -> "Recipe":
        """The recipe of one layer, at the rank that the map gives it."""
        assert self.factors is not None
        return replace(self, factors=own(self.factors, self.ranks, path), ranks=None, policy=None)

    def for_steps(self, total_steps: int) -> "Recipe":
        """The recipe with what depends on the length of training filled in."""
        return self if self.factors is None else replace(self, factors=self.factors.for_steps(total_steps))

    def count(self, out_features: int, in_features: int) -> int:
        """Values of one adapted layer that learn, in closed form."""
        sizes = {"m": out_features} | ({} if self.factors is None else self.factors.sizes(out_features, in_features))
        return sum(sizes[role] for role in self.learn)


NAMED: dict[str, tuple[Recipe, str]] = {
    "lora": (Recipe(), "W x + b + (alpha/r) B A x"),
    "rslora": (Recipe(factors=LoRA(stabilized=True)), "W x + b + (alpha/sqrt(r)) B A x"),
    "dora": (Recipe(gain=True), "m / |W + s B A| * (W x + s B A x) + b"),
    "vera": (Recipe(factors=VeRA(), lr=3e-2), "W x + b + diag(b) B diag(d) A x"),
    "lora-fa": (Recipe(train=("B",), lr=3e-3), "W x + b + s B A x, A frozen"),
    "lora-fa-precond": (Recipe(factors=PreconditionedLoRA(), lr=3e-3), "lora-fa, g_B <- g_B (A A^T)^-1 / s^2"),
    "lora+": (Recipe(lr=1.5e-4, lr_ratio=16.0), "W x + b + s B A x, B learns 16 times faster"),
    "dylora": (Recipe(factors=DyLoRA()), "W x + b + (alpha/k) B[:, :k] A[:k] x, k drawn each step"),
    "frozen-dylora": (Recipe(factors=DyLoRA(frozen=True), lr=3e-3), "dylora, only row and column k learn"),
    "delta-lora": (Recipe(factors=DeltaLoRA()), "W x + b + s B A x + follow s (B A - B0 A0) x"),
    "adalora": (Recipe(factors=AdaLoRA(), lr=6e-3), "W x + b + s B diag(E) A x, a falling budget closes gates E"),
    "pissa": (Recipe(start="pissa", lr=3e-4), "W x + b + s (B A - B0 A0) x, s B0 A0 the best rank-r part of W"),
    "olora": (Recipe(start="olora", lr=2e-4), "W x + b + s (B A - B0 A0) x, B0 A0 the first r of W = Q R"),
    "loftq": (Recipe(store="nf4", start="loftq"), "Q x + b + s B A x, W kept as Q in 4 bit, s B A starts near W - Q"),
    "eva": (Recipe(start="eva", lr=3e-4), "W x + b + s B A x, A starts at what the inputs span"),
    "qlora": (Recipe(store="nf4-dq"), "W x + b + s B A x, W in 4 bit"),
    "qdora": (Recipe(store="nf4-dq", gain=True), "dora, W in 4 bit"),
    "lora-drop": (Recipe(policy="drop"), "lora, layers of small output share one A and B per kind"),
    "alora": (Recipe(policy="alora"), "lora, ranks that matter least go to other layers"),
    "lokr": (Recipe(factors=SuperLoRA(split=2), lr=9e-3), "W x + b + s (T1 kron T2) x, T of rank r or whole"),
    "lonkr": (Recipe(factors=SuperLoRA(split=3), lr=1e-2), "W x + b + s (T1 kron T2 kron T3) x, T of rank r or whole"),
    "lorta": (
        Recipe(factors=SuperLoRA(order=3, core=True), lr=3e-3),
        "W x + b + s (C x1 A1 x2 A2 x3 A3) x, folded to order 3",
    ),
    "superlora": (
        Recipe(factors=SuperLoRA(ratio=0.25), lr=2e-3),
        "W x + b + s F(A1 A2) x, F fixed, 4 weights from a number",
    ),
    "bitfit": (Recipe(factors=None, train=("bias",), lr=3e-3), "every bias learns"),
    "full": (Recipe(factors=None, train=("all",), lr=1e-4), "every tensor learns"),
    "head": (Recipe(factors=None, train=(), lr=3e-3), "only the classification head learns"),
}


# what files call a method -> its class
FACTORS = {r.factors.kind: type(r.factors) for r, _ in NAMED.values() if r.factors is not None}


def recipe(method: "str | Recipe", **settings: Any) -> Recipe:
    """The recipe of a name, with settings changed by their own names: `recipe("lora", rank=4, dropout=0.1)`.

    A setting belongs to the recipe or to its factors. Raises UserError for an unknown name, setting or combination.
    """
    if isinstance(method, Recipe):
        base = method
    elif method in NAMED:
        base = NAMED[method][0]
    else:
        raise UserError(f"method {method!r} is unknown{hint(str(method), NAMED)}: choose one of {', '.join(NAMED)}")
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
    shared = (r.policy in POLICIES and POLICIES[r.policy].shares) or bool(getattr(r.ranks, "shares", None))
    problems += starts.problems(r.start, r.factors, r.store, shared)
    problems += policies.problems(r.policy, r.factors, r.gain, r.start, r.store)
    if r.learn_base and r.store:
        problems.append(f"train={r.learn_base!r} with store={r.store!r}: a stored weight is frozen")
    if r.factors is None and (r.dropout or r.learn or r.gain or r.lr_ratio != 1):
        given = f"dropout={r.dropout}, gain={r.gain}, train={r.train}, lr_ratio={r.lr_ratio}"
        problems.append(f"factors=None with {given}: no layer is adapted")
    if r.factors is None and r.ranks:
        problems.append("factors=None with ranks: no layer is adapted")
    if r.exact_gain and not r.gain:
        problems.append(f"exact_gain={r.exact_gain} with gain={r.gain}: there is no norm")
    if r.factors is not None:
        problems += r.factors.problems()
        problems += _map_problems(r.factors, r)
        problems += _learn_problems(r.factors, r)
        if r.dropout and not r.factors.drops:
            problems.append(f"dropout={r.dropout} with {r.factors.kind}: its W follows B A, and sees no dropped x")
    if problems:
        raise UserError("; ".join(problems))
    return r


def _learn_problems(factors: Factors, r: Recipe) -> list[str]:
    """Why the roles that a recipe trains cannot be trained, or not move."""
    name = factors.kind
    able = [role for role in r.roles if role not in starts.added(r.start)]
    wrong = []
    if strange := sorted(set(r.learn) - set(able)):
        wrong.append(f"train={r.train} with {name}: its roles are {', '.join(able)}, not {', '.join(strange)}")
    elif r.train is not None and not factors.problems() and not _moves(factors, r):
        wrong.append(f"train={r.train} with {name}: what is frozen is zero at the start, so none of these ever moves")
    if r.lr_ratio != 1 and "B" not in r.learn:
        learned = ", ".join(r.learn) or "none"
        wrong.append(f"lr_ratio={r.lr_ratio} with {name}: no role B learns (those that do: {learned}); leave it at 1")
    return wrong


def _moves(factors: Factors, r: Recipe) -> bool:
    """Whether the roles that learn have a gradient at the start, tried on a square layer.

    What a dense update has of its roles depends on the layer's size, so nothing is said of it.
    """
    if "m" in r.learn or r.start not in starts.STARTS or not starts.STARTS[r.start].zero or not factors.low_rank:
        return True
    n = max(getattr(factors, "rank", 1), 8)
    # an adapter may be loaded where no gradients are wanted, or planned where tensors have no values
    with torch.enable_grad(), _disable_current_modes():
        p = factors.init(n, n, Generator().manual_seed(0))
        learned = [p[role].requires_grad_() for role in r.learn]
        p |= factors.local(factors.constants([(n, n)]), n, n)
        A, B = factors.lower(p)
        total = ((B @ A) * torch.randn(n, n, generator=Generator().manual_seed(1))).sum()
        return total.requires_grad and any(bool(grad.any()) for grad in torch.autograd.grad(total, learned))


def _map_problems(factors: Factors, r: Recipe) -> list[str]:
    """Why the recipe cannot have its rank map; a start must suit the rank of every layer."""
    ranks = r.ranks
    if r.policy in POLICIES and ranks is None and not factors.problems():
        ranks = example(POLICIES[r.policy].shares, getattr(factors, "rank", 1))
    if ranks is None:
        return []
    if wrong := rank_problems(factors, ranks):
        return wrong if r.ranks is not None else [f"policy={r.policy!r} makes {problem}" for problem in wrong]
    at_rank = {part.rank: sized(factors, part) for part in ranks.adapted.values()}
    told = [problem for f in at_rank.values() for problem in starts.problems(r.start, f, r.store)]
    if starts.added(r.start) and any(part.gates for part in ranks.adapted.values()):
        told.append(f"start={r.start!r} with gates: what a start off zero takes away has none")
    return told


def to_json(r: Recipe) -> dict[str, Any]:
    factors = None if r.factors is None else {"kind": r.factors.kind, **dataclasses.asdict(r.factors)}
    ranks = None if r.ranks is None else r.ranks.to_json()
    return {**{f.name: getattr(r, f.name) for f in dataclasses.fields(r)}, "factors": factors, "ranks": ranks}


def from_json(data: dict[str, Any]) -> Recipe:
    """The inverse of `to_json`; raises UserError for what this version does not know."""
    try:
        data = {OLD_FIELDS.get(key, key): value for key, value in data.items()}
        if (factors := data["factors"]) is not None:
            factors = dict(factors)
            data["factors"] = FACTORS[factors.pop("kind")](**factors)
        data["train"] = None if data["train"] is None else tuple(data["train"])
        data["ranks"] = None if data.get("ranks") is None else RankMap.from_json(data["ranks"])
        return check(Recipe(**data))
    except (KeyError, TypeError) as error:
        raise UserError(f"recipe {data}: {error} is not known here; it may come from a newer version") from error
