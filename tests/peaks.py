"""Planned against measured peaks; `python tests/peaks.py` prints the table of docs/memory.md, a fresh process a row."""

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from loralab import models
from loralab.train.memory import Peak
from loralab.train.planner import Setup, Step, plan

SHAPE = {"model": "minilm", "batch": 32, "length": 64, "dtype": "bfloat16"}
SETUPS = {
    "lora, q and v": Setup(**SHAPE, targets="attention-qv"),
    "lora, all linear": Setup(**SHAPE),
    "dora, all linear": Setup(**SHAPE, method="dora"),
    "vera, all linear": Setup(**SHAPE, method="vera"),
    "full": Setup(**SHAPE, method="full"),
    "lora, q and v, nf4": Setup(**SHAPE, targets="attention-qv", store="nf4"),
}


def measured(name: str) -> tuple[int, int]:
    """(peak resident memory of three steps, of the loading before too), above what imports take, in a fresh process."""
    out = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    training, loading = json.loads(out.stdout.splitlines()[-1])
    return training, loading


def measure(setup: Setup) -> tuple[int, int]:
    torch.set_num_threads(1)
    _warm(setup)
    peak = Peak()
    before = peak.before
    model, _tokenizer = models.classifier(setup.model, setup.labels, False, torch.float32, seed=0)
    step = Step(model, setup)
    loading = peak.reached - before
    peak = Peak()
    for _ in range(3):
        step(setup)
    return peak.reached - before, loading


def _warm(setup: Setup) -> None:
    """Loads the libraries, kernels and tokenizer that a step needs: what the imports take."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    models.classifier(setup.model, setup.labels, False, torch.float32, seed=0)
    config = AutoConfig.from_pretrained(models.resolve(setup.model), num_hidden_layers=1)
    small = Setup(**{**asdict(setup), "batch": 2, "length": 8})
    Step(AutoModelForSequenceClassification.from_config(config), small)(small)


def table() -> None:
    print("| setting | tensors | planned | measured | measured / planned | while loading: planned | measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    worst = 0.0
    for name, setup in SETUPS.items():
        planned, (training, loading) = plan(setup), measured(name)
        ratio = training / planned.training
        worst = max(worst, abs(ratio - 1))
        mb = [
            f"{value / 1e6:.0f} MB" for value in (planned.tensors, planned.training, training, planned.loading, loading)
        ]
        print(f"| {name} | {mb[0]} | {mb[1]} | {mb[2]} | {ratio:.3f} | {mb[3]} | {mb[4]} |", flush=True)
    print(f"\nlargest deviation {worst:.1%}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(SETUPS[sys.argv[1]])))
    else:
        table()
