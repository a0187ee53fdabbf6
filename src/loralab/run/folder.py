"""A run folder: run.json first, metrics.jsonl and checkpoint/ as it goes, predictions and, last, result.json.

Whoever finds result.json finds everything else whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loralab.disk import read_header, read_tensors
from loralab.errors import UserError
from loralab.run.settings import NOT_RESULT


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def check(self, settings: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
        """The finished result if there is one to resume; UserError if the folder is not this run's to use."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file, expected a folder")
        if not (self.path / "run.json").exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise UserError(f"--out {self.path} holds other files: choose an empty or a new folder")
            self._check_writable()
            return None
        if not resume:
            raise UserError(f"--out {self.path} holds another run: choose a new folder, or go on with --resume")
        before = read_header(self.path / "run.json").get("settings", {})
        if keys := changed(before, settings):
            told = ", ".join(f"{key} was {before.get(key)}, now {settings[key]}" for key in keys)
            raise UserError(f"--resume {self.path}: {told}; a run goes on only with its own settings")
        self._check_writable()
        return read_header(self.result) if self.result.exists() else None

    def _check_writable(self) -> None:
        there = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"--out {self.path}: no permission to write in {there}; choose another folder")

    def begin(self, run: Mapping[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be made ({error.strerror}): choose another folder") from error
        write_json(self.path / "run.json", run)
        self.write_metrics([])

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def write_checkpoint(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """progress.json and state.safetensors; the old checkpoint stays until the new one is whole."""
        fresh = self.path / "checkpoint.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(
            {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, fresh / "state.safetensors"
        )
        write_json(fresh / "progress.json", progress)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        os.replace(fresh, self.checkpoint)

    def read_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not (self.checkpoint / "progress.json").exists():
            return None
        return read_header(self.checkpoint / "progress.json"), read_tensors(self.checkpoint / "state.safetensors")

    def finish(self, result: Mapping[str, Any], predictions: Mapping[str, Tensor]) -> None:
        """`predictions`: SPLIT/logits (rows, outputs) float32 and SPLIT/labels (rows,) at the selected epoch."""
        temporary = self.path / "predictions.safetensors.tmp"
        save_file(dict(predictions), temporary)
        os.replace(temporary, temporary.with_suffix(""))
        write_json(self.result, result)
        shutil.rmtree(self.checkpoint, ignore_errors=True)


def changed(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The settings that decide a result and read otherwise than those of a run.json."""
    now = json.loads(json.dumps(dict(settings)))
    return [key for key in now if key not in NOT_RESULT and before.get(key) != now[key]]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    _replace(path, json.dumps(data, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
