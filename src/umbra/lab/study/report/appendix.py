"""Sections on failed runs and on reproduction."""

from typing import Any

from umbra.lab.study.archive import Record
from umbra.lab.study.methods import ATTACHED
from umbra.lab.study.report import wording
from umbra.lab.study.report.page import Section
from umbra.lab.study.report.performance import Made
from umbra.lab.study.results import Results

LONGEST = 200  # characters of an error


def failures(results: Results) -> Made:
    """Runs and tests that ended with an error."""
    if not results.failed and not results.unscored:
        return None, None
    rows = [[_name(results, r), _last_line(r["run_info"]["error_msg"])] for r in results.failed]
    rows += [
        [f"{_name(results, r)}, tested on {test}", _last_line(error)] for r, test, error in results.unscored
    ]  # fmt: skip
    text = ["These runs ended with an error and are in no table. A row that names a test is a missing score."]
    return Section("Failed runs", text, ["run", "error"], rows), None


def _name(results: Results, record: Record) -> str:
    request = record["umbra"]["request"]
    return f"{request['task']}: {', '.join(results.names_of(record))}, seed {request['seed']}"


def _last_line(error: str) -> str:
    return "".join(error.strip().splitlines()[-1:])[:LONGEST]


def reproduction(results: Results) -> Made:
    """The command, the budgets and the configurations of all methods."""
    hours = sum(r["run_info"]["total_time"] for r in (*results.runs, *results.trials)) / 3600
    budgets = {t: {**results.study["training"], **results.study["tasks"][t]["training"]} for t in results.trained}
    steps = [f"{t} {_length(b)} of {b.get('per_device_train_batch_size', 8)}" for t, b in budgets.items()]
    shown = [v for v in results.variants if v.mode == ATTACHED or v.kind != "umbra"]
    methods = [f"{v.method}: {results.describe_kind(v)} {wording.fields(results, v)}".strip() for v in shown]
    text = [
        f"`{results.description['command']}` runs what has no record in its folder yet ({len(results.runs)} runs and "
        f"{len(results.trials)} trials, {hours:.1f} hours in total); `umbra report` writes this page from the records. Training "
        f"budgets: {', '.join(steps)}.",
        "; ".join(methods) + ".",
    ]  # fmt: skip
    return Section("Reproduction", text), None


def _length(training: dict[str, Any]) -> str:
    if training.get("max_steps", 0) > 0:
        return f"{training['max_steps']} steps"
    return f"{training.get('num_train_epochs', 1):g} epochs, in steps"
