"""Tools around a model: torch.compile, torch.export and ONNX of a merged one, Lightning, mixed precision in Trainer."""

import copy
import warnings

import pytest
import torch
from archs import build, rows, shake
from test_steps import LENGTH, STEPPED
from transformers import Trainer, TrainingArguments

import loralab

LABELS = torch.tensor([0, 1, 2, 1, 0])
STEPS = 6
METHODS = {  # method -> settings
    "lora": {"rank": 3, "alpha": 5.0}, "dora": {"rank": 3, "alpha": 5.0}, "vera": {"rank": 7},
    **{name: {"rank": 4, **LENGTH.get(name, {})} for name in STEPPED},
}  # fmt: skip


def attached(method="lora", kind="bert", std=0.1, **given):
    model = build(kind)
    settings = {"targets": "attention", "head": True, "seed": 3, **METHODS[method], **given}
    adapters = loralab.attach(model, method, name="a", **settings)
    shake(adapters, "a", std=std)
    return model, adapters


def sgd(adapters):
    return torch.optim.SGD(adapters.parameter_groups(lr=0.2), momentum=0.9)


def examples(count=24):
    batch = rows(count=count, seed=5)
    batch["attention_mask"][:] = 1
    return [{**{key: t[i] for key, t in batch.items()}, "labels": int(batch["input_ids"][i].sum() % 3)}
            for i in range(count)]  # fmt: skip


# ---- compile, export -------------------------------------------------------------------------------------------------


def given(kind, seed):
    """A batch; a decoder is asked for no cache of keys, which is no tensor."""
    return {**rows(seed=seed), **({"use_cache": False} if kind == "llama" else {})}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "delta-lora"])
def test_a_compiled_model_trains_as_the_plain_one(method):
    results = []
    for compiled in (False, True):
        model, adapters = attached(method)
        called = torch.compile(model.train(), backend="aot_eager") if compiled else model.train()
        optimizer, losses = sgd(adapters), []
        for seed in range(STEPS):
            loss = called(**rows(seed=seed), labels=LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, {key: t.detach() for key, t in adapters.state().items()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert abs(results[0][0][0] - results[0][0][-1]) > 1e-3
    for key, t in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], t, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trainer_compiles_an_adapted_model_and_saves_the_adapter(tmp_path):
    states = []
    for compiled in (False, True):
        model, adapters = attached()
        settings = TrainingArguments(
            str(tmp_path / str(compiled)), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
            use_cpu=True, report_to="none", disable_tqdm=True, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None, save_steps=4,
        )  # fmt: skip
        Trainer(model, settings, train_dataset=examples()).train()
        states.append(adapters.state())
        saved = loralab.load(build("bert"), tmp_path / str(compiled) / "checkpoint-4").state()
        assert all(torch.equal(t, saved[key]) for key, t in adapters.state().items())
    for key, t in states[0].items():
        torch.testing.assert_close(states[1][key], t, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "kind"), [("dora", "bert"), ("vera", "mpnet"), ("lora", "llama")])
def test_a_merged_model_is_exported_by_torch(method, kind):
    model, adapters = attached(method, kind, 0.5)
    plain = adapters.merge().eval()
    program = torch.export.export(plain, (), given(kind, 1), strict=False)
    batch = given(kind, 2)
    with torch.no_grad():
        right = model(**batch).logits
        torch.testing.assert_close(program.module()(**batch).logits, right, rtol=0, atol=1e-5)
        assert (build(kind)(**batch).logits - right).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("dora", "bert"), ("lora", "llama")])
def test_a_merged_model_is_exported_to_onnx(method, kind, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnx and onnxscript: pip install onnx onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, adapters = attached(method, kind, 0.5)
    plain = adapters.merge().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(plain, (), str(tmp_path / "m.onnx"), kwargs=given(kind, 1), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    batch = given(kind, 2)
    (logits, *_) = session.run(None, {each.name: batch[each.name].numpy() for each in session.get_inputs()})
    with torch.no_grad():
        right = model(**batch).logits
    torch.testing.assert_close(torch.from_numpy(logits), right, rtol=0, atol=1e-4)


# ---- Lightning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_lightning_takes_the_steps_of_a_plain_loop(method, accumulate, tmp_path):
    """It steps with a closure in which the forward and the backward pass run."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model, adapters):
            super().__init__()
            self.model, self.adapters = model, adapters

        def training_step(self, batch, _):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return sgd(self.adapters)

    data = torch.utils.data.DataLoader(examples(4 * STEPS * accumulate), batch_size=4)
    model, adapters = attached(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.3,
            accumulate_grad_batches=accumulate, default_root_dir=tmp_path,
        ).fit(Module(model.train(), adapters), data)  # fmt: skip
    plain, other = attached(method)
    optimizer = sgd(other)
    learned = [p for p in plain.train().parameters() if p.requires_grad]
    for number, batch in enumerate(data):
        (plain(**batch).loss / accumulate).backward()
        if number % accumulate == accumulate - 1:
            torch.nn.utils.clip_grad_norm_(learned, 0.3)
            optimizer.step()
            optimizer.zero_grad()
    before = attached(method)[1].state()
    for key, t in other.state().items():
        torch.testing.assert_close(adapters.state()[key], t, rtol=0, atol=1e-6)
    assert any((t - other.state()[key]).abs().max() > 1e-3 for key, t in before.items() if t.is_floating_point())
    if method in STEPPED:
        assert adapters.steps.count("a") == STEPS


# ---- mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "delta-lora"])
def test_trainer_in_bfloat16_takes_the_steps_of_autocast(method, tmp_path):
    data = examples(4 * STEPS)
    losses: list[float] = []

    class Told(Trainer):
        def training_step(self, *given, **more):
            loss = super().training_step(*given, **more)
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model, adapters = attached(method)
    start = {key: t.detach().clone() for key, t in adapters.state().items()}
    settings = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, bf16=True, use_cpu=True, max_grad_norm=0.0,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, save_steps=STEPS,
    )  # fmt: skip
    Told(model, settings, train_dataset=data, optimizers=(sgd(adapters), None)).train()
    for dtype in (torch.bfloat16, torch.float32):
        plain, other = attached(method)
        optimizer, own = sgd(other), []
        for i in range(STEPS):
            batch = torch.utils.data.default_collate(data[4 * i : 4 * i + 4])
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = plain.train()(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        assert own == pytest.approx(losses, abs=1e-6 if dtype == torch.bfloat16 else 0.1)
        assert dtype == torch.bfloat16 or own != losses
        if dtype == torch.bfloat16:
            assert all(torch.equal(t, adapters.state()[key]) for key, t in other.state().items())
    assert all(t.dtype == start[key].dtype for key, t in adapters.state().items())
    assert any(not torch.equal(t, start[key]) for key, t in adapters.state().items())
    saved = loralab.load(copy.deepcopy(build("bert")), tmp_path / f"checkpoint-{STEPS}").state()
    assert all(torch.equal(t, saved[key]) for key, t in adapters.state().items())
