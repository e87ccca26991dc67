"""Narrower copies of a base's blocks: the directions, heads and neurons with the largest weights.

    states    x′ = Qᵀ · x              Q (D, Ds): the leading eigenvectors of Eᵀ · E, E the embeddings (V, D)
    reading   W′ = c · W · diag(g) · Q   g: the weight of the preceding norm, c = √(share of E's energy in Q · D / Ds), since
    writing   W′ = Qᵀ · W                    the norm of fewer directions differs

Heads are selected in groups that share keys and values, by ‖W_v‖; heads within a group, and neurons, by their weights.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from umbra.base import quantized
from umbra.base.architectures.parts import Architecture
from umbra.base.architectures.tables import embedding_rows, weight_of
from umbra.errors import ConfigError

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NORMS = ("input_layernorm", "post_attention_layernorm")
READING = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITING = ("self_attn.o_proj", "mlp.down_proj")
# All parameters of a block in Llama's form, and optional ones. A norm with a bias is none of these.
NEEDED = {f"{name}.weight" for name in (*NORMS, *READING, *WRITING)}
ALLOWED = {f"{name}.bias" for name in (*READING, *WRITING)} | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
ROWS = 2**14  # of a table, multiplied at once


def is_narrower(config: PretrainedConfig, base: PretrainedConfig) -> bool:
    """Return whether a shadow of the base's architecture differs in size from its blocks.

    Args:
        config: of the shadow's backbone.
        base: of the base's decoder.
    """
    if config.model_type != base.model_type:
        return False
    first = base.per_layer_config[0]  # as `mirror_config` does
    return any(getattr(config, n, None) != getattr(first, n, None) for n in (*SIZES, "head_dim"))


class Projections(NamedTuple):
    """Maps into (Ds, D) and out of (D, Ds) the narrower stream; None where its width is the base's."""

    embed_projection: Tensor | None
    projection: Tensor | None


@dataclass(frozen=True)
class _Basis:
    """Q (D, Ds), and c."""

    matrix: Tensor
    scale: float

    @property
    def is_square(self) -> bool:
        return self.matrix.shape[0] == self.matrix.shape[1]


@torch.no_grad()
def prune_blocks(source: Architecture, backbone: PreTrainedModel, layers: tuple[int, ...]) -> Projections:
    """Initialize a narrower shadow with these blocks of the base.

    Args:
        source: the base.
        backbone: of the shadow, of the base's architecture; changed in place.
        layers: the base's block for each block of the shadow.

    Raises:
        ConfigError: blocks of another form than Llama's, or sizes larger than the base's.
    """
    _check(source, backbone)
    decoder: Any = backbone  # of Llama's form
    width, full, share = backbone.config.hidden_size, source.config.hidden_size, 1.0
    matrix = torch.eye(full)
    if width < full:
        matrix, share = _directions(embedding_rows(source.embeddings), width)
    basis = _Basis(matrix, (share * full / width) ** 0.5)
    for block, l in zip(decoder.layers, layers, strict=True):
        _prune(source.blocks[l], block, basis, source, backbone.config)
    final = source.decoder.get_submodule("norm")
    if width == full:
        decoder.norm.load_state_dict(final.state_dict())
        return Projections(None, None)
    _reset(decoder.norm)
    return Projections(matrix.T, basis.scale * _gain(final)[:, None] * matrix)


def _check(source: Architecture, backbone: PreTrainedModel) -> None:
    """Raise a ConfigError where the blocks cannot be narrowed."""
    config, base = backbone.config, source.config
    blocks = getattr(backbone, "layers", None)
    names = {name for name, _ in blocks[0].named_parameters()} if isinstance(blocks, nn.ModuleList) else set()
    if type(backbone) is not type(source.decoder) or not NEEDED <= names <= NEEDED | ALLOWED:
        raise ConfigError(
            f"init='base' copies blocks of a {base.model_type} into a shadow of their own sizes; only blocks of Llama's form "
            "can be made narrower. Leave the shadow's sizes alone."
        )
    for name in SIZES:
        if getattr(config, name) > getattr(base, name):
            raise ConfigError(
                f"init='base' copies parts of the base: shadow_{name}={getattr(config, name)} is more than its "
                f"{getattr(base, name)}."
            )
    groups = [c.num_attention_heads // c.num_key_value_heads for c in (config, base)]
    if _head_dim(config) != _head_dim(base) or groups[0] > groups[1]:
        raise ConfigError(
            f"init='base' copies whole heads: shadow_head_dim must be {_head_dim(base)}, and at most {groups[1]} heads may share "
            f"keys and values, got {_head_dim(config)} and {groups[0]}."
        )


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gain(norm: nn.Module) -> Tensor:
    """Return the factor (D,) that a norm applies: its weight, or 1 + weight."""
    weight = weight_of(norm)
    return norm(torch.ones(weight.shape, dtype=weight.dtype, device=weight.device)).float().cpu()


def _reset(norm: nn.Module) -> None:
    """Set a norm's factor to 1."""
    weight_of(norm).fill_(1.0)
    if (_gain(norm) - 1).abs().max() > 1e-2:
        weight_of(norm).zero_()


def _directions(table: Tensor, width: int) -> tuple[Tensor, float]:
    """Return Q (D, Ds), and its share of the energy of a table (V, D)."""
    gram = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows in table.split(ROWS):
        gram += (rows.float().T @ rows.float()).cpu()
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, -width:].flip(-1).float(), float(values[-width:].sum() / values.sum())


