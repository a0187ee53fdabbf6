"""The normal form against dense products and Python loops, in float64."""

import pytest
import torch
from archs import build, rows
from torch.nn import functional as F

import loralab
from loralab.stores.float import Float
from loralab.update import Update, apply, merged, nothing, stack, take

N_OUT, N_IN, ROWS, TOKENS = 13, 11, 5, 7


def make(rank: int, gain: bool, seed: int) -> Update:
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((rank, N_IN), (N_OUT, rank)))
    return Update(A, B, 1 + 0.3 * torch.randn(N_OUT, generator=g, dtype=torch.float64) if gain else None)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def base(request):
    g = torch.Generator().manual_seed(9)
    W = torch.nn.Parameter(torch.randn(N_OUT, N_IN, generator=g, dtype=torch.float64), requires_grad=False)
    return Float(W, torch.randn(N_OUT, generator=g, dtype=torch.float64) if request.param else None)


def oracle(x, base, u):
    W = base.weight + u.B @ u.A
    if u.gain is not None:
        W = torch.diag(u.gain) @ W
    y = torch.stack([W @ row for row in x.reshape(-1, N_IN)]).reshape(*x.shape[:-1], N_OUT)
    return y if base.bias is None else y + base.bias


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, TOKENS), (ROWS,), ()])
def test_apply_and_merged_are_the_dense_product(base, gain, shape):
    x, u = torch.randn(*shape, N_IN, dtype=torch.float64), make(3, gain, 1)
    torch.testing.assert_close(apply(x, base, u) if shape else apply(x[None], base, u)[0], oracle(x, base, u))
    torch.testing.assert_close(F.linear(x, merged(base.weight, u), base.bias), oracle(x, base, u))


def test_gain_of_one_and_zero_update_change_no_bit(base):
    x = torch.randn(ROWS, TOKENS, N_IN, dtype=torch.float64)
    u = nothing(N_OUT, N_IN, x)._replace(gain=torch.ones(N_OUT, dtype=torch.float64))
    assert torch.equal(apply(x, base, u), base(x))


def test_a_small_change_of_a_gain_is_seen_in_a_bfloat16_model():
    """A gain was rounded to bfloat16, which knows no number between 1 and 1.0078, so such a change did nothing."""
    model = build("bert").bfloat16()
    adapters = loralab.attach(model, "dora", rank=3)
    before, after = [], []
    for seen in (before, after):
        seen += model(**rows(), output_hidden_states=True).hidden_states
        with torch.no_grad():
            for role, m in adapters.tensors().values():
                assert m.dtype == torch.float32
                if role == "m":
                    m.mul_(1.001)
    same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert same == [True] + [False] * (len(same) - 1)  # the first are the embeddings


def test_a_row_of_a_stacked_update_is_the_row_alone(base):
    x, ids = torch.randn(ROWS, TOKENS, N_IN, dtype=torch.float64), torch.tensor([2, 0, 1, 2, 2])
    updates = [make(3, True, 1), make(5, False, 2), make(1, True, 3)]
    mixed = apply(x, base, take(stack(updates), ids))
    for row, i in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed[row], apply(x[row : row + 1], base, updates[i])[0])


def test_dropout_is_on_the_adapter_branch_alone(base):
    x, u = torch.randn(ROWS, TOKENS, N_IN, dtype=torch.float64), make(3, True, 1)
    assert torch.allclose(
        apply(x, base, u, drop=torch.zeros_like), oracle(x, base, u._replace(B=torch.zeros_like(u.B)))
    )
