# make demo   set up .venv and run the whole sequence on synthetic people
# make test   set up .venv and run lint, types and tests
# make fast   lint and the tests that take no time (about a minute)
# make docs   build the manual into site/
# make runtimes  exported models in an old onnxruntime, OpenCV 4, OpenVINO and insightface, an environment each
# make gpu    every figure that asks for a GPU, in ten minutes
#
# PYTHON=python3.12    another interpreter
# ENV=current          no .venv: the packages of PYTHON as they are (an environment that has torch already)
VENV := .venv
ifeq ($(ENV),current)
PYTHON ?= $(shell command -v python || command -v python3)
BIN := $(shell $(PYTHON) -c "import sys, pathlib; print(pathlib.Path(sys.executable).parent)")
RUN := $(shell $(PYTHON) -c "import sys; print(sys.executable)")
else
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
RUN := $(BIN)/python
endif
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test fast lint types runtimes gpu docs setup setup-synthetic clean

demo: setup-synthetic
	PATH="$(abspath $(BIN)):$$PATH" bash demo.sh

test: setup-synthetic lint types
	$(RUN) -m pytest -n 2

fast: setup-synthetic lint
	$(RUN) -m pytest -n 2 -m "not slow"

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup-synthetic
	$(RUN) -m mypy

# What people run exported models with and this environment cannot hold, each with the packages that it wants.
RUNTIMES := $(VENV)/runtimes
runtimes: setup $(RUNTIMES)/onnxruntime-1.16 $(RUNTIMES)/opencv-4 $(RUNTIMES)/openvino $(RUNTIMES)/insightface
	RUNTIMES="$(abspath $(RUNTIMES))" $(RUN) -m pytest -n 0 tests/test_other_runtimes.py

$(RUNTIMES)/onnxruntime-1.16: PACKAGES := "onnxruntime==1.16.3" "numpy<2"
$(RUNTIMES)/opencv-4: PACKAGES := "opencv-python-headless<5"
$(RUNTIMES)/openvino: PACKAGES := openvino
$(RUNTIMES)/insightface: PACKAGES := insightface onnxruntime
$(RUNTIMES)/%:
	$(PYTHON) -m venv $@.tmp
	$@.tmp/bin/python -m pip install --disable-pip-version-check --quiet $(PACKAGES)
	mv $@.tmp $@

# Figures of a GPU, in ten minutes (benchmarks/on_gpu.sh).
gpu: setup-synthetic
	PYTHON="$(abspath $(RUN))" bash benchmarks/on_gpu.sh

docs: setup
	$(RUN) -m mkdocs --version >/dev/null 2>&1 || $(PIP) -r requirements-docs.txt
	$(RUN) -m mkdocs build --strict

ifeq ($(ENV),current)
setup:
	@$(RUN) -c "import torch, torchvision, cv2, scipy, numba, onnx, onnxruntime, tensorboard, tqdm, matplotlib" || { \
	  echo "ENV=current: $(RUN) misses what is named above; pip install -r requirements.txt -c constraints.txt"; exit 1; }
setup-synthetic: setup
	@$(RUN) -c "import anny, warp" || { \
	  echo "ENV=current: $(RUN) misses what is named above; pip install -r requirements-synthetic.txt"; exit 1; }
else
setup: $(VENV)/.base
setup-synthetic: $(VENV)/.synthetic
endif

# OpenCV's wheel wants libGL of the system; where it is missing, the headless wheel does all that is needed here.
$(VENV)/.base: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-dev.txt
	@$(BIN)/python -c "import cv2" || { \
	  echo "OpenCV misses the system library named above (Debian, Ubuntu: apt-get install libgl1 libglib2.0-0);"; \
	  echo "taking the wheel without windows instead: opencv-python-headless"; \
	  $(BIN)/pip uninstall --quiet --yes opencv-python && $(PIP) opencv-python-headless && \
	  $(BIN)/python -c "import cv2"; }
	@touch $@

$(VENV)/.synthetic: requirements-synthetic.txt $(VENV)/.base
	$(PIP) -r requirements-synthetic.txt
	@touch $@

clean:
	rm -rf $(VENV) data runs site
