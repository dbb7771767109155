# Everything starts here. `make train` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
# the build that this project is tested with; for Volta (p3), which it has no kernels for: torch==2.10.0 torchvision==0.25.0
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: setup train test lab tensorboard export readme sync clean

setup: .venv/done

.venv/done: settings.ini setup.py pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; use make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) -e '.[dev]'
	touch $@

# make train hw=cpu2 recipe=imagenette name=first data_dir=/pictures seed=1 numerics=close overrides='{epochs: 2}'
train: setup
	$(BIN)/resnet-nb train $(foreach p,hw recipe name data_dir numerics,$(if $($(p)),-r $(p) '$($(p))')) \
	  $(if $(seed),-p seed '$(seed)') $(if $(overrides),-y 'overrides: $(overrides)')

test: setup
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest

lab: setup
	$(BIN)/jupyter lab nbs

tensorboard: setup
	$(BIN)/tensorboard --logdir runs

export: setup
	$(BIN)/nbdev_export

readme: setup
	cd nbs && ../$(BIN)/jupyter nbconvert --to markdown --log-level WARN --output-dir .. --output README \
	  --NbConvertApp.output_files_dir=nbs/images --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags=hide-input index.ipynb

# what the notebooks say and what is committed are the same
sync: setup
	rm -f resnet_nb/*.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) --no-print-directory readme
	git status --porcelain --untracked-files=all -- nbs resnet_nb README.md | tee .venv/sync
	@test ! -s .venv/sync || { echo 'out of sync: commit the files above, they are what the notebooks say'; exit 1; }

clean:
	rm -rf .venv
