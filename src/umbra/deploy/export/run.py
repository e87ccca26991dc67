"""Answer prompts with an exported model: python run.py "a prompt".

Umbra writes this file beside the model, and prompt.json, which says how a prompt is put to it. ONNX files need the packages
onnxruntime, tokenizers and numpy; GGUF files cyllama and numpy. Nothing of Umbra, transformers or PyTorch is imported.

``--request FILE`` (- is standard input) is for programs: token ids in, tokens and figures out, as JSON. A request holds

    prompts         [[id, …], …]
    max_new_tokens  of a greedy answer to each; 0 for none
    end             [id, …] that end an answer; default those of prompt.json
    answers         [[id, …], …] optional: what would the model say next, given each prompt and each part of its answer?
    logits          optional: file of float32, the logits before the first rows[i] tokens of answer i, to be compared
    rows            [n, …]
    texts           [text, …] optional, to be tokenised

and is answered with `answers`, `next` [[id, …], …], `logits` {max, mean, rows}, `tokens` [[id, …], …], `load_seconds`,
`first_token_seconds` [s, …], `tokens_per_second` (of those after the first), `peak_bytes` of memory and `file_bytes`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 512  # tokens that llama.cpp takes at once
NEEDS = {".onnx": "onnxruntime tokenizers numpy", ".gguf": "cyllama numpy"}


class Onnx:
    """An ONNX file in onnxruntime: one graph, whose keys and values go in and out."""

    def __init__(self, file: Path, threads: int):
        import onnxruntime  # type: ignore
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
        """Forget what was read."""
        self.length = 0
        self.past = {
            name: self.value(np.zeros((1, shape[1], 0, shape[3]), np.float32))
            for name, shape in self.inputs.items()
            if name.startswith("past.")
        }

    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """(rows, V): read (T,) ids; what comes after each of the last ``rows``."""
        new, total = len(ids), self.length + len(ids)
        told = {
            "input_ids": np.asarray([ids]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total)[None],
            "logits_to_keep": np.arange(new - rows, new),
        }
        feed = {name: self.value(told[name].astype(np.int64)) for name in self.inputs if name in told}
        found = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feed | self.past), strict=True))
        self.past = {name: found[name.replace("past", "present")] for name in self.past}
        self.length = total
        return found["logits"].numpy()[0, -rows:]

    def next(self, ids: list[int]) -> int:
        """The likeliest token after these."""
        return int(self.logits(ids, 1)[0].argmax())

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens as such."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids)


class Gguf:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, threads: int):
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # where it gives up, it would call a debugger
        from cyllama.llama import llama_cpp  # type: ignore

        class Model(llama_cpp.LlamaModel):
            """With the size that get_logits_ith of cyllama (until 0.2.18 at least) looks for."""

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
        """Forget what was read; ``room`` tokens will come."""
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
        """Read ids; within each part that llama.cpp takes at once, the places whose logits are there."""
        for begin in range(0, len(ids), CHUNK):
            part = ids[begin : begin + CHUNK]
            batch = self.cpp.LlamaBatch(n_tokens=len(part), embd=0, n_seq_max=1)
            wanted = [begin + i >= len(ids) - rows for i in range(len(part))]
            for i, token in enumerate(part):
                batch.add(token, self.length + i, [0], wanted[i])
            self.context.decode(batch)
            self.length += len(part)
            yield from (i for i, here in enumerate(wanted) if here)

    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """(rows, V): read (T,) ids; what comes after each of the last ``rows``."""
        return np.stack([np.asarray(self.context.get_logits_ith(i), np.float32) for i in self.read(ids, rows)])

    def next(self, ids: list[int]) -> int:
        """The likeliest token after these."""
        for _ in self.read(ids, 1):
            pass
        return self.sampler.sample(self.context, -1)

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens as such."""
        return list(self.vocabulary.tokenize(text, False, True))

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        text = self.vocabulary.detokenize([*self.encode("a"), *ids], text_len_max=64 + 64 * len(ids))
        return text[1:]  # alone, they would lose a space at the beginning


def answer(model: Any, prompt: list[int], new: int, end: list[int]) -> Iterator[int]:
    """Greedily, at most ``new`` tokens, the one that ends it included."""
    model.start(len(prompt) + new)
    ids = prompt
    for _ in range(new):
        ids = [model.next(ids)]
        yield ids[0]
        if ids[0] in end:
            return


