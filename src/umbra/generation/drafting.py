"""Speculative decoding within one model: the shadow drafts, the base verifies (Leviathan et al., 2023, arXiv 2211.17192).

The text ends in t, whose keys are not cached yet. p is the attached model's next-token distribution, q the shadow's.

    draft      s⁰ of t, d₁ … d_k, one after another, by the shadow's layers alone; d_{i+1} from softmax(head(s⁰ of d_i))
    verify     p after t, d₁ … d_k, by one forward of the base in which those s⁰ are the shadow's states
    accept     d₁ … until one is rejected, see speculation.py; after d_k one more token of p
    roll back  the one cache, base's and shadow's layers alike, to all but the last token of the text

A drafted token brings along the very s⁰ that the attached forward needs: what drafting costs is a narrow head.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, logits_process

from umbra.base import architectures, quantized
from umbra.errors import BaseModelError, ConfigError, StateError, shown
from umbra.generation.caches import is_interrupted, undivided
from umbra.generation.decoding import Decoding
from umbra.generation.speculation import Drafted, Pace, Text
from umbra.method.adapter_state import AdapterState
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import ForwardContext
from umbra.method.kernels import product
from umbra.shadow.network import Shadow, check_draft_tokens

AUTO = 8  # draft tokens at most where nobody says; more would be verified at a loss even where nearly all are accepted
MOST_TOKENS = 8192  # of a draft vocabulary that is chosen from data
EXTRA = {"cpu": 0.08}  # cost of one more token in a verification, in forwards of the base over one token, by device
ELSEWHERE = 0.01  # where weights are read more slowly than numbers are multiplied
THRESHOLD = "assistant_confidence_threshold"  # of transformers' GenerationConfig
# What changes a distribution without knowing which token is which: it can run on a part of the vocabulary.
WARPERS = (
    logits_process.TemperatureLogitsWarper, logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper, logits_process.TypicalLogitsWarper, logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper, logits_process.LogitNormalization, logits_process.InfNanRemoveLogitsProcessor,
)  # fmt: skip
# What remembers that it was called, or asks somebody who may: it must see each token of the text once, and no other.
REMEMBERING = (
    logits_process.SynthIDTextWatermarkLogitsProcessor, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
)  # fmt: skip


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """As its parent, and what drafting brought, counted in places of the text: rows of a batch go in lockstep.

    Args:
        drafted: draft tokens that the base verified.
        accepted: those that stand in the text.
        verified: forwards of the base after the prompt's.
        acceptance_length: tokens of the text for each of them.
    """

    drafted: int | None = None
    accepted: int | None = None
    verified: int | None = None
    acceptance_length: float | None = None


def frequent_tokens(labels: Iterable[Any], also: Iterable[int] = (), most: int = MOST_TOKENS) -> list[int]:
    """A draft vocabulary from data: the tokens in ``labels`` that are not negative, the most frequent first.

    Args:
        also: tokens that are in it anyway, such as the end of the text.
        most: how many there are at most.
    """
    also = list(dict.fromkeys(also))
    rows = [torch.as_tensor(row).reshape(-1).long() for row in labels]
    tokens, counts = torch.cat([torch.zeros(0, dtype=torch.long), *rows]).unique(return_counts=True)
    seen = [t for t in tokens[counts.argsort(descending=True, stable=True)].tolist() if t >= 0 and t not in also]
    return also + seen[: max(most - len(also), 0)]


class Drafting(Decoding):
    """Generating with drafts, beside all that `Decoding` can."""

    def generate(self, *args: Any, draft: int | str | None = None, **options: Any) -> Any:
        """As in transformers, with one cache for base and shadow.

        Args:
            draft: K: the shadow drafts up to K tokens that one forward of the base verifies, fewer where a further one is
                not worth its cost; "auto" for a K of Umbra's choice, None for no drafts. Greedy decoding gives the tokens
                that it gives without, sampling the same distribution. ``assistant_confidence_threshold`` in place of
                the cost: draft on until the shadow's likeliest token is less probable than this.

        Returns:
            As in transformers; with ``draft`` and ``return_dict_in_generate`` a `DraftedOutput`.

        Raises:
            ConfigError: no such K, or with ``draft`` a search, or an output, that drafting does not have.
            BaseModelError: a base or a cache out of which rejected tokens cannot be taken.
            StateError: ``draft`` where the adapter is disabled.
        """
        if draft is None:
            return super().generate(*args, **options)
        check_draft(draft)
        if options.get("custom_generate") is not None or options.get("cache_implementation") == "paged":
            raise ConfigError("draft=… is a way of generating of its own: leave custom_generate and a paged cache out.")
        config = args[1] if len(args) > 1 else options.get("generation_config")
        configs: Any = (config, self.generation_config)  # type: ignore[attr-defined]
        thresholds = [options.get(THRESHOLD), *(vars(c).get(THRESHOLD) for c in configs if c is not None)]
        threshold = next((value for value in thresholds if value is not None), None)
        drafter = Drafter(self, AUTO if draft == "auto" else int(draft), threshold)
        return super().generate(*args, custom_generate=drafter, **options)

    def set_draft_vocabulary(self, token_ids: Iterable[int] | None, adapter_name: str | None = None) -> None:
        """The tokens that a shadow drafts; the fewer, the cheaper. It is saved with the adapter, and changes no answer.

        Args:
            token_ids: such as `frequent_tokens` gives; None for the whole vocabulary.
            adapter_name: by default the active one.

        Raises:
            ConfigError: none, or one that is no token of the base.
        """
        shadow, tokens = self.adapter(adapter_name), None
        if token_ids is not None:
            listed = token_ids.tolist() if isinstance(token_ids, Tensor | np.ndarray) else token_ids
            tokens = list(dict.fromkeys(t.item() if isinstance(t, Tensor | np.generic) else t for t in listed))
            check_draft_tokens(tokens, architectures.vocabulary_size(self.base.get_input_embeddings()))
        shadow.draft_tokens = tokens

    def _extract_generation_mode_kwargs(self, custom_generate: Any, *args: Any) -> dict[str, Any]:
        if not isinstance(custom_generate, Drafter):
            return super()._extract_generation_mode_kwargs(custom_generate, *args)  # type: ignore[misc]
        # A callable would be given neither streamer nor tokenizer.
        return {**super()._extract_generation_mode_kwargs(None, *args), "drafter": custom_generate}  # type: ignore[misc]

    def _validate_generation_mode(self, mode: Any, config: GenerationConfig, given: dict[str, Any]) -> None:
        super()._validate_generation_mode(mode, config, given)  # type: ignore[misc]
        if "drafter" in given:
            if not architectures.takes_cache(self.base):
                raise BaseModelError(f"draft=… needs a cache; {type(self.base).__name__} has none. Leave draft out.")
            _check_request(mode, config, given)


def check_draft(draft: Any) -> None:
    """Raise a ConfigError where this is neither a K nor "auto"."""
    if draft != "auto" and (not isinstance(draft, int) or isinstance(draft, bool) or draft < 1):
        raise ConfigError(f"draft must be an integer of at least 1, or 'auto', got {shown(draft)}.")


def _check_request(mode: Any, config: GenerationConfig, given: dict[str, Any]) -> None:
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ConfigError(f"draft=… is for greedy decoding and sampling, not for {mode.value}: leave one of them out.")
    if config.use_cache is False:
        raise ConfigError("draft=… needs the cache: set use_cache=True.")
    if config.output_attentions or config.output_hidden_states:
        raise ConfigError("draft=… gives no attentions and no hidden states: leave them, or draft, out.")
    if given.get("synced_gpus"):
        raise ConfigError(
            "draft=… takes another number of forwards on each rank, and cannot be kept in step: leave it out."
        )


class Drafter:
    """One call of ``generate(draft=…)``, as the ``custom_generate`` of transformers.

    Args:
        model: a `ShadowModel` for causal language modelling.
        most: K.
        threshold: the least probability of the shadow's likeliest token with which it goes on; None weighs the costs.

    Raises:
        StateError: the adapter is disabled, or runs alone.
    """

    def __init__(self, model: Any, most: int, threshold: float | None):
        if model._is_disabled or model._only == "shadow":
            raise StateError("draft=… needs the shadow and the base: leave disable_adapter() or shadow_only().")
        self.shadow: Shadow = model.shadow
        self.most, self.threshold = most, threshold

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        drafter: Any = None,
        tokenizer: Any = None,
        synced_gpus: bool = False,
        **told: Any,
    ) -> Any:
        """The decoding loop: a prefill, then cycles of drafting and verifying.

        Args:
            told: what a forward is told beside its tokens: the cache, the mask and the positions of the whole text.

        Raises:
            ConfigError: adapter_names.
            BaseModelError: see `Drafting.generate`.
        """
        _check_cache(model, told)
        span = _Span(model, self.shadow, input_ids, told)
        kind, samples = model.device.type, generation_config.do_sample
        timed = kind == "cpu" and not samples  # how far to draft decides what is drawn: a seed is to give one text
        pace = Pace(_cost(model, self.shadow), EXTRA.get(kind, ELSEWHERE), self.threshold, timed=timed)
        text = Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer, pace)
        out = model._prefill(input_ids, generation_config, told)
        text.add(out.logits[:, -1])
        told = model._update_model_kwargs_for_generation(out, told)
        cache, mine = told["past_key_values"], self.shadow.cache_layers
        depth = len(architectures.layer_types(model.base.config.get_text_config(decoder=True)))
        layers = cache.layers[:depth], cache.layers[mine.start : mine.stop]
        draft = _Draft(model, self.shadow, architectures.ahead(cache, mine), text, out.logits.shape[-1])
        del out
        architectures.record_past([*layers[0], *layers[1]], True)
        try:
            while not text.finished:
                before = text.length
                with _rolled_back(cache, layers, text) as held:
                    room = min(generation_config.max_length - before - 1, span.room(before))
                    self._cycle(model, draft, held, room, told)
                told = model._update_model_kwargs_for_generation({}, told, num_new_tokens=text.length - before)
        finally:
            architectures.record_past([*layers[0], *layers[1]], False)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return text.ids
        return DraftedOutput(
            sequences=text.ids,  # type: ignore[arg-type]
            scores=text.scores, logits=text.logits, past_key_values=cache,
            drafted=pace.drafted, accepted=text.accepted, verified=pace.cycles,
            acceptance_length=pace.written / pace.cycles if pace.cycles else None,
        )  # fmt: skip

    def _cycle(self, model: Any, draft: "_Draft", held: "_Held", room: int, told: dict[str, Any]) -> None:
        """Draft, verify and accept: at least one more token of the text."""
        text, before, began = draft.text, draft.text.length, time.perf_counter()
        states, drafted = draft.run(min(self.most, room), told, held)
        between = time.perf_counter()
        with undivided(told["past_key_values"]):
            logits = self._verify(model, text.ids, states, drafted, told)
            held.base = len(states)
        ended = time.perf_counter()
        for i in range(len(drafted) + 1):
            if not text.add(logits[:, i], drafted[i] if i < len(drafted) else None):
                break
        text.pace.cycle(len(drafted), text.length - before, between - began, ended - between)

    def _verify(
        self, model: Any, ids: Tensor, states: list[Tensor], drafted: list[Drafted], told: dict[str, Any]
    ) -> Tensor:
        """(B, k + 1, V): the attached logits after the last token of the text and after each of the k drafted ones."""
        ids = torch.cat([ids, *(one.tokens[:, None] for one in drafted)], 1)
        batch, _ = _prepare(model, ids, told, len(drafted))
        batch.pop("logits_to_keep", None)
        lane = AdapterState(self.shadow.couplings, torch.cat(states, 1))
        with ForwardContext(model._attachment, [lane], HeadInputs([(None, self.shadow.heads)])):
            return model._call_base(batch, return_dict=True).logits


@dataclass
class _Held:
    """Tokens that the layers of the base and of the shadow have been given in one cycle."""

    base: int = 0
    shadow: int = 0


@contextmanager
def _rolled_back(cache: Any, layers: tuple[list[Any], list[Any]], text: Text) -> Iterator[_Held]:
    """A context for one cycle, after which the cache holds all but the last token of the text, however it ends.

    Args:
        layers: the base's and the shadow's.
    """
    before, held = text.length, _Held()
    try:
        yield held
    finally:
        written = text.length - before
        if not is_interrupted(cache):
            with undivided(cache):
                for part, given in zip(layers, (held.base, held.shadow), strict=True):
                    architectures.roll_back(part, max(given - written, 0))


class _Draft:
    """The drafting half of a cycle.

    Args:
        cache: in which the shadow may be ahead of the base.
        text: what is drafted for.
        width: V, of the attached logits.
    """

    def __init__(self, model: Any, shadow: Shadow, cache: Any, text: Text, width: int):
        self.model, self.shadow, self.cache, self.text, self.width = model, shadow, cache, text, width
        self.head = DraftHead(model, shadow, text.ids.device)
        # A processor of somebody else may remember its calls, and must not see what may never be in the text.
        own = [p for p in text.processors if type(p).__module__ == logits_process.__name__]
        self.processors = [p for p in own if not isinstance(p, REMEMBERING)]
        self.on_part = all(isinstance(p, WARPERS) for p in self.processors)

    def run(self, limit: int, told: dict[str, Any], held: _Held) -> tuple[list[Tensor], list[Drafted]]:
        """s⁰ (B, 1, D) of the text's last token and of each drafted one, and these, ``limit`` at most."""
        ids, states, drafted = self.text.ids, [], []
        whole, mask = _prepare(self.model, torch.cat([ids, ids[:, -1:].expand(-1, limit)], 1), told, limit)
        positions = whole.get("position_ids")
        while True:
            ahead = limit - len(drafted)  # tokens beyond this one
            batch = {
                "input_ids": ids[:, -1:].to(whole["input_ids"].device), "inputs_embeds": None,
                "past_key_values": self.cache, "use_cache": True,
                "attention_mask": mask if mask is None else mask[:, : mask.shape[1] - ahead],
                "position_ids": positions if positions is None else positions[..., len(drafted) : len(drafted) + 1],
            }  # fmt: skip
            with undivided(told["past_key_values"]):
                states.append(self.model._initial_state(self.model._seen_by(self.shadow, batch, {}), self.shadow))
                held.shadow += 1
            next_one = self._propose(ids, states[-1][:, -1]) if ahead else None
            if next_one is None:
                return states, drafted
            drafted.append(next_one)
            ids = torch.cat([ids, next_one.tokens[:, None]], 1)

    def _propose(self, ids: Tensor, s0: Tensor) -> Drafted | None:
        """The token after ``ids`` (B, T), from s⁰ (B, D) of their last; None where it is not worth it."""
        text, pace = self.text, self.text.pace
        if not pace.may_go_on(len(text.rows)):
            return None
        scores = self.head(s0).to(ids.device)
        is_part = self.head.tokens is not None
        if is_part and self.processors and not self.on_part:
            scores, is_part = self._spread(scores, -torch.inf), False
        for processor in self.processors:
            scores = processor(ids, scores)
        q: Any = None
        sure = [1.0] * len(text.rows)
        if not text.samples and pace.is_blind:
            tokens = scores.argmax(-1)
        else:
            q = scores.softmax(-1).nan_to_num(1 / scores.shape[-1])  # where the processors left nothing
            likeliest, tokens = q.max(-1)
            if not pace.is_blind and (pace.threshold is not None or not text.samples):
                every = likeliest.tolist()
                sure = [every[row] for row in text.rows]
        if not pace.is_blind and not pace.goes_on(sure):
            return None
        if text.samples:
            tokens = torch.multinomial(q, 1).squeeze(1)
            q = self._spread(q, 0.0) if is_part else q
        tokens = self.head.tokens[tokens] if is_part else tokens
        return Drafted(text.pad_finished(tokens), q if text.samples else None, sure)

    def _spread(self, part: Tensor, fill: float) -> Tensor:
        """(B, N) of the draft vocabulary → (B, V)."""
        return part.new_full((len(part), self.width), fill).index_copy_(1, self.head.tokens, part)


