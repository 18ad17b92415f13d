# All a fresh clone needs: `make demo` quantizes the bundled model, `make test` checks the code. Both set up .venv once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: venv demo test lint bench clean

venv: $(READY)

# torch goes first and alone, so that a build from wherever pip is configured to look (CPU or CUDA) satisfies the rest.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,onnx,openvino]'
	touch $@

demo: venv
	$(BIN)/tcaq demo --output demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest

bench: venv
	$(BIN)/python benchmarks/quality.py

clean:
	rm -rf $(VENV) demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
