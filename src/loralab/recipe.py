"""Recipes: a recipe is a value on each axis (factors, start, gain, store, ...). Published methods are rows of NAMED."""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator
from torch.utils._python_dispatch import _disable_current_modes

from loralab import policies, schema
from loralab.errors import UserError, hint
from loralab.methods import starts
from loralab.methods.adalora import AdaLoRA
from loralab.methods.base import Factors, Roles
from loralab.methods.delta import DeltaLoRA
from loralab.methods.dylora import DyLoRA
from loralab.methods.gain import gain
from loralab.methods.ia3 import IA3
from loralab.methods.loha import LoHa
from loralab.methods.lora import LoRA
from loralab.methods.miss import MiSS
from loralab.methods.oft import OFT
from loralab.methods.precond import PreconditionedLoRA
from loralab.methods.superlora import SuperLoRA
from loralab.methods.tokens import Tokens
from loralab.methods.vera import VeRA
from loralab.methods.xs import LoRAXS
from loralab.policies import POLICIES
from loralab.rankmap import RankMap, example, own, sized
from loralab.rankmap import problems as rank_problems
from loralab.stores import STORES
from loralab.update import Dense, Update

OLD_FIELDS = {"plan": "policy"}  # old name of a field in files of 0.1.0 -> its name now
BASE_ROLES = ("bias", "all")  # roles of the base that can learn in place: every bias, or every tensor
SMALL = 8  # side and largest rank of the layer on which a recipe is tried
NO_SETTINGS = ("factors", "ranks")  # the fields of a recipe that are objects of their own
WITHOUT_LAYERS = ("train", "lr")  # the settings of a recipe that adapts no layer


