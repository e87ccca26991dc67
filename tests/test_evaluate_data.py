"""What a study is made of: known data sets in their own columns, metrics, statistics, and files that are refused."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from umbra.config import DIALECTS
from umbra.errors import ConfigError, DataError
from umbra.evaluate import harness, metrics
from umbra.evaluate.sets import SETS, items, known
from umbra.evaluate.statistics import difference, estimate, mcnemar
from umbra.evaluate.study import Study, key_of
from umbra.evaluate.tasks import TaskOptions, load_task, right_answers
from umbra.folder import digest_of

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
        told = [{**r, asked: f"{r[asked]} ({i})" if learned else r[asked]} for i in range(count) for r in rows]
        (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in told))


# -- sets --------------------------------------------------------------------------------------------------------------


def test_every_set_has_a_fixture_or_is_generated():
    assert set(ROWS) | {"gsm_symbolic"} == set(SETS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_prompt_and_answers(name, tmp_path):
    row, (prompt, answers) = ROWS[name]
    fixture(tmp_path, name, row)
    task = load_task(name, TaskOptions(data=str(tmp_path), validation=1))
    assert (len(task.train), len(task.validation), len(task.test)) == (2, 1, 3)
    assert task.test[0]["prompt"] == prompt
    assert right_answers(task.test[0]) == answers
    assert load_task(name, TaskOptions(data=str(tmp_path), validation=1), False).test[0]["prompt"] == prompt + "\n"


@pytest.mark.parametrize("name", ROWS)
def test_the_hub_is_asked_for_the_papers_splits(name, tmp_path, monkeypatch):
    """Those without a hub id are refused; a row comes back as from a folder."""
    import datasets

    asked = []

    def load_dataset(*where, split):
        asked.append((*where, split))
        return [ROWS[name][0]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if not SETS[name].hub:
        with pytest.raises(ConfigError, match="on no hub: name the folder"):
            items(name, "train")
        return
    for part, split in zip(("train", "test"), SETS[name].splits, strict=True):
        found = items(name, part)[0]
        assert f"{found.text}\n{found.question}".strip() == ROWS[name][1][0]
        assert asked[-1] == (*SETS[name].hub, split)


def test_a_question_without_an_answer_is_unanswerable(tmp_path):
    fixture(tmp_path, "squad_v2", {**ROWS["squad_v2"][0], "answers": {"text": [], "answer_start": []}})
    assert items("squad_v2", "test", str(tmp_path))[0].answer == "unanswerable"


def test_generated_sets_are_never_tested_on_what_they_train_on():
    pytest.importorskip("reasoning_gym")
    task = load_task("gsm_symbolic", TaskOptions())
    assert not {r["prompt"] for r in task.train} & {r["prompt"] for r in task.test}
    assert "####" in task.train[0]["completion"]
    other = load_task("x", TaskOptions(set="reasoning_gym:chain_sum"))
    assert other.test[0]["completion"].lstrip("-").isdigit()
    assert other.score(other.test[0]["completion"], other.test[0]) == {"exact": 1.0}
    with pytest.raises(ConfigError, match="no generator 'chain_of_fools'"):
        load_task("x", TaskOptions(set="reasoning_gym:chain_of_fools"))


def test_a_puzzle_with_several_right_answers_is_judged_by_its_generator():
    pytest.importorskip("reasoning_gym")
    task = load_task("x", TaskOptions(set="reasoning_gym:n_queens", test_limit=5))
    for record in task.test:
        right = record["puzzle"]["metadata"]["valid_answers"]
        assert all(task.score(f" {answer}\n", record) == {"exact": 1.0} for answer in right)
        assert task.score(right[0].replace("Q", "_"), record) == {"exact": 0.0}
    assert any(len(r["puzzle"]["metadata"]["valid_answers"]) > 1 for r in task.test)
    asked = load_task("x", TaskOptions(set="reasoning_gym:n_queens", test_limit=1, metric="exact"))
    assert asked.score(asked.test[0]["completion"], asked.test[0]) == {"exact": 1.0}


def test_words_heads_and_limits(tmp_path):
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
    told = load_task("hotel_reviews", TaskOptions(**given, head="text"))
    assert "\nIs this" in told.test[0]["text"] and told.metric == "loss"


def test_nothing_that_is_learned_is_asked_and_order_says_nothing(tmp_path):
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


def test_choices_are_made_on_what_is_held_out(tmp_path):
    rows = [{"text": f"one two {k}", "label": k} for k in ("neutral", "positive")]
    fixture(tmp_path, "hotel_reviews", *rows, count=6)
    given = {"data": str(tmp_path), "validation": 4, "train_limit": 4}
    task, chosen = (load_task("hotel_reviews", TaskOptions(**given, scored_on=s)) for s in ("test", "validation"))
    assert chosen.test == chosen.validation == task.validation != task.test and chosen.train == task.train
    assert not {r["prompt"] for r in chosen.test} & {r["prompt"] for r in chosen.train}


def test_classes_that_are_not_learned_are_told_before_training(tmp_path):
    for part, labels in (("train", "ab"), ("test", "abc")):
        rows = [{"text": f"{part} {k} {i}", "label": k} for k in labels for i in range(4)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = {"train": f"{tmp_path}/train.jsonl", "test": f"{tmp_path}/test.jsonl", "validation": 2, "head": "classify"}
    with pytest.raises(DataError, match="tests classes that it does not learn: c"):
        load_task("x", TaskOptions(**given))
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(json.dumps({"text": f"{part}{i}", "label": 0.5 * i}) + "\n" for i in range(6))
        )
    with pytest.raises(DataError, match="one class each, not of regression"):
        load_task("x", TaskOptions(**given))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"hotel_reviews, train, row 2 \(columns 'text'\) is not as this set's"),
        ({"label": "x", "text": None}, "row 2"),
    ],
)
def test_a_row_that_is_not_as_the_sets_is_named(row, message, tmp_path):
    for split in ("train", "test"):
        lines = [{"text": "fine", "label": "positive"}, row]
        (tmp_path / f"hotel_reviews.{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(DataError, match=message):
        load_task("hotel_reviews", TaskOptions(data=str(tmp_path), validation=1, words=3))


def test_a_folder_without_the_set_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds neither hotel_reviews\.train\.jsonl"):
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
def test_what_reads_as_no_finite_number_is_wrong(reply):
    assert metrics.number(reply, ["1"]) == {"exact": 0.0}


def test_an_answer_of_parts_is_their_text():
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
def test_spans_are_scored_as_squad_does(reply, right, f1, exact):
    assert metrics.squad(reply, right) == {"f1": pytest.approx(f1), "exact": exact}


# -- statistics --------------------------------------------------------------------------------------------------------


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
def test_that_there_is_no_answer_is_right_or_wrong_as_a_whole(reply, f1):
    assert metrics.squad(reply, ["unanswerable"]) == {"f1": f1, "exact": f1}
    assert metrics.squad("unanswerable", ["in Paris"])["f1"] == 0


@pytest.mark.parametrize("score", [metrics.exact, metrics.squad])
def test_a_reply_without_a_match_is_wrong(score):
    for reply, right, expected in (("yes", "no", 0), ("garbage", "Yes", 0), ("no, yes", "yes", 1)):
        assert set(score(reply, [right], "(yes|no)").values()) == {expected}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pattern": "(yes|no)"}, r"finds no answer in 'Yes'"),
        ({"metric": "number"}, "metric=number finds no answer in 'Yes'"),
    ],
)
def test_an_answer_that_no_reply_can_be_held_to_is_named(options, says, tmp_path):
    rows = [{"prompt": str(i), "completion": "Yes"} for i in range(9)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=says):
        load_task("mine", TaskOptions(test=str(file), **options))


def test_a_judge_that_cannot_read_a_reply_holds_it_for_wrong():
    """prime_factorization's makes numbers of whatever it is given."""
    item = items("reasoning_gym:prime_factorization", "test")[0]
    assert metrics.puzzle("no idea", item.puzzle) == {"exact": 0.0}
    assert metrics.puzzle(item.puzzle["answer"], item.puzzle) == {"exact": 1.0}


