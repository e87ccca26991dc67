"""The committed results: few files, and pages that are rendered from the records beside them."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from bench import report

from umbra.errors import CheckpointError
from umbra.lab.study import records
from umbra.lab.study.archive import ARCHIVE_FILE, STUDY_FILE, read_archive, read_description
from umbra.lab.study.report import write_report
from umbra.lab.study.requests import key_of
from umbra.lab.study.results import Results

RESULTS = report.RESULTS
ROOT = RESULTS.parents[1]
MOST_FILES, MOST_BYTES = 60, 2_500_000


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return report.pages()


def test_committed_results_are_few_and_small():
    listed = subprocess.run(["git", "ls-files", "bench/results"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not in a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    assert len(files) <= MOST_FILES and sum(f.stat().st_size for f in files) <= MOST_BYTES


def test_every_page_is_rendered_from_its_records(pages):
    assert {path for path in RESULTS.rglob("*.md") if "golden" not in path.parts} == set(pages)
    assert [str(path) for path, text in pages.items() if path.read_text(encoding="utf-8") != text] == []


def test_every_study_of_the_repository_has_a_page(pages):
    packed = {path.parent.name for path in RESULTS.glob(f"*/{ARCHIVE_FILE}")}
    assert packed == {path.parent.name for path in pages if path.name == "report.md"} and len(packed) == 7


def test_every_run_of_the_packed_studies_is_there():
    for file in RESULTS.glob(f"*/{ARCHIVE_FILE}"):
        results = Results(file.parent)
        assert results.runs and not results.missing and not results.failed and not results.unscored


def test_keys_of_the_packed_records_are_those_of_their_requests():
    """So that a study is resumed from them, whatever fields have been renamed since."""
    for file in RESULTS.glob(f"*/{ARCHIVE_FILE}"):
        for record in read_archive(file.parent)[1]:
            assert key_of(record["umbra"]["request"]) == record["umbra"]["key"]


def test_packed_records_give_the_report_of_single_files(done, tmp_path):
    single = done / "out"
    packed = records.pack_study(single, tmp_path / "packed").parent
    assert records.read_all(packed) == records.read_all(single)
    assert read_description(packed) == json.loads((single / STUDY_FILE).read_text())
    write_report(packed, tmp_path / "report")
    assert (tmp_path / "report" / "report.md").read_text() == (single / "report.md").read_text()
    again = records.pack_study(packed, tmp_path / "again")
    assert again.read_bytes() == (packed / ARCHIVE_FILE).read_bytes()


def test_single_records_replace_packed_ones(done, tmp_path):
    records.pack_study(done / "out", tmp_path)
    key, record = next(iter(records.read_all(tmp_path).items()))
    record["run_info"]["total_time"] = -1.0
    records.write(tmp_path, record)
    assert records.read_all(tmp_path)[key]["run_info"]["total_time"] == -1.0


def test_packed_records_of_umbra_evaluate_name_the_new_command(done, tmp_path):
    description = json.loads((done / "out" / STUDY_FILE).read_text())
    (tmp_path / STUDY_FILE).write_text(json.dumps({**description, "command": "umbra evaluate a.yaml --out b"}))
    assert read_description(tmp_path)["command"] == "umbra study a.yaml --out b"


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"no gzip", lambda data: gzip.compress(b"{")])
def test_a_damaged_archive_is_named(done, tmp_path, damage):
    file = records.pack_study(done / "out", tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{ARCHIVE_FILE} is damaged"):
        read_archive(tmp_path)
