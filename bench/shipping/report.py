"""Tables and pictures of the runs: means of the seeds, ± half the width of their 95 % interval (Student's t)."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.quality import interval

from .tasks import LONGER, ROWS
from .text import TASKS

Run = dict[str, Any]
PAIR, ALONE = "attached", "detached"


def place(machine: dict[str, Any]) -> str:
    """A machine, in a few words."""
    cpu = f"{machine['cores']} cores of {machine['cpu']} ({machine['capability']})"
    return machine["gpu"] if "gpu" in machine else f"{cpu}, {machine['threads']} threads"


def about(held: dict[str, Any]) -> list[str]:
    """Where it was measured."""
    runs = held["runs"] if isinstance(held["runs"], list) else []
    where = "; ".join(dict.fromkeys(place(r.get("machine", held["machine"])) for r in runs)) or place(held["machine"])
    return [f"SmolLM2-135M-Instruct in bf16; {where}; {held['versions']}; {held['date']}.", ""]


def told(values: list[float], form: str = "{:.1f}", unit: str = "") -> str:
    """Mean ± half the width of the interval."""
    mean, half = interval(values)
    return form.format(mean) + unit + (f" ± {form.format(half)}" if len(values) > 1 else "")


# -- initialisations ---------------------------------------------------------------------------------------------------


def initialisations(held: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# How a shadow begins", "", *about(held),
        "60 steps of distillation (4 × 256 tokens, every 4th of them, the base's 64 likeliest tokens, rate 3e-3) on the same text,",
        "then the divergence KL(base ‖ shadow) on held-out blocks, nats a token, and how often both say the same next token.",
        "Copied blocks are named; their final norm is multiplied by 0.3 where nothing else is said. *Another checkpoint*",
        "learned sums, without the base. `python -m bench.shipping initialise`.", "",
        "| beginning | parameters | seeds | divergence before | after | agreement |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["variant"] for r in held["runs"]):
        mine = [r for r in held["runs"] if r["variant"] == name]
        lines.append(
            f"| {name} | {mine[0]['parameters'] / 1e6:.1f} M | {len(mine)} | {told([r['start'] for r in mine], '{:.2f}')} "
            f"| {told([r['divergence'] for r in mine], '{:.2f}')} | {told([100 * r['agreement'] for r in mine])} % |"
        )
    return "\n".join(lines) + "\n"


# -- tasks -------------------------------------------------------------------------------------------------------------


def _accuracies(runs: list[Run], task: str, row: str, mode: str) -> dict[int, float]:
    return {r["seed"]: 100 * r["accuracy"] for r in runs if (r["task"], r["row"], r["mode"]) == (task, row, mode)}


def tasks(held: dict[str, Any]) -> str:
    """Markdown."""
    runs = held["runs"]
    lines = [
        "# Tasks, beside the base and without it", "", *about(held),
        "A shadow of two blocks, trained on each task; % of the test file that it answers rightly. *Pretrained* began as a shadow",
        "that learned the base's distribution ([shipping-pretrain.json](shipping-pretrain.json)); *alone* was trained without the",
        "base, *for longer* at a quarter to a half of the rate; *alone first* began as what *pretrained, alone for longer* had",
        "become. *Of the pair*: the detached shadow's share of the attached pair's accuracy. `python -m bench.shipping tasks`.",
    ]  # fmt: skip
    for task in (t for t in TASKS if any(r["task"] == t for r in runs)):
        tested = next(r["total"] for r in runs if r["task"] == task)
        lines += [
            "", f"## {task}: {TASKS[task].steps} steps of {TASKS[task].batch}, {tested} tested", "",
            "| shadow | seeds | attached | less random | detached | less random | of the pair |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for row in (r for r in ROWS if any(x["task"] == task and x["row"] == r for x in runs)):
            cells = []
            for mode in (PAIR, ALONE):
                mine, random = (_accuracies(runs, task, r, mode) for r in (row, "random"))
                apart = [mine[s] - random[s] for s in mine if s in random]
                cells += [
                    told(list(mine.values()), unit=" %") if mine else "–",
                    told(apart) if apart and row != "random" else "",
                ]
            pair, alone = (_accuracies(runs, task, row, mode) for mode in (PAIR, ALONE))
            share = [alone[s] / pair[s] for s in alone if pair.get(s)]
            name = f"{row} ({TASKS[task].alone} steps)" if row in LONGER else row
            lines.append(f"| {name} | {len(alone)} | {' | '.join(cells)} | {told(share, '{:.2f}') if share else ''} |")
    return "\n".join(lines) + "\n"


# -- the edge ----------------------------------------------------------------------------------------------------------


def edge(held: dict[str, Any]) -> str:
    """Markdown."""
    runs = held["runs"]
    lines = [
        f"# At the edge: {held['task']}", "", *about(held),
        "A shadow of two blocks, detached: in PyTorch, onnxruntime and llama.cpp, each row a process of its own; *trimmed* keeps",
        "the tokens of the task's training text. Time to the first token after a prompt (median), then tokens a second, on 1 and",
        "on 2 threads; most memory of the process; right answers to the same questions. `python -m bench.shipping edge`.", "",
        "| model | runtime | weights | MB | memory, MB | first token, ms | tokens/s, 1 thread | 2 threads | right | 95 % |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for r in runs:
        first, speed = (list(r[name].values()) for name in ("first_token_seconds", "tokens_per_second"))
        low, high = r["interval"]
        lines.append(
            f"| {r['who']} | {r['runtime']} | {r['form']} | {r['bytes'] / 1e6:.1f} | {r['peak_bytes'] / 1e6:.0f} "
            f"| {1000 * first[0]:.0f}, {1000 * first[1]:.0f} | {speed[0]:.0f} | {speed[1]:.0f} "
            f"| {r['right']}/{r['asked']} | {100 * low:.0f} – {100 * high:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def widths(held: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# A pretrained shadow beside a base of another width", "", *about(held),
        "The base's channels shuffled and padded: the same logits from other weights. Divergence KL(base ‖ shadow) on held-out",
        "text, nats a token. `python -m bench.shipping widths`.", "",
        "| beside | seeds | divergence | agreement | seconds |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["beside"] for r in held["runs"]):
        mine = [r for r in held["runs"] if r["beside"] == name]
        cells = [told([r["divergence"] for r in mine], "{:.3f}"), told([100 * r["agreement"] for r in mine], unit=" %")]
        lines.append(
            f"| {name} | {len(mine)} | {' | '.join(cells)} | {statistics.mean(r['seconds'] for r in mine):.0f} |"
        )
    return "\n".join(lines) + "\n"


# -- pictures ----------------------------------------------------------------------------------------------------------


def _dots(axes: Any, names: list[str], values: Callable[[str], list[tuple[list[float], str]]]) -> None:
    """A line for each name, with a dot for each value and a bar at the mean of its colour."""
    for y, name in enumerate(names):
        for found, colour in values(name):
            axes.plot(found, [y] * len(found), "o", color=colour, alpha=0.6)
            axes.plot([statistics.mean(found)] * 2, [y - 0.3, y + 0.3], color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def picture_of_initialisations(held: dict[str, Any], path: Path) -> None:
    """The divergence after the budget: every seed a dot."""
    from matplotlib.figure import Figure

    runs = held["runs"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(r["variant"] for r in runs))
    _dots(axes, names, lambda n: [([r["divergence"] for r in runs if r["variant"] == n], "#4e79a7")])
    axes.set(xlabel="KL(base ‖ shadow) after 60 steps, nats a token")
    figure.savefig(path, dpi=110, format="png")


def picture_of_tasks(held: dict[str, Any], path: Path) -> None:
    """Accuracy of the pair and of the detached shadow: every seed a dot."""
    from matplotlib.figure import Figure

    runs = held["runs"]
    shown = [t for t in TASKS if any(r["task"] == t for r in runs)]
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    colours = {PAIR: "#4e79a7", ALONE: "#e07b39"}
    for axes, task in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):

        def values(row: str, task: str = task) -> list[tuple[list[float], str]]:
            found = [(list(_accuracies(runs, task, row, mode).values()), colour) for mode, colour in colours.items()]
            return [(v, colour) for v, colour in found if v]

        _dots(axes, list(ROWS), values)
        axes.set(title=task, xlabel="right answers, %")
        axes.set_xlim(left=0)
    for mode, colour in colours.items():
        figure.axes[0].plot([], [], "o", color=colour, label=mode)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, dpi=110, format="png")


def picture_of_edge(held: dict[str, Any], path: Path) -> None:
    """Tokens a second on two threads, against the size of the file."""
    from matplotlib.figure import Figure

    colours = {"bare base": "#888888", "attached": "#4e79a7", "detached": "#e07b39", "trimmed": "#59a14f"}
    shapes = {"PyTorch": "s", "onnx": "^", "gguf": "o"}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, r in enumerate(sorted(held["runs"], key=lambda r: (r["who"], r["bytes"]))):
        x, y = r["bytes"] / 1e6, list(r["tokens_per_second"].values())[-1]
        axes.plot(x, y, shapes[r["runtime"]], color=colours[r["who"]])
        beside = {"xytext": (5, 4)} if i % 2 else {"xytext": (-5, -9), "ha": "right"}
        axes.annotate(r["form"], (x, y), textcoords="offset points", fontsize=7, **beside)
    for who, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=who)
    for runtime, shape in shapes.items():
        axes.plot([], [], shape, color="black", fillstyle="none", label=runtime)
    axes.set(xscale="log", yscale="log", xlabel="size of the weights, MB", ylabel="tokens a second, 2 threads")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "initialise": initialisations, "tasks": tasks, "widths": widths, "edge": edge,
}  # fmt: skip
