"""`ShadowModel`: a frozen base and its shadows as one transformers model, which holds its parts and delegates to them."""

# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
# (Methods for adapters, saving and loading have other arguments than those of transformers: a base is given, not a class.)

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from umbra.adapters.files import PREFIX
from umbra.adapters.reading import load_shadow, open_with_base, restore
from umbra.adapters.saving import AttachedShadow, save
from umbra.base import architectures, quantized
from umbra.config import ShadowConfig, check_kind
from umbra.errors import BaseModelError, ConfigError
from umbra.method import kernels
from umbra.method.hooks import Attachment, ForwardContext, check_free
from umbra.model import hub
from umbra.model.adapter_set import AdapterSet
from umbra.model.base_state import BaseState
from umbra.model.checks import INACTIVE, check_devices, of_base, rename_old_keys
from umbra.model.forward import Batch, ForwardRunner
from umbra.model.losses import Losses
from umbra.model.outputs import OutputClass, as_output
from umbra.model.peft_calls import UNAVAILABLE, AdapterNames
from umbra.model.training_guard import TrainingGuard
from umbra.model.vocabulary import Vocabulary
from umbra.shadow.detached import detached
from umbra.shadow.network import Shadow

PROMPTING_ARGUMENTS = ("tokenizer", "chat_template", "chat_template_kwargs")
LABEL_FIELDS = ("id2label", "label2id", "problem_type")  # of a classifier's configuration, which the adapter stores


