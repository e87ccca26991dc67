"""Tables and figures: means over seeds ± half the 95 % confidence interval (Student's t)."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbra.lab.study.statistics import mean_of_seeds

from .tasks import LONGER, ROWS
from .text import TASKS

Run = dict[str, Any]
PAIR, ALONE = "attached", "detached"


def place(machine: dict[str, Any]) -> str:
    """Return a short description of a machine."""
    cpu = f"{machine['cores']} cores of {machine['cpu']} ({machine['capability']})"
    return machine["gpu"] if "gpu" in machine else f"{cpu}, {machine['threads']} threads"


def about(data: dict[str, Any]) -> list[str]:
    """Return the line with base, machines, versions and date."""
    runs = data["runs"] if isinstance(data["runs"], list) else []
    where = "; ".join(dict.fromkeys(place(r.get("machine", data["machine"])) for r in runs)) or place(data["machine"])
    return [f"SmolLM2-135M-Instruct in bf16; {where}; {data['versions']}; {data['date']}.", ""]


def mean_ci(values: list[float], form: str = "{:.1f}", unit: str = "") -> str:
    """Return mean ± half the interval."""
    mean, half = mean_of_seeds(values)
    return form.format(mean) + unit + (f" ± {form.format(half)}" if len(values) > 1 else "")


# -- initialisations ---------------------------------------------------------------------------------------------------


def initialisations(data: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Initialization of the shadow", "", *about(data),
        "60 steps of distillation (4 × 256 tokens, every 4th of them, the base's top-64 tokens, rate 3e-3) on the same text, then",
        "the divergence KL(base ‖ shadow) on held-out blocks (nats/token) and the top-1 agreement. Copied blocks are listed; their",
        "final norm is multiplied by 0.3 unless another factor is given. *Another checkpoint* was trained on sums without the",
        "base. `python -m bench.shipping initialise`.", "",
        "| initialization | parameters | seeds | divergence before | after | agreement |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["variant"] for r in data["runs"]):
        selected = [r for r in data["runs"] if r["variant"] == name]
        lines.append(
            f"| {name} | {selected[0]['parameters'] / 1e6:.1f} M | {len(selected)} "
            f"| {mean_ci([r['start'] for r in selected], '{:.2f}')} "
            f"| {mean_ci([r['divergence'] for r in selected], '{:.2f}')} | {mean_ci([100 * r['agreement'] for r in selected])} % |"
        )
    return "\n".join(lines) + "\n"


# -- tasks -------------------------------------------------------------------------------------------------------------


def _accuracies(runs: list[Run], task: str, row: str, mode: str) -> dict[int, float]:
    return {r["seed"]: 100 * r["accuracy"] for r in runs if (r["task"], r["row"], r["mode"]) == (task, row, mode)}


def tasks(data: dict[str, Any]) -> str:
    """Return the page."""
    runs = data["runs"]
    lines = [
        "# Tasks: attached and detached", "", *about(data),
        "A shadow of two blocks; test accuracy in %. *Pretrained*: initialized with a shadow distilled from the",
        "base ([shipping-pretrain.json](shipping-pretrain.json)). *Alone*: trained without the base, *for longer* at a quarter to",
        "a half of the rate. *Alone first*: initialized with the result of *pretrained, alone for longer*. *Of the pair*:",
        "accuracy of the detached shadow relative to the attached pair. `python -m bench.shipping tasks`.",
    ]  # fmt: skip
    for task in (t for t in TASKS if any(r["task"] == t for r in runs)):
        tested = next(r["total"] for r in runs if r["task"] == task)
        lines += [
            "", f"## {task}: {TASKS[task].steps} steps of {TASKS[task].batch}, {tested} test records", "",
            "| shadow | seeds | attached | minus random | detached | minus random | of the pair |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for row in (r for r in ROWS if any(x["task"] == task and x["row"] == r for x in runs)):
            cells = []
            for mode in (PAIR, ALONE):
                selected, random = (_accuracies(runs, task, r, mode) for r in (row, "random"))
                differences = [selected[s] - random[s] for s in selected if s in random]
                cells += [
                    mean_ci(list(selected.values()), unit=" %") if selected else "–",
                    mean_ci(differences) if differences and row != "random" else "",
                ]
            pair, alone = (_accuracies(runs, task, row, mode) for mode in (PAIR, ALONE))
            share = [alone[s] / pair[s] for s in alone if pair.get(s)]
            name = f"{row} ({TASKS[task].alone} steps)" if row in LONGER else row
            lines.append(
                f"| {name} | {len(alone)} | {' | '.join(cells)} | {mean_ci(share, '{:.2f}') if share else ''} |"
            )
    return "\n".join(lines) + "\n"


# -- the edge ----------------------------------------------------------------------------------------------------------


def edge(data: dict[str, Any]) -> str:
    """Return the page."""
    runs = data["runs"]
    lines = [
        f"# Edge runtimes: {data['task']}", "", *about(data),
        "A detached shadow of two blocks in PyTorch, onnxruntime and llama.cpp, each row in a separate process; the vocabulary of",
        "*trimmed* is that of the task's training text. Median time to the first token and tokens/s on 1 and 2 threads; peak",
        "memory of the process; correct answers to the same questions. `python -m bench.shipping edge`.", "",
        "| model | runtime | weights | MB | memory, MB | first token, ms | tokens/s, 1 thread | 2 threads | correct | 95 % |",
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


def widths(data: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# A pretrained shadow with a base of another width", "", *about(data),
        "The channels of the base are shuffled and padded: the same logits from other weights. Divergence KL(base ‖ shadow) on",
        "held-out text (nats/token). `python -m bench.shipping widths`.", "",
        "| base | seeds | divergence | agreement | seconds |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["beside"] for r in data["runs"]):
        selected = [r for r in data["runs"] if r["beside"] == name]
        cells = [
            mean_ci([r["divergence"] for r in selected], "{:.3f}"),
            mean_ci([100 * r["agreement"] for r in selected], unit=" %"),
        ]
        lines.append(
            f"| {name} | {len(selected)} | {' | '.join(cells)} | {statistics.mean(r['seconds'] for r in selected):.0f} |"
        )
    return "\n".join(lines) + "\n"


# -- pictures ----------------------------------------------------------------------------------------------------------


def _dots(axes: Any, names: list[str], values: Callable[[str], list[tuple[list[float], str]]]) -> None:
    """Draw one line per name, a dot for each value and a bar at the mean of each color."""
    for y, name in enumerate(names):
        for group, colour in values(name):
            axes.plot(group, [y] * len(group), "o", color=colour, alpha=0.6)
            axes.plot([statistics.mean(group)] * 2, [y - 0.3, y + 0.3], color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def picture_of_initialisations(data: dict[str, Any], path: Path) -> None:
    """Draw the divergence after distillation, one dot per seed."""
    from matplotlib.figure import Figure

    runs = data["runs"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(r["variant"] for r in runs))
    _dots(axes, names, lambda n: [([r["divergence"] for r in runs if r["variant"] == n], "#4e79a7")])
    axes.set(xlabel="KL(base ‖ shadow) after 60 steps, nats/token")
    figure.savefig(path, dpi=110, format="png")


def picture_of_tasks(data: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of the pair and of the detached shadow, one dot per seed."""
    from matplotlib.figure import Figure

    runs = data["runs"]
    shown = [t for t in TASKS if any(r["task"] == t for r in runs)]
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    colours = {PAIR: "#4e79a7", ALONE: "#e07b39"}
    for axes, task in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):

        def values(row: str, task: str = task) -> list[tuple[list[float], str]]:
            groups = [(list(_accuracies(runs, task, row, mode).values()), colour) for mode, colour in colours.items()]
            return [(v, colour) for v, colour in groups if v]

        _dots(axes, list(ROWS), values)
        axes.set(title=task, xlabel="accuracy, %")
        axes.set_xlim(left=0)
    for mode, colour in colours.items():
        figure.axes[0].plot([], [], "o", color=colour, label=mode)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, dpi=110, format="png")


