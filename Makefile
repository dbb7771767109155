# Everything starts here. `make train` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
# the build that this project is tested with; for Volta (p3), which it has no kernels for: torch==2.10.0 torchvision==0.25.0
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin
NBCONVERT := ../../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN

.PHONY: FORCE help setup train lab tensorboard test test-fast gpu faults typecheck proofs export readme sync clean

help:  # this list
	@awk -F ':.*  # ' '/^[a-z-]+:.*  # / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: .venv/done  # install everything into .venv; every other target does it first

# another build of torch that is asked for is installed, whatever is there
.venv/done: settings.ini setup.py pyproject.toml $(if $(filter file,$(origin TORCH)),,FORCE)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; use make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) -e '.[dev]'
	touch $@

GIVEN := hw recipe name data_dir seed numerics nodes rdzv overrides
SAID = $(foreach v,$(GIVEN),$(if $($(v)),$(v)))
UNKNOWN = $(strip $(foreach v,$(filter-out $(GIVEN) PYTHON TORCH,$(.VARIABLES)),$(if $(findstring command line,$(origin $(v))),$(v))))
# make train hw=cpu2 recipe=imagenette name=first data_dir=/pictures seed=1 numerics=close overrides='{epochs: 2}'
train: setup  # train, into runs/NAME; hw= recipe= name= data_dir= seed= numerics= nodes= rdzv= overrides= say what and where
	$(if $(UNKNOWN),$(error make train does not know $(UNKNOWN:%=%=); it takes $(GIVEN:%=%=), fields of a recipe go into overrides='{epochs: 2}'))
	$(BIN)/resnet-nb train $(foreach v,$(SAID),$(if $(filter seed nodes overrides,$(v)),-p,-r) $(v) '$($(v))')

lab: setup  # open the notebooks in JupyterLab
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/train.ipynb

# TensorBoard calls a run by the path of its folder: links have the names of the runs
tensorboard: setup  # show the curves of all runs side by side
	links=$$(mktemp -d); trap 'kill $$!; rm -rf "$$links"' EXIT; trap 'exit 130' INT TERM; \
	while :; do for run in runs/*/tensorboard; do \
	  link="$$links/$$(basename "$${run%/tensorboard}")"; [ -e "$$link" ] || [ ! -d "$$run" ] || ln -s "$$PWD/$$run" "$$link"; \
	done; sleep 5; done & $(BIN)/tensorboard --logdir "$$links"

# one thread each: threads of two that share a core wait for each other; tests often wait, so that three of them keep two cores busy
test: export OMP_NUM_THREADS = 1
test: setup  # every notebook from top to bottom, types, style, then all tests
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && TMPDIR="$$folder" $(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/mypy
	$(BIN)/ruff check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder  # a file of tests each, the slow ones first (tests/conftest.py)

# make test-fast nb=nbs/data/06_sampler.ipynb; without nb, all notebooks that differ from the last commit
test-fast: setup  # the notebooks that were changed, then the quick tests
	for notebook in $(or $(nb),$$(git diff --name-only HEAD -- 'nbs/*.ipynb')); do $(BIN)/nbdev_test --path $$notebook --do_print || exit 1; done
	$(BIN)/python -m pytest $(addprefix tests/test_,repository.py sampler.py stream.py proofs.py damaged_data.py)

# make gpu IMAGENETTE_DIR=/folder TIMM_TRAIN=/timm's/train.py; without pictures, loops alone; then bench_gpu.ipynb and README show the new record
gpu: setup  # on one NVIDIA GPU: its tests, then speed, into nbs/proofs/gpu.json; elsewhere nothing
	$(BIN)/python tests/gpu/bench.py nbs/proofs/gpu.json $(IMAGENETTE_DIR) $(TIMM_TRAIN)

# what was seen goes into the record that nbs/proofs/reliability.ipynb shows
faults: export OMP_NUM_THREADS = 1
faults: setup  # every fault that a run must survive, and the page of them
	rm -f nbs/proofs/faults.jsonl
	RESNET_NB_FAULTS=$(CURDIR)/nbs/proofs/faults.jsonl $(BIN)/python -m pytest tests/faults -m '' -n 2 --dist loadfile
	cd nbs/proofs && $(NBCONVERT) reliability.ipynb && ../../$(BIN)/nbdev_clean

typecheck: setup  # types alone
	$(BIN)/mypy

# they write their own outputs; the benchmarks want a quiet machine and real photos
proofs: setup  # make the proof of exactness again, in place; with $IMAGENETTE_DIR and $IMAGENET_PHOTOS_DIR the benchmarks, too
	cd nbs/proofs && $(NBCONVERT) exactness.ipynb
	if [ -n "$$IMAGENETTE_DIR" ]; then cd nbs/proofs && $(NBCONVERT) bench_step.ipynb; fi
	if [ -n "$$IMAGENET_PHOTOS_DIR" ]; then cd nbs/proofs && $(NBCONVERT) bench_data.ipynb; fi
	$(BIN)/jupyter nbconvert --inplace --coalesce-streams --log-level WARN nbs/proofs/*.ipynb  # the pieces in which text came, joined
	$(BIN)/nbdev_clean

export: setup  # write resnet_nb/ from the notebooks
	$(BIN)/nbdev_export

readme: setup  # write README.md from nbs/index.ipynb
	cd nbs && ../$(BIN)/jupyter nbconvert --to markdown --log-level WARN --output-dir .. --output README \
	  --NbConvertApp.output_files_dir=nbs/images --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags=hide-input index.ipynb
	$(BIN)/python -c 'import pathlib, re; page = pathlib.Path("README.md"); links = re.compile(r"\]\((?!nbs/images/|[a-z]+:|#)([^)]+)\)"); \
	  page.write_text(links.sub(lambda link: "](" + f"nbs/{link[1]}".replace("nbs/../", "") + ")", page.read_text("utf-8")), "utf-8")'  # README lies elsewhere

sync: setup  # make all that is generated anew: is what the notebooks say what is committed?
	find resnet_nb -name '*.py' -delete
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) --no-print-directory readme
	git status --porcelain --untracked-files=all -- nbs resnet_nb README.md | tee .venv/sync
	@test ! -s .venv/sync || { echo 'out of sync: commit the files above, they are what the notebooks say'; exit 1; }

clean:  # remove .venv
	rm -rf .venv
