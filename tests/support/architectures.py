"""Decoder families of transformers: a tiny configuration of each, and the reasons for unsupported ones.

`test_architectures.py` runs its checks on every entry, and docs/reference/architectures.md is written from their outcomes.
"""

from dataclasses import dataclass, field
from typing import Any

from support.tiny import COMMON


@dataclass(frozen=True)
class Family:
    """One line of docs/reference/architectures.md.

    Args:
        kind: architecture type: dense, MoE, ALiBi, learned positions, parallel blocks, hybrid, …
        config: keyword arguments of the configuration, about 3 blocks of width 32.
        shadow: form of the default shadow: mirror or dense.
        note: shown on the page.
        model_type: the configuration's model_type; defaults to the family's name.
        skip: checks that do not apply, each with the reason shown on the page.
    """

    kind: str
    config: dict[str, Any]
    shadow: str = "mirror"
    note: str = ""
    model_type: str = ""
    skip: dict[str, str] = field(default_factory=dict)


DENSE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD_DIM = {**DENSE, "head_dim": 8}
NO_GROUPS = {k: v for k, v in DENSE.items() if k != "num_key_value_heads"}
GPT2 = {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LOCAL = {**EXPERTS, "num_local_experts": 4}
NUMBERED = {**EXPERTS, "num_experts": 4}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MIXED = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
INDEXED = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 6, "d_rel": 4,
    "rel_extent": 16, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}  # fmt: skip
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7, "attention_multiplier": 0.5}
BART = {
    **COMMON, "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "afmoe": Family("MoE", {**HEAD_DIM, **NUMBERED, **SLIDING, "num_shared_experts": 1, "mup_enabled": True}, "dense"),
    "apertus": Family("dense", DENSE),
    "arcee": Family("dense", DENSE),
    "aria_text": Family("MoE", {**HEAD_DIM, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}, "dense"),
    "axk1": Family("MoE, latent attention", {**DENSE, **LATENT, **ROUTED, **MIXED}, "dense"),
    "axk2": Family("MoE, indexed latent attention", {**DENSE, **LATENT, **ROUTED, **MIXED, **INDEXED}, "dense"),
    "beam": Family(
        "MoE, capped logits", {**HEAD_DIM, **NUMBERED, **MIXED, **SLIDING, "n_group": 1, "topk_group": 1}, "dense"
    ),
    "biogpt": Family("learned positions", NO_GROUPS),
    "bitnet": Family("dense", DENSE),
    "bloom": Family("ALiBi", {**COMMON, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "codegen": Family("parallel blocks", {**GPT2, "rotary_dim": 4}),
    "cohere": Family("parallel blocks, scaled logits", {**DENSE, "logit_scale": 0.25}),
    "cohere2": Family("parallel blocks, scaled logits", {**HEAD_DIM, **SLIDING, "logit_scale": 0.25}),
    "cohere2_moe": Family("MoE, scaled logits", {**HEAD_DIM, **NUMBERED, **SLIDING, "logit_scale": 0.25}, "dense"),
    "cohere_compass_text": Family(
        "parallel blocks, scaled logits",
        {
            **HEAD_DIM,
            **SLIDING,
            "logit_scale": 0.25,
            "rope_parameters": {
                k: {"rope_type": "default", "rope_theta": 1e4} for k in ("sliding_attention", "full_attention")
            },
        },
    ),
    "ctrl": Family("sinusoidal positions", {**GPT2, "dff": 48}),
    "cwm": Family("dense", {**HEAD_DIM, **SLIDING}),
    "dbrx": Family(
        "MoE",
        {
            **COMMON,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "dense",
    ),
    "deepseek_v2": Family("MoE, latent attention", {**DENSE, **LATENT, **ROUTED, "first_k_dense_replace": 1}, "dense"),
    "deepseek_v3": Family("MoE, latent attention", {**DENSE, **LATENT, **ROUTED, "first_k_dense_replace": 1}, "dense"),
    "deepseek_v32": Family(
        "MoE, indexed latent attention",
        {**DENSE, **LATENT, **ROUTED, **MIXED, **INDEXED},
        "dense",
        note="beyond the indexer's top k, the base's own cached decoding differs from its uncached",
    ),
    "diffllama": Family("differential attention", DENSE),
    "doge": Family("dynamic mask attention", DENSE),
    "dots1": Family("MoE", {**HEAD_DIM, **ROUTED, "first_k_dense_replace": 1}, "dense"),
    "dots3_note_text": Family(
        "MoE, indexed latent attention, head counts by layer",
        {
            **DENSE,
            **LATENT,
            **ROUTED,
            **MIXED,
            **INDEXED,
            "shared_experts_intermediate_size": 16,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "per_layer_config": {"01": {"num_attention_heads": 2, "num_key_value_heads": 2}},
        },
        "dense",
    ),
    "emu3": Family("dense", {"text_config": DENSE}, note="text alone"),
    "ernie4_5": Family("dense", HEAD_DIM),
    "ernie4_5_moe": Family(
        "MoE",
        {**DENSE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
        "dense",
    ),
    "exaone4": Family("post-norm", {**DENSE, **SLIDING}),
    "exaone_moe": Family("MoE", {**HEAD_DIM, **NUMBERED, **SLIDING, **MIXED, "num_shared_experts": 1}, "dense"),
    "falcon": Family("parallel blocks, multi-query", NO_GROUPS),
    "falcon-alibi": Family("ALiBi", {**NO_GROUPS, "alibi": True, "parallel_attn": False}, model_type="falcon"),
    "falcon-new": Family(
        "parallel blocks, grouped queries",
        {**NO_GROUPS, "new_decoder_architecture": True, "num_kv_heads": 2},
        model_type="falcon",
    ),
    "flex_olmo": Family("MoE, post-norm", {**DENSE, "num_experts": 4, "num_experts_per_tok": 2}, "dense"),
    "flint": Family(
        "MoE", {**HEAD_DIM, **NUMBERED, "sliding_window": 6, "shared_expert_intermediate_size": 16}, "dense"
    ),
    "fuyu": Family(
        "dense",
        {**NO_GROUPS, "text_config": {**NO_GROUPS, "model_type": "persimmon"}, "patch_size": 4},
        note="text alone",
    ),
    "gemma": Family("scaled embeddings", HEAD_DIM),
    "gemma2": Family("capped logits, scaled embeddings", {**HEAD_DIM, **SLIDING, "final_logit_softcapping": 3.0}),
    "gemma4_unified_text": Family(
        "scaled embeddings, capped logits, head widths by layer",
        {**HEAD_DIM, **SLIDING, "final_logit_softcapping": 3.0},
        "dense",
    ),
    "gemma3_text": Family("scaled embeddings", {**HEAD_DIM, **SLIDING}),
    "glm": Family("dense", HEAD_DIM),
    "glm4": Family("sandwich norm", HEAD_DIM),
    "glm4_moe": Family("MoE", {**HEAD_DIM, **ROUTED}, "dense"),
    "glm4_moe_lite": Family("MoE, latent attention", {**DENSE, **LATENT, **ROUTED, **MIXED}, "dense"),
    "glm_moe_dsa": Family(
        "MoE, indexed latent attention",
        {**DENSE, **LATENT, **ROUTED, **MIXED, **INDEXED},
        "dense",
        note="beyond the indexer's top k, the base's own cached decoding differs from its uncached",
    ),
    "gpt-sw3": Family("learned positions", GPT2),
    "gpt2": Family("learned positions", GPT2),
    "gpt_bigcode": Family("learned positions, multi-query", GPT2),
    "gpt_neo": Family(
        "learned positions, local attention",
        {
            **COMMON,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 6,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": Family("parallel blocks", NO_GROUPS),
    "gpt_neox_japanese": Family("dense", NO_GROUPS),
    "gpt_oss": Family(
        "MoE, attention sinks", {**HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}, "dense"
    ),
    "gptj": Family("parallel blocks", {**GPT2, "rotary_dim": 4}),
    "granite": Family("scaled embeddings and logits", {**DENSE, **GRANITE}),
    "granite_swa": Family("scaled embeddings and logits", {**DENSE, **GRANITE, **SLIDING}),
    "granitemoe": Family("MoE, scaled embeddings and logits", {**DENSE, **GRANITE, **LOCAL}, "dense"),
    "granitemoe_swa": Family("MoE, scaled embeddings and logits", {**DENSE, **GRANITE, **LOCAL, **SLIDING}, "dense"),
    "granitemoeshared": Family("MoE, scaled embeddings and logits", {**DENSE, **GRANITE, **LOCAL}, "dense"),
    "helium": Family("dense", HEAD_DIM),
    "hunyuan_v1_dense": Family("dense", HEAD_DIM),
    "hunyuan_v1_moe": Family("MoE", {**HEAD_DIM, "num_experts": 4, "moe_topk": 2}, "dense"),
    "hy_v3": Family("MoE", {**HEAD_DIM, **NUMBERED, **MIXED, "num_shared_experts": 1}, "dense"),
    "hyperclovax": Family("scaled embeddings and logits", {**DENSE, **GRANITE}),
    "inkling2_text": Family(
        "MoE, short convolutions, capped logits",
        {**HEAD_DIM, **INKLING, **EXPERTS, "n_routed_experts": 4, "unpadded_vocab_size": 99},
        "dense",
    ),
    "inkling_text": Family(
        "MoE, short convolutions, scaled logits", {**HEAD_DIM, **INKLING, **ROUTED, **MIXED}, "dense"
    ),
    "internlm3": Family("dense", DENSE),
    "iquestcoder": Family("dense", DENSE),
    "jais2": Family("dense", DENSE),
    "jetmoe": Family("MoE", {**NO_GROUPS, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4}, "dense"),
    "kolibri1": Family("MoE", {**HEAD_DIM, **LOCAL, **SLIDING, "shared_expert_intermediate_size": 16}, "dense"),
    "laguna": Family("MoE", {**HEAD_DIM, **NUMBERED, **MIXED, "shared_expert_intermediate_size": 16}, "dense"),
    "llama": Family("dense", DENSE),
    "llama4_text": Family(
        "MoE, chunked attention",
        {**HEAD_DIM, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
        "dense",
    ),
    "longcat_flash": Family(
        "MoE, latent attention, two per block",
        {
            **{k: v for k, v in DENSE.items() if k not in ("num_hidden_layers", "intermediate_size")},
            **LATENT,
            "head_dim": 4,
            "num_layers": 3,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        "dense",
    ),
    "mellum": Family("MoE", {**HEAD_DIM, **LOCAL}, "dense"),
    "mimo_v2_flash": Family("MoE", {**HEAD_DIM, **ROUTED, **SLIDING, **MIXED, "v_head_dim": 8}, "dense"),
    "minicpm3": Family("latent attention, scaled embeddings", {**DENSE, **LATENT, "dim_model_base": 16}),
    "minimax_m2": Family(
        "MoE", {**HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}, "dense"
    ),
    "minimax_m3_vl_text": Family(
        "MoE",
        {
            **HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "rotary_dim": 4,
        },
        "dense",
    ),
    "ministral": Family("dense", {**HEAD_DIM, **SLIDING}),
    "ministral3": Family("dense", HEAD_DIM),
    "mistral": Family("dense, sliding windows", {**DENSE, "sliding_window": 6}),
    "mixtral": Family("MoE", {**DENSE, "num_local_experts": 4}, "dense"),
    "mpt": Family("ALiBi", {**COMMON, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}),
    "nanochat": Family("capped logits", {**DENSE, "final_logit_softcapping": 3.0}),
    "nemotron": Family("dense", DENSE),
    "olmo": Family("dense", DENSE),
    "olmo2": Family("post-norm", DENSE),
    "olmo3": Family("post-norm", {**DENSE, **SLIDING}),
    "olmoe": Family("MoE", {**DENSE, "num_experts": 4, "num_experts_per_tok": 2}, "dense"),
    "openai-gpt": Family("learned positions, post-norm", GPT2),
    "opt": Family("learned positions", {**NO_GROUPS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": Family(
        "learned positions, post-norm, embeddings of another width",
        {**NO_GROUPS, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        model_type="opt",
    ),
    "persimmon": Family("dense", NO_GROUPS),
    "phi": Family("parallel blocks", DENSE),
    "phi3": Family("dense", DENSE),
    "phi4_multimodal": Family(
        "dense",
        {
            **DENSE,
            "vision_config": {**TOWER, "crop_size": 8, "image_size": 8, "patch_size": 4},
            "audio_config": {
                **TOWER,
                "num_blocks": 1,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 16,
                "bias_max_distance": 10,
            },
        },
        "dense",
        note="text alone",
    ),
    "phimoe": Family("MoE", {**DENSE, "num_local_experts": 4}, "dense"),
    "qwen2": Family("dense", DENSE),
    "qwen2_moe": Family("MoE", {**DENSE, **NUMBERED, "shared_expert_intermediate_size": 16}, "dense"),
    "qwen3": Family("dense", HEAD_DIM),
    "qwen3_moe": Family("MoE", {**HEAD_DIM, **NUMBERED}, "dense"),
    "seed_oss": Family("dense", HEAD_DIM),
    "smollm3": Family("dense", DENSE),
    "solar_open": Family("MoE", {**HEAD_DIM, **ROUTED}, "dense"),
    "stablelm": Family("dense", DENSE),
    "starcoder2": Family("dense", DENSE),
    "vaultgemma": Family("capped logits, scaled embeddings", {**HEAD_DIM, **SLIDING, "final_logit_softcapping": 3.0}),
    "xglm": Family(
        "sinusoidal positions, scaled embeddings",
        {**COMMON, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 64},
    ),
    "qwen3_5_moe_text": Family(
        "MoE, gated delta net",
        {
            **HEAD_DIM,
            **NUMBERED,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        "dense",
    ),
    "modernbert-decoder": Family(
        "alternating windows, transformed states before the head",
        {**NO_GROUPS, "local_attention": 12},
        skip={"dense shadow": "it cannot transform its states before the head"},
    ),
    "youtu": Family(
        "latent attention",
        {**DENSE, **LATENT, "pad_token_id": None},
        note="transformers empties the padding row on loading",
    ),
}

_HALF = {
    "skip": {"left padding": "the base itself counts padding as positions"},
    "note": "the decoder alone, without its encoder",
}
FAMILIES |= {
    name: Family("learned positions", BART, "dense", **_HALF)
    for name in ("bart", "blenderbot", "blenderbot-small", "mbart", "mvp", "plbart", "trocr", "whisper")
}
FAMILIES |= {
    name: Family("sinusoidal positions", BART, "dense", **_HALF) for name in ("bigbird_pegasus", "marian", "pegasus")
}

_STREAMS = "several streams at once"
_SPEECH = "several codebooks"
_ENCODER = "an encoder run as a decoder"
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
# Model types of AutoModelForCausalLM that `umbra.attach` refuses: a configuration, and what the error says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blt": ({}, "patches"),
    "cpmant": ({**NO_GROUPS, "dim_head": 8, "dim_ff": 48}, "a prompt before the tokens"),
    "deepseek_v4": ({**DENSE, **ROUTED}, _STREAMS),
    "git": (
        {**NO_GROUPS, "vision_config": {**TOWER, "image_size": 8, "patch_size": 4}},
        "features of images before the tokens",
    ),
    "hrm_text": ({**HEAD_DIM, "num_layers_per_stack": 2}, "the same blocks several times"),
    "hy_v4": ({**DENSE, **LATENT, **ROUTED, **MIXED, **INDEXED}, _STREAMS),
    "mllama": ({"text_config": {**DENSE, "cross_attention_layers": [1]}}, "cross-attention where there is no image"),
    "moshi": ({}, _SPEECH),
    "prophetnet": ({}, "predicted streams"),
    "qwen4_exp_text": (
        {
            **HEAD_DIM,
            **NUMBERED,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [],
        },
        _STREAMS,
    ),
    "reformer": ({"is_decoder": True}, "reversible blocks"),
    "xlm": ({**COMMON, "emb_dim": 32, "n_layers": 3, "n_heads": 4}, _ENCODER),
    "xlnet": ({**COMMON, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48}, r"\(T, B, D\)"),
    **{name: ({**NO_GROUPS, "is_decoder": True}, _ENCODER) for name in ENCODERS},
}

_UNBUILT = "AutoModelForCausalLM of transformers 5.23 cannot build it from its own configuration"
# Model types of AutoModelForCausalLM that are no line of their own, and why.
ELSEWHERE: dict[str, str] = {
    "dots3_note": "the vision-language model around `dots3_note_text`",
    "gemma3n": "the vision-language model around `gemma3n_text`, whose towers need timm",
    "gemma4": "the vision-language model around `gemma4_text`",
    "gemma4_assistant": _UNBUILT,
    "gemma4_unified": "the vision-language model around `gemma4_unified_text`",
    "gemma4_unified_assistant": _UNBUILT,
    "got_ocr2": "a vision-language model around `qwen2`",
    "moss_transcribe_diarize": "an audio model around `qwen3`",
    "musicgen": _UNBUILT,
    "musicgen_melody": _UNBUILT,
    "qwen3_5_moe": "the vision-language model around `qwen3_5_moe_text`",
    "qwen4_exp": "the vision-language model around `qwen4_exp_text`, which cannot carry a shadow",
}
