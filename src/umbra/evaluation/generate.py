"""``umbra generate``: answer one prompt."""

import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import TextStreamer

from umbra.data import end_tokens
from umbra.deploy.opening import MODES, open_model
from umbra.errors import ConfigError
from umbra.evaluation.scoring import GREEDY, PLAIN, in_mode, on_accelerator, room
from umbra.generation.speculative import check_draft
from umbra.options import GenerateOptions, check_dtype


def generate(options: GenerateOptions) -> dict[str, Any]:
    """Run ``umbra generate``, which prints the answer while it is generated, unless JSON is requested.

    Raises:
        ConfigError: an unknown mode, drafts in another mode than attached, or an adapter that classifies.
    """
    if options.mode not in (None, *MODES):
        raise ConfigError(f"Unknown mode {options.mode!r}: choose from {', '.join(MODES)}.")
    drafting: dict[str, Any] = {}
    if options.draft is not None:
        if options.mode not in (None, "attached"):
            raise ConfigError(f"--draft needs shadow and base: --mode attached, not {options.mode}.")
        draft = int(options.draft) if options.draft.isdecimal() else options.draft
        check_draft(draft)
        drafting = {"draft": draft, "return_dict_in_generate": True}
    check_dtype(options.dtype)
    try:
        prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError as error:
        raise ConfigError(f"The prompt on stdin is not UTF-8: {error}") from error
    if not prompt.strip():
        raise ConfigError("The prompt is empty.")
    opened = open_model(
        options.adapter, options.base, dtype=options.dtype, chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
    )  # fmt: skip
    model, mode = opened.model, opened.mode("attached" if drafting else options.mode)
    on_accelerator(model)
    if not model.can_generate():
        raise ConfigError(f"{options.adapter} classifies and cannot generate; use `umbra predict`.")
    formatter, tokenizer = opened.formatter, opened.formatter.tokenizer
    ids = torch.tensor([formatter.tokens(formatter.ask(prompt))], device=model.device)
    torch.manual_seed(options.seed)
    sampling = {**PLAIN, "do_sample": True, "temperature": options.temperature} if options.temperature > 0 else GREEDY
    streamer = None if options.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    with in_mode(model, mode) as runner:
        began = time.perf_counter()
        out = cast(Callable[..., Any], runner.generate)(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            max_new_tokens=room(runner, ids.shape[1], options.max_new_tokens), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens(runner, formatter) or None, streamer=streamer, tokenizer=tokenizer,
            **{**sampling, **drafting},
        )  # fmt: skip
        seconds = time.perf_counter() - began
    new = (out.sequences if drafting else out)[0, ids.shape[1] :]
    answer = {
        "mode": mode,
        "answer": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": seconds,
    }
    if drafting:
        answer |= {k: getattr(out, k) for k in ("drafted", "accepted", "verified", "acceptance_length")}
        if not options.json:
            print(
                f"{len(new)} tokens, {len(new) / seconds:.1f} per second; {out.accepted} of {out.drafted} drafted tokens "
                f"accepted, {out.acceptance_length or 0:.2f} tokens per forward of the base",
                file=sys.stderr,
            )
    return answer
