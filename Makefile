# `make demo`, which is `karat quickstart`, and `make test` set up all that they need, in .venv beside this file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the extra `ffcv` and the compiled kernels and decoder are built with, and what opens the report, on Debian.
PACKAGES := libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ chromium chromium-driver nginx-light
EXTRAS := ffcv dali export detection parquet remote corruptions demo wandb mlflow trackio mlflow-server
# Test processes, one more than cores, as a test often waits; each needs up to 3 GB.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n + 1 : 8)))
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)
# uv takes a fifth of pip's time. It reads none of pip's settings, so it gets them. Where it fails, pip installs.
SETTINGS = $(BIN)/python -m pip config list 2>/dev/null | sort -r | sed -E -n "s/\\\\n/,/g; s/'//g; s/^[^=]*\.//; \
	s/^index-url=/UV_DEFAULT_INDEX=/p; s/^extra-index-url=/UV_INDEX=/p; s/^find-links=/UV_FIND_LINKS=/p; \
	s/^constraint=/UV_CONSTRAINT=/p; s/^cert=/SSL_CERT_FILE=/p; s/^trusted-host=/UV_INSECURE_HOST=/p"
INSTALL = with() { { test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --progress-bar off uv; } && \
	env UV_SYSTEM_CERTS=1 $$($(SETTINGS)) $(BIN)/uv pip install --python $(BIN)/python "$$@" || \
	$(BIN)/python -m pip install --progress-bar off "$$@"; }; with --editable
# The tests start hundreds of processes: each would compile all that it imports where this is set.
unexport PYTHONDONTWRITEBYTECODE
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: install hooks demo docs docs-version test test-full test-turn test-aarch64 cross faults coverage lint release clean packages extras

$(BIN)/python:
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # a part of one would count as whole

# One marker file per set of extras, older than pyproject.toml when that changes.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing the project and torch into $(VENV)"
	@$(INSTALL) .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== installing what the tests need"
	@$(INSTALL) '.[dev]'
	touch $@

install: $(VENV)/.installed

# From now on, `git commit` first runs the checks of .pre-commit-config.yaml.
hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

# Root installs what is missing. Anyone else is told, and the tests that need it are skipped with the reason.
packages:
	@headers=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h; \
	missing=$$(for name in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}\n' $$name 2>/dev/null | grep -qx installed || echo $$name; done; \
		test -f $$headers || echo python3-dev; \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv); \
	missing=$$(echo $$missing); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "== installing the Debian packages $$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -q --no-install-recommends $$missing && exit 0; fi; \
	echo "note: these Debian packages are missing, so some tests are skipped: $$missing"; \
	echo "note: as root: apt-get install --no-install-recommends $$missing"

# Root on Debian installs what builds for aarch64.
cross:
	dpkg --add-architecture arm64 && apt-get update -q && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -q --no-install-recommends g++-aarch64-linux-gnu libjpeg62-turbo-dev:arm64

# Builds the native libraries for aarch64 and runs them in an emulator. CI runs it.
test-aarch64: extras cross
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends qemu-user
	$(BIN)/python -m pytest --slow=all tests/data/decoders/test_aarch64.py tests/attention/kernels/test_aarch64.py

# All at once, which takes the least time; one by one where that fails, so that one alone is missing.
extras: packages $(BIN)/python
	@left=$$(for extra in dev $(EXTRAS); do [ $(VENV)/.installed-$$extra -nt pyproject.toml ] || echo $$extra; done); \
	if [ -z "$$left" ]; then exit 0; fi; \
	together=$$(echo $$left | tr ' ' ,); \
	echo "== installing .[$$together] into $(VENV)"; \
	if $(INSTALL) ".[$$together]"; then \
		touch $(VENV)/.installed; \
		for extra in $$left; do touch $(VENV)/.installed-$$extra; done; exit 0; fi; \
	$(MAKE) install && for extra in $$left; do \
		echo "== installing .[$$extra] into $(VENV)"; \
		if $(INSTALL) ".[$$extra]"; then touch $(VENV)/.installed-$$extra; \
		else echo "note: the extra $$extra does not install, so its tests are skipped"; fi; done

demo: $(VENV)/.installed
	@echo "== to type karat yourself: . $(BIN)/activate"
	$(BIN)/karat quickstart

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(INSTALL) '.[docs]'
	touch $@

# The site is in build/site. mkdocs-material announces mkdocs 2 at each build unless the variable is set.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Adds the pages of this version to the branch gh-pages, which `git push` publishes.
docs-version: $(VENV)/.installed-docs
	version=$$($(BIN)/python -c 'import karat_scale; print(karat_scale.__version__.rpartition(".")[0])') && \
		PATH=$(CURDIR)/$(BIN):$$PATH DOCS_VERSIONS=mike NO_MKDOCS_2_WARNING=1 mike deploy --update-aliases $$version latest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# What a newcomer waits for, all tests, and CI's share of the slow ones: tests/conftest.py has the rule.
test: extras lint
	$(PYTEST)

test-full: extras lint
	$(PYTEST) --slow=all

test-turn: extras
	$(PYTEST) --turn=$(TURN)

# Hours: all that docs/reliability.md counts. build/faults has what was tried. Another SEED tries other faults.
SEED ?= 0
faults: extras
	$(PYTEST) tests/faults --slow=all --faults=all --seed=$(SEED) --timeout=0

# For one package: make coverage PYTEST_ARGS=tests/recipe. The pages of the lines that no test ran are in build/coverage.
coverage: extras
	$(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage

# Builds the sdist, and from it a wheel for each kind of machine with the compiled libraries inside. Trains with the
# wheel alone in a new environment where no compiler is on PATH, and which may write to no file at home but caches.
MACHINES := x86_64 aarch64
release: $(VENV)/.installed-dev packages cross
	rm -rf dist build/release
	$(BIN)/python -m build --sdist
	for machine in $(MACHINES); do KARAT_WHEEL=$$machine $(BIN)/python -m pip wheel --no-cache-dir --no-deps \
		--wheel-dir build/release dist/*.tar.gz || exit 1; done
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/release/*.whl
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m zipfile -l dist/*_aarch64.whl | grep attention-neon.so
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/python -m pip install dist/*_$$(uname -m).whl
	cd build/release && mkdir home && alone="env -i HOME=$$PWD/home PATH=$$PWD/venv/bin karat" && \
		$$alone doctor > doctor.txt; cat doctor.txt && \
		grep -q 'attention auto: uses cpu' doctor.txt && grep -q 'decoder auto: uses native' doctor.txt && \
		grep -q 'C++ compiler: not needed' doctor.txt && \
		$$alone train fashion_mnist_demo data.backend=synthetic data.synthetic_samples=256 train.global_batch=32 \
			run.dir=run && test -z "$$(find home -type f -not -path 'home/.cache/*')"
	@echo "== dist/ holds $$(cd dist && echo *); upload it with: $(BIN)/twine upload dist/*"

clean:
	rm -rf $(VENV) build dist
