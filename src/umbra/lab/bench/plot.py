"""The figures: for each case one dot per method with the range of its rounds, and the growth of cost."""

import math
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from umbra.lab.bench.methods import BASE, LORA
from umbra.lab.bench.report import Report, ratios

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#f28e2b", "#76b7b2", "#9c755f", "#7f7f7f", "#edc948", "#1f3f66")
COLUMNS = 3
CURVE_STEP = 4  # batch size whose case has a separate panel as well


def dots(report: Report, sizes: dict[str, int], path: Path) -> None:
    """Draw ratios to LoRA, one panel per case, and one panel of ratios over batch size.

    Args:
        report: The measurement.
        sizes: The batch size by case, for the cases of that panel.
        path: The PNG file.
    """
    panels = {case: _points(report, case) for case in report.cases if case not in sizes or sizes[case] == CURVE_STEP}
    panels = {case: points for case, points in panels.items() if len(points) > 1}
    panels = dict(sorted(panels.items(), key=lambda item: -len(item[1])))  # panels of similar height side by side
    curve = {sizes[case]: _points(report, case) for case in report.cases if case in sizes}
    curve = {n: points for n, points in sorted(curve.items()) if points}
    has_curve = len(curve) > 1
    count = len(panels) + has_curve
    if not count:
        return
    heights = [max(len(p), 3) for p in panels.values()][::COLUMNS] + ([9] if len(panels) % COLUMNS == 0 else [])
    if has_curve:
        heights[len(panels) // COLUMNS] = max(9, heights[len(panels) // COLUMNS])
    heights = heights[: math.ceil(count / COLUMNS)]
    figure = Figure(figsize=(5.2 * COLUMNS, 0.32 * sum(heights) + 0.8 * len(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=[h + 1 for h in heights])
    header = report.values["header"]
    figure.suptitle(f"Ratio to {LORA}, median and range: {header['base']}, {header['dtype']}, {_machine(header)}")
    for i, (case, points) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i // COLUMNS, i % COLUMNS])
        _draw_dots(axes, points)
        axes.set_title(case, fontsize=10)
    if has_curve:
        axes = figure.add_subplot(grid[len(panels) // COLUMNS, len(panels) % COLUMNS])
        _draw_curve(axes, curve, report.methods)
        axes.set_title("step-masked, batches of 128 tokens a row", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def _draw_dots(axes: Axes, points: dict[str, list[float]]) -> None:
    axes.axvline(1, color="#aaaaaa", linewidth=1, zorder=0)
    for y, (name, values) in enumerate(points.items()):
        centre, colour = median(values), {LORA: "#b03a2e", BASE: "#333333"}.get(name, "#4e79a7")
        axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=2, alpha=0.5)
        axes.plot(centre, y, "o", color=colour, markersize=6)
        position = max(values), y
        axes.annotate(f"{centre:.2f}", position, (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(points)), list(points), fontsize=9)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(max(v) for v in points.values()))
    axes.grid(axis="x", alpha=0.3)
    _bare(axes)


def _draw_curve(axes: Axes, curve: dict[int, dict[str, list[float]]], names: list[str]) -> None:
    axes.axhline(1, color="#aaaaaa", linewidth=1, zorder=0)
    drawn = [n for n in names if n != LORA and sum(n in points for points in curve.values()) > 1]
    for name, colour in zip(drawn, COLOURS, strict=False):
        x = [n for n, points in curve.items() if name in points]
        values = [curve[n][name] for n in x]
        colour = "#333333" if name == BASE else colour
        axes.plot(x, [median(v) for v in values], "o-", color=colour, markersize=4, label=name)
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(curve), [str(n) for n in curve])
    axes.set_xlabel("rows of the batch", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", ncols=2)
    _bare(axes)


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def growth(report: Report, axes_of: dict[str, dict[str, int]], path: Path) -> None:
    """Draw milliseconds of a step over one size per panel, one line per method; both axes are logarithmic.

    Args:
        report: The measurement.
        axes_of: By name of the size, its value in every case.
        path: The PNG file.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    header = report.values["header"]
    figure.suptitle(f"Milliseconds of a step, {header['dtype']}, {_machine(header)}\n{header['base']}", fontsize=10)
    for i, (axis, places) in enumerate(axes_of.items()):
        axes = figure.add_subplot(2, math.ceil(len(axes_of) / 2), i + 1)
        for name, colour in zip(report.methods, COLOURS, strict=False):
            rows = [
                (x, report.values["cases"].get(case, {}).get(name, {}).get("seconds")) for case, x in places.items()
            ]
            rows = [(x, [1000 * s for s in seconds]) for x, seconds in rows if seconds]
            if rows:
                x, middle = [x for x, _ in rows], [median(v) for _, v in rows]
                axes.plot(x, middle, "o-", color=colour, label=name, markersize=4)
                axes.fill_between(x, [min(v) for _, v in rows], [max(v) for _, v in rows], color=colour, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted(places.values())
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_xlabel(axis)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3, which="both")
        if i == 0:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def _points(report: Report, case: str) -> dict[str, list[float]]:
    rows = report.values["cases"][case]
    lora = rows.get(LORA, {})
    points = {}
    for name in report.methods:
        row = rows.get(name, {})
        values = [row["peak"] / lora["peak"]] if "peak" in row and "peak" in lora else ratios(row, LORA)
        if values:
            points[name] = values
    return points


def _machine(header: dict[str, Any]) -> str:
    machine = header["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
