"""The same model under the same method, made by PEFT and by loralab, and the step that both take.

PEFT runs as Hugging Face's Trainer runs it: float32 weights, under autocast for bfloat16. loralab runs as `loralab
train` does. Both adapt the layers that `targets` covers, and train the head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab import fast, models
from loralab.adapters import Adapters, attach
from loralab.bench.cases import PEFT_METHODS, Case
from loralab.errors import UserError
from loralab.heads import head_of
from loralab.objectives.classification import OBJECTIVE
from loralab.optimizers import adamw
from loralab.run.settings import StepSettings
from loralab.run.step import step as take_step
from loralab.stores.nf4 import library
from loralab.targets import cover

FIRST_ID = 5  # of a token in a random batch: below are padding and other special ones
CLIP = 1.0  # of the gradient's norm, Trainer's default


@dataclass(frozen=True)
class Built:
    """A model under a method, ready to train."""

    model: nn.Module
    trainable: list[nn.Parameter]
    autocast: bool  # whether products are cast to bfloat16 step by step
    choices: list[fast.Choice] = field(default_factory=list)


def device() -> torch.device:
    """CUDA where there is one; not measured there."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(case: Case) -> Any:
    """The base of a case under a new head, the same for both backends."""
    model, _ = models.classifier(case.model, 2, False, torch.float32, 0)
    if case.layers is not None:
        shorten(model, case.layers)
    most = getattr(model.config, "max_position_embeddings", case.max_length)
    if case.max_length > most:
        raise UserError(f"--lengths {case.max_length}: {case.model} takes fewer than {most} tokens")
    return model


def shorten(model: Any, count: int) -> None:
    """Keep the first `count` layers of an encoder. Raises UserError if it has fewer."""
    layers = next((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None or count > len(layers):
        raise UserError(f"--layers {count}: {type(model).__name__} has {len(layers or ())}")
    del layers[count:]
    model.config.num_hidden_layers = count


def build_peft(case: Case) -> Built:
    """The model of a case under PEFT."""
    return under_peft(load(case), case)


def under_peft(model: nn.Module, case: StepSettings) -> Built:
    """PEFT's adapters on a loaded model."""
    method, heads = PEFT_METHODS[case.method], head_of(model)
    if method.config is not None:
        import peft

        paths = cover(model, case.targets, heads).paths
        if method.four_bit:
            four_bit(model, paths, case.precision)
        config = getattr(peft, method.config)
        options = method.options | peft_rank(case)
        model = peft.get_peft_model(model, config(target_modules=paths, modules_to_save=list(heads), **options))
        if not method.train_a:
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.lora_A.requires_grad_(False)
    return _ready(model, autocast=case.precision == torch.bfloat16)


def peft_rank(case: StepSettings) -> dict[str, Any]:
    """The rank and alpha of loralab's method as arguments of PEFT's config."""
    factors = case.recipe().factors
    alpha = getattr(factors, "alpha", None)
    return {"r": getattr(factors, "rank", None)} | ({} if alpha is None else {"lora_alpha": alpha})


def four_bit(model: nn.Module, paths: list[str], dtype: torch.dtype) -> None:
    """Replace the layers that get an adapter by bitsandbytes' Linear4bit with the same weights."""
    library()  # its one-line error where it is missing
    import bitsandbytes as bnb

    for path in paths:
        layer: Any = model.get_submodule(path)
        quantized: Any = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4"
        )
        quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
        quantized.bias = layer.bias
        model.set_submodule(path, quantized.to(device()))


def adapted(case: Case) -> Adapters:
    """loralab's adapters on a loaded model, without the fast path."""
    return attach(load(case), case.recipe(), targets=case.targets, head=True)


def build_loralab(case: Case) -> Built:
    """The model of a case under loralab, with the fast path as `case.speed` says."""
    model = adapted(case).model
    choices = fast.enable(model.to(device()), case.precision, case.speed)
    return replace(_ready(model, choices.autocast), choices=list(choices))


def _ready(model: nn.Module, autocast: bool) -> Built:
    model.to(device()).train()
    return Built(model, [p for p in model.parameters() if p.requires_grad], autocast)


BACKENDS: dict[str, Callable[[Case], Built]] = {"peft": build_peft, "loralab": build_loralab}


def batch(case: Case, config: Any) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, labels): random tokens; the last quarter of a quarter of the rows is padding."""
    n, length = case.batch_size, case.max_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ID, config.vocab_size, (n, length), generator=generator)
    mask = torch.ones_like(ids)  # (n, length)
    mask[: n // 4, length - length // 4 :] = 0
    ids[mask == 0] = config.pad_token_id
    labels = torch.randint(0, 2, (n,), generator=generator)
    inputs = {"input_ids": ids.to(device()), "attention_mask": mask.to(device())}
    return inputs, labels.to(device())


def stepper(built: Built, inputs: dict[str, Tensor], labels: Tensor) -> Callable[[], None]:
    """A function that takes one optimizer step: forward, backward, clipping, AdamW."""
    optimizer = adamw([{"params": built.trainable, "lr": 1e-4}], fused=True)
    kind = device().type

    def step() -> None:
        take_step(built.model, OBJECTIVE, inputs, labels, len(labels), optimizer, built.trainable, CLIP, built.autocast)
        if kind == "cuda":
            torch.cuda.synchronize()

    return step
