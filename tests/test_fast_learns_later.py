"""What is let learn after `fast()` learns as before it; models with tables and pictures; layers compiled one by one."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import loralab
from loralab.rounded import RoundedNote

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, intermediate_size=40, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def norms(model: nn.Module) -> list[nn.Parameter]:
    return [p for key, p in model.named_parameters() if "LayerNorm" in key]


def some_steps(model: nn.Module, lr: float, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=torch.tensor([0, 2, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_let_learn_after_fast_learns(copied):
    model = bert()
    adapters = loralab.attach(model, "lora", rank=3, head=True)
    choices = adapters.fast("bfloat16", quiet=True)
    assert (choices.store, choices.autocast) == ("bfloat16", False)
    model(input_ids=IDS)
    if copied:
        model = copy.deepcopy(model)
    for p in norms(model):
        assert p.dtype == torch.bfloat16
        p.requires_grad_(True)
    before = [p.detach().float().clone() for p in norms(model)]
    with pytest.warns(RoundedNote, match=r"LayerNorm\.\w+ learns now"):
        some_steps(model, 1e-4, 1)
    some_steps(model, 1e-4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = [(p - b).abs().max() for p, b in zip(norms(model), before, strict=True)]
    assert all(2e-4 < m.item() < 6e-4 for m in moved)
    if not copied:
        assert (choices.store, choices.autocast) == (None, True)
        assert "autocast" in str(choices)


def test_what_was_put_into_a_wider_dtype_is_never_narrowed_by_learning():
    model = bert().bfloat16()
    loralab.attach(model, "lora", rank=3, head=True)
    loralab.fast.prepare(model, store="float32")
    weights = norms(model)[0].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundedNote)
        some_steps(model, 1e-4, 1)
    assert weights.dtype == torch.float32


def test_full_fine_tuning_after_fast_takes_whole_steps():
    model = bert()
    adapters = loralab.attach(model, "lora", rank=3, head=True)
    adapters.fast("bfloat16", quiet=True)
    with adapters.use(None):
        adapters.remove("default")
    adapters.add("all", "full", head=True)
    weights = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    before = weights.detach().float().clone()
    with pytest.warns(RoundedNote):
        some_steps(model, 2e-5, 1)
    assert weights.dtype == torch.float32
    assert (weights.detach() != before).float().mean().item() > 0.99


def test_nothing_is_said_where_only_adapters_learn():
    model = bert()
    loralab.attach(model, "lora", rank=3, head=True).fast("bfloat16", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundedNote)
        some_steps(model, 1e-3)
    assert all(p.dtype == torch.bfloat16 for p in norms(model))


TABLES = {
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(
            vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40,
        )
    ),
    "xglm": lambda: transformers.XGLMForCausalLM(
        transformers.XGLMConfig(vocab_size=61, d_model=24, num_layers=1, attention_heads=4, ffn_dim=40)
    ),
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=61, n_embd=24, n_layer=1, n_head=4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_a_model_adds_are_rounded_with_it(kind):
    torch.manual_seed(0)
    model = TABLES[kind]().eval()
    adapters = loralab.attach(model, "lora", rank=2)
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    plain = model(input_ids=IDS, **more).logits
    adapters.fast("bfloat16", quiet=True)
    fast = model(input_ids=IDS, **more).logits
    assert fast.dtype == torch.bfloat16
    assert (fast - plain).norm() < 0.02 * plain.norm()


def test_a_model_that_takes_pictures_too_is_left_to_autocast():
    config = transformers.LayoutLMv3Config(
        **SMALL, intermediate_size=40, input_size=32, patch_size=16, coordinate_size=4, shape_size=4
    )
    model = transformers.LayoutLMv3Model(config)
    choices = loralab.attach(model, "lora", rank=2).fast("bfloat16", quiet=True)
    assert (choices.store, choices.autocast) == (None, True)
    boxes = torch.zeros(3, 7, 4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, bbox=boxes, pixel_values=torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize("make", [bert, llama])
def test_layers_can_be_compiled_each_by_itself(make):
    model = make().eval()
    adapters = loralab.attach(model, "lora", rank=2)
    layers = model.bert.encoder.layer if make is bert else model.model.layers
    plain = model(input_ids=IDS).logits
    adapters.fast("float32", quiet=True)
    for layer in layers:
        layer.compile(backend="eager")
    more = {} if make is bert else {"use_cache": False}
    assert torch.allclose(model(input_ids=IDS, **more).logits, plain, atol=1e-5)


def test_masks_are_drawn_whatever_the_default_device():
    model = bert().train()
    loralab.attach(model, "lora", rank=2).fast("float32", quiet=True)
    with torch.device("meta"):
        assert model(input_ids=IDS).logits.device.type == "cpu"
