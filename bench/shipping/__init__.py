"""``python -m bench.shipping``: shadows worth detaching, from their initialisation to the edge; results in bench/results.

text.py         what is learned from, and each task as records; out of the files of shared/data
initialise.py   initialisations of a shadow on one budget of pretraining
tasks.py        tasks: a random shadow, a copied and a pretrained one, beside the same architecture without its base
widths.py       the pretrained shadow beside a base of another width
edge.py         the detached shadow in the runtimes of the edge
report.py       tables and pictures

Each step is made of runs of `umbra pretrain`, `umbra train` and `umbra eval`, kept in ``out/shipping``: a killed step goes on
where it was.
"""
