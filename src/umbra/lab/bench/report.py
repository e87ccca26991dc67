"""The tables: ratios to PEFT's LoRA and to the bare base, milliseconds, and memory; medians with the range over rounds."""

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from umbra.lab.bench.methods import BASE, LORA, METHODS
from umbra.lab.bench.timing import Row

WAYS = {"absent": "–", "refused": "**refused**", "failed": "fails"}

MEMORY = """\
Each method runs in a separate process, on a base with random weights, after a small warm-up step. *Peak* is the maximum
memory of the process during the step (on a GPU: of its tensors), including Python, torch and the weights of the base;
*increase* is the peak minus the memory before the step. Tensors of 256 KiB or more get separate pages
(MALLOC_MMAP_THRESHOLD_), so that earlier deallocations have no influence."""
RULES = """\
No method uses dropout. Shadows have as many trainable parameters as LoRA (within 5 %), fitted by their feed-forward
width. Before a method is timed, its logits, task loss and tokens at initialization are compared with those of the base
(fp32: 1e-4 of the largest entry; bf16: 1e-1, losses 1e-2); a method that differs is refused. Rounds are interleaved, in
shuffled order."""


def ratios(row: Row, reference: str) -> list[float]:
    """Return a method's time relative to a reference in every round; empty if either was not timed."""
    return [a / b for a, b in zip(row.get("seconds", ()), row.get("beside", {}).get(reference, ()), strict=False)]


def spread(values: list[float], digits: int = 2) -> str:
    """Return median [minimum – maximum]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f} – {max(values):.{digits}f}]"


def order(names: Iterable[str], known: list[str]) -> list[str]:
    """Return names in the order of ``known``, unknown ones last."""
    return sorted(names, key=lambda n: known.index(n) if n in known else len(known))


class Report:
    """The page of a measurement.

    Args:
        values: The content of the JSON file; see `Records.as_dict`.
        about: The description of each case, in the order of the columns.
    """

    def __init__(self, values: dict[str, Any], about: dict[str, str]):
        self.values, self.about = values, about
        self.cases = order(values["cases"], list(about))
        self.timed = [c for c in self.cases if not c.startswith("memory")]
        self.weighed = [c for c in self.cases if c not in self.timed]
        methods = {name for rows in values["cases"].values() for name in rows}
        self.methods = order(methods, [m.name for m in METHODS])

    def text(self) -> str:
        """Return the page as Markdown."""
        parts = [self._origin()]
        for reference in (LORA, BASE):
            cells = self._cells(lambda row, r=reference: spread(values) if (values := ratios(row, r)) else None)
            if cells:
                unit = "Median of the rounds' ratios [minimum – maximum]; lower is faster."
                parts.append(f"## Time, as ratios to {reference}\n\n{unit}\n\n{cells}")
        cells = self._cells(lambda row: spread([1000 * s for s in row["seconds"]], 0) if "seconds" in row else None)
        if cells:
            parts.append(f"## Milliseconds\n\nMedians [minimum – maximum].\n\n{cells}")
        if self.weighed:
            parts.append(f"## Memory of a training step\n\n{self._memory()}")
        parts.append(self._legend())
        return "\n\n".join(parts) + "\n"

    def _origin(self) -> str:
        header = self.values["header"]
        lines = [f"# {header['base']}, {header['dtype']}, on {header['device']}", ""]
        lines += [f"- {key}: {value}" for key, value in header["machine"].items()]
        lines += [f"- {key}: {header[key]}" for key in header if key not in ("base", "dtype", "device", "machine")]
        for i, s in enumerate(self.values["sessions"]):
            if s is not None:
                versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in s["versions"].items())
                lines.append(f"- measured {s['date']} at commit {s['commit']} with {versions}: {self._part(i)}")
        return "\n".join(lines)

    def _part(self, session: int) -> str:
        """Return which rows a session has measured."""
        rows = self.values["cases"]
        measured = {c: [n for n, row in rows[c].items() if row["session"] == session] for c in self.cases}
        measured = {c: names for c, names in measured.items() if names}
        if all(len(measured.get(c, ())) == len(rows[c]) for c in self.cases):
            return "everything"
        names = order({n for names in measured.values() for n in names}, self.methods)
        return f"{', '.join(names)} in {', '.join(measured)}"

    def _cells(self, cell: Callable[[Row], str | None]) -> str:
        """Return a table of methods × timed cases; ``cell`` returns the text of a row, or None."""
        rows = self.values["cases"]
        shown = [c for c in self.timed if any(cell(row) for row in rows[c].values())]
        if not shown:
            return ""
        lines = ["| | " + " | ".join(shown) + " |", "|---" + "|---:" * len(shown) + "|"]
        for name in self.methods:
            cells = [rows[c].get(name, {"absent": ""}) for c in shown]
            if any("absent" not in row for row in cells):
                lines.append(f"| {name} | " + " | ".join(cell(row) or self._why(row) for row in cells) + " |")
        return "\n".join(lines)

    def _why(self, row: Row) -> str:
        return next((mark for key, mark in WAYS.items() if key in row), "–")

    def _memory(self) -> str:
        rows = self.values["cases"]
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
        lines = ["## Legend", "", "| case | |", "|---|---|"]
        lines += [f"| {case} | {self.about.get(case, '')} |" for case in self.cases]
        lines += ["", "| method | trainable parameters | |", "|---|---:|---|"]
        about = {m.name: m.about for m in METHODS}
        for name in self.methods:
            size = self.values["trainable"].get(name)
            lines.append(f"| {name} | {'' if size is None else f'{size:,}'} | {about.get(name, '')} |")
        lines += ["", RULES]
        reasons: dict[str, list[str]] = {}
        for case in self.cases:
            for name, row in self.values["cases"][case].items():
                for way in WAYS:
                    if row.get(way):
                        reasons.setdefault(f"- {name}, {way}: {row[way]}", []).append(case)
        lines += ["", "Not measured:", ""] if reasons else []
        return "\n".join(lines + [f"{why} ({', '.join(cases)})" for why, cases in reasons.items()])


def _peak(row: Row) -> float:
    return row["peak"]


def _increase(row: Row) -> float:
    return row["peak"] - row["before"]
