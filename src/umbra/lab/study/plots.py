"""The report's pictures, as matplotlib figures. What is black in them is, in an SVG, the colour of the page's own text."""

import io
import re
import textwrap
from typing import Any

import numpy as np

from umbra.lab.study.results import Results, Variant
from umbra.lab.study.statistics import Estimate

INK = "#010203"  # replaced by currentColor
WIDE = 36  # letters of a line of a name
LETTER = 0.075  # of a tick label, in inches
MARKERS = "os^DvP"
COLOURS = ("#4e79a7", "#e08a3c", "#59a14f", "#d1605e", "#9d7cb8", "#8c6d5a", "#d98cb3", "#7a8794", "#b8a03a", "#4fa3a0")


def looks(results: Results) -> dict[str, dict[str, str]]:
    """A colour for every variant, and a marker where there are more variants than colours; the bare base is grey."""
    trained = [v.name for v in results.variants if v.is_trained]
    found = {v.name: {"color": "#8a8a8a", "fmt": MARKERS[0]} for v in results.variants}
    for i, name in enumerate(trained):
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        found[name] = {"color": COLOURS[i % len(COLOURS)], "fmt": marker}
    return found


def _name(text: str) -> str:
    """A name as matplotlib leaves it alone: not set as mathematics for its $, not left out of a legend for its underscore.

    A long one takes two lines.
    """
    lines = textwrap.wrap(text, WIDE, max_lines=2, placeholder=" …")
    return re.sub("^_", "\u200b_", "\n".join(lines).replace("$", r"\$"))


def _width(results: Results) -> float:
    """Inches of the longest name of a variant."""
    return LETTER * max(len(line) for v in results.variants for line in _name(v.name).split("\n"))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Any, **labels: Any) -> Any:
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)
    axes.tick_params(colors=INK, labelsize=8)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
        text.set_fontsize(9)
    return axes


def scores(results: Results) -> Any:
    """Every variant's score on every task it was trained on, with its interval."""
    palette, tasks = looks(results), results.trained
    figure = _figure(3.1 * len(tasks) + max(1.2, _width(results)), 0.34 * len(results.variants) + 0.9)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True):
        scale = 1 if results.is_loss(task) else 100
        for y, variant in enumerate(results.variants):
            found = results.score(variant, task, task)
            if found is not None:
                half = 0 if np.isinf(found.half) else scale * found.half
                axes.errorbar(scale * found.mean, y, xerr=half, **palette[variant.name], capsize=2, markersize=5)
        axes.set_yticks(range(len(results.variants)), [_name(v.name) for v in results.variants])
        axes.grid(axis="x", color=INK, alpha=0.12)
        _plain(axes, title=_name(task), xlabel=_name(results.metric(task)) + ("" if results.is_loss(task) else ", %"))
    figure.axes[0].invert_yaxis()
    return figure


def pareto(results: Results) -> Any:
    """The mean score against what it costs."""
    palette = looks(results)
    costs = (
        ("parameters", 1e6, "trainable parameters, M"),
        ("peak", 1e9, "peak memory of training, GB"),
        ("seconds", 1, "seconds a step"),
    )
    lines = sum(len(_name(v.name).split("\n")) for v in results.variants)
    figure = _figure(8.5 + max(2, _width(results)), max(3.2, 0.18 * lines + 0.5))
    for axes, (name, unit, label) in zip(figure.subplots(1, 3, sharey=True), costs, strict=True):
        for variant in results.variants:
            mean, cost = results.mean_score(variant), results.cost(variant)
            if mean is not None and cost:
                half = 0 if np.isinf(mean.half) else 100 * mean.half
                look = {**palette[variant.name], "label": _name(variant.name), "capsize": 2}
                axes.errorbar(cost[name] / unit, 100 * mean.mean, yerr=half, **look)
        axes.grid(color=INK, alpha=0.12)
        axes.axvline(0, alpha=0)  # so that the margin at the right is of the whole width
        axes.set_xlim(left=0)
        _plain(axes, xlabel=label, ylabel="mean score, %" if name == "parameters" else "")
    _legend(figure.axes[-1])
    return figure


def _legend(axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, names, frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5)
        )


def transfer(results: Results, pairs: list[tuple[str, str]]) -> Any:
    """What every variant scores on tasks that it was not trained on, as a map."""
    values = np.full((len(results.variants), len(pairs)), np.nan)
    for i, variant in enumerate(results.variants):
        for j, (trained, tested) in enumerate(pairs):
            found = results.score(variant, trained, tested)
            values[i, j] = np.nan if found is None else 100 * found.mean
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
    return _plain(axes).figure


def scaling(results: Results, families: dict[str, list[Variant]]) -> Any:
    """The mean score over trainable parameters, a curve for every family."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = _figure(6, 3.4)
    axes = figure.subplots()
    for colour, (name, variants) in zip(COLOURS, families.items(), strict=False):
        told = [(results.cost(v), results.mean_score(v)) for v in variants]
        points = sorted(((c["parameters"] / 1e6, f) for c, f in told if c and f), key=lambda point: point[0])
        halves = [0 if np.isinf(f.half) else 100 * f.half for _, f in points]
        x, y = [x for x, _ in points], [100 * f.mean for _, f in points]
        axes.errorbar(x, y, halves, fmt="o-", color=colour, label=_name(name), capsize=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=INK, alpha=0.12)
    _plain(axes, xlabel="trainable parameters, M", ylabel="mean score, %")
    _legend(axes)
    return figure


def differences(rows: list[tuple[str, Estimate]], label: str) -> Any:
    """Differences with their intervals, beside zero."""
    figure = _figure(7, 0.3 * len(rows) + 0.8)
    axes = figure.subplots()
    for y, (_, found) in enumerate(rows):
        colour = {"win": COLOURS[2], "loss": COLOURS[3], "tie": "#8a8a8a"}[found.verdict]
        half = 0 if np.isinf(found.half) else 100 * found.half
        axes.errorbar(100 * found.mean, y, xerr=half, fmt="o", color=colour, capsize=2, markersize=5)
    axes.axvline(0, color=INK, alpha=0.5, linewidth=1)
    axes.set_yticks(range(len(rows)), [_name(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color=INK, alpha=0.12)
    return _plain(axes, xlabel=label).figure


def svg(figure: Any) -> str:
    """For a page: without a background, text as text, in the page's colour."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "umbra", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(INK, "currentColor")
    return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)


def png(figure: Any) -> bytes:
    """For Markdown: on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white")
    return out.getvalue()
