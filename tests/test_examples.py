"""The five scripts of examples/, each beside PEFT's version: the same losses, and checkpoints that are adapters."""

import difflib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from archs import SIZES, rows, shake
from conftest import REPO
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoformerModel,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    CLIPModel,
    ConvNextModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    ResNetModel,
    Trainer,
)

import loralab

peft = pytest.importorskip("peft")
SCRIPTS = {  # script -> the packages that it needs beside
    "classification": (), "tagging": (), "chat": ("trl", "datasets"), "preferences": ("trl", "datasets"),
    "embeddings": ("sentence_transformers", "datasets"),
}  # fmt: skip
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
STEPS = 20


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """An encoder and a decoder with random weights, and a tokenizer of single characters."""
    root = tmp_path_factory.mktemp("bases")
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **names, eos_token="[SEP]", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.chat_template = CHAT
    sizes = {**SIZES, "max_position_embeddings": 128, "pad_token_id": 0}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(4)
    made = {
        "encoder": AutoModel.from_config(BertConfig(**sizes, **quiet)),
        "decoder": AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=2, eos_token_id=3)
        ),
    }
    for kind, model in made.items():
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in made}


class Starts:
    """The same start for both libraries: that of loralab's adapter with B off zero, copied into PEFT's."""

    def __init__(self, monkeypatch) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []
        self.adapters = None
        attach, given, step = loralab.attach, peft.get_peft_model, Trainer.training_step

        def ours(*args, **settings):
            self.adapters = attach(*args, **settings)
            with torch.no_grad():
                for key, t in self.adapters.state().items():
                    if key.endswith(".B"):
                        t.normal_(std=0.05, generator=torch.Generator().manual_seed(len(key)))
            self.start = {key: t.detach().clone() for key, t in self.adapters.state().items()}
            return self.adapters

        def theirs(*args, **settings):
            model = given(*args, **settings)
            self.fill(model)
            return model

        def training_step(trainer, *args, **more):
            loss = step(trainer, *args, **more)
            self.losses.append(loss.item())
            return loss

        monkeypatch.setattr(loralab, "attach", ours)
        monkeypatch.setattr(peft, "get_peft_model", theirs)
        monkeypatch.setattr(Trainer, "training_step", training_step)

    def fill(self, model: torch.nn.Module) -> None:
        """Put the start into a model of PEFT."""
        learned = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert len(learned) == len(self.start)
        with torch.no_grad():
            for key, t in self.start.items():
                path, _, role = key.rpartition(".")
                own = f"lora_{role}.default.weight" if role in "AB" else f"modules_to_save.default.{role}"
                (found,) = [p for k, p in learned.items() if k.endswith(f"{path}.{own}")]
                found.copy_(t)


@pytest.fixture
def starts(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(REPO / "examples"), str(REPO / "examples" / "with_peft")])
    return Starts(monkeypatch)


