"""Small models of many architectures of transformers, with random weights: a row each, and what each takes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
SPEECH = {
    **SIZES, "conv_dim": (16, 16), "conv_kernel": (5, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "apply_spec_augment": False,
}  # fmt: skip
EXPERTS = {**HEADS, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
LM, SEQ2SEQ, ENCODER = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Row:
    """One architecture."""

    family: str
    auto: str  # class of transformers that makes it
    config: dict[str, Any] = field(default_factory=dict)
    inputs: str = "text"  # a key of INPUTS
    kind: str = ""  # model_type, where it is not the name of the row
    not_peft: tuple[str, ...] = ()  # ends of paths that PEFT takes for other layers


ROWS: dict[str, Row] = {
    # text encoders
    **{
        name: Row("encoder", ENCODER, SIZES)
        for name in (
            "bert",
            "roberta",
            "xlm-roberta",
            "camembert",
            "ernie",
            "megatron-bert",
            "roberta-prelayernorm",
            "nystromformer",
            "rembert",
            "roformer",
        )
    },
    "electra": Row("encoder", ENCODER, {**SIZES, "embedding_size": 16}),
    "albert": Row("encoder", ENCODER, {**SIZES, "embedding_size": 16}),
    "mpnet": Row("encoder", ENCODER, SIZES),
    "deberta": Row("encoder", ENCODER, {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v2": Row(
        "encoder",
        ENCODER,
        {
            **SIZES,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 8,
        },
    ),
    "distilbert": Row(
        "encoder",
        ENCODER,
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 1},
    ),
    "modernbert": Row("encoder", ENCODER, {**SIZES, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 8}),
    "squeezebert": Row(
        "encoder",
        ENCODER,
        {
            **SIZES,
            "embedding_size": 32,
            "q_groups": 1,
            "k_groups": 1,
            "v_groups": 1,
            "post_attention_groups": 1,
            "intermediate_groups": 1,
            "output_groups": 1,
        },
    ),
    "esm": Row("encoder", ENCODER, {**SIZES, "mask_token_id": 4, "position_embedding_type": "absolute"}),
    "xlnet": Row("encoder", ENCODER, {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "fnet": Row("encoder", ENCODER, SIZES, "ids"),
    # decoders
    **{
        name: Row("decoder", LM, GROUPED)
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "phi3",
            "olmo",
            "olmo2",
            "cohere",
            "starcoder2",
            "stablelm",
            "granite",
        )
    },
    **{name: Row("decoder", LM, HEADS) for name in ("qwen3", "gemma", "gemma2", "smollm3", "glm", "helium")},
    "gemma3_text": Row("decoder", LM, HEADS),
    "phi": Row("decoder", LM, GROUPED),
    "gpt2": Row("decoder", LM, GPT2),
    "gptj": Row("decoder", LM, {**GPT2, "rotary_dim": 4}),
    "gpt_bigcode": Row("decoder", LM, GPT2),
    "gpt_neo": Row(
        "decoder",
        LM,
        {**SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_neox": Row("decoder", LM, SIZES),
    "opt": Row("decoder", LM, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Row("decoder", LM, {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 1}),
    "falcon": Row("decoder", LM, {**SIZES, "alibi": False, "new_decoder_architecture": False}),
    "mpt": Row("decoder", LM, {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "codegen": Row("decoder", LM, {**GPT2, "rotary_dim": 4}),
    "biogpt": Row("decoder", LM, SIZES),
    # mixtures of experts
    "mixtral": Row("mixture", LM, {**GROUPED, "num_local_experts": 4}),
    "qwen2_moe": Row("mixture", LM, {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": Row("mixture", LM, EXPERTS),
    "olmoe": Row("mixture", LM, EXPERTS),
    "gpt_oss": Row("mixture", LM, {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Row(
        "mixture",
        LM,
        {
            **SIZES,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        not_peft=("gate_proj", "up_proj", "down_proj"),
    ),  # it looks for them among the experts
    # state space
    "mamba": Row("state space", LM, {**SIZES, "state_size": 4}, "ids"),
    "mamba2": Row("state space", LM, {**SIZES, "num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2}, "ids"),
    "falcon_mamba": Row("state space", LM, {**SIZES, "state_size": 4}, "ids"),
    "recurrent_gemma": Row(
        "state space",
        LM,
        {**HEADS, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    # encoders with decoders
    "t5": Row("encoder-decoder", SEQ2SEQ, T5, "pairs"),
    "mt5": Row("encoder-decoder", SEQ2SEQ, T5, "pairs"),
    "umt5": Row("encoder-decoder", SEQ2SEQ, T5, "pairs"),
    "switch_transformers": Row(
        "encoder-decoder", SEQ2SEQ, {**T5, "num_experts": 4}, "pairs"
    ),  # its forward reads the tie
    "longt5": Row("encoder-decoder", SEQ2SEQ, {**T5, "local_radius": 4}, "pairs"),
    **{
        name: Row("encoder-decoder", SEQ2SEQ, BART, "pairs")
        for name in ("bart", "mbart", "pegasus", "blenderbot", "m2m_100", "plbart")
    },
    "marian": Row("encoder-decoder", SEQ2SEQ, {**BART, "decoder_vocab_size": 99}, "pairs"),
    # vision
    "vit": Row("vision", "AutoModelForImageClassification", VISION, "image"),
    "beit": Row("vision", "AutoModelForImageClassification", VISION, "image"),
    "dinov2": Row("vision", "AutoModelForImageClassification", VISION, "image"),
    "siglip_vision_model": Row("vision", "AutoModel", VISION, "image"),
    "clip_vision_model": Row("vision", "AutoModel", VISION, "image"),
    "swin": Row(
        "vision",
        "AutoModelForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
        "image",
    ),
    "convnext": Row(
        "vision",
        "AutoModelForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2},
        "image",
    ),
    "resnet": Row(
        "vision",
        "AutoModelForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "image",
    ),
    # audio
    "wav2vec2": Row("audio", "AutoModelForCTC", SPEECH, "wave"),
    "hubert": Row("audio", "AutoModelForCTC", SPEECH, "wave"),
    "wavlm": Row("audio", "AutoModelForCTC", {**SPEECH, "num_buckets": 8, "max_bucket_distance": 16}, "wave"),
    "whisper": Row(
        "audio",
        "AutoModelForSpeechSeq2Seq",
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 20,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "spectrum",
    ),
    "audio-spectrogram-transformer": Row(
        "audio",
        "AutoModelForAudioClassification",
        {**VISION, "max_length": 16, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4, "patch_size": 4},
        "spectrogram",
    ),
    # text with images
    "clip": Row(
        "vision and text", "AutoModel", {"text_config": SIZES, "vision_config": VISION, "projection_dim": 16}, "both"
    ),
    "siglip": Row("vision and text", "AutoModel", {"text_config": SIZES, "vision_config": VISION}, "both"),
}


def ids(rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids (rows, length) without special tokens."""
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def values(*shape: int) -> torch.Tensor:
    """Random numbers of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "text": lambda: {"input_ids": ids(3, 6, 0), "attention_mask": torch.ones(3, 6, dtype=torch.int64)},
    "ids": lambda: {"input_ids": ids(3, 6, 0)},
    "pairs": lambda: {"input_ids": ids(3, 6, 0), "decoder_input_ids": ids(3, 5, 1)},
    "image": lambda: {"pixel_values": values(3, 3, 16, 16)},
    "wave": lambda: {"input_values": values(3, 120)},
    "spectrum": lambda: {"input_features": values(3, 8, 20), "decoder_input_ids": ids(3, 5, 1)},
    "spectrogram": lambda: {"input_values": values(3, 16, 16)},
    "both": lambda: {"input_ids": ids(3, 6, 0), "pixel_values": values(3, 3, 16, 16)},
}


def build(name: str) -> nn.Module:
    """The model of a row in eval mode and float64, the same at every call; no weight or bias is near zero."""
    row = ROWS[name]
    config = transformers.AutoConfig.for_model(row.kind or name, **copy.deepcopy(row.config))
    for part in (
        config,
        *(c for key in ("text_config", "vision_config") if (c := getattr(config, key, None)) is not None),
    ):
        for key, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in key or "pdrop" in key or "layerdrop" in key):
                setattr(part, key, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, row.auto).from_config(config)
        model.config._experts_implementation = "eager"  # grouped products know no float64
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):  # others are tables made by a rule
                if p.ndim > 1:
                    p.normal_(0, 0.15)
                else:
                    p.add_(torch.randn_like(p) * 0.1)
    return model.double().eval()
