VENV ?= .venv
DOCS_VENV ?= .venv-docs
SERVE_ARGS ?=
TEST_ARGS ?=

.PHONY: serve check test test-gpu lint docs clean

serve:  ## Serve the demo model with its precision profile; SERVE_ARGS="--port 9000" and the like go to `kvtuner demo`
	@tools/setup_env.sh $(VENV)
	@$(VENV)/bin/kvtuner demo $(SERVE_ARGS)

check: lint  ## In about a minute on two cores: linters, types, and the quick tests, which start no engine
	$(VENV)/bin/python -m pytest -q -n 2 -m "not gpu and not engine and not slow" \
		--ignore tests/serving --ignore tests/e2e $(TEST_ARGS)  # nothing of theirs would run, and importing them takes seconds

test: lint  ## All CPU tests, which is what CI runs; TEST_ARGS="tests/profile -k layers" runs some
	$(VENV)/bin/python -m pytest $(TEST_ARGS)

test-gpu: lint  ## All tests that need an NVIDIA GPU
	$(VENV)/bin/python -m pytest -m gpu $(TEST_ARGS)

.PHONY: tables
tables:  ## Tables, figures and pictures of the documentation, from docs/benchmarks/data
	@tools/setup_env.sh $(VENV)
	$(VENV)/bin/python -m kvtuner_tools.bench.tables

lint:
	@tools/setup_env.sh $(VENV)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

docs:  ## The site of docs/ in site/, in a small environment of its own
	@test -x $(DOCS_VENV)/bin/python || python3 -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --editable ".[docs]"
	$(DOCS_VENV)/bin/zensical build --clean --strict

clean:
	rm -rf $(VENV) $(DOCS_VENV) .models build site *.egg-info
