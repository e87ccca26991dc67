"""The tables: ratios to PEFT's LoRA and to the bare base, seconds, and memory; medians with the spread of the rounds."""

from statistics import median
from typing import Any

from umbra.lab.bench.methods import BASE, LORA, METHODS
from umbra.lab.bench.timing import Row

WAYS = {"absent": "–", "refused": "**refused**", "failed": "fails"}

MEMORY = """\
Each method in a process of its own, on a base made in place, after a small first step. *Peak* is all that the process
(on a GPU: its tensors) held at its highest during the step, Python, torch and the base's weights included; *increase* is
the peak less what it held before the step. Tensors of 256 KiB or more have pages of their own (MALLOC_MMAP_THRESHOLD_),
so that the heap's history has no say."""
RULES = """\
No dropout anywhere. Shadows have as many trainable parameters as LoRA (within 5 %), fitted by the width of their
feed-forward. Before a method is timed, its logits, task loss and tokens at initialisation are compared with the base's
(fp32: 1e-4 of the largest entry; bf16: 1e-1, losses 1e-2); one that differs is refused. Rounds are interleaved, in
shuffled order."""


def ratios(row: Row, reference: str) -> list[float]:
    """Of each round, a method's seconds by those of the reference in the same round; empty where either was not timed."""
    return [a / b for a, b in zip(row.get("seconds", ()), row.get("beside", {}).get(reference, ()), strict=False)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median [least – most]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f} – {max(values):.{digits}f}]"


def order(names: Any, known: list[str]) -> list[str]:
    """Names in the order in which they are known, unknown ones last."""
    return sorted(names, key=lambda n: known.index(n) if n in known else len(known))


class Report:
    """Markdown of what was measured.

    Args:
        held: as `Records.as_dict` gives it.
        about: of each case, what is measured in one line, in the order of the columns.
    """

    def __init__(self, held: dict[str, Any], about: dict[str, str]):
        self.held, self.about = held, about
        self.cases = order(held["cases"], list(about))
        self.timed = [c for c in self.cases if not c.startswith("memory")]
        self.weighed = [c for c in self.cases if c not in self.timed]
        methods = {name for rows in held["cases"].values() for name in rows}
        self.methods = order(methods, [m.name for m in METHODS])

    def text(self) -> str:
        """The whole page."""
        parts = [self._origin()]
        for reference in (LORA, BASE):
            cells = self._cells(lambda row, r=reference: spread(found) if (found := ratios(row, r)) else None)
            if cells:
                what = "of each round's ratio, medians [least – most]; less is faster"
                parts.append(f"## Time, as ratios to {reference}\n\nIn each cell, {what}.\n\n{cells}")
        cells = self._cells(lambda row: spread([1000 * s for s in row["seconds"]], 0) if "seconds" in row else None)
        if cells:
            parts.append(f"## Milliseconds\n\nMedians [least – most].\n\n{cells}")
        if self.weighed:
            parts.append(f"## Memory of a training step\n\n{self._memory()}")
        parts.append(self._legend())
        return "\n\n".join(parts) + "\n"

    def _origin(self) -> str:
        header = self.held["header"]
        lines = [f"# {header['base']}, {header['dtype']}, on {header['device']}", ""]
        lines += [f"- {key}: {value}" for key, value in header["machine"].items()]
        lines += [f"- {key}: {header[key]}" for key in header if key not in ("base", "dtype", "device", "machine")]
        for i, s in enumerate(self.held["sessions"]):
            if s is not None:
                versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in s["versions"].items())
                lines.append(f"- measured {s['date']} at commit {s['commit']} with {versions}: {self._part(i)}")
        return "\n".join(lines)

    def _part(self, session: int) -> str:
        """What stems from a session."""
        rows = self.held["cases"]
        mine = {c: [n for n, row in rows[c].items() if row["session"] == session] for c in self.cases}
        mine = {c: names for c, names in mine.items() if names}
        if all(len(mine.get(c, ())) == len(rows[c]) for c in self.cases):
            return "everything"
        names = order({n for names in mine.values() for n in names}, self.methods)
        return f"{', '.join(names)} in {', '.join(mine)}"

    def _cells(self, cell: Any) -> str:
        rows = self.held["cases"]
        shown = [c for c in self.timed if any(cell(row) for row in rows[c].values())]
        if not shown:
            return ""
        lines = ["| | " + " | ".join(shown) + " |", "|---" + "|---:" * len(shown) + "|"]
        for name in self.methods:
            found = [rows[c].get(name, {"absent": ""}) for c in shown]
            if any("absent" not in row for row in found):
                lines.append(f"| {name} | " + " | ".join(cell(row) or self._why(row) for row in found) + " |")
        return "\n".join(lines)

    def _why(self, row: Row) -> str:
        return next((mark for key, mark in WAYS.items() if key in row), "–")

    def _memory(self) -> str:
        rows = self.held["cases"]
        head = "".join(f" {c}: peak | to {LORA} | increase | to {LORA} |" for c in self.weighed)
        lines = [f"| |{head}", "|---" + "|---:" * (4 * len(self.weighed)) + "|"]
        for name in self.methods:
            cells = []
            for case in self.weighed:
                row, lora = rows[case].get(name, {"absent": ""}), rows[case].get(LORA, {})
                for size in (_peak, _increase):
                    if "peak" not in row:
                        cells += [self._why(row), "–"]
                    else:
                        ratio = f"{size(row) / size(lora):.2f}" if "peak" in lora else "–"
                        cells += [f"{size(row) / 1e9:.2f} GB", ratio]
            if any(cell != "–" for cell in cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", MEMORY]
        return "\n".join(lines)

    def _legend(self) -> str:
        lines = ["## What is what", "", "| column | |", "|---|---|"]
        lines += [f"| {case} | {self.about.get(case, '')} |" for case in self.cases]
        lines += ["", "| row | trainable parameters | |", "|---|---:|---|"]
        about = {m.name: m.about for m in METHODS}
        for name in self.methods:
            size = self.held["trainable"].get(name)
            lines.append(f"| {name} | {'' if size is None else f'{size:,}'} | {about.get(name, '')} |")
        lines += ["", RULES]
        told: dict[str, list[str]] = {}
        for case in self.cases:
            for name, row in self.held["cases"][case].items():
                for way in WAYS:
                    if row.get(way):
                        told.setdefault(f"- {name}, {way}: {row[way]}", []).append(case)
        lines += ["", "What was not measured:", ""] if told else []
        return "\n".join(lines + [f"{why} ({', '.join(cases)})" for why, cases in told.items()])


def _peak(row: Row) -> float:
    return row["peak"]


def _increase(row: Row) -> float:
    return row["peak"] - row["before"]
