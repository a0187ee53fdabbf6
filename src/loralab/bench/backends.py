"""The same model under the same method, made by PEFT and by loralab, and the step that both take.

PEFT runs as Hugging Face's Trainer runs it: float32 weights, under autocast for bfloat16. loralab runs as `loralab
train` does. Both adapt the layers that `targets` covers, and train the head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab import fast, models, objectives
from loralab.adapters import Adapters, attach
from loralab.bench.cases import LEARNS, PEFT_METHODS, Case, EpochCase
from loralab.errors import UserError
from loralab.heads import head_of
from loralab.inputs import IGNORED
from loralab.objectives import Batch, Objective
from loralab.optimizers import adamw
from loralab.run.settings import StepSettings
from loralab.run.step import step as take_step
from loralab.stores.nf4 import library
from loralab.targets import cover

FIRST_ID = 5  # of a token in a random batch: below are padding and other special ones
CLASSES = objectives.OBJECTIVES["classification"]
CLIP = 1.0  # of the gradient's norm, Trainer's default


@dataclass(frozen=True)
class Built:
    """A model under a method, ready to train."""

    model: nn.Module
    trainable: list[nn.Parameter]
    autocast: bool  # whether products are cast to bfloat16 step by step
    objective: Objective
    choices: list[fast.Choice] = field(default_factory=list)


def device() -> torch.device:
    """CUDA where there is one; not measured there."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(case: Case) -> Any:
    """The base of a case, under a new head where it has one, the same for both backends."""
    objective = objectives.OBJECTIVES[LEARNS[case.learns]]
    model, _ = models.fresh(case.model, objective.task_type, 2 if objective.new_head else None, torch.float32, seed=0)
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
    return under_peft(load(case), case, objectives.OBJECTIVES[LEARNS[case.learns]])


def under_peft(model: nn.Module, case: Case | EpochCase, objective: Objective = CLASSES) -> Built:
    """PEFT's adapters on a loaded model; a decoder has transformers' own loss."""
    if case.allocator == "equal":
        fast.keep_memory(model)
    method, heads = PEFT_METHODS[case.method], head_of(model) if objective.new_head else ()
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
    own = objective if objective.new_head else replace(objective, forward=_own_loss)
    return _ready(model, case.precision == torch.bfloat16, own)


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return (rows, 1): a decoder's own mean loss of a token, times the tokens, in the first row."""
    labels = batch["labels"]  # (rows, t)
    mean = model(**batch, use_cache=False).loss
    return torch.cat([(mean * (labels[:, 1:] != IGNORED).sum())[None], mean.new_zeros(len(labels) - 1)])[:, None]


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
    objective, model = objectives.OBJECTIVES[LEARNS[case.learns]], load(case)
    objective.prepare(model)
    return attach(model, case.recipe(), targets=case.targets, head=objective.new_head)


def build_loralab(case: Case) -> Built:
    """The model of a case under loralab, with the fast path as `case.speed` says."""
    model = adapted(case).model
    choices = fast.enable(model.to(device()), case.precision, case.speed)
    objective = objectives.OBJECTIVES[LEARNS[case.learns]]
    return replace(_ready(model, choices.autocast, objective), choices=list(choices))


def _ready(model: nn.Module, autocast: bool, objective: Objective) -> Built:
    model.to(device()).train()
    return Built(model, [p for p in model.parameters() if p.requires_grad], autocast, objective)


BACKENDS: dict[str, Callable[[Case], Built]] = {"peft": build_peft, "loralab": build_loralab}


def batch(case: Case, config: Any) -> tuple[dict[str, Tensor], Tensor, int]:
    """(inputs, labels, weight): random tokens; the last quarter of a quarter of the rows is padding.

    Labels are those of rows (rows,), what the loss is of; those of tokens are in the inputs. The weight is how many
    labels there are.
    """
    n, length = case.batch_size, case.max_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ID, config.vocab_size, (n, length), generator=generator)
    mask = torch.ones_like(ids)  # (n, length)
    mask[: n // 4, length - length // 4 :] = 0
    ids[mask == 0] = config.pad_token_id
    labels = torch.randint(0, 2, (n,), generator=generator)
    inputs, weight = {"input_ids": ids, "attention_mask": mask}, n
    if case.learns != "classes":
        of_tokens = ids if case.learns == "text" else torch.randint(0, 2, (n, length), generator=generator)
        inputs["labels"] = of_tokens.masked_fill(mask == 0, IGNORED)  # (n, length)
        weight = int((inputs["labels"][:, case.learns == "text" :] != IGNORED).sum())
    return {key: t.to(device()) for key, t in inputs.items()}, labels.to(device()), weight


def stepper(built: Built, inputs: dict[str, Tensor], labels: Tensor, weight: int) -> Callable[[], None]:
    """A function that takes one optimizer step: forward, backward, clipping, AdamW."""
    optimizer, learned = adamw([{"params": built.trainable, "lr": 1e-4}], fused=True), built.trainable
    kind = device().type

    def step() -> None:
        take_step(built.model, built.objective, inputs, labels, weight, optimizer, learned, CLIP, built.autocast)
        if kind == "cuda":
            torch.cuda.synchronize()

    return step
