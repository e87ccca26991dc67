"""Speculative decoding within one model: the shadow drafts, the base verifies (Leviathan et al., 2023, arXiv 2211.17192).

The text ends in t, whose keys are not cached yet. p is the attached model's next-token distribution, q the shadow's.

    draft      s⁰ of t, d₁ … d_k, one after another, by the shadow's layers alone; d_{i+1} from softmax(head(s⁰ of d_i))
    verify     p after t, d₁ … d_k, by one forward of the base in which those s⁰ are the shadow's states
    accept     d₁ … until one is rejected, see batch.py; after d_k one more token of p
    roll back  the shared cache, base's and shadow's layers alike, to all but the last token of the text

A draft token brings along the very s⁰ that the attached forward needs: drafting costs only a narrow head.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from umbra.base import architectures, private_transformers
from umbra.errors import BaseModelError, ConfigError, shown
from umbra.generation.batch import DecodingBatch, Streamer
from umbra.generation.caches import invalidate_on_error, is_interrupted
from umbra.generation.draft_model import Computed, DraftModel, TargetModel, prepare_step
from umbra.generation.scheduler import DraftScheduler
from umbra.shadow.network import Shadow

AUTO = 8  # most draft tokens by default; more would be verified at a loss even where nearly all are accepted
MOST_POSITIONS = 8192  # most draft tokens where rotary positions set no limit
# Cost of one more token in a verification, in forwards of the base over one token.
VERIFY_COST_CPU = 0.08
VERIFY_COST = 0.01  # where reading the weights takes longer than multiplying by them
# Names in transformers' GenerationConfig.
NUM_TOKENS, THRESHOLD = "num_assistant_tokens", "assistant_confidence_threshold"


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """The parent class's output, and statistics of drafting, counted in positions of the text: rows advance in lockstep.

    Args:
        drafted: draft tokens that the base verified.
        accepted: those that are in the text.
        verified: forwards of the base after the prompt's.
        acceptance_length: tokens of the text for each of them.
    """

    drafted: int | None = None
    accepted: int | None = None
    verified: int | None = None
    acceptance_length: float | None = None


def check_draft(draft: object) -> None:
    """Raise a ConfigError where ``draft`` is neither a positive integer nor "auto"."""
    if draft != "auto" and (not isinstance(draft, int) or isinstance(draft, bool) or draft < 1):
        raise ConfigError(f"draft must be an integer of at least 1, or 'auto', got {shown(draft)}.")


def check_mode(mode: GenerationMode, config: GenerationConfig, mode_kwargs: dict[str, Any]) -> None:
    """Check that a generation mode can use drafts.

    Args:
        mode: of transformers.
        config: of this call.
        mode_kwargs: further arguments of the mode.

    Raises:
        ConfigError: a search, or an output, that drafting does not support.
    """
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ConfigError(f"draft=… is for greedy decoding and sampling, not for {mode.value}: leave one of them out.")
    if config.use_cache is False:
        raise ConfigError("draft=… needs the cache: set use_cache=True.")
    if config.output_attentions or config.output_hidden_states:
        raise ConfigError("draft=… gives no attentions and no hidden states: leave them, or draft, out.")
    if mode_kwargs.get("synced_gpus"):
        raise ConfigError(
            "draft=… takes another number of forwards on each rank, and cannot be kept in step: leave it out."
        )


class SpeculativeDecoder:
    """One call of ``generate(draft=…)``, as the ``custom_generate`` of transformers.

    Args:
        shadow: the draft model.
        num_draft_tokens: K, the most draft tokens of a cycle.
        threshold: draft on while the probability of the shadow's most likely token is at least this; None weighs costs.
    """

    def __init__(self, shadow: Shadow, num_draft_tokens: int, threshold: float | None = None):
        self.shadow, self.num_draft_tokens, self.threshold = shadow, num_draft_tokens, threshold

    @classmethod
    def from_call(
        cls,
        shadow: Shadow,
        draft: int | str,
        args: tuple[object, ...],
        options: dict[str, Any],
        default_config: GenerationConfig | None,
    ) -> "SpeculativeDecoder":
        """Read the settings of a ``generate`` call.

        ``draft="auto"`` drafts ``num_assistant_tokens``, where the call or a generation configuration sets it, and
        `AUTO` tokens otherwise.

        Args:
            shadow: the draft model.
            draft: K or "auto".
            args: positional arguments of the call.
            options: keyword arguments of the call.
            default_config: the model's generation configuration.

        Raises:
            ConfigError: an invalid K, or an option that excludes drafting.
        """
        check_draft(draft)
        if options.get("custom_generate") is not None or options.get("cache_implementation") == "paged":
            raise ConfigError("draft=… is a way of generating of its own: leave custom_generate and a paged cache out.")
        config = args[1] if len(args) > 1 else options.get("generation_config")
        settings = [options, *(vars(c) for c in (config, default_config) if c is not None)]

        def first(name: str) -> Any:
            return next((values[name] for values in settings if values.get(name) is not None), None)

        number = first(NUM_TOKENS) if draft == "auto" else draft
        if number is not None:
            check_draft(number)
        return cls(shadow, AUTO if number in (None, "auto") else int(number), first(THRESHOLD))

    def __call__(
        self,
        model: TargetModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Streamer | None = None,
        drafter: object = None,
        tokenizer: object = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | DraftedOutput:
        """Run the decoding loop: a prefill, then cycles of drafting and verifying.

        Args:
            model: the model that transformers' ``generate`` runs.
            input_ids: (B, T), the prompts.
            logits_processor: of this generation.
            stopping_criteria: of this generation.
            generation_config: of this generation.
            streamer: receives the tokens, or None.
            drafter: this object, which transformers passes on; unused.
            tokenizer: unused.
            synced_gpus: unused; `check_mode` rejects it.
            model_kwargs: arguments of the forward: the cache, the mask and the positions of the whole text.

        Returns:
            The tokens (B, T′), or a `DraftedOutput`.

        Raises:
            ConfigError: ``adapter_names`` were given.
            BaseModelError: the base or the cache cannot drop rejected tokens.
        """
        _check_cache(model, model_kwargs)
        limits = _PositionLimits(model, self.shadow, input_ids, model_kwargs)
        scheduler = self._scheduler(model, bool(generation_config.do_sample))
        batch = DecodingBatch(input_ids, logits_processor, stopping_criteria, generation_config, streamer, scheduler)
        out = private_transformers.prefill(model, input_ids, generation_config, model_kwargs)
        batch.append(out.logits[:, -1])
        model_kwargs = private_transformers.update_model_kwargs(model, out, model_kwargs)
        cache, shadow_layers = model_kwargs["past_key_values"], self.shadow.cache_layers
        depth = len(architectures.layer_types(model.base.config.get_text_config(decoder=True)))
        layers = cache.layers[:depth], cache.layers[shadow_layers.start : shadow_layers.stop]
        view = architectures.ahead(cache, shadow_layers)
        draft_model = DraftModel(model, self.shadow, view, batch, out.logits.shape[-1])
        del out
        with _recording(layers):
            while not batch.finished:
                before = batch.length
                room = min(generation_config.max_length - before - 1, limits.room(before))
                with _rolled_back(cache, layers, batch) as computed:
                    self._run_cycle(model, draft_model, computed, room, model_kwargs)
                model_kwargs = private_transformers.update_model_kwargs(
                    model, {}, model_kwargs, num_new_tokens=batch.length - before
                )
        if streamer is not None:
            streamer.end()
        return _output(batch, cache) if generation_config.return_dict_in_generate else batch.ids

    def _scheduler(self, model: TargetModel, samples: bool) -> DraftScheduler:
        is_cpu = model.device.type == "cpu"
        # In sampling, the number of draft tokens decides what is drawn: with a seed it must not depend on a clock.
        return DraftScheduler(
            _draft_cost(model, self.shadow), VERIFY_COST_CPU if is_cpu else VERIFY_COST, self.threshold,
            timed=is_cpu and not samples,
        )  # fmt: skip

    def _run_cycle(
        self, model: TargetModel, draft_model: DraftModel, computed: Computed, room: int, model_kwargs: dict[str, Any]
    ) -> None:
        """Draft, verify and accept: append at least one token to the text."""
        batch, before, start = draft_model.batch, draft_model.batch.length, time.perf_counter()
        states, drafts = draft_model.draft(min(self.num_draft_tokens, room), model_kwargs, computed)
        between = time.perf_counter()
        with invalidate_on_error(model_kwargs["past_key_values"]):
            ids = torch.cat([batch.ids, *(draft.tokens[:, None] for draft in drafts)], 1)
            prepared, _ = prepare_step(model, ids, model_kwargs, len(drafts))
            prepared.pop("logits_to_keep", None)
            logits = model.verify(self.shadow, torch.cat(states, 1), prepared)
            computed.base = len(states)
        end = time.perf_counter()
        for i in range(len(drafts) + 1):
            if not batch.append(logits[:, i], drafts[i] if i < len(drafts) else None):
                break
        batch.scheduler.record_cycle(len(drafts), batch.length - before, between - start, end - between)


def _output(batch: DecodingBatch, cache: Cache) -> DraftedOutput:
    scheduler = batch.scheduler
    return DraftedOutput(
        sequences=cast(Any, batch.ids),
        scores=batch.scores, logits=batch.logits, past_key_values=cache,
        drafted=scheduler.drafted, accepted=batch.num_accepted, verified=scheduler.cycles,
        acceptance_length=scheduler.written / scheduler.cycles if scheduler.cycles else None,
    )  # fmt: skip


@contextmanager
def _recording(layers: tuple[list[Any], list[Any]]) -> Iterator[None]:
    """A context in which these layers of a cache retain the tokens that leave their windows, for a rollback."""
    every = [*layers[0], *layers[1]]
    architectures.record_past(every, True)
    try:
        yield
    finally:
        architectures.record_past(every, False)


@contextmanager
def _rolled_back(cache: Cache, layers: tuple[list[Any], list[Any]], batch: DecodingBatch) -> Iterator[Computed]:
    """A context for one cycle, after which the cache holds all but the last token of the text, even after an error.

    Args:
        cache: the shared cache.
        layers: the base's and the shadow's.
        batch: the texts.
    """
    before, computed = batch.length, Computed()
    try:
        yield computed
    finally:
        written = batch.length - before
        if not is_interrupted(cache):
            with invalidate_on_error(cache):
                for part, tokens in zip(layers, (computed.base, computed.shadow), strict=True):
                    architectures.roll_back(part, max(tokens - written, 0))


def _check_cache(model: TargetModel, model_kwargs: dict[str, Any]) -> None:
    cache = model_kwargs.get("past_key_values")
    if model_kwargs.get("adapter_names") is not None:
        raise ConfigError("draft=… is for one adapter: set_adapter(…) it, and leave adapter_names out.")
    reason = "there is none" if cache is None else architectures.rollback_obstacle(model.base, cache)
    if reason:
        raise BaseModelError(f"draft=… needs a cache out of which tokens can be taken: {reason}. Leave draft out.")


class _PositionLimits:
    """The number of tokens that one forward may verify with the same result as one by one.

    Some rotary position embeddings depend on the length of the text: beyond a limit, all positions are encoded otherwise. A
    forward must not extend across the limit, and where the encoding changes with every token it holds one token.

    Raises:
        BaseModelError: an unknown kind of rotary position embedding.
    """

    def __init__(self, model: TargetModel, shadow: Shadow, ids: Tensor, model_kwargs: dict[str, Any]):
        self.limits: list[tuple[int, bool]] = []
        for name, config in (("base", model.base.config), ("shadow", shadow.backbone.config)):
            limits = architectures.rotary_limits(config)
            if limits is None:
                raise BaseModelError(f"draft=… does not know the rotary positions of the {name}. Leave draft out.")
            self.limits += limits
        positions = model_kwargs.get("position_ids")
        self.offset = 0 if not self.limits or positions is None else int(positions.max()) + 1 - ids.shape[1]

    def room(self, length: int) -> int:
        """Return how many tokens may be drafted after a text of ``length`` tokens."""
        length += self.offset
        if any(length > limit and not settles for limit, settles in self.limits):
            return 0
        return min((limit - length for limit, _ in self.limits if length <= limit), default=MOST_POSITIONS)


def _draft_cost(model: TargetModel, shadow: Shadow) -> float:
    """Estimate the cost of a draft token, in forwards of the base over one token: the share of weights that it reads."""
    rows = architectures.vocabulary_size(model.base.get_input_embeddings())
    rows = rows if shadow.draft_tokens is None else len(shadow.draft_tokens)
    backbone = sum(p.numel() for n, p in shadow.backbone.named_parameters() if "embed" not in n)
    width = model.base.config.get_text_config(decoder=True).hidden_size
    return (backbone + rows * width) / sum(p.numel() for p in model.base.parameters())
