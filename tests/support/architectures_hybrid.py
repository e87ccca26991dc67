"""Tiny configurations of hybrid and recurrent decoders, and of decoders with per-layer inputs."""

from support.architectures import Family
from support.tiny import COMMON

DENSE = {
    **COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA_MIXER = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 4}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7, "attention_multiplier": 0.5}
SHARED_KEYS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
PER_LAYER = {
    **DENSE, "num_hidden_layers": 4, "head_dim": 8, "layer_types": SHARED_KEYS, "num_kv_shared_layers": 2, "sliding_window": 6,
    "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 4.0,
}  # fmt: skip
STATE_SPACE = {**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}

FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(
        "hybrid",
        {
            **DENSE,
            **EXPERTS,
            **DELTA,
            "head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": LINEAR_FIRST,
        },
        "dense",
        "gated delta net, mixture of experts",
    ),
    "qwen3_5_text": Family(
        "hybrid", {**DENSE, **DELTA, "head_dim": 8, "layer_types": LINEAR_FIRST}, "dense", "gated delta net"
    ),
    "olmo_hybrid": Family("hybrid", {**DENSE, **DELTA, "layer_types": LINEAR_FIRST}, "dense", "gated delta net"),
    "kimi_linear": Family(
        "hybrid",
        {
            **DENSE,
            **EXPERTS,
            **LATENT,
            "num_local_experts": 4,
            "n_shared_experts": 1,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "layer_types": LINEAR_FIRST,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "dense",
        "Kimi delta attention, latent attention, mixture of experts",
    ),
    "bailing_hybrid": Family(
        "hybrid",
        {
            **DENSE,
            **EXPERTS,
            **LATENT,
            "num_local_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 8,
            "layer_types": LINEAR_FIRST,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_mtp_layers": 0,
        },
        "dense",
        "delta and latent attention, mixture of experts",
    ),
    "lfm2": Family(
        "hybrid",
        {**DENSE, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
        "dense",
        "short convolutions",
    ),
    "lfm2_moe": Family(
        "hybrid",
        {
            **DENSE,
            **EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        "dense",
        "short convolutions, mixture of experts",
    ),
    "lfm3": Family(
        "hybrid",
        {
            **DENSE,
            "head_dim": 8,
            "conv_L_cache": 3,
            "sliding_window": 6,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        "dense",
        "short convolutions",
    ),
    "falcon_h1": Family(
        "hybrid",
        {
            **DENSE,
            **MAMBA_MIXER,
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
        },
        "dense",
        "attention and Mamba 2 side by side in every block",
    ),
    "bamba": Family("hybrid", {**DENSE, **MAMBA_MIXER, "attn_layer_indices": [1]}, "dense", "Mamba 2"),
    "granitemoehybrid": Family(
        "hybrid",
        {
            **DENSE,
            **MAMBA_MIXER,
            **GRANITE,
            "num_local_experts": 4,
            "shared_intermediate_size": 16,
            "layer_types": LINEAR_FIRST,
        },
        "dense",
        "Mamba 2, mixture of experts",
    ),
    "jamba": Family(
        "hybrid",
        {
            **DENSE,
            "num_experts": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        "dense",
        "Mamba, mixture of experts",
    ),
    "zamba": Family(
        "hybrid",
        {
            **DENSE,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "mamba_d_state": 4,
            "n_mamba_heads": 2,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        },
        "dense",
        "Mamba, one attention block shared by layers",
    ),
    "zamba2": Family(
        "hybrid",
        {
            **DENSE,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "num_hidden_layers": 4,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        },
        "dense",
        "Mamba 2, one attention block shared by layers",
    ),
    "nemotron_h": Family(
        "hybrid",
        {
            **{k: v for k, v in DENSE.items() if k != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "head_dim": 8,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        "dense",
        "Mamba 2, attention, experts or a feed-forward net in each block",
    ),
    "recurrent_gemma": Family(
        "hybrid",
        {
            **DENSE,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 6,
            "logits_soft_cap": 4.0,
            "block_types": ["recurrent", "attention", "recurrent"],
        },
        "dense",
        "RG-LRU and local attention",
        skip={"left padding": "the base itself lets padding into its recurrent state"},
    ),
    "minimax": Family(
        "hybrid",
        {
            **DENSE,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 4,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
        },
        "dense",
        "lightning attention, mixture of experts; its own cache class, greedy decoding",
    ),
    "zaya": Family(
        "hybrid",
        {
            **DENSE,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
        },
        "dense",
        "compressed convolutional attention, mixture of experts",
    ),
    "mamba": Family("recurrent", STATE_SPACE, "dense"),
    "mamba2": Family(
        "recurrent", {**STATE_SPACE, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}, "dense"
    ),
    "falcon_mamba": Family("recurrent", STATE_SPACE, "dense"),
    "gemma3n_text": Family(
        "inputs per layer",
        {**PER_LAYER, "altup_num_inputs": 2, "laurel_rank": 4},
        "dense",
        "the shadow is coupled to AltUp's active stream",
    ),
    "gemma4_text": Family("inputs per layer", PER_LAYER, "dense"),
}

# Model types that `umbra.attach` refuses, each with what its error says.
REFUSED = {
    "rwkv": ({**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 64}, "a list of tensors"),
    "xlstm": ({**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2}, "an xLSTMCache"),
}
