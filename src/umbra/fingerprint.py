"""Telling one base from another: sizes, and a sample of the weights.

The sample survives a change of precision (it is kept in bf16) and quantisation, but not another training run. Of what is
quantised, on either side, only the likeness is compared: 2 to 8 bits tell a base from a stranger, not from its sibling.
"""

import base64
from typing import Any

import torch
from torch import Tensor

from . import anatomy, dense, shards
from .anatomy import Anatomy
from .errors import BaseModelError, CheckpointError

SAMPLES = 16  # values of each tensor
AGREEMENT = 0.9  # share of all samples that must be equal in bf16, and of one tensor's that must be next to equal
NEXT = 2.0**-7, 1e-7  # relative, absolute: one step of bf16; a detour over fp16 moves 1 value in 16 by that much
LIKENESS = 0.7  # least mean cosine of quantised samples with those of the same base; 2 bits 0.9, another base 0 ± 0.1


def fingerprint(base: Anatomy) -> dict[str, Any]:
    """Sizes, and ``weights`` and ``quantised``: name → base64 of `SAMPLES` evenly spaced values in bf16.

    Sampled are the embeddings and every tensor of every block.
    """
    config, blocks = base.config, list(base.blocks)
    plain, quantised = {}, {}

    def columns(layer: Any) -> Tensor:
        return dense.columns(layer, _places(layer.in_features), base.model.dtype)

    if _is_readable(base.embeddings.weight):
        plain["embeddings"] = _sample(base.embeddings.weight)
    elif dense.is_packed(base.embeddings):
        rows = anatomy.embedding_rows(base.embeddings, _places(anatomy.vocabulary_size(base.embeddings)))
        quantised["embeddings"] = _sample(rows)
    for l in range(len(blocks)):
        plain |= {f"block {l} {n}": _sample(p) for n, p in blocks[l].named_parameters() if _is_readable(p)}
        packed = {n: m for n, m in blocks[l].named_modules() if dense.is_packed_linear(m)}
        quantised |= {f"block {l} {n}.weight": _sample(columns(m)) for n, m in packed.items()}
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(blocks),
        "vocab_size": anatomy.vocabulary_size(base.embeddings),
        "weights": plain,
        "quantised": quantised,
    }


def _is_readable(p: Tensor) -> bool:
    return dense.is_plain(p) or (shards.is_partitioned(p) and p.is_floating_point())


def _places(size: int, device: torch.device | None = None) -> Tensor:
    return torch.linspace(0, size - 1, SAMPLES, dtype=torch.float64).long().to(device)


def _sample(p: Tensor) -> str:
    """Along the diagonal, so that a weight, its transpose and its sampled columns alone give the same values."""
    with shards.gathered([p]):
        whole = shards.gather(p.detach())
        values = whole[tuple(_places(size, whole.device) for size in whole.shape)]
    return base64.b64encode(values.float().bfloat16().view(torch.int16).cpu().numpy().tobytes()).decode()


def _decode(sample: str) -> Tensor:
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
        plain, quantised = (
            {name: _decode(sample) for name, sample in expected[kind].items()} for kind in ("weights", "quantised")
        )
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"The adapter's record of its base's weights is damaged: {error!r}") from error
    given, have = plain | quantised, found["weights"] | found["quantised"]
    exact = plain.keys() & found["weights"].keys()
    equal, count, likeness = 0, 0, []
    for name in sorted(given.keys() & have.keys()):
        a, b = given[name], _decode(have[name])
        if len(a) != len(b) or (name in exact and torch.isclose(a, b, *NEXT).float().mean() < AGREEMENT):
            raise BaseModelError(f"Wrong base: same sizes, but other weights in {name}. {mend}")
        if name in exact:
            equal, count = equal + int((a == b).sum()), count + len(a)
        else:
            likeness.append(float(torch.cosine_similarity(a, b, dim=0)))
    if equal < AGREEMENT * count:
        raise BaseModelError(f"Wrong base: same sizes, but slightly other weights throughout. {mend}")
    if sum(likeness) < LIKENESS * len(likeness):
        raise BaseModelError(f"Wrong base: same sizes, but other quantised weights. {mend}")
