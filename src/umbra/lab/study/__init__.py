"""Studies, ``umbra study``: methods × tasks × seeds with one learning-rate search for every method; ``umbra report`` renders them.

definition.py, reading.py, checks.py   the YAML file of a study
sets.py, tasks.py, lm_eval_tasks.py    training and test records
methods.py, ablations.py               models to compare
requests.py                            one request per run, and its key
run.py, training.py, scoring.py        one run
records.py, archive.py                 result files
preparation.py, rates.py, sweep.py     all runs of a study
results.py, statistics.py              scores, intervals and paired differences
report/                                Markdown, HTML and figures
"""
