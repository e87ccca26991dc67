"""Load randomly damaged adapter folders: ``PYTHONPATH=tests python -m support.fuzz --cases 10000``.

A case is a seed. `mutate` damages a folder and returns the permitted outcome; `Fuzzer.attempt` loads it and checks the
outcome:

    same      nothing relevant was changed: the folder loads, and its outputs are bit-identical
    any       refused, or the same
    refused   it must not load
    detected  likewise, but only through the digest; without the digest it is "edited"
    edited    the changed value may load; any error must be an UmbraError

In every case, an error is an UmbraError that names the folder, time and memory are bounded, and the base is unchanged.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import umbra
from support.folders import CONFIG, WEIGHTS, hook_count
from support.mutations import MUTATIONS
from support.mutations_of_files import read_json, write_json
from support.tiny import make, make_base, tokens
from umbra.adapters.inspect import explain, inspect

SECONDS, MEGABYTES = 10, 64  # of one case; a load that succeeds takes 0.02 seconds and next to nothing
TEMPLATES: dict[str, tuple[dict, dict]] = {  # base, shadow
    "llama": ({}, {}),
    "projected": ({}, {"dialect": "peft", "shadow_hidden_size": 16, "shadow_num_attention_heads": 2}),
    "own embeddings": ({}, {"embeddings": "own", "shadow_num_hidden_layers": 2}),
    "trained heads": ({}, {"train_heads": True}),
    "gpt2": ({"name": "gpt2"}, {}),
    "gemma3_text": ({"name": "gemma3_text"}, {}),
    "classifier": ({"classifier": True}, {}),
}


@dataclass
class Damage:
    """A mutation applied to a folder, and the permitted outcome."""

    what: str
    expected: str


def mutate(folder: Path, seed: int) -> Damage:
    """Damage an adapter folder by one or two mutations chosen by the seed."""
    rng = random.Random(seed)
    done, expected = [], []
    for mutation, becomes in rng.sample(MUTATIONS, rng.choice([1, 1, 1, 2])):
        if done and not all(
            file.is_file() and file.stat().st_size < 2**24 for file in (folder / CONFIG, folder / WEIGHTS)
        ):
            break  # a pipe cannot be read, nor a sparse giant copied
        try:
            done.append(f"{mutation.__name__} ({mutation(folder, rng) or ''})")
        except Exception:
            if not done:
                raise
            done.append("and more")  # cut short, because the first damage left too little
        expected.append(becomes)
    outcome = expected[0] if len(set(expected)) == 1 else "any"
    if outcome in ("any", "detected") and rng.random() < 0.4 and _switch_digest_off(folder):
        return Damage(" + ".join(["no digest", *done]), "edited")
    return Damage(" + ".join(done), "refused" if outcome == "detected" else outcome)


def _switch_digest_off(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    try:
        write_json(folder, {**read_json(folder), "sha256": None})
    except Exception:
        return False
    return True


class Failed(Exception):
    """The loader's outcome was not the permitted one."""


class Hung(BaseException):
    """A case took longer than `SECONDS`; no ``except Exception`` hides it."""


class Fuzzer:
    """Adapters, bases and reference outputs, shared by all cases."""

    def __init__(self, root: Path):
        self.root, self.ids = root, tokens()
        self.cases: dict[str, tuple] = {}
        for name, (base, shadow) in TEMPLATES.items():
            model = make(**base, **shadow)
            model.save_pretrained(root / name)
            own, other = make_base(**base), make_base(**base, seed=9)
            with torch.no_grad():
                self.cases[name] = own, other, own(self.ids).logits, model(self.ids).logits

    def attempt(self, seed: int) -> tuple[str, str]:
        """Return (outcome, description); the outcome is refused, same or edited.

        Raises:
            Failed: any other outcome.
        """
        name = random.Random(f"template {seed}").choice(list(TEMPLATES))
        own, other, bare, answer = self.cases[name]
        place = Path(tempfile.mkdtemp(prefix="case-", dir=self.root))
        folder = place / random.Random(seed).choice(["adapter", "影 ☂", "a b\n'\"", "-x", "é" * 80])
        shutil.copytree(self.root / name, folder)
        damage = mutate(folder, seed)
        stranger = random.Random(f"base {seed}").random() < 0.05
        base = other if stranger else own
        try:
            outcome = self._load(folder, base, answer, damage.expected)
            expected = "refused" if stranger else damage.expected
            if outcome not in {"any": ("refused", "same"), "edited": ("refused", "edited")}.get(expected, (expected,)):
                raise Failed(f"expected {expected}, found {outcome}")
            if hook_count(base) or not all(p.requires_grad for p in base.parameters()):
                raise Failed("the base was not left as it was")
            if not stranger and not torch.equal(base(self.ids).logits, bare):
                raise Failed("the base answers otherwise")
        except Failed as error:
            raise Failed(f"seed {seed}, {name}: {damage.what}: {error}") from error.__cause__
        finally:
            shutil.rmtree(place)
        return outcome, damage.what

    def _load(self, folder: Path, base, answer: torch.Tensor, expected: str) -> str:
        with torch.no_grad(), limits():
            try:
                model = umbra.load(folder, base=base)
            except umbra.UmbraError as error:
                if str(folder) not in str(error) or len(str(error)) > 10_000:
                    raise Failed(f"the message does not name the folder, or is endless: {error!s:.300}") from error
                outcome = "refused"
            except Exception as error:
                raise Failed(f"raised {error!r:.300}") from error
            else:
                try:
                    outcome = "edited"
                    if expected != "edited":
                        outcome = "same" if torch.equal(model(self.ids).logits, answer) else "silently other"
                finally:
                    model.unload()
            try:
                explain(inspect(str(folder)))
            except umbra.UmbraError as error:
                if outcome == "same":
                    raise Failed(f"loads, but inspect says {error}") from error
            except Exception as error:
                raise Failed(f"inspect raised {error!r:.300}") from error
        return outcome


class limits:
    """Raise `Failed` if the block takes too long or too much memory (measured through /proc)."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._hung)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = self._peak()

    def __exit__(self, kind, error, trace) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(error, Hung):
            raise Failed(f"no end after {SECONDS} s") from error
        grown = self._peak() - self.before
        if grown > MEGABYTES and kind is None:
            raise Failed(f"grew by {grown} MB")

    @staticmethod
    def _hung(*_) -> None:
        raise Hung

    @staticmethod
    def _peak() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> int:
    """Run cases from the command line; return 1 if any failed."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure and show where it was raised")
    options = parser.parse_args()
    torch.set_num_threads(1)
    used = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line))
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + 2**33, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        fuzzer = Fuzzer(Path(root))
        for seed in tqdm(range(options.first, options.first + options.cases), mininterval=2, unit="case"):
            try:
                outcomes[fuzzer.attempt(seed)[0]] += 1
            except Failed as error:
                if options.stop:
                    raise
                outcomes["FAILED"] += 1
                tqdm.write(str(error).encode("ascii", "backslashreplace").decode())
    counts = {"cases": options.cases, **outcomes, "seconds": round(time.perf_counter() - start)}
    print(json.dumps(counts))
    return 1 if outcomes["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
