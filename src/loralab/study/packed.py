"""The predictions of a study's reported runs in one compressed file: gzip around safetensors, float16.

Labels, which all runs of a task share, are in it once. The file is written whole before the files of the runs are
removed, so a study that is killed in between loses nothing, and the next stage packs what is left.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loralab.disk import read_tensors, replacing
from loralab.errors import UserError

FILE = "predictions.safetensors.gz"
PREDICTIONS = "predictions.safetensors"  # of a run
LARGEST = 2**31  # bytes of the file, unpacked
LABELS = "labels"  # prefix of what runs share
EXACT = 2048  # up to here float16 has every whole number


@dataclass(frozen=True)
class Packed:
    """ADDRESS/SPLIT/logits (rows, outputs), ADDRESS/SPLIT/HASH (0,) that names the labels, labels/HASH (rows,)."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Packed | None":
        """The file of a study folder, None where there is none. Raises UserError for a damaged one."""
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            with gzip.open(file) as stream:
                content = stream.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise UserError(f"{file} holds more than {LARGEST:,} bytes, the most that is read here")
            return cls(load(content))
        except (OSError, EOFError, zlib.error, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}): bring it back from a copy, or remove it") from error

    def of(self, address: str) -> dict[str, Tensor]:
        """SPLIT/logits and SPLIT/labels of a run, as its own file had them, with logits rounded as `pack` does."""
        found: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            owner, _, rest = key.partition("/")
            split, _, what = rest.rpartition("/")
            if owner == address and what == "logits":
                found[f"{split}/logits"] = tensor.float()
            elif owner == address:
                found[f"{split}/labels"] = self.tensors[f"{LABELS}/{what}"]
        return found


def pack(folder: Path, store: Path, reported: Iterable[str], tuning: Iterable[str]) -> None:
    """Move the predictions of reported runs, by address, into the study's file; remove those of tuning runs."""
    before = Packed.read(folder)
    tensors = {} if before is None else dict(before.tensors)
    files = [(address, file) for address in reported if (file := store / address / PREDICTIONS).is_file()]
    for address, file in files:
        for key, tensor in read_tensors(file).items():
            split, _, what = key.rpartition("/")
            if what == "logits":
                tensors[f"{address}/{split}/logits"] = _narrow(tensor)
            else:
                name = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
                tensors[f"{address}/{split}/{name}"] = torch.empty(0)
                tensors[f"{LABELS}/{name}"] = tensor
    if files:
        with replacing(folder / FILE) as temporary:
            temporary.write_bytes(gzip.compress(save(tensors), mtime=0))
    for _, file in files:
        file.unlink()
    for address in tuning:
        (store / address / PREDICTIONS).unlink(missing_ok=True)


def _narrow(predictions: Tensor) -> Tensor:
    """Predictions in float16; those with numbers that it would change by more than a half, as counts, as they are."""
    return predictions if predictions.abs().nan_to_num(posinf=0).max() > EXACT else predictions.half()
