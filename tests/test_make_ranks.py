"""Rank maps for a loop of one's own: `rank_map` against the policy's parts called by hand, and the model as it was."""

import copy

import pytest
import torch
import zoo
from archs import LABELS, build, rows
from transformers import Trainer, TrainingArguments

import loralab
from loralab import UserError, make_ranks
from loralab.adapted import HANDLE
from loralab.policies import POLICIES
from loralab.ranks.alora import alora
from loralab.ranks.drop import drop_map, importance, shapes
from loralab.ranks.groups import groups
from loralab.ranks.spectrum import error_map
from loralab.recipe import recipe
from loralab.targets import cover

TARGETS = ["attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense"]
GIVEN = {"targets": TARGETS, "exclude": ["layer.1.attention.output"], "head": True, "rank": 3, "alpha": 5.0, "lr": 2e-2}
POLICY = {  # policy -> what is given to rank_map
    "drop": {"epochs": 2, "keep": 0.05},
    "alora": {"rounds": 2},
    "error-spectrum": {"store": "bfloat16", "least": 1},
    "groups": {"span": 2},
}


def batches():
    made = [rows(count=4, seed=seed) for seed in range(3, 7)]
    return [{**batch, "labels": (batch["input_ids"].sum(1) % LABELS)} for batch in made]


def by_hand(adapters, batches, optimizer):
    adapters.model.train()
    for batch in batches:
        optimizer.zero_grad()
        adapters.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()


def drop_by_hand(adapters):
    optimizer = torch.optim.AdamW(adapters.parameter_groups())
    for _ in range(2):
        by_hand(adapters, batches(), optimizer)
    return drop_map(importance(adapters, "a", batches()), shapes(adapters, "a"), 3, 0.05)


def alora_by_hand(adapters):
    def epoch(_):
        by_hand(adapters, batches()[:-1], torch.optim.AdamW(adapters.parameter_groups()))

    return alora(adapters, "a", epoch, batches()[-1], 2, seed=7)[-1]


