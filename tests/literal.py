"""Every paper's equation and algorithm, written slowly: loops over rows and columns in float64, no code of the library.

`UPDATES` gives U (out, in) of y = g * (W x + U drop(x)) + b for each named method, from its parameters by role and, for
a method that sees it, W.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

DOUBLE = torch.float64


def tensor(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def product(B, A):
    """B A by its definition: three loops."""
    return torch.stack(
        [torch.stack([sum(b * A[k, j] for k, b in enumerate(row)) for j in range(A.shape[1])]) for row in B]
    )


def forward(x, W, b, U, m=None, exact=False, seen=None):
    """g_i (sum_j W_ij x_j + U_ij seen_j) + b_i with g_i = m_i / |W_i + U_i|, held constant unless `exact`.

    `seen` (..., in) is what dropout leaves of x for the update.
    """
    seen, columns = x if seen is None else seen, []
    for i in range(len(W)):
        y = sum(W[i, j] * x[..., j] + U[i, j] * seen[..., j] for j in range(W.shape[1]))
        if m is not None:
            norm = sum((W[i, j] + U[i, j]) ** 2 for j in range(W.shape[1])) ** 0.5
            y = m[i] / (norm if exact else norm.detach()) * y
        columns.append(y if b is None else y + b[i])
    return torch.stack(columns, -1)


# ---- updates: (parameters by role, settings of the method, what it drew) -> U (out, in) ---------------------------


def scale(f, rank):
    """alpha / r, or that of rsLoRA."""
    return f.alpha / (math.sqrt(rank) if f.stabilized else rank)


def lora(p, f, drawn=None):
    return scale(f, f.rank) * product(p["B"], p["A"])


def rslora(p, f, drawn=None):
    return f.alpha / math.sqrt(f.rank) * product(p["B"], p["A"])


def miss(p, f, drawn=None):
    """U_ij = D_(j mod r)i: every block of r columns is D^T."""
    columns = p["S"].shape[1]
    return torch.stack([torch.stack([p["D"][j % f.rank, i] for j in range(columns)]) for i in range(p["D"].shape[1])])


def ia3(p, f, drawn=None):
    """diag(l) W - W."""
    return product(torch.diag(p["l"]), p["W"]) - p["W"]


def ia3_of_inputs(p, f, drawn=None):
    """W diag(l) - W."""
    return product(p["W"], torch.diag(p["l"])) - p["W"]


def rotation(values, k, terms):
    """R = (I + Q)(I - Q)^-1, or so many terms of its series, Q from its numbers above the diagonal."""
    Q, place = torch.zeros(k, k, dtype=DOUBLE), iter(values)
    for i in range(k):
        for j in range(i + 1, k):
            Q[i, j] = next(place)
            Q[j, i] = -Q[i, j]
    eye = torch.eye(k, dtype=DOUBLE)
    if not terms:
        return (eye + Q) @ torch.linalg.inv(eye - Q)
    powers = [torch.linalg.matrix_power(Q, n) for n in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def oft(p, f, drawn=None):
    """W R^T - W, R with a rotation of its own for each block, or one for all."""
    W, Q = p["W"], p["Q"]
    k = round((1 + math.sqrt(1 + 8 * Q.shape[1])) / 2)
    turns = [rotation(values, k, f.terms) for values in (Q if len(Q) > 1 else [Q[0]] * (W.shape[1] // k))]
    return product(W, torch.block_diag(*turns).T) - W


def lora_xs(p, f, drawn=None):
    return scale(f, f.rank) * product(p["B"], product(p["R"], p["A"]))


def vera(p, f, drawn=None):
    """diag(b) B diag(d) A."""
    return product(torch.diag(p["b"]), product(p["B"], product(torch.diag(p["d"]), p["A"])))


def dylora(p, f, drawn=None):
    rank = drawn or f.rank
    return scale(f, rank) * product(p["B"][:, :rank], p["A"][:rank])


def frozen_dylora(p, f, drawn=None):
    """All of the first `drawn` terms act, the last of them learns."""
    if drawn is None:
        return dylora(p, f)
    terms = [torch.outer(p["B"][:, k], p["A"][k]) for k in range(drawn)]
    return scale(f, drawn) * sum([*(t.detach() for t in terms[:-1]), terms[-1]])


def delta_lora(p, f, drawn=None):
    """W has followed B A since the snapshot; it is a constant to autograd."""
    followed = product(p["B"], p["A"]) - product(p["Bk"], p["Ak"])
    return lora(p, f) + f.follow * scale(f, f.rank) * followed.detach()


def adalora(p, f, drawn=None):
    """P Lambda Q; the divisor is that of the authors' code."""
    return (
        f.alpha
        / ((math.sqrt(f.rank) if f.stabilized else f.rank) + 1e-5)
        * product(p["B"], product(torch.diag(p["E"]), p["A"]))
    )


def moved(p, f, drawn=None):
    """PiSSA and OLoRA over their own residual: (W - B0 A0) x + s B A x."""
    return lora(p, f) - product(p["B0"], p["A0"])


def gated(p, f, drawn=None):
    """The update of a layer with gates on the rows of A (a rank map, ALoRA)."""
    return scale(f, f.rank) * product(p["B"], product(torch.diag(p["gates"]), p["A"]))


