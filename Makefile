# make setup | demo [CHECK=1] [DATA=DIR] [INDEX=milvus|pgvector] | test | lint | lab | bench | peers | soak
#
# Each command does the set-up that it needs: everything goes into .venv, once for each state of constraints.txt and
# pyproject.toml. `make demo` needs neither root nor Debian packages nor the tools of development.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint packages wheel lab lab-smoke bench peers soak

# What the tests need beyond Python: a browser for the page, a font for the browser, Java for Spark, and Redis.
DEBIAN_PACKAGES ?= chromium fonts-dejavu-core openjdk-17-jre-headless redis-server

REAL_DATA := $(or $(TWOTOWER_DATA),../shared/data)

PYTHON := $(shell for python in python3.11 python3; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)
BIN := .venv/bin
STATE := $(shell cat constraints.txt pyproject.toml | cksum | tr ' ' -)
BASE := .venv/.stamp-base-$(STATE)
DEV := .venv/.stamp-dev-$(STATE)
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help:
	@sed -n '1s/^# //p' Makefile

setup: $(DEV)

# A killed pip can leave half a package behind that it later takes for a whole one: .venv/.installing says that this may
# have happened, and the environment is then made anew. torch goes first: together with the rest, pip would rather
# resolve to gigabytes of CUDA packages.
$(BASE):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and neither python3.11 nor python3 is one: \
	install it, or name it with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if [ -e .venv/.installing ]; then echo "an earlier set-up was interrupted: starting anew" >&2; rm -rf .venv; fi
	@echo "set-up: torch and the other dependencies into .venv, a minute or two the first time" >&2
	@$(PYTHON) -m venv .venv
	@rm -f .venv/.stamp-*
	@touch .venv/.installing
	@$(BIN)/python $(INSTALL) torch setuptools
	@$(BIN)/python $(INSTALL) --no-build-isolation --editable .
	@rm .venv/.installing
	@touch $@

$(DEV): $(BASE)
	@echo "set-up: the tools of development into .venv" >&2
	@touch .venv/.installing
	@$(BIN)/python $(INSTALL) --no-build-isolation --editable '.[als,databases,dev,kafka,lab,milvus,pgvector,plots,redis,spark,swing,tune]'
	@rm .venv/.installing
	@touch $@

# The server of a vector database, and its client.
$(if $(filter-out milvus pgvector,$(INDEX)),$(error INDEX=$(INDEX), where milvus or pgvector is expected))

.venv/.stamp-milvus-$(STATE) .venv/.stamp-pgvector-$(STATE): .venv/.stamp-%-$(STATE): $(BASE)
	@echo "set-up: a server of $* and its client into .venv" >&2
	@touch .venv/.installing
	@$(BIN)/python $(INSTALL) --no-build-isolation --editable '.[databases,$*]'
	@rm .venv/.installing
	@touch $@

demo: $(BASE) $(if $(INDEX),.venv/.stamp-$(INDEX)-$(STATE))
	$(BIN)/twotower demo$(if $(INDEX), --index $(INDEX))$(if $(DATA), --data '$(DATA)')$(if $(filter 1,$(CHECK)), --check)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What runs on one core runs beside something else: the tests take two.
test: packages $(DEV)
	@$(MAKE) --no-print-directory lint & lint=$$!; $(MAKE) --no-print-directory wheel && wait $$lint
	$(BIN)/pytest -n 2 --dist worksteal -r fEsX --durations=20

packages:
	@missing=; for package in $(DEBIAN_PACKAGES); do \
		[ "$$(dpkg-query --show --showformat='$${db:Status-Status}' $$package 2>/dev/null)" = installed ] \
			|| missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing the Debian packages that tests need:$$missing" >&2; \
		apt-get -qq update; \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $$missing >/dev/null; \
	else \
		echo "some tests need Debian packages that are missing; type: sudo apt-get install$$missing" >&2; \
	fi

