"""Drafts keep their promise, the same tokens: positions that depend on the length, and every feature of generation."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, SynthIDTextWatermarkingConfig, WatermarkingConfig

import umbra
from support.drafts import close_draft, drafted, plain
from support.tiny import CONFIGS, LAYERS, make, tokens

ROPES = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


def longer(kind: str, name: str = "llama") -> dict:
    """Options of a base whose positions change at 16 tokens, with heads of 8."""
    rope = ROPES[kind]
    rope = {"full_attention": rope, "sliding_attention": {**ROPES["longrope"]}} if name == "gemma3_text" else rope
    return {"rope_parameters": rope, "max_position_embeddings": 64 if kind != "dynamic" else 16}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((k, "llama") for k in ROPES), ("longrope", "phi3"), ("longrope", "gemma3_text"), ("dynamic", "mistral")],
)
@pytest.mark.parametrize("length", [5, 15, 20])
def test_length_dependent_positions_stay_exact(kind, name, length):
    """Within, across and beyond the limit; one row, and two with padding."""
    model, ids = close_draft(name, base_options=longer(kind, name), shadow_num_hidden_layers=2), tokens(2, length)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    outputs = []
    for rows in (slice(1, 2), slice(0, 2)):
        given = {"attention_mask": mask[rows]}
        expected = plain(model, ids[rows], **given)
        for k in (1, 3, 6):
            outputs.append(drafted(model, ids[rows], k, **given))
            assert torch.equal(outputs[-1].sequences, expected)
    assert (kind == "dynamic" and length > 14) is not any(out.drafted for out in outputs)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_length_dependent_shadow_positions_stay_exact(kind, tmp_path):
    small = {**CONFIGS["llama"], "hidden_size": 32, "head_dim": 8, **longer(kind)}
    AutoModel.from_config(AutoConfig.for_model("llama", **small)).save_pretrained(tmp_path)
    model, ids = close_draft(shadow=str(tmp_path)), tokens(1, 12)
    expected = plain(model, ids)
    for k in (1, 3, 6):
        assert torch.equal(drafted(model, ids, k).sequences, expected)


def test_longrope_regression_stays_exact():
    """A shadow that agrees often, and a text that crosses the limit."""
    model = make(
        base_options=longer("longrope"), shadow_num_hidden_layers=LAYERS, init="base", constants={"init_scale": 1.0}
    )
    with torch.no_grad():
        for injection in model.shadow.couplings.injections.values():
            injection.up.weight.zero_()
    model.generation_config.eos_token_id, ids = None, tokens(1, 10)
    expected = plain(model, ids)
    for k in (1, 3, 6):
        assert torch.equal(drafted(model, ids, k).sequences, expected)


def test_unknown_position_kind_is_refused_early():
    model, forwards = close_draft(), []
    model.base.config.rope_parameters["rope_type"] = "of-somebody"
    model.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(umbra.BaseModelError, match=r"draft=.*rotary positions of the base"):
        drafted(model, tokens(1))
    assert not forwards


FEATURES = {
    "min_length": {"min_length": 14, "eos_token_id": list(range(3, 60))},
    "exponential decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7},
    "forced bos": {"forced_bos_token_id": 9},
    "forced eos": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "begin suppressed": {"begin_suppress_tokens": list(range(3, 70))},
    "sequence bias": {"sequence_bias": [[[t], 9.0 if t % 7 else -9.0] for t in range(3, 99)]},
    "encoder penalty": {"encoder_repetition_penalty": 1.7},
    "encoder n-grams": {"encoder_no_repeat_ngram_size": 2},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "contextual watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 8, 13], ngram_len=3)},
    "guidance": {"guidance_scale": 1.6},
    "invalid removed": {"remove_invalid_values": True},
    "renormalised": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "likeliest of several": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "temperature": {"do_sample": True, "temperature": 1e-4},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "constraints by groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "layers": {"dola_layers": "low"},
    "early exit": {"assistant_early_exit": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static"},
    "quantised": {"cache_implementation": "quantized"},
}  # fmt: skip


@pytest.mark.parametrize("form", FEATURES)
def test_every_generation_feature_is_exact_or_refused(form):
    model, ids, options = close_draft(), tokens(2), FEATURES[form]
    try:
        found = drafted(model, ids, 3, **options).sequences
    except (umbra.ConfigError, umbra.BaseModelError):
        return
    except (ValueError, ImportError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            plain(model, ids, **options)
        return
    assert torch.equal(found, plain(model, ids, **options))