def script(name: str, folder: str):
    """The module of a script, anew."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", REPO / "examples" / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_both(name, bases, starts, monkeypatch, folder, *more):
    """The losses of both scripts, and the last trainer of ours."""
    for package in SCRIPTS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    base = bases["decoder" if "trl" in SCRIPTS[name] else "encoder"]
    torch.manual_seed(1)
    trainer = script(name, "").main(base, str(folder / "ours"), *more)
    ours = starts.losses.copy()
    starts.losses.clear()
    if name == "embeddings":
        from sentence_transformers import SentenceTransformer

        add = SentenceTransformer.add_adapter
        monkeypatch.setattr(SentenceTransformer, "add_adapter", lambda m, c: (add(m, c), starts.fill(m)))
    script(name, "with_peft").main(base, str(folder / "theirs"), *more)
    return ours, starts.losses, trainer


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_losses_of_peft_and_leaves_an_adapter(name, bases, starts, monkeypatch, tmp_path):
    ours, theirs, _ = run_both(name, bases, starts, monkeypatch, tmp_path)
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[0] - ours[-1]) > 1e-3
    checkpoint, plain = tmp_path / "ours" / "checkpoint-20", tmp_path / "theirs" / "checkpoint-20"
    assert sizes(checkpoint)[0] == sizes(plain)[0]
    assert sizes(checkpoint)[1] <= 64_000
    for folder in (checkpoint, tmp_path / "ours"):
        again = loralab.load(plain_model(name, bases), folder)
        for key, t in starts.adapters.state().items():
            if folder == checkpoint and name != "classification":  # whose best checkpoint may be an earlier one
                assert torch.equal(again.state()[key], t), key
        with pytest.raises(Exception, match=r"loralab\.load"):
            type(again.model).from_pretrained(folder)


def plain_model(name, bases):
    """A base such as the script loads."""
    if name in ("chat", "preferences"):
        return AutoModelForCausalLM.from_pretrained(bases["decoder"])
    if name == "embeddings":
        return AutoModel.from_pretrained(bases["encoder"])
    kind = AutoModelForSequenceClassification if name == "classification" else AutoModelForTokenClassification
    return kind.from_pretrained(bases["encoder"], num_labels=2 if name == "classification" else 4)


def sizes(folder: Path) -> tuple[int, int]:
    """(bytes of the tensors of adapters, bytes of the other files of adapters) in a folder."""
    tensors = other = 0
    for file in folder.iterdir():
        if file.name in ("model.safetensors", "adapter_model.safetensors"):
            header = int.from_bytes(file.read_bytes()[:8], "little")
            tensors += file.stat().st_size - 8 - header
            other += 8 + header
        elif file.name in ("adapter.json", "adapter_config.json", "config.json"):
            other += file.stat().st_size
        else:
            assert not file.name.startswith(("adapter", "model", "pytorch_model"))
    return tensors, other


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_differs_from_that_of_peft_in_the_lines_of_the_adapter(name):
    one, other = ((REPO / "examples" / folder / f"{name}.py").read_text().splitlines() for folder in ("", "with_peft"))
    changed = [line for line in difflib.ndiff(one, other) if line[:2] in ("- ", "+ ") and line[2:].strip()]
    about = ("python examples", "loralab", "peft", "LoraConfig", "adapters", "DPOTrainer", "model, ref_model", ")")
    assert all(any(word in line for word in about) for line in changed), changed
    assert len([line for line in changed if line.startswith("- ")]) <= 6


def test_trainer_resumes_bit_for_bit_and_ends_with_the_best_checkpoint(bases, starts, tmp_path, caplog):
    main = script("classification", "").main
    torch.manual_seed(1)
    trainer = main(bases["encoder"], str(tmp_path / "whole"))
    whole, rest = {key: t.detach().clone() for key, t in starts.adapters.state().items()}, starts.losses[10:]
    best = loralab.load(plain_model("classification", bases), trainer.state.best_model_checkpoint)
    assert all(torch.equal(t, whole[key]) for key, t in best.state().items())
    starts.losses.clear()
    torch.manual_seed(1)
    main(bases["encoder"], str(tmp_path / "rest"), str(tmp_path / "whole" / "checkpoint-10"))
    assert starts.losses == rest
    assert all(torch.equal(t, whole[key]) for key, t in starts.adapters.state().items())
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


def test_no_class_makes_a_model_of_a_checkpoint_and_its_tokenizer_is_read(bases, tmp_path):
    """Config classes without a vocabulary or one hidden size took the stub, and a random model came out."""
    model = plain_model("classification", bases)
    loralab.attach(model, "lora", rank=3, targets=["query"], head=True)
    tokenizer = AutoTokenizer.from_pretrained(bases["encoder"])
    for save in (model.save_pretrained, tokenizer.save_pretrained):
        save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a fine film") == tokenizer("a fine film")
    autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    own = (type(model), ConvNextModel, ResNetModel, CLIPModel, LlavaForConditionalGeneration, AutoformerModel)
    for kind in (*autos, *own):
        for given in ({}, {"attn_implementation": "eager"}, {"ignore_mismatched_sizes": True, "dtype": "float32"}):
            with pytest.raises(Exception, match=r"loralab\.load\(base, folder\)"):
                kind.from_pretrained(tmp_path, **given)


def test_an_adapted_model_is_not_pushed_as_it_is(bases, monkeypatch):
    """The method of transformers uploads what it wrote unseen: paths too, and no card of the adapter."""
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: asked.append(a))
    model = plain_model("classification", bases)
    adapters = loralab.attach(model, "lora", rank=3, targets=["query"])
    for push in (model.push_to_hub, adapters.reference().push_to_hub):
        with pytest.raises(loralab.UserError, match=r"adapters\.push\(repo\).*merge\(\)\.push_to_hub"):
            push("me/reviews")
    assert not asked
    plain = adapters.merge()
    adapters.detach()
    for each in (plain, model):
        assert each.push_to_hub.__func__ is type(model).push_to_hub


def test_a_checkpoint_of_other_adapters_is_refused(bases, tmp_path):
    def adapted(**given):
        model = plain_model("classification", bases)
        return model, loralab.attach(model, "lora", **{"rank": 3, "targets": ["query"], "head": True, **given})

    model, _ = adapted()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for given in ({"name": "b"}, {"targets": ["query", "value"]}, {"targets": ["value"]}, {"head": False}):
        other, adapters = adapted(**given)
        before = {key: t.detach().clone() for key, t in adapters.state().items()}
        with pytest.raises(loralab.UserError, match="of other adapters than the model has"):
            other.load_state_dict(state, strict=False)
        assert all(torch.equal(t, before[key]) for key, t in adapters.state().items())
    again, adapters = adapted(seed=5)
    assert not again.load_state_dict(state).missing_keys
    first = loralab.load(plain_model("classification", bases), tmp_path).state()
    assert all(torch.equal(t, first[key]) for key, t in adapters.state().items())


def test_a_reference_answers_as_its_policy_did_and_shares_the_base(bases):
    model = plain_model("chat", bases)
    adapters = loralab.attach(model, "lora", rank=3, alpha=5, targets=["q_proj", "down_proj"])
    shake(adapters, "default")
    batch = rows()
    with torch.no_grad():
        now = model(**batch).logits
        with adapters.use(None):
            plain, base = model(**batch).logits, adapters.reference()
    frozen = adapters.reference()
    held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    own = [t for t in (*frozen.parameters(), *frozen.buffers()) if t.data_ptr() not in held]
    assert sum(t.nbytes for t in own) < sum(t.nbytes for t in adapters.state().values()) + 100
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=0.1))
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(frozen(**batch).logits, now)
        assert torch.equal(base(**batch).logits, plain)
        assert (model(**batch).logits - now).abs().max() > 0.1
        assert (now - plain).abs().max() > 0.1
    assert not any(p.requires_grad for p in (*frozen.parameters(), *base.parameters()))
    assert sum(p.requires_grad for p in model.parameters()) == len(adapters.state())


@pytest.mark.parametrize("name", ["chat", "classification"])
def test_a_reference_whose_base_was_averaged_in_place_is_refused(name, bases):
    """TRL's sync_ref_model writes r (1 - a) + p a into r, and r is p: the base would be scaled by 1 - a^2 a step."""
    model = plain_model(name, bases)
    adapters = loralab.attach(model, "lora", rank=3, alpha=5, targets="attention")
    frozen = adapters.reference()
    with torch.no_grad():
        expected = frozen(**rows()).logits
        adapters.fast("bfloat16", quiet=True, speed="off")  # rounds the frozen tensors, which is meant
        torch.testing.assert_close(frozen(**rows()).logits.float(), expected, rtol=0.1, atol=0.1)
        for ref, p in zip(frozen.parameters(), model.parameters(), strict=True):
            ref.data.mul_(1 - 0.6).add_(p.data, alpha=0.6)
        with pytest.raises(loralab.UserError, match="sync_ref_model"):
            frozen(**rows())


