"""The fast tier of the tests, ``pytest --fast`` (a pytest plugin): what a developer runs while editing.

It leaves out the tests of `SLOW`. Of a parametrised test it runs one case, which the test's name selects, so that together the
tests cover all parameters; of a test of all decoder families, one family of each kind of `KINDS`.
"""

from itertools import groupby
from pathlib import Path
from zlib import crc32

import pytest

from support.tables import LISTED, cells

ROOT = Path(__file__).parents[1]

# By module: the tests that take over 2 seconds of CPU time; an empty set means all of the module.
SLOW: dict[str, set[str]] = {
    "adapters/test_fuzz": {"test_fuzzer_detects_planted_bug"},
    "adapters/test_prompting": {"test_template_arguments_apply_to_training_and_prompting"},
    "adapters/test_saving": {"test_save_interrupted_anywhere_leaves_whole_adapter", "test_saved_files_follow_umask"},
    "adapters/test_untrusted": {
        "test_memory_measurement_does_not_import_working_folder",
        "test_working_folder_is_never_imported",
    },
    "base/test_added_tokens": {"test_compiled_model_reads_current_rows"},
    "base/test_architectures": {"test_detached_model_loads_without_umbra"},
    "base/test_bases": {
        "test_embedded_base_equals_its_gguf_and_is_unpacked_once",
        "test_killed_unpacking_leaves_no_partial_base",
    },
    "base/test_vision": {"test_detached_model_loads_without_umbra"},
    "deploy/test_detached": {"test_detached_model_loads_without_umbra"},
    "deploy/test_export": {
        "test_commands_in_guide_run",
        "test_escalation_token_survives_trimming",
        "test_export_command_prints_table_json_and_answer",
        "test_export_failing_parity_is_removed",
        "test_export_that_cannot_run_is_removed",
        "test_exported_model_answers_through_python_api",
        "test_exported_model_runs_in_its_runtime",
        "test_export_leaves_unrelated_files",
        "test_flattened_matmuls_are_quantised",
        "test_gguf_export_matches_model",
        "test_inconsistent_generation_config_is_exported",
        "test_model_with_few_positions_is_compared_within_them",
        "test_one_onnx_graph_accepts_any_batch_and_length",
        "test_onnx_export_matches_model",
        "test_other_model_shapes_export",
        "test_parity_ignores_generation_penalties",
        "test_parity_prompts_may_skip_chat_template",
        "test_previous_export_files_are_removed",
        "test_sliding_window_model_exports",
        "test_trimmed_export_matches_model",
    },
    "generation/test_drafting": {"test_end_of_text_stops_at_any_position"},
    "generation/test_generation": {"test_detached_shadow_can_assist"},
    "generation/test_speculation": {"test_sampling_distribution_equals_plain_decoding"},
    "lab/test_study_runs": set(),
    "lab/test_study_failures": set(),
    "lab/test_study_resume": set(),
    "lab/test_study_report": set(),
    "method/test_compiled": set(),
    "model/test_unlucky": {
        "test_forward_interrupted_anywhere_leaves_no_state",
        "test_four_threads_load_concurrently",
    },
    "training/test_detachment": {
        "test_evaluation_loss_per_label_is_independent_of_batches",
        "test_only_detached_model_escalates_marked_records",
    },
    "training/test_distributed": set(),
    "training/test_kills": set(),
    "training/test_pretrain": {"test_cached_teacher_equals_base_teacher", "test_stage_loss_matches_formula"},
    "training/test_resuming": {"test_resumed_run_equals_uninterrupted_run"},
    "training/test_runs": {"test_concurrent_readers_see_one_version", "test_only_one_writer_holds_lock"},
    "training/test_train": {
        "test_classifier_trains_both_heads_but_not_base_head",
        "test_killed_process_resumes_from_last_whole_checkpoint",
    },
    "training/test_trl": {"test_two_ranks_equal_one"},
    "test_docs": {"test_python_of_readme_runs"},
    "test_examples": {"test_example_runs", "test_lm_eval_example_runs"},
}
KINDS = {"dense", "MoE", "hybrid", "vision-language"}
WHOLE = {"test_structure"}  # every case is cheap


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="run the fast tier: no slow tests, few cases of each test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        chosen = select(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def select(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the tests of the fast tier."""
    chosen: set[pytest.Item] = set()
    for (path, name), group in groupby(sorted(items, key=_function), key=_function):
        cases = list(group)
        slow = SLOW.get(path)
        if slow is not None and (not slow or name in slow):
            continue
        if path in WHOLE:
            chosen.update(cases)
            continue
        families = {LISTED[cell[0]].kind: case for case in reversed(cases) for cell in cells(case)}
        if families:
            chosen.update(case for kind, case in families.items() if kind in KINDS)
        else:
            chosen.add(cases[crc32(name.encode()) % len(cases)])
    return chosen


def _function(item: pytest.Item) -> tuple[str, str]:
    """Return the path of a test's module without its suffix, and the name of its function."""
    path = item.path.relative_to(ROOT).with_suffix("").as_posix()
    return path, getattr(item, "originalname", item.name)
