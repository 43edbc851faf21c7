# Each target sets itself up on a fresh machine: a virtual environment with the pinned versions.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-quick check docs setup setup-browser clean

demo: setup
	$(BIN)/tiue-export demo --out demo --force

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations=20

test: setup
	$(PYTEST)

# Without the longest, while one works; CI runs all.
test-quick: setup
	$(PYTEST) -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

# The documentation as a site, in site/; a dead link fails. Its first page draws: the demo student, in the browser.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/tiue-export onnx --ckpt demo --precision fp16 --out build/emoji --force
	$(BIN)/tiue-export web build/emoji --out site/draw --title "Emoji of your own" \
	  --prompt "a fox on a dark green background"

# What the studio's browser test needs; it is skipped without.
setup-browser:
	command -v chromium >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends chromium)

setup: $(VENV)/.installed

# torch is installed first and alone: a range resolved later is then satisfied by the pinned build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade 'pip>=23' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site build dist *.egg-info