class DraftHead:
    """The shadow's head on its draft vocabulary.

    Args:
        model: whose base's head it is, where the shadow has none of its own.
        shadow: what drafts.
        device: of the text.
    """

    def __init__(self, model: Any, shadow: Shadow, device: torch.device):
        self.base = model.base
        self.head: Any = shadow.heads["shadow"] if shadow.heads else model.base_head
        self.dtype = next(shadow.heads.parameters()).dtype if shadow.heads else model.base.dtype
        self.factor, self.cap = architectures.after_head(model.base.config)
        self.tokens: Any = None
        self.weight: Any = None
        if shadow.draft_tokens is not None:
            weight, bias = quantized.linear_weight(self.head, self.dtype), getattr(self.head, "bias", None)
            self.tokens = torch.tensor(shadow.draft_tokens, device=device)
            if not weight.is_meta:  # offloaded, the head has to run as a whole
                rows = self.tokens.to(weight.device)
                self.weight, self.bias = weight[rows], None if bias is None else bias[rows]

    def __call__(self, s0: Tensor) -> Tensor:
        """(B, D) → logits (B, N) in float32."""
        x = architectures.head_input(self.base, s0).to(self.dtype)
        if self.weight is not None:
            logits = product(x.to(self.weight.device), self.weight, self.bias)
        else:
            logits = self.head(x) if self.tokens is None else self.head(x)[:, self.tokens.to(x.device)]
        logits = logits.float() * self.factor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def _prepare(model: Any, ids: Tensor, told: dict[str, Any], ahead: int) -> tuple[dict[str, Any], Tensor | None]:
    """What a forward over the last ``ahead`` + 1 tokens of ``ids`` (B, T) is given, and the mask (B, T) of all.

    Args:
        told: of a text that ends ``ahead`` tokens before.
    """
    told = model._update_model_kwargs_for_generation({}, dict(told), num_new_tokens=ahead)
    return model.prepare_inputs_for_generation(ids, next_sequence_length=ahead + 1, **told), told.get("attention_mask")


