"""Tiny random models and adapters with randomised weights."""

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
    "gemma3_text": {
        **LLAMA_LIKE,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 8,
    },
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
    """Return a tiny random base in eval mode, without dropout, with weights large enough to affect outputs."""
    return randomise(AutoConfig.for_model(name, **{**CONFIGS[name], **options}), seed, classifier)


def randomise(config, seed: int = 0, classifier: bool = False):
    """Return a random model of this configuration (see `make_base`)."""
    torch.manual_seed(seed)
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "attention_dropout", "dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    scramble(model, seed, 0.15)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def scramble(module, seed: int = 1, std: float = 0.3):
    """Randomise every weight, including zero-initialised ones; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else noise)
    return module


def make(name: str = "llama", seed: int = 0, classifier: bool = False, base_options: dict | None = None, **fields):
    """Return a tiny `ShadowModel` with randomised shadow weights and no dropout, in eval mode."""
    fields = {"dropout": 0.0, "rank": 4, "alpha": 0.5, **fields}
    model = umbra.attach(make_base(name, seed, classifier, **(base_options or {})), umbra.ShadowConfig(**fields))
    scramble(model.shadow, seed + 1)
    return model.eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """Return (rows, length) token ids without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


ARCHITECTURES = list(CONFIGS)
DIALECTS = ["paper", "peft"]
CLASSIFIERS = {
    "single": {"num_labels": 3, "problem_type": "single_label_classification"},
    "multi": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}


def class_labels(problem: str, rows: int = 4) -> torch.Tensor:
    """Return labels for one of `CLASSIFIERS`."""
    generator = torch.Generator().manual_seed(5)
    if problem == "single":
        return torch.randint(0, 3, (rows,), generator=generator)
    if problem == "multi":
        return torch.randint(0, 2, (rows, 3), generator=generator).float()
    return torch.randn(rows, generator=generator)


def partly_labelled(ids: torch.Tensor) -> torch.Tensor:
    """Return labels for ids: the last 2 + 2r tokens of row r; -100 elsewhere."""
    labels = torch.full_like(ids, -100)
    for row in range(len(ids)):
        count = min(2 + 2 * row, ids.shape[1] - 1)
        labels[row, -count:] = ids[row, -count:]
    return labels


def label_count(labels: torch.Tensor) -> int:
    """Return the number of next-token losses in (B, T) labels."""
    return int((labels[:, 1:] != -100).sum())


def gradients(model) -> dict[str, torch.Tensor]:
    """Return every gradient by name and clear it; assert that each trainable parameter has one."""
    taken = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            taken[name], p.grad = p.grad, None
    return taken


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-4) -> None:
    """Assert that two sets of gradients are equal up to fp32 rounding, relative to each tensor's largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = rtol * float(value.abs().max()) + 1e-6
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def shadow_head(model):
    """Return the head that reads s⁰."""
    return model.shadow.heads["shadow"] if model.shadow.heads else model.base_head


def shadow_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Return head(s⁰), (B, T, V) or (B, T, C)."""
    s0 = model.runner.initial_state({"input_ids": ids, "inputs_embeds": None})
    return shadow_head(model)(s0.to(model.shadow.dtype if model.shadow.heads else model.base.dtype))


def step_gradients(trainer) -> dict[str, torch.Tensor]:
    """Return every gradient of the trainer's first optimizer step, as the optimizer would see it; weights are unchanged."""
    from transformers import TrainerCallback

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            self.taken = gradients(trainer.model)
            control.should_training_stop = True

    take = Take()
    trainer.add_callback(take)
    trainer.train()
    return take.taken


def detached_gradients(model, loss_of) -> dict[str, torch.Tensor]:
    """Return the gradients of the detached model's loss with respect to the shadow's backbone, by name.

    Args:
        loss_of: maps the stock model to a scalar.
    """
    edge = model.detached()
    loss_of(edge).backward()
    names = [n for n, _ in model.shadow.backbone.named_parameters()]
    return {f"shadow.backbone.{n}": edge.base_model.get_parameter(n).grad for n in names}


def backbone_of(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of the shadow's backbone."""
    return {n: g for n, g in found.items() if n.startswith("shadow.backbone.")}


def auxiliary(with_weight, without, weight: float) -> dict[str, torch.Tensor]:
    """Return the shadow loss's contribution to the backbone's gradients, per unit of λ.

    Args:
        with_weight, without: all gradients at λ = weight and at λ = 0.
    """
    before = backbone_of(without)
    return {n: (g - before[n]) / weight for n, g in backbone_of(with_weight).items()}
