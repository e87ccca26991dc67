"""Time all decoding methods, question by question in shuffled order, greedy at batch size 1."""

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from umbra.method import kernels

DRAFTS = (1, 2, 4, 8, "auto")
LOOKED_UP = 5  # draft tokens of other methods with a fixed number
LONGEST = 200  # maximum length of an answer in tokens
BASE, QUICK, ATTACHED = "bare base", "bare base +", "attached"


class Way(NamedTuple):
    """A decoding method: the model whose tokens it must reproduce, and its call (ids, **options of generate)."""

    of: str
    generate: Callable[..., Any]


def ways(bare: Any, model: Any) -> dict[str, Way]:
    """Return the decoding methods of the base and of the attached model, without and with drafts.

    Args:
        bare: The base in separate modules without a shadow. A copy of it with Umbra's matrix products (`QUICK`) shows their
            contribution.
        model: The attached model.
    """
    edges = {name: model.detached() for name in ("its defaults", f"{LOOKED_UP} tokens")}
    fixed = edges[f"{LOOKED_UP} tokens"].generation_config
    fixed.num_assistant_tokens, fixed.num_assistant_tokens_schedule = LOOKED_UP, "constant"
    fixed.assistant_confidence_threshold = 0.0

    quick = copy.deepcopy(bare, {id(p): p for p in bare.parameters()})
    quick.generation_config = bare.generation_config
    kernels.patch_linears(quick.modules())

    def attached(**more: Any) -> Way:
        return Way(ATTACHED, lambda ids, **options: model.generate(ids, **more, **options))

    return {
        BASE: Way(BASE, bare.generate),
        QUICK: Way(BASE, quick.generate),
        ATTACHED: attached(),
        **{f"drafted, {k}": attached(draft=k) for k in DRAFTS},
        **{f"assisted generation, {name}": attached(assistant_model=edge) for name, edge in edges.items()},
        "prompt lookup": attached(prompt_lookup_num_tokens=LOOKED_UP),
        f"{BASE}, prompt lookup": Way(
            BASE, lambda ids, **options: bare.generate(ids, prompt_lookup_num_tokens=LOOKED_UP, **options)
        ),
    }


def answers(bare: Any, model: Any, end: int, prompts: list[Tensor]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Time all methods on all questions; all generate as many tokens as the answer of the attached model has.

    Args:
        bare: See `ways`.
        model: The attached model.
        end: The end token.
        prompts: Token ids, (1, T) each.

    Returns:
        A row for each question and method (seconds, tokens, draft counts, equality), and the answers of the attached model.
    """
    methods, rng = ways(bare, model), random.Random(0)
    for config in {id(c): c for c in (model.generation_config, bare.generation_config)}.values():
        config.eos_token_id, config.pad_token_id = None, end
    options = {"do_sample": False, "return_dict_in_generate": True}
    for way in methods.values():
        way.generate(prompts[0], max_new_tokens=8, **options)
    rows, texts = [], []
    for number, ids in enumerate(tqdm(prompts, desc="answers", disable=None)):
        answer = model.generate(ids, max_new_tokens=LONGEST, do_sample=False, eos_token_id=end)[0, ids.shape[1] :]
        order, written, measured = list(methods), {}, []
        rng.shuffle(order)
        for name in order:
            began = time.perf_counter()
            out = methods[name].generate(ids, max_new_tokens=len(answer), **options)
            seconds = time.perf_counter() - began
            written[name] = out.sequences[0, ids.shape[1] :].tolist()
            counted = {key: getattr(out, key, None) for key in ("drafted", "accepted", "verified")}
            measured.append(
                {"question": number, "way": name, "seconds": seconds, "tokens": len(written[name]), **counted}
            )
        for of in (BASE, ATTACHED):
            others = [row for row in measured if methods[row["way"]].of == of]
            logits = None
            if any(written[row["way"]] != written[of] for row in others):
                logits = methods[of].generate(ids, max_new_tokens=len(answer), output_logits=True, **options).logits
            for row in others:
                row |= compare(written[row["way"]], written[of], logits, bare.dtype)
        rows += measured
        texts.append(answer)
    return rows, texts


def compare(
    actual: list[int], expected: list[int], logits: Sequence[Tensor] | None, dtype: torch.dtype
) -> dict[str, Any]:  # fmt: skip
    """Compare two answers and, if they differ, the logits of their first different tokens.

    Args:
        logits: from which each token of ``expected`` was chosen, (1, V); not needed where the answers are equal.

    Returns:
        equal; gap, in logits; and steps: the gap in steps from one number of ``dtype`` to the next where the largest logit
        is. Both are None where the answers are equal.
    """
    at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b), None)
    if at is None or logits is None:
        return {"equal": at is None, "gap": None, "steps": None}
    row = logits[at][0].float()
    gap = float(row[expected[at]] - row[actual[at]])
    return {
        "equal": False,
        "gap": gap,
        "steps": gap / (torch.finfo(dtype).eps * 2 ** math.floor(math.log2(row.abs().max()))),
    }


@torch.no_grad()
def costs(bare: Any, model: Any, ids: Tensor, most: int = 9, rounds: int = 15) -> dict[str, Any]:
    """Return the seconds of the attached forward over 1 … ``most`` tokens after ``ids`` (1, T), and of the bare base over one."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    apart = bare(ids, use_cache=True, logits_to_keep=1).past_key_values
    seconds: dict[int, list[float]] = {n: [] for n in range(most + 1)}
    for _ in range(rounds):
        for n, times in seconds.items():
            batch = {"input_ids": ids[:, : max(n, 1)], "use_cache": True}
            began = time.perf_counter()
            model(**batch, past_key_values=cache) if n else bare(**batch, past_key_values=apart)
            times.append(time.perf_counter() - began)
            (cache if n else apart).crop(-max(n, 1))
    medians = {n: statistics.median(times) for n, times in seconds.items()}
    return {"base": medians.pop(0), "attached": medians}
