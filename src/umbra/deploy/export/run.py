"""Run an exported model: python run.py "a prompt" answers it; a classifier gives the label of a text, with probabilities.

Umbra writes this file next to the model, together with prompt.json, which describes how prompts are formatted. ONNX files need
the packages onnxruntime, tokenizers and numpy; GGUF files need cyllama and numpy. The script imports neither Umbra nor
transformers nor PyTorch.

``--request FILE`` (- for standard input) is for programs: JSON with token ids in, JSON with tokens and measurements out. A
request holds

    prompts         [[id, …], …]
    max_new_tokens  length of a greedy answer to each prompt; 0 for none
    end             [id, …] that end an answer; default: those of prompt.json
    answers         [[id, …], …] optional; the next token is predicted after each prompt and each prefix of its answer
    logits          optional: file of float32, the logits before the first rows[i] tokens of answer i, for comparison
    rows            [n, …]
    texts           [text, …] optional, to be tokenised
    classify        [text, …] instead of all of these, for a classifier: the response has `logits` [[z, …], …] and `tokens`

and the response `answers`, `next` [[id, …], …], `logits` {max, mean, rows}, `tokens` [[id, …], …], `load_seconds`,
`first_token_seconds` [s, …], `tokens_per_second` (after the first token), `peak_bytes` of memory and `file_bytes`.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations  # types are not evaluated, so --help works without numpy

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
else:
    try:
        import numpy as np
    except ImportError:  # _load names it
        np = None

OLDEST = (3, 10)  # the oldest Python
CHUNK = 512  # tokens per batch of llama.cpp
NEEDS = {".onnx": "onnxruntime tokenizers numpy", ".gguf": "cyllama numpy"}


class Runtime(Protocol):
    """A model with a key-value cache for one sequence."""

    def start(self, room: int) -> None:
        """Begin a new sequence of at most ``room`` tokens."""
        ...

    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """Append T ids to the sequence, and return the logits (rows, V) after each of the last ``rows``."""
        ...

    def next(self, ids: list[int]) -> int:
        """Append ids to the sequence, and return the likeliest next token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...


