# make setup   .venv with everything that demo and tests need; what is imported is compiled then
# make demo    export a real small model with LoRA-Drop, verify it, generate text, show what it saved
# make test    the whole test suite
# make check   lint, types
# make test-cuda   what runs on ONNX Runtime's CUDA provider, without a GPU: needs g++, makes .venv-cuda

# Set in many containers: without what is written, each command would compile torch anew, six seconds of it
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check test-cuda clean

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
BIN := $(VENV)/bin

setup: $(VENV)/.ready

# The demo needs less than half of what the tests need
$(VENV)/.ready: EXTRAS := export,dev
$(VENV)/.demo: EXTRAS := export,cpu,openvino
$(VENV)/.ready $(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	touch $@

demo: $(or $(wildcard $(VENV)/.ready),$(VENV)/.demo)
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy docs/*/*.py examples/demo.py examples/fetch_model.py examples/editing/measure.py

# The package for CUDA beside the runtime alone. Not the extra `cuda`: tests/support/cuda_stub stands for its libraries,
# so of NVIDIA's wheels only the headers are needed, out of reach of what loads libraries from wheels. Its libraries have
# the functions that the provider of this version calls
$(CUDA_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --editable . 'onnxruntime-gpu==1.31.*'
	$(CUDA_VENV)/bin/python -m pip install --quiet --upgrade --no-deps --target $(CUDA_VENV)/headers \
		'nvidia-cuda-runtime==13.*' 'nvidia-cuda-crt==13.*'
	touch $@

test-cuda: setup $(CUDA_VENV)/.ready
	CUDA_VENV=$(CUDA_VENV) $(BIN)/python -m pytest -m cuda_stub tests/runtime/engines/ort

clean:
	rm -rf $(VENV) $(CUDA_VENV) .demo
