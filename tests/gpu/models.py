"""Small and large models on random weights, adapters off their start, and batches."""

import copy
import gc
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from loralab import attach, fast, recipe

GPU = torch.cuda.is_available()
TOY = "--toy" in sys.argv or not GPU
DEVICE = torch.device("cuda" if GPU else "cpu")
FLOAT, BF16 = torch.float32, torch.bfloat16
KINDS = ("bert", "roberta", "gpt2", "llama")
SETTINGS = {"rank": 4, "alpha": 6.0, "total_steps": 10, "wait": 0}  # of a method that has them
SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 80,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}


def shapes() -> dict[str, tuple[Any, Any, int, int]]:
    """Name -> class, config, rows and tokens of a batch."""
    classifier = hf.AutoModelForSequenceClassification
    small = {kind: (classifier, hf.AutoConfig.for_model(kind, **SMALL), 6, 16) for kind in KINDS}
    roberta = hf.RobertaConfig(**({**SMALL, "hidden_dropout_prob": 0.1} if TOY else {}))
    llama = hf.LlamaConfig(**(SMALL if TOY else LLAMA_1B), use_cache=False, tie_word_embeddings=True)
    rows = (2, 16, 2, 16) if TOY else (32, 128, 4, 1024)
    large = {
        "roberta-base": (classifier, roberta, *rows[:2]),
        "llama-1b": (hf.AutoModelForCausalLM, llama, *rows[2:]),
    }
    return small | large


SHAPES = shapes()


def fresh(shape: str, dtype: torch.dtype = FLOAT, device: torch.device = DEVICE) -> Any:
    """A model of that shape on random weights."""
    kind, config, _, _ = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        return kind.from_config(copy.deepcopy(config), dtype=dtype)


def build(kind: str, dtype: torch.dtype = FLOAT) -> Any:
    """A small classifier on the CPU, without dropout; its weights are numbers of bfloat16, in whichever dtype."""
    return copy.deepcopy(_built(kind)).to(dtype)


@cache
def _built(kind: str) -> Any:
    model = fresh(kind, device=torch.device("cpu"))
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model.bfloat16().eval()


def adapted(
    kind: str,
    method: str,
    device: Any,
    dtype: torch.dtype = FLOAT,
    store: str | None = None,
    moved: bool = False,
    moves: float = 0.1,
    quick: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """(model, adapters), the adapter off its start.

    `moved` puts the model on the device after attach, as Trainer does. `quick` is the dtype of the fast path.
    """
    model, factors = build(kind, dtype).to("cpu" if moved else device), recipe(method).factors
    settings = {key: value for key, value in SETTINGS.items() if hasattr(factors, key)}
    adapters = attach(model, method, name="a", head=True, store=store, **settings)
    shake(adapters, "a", moves)
    if quick:
        fast.enable(model, quick)
    return model.to(device), adapters


def shake(adapters: Any, name: str, moves: float = 0.1) -> None:
    """Move the tensors of an adapter by a tenth of their size, and what is zero by a tenth."""
    generator = torch.Generator().manual_seed(2)
    for role, t in adapters.tensors(name).values():
        if role != "head" and t.is_floating_point():
            size = float(t.detach().abs().mean()) or 1.0
            t.data += torch.randn(t.shape, generator=generator).to(t) * moves * size


def inputs(shape: str, count: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random tokens, a quarter of the rows with padding where the model is a classifier."""
    _, config, rows, length = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, (count or rows, length), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    if shape != "llama-1b":
        mask[: len(ids) // 4, -length // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids if shape == "llama-1b" else ids[:, 0] % 2}


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds a call; the device is idle at the end, and so at the next beginning."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    if GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    torch.cuda.empty_cache()
