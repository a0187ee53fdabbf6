"""Methods that work at every step, inside training loops of other libraries, unchanged."""

import pytest
import torch
from accelerate import Accelerator
from archs import build, rows
from test_steps import STEPPED
from transformers import Trainer, TrainerCallback, TrainingArguments

import loralab
from loralab.methods.adalora import kept_gates

COUNT = 8


def examples():
    batch = rows(count=24, seed=5)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": int(ids.sum() % 3)}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


class Look(TrainerCallback):
    """Calls `seen(number)` when the gradients of a step are there and `after(number)` when it has been taken."""

    def __init__(self, seen=None, after=None):
        self.seen, self.after, self.number = seen, after, 0

    def on_pre_optimizer_step(self, *_, **__):
        if self.seen:
            self.seen(self.number)

    def on_optimizer_step(self, *_, **__):
        if self.after:
            self.after(self.number)
        self.number += 1


def run(model, tmp_path, look, accumulate=1, optimizer=None, **given):
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=COUNT, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
        gradient_accumulation_steps=accumulate, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        **given,
    )  # fmt: skip
    data = examples()
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data[:8], callbacks=[look],
                      optimizers=(optimizer, None))  # fmt: skip
    trainer.train()
    assert look.number == COUNT
    return trainer


def layers(adapters):
    return {path: layer.roles("default") for path, layer in adapters.layers.items()}


def copies(adapters):
    return {path: {role: t.detach().clone() for role, t in p.items()} for path, p in layers(adapters).items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dylora_draws_one_rank_a_step_for_all_layers(tmp_path, accumulate):
    model = build("bert")
    adapters = loralab.attach(model, "dylora", rank=4, targets="attention", head=True)
    used, drawn = [], []  # the rank of each micro-batch, of each step
    model.register_forward_hook(lambda *_: used.append(adapters.active.drawn["default"]))

    def seen(_):
        drawn.append(adapters.active.drawn["default"])
        for p in layers(adapters).values():
            assert p["B"].grad.any(0).nonzero().flatten().tolist() == list(range(drawn[-1]))

    run(model, tmp_path, Look(seen), accumulate)
    assert used == [rank for rank in drawn for _ in range(accumulate)]
    assert len(drawn) == COUNT
    assert len(set(drawn)) > 1


def test_frozen_dylora_leaves_other_rows_their_bits_after_adamw(tmp_path):
    model = build("bert")
    adapters = loralab.attach(model, "frozen-dylora", rank=4, targets="attention", head=True)
    before, moved = {}, []

    def seen(_):
        before.update(now=copies(adapters), rank=adapters.active.drawn["default"])

    def after(_):
        for path, p in layers(adapters).items():
            for role, axis in (("A", 1), ("B", 0)):
                changed = (p[role] != before["now"][path][role]).any(axis).nonzero().flatten().tolist()
                moved.append(changed == [before["rank"] - 1])

    run(model, tmp_path, Look(seen, after), weight_decay=0.1)
    assert len(moved) == COUNT * 2 * len(adapters.layers)
    assert all(moved)


def test_delta_lora_follows_from_its_step_on(tmp_path):
    model = build("bert")
    adapters = loralab.attach(
        model, "delta-lora", rank=3, alpha=5.0, wait=3, follow=2.0, targets="attention", head=True
    )
    taken = {}

    def after(number):
        if number + 1 == 3:
            taken.update(copies(adapters))

    run(model, tmp_path, Look(after=after), accumulate=2)
    s = 5 / 3
    for path, p in layers(adapters).items():
        assert torch.equal(p["Ak"], taken[path]["A"])
        assert torch.equal(p["Bk"], taken[path]["B"])
        u = adapters.layers[path].lower("default")
        own, start = p["B"] @ p["A"], taken[path]["B"] @ taken[path]["A"]
        torch.testing.assert_close(u.B @ u.A, s * own + 2 * s * (own - start), rtol=0, atol=1e-6)
        assert (own - start).abs().max() > 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adalora_closes_gates_as_its_budget_falls(tmp_path, accumulate):
    model = build("bert")
    adapters = loralab.attach(
        model, "adalora", rank=4, target_rank=2, total_steps=COUNT, tinit=1, tfinal=2, targets="attention", head=True
    )
    budgets, opened = [], []

    def after(number):
        factors = adapters.spec(None).recipe.factors
        budgets.append(factors.budget(number + 1, len(adapters.layers)))
        opened.append(sum(map(sum, kept_gates(layers(adapters)).values())))

    run(model, tmp_path, Look(after=after), accumulate)
    assert opened == budgets
    assert (opened[0], opened[-1]) == (4 * 8, 2 * 8)
    assert len(set(opened)) > 3


def test_lora_plus_groups_reach_the_optimizer_of_trainer(tmp_path):
    model = build("bert")
    adapters = loralab.attach(model, "lora+", rank=3, targets="attention", head=True)
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=1e-3, head_lr=2e-3))
    before, ratios = {}, []

    def seen(_):
        before.update({key: t.detach().clone() for key, t in adapters.state().items()})

    def after(number):
        rate = 1e-3 * (1 - number / COUNT)  # Trainer's linear schedule
        for key, (role, t) in adapters.tensors().items():
            expected = before[key] - rate * {"A": 1, "B": 16, "head": 2}[role] * t.grad
            torch.testing.assert_close(t.detach(), expected, rtol=1e-5, atol=1e-7)
            ratios.append(role)

    run(model, tmp_path, Look(seen, after), optimizer=optimizer, max_grad_norm=0.0)
    assert {"A", "B", "head"} == set(ratios)


