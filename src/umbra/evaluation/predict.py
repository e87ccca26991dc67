"""``umbra predict``: a prediction for every record of a stream, in its order, written as it is computed."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.data import ChatFormatter, encode_plain, end_tokens
from umbra.data.from_json import parse_json
from umbra.data.labels import prediction_of
from umbra.data.records import normalize
from umbra.data.text_files import numbered_lines
from umbra.deploy.opening import Opened, open_model
from umbra.errors import ConfigError, DataError, shown
from umbra.evaluation.scores import escalates
from umbra.evaluation.scoring import generate_replies, in_mode, on_accelerator
from umbra.options import PredictOptions, check_dtype

Row = dict[str, Any]
STDIN = "-"
WRITTEN = ("prediction", "probabilities", "escalated")  # the columns that are added
OF_A_REQUEST = ("prompt", "messages", "conversations", "tools", "functions", "chat_template_kwargs")
PLACEHOLDER = "a"  # for the answer of a record, which is cut off again
PARTIAL = ".partial"


def predict(options: PredictOptions, write: Callable[[str], object]) -> tuple[int, int]:
    """Run ``umbra predict``.

    Args:
        options: of the command.
        write: writes and flushes one line, if no output file is given.

    Returns:
        Number of predictions, and of skipped lines.

    Raises:
        ConfigError: unusable options.
        DataError: a line that is no record, unless such lines are skipped. In a file it is reported before the first
            prediction; on standard input, predictions for the lines before it are written first.
        CheckpointError, BaseModelError: see `umbra.deploy.opening.open_model`.
    """
    check_dtype(options.dtype)
    _check_files(options)
    opened = open_model(
        options.adapter, options.base, dtype=options.dtype, chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
    )  # fmt: skip
    mode = opened.mode(options.mode)
    request_of = asked if opened.model.can_generate() else classified
    if options.data != STDIN and not options.skip_bad:
        for _ in _read(options.data, request_of, None):
            pass
    on_accelerator(opened.model)
    skipped: list[str] = []
    rows = _read(options.data, request_of, skipped if options.skip_bad else None)
    count = 0
    with _output(options.output, write) as put, in_mode(opened.model, mode) as runner:
        for row in predictions(runner, opened, rows, options):
            put(json.dumps(row, ensure_ascii=False))
            count += 1
    return count, len(skipped)


# -- records -----------------------------------------------------------------------------------------------------------


def _read(
    data: str, request_of: Callable[[Row, str], Row], skipped: list[str] | None
) -> Iterator[tuple[str, Row, Row]]:
    """Yield the place, the columns and the request of each line; blank lines are left out.

    Args:
        data: a file of JSON lines, or `STDIN`.
        request_of: returns the request in a row, or raises a DataError.
        skipped: receives the messages of bad lines, which are reported on standard error; None raises them.

    Raises:
        DataError: a bad line.
    """
    for where, line in _lines(data):
        try:
            row = _parse(line, where)
            yield where, row, request_of(row, where)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            print(f"umbra: skipped: {error}", file=sys.stderr)


def _lines(data: str) -> Iterator[tuple[str, str]]:
    name = "standard input" if data == STDIN else data
    lines: Iterable[tuple[int, str]] = enumerate(sys.stdin, 1) if data == STDIN else numbered_lines(Path(data))
    try:
        for number, line in lines:
            if line.strip():
                yield f"{name}:{number}", line
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: {error}") from error


def _parse(line: str, where: str) -> Row:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error!s:.200}. Each line must be one JSON object.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is {shown(row)}, not an object with columns.")
    if present := [column for column in WRITTEN if column in row]:
        raise DataError(f"{where} has the column {present[0]!r}, which umbra predict writes: rename it.")
    return row


def classified(row: Row, where: str) -> Row:
    """Return the text to classify in a row, as a record.

    Raises:
        DataError: there is none.
    """
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        problem = (
            f"'text' is {shown(text)}" if "text" in row else f"it has {', '.join(map(shown, row)) or 'no columns'}"
        )
        raise DataError(f"{where}: a classifier needs a column 'text' that holds text; {problem}.")
    return {"text": text}


def asked(row: Row, where: str) -> Row:
    """Return the request in a row as a record; its answer, if it has one, is replaced by a placeholder.

    Raises:
        DataError: there is neither a prompt nor a conversation, or a malformed one.
    """
    given = {k: v for k, v in row.items() if k in OF_A_REQUEST and v is not None}
    if not given.keys() & {"prompt", "messages", "conversations"}:
        columns = ", ".join(map(shown, row)) or "no columns"
        raise DataError(f"{where}: a language model needs a column 'prompt' or 'messages'; the line has {columns}.")
    if "prompt" in given:
        prompt = given["prompt"]
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise DataError(f"{where}: 'prompt' is empty, so there is nothing to answer.")
        return normalize({**given, "completion": PLACEHOLDER}, where, kind="completion")
    key = "messages" if "messages" in given else "conversations"
    messages = given[key]
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1].get("role", messages[-1].get("from"))
        messages = messages[:-1] if last in ("assistant", "gpt") else messages
        given[key] = [*messages, {"role": "assistant", "content": PLACEHOLDER}]
    return normalize(given, where, kind="messages")


# -- predictions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(
    runner: PreTrainedModel, opened: Opened, rows: Iterator[tuple[str, Row, Row]], options: PredictOptions
) -> Iterator[Row]:
    """Yield each row with its prediction, a batch at a time.

    Args:
        runner: the model that answers.
        opened: the folder that it is from.
        rows: place, columns and request of each line. If it raises, the rows before the error are predicted first.
        options: of the command.

    Raises:
        DataError: see `predict`.
    """
    failure: DataError | None = None
    while failure is None:
        batch: list[tuple[str, Row, Row]] = []
        try:
            batch.extend(islice(iter(lambda: next(rows, None), None), options.batch_size))
        except DataError as error:
            failure = error
        if not batch and failure is None:
            return
        if batch:
            step = generated if runner.can_generate() else classes
            for (_, row, _), result in zip(batch, step(runner, opened, batch, options), strict=True):
                yield {**row, **result}
    raise failure


def generated(
    runner: PreTrainedModel, opened: Opened, batch: list[tuple[str, Row, Row]], options: PredictOptions
) -> list[Row]:
    """Return the greedy answer to each request, and whether it escalates."""
    formatter, escalation = opened.formatter, opened.escalation
    ids = [_prompt_ids(formatter, request, where) for where, _, request in batch]
    new = options.max_new_tokens
    if escalation is not None:
        new = max(new, len(formatter.tokens(escalation)) + 1)
    texts, _ = generate_replies(runner, formatter, ids, new, end_tokens(runner, formatter) or None)
    if escalation is None:
        return [{"prediction": text} for text in texts]
    return [{"prediction": text, "escalated": escalates({"reply": text}, escalation)} for text in texts]


def _prompt_ids(formatter: ChatFormatter, request: Row, where: str) -> list[int]:
    try:
        ids = formatter.tokens(formatter.prompt(request), formatter.is_plain(request))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not ids:
        raise DataError(f"{where} has an empty prompt: there is nothing to answer.")
    return ids


def classes(
    runner: PreTrainedModel, opened: Opened, batch: list[tuple[str, Row, Row]], options: PredictOptions
) -> list[Row]:
    """Return the class or classes of each text with the probability of every class, or the value of a regression."""
    tokenizer, longest = opened.formatter.tokenizer, architectures.positions(runner.config)
    ids = [encode_plain(tokenizer, request["text"])[:longest] for _, _, request in batch]
    if [] in ids:
        raise DataError(f"{batch[ids.index([])][0]}: 'text' has no tokens: there is nothing to classify.")
    padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(runner.device)
    logits = runner(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits.float().cpu()
    if not logits.isfinite().all():
        raise DataError("The model's logits are not finite, so nothing can be predicted.")
    return [prediction_of(row, runner.config) for row in logits]


# -- files -------------------------------------------------------------------------------------------------------------


def _check_files(options: PredictOptions) -> None:
    """Raise a ConfigError for data that cannot be read or an output that cannot be written."""
    data, out = Path(options.data), None if options.output is None else Path(options.output)
    if options.data != STDIN and not data.exists():
        raise ConfigError(f"{data} does not exist: give a file of JSON lines, or - for standard input.")
    if options.data != STDIN and data.is_dir():
        raise ConfigError(f"{data} is a folder: give a file of JSON lines, or - for standard input.")
    if out is None:
        return
    if options.data != STDIN and out.exists() and out.samefile(data):
        raise ConfigError(f"output={out} is the data: name another file.")
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"output={out} is not a file that can be written: name a file in an existing folder.")


@contextmanager
def _output(name: str | None, write: Callable[[str], object]) -> Iterator[Callable[[str], object]]:
    """A context with a function that writes a line: by ``write``, or into a file that is complete when it appears.

    Until then the predictions lie in ``NAME.partial``, which stays if the command fails.
    """
    if name is None:
        yield write
        return
    partial = Path(f"{name}{PARTIAL}")
    with ExitStack() as on_failure:
        on_failure.callback(_keep_partial, partial)
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield lambda line: print(line, file=file, flush=True)
        on_failure.pop_all()
    partial.replace(name)


def _keep_partial(partial: Path) -> None:
    """Name the file of an interrupted command on standard error, or remove it if it is empty."""
    if partial.is_file() and partial.stat().st_size:
        print(f"umbra: the predictions so far are in {partial}", file=sys.stderr)
    else:
        partial.unlink(missing_ok=True)
