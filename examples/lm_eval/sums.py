"""The questions of sums.yaml, made on the spot."""

from datasets import Dataset


def dataset(**_):
    pairs = [(a, b) for a in range(4) for b in (2, 3)]
    rows = [{"question": f"{a} plus {b} is", "choices": [str(a + b), str(a + b + 1)], "answer": 0} for a, b in pairs]
    return {"test": Dataset.from_list(rows)}
