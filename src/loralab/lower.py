"""From the parameters of one adapter in one layer to its update: the axes meet here, and nowhere else.

Beside the roles of its factors a layer may hold m (a gain), gates (r,) on the rows of A, and A0, B0: what a start that
begins off zero must take away, so that the base keeps its own W and the adapter is portable.
"""

from typing import Any

import torch

from loralab.factors.base import Roles
from loralab.gain import gain
from loralab.recipe import Recipe
from loralab.update import Dense, Update


def lower(recipe: Recipe, p: Roles, base: Any, drawn: Any = None) -> Update | Dense:
    """The update of a layer with parameters `p` over `base`."""
    assert recipe.factors is not None
    u: Update | Dense
    if recipe.factors.low_rank:
        u = low_rank(recipe, p, drawn)
    else:
        u = Dense(recipe.factors.dense(p, base.out_features, base.in_features, drawn))
    return u._replace(gain=gain(p["m"], base, u, recipe.exact_gain)) if "m" in p else u


def low_rank(recipe: Recipe, p: Roles, drawn: Any) -> Update:
    assert recipe.factors is not None
    A, B = recipe.factors.lower(p, drawn)  # (..., r, in), (..., out, r)
    if "gates" in p:
        A = p["gates"].unsqueeze(-1) * A
    if "A0" in p:
        A, B = torch.cat([A, p["A0"]], -2), torch.cat([B, -p["B0"]], -1)
    return Update(A, B)