@pytest.mark.parametrize("method", ["lora", *STEPPED])
def test_trainer_learns_evaluates_at_the_full_rank_and_saves(tmp_path, method):
    model = build("bert")
    more = {"total_steps": COUNT} if method == "adalora" else {}
    adapters = loralab.attach(model, method, rank=4, head=True, **more)
    before = copies(adapters)
    trainer = run(model, tmp_path / "t", Look(), eval_strategy="steps", eval_steps=2)
    reported = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(reported) == COUNT // 2
    learned = adapters.spec(None).recipe.learn
    assert all((p[role] != before[path][role]).any() for path, p in layers(adapters).items() if "pooler" not in path
               for role in learned if role != "A")  # fmt: skip
    merged = adapters.merge().eval()
    batch = torch.utils.data.default_collate(examples()[:8])
    with torch.no_grad():
        loss = merged(**batch).loss.item()
    assert reported[-1] == pytest.approx(loss, abs=1e-5)
    adapters.save(tmp_path / "adapter")
    loaded = build("bert")
    loralab.load(loaded, tmp_path / "adapter")
    with torch.no_grad():
        assert loaded(**batch).loss.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("method", STEPPED)
def test_an_optimizer_of_another_kind_stops_trainer_at_its_second_step(tmp_path, method):
    model = build("bert")
    more = {"total_steps": COUNT} if method == "adalora" else {}
    adapters = loralab.attach(model, method, rank=3, targets="attention", head=True, **more)

    class Quiet(torch.optim.SGD):
        """Looks like an optimizer of torch, but its step is another function, as in some bridges to other libraries."""

        def __init__(self, groups):
            super().__init__(groups, lr=1e-2)
            self.step = self.quietly

        @torch.no_grad()
        def quietly(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p -= group["lr"] * p.grad

    with pytest.raises(loralab.UserError, match="did not see"):
        run(model, tmp_path, Look(), optimizer=Quiet(adapters.parameter_groups()), lr_scheduler_type="constant")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerates_prepared_optimizer_takes_the_same_steps(accumulate):
    states = []
    for prepared in (False, True):
        model = build("bert").train()
        adapters = loralab.attach(model, "frozen-dylora", rank=4, targets="attention", head=True)
        adapters.add("also", "delta-lora", rank=2, wait=2, head=True)
        groups = adapters.parameter_groups(lr=1e-2, name="default") + adapters.parameter_groups(lr=1e-2, name="also")
        optimizer, accelerator = (
            torch.optim.AdamW(groups),
            Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        )
        called = model
        if prepared:
            called, optimizer = accelerator.prepare(model, optimizer)
        for number in range(6):
            with adapters.use("also" if number in (2, 3) else "default"):
                for part in range(accumulate):
                    batch = rows(seed=10 * number + part)
                    loss = called(**batch, labels=torch.tensor([0, 1, 2, 1, 0])).loss
                    if prepared:
                        with accelerator.accumulate(called):
                            accelerator.backward(loss)
                            optimizer.step()
                            optimizer.zero_grad()
                    else:
                        (loss / accumulate).backward()
                if not prepared:
                    optimizer.step()
                    optimizer.zero_grad()
        states.append({key: t.detach() for name in adapters.names for key, t in adapters.state(name).items()})
        assert {int(t) for key, t in adapters.state("also").items() if key.endswith(".step")} == {2}
    for key, t in states[0].items():
        torch.testing.assert_close(t, states[1][key], rtol=0, atol=1e-6)
