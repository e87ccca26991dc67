"""Numbers of a report as text."""

import math

from umbra.lab.study.results import Results, Variant
from umbra.lab.study.statistics import Estimate

NOTHING = "–"


def score(estimate: Estimate | None, is_loss: bool = False, sign: str = "") -> str:
    """Return mean ± half the interval: in percent, or as it is for a loss.

    Args:
        estimate: The estimate; None for a missing score.
        is_loss: Whether it is a loss.
        sign: "+" to show the sign of positive values.
    """
    if estimate is None:
        return NOTHING
    scale, digits = (1, ".3f") if is_loss else (100, ".1f")
    half = "" if estimate.half_width == math.inf else f" ± {scale * estimate.half_width:{digits}}"
    missing = (
        f" ({estimate.seeds} of {estimate.planned_seeds} seeds)" if estimate.seeds < estimate.planned_seeds else ""
    )
    return f"{scale * estimate.mean:{sign}{digits}}{half}{missing}"


def verdict(difference: Estimate | None, is_loss: bool = False) -> str:
    """Return a difference with win, tie or loss."""
    if difference is None:
        return NOTHING
    label = {"tie": "tie", "": "(seeds only)"}.get(difference.verdict, f"**{difference.verdict}**")
    return f"{score(difference, is_loss, '+')} {label}"


def ratio(estimate: Estimate | None) -> str:
    """Return a ratio ± half its interval."""
    if estimate is None:
        return NOTHING
    half = "" if estimate.half_width in (0, math.inf) else f" ± {estimate.half_width:.2f}"
    return f"{estimate.mean:.2f}{half} ×"


def millions(parameters: float) -> str:
    """Return a number of parameters in millions."""
    return f"{parameters / 1e6:.2f} M"


def about_losses(results: Results) -> str:
    """Return the sentence that explains tasks scored by a loss; empty without any."""
    losses = [t for t in results.trained if results.is_loss(t)]
    if not losses:
        return ""
    return (
        f" {', '.join(losses)}: scored by the loss (lower is better), not part of any mean; a positive difference means that the "
        "first method has the lower loss."
    )


def fields(results: Results, variant: Variant) -> str:
    """Return the fields of a variant's method as code."""
    values = results.study["methods"][variant.method]["fields"]
    text = ", ".join(f"{k}={v}" for k, v in values.items() if k not in ("peft_type", "target_modules"))
    return f"(`{text}`)" if text else ""
