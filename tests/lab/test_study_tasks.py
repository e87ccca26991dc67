"""What a study is made of: known data sets in their own columns, and metrics."""

import json

import pytest

from umbra.errors import ConfigError, DataError
from umbra.lab.study import lm_eval_tasks, metrics
from umbra.lab.study.sets import SETS, items, known
from umbra.lab.study.tasks import TaskOptions, load_task, right_answers

# A row of each set with the columns that it has on its hub or in its folder, and what becomes of it: prompt and answers.
ROWS = {
    "mmlu": (
        {"question": "2 + 2?", "subject": "", "choices": ["3", "4", "5", "6"], "answer": 1},
        ("2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer with the letter.", ["B"]),
    ),
    "gsm8k": (
        {"question": "Six and six?", "answer": "6+6=<<6+6=12>>12\n#### 12"},
        ("Six and six?", ["6+6=12\n#### 12"]),
    ),
    "squad_v2": (
        {"context": "Ada met Bob.", "question": "Whom?", "answers": {"text": ["Bob", "Bob", "Bob."], "answer_start": [8] * 3}},
        ("Ada met Bob.\nWhom?\nAnswer with words of the text, or with unanswerable.", ["Bob", "Bob."]),
    ),
    "amazon_reviews": (
        {"id": "en_1", "text": "Broke at once.", "label": 0, "label_text": "0"},
        ("Broke at once.\nHow many stars does this review give?", ["1 star"]),
    ),
    "20newsgroups": (
        {"text": "The shuttle flew.", "label": 14, "label_text": "sci.space"},
        ("The shuttle flew.\nWhich newsgroup is this from?", ["sci.space"]),
    ),
    "ag_news": (
        {"text": "Stocks fell.", "label": 2},
        ("Stocks fell.\nWorld, Sports, Business or Sci/Tech?", ["Business"]),
    ),
    "hotel_reviews": (
        {"text": "Fine.", "label": "positive"},
        ("Fine.\nIs this review positive, negative, neutral or ambivalent?", ["positive"]),
    ),
    "medicine_reviews": (
        {"text": "Poor.", "label": "negative"},
        ("Poor.\nIs this review positive, negative, neutral or ambivalent?", ["negative"]),
    ),
    "intents": ({"text": "Play it", "label": "play_music"}, ("Play it\nWhat is the intent?", ["play music"])),
    "vitaminc": (
        {"evidence": "It rained.", "claim": "It was dry.", "label": "False"},
        ("Evidence: It rained.\nClaim: It was dry.\nTrue, False or Neither?", ["False"]),
    ),
    "social_iqa": (
        {"question": "Why?", "choices": ["so", "no"], "answer": 0},
        ("Why?\nA. so\nB. no\nAnswer with the letter.", ["A"]),
    ),
    "strategyqa": (
        {"question": "Can it?", "choices": ["Yes", "No"], "answer": 1},
        ("Can it?\nA. Yes\nB. No\nAnswer with the letter.", ["B"]),
    ),
    "disfl_qa": (
        {"question": "Who no wait where?", "context": "In Rome.", "answer": "unknown"},
        ("In Rome.\nWho no wait where?\nAnswer with words of the text, or with unknown.", ["unknown"]),
    ),
}  # fmt: skip


def fixture(folder, name, *rows, count=3):
    """Files of a set, in its own columns: ``count`` times the rows to test on, and the same with other words to learn."""
    asked = next(k for k in ("claim", "question", "text") if k in rows[0])
    for split in known(name).splits:
        learned = split == known(name).splits[0]
        output = [{**r, asked: f"{r[asked]} ({i})" if learned else r[asked]} for i in range(count) for r in rows]
        (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in output))


# -- sets --------------------------------------------------------------------------------------------------------------


def test_every_dataset_has_fixture_or_generator():
    assert set(ROWS) | {"gsm_symbolic"} == set(SETS)


@pytest.mark.parametrize("name", ROWS)
def test_row_becomes_prompt_and_answers(name, tmp_path):
    row, (prompt, answers) = ROWS[name]
    fixture(tmp_path, name, row)
    task = load_task(name, TaskOptions(data=str(tmp_path), validation=1))
    assert (len(task.train), len(task.validation), len(task.test)) == (2, 1, 3)
    assert task.test[0]["prompt"] == prompt
    assert right_answers(task.test[0]) == answers
    assert load_task(name, TaskOptions(data=str(tmp_path), validation=1), False).test[0]["prompt"] == prompt + "\n"


