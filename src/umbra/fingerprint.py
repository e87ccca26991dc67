"""Telling one base from another: sizes, and a sample of the weights.

The sample survives a change of precision (it is kept in bf16) and quantised linears (they are not in it, only what
is still floating point), but not another training run.
"""

import base64
from typing import Any

import torch

from . import shards
from .anatomy import Anatomy, vocabulary_size
from .errors import BaseModelError, CheckpointError

SAMPLES = 16  # values of each tensor
AGREEMENT = 0.9  # share of all samples that must be equal in bf16, and of one tensor's that must be next to equal
NEXT = 2.0**-7, 1e-7  # relative, absolute: one step of bf16; a detour over fp16 moves 1 value in 16 by that much


def fingerprint(base: Anatomy) -> dict[str, Any]:
    """Sizes, and ``weights``: name → base64 of `SAMPLES` evenly spaced values in bf16.

    Sampled are the embeddings and every tensor of every block.
    """
    config, blocks = base.config, list(base.blocks)
    tensors: dict[str, torch.Tensor] = {"embeddings": base.embeddings.weight}
    for l in range(len(blocks)):
        tensors |= {f"block {l} {name}": p for name, p in blocks[l].named_parameters()}
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(blocks),
        "vocab_size": vocabulary_size(base.embeddings),
        "weights": {name: _sample(p) for name, p in tensors.items() if _is_plain(p)},
    }


def _is_plain(p: torch.Tensor) -> bool:
    return p.is_floating_point() and p.element_size() > 1 and type(p.data) is torch.Tensor and not p.is_meta


def _sample(p: torch.Tensor) -> str:
    with shards.gathered([p]):
        flat = shards.gather(p.detach()).reshape(-1)
        values = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    return base64.b64encode(values.float().bfloat16().view(torch.int16).cpu().numpy().tobytes()).decode()


def _decode(sample: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(sample)), dtype=torch.bfloat16).float()


def check_same_base(expected: dict[str, Any], base: Anatomy) -> None:
    """Raise unless ``base`` is the one that the fingerprint was taken of.

    Raises:
        BaseModelError: another architecture, other sizes, or other weights.
        CheckpointError: a damaged fingerprint.
    """
    found = fingerprint(base)
    mend = "Load the adapter with the base that it was trained on; allow_other_base=True overrides."
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if expected.get(key) != found[key]:
            raise BaseModelError(f"Wrong base: {key} is {found[key]}, the adapter's has {expected.get(key)}. {mend}")
    try:
        samples = {name: _decode(sample) for name, sample in expected["weights"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"The adapter's record of its base's weights is damaged: {error!r}") from error
    equal = count = 0
    for name in sorted(samples.keys() & found["weights"].keys()):
        a, b = samples[name], _decode(found["weights"][name])
        if len(a) != len(b) or torch.isclose(a, b, *NEXT).float().mean() < AGREEMENT:
            raise BaseModelError(f"Wrong base: same sizes, but other weights in {name}. {mend}")
        equal, count = equal + int((a == b).sum()), count + len(a)
    if equal < AGREEMENT * count:
        raise BaseModelError(f"Wrong base: same sizes, but slightly other weights throughout. {mend}")
