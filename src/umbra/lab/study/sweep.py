"""``umbra study``: run everything in a study that has no record yet, and write its report."""

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.files.locks import locked
from umbra.lab.options import StudyOptions
from umbra.lab.study import records, requests
from umbra.lab.study.ablations import is_ablated
from umbra.lab.study.archive import STUDY_FILE, Record
from umbra.lab.study.definition import Study
from umbra.lab.study.preparation import prepare
from umbra.lab.study.rates import Rates, choose_rates
from umbra.lab.study.reading import read_study
from umbra.lab.study.report import write_report
from umbra.lab.study.requests import Request, Sizes, key_of
from umbra.lab.study.run import run

LOST_DEVICE = "device-side assert"  # CUDA's message after which a process cannot use the GPU any more


def run_study(options: StudyOptions) -> dict[str, Any]:
    """Run everything in a study that has no record yet, and write its report.

    Args:
        options: The study's file, the output folder, and whether failed runs are repeated.

    Returns:
        ``runs``, the number of runs and trials; ``failed``, the number of those without a complete record; and ``report``, the
        paths of the report's files.

    Raises:
        ConfigError, DataError: the study or its data cannot be used; raised before any training.
        CheckpointError: a folder cannot be written, or a run has left the GPU unusable.
    """
    study, out = read_study(options.study), Path(options.out)
    sizes, parameters = prepare(study)
    with locked(out):
        for record_folder in (out / "runs", out / "trials"):
            folder.recover(record_folder)
        return _run_all(options, study, out, sizes, parameters)


def _run_all(
    options: StudyOptions, study: Study, out: Path, sizes: Sizes, parameters: dict[str, int]
) -> dict[str, Any]:  # fmt: skip
    """Run the trials, then the runs with the rates that they determine; the output folder is locked."""
    trials, done = list(requests.trials(study, sizes)), records.read_all(out)
    total = len(trials) + sum(1 for _ in requests.runs(study, sizes, {}))
    description = {
        "study": as_values(study),
        "parameters": parameters,
        "command": shlex.join(["umbra", "study", str(options.study), "--out", str(options.out)]),
    }
    runs: list[Request] = []
    with tqdm(total=total, desc="study", disable=None, smoothing=0.1) as bar:
        for stage in (trials, runs):
            rates = choose_rates(study, trials, done)
            runs[:] = requests.runs(study, sizes, {k: rate for k, (rate, _) in rates.items()})
            _write_description(out, description, trials, runs, rates if stage is runs else {})
            with _quiet_transformers():
                _run_stage(stage, done, out, study, bar, options.retry)
    shutil.rmtree(out / "work", ignore_errors=True)
    if study.config.keep_adapters:
        _warn_about_adapters(out, runs, done)
    failed = [r for r in (*trials, *runs) if not records.is_complete(done.get(key_of(r)))]
    return {"runs": len(trials) + len(runs), "failed": len(failed), "report": [str(f) for f in write_report(out)]}


def _run_stage(
    stage: Iterable[Request], done: dict[str, Record], out: Path, study: Study, bar: tqdm, retry: bool
) -> None:  # fmt: skip
    """Run the requests of a stage that have no record, and those that failed if ``retry``."""
    for request in stage:
        key = key_of(request)
        seed = "trial" if request["is_trial"] else request["seed"]
        bar.set_postfix_str(f"{request['task']}, {request['method']}, {seed}")
        if key not in done or (retry and not records.is_complete(done[key])):
            work = out / "work" / key
            keeps = study.config.keep_adapters and not request["is_trial"] and not is_ablated(request["fields"])
            adapters = out / "adapters" / records.file_of(out, request).stem if keeps else None
            done[key] = run(request, work, adapters)
            records.write(out, done[key])
            shutil.rmtree(work, ignore_errors=True)
            _report_errors(request, done[key], out)
        bar.update()


def _report_errors(request: Request, record: Record, out: Path) -> None:
    """Print one line for each error of a run.

    Raises:
        CheckpointError: the error has left the GPU unusable.
    """
    name = f"{request['task']}, {request['method']}"
    errors = {"": record["run_info"]["error_msg"], **{f" on {t}": e for t, e in record["umbra"]["unscored"].items()}}
    for where, error in errors.items():
        if error:
            tqdm.write(f"{name}{where} failed: {error.strip().splitlines()[-1]:.200}", file=sys.stderr)
    if any(LOST_DEVICE in error for error in errors.values()):
        raise CheckpointError(
            f"{name} failed and left the GPU unusable for this process. Finished runs are saved in {out}; the same command "
            "continues after this run."
        )


def _warn_about_adapters(out: Path, runs: Iterable[Request], done: dict[str, Record]) -> None:
    """Print how many runs have no saved adapter: they ended before keep_adapters was set, or adapters were removed."""
    trained = [r for r in runs if r["kind"] != "base" and not is_ablated(r["fields"])]
    keys = {key for key in map(key_of, trained) if records.succeeded(done.get(key))}
    missing = sum(not any(out.glob(f"adapters/*--{key}")) for key in keys)
    if missing:
        tqdm.write(
            f"keep_adapters: {missing} of {len(keys)} finished runs have no adapter in {out / 'adapters'}, because they ended "
            f"without keep_adapters. To train one again, remove its record from {out / 'runs'} and repeat the command.",
            file=sys.stderr,
        )


def _write_description(
    out: Path, description: dict[str, Any], trials: list[Request], runs: list[Request], rates: Rates
) -> None:  # fmt: skip
    """Write ``study.json``, which the report reads, also while runs are missing."""
    methods: dict[str, list[str]] = {}  # by key: methods with equal configurations share a run
    for request in (*trials, *runs):
        methods.setdefault(key_of(request), []).append(request["method"])
    values = {
        **description, "trials": [key_of(r) for r in trials], "runs": [key_of(r) for r in runs],
        "methods": methods, "rates": [[*k, *rate] for k, rate in rates.items()],
    }  # fmt: skip
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    folder.write_together(out, lambda staging: folder.write_text(staging / STUDY_FILE, text))


def as_values(study: Study) -> dict[str, Any]:
    """Return a study as plain values, with the tasks that are trained and tested."""
    return {
        **asdict(study.config), "tasks": {n: asdict(t) for n, t in study.tasks.items()},
        "methods": {n: asdict(m) for n, m in study.methods.items()}, "trained": study.trained,
        "search": None if study.search is None else asdict(study.search),
        "tested": {n: study.tested(n) for n in study.trained},
    }  # fmt: skip


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' messages about each of many models."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
