# Everything is set up inside the checkout: .venv (Python, pip, zc.buildout), eggs, bin.

PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

# Settings of the caller's that would lead pip or Python out of the checkout.
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PIP_TARGET PIP_PREFIX
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The package itself is built, too, with the pinned setuptools.
export PIP_BUILD_CONSTRAINT := $(CURDIR)/.venv/constraints.txt

# What the environment was made of; scripts in bin/ contain the path of the checkout.
chosen := $(filter environment command% override,$(origin PYTHON))
python_id := $(if $(chosen),$(shell $(PYTHON) -c 'import sys; print(sys.version.split()[0] + " " + getattr(sys, "base_prefix", ""))' 2>/dev/null),$(shell sed -n 1p .venv/made-of 2>/dev/null))
made_of := $(shell cat .venv/made-of 2>/dev/null | tr '\n' '|')
ifneq ($(made_of),$(python_id)|$(CURDIR)|)
stale := yes
endif
debian_packages := chromium mariadb-server-core mariadb-client-core default-libmysqlclient-dev \
    etcd-server galera-4 gcc haproxy iproute2 iptables openssl patroni pgbouncer pkg-config prometheus python3-dev \
    python3-etcd
server_programs := chromium mariadbd mariadb-install-db my_print_defaults pgbouncer haproxy patroni \
    etcd ip iptables openssl prometheus promtool
has_server := (PATH="$$PATH:/usr/sbin"; for program in $(server_programs); do \
    command -v $$program || exit 1; done; ls /usr/lib*/galera*/libgalera_smm.so) >/dev/null 2>&1
compiles := command -v cc >/dev/null && \
    $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null
