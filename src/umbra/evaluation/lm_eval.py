"""Adapters in lm-eval: ``umbra lm_eval run --model umbra --model_args adapter=out --tasks …``

lm-eval 0.4.13 discovers no models of other packages: the class below must be imported before its command line runs, which `main`
does. In Python, ``import umbra.evaluation.lm_eval`` is enough.
"""

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from umbra.adapters.files import local_folder, read_config
from umbra.adapters.prompting import Prompting, open_formatter, report
from umbra.errors import BaseModelError, ConfigError, unknown_key
from umbra.model.loading import load

MODES = ("attached", "detached", "base")
# Options of lm-eval's own class that apply to a loaded model; the others concern loading.
OPTIONS = (
    "batch_size", "max_batch_size", "device", "max_length", "add_bos_token", "prefix_token_id", "truncation", "logits_cache",
    "softmax_dtype", "mixed_precision_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip


@register_model("umbra")
class UmbraLM(HFLM):
    """lm-eval's Hugging Face model, for an adapter.

    Args:
        adapter: an adapter folder, or a hub id.
        base: path or hub id of the base, by default the one recorded in the adapter.
        mode: attached, detached (the shadow alone) or base.
        dtype: precision of the base.
        tokenizer: by default the adapter's.
        options: any of `OPTIONS`, as for lm-eval's ``hf``.

    Raises:
        ConfigError: an unknown mode or option, or an adapter that classifies.
        BaseModelError, CheckpointError: as in `umbra.load`.
    """

    _chats: bool | None = None  # whether the adapter is prompted by its chat template; None with another tokenizer

    def __init__(
        self,
        adapter: str,
        base: str | None = None,
        mode: str = "attached",
        dtype: str = "auto",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        **options: Any,
    ):
        if mode not in MODES:
            raise ConfigError(f"Unknown mode {mode!r}: choose from {', '.join(MODES)}.")
        for key in options:
            if key not in OPTIONS:
                raise unknown_key(key, ("adapter", "base", "mode", "dtype", "tokenizer", *OPTIONS), "--model_args")
        name = base or read_config(local_folder(adapter)).get("base_model_name_or_path")
        if not name:
            raise BaseModelError(f"{adapter} does not name its base: add base=… to --model_args.")
        model = load(adapter, base, dtype=dtype)
        if not model.can_generate():
            raise ConfigError(f"{adapter} classifies and is no language model; score it with `umbra eval`.")
        if tokenizer is None:
            saved = (model.shadow.prompting or Prompting()).chat_template_kwargs
            arguments = {**saved, **(options.get("chat_template_args") or {})}
            if options.get("enable_thinking") is not None:
                arguments["enable_thinking"] = options["enable_thinking"]
            formatter = open_formatter(model, chat_template_kwargs=arguments)
            tokenizer, self._chats = formatter.tokenizer, formatter.chats
            options["chat_template_args"] = formatter.chat_template_kwargs
        self._loaded, self._mode = model, mode
        options |= {"pretrained": name, "tokenizer": tokenizer, "dtype": dtype}
        super().__init__(**options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return lm-eval's template, whose use its flag decides; report on stderr if the adapter was trained differently."""
        if self._chats is not None and self._chats != bool(chat_template):
            with_or_without = ("without", "with")[self._chats]
            report(f"the adapter was trained {with_or_without} chat template; --apply_chat_template decides here.")
        return super().chat_template(chat_template)

    def _get_config(self, pretrained: str, **_: object) -> None:
        model, mode = self._loaded, self._mode
        self._model = {"attached": lambda: model, "detached": model.detached, "base": model.unload}[mode]()
        self._config = self._model.config

    def _create_model(self, pretrained: str, **_: object) -> None:
        self._model.to(self.device)


def main(arguments: list[str]) -> None:
    """Run lm-eval's own command line, with the model ``umbra``."""
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
