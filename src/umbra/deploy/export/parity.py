"""Whether an exported model says what the model says in PyTorch: along its answers, and answering by itself."""

import inspect
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.data import ChatFormatter, end_tokens
from umbra.deploy.export.process import run_python
from umbra.deploy.export.run import answer as greedy
from umbra.deploy.export.run import measure
from umbra.errors import ExportError

WHOLE = "before trimming, in PyTorch"
LEAST = 0.99  # share of equal next tokens under which an export that is not quantised is refused
COMPARED = 8  # tokens at the beginning of each answer whose logits are compared, all of them
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "How do I make a good cup of coffee at home?",
    "Explain in simple words why the sky is blue.",
    "Write a short poem about a river in winter.",
    "What should I pack for a weekend in the mountains?",
    "Give me three tips for learning a new language.",
    "How does a bicycle stay upright when it moves?",
    "What is the difference between weather and climate?",
    "Tell me a story about a lighthouse keeper and his cat.",
    "Why do leaves change their colour in autumn?",
    "How can I remember the names of people I meet?",
    "If a train leaves at nine and travels for four hours, when does it arrive?",
    "Describe the taste of a ripe peach.",
    "What happens to water when it freezes?",
    "Write an email asking a colleague to move a meeting to Friday.",
    "Which animals sleep during the winter?",
    "What is a prime number? Give five examples.",
    "How do I take care of a houseplant that loses its leaves?",
    "Who is my mother's brother to me?",
    "Summarise how a democracy works in two sentences.",
    "What are the planets of the solar system, in order?",
    "Suggest a simple dinner with rice, eggs and spinach.",
    "How long should I boil an egg?",
    "What makes a good friend?",
)


@dataclass(frozen=True)
class Reference:
    """What the model answers in PyTorch: token ids, the first logits (n, V) of each answer, and the prompts as text.

    ``paths`` are the answers and what would come after their ends, ``new`` tokens each: what is compared token by token.
    """

    texts: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]
    paths: list[list[int]]
    logits: list[np.ndarray]
    end: list[int]
    new: int


@dataclass(frozen=True)
class Parity:
    """One file against the reference. ``tokens`` were compared given the same prefix, the rest of the fields says how.

    Where no logits were compared theirs are None.
    """

    file: str
    bytes: int
    tokens: int
    same_next: float
    answers: int
    same_answers: int
    logits_max: float | None
    logits_mean: float | None
    prompts_tokenised_alike: int


class Stock:
    """A model of transformers, as run.py runs one."""

    def __init__(self, model: PreTrainedModel, writer: ChatFormatter):
        self.model, self.writer = model, writer
        self.takes = inspect.signature(model.forward).parameters
        self.start(0)

    def start(self, room: int) -> None:
        """Forget what was read."""
        self.past: Any = None
        self.read: list[int] = []

    @torch.no_grad()
    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """(rows, V): read (T,) ids; what comes after each of the last ``rows``."""
        self.read += ids
        caches = "past_key_values" in self.takes  # a recurrent model reads everything again
        options = {"past_key_values": self.past, "use_cache": True} if caches else {}
        options |= {"logits_to_keep": rows} if "logits_to_keep" in self.takes else {}
        out: Any = self.model(torch.tensor([ids if caches else self.read], device=self.model.device), **options)
        self.past = out.past_key_values if caches else None
        return out.logits[0, -rows:].float().cpu().numpy()

    def next(self, ids: list[int]) -> int:
        """The likeliest token after these."""
        return int(self.logits(ids, 1)[0].argmax())

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return self.writer.tokens(text)


class Recorded(Stock):
    """Keeps the first logits of each answer."""

    def start(self, room: int) -> None:
        """Forget what was read."""
        super().start(room)
        self.said: list[np.ndarray] = []

    def next(self, ids: list[int]) -> int:
        """The likeliest token after these."""
        z = self.logits(ids, 1)
        if len(self.said) < COMPARED:
            self.said.append(z)
        return int(z[0].argmax())