def tucker(C, modes):
    """T[i_1, ...] = sum over r_1, ... of C[r_1, ...] A_1[i_1, r_1] ...; without C the r are all the same."""
    entries = []
    for index in itertools.product(*(range(len(A)) for A in modes)):
        ranks = itertools.product(*(range(A.shape[1]) for A in modes))
        ranks = [r for r in ranks if C is not None or len(set(r)) == 1]
        entries.append(
            sum(
                (1 if C is None else C[r]) * math.prod(A[i, k] for A, i, k in zip(modes, index, r, strict=True))
                for r in ranks
            )
        )
    return torch.stack(entries).reshape([len(A) for A in modes])


def projection(seed, n, count):
    """F (count, n) as a matrix: places in the order of Philox's words hold v, -v, v, -v, ..."""
    words = np.random.Philox(key=seed).random_raw(count).tolist()
    matrix = torch.zeros(count, n, dtype=DOUBLE)
    for place, turn in enumerate(sorted(range(count), key=words.__getitem__)):
        matrix[place, turn % n] = (-1) ** (turn // n)
    return matrix


def fastfood(seed, n, count):
    """F (count, n) as a matrix: (d / n)^0.5 H G P H S of each block, one below the other, all drawn from one stream."""
    d = 2 ** math.ceil(math.log2(n))
    blocks = math.ceil(count / d)
    words = iter(np.random.Philox(key=seed).random_raw(5 * blocks * d).tolist())
    signs = [[1.0 if next(words) >= 2**63 else -1.0 for _ in range(d)] for _ in range(blocks)]
    keys = [[next(words) for _ in range(d)] for _ in range(blocks)]
    H = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=DOUBLE) / d**0.5
    rows = []
    for sign, key in zip(signs, keys, strict=True):
        normal = []
        for _ in range(d):  # twelve numbers of 16 bits, less their mean
            three = [next(words) for _ in range(3)]
            parts = [word // 65536**place % 65536 for word in three for place in range(4)]
            normal.append(sum(part - 32767.5 for part in parts) / 65536)
        P = torch.zeros(d, d, dtype=DOUBLE)
        for i, j in enumerate(sorted(range(d), key=key.__getitem__)):
            P[i, j] = 1
        G, S = (torch.diag(torch.tensor(values, dtype=DOUBLE)) for values in (normal, sign))
        rows.append((d / n) ** 0.5 * H @ G @ P @ H @ S[:, :n])
    return torch.cat(rows)[:count]


def superlora(p, f, matrices, size):
    """F(T_1 kron T_2 ...) for a layer of `size`; `matrices` are the (o_k, i_k), worked out by hand.

    Of a layer of several groups each part of the rows is made so.
    """
    if f.groups > 1:
        count, one = len(next(iter(p.values()))), replace(f, groups=1)
        part = size[0] // count, size[1]
        own = [{role: t[g] for role, t in p.items() if role[0] in "AC"} for g in range(count)]
        return torch.cat([superlora(q, one, matrices, part) for q in own])
    D = torch.ones(1, 1, dtype=DOUBLE)
    for k, matrix in enumerate(matrices, 1):
        modes = [p[f"A{k}{m}"] for m in range(1, f.order + 1) if f"A{k}{m}" in p]
        D = torch.kron(D, tucker(p.get(f"C{k}"), modes).reshape(matrix) if modes else p[f"C{k}"])
    if f.ratio < 1:
        spread = {"shuffle": projection, "fastfood": fastfood}[f.projection]
        D = (spread(f.projection_seed, D.numel(), math.prod(size)) @ D.flatten()).reshape(size)
    return scale(f, f.rank) * D


WIDE = (12, 10)  # a size that splits, for SuperLoRA
HAND = {  # its named rows at rank 1 on that size
    "lokr": [(3, 2), (4, 5)],
    "lonkr": [(2, 1), (2, 2), (3, 5)],
    "lorta": [(12, 10)],
    "superlora": [(6, 5)],
}
UPDATES = {
    **dict.fromkeys(
        ("lora", "dora", "lora-fa", "lora-fa-precond", "lora+", "loftq", "eva", "qlora", "qdora", "alora"), lora
    ),
    "rslora": rslora,
    "vera": vera,
    "loha": lambda p, f, drawn=None: scale(f, f.rank) * (product(p["B1"], p["A1"]) * product(p["B2"], p["A2"])),
    "miss": miss,
    "ia3": ia3,
    "oft": oft,
    "lora-xs": lora_xs,
    "dylora": dylora,
    "frozen-dylora": frozen_dylora,
    "delta-lora": delta_lora,
    "adalora": adalora,
    "lora-ga": moved,
    "pissa": moved,
    "olora": moved,
    "lora-drop": gated,
    **{name: lambda p, f, drawn=None, hand=hand: superlora(p, f, hand, WIDE) for name, hand in HAND.items()},
}


# ---- starts ----------------------------------------------------------------------------------------------------------


def best_part(M, rank):
    """The best rank-r part of M: M times the projector on the eigenvectors of M^T M with the largest values."""
    _, V = torch.linalg.eigh(M.double().T @ M.double())
    top = V[:, -rank:]
    return M.double() @ top @ top.T


def gram_schmidt(W, rank):
    """(A, B) of OLoRA up to signs: B from the first columns of W, A what they take of W."""
    Q = []
    for column in W.double().T[:rank]:
        rest = column - sum((q @ column) * q for q in Q)
        Q.append(rest / rest.norm())
    return torch.stack([q @ W.double() for q in Q]), torch.stack(Q, 1)
