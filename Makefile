# Everything runs in .venv, which the first target makes. On Windows, see "Without make" in README.md.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed

TWO_PROCESSES := ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(PY) -m accelerate.commands.launch \
	--config_file examples/accelerate/two_processes_cpu.yaml
EVALUATE := $(TWO_PROCESSES) -m lora_training.evaluation

.PHONY: help install test test-hard test-lowest lint types demo demo-edit demo-video report report-video bench shapes shapes_video shapes_xl adapters adapters_video seeds adapter_xl clean

help: ## what can be made
	@grep -E '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m uv pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[dev]'
	touch $@

$(LOWEST_STAMP): $(STAMP) pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PY) -m uv pip install --quiet --python $(LOWEST)/bin/python --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

install: $(STAMP) ## the virtual environment with everything in it

demo: $(STAMP) ## pictures with the shipped model and adapters: outputs/demo
	$(PY) examples/shapes/demo.py

demo-video: $(STAMP) ## clips with the shipped motion modules and adapters, as a moving sheet and a table: outputs/demo
	$(PY) examples/shapes/demo_video.py

demo-edit: $(STAMP) ## a sheet of every editing task: outputs/demo
	$(PY) examples/shapes/demo_edit.py

test: $(STAMP) lint types ## lint, types and tests
	$(PY) -m pytest -n auto

test-hard: $(STAMP) ## what takes longer: runs that are killed, a hundred thousand malformed inputs, a million jumps; under 40 minutes
	$(PY) -m pytest -m hard -n auto

test-lowest: $(LOWEST_STAMP) ## the tests with the lowest versions that pyproject.toml allows, in an environment of their own
	$(LOWEST)/bin/python -m pytest -n auto

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy pcm_scheduler lora_training

report: $(STAMP) ## docs/results.md: every claim measured on the shapes model; an hour on two cores
	$(PY) examples/shapes/write_prompts.py outputs/shapes_prompts.txt --count 512
	$(PY) examples/shapes/write_prompts.py outputs/shapes_pairs.jsonl --count 128
	$(EVALUATE) examples/evaluation/shapes.yaml
	$(PY) examples/shapes/report.py

report-video: $(STAMP) ## the section on clips in docs/results.md; three quarters of an hour on two cores
	$(PY) examples/shapes/write_prompts.py outputs/shapes_video_prompts.txt --moving --count 96
	$(PY) examples/shapes/video_model.py outputs/shapes_video_model
	$(EVALUATE) examples/evaluation/shapes_video.yaml
	$(PY) examples/shapes/report.py --kept

bench: $(STAMP) ## the tables in benchmarks/README.md and docs/editing.md; hours
	$(PY) benchmarks/scheduler_step.py --write
	$(PY) benchmarks/training_step.py --write
	$(PY) benchmarks/sampling.py
	$(PY) benchmarks/sampling.py --video --write
	$(PY) benchmarks/scaling.py --write
	$(PY) benchmarks/editing.py

shapes: $(STAMP) ## train and measure the shapes model again
	$(PY) examples/shapes/train_autoencoder.py
	$(PY) examples/shapes/train_classifier.py
	$(PY) examples/shapes/train_denoiser.py
	$(PY) examples/shapes/measure_teacher.py

shapes_video: $(STAMP) ## train and measure the words of motion, the domain adapter and the motion modules again; hours
	$(PY) examples/shapes/motion_words.py
	$(TWO_PROCESSES) examples/shapes/domain_adapter.py
	$(TWO_PROCESSES) examples/shapes/train_motion.py
	$(TWO_PROCESSES) examples/shapes/video_guidance.py
	$(TWO_PROCESSES) examples/shapes/measure_motion.py

adapters_video: $(STAMP) ## distil the adapters for clips again; two hours
	$(PY) examples/shapes/distil_video.py

shapes_xl: $(STAMP) ## train and measure the shapes model of SDXL's shape again
	$(PY) examples/shapes/train_xl.py

adapters: $(STAMP) ## distil the shapes adapters again, and those that docs/results.md compares; half a day
	$(PY) examples/shapes/distil.py
	$(PY) examples/shapes/ablate.py

seeds: $(STAMP) ## train the adapter of 4 phases from two other seeds, and measure the three; an hour
	$(PY) examples/shapes/write_dataset.py outputs/shapes_data --count 8192
	for seed in 1 2; do \
		$(PY) lora_training/train.py --config examples/configs/shapes_pcm4.yaml --seed $$seed --output outputs/pcm_seed$$seed.safetensors || exit 1; \
	done
	$(PY) examples/shapes/measure_adapter.py examples/shapes/adapters/pcm_4phase.safetensors outputs/pcm_seed*.safetensors \
		--steps 2 4 8 --out docs/seeds_shapes.md

adapter_xl: $(STAMP) ## train the adapter of the shapes model of SDXL's shape again, from three seeds, and measure them
	$(PY) examples/shapes/write_dataset.py outputs/shapes_data --count 8192
	for seed in 0 1 2; do \
		$(PY) lora_training/train.py --config examples/configs/shapes_xl_pcm4.yaml --seed $$seed --output outputs/xl_seed$$seed.safetensors || exit 1; \
	done
	cp outputs/xl_seed0.safetensors examples/shapes/adapters/xl_pcm_4phase.safetensors
	$(PY) examples/shapes/measure_adapter.py outputs/xl_seed*.safetensors --model shapes-xl --out docs/seeds_shapes_xl.md

clean: ## remove what runs have written
	rm -rf outputs build dist *.egg-info
