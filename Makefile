# `make` lists the targets. libtorch: an existing LIBTORCH or LIBTORCH_USE_PYTORCH is used; otherwise scripts/setup.sh
# fetches one. FEATURES=cuda runs elementwise passes in kernels of our own, and links libtorch's CUDA libraries (on a
# machine with an NVIDIA GPU).

CARGO ?= cargo
FEATURES ?=
FLAGS := $(if $(FEATURES),--features $(FEATURES))
# Always all members: what is built for one of them alone has other features and would be built twice.
ALL := --workspace $(FLAGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check-cuda-source test-mpi test-faults test-statistics test-large test-cuda lint bench bench-peers bench-cuda pack-cuda drop-in drop-in-rates \
	reproduce clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

setup: ## find or fetch libtorch
	@scripts/setup.sh

demo: setup ## train, compare, draw, and check what it shows; prints where the pictures and the report are
	$(CARGO) run --release $(FLAGS) --example demo

# The tests run side by side; OpenMP threads of their own would only wait for each other.
test test-statistics: export OMP_NUM_THREADS ?= 1

test: setup ## every test: unit, integration, examples, doctests; what runs in lanes on narrower vectors too
	$(CARGO) test $(ALL)
	@# Every row's numbers in f64, its two back-ends in f32 and f64, and that it learns in bf16 too: more does not ask for lanes.
	for width in default avx2; do echo "vectors: $$width"; export TCH_BLR_CPU_CAPABILITY=$$width; \
		$(CARGO) test $(ALL) --test golden --test properties || exit 1; \
		$(CARGO) test $(ALL) --test exact --test conformance -- reference_step loss_decreases || exit 1; done
	@# A GPU's driver and compiler, played by a library of the tests.
	$(CARGO) test $(FLAGS) --features cuda --lib kernel::cuda

check-cuda-source: setup ## compile every row's CUDA source for four GPUs, of which none is needed; fetches NVRTC
	CARGO="$(CARGO)" OMP_NUM_THREADS=1 scripts/check_cuda_source.sh

# Over processes. `--workspace`, so that nothing is built again that `make test` has built.
test-mpi test-faults: export OMP_NUM_THREADS ?= 1
MPI := --workspace --features tch-blr-mpi/mpi
MPI_TARGETS := --test ranks --test training --example distributed --example reduction

test-mpi: setup ## ranks that are processes: numbers, bits, faults, files; needs an MPI and libclang; minutes
	@scripts/mpi_missing.sh
	$(CARGO) clippy $(MPI) --lib $(MPI_TARGETS) -- -D warnings
	$(CARGO) test $(MPI) $(MPI_TARGETS)
	@# Another process, where MPI starts again.
	$(CARGO) test $(MPI) --lib world::
	$(CARGO) test $(MPI) --doc world::
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps $(MPI)

test-faults: setup ## fifty processes killed at random moments of a training of several; minutes
	@scripts/mpi_missing.sh
	$(CARGO) test $(MPI) --test training -- --exact fifty_kills --ignored --nocapture

test-statistics: setup ## what `make test` leaves out: 10⁸ draws of noise and more, memory at 124 M weights, more of each benchmark
	$(CARGO) test --release $(FLAGS) --test normals --test memory --test continual_benchmarks -- --ignored --nocapture --skip child

test-large: ## merge two files of 10⁹ weights in less than 1 GiB; 12 GB of disk in $$TMPDIR, minutes
	$(CARGO) test --release -p blr-merge --test cli -- --ignored --nocapture

test-cuda: setup ## on an NVIDIA GPU: its driver, the bits of the CPU, golden trajectories, the conformance suite
	$(CARGO) test --release --features cuda --lib --test cuda --test golden --test conformance

lint: setup ## formatting, clippy, documentation (warnings denied), and which room of src/ may use which
	python3 scripts/arrows.py
	$(CARGO) fmt --all --check
	$(CARGO) fmt --check --manifest-path examples/downstream/Cargo.toml
	$(CARGO) clippy --all-targets $(ALL) -- -D warnings
	$(CARGO) clippy --all-targets $(FLAGS) --features cuda -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps $(ALL)

bench: setup ## criterion benchmarks, a few minutes
	$(CARGO) bench $(FLAGS) $(addprefix --bench ,step normals predict per_example fromp checkpoint merge)

bench-peers: setup ## time our optimizers beside PyTorch's, ivon-opt's and tch's
	-@scripts/peers.sh # without it the peers of tch are measured
	$(CARGO) bench $(FLAGS) --bench peers

bench-cuda: setup ## one step on an NVIDIA GPU beside PyTorch's fused Adam and a copy of as many bytes; a minute
	$(CARGO) bench --features cuda --bench cuda

pack-cuda: ## the two above as programs, for a machine that has a GPU and PyTorch but no Rust
	scripts/cuda.sh pack

drop-in: setup ## ten programs by six optimizers from three seeds; the table is in target/drop_in/table.md; 40 minutes
	$(CARGO) run --release $(FLAGS) --example drop_in -- --seeds 3

drop-in-rates: setup ## how much the learning rate matters to each: target/drop_in_rates/rates.svg, on the validation data; 40 minutes
	$(CARGO) run --release $(FLAGS) --example drop_in -- --validation --folder target/drop_in_rates \
		--optimizer adam --optimizer ivon-auto --optimizer bsam-auto \
		--lr-scale 0.25 --lr-scale 0.5 --lr-scale 1 --lr-scale 2 --lr-scale 4

reproduce: setup ## published numbers, run again
	$(CARGO) run --release $(FLAGS) --example reproduce

clean: ## remove what was built here; the fetched libtorch stays in the per-user cache
	$(CARGO) clean
	rm -f .libtorch examples/downstream/Cargo.lock
