"""Small real configurations of every architecture with a preset, on random weights, in generic position."""

import copy
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    RobertaConfig,
)

from loralab.fast import masks
from loralab.heads import head_of
from loralab.rankmap import RankMap
from loralab.ranks.drop import drop_map
from loralab.targets import cover

SIZES = {
    "vocab_size": 101,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, embedding_size=17),
    "mpnet": MPNetConfig(**SIZES, pad_token_id=1),
    "deberta-v2": DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8
    ),
    "distilbert": DistilBertConfig(vocab_size=101, dim=24, n_layers=2, n_heads=3, hidden_dim=37),
    "gpt2": GPT2Config(vocab_size=101, n_embd=24, n_layer=2, n_head=3, n_inner=37, pad_token_id=0),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0),
}
LABELS = 3


def build(kind: str, seed: int = 0) -> nn.Module:
    """A classifier in eval mode, with biases off zero and no dropout."""
    config = copy.deepcopy(CONFIGS[kind])
    config.num_labels = LABELS
    for key, value in vars(config).items():
        if isinstance(value, float) and any(word in key for word in ("dropout", "pdrop")):
            setattr(config, key, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.3)
    return model.eval()


def written_in(file: ModuleType, function: Any) -> FunctionType:
    """The function as if that file had it; its globals are those of the file. A block takes nobody else's."""
    return FunctionType(function.__code__, vars(file), function.__name__, function.__defaults__, function.__closure__)


def drop_as_blocks(monkeypatch: Any) -> None:
    """Let torch's dropout draw the masks that a block draws."""

    def drawn(x, p=0.5, training=True, inplace=False):  # type: ignore[no-untyped-def]
        return dropout(x, p, training)  # noqa: F821  (of the file of masks)

    monkeypatch.setattr(F, "dropout", written_in(masks, drawn))


def rows(count: int = 5, tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids with some padding at the end of the even rows."""
    ids = torch.randint(5, 101, (count, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labelled(seed: int = 8) -> dict[str, torch.Tensor]:
    """`rows` with labels, for starts that look at data."""
    return {**rows(seed=seed), "labels": torch.tensor([0, 1, 2, 1, 0])}


def losses_by_heart(model, adapters, lr: float, steps: int) -> list[float]:
    """The losses of steps of AdamW on five rows and their labels."""
    batch, labels = rows(), torch.tensor([0, 1, 2, 1, 0])
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=lr))
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shake(adapters, name: str, seed: int = 2, std: float = 0.3) -> None:
    """Moves every tensor of an adapter off its start, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role, tensor in adapters.tensors(name).values():
            if role != "head" and tensor.is_floating_point():
                tensor.add_(torch.empty(tensor.shape).normal_(0, std, generator=generator))


def alone(model, adapters, names, ids, batch, **more):
    """The logits of each row by itself, one adapter live, nothing kept from before."""
    with torch.enable_grad():
        for row, i in enumerate(ids):
            with adapters.use(names[i], **more):
                yield model(**{key: t[row : row + 1] for key, t in batch.items()}).logits[0].detach()


def assert_rows(mixed, expected, tolerance=2e-5):
    """Logits of a batch are those of the rows alone; what an adapter has no label for is -inf."""
    for row, one in zip(mixed, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(row[: len(one)], one, rtol=0, atol=tolerance)
        assert (row[len(one) :] == -torch.inf).all()


def check_mixed(model, adapters, names, ids, tolerance=1e-5):
    """The law that rows of several adapters in one batch are each row alone."""
    batch = rows()
    with torch.no_grad(), adapters.use(list(names), ids=ids):
        mixed = model(**batch).logits
    assert_rows(mixed, list(alone(model, adapters, names, ids, batch)), tolerance)


def rank_map(model: nn.Module, rank: int = 3, seed: int = 6) -> RankMap:
    """A map as LoRA-drop makes it: half of the importance, drawn at random, keeps its own factors, the rest shares."""
    layers = {path: model.get_submodule(path) for path in cover(model, "all-linear", head_of(model)).paths}
    sizes = {path: (m.nf, m.nx) if hasattr(m, "nf") else (m.out_features, m.in_features) for path, m in layers.items()}
    drawn = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    return drop_map(dict(zip(sizes, drawn, strict=True)), sizes, rank, keep=0.5)