# mysqlclient has no wheels for Linux.
builds_mysqlclient := pkg-config --exists mysqlclient 2>/dev/null && $(compiles)
programs := bin/py bin/test bin/zreconnect bin/coverage bin/mypy bin/ruff
unbuilt := $(filter-out $(wildcard bin/*),$(programs))
tools := .venv/tools/bin

.PHONY: help demo test coverage lint docs package lowest changes tell services suites bench clean .FORCE

help:
	@echo 'make demo       import a source tree into a database that is interrupted meanwhile'
	@echo 'make test       run the tests; TESTS="-t word -vv" hands options to bin/test'
	@echo 'make coverage   run the tests and print which branches of the core they missed'
	@echo 'make lint       ruff check, ruff format --check and mypy --strict'
	@echo 'make docs       the site, in docs/_build/html; a warning, or a dead link within, is an error'
	@echo 'make package    sdist and wheel, in dist, from what git knows, and what checks them'
	@echo 'make lowest     the tests with the lowest versions that are stated, on each Python of 3.10 and 3.13'
	@echo '                that there is; LOWEST=quick takes some tests'
	@echo 'make changes    what the fragments in changes/ become at a release'
	@echo 'make services   install what the tests need beyond Python (Debian, as root)'
	@echo 'make suites     other projects'"'"' test suites, bare and through zreconnect (long; fetches them);'
	@echo '                SUITES="storm django" chooses'
	@echo 'make bench      what zreconnect and its peers cost, side by side (15 minutes; installs them);'
	@echo '                BENCH="transactions reading" chooses'
	@echo 'make clean      remove everything that make has made'
	@echo
	@echo 'Each sets up what it needs first, inside the checkout. It also leaves bin/py (a Python'
	@echo 'that can import zreconnect), bin/test, bin/zreconnect, bin/ruff, bin/mypy, bin/coverage.'
	@echo 'PYTHON=python3.12 make test   chooses an interpreter (3.10 or newer; default: python3)'
	@echo 'COVERAGE=1 make test          does what make coverage does'

demo: .venv/built
	$(strip bin/zreconnect demo $(DEMO))

# How long it takes, and what is skipped and why, before anything else.
tell:
	@test -e .venv/built || echo 'First, and once, some 170 packages are installed in the checkout: 1 to 5 minutes.'
	@echo '$(if $(TESTS),Tests of $(TESTS).,All tests: 20 minutes on two cores with TESTS=-j4, longer without. CONTRIBUTING.rst has a part that takes one.)'
	@missing=$$(PATH="$$PATH:/usr/sbin"; for program in $(server_programs); do \
	    command -v $$program >/dev/null || printf ' %s' $$program; done); \
	    test -z "$$missing" || echo "Skipped where there is no$$missing: make services"
	@$(builds_mysqlclient) || echo 'Skipped without mysqlclient, which cannot be built here: make services'
	@test "`id -u`" = 0 || echo 'Skipped because only root can: networks, file systems and servers of another user'
	@test "$$ZRECONNECT_SWEEP" = full || echo 'Skipped without ZRECONNECT_SWEEP=full: the whole of sweeps, of which a part is run'

ifdef COVERAGE
test: tell .venv/built
	@bin/coverage erase
	$(strip bin/coverage run bin/test $(TESTS))
	@bin/coverage combine --quiet
	bin/coverage report
else
test: tell .venv/built
	$(strip bin/test $(TESTS))
endif

coverage:
	@$(MAKE) --no-print-directory test COVERAGE=1

lint: .venv/built
	bin/ruff check
	bin/ruff format --check
	bin/mypy

docs: bin/sphinx-build
	bin/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env --write-all --jobs 2 \
	    docs docs/_build/html
	@echo 'The site is docs/_build/html/index.html'

bin/sphinx-build: .venv/built
	@echo 'Installing Sphinx with zc.buildout'
	@PYTHONWARNINGS='ignore:Module zc was already imported:UserWarning' \
	    .venv/bin/buildout install docs 2>&1 | sed '/^root: /d'
	@test -x $@ && touch $@

# setuptools is that of the tools: nothing is fetched for a build. It would also take what an earlier
# SOURCES.txt has. pyroma misses an address of the
# authors' and one of a project page.
package: .venv/tools/built
	rm -rf dist src/*.egg-info/SOURCES.txt
	$(tools)/check-manifest --no-build-isolation
	$(tools)/python -m build --no-isolation --outdir dist >.venv/tools/build.log 2>&1 || { cat .venv/tools/build.log; exit 1; }
	$(tools)/twine check --strict dist/*
	$(tools)/check-wheel-contents dist/*.whl
	$(tools)/pyroma --quiet --min 8 --file dist/*.tar.gz

lowest: package
	.ci/lowest $(LOWEST)

changes: .venv/tools/built
	$(tools)/towncrier build $(or $(CHANGES),--draft) \
	    --version `sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml`

.venv/tools/built: .venv/ready pyproject.toml
	@echo 'Installing what packages are made and checked with in .venv/tools'
	@test -x $(tools)/python || .venv/bin/python -m venv --without-pip .venv/tools
	@.venv/bin/python -m pip --python $(tools)/python install --quiet \
	    --constraint .venv/constraints.txt --group package setuptools wheel
	@touch .venv/tools/built

# chromium looks at reports. The next two packages have MariaDB's programs without the service; pgbouncer,
# haproxy, etcd-server and prometheus come with one, on ports of their own, that the tests leave alone.
# iproute2 and iptables make networks for root, openssl makes certificates. python3-etcd is for patroni. The
# others are for building mysqlclient, after which bin/ is to be made anew.
services:
	@if $(has_server) && $(builds_mysqlclient); then \
	    echo 'services: all that the tests need is installed.'; \
	elif ! command -v apt-get >/dev/null; then \
	    echo 'services: the tests need a MariaDB server with galera, pgbouncer, haproxy, patroni, etcd, Prometheus and Chromium, and as root' \
	        'ip and iptables; building' \
	        'mysqlclient needs a C compiler, pkg-config and the headers of Python and of a MySQL or MariaDB client.' \
	        'Only on Debian and Ubuntu this can install them; tests that miss one are skipped.' >&2; \
	    exit 1; \
	elif [ "$$(id -u)" != 0 ]; then \
	    echo 'services: only root can install packages. Have root run:' \
	        'apt-get install $(debian_packages)' >&2; \
	    exit 1; \
	else \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	        apt-get install --yes --no-install-recommends -qq $(debian_packages) && rm -f .venv/built; \
	fi

suites: .venv/built
	PYTHONPATH=. $(strip bin/py -m suites $(SUITES))

bench: .venv/built
	PYTHONPATH=. $(strip bin/py -m benchmarks $(BENCH))

clean:
	rm -rf .benchmarks .suites .venv bin develop-eggs eggs parts .installed.cfg build dist src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .coverage .coverage.* htmlcov docs/_build docs/manual
	find src benchmarks docs doctests suites -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The virtual environment, with the pinned versions of pip, zc.buildout and what buildout needs.
# coverage is there for the .pth file that starts it in child processes, ruff for its program.
.venv/ready: buildout.cfg $(if $(stale),.FORCE)
	@case '$(CURDIR)' in *[[:space:]]*) \
	    echo 'The path of the checkout contains a space, which scripts cannot start from: $(CURDIR)' >&2; \
	    exit 1;; esac
	@command -v $(PYTHON) >/dev/null || { \
	    echo 'There is no $(PYTHON). Install Python 3.10 or newer, or name one: PYTHON=python3.12 make test' >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "zreconnect needs Python 3.10 or newer; $(PYTHON) is `$(PYTHON) -c 'import sys; print(sys.version.split()[0])'`." \
	        'Name another: PYTHON=python3.12 make test' >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo '$(PYTHON) lacks venv or ensurepip. On Debian and Ubuntu: apt-get install python3-venv' >&2; \
	    exit 1; }
	@rm -f .venv/ready .venv/built
	$(if $(stale),@rm -rf .venv bin develop-eggs parts .installed.cfg)
	@echo 'Making the virtual environment .venv'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@sed -n '/^\[versions\]/,$$ s/^\([a-z0-9.-]*\) = /\1==/p' buildout.cfg > .venv/constraints.txt
	@echo 'Installing zc.buildout in it'
	@.venv/bin/python -m pip install --quiet --constraint .venv/constraints.txt \
	    coverage pip ruff setuptools wheel zc.buildout
	@.venv/bin/python -c 'import sys; print(sys.version.split()[0] + " " + sys.base_prefix)' > .venv/made-of
	@echo '$(CURDIR)' >> .venv/made-of
	@touch .venv/ready

# "root: ..." are the addresses that buildout reads. The warning is about buildout's own imports.
# Storm, which has no wheels, runs without its C extension, but does not build without a compiler:
# one that does nothing leaves the extension out.
.venv/built: .venv/ready setup.py pyproject.toml buildout.cfg $(if $(unbuilt),.FORCE)
	@echo 'Installing the eggs and bin/ with zc.buildout'
	@$(compiles) || export CC=true; \
	    PYTHONWARNINGS='ignore:Module zc was already imported:UserWarning' \
	    .venv/bin/buildout -U "buildout:mysql=`$(builds_mysqlclient) && echo ', mysql'`" 2>&1 \
	    | sed '/^root: /d'
	@for program in $(programs); do \
	    test -x $$program || { echo "buildout did not make $$program" >&2; exit 1; }; done
	@touch .venv/built
	@echo 'Ready: $(programs)'