class Onnx:
    """An ONNX file in onnxruntime: one graph with keys and values as inputs and outputs."""

    def __init__(self, file: Path, threads: int):
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.tokenizer = Tokenizer.from_file(str(file.with_name("tokenizer.json")))
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.start(0)

    def start(self, room: int) -> None:
        """Begin a new sequence."""
        self.length = 0
        self.past = {
            name: self.value(np.zeros((1, shape[1], 0, shape[3]), np.float32))
            for name, shape in self.inputs.items()
            if name.startswith("past.")
        }

    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """Append T ids to the sequence, and return the logits (rows, V) after each of the last ``rows``."""
        new, total = len(ids), self.length + len(ids)
        inputs = {
            "input_ids": np.asarray([ids]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total)[None],
            "logits_to_keep": np.arange(new - rows, new),
        }
        feed = {name: self.value(inputs[name].astype(np.int64)) for name in self.inputs if name in inputs}
        outputs = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feed | self.past), strict=True))
        self.past = {name: outputs[name.replace("past", "present")] for name in self.past}
        self.length = total
        return outputs["logits"].numpy()[0, -rows:]

    def next(self, ids: list[int]) -> int:
        """Append ids to the sequence, and return the likeliest next token."""
        return int(self.logits(ids, 1)[0].argmax())

    def class_logits(self, ids: list[int]) -> np.ndarray:
        """Return a classifier's logits (C,) of a text."""
        inputs = {"input_ids": np.asarray([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feed = {name: inputs[name] for name in self.inputs}
        return np.asarray(self.session.run(["logits"], feed)[0])[0]

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens in the text become single ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return text without special tokens."""
        return self.tokenizer.decode(ids)


class Gguf:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, threads: int):
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # on an error, it would start a debugger
        from cyllama.llama import llama_cpp

        class Model(llama_cpp.LlamaModel):
            """Has the attribute that get_logits_ith of cyllama (up to 0.2.18 at least) needs."""

            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        llama_cpp.disable_logging()
        self.cpp, self.threads = llama_cpp, threads
        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self.model = Model(str(file), settings, verbose=False)
        self.vocabulary = self.model.get_vocab()
        self.sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        self.sampler.add_greedy()
        self.context: Any = None
        self.room = self.length = 0

    def start(self, room: int) -> None:
        """Begin a new sequence of at most ``room`` tokens."""
        self.length = 0
        if room <= self.room:
            self.context.kv_cache_clear()
            return
        settings = self.cpp.LlamaContextParams()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = room, CHUNK, CHUNK
        if self.threads:
            settings.n_threads = settings.n_threads_batch = self.threads
        self.context, self.room = self.cpp.LlamaContext(self.model, settings, verbose=False), room

    def read(self, ids: list[int], rows: int) -> Iterator[int]:
        """Append ids in batches; after each batch, yield the places in it that have logits, for the last ``rows`` ids."""
        for begin in range(0, len(ids), CHUNK):
            chunk = ids[begin : begin + CHUNK]
            batch = self.cpp.LlamaBatch(n_tokens=len(chunk), embd=0, n_seq_max=1)
            has_logits = [begin + i >= len(ids) - rows for i in range(len(chunk))]
            for i, token in enumerate(chunk):
                batch.add(token, self.length + i, [0], has_logits[i])
            self.context.decode(batch)
            self.length += len(chunk)
            yield from (i for i, present in enumerate(has_logits) if present)

    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """Append T ids to the sequence, and return the logits (rows, V) after each of the last ``rows``."""
        return np.stack([np.asarray(self.context.get_logits_ith(i), np.float32) for i in self.read(ids, rows)])

    def next(self, ids: list[int]) -> int:
        """Append ids to the sequence, and return the likeliest next token."""
        for _ in self.read(ids, 1):
            pass
        return self.sampler.sample(self.context, -1)

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens in the text become single ids."""
        return list(self.vocabulary.tokenize(text, False, True))

    def decode(self, ids: list[int]) -> str:
        """Return text without special tokens."""
        text = self.vocabulary.detokenize([*self.encode("a"), *ids], text_len_max=64 + 64 * len(ids))
        return text[1:]  # without the "a" before them, they would lose a leading space


def answer(model: Runtime, prompt: list[int], new: int, end: list[int]) -> Iterator[int]:
    """Yield the tokens of a greedy answer.

    Args:
        model: the model.
        prompt: token ids.
        new: the maximum number of tokens, with the end token.
        end: tokens that end the answer.
    """
    model.start(len(prompt) + new)
    ids = prompt
    for _ in range(new):
        ids = [model.next(ids)]
        yield ids[0]
        if ids[0] in end:
            return


def measure(model: Runtime, request: dict[str, Any], end: list[int]) -> dict[str, Any]:
    """Return the response to a request; see the top of this file.

    Args:
        model: the model.
        request: the request.
        end: end tokens, unless the request has some.
    """
    response: dict[str, Any] = {"tokens": [model.encode(text) for text in request.get("texts", ())]}
    new, prompts, end = request.get("max_new_tokens", 0), request["prompts"], request.get("end", end)
    if new:
        response["answers"], first, seconds, later = [], [], 0.0, 0
        for prompt in prompts:
            times, tokens = [time.perf_counter()], []
            for token in answer(model, prompt, new, end):
                tokens.append(token)
                times.append(time.perf_counter())
            response["answers"].append(tokens)
            first.append(times[1] - times[0])
            seconds, later = seconds + times[-1] - times[1], later + len(tokens) - 1
        response |= {"first_token_seconds": first, "tokens_per_second": later / seconds if later else None}
    if "answers" in request:
        response |= _predict(model, request)
    return response


def _predict(model: Runtime, request: dict[str, Any]) -> dict[str, Any]:
    """The entries ``next`` and ``logits`` of a response: predictions along given answers."""
    predicted, most, total, count, done = [], 0.0, 0.0, 0, 0
    rows = request.get("rows", [0] * len(request["answers"]))
    for prompt, path, compared in zip(request["prompts"], request["answers"], rows, strict=True):
        model.start(len(prompt) + len(path))
        z = model.logits(prompt, 1)
        if len(path) > 1:
            z = np.concatenate([z, model.logits(path[:-1], len(path) - 1)])
        predicted.append(z.argmax(-1).tolist())
        if compared:
            V = z.shape[1]
            expected = np.fromfile(request["logits"], np.float32, compared * V, offset=4 * V * done).reshape(-1, V)
            error = np.abs(z[:compared] - expected)
            most, total, count = max(most, float(error.max())), total + float(error.sum()), count + error.size
            done += compared
    return {"next": predicted, "logits": {"max": most, "mean": total / count, "rows": done} if count else None}


def peak_bytes() -> int | None:
    """Return the peak memory of this process.

    On Linux, ru_maxrss includes the parent's memory at the time of the fork, so /proc is read first.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Run the command; whatever goes wrong is one line."""
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes it once more
        sys.exit(141)
    except Exception as error:  # of any package
        sys.exit(f"run.py: {type(error).__name__}: " + " ".join(str(error).split())[:500])


def _run() -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    options = _parse()
    if sys.version_info < OLDEST:
        sys.exit("run.py: Python {}.{} or later is needed, this is {}".format(*OLDEST, sys.version.split()[0]))
    folder = Path(__file__).parent
    settings = _settings(folder / "prompt.json")
    file = folder / (options.model or settings["model"])
    model, load_seconds = _load(file, options.threads)
    if options.request:
        text = sys.stdin.read() if options.request == "-" else Path(options.request).read_text(encoding="utf-8")
        request = json.loads(text)
        if "classify" in request:
            print(json.dumps(_classify_all(model, request["classify"], settings)))
        else:
            print(json.dumps(_respond(model, file, request, settings["end"], load_seconds)))
        return
    prompt = options.prompt if options.prompt is not None else sys.stdin.read().removesuffix("\n")
    if "labels" in settings:
        print(json.dumps(classify(model, prompt, settings), ensure_ascii=False))
    else:
        _print_answer(model, prompt, settings, options.max_new_tokens)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Answer a prompt, or classify a text, with the model beside this file."
    )
    parser.add_argument("prompt", nargs="?", help="the prompt or text (default: standard input)")
    parser.add_argument("--model", help="model file (default: the one that prompt.json names)")
    parser.add_argument("--threads", type=int, default=0, help="number of threads (default: chosen by the runtime)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="maximum tokens of the answer (default: %(default)s)"
    )
    parser.add_argument(
        "--request", help="JSON file for programs, - for standard input; described at the top of this script"
    )
    return parser.parse_args()


def _settings(file: Path) -> dict[str, Any]:
    """The content of prompt.json."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        sys.exit(f"run.py: {file} is missing: copy the whole exported folder")
    except ValueError as error:
        sys.exit(f"run.py: {file} is damaged: {error}")


def _load(file: Path, threads: int) -> tuple[Any, float]:
    """The runtime with the model, and the seconds to load it."""
    if file.suffix not in NEEDS:
        sys.exit(f"run.py: {file} is no .onnx or .gguf file")
    beside = [Path(f"{file}.data"), file.with_name("tokenizer.json")] if file.suffix == ".onnx" else []
    for part in (file, *beside):
        if not part.is_file():
            sys.exit(f"run.py: {part} is missing: copy the whole exported folder")
    if np is None:
        sys.exit(f"run.py: numpy is missing: pip install {NEEDS[file.suffix]}")
    began = time.perf_counter()
    try:
        model = Onnx(file, threads) if file.suffix == ".onnx" else Gguf(file, threads)
    except ImportError as error:
        missing = f"{error.name} is missing" if isinstance(error, ModuleNotFoundError) and error.name else str(error)
        sys.exit(f"run.py: {missing}: pip install {NEEDS[file.suffix]}")
    return model, time.perf_counter() - began


def _text_ids(model: Onnx, text: str, settings: dict[str, Any]) -> list[int]:
    """Token ids of a text to classify, with the tokens that begin and end it, cut to the model's positions."""
    ids, start, finish = model.encode(text), settings["start"], settings["finish"]
    ids = ids if ids[: len(start)] == start else start + ids
    ids = ids if not finish or ids[-len(finish) :] == finish else ids + finish
    return ids[: settings["positions"]]


def classify(model: Onnx, text: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the label of a text and the probability of each, several labels, or the value of a regression."""
    ids = _text_ids(model, text, settings)
    if not text.strip() or not ids:
        sys.exit("run.py: the text is empty")
    z, names = model.class_logits(ids).astype(np.float64), settings["labels"]
    if settings["problem"] == "regression":
        return {"prediction": float(z[0]) if len(z) == 1 else z.tolist()}
    several = settings["problem"] == "multi_label_classification"
    p = 1 / (1 + np.exp(-z)) if several else np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    prediction = [name for name, x in zip(names, z, strict=True) if x > 0] if several else names[int(z.argmax())]
    return {"prediction": prediction, "probabilities": {n: round(float(x), 6) for n, x in zip(names, p, strict=True)}}


def _classify_all(model: Onnx, texts: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The response to a request with texts to classify."""
    rows = [_text_ids(model, text, settings) for text in texts]
    return {"logits": [model.class_logits(ids).tolist() for ids in rows], "tokens": rows}


def _respond(
    model: Runtime, file: Path, request: dict[str, Any], end: list[int], load_seconds: float
) -> dict[str, Any]:
    """The response to a request, with measurements of the process and the file."""
    answers = max(map(len, request.get("answers", [[]])), default=0)
    began = time.perf_counter()
    model.start(max(map(len, request["prompts"])) + max(request.get("max_new_tokens", 0), answers))
    load_seconds += time.perf_counter() - began
    response = measure(model, request, end)
    size = sum(part.stat().st_size for part in [file, *file.parent.glob(f"{file.name}.*")])
    return {**response, "load_seconds": load_seconds, "peak_bytes": peak_bytes(), "file_bytes": size}


def _print_answer(model: Onnx | Gguf, prompt: str, settings: dict[str, Any], new: int) -> None:
    """Print the greedy answer to a prompt while it is generated."""
    ids = settings["start"] + model.encode(settings["prefix"] + prompt + settings["suffix"])
    room = (settings.get("positions") or sys.maxsize) - len(ids)
    if room < 1:
        sys.exit(f"run.py: the prompt has {len(ids)} tokens, but the model has {settings['positions']} positions")
    tokens, printed = [], ""
    for token in answer(model, ids, min(new, room), settings["end"]):
        tokens.append(token)
        text = model.decode([t for t in tokens if t not in settings["end"]])
        if not text.endswith("\ufffd"):  # an incomplete character, which the next token completes
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()


if __name__ == "__main__":
    main()
