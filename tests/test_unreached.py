"""Weights that no target reaches are told of: stacks of experts, and any matrix that is no linear layer's.

The right numbers are counted from the names and shapes that the models are built with, not from what loralab finds.
"""

import warnings

import pytest
import torch
from archs import CONFIGS, build
from torch import nn
from transformers import AutoModelForSequenceClassification, MixtralConfig, Qwen2MoeConfig

import loralab
from loralab.targets import ReachNote

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(
        **SIZES, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts_per_tok=2
    ),
}


class Stacked(nn.Module):
    """A layer, a table, and matrices of its own: `unlike` linear layers in every way a module can hold one."""

    def __init__(self, dims):
        super().__init__()
        self.layer, self.table = nn.Linear(8, 8), nn.Embedding(9, 8)
        self.stack = nn.Parameter(torch.randn(*dims))
        self.vector = nn.Parameter(torch.randn(7))


def told(build_and_attach):
    """(handle, text of its warnings about reach)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = build_and_attach()
    return handle, " ".join(str(w.message) for w in caught if w.category is ReachNote)


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_and_routers_are_counted_and_told_of(kind, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_config(MIXTURES[kind])
    sizes = {key: p.numel() for key, p in model.named_parameters() if not key.startswith("score.")}
    experts = {key: n for key, n in sizes.items() if "experts." in key}  # adapted only by name
    routers = {key: n for key, n in sizes.items() if key.endswith("mlp.gate.weight")}  # not at all
    size = sum(sizes.values())
    handle, said = told(lambda: loralab.attach(model, rank=1, head=True))
    coverage = handle.coverage()
    assert dict.fromkeys(coverage.unreached) == dict.fromkeys(routers)
    assert coverage.unreached_values == sum(routers.values())
    assert sum(experts.values()) > 0.4 * size
    assert f"{sum(routers.values()):,} values, {sum(routers.values()) / size:.1%} of the backbone" in str(coverage)
    left = next(row for row in coverage.rows() if row.kind == "experts")
    assert (left.values, set(left.paths)) == (sum(experts.values()), set(experts))
    assert "less than half" in said
    assert f"{left.share:.1%} experts" in said
    # what a folder says, read without the model
    handle.save(tmp_path / "adapter")
    from loralab.cli import main

    assert main(["inspect", str(tmp_path / "adapter")]) in (0, None)
    assert f"{sum(routers.values()):,} values of no linear layer" in " ".join(capsys.readouterr().out.split())
    # a second adapter over the same base has the same coverage, and another choice of layers is not warned about
    _, said = told(lambda: handle.add("second", rank=1))
    assert handle.coverage("second").unreached == coverage.unreached
    assert "less than half" in said
    _, said = told(lambda: handle.add("third", rank=1, targets=["q_proj"]))
    assert said == ""
    with pytest.raises(loralab.UserError, match=r"targets '\.\*mlp\\\\\.gate': not adapted, whatever the targets"):
        handle.add("fourth", rank=1, targets=r".*mlp\.gate")
    handle.add("fifth", rank=1, targets=["experts"])  # the module means its stacks
    assert set(handle.spec("fifth").paths) == set(experts)


@pytest.mark.parametrize("dims", [(5, 6), (3, 5, 6), (2, 3, 5, 6)])
def test_any_matrix_of_no_linear_layer_counts_and_no_table_or_vector(dims):
    handle, said = told(lambda: loralab.attach(Stacked(dims), rank=1))
    assert dict(handle.coverage().unreached) == {"stack": dims}
    assert "stack (1)" in said
    assert ("a table or matrix" if len(dims) == 2 else f"a tensor of {len(dims)} dimensions") in said


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_of_linear_layers_has_nothing_to_tell(kind):
    handle, said = told(lambda: loralab.attach(build(kind), rank=1, head=True))
    assert (dict(handle.coverage().unreached), said, "whatever" in str(handle.coverage())) == ({}, "", False)


def test_little_is_listed_and_not_warned_of():
    model = nn.Sequential(nn.Linear(100, 100), nn.Module())
    model[1].small = nn.Parameter(torch.randn(2, 3))
    handle, said = told(lambda: loralab.attach(model, rank=1))
    assert (dict(handle.coverage().unreached), said) == ({"1.small": (2, 3)}, "")
