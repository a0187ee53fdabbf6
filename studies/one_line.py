"""What does one line gain in your own Trainer? `python studies/one_line.py --data DIR [--repeats 3]`.

The same script with PEFT, with `loralab.attach`, and with `attach` and `adapters.fast()`: Trainer(bf16=True) on minilm
and mpnet (MRPC, batch 32) and TRL's SFTTrainer on smollm2 (4 rows of 256 tokens), LoRA of rank 8 on all linear layers.
Each side runs in fresh processes that take turns; a time is the median of the steps after the third. By default the
environment lets all keep freed memory for the next step; with `--allocator own` all have the C library's settings. For
a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("peft", "attach", "fast")
STEPS, WARM = 13, 3
ALLOCATOR = {"equal": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}, "own": {}}  # --allocator
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
MPNET = ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"minilm": BERT, "mpnet": MPNET, "smollm2": LLAMA}


def under(side: str, model, name: str, head: list[str]):
    """Return the model with a LoRA of one side."""
    if side == "peft":
        import peft

        return peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[name], modules_to_save=head or None)
        )
    import loralab

    adapters = loralab.attach(model, "lora", rank=8, alpha=16, targets=TARGETS[name], head=head)
    if side == "fast":
        adapters.fast()  # the line
    return model


def trainer_of(side: str, name: str, data: Path, folder: str):
    """Return a Trainer, or for smollm2 an SFTTrainer, that takes STEPS steps."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from loralab import models
    from loralab.data import glue

    rows = glue.load("mrpc", data).train
    common = {
        "output_dir": folder, "max_steps": STEPS, "bf16": True, "report_to": [], "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    if name == "smollm2":
        from trl import SFTConfig, SFTTrainer

        model, tokenizer, _ = models.pretrained(name, "CAUSAL_LM")
        texts = [" ".join(" ".join(pair) for pair in rows.texts[i : i + 12]) for i in range(0, 12 * 4 * STEPS, 12)]
        settings = SFTConfig(**common, per_device_train_batch_size=4, max_length=256, gradient_checkpointing=False)
        given = Dataset.from_dict({"text": texts})
        return SFTTrainer(under(side, model, name, []), settings, train_dataset=given, processing_class=tokenizer)
    model, tokenizer, _ = models.pretrained(name, "SEQ_CLS", 2)
    count = 32 * STEPS
    given = [
        {**tokenizer(*pair, truncation=True, max_length=128), "labels": label}
        for pair, label in zip(rows.texts[:count], rows.labels[:count], strict=True)
    ]
    settings = TrainingArguments(**common, per_device_train_batch_size=32)
    model = under(side, model, name, ["classifier"])
    return Trainer(model, settings, train_dataset=given, processing_class=tokenizer)


def run(side: str, name: str, data: Path) -> dict[str, float]:
    """Return the median of a step's milliseconds, and the loss, of one run of one side."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_, **__) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            self.times.append(1000 * (time.perf_counter() - self.began))

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(side, name, data, folder)
        trainer.add_callback(clock)
        loss = trainer.train().training_loss
    return {"ms": statistics.median(clock.times[WARM:]), "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GLUE tasks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--allocator", choices=ALLOCATOR, default="equal")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run(given.side, given.only[0], given.data)))
        return
    print("| model | side | a step | faster than PEFT | loss |\n| --- | --- | ---: | ---: | ---: |")
    for name in given.only:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for repeat in range(given.repeats):
            for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                command = [sys.executable, __file__, "--data", str(given.data), "--only", name, "--side", side]
                env = os.environ | ALLOCATOR[given.allocator]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        for side, runs in found.items():
            ratios = [peft["ms"] / own["ms"] for peft, own in zip(found["peft"], runs, strict=True)]
            print(
                f"| {name} | {side} | {statistics.median(r['ms'] for r in runs):.0f} ms | "
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) | {runs[0]['loss']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
