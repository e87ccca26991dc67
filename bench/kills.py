"""Kill every command at many points, repeat it, and compare the result with an uninterrupted run: ``python -m bench.kills``.

One process imports everything and forks a child for each run. A child either kills itself (SIGKILL) at the n-th operation that
changes the disk (open for writing, rename, replace, unlink, mkdir, rmdir, link, symlink, fsync, truncate), or is killed after a
random time. The same command then runs again, sometimes killed once more, until it ends.

A result is equal if the command exits with 0, all .safetensors files are equal byte for byte, all metrics but times are equal, and
the same files exist. A refusal is a repetition with another exit status. After each kill of `detach --overwrite` the folder must
hold exactly the old model or the new one, and load as such; anything else is a mixture.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kills.json"
TIMES = ("runtime", "per_second", "seconds", "time", "created_at", "memory", "machine", "commit", "mtime")
BPE = {  # sizes for SmolLM2's tokenizer, which GGML's converter knows
    "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 64, "head_dim": 16,
    "tie_word_embeddings": True, "num_hidden_layers": 2,
}  # fmt: skip
HEAVY = ("export onnx", "export gguf")
POINTS = {
    os: ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "fsync", "truncate"),
}


# -- commands ----------------------------------------------------------------------------------------------------------


def scenarios(place: Path) -> dict[str, tuple[Callable[[Path], list[str]], Callable[[Path], None] | None]]:
    """Return by name the command line for an output folder, and the function that prepares that folder."""
    base, data = place / "base", place / "train.jsonl"
    train = [
        "train", "--base", base, "--train_data", data, "--eval_data", place / "eval.jsonl", "--rank", 4, "--gate_rank", 4,
        "--dropout", 0.1, "--per_device_train_batch_size", 4, "--logging_steps", 4, "--save_steps", 3, "--disable_tqdm", "true",
        "--use_cpu", "true", "--seed", 7,
    ]  # fmt: skip
    pretrain = [
        "pretrain", "--base", base, "--data", place / "text.txt", "--max_length", 16, "--held_out", 4,
        "--per_device_train_batch_size", 4, "--save_steps", 2, "--disable_tqdm", "true", "--use_cpu", "true",
    ]  # fmt: skip
    generated = ["--prompts", place / "prompts.txt", "--own_documents", 12, "--own_new_tokens", 8]
    cache = ["--teacher_cache", "true", "--teacher_top_k", 4]
    detach, few = ["detach", place / "adapter"], ["--prompts", place / "prompts.txt", "--max-new-tokens", 2]

    def old_model(out: Path) -> None:
        shutil.copytree(place / "old", out)
        (out / "notes.txt").write_text("notes")

    def to(*words: Any) -> Callable[[Path], list[str]]:
        return lambda out: [str(w) for w in (*words, "--output_dir", out)]

    def into(*words: Any) -> Callable[[Path], list[str]]:
        return lambda out: [str(w) for w in (*words, "--out", out)]

    commands: dict[str, Any] = {
        "train max_steps": (to(*train, "--max_steps", 7, "--lr_scheduler_type", "constant"), None),
        "train 1.5 epochs": (to(*train, "--num_train_epochs", 1.5), None),
        "train epochs, accumulated": (to(*train, "--num_train_epochs", 2, "--gradient_accumulation_steps", 2), None),
        "train the best": (
            to(*train, "--max_steps", 6, "--eval_steps", 3, "--load_best_model_at_end", "true", "--save_total_limit", 1), None,
        ),
        "train from an adapter": (to(*train[:1], "--adapter", place / "adapter", *train[1:7], *train[13:], "--max_steps", 5), None),
        "pretrain": (to(*pretrain, "--max_steps", 6), None),
        "pretrain two stages": (to(*pretrain, "--stages", "next_token,distillation", "--max_steps", 4), None),
        "pretrain, teacher and own text": (to(*pretrain, *generated, *cache, "--max_steps", 3), None),
        "detach": (lambda out: [*map(str, detach), str(out)], None),
        "detach --overwrite": (lambda out: [*map(str, detach), str(out), "--overwrite"], old_model),
        "convert peft": (into("convert", place / "peft", "--to", "peft"), None),
        "convert umbra": (into("convert", place / "adapter", "--to", "umbra"), None),
        "export hf": (into("export", place / "adapter", "--to", "hf", *few), None),
        "study": (into("study", place / "study.yaml"), None),
        "bench": (into("bench", "--base", "random:tiny", "--rounds", 1, "--methods", "bare base,PEFT LoRA,Umbra", "--cases",
                       "prefill,latency"), None),
        "export onnx": (into("export", place / "adapter", "--to", "onnx", "--quantization", "fp32", *few), None),
        "export gguf": (into("export", place / "bpe-adapter", "--to", "gguf", "--quantization", "f16", *few), None),
    }  # fmt: skip
    return commands


def prepare(place: Path, gguf: bool) -> None:
    """Write a tiny base, adapters, data and a study."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    import umbra
    from support.studies import METHODS, SUMS, TRAINING, lines
    from support.tiny import LLAMA_LIKE, scramble
    from support.tokenizer import make_tokenizer
    from umbra.base.loading import load_base, load_tokenizer
    from umbra.deploy.detach import write_detached
    from umbra.options import EMBEDDED

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA_LIKE, "vocab_size": 99}))
    model.save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    if gguf:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA_LIKE, **BPE}))
        model.save_pretrained(place / "bpe-base")
        load_tokenizer(EMBEDDED).save_pretrained(place / "bpe-base")
        attached = umbra.attach(load_base(str(place / "bpe-base")), umbra.ShadowConfig(rank=4))
        scramble(attached.shadow, std=0.1)
        attached.save_pretrained(place / "bpe-adapter")
    for name, fields in (("adapter", {}), ("peft", {"dialect": "peft"}), ("other", {"rank": 3})):
        torch.manual_seed(1)
        base = load_base(str(place / "base"))
        attached = umbra.attach(base, umbra.ShadowConfig(**{"rank": 4, "gate_rank": 4, **fields}))
        scramble(attached.shadow, 3 + len(name))
        attached.save_pretrained(place / name)
        if name == "other":
            write_detached(attached, place / "old", make_tokenizer())
    records = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    lines(place / "train.jsonl", records[:21])
    lines(place / "eval.jsonl", records[21:])
    (place / "text.txt").write_text(
        "\n\n".join(f"{a} plus {b} is {a + b}, as is {b} plus {a}." for a in range(9) for b in range(9))
    )
    (place / "prompts.txt").write_text("one\ntwo\n")
    study = {
        "title": "Tiny", "base": str(place / "base"), "dtype": "float32", "seeds": [0],
        "tasks": {"sum": {"train": lines(place / "s.jsonl", SUMS[::2]), "test": lines(place / "t.jsonl", SUMS[1::2]),
                          "validation": 6, "max_new_tokens": 2}},
        "methods": {"LoRA": {"kind": "lora", "r": 2}, "Umbra": METHODS["Umbra"]},
        "training": {**TRAINING, "max_steps": 5, "save_strategy": "steps", "save_steps": 2},
    }  # fmt: skip
    (place / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


# -- one run -----------------------------------------------------------------------------------------------------------


def count_down(left: int, counted: Path | None) -> None:
    """Kill this process at the ``left``-th operation that changes the disk; or write their number to ``counted``."""
    state = [0]

    def hit() -> None:
        state[0] += 1
        if state[0] == left:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            hit()
            return function(*args, **options)

        return call

    for module, names in POINTS.items():
        for name in names:
            setattr(module, name, wrap(getattr(module, name)))

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            hit()

    sys.addaudithook(audit)
    if counted is not None:
        import atexit

        atexit.register(lambda: None)
        globals()["_count"] = state


def run(
    command: list[str], log: Path, left: int = -1, seconds: float | None = None, counted: Path | None = None
) -> int:
    """The exit status of a command in a forked process; -9 where it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with log.open("a") as text, redirect_stdout(text), redirect_stderr(text):
                os.dup2(text.fileno(), 1)
                os.dup2(text.fileno(), 2)
                from umbra.cli import main

                count_down(left, counted)
                status = main(command)
                if counted is not None:
                    modules = [m for m in sys.modules if not m.startswith(("_", "bench"))]
                    counted.write_text(json.dumps([globals()["_count"][0], modules]))
        except BaseException as error:
            log.write_text(log.read_text() + f"\n{type(error).__name__}: {error}")
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_of(out: Path) -> dict[str, Any]:
    """Return files, tensors and metrics of an output folder, without times."""
    end: dict[str, Any] = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(file.relative_to(out))
        if file.suffix == ".safetensors":
            end[name] = file.read_bytes()
        elif name in ("run.json", "study.json", "parity.json") or name.endswith("stage.json") or "runs/" in name:
            end[name] = timeless(json.loads(file.read_text()))
        else:
            varies = file.suffix in (".json", ".md", ".html", ".png", ".pt", ".pth")
            end[name] = None if varies else hashlib.sha256(file.read_bytes()).hexdigest()
    return end


def timeless(value: Any) -> Any:
    """Return a value without times, and without digests of files that contain times."""
    if isinstance(value, dict):
        remaining = {
            k: v for k, v in value.items() if not any(t in k for t in TIMES) and k not in ("asked", "command", "files")
        }
        return {k: timeless(v) for k, v in remaining.items()}
    if isinstance(value, list):
        return [timeless(v) for v in value]
    return value


def visible(out: Path) -> dict[str, bytes]:
    """Return the files of a model as a reader sees them."""
    return {p.name: p.read_bytes() for p in out.glob("[!.]*") if p.is_file() and p.name != "notes.txt"}


def is_one_of(out: Path, allowed: list[dict[str, bytes]]) -> bool:
    """Return whether a folder holds one of these sets of files, loads in transformers, and still has the user's file."""
    from transformers import AutoModelForCausalLM

    loads = in_child(lambda: AutoModelForCausalLM.from_pretrained(out))
    return loads and visible(out) in allowed and (out / "notes.txt").read_text() == "notes"


def in_child(work: Callable[[], Any]) -> bool:
    """Return whether a call succeeds in a forked process; the parent must not start threads, which children would lack."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main() -> None:
    """Run all scenarios, print progress and write `RESULTS`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="kills of each scenario")
    parser.add_argument("--only", default="", help="scenarios whose names contain one of these, by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    import umbra.deploy.export
    import umbra.lab.study.sweep
    import umbra.training.pretrain
    import umbra.training.train  # noqa: F401

    if not in_child(lambda: prepare(place, "gguf" in given.only)):
        raise SystemExit("The models could not be created.")
    rows = {}
    for name, (command, begin) in scenarios(place).items():
        if any(part in name for part in given.only.split(",")) and (given.only or name not in HEAVY):
            count = given.kills // 3 if name in (*HEAVY, "study") else given.kills
            rows[name] = kill(name, command, begin, place, count, given.seed)
            print(name, rows[name], flush=True)
    total = {k: sum(r[k] for r in rows.values()) for k in ("kills", "unequal", "refused", "mixtures")}
    print("total", total)
    given.out.write_text(
        json.dumps({**about(), "seed": given.seed, "total": total, "scenarios": rows}, indent=1) + "\n"
    )
    shutil.rmtree(place)


def about() -> dict[str, Any]:
    """Return date, machine and versions."""
    from umbra.lab.bench.machine import Device, versions

    packages = versions(("umbra-peft", "torch", "transformers", "safetensors"))
    return {"date": time.strftime("%Y-%m-%d"), "machine": Device("cpu").describe(), "versions": packages}


def kill(
    name: str,
    command: Callable[[Path], list[str]],
    begin: Callable[[Path], None] | None,
    place: Path,
    kills: int,
    seed: int,
) -> dict[str, Any]:
    """Return how many kills of one command led to an unequal result or a refusal."""
    rng, scenario = random.Random(f"{seed} {name}"), place / "work"
    log, out, counted = place / "log.txt", scenario / "out", place / "count.txt"

    def fresh() -> None:
        shutil.rmtree(scenario, ignore_errors=True)
        scenario.mkdir()
        if begin is not None:
            begin(out)

    fresh()
    started = time.perf_counter()
    if run(command(out), log, counted=counted) != 0:
        raise SystemExit(f"{name}: {log.read_text()[-2000:]}")
    seconds, (points, modules) = time.perf_counter() - started, json.loads(counted.read_text())
    for module in modules:  # once, not in every child
        with suppress(Exception):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    expected = end_of(out)
    done = unequal = refused = mixtures = 0
    allowed = [visible(place / "old"), visible(out)]
    problems: list[str] = []
    while done < kills:
        fresh()
        log.write_text("")
        moments = [rng.randint(1, points) for _ in range(rng.choice([1, 2, 3]))]
        by_time = rng.random() < 0.2
        killed = []
        for moment in moments:
            after = rng.uniform(0, seconds) if by_time else None
            status = run(command(out), log, -1 if by_time else moment, after)
            killed.append(round(after, 3) if after is not None else moment)
            if status == -signal.SIGKILL:
                done += 1
                if name == "detach --overwrite" and not is_one_of(out, allowed):
                    mixtures += 1
                    problems.append(f"killed at {killed}: a mixture")
            elif status != 0:
                refused += 1
                problems.append(f"killed at {killed}: refused: {log.read_text()[-300:]}")
        status = run(command(out), log)
        if status != 0:
            refused += 1
            problems.append(f"killed at {killed}: {log.read_text()[-300:]}")
        else:
            end = end_of(out)
            if end != expected:
                unequal += 1
                different = sorted(k for k in end.keys() | expected.keys() if end.get(k, 0) != expected.get(k, 0))
                problems.append(f"killed at {killed}: unequal: {different[:5]}")
    for problem in problems[:5]:
        print(f"  {name}: {problem}", flush=True)
    return {"points": points, "kills": done, "unequal": unequal, "refused": refused, "mixtures": mixtures}


if __name__ == "__main__":
    main()
