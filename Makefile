# Everything goes through `.venv`, which is made at the first need and kept until
# pyproject.toml or constraints.txt change. Works with GNU make 3.81 (macOS) and newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
BENCH := .bench-venv
BENCH_READY := $(BENCH)/.installed
SURVEY := .survey-venv
SURVEY_READY := $(SURVEY)/.installed
SITE := _build/html
PDF := _build/weighing-adam.pdf
PDF_PAGE := _build/singlehtml/book/intro.html
JOBS ?= 2
RELEASE ?= file://$(CURDIR)/dist
SITE_ADDRESS ?= file://$(CURDIR)/$(SITE)

unexport IN_TEST           # under it, nbdev exports nothing and says nothing

.PHONY: help install test test-slow export run-notebooks check-notebooks records tables verify book linkcheck probe dist launch release pdf bench bench-loops bench-steps bench-qrnn bench-cache cases bench-decode bench-epochs samples counterexamples survey clean bench-loss
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(READY): pyproject.toml constraints.txt | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e ".[dev]"
	@touch $@

install: $(READY)  ## make .venv, with everything that is needed

test: $(READY)  ## re-run all notebooks, compare their outputs, run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(READY)  ## the tasks on a GPU that is not there, every Triton kernel compiled, processes that are killed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/slow $(ARGS)

export: $(READY)  ## write nbutils/ from the notebooks
	$(BIN)/nbdev-export
	@rm -f nbutils/_modidx.py

run-notebooks: export  ## export, then run all notebooks in order and store their outputs
	$(BIN)/python tools/nb.py run

check-notebooks: $(READY)  ## check what the notebooks store, without running them
	$(BIN)/python tools/nb.py check

records: $(READY)  ## write the pages of runs, speed and status
	$(BIN)/python tools/records_page.py
	$(BIN)/python tools/speed_page.py
	$(BIN)/python tools/status_page.py

tables: $(READY)  ## bring the tables of README, introduction and parts up to the records
	$(BIN)/python tools/readme_tables.py

verify: $(READY)  ## check every record, and every table cell against the records
	$(BIN)/python tools/verify_records.py $(ARGS)
	$(BIN)/python tools/readme_tables.py --check

book: export verify records  ## build the book; warnings are errors
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@mkdir -p book/records; rm -rf $(SITE)/records
	cp -RP book/records $(SITE)/records        # -P: a link stays a link, and the last line refuses it
	$(BIN)/python tools/check_site.py $(SITE)
	$(BIN)/python tools/verify_records.py --site $(SITE)
	@echo
	@echo "The book: file://$(CURDIR)/$(SITE)/index.html"

linkcheck: $(READY) records  ## ask every address that the pages name (needs the network)
	$(BIN)/jupyter-book build . --all --builder linkcheck

probe: $(READY)  ## ask the addresses of the data sets, without fetching them
	$(BIN)/python tools/probe_addresses.py $(ARGS)

dist: $(READY)  ## build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/uv build --out-dir dist .

launch: $(READY)  ## copies of the chapters for Colab and Kaggle into dist/launch/, beside the wheel
	$(BIN)/uv build --quiet --wheel --out-dir dist .
	$(BIN)/python tools/launch.py --release "$(RELEASE)" --site "$(SITE_ADDRESS)" --out dist

release: book dist  ## dist/ with wheel, source archive and the zipped site, for TAG=v0.1.0
	@version=$$($(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])'); \
	  test "$(TAG)" = "v$$version" || { echo "TAG is '$(TAG)', and pyproject.toml says v$$version"; exit 1; }
	$(BIN)/python -c 'import shutil; shutil.make_archive("dist/weighing-adam-site", "zip", "$(SITE)")'

pdf: $(READY)  ## the book as one PDF, built after the site; needs Chromium
	$(BIN)/python tools/pdf.py --check $(PDF_PAGE) $(PDF)
	$(MAKE) book
	$(BIN)/jupyter-book build . --builder singlehtml -n --keep-going
	$(BIN)/python tools/pdf.py $(PDF_PAGE) $(PDF)
	@echo "The book: $(CURDIR)/$(PDF)"

$(BENCH_READY): bench/requirements.txt constraints.txt pyproject.toml | $(BIN)/uv
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BIN)/uv pip install --python $(BENCH)/bin/python -c constraints.txt \
	  -r bench/requirements.txt -e .
	@touch $@

bench: bench-loops bench-steps bench-qrnn bench-loss bench-cache bench-epochs bench-decode  ## all seven benchmarks: a record each

bench-loops: $(BENCH_READY)  ## our loop against others (installs them in .bench-venv)
	$(BENCH)/bin/python bench/bench.py $(ARGS)

bench-steps: $(READY)  ## our optimizers' steps, by each engine, against torch's
	$(BIN)/python bench/steps.py $(ARGS)

bench-qrnn: $(READY)  ## the QRNN's recurrence as a loop, a scan and a kernel
	$(BIN)/python bench/qrnn.py $(ARGS)

bench-loss: $(READY)  ## the token loss by each way, and layers with padded sizes
	$(BIN)/python bench/loss.py $(ARGS)

bench-cache: $(READY)  ## the cache in blocks against a loop over tokens
	$(BIN)/python bench/cache.py $(ARGS)

cases: $(READY)  ## pictures of cars that a row gets right and wrong, for the book
	$(BIN)/python bench/cases.py $(ARGS)

bench-decode: $(READY)  ## pictures of files to one tensor, with one worker and two
	$(BIN)/python bench/decode.py $(ARGS)

bench-epochs: $(READY)  ## epochs of the larger models, one run and several at once
	$(BIN)/python bench/epochs.py $(ARGS)

samples: $(READY)  ## train a language model and keep what it says: a record
	$(BIN)/python bench/samples.py $(ARGS)

counterexamples: $(READY)  ## run chapter 4's long simulations again: a record
	$(BIN)/python bench/counterexamples.py $(ARGS)

$(SURVEY_READY): bench/survey-requirements.txt constraints.txt pyproject.toml | $(BIN)/uv
	test -x $(SURVEY)/bin/python || $(PYTHON) -m venv $(SURVEY)
	$(BIN)/uv pip install --python $(SURVEY)/bin/python -c constraints.txt \
	  -r bench/survey-requirements.txt -e .
	@touch $@

survey: $(SURVEY_READY)  ## whose conventions do other libraries' optimizers follow? a record
	$(SURVEY)/bin/python bench/survey.py $(ARGS)

clean:  ## remove what was built; environments and data stay
	rm -rf _build build dist .pytest_cache book/runs.md book/speed.md book/status.md
	find nbs nbutils tests tools bench book -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
