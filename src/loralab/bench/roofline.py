"""The roofline of a step: how fast this machine computes each product that the step needs, and what that adds up to.

Each product is taken by itself, its operands in the cache as far as they fit, its result written into a tensor that is
there. So the sum is a floor for a step that computes products of these shapes one after the other. A step that joins
some, as the fast path joins q, k and v, may come nearer to it than another that does not, or fall below.

Beside it, on a CPU, stands the same product with its right operand packed once by oneDNN, which is what frozen weights
could have: if it is faster, packing pays.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from loralab.bench.backends import BACKENDS, adapted, batch, device, stepper
from loralab.bench.cases import Case
from loralab.bench.flops import Product, step_products

TURNS, STEPS, TRIES = 5, 4, 5  # turns of steps and products; steps of a turn; times that a product is taken in one


def measure(case: Case) -> dict[str, Any]:
    """Seconds of a step of loralab, those of each product that it needs, and their sum; medians over turns."""
    adapters = adapted(case)
    counts = step_products(adapters, batch(case, adapters.model.config)[0])
    del adapters
    built = BACKENDS["loralab"](case)
    step = stepper(built, *batch(case, built.model.config))
    step()
    steps: list[float] = []
    times: dict[Product, list[float]] = {product: [] for product in counts}
    packed: dict[Product, list[float]] = {product: [] for product in counts if can_pack(product)}
    for _ in range(TURNS):
        steps.append(median(seconds_of(step) for _ in range(STEPS)))
        for product in counts:
            times[product].append(seconds(product, case.precision))
            if product in packed:
                packed[product].append(seconds(product, case.precision, pack=True))
    rows = [
        {**product._asdict(), "count": count, "operations": product.operations, "seconds": median(times[product])}
        | ({"packed": median(packed[product])} if product in packed else {})
        for product, count in counts.items()
    ]
    rows.sort(key=lambda row: -row["count"] * row["seconds"])
    return {
        "seconds": median(steps),
        "floor": sum(row["count"] * row["seconds"] for row in rows),
        "operations": sum(row["count"] * row["operations"] for row in rows),
        "products": rows,
    }


def can_pack(product: Product) -> bool:
    """Whether oneDNN packs the right operand of this product: one matrix, on a CPU."""
    return product.batch == 1 and device().type == "cpu" and torch.backends.mkldnn.is_available()


def seconds(product: Product, dtype: torch.dtype, pack: bool = False) -> float:
    """Seconds of one product, the median of a few after one that is not counted."""
    a, b, out = operands(product, dtype)
    ops = torch.ops.mkldnn
    W = ops._reorder_linear_weight(b[0].mT.contiguous(), product.n) if pack else None  # of (m, k)

    def take() -> Any:
        if pack:
            return ops._linear_pointwise(a[0], W, None, "none", [], "")  # (n, m), allocated anew
        return torch.bmm(a, b, out=out)  # (batch, n, m)

    take()
    return median(seconds_of(take) for _ in range(TRIES))


def operands(product: Product, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (batch, n, k), B (batch, k, m), each in memory as `form` says, and the result (batch, n, m)."""
    count, n, k, m, form = product
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int, turned: str) -> torch.Tensor:
        shape = (count, columns, rows) if turned == "t" else (count, rows, columns)
        made = torch.randn(shape, generator=generator).to(device(), dtype)
        return made.mT if turned == "t" else made

    a, b = drawn(n, k, form[0]), drawn(k, m, form[1])
    return a, b, torch.empty(count, n, m, dtype=dtype, device=device())


def seconds_of(take: Callable[[], object]) -> float:
    """Seconds that a call takes, on a GPU until it is done there."""
    started = time.perf_counter()
    take()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
