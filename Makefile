# Everything runs in .venv, which the first target makes. On Windows, see "Without make" in README.md.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help install test lint types demo measure bench shapes shapes_xl adapters clean

help: ## what can be made
	@grep -E '^[a-z_]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m uv pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP) ## the virtual environment with everything in it

demo: $(STAMP) ## pictures with the shipped model and adapters: outputs/demo
	$(PY) examples/shapes/demo.py

test: $(STAMP) lint types ## lint, types and tests
	$(PY) -m pytest -n auto

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy pcm_scheduler lora_training

measure: $(STAMP) ## the tables in docs/results.md: Frechet distances and all
	$(PY) examples/shapes/measure.py

bench: $(STAMP) ## the tables in benchmarks/README.md
	$(PY) benchmarks/scheduler_step.py --write

shapes: $(STAMP) ## train and measure the shapes model again
	$(PY) examples/shapes/train_autoencoder.py
	$(PY) examples/shapes/train_classifier.py
	$(PY) examples/shapes/train_denoiser.py
	$(PY) examples/shapes/measure_teacher.py

shapes_xl: $(STAMP) ## train and measure the shapes model of SDXL's shape again
	$(PY) examples/shapes/train_xl.py

adapters: $(STAMP) ## distil the shapes adapters again
	$(PY) examples/shapes/distil.py

clean: ## remove what runs have written
	rm -rf outputs build dist *.egg-info
