"""The causal objective against TRL's SFTTrainer: the same rows and the same adapter start give the same losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_objectives import bases, rows_of  # noqa: F401 (a fixture)
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab import objectives
from loralab.data.batches import collate
from loralab.objectives import Encoding
from loralab.optimizers import adamw
from loralab.run.step import step

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'loralab[hub]'")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

STEPS, BATCH, RATE, LONGEST = 20, 4, 0.01, 12


def unfolded(folder: Path, alpha: float) -> None:
    """Take the scaling out of B again: an export folds it in, and training goes on from here."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaled = {key: t * (config["r"] / alpha) if "lora_B" in key else t for key, t in tensors.items()}
    save_file(scaled, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha, "alpha_pattern": {}}))


@pytest.mark.parametrize("kind", ["completion", "text"])
def test_twenty_steps_have_the_losses_of_sft_trainer(kind, bases, tmp_path):  # noqa: F811
    rows = rows_of(kind, STEPS * BATCH, 5)
    base, device = bases["llama"], torch.device("cpu")
    adapters = loralab.attach(AutoModelForCausalLM.from_pretrained(base), "lora", name="a", rank=3, alpha=5, seed=2)
    with torch.no_grad():
        for key, t in adapters.state("a").items():
            if key.endswith(".B"):
                t.normal_(std=0.05, generator=torch.Generator().manual_seed(7))
    adapters.export(tmp_path / "start", "a")
    unfolded(tmp_path / "start", alpha=5)

    theirs: list[float] = []

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *inputs, **more):
            loss = super().training_step(*inputs, **more)
            theirs.append(loss.item())
            return loss

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", max_length=LONGEST, bf16=False, gradient_checkpointing=False, dataset_num_proc=None,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "start"), is_trainable=True
    )
    trainer = InOrder(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = objectives.load(str(tmp_path / "rows.jsonl"), whole=True)
    objective = objectives.of(task)
    encoded = objective.encode(task, task.train, tokenizer, Encoding(LONGEST, train=True))
    assert kind == "text" or encoded.cut()
    objective.prepare(adapters.model)
    optimizer = adamw(adapters.parameter_groups(lr=RATE, weight_decay=0.0))
    learned = [p for p in adapters.model.parameters() if p.requires_grad]
    ours = []
    for i in range(STEPS):
        chosen = list(range(i * BATCH, (i + 1) * BATCH))
        batch = collate(encoded, chosen, tokenizer, device)
        weight = encoded.weight(chosen)
        loss = step(adapters.model.train(), objective, batch, encoded.labels[chosen], weight, optimizer, learned)
        ours.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert abs(ours[0] - ours[-1]) > 1e-3
