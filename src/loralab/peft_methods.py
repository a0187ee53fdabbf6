"""The methods of PEFT that are read, and how each is one of loralab's: names of tensors, settings, values.

A method of PEFT is a row of METHODS. What is a low-rank product is written as a LoRA; a row of OWN writes a method that
is none as PEFT has it. This file knows no folders and no model.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods.base import Factors
from loralab.methods.ia3 import IA3
from loralab.methods.loha import LoHa
from loralab.methods.lora import LoRA
from loralab.methods.miss import MiSS
from loralab.methods.oft import OFT
from loralab.methods.vera import VeRA
from loralab.update import Update

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]  # path.role -> tensor


class PeftMethod(NamedTuple):
    """One method of PEFT."""

    needed: frozenset[str]  # settings that a config of it must have
    roles: Mapping[str, str]  # PEFT's name of a tensor in a layer -> role
    factors: Callable[[Config, Sequence[str], Tensors], Factors]  # also makes the tensors those of loralab, in place
    unbiased: Callable[[Any, Sequence[str]], list[str]] = lambda factors, paths: []  # layers that must have no bias


# ---- reading ---------------------------------------------------------------------------------------------------------


def _lora(c: Config, paths: Sequence[str], tensors: Tensors) -> Factors:
    return LoRA(rank=c["r"], alpha=float(c["lora_alpha"]), stabilized=bool(c.get("use_rslora")))


def _vera(c: Config, paths: Sequence[str], tensors: Tensors) -> Factors:
    return VeRA(rank=c["r"], projection_seed=c["projection_prng_key"], source="peft")


def _loha(c: Config, paths: Sequence[str], tensors: Tensors) -> Factors:
    return LoHa(rank=c["r"], alpha=float(c["alpha"]))


def _miss(c: Config, paths: Sequence[str], tensors: Tensors) -> Factors:
    if isinstance(kind := c.get("init_weights"), str):
        raise UserError(f"init_weights={kind!r} is another function than MiSS; through_peft=True has PEFT convert it")
    return MiSS(rank=c["r"])


def _ia3(c: Config, paths: Sequence[str], tensors: Tensors) -> Factors:
    """l is (1, in) where inputs are scaled and (out, 1) where outputs are."""
    inputs = []
    for path in paths:
        l = tensors[f"{path}.l"]  # noqa: E741  (as the paper calls it)
        if l.ndim != 2 or 1 not in l.shape:
            raise UserError(f"{path}.l is {tuple(l.shape)}: expected the factors of a linear layer, one side 1")
        inputs += [path] if len(l) == 1 else []
        tensors[f"{path}.l"] = l.flatten()
    return IA3(inputs=tuple(inputs))


def outputs_scaled(factors: Any, paths: Sequence[str]) -> list[str]:
    """The layers of IA3 whose outputs are scaled: PEFT scales a bias with them, and loralab does not."""
    return [path for path in paths if factors.on(path) is factors]


def _oft(c: Config, paths: Sequence[str], tensors: Tensors) -> Factors:
    """PEFT's exact rotation is (I - Q)(I + Q)^-1, that of -Q; its series is of (I + Q)(I - Q)^-1 as here."""
    series = c.get("use_cayley_neumann") is not False
    terms = c.get("num_cayley_neumann_terms") or 5
    if series and terms < 3:
        raise UserError(f"num_cayley_neumann_terms={terms}: expected 3 or more")
    if series and not _at_least(c.get("peft_version"), (0, 18)):
        raise UserError("use_cayley_neumann=True of PEFT before 0.18: its series was another one; merge it there")
    for path in () if series else paths:
        tensors[f"{path}.Q"] = -tensors[f"{path}.Q"]
    sides = {path: side_of(tensors[f"{path}.Q"].shape[-1]) for path in paths}
    if c.get("r") and len(set(sides.values())) > 1:
        raise UserError(f"r={c['r']} gives blocks of different sides, {sorted(set(sides.values()))}: not read here")
    block = next(iter(sides.values()), 2) if c.get("r") else c["oft_block_size"]
    return OFT(block=block, one_block=bool(c.get("block_share")), terms=max(4, terms) if series else 0)