@pytest.mark.parametrize("name", ROWS)
def test_hub_splits_are_those_of_paper(name, tmp_path, monkeypatch):
    """Those without a hub id are refused; a row comes back as from a folder."""
    import datasets

    asked = []

    def load_dataset(*where, split):
        asked.append((*where, split))
        return [ROWS[name][0]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if not SETS[name].hub:
        with pytest.raises(ConfigError, match="not on the hub: set `data`"):
            items(name, "train")
        return
    for part, split in zip(("train", "test"), SETS[name].splits, strict=True):
        result = items(name, part)[0]
        assert f"{result.text}\n{result.question}".strip() == ROWS[name][1][0]
        assert asked[-1] == (*SETS[name].hub, split)


def test_question_without_answer_is_unanswerable(tmp_path):
    fixture(tmp_path, "squad_v2", {**ROWS["squad_v2"][0], "answers": {"text": [], "answer_start": []}})
    assert items("squad_v2", "test", str(tmp_path))[0].answer == "unanswerable"


def test_generated_train_and_test_sets_are_disjoint():
    pytest.importorskip("reasoning_gym")
    task = load_task("gsm_symbolic", TaskOptions())
    assert not {r["prompt"] for r in task.train} & {r["prompt"] for r in task.test}
    assert "####" in task.train[0]["completion"]
    other = load_task("x", TaskOptions(set="reasoning_gym:chain_sum"))
    assert other.test[0]["completion"].lstrip("-").isdigit()
    assert other.score(other.test[0]["completion"], other.test[0]) == {"exact": 1.0}
    with pytest.raises(ConfigError, match="no generator 'chain_of_fools'"):
        load_task("x", TaskOptions(set="reasoning_gym:chain_of_fools"))


def test_ambiguous_puzzle_is_judged_by_its_generator():
    pytest.importorskip("reasoning_gym")
    task = load_task("x", TaskOptions(set="reasoning_gym:n_queens", test_limit=5))
    for record in task.test:
        right = record["puzzle"]["metadata"]["valid_answers"]
        assert all(task.score(f" {answer}\n", record) == {"exact": 1.0} for answer in right)
        assert task.score(right[0].replace("Q", "_"), record) == {"exact": 0.0}
    assert any(len(r["puzzle"]["metadata"]["valid_answers"]) > 1 for r in task.test)
    asked = load_task("x", TaskOptions(set="reasoning_gym:n_queens", test_limit=1, metric="exact"))
    assert asked.score(asked.test[0]["completion"], asked.test[0]) == {"exact": 1.0}


def test_dataset_options_are_validated(tmp_path):
    rows = [{"text": f"one two {k}", "label": k} for k in ("neutral", "positive")]
    fixture(tmp_path, "hotel_reviews", *rows, count=6)
    given = {"data": str(tmp_path), "validation": 2, "train_limit": 4, "test_limit": 5}
    task = load_task("hotel_reviews", TaskOptions(**given, words=4))
    assert task.train[0]["prompt"].startswith("one two ") and "(" in task.train[0]["prompt"]
    assert task.test[0]["prompt"].split("\n")[0] in ("one two neutral", "one two positive")
    assert (len(task.train), len(task.validation), len(task.test)) == (4, 2, 5)
    classified = load_task("hotel_reviews", TaskOptions(**given, head="classify"))
    assert classified.test[0] in rows
    claimed = [{"evidence": "a b c d", "claim": "It is.", "label": str(label)} for label in (True, False)]
    fixture(tmp_path, "vitaminc", *claimed, count=6)
    claims = load_task("vitaminc", TaskOptions(**given, head="classify", words=3))
    assert claims.test[0]["text"] == "Evidence: a b\nClaim: It is.\nTrue, False or Neither?"
    output = load_task("hotel_reviews", TaskOptions(**given, head="text"))
    assert "\nIs this" in output.test[0]["text"] and output.metric == "loss"


def test_records_are_shuffled_and_test_prompts_are_not_trained_on(tmp_path):
    """Sets in order of their classes are shuffled, always alike; training records that the test asks are dropped."""
    rows = [{"prompt": f"{k}{i}", "completion": k} for k in "ab" for i in range(40)]
    for part, chosen in (("train", rows), ("test", rows[::4])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    options = TaskOptions(
        train=f"{tmp_path}/train.jsonl", test=f"{tmp_path}/test.jsonl", validation=20, test_limit=10, train_limit=20
    )
    task = load_task("x", options)
    asked = {r["prompt"] for r in rows[::4]}
    assert not asked & {r["prompt"] for r in (*task.train, *task.validation)}
    for part in (task.train, task.validation, task.test):
        assert {r["completion"] for r in part} == {"a", "b"}
    assert load_task("x", options) == task


def test_scored_on_validation_uses_held_out_records(tmp_path):
    rows = [{"text": f"one two {k}", "label": k} for k in ("neutral", "positive")]
    fixture(tmp_path, "hotel_reviews", *rows, count=6)
    given = {"data": str(tmp_path), "validation": 4, "train_limit": 4}
    task, chosen = (load_task("hotel_reviews", TaskOptions(**given, scored_on=s)) for s in ("test", "validation"))
    assert chosen.test == chosen.validation == task.validation != task.test and chosen.train == task.train
    assert not {r["prompt"] for r in chosen.test} & {r["prompt"] for r in chosen.train}


def test_unseen_test_classes_are_an_error_before_training(tmp_path):
    for part, labels in (("train", "ab"), ("test", "abc")):
        rows = [{"text": f"{part} {k} {i}", "label": k} for k in labels for i in range(4)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = {"train": f"{tmp_path}/train.jsonl", "test": f"{tmp_path}/test.jsonl", "validation": 2, "head": "classify"}
    with pytest.raises(DataError, match="test classes without a training record: c"):
        load_task("x", TaskOptions(**given))
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(json.dumps({"text": f"{part}{i}", "label": ["a", "b"]}) + "\n" for i in range(6))
        )
    with pytest.raises(DataError, match="one class per record, got multi_label_classification"):
        load_task("x", TaskOptions(**given))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"hotel_reviews, .*train.jsonl:2 \(columns 'text'\) does not have the format of this data set"),
        ({"label": "x", "text": None}, "train.jsonl:2"),
    ],
)
def test_a_row_of_another_format_is_named(row, message, tmp_path):
    for split in ("train", "test"):
        lines = [{"text": "fine", "label": "positive"}, row]
        (tmp_path / f"hotel_reviews.{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(DataError, match=message):
        load_task("hotel_reviews", TaskOptions(data=str(tmp_path), validation=1, words=3))


def test_a_folder_without_the_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has neither hotel_reviews\.train\.jsonl"):
        load_task("hotel_reviews", TaskOptions(data=str(tmp_path)))


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "right", "expected"),
    [
        ("#### 1,200", "#### 1200.0", 1), ("so #### 12\n#### 13", "#### 13", 1), ("#### 13.", "#### 13", 1),
        ("13", "#### 13", 0), ("#### thirteen", "#### 13", 0), ("#### -13", "#### 13", 0),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(reply, right, expected):
    assert metrics.number(reply, [right], SETS["gsm8k"].pattern) == {"exact": expected}


@pytest.mark.parametrize("reply", ["sNaN", "nan", "Infinity", "1e9999999"])
def test_a_number_that_is_not_finite_is_wrong(reply):
    assert metrics.number(reply, ["1"]) == {"exact": 0.0}


def test_answer_parts_are_joined_as_text():
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    assert right_answers({"messages": [{"role": "assistant", "content": parts}]}) == ["yes"]


@pytest.mark.parametrize(
    ("reply", "right", "f1", "exact"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in the old Eiffel tower", ["Eiffel tower", "Paris"], 2 * 2 / (4 + 2), 0),
        ("Paris", ["Eiffel tower", "Paris"], 1, 1),
        ("unanswerable", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_spans_are_scored_as_in_squad(reply, right, f1, exact):
    assert metrics.squad(reply, right) == {"f1": pytest.approx(f1), "exact": exact}


@pytest.mark.parametrize(
    ("reply", "f1"),
    [
        ("unanswerable", 1),
        ("Unanswerable.", 1),
        ("the question is unanswerable", 0),
        ("it", 0),
        ("unknown unanswerable", 0),
    ],
)
def test_unanswerable_question_scores_all_or_nothing(reply, f1):
    assert metrics.squad(reply, ["unanswerable"]) == {"f1": f1, "exact": f1}
    assert metrics.squad("unanswerable", ["in Paris"])["f1"] == 0


@pytest.mark.parametrize("score", [metrics.exact, metrics.squad])
def test_reply_without_match_is_wrong(score):
    for reply, right, expected in (("yes", "no", 0), ("garbage", "Yes", 0), ("no, yes", "yes", 1)):
        assert set(score(reply, [right], "(yes|no)").values()) == {expected}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pattern": "(yes|no)"}, r"matches nothing in the right answer 'Yes'"),
        ({"metric": "number"}, "metric=number matches nothing in the right answer 'Yes'"),
    ],
)
def test_a_right_answer_without_a_match_is_named(options, says, tmp_path):
    rows = [{"prompt": str(i), "completion": "Yes"} for i in range(9)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=says):
        load_task("mine", TaskOptions(test=str(file), **options))


def test_an_unparsable_reply_is_wrong():
    """prime_factorization's makes numbers of whatever it is given."""
    item = items("reasoning_gym:prime_factorization", "test")[0]
    assert metrics.puzzle("no idea", item.puzzle) == {"exact": 0.0}
    assert metrics.puzzle(item.puzzle["answer"], item.puzzle) == {"exact": 1.0}


@pytest.mark.parametrize(
    ("metric", "less", "whole"),
    [("bleu", False, 100), ("exact", False, 100), ("rougeL_diff", False, 100), ("exact_match", False, 1), ("f1", False, 1),
     ("acc", False, 1), ("word_perplexity", True, 1), ("ter", True, 1)],
)  # fmt: skip
def test_lm_eval_percentages_become_fractions(metric, less, whole):
    """By the metric's name: a value of 0.9 may be a percent, too."""
    assert lm_eval_tasks.scale_of(metric, less) == whole


def test_a_judge_that_fails_on_the_right_answer_raises(monkeypatch):
    def judge(answer, row):
        raise KeyError("valid_answers")

    monkeypatch.setattr(metrics, "_judge", lambda generator: judge)
    with pytest.raises(KeyError, match="valid_answers"):
        metrics.puzzle("1", {"metadata": {"source_dataset": "x"}, "answer": "1"})


@pytest.mark.parametrize(
    ("reply", "right"), [("B", 1), ("B.", 1), ("(B)", 1), ("B) two", 1), ("A", 0), ("Both", 0), ("", 0)]
)
def test_choice_letter_is_read_at_beginning(reply, right):
    assert metrics.exact(reply, ["B"], known("mmlu").pattern) == {"exact": right}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("social_iqa", {"question": "q", "choices": ["a", "b"], "answer": -1}),
        ("social_iqa", {"question": "q", "choices": ["a", "b"], "answer": 2}),
        ("ag_news", {"text": "t", "label": -1}),
    ],
)
def test_number_outside_choices_is_refused(name, row, tmp_path):
    fixture(tmp_path, name, row)
    with pytest.raises(DataError, match="is not in 0 to"):
        items(name, "test", str(tmp_path))


def test_a_tested_task_needs_no_training_records(tmp_path):
    (tmp_path / "hotel_reviews.test.jsonl").write_text(json.dumps({"text": "good", "label": "positive"}) + "\n")
    options = TaskOptions(data=str(tmp_path))
    assert len(load_task("hotel_reviews", options, learned=False).test) == 1
    with pytest.raises(DataError, match=r"neither hotel_reviews.train"):
        load_task("hotel_reviews", options)
    one_class = TaskOptions(data=str(tmp_path), head="classify")
    assert load_task("hotel_reviews", one_class, learned=False).train == []


def test_records_marked_for_escalation_are_an_error(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**row, "escalate": False}) + "\n")
    assert load_task("mine", TaskOptions(test=str(file))).test
    file.write_text(json.dumps({**row, "escalate": True}) + "\n")
    with pytest.raises(DataError, match="remove the column"):
        load_task("mine", TaskOptions(test=str(file)))


def test_a_users_column_named_also_is_no_answer():
    assert right_answers({"prompt": "a", "completion": "b", "also": None}) == ["b"]
    assert right_answers({"prompt": "a", "completion": "b", "also": "xyz"}) == ["b"]
