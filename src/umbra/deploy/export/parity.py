"""Compare an exported model with the same model in PyTorch: token by token along its answers, and in free generation."""

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
from transformers import Cache, PreTrainedModel

from umbra.base import architectures
from umbra.data import ChatFormatter, end_tokens
from umbra.deploy.export.process import run_python
from umbra.deploy.export.run import answer as greedy
from umbra.deploy.export.run import measure
from umbra.errors import ExportError

WHOLE = "before trimming, in PyTorch"
LEAST_AGREEMENT = 0.99  # share of equal next tokens below which an unquantised export is refused
COMPARED = 8  # tokens at the beginning of each answer whose logits are compared
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
    """Answers of the model in PyTorch.

    Args:
        texts: the prompts.
        prompts: their token ids.
        answers: token ids of the greedy answers.
        paths: the answers and their continuation beyond the end token, ``new`` ids each; compared token by token.
        logits: of the first tokens of each answer, each (n, V).
        end: end tokens.
        new: the length of each path.
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
    """One file compared with the reference.

    Args:
        file: its name.
        bytes: its size.
        tokens: number of next-token predictions that were compared, given the same prefix.
        same_next: share of them that are equal.
        answers: number of greedy answers that were compared.
        same_answers: number of them that are equal.
        logits_max: largest absolute difference of logits; None if none were compared.
        logits_mean: mean absolute difference of logits, likewise.
        prompts_tokenised_alike: number of prompts with the same tokens.
        classifies: whether the model is a classifier, whose classes are compared instead of tokens and answers.
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
    classifies: bool = False


class Stock:
    """A transformers model with the interface of the runtimes in run.py.

    Args:
        model: the model.
        writer: tokenises texts.
    """

    def __init__(self, model: PreTrainedModel, writer: ChatFormatter):
        self.model, self.writer = model, writer
        self.parameters = inspect.signature(model.forward).parameters
        self.start(0)

    def start(self, room: int) -> None:
        """Begin a new sequence."""
        self.past: Cache | None = None
        self.ids: list[int] = []

    @torch.no_grad()
    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """Append T ids to the sequence, and return the logits (rows, V) after each of the last ``rows``."""
        self.ids += ids
        caches = "past_key_values" in self.parameters  # a recurrent model computes the whole sequence again
        options = {"past_key_values": self.past, "use_cache": True} if caches else {}
        options |= {"logits_to_keep": rows} if "logits_to_keep" in self.parameters else {}
        out = self.model(torch.tensor([ids if caches else self.ids], device=self.model.device), **options)
        self.past = out.past_key_values if caches else None
        return out.logits[0, -rows:].float().cpu().numpy()

    def next(self, ids: list[int]) -> int:
        """Append ids to the sequence, and return the likeliest next token."""
        return int(self.logits(ids, 1)[0].argmax())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.writer.tokens(text)


class Recorded(Stock):
    """A `Stock` that records the first logits of each answer."""

    def start(self, room: int) -> None:
        """Begin a new sequence and a new recording."""
        super().start(room)
        self.recorded: list[np.ndarray] = []

    def next(self, ids: list[int]) -> int:
        """Append ids to the sequence, and return the likeliest next token."""
        z = self.logits(ids, 1)
        if len(self.recorded) < COMPARED:
            self.recorded.append(z)
        return int(z[0].argmax())


def answer(model: PreTrainedModel, writer: ChatFormatter, prompts: Iterable[str], new: int) -> Reference:
    """Return the greedy answers of a model, decoded with a cache; penalties of its generation config do not apply.

    Args:
        model: the model.
        writer: formats and tokenises prompts.
        prompts: the prompts.
        new: tokens per answer; fewer if the model has too few positions after the longest prompt.

    Raises:
        ExportError: a prompt leaves no room for an answer.
    """
    end, runner = end_tokens(model, writer), Recorded(model, writer)
    texts = [writer.ask(p) for p in prompts]
    ids = [writer.tokens(t) for t in texts]
    paths, logits, longest = [], [], max(map(len, ids))
    most = architectures.positions(model.config) or sys.maxsize
    if longest >= most:
        raise ExportError(
            f"A prompt has {longest} tokens, and the model has {most} positions: pass other prompts (--prompts)."
        )
    new = min(new, most - longest)
    for prompt in ids:
        paths.append(list(greedy(runner, prompt, new, [])))
        logits.append(np.concatenate(runner.recorded))
    return Reference(texts, ids, [_to_the_end(path, end) for path in paths], paths, logits, end, new)