@dataclass(frozen=True)
class Recipe:
    """All that defines a method and its settings, apart from the model. `recipe` makes and checks one."""

    factors: Factors | None = field(default_factory=LoRA)
    """The method that gives A and B; None adapts no layer."""
    start: str = "kaiming"
    """Starting values of A and B (docs/starts.md)."""
    gain: bool = False
    """DoRA: also learn the length of each row of the weight."""
    exact_gain: bool = False
    """Let gradients through the norm of a gain; the paper holds it constant."""
    store: str | None = None
    """How the frozen weight is kept (docs/quantization.md); None leaves it as it was loaded."""
    train: tuple[str, ...] | None = None
    """Roles that learn: A, B, ..., or of the base: bias, all. None means the method's own."""
    lr: float = 1e-3
    """Learning rate; for a named method from a small search (docs/methods.md), and a real comparison tunes its own."""
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B divided by that of A."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in training."""
    ranks: RankMap | None = None
    """Rank, share and gates of every layer; None gives each layer its own factors at the method's rank."""
    policy: str | None = None
    """What makes the rank map before a run (docs/rank-maps.md). Without a run, give `ranks`."""

    @property
    def learn(self) -> tuple[str, ...]:
        """Roles of the adapted layers that learn."""
        if self.train is not None:
            return tuple(role for role in self.train if role not in BASE_ROLES)
        return () if self.factors is None else (*self.factors.learn, *(["m"] if self.gain else []))

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the tensors of a layer."""
        if self.factors is None:
            return ()
        return (*self.factors.roles, *starts.added(self.start), *(["m"] if self.gain else []))

    @property
    def low_rank(self) -> bool:
        """Whether the update of a layer is a low-rank product, with or without a gain, which other tools can read."""
        return self.factors is not None and self.factors.low_rank

    @property
    def over_base(self) -> bool:
        """Whether the update of a layer depends on the frozen weight."""
        return self.gain or (self.factors is not None and self.factors.sees_weight)

    @property
    def learn_base(self) -> str | None:
        """The tensors of the base that learn in place: None, "bias" or "all"."""
        return next((role for role in self.train or () if role in BASE_ROLES), None)

    def lower(self, p: Roles, base: Any, drawn: Any = None) -> Update | Dense:
        """The update of one layer with tensors `p` over `base`. All axes are combined here, and nowhere else.

        Beside the roles of its method a layer may have m (a gain), gates (r,) on the rows of A, and A0, B0, which take
        away a start with s B A not zero, so that the adapter fits the original model. `drawn` is the method's draw of
        this training step.
        """
        assert self.factors is not None
        u: Update | Dense
        if self.factors.low_rank:
            u = self.lower_low_rank(p, drawn)
        else:
            if self.factors.sees_weight:
                p = {**p, "W": base.dense().detach()}  # (out, in)
            u = Dense(self.factors.dense(p, base.out_features, base.in_features, drawn))
        return u._replace(gain=gain(p["m"], base, u, self.exact_gain)) if "m" in p else u

    def lower_low_rank(self, p: Roles, drawn: Any = None) -> Update:
        """The update of one layer without its gain; needs no base."""
        assert self.factors is not None
        A, B = self.factors.lower(p, drawn)  # (..., r, in), (..., out, r)
        if "gates" in p:
            A = p["gates"].unsqueeze(-1) * A
        if "A0" in p:
            A, B = torch.cat([A, p["A0"]], -2), torch.cat([B, -p["B0"]], -1)  # (..., 2r, in), (..., out, 2r)
        if A.ndim != B.ndim:  # a side that adapters have in common has no axis of them
            lead = max(A.shape[:-2], B.shape[:-2], key=len)
            A, B = A.expand(*lead, *A.shape[-2:]), B.expand(*lead, *B.shape[-2:])
        return Update(A, B)

    def at(self, path: str) -> "Recipe":
        """The recipe of one layer, at the rank that the map gives it."""
        assert self.factors is not None
        factors = own(self.factors, self.ranks, path).on(path)
        if isinstance(factors, Tokens):  # none of the other axes is for it
            return Recipe(factors)
        return replace(self, factors=factors, ranks=None, policy=None)

    def for_steps(self, total_steps: int) -> "Recipe":
        """The recipe for a run of that many steps, with the settings that depend on the length filled in.

        Raises UserError if the run is so short that the method would be another one.
        """
        return self if self.factors is None else replace(self, factors=self.factors.for_steps(total_steps))

    def notes(self, total_steps: int) -> list[str]:
        """What a user should know before a run of that many steps; call it on the result of `for_steps`."""
        return [] if self.factors is None else self.factors.notes(total_steps)

    def count(self, out_features: int, in_features: int) -> int:
        """Number of values of one adapted layer that learn, in closed form."""
        sizes = {"m": out_features} | ({} if self.factors is None else self.factors.sizes(out_features, in_features))
        return sum(sizes[role] for role in self.learn)


# name -> recipe, equation; adding a method means a file in methods/ and a row here
NAMED: dict[str, tuple[Recipe, str]] = {
    "lora": (Recipe(), "W x + b + (alpha/r) B A x"),
    "rslora": (Recipe(factors=LoRA(stabilized=True)), "W x + b + (alpha/sqrt(r)) B A x"),
    "dora": (Recipe(gain=True), "m / norm(W + s B A) * (W x + s B A x) + b"),
    "vera": (Recipe(factors=VeRA(), lr=3e-2), "W x + b + diag(b) B diag(d) A x"),
    "lora-fa": (Recipe(train=("B",), lr=3e-3), "W x + b + s B A x, A frozen"),
    "lora-fa-precond": (Recipe(factors=PreconditionedLoRA(), lr=3e-3), "lora-fa, g_B <- g_B (A A^T)^-1 / s^2"),
    "lora+": (Recipe(lr=1.5e-4, lr_ratio=16.0), "W x + b + s B A x, B learns 16 times faster"),
    "dylora": (Recipe(factors=DyLoRA()), "W x + b + (alpha/k) B[:, :k] A[:k] x, k drawn each step"),
    "frozen-dylora": (Recipe(factors=DyLoRA(frozen=True), lr=3e-3), "dylora, only row and column k learn"),
    "delta-lora": (Recipe(factors=DeltaLoRA(), lr=3e-4), "W x + b + s B A x + follow s (B A - B0 A0) x"),
    "adalora": (Recipe(factors=AdaLoRA(), lr=6e-3), "W x + b + s B diag(E) A x, a falling budget closes gates E"),
    "pissa": (Recipe(start="pissa", lr=3e-4), "W x + b + s (B A - B0 A0) x, s B0 A0 the best rank-r part of W"),
    "olora": (Recipe(start="olora", lr=2e-4), "W x + b + s (B A - B0 A0) x, B0 A0 the first r of W = Q R"),
    "loftq": (Recipe(store="nf4", start="loftq"), "Q x + b + s B A x, W kept as Q in 4 bit, s B A starts near W - Q"),
    "eva": (Recipe(start="eva", lr=3e-4), "W x + b + s B A x, A starts at what the inputs span"),
    "lora-ga": (Recipe(start="lora-ga", lr=3e-4), "W x + b + s (B A - B0 A0) x, A0 and B0 from the gradient of W"),
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
    "loha": (Recipe(factors=LoHa()), "W x + b + s (B1 A1 * B2 A2) x, * by element"),
    "miss": (Recipe(factors=MiSS()), "W x + b + D^T S x, S adds up every r-th input"),
    "ia3": (Recipe(factors=IA3(), lr=1e-2), "diag(l) W x + b, or W diag(l) x + b for layers that inputs names"),
    "oft": (Recipe(factors=OFT(), lr=1e-3), "W R^T x + b, R block-diagonal and orthogonal"),
    "lora-xs": (Recipe(factors=LoRAXS(), lr=1e-3), "W x + b + s B R A x, B A the best rank-r part of W, R learns"),
    "bitfit": (Recipe(factors=None, train=("bias",), lr=3e-3), "every bias learns"),
    "full": (Recipe(factors=None, train=("all",), lr=1e-4), "every tensor learns"),
    "head": (Recipe(factors=None, train=(), lr=3e-3), "only the classification head learns"),
}


# kind in files -> class
FACTORS = {r.factors.kind: type(r.factors) for r, _ in NAMED.values() if r.factors is not None}


PEFT_NAMES = {  # a field of PEFT's LoraConfig -> what it is called here, where the names are not alike
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
    "exclude_modules": "exclude", "modules_to_save": "head", "init_lora_weights": "start", "rank_pattern": "ranks",
    "use_rslora": "stabilized", "use_dora": "gain", "trainable_token_indices": "tokens",
}  # fmt: skip


def recipe(method: "str | Recipe", **settings: Any) -> Recipe:
    """The recipe of a named method, with settings changed by their own names: `recipe("lora", rank=4, dropout=0.1)`.

    A setting is a field of the recipe or of its factors. Raises UserError for an unknown name, setting or combination.
    """
    if isinstance(method, Recipe):
        base = method
    elif isinstance(method, str) and method in NAMED:
        base = NAMED[method][0]
    else:
        raise UserError(f"method {method!r:.60} is unknown{hint(str(method), NAMED)}: choose one of {', '.join(NAMED)}")
    settings = {key: schema.plain(value) for key, value in settings.items()}
    if isinstance(settings.get("train"), str):
        settings["train"] = (settings["train"],)
    of_recipe = {f.name for f in dataclasses.fields(Recipe)}
    given = settings.get("factors", base.factors)
    of_factors = {f.name for f in dataclasses.fields(given)} if isinstance(given, Factors) else set()
    if unknown := sorted(set(settings) - of_recipe - of_factors):
        known = sorted(of_recipe | of_factors)
        subject = f"method {method!r}" if isinstance(method, str) else "this recipe"
        here = {key: f" ({PEFT_NAMES[key]!r} here)" if key in PEFT_NAMES else hint(key, known) for key in unknown}
        some = ", ".join(f"{key!r}{said}" for key, said in here.items())
        raise UserError(f"{subject} has no setting {some}: it has {', '.join(known)}")
    inner = {key: value for key, value in settings.items() if key in of_factors}
    changed = replace(base, **{key: value for key, value in settings.items() if key in of_recipe})
    if inner and changed.factors is not None:
        changed = replace(changed, factors=replace(changed.factors, **inner))
    _check_types(changed)
    if base.store != changed.store and (plain := _without_store(base)):
        other = f"method={plain!r}" + (f" with store={changed.store!r}" if changed.store else "")
        raise UserError(f"method {method!r} means W kept in {base.store}, and another store is given: choose {other}")
    return check(changed)


def name_of(r: Recipe) -> str:
    """The name of the method that a recipe is, or comes nearest to, whatever its rank and rates."""
    free = {"lr", "dropout", "ranks", "factors", "rank", "alpha"}  # what every method may have in its own size

    def other(a: Any, b: Any) -> int:
        return sum(getattr(a, f.name) != getattr(b, f.name) for f in dataclasses.fields(a) if f.name not in free)

    def distance(name: str) -> tuple[bool, int]:
        row = NAMED[name][0]
        same = type(row.factors) is type(r.factors)
        return not same, other(r, row) + (other(r.factors, row.factors) if same and r.factors is not None else 0)

    return min(NAMED, key=distance)


def _without_store(r: Recipe) -> str | None:
    """The named method that a recipe is but for its store, which then is what its own name means."""
    plain = replace(r, store=None)
    return next((name for name, (row, _) in NAMED.items() if row == plain), None) if r.store is not None else None


def check(r: Recipe) -> Recipe:
    """The recipe itself. Raises one UserError with every problem, and with all fields of a wrong combination."""
    _check_types(r)
    problems = []
    if r.store is not None and r.store not in STORES:
        problems.append(f"store={r.store!r}: choose one of {', '.join(STORES)}")
    if not 0 <= r.dropout < 1:
        problems.append(f"dropout={r.dropout}: expected 0 <= dropout < 1")
    if not 0 < r.lr < math.inf or not 0 < r.lr_ratio < math.inf:
        problems.append(f"lr={r.lr}, lr_ratio={r.lr_ratio}: expected both above 0")
    shared = (r.policy in POLICIES and POLICIES[r.policy].shares) or any(
        layer.share and not layer.tokens for layer in getattr(r.ranks, "layers", {}).values()
    )
    problems += starts.problems(r.start, r.factors, r.store, shared)
    problems += policies.problems(r.policy, r.factors, r.gain, r.start, r.store)
    if r.learn_base and r.store:
        problems.append(f"train={r.learn_base!r} with store={r.store!r}: a stored weight is frozen")
    if r.factors is None and (r.dropout or r.learn or r.gain or r.store or r.lr_ratio != 1):
        given = f"dropout={r.dropout}, gain={r.gain}, store={r.store}, train={r.train}, lr_ratio={r.lr_ratio}"
        problems.append(f"factors=None with {given}: no layer is adapted")
    if r.factors is None and r.ranks:
        problems.append("factors=None with ranks: no layer is adapted")
    if r.exact_gain and not r.gain:
        problems.append(f"exact_gain={r.exact_gain} with gain={r.gain}: there is no norm")
    if r.factors is not None:
        problems += r.factors.problems()
        if r.gain and not r.factors.gains:
            problems.append(f"gain={r.gain} with {r.factors.kind}: it scales the rows of the weight itself")
        problems += _map_problems(r.factors, r)
        problems += _learn_problems(r.factors, r)
        if r.dropout and not r.factors.drops:
            problems.append(f"dropout={r.dropout} with {r.factors.kind}: its W follows B A, and sees no dropped x")
    if problems:
        raise UserError("; ".join(problems))
    return r


def _check_types(r: Recipe) -> None:
    """Raise UserError for settings that are not of the type that their field says."""
    wrong = []
    for holder in (r,) if r.factors is None else (r, r.factors):
        for key, expected in schema.fields_of(type(holder)).items():
            if key not in NO_SETTINGS:
                wrong += schema.argument_problems(getattr(holder, key), expected, key)
    if wrong:
        raise UserError("; ".join(wrong))


def _learn_problems(factors: Factors, r: Recipe) -> list[str]:
    """Why the roles that a recipe trains cannot be trained, or would never change."""
    name, wrong = factors.kind, []
    if len(set(r.train or ())) < len(r.train or ()):
        wrong.append(f"train={r.train}: name each role once")
    if not factors.problems():
        counted = factors.sizes(8, 8)  # the roles that can learn; no snapshot, counter or gates of a map
        known = [role for role in r.roles if role == "m" or role in counted]
        if unknown := sorted(set(r.learn) - set(known)):
            wrong.append(f"train={r.train} with {name}: its roles are {', '.join(known)}, not {', '.join(unknown)}")
        elif r.train is not None and not _moves(factors, r):
            wrong.append(
                f"train={r.train} with {name}: what is frozen is zero at the start, so none of these ever moves"
            )
    if r.lr_ratio != 1 and "B" not in r.learn:
        learned = ", ".join(r.learn) or "none"
        wrong.append(f"lr_ratio={r.lr_ratio} with {name}: no role B learns (those that do: {learned}); leave it at 1")
    return wrong


def _moves(factors: Factors, r: Recipe) -> bool:
    """Whether the roles that learn have a gradient at the start, tried on a square layer.

    True without a trial for a dense update, whose roles depend on the size of the layer.
    """
    if "m" in r.learn or r.start not in starts.STARTS or not starts.STARTS[r.start].zero or not factors.low_rank:
        return True
    if hasattr(factors, "rank"):
        factors = replace(factors, rank=min(factors.rank, SMALL))  # type: ignore[call-arg]  # the answer is the same
    n = SMALL
    # also where gradients are off (loading) or tensors have no values (an estimate of memory)
    with torch.enable_grad(), _disable_current_modes():
        p = factors.init(n, n, Generator().manual_seed(0))
        learned = [p[role].requires_grad_() for role in r.learn]
        p |= factors.local(factors.constants([(n, n)]), n, n)
        A, B = factors.lower(p)
        total = ((B @ A) * torch.randn(n, n, generator=Generator().manual_seed(1))).sum()
        return total.requires_grad and any(bool(grad.any()) for grad in torch.autograd.grad(total, learned))


def _map_problems(factors: Factors, r: Recipe) -> list[str]:
    """Why the recipe cannot have its rank map, such as a start that does not fit the rank of a layer."""
    ranks = r.ranks
    if r.policy in POLICIES and ranks is None and not factors.problems():
        ranks = example(POLICIES[r.policy].shares, getattr(factors, "rank", 1))
    if ranks is None:
        return []
    if wrong := rank_problems(factors, ranks):
        return wrong if r.ranks is not None else [f"policy={r.policy!r} makes {problem}" for problem in wrong]
    at_rank = {layer.rank: sized(factors, layer) for layer in ranks.adapted.values() if layer.tokens is None}
    wrong = [problem for f in at_rank.values() for problem in starts.problems(r.start, f, r.store)]
    if starts.added(r.start) and any(layer.gates for layer in ranks.adapted.values()):
        wrong.append(f"start={r.start!r} with gates: A0 and B0, which the start subtracts, have no gates")
    return wrong


def to_json(r: Recipe) -> dict[str, Any]:
    """The recipe as JSON has it, with the kind of its factors."""
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
