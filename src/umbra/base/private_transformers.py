"""Private names of transformers that Umbra calls, reads or overrides: see `umbra.base.private`."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from umbra.base import private
from umbra.base.private import PrivateName

if TYPE_CHECKING:
    from transformers import TrainingArguments

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
    PrivateName("transformers:CompileConfig", "_compile_all_devices", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_from_model_config", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_mask_length", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_original_object_hash", on_instance=True),
    PrivateName(GENERATION_CONFIG, "_pad_token_tensor", on_instance=True),
    # The trainers override these.
    PrivateName(TRAINER, "_finalize_training", ("trial", "num_train_samples", "start_time")),
    PrivateName(TRAINER, "_get_num_items_in_batch", ("batch_samples", "device")),
    PrivateName(
        TRAINER, "_init_training_state",
        ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ),
    PrivateName(
        TRAINER, "_inner_training_loop",
        ("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    ),
    PrivateName(TRAINER, "_load_best_model", ()),
    PrivateName(TRAINER, "_load_from_checkpoint", ("resume_from_checkpoint", "model")),
    PrivateName(TRAINER, "_load_optimizer_and_scheduler", ("checkpoint",)),
    PrivateName(
        TRAINER, "_maybe_log_save_evaluate",
        ("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time", "learning_rate"),
    ),
    PrivateName(TRAINER, "_save", ("output_dir", "state_dict")),
    PrivateName(TRAINER, "_save_checkpoint", ("model", "trial")),
    PrivateName(TRAINER, "_save_optimizer_and_scheduler", ("output_dir",)),
    PrivateName(TRAINER, "_save_scaler", ("output_dir",)),
    PrivateName(TRAINER, "_set_signature_columns_if_needed", ()),
    # The trainers call or read these.
    PrivateName(TRAINER, "_get_output_dir", ("trial",)),
    PrivateName(TRAINER, "_load_rng_state", ("checkpoint",)),
    PrivateName(TRAINER, "_globalstep_last_logged", on_instance=True),
    PrivateName(TRAINER, "_initial_global_step", on_instance=True),
    PrivateName(TRAINER, "_signature_columns", on_instance=True),
    PrivateName(TRAINER, "_total_loss_scalar", on_instance=True),
    PrivateName(TRAINER, "_tr_loss", on_instance=True),
    PrivateName(ARGUMENTS, "_n_gpu", on_instance=True),
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


def recordable_outputs(model: PreTrainedModel) -> Iterable[str]:
    """Return the names of the intermediate outputs that a model can return."""
    return model._can_record_outputs or ()


def use_attention_of(config: PretrainedConfig, other: PretrainedConfig) -> None:
    """Select the attention implementation of another configuration."""
    config._attn_implementation = other._attn_implementation


def clear_implementations(config: PretrainedConfig) -> None:
    """Select no implementation of attention and experts, in nested configurations too."""
    config._attn_implementation = None
    config._experts_implementation = None


def build_from_config(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of this class with new weights."""
    return kind._from_config(config, dtype=dtype)


def use_one_gpu(arguments: "TrainingArguments") -> None:
    """Prevent DataParallel in this process: it would copy hooks that refer to one device."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


def compile_on_all_devices(config: CompileConfig) -> None:
    """Let generation compile on a CPU too, where transformers does not compile automatically."""
    config._compile_all_devices = True  # type: ignore[assignment]


def mark_changed(generation: GenerationConfig, *, is_read_back: bool = True) -> None:
    """Let a generation config be saved after a change, even if entries that came from the base are inconsistent.

    Args:
        generation: the config.
        is_read_back: whether `from_pretrained` must read the file; it ignores one that says it was derived from the
            model's configuration.
    """
    if is_read_back:
        generation._from_model_config = False
    generation._original_object_hash = hash(generation)


def prefill(model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
    """Return the model output of the prompt (B, T)."""
    return model._prefill(input_ids, config, model_kwargs)


def update_model_kwargs(
    model: Any, outputs: Mapping[str, Any], model_kwargs: dict[str, Any], *args: Any, **options: Any
) -> dict[str, Any]:
    """Return the arguments of the next forward: cache, mask and positions, longer by ``num_new_tokens``, by default 1."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)


def validate_model_kwargs(model: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for arguments that a model's forward does not take."""
    model._validate_model_kwargs(model_kwargs)


def prepare_position_ids(model: Any, inputs: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Return the position ids of the prompt (B, T)."""
    return model._prepare_position_ids_for_generation(inputs, model_kwargs)


def prepare_encoder_kwargs(model: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """Return the arguments of the forward with the outputs of a model's encoder, where it has one."""
    return model._maybe_prepare_encoder_kwargs_for_generation(*args, **options)


def pad_token(config: GenerationConfig, device: torch.device) -> Tensor:
    """Return the padding token () of a generation that has an end-of-text token."""
    padding = config._pad_token_tensor
    assert padding is not None
    return padding.to(device)


def mask_length(config: GenerationConfig) -> int | None:
    """Return the length of the attention mask that ``generate`` dropped because it hides nothing; None if it kept it."""
    return vars(config).get("_mask_length")
