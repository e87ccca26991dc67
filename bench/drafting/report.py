"""The table of decoding speeds, and a cost model that predicts the speedup of speculative decoding."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from .measure import ATTACHED, BASE, DRAFTS, QUICK

FIXED = [k for k in DRAFTS if isinstance(k, int)]
# An assumption for a base of 8B in bf16 on one GPU. Further tokens are nearly free where memory bandwidth is the limit; a shadow
# of 0.6B reads a thirteenth of the weights.
ELSEWHERE = {"8B base on a GPU, shadow of 0.6B": {"draft": 0.08, "extra": 0.01, "attached": 1.03}}


def summary(rows: list[dict[str, Any]], costs: dict[str, Any]) -> dict[str, Any]:
    """Return by method tokens/s, speedup over the bare base (median and quartiles over questions) and draft counts."""
    base = {r["question"]: r["seconds"] for r in rows if r["way"] == BASE}
    table = {}
    for way in dict.fromkeys(r["way"] for r in sorted(rows, key=lambda r: (r["question"], _order(r["way"])))):
        selected = [r for r in rows if r["way"] == way]
        ratios = [base[r["question"]] / r["seconds"] for r in selected]
        low, middle, high = statistics.quantiles(ratios, n=4)
        counts = {
            k: sum(r[k] for r in selected) for k in ("drafted", "accepted", "verified") if selected[0][k] is not None
        }
        tokens = sum(r["tokens"] for r in selected)
        table[way] = {
            "tokens_per_second": tokens / sum(r["seconds"] for r in selected), "speedup": middle, "quartiles": [low, high],
            "tokens": tokens, "equal": sum(r["equal"] for r in selected), **counts, **_widest(selected),
        }  # fmt: skip
    return {"ways": table, "model": cost_model(rows, costs)._asdict()}


def _widest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the widest gap between the first different tokens of unequal answers."""
    gaps = [(r["gap"], r["steps"]) for r in rows if not r["equal"]]
    return dict(zip(("gap", "steps"), max(gaps), strict=True)) if gaps else {}


def _order(way: str) -> int:
    names = [BASE, QUICK, ATTACHED, *(f"drafted, {k}" for k in DRAFTS)]
    return names.index(way) if way in names else len(names)


class CostModel(NamedTuple):
    """Costs, in forwards of the bare base over one token.

    Args:
        acceptance: a, the probability that a draft token is accepted if those before it are.
        draft: One run of the shadow and its head.
        extra: Each further token of a verification.
        attached: The attached forward over one token.
    """

    acceptance: float
    draft: float
    extra: float
    attached: float

    def speedup(self, k: int) -> float:
        """Return tokens over cost for a cycle of k draft tokens: Σ aⁱ / (attached + k · extra + (k + 1) · draft).

        The shadow runs k + 1 times, because the verification needs the state of the last draft token as well.
        """
        return sum(self.acceptance**i for i in range(k + 1)) / (self.attached + k * self.extra + (k + 1) * self.draft)


def cost_model(rows: list[dict[str, Any]], costs: dict[str, Any]) -> CostModel:
    """Fit the cost model to the rows with a fixed k."""
    one, attached = costs["base"], {int(n): s for n, s in costs["attached"].items()}
    most = max(attached)
    extra = (attached[most] - attached[1]) / (most - 1)
    fixed = [r for r in rows if r["way"] in [f"drafted, {k}" for k in FIXED]]
    drafting = sum(r["seconds"] - r["verified"] * attached[1] - r["drafted"] * extra for r in fixed)
    runs = sum(r["drafted"] + r["verified"] for r in fixed)
    accepted, tried = (
        sum(r["accepted"] for r in fixed),
        sum(min(r["accepted"] + r["verified"], r["drafted"]) for r in fixed),
    )
    return CostModel(accepted / tried, drafting / runs / one, extra / one, attached[1] / one)


