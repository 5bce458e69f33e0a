# The workbook's commands. Each sets up .venv first, once; Python 3.11 or newer and make are all it takes.
#   make ablate            train the first ablation at preset cpu, three seeds, and make its report
#   make ablate NAME=prediction_target PRESET=smoke SEEDS=1
#   make test              everything that must hold
#   make test-gpu          what must hold on a GPU
#   make bench-gpu         seconds and memory on a GPU, beside diffusers; leaves outputs/bench_gpu/
#   make lab               JupyterLab on the checkout, from nbs/index.ipynb on (ARGS=--no-browser)
#   make docs              README.md, and a site of all notebooks in _docs/
#   make clean-nbs         notebooks without counts and widgets, as git has them
#   make export            notebooks -> package, clean and linked notebooks

VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.prx-nb-installed

NAME   ?= prediction_target
PRESET ?= cpu
SEEDS  ?= 3
# two runs of one thread each go further on two cores than one run of two
JOBS   ?= 2
# tests side by side; many of them wait for processes of their own
WORKERS ?= 2
ARGS   ?=

.PHONY: help setup ablate test test-gpu bench-gpu lab docs export clean clean-nbs
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is needed; found '$(PYTHON)'. Name another: make setup PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON): about 100 packages, some minutes, only this once."
	@begin=$$(date +%s); \
	  { test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV); } \
	  && $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  && touch $(STAMP) \
	  && echo "$(VENV) is ready after $$(( $$(date +%s) - begin )) s."
	@$(BIN)/python -m prx_nb.lab.desk filter || echo "Notebooks are not cleaned on their way into git; make clean-nbs does it by hand."

ablate: $(STAMP)
	@$(BIN)/prx-nb ablate $(NAME) --preset $(PRESET) --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# one process: tests would fight for the card's memory
test-gpu: $(STAMP)
	@PRX_NB_TEST_GPU=1 $(BIN)/python -m pytest -p no:xdist -m gpu tests/gpu $(ARGS)

bench-gpu: $(STAMP)
	@mkdir -p outputs/bench_gpu && $(BIN)/python -m papermill nbs/benchmarks/gpu.ipynb outputs/bench_gpu/gpu.ipynb \
	  --cwd nbs/benchmarks -p out "$(CURDIR)/outputs/bench_gpu" $(ARGS)

lab: $(STAMP)
	@$(BIN)/python -m prx_nb.lab.desk $(ARGS)

docs: $(STAMP)
	@$(BIN)/python -m prx_nb.lab.docs $(ARGS)

clean-nbs: $(STAMP)
	@$(BIN)/python -m prx_nb.lab.desk clean

export: $(STAMP)
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python -m prx_nb.lab.docs links && echo "The package is in step with the notebooks."

clean:
	@rm -rf _docs _proc build dist .pytest_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Removed what can be built again; $(VENV) and outputs/ stay."
