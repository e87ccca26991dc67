"""Detached shadows, from initialization to edge runtimes: ``python -m bench.shipping``; results in bench/results.

text.py         training texts and task records, from the files of shared/data
initialise.py   initializations of a shadow with equal pretraining budgets
tasks.py        random, copied and pretrained shadows, and the same architecture trained without the base
widths.py       the pretrained shadow with a base of another width
edge.py         the detached shadow in edge runtimes
report.py       tables and figures

Each step consists of runs of `umbra pretrain`, `umbra train` and `umbra eval` in ``out/shipping``, and resumes after a kill.
"""
