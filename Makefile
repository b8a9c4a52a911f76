# make demo   set up .venv and run the whole sequence on synthetic people
# make test   set up .venv and run lint and tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint setup setup-synthetic clean

demo: setup-synthetic
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

test: setup-synthetic lint
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.base
setup-synthetic: $(VENV)/.synthetic

$(VENV)/.base: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@$(BIN)/python -c "import cv2" || { echo "OpenCV misses a system library: apt-get install libgl1 libglib2.0-0"; \
	  apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && $(BIN)/python -c "import cv2"; }
	@touch $@

$(VENV)/.synthetic: requirements-synthetic.txt $(VENV)/.base
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements-synthetic.txt
	@touch $@

clean:
	rm -rf $(VENV) data runs