@pytest.mark.parametrize(
    ("metric", "less", "whole"),
    [("bleu", False, 100), ("exact", False, 100), ("rougeL_diff", False, 100), ("exact_match", False, 1), ("f1", False, 1),
     ("acc", False, 1), ("word_perplexity", True, 1), ("ter", True, 1)],
)  # fmt: skip
def test_percents_of_lm_eval_are_shares(metric, less, whole):
    """By the metric's name: a value of 0.9 may be a percent, too."""
    assert harness.whole_of(metric, less) == whole


def test_a_judge_that_cannot_read_the_right_answer_is_at_fault(monkeypatch):
    def judge(answer, row):
        raise KeyError("valid_answers")

    monkeypatch.setattr(metrics, "_judge", lambda generator: judge)
    with pytest.raises(KeyError, match="valid_answers"):
        metrics.puzzle("1", {"metadata": {"source_dataset": "x"}, "answer": "1"})


@pytest.mark.parametrize(
    ("reply", "right"), [("B", 1), ("B.", 1), ("(B)", 1), ("B) two", 1), ("A", 0), ("Both", 0), ("", 0)]
)
def test_a_letter_is_read_off_the_beginning(reply, right):
    assert metrics.exact(reply, ["B"], known("mmlu").pattern) == {"exact": right}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("social_iqa", {"question": "q", "choices": ["a", "b"], "answer": -1}),
        ("social_iqa", {"question": "q", "choices": ["a", "b"], "answer": 2}),
        ("ag_news", {"text": "t", "label": -1}),
    ],
)
def test_a_number_of_no_choice_is_refused(name, row, tmp_path):
    fixture(tmp_path, name, row)
    with pytest.raises(DataError, match="is none of 0 to"):
        items(name, "test", str(tmp_path))


