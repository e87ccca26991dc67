"""``python -m bench.drafting``: drafted decoding of real answers beside its peers; results in bench/results.

shadow.py    a shadow that is worth drafting with: trained alone, then beside the base, in ``out/drafting``
measure.py   every way of writing an answer, interleaved, each held to the tokens of its own model
report.py    the table, the cost model and its curve
"""
