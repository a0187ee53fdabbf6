"""The same model under the same method, made by PEFT and by loralab, and the step that both take.

PEFT runs as Hugging Face's Trainer runs it: float32 weights, under autocast for bfloat16. loralab runs as `loralab
train` does. The layers that both adapt, and the head that both train, are what `targets` covers. A method is one row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab import fast, models
from loralab.adapters import Adapters, attach
from loralab.errors import UserError
from loralab.heads import head_of
from loralab.optimizers import adamw
from loralab.recipe import recipe
from loralab.run.step import step as take_step
from loralab.stores.nf4 import library
from loralab.targets import cover

if TYPE_CHECKING:
    from loralab.bench.cases import Case

FIRST_ID = 5  # of a token in a random batch: below are padding and other special ones
CLIP = 1.0  # of the gradient's norm, Trainer's default


@dataclass(frozen=True)
class Theirs:
    """How PEFT makes a method of the same name."""

    config: str | None = "LoraConfig"
    """Its class in peft; None uses no PEFT."""
    options: dict[str, Any] = field(default_factory=dict)
    train_a: bool = True
    four_bit: bool = False
    """Puts bitsandbytes' Linear4bit under the adapters: NF4, absmax quantized too."""


METHODS: dict[str, Theirs] = {
    "lora": Theirs(),
    "dora": Theirs(options={"use_dora": True}),
    "vera": Theirs("VeraConfig"),
    "lora-fa": Theirs(train_a=False),  # PEFT's own LoRA-FA is an optimizer with another update (lora-fa-precond)
    "qlora": Theirs(four_bit=True),
    "full": Theirs(None),
}


@dataclass(frozen=True)
class Built:
    """A model under a method, ready to train."""

    model: nn.Module
    learned: list[nn.Parameter]
    autocast: bool  # whether products are cast to bfloat16 step by step
    choices: list[fast.Choice] = field(default_factory=list)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CUDA: not measured


def load(case: "Case") -> Any:
    """The base of a case under a new head, the same on both sides."""
    model, _ = models.classifier(case.model, 2, False, torch.float32, 0)
    if case.layers is not None:
        shorten(model, case.layers)
    most = getattr(model.config, "max_position_embeddings", case.length)
    if case.length > most:
        raise UserError(f"--lengths {case.length}: {case.model} takes fewer than {most} tokens")
    return model


def shorten(model: Any, count: int) -> None:
    """Leaves the first `count` layers of an encoder."""
    layers = next((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None or count > len(layers):
        raise UserError(f"--layers {count}: {type(model).__name__} has {len(layers or ())}")
    del layers[count:]
    model.config.num_hidden_layers = count


def peft_side(case: "Case") -> Built:
    return under_peft(load(case), case)


def under_peft(model: nn.Module, case: Any) -> Built:
    """PEFT's adapters on a loaded model."""
    theirs, heads = METHODS[case.method], head_of(model)
    if theirs.config is not None:
        import peft

        paths = cover(model, case.targets, heads).paths
        if theirs.four_bit:
            four_bit(model, paths, case.dtype)
        config = getattr(peft, theirs.config)
        options = theirs.options | ranked(case)
        model = peft.get_peft_model(model, config(target_modules=paths, modules_to_save=list(heads), **options))
        if not theirs.train_a:
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.lora_A.requires_grad_(False)
    return _ready(model, autocast=case.dtype == "bfloat16")


def ranked(case: Any) -> dict[str, Any]:
    """loralab's rank and alpha of the method, in PEFT's words."""
    factors = recipe(case.method, **_rank(case)).factors
    alpha = getattr(factors, "alpha", None)
    return {"r": getattr(factors, "rank", None)} | ({} if alpha is None else {"lora_alpha": alpha})


def four_bit(model: nn.Module, paths: list[str], dtype: str) -> None:
    """The layers that get an adapter become bitsandbytes' own, with the same weights."""
    library()  # its one-line error where it is missing
    import bitsandbytes as bnb

    for path in paths:
        layer: Any = model.get_submodule(path)
        kept: Any = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, getattr(torch, dtype), quant_type="nf4"
        )
        kept.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=kept)
        kept.bias = layer.bias
        model.set_submodule(path, kept.to(device()))


def adapted(case: "Case") -> Adapters:
    """loralab's adapters on a loaded model, on the plain path."""
    rank: dict[str, Any] = _rank(case)
    return attach(load(case), case.method, targets=case.targets, head=True, **rank)


def loralab_side(case: "Case") -> Built:
    model = adapted(case).model
    choices, autocast = fast.quicken(model.to(device()), "auto", getattr(torch, case.dtype))
    built = _ready(model, autocast)
    return Built(built.model, built.learned, built.autocast, choices)


def _rank(case: Any) -> dict[str, int]:
    rank = getattr(case, "rank", None)
    return {} if rank is None else {"rank": rank}


def _ready(model: nn.Module, autocast: bool) -> Built:
    model.to(device()).train()
    return Built(model, [p for p in model.parameters() if p.requires_grad], autocast)


SIDES: dict[str, Callable[["Case"], Built]] = {"peft": peft_side, "loralab": loralab_side}


def batch(case: "Case", config: Any) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, labels): random tokens, the last quarter of a quarter of the rows is padding."""
    n, length = case.batch_size, case.length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ID, config.vocab_size, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[: n // 4, length - length // 4 :] = 0
    ids[mask == 0] = config.pad_token_id
    labels = torch.randint(0, 2, (n,), generator=generator)
    inputs = {"input_ids": ids.to(device()), "attention_mask": mask.to(device())}
    return inputs, labels.to(device())


def stepper(built: Built, inputs: dict[str, Tensor], labels: Tensor) -> Callable[[], None]:
    """One optimizer step: forward, backward, clipping, AdamW."""
    optimizer = adamw([{"params": built.learned, "lr": 1e-4}], fused=True)
    kind = device().type

    def step() -> None:
        take_step(built.model, inputs, labels, optimizer, built.learned, CLIP, built.autocast)
        if kind == "cuda":
            torch.cuda.synchronize()

    return step