def text(data: dict[str, Any]) -> str:
    """Return the page."""
    ways, model, machine = data["ways"], CostModel(**data["model"]), data["machine"]
    lines = [
        f"# Speculative decoding: {data['base']}, {data['dtype']}, batch 1, greedy", "",
        f"{data['questions']} {data['split']} problems of gsm_symbolic with worked answers; every method generates as many tokens "
        f"as the answer of the attached model has.",
        f"{machine['cpu']}, {machine['threads']} threads; {data['versions']}; {data['date']}.", "",
        f"The shadow has {data['shadow_parameters']:,} parameters, {data['share']:.1%} of the base without its embeddings, and a "
        f"draft vocabulary of {data['draft_vocabulary']} tokens.",
        f"Trained by `python -m bench.drafting` (seed 0): {data['training']}.",
        f"Correct answers of the attached model: {data['right']} of {data['questions']}.", "",
        "| method | tokens/s | × bare base, median | quartiles | draft tokens | accepted | tokens/verification | equal answers |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for name, row in ways.items():
        drafted = ["", "", ""]
        if "drafted" in row:
            share = row["accepted"] / row["drafted"] if row["drafted"] else 0
            drafted = [str(row["drafted"]), f"{share:.0%}", f"{row['tokens'] / row['verified']:.2f}"]
        low, high = row["quartiles"]
        cells = [name, f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}", f"{low:.2f} – {high:.2f}", *drafted]
        equal = f"{row['equal']} of {data['questions']}"
        equal += f", else ≤ {row['gap']:.2f} ({row['steps']:.0f} ulp)" if "gap" in row else ""
        lines.append(f"| {' | '.join(cells)} | {equal} |")
    lines += [
        "", f"*{QUICK}*: the bare base with Umbra's matrix products.",
        "*Equal answers*: identical to greedy decoding with the same model, token for token. For an unequal answer: the gap",
        f"between the logits of the first different tokens, also in units in the last place (ulp) of {data['dtype']} at the",
        "largest logit.",
        "", "## Cost of a cycle", "", "In forwards of the bare base over one token:", "",
        f"- the attached forward over one token: {model.attached:.2f}; each further token in it: {model.extra:.3f}",
        f"- a draft token: {model.draft:.3f}",
        f"- a draft token is accepted, if those before it are, with probability a = {model.acceptance:.2f}",
        "", "tokens of a cycle / its cost = Σ aⁱ / (attached + k · extra + (k + 1) · draft), for a fixed number k of draft tokens.",
        "The measured runs stop drafting early if the shadow's confidence is low; therefore their speed does not fall with k.",
        "", "| k | predicted | measured |", "|---:|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {k} | {model.speedup(k):.2f} | {ways[f'drafted, {k}']['speedup']:.2f} |" for k in FIXED]
    lines += ["", "Not measured; predicted with the same acceptance and assumed costs:", ""]
    for name, costs in ELSEWHERE.items():
        there = model._replace(**costs)
        best = max(range(1, 17), key=there.speedup)
        assumed = ", ".join(f"{k} {v}" for k, v in costs.items())
        lines.append(f"- {name} ({assumed}): {there.speedup(best):.2f} × at k = {best}")
    return "\n".join(lines) + "\n"


def picture(data: dict[str, Any], path: Path) -> None:
    """Draw the speedup of every method over the bare base, and the cost model with the measured values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    bars, curve = figure.subplots(1, 2)
    _bars(bars, data["ways"])
    _curve(curve, data["ways"], CostModel(**data["model"]))
    figure.legend(*curve.get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=8)
    for axes in (bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def _bars(axes: Any, ways: dict[str, Any]) -> None:
    names = list(ways)[::-1]
    middle = [ways[n]["speedup"] for n in names]
    below = [m - ways[n]["quartiles"][0] for n, m in zip(names, middle, strict=True)]
    above = [ways[n]["quartiles"][1] - m for n, m in zip(names, middle, strict=True)]
    colours = ["#4e79a7" if n.startswith("drafted") else "#9c9c9c" for n in names]
    axes.barh(names, middle, xerr=[below, above], color=colours, ecolor="#555555")
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xlabel("× the bare base's tokens/s, batch 1 (median, quartiles over questions)")


def _curve(axes: Any, ways: dict[str, Any], model: CostModel) -> None:
    ks = range(1, 13)
    axes.plot(ks, [model.speedup(k) for k in ks], linewidth=2.5, label=f"this machine, a = {model.acceptance:.2f}")
    for a in (0.6, 0.8, 0.95):
        axes.plot(
            ks, [model._replace(acceptance=a).speedup(k) for k in ks], linewidth=1, label=f"this machine, a = {a}"
        )
    for name, costs in ELSEWHERE.items():
        there = model._replace(**costs)
        axes.plot(ks, [there.speedup(k) for k in ks], "--", label=f"{name} (assumed costs)")
    axes.plot(
        FIXED,
        [ways[f"drafted, {k}"]["speedup"] for k in FIXED],
        "o",
        color="black",
        label="measured: at most k, fewer at low confidence",
    )
    axes.axhline(1, color="#333333", linewidth=1)
    axes.set(xlabel="draft tokens per cycle, k", ylabel="× the bare base")
    axes.set_ylim(bottom=0)
