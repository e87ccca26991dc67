"""``python -m bench``: `umbra bench`, with its results in bench/results."""