def answer(model: PreTrainedModel, writer: ChatFormatter, prompts: Iterable[str], new: int) -> Reference:
    """Greedy answers, decoded with a cache: the likeliest tokens, whatever the generation configuration penalises.

    Args:
        new: tokens of an answer; fewer where the model is not made for as many after the longest prompt.

    Raises:
        ExportError: a prompt that leaves no room for an answer.
    """
    end, runner = end_tokens(model, writer), Recorded(model, writer)
    texts = [writer.ask(p) for p in prompts]
    ids = [writer.tokens(t) for t in texts]
    paths, logits, longest = [], [], max(map(len, ids))
    most = architectures.positions(model.config) or sys.maxsize
    if longest >= most:
        raise ExportError(f"A prompt has {longest} tokens, and the model is made for {most}: name others by --prompts.")
    new = min(new, most - longest)
    for prompt in ids:
        paths.append(list(greedy(runner, prompt, new, [])))
        logits.append(np.concatenate(runner.said))
    return Reference(texts, ids, [_to_the_end(path, end) for path in paths], paths, logits, end, new)


def _to_the_end(path: list[int], end: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(path) if token in end]
    return path[: ends[0] + 1] if ends else path


def compare(reference: Reference, file: Path, size: int, runner: Path | Stock) -> Parity:
    """One written model, run by a script of its own or as a model of transformers.

    Raises:
        ExportError: the runtime failed.
    """
    with TemporaryDirectory() as folder:
        request: dict[str, Any] = {
            "prompts": reference.prompts, "answers": reference.paths, "max_new_tokens": reference.new, "end": reference.end,
            "texts": reference.texts,
        }  # fmt: skip
        if reference.logits:
            stored = Path(folder) / "logits"
            np.concatenate(reference.logits).tofile(stored)
            request |= {"logits": str(stored), "rows": list(map(len, reference.logits))}
        found = measure(runner, request, []) if isinstance(runner, Stock) else _ask(runner, file, request, Path(folder))
    said = [a == b for xs, ys in zip(found["next"], reference.paths, strict=True) for a, b in zip(xs, ys, strict=True)]
    alike = sum(
        p[-len(t) :] == t for p, t in zip(reference.prompts, found["tokens"], strict=True)
    )  # but for a start token
    same = sum(a == b for a, b in zip(found["answers"], reference.answers, strict=True))
    off = found["logits"] or {"max": None, "mean": None}
    return Parity(
        file.name, size, len(said), sum(said) / len(said), len(reference.answers), same, off["max"], off["mean"], alike
    )


def compare_whole(reference: Reference, kept: list[int], whole: PreTrainedModel, writer: ChatFormatter) -> Parity:
    """The model before tokens were left out of its vocabulary against what it says without them.

    Args:
        kept: the ids that were left, by their new ones.
    """

    def old(rows: list[list[int]]) -> list[list[int]]:
        return [[kept[i] for i in row] for row in rows]

    asked = Reference(
        reference.texts, old(reference.prompts), old(reference.answers), old(reference.paths), [], old([reference.end])[0],
        reference.new,
    )  # fmt: skip
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    return compare(asked, Path(WHOLE), size, Stock(whole, writer))


def _ask(script: Path, file: Path, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked = folder / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    options = ["--model", file.name, "--threads", str(torch.get_num_threads()), "--request", str(asked)]
    done = run_python(str(script.resolve()), *options)
    if done.returncode:
        raise ExportError(f"{file.name} was written, but cannot be run: {done.stderr[-1000:].strip()}")
    return json.loads(done.stdout)


def check(found: Parity) -> None:
    """Raise an ExportError if a model that was not quantised says something else than the one it was made from."""
    if found.same_next < LEAST or found.prompts_tokenised_alike < found.answers:
        raise ExportError(
            f"{found.file} says the same next token as the model it was made from at {found.same_next:.2%} of {found.tokens} "
            f"places, where {LEAST:.0%} is the least, and tokenises {found.prompts_tokenised_alike} of {found.answers} prompts "
            "alike. Nothing was written: this format does not hold the model as it is; take another (--to)."
        )


def table(rows: Iterable[Parity]) -> str:
    """A Markdown table."""
    lines = [
        "| file | MB | same next token | same answers | logits off by, at most | on average |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.file} | {r.bytes / 1e6:.1f} | {100 * r.same_next:.2f} % of {r.tokens} | {r.same_answers} of {r.answers} "
            + "".join(f"| {'–' if off is None else f'{off:.2g}'} " for off in (r.logits_max, r.logits_mean))
            + "|"
        )
    return "\n".join(lines)
