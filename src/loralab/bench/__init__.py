"""Time and memory of loralab against PEFT, in one run on one machine: `loralab bench`.

Each backend has a process of its own, so that neither meets the other's environment, threads or allocator. They
alternate in turns of a few steps; while one measures, the other waits for its next request. The result is the ratio of
the two turn by turn, its median and quartiles. A step is the same work for both: weights, adapted layers, data, dropout
of the model, clipping, AdamW (docs/benchmarks.md).
"""

from loralab.bench.cases import Case, EpochCase, MixedCase
from loralab.bench.measure import Bench

__all__ = ["Bench", "Case", "EpochCase", "MixedCase"]
