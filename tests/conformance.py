"""docs/conformance.md: what each method was compared with, how far apart they were, and where PEFT and papers differ.

`python tests/conformance.py` measures and writes the page; a test compares all of it but the digits.
"""

import re
from pathlib import Path

import conftest  # noqa: F401  (offline, one thread)
import measure
from deviations import DEVIATIONS
from peft_oracle import PEFT

from loralab.recipe import NAMED

PAGE = Path(__file__).parents[1] / "docs/conformance.md"
COLUMNS = {"equation": measure.EQUATIONS, "steps": measure.STEPS, "start": measure.STARTS, "PEFT": PEFT}
NUMBER = re.compile(r"\b\d\.\de[-+]\d\d\b")
TEXT = """# Conformance

Written by `python tests/conformance.py` from the tables that the tests run; a test fails where this page is not theirs.

## Methods

The largest absolute difference found, of values up to some hundreds in the first column and up to ten in the others.
The tests (`tests/test_methods.py`, `tests/test_peft.py`) bound the columns by 1e-11 (qdora by 1e-5: the lengths of rows
kept in few bits are float32), 1e-10, 1e-5 and 1e-5. In an empty cell there is nothing to compare beyond the other
cells, or PEFT has no such method.

* **equation**: output and all gradients of one 13 x 11 layer (12 x 10 for SuperLoRA and OFT) with dropout 0.3,
  against the paper's formula in loops (`tests/literal.py`), float64.
* **steps**: parameters after some steps against the paper's algorithm by hand, float64. For delta-lora that is 50 AdamW
  steps of the algorithm that writes to W, for adalora 17 steps with sensitivities value by value, else 6 steps of SGD.
* **start**: A and B against the rule by eigenvectors or Gram-Schmidt, computed in float32. The starts of eva and
  lora-ga are compared in `tests/test_starts.py`.
* **PEFT**: outputs, the gradient of every tensor that learns, and outputs of the merged model, of a BERT of two layers,
  float32; for lora+ the parameters after 5 AdamW steps over PEFT's groups.

{methods}

No layer is adapted by {without}: there is no equation to compare. The forms of SuperLoRA beyond the named rows are in
`tests/test_superlora.py`, rank maps in `tests/test_ranks.py`.

## Where PEFT and the papers differ

PEFT {version}. Each row is shown by a test, for PEFT and for loralab. What the papers say is taken from abstracts, the
authors' code and secondary copies; *not said* means not found there.

{deviations}

PEFT's folders of LoRA, rsLoRA, DoRA, VeRA, LoHa, MiSS, IA3, OFT and AdaLoRA, of PiSSA and OLoRA (whose moved base is
made again from W), with `rank_pattern` and `alpha_pattern` (a rank map), with `target_parameters`, `bias` and
`trainable_token_indices` load as the same function.
Any other setting that would change the function is refused: PEFT's randomised PiSSA, LoftQ, CorDA and LoRA-GA move the
base in a way that is not made again here.
"""


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(number):
    """The page; `number(measure)` gives the text of a difference."""
    import peft

    methods = [
        [name, *(number(column[name]) if name in column else "" for column in COLUMNS.values())]
        for name in NAMED
        if name not in measure.WITHOUT
    ]
    differ = [[what, d.paper, d.peft, d.loralab] for what, d in sorted(DEVIATIONS.items())]
    return TEXT.format(
        methods=table(["method", *COLUMNS], methods),
        without=", ".join(measure.WITHOUT),
        version=".".join(peft.__version__.split(".")[:2]),
        deviations=table(["what", "paper", "PEFT", "loralab"], differ),
    )


def without_digits(text):
    return NUMBER.sub("#", text)


if __name__ == "__main__":
    PAGE.write_text(page(lambda measured: f"{measured():.1e}"))
