"""Estimated and measured peaks: `make peaks` prints the tables of docs/memory.md, with a fresh process for each row."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loralab import models
from loralab.run.estimate import BlankStep, Estimate, EstimateSettings, estimate
from loralab.run.memory import Peak


def case(model: str, method: str, batch: int, length: int, **more: Any) -> EstimateSettings:
    return EstimateSettings(
        model=model, method=method, batch_size=batch, max_length=length, **{"dtype": "bfloat16", **more}
    )


FITTED = {  # constants of the estimate were chosen on these
    "minilm, lora, q and v, 32 x 64": case("minilm", "lora", 32, 64, targets="attention-qv"),
    "minilm, lora, 32 x 64": case("minilm", "lora", 32, 64),
    "minilm, dora, 32 x 64": case("minilm", "dora", 32, 64),
    "minilm, vera, 32 x 64": case("minilm", "vera", 32, 64),
    "minilm, full, 32 x 64": case("minilm", "full", 32, 64),
    "minilm, qlora, q and v, 32 x 64": case("minilm", "qlora", 32, 64, targets="attention-qv"),
}
CHECKED = {
    "minilm, lora, 16 x 128, float32": case("minilm", "lora", 16, 128, dtype="float32"),
    "minilm, vera, 64 x 40": case("minilm", "vera", 64, 40),
    "minilm, full, 8 x 96": case("minilm", "full", 8, 96),
    "mpnet, lora, q and v, 16 x 48": case("mpnet", "lora", 16, 48, targets="attention-qv"),
    "mpnet, dora, 8 x 128": case("mpnet", "dora", 8, 128),
    "mpnet, qlora, 24 x 32": case("mpnet", "qlora", 24, 32),
}


def measured(name: str) -> tuple[int, int]:
    """Return the peak resident memory of (steps, loading) above what imports take, measured in a fresh process."""
    out = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    training, loading = json.loads(out.stdout.splitlines()[-1])
    return training, loading


def measure(settings: EstimateSettings, steps: int = 4) -> tuple[int, int]:
    torch.set_num_threads(1)
    _warm(settings)
    peak = Peak()
    before = peak.before
    model, _tokenizer = models.classifier(settings.model, settings.labels, False, torch.float32, seed=0)
    step = BlankStep(model, settings)
    loading = peak.reached - before
    peak = Peak()
    for _ in range(steps):
        step(settings)
    return peak.reached - before, loading


def _warm(settings: EstimateSettings) -> None:
    """Load the libraries, kernels and tokenizer that a step needs, so that they count as imports."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(models.resolve(settings.model), num_hidden_layers=1)
    small = EstimateSettings(**{**asdict(settings), "batch_size": 2, "max_length": 8})
    BlankStep(AutoModelForSequenceClassification.from_config(config), small)(small)


def table(title: str, cases: dict[str, EstimateSettings]) -> None:
    print(f"{title}\n\n| model, method, batch x length | tensors | estimated | measured | error |", end="")
    print(" loading: estimated | measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    errors = []
    for name, settings in cases.items():
        (training, loading), found = measured(name), estimate(settings)
        errors.append(found.training / training - 1)
        print(_row(name, found, training, loading), flush=True)
    print(f"\nerrors {min(errors):+.1%} to {max(errors):+.1%}\n")


def _row(name: str, e: Estimate, training: int, loading: int) -> str:
    tensors, estimated, got, first, second = (
        f"{value / 1e6:.0f} MB" for value in (e.tensors, e.training, training, e.loading, loading)
    )
    return f"| {name} | {tensors} | {estimated} | {got} | {e.training / training - 1:+.1%} | {first} | {second} |"


def _machine() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(": ")[2] if lines else platform.machine()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure({**FITTED, **CHECKED}[sys.argv[1]])))
    else:
        libc, versions = " ".join(platform.libc_ver()), f"torch {torch.__version__}"
        print(f"{time.strftime('%Y-%m-%d')}, {_machine()}, one thread, {libc}, {versions}")
        print("error = estimated / measured - 1\n")
        table("Chosen on:", FITTED)
        table("Checked on:", CHECKED)