def picture_of_edge(data: dict[str, Any], path: Path) -> None:
    """Draw tokens/s on two threads over the size of the file."""
    from matplotlib.figure import Figure

    colours = {"bare base": "#888888", "attached": "#4e79a7", "detached": "#e07b39", "trimmed": "#59a14f"}
    shapes = {"PyTorch": "s", "onnx": "^", "gguf": "o"}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, r in enumerate(sorted(data["runs"], key=lambda r: (r["who"], r["bytes"]))):
        x, y = r["bytes"] / 1e6, list(r["tokens_per_second"].values())[-1]
        axes.plot(x, y, shapes[r["runtime"]], color=colours[r["who"]])
        beside: dict[str, Any] = {"xytext": (5, 4)} if i % 2 else {"xytext": (-5, -9), "ha": "right"}
        axes.annotate(r["form"], (x, y), textcoords="offset points", fontsize=7, **beside)
    for who, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=who)
    for runtime, shape in shapes.items():
        axes.plot([], [], shape, color="black", fillstyle="none", label=runtime)
    axes.set(xscale="log", yscale="log", xlabel="size of the weights, MB", ylabel="tokens/s, 2 threads")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "initialise": initialisations, "tasks": tasks, "widths": widths, "edge": edge,
}  # fmt: skip
