# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo measure bench bench-range-test study test test-fullsize test-faults check audit format clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml .constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --constraint .constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # on all cores; pip does it on one
	touch $@

demo: install  ## range-test, train and sample on the embedded model and images
	$(BIN)/sdclr range-test configs/demo.yaml
	test -d runs/mochi/final || $(BIN)/sdclr train configs/demo.yaml $$(ls -d runs/mochi/checkpoints/step-* >/dev/null 2>&1 && echo --resume)
	$(BIN)/sdclr sample configs/demo.yaml
	@echo "look at: runs/mochi/range-test/report.html, runs/mochi/report.html and runs/mochi/samples/index.html"

measure: install  ## how good the embedded model is: VAE PSNR, obedience to held-out captions
	$(BIN)/python data/measure_demo.py

bench: install  ## sdclr train beside the bare floor and diffusers' script: a quarter of an hour on an idle machine (BENCH='--quick' for minutes)
	$(BIN)/pip install --quiet --constraint .constraints.txt --editable '.[bench]'
	$(BIN)/python tests/benchmarks/throughput.py $(BENCH)

bench-range-test: install  ## the range test against brute force, on every case: hours (BENCH='--quick' for minutes); goes on where it stopped
	$(BIN)/python tests/benchmarks/range_test_accuracy.py --work build/bench-range-test $(BENCH)

study: install  ## does cycling pay? at most three hours on two cores, goes on where it was stopped
	$(BIN)/python tests/benchmarks/study.py

check: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## everything that fits in minutes on two CPU cores
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not fullsize and not gpu and not faults"

test-fullsize: install  ## one training step of the true SD 1.5 shape, on the CPU
	$(BIN)/pytest -m fullsize -s

test-faults: install  ## every kill, corruption, full disk and hostile input, with the figures
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults -m faults -s

audit: install  ## known vulnerabilities of the pinned dependencies (asks PyPI)
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement .constraints.txt --no-deps --disable-pip

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
