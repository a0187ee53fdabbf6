"""The operations that take most of a training step: self time by torch's profiler, whose own cost is in it."""

from typing import Any

from torch.profiler import ProfilerActivity, profile

from loralab.bench.backends import BACKENDS, batch, stepper
from loralab.bench.cases import Case

WARM, STEPS = 5, 20
MOST = 12  # operations


def measure(backend: str, case: Case) -> dict[str, Any]:
    """Seconds of a step, and the operations that take most of it, each with its calls and its share of the time."""
    built = BACKENDS[backend](case)
    step = stepper(built, *batch(case, built.model.config))
    for _ in range(WARM):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)  # microseconds
    operations = [
        {"name": event.key, "calls": event.count // STEPS, "share": event.self_cpu_time_total / total}
        for event in events[:MOST]
    ]
    return {"seconds": total / STEPS / 1e6, "operations": operations}