def _to_the_end(path: list[int], end: list[int]) -> list[int]:
    """The ids up to the first end token, which is included."""
    ends = [i for i, token in enumerate(path) if token in end]
    return path[: ends[0] + 1] if ends else path


def compare(reference: Reference, file: Path, size: int, runner: Path | Stock) -> Parity:
    """Compare an exported model with the reference.

    Args:
        reference: answers of the model in PyTorch.
        file: the exported file.
        size: its size in bytes, with all its parts.
        runner: the script that runs it, or a transformers model.

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
        is_stock = isinstance(runner, Stock)
        response = measure(runner, request, []) if is_stock else run_request(runner, file, request, Path(folder))
    pairs = zip(response["next"], reference.paths, strict=True)
    equal = [a == b for predicted, path in pairs for a, b in zip(predicted, path, strict=True)]
    prompts = zip(reference.prompts, response["tokens"], strict=True)
    difference = response["logits"] or {"max": None, "mean": None}
    return Parity(
        file=file.name,
        bytes=size,
        tokens=len(equal),
        same_next=sum(equal) / len(equal),
        answers=len(reference.answers),
        same_answers=sum(a == b for a, b in zip(response["answers"], reference.answers, strict=True)),
        logits_max=difference["max"],
        logits_mean=difference["mean"],
        prompts_tokenised_alike=sum(p[-len(t) :] == t for p, t in prompts),  # except for a start token
    )


def compare_whole(reference: Reference, ids: list[int], whole: PreTrainedModel, writer: ChatFormatter) -> Parity:
    """Compare a model before its vocabulary was trimmed with the reference, which was computed afterwards.

    Args:
        reference: answers of the trimmed model.
        ids: old token ids by new ones.
        whole: the model before.
        writer: its chat formatter.
    """

    def old(rows: list[list[int]]) -> list[list[int]]:
        return [[ids[i] for i in row] for row in rows]

    translated = Reference(
        reference.texts, old(reference.prompts), old(reference.answers), old(reference.paths), [], old([reference.end])[0],
        reference.new,
    )  # fmt: skip
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    return compare(translated, Path(WHOLE), size, Stock(whole, writer))


def run_request(script: Path, file: Path, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run an exported file by its script, and return the response.

    Args:
        script: the run.py beside the file.
        file: the exported file.
        request: see run.py.
        folder: for temporary files.

    Raises:
        ExportError: the script failed.
    """
    path = folder / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    options = ["--model", file.name, "--threads", str(torch.get_num_threads()), "--request", str(path)]
    done = run_python(str(script.resolve()), *options)
    if done.returncode:
        raise ExportError(f"{file.name} was written, but cannot be run: {done.stderr[-1000:].strip()}")
    return json.loads(done.stdout)


def check(parity: Parity) -> None:
    """Raise an ExportError if an unquantised export predicts other tokens than the model it was made from."""
    if parity.same_next < LEAST_AGREEMENT or parity.prompts_tokenised_alike < parity.answers:
        raise ExportError(
            f"{parity.file} predicts the same next token as the model it was made from at {parity.same_next:.2%} of "
            f"{parity.tokens} positions, the minimum is {LEAST_AGREEMENT:.0%}, and tokenises {parity.prompts_tokenised_alike} of "
            f"{parity.answers} prompts alike. Nothing was written: this format cannot represent the model; take another (--to)."
        )


def table(rows: Iterable[Parity]) -> str:
    """Return a Markdown table of the comparisons."""
    rows = list(rows)
    if any(r.classifies for r in rows):
        return _table_of_classes(rows)
    lines = [
        "| file | MB | same next token | same answers | logit difference, max | mean |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.file} | {r.bytes / 1e6:.1f} | {100 * r.same_next:.2f} % of {r.tokens} | {r.same_answers} of {r.answers} "
            + "".join(f"| {'–' if value is None else f'{value:.2g}'} " for value in (r.logits_max, r.logits_mean))
            + "|"
        )
    return "\n".join(lines)


def _table_of_classes(rows: Iterable[Parity]) -> str:
    """Return the table of a classifier."""
    lines = ["| file | MB | same class | logit difference, max | mean |", "|---|---:|---:|---:|---:|"]
    for r in rows:
        differences = f"{r.logits_max:.2g} | {r.logits_mean:.2g}"
        lines.append(f"| {r.file} | {r.bytes / 1e6:.1f} | {r.same_answers} of {r.answers} | {differences} |")
    return "\n".join(lines)