class ShadowModel(PreTrainedModel):
    """A frozen ``base`` and the trainable ``shadow`` that corrects it. Made by `attach` and `load`.

    Attributes:
        base: the base model.
        shadow: the active adapter.
        inactive_adapters: the other adapters, by name.
        attachment: the hooks on the base.
        adapter_set: names, activates, replaces and deletes adapters.
        vocabulary: keeps base and adapters on one number of tokens.
        runner: runs one forward of base and shadows.
        guard: checks training steps.
    """

    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    _attach: ClassVar[Callable[..., PreTrainedModel]]  # set by attach.py, which knows the subclasses

    base: PreTrainedModel
    shadow: Shadow
    inactive_adapters: nn.ModuleDict

    def __init__(self, base: PreTrainedModel, config: ShadowConfig, *, backbone_config: PretrainedConfig | None = None):
        architectures.check_bare(base)
        located = architectures.locate(base)
        check_free(located.blocks)
        check_devices(base)
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
        self.adapter_set = AdapterSet(base, shadow)
        self._register_adapters()
        self.main_input_name = base.main_input_name
        self.all_tied_weights_keys = of_base(base.all_tied_weights_keys)
        self._no_split_modules = base._no_split_modules
        self._keys_to_ignore_on_save = {f"base.{key}" for key in base.state_dict()}
        self._base_state = BaseState(base, repacking)
        decoder = located.decoder if located.merges_embeddings else None
        arguments = architectures.forward_arguments(self, base, base.base_model, located.decoder)
        self.attachment = Attachment(located.blocks, base, located.head_name, decoder, located.stream)
        self.vocabulary = Vocabulary(base, self.adapter_set, self.attachment)
        self.runner = ForwardRunner(
            base, composite, self.adapter_set, self.attachment, arguments, located.merges_embeddings
        )
        self.guard = TrainingGuard(base, self.adapter_set, self.attachment)
        self.register_load_state_dict_pre_hook(rename_old_keys)
        base.requires_grad_(False)
        kernels.patch_linears(self.modules())
        self.train(base.training)

    @property
    def shadow_config(self) -> ShadowConfig:
        """The configuration of the active shadow."""
        return self.shadow.config

    @property
    def base_head(self) -> nn.Module:
        """The base's own task head, frozen."""
        return self.attachment.task_head

    @property
    def base_fingerprint(self) -> dict[str, Any]:
        """The values that identify the base: its sizes, and a sample of its weights."""
        return self.vocabulary.fingerprint

    # -- paths -----------------------------------------------------------------------------------------------------

    def disable_adapter(self) -> ForwardContext:
        """Return a context in which this thread runs the bare base: ``with model.disable_adapter(): model(...)``."""
        return ForwardContext(self.attachment, disabled=True)

    def attached_only(self) -> ForwardContext:
        """Return a context in which losses are the task's alone: for trainers that add the shadow's themselves."""
        return ForwardContext(self.attachment, only="attached")

    def shadow_only(self) -> ForwardContext:
        """Return a context in which logits and losses are the shadow's, as after detaching; nothing is cached."""
        return ForwardContext(self.attachment, only="shadow")

    # -- for the forwards of the subclasses ------------------------------------------------------------------------

    def _further_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        return self.runner.further_arguments(given, type(self).__name__)

    def _batch(
        self, further: dict[str, Any], input_ids: Tensor | None, attention_mask: Tensor | None,
        position_ids: Tensor | None, past_key_values: Cache | None, inputs_embeds: Tensor | None,
        use_cache: bool | None,
    ) -> Batch:  # fmt: skip
        """Return the arguments of a forward by name, those of its keyword arguments that the base has included."""
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **self._further_arguments(further),
        }

    def _total(self, losses: Losses) -> Tensor:
        """Return the loss to train on; in evaluation the task's alone."""
        if not self.training:
            return losses.task
        return losses.total(self.guard.shadow_weight(), self.shadow.config.distillation_weight)

    def _output(self, kind: OutputClass, values: dict[str, Any], batch: Batch, return_dict: bool | None) -> Any:
        """Return values by name as an output, or as a tuple in the base's order."""
        values = {"loss": None, **values}
        for name in ("loss", "logits"):
            values[name] = self.guard.with_gradient(values.get(name), batch["inputs_embeds"], self.training)
        return as_output(kind, values, bool(self.config.return_dict if return_dict is None else return_dict))

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters, the active one first."""
        return self.adapter_set.names

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter."""
        return self.adapter_set.active_name

    @property
    def active_adapters(self) -> AdapterNames:
        """The name of the active adapter in a list; callable, because it is a method in transformers."""
        return AdapterNames([self.active_adapter])

    def adapter(self, name: str | None = None) -> Shadow:
        """Return the shadow of this name, by default the active one.

        Raises:
            ConfigError: no adapter has this name.
        """
        return self.adapter_set.get(name)

    def add_adapter(self, config: ShadowConfig, name: str | None = None) -> None:
        """Add a new shadow; `set_adapter` activates it.

        Args:
            config: of the shadow.
            name: of the adapter.

        Raises:
            ConfigError: the name is taken or not a name, sizes that do not fit the base, or no `ShadowConfig`.
        """
        check_kind(config)
        name = self.adapter_set.check_new_name(name)
        with self.disable_adapter():  # building a shadow may run the base
            shadow = Shadow(architectures.locate(self.base), config.resolve())
        self.adapter_set.put(name, shadow)
        self._adapters_changed()

    def load_adapter(
        self, path: str | Path, name: str | None = None, *, replace: bool = False, trainable: bool = False,
        allow_other_base: bool = False, shadow: str | None = None,
    ) -> None:  # fmt: skip
        """Read an adapter folder and add its shadow; `set_adapter` activates it.

        Args:
            path: the folder, or an id on the hub.
            name: of the adapter.
            replace: take the place of the adapter of this name, active or not; nothing changes if reading fails.
            trainable: as in `umbra.load`, like all arguments below.
            allow_other_base: whether to accept another base.
            shadow: path of a pretrained shadow.

        Raises:
            ConfigError: the name is taken and ``replace`` is False, or not a name.
            CheckpointError: as in `umbra.load`.
            BaseModelError: as in `umbra.load`.
        """
        name = name if replace and name in self.adapters else self.adapter_set.check_new_name(name)
        read = load_shadow(path, self.base, trainable=trainable, allow_other_base=allow_other_base, shadow=shadow)
        self.vocabulary.share(name, read, path)
        self.adapter_set.put(name, read)
        self._adapters_changed()

    def set_adapter(self, name: str) -> None:
        """Activate an adapter: it is trained, saved, detached, and runs where a call names none.

        Raises:
            ConfigError: no adapter has this name.
        """
        self.adapter_set.activate(name)
        self._adapters_changed()

    def delete_adapter(self, name: str) -> None:
        """Remove an inactive adapter and free its weights.

        Raises:
            ConfigError: no adapter has this name.
            StateError: the adapter is the active one.
        """
        self.adapter_set.delete(name)
        self._adapters_changed()

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            ConfigError: no adapter is called ``old``, or ``new`` is taken or not a name.
        """
        self.adapter_set.rename(old, new)
        self._adapters_changed()

    def disable_adapters(self) -> None:
        """Raise a `ConfigError`: in transformers this would hold until further notice, for every thread."""
        raise ConfigError(
            "A shadow is disabled for a block of code: `with model.disable_adapter():`; unload() is for good."
        )

    def enable_adapters(self) -> None:
        """Raise a `ConfigError`: see `disable_adapters`."""
        raise ConfigError("A shadow is enabled wherever `with model.disable_adapter():` does not disable it.")

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: object = None) -> dict[str, Tensor]:
        """Raise a `ConfigError`: transformers' format is that of other adapters."""
        raise ConfigError(
            "A shadow's weights are model.adapter(name).state_dict(); save_pretrained() writes its folder."
        )

    def enable_peft_hotswap(self, *args: object, **options: object) -> None:
        """Raise a `ConfigError`: a shadow needs no preparation for being replaced."""
        raise ConfigError("load_adapter(path, name, replace=True) takes the place of a loaded shadow at any time.")

    def _register_adapters(self) -> None:
        self.shadow, self.inactive_adapters = self.adapter_set.active, self.adapter_set.inactive

    def _adapters_changed(self) -> None:
        """Bring up to date the registered modules, the layers of the cache, and the keys that no checkpoint holds."""
        self._register_adapters()
        shadows = {s.first_cache_layer: s.backbone.config for s in self.adapter_set.shadows}
        architectures.copy_layers(self.config, architectures.composite_config(self.base.config, shadows))
        others = {key for key in self._keys_to_ignore_on_save or () if not key.startswith(INACTIVE)}
        self._keys_to_ignore_on_save = others | set(self.inactive_adapters.state_dict(prefix=INACTIVE))

    # -- the vocabulary --------------------------------------------------------------------------------------------

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Module:
        """Resize the vocabulary as in transformers, for the base and its shadows.

        Rows beyond the base's own vocabulary are trained with the shadow while there is one adapter, and are saved in its
        folder; `umbra.load` resizes a base that does not have them. `unload` takes them away again.

        Args:
            new_num_tokens: as in transformers.
            args: as in transformers.
            options: as in transformers.

        Raises:
            BaseModelError: the embeddings are quantised, offloaded or sharded.
        """
        if new_num_tokens is None and not options.get("pad_to_multiple_of") and not args:
            return self.base.get_input_embeddings()
        table = self.vocabulary.resize(new_num_tokens, *args, **options)
        self.config.get_text_config(decoder=True).vocab_size = architectures.vocabulary_size(table)
        self.all_tied_weights_keys = of_base(self.base.all_tied_weights_keys)
        self._adapters_changed()
        return table

    def carry_added_tokens(self, first: int, count: int) -> None:
        """Let the adapters carry ``count`` rows beyond the first ``first``, which are the base's.

        The base is resized, unless it has these rows already; then `unload` restores them.
        """
        if architectures.vocabulary_size(self.base.get_input_embeddings()) == first:
            self.resize_token_embeddings(first + count, mean_resizing=False)
        else:
            self.vocabulary.carry(first)
            self._adapters_changed()

    # -- as a transformers model -----------------------------------------------------------------------------------

    def unload(self) -> PreTrainedModel:
        """Return the base, bit for bit as it was before `attach`; this model cannot be used afterwards.

        Rows of added tokens are removed, or restored if the base had them. Rows that were cut off do not come back.
        """
        self.attachment.remove()
        self.vocabulary.restore()
        self._base_state.restore()
        return self.base

    def detached(self) -> PreTrainedModel:
        """Return the active shadow as a stock transformers model with copied weights, whose logits are head(s⁰).

        Raises:
            DetachError: see `umbra.shadow.detached.detached`.
        """
        return detached(self.base, self.shadow)

    def save_pretrained(
        self, save_directory: str | Path, *, adapter_name: str | None = None, push_to_hub: bool = False,
        repo_id: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Write the adapter folder, atomically; the base is not written.

        Args:
            save_directory: the folder.
            adapter_name: of the adapter; by default the active one.
            push_to_hub: upload the adapter as well.
            repo_id: the repository to upload to; by default one with the name of the folder.
            options: keyword arguments of `umbra.adapters.saving.save`; with ``push_to_hub`` also those of `push_to_hub`.
        """
        names = inspect.signature(self.push_to_hub).parameters.keys() - {
            "repo_id",
            "adapter_name",
            *PROMPTING_ARGUMENTS,
        }
        hub_options = {name: options.pop(name) for name in names & options.keys()}
        shadow = self.adapter(adapter_name)
        prefix = next((f"{INACTIVE}{n}." for n, s in self.inactive_adapters.items() if s is shadow), PREFIX)
        save(AttachedShadow(shadow, self.base, self.base_fingerprint, prefix), save_directory, **options)
        if push_to_hub:
            saved = {name: options.get(name) for name in PROMPTING_ARGUMENTS}
            self.push_to_hub(repo_id or Path(save_directory).name, adapter_name=adapter_name, **saved, **hub_options)

    def push_to_hub(
        self, repo_id: str, *, adapter_name: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: bool | None = None, chat_template_kwargs: dict[str, Any] | None = None,
        commit_message: str = "Upload adapter", commit_description: str | None = None, private: bool | None = None,
        token: str | bool | None = None, revision: str | None = None, create_pr: bool = False,
    ) -> CommitInfo:  # fmt: skip
        """Upload an adapter folder with its model card, to a repository that is created if it does not exist.

        Args:
            repo_id: the repository.
            adapter_name: of the adapter; by default the active one.
            tokenizer: as in `umbra.adapters.saving.save`, like ``chat_template`` and ``chat_template_kwargs``.
            chat_template: whether prompts use the chat template.
            chat_template_kwargs: arguments of the chat template.
            commit_message: as in huggingface_hub, like all arguments below.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: of the user.
            revision: a branch.
            create_pr: whether to open a pull request.
        """

        def write(folder: str) -> None:
            self.save_pretrained(
                folder, adapter_name=adapter_name, tokenizer=tokenizer, chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )  # fmt: skip

        return hub.upload(
            write, repo_id, private=private, token=token, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, path: str | Path, base: PreTrainedModel | str | None = None, *, trainable: bool = False,
        allow_other_base: bool = False, shadow: str | None = None, **base_options: Any,
    ) -> "ShadowModel":  # fmt: skip
        """Read an adapter and attach it to its base; see `umbra.load`."""
        saved, base = open_with_base(
            path, base, allow_other_base=allow_other_base, shadow=shadow, base_options=base_options
        )
        model = cast(ShadowModel, cls._attach(base, saved.config, backbone_config=saved.backbone_config))
        with ExitStack() as undo:
            undo.callback(model.unload)
            if saved.added_count:
                model.carry_added_tokens(saved.base_rows, saved.added_count)
            restore(model.shadow, saved)
            for name, value in model.shadow.classifier.items():
                if name in LABEL_FIELDS:
                    setattr(model.config, name, value)
            undo.pop_all()
        if not trainable:
            model.requires_grad_(False)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's input embeddings."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's input embeddings, which its shadows read too.

        Args:
            value: the new table.

        Raises:
            ConfigError: the table has another size.
            BaseModelError: the table would separate head and embeddings after tokens were added to both.
        """
        self.vocabulary.replace_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the base's head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base's head, which both paths use from then on.

        Args:
            new_embeddings: the new head.

        Raises:
            ConfigError: an adapter has trained heads, or the head has another size.
            BaseModelError: as in `set_input_embeddings`.
        """
        if new_embeddings is not self.get_output_embeddings():
            self.vocabulary.replace_head(new_embeddings)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **options: Any) -> None:
        """Enable checkpointing as in transformers, but not in blocks below the first coupled one: they save no activations."""
        super()._set_gradient_checkpointing(enable, *args, **options)
        blocks = architectures.locate(self.base).blocks
        architectures.exempt_from_checkpointing(blocks[: self.shadow.couplings.layers[0]])

    def enable_input_require_grads(self) -> None:
        """Do nothing: a gradient of the embeddings would only pass through the blocks below the first coupled one."""

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: object, **options: object
    ) -> Any:
        return attn_implementation  # the base has chosen it

    def _check_and_adjust_experts_implementation(self, experts_implementation: str | None) -> Any:
        return experts_implementation  # likewise

    def num_trainable_parameters(self) -> int:
        """Return the number of parameters that an optimizer would update."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of parameters that an optimizer would update, and the number of all, those of the base included.

        Weights that are packed by a quantisation count once for each value that they hold.
        """
        return self.num_trainable_parameters(), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print the numbers of `get_nb_trainable_parameters`, and the percentage that is trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def get_base_model(self) -> PreTrainedModel:
        """Return the base, which still runs with its shadow; `unload` returns it as it was before `attach`."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, buffer or module; raise an AttributeError that explains what PEFT's models have instead."""
        if name in UNAVAILABLE:
            raise AttributeError(f"{type(self).__name__} has no {name}: {UNAVAILABLE[name]}")
        return super().__getattr__(name)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: base and shadow are initialised already."""
