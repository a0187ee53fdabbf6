"""Whichever package imports bitsandbytes, once loralab is imported it fetches no compiled code and says nothing.

A package `kernels` that notes what it is asked for stands where the real one, which asks a hub, would be. transformers
imports it to look at its version, which fetches nothing.
"""

import os
import subprocess
import sys
from itertools import permutations

import pytest

NOTES = "def get_kernel(*_, **__): open('fetched', 'w').close()\n"
FAKE = """import kernels_of_its_own, logging
logging.getLogger(__name__).warning("said at import")
def fetch():
    from kernels import get_kernel
    get_kernel()
def warn():
    logging.getLogger(__name__).warning("said later")
"""
TINY = "loralab.attach(torch.nn.Sequential(torch.nn.Linear(64, 64)), rank=2, store='nf4')"


def run(folder, code):
    """(exit code, what was printed, whether a kernel was fetched) of a process."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, (folder / "fetched").exists()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "code",
    [
        "import loralab, accelerate, transformers, peft, bitsandbytes",
        f"import transformers, accelerate, torch, loralab; {TINY}; import peft.tuners.lora.bnb",
        "import loralab, torch; from accelerate.utils.bnb import load_and_quantize_model; import bitsandbytes.nn",
    ],
)
def test_an_import_of_bitsandbytes_fetches_nothing_and_says_nothing(tmp_path, code):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text(NOTES)
    assert run(tmp_path, code) == (0, "", False)


@pytest.mark.parametrize("order", [*permutations(["loralab", "bitsandbytes.inner", "bitsandbytes"])])
def test_in_any_order_after_loralab_bitsandbytes_alone_cannot_import_kernels(tmp_path, order):
    """Also from a function that is called long after the import; `kernels_of_its_own` is another package."""
    (tmp_path / "kernels.py").write_text(NOTES)
    (tmp_path / "kernels_of_its_own.py").write_text("")
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("")
    (tmp_path / "bitsandbytes/inner.py").write_text(FAKE)
    refused = order.index("loralab") < order.index(
        "bitsandbytes.inner"
    )  # what was imported before loralab is beyond its reach
    imports = "\n".join(f"import {name}" for name in order)
    code, said, fetched = run(tmp_path, f"{imports}\nbitsandbytes.inner.fetch()")
    assert (code != 0, "said at import" in said, fetched) == (refused, not refused, not refused)
    assert not refused or "loralab lets bitsandbytes fetch no compiled code" in said
    code, said, fetched = run(tmp_path, f"{imports}\nimport kernels; kernels.get_kernel(); bitsandbytes.inner.warn()")
    assert (code, "said later" in said, fetched) == (0, True, True), "all other code can, and later warnings are seen"