def test_losses_that_read_the_weight_of_the_output_layer_see_its_adapter(bases):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    model = plain_model("chat", bases)
    adapters = loralab.attach(model, "lora", rank=3, alpha=5, targets=["q_proj", "lm_head"])
    shake(adapters, "default")
    batch = rows()
    given = {**batch, "labels": batch["input_ids"]}
    own = model(**given).loss
    own.backward()
    gradients = {key: t.grad.clone() for key, t in adapters.state().items()}
    model.zero_grad()
    utils.add_fused_lm_head(model)
    loss = model(**given, fused_lm_head=True).loss
    loss.backward()
    torch.testing.assert_close(loss, own)
    for key, t in adapters.state().items():
        torch.testing.assert_close(t.grad, gradients[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_sentence_transformers_resumes_bit_for_bit_and_ends_with_the_best_checkpoint(dense, bases, tmp_path, caplog):
    """Its trainer takes a checkpoint up by opening it as a whole model: adapters are loaded part by part instead."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Dense

    rows = [{"anchor": f"What is {i} plus {i + 1}?", "positive": f"It is {2 * i + 1}."} for i in range(40)]

    def run(folder, resume=None):
        torch.manual_seed(1)
        model = SentenceTransformer(bases["encoder"])
        if dense:  # a part beside the adapted one, which learns too
            model.append(Dense(model.get_embedding_dimension(), 5))
        adapters = loralab.attach(model[0].auto_model, "dora", rank=4, alpha=8, targets=["query", "value"])
        losses = []

        class Told(SentenceTransformerTrainer):
            def training_step(self, *args, **more):
                loss = super().training_step(*args, **more)
                losses.append(loss.item())
                return loss

        settings = SentenceTransformerTrainingArguments(
            str(folder), max_steps=12, per_device_train_batch_size=4, learning_rate=0.3, eval_strategy="steps",
            eval_steps=3, save_steps=3, load_best_model_at_end=True, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        loss = MultipleNegativesRankingLoss(model)
        trainer = Told(model, settings, train_dataset=data, eval_dataset=data.select(range(8)), loss=loss)
        trainer.train(resume_from_checkpoint=resume)
        state = {key: t.detach().clone() for key, t in model.state_dict().items()}
        return trainer, adapters, losses, state

    whole, adapters, losses, state = run(tmp_path / "whole")
    assert len(losses) == 12
    best = Path(whole.state.best_model_checkpoint)
    last = load_file(tmp_path / "whole" / "checkpoint-12" / "model.safetensors")
    kept = load_file(best / "model.safetensors")
    for key, t in adapters.state().items():
        assert torch.equal(kept[f"loralab/default/{key}"], t), key
    if best.name != "checkpoint-12":
        assert any(not torch.equal(last[key], t) for key, t in kept.items())
    assert "Could not load the best model" not in caplog.text
    _, _, rest, resumed = run(tmp_path / "rest", str(tmp_path / "whole" / "checkpoint-6"))
    assert rest == losses[6:]
    assert resumed.keys() == state.keys()
    assert all(torch.equal(t, state[key]) for key, t in resumed.items())
    other = SentenceTransformer(bases["encoder"])  # a model without adapters goes the way it went
    plain = SentenceTransformerTrainer(other, SentenceTransformerTrainingArguments(str(tmp_path / "p"), use_cpu=True))
    other.save_pretrained(str(tmp_path / "plain"))
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    plain._load_from_checkpoint(str(tmp_path / "plain"))
    assert torch.equal(next(other.parameters()), next(SentenceTransformer(bases["encoder"]).parameters()))


def test_the_trainer_of_transformers_stays_its_own():
    """sentence-transformers' trainer module has it too, under the same name of the method that is wrapped."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from transformers import Trainer

    from loralab.sentence_checkpoints import METHOD, WRAPPED, follow_sentence_transformers

    follow_sentence_transformers()
    assert not hasattr(vars(Trainer)[METHOD], WRAPPED)
