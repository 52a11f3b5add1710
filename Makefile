# Two commands matter: `make demo` and `make test`. Each makes .venv when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := demo,io,llm,app,test
NMNIST ?=
FAST ?=

.PHONY: demo test test-slow browser fuzz faults lint format bench clean

$(VENV)/.installed: setup.cfg pyproject.toml
	@echo "installing into $(VENV): some minutes, without a word"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

demo: $(VENV)/.installed  ## both stages, probes and a report, on a CPU and without a download
	$(BIN)/gep demo $(if $(NMNIST),--nmnist "$(NMNIST)") $(if $(FAST),--fast)

test: $(VENV)/.installed  ## the quick tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not browser"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

browser: $(VENV)/.installed  ## gep app in headless Chromium; screenshots in .out/screenshots
	$(BIN)/python -m pytest -m browser -s tests/test_app_browser.py

fuzz: $(VENV)/.installed  ## 20,000 damaged recordings over all readers
	$(BIN)/python -m tests.fuzz --inputs 20000

faults: $(VENV)/.installed  ## 50 kills at random moments, full disks, damaged checkpoints, lost workers and ranks
	$(BIN)/python -m tests.faults --kills 50

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gep stage1_align stage2_autoregress downstream

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## speed as ratios, one table a script
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m bench.represent
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.wait
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.simulate
	$(BIN)/python -m bench.sparse
	$(BIN)/python -m bench.teacher_cache
	$(BIN)/python -m bench.tokens
	$(BIN)/python -m bench.stream
	$(BIN)/python -m bench.plan
	$(BIN)/python -m bench.evrep

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