@pytest.mark.parametrize(("policy", "expected"), [("drop", drop_by_hand), ("alora", alora_by_hand)])
@pytest.mark.parametrize("mode", [True, False])
def test_a_map_is_that_of_the_policys_parts_and_the_model_is_as_it_was(policy, expected, mode):
    right = expected(loralab.attach(build("bert"), "lora", name="a", seed=7, **GIVEN))
    model = build("bert").train(mode)
    model.bert.encoder.layer[0].eval()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    modules = {path: (id(module), module.training) for path, module in model.named_modules()}
    learns = {key: p.requires_grad for key, p in model.named_parameters()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    once = iter(batches())  # is read once
    found = loralab.rank_map(model, "lora", once, policy=policy, seed=7, **GIVEN, **POLICY[policy])
    assert found == right
    assert not found.even
    assert torch.equal(torch.get_rng_state(), state)
    assert modules == {path: (id(module), module.training) for path, module in model.named_modules()}
    assert learns == {key: p.requires_grad for key, p in model.named_parameters()}
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not hasattr(model, HANDLE)


def test_alora_scores_the_batch_it_is_given():
    model, rest = build("bert"), batches()
    given = {"policy": "alora", "seed": 7, **GIVEN}
    assert loralab.rank_map(model, "lora", rest[:-1], scored=rest[-1], **given) == loralab.rank_map(
        model, "lora", rest, **given
    )


def test_maps_that_need_no_training_are_those_of_the_layers():
    model = build("bert")
    paths = cover(model, TARGETS, ["classifier"], ["layer.1.attention.output"]).paths
    layers = {path: model.get_submodule(path) for path in paths}
    made = loralab.rank_map(model, "lora", policy="error-spectrum", store="bfloat16", least=1, **GIVEN)
    assert made == error_map(layers, "bfloat16", 3, 1)
    assert loralab.rank_map(model, "lora", policy="groups", span=2, **GIVEN) == groups(
        model, TARGETS, 3, 2, exclude=["layer.1.attention.output"]
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trainer_script_trains_with_the_map(policy, tmp_path):
    model = build("bert")
    store = {key: value for key, value in POLICY[policy].items() if key == "store"}
    ranks = loralab.rank_map(model, "lora", batches(), policy=policy, **GIVEN, **POLICY[policy])
    adapters = loralab.attach(model, "lora", ranks=ranks, policy=policy, **GIVEN, **store)
    assert {path: len(layer.roles("default")["A"]) for path, layer in adapters.layers.items()} == {
        path: layer.rank for path, layer in ranks.adapted.items()
    }
    before = {key: t.detach().clone() for key, t in adapters.state().items()}
    data = [{key: t[i] for key, t in batch.items()} for batch in batches() for i in range(len(batch["labels"]))]
    settings = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    Trainer(model, settings, train_dataset=data).train()
    assert all(not torch.equal(t, before[key]) for key, t in adapters.state().items() if t.requires_grad)


def test_a_method_that_rounds_its_base_leaves_the_users_model_whole():
    model = build("bert")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    ranks = loralab.rank_map(model, "lora", batches(), policy="drop", store="int8", keep=0.05, **GIVEN)
    assert ranks.shares
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    rounded = copy.deepcopy(model)
    loralab.attach(rounded, "lora", store="int8", **GIVEN).detach()
    assert any(not torch.equal(t, before[key]) for key, t in rounded.state_dict().items())


def test_every_policy_of_the_table_can_run():
    assert make_ranks.MAKERS.keys() == make_ranks.OPTIONS.keys() == POLICIES.keys()


@pytest.mark.parametrize(
    ("method", "data", "given", "why"),
    [
        ("dora", batches, {}, "method 'dora' has no rank policy: choose lora-drop, alora, or policy="),
        ("lora-drop", list, {}, "got 0 batches: pass 1 or more"),
        ("alora", lambda: batches()[:1], {}, "got 1 batches: pass 2 or more"),
        ("alora", batches, {"keep": 0.5}, "policy='alora' has no option keep: it has rounds, scored"),
        ("lora-drop", batches, {"keeps": 0.5}, "has no setting 'keeps'"),
        ("lora-drop", lambda: [rows()], {}, "gives no loss for these batches: put labels"),
        ("alora", batches, {"targets": ["layer.0.attention.self.query"]}, "ranks move between layers"),
        ("lora-drop", batches, {"targets": ["nowhere"]}, "nowhere"),
        ("lora", batches, {"policy": "error-spectrum"}, "store=None"),
    ],
)
def test_what_cannot_be_made_is_refused_and_the_model_stays_plain(method, data, given, why):
    model = build("bert")
    with pytest.raises(UserError, match=why):
        loralab.rank_map(model, method, data(), **given)
    assert not hasattr(model, HANDLE)
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())


def test_a_model_with_adapters_or_a_recipe_with_ranks_is_refused():
    model = build("bert")
    ranks = loralab.rank_map(model, "lora", policy="groups", **GIVEN)
    with pytest.raises(UserError, match="ranks are given already"):
        loralab.rank_map(model, recipe("lora-drop", rank=3, ranks=ranks), batches(), targets=TARGETS)
    adapters = loralab.attach(model, "lora", rank=3)
    with pytest.raises(UserError, match="make the map before attach"):
        loralab.rank_map(model, "lora-drop", batches())
    adapters.detach()
    with pytest.raises(UserError, match=r"give ranks=loralab\.rank_map\(model, method, batches\)"):
        loralab.attach(model, "alora")


@pytest.mark.parametrize("layers", ["experts", "embed_tokens"])
@pytest.mark.parametrize(
    ("method", "settings", "embeddings"),
    [("lora-drop", {}, False), ("alora", {}, True), ("lora", {"policy": "error-spectrum", "store": "nf4"}, False),
     ("superlora", {"policy": "groups"}, True)],
)  # fmt: skip
def test_layers_that_a_policy_does_not_rank_are_refused(layers, method, settings, embeddings):
    """Stacks of experts by all of them; embeddings by those that look at vectors that go through, or at a store."""
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    given = {"targets": [layers, "q_proj"], "rank": 2, "batches": [{"input_ids": ids, "labels": ids}] * 3, **settings}
    if layers == "embed_tokens" and embeddings:
        assert any("embed_tokens" in path for path in make_ranks.rank_map(zoo.build("mixtral"), method, **given).layers)
        return
    with pytest.raises(loralab.UserError, match=rf"does not rank layers like \S*{layers}.*: exclude them"):
        make_ranks.rank_map(zoo.build("mixtral"), method, **given)
