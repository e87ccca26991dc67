"""Tiny random models, and adapters that are no no-ops."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import umbra

VOCAB, HIDDEN, LAYERS = 99, 32, 4
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

CONFIGS = {
    "llama": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
    "mistral": {**LLAMA_LIKE, "sliding_window": 6},
    "gpt2": {**COMMON, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        **COMMON,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "phi3": LLAMA_LIKE,
    "qwen3_moe": {
        **LLAMA_LIKE,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def make_base(name: str = "llama", seed: int = 0, classifier: bool = False, **options):
    """A tiny random base in eval mode, without dropout, with weights large enough to matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**CONFIGS[name], **options})
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "attention_dropout", "resid_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    scramble(model, seed, 0.15)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def scramble(module, seed: int = 1, std: float = 0.3):
    """Randomise every weight, the zero-initialised ones above all; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else noise)
    return module


def make(name: str = "llama", seed: int = 0, classifier: bool = False, base_options: dict | None = None, **fields):
    """A tiny `ShadowModel` with every weight of the shadow randomised and no dropout, in eval mode."""
    fields = {"dropout": 0.0, "rank": 4, "alpha": 0.5, **fields}
    model = umbra.attach(make_base(name, seed, classifier, **(base_options or {})), umbra.ShadowConfig(**fields))
    scramble(model.shadow, seed + 1)
    return model.eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """(rows, length) of token ids, none of them special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