def _at_least(version: str | None, least: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return found is not None and tuple(map(int, found.groups())) >= least


def side_of(values: int) -> int:
    """The side k of a skew-symmetric matrix with that many numbers above its diagonal, k (k - 1) / 2."""
    return (1 + math.isqrt(1 + 8 * values)) // 2


def as_lora(c: Config, paths: Sequence[str], tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """(the config as that of a LoRA of scaling 1, the layers that have any rank left) of PEFT's AdaLoRA.

    Its layers compute alpha / (init_r + 1e-5) B (E * A), E (r, 1), at the rank r that is left of init_r.
    """
    ranks: dict[str, int] = {}
    scaling = (float(c["lora_alpha"]) if c["lora_alpha"] > 0 else c["init_r"]) / (c["init_r"] + 1e-5)
    for path in paths:
        A, B, E = (tensors.pop(f"{path}.{role}", None) for role in "ABE")
        if (
            A is None
            or B is None
            or E is None
            or not (A.ndim == B.ndim == 2 and E.shape == (len(A), 1) == (B.shape[1], 1))
        ):
            raise UserError(f"{path}: expected lora_A (r, in), lora_B (out, r) and lora_E (r, 1)")
        if not (rank := len(A)):
            continue
        ranks[path] = rank
        tensors[f"{path}.A"], tensors[f"{path}.B"] = E * A, scaling * B
    most = max(ranks.values(), default=1)
    own = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    patterns = {"rank_pattern": own, "alpha_pattern": own, "use_rslora": False, "use_dora": False}
    return {**c, "peft_type": "LORA", "r": most, "lora_alpha": most, **patterns}, list(ranks)


LORA_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
}
METHODS: dict[str, PeftMethod] = {  # peft_type -> its method
    "LORA": PeftMethod(frozenset({"r", "lora_alpha"}), LORA_ROLES, _lora),
    "LOHA": PeftMethod(
        frozenset({"r", "alpha"}), {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}, _loha
    ),
    "MISS": PeftMethod(frozenset({"r"}), {"miss_block": "D"}, _miss),
    "VERA": PeftMethod(frozenset({"r", "projection_prng_key"}), {"vera_lambda_d": "d", "vera_lambda_b": "b"}, _vera),
    "IA3": PeftMethod(frozenset(), {"ia3_l": "l"}, _ia3, outputs_scaled),
    "OFT": PeftMethod(frozenset({"oft_block_size"}), {"oft_R.weight": "Q"}, _oft),
    "ADALORA": PeftMethod(frozenset({"init_r", "lora_alpha"}), {"lora_A": "A", "lora_B": "B", "lora_E": "E"}, _lora),
}
ROLES = {name: role for method in METHODS.values() for name, role in method.roles.items()}
PROJECTION = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
NAMES, SETTINGS = str | list[str] | None, dict[str, Any] | None
CONFIG: dict[str, Any] = {  # settings that are read, or do not change what the tensors mean; any other must be unset
    "peft_type": str, "task_type": str | None, "auto_mapping": SETTINGS, "peft_version": str | None,
    "base_model_name_or_path": str | None, "revision": str | None, "inference_mode": bool | None,
    "r": int, "lora_alpha": float, "rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None, "use_dora": bool | None, "init_lora_weights": bool | str | None,
    "lora_dropout": float | None, "target_modules": NAMES, "exclude_modules": NAMES,
    "layers_to_transform": int | list[int] | None, "layers_pattern": NAMES, "modules_to_save": list[str] | None,
    "fan_in_fan_out": bool | None, "megatron_core": str | None, "runtime_config": SETTINGS,
    "qalora_group_size": int | None, "loftq_config": SETTINGS, "eva_config": SETTINGS, "projection_prng_key": int,
    "save_projection": bool | None, "vera_dropout": float | None, "d_initial": float | None,
    "init_weights": bool | str | None, "alpha": float, "use_effective_conv2d": bool | None, "mini_r": int,
    "rank_dropout": float | None, "miss_dropout": float | None, "target_parameters": list[str] | None,
    "feedforward_modules": NAMES, "init_ia3_weights": bool | None, "oft_block_size": int, "eps": float | None,
    "block_share": bool | None, "use_cayley_neumann": bool | None, "num_cayley_neumann_terms": int | None,
    "bias": str | None, "trainable_token_indices": list[int] | dict[str, list[int]] | None, "target_r": int,
    "init_r": int, "tinit": int, "tfinal": int, "deltaT": int, "beta1": float, "beta2": float, "orth_reg_weight": float,
    "total_step": int | None,
}  # fmt: skip
UNSET: tuple[Any, ...] = (None, False, "none", {}, [])
# init_lora_weights -> start; those that move PEFT's base are taken away here, from the same rule over the same weight
STARTS = {str(plain): "kaiming" for plain in (True, False, None, "gaussian", "orthogonal", "eva")}
STARTS |= {"pissa": "pissa", "olora": "olora"}


# ---- writing ---------------------------------------------------------------------------------------------------------


class Own(NamedTuple):
    """An adapter as PEFT's own method has it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]  # path and PEFT's name of a tensor in a layer -> tensor


def _own_ia3(factors: Any, layers: Mapping[str, Mapping[str, Tensor]]) -> Own:
    inputs = [path for path in layers if path not in outputs_scaled(factors, list(layers))]
    tensors = {f"{path}.ia3_l": p["l"].unsqueeze(0 if path in inputs else 1) for path, p in layers.items()}
    return Own({"peft_type": "IA3", "feedforward_modules": inputs}, tensors)


def _own_oft(factors: Any, layers: Mapping[str, Mapping[str, Tensor]]) -> Own:
    sign = 1 if factors.terms else -1  # as in `_oft`
    series = {"use_cayley_neumann": bool(factors.terms), "num_cayley_neumann_terms": factors.terms or 5}
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": factors.block, "block_share": factors.one_block}
    # the series of PEFT 0.18 and later; it reads a folder without a version as an older one
    return Own(
        {**config, **series, "coft": False, "module_dropout": 0.0, "init_weights": True, "peft_version": "0.21.0"},
        {f"{path}.oft_R.weight": sign * p["Q"] for path, p in layers.items()},
    )


# kind of factors -> (factors, path -> role -> tensor) -> the adapter as PEFT's method of that name has it
OWN: dict[str, Callable[[Any, Mapping[str, Mapping[str, Tensor]]], Own]] = {"ia3": _own_ia3, "oft": _own_oft}
OWN_METHOD = {kind: METHODS[kind.upper()] for kind in OWN}


def at_most_full(u: Update) -> Update:
    """The same update at no higher a rank than its matrix (out, in) can have, as some methods stack several pairs."""
    (rank, columns), rows = u.A.shape, len(u.B)
    if rank <= min(rows, columns):
        return u
    D = u.matrix()  # (out, in)
    eye = torch.eye(min(rows, columns), dtype=D.dtype, device=D.device)
    return u._replace(A=D, B=eye) if rows <= columns else u._replace(A=eye, B=D)