# The wheel must stand on its own: every module imports, and the command starts, with nothing but what it declares. That
# pip finds all of it shows each set-up.
wheel: $(DEV)
	@rm -rf dist
	@echo "building the sdist, and the wheel out of it" >&2
	@$(BIN)/python -m build --quiet --no-isolation
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python tests/clean_environment.py dist/*.whl "$$folder"; \
	"$$folder/bin/python" -I tests/installed.py; \
	"$$folder/bin/twotower" --help >/dev/null; \
	echo "the wheel works with what it declares" >&2

# Other libraries, each in an environment of its own, to be compared with.
peers: .peers/tfrs/.stamp .peers/torch_rechub/.stamp

.peers/%/.stamp: benchmarks/peers/%.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@echo "$* into .peers/$*, a minute or two" >&2
	@rm -rf .peers/$*
	@$(PYTHON) -m venv .peers/$*
	@if grep -q '^torch==' $<; then .peers/$*/bin/python -m pip install --quiet "$$(grep '^torch==' $<)"; fi
	@.peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# Every experiment of docs/lab.md; interrupted, it goes on where it was.
lab: $(DEV)
	$(BIN)/twotower lab run all $(if $(wildcard $(REAL_DATA)),--data '$(REAL_DATA)') --out $(or $(OUT),lab)

# All of them on tiny worlds, in a minute or two: that they run. The tests run one of each kind.
lab-smoke: $(DEV)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/twotower lab run all --smoke --jobs 2 --out "$$folder" >/dev/null

bench: $(DEV) peers
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/index.py --out benchmarks/results/index.json
	$(BIN)/python benchmarks/databases.py --out benchmarks/results/databases.json
	$(BIN)/python benchmarks/samples.py --out benchmarks/results/samples.json
	$(BIN)/python benchmarks/engines.py --out benchmarks/results/engines.json
	$(BIN)/python benchmarks/serve.py --out benchmarks/results/serve.json
	$(BIN)/python benchmarks/freshness.py --out benchmarks/results/freshness.json
	$(BIN)/python benchmarks/freshness.py --rates 100 --index faiss pgvector milvus \
		--out benchmarks/results/freshness_databases.json
	$(BIN)/python benchmarks/stream.py --out benchmarks/results/stream.json
	$(BIN)/python benchmarks/deltas.py --out benchmarks/results/deltas.json
	$(BIN)/python benchmarks/quality.py --data '$(REAL_DATA)' --out benchmarks/results/quality.json
	$(BIN)/python benchmarks/speed.py --data '$(REAL_DATA)/ml-1m' --out benchmarks/results/speed.json
	$(BIN)/python benchmarks/scaling.py --out benchmarks/results/scaling.json
	$(BIN)/python benchmarks/fusion.py --data '$(REAL_DATA)' --out benchmarks/results/fusion.json
	$(BIN)/python benchmarks/early_fusion.py --out benchmarks/results/early_fusion.json
	$(BIN)/python benchmarks/neighbours.py --data '$(REAL_DATA)' --out benchmarks/results/neighbours.json
	$(BIN)/python benchmarks/world.py --data '$(REAL_DATA)' --out benchmarks/results/world.json

soak: $(DEV)
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/soak/event_log.py --kills 500 | tee benchmarks/results/soak_event_log.json
	$(BIN)/python benchmarks/soak/join.py --kills 500 | tee benchmarks/results/soak_join.json
	$(BIN)/python benchmarks/soak/train.py --kills 50 | tee benchmarks/results/soak_train.json
	$(BIN)/python benchmarks/soak/publish.py --kills 50 | tee benchmarks/results/soak_publish.json
	$(BIN)/python benchmarks/soak/update.py --part incremental --kills 500 | tee benchmarks/results/soak_incremental.json
	$(BIN)/python benchmarks/soak/update.py --part full --kills 200 | tee benchmarks/results/soak_full.json
	$(BIN)/python benchmarks/soak/update.py --part line --kills 500 | tee benchmarks/results/soak_line.json
	$(BIN)/python benchmarks/soak/promote.py --seconds 60 --promotions 10 | tee benchmarks/results/soak_promote.json
	$(BIN)/python benchmarks/soak/database.py | tee benchmarks/results/soak_database.json
	$(BIN)/python benchmarks/soak/spark.py --data '$(REAL_DATA)/ml-1m' | tee benchmarks/results/soak_spark.json
	@$(MAKE) --no-print-directory lab-smoke
