"""Private names of transformers that Umbra calls, reads or overrides: see `umbra.base.private`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from umbra.base import private
from umbra.base.private import PrivateName

SUPPORTED = ">=5.23,<6"  # as in pyproject.toml
GENERATION, MODEL, CONFIG = (
    "transformers:GenerationMixin",
    "transformers:PreTrainedModel",
    "transformers:PreTrainedConfig",
)
GENERATION_CONFIG, TRAINER, ARGUMENTS = (
    "transformers:GenerationConfig", "transformers:Trainer", "transformers:TrainingArguments",
)  # fmt: skip
_DECODING = ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus")
NAMES = (
    # `ShadowForCausalLM` overrides these.
    PrivateName(
        GENERATION, "_assisted_decoding",
        (*_DECODING, "streamer", "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer", "model_kwargs"),
    ),
    PrivateName(GENERATION, "_beam_search", (*_DECODING, "model_kwargs")),
    PrivateName(
        GENERATION, "_extract_generation_mode_kwargs",
        ("custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"),
    ),
    PrivateName(
        GENERATION, "_get_candidate_generator",
        ("generation_config", "input_ids", "inputs_tensor", "logits_processor", "model_kwargs", "assistant_model",
         "target_tokenizer", "assistant_tokenizer"),
    ),
    PrivateName(GENERATION, "_get_static_cache_init_shape", ()),
    PrivateName(
        GENERATION, "_maybe_prepare_encoder_kwargs_for_generation",
        ("inputs_tensor", "model_kwargs", "model_input_name", "generation_config"),
    ),
    PrivateName(GENERATION, "_prefill", ("input_ids", "generation_config", "model_kwargs", "is_first_iteration")),
    PrivateName(
        GENERATION, "_prepare_cache_for_generation",
        ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    ),
    PrivateName(GENERATION, "_prepare_position_ids_for_generation", ("inputs_tensor", "model_kwargs")),
    PrivateName(
        GENERATION, "_update_model_kwargs_for_generation",
        ("outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"),
    ),
    PrivateName(
        GENERATION, "_validate_generation_mode", ("generation_mode", "generation_config", "generation_mode_kwargs"),
    ),
    PrivateName(GENERATION, "_validate_model_kwargs", ("model_kwargs",)),
    # `ShadowModel` overrides these.
    PrivateName(
        MODEL, "_check_and_adjust_attn_implementation", ("attn_implementation", "is_init_check", "allow_all_kernels"),
    ),
    PrivateName(MODEL, "_check_and_adjust_experts_implementation", ("experts_implementation",)),
    PrivateName(MODEL, "_init_weights", ("module",)),
    PrivateName(
        MODEL, "_set_gradient_checkpointing", ("enable", "gradient_checkpointing_func", "every_n_layers"),
    ),
    PrivateName(MODEL, "_can_compile_fullgraph"),
    PrivateName(MODEL, "_is_stateful"),
    PrivateName(MODEL, "_keys_to_ignore_on_save"),
    PrivateName(MODEL, "_no_split_modules"),
    # Called or read.
    PrivateName(MODEL, "_can_record_outputs"),
    PrivateName(MODEL, "_from_config", ("config", "kwargs")),
    PrivateName(CONFIG, "_attn_implementation"),
    PrivateName(CONFIG, "_experts_implementation"),
    PrivateName(CONFIG, "_name_or_path", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_from_model_config", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_mask_length", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_original_object_hash", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_pad_token_tensor", on_instance=True),
)  # fmt: skip


def check(*owners: str) -> None:
    """Check the private names of these owners.

    Args:
        owners: such as `GENERATION`.

    Raises:
        ImportError: a name is missing or takes other parameters.
    """
    names = [name for name in NAMES if name.owner in owners and not name.on_instance]
    private.check("transformers", SUPPORTED, names)


def prefill(model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
    """Return the model output of the prompt (B, T)."""
    return model._prefill(input_ids, config, model_kwargs)


def update_model_kwargs(
    model: Any, outputs: Mapping[str, Any], model_kwargs: dict[str, Any], num_new_tokens: int | None = None
) -> dict[str, Any]:
    """Return the arguments of the next forward: cache, mask and positions, longer by ``num_new_tokens``, by default 1."""
    options = {} if num_new_tokens is None else {"num_new_tokens": num_new_tokens}
    return model._update_model_kwargs_for_generation(outputs, model_kwargs, **options)


def pad_token(config: GenerationConfig, device: torch.device) -> Tensor:
    """Return the padding token () of a generation that has an end-of-text token."""
    padding = config._pad_token_tensor
    assert padding is not None
    return padding.to(device)


def mask_length(config: GenerationConfig) -> int | None:
    """Return the length of the attention mask that ``generate`` dropped because it hides nothing; None if it kept it."""
    return vars(config).get("_mask_length")
