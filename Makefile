# One shared environment, made on first use. `make demo` runs the main job, `make test` all tests.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export OMP_NUM_THREADS = 1
# torch's cache of shapes costs more than it saves where sizes are symbols: 8% of a compile
export TORCH_FAKE_TENSOR_DISPATCH_CACHE = 0
# tests at a time: most are one process with one thread
JOBS ?= 2

.PHONY: demo test quick check dist bench profile zoo rules docs mutants broken graphs scripts wide integrations soak clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q setuptools
	$(BIN)/pip install -q -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest tests -n $(JOBS) --dist worksteal

quick: $(READY)
	$(BIN)/python -m pytest tests/tspc tests/passes tests/runtime -m "not dist and not slow" -n $(JOBS) --dist worksteal

dist: $(READY)
	$(BIN)/python -m pytest tests -m dist

bench: $(READY)
	$(BIN)/python bench/speed.py

profile: $(READY)
	$(BIN)/python bench/profiles.py --top 12 --out bench/results

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/house/test_imports.py

zoo: $(READY)
	$(BIN)/python -m tests.support.run_zoo

rules: $(READY)
	$(BIN)/python -m pytest tests/behaviour/test_samples.py tests/docs/test_example_scripts.py -k "not curves" --update-golden

docs: $(READY)
	$(BIN)/python -m docs.picture
	$(BIN)/python -m docs.reference

mutants: $(READY)
	$(BIN)/python -m tests.house.mutants

broken: $(READY)
	$(BIN)/python -m tests.house.broken $(MODULES)

graphs: $(READY)
	$(BIN)/python -m pytest tests/parity/test_graphs.py --graphs 200 -n $(JOBS) --dist worksteal

scripts: $(READY)
	$(BIN)/python -m pytest tests/parity/test_scripts.py --scripts 200 -n $(JOBS) --dist worksteal

wide: $(READY)
	$(BIN)/python -m pytest tests -m wide --wide -n $(JOBS) --dist worksteal

integrations: $(READY)
	$(BIN)/pip install -q -e ".[dev,integrations]"
	$(BIN)/python -m pytest tests -m integrations --integrations

soak: $(READY)
	$(BIN)/python -m pytest tests/dist/test_soak.py --soak

clean:
	rm -rf $(VENV) results build *.egg-info
