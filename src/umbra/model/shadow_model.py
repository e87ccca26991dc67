"""`ShadowModel`: the base and its shadow as one transformers model."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from umbra.base import architectures, quantized
from umbra.base.fingerprint import fingerprint
from umbra.config import ShadowConfig, check_kind
from umbra.errors import BaseModelError, ConfigError
from umbra.generation.drafting import Drafting
from umbra.method import kernels
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import Attachment, check_free
from umbra.method.losses import IGNORED, as_classes, classification_loss, token_loss
from umbra.model.adapter_set import DEFAULT, Adapters
from umbra.model.losses import Labelled, Labels, Losses
from umbra.model.paths import Paths
from umbra.shadow.network import Shadow


@dataclass
class ShadowCausalLMOutput(CausalLMOutputWithPast):
    """As its parent, and not multiplied by their weights: ``shadow_loss``, the shadow's own, and ``distillation_loss``."""

    shadow_loss: Tensor | None = None
    distillation_loss: Tensor | None = None


@dataclass
class ShadowSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """As its parent, and ``shadow_loss``: the shadow's own loss, not multiplied by λ."""

    shadow_loss: Tensor | None = None


FIELDS = {kind: [f.name for f in fields(kind)] for kind in (ShadowCausalLMOutput, ShadowSequenceClassifierOutput)}


def attach(
    base: PreTrainedModel, config: ShadowConfig | None = None, *, backbone_config: PretrainedConfig | None = None
) -> "ShadowModel":
    """Put a shadow beside a frozen base.

    The base's weights are frozen and never changed; no module of it is replaced or renamed. `ShadowModel.unload`
    gives the base back.

    Args:
        base: a decoder with a language-model head, or with a sequence-classification head.
        config: default `ShadowConfig()`.
        backbone_config: of a shadow that was saved before (see `umbra.load`).

    Raises:
        BaseModelError: a base that cannot carry a shadow, carries one or another adapter, or is wrapped.
        ConfigError: sizes that do not fit the base, or no `ShadowConfig`.
    """
    config = ShadowConfig() if config is None else check_kind(config)
    architectures.check_bare(base)
    located = architectures.locate(base)
    kind = ShadowForSequenceClassification if located.is_classifier else ShadowForCausalLM
    return kind(base, config, backbone_config=backbone_config)


