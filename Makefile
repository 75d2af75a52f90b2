VENV ?= .venv
SERVE_ARGS ?=
TEST_ARGS ?=

.PHONY: serve test lint clean

serve:  ## Serve the demo model with its precision profile; SERVE_ARGS="--port 9000" and the like go to `kvtuner demo`
	@tools/setup_env.sh $(VENV)
	@$(VENV)/bin/kvtuner demo $(SERVE_ARGS)

test: lint  ## All CPU tests; TEST_ARGS="-m gpu" runs the GPU's
	$(VENV)/bin/python -m pytest $(TEST_ARGS)

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

clean:
	rm -rf $(VENV) .models build *.egg-info
