# make demo          a labelled grid of pictures from the bundled model of the shapes
# make test          the whole test suite, as CI runs it
# make check         linters and type checker
# make train         both stages on the built-in shapes, as the bundled model of the shapes was made
# make bundle        puts the model that `make train` made into the package, as float16; make bundle-emoji that of the emoji
# make train-quick   the same on an easier task in a quarter of an hour

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin
DONE := $(VENV)/installed
PROMPTS := docs/demo_prompts.txt

.PHONY: demo test check train train-quick bundle bundle-emoji
.DELETE_ON_ERROR:

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(DONE)

demo: $(DONE)
	$(RUN)/ldm-generate --model shapes --prompts-file $(PROMPTS) --seed 1 --grid --output outputs/demo --json > /dev/null
	@echo
	@echo "Pictures: outputs/demo/grid.png"
	@echo "To train the same model from scratch: make train"

# A worker per core with one thread each (the list "1,1" is one thread that the trainings under test keep, too).
test: $(DONE)
	OMP_NUM_THREADS=1,1 $(RUN)/python -m pytest -n auto --dist worksteal

check: $(DONE)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

train: $(DONE)
	$(RUN)/accelerate launch train_autoencoder.py --config train_configs/shapes/autoencoder.yaml
	$(RUN)/accelerate launch train_autoencoder.py --config train_configs/shapes/autoencoder-decoder.yaml
	$(RUN)/accelerate launch train_ldm.py --config train_configs/shapes/ldm.yaml
	$(RUN)/accelerate launch train_ldm.py --config train_configs/shapes/ldm-order.yaml

train-quick: $(DONE)
	$(RUN)/accelerate launch train_autoencoder.py --config train_configs/shapes/quick-autoencoder.yaml
	$(RUN)/accelerate launch train_ldm.py --config train_configs/shapes/quick-ldm.yaml
	$(RUN)/ldm-generate --model runs/shapes/quick-ldm/export --prompts-file docs/quick_prompts.txt --grid \
		--output outputs/quick --json > /dev/null
	@echo
	@echo "Pictures: outputs/quick/grid.png"

bundle: $(DONE)
	$(RUN)/python -c 'import torch; from ldm import TextToImage; \
		TextToImage.from_pretrained("runs/shapes/ldm-order/export").save_pretrained("ldm/bundled/shapes", torch.float16)'

bundle-emoji: $(DONE)
	$(RUN)/python -c 'import torch; from ldm import TextToImage; \
		TextToImage.from_pretrained("runs/emoji/ldm/export").save_pretrained("ldm/bundled/emoji", torch.float16)'