class ShadowModel(Adapters, Paths, PreTrainedModel):
    """A frozen ``base`` and the trainable ``shadow`` that corrects it. Made by `attach` and `load`."""

    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    def __init__(self, base: PreTrainedModel, config: ShadowConfig, *, backbone_config: PretrainedConfig | None = None):
        architectures.check_bare(base)
        located = architectures.locate(base)
        check_free(located.blocks)
        _check_devices(base)
        repacking = quantized.keep_unpacked(base)
        resolved = config.resolve()
        layers = len(located.blocks)
        if layers < 2:
            raise BaseModelError(f"The base has {layers} block; a shadow needs at least 2 to be coupled to.")
        resolved.coupled(layers)
        shadow = Shadow(located, resolved, backbone_config)

        composite = architectures.composite_config(base.config, {shadow.first_cache_layer: shadow.backbone.config})
        composite.keys_to_ignore_at_inference = ["past_key_values", "shadow_loss"]
        super().__init__(composite)
        self.base = base
        self.shadow = shadow
        self.resting = nn.ModuleDict()
        self.active_adapter = DEFAULT
        self.main_input_name = base.main_input_name
        # Of the training, from 0 to 1: what a schedule goes by. Trainers keep it.
        self.progress = torch.zeros((), device="cpu")
        self.all_tied_weights_keys = {f"base.{k}": f"base.{v}" for k, v in base.all_tied_weights_keys.items()}
        self._no_split_modules = base._no_split_modules
        self._keys_to_ignore_on_save = {f"base.{key}" for key in base.state_dict()}
        self._head_name = located.head_name
        self.base_fingerprint = fingerprint(located)
        self._repacking = repacking
        self._was_checkpointing = base.is_activation_checkpointing
        self._modes = architectures.modes(base)
        self._were_trainable = [name for name, p in base.named_parameters() if p.requires_grad]
        self._merges_embeddings = located.merges_embeddings
        self._cache_argument = architectures.cache_argument(base)
        self._arguments = architectures.forward_arguments(self, base, base.base_model, located.decoder)
        decoder = located.decoder if located.merges_embeddings else None
        self._rows_before: list[Tensor] = []  # of added tokens, where the base had such already
        self._attachment = Attachment(located.blocks, base, located.head_name, decoder, located.stream)
        base.requires_grad_(False)
        kernels.patch_linears(self.modules())
        self.train(base.training)

    @property
    def shadow_config(self) -> ShadowConfig:
        """The active shadow's."""
        return self.shadow.config

    def _total(self, losses: Losses) -> Tensor:
        """task + λ · shadow + μ · distillation in training; evaluation reports the task's loss alone."""
        total = losses.task
        if self.training and losses.shadow is not None:
            total = total + self._weight * losses.shadow
        if self.training and losses.distillation is not None:
            total = total + self._distillation_weight * losses.distillation
        return total

    def _output(self, kind: type, values: dict[str, Any], batch: dict[str, Any], return_dict: bool | None) -> Any:
        """Values by name as an output of this kind, or as a tuple in the base's order, of those that there are.

        What only the base's own class has (image states, router logits) stands in it as well.
        """
        values = {"loss": None, **values}
        for name in ("loss", "logits"):
            values[name] = self._to_train(values.get(name), batch["inputs_embeds"])
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(value for value in values.values() if value is not None)
        known = FIELDS[kind]
        result = kind(**{k: v for k, v in values.items() if k in known})
        for name, value in values.items():
            if name not in known:
                result[name] = value
        return result

    @property
    def _distillation_weight(self) -> Tensor | float:
        """μ, now."""
        config = self.shadow.config
        if config.distillation_schedule == "constant":
            return config.distillation_weight
        share = self.progress if config.distillation_schedule == "rise" else 1 - self.progress
        return config.distillation_weight * share

    @property
    def base_head(self) -> nn.Module:
        """The base's own task head, frozen."""
        return self.base.get_submodule(self._head_name)

    @property
    def base_fingerprint(self) -> dict[str, Any]:
        """What tells the base from others, of the head and the embeddings that it has now."""
        if self._tables() != self._fingerprinted[1]:
            added = self.shadow.added_tokens
            self.base_fingerprint = fingerprint(architectures.locate(self.base), None if added is None else added.first)
        return self._fingerprinted[0]

    @base_fingerprint.setter
    def base_fingerprint(self, value: dict[str, Any]) -> None:
        self._fingerprinted = value, self._tables()

    def _tables(self) -> tuple[nn.Module, nn.Module, int]:
        """The base's head and embeddings, and the rows of the latter."""
        embeddings = self.base.get_input_embeddings()
        return self.base_head, embeddings, architectures.vocabulary_size(embeddings)

    # -- as a transformers model -----------------------------------------------------------------------------------

    def unload(self) -> PreTrainedModel:
        """The base, bit for bit as it was before `attach`; this model cannot be used afterwards.

        Rows of added tokens go, or become again what they were. Rows that were cut off do not come back.
        """
        self._attachment.remove()
        self._remove_added_tokens()
        kernels.unpatch_linears(self.base.modules())
        if not self._was_checkpointing:
            self.base.activation_checkpointing_disable()
        architectures.restore_modes(self.base, self._modes)
        for name in self._were_trainable:
            self.base.get_parameter(name).requires_grad_(True)
        quantized.allow_repacking(self._repacking)
        return self.base

    def detached(self) -> PreTrainedModel:
        """The shadow as a stock transformers model with weights of its own: see `umbra.deploy.detach`."""
        from umbra.deploy.detach import detach

        return detach(self)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the adapter folder, atomically; the base is not written. See `umbra.adapters.checkpoint.save`.

        Args:
            push_to_hub: upload the adapter too, to ``repo_id`` or a repository of the folder's name; then also all
                arguments of `push_to_hub`.
        """
        from umbra.adapters.checkpoint import save

        own = ("adapter_name", "tokenizer", "chat_template", "chat_template_kwargs")
        names = inspect.signature(self.push_to_hub).parameters.keys() - {"repo_id", *own}
        hub = {name: options.pop(name) for name in names & options.keys()}
        save(self, save_directory, **options)
        if push_to_hub:
            saved = {name: options.get(name) for name in own}
            self.push_to_hub(repo_id or Path(save_directory).name, **saved, **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        adapter_name: str | None = None,
        tokenizer: Any = None,
        chat_template: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: Any = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload an adapter's folder with its card, to a repository that is made if it is not there.

        Args:
            adapter_name: which of several adapters; by default the active one.
            tokenizer, chat_template, chat_template_kwargs: as in `umbra.adapters.checkpoint.save`.
            private, token, revision, create_pr, commit_message, commit_description: as in huggingface_hub.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        with TemporaryDirectory() as scratch:
            self.save_pretrained(
                scratch, adapter_name=adapter_name, tokenizer=tokenizer, chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )  # fmt: skip
            return api.upload_folder(
                repo_id=repository, folder_path=scratch, commit_message=commit_message, revision=revision,
                commit_description=commit_description, create_pr=create_pr,
            )  # fmt: skip

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **options: Any) -> "ShadowModel":  # type: ignore[override]
        """The same as `umbra.load`."""
        from umbra.adapters.checkpoint import load

        return load(path, *args, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the base another table of embeddings, which its shadows read too.

        Raises:
            ConfigError: a table of another size.
            BaseModelError: one that parts head and embeddings after tokens were added to both.
        """
        before = self.base.get_input_embeddings()
        _check_replacement("input embeddings", before, value)
        self._replace(self.base.set_input_embeddings, before, value)

    def _replace(self, put: Callable[[nn.Module], None], before: nn.Module, after: nn.Module) -> None:
        put(after)
        try:
            self._attachment.settle()
        except BaseModelError:
            put(before)
            raise

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the base another head, which both paths read from then on.

        Raises:
            ConfigError: trained heads stand in its place, or it has another size.
            BaseModelError: as `set_input_embeddings`.
        """
        if new_embeddings is self.get_output_embeddings():
            return
        trained = [name for name in self.adapters if self.adapter(name).heads]
        if trained:
            raise ConfigError(
                f"The adapter {trained[0]!r} has trained heads, which answer in place of the base's: another head would have no "
                "effect. Change model.shadow.heads, or attach with train_heads=False."
            )
        _check_replacement("head", self.base_head, new_embeddings)
        self._replace(self.base.set_output_embeddings, self.base_head, new_embeddings)
        kernels.patch_linears([new_embeddings])

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **options: Any) -> None:
        """As in transformers; blocks below the first coupled one keep nothing for a backward and are left out."""
        super()._set_gradient_checkpointing(enable, *args, **options)
        architectures.exempt_from_checkpointing(
            architectures.locate(self.base).blocks[: self.shadow.couplings.layers[0]]
        )

    def enable_input_require_grads(self) -> None:
        """Nothing: a gradient of the embeddings would only be carried through every block below the first coupled one."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **options: Any) -> Any:
        return attn_implementation  # the base has settled it

    def _check_and_adjust_experts_implementation(self, experts_implementation: Any) -> Any:
        return experts_implementation  # likewise

    def num_trainable_parameters(self) -> int:
        """Parameters that an optimizer would be given."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: base and shadow arrive initialised."""


