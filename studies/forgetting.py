"""What does SmolLM2 forget when it learns SST-2? `python studies/forgetting.py --data DIR [--seeds 1]`.

Negative log-likelihood by token, and perplexity, of 200 sentences of Wikipedia (the longest of QNLI's validation rows,
which no training here has) before, and after SST-2 as a completion with LoRA and with full fine-tuning, at three
rates each; accuracy on SST-2 beside it. Runs are kept in runs/kinds and runs/forgetting and not run again.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from kinds import RUNS as OF_KINDS
from kinds import SST2
from torch.nn.functional import cross_entropy

from loralab import adapters, models
from loralab.data import glue
from loralab.run import Settings, train
from loralab.run.bar import Bar
from loralab.serve.loading import on_base

RUNS = Path("runs/forgetting")
SENTENCES = 200
OF_KINDS_LR = 1e-3
RATES = {"lora": (1e-4, 3e-4, 1e-3), "full": (1e-5, 3e-5, 1e-4)}


@torch.no_grad()
def losses(model: torch.nn.Module, tokenizer, texts: list[str]) -> list[float]:
    """Return the mean negative log-likelihood of the tokens of each text, after its first; nats."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids  # (1, tokens)
        logits = model(ids, use_cache=False).logits[0, :-1]  # (tokens - 1, vocabulary)
        found.append(cross_entropy(logits.float(), ids[0, 1:]).item())
    return found


def held_out_text(data: Path) -> list[str]:
    """Return the longest sentences of QNLI's validation rows, each once."""
    rows = glue.load("qnli", data).validation["validation"].texts
    return sorted({row[1] for row in rows}, key=lambda text: (-len(text.split()), text))[:SENTENCES]


def trained(data: Path, seed: int) -> Iterator[tuple[str, Settings]]:
    """Yield (what, settings) of the runs of a seed."""
    common = {**SST2, "data": data, "objective": "causal", "seed": seed, "resume": True}
    for method, rates in RATES.items():
        for lr in rates:
            shared = method == "lora" and lr == OF_KINDS_LR  # that of kinds.py, run there already
            out = OF_KINDS / f"sst2-completion-{seed}" if shared else RUNS / f"{method}-{lr:g}-{seed}"
            yield f"{method}, {lr:g}", Settings(**common, method=method, lr=lr, out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GLUE tasks")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    texts = held_out_text(given.data)
    base, tokenizer, _ = models.pretrained("smollm2", "CAUSAL_LM")
    before = losses(base, tokenizer, texts)
    print("| | SST-2, accuracy | nats a token | perplexity | more nats, mean (95 % over sentences) |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(f"| before | | {mean(before):.3f} | {math.exp(mean(before)):.1f} | |", flush=True)
    for seed in range(given.seeds):
        for what, settings in trained(given.data, seed):
            accuracy = train(settings, Bar())["metric"]["selected"]
            folder = settings.folder / "adapter"
            handle, _ = on_base("smollm2", adapters.read(folder), folder)
            after = losses(handle.model, tokenizer, texts)
            more = torch.tensor(after) - torch.tensor(before)  # (sentences,)
            half = 1.96 * float(more.std()) / math.sqrt(len(more))
            print(
                f"| {what}, seed {seed} | {accuracy:.3f} | {mean(after):.3f} | {math.exp(mean(after)):.1f} | "
                f"{float(more.mean()):+.3f} ({float(more.mean()) - half:.3f} to {float(more.mean()) + half:.3f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