def test_what_is_tested_only_needs_nothing_to_learn(tmp_path):
    (tmp_path / "hotel_reviews.test.jsonl").write_text(json.dumps({"text": "good", "label": "positive"}) + "\n")
    options = TaskOptions(data=str(tmp_path))
    assert len(load_task("hotel_reviews", options, learned=False).test) == 1
    with pytest.raises(DataError, match=r"neither hotel_reviews.train"):
        load_task("hotel_reviews", options)
    one_class = TaskOptions(data=str(tmp_path), head="classify")
    assert load_task("hotel_reviews", one_class, learned=False).train == []


def test_marks_for_the_pair_are_not_for_studies(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**row, "escalate": False}) + "\n")
    assert load_task("mine", TaskOptions(test=str(file))).test
    file.write_text(json.dumps({**row, "escalate": True}) + "\n")
    with pytest.raises(DataError, match="leave the column out"):
        load_task("mine", TaskOptions(test=str(file)))


def test_a_column_of_the_users_own_is_no_further_answer():
    assert right_answers({"prompt": "a", "completion": "b", "also": None}) == ["b"]
    assert right_answers({"prompt": "a", "completion": "b", "also": "xyz"}) == ["b"]


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1.0])
def test_rounding_is_no_variance(value):
    assert difference({s: [value] * 3 for s in range(3)}, {s: [0.0] * 3 for s in range(3)}).verdict == "tie"


