# Two targets matter to a newcomer: `make demo` and `make test`. Both set up .venv first; nothing else is needed but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/resnet18_int8.yaml

.PHONY: demo test test-main-recipe test-recipes check setup setup-test lint format types layers docker schema clean

demo: $(VENV)/.installed
	$(BIN)/deployopt run $(RECIPE)

test: $(VENV)/.installed-test
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not recipe" --durations=15

# The main recipe to its end, trained as shipped, on all cores.
test-main-recipe: $(VENV)/.installed-test
	$(BIN)/pytest tests/pipeline/test_main_recipe.py

# Every shipped recipe to its end, the others on small data: before a release, since CI has time for the main one only.
test-recipes: $(VENV)/.installed-test
	$(BIN)/pytest -m recipe

# The same checks as .ci/run.
check: lint types layers docker test test-main-recipe

setup: $(VENV)/.installed
setup-test: $(VENV)/.installed-test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-test
	$(BIN)/mypy

layers: $(VENV)/.installed-test
	$(BIN)/lint-imports

docker: $(VENV)/.installed-test
	$(BIN)/hadolint docker/*.Dockerfile

schema: $(VENV)/.installed-test
	$(BIN)/deployopt schema > recipes/recipe.schema.json

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deployopt needs Python 3.11 or later: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[all,tensorrt-rtx,test,dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -c constraints.txt tensorrt-stubs
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