def _check_cache(model: Any, told: dict[str, Any]) -> None:
    cache = told.get("past_key_values")
    if told.get("adapter_names") is not None:
        raise ConfigError("draft=… is for one adapter: set_adapter(…) it, and leave adapter_names out.")
    reason = "there is none" if cache is None else architectures.cannot_go_back(model.base, cache)
    if reason:
        raise BaseModelError(f"draft=… needs a cache out of which tokens can be taken: {reason}. Leave draft out.")


class _Span:
    """How many tokens one forward may verify without another outcome than one by one.

    Some rotary positions depend on the length of the text: beyond a limit those of all its tokens are others. A forward
    must not lie on both sides of it, and where they change with every token it holds one.

    Raises:
        BaseModelError: a kind of rotary positions that is not known.
    """

    def __init__(self, model: Any, shadow: Shadow, ids: Tensor, told: dict[str, Any]):
        self.limits: list[tuple[int, bool]] = []
        for name, config in (("base", model.base.config), ("shadow", shadow.backbone.config)):
            limits = architectures.rotary_limits(config)
            if limits is None:
                raise BaseModelError(f"draft=… does not know the rotary positions of the {name}. Leave draft out.")
            self.limits += limits
        positions = told.get("position_ids")
        self.ahead = 0 if not self.limits or positions is None else int(positions.max()) + 1 - ids.shape[1]

    def room(self, length: int) -> int:
        """How many tokens may be drafted after a text of ``length`` tokens."""
        length += self.ahead
        beyond = any(length > limit and not settles for limit, settles in self.limits)
        return (
            0 if beyond else min((limit - length for limit, _ in self.limits if length <= limit), default=MOST_TOKENS)
        )


def _cost(model: Any, shadow: Shadow) -> float:
    """A first guess at what one draft token costs, in forwards of the base over one token: its share of weights read."""
    rows = architectures.vocabulary_size(model.base.get_input_embeddings())
    rows = rows if shadow.draft_tokens is None else len(shadow.draft_tokens)
    own = sum(p.numel() for n, p in shadow.backbone.named_parameters() if "embed" not in n)
    width = model.base.config.get_text_config(decoder=True).hidden_size
    return (own + rows * width) / sum(p.numel() for p in model.base.parameters())
