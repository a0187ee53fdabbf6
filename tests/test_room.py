"""Room for runs: parts of a GPU, groups that run out of memory go on in smaller ones, and what is said of failures."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from test_together import history, settings

from loralab import UserError
from loralab.run import loop as loop_module
from loralab.run import room, train_together
from loralab.run.sharing import passes
from loralab.run.state import OutOfMemory, RunFailed
from loralab.study import failures, in_processes
from loralab.study.bar import StudyBar
from loralab.study.in_processes import InProcesses
from loralab.study.record import ScheduledRun, Study

GB = 1e9


@pytest.fixture
def card(monkeypatch):
    """`card(bytes)` stands in for a GPU of that size; it returns the fractions that are asked for."""
    monkeypatch.setattr(room, "PASS_BYTES", dict(room.PASS_BYTES))

    def made(total):
        fractions = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(total)))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
        return fractions

    return made


# ---- parts of a card -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [12 * GB, 24 * GB, 80 * GB, 141 * GB])
@pytest.mark.parametrize("count", [1, 2, 7, 15, 40])
def test_processes_share_a_card_or_are_refused_with_a_number_that_fits(card, total, count):
    fractions = card(total)
    try:
        room.share_card(count)
    except UserError as error:
        most = int(str(error).rpartition("processes:")[2].split()[0])
        assert most < count
        room.share_card(most)
        count = most
    (fraction,) = fractions
    assert count * (fraction * total + room.CONTEXT) == pytest.approx(total)
    assert room.PASS_BYTES["cuda"] == pytest.approx(min(4e9, fraction * total / 2))


def test_a_process_alone_takes_as_much_a_pass_as_ever(card):
    card(80 * GB)
    room.share_card(15)
    assert 1e9 < room.PASS_BYTES["cuda"] < 4e9
    room.share_card(1)
    assert room.PASS_BYTES["cuda"] == room.ON_GPU == 4e9


def test_without_a_gpu_nothing_is_limited(monkeypatch):
    before = dict(room.PASS_BYTES)
    room.share_card(1000)
    assert before == room.PASS_BYTES


def test_passes_keep_within_the_part(card, monkeypatch):
    card(80 * GB)
    monkeypatch.setattr("loralab.run.sharing.PASS_BYTES", room.PASS_BYTES)
    monkeypatch.setattr("loralab.run.sharing.width", lambda rows, chosen: 10)
    progress = SimpleNamespace(step=1, bytes_per_token=2e6)  # 30 rows of 10 tokens: 0.6 GB a run
    states = [SimpleNamespace(progress=progress, run=SimpleNamespace(train=None)) for _ in range(9)]
    sizes = []
    for count in (1, 15):
        room.share_card(count)
        sizes.append([len(group) for group in passes(states, [list(range(30))] * 9, "cuda")])
    assert sizes == [[6, 3], [3, 3, 3]]


ERRORS = {
    "of torch": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
    "of cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    "of cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
    "on a CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
    "of Python": (MemoryError(), True),
    "another": (RuntimeError("CUDA error: device-side assert triggered"), False),
    "a text": (ValueError("out of memory"), False),
}


@pytest.mark.parametrize("name", ERRORS)
def test_which_errors_are_for_want_of_memory(name):
    error, expected = ERRORS[name]
    assert room.is_out_of_memory(error) == expected


# ---- smaller groups --------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("most", [2, 1])
def test_a_group_that_is_out_of_memory_goes_on_in_halves_to_the_same(tiny, own, tmp_path, monkeypatch, most):
    """It has steps with memory first, so halves go on from checkpoints of the whole."""
    given = {"train_rows": 60, "epochs": 2, "dtype": "float32"}
    whole = train_together([settings(tiny, own, tmp_path / f"whole{i}", seed=i, **given) for i in range(3)])
    backward, groups = loop_module.Loop._backward, []

    def short(self, states, chosen):
        if not groups or groups[-1] is not self.states:
            groups.append(self.states)
        if len(self.states) > most and max(state.progress.epoch for state in states) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return backward(self, states, chosen)

    monkeypatch.setattr(loop_module.Loop, "_backward", short)
    outcomes = train_together([settings(tiny, own, tmp_path / f"{i}", seed=i, **given) for i in range(3)])
    assert [len(states) for states in groups] == {2: [3, 2, 1], 1: [3, 2, 1, 1, 1]}[most]
    for i, (one, other) in enumerate(zip(outcomes, whole, strict=True)):
        assert one["metric"] == other["metric"]
        for a, b in zip(history(tmp_path / f"{i}"), history(tmp_path / f"whole{i}"), strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)


def test_alone_it_fails_and_says_what_to_do(tiny, own, tmp_path, monkeypatch):
    def short(self, states, chosen):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(loop_module.Loop, "_backward", short)
    (outcome,) = train_together([settings(tiny, own, tmp_path / "a", train_rows=60)])
    assert isinstance(outcome, OutOfMemory)
    for part in ("CUDA out of memory", "accumulate", "fewer --on processes:N", "traceback.txt"):
        assert part in str(outcome)


class Here:
    """A pool whose work is done in this process."""

    def submit(self, work, *given):
        done = Future()
        done.set_result(work(*given))
        return done


def test_processes_try_alone_again_what_was_out_of_memory_in_its_part(tmp_path, monkeypatch, tiny, own):
    """The last resort: with no other process at work; what another reason ended is not tried again."""
    calls, parts = [], []
    reasons = {1: OutOfMemory("x"), 3: RunFailed("of a bug"), 4: OutOfMemory("never enough")}

    def run(many, reporter, adapters):
        calls.append((parts[-1], [s.seed for s in many]))
        alone = parts[-1] == 1
        return [
            reasons[s.seed] if s.seed in reasons and not (alone and s.seed == 1) else {"seed": s.seed} for s in many
        ]

    monkeypatch.setattr(in_processes, "run_stored_together", run)
    monkeypatch.setattr(in_processes, "share_card", parts.append)
    runs = [settings(tiny, own, tmp_path / str(seed), seed=seed) for seed in range(6)]
    found = {s.seed: outcome for s, outcome in InProcesses(3, pool=Here()).run(runs, StudyBar(), True)}
    assert sorted(calls[:-2]) == [(3, [0, 1]), (3, [2, 3]), (3, [4, 5])]
    assert sorted(calls[-2:]) == [(1, [1]), (1, [4])]
    assert found == {s: reasons[s] if s in (3, 4) else {"seed": s} for s in range(6)}
    calls.clear()
    list(InProcesses(1, pool=Here()).run(runs, StudyBar(), True))
    assert len(calls) == 1  # it had the whole card


# ---- what is said ----------------------------------------------------------------------------------------------------


def failed_study(folder, messages):
    """A study whose runs failed: (cell, message) each."""
    schedule = []
    for i, ((task, method), text) in enumerate(messages):
        address = f"{i:016x}"
        place = folder / "store" / address
        place.mkdir(parents=True)
        whole = f"{place} failed: {text}; its traceback is in {place}/traceback.txt"
        (place / "failed.json").write_text(json.dumps({"error": whole}))
        schedule.append(ScheduledRun(task, "minilm", method, i, "final", {}, address, {}))
    compare = {"alpha": 0.05, "margin": {"default": 0.01}, "against": None}
    return Study(folder, "x", "", folder / "store", {}, compare, tuple(schedule), ())


def test_each_reason_is_said_once_with_its_runs_and_cells(tmp_path):
    torch_says = "OutOfMemoryError: Tried to allocate {} MiB"
    many = [((f"task{i % 5}", "lora"), torch_says.format(20 + i)) for i in range(40)]
    many += [(("cola", "dora"), "RuntimeError: cuDNN error")] * 2 + [(("rte", "vera"), "KeyError: 'a'")]
    text = failures.message(failed_study(tmp_path, many))
    assert text.startswith("43 runs failed: OutOfMemoryError: Tried to allocate 20 MiB (40 runs: task0 minilm lora, ")
    assert text.count("OutOfMemoryError") == text.count("cuDNN") == text.count("traceback") == 1
    assert "task2 minilm lora and 2 more); RuntimeError: cuDNN error (2 runs: cola minilm dora); KeyError" in text
    assert len(text) < 600


def test_of_many_reasons_the_most_frequent_are_said(tmp_path):
    many = [((f"t{i}", "lora"), f"{'ABCDE'[i]}Error: no") for i in range(5) for _ in range(i + 1)]
    text = failures.message(failed_study(tmp_path, many))
    assert [text.count(f"{letter}Error") for letter in "ABCDE"] == [0, 0, 1, 1, 1]
    assert "and 2 other reasons" in text
    one = failures.message(failed_study(tmp_path / "one", many[:1]))
    assert f"{tmp_path}/one/store/{0:016x}/failed.json" in one


def test_runs_that_are_trained_count_until_their_group_has_ended():
    """The time left of a study went from minutes to hours while the last runs were evaluated."""
    at = [0.0] * 4
    told = in_processes.Told(at, 1)
    told.start("", 30, 10)
    told.advance(20, 0.5)
    told.stop()
    assert at == [0, 0, 30, 30]
    told.nothing()
    assert at == [0.0] * 4
