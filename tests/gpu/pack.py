"""What `make gpu-pack` packs of data and models: a few tasks of GLUE, and minilm in bfloat16 with their tokens alone.

    python tests/gpu/pack.py GLUE OUT

Rows of the embedding that no token of these tasks has are zero, so that an archive hardly grows by them.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from loralab import data, models

TASKS = ("cola", "mrpc")  # of the epochs, and of ten-epochs.toml
EMBEDDING = "embeddings.word_embeddings.weight"


def main() -> None:
    """Write OUT/glue and OUT/models/minilm."""
    glue, out = map(Path, sys.argv[1:])
    source, folder = Path(models.resolve("minilm")), out / "models/minilm"
    folder.mkdir(parents=True)
    for file in [*source.glob("*.json"), source / "vocab.txt"]:
        shutil.copyfile(file, folder / file.name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    used = set(tokenizer.all_special_ids)
    for name in TASKS:
        shutil.copytree(glue / name, out / "glue" / name, copy_function=shutil.copyfile)
        task = data.load(name, glue)
        for split in (task.train, *task.validation.values()):
            used.update(token for texts in split.texts for text in texts for token in tokenizer(text).input_ids)
    stored = load_file(source / "model.safetensors")
    tensors = {key: t.to(torch.bfloat16) if t.is_floating_point() else t for key, t in stored.items()}
    words = tensors[EMBEDDING]  # (vocabulary, d)
    unused = torch.ones(len(words), dtype=torch.bool)
    unused[sorted(used)] = False
    words[unused] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{len(used)} of {len(words)} tokens")


if __name__ == "__main__":
    main()
