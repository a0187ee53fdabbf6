"""Planned against measured peaks: `make peaks` prints the tables of docs/memory.md, a fresh process a row."""

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
from loralab.run.estimate import Estimate, EstimateSettings, Step, estimate
from loralab.run.memory import Peak


def setup(model: str, method: str, batch: int, length: int, **more: Any) -> EstimateSettings:
    return EstimateSettings(
        model=model, method=method, batch_size=batch, max_length=length, **{"dtype": "bfloat16", **more}
    )


FITTED = {  # what is not derived was chosen on these
    "minilm, lora, q and v, 32 x 64": setup("minilm", "lora", 32, 64, targets="attention-qv"),
    "minilm, lora, 32 x 64": setup("minilm", "lora", 32, 64),
    "minilm, dora, 32 x 64": setup("minilm", "dora", 32, 64),
    "minilm, vera, 32 x 64": setup("minilm", "vera", 32, 64),
    "minilm, full, 32 x 64": setup("minilm", "full", 32, 64),
    "minilm, qlora, q and v, 32 x 64": setup("minilm", "qlora", 32, 64, targets="attention-qv"),
}
CHECKED = {
    "minilm, lora, 16 x 128, float32": setup("minilm", "lora", 16, 128, dtype="float32"),
    "minilm, vera, 64 x 40": setup("minilm", "vera", 64, 40),
    "minilm, full, 8 x 96": setup("minilm", "full", 8, 96),
    "mpnet, lora, q and v, 16 x 48": setup("mpnet", "lora", 16, 48, targets="attention-qv"),
    "mpnet, dora, 8 x 128": setup("mpnet", "dora", 8, 128),
    "mpnet, qlora, 24 x 32": setup("mpnet", "qlora", 24, 32),
}


def measured(name: str) -> tuple[int, int]:
    """(peak resident memory of a setting's steps, of the loading before), above what imports take: a fresh process."""
    out = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    training, loading = json.loads(out.stdout.splitlines()[-1])
    return training, loading


def measure(setup: EstimateSettings, steps: int = 4) -> tuple[int, int]:
    torch.set_num_threads(1)
    _warm(setup)
    peak = Peak()
    before = peak.before
    model, _tokenizer = models.classifier(setup.model, setup.labels, False, torch.float32, seed=0)
    step = Step(model, setup)
    loading = peak.reached - before
    peak = Peak()
    for _ in range(steps):
        step(setup)
    return peak.reached - before, loading


def _warm(setup: EstimateSettings) -> None:
    """Loads the libraries, kernels and tokenizer that a step needs: what the imports take."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(models.resolve(setup.model), num_hidden_layers=1)
    small = EstimateSettings(**{**asdict(setup), "batch_size": 2, "max_length": 8})
    Step(AutoModelForSequenceClassification.from_config(config), small)(small)


def table(title: str, settings: dict[str, EstimateSettings]) -> None:
    print(f"{title}\n\n| model, method, batch x length | tensors | planned | measured | error |", end="")
    print(" loading: planned | measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    errors = []
    for name, setup in settings.items():
        (training, loading), p = measured(name), estimate(setup)
        errors.append(p.training / training - 1)
        print(_row(name, p, training, loading), flush=True)
    print(f"\nerrors {min(errors):+.1%} to {max(errors):+.1%}\n")


def _row(name: str, p: Estimate, training: int, loading: int) -> str:
    tensors, planned, got, first, second = (
        f"{value / 1e6:.0f} MB" for value in (p.tensors, p.training, training, p.loading, loading)
    )
    return f"| {name} | {tensors} | {planned} | {got} | {p.training / training - 1:+.1%} | {first} | {second} |"


def _machine() -> str:
    told = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return told[0].partition(": ")[2] if told else platform.machine()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure({**FITTED, **CHECKED}[sys.argv[1]])))
    else:
        libc, versions = " ".join(platform.libc_ver()), f"torch {torch.__version__}"
        print(f"{time.strftime('%Y-%m-%d')}, {_machine()}, one thread, {libc}, {versions}")
        print("error = planned / measured - 1\n")
        table("Chosen on:", FITTED)
        table("Checked on:", CHECKED)
