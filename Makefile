# make demo       train a small CLIP on the embedded data set through the DeepSpeed launcher, and leave a report
# make test       the fast tests (<= 15 minutes on 2 cores from nothing)
# make test-all   all tests: also the long ones and those beside other packages (make test-long)
# make lint       ruff and mypy
# make docs       the documents as a site, into build/site
# make bench      measures the CPU part (<= 15 minutes on 2 cores): rows and plots in $(BENCH_OUT); those of a whole run
#                 go to benchmarks/results/ and the tables in docs/
# make lab        for a GPU at hand for minutes: builds, tests, measures what matters most first, into $(LAB_OUT)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
DEMO_DATA ?= data/demo
DEMO_RUN ?= runs/demo
DEMO_MINUTES ?= 5
LAB_OUT ?= build/lab
LAB_SECONDS ?= 540
TEST_WORKERS ?= 2
BENCH_OUT ?= build/bench
BENCH_SECONDS ?= 820

export TORCH_EXTENSIONS_DIR := $(CURDIR)/build/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

PIP = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-long test-all lint docs bench lab build env clean

env: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/cpu/*)
	@command -v $(PYTHON) >/dev/null || { echo "python >= 3.10 is missing: apt-get install python3 python3-venv"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is missing: apt-get install g++"; exit 1; }
	@command -v git >/dev/null || { echo "git is missing: apt-get install git"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python >= 3.10 is needed: set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel ninja triton
	@$(PIP) --no-build-isolation -e '.[train,eval,data,search,dev,docs]'
	@touch $@

# What tests compare with and drop in to. Some ask for a torchvision, and no build of that belongs to the pinned torch: see
# tests/peers.py.
$(PEERS): $(STAMP)
	@$(PIP) --no-deps torchvision timm open_clip_torch clip_benchmark
	@$(PIP) ftfy regex huggingface_hub transformers sentence-transformers accelerate lightning webdataset pandas torchao
	@touch $@

build: $(STAMP)
	$(BIN)/fastclip build

# Training on the embedded data set: every GPU where there are some, else two processes on the CPU. A second call goes on
# where the first ended: to more minutes, or at once to the evaluation.
demo: $(STAMP)
	@$(BIN)/fastclip data demo $(DEMO_DATA)
	@$(BIN)/python -m fastclip.training.launch --recipe demo --data '$(DEMO_DATA)' --minutes $(DEMO_MINUTES) --out $(DEMO_RUN) --resume latest $(DEMO_ARGS)
	@$(BIN)/fastclip search "a red circle above a blue square" --checkpoint $(DEMO_RUN) --data $(DEMO_DATA)

# OpenMP's threads wait asleep: spinning, those of one worker keep the other's from the cores.
SIDE_BY_SIDE = OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

test: $(STAMP)
	@$(SIDE_BY_SIDE) -m "not long and not peer"

test-long: $(STAMP) $(PEERS)
	@$(SIDE_BY_SIDE) -m "(long or peer) and not alone"
	@$(BIN)/python -m pytest -m alone

test-all: test test-long

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(STAMP)
	@$(BIN)/mkdocs build --strict -q
	@echo build/site/index.html

# No problem begins after the seconds, and the longest takes some two minutes. The quick rows are compared with themselves:
# they are what is to be recorded.
bench: $(STAMP) $(PEERS)
	@rm -f $(BENCH_OUT)/cpu.csv $(BENCH_OUT)/quick.csv
	@$(BIN)/python -m benchmarks --device cpu --out $(BENCH_OUT)/cpu.csv --time-budget $(BENCH_SECONDS) --refine --seconds 0.5
	@$(BIN)/python -m benchmarks --device cpu --quick --out $(BENCH_OUT)/quick.csv --recorded $(BENCH_OUT)/quick.csv
	@$(BIN)/python -m benchmarks.plot $(BENCH_OUT)/cpu.csv
	@$(BIN)/python -m benchmarks.record $(BENCH_OUT)

# With the interpreter that is there, no environment and no network: see benchmarks/lab.py.
lab:
	@$(PYTHON) -m benchmarks.lab --out $(LAB_OUT) --time-budget $(LAB_SECONDS)

clean:
	rm -rf $(VENV) build dist *.egg-info fastclip/*.so
