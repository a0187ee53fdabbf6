"""Time and memory of loralab against PEFT, in one run on one machine: `loralab bench`.

Each side has a process of its own, so that neither meets the other's environment, threads or allocator. They take turns
of a few steps; while one measures, the other waits for its next line. What is told is the ratio turn by turn, its
median and quartiles. A step is the same work on both sides: weights, layers adapted, data, dropout of the model,
clipping, AdamW (docs/benchmarks.md).
"""

from loralab.bench.cases import Case, EpochCase
from loralab.bench.conduct import Bench

__all__ = ["Bench", "Case", "EpochCase"]
