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

# A process for each core, with a thread each: small models gain nothing from more threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadfile

PARTS := --model benchmarks/models/garments-dit --guidance 1.5 --num 500 --steps 20 --output build/parts

# A day on two cores; it can be stopped and goes on.
bench: venv
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/spread.py
	$(BIN)/python benchmarks/strip.py
	$(BIN)/tcaq compare benchmarks/models/garments-dit --guidance 1.5 --recipes minmax,qdiffusion,tcaq --bits w4a4,w8a8 --preset quick --num 500 --steps 20 --output build/second
	cp build/second/compare.json benchmarks/results/second.json
	cp build/second/samples-w4a4.png docs/images/second-w4a4.png
	$(BIN)/python benchmarks/quality.py $(PARTS) --preset quick --results benchmarks/results/parts.json --only tcaq-w4a4 no-tcr-w4a4 none-w4a4
	$(BIN)/python benchmarks/spread.py $(PARTS) --results benchmarks/results/parts-spread.json --only tcaq-w4a4 no-tcr-w4a4 none-w4a4
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
