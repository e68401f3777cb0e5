# `make demo` and `make test` set up all that they need, in .venv beside this file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the extra `ffcv` and the compiled kernels and decoder are built with, and what opens the report, on Debian.
PACKAGES := libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ chromium chromium-driver
EXTRAS := ffcv dali export detection

.PHONY: install demo docs test lint clean packages extras

# One marker file per set of extras, older than pyproject.toml when that changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

# Root installs what is missing. Anyone else is told, and the tests that need it are skipped with the reason.
packages:
	@headers=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h; \
	missing=$$(for name in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}\n' $$name 2>/dev/null | grep -qx installed || echo $$name; done; \
		test -f $$headers || echo python3-dev); \
	missing=$$(echo $$missing); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $$missing >/dev/null && exit 0; fi; \
	echo "note: these Debian packages are missing, so some tests are skipped: $$missing"; \
	echo "note: as root: apt-get install --no-install-recommends $$missing"

extras: packages $(VENV)/.installed-dev
	@for extra in $(EXTRAS); do \
		if [ $(VENV)/.installed-$$extra -nt pyproject.toml ]; then continue; fi; \
		echo "$(BIN)/python -m pip install '.[$$extra]'"; \
		if $(BIN)/python -m pip install --quiet --editable ".[$$extra]"; then touch $(VENV)/.installed-$$extra; \
		else echo "note: the extra $$extra does not install, so its tests are skipped"; fi; done

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# The site is in build/site. mkdocs-material announces mkdocs 2 at each build unless the variable is set.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint extras
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist
