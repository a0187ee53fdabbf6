"""Coverage is true: every parameter of the backbone once, with its reason; exclude, small layers, presets, warnings."""

import copy
import re
import warnings

import pytest
import torch
import zoo
from archs import CONFIGS
from torch import nn
from transformers import AutoModelForSequenceClassification

import loralab
from loralab.coverage import ADAPTED, LEFT, UNREACHABLE
from loralab.heads import head_of
from loralab.presets import PRESETS, structure
from loralab.targets import ReachNote, cover

MODELS = ["gemma2", "mixtral", "t5", "wav2vec2", "swin", "xlnet", "mamba", "clip", "gpt2"]


def quiet(model, *args, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loralab.attach(model, *args, **given)


@pytest.mark.parametrize("store", [None, "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_backbone_is_counted_once(name, store):
    """Before an adapter, with one, and with a second beside it; each row has a reason."""
    model = zoo.build(name).float()
    outside = head_of(model)
    right = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(tuple(f"{h}." for h in outside)))
    handle = quiet(model, rank=2, name="a", store=store)
    handle.add("b", rank=1, targets=[handle.coverage().paths[0]], store=store)
    for one in ("a", "b"):
        coverage = handle.coverage(one)
        assert coverage.size == right
        rows = coverage.rows()
        assert sum(row.values for row in rows) == right
        assert sum(len(row.paths) for row in rows) == len({path for row in rows for path in row.paths})
        assert all(row.why for row in rows if row.state != ADAPTED)
        assert {row.state for row in rows} <= {ADAPTED, LEFT, UNREACHABLE}
        assert sum(coverage.share(state) for state in (ADAPTED, LEFT, UNREACHABLE)) == pytest.approx(1)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_adapted_is_what_changes(name):
    """The weights that a merge changes are those of the adapted layers, and no others."""
    model = zoo.build(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    handle = quiet(model, rank=2, name="a")
    with torch.no_grad():
        for _, t in handle.tensors().values():
            t.add_(torch.randn_like(t))
    after = dict(handle.merge().named_parameters())
    changed = {key for key, p in before.items() if not torch.equal(after[key], p)}
    assert changed == {f"{path}.weight" for path in handle.coverage().paths}
    values = sum(before[key].numel() for key in changed)
    adapted = [part for part in handle.coverage().parts if part.path in handle.coverage().paths]
    biases = sum(before[f"{part.path}.bias"].numel() for part in adapted if f"{part.path}.bias" in before)
    assert sum(part.values for part in adapted) == values + biases


def test_less_than_half_of_the_linear_values_is_a_warning():
    with pytest.warns(ReachNote, match=r"adapts \d+\.\d% of the values of linear layers, less than half: .*experts"):
        loralab.attach(zoo.build("mixtral"), rank=2)
    with pytest.warns(ReachNote, match="less than half.*excluded"):
        loralab.attach(zoo.build("llama"), rank=2, exclude=["mlp", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loralab.attach(zoo.build("llama"), rank=2)
        loralab.attach(zoo.build("llama"), rank=2, targets=["q_proj"])  # only all-linear means all


# ---- exclude ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["q_proj"], r".*q_proj"), (["layers.1"], r"model\.layers\.1\..*"), (["*.down_proj"], r".*\.down_proj"),
        (["self_attn", "up_proj"], r".*self_attn.*|.*up_proj"),
    ],
)  # fmt: skip
def test_exclude_names_layers_and_modules_around_them(exclude, gone):
    everything = set(quiet(zoo.build("llama"), rank=2).layers)
    handle = quiet(zoo.build("llama"), rank=2, exclude=exclude)
    assert everything - set(handle.layers) == {path for path in everything if re.fullmatch(gone, path)} != set()
    assert all(
        row.why == "excluded" for row in handle.coverage().rows() if set(row.paths) & (everything - set(handle.layers))
    )


def test_exclude_that_matches_nothing_or_leaves_nothing_is_refused():
    for given, why in (
        ({"exclude": ["q_porj"]}, "'q_porj' matches no layer.*did you mean 'q_proj'"),
        ({"exclude": ["model"]}, "leaves none"),
        ({"targets": ["q_proj"], "exclude": ["self_attn"]}, "leaves none"),
        ({"exclude": ["q_proj", "q_proj"]}, "twice"),
        ({"method": "bitfit", "exclude": ["q_proj"]}, "adapts no layer"),
    ):
        model = zoo.build("llama")
        with pytest.raises(loralab.UserError, match=why):
            loralab.attach(model, **({} if "method" in given else {"rank": 2}), **given)
        assert not any(type(m).__name__ == "Adapted" for m in model.modules())


def test_an_excluded_layer_that_cannot_be_adapted_is_no_obstacle():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    with pytest.raises(loralab.UserError, match="past"):
        loralab.attach(model, rank=2, targets=".*")
    assert set(loralab.attach(model, rank=2, targets=".*", exclude=["a"]).layers) == {"b"}


# ---- layers smaller than the rank ------------------------------------------------------------------------------------


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.gate, self.narrow = nn.Linear(12, 10), nn.Linear(12, 1), nn.Linear(3, 12)

    def forward(self, x):
        return self.narrow(self.wide(x)[..., :3]) * self.gate(x)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora-fa", "pissa"])
def test_a_layer_too_small_for_the_rank_takes_its_largest(method, tmp_path):
    torch.manual_seed(0)
    model, x = Uneven(), torch.randn(4, 12)
    base = copy.deepcopy(model)
    handle = loralab.attach(model, method, rank=5, name="a")
    assert dict(handle.coverage().ranks) == {"gate": 1, "narrow": 3}
    assert "rank 1, the most they can have: gate (1); rank 3" in str(handle.coverage())
    assert {path: layer.roles("a")["A"].shape[0] for path, layer in handle.layers.items()} == {
        "wide": 5, "gate": 1, "narrow": 3,
    }  # fmt: skip
    with torch.no_grad():
        for role, t in handle.tensors().values():
            t.add_(0.1 * torch.randn_like(t) if role in ("A", "B") else 0)
    torch.testing.assert_close(handle.merge()(x), model(x), rtol=0, atol=1e-5)
    handle.save(tmp_path)
    loralab.load(base, tmp_path)
    torch.testing.assert_close(base(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["adalora", "dylora", "lora-fa-precond"])
def test_a_method_of_one_rank_leaves_small_layers_alone(method):
    handle = loralab.attach(Uneven(), method, rank=5, **({"target_rank": 2} if method == "adalora" else {}))
    assert list(handle.layers) == ["wide"]
    assert "too small for rank 5" in str(handle.coverage())


def test_a_rank_that_no_layer_can_have_is_a_mistake():
    with pytest.raises(loralab.UserError, match="rank 11: a 10 x 12 weight allows 1 to 10"):
        loralab.attach(Uneven(), rank=11)


# ---- presets ---------------------------------------------------------------------------------------------------------


BERT = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "o": "attention.output.dense", "mlp": "intermediate.dense layer.*.output.dense",
}  # fmt: skip
DEBERTA = {part: f"attention.self.{name}_proj" for part, name in (("q", "query"), ("k", "key"), ("v", "value"))}
MLP = {"mlp": "mlp.gate_proj mlp.up_proj mlp.down_proj"}
PARTS = {  # architecture -> part -> path endings, by reading its file in transformers
    "bert": BERT, "roberta": BERT, "electra": BERT, "deberta-v2": BERT | DEBERTA,
    "mpnet": BERT | {part: f"attention.attn.{part}" for part in "qkvo"},
    "distilbert": {part: f"attention.{part}_lin" for part in "qkv"} | {"o": "attention.out_lin", "mlp": "lin1 lin2"},
    "gpt2": dict.fromkeys("qkv", "attn.c_attn") | {"o": "attn.c_proj", "mlp": "mlp.c_fc mlp.c_proj"},
    "llama": {part: f"self_attn.{part}_proj" for part in "qkvo"} | MLP,
}  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", [*CONFIGS, "deberta-v2, positions apart"])
def test_structure_tells_the_parts_of_an_architecture(kind, adapted):
    """Layers of a model that is adapted already are told too; a projection of positions is no output of attention."""
    kind, _, apart = kind.partition(", ")
    config = copy.deepcopy(CONFIGS[kind])
    config.share_att_key = not apart
    model = AutoModelForSequenceClassification.from_config(config)
    assert sum("pos_key_proj" in path for path, _ in model.named_modules()) == 2 * bool(apart)
    if adapted:
        loralab.attach(model, rank=3)
    told = structure(model)
    assert told.keys() == PARTS[kind].keys()
    for part, endings in told.items():
        of_part = [cover(model, given, head_of(model)).paths for given in (endings, PARTS[kind][part].split())]
        assert sorted(of_part[0]) == sorted(of_part[1]), part


@pytest.mark.parametrize(
    ("name", "qv", "mlp"),
    [
        ("t5", "q v", "wi wo"), ("whisper", "q_proj v_proj", "fc1 fc2"), ("vit", "q_proj v_proj", "fc1 fc2"),
        ("opt", "q_proj v_proj", "fc1 fc2"), ("gpt_neox", "query_key_value", "dense_h_to_4h dense_4h_to_h"),
        ("mixtral", "q_proj v_proj", ""), ("clip", "q_proj v_proj", "fc1 fc2"), ("bloom", "query_key_value",
                                                                                 "dense_h_to_4h dense_4h_to_h"),
    ],
)  # fmt: skip
def test_presets_of_other_architectures_come_from_the_structure(name, qv, mlp):
    model = zoo.build(name)
    for preset, wanted in (("attention-qv", qv), ("mlp", mlp)):
        if not wanted:
            with pytest.raises(loralab.UserError, match="does not tell which layers are mlp"):
                cover(model, preset)
            continue
        assert {path.rpartition(".")[2] for path in cover(model, preset).paths} == set(wanted.split())


def test_what_the_structure_does_not_tell_is_refused():
    for name in ("mamba", "fnet", "resnet"):
        for preset in PRESETS:
            with pytest.raises(loralab.UserError, match="does not tell"):
                cover(zoo.build(name), preset)
