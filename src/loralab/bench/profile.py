"""Where the time of a training step goes: `python -m loralab.bench.profile --length 12`, PEFT and loralab, as Markdown.

Self time on the CPU by torch's profiler, of the operations that take most; the profiler's own cost is in it.
"""

import argparse

from torch.profiler import ProfilerActivity, profile

from loralab.bench.cases import Case
from loralab.bench.sides import SIDES, batch, stepper

WARM, STEPS = 5, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--side", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--most", type=int, default=12, help="operations shown")
    given = parser.parse_args()
    case = Case(model=given.model, method=given.method, length=given.length, dtype=given.dtype)
    for side in given.side:
        print(table(side, case, given.most))


def table(side: str, case: Case, most: int) -> str:
    built = SIDES[side](case)
    step = stepper(built, *batch(case, built.model.config))
    for _ in range(WARM):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            step()
    found = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in found)
    lines = [
        f"{side}, {whole / STEPS / 1e3:.0f} ms a step",
        "",
        "| operation | calls a step | share |",
        "| --- | ---: | ---: |",
    ]
    lines += [
        f"| `{event.key}` | {event.count // STEPS} | {event.self_cpu_time_total / whole:.0%} |"
        for event in found[:most]
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