class ShadowForCausalLM(Labelled, ShadowModel, Drafting, GenerationMixin):
    """A language model and its shadow."""

    def __init__(self, base: PreTrainedModel, config: ShadowConfig, *, backbone_config: PretrainedConfig | None = None):
        super().__init__(base, config, backbone_config=backbone_config)
        self.generation_config = copy.deepcopy(base.generation_config) or GenerationConfig()
        self._is_stateful = base._is_stateful  # transformers then refuses what would have to go back
        if not architectures.takes_cache(base):
            self.generation_config.use_cache = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shadow_targets: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        adapter_names: Sequence[str | None] | None = None,
        ignore_index: int = IGNORED,
        **kwargs: Any,
    ) -> Any:
        """The attached forward.

        Args:
            input_ids: (B, T).
            labels: (B, T) of any integer dtype, aligned with the input, -100 where there is no loss.
            shadow_targets: (B, T), what the shadow is to say by itself, where that is not what ``labels`` say.
            num_items_in_batch: labels of the whole accumulated batch, which both losses are divided by; by default
                the labels of this batch.
            skip_logits: compute logits only where there is a label, and return none; by default in training with
                labels.
            return_dict: False for a tuple, in the order of the base's own; by default as the configuration says.
            adapter_names: the adapter of each of the B rows, None for the bare base; by default the active one for all.
            ignore_index: another number than -100 for labels without a loss.
            kwargs: further arguments of the base; and ``shift_labels`` (B, T), the labels of the following tokens, in place
                of those in ``labels``.

        Returns:
            ShadowCausalLMOutput. ``loss`` is the task's plus λ times the shadow's in training, the task's alone in
            evaluation; ``shadow_loss`` stands beside it. ``logits`` (B, T, V) are the attached path's. The task's loss
            includes the load-balancing loss of a base with routers where ``output_router_logits`` asks for it.

        Raises:
            ConfigError: an argument that neither this model nor its base has; labels that are no tokens, or whose shape
                is not the input's.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # in the signature, Trainer would ask every data set for it
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **self._further_arguments(kwargs),
        }
        if shadow_targets is not None and shift_labels is not None:
            raise ConfigError("shadow_targets are aligned with the input, shift_labels are not: pass one of them.")
        if labels is not None and ignore_index != IGNORED:
            labels = labels.masked_fill(labels == ignore_index, IGNORED)
            shift_labels = (
                None if shift_labels is None else shift_labels.masked_fill(shift_labels == ignore_index, IGNORED)
            )
        if self._only == "shadow" and shadow_targets is not None:
            labels, shadow_targets = shadow_targets, None
        places = None if labels is None else self._places(batch, labels, shadow_targets, shift_labels)
        if self._is_disabled:
            return self._run_bare(
                batch, labels=_long(labels), shift_labels=_long(shift_labels), logits_to_keep=logits_to_keep,
                return_dict=return_dict, num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        if labels is None:
            self._warn_if_untrained()
        by_default = self.training and self._only is None
        skip_logits = (by_default if skip_logits is None else skip_logits) and places is not None
        if self._only == "shadow":
            _check_one(adapter_names)
            values = self._run_alone(batch, places, num_items_in_batch, skip_logits, logits_to_keep)
        elif places is None or adapter_names is not None:
            values = self._run_rows(batch, places, num_items_in_batch, logits_to_keep, adapter_names)
        else:
            route = self._route(batch, None)
            self._prepare_cache(batch, route)
            values, losses = self._run_labelled(batch, route, places, num_items_in_batch, skip_logits)
            losses = losses._replace(task=losses.task + self._router_loss(values))
            values["logits"] = None if skip_logits else _kept(values["logits"], logits_to_keep)
            beside = {"shadow_loss": losses.shadow, "distillation_loss": losses.distillation}
            values |= {"loss": self._total(losses), **beside}
        return self._output(ShadowCausalLMOutput, values, batch, return_dict)

    def _places(
        self, batch: dict[str, Any], labels: Tensor, shadow_targets: Tensor | None, shift_labels: Tensor | None
    ) -> Labels:
        """Where the losses are read."""
        x = batch["input_ids"] if batch["inputs_embeds"] is None else batch["inputs_embeds"]
        width = architectures.head_width(self.base_head)
        if shift_labels is not None:
            shift_labels = _aligned("shift_labels", shift_labels, x, width)
        if shadow_targets is not None:
            shadow_targets = as_classes(shadow_targets, width, "shadow_targets")
        return Labels.of(_aligned("labels", labels, x, width), shadow_targets, shift_labels)

    def _run_alone(
        self, batch: dict[str, Any], places: Labels | None, items: Any, skip_logits: bool, logits_to_keep: int | Tensor
    ) -> dict[str, Any]:
        """The output by name of the shadow without its base."""
        s0 = self._state_alone(batch)
        if places is not None and skip_logits:
            loss = self._loss_alone(s0, places, items)
            return {"loss": loss, "shadow_loss": _copied(loss)}
        if places is None:
            s0 = _kept(s0, logits_to_keep)
        rows, loss = self._logits_alone(s0), None
        if places is not None:
            loss = token_loss(rows[places.own.to(rows.device)], places.own_targets, items)
        return {"loss": loss, "logits": rows.view(*s0.shape[:2], -1), "shadow_loss": _copied(loss)}

    def _run_rows(
        self, batch: dict[str, Any], places: Labels | None, items: Any, logits_to_keep: int | Tensor, names: Any
    ) -> dict[str, Any]:
        """The output by name without the shadow's own loss: there are no labels, or rows of several adapters."""
        route = self._route(batch, names)
        self._prepare_cache(batch, route)
        length = (batch["input_ids"] if batch["inputs_embeds"] is None else batch["inputs_embeds"]).shape[1]
        kept = architectures.logits_to_keep(self.base.config, logits_to_keep, length)
        heads = HeadInputs([(rows, shadow.heads) for shadow, rows in route])
        values = self._run_base({**batch, "logits_to_keep": kept if places is None else 0}, route, heads)
        if places is not None:
            at_labels = values["logits"].flatten(0, 1)[places.positions.to(values["logits"].device)]
            values["loss"] = token_loss(at_labels, places.targets, items) + self._router_loss(values)
            values["logits"] = _kept(values["logits"], logits_to_keep)
        return values