def measure(model: Any, request: dict[str, Any], end: list[int]) -> dict[str, Any]:
    """What a request asks for; see above."""
    found: dict[str, Any] = {"tokens": [model.encode(text) for text in request.get("texts", ())]}
    new, prompts, end = request.get("max_new_tokens", 0), request["prompts"], request.get("end", end)
    if new:
        found["answers"], first, seconds, more = [], [], 0.0, 0
        for prompt in prompts:
            times, tokens = [time.perf_counter()], []
            for token in answer(model, prompt, new, end):
                tokens.append(token)
                times.append(time.perf_counter())
            found["answers"].append(tokens)
            first.append(times[1] - times[0])
            seconds, more = seconds + times[-1] - times[1], more + len(tokens) - 1
        found |= {"first_token_seconds": first, "tokens_per_second": more / seconds if more else None}
    if "answers" in request:
        found |= _follow(model, request)
    return found


def _follow(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """``next`` and ``logits``: along given answers."""
    said, most, total, count, done = [], 0.0, 0.0, 0, 0
    rows = request.get("rows", [0] * len(request["answers"]))
    for prompt, given, compared in zip(request["prompts"], request["answers"], rows, strict=True):
        model.start(len(prompt) + len(given))
        z = model.logits(prompt, 1)
        if len(given) > 1:
            z = np.concatenate([z, model.logits(given[:-1], len(given) - 1)])
        said.append(z.argmax(-1).tolist())
        if compared:
            V = z.shape[1]
            expected = np.fromfile(request["logits"], np.float32, compared * V, offset=4 * V * done).reshape(-1, V)
            off = np.abs(z[:compared] - expected)
            most, total, count = max(most, float(off.max())), total + float(off.sum()), count + off.size
            done += compared
    return {"next": said, "logits": {"max": most, "mean": total / count, "rows": done} if count else None}


def peak_bytes() -> int | None:
    """The most memory this process has had.

    Linux counts what the parent had when it started us into ru_maxrss, so its own file is asked first.
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
    """The command."""
    stream: Any
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")
    folder = Path(__file__).parent
    asking = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Answer a prompt with the model beside this file.")
    parser.add_argument("prompt", nargs="?", help="the prompt; default: read from standard input")
    parser.add_argument("--model", default=asking["model"], help="the file of the model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads to compute with; default the runtime's choice")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of the answer (default: %(default)s)")
    parser.add_argument("--request", help="a JSON file for programs, - for standard input; described in this script")
    given = parser.parse_args()
    file = folder / given.model
    if file.suffix not in NEEDS or not file.is_file():
        sys.exit(f"run.py: {file} is no .onnx or .gguf file")
    began = time.perf_counter()
    try:
        model = Onnx(file, given.threads) if file.suffix == ".onnx" else Gguf(file, given.threads)
    except ImportError as error:
        sys.exit(f"run.py: {error}: pip install {NEEDS[file.suffix]}")
    load_seconds = time.perf_counter() - began
    if given.request:
        text = sys.stdin.read() if given.request == "-" else Path(given.request).read_text(encoding="utf-8")
        request = json.loads(text)
        answers = max(map(len, request.get("answers", [[]])), default=0)
        began = time.perf_counter()
        model.start(max(map(len, request["prompts"])) + max(request.get("max_new_tokens", 0), answers))
        load_seconds += time.perf_counter() - began
        found = measure(model, request, asking["end"])
        files = [file, *folder.glob(f"{file.name}.*")]
        size = sum(f.stat().st_size for f in files)
        print(json.dumps({**found, "load_seconds": load_seconds, "peak_bytes": peak_bytes(), "file_bytes": size}))
        return
    prompt = given.prompt if given.prompt is not None else sys.stdin.read().removesuffix("\n")
    ids = asking["start"] + model.encode(asking["prefix"] + prompt + asking["suffix"])
    room = (asking.get("positions") or sys.maxsize) - len(ids)
    if room < 1:
        sys.exit(f"run.py: the prompt has {len(ids)} tokens, but the model is made for {asking['positions']}")
    tokens, shown = [], ""
    for token in answer(model, ids, min(given.max_new_tokens, room), asking["end"]):
        tokens.append(token)
        text = model.decode([t for t in tokens if t not in asking["end"]])
        if not text.endswith("\ufffd"):  # half a character; the rest comes with the next token
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    main()
