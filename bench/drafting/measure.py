"""Every way of writing an answer, question by question in shuffled order, at batch 1 and greedy."""

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
LOOKED_UP = 5  # tokens that a peer drafts at most, where it does not choose by itself
LONGEST = 200  # tokens of an answer
BASE, QUICK, ATTACHED = "bare base", "bare base +", "attached"


class Way(NamedTuple):
    """One way: whose tokens it must give, and how it is called: (ids, **options of generate)."""

    of: str
    generate: Callable[..., Any]


def ways(bare: Any, model: Any) -> dict[str, Way]:
    """Base and attached model, each as transformers decodes it, and with drafts from wherever they can come.

    Args:
        bare: the base in modules of its own, which nothing is attached to; a copy of it with Umbra's products of matrices
            (`QUICK`) tells what these bring without a shadow.
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
    """A row for each question and way: seconds, tokens, what drafting counted, and whether they are its model's tokens.

    All write as many tokens as the attached model's answer has.

    Args:
        bare: see `ways`.
        end: the token that ends an answer.
        prompts: (1, T) each.

    Returns:
        The rows, and the attached model's answers.
    """
    found, chance = ways(bare, model), random.Random(0)
    for config in {id(c): c for c in (model.generation_config, bare.generation_config)}.values():
        config.eos_token_id, config.pad_token_id = None, end
    options = {"do_sample": False, "return_dict_in_generate": True}
    for way in found.values():
        way.generate(prompts[0], max_new_tokens=8, **options)
    rows, texts = [], []
    for number, ids in enumerate(tqdm(prompts, desc="answers", disable=None)):
        answer = model.generate(ids, max_new_tokens=LONGEST, do_sample=False, eos_token_id=end)[0, ids.shape[1] :]
        order, written, mine = list(found), {}, []
        chance.shuffle(order)
        for name in order:
            began = time.perf_counter()
            out = found[name].generate(ids, max_new_tokens=len(answer), **options)
            seconds = time.perf_counter() - began
            written[name] = out.sequences[0, ids.shape[1] :].tolist()
            counted = {key: getattr(out, key, None) for key in ("drafted", "accepted", "verified")}
            mine.append({"question": number, "way": name, "seconds": seconds, "tokens": len(written[name]), **counted})
        for of in (BASE, ATTACHED):
            others = [row for row in mine if found[row["way"]].of == of]
            logits = None
            if any(written[row["way"]] != written[of] for row in others):
                logits = found[of].generate(ids, max_new_tokens=len(answer), output_logits=True, **options).logits
            for row in others:
                row |= compare(written[row["way"]], written[of], logits, bare.dtype)
        rows += mine
        texts.append(answer)
    return rows, texts


def compare(
    found: list[int], expected: list[int], logits: Sequence[Tensor] | None, dtype: torch.dtype
) -> dict[str, Any]:  # fmt: skip
    """Whether two answers are equal; if not, how far apart their first different tokens are for the model of the second.

    Args:
        logits: from which each token of ``expected`` was chosen, (1, V); not needed where the answers are equal.

    Returns:
        equal; gap, in logits; and steps: the gap in steps from one number of ``dtype`` to the next where the largest logit
        is. Both are None where the answers are equal.
    """
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if at is None or logits is None:
        return {"equal": at is None, "gap": None, "steps": None}
    row = logits[at][0].float()
    gap = float(row[expected[at]] - row[found[at]])
    return {
        "equal": False,
        "gap": gap,
        "steps": gap / (torch.finfo(dtype).eps * 2 ** math.floor(math.log2(row.abs().max()))),
    }


@torch.no_grad()
def costs(bare: Any, model: Any, ids: Tensor, most: int = 9, rounds: int = 15) -> dict[str, Any]:
    """Seconds of the attached forward over 1 … ``most`` tokens after ``ids`` (1, T), and of the bare base over 1."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    apart = bare(ids, use_cache=True, logits_to_keep=1).past_key_values
    found: dict[int, list[float]] = {n: [] for n in range(most + 1)}
    for _ in range(rounds):
        for n, times in found.items():
            batch = {"input_ids": ids[:, : max(n, 1)], "use_cache": True}
            began = time.perf_counter()
            model(**batch, past_key_values=cache) if n else bare(**batch, past_key_values=apart)
            times.append(time.perf_counter() - began)
            (cache if n else apart).crop(-max(n, 1))
    medians = {n: statistics.median(times) for n, times in found.items()}
    return {"base": medians.pop(0), "attached": medians}