class ShadowForSequenceClassification(ShadowModel):
    """A classifier and its shadow: single label, multi label or regression, as the base's configuration says."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The attached forward.

        Args:
            input_ids: (B, T).
            labels: (B,) classes, (B,) or (B, C) values for regression, (B, C) of 0 and 1 for multi label.
            num_items_in_batch: labels of the whole accumulated batch, which both losses are divided by.
            skip_logits: has no effect: class logits are cheap.
            return_dict: False for a tuple, in the order of the base's own; by default as the configuration says.
            adapter_names: the adapter of each of the B rows, None for the bare base; by default the active one for all.
            kwargs: further arguments of the base.

        Returns:
            ShadowSequenceClassifierOutput with ``logits`` (B, C); losses as in `ShadowForCausalLM`.

        Raises:
            ConfigError: an argument that neither this model nor its base has; labels that are no classes.
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **self._further_arguments(kwargs),
        }
        architectures.pad_alike(self.config, self.base.config)
        kind = None if labels is None else architectures.problem_type(self.base.config, labels)
        if kind is not None:  # as transformers' classifiers do: pipelines ask for it
            self.config.problem_type = self.base.config.problem_type = kind  # type: ignore[assignment]
        if labels is not None and kind == "single_label_classification":
            labels = as_classes(labels, architectures.head_width(self.base_head))
        if self._is_disabled:
            return self._run_bare(batch, labels=labels, return_dict=return_dict)
        if self._only == "shadow":
            _check_one(adapter_names)
            logits = self._shadow_logits(batch, self._state_alone(batch))
            loss = None if labels is None else classification_loss(logits, labels, str(kind), num_items_in_batch)
            values = {"loss": loss, "logits": logits, "shadow_loss": _copied(loss)}
            return self._output(ShadowSequenceClassifierOutput, values, batch, return_dict)
        if labels is None:
            self._warn_if_untrained()
        route = self._route(batch, adapter_names)
        self._prepare_cache(batch, route)
        heads, states = [(rows, shadow.heads) for shadow, rows in route], []
        values = self._run_base(batch, route, HeadInputs(heads), states.append if adapter_names is None else None)
        if labels is not None:
            alone = None
            if states and self._weight > 0:
                shadow_logits = self._shadow_logits(batch, states[0])
                alone = classification_loss(shadow_logits, labels, str(kind), num_items_in_batch)
            task = classification_loss(values["logits"], labels, str(kind), num_items_in_batch)
            values |= {"loss": self._total(Losses(task, alone)), "shadow_loss": alone}
        return self._output(ShadowSequenceClassifierOutput, values, batch, return_dict)

    def _shadow_logits(self, batch: dict[str, Any], s0: Tensor) -> Tensor:
        """(B, C) from the last token's row of s⁰."""
        pooled = s0[torch.arange(len(s0), device=s0.device), self._last_token(batch, s0)]
        head = self.shadow.heads["shadow"] if self.shadow.heads else self.base_head
        dtype = self.shadow.dtype if self.shadow.heads else self.base.dtype
        return head(architectures.head_input(self.base, pooled).to(dtype))

    def _last_token(self, batch: dict[str, Any], s0: Tensor) -> Tensor:
        """(B,) the rightmost token that is not padding, by the rule of transformers' classifiers.

        Raises:
            ConfigError: several rows, and no padding token by which to tell where each ends.
        """
        pad, input_ids = architectures.pad_token_id(self.base.config), batch["input_ids"]
        if pad is None and len(s0) != 1:
            raise ConfigError(
                f"A batch of {len(s0)} rows needs a padding token to tell where each ends: set model.config.pad_token_id, or "
                "pass one row at a time."
            )
        if input_ids is None or pad is None:
            return torch.full((len(s0),), s0.shape[1] - 1, device=s0.device)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return ((input_ids != pad) * places).argmax(-1).to(s0.device)


