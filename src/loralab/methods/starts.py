"""The starting values of A (r, in) and B (out, r); later steps are the method's own. s is the scaling of the method.

kaiming      the method's own: A uniform in +-1/sqrt(in), B = 0             (Hu et al., 2021)
gaussian     A normal with deviation 1/r, B = 0
orthogonal   A and B random with orthogonal rows and columns in between, so that B A = 0 and neither is zero
pissa        s B A is the best rank-r part of W: B = U sqrt(S/s), A = sqrt(S/s) V^T      (Meng et al., 2024)
pissa-fast   the same from a randomised SVD                                  (Halko et al., 2011)
olora        B = Q[:, :r], A = R[:r] of W = Q R                              (Buyukakyuz, 2024)
loftq        s B A is the best rank-r part of W - Q, the error of a stored weight Q; one round  (Li et al., 2024)
eva          A is the top right singular vectors of the layer's inputs, B = 0  (Paischer et al., 2024)
lora-ga      A is the first r right, B the next r left singular vectors of the gradient of W, both times out^(1/4) / 4
             (Wang et al., 2024)

pissa, olora and lora-ga start with s B A not zero. The base keeps its W all the same: a layer holds A0 = A and
B0 = s B as they were at the start, and the update is s B A - B0 A0. So the start changes nothing (to rounding) and the
adapter fits the original model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from loralab.methods.base import Factors
from loralab.methods.lora import LoRA
from loralab.methods.precond import PreconditionedLoRA

FROZEN = ("A0", "B0")  # roles that a start with s B A not zero adds; they never learn
WHOLE = (LoRA, PreconditionedLoRA)  # methods whose update is all of s B A from the first step on
FLOATS = (None, "float32", "bfloat16")  # stores that round nothing, or next to nothing, away
GAMMA = 16.0  # of lora-ga: its A and B have the size (out ** 0.5 / GAMMA) ** 0.5, as in the paper and its code


class InputDirections(NamedTuple):
    """Right singular vectors of a layer's inputs, and the share of the inputs' squares that each explains."""

    directions: Tensor  # (rank, in), rows of length 1, the largest entry of each above zero
    shares: Tensor  # (in,) falling, sum 1


class LayerInfo(NamedTuple):
    """What a start may use of one layer."""

    W: Tensor | None  # (out, in) before the store rounded it, if that is still there
    kept: Tensor  # (out, in) as the base keeps it
    rank: int
    scaling: float
    generator: Generator
    seen: InputDirections | Tensor | None  # what the start looked at: a gradient is (out, in)


@dataclass(frozen=True)
class Start:
    make: Callable[[LayerInfo], tuple[Tensor, Tensor]] | None  # -> (A (r, in), B (out, r)); None: the method's own
    zero: bool = True  # B = 0
    subtracted: bool = False  # s B A is not zero, and A0, B0 take it away
    per_layer: bool = False  # made from the layer's weight or inputs, so layers cannot share A and B
    sees: Literal["inputs", "gradients"] | None = None  # what of a layer it looks at, on batches of data
    revision: int = 1  # raised when it computes something else; addresses of runs carry it above 1


def gaussian(g: LayerInfo) -> tuple[Tensor, Tensor]:
    out_features, in_features = g.kept.shape
    A = torch.empty(g.rank, in_features).normal_(0, 1 / g.rank, generator=g.generator)
    return A, torch.zeros(out_features, g.rank)


def orthogonal(g: LayerInfo) -> tuple[Tensor, Tensor]:
    """Even and odd rows of one orthogonal matrix: A = (X odd)^T / 10, B = X' even / 10, and odd even^T = 0."""
    out_features, in_features = g.kept.shape
    Q = torch.linalg.qr(torch.randn(g.rank, g.rank, generator=g.generator)).Q  # (r, r)
    X = torch.randn(in_features, g.rank // 2, generator=g.generator)  # (in, r/2)
    Y = torch.randn(out_features, g.rank // 2, generator=g.generator)  # (out, r/2)
    return (X @ Q[0::2]).T / 10, Y @ Q[1::2] / 10


def pissa(g: LayerInfo) -> tuple[Tensor, Tensor]:
    return _best(_wide(g.kept), g)


def pissa_fast(g: LayerInfo, more: int = 10, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """Subspace iteration with `more` extra directions; every round shrinks the error by (S[r + more] / S[r])^2."""
    M = _wide(g.kept)
    Q = torch.linalg.qr(M @ torch.randn(M.shape[1], g.rank + more, generator=g.generator)).Q  # (out, r + more)
    for _ in range(rounds):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    return _halves(Q @ U, S, Vh, g)


def olora(g: LayerInfo) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(_wide(g.kept))
    return R[: g.rank], Q[:, : g.rank]  # (r, in), (out, r)


def loftq(g: LayerInfo) -> tuple[Tensor, Tensor]:
    assert g.W is not None
    return _best(_wide(g.W) - _wide(g.kept), g)


def eva(g: LayerInfo) -> tuple[Tensor, Tensor]:
    assert isinstance(g.seen, InputDirections)
    return g.seen.directions[: g.rank], torch.zeros(g.kept.shape[0], g.rank)


def lora_ga(g: LayerInfo) -> tuple[Tensor, Tensor]:
    """The signs are such that the largest entry of each right vector is above zero."""
    assert isinstance(g.seen, Tensor)
    U, _, Vh = torch.linalg.svd(_wide(g.seen), full_matrices=False)
    sign = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # (k, 1)
    size = math.sqrt(math.sqrt(len(U)) / GAMMA)
    return size * (Vh * sign)[: g.rank], size * (U * sign.mT)[:, g.rank : 2 * g.rank]  # (r, in), (out, r)


# revision 1 of lora-ga: a run that shared a model with others took the gradients with the head of the first of them
STARTS: dict[str, Start] = {
    "kaiming": Start(None),
    "gaussian": Start(gaussian),
    "orthogonal": Start(orthogonal, zero=False),
    "pissa": Start(pissa, zero=False, subtracted=True, per_layer=True),
    "pissa-fast": Start(pissa_fast, zero=False, subtracted=True, per_layer=True),
    "olora": Start(olora, zero=False, subtracted=True, per_layer=True),
    "loftq": Start(loftq, zero=False, per_layer=True),
    "eva": Start(eva, per_layer=True, sees="inputs"),
    "lora-ga": Start(lora_ga, zero=False, subtracted=True, per_layer=True, sees="gradients", revision=2),
}


def _wide(M: Tensor) -> Tensor:
    """M in float32 on the CPU, so that every device gets the same start."""
    return M.detach().to("cpu", torch.float32)


def _best(M: Tensor, g: LayerInfo) -> tuple[Tensor, Tensor]:
    """(A, B) with s B A the best rank-r part of M (out, in)."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return _halves(U, S, Vh, g)


def _halves(U: Tensor, S: Tensor, Vh: Tensor, g: LayerInfo) -> tuple[Tensor, Tensor]:
    """(A, B) with s B A = U_r S_r V_r^T."""
    root = (S[: g.rank] / g.scaling).sqrt()
    return root[:, None] * Vh[: g.rank], U[:, : g.rank] * root


def added(start: str) -> tuple[str, ...]:
    """The roles that a start adds to those of the method."""
    return FROZEN if start in STARTS and STARTS[start].subtracted else ()


def looks_at(start: str) -> str | None:
    """What of a layer a start looks at, on batches of data: its inputs, its gradients, or nothing."""
    return STARTS[start].sees if start in STARTS else None


def revision(start: str) -> int:
    """The revision of a start, 1 for one that computes what it always did."""
    return STARTS[start].revision if start in STARTS else 1


def looks_at_layer(start: str) -> bool:
    """Whether a start is made from the layer's weight or inputs, so that equal layers may start differently."""
    return start in STARTS and STARTS[start].per_layer


def problems(start: str, factors: Factors | None, store: str | None, shared: bool = False) -> list[str]:
    """Why a recipe cannot start this way, one phrase each."""
    if start not in STARTS:
        return [f"start={start!r}: choose one of {', '.join(STARTS)}"]
    if STARTS[start].make is None:
        return []
    if factors is None:
        return [f"start={start!r} with factors=None: no layer is adapted"]
    name = factors.kind
    if not {"A", "B"} <= set(factors.roles):
        return [f"start={start!r} with {name}: it has no A and B of its own, its roles are {', '.join(factors.roles)}"]
    wrong = []
    if not STARTS[start].zero and type(factors) not in WHOLE:
        able = ", ".join(kind.kind for kind in WHOLE)
        wrong.append(f"start={start!r} with {name}: a B that is not zero at the start goes with {able} only")
    if STARTS[start].zero and "E" in factors.roles:
        wrong.append(f"start={start!r} with {name}: B and its gates E would both be zero and never move")
    if STARTS[start].zero and not factors.problems() and _own_B(factors).any():
        wrong.append(f"start={start!r} with {name}: its own B is not zero at the start, and at zero it would not learn")
    if start == "orthogonal" and getattr(factors, "rank", 0) % 2:
        wrong.append(f"start={start!r} with rank={factors.rank}: expected an even rank")  # type: ignore[attr-defined]
    if start == "loftq" and store in FLOATS:
        wrong.append(f"start={start!r} with store={store!r}: it makes up for what a store of few bits rounds away")
    if shared and STARTS[start].per_layer:
        wrong.append(
            f"start={start!r} with layers that share A and B: it is made from each layer's own weight or inputs"
        )
    if shared and type(factors).placed is not Factors.placed:
        wrong.append(f"start={start!r} with {name} of layers in a share: they form one group, which starts its own way")
    return wrong


def _own_B(factors: Any) -> Tensor:
    """B (n, n) as the method itself starts it, on a small layer of n x n: it is zero there or at no size."""
    n = min(factors.rank, 8)
    B: Tensor = replace(factors, rank=n).init(n, n, Generator())["B"]
    return B


def blank(start: str, factors: Any, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
    """Role -> tensor of a fresh layer before `begin` sets some of them; a loaded file fills them instead."""
    p: dict[str, Tensor] = factors.init(out_features, in_features, generator)
    return p | ({"A0": p["A"].clone(), "B0": torch.zeros_like(p["B"])} if added(start) else {})


def begin(
    start: str,
    factors: Any,
    W: Tensor | None,
    base: Any,
    generator: Generator,
    seen: InputDirections | Tensor | None = None,
) -> dict[str, Tensor]:
    """Role -> tensor for the roles that `start` sets in one layer.

    `W` is the weight before it was stored, if it is still known. `generator` is left as it was, so that the head drawn
    later does not depend on the start.
    """
    made = STARTS[start]
    if made.make is None:
        return {}
    own = Generator().manual_seed(int(torch.randint(2**62, (), generator=generator.clone_state())))
    A, B = (t.contiguous() for t in made.make(LayerInfo(W, base.dense(), factors.rank, factors.scaling, own, seen)))
    return {"A": A, "B": B} | ({"A0": A.clone(), "B0": factors.scaling * B} if made.subtracted else {})
