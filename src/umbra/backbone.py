"""The shadow itself: a small decoder beside the base, and what brings it to the base's width.

    s⁰ = projection(backbone(embed_projection(x)))        # x (B, T, D) → (B, T, Ds) → (B, T, D)

Both projections are bias-free linear maps, and absent where the widths are equal, so that a detached shadow can
fold them into its embeddings and its head.
"""

import copy
import uuid
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from . import anatomy
from .anatomy import Anatomy
from .config import ShadowConfig
from .core import Couplings
from .errors import BaseModelError, ConfigError

# What the shadow's backbone may be told about a batch, of all that a forward is given.
BATCH_ARGUMENTS = (
    "attention_mask", "position_ids", "past_key_values", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


class Shadow(nn.Module):
    """All trainable weights of a `ShadowModel`: backbone, projections, couplings, and trained heads if any.

    Args:
        base: where the parts of the base are.
        config: resolved.
        backbone_config: of a backbone that was saved before; None builds the one that ``config`` asks for.
    """

    def __init__(self, base: Anatomy, config: ShadowConfig, backbone_config: PretrainedConfig | None = None):
        super().__init__()
        D, L = base.config.hidden_size, len(base.blocks)
        self.config = config
        self.adapter_id = uuid.uuid4().hex
        self.classifier: dict[str, Any] = {}  # label names, where they are not those of the base's configuration
        self.first_cache_layer = 0
        self.trained: list[str] | None = None  # while it rests: what to train again
        self.backbone = build_backbone(base, config, backbone_config)
        self.owns_embeddings = _owns_embeddings(base, config, self.backbone)
        if not self.owns_embeddings:
            anatomy.remove_embeddings(self.backbone)
        elif config.is_pretrained:
            self.backbone.get_input_embeddings().requires_grad_(False)
        self.place(anatomy.cache_depth(base))
        self.shares_masks = anatomy.shares_masks(base.decoder, self.backbone)

        E, width = anatomy.table_width(base.embeddings), anatomy.states_width(self.backbone.config)
        narrows = width != E and not self.owns_embeddings
        self.embed_projection = nn.Linear(E, width, bias=False) if narrows else None
        self.projection = nn.Linear(width, D, bias=False) if width != D else None
        self.couplings = Couplings(L, D, config)

        train_heads = base.is_classifier if config.train_heads is None else config.train_heads
        self.heads = nn.ModuleDict()
        if train_heads:
            self.heads.update({path: copy.deepcopy(base.head).requires_grad_() for path in ("attached", "shadow")})

        weight: Tensor = base.embeddings.weight
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        self.to(device=weight.device, dtype=dtype)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, table: nn.Module, **batch: Any) -> Tensor:
        """The initial state s⁰ (B, T, D), in the shadow's dtype.

        Args:
            input_ids: (B, T); read by a shadow with its own embeddings.
            inputs_embeds: (B, T, D) of the base; looked up in ``table`` where None.
            table: the base's input embeddings.
            batch: any of `BATCH_ARGUMENTS`.

        Raises:
            BaseModelError: only ``inputs_embeds`` were given to a shadow that has its own embeddings.
        """
        batch.setdefault("use_cache", False)
        if self.owns_embeddings:
            if input_ids is None:
                raise BaseModelError(
                    "This shadow has its own embeddings and cannot read inputs_embeds of the base: pass input_ids."
                )
            x = self.backbone.get_input_embeddings()(input_ids)
        else:
            x = (table(input_ids) if inputs_embeds is None else inputs_embeds).to(self.dtype)
            x = x if self.embed_projection is None else self.embed_projection(x)
        if self.backbone.is_activation_checkpointing and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # reentrant checkpointing needs an input with a gradient
        return self._project(self.backbone(inputs_embeds=x, **batch).last_hidden_state)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    @property
    def cache_layers(self) -> range:
        """The layers of the common cache that hold this shadow's keys."""
        return range(self.first_cache_layer, self.first_cache_layer + self.backbone.config.num_hidden_layers)

    def place(self, first_cache_layer: int) -> None:
        """Move to other layers of the common cache."""
        anatomy.shift_layer_indices(self.backbone, first_cache_layer - self.first_cache_layer)
        self.first_cache_layer = first_cache_layer

    def rest(self) -> None:
        """Freeze all weights, until `wake`."""
        if self.trained is None:
            self.trained = [name for name, p in self.named_parameters() if p.requires_grad]
        self.requires_grad_(False)

    def wake(self) -> None:
        """Train again what was trained before `rest`."""
        for name in self.trained or ():
            self.get_parameter(name).requires_grad_()
        self.trained = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def parts(self) -> dict[str, int]:
        """Parameters of each part; parts without any are left out."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return {name: n for name, n in counts.items() if n}


def build_backbone(base: Anatomy, config: ShadowConfig, backbone_config: PretrainedConfig | None) -> PreTrainedModel:
    """The decoder that computes the shadow's states.

    Raises:
        ConfigError: sizes that do not fit together or do not exist in this architecture.
        BaseModelError: a pretrained shadow with another vocabulary.
    """
    if backbone_config is None and config.is_pretrained:
        return _pretrained(base, config.shadow)
    chosen = backbone_config or _backbone_config(base, config)
    chosen.__dict__.pop("quantization_config", None)
    if not config.is_pretrained:
        chosen._attn_implementation = base.config._attn_implementation
    build = type(base.decoder)._from_config if chosen.model_type == base.config.model_type else AutoModel.from_config
    try:
        backbone = build(chosen, dtype=torch.float32)
    except Exception as error:  # transformers and torch raise several unrelated types
        raise ConfigError(f"No shadow can be built from these sizes: {error}") from error
    if config.init == "base" and backbone_config is None:
        anatomy.copy_blocks(base, backbone)
    return backbone


def _backbone_config(base: Anatomy, config: ShadowConfig) -> PretrainedConfig:
    given = {k.removeprefix("shadow_"): v for k, v in config.to_dict().items() if k.startswith("shadow_")}
    sizes = {"num_hidden_layers": 1, **{k: v for k, v in given.items() if v is not None}}
    if config.shadow == "mirror" and anatomy.is_cheap_to_mirror(base.config):
        return anatomy.mirror_config(base.config, sizes)
    return anatomy.dense_config(base.config, sizes)


def _pretrained(base: Anatomy, path: str) -> PreTrainedModel:
    try:
        backbone = AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"shadow={path!r} is no model that transformers can load: {error}") from error
    if not anatomy.is_causal(backbone.config):
        raise BaseModelError(
            f"The pretrained shadow {path!r} ({backbone.config.model_type}) is no causal decoder: its states would know "
            "the tokens that they are to predict."
        )
    backbone.train()
    rows, needed = backbone.config.vocab_size, anatomy.vocabulary_size(base.embeddings)
    if rows < needed:
        raise BaseModelError(
            f"The pretrained shadow {path!r} knows {rows} tokens, the base {needed}: they must share one tokenizer. "
            "Take a shadow of the base's family, or shadow='mirror'."
        )
    return backbone


def _owns_embeddings(base: Anatomy, config: ShadowConfig, backbone: PreTrainedModel) -> bool:
    own = config.is_pretrained if config.embeddings == "auto" else config.embeddings == "own"
    if own and base.merges_embeddings:
        raise BaseModelError(
            f"A shadow with embeddings of its own cannot see the images that {type(base.model).__name__} puts among its "
            "embeddings: set embeddings='base'."
        )
    return own


def saved_config(values: dict[str, Any]) -> PretrainedConfig:
    """A backbone configuration from an adapter folder; only model types that transformers knows.

    Raises:
        ConfigError: an unknown model type, or values that it refuses.
    """
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # strict validation of transformers raises several unrelated types
        raise ConfigError(f"The saved shadow's configuration cannot be used: {error}") from error