def _kept(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Those of the columns (B, T, …) that a call keeps; 0 for all."""
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    return x[:, logits_to_keep]


def _long(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.long()


def _aligned(name: str, labels: Tensor, x: Tensor, width: int) -> Tensor:
    """Labels (B, T) of the input's shape as `torch.long`."""
    if labels.shape != x.shape[:2]:
        raise ConfigError(f"{name} must be of the input's shape {tuple(x.shape[:2])}, got {tuple(labels.shape)}.")
    return as_classes(labels, width, name)


def _check_replacement(what: str, before: Any, after: Any) -> None:
    """Refuse a table or head of another size than the one that it replaces."""
    old, new = (architectures.table_sizes(module) for module in (before, after))
    if old != new:
        raise ConfigError(
            f"The new {what} is {new}, the base's is {old}: use resize_token_embeddings() for more tokens."
        )


def _check_devices(base: PreTrainedModel) -> None:
    """Refuse a base whose blocks run on several accelerators: states and shadow would have to follow them."""
    devices = architectures.accelerators(base)
    if len({device.partition(":")[2] or "0" for device in devices}) > 1:
        raise BaseModelError(
            f"The base is spread over {', '.join(sorted(devices))}: load it on one device (device_map={{'': 0}}), train "
            "with FSDP2, or use a smaller dtype."
        )


def _copied(loss: Tensor | None) -> Tensor | None:
    """To be told beside it: trainers scale the other in place."""
    return None if loss is None else loss.detach().clone()


def _check_one(adapter_names: Any) -> None:
    if adapter_names is not None:
        raise ConfigError("shadow_only() runs the active adapter: set_adapter(…) it, and leave adapter_names out.")


architectures.announce(ShadowForCausalLM, ShadowForSequenceClassification)
