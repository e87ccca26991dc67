"""The pictures: per case a dot for each method, with the spread of its rounds; and how cost grows."""

import math
from pathlib import Path
from statistics import median
from typing import Any

from .methods import BASE, LORA
from .report import Report, ratios

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#f28e2b", "#76b7b2", "#9c755f", "#7f7f7f", "#edc948", "#1f3f66")
COLUMNS = 3


def dots(report: Report, path: Path) -> None:
    """A panel for each case: ratios to LoRA, which stands at 1; memory by its peak."""
    from matplotlib.figure import Figure

    panels = [(c, _points(report, c)) for c in report.cases]
    panels = [(c, points) for c, points in panels if len(points) > 1]
    if not panels:
        return
    lines = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, (0.34 * len(report.methods) + 1.1) * lines + 0.6), layout="constrained")
    header = report.held["header"]
    figure.suptitle(f"Ratio to {LORA}: {header['base']}, {header['dtype']}, {_machine(header)}")
    for i, (case, points) in enumerate(panels):
        axes = figure.add_subplot(lines, COLUMNS, i + 1)
        axes.axvline(1, color="#aaaaaa", linewidth=1, zorder=0)
        for y, (name, values) in enumerate(points.items()):
            centre = median(values)
            colour = "#b03a2e" if name == LORA else "#333333" if name == BASE else "#4e79a7"
            axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=2, alpha=0.5)
            axes.plot(centre, y, "o", color=colour, markersize=6)
            axes.annotate(
                f"{centre:.2f}", (max(values), y), (6, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(points)), list(points), fontsize=9)
        axes.set_ylim(len(points) - 0.4, -0.6)
        axes.set_xlim(0, 1.15 * max(max(v) for v in points.values()))
        axes.set_title(case, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def growth(report: Report, axes_of: dict[str, dict[str, int]], path: Path) -> None:
    """A panel for each axis: milliseconds of a step, each method a line, against what grows; both logarithmic.

    Args:
        axes_of: axis → case → where on the axis it stands.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    header = report.held["header"]
    figure.suptitle(f"Milliseconds of a step, {header['base']}, {header['dtype']}, {_machine(header)}")
    for i, (axis, places) in enumerate(axes_of.items()):
        axes = figure.add_subplot(2, math.ceil(len(axes_of) / 2), i + 1)
        for name, colour in zip(report.methods, COLOURS, strict=False):
            rows = [(x, report.held["cases"].get(case, {}).get(name, {}).get("seconds")) for case, x in places.items()]
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
    rows = report.held["cases"][case]
    lora = rows.get(LORA, {})
    found = {}
    for name in report.methods:
        row = rows.get(name, {})
        values = [row["peak"] / lora["peak"]] if "peak" in row and "peak" in lora else ratios(row, LORA)
        if values:
            found[name] = values
    return found


def _machine(header: dict[str, Any]) -> str:
    machine = header["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
