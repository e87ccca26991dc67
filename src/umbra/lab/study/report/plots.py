"""The figures of a report. Black elements take the text color of the page when a figure is saved as SVG."""

import io
import re
import textwrap
from typing import TypedDict, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from umbra.lab.study.results import Results, Variant
from umbra.lab.study.statistics import Estimate

INK = "#010203"  # replaced by currentColor in SVG
LINE = 36  # characters in one line of a name
LETTER = 0.075  # width of a character in a tick label, in inches
MARKERS = "os^DvP"
COLORS = ("#4e79a7", "#e08a3c", "#59a14f", "#d1605e", "#9d7cb8", "#8c6d5a", "#d98cb3", "#7a8794", "#b8a03a", "#4fa3a0")
GREY = "#8a8a8a"


class Look(TypedDict):
    """Color and marker of a variant, as keyword arguments of `Axes.errorbar`."""

    color: str
    fmt: str


def looks(results: Results) -> dict[str, Look]:
    """Return a color for every variant, with other markers if there are more variants than colors; the bare base is grey."""
    trained = [v.name for v in results.variants if v.is_trained]
    by_name: dict[str, Look] = {v.name: {"color": GREY, "fmt": MARKERS[0]} for v in results.variants}
    for i, name in enumerate(trained):
        marker = MARKERS[i // len(COLORS) % len(MARKERS)]
        by_name[name] = {"color": COLORS[i % len(COLORS)], "fmt": marker}
    return by_name


def _name(text: str) -> str:
    """Return a name on at most two lines, escaped so that matplotlib neither typesets $ nor hides a leading underscore."""
    lines = textwrap.wrap(text, LINE, max_lines=2, placeholder=" …")
    return re.sub("^_", "\u200b_", "\n".join(lines).replace("$", r"\$"))


def _width(results: Results) -> float:
    """Return the width of the longest name of a variant in inches."""
    return LETTER * max(len(line) for v in results.variants for line in _name(v.name).split("\n"))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _finish(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> Figure:
    """Apply the common style to axes and return their figure."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)
    axes.tick_params(colors=INK, labelsize=8)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
        text.set_fontsize(9)
    return cast(Figure, axes.figure)


def _half_width(estimate: Estimate, scale: float = 100) -> float:
    """Return half the interval, scaled; 0 if it is unknown."""
    return 0 if np.isinf(estimate.half_width) else scale * estimate.half_width


def scores(results: Results) -> Figure:
    """Draw every variant's score on every trained task, with its interval."""
    palette, tasks = looks(results), results.trained
    figure = _figure(3.1 * len(tasks) + max(1.2, _width(results)), 0.34 * len(results.variants) + 0.9)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True):
        scale = 1 if results.is_loss(task) else 100
        for y, variant in enumerate(results.variants):
            score = results.score(variant, task, task)
            if score is not None:
                half = _half_width(score, scale)
                axes.errorbar(scale * score.mean, y, xerr=half, **palette[variant.name], capsize=2, markersize=5)
        axes.set_yticks(range(len(results.variants)), [_name(v.name) for v in results.variants])
        axes.grid(axis="x", color=INK, alpha=0.12)
        unit = "" if results.is_loss(task) else ", %"
        _finish(axes, title=_name(task), xlabel=_name(results.metric(task)) + unit)
    figure.axes[0].invert_yaxis()
    return figure


def pareto(results: Results) -> Figure:
    """Draw the mean score over trainable parameters, peak memory and time."""
    palette = looks(results)
    costs = (
        ("parameters", 1e6, "trainable parameters, M"),
        ("peak", 1e9, "peak memory of training, GB"),
        ("seconds", 1, "s/step"),
    )
    lines = sum(len(_name(v.name).split("\n")) for v in results.variants)
    figure = _figure(8.5 + max(2, _width(results)), max(3.2, 0.18 * lines + 0.5))
    for axes, (name, unit, label) in zip(figure.subplots(1, 3, sharey=True), costs, strict=True):
        for variant in results.variants:
            mean, cost = results.mean_score(variant), results.cost(variant)
            if mean is not None and cost:
                axes.errorbar(
                    cost[name] / unit, 100 * mean.mean, yerr=_half_width(mean), capsize=2, label=_name(variant.name),
                    **palette[variant.name],
                )  # fmt: skip
        axes.grid(color=INK, alpha=0.12)
        axes.axvline(0, alpha=0)  # so that the right margin is proportional to the whole width
        axes.set_xlim(left=0)
        _finish(axes, xlabel=label, ylabel="mean score, %" if name == "parameters" else "")
    _legend(figure.axes[-1])
    return figure


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, names, frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5)
        )


def transfer(results: Results, pairs: list[tuple[str, str]]) -> Figure:
    """Draw every variant's score on tasks that it was not trained on as a heat map; ``pairs`` are (trained, tested)."""
    values = np.full((len(results.variants), len(pairs)), np.nan)
    for i, variant in enumerate(results.variants):
        for j, (trained, tested) in enumerate(pairs):
            score = results.score(variant, trained, tested)
            values[i, j] = np.nan if score is None else 100 * score.mean
    names = [_name(f"{a} →") + "\n" + _name(b) for a, b in pairs]
    column = max(1.3, LETTER * max(len(line) for name in names for line in name.split("\n")))
    figure = _figure(max(2.4, 1 + _width(results)) + column * len(pairs), 1.5 + 0.34 * len(results.variants))
    axes = figure.subplots()
    axes.pcolormesh(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=100)
    axes.invert_yaxis()
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            shade = "white" if value > 55 else "black"
            axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(np.arange(len(pairs)) + 0.5, names)
    axes.set_yticks(np.arange(len(results.variants)) + 0.5, [_name(v.name) for v in results.variants])
    return _finish(axes)


def scaling(results: Results, families: dict[str, list[Variant]]) -> Figure:
    """Draw the mean score over trainable parameters, one curve per family."""
    figure = _figure(6, 3.4)
    axes = figure.subplots()
    for color, (name, variants) in zip(COLORS, families.items(), strict=False):
        pairs = [(results.cost(v), results.mean_score(v)) for v in variants]
        points = sorted(((c["parameters"] / 1e6, s) for c, s in pairs if c and s), key=lambda point: point[0])
        x, y = [x for x, _ in points], [100 * s.mean for _, s in points]
        axes.errorbar(x, y, [_half_width(s) for _, s in points], fmt="o-", color=color, label=_name(name), capsize=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=INK, alpha=0.12)
    _finish(axes, xlabel="trainable parameters, M", ylabel="mean score, %")
    _legend(axes)
    return figure


def differences(rows: list[tuple[str, Estimate]], label: str) -> Figure:
    """Draw differences with their intervals and a line at zero."""
    figure = _figure(7, 0.3 * len(rows) + 0.8)
    axes = figure.subplots()
    for y, (_, difference) in enumerate(rows):
        color = {"win": COLORS[2], "loss": COLORS[3], "tie": GREY}[difference.verdict]
        half = _half_width(difference)
        axes.errorbar(100 * difference.mean, y, xerr=half, fmt="o", color=color, capsize=2, markersize=5)
    axes.axvline(0, color=INK, alpha=0.5, linewidth=1)
    axes.set_yticks(range(len(rows)), [_name(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color=INK, alpha=0.12)
    return _finish(axes, xlabel=label)


def svg(figure: Figure) -> str:
    """Return a figure as SVG for an HTML page: no background, text as text, in the color of the page."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "umbra", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(INK, "currentColor")
    return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG with a white background."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white")
    return out.getvalue()
