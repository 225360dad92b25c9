# Two commands for a fresh machine with Rust and Python 3: `make demo` and `make test`.

MODEL  ?= .cache/smollm2-135m
STAGES ?= 2
export PROMPT ?= Explain in three sentences why the sky is blue.

.PHONY: demo test check model bench fuzz clean

demo: model ## build, fetch a small model, answer a prompt through two stages
	cargo build --release --locked
	target/release/pipeline-infer --model $(MODEL) --stages $(STAGES) --max-tokens 128 --prompt "$$PROMPT"

model: $(MODEL)/model.safetensors

$(MODEL)/model.safetensors:
	python3 tools/smollm2.py $(MODEL)

test: check ## all that can run on this machine
	@$(MAKE) --no-print-directory model || { \
	  echo "SKIPPED: tests with SmolLM2-135M, which could not be fetched"; test -z "$(REQUIRE_MODEL)"; }
	PIPELINE_INFER_SMOLLM2="$(abspath $(MODEL))" cargo test --locked --all-targets
	cargo test --locked --doc
	@# Interleavings of the pipeline's threads: a crate of its own, without the kernels, built in seconds.
	cargo test --locked -p pipeline-infer-protocol

# The oldest Rust that the crate promises to be built by.
OLDEST := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml).0
check:
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else echo "SKIPPED: rustfmt is not installed"; fi
	@# The fuzz targets too. Without default features they need no C++ compiler, and the rest has none.
	@if cargo clippy --version >/dev/null 2>&1; then \
	  cargo clippy --locked --workspace --no-default-features --all-targets -- -D warnings; \
	else echo "SKIPPED: clippy is not installed"; fi
	@if cargo +$(OLDEST) --version >/dev/null 2>&1; then cargo +$(OLDEST) check --locked --all-targets; \
	else echo "SKIPPED: Rust $(OLDEST) is not installed"; fi
	@python3 -B tools/gpu_check_test.py -q
	@python3 tools/kernels.py --quiet || { code=$$?; test $$code -eq 3 && \
	  echo "SKIPPED: GPU kernels are not compiled: NVRTC could not be fetched" && test -z "$(REQUIRE_MODEL)"; }

bench: model ## compare stage splits, and time the CPU's ops
	PIPELINE_INFER_SMOLLM2="$(abspath $(MODEL))" cargo bench --locked

RUNS ?= 1000000
fuzz: ## a million damaged headers and configs
	PIPELINE_INFER_FUZZ_RUNS=$(RUNS) cargo test --locked --test hostile_random -- --nocapture

clean:
	cargo clean
