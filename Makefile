# Two commands: `make demo` trains a model and asks it about an image, `make test` runs every check without a GPU.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/train
	$(BIN)/python examples/finetune.py --output runs/digits --overwrite
	$(BIN)/python examples/classify.py runs/digits/best runs/digits/samples/*.png

test: .venv/dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

.venv/train .venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(notdir $@)]"
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