def _prune(
    base_block: nn.Module, block: nn.Module, basis: _Basis, source: Architecture, config: PretrainedConfig
) -> None:
    """Initialize a block of the shadow from one of the base."""

    def weight(name: str) -> Tensor:
        return quantized.linear_weight(base_block.get_submodule(name), source.model.dtype).float().cpu()

    v, o = weight("self_attn.v_proj"), weight("self_attn.o_proj")
    groups, heads = _largest_heads(v, o, source.config, config)
    inner = [weight(f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")]
    sizes = inner[0].norm(dim=1) * inner[1].norm(dim=1) * inner[2].norm(dim=0)
    neurons = sizes.topk(config.intermediate_size).indices.sort().values
    gains = [_copy_norm(base_block.get_submodule(name), block.get_submodule(name), basis) for name in NORMS]
    reading = (heads, groups, groups, neurons, neurons)
    for name, rows in zip(READING, reading, strict=True):
        gain = gains[0] if name.startswith("self_attn") else gains[1]
        old, new = _linears(base_block, block, name)
        new.weight.copy_((weight(name)[rows] * gain) @ basis.matrix)
        if new.bias is not None:
            new.bias.copy_(old.bias[rows])
    for name, columns in zip(WRITING, (heads, neurons), strict=True):
        old, new = _linears(base_block, block, name)
        new.weight.copy_(basis.matrix.T @ weight(name)[:, columns])
        if new.bias is not None:
            new.bias.copy_(basis.matrix.T @ old.bias.float().cpu())
    base_modules, modules = dict(base_block.named_modules()), dict(block.named_modules())
    for name in ("self_attn.q_norm", "self_attn.k_norm"):
        if name in modules and weight_of(modules[name]).shape == weight_of(base_modules[name]).shape:
            modules[name].load_state_dict(base_modules[name].state_dict())


def _linears(base_block: nn.Module, block: nn.Module, name: str) -> tuple[nn.Linear, nn.Linear]:
    return cast(nn.Linear, base_block.get_submodule(name)), cast(nn.Linear, block.get_submodule(name))


def _copy_norm(old: nn.Module, new: nn.Module, basis: _Basis) -> Tensor:
    """Initialize a norm, and return the factor (D,) that goes into the weights that read its output."""
    if basis.is_square:
        new.load_state_dict(old.state_dict())
        return torch.ones(len(basis.matrix))
    _reset(new)
    return basis.scale * _gain(old)


def _largest_heads(v: Tensor, o: Tensor, base: PretrainedConfig, config: PretrainedConfig) -> tuple[Tensor, Tensor]:
    """Return the rows of k and v of the selected groups, and the rows of q of the selected heads in each."""
    dim, num_groups, new_groups = _head_dim(base), base.num_key_value_heads, config.num_key_value_heads
    group_size, new_size = base.num_attention_heads // num_groups, config.num_attention_heads // new_groups
    groups = v.view(num_groups, -1).norm(dim=1).topk(new_groups).indices.sort().values
    sizes = o.T.reshape(num_groups, group_size, -1).norm(dim=2)[groups]
    heads = sizes.topk(new_size, dim=1).indices.sort(dim=1).values + groups[:, None] * group_size

    def rows(chosen: Tensor) -> Tensor:
        return (chosen.flatten()[:, None] * dim + torch.arange(dim)).flatten()

    return rows(groups), rows(heads)