def test_one_seed_gives_the_t_interval_over_items():
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, 40)
    found, expected = estimate(d[None]), stats.ttest_1samp(d, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_item_gives_the_t_interval_over_seeds():
    d = np.random.default_rng(1).normal(0.2, 1, 5)
    found, expected = estimate(d[:, None]), stats.ttest_1samp(d, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("of_seeds", "of_items", "rest"), [(0.3, 0.0, 1.0), (0.0, 0.5, 1.0), (0.2, 0.5, 0.5), (0.05, 0.0, 0.1)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(of_seeds, of_items, rest):
    """Three seeds and 100 items, drawn a thousand times: about 95 % hold the mean. Leaving either noise out would not do."""
    rng = np.random.default_rng(2)
    held = []
    for _ in range(1000):
        d = rng.normal(0, of_seeds, (3, 1)) + rng.normal(0, of_items, (1, 100)) + rng.normal(0, rest, (3, 100))
        found = estimate(d)
        held.append(found.low <= 0 <= found.high)
    assert 0.91 <= np.mean(held) <= 1.0


def test_a_difference_is_paired_and_judged():
    rng = np.random.default_rng(3)
    hard = rng.random(200)
    ours = {s: (hard < 0.75).astype(float).tolist() for s in (0, 1, 2)}
    theirs = {s: (hard < 0.65).astype(float).tolist() for s in (0, 1, 2)}
    apart = difference(ours, theirs)
    assert apart is not None and apart.verdict == "win"
    assert difference(theirs, ours).verdict == "loss"
    assert difference(ours, ours).verdict == "tie"
    unpaired = math.hypot(estimate(np.array(list(ours.values()))).half, estimate(np.array(list(theirs.values()))).half)
    assert apart.half < unpaired / 1.2
    assert difference(ours, {5: theirs[0]}) is None
    assert difference(ours, {0: theirs[0][:-1]}) is None


@pytest.mark.parametrize(("items", "verdict"), [(1, "tie"), (2, "tie"), (5, "tie"), (6, "win"), (50, "win")])
def test_what_never_differs_is_no_proof_where_it_is_little(items, verdict):
    """All for one side: as McNemar's exact test judges it."""
    apart = difference({0: [1.0] * items}, {0: [0.0] * items})
    assert apart is not None and apart.verdict == verdict
    assert (mcnemar([1.0] * items, [0.0] * items) < 0.05) == (verdict == "win")


@pytest.mark.parametrize(("apart", "verdict"), [(4, "tie"), (5, "tie"), (6, "win")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_few_items_that_differ_are_a_win_where_the_sign_test_says_so(apart, verdict, seeds):
    right, less = [1.0] * 100 + [0.0] * 100, [1.0] * (100 - apart) + [0.0] * (100 + apart)
    ours, theirs = (dict.fromkeys(range(seeds), side) for side in (right, less))
    found = difference(ours, theirs)
    assert found.verdict == verdict and (mcnemar(right, less) < 0.05) == (verdict == "win")
    assert found.mean == pytest.approx(apart / 200) and found.high - found.mean == pytest.approx(found.mean - found.low)
    assert (found.low == 0) == (verdict == "tie")
    back = difference(theirs, ours)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_the_interval_of_scores_that_are_all_alike():
    """Clopper's and Pearson's; over seeds where there is one item; none where nothing is known."""
    low = stats.binomtest(9, 9).proportion_ci(method="exact").low
    assert estimate(np.ones((1, 9))).low == pytest.approx(low)
    assert estimate(np.ones((3, 1))).half == pytest.approx(1 - 0.025 ** (1 / 3))
    assert estimate(np.ones((1, 1))).half == math.inf and estimate(np.ones((3, 4)), span=0).half == 0


def test_mcnemar_is_exact():
    ours, theirs = [1.0] * 8 + [0.0] * 2, [0.0] * 6 + [1.0] * 2 + [0.0] * 2
    assert mcnemar(ours, theirs) == pytest.approx(2 * 0.5**6)
    assert mcnemar(ours, ours) == 1.0


# -- studies -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    for name in ("a", "b"):
        for part, prompt in (("train", "1+1="), ("test", "1+2=")):
            (tmp_path / f"{name}.{part}.jsonl").write_text(
                (json.dumps({"prompt": prompt, "completion": "2"}) + "\n") * 4
            )
    tasks = {
        n: {"train": f"{tmp_path}/{n}.train.jsonl", "test": f"{tmp_path}/{n}.test.jsonl", "validation": 1} for n in "ab"
    }
    return {"tasks": tasks, "methods": {"Umbra": {"kind": "umbra", "rank": 4}}, "training": {"max_steps": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "names no tasks"),
        ({"method": {}}, "Unknown key 'method'.*Did you mean 'methods'"),
        ({"methods": {"x": {"kind": "lorra"}}}, "Unknown key 'lorra'.*'lora'"),
        ({"methods": {"x": {"r": 8}}}, "method x needs a kind"),
        ({"methods": {"x": {"kind": "lora", "rr": 8}}}, "Unknown key 'rr'.*LoraConfig"),
        ({"methods": {"x": {"kind": "peft", "peft_type": "NONE"}}}, "peft_type of PEFT"),
        ({"methods": {"x": {"kind": "umbra", "ranc": 8}}}, "Unknown key 'ranc'"),
        ({"methods": {"x": {"kind": "umbra", "rank": 0}}}, "rank must be"),
        ({"methods": {"x": {"kind": "lora", "modes": ["detached"]}}}, "modes are attached"),
        ({"methods": {"x": {"kind": "base", "rank": 1}}}, "bare base has no fields"),
        ({"methods": {"x": {"kind": "lora", "learning_rate": -1}}}, "learning_rate must be above 0"),
        ({"seeds": []}, "seeds must be"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"dtype": "float8"}, "Unknown dtype"),
        ({"match": "LoRA"}, "Unknown key 'LoRA' in the study's methods"),
        ({"match": 0}, "match must be"),
        ({"reference": "LoRA"}, "study's methods .reference"),
        ({"transfer": {"a": ["c"]}}, "study's tasks .transfer"),
        ({"transfer": {"a": 3}}, "transfer.a must be a list"),
        ({"forgetting": ["a", "b"]}, "Every task of the study is tested only"),
        ({"search": {"learning_rates": [1]}}, "Unknown key 'learning_rates' in search"),
        ({"search": {"tasks": ["c"]}}, "study's tasks .search"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"base": "random:tiny"}, "is of the referee"),
        ({"search": {"learning_rate": []}}, "search.learning_rate is empty"),
        ({"search": {"max_steps": 0}}, "search.max_steps must be"),
        ({"search": {"seed": -1}}, "search.seed at least 0"),
        ({"search": {"tasks": ["b"]}, "transfer": {"a": ["b"]}}, "b, which is tested only"),
        ({"forgetting": ["b"]}, "add a method of .kind: base"),
        ({"tasks": {n: {"set": "intents", "data": ".", "head": "classify"} for n in "ab"}, "forgetting": ["b"]}, "no head for"),
        ({"methods": {"x": {"kind": "lora", "learning_rate": [1e-3, 1e-2]}}}, "several rates to try, but the study has no search"),
        ({"methods": {"x": {"kind": "lora", "learning_rate": "fast"}}}, "method x: learning_rate must be"),
        ({"methods": {"x": {"kind": "lora", "training": 5}}}, "method x: training must be"),
        ({"methods": {"x": {"kind": ["lora"]}}}, "the kinds of method"),
        ({"methods": {"x": {"kind": "lora", "training": {"learning_rate": 1}}}}, "beside training, not in it"),
        ({"methods": {"x": {"kind": "umbra", "modes": "detachd"}}}, "modes are attached, detached"),
        ({"training": {"per_device_train_batch_size": "eight"}}, "per_device_train_batch_size must be"),
        ({"seeds": [True]}, "seeds must be"),
        ({"forgetting": [{"text": None}]}, r"the study: forgetting must be list\[str\]"),
        ({"transfer": {"a": [{"b": None}]}}, "transfer.a must be a list of tasks"),
        ({"search": {"tasks": [["a"]]}}, r"search: tasks must be list\[str\]"),
        ({"search": {"learning_rate": [[0.1]]}}, r"search: learning_rate must be list\[float\]"),
        ({"ours": [["Umbra"]]}, "the study: ours must be"),
        ({"methods": {"x": {"kind": "umbra", "modes": [["attached"]]}}}, "method x: modes are attached, detached"),
        ({"training": {"seed": 3}}, "Unknown key 'seed'"),
        ({"training": {"max_step": 2}}, "max_step"),
        ({"training": {"eval_strategy": "steps"}}, "eval_strategy has nothing to evaluate on"),
        ({"search": {"learning_rate": [0.1, 0.1]}}, "names a rate twice"),
        ({"reference": "Umbra"}, "Umbra is the only method of kind umbra"),
        ({"methods": {"a\nb": {"kind": "lora"}}}, "characters that a table cannot show"),
        ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_run_is_refused(change, message, study):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Study.of({**study, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": None}, "train needs test"),
        ({"words": 3}, "words is of a known set"),
        ({"metric": "bleu"}, "Unknown key 'bleu'.*metrics"),
        ({"metric": "loss", "head": "classify"}, "metric=loss is of an answer in words"),
        ({"pattern": "("}, "no regular expression"),
        ({"validation": 0}, "validation must be at least 1"),
        ({"head": "regress"}, "head must be"),
        ({"steps": 3}, "Unknown key 'steps' in task a"),
        ({"train": None, "test": None}, "data sets that a study knows"),
        ({"train": None, "scored_on": "validation"}, "scored_on=validation needs records that are learned"),
        ({"train": None, "test": None, "lm_eval": "x", "metric": "exact"}, "metric is not for a task of lm-eval"),
        (
            {"train": None, "test": None, "lm_eval": "x", "head": "classify"},
            "head=classify is not for a task of lm-eval",
        ),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(change, message, study):
    study["tasks"]["a"] |= change
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Study.of(study)


def test_too_little_data_and_the_wrong_records_are_named(study):
    with pytest.raises(
        DataError, match="4 training records that its test does not ask, of which validation=4 leaves none"
    ):
        load_task("a", TaskOptions(**{**study["tasks"]["a"], "validation": 4}))
    with pytest.raises(DataError, match="head=classify, which takes label records, not completion"):
        load_task("a", TaskOptions(**study["tasks"]["a"], head="classify"))


def test_a_key_follows_what_a_result_depends_on_and_nothing_else(study, tmp_path, monkeypatch):
    def key(**changes):
        made = Study.of({**study, **changes})
        return key_of(next(made.runs({n: m.fields for n, m in made.methods.items()}, {})))

    first = key()
    with monkeypatch.context() as patch:  # of another version, where a field that is not given means another number
        patch.setitem(DIALECTS["umbra"], "alpha", 0.7)
        assert key() != first
        given = {"methods": {"Umbra": {"kind": "umbra", "rank": 4, "alpha": 0.7}}}
        patch.setitem(DIALECTS["umbra"], "alpha", 1.0)
        assert key() == first != key(**given)
    assert key(title="Other", about="words", batch_size=3) == first
    assert key(methods={"Renamed": study["methods"]["Umbra"]}) == first
    assert key(seeds=[1]) != first
    assert key(training={"max_steps": 3}) != first
    assert key(methods={"Umbra": {"kind": "umbra", "rank": 5}}) != first
    assert key(transfer={"a": ["b"]}) != first
    assert first == "240caff700f738f1", "records of schema 1 stay valid"
    assert key(tasks={"a": {**study["tasks"]["a"], "scored_on": "validation"}}) != first
    assert key(tasks={"a": {**study["tasks"]["a"], "train": "org/a", "test": "org/t"}}) != key(
        tasks={"a": {**study["tasks"]["a"], "train": "org/b", "test": "org/t"}}
    )
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "config.json").write_text("{}")
    pretrained = {"Umbra": {"kind": "umbra", "shadow": str(tmp_path / "shadow")}}
    before = key(methods=pretrained)
    (tmp_path / "shadow" / "config.json").write_text('{"again": 1}')
    assert key(methods=pretrained) != before
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "a.train.jsonl").read_bytes())
    moved = {**study["tasks"]["a"], "train": str(tmp_path / "moved.jsonl")}
    assert key(tasks={"a": moved}) == first
    (tmp_path / "moved.jsonl").write_text('{"prompt": "1+1=", "completion": "33"}\n' * 4)
    assert key(tasks={"a": moved}) != first


def test_a_key_follows_all_files_of_a_task_of_lm_eval_and_not_their_place(study, tmp_path):
    def key(folder):
        tasks = {**study["tasks"], "b": {"lm_eval": "toy", "lm_eval_path": str(folder)}}
        made = Study.of({**study, "tasks": tasks, "transfer": {"a": ["b"]}})
        return key_of(next(made.runs({n: m.fields for n, m in made.methods.items()}, {})))

    for folder, data in (("one", "1"), ("two", "1"), ("three", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.yaml").write_text("task: toy")
        (tmp_path / folder / "toy.jsonl").write_text(data)
    assert key(tmp_path / "one") == key(tmp_path / "two") != key(tmp_path / "three")


def test_a_file_is_read_once_for_its_digest_until_it_changes(tmp_path, monkeypatch):
    read = []
    plain = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *x: read.append(1) or plain(*x))
    file = tmp_path / "weights"
    file.write_text("one")
    first = digest_of([file])
    assert digest_of([file]) == first and len(read) == 1
    assert first == hashlib.sha256(hashlib.sha256(b"one").hexdigest().encode()).hexdigest()[:16]
    file.write_text("three")
    assert digest_of([file]) != first and len(read) == 2


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "bench" / "studies").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_studies_of_the_bench_can_be_read(file):
    study = Study.read(str(file))
    assert study.trained and all(study.tested(t) for t in study.trained)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_map_writes_each_score_into_its_cell():
    from types import SimpleNamespace

    from umbra.evaluate import plots

    scores = {("A", "x"): 0.25, ("A", "y"): 0.5, ("B", "y"): 0.75}
    results = SimpleNamespace(
        variants=[SimpleNamespace(name=n) for n in "AB"],
        score=lambda v, _, tested: (
            None if (v.name, tested) not in scores else estimate(np.array([[scores[v.name, tested]]]))
        ),
    )
    (axes,) = plots.transfer(results, [("t", "x"), ("t", "y")]).axes  # type: ignore[arg-type]
    assert {t.get_text(): t.get_position() for t in axes.texts} == {
        "25": (0.5, 0.5),
        "50": (1.5, 0.5),
        "75": (1.5, 1.5),
    }


def test_names_are_drawn_as_they_are():
    """Two dollars begin no mathematics, and an underscore hides nothing from a legend."""
    from types import SimpleNamespace

    from umbra.evaluate import plots

    names = ["_first", "$5 and $\\frac", "$x_1$"]
    results = SimpleNamespace(cost=lambda v: {"parameters": 1e6 * v}, mean_score=lambda v: estimate(np.eye(3)))
    figure = plots.scaling(results, {n: [1, 2] for n in names})  # type: ignore[arg-type, list-item]
    assert [t.get_text().lstrip("\u200b") for t in figure.axes[0].get_legend().get_texts()] == [
        n.replace("$", "\\$") for n in names
    ]
    for each in (figure, plots.differences([(n, estimate(np.eye(3))) for n in names], "")):
        drawn = plots.svg(each)
        assert all(n in drawn for n in names) and plots.png(each)
