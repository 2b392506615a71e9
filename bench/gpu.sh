#!/usr/bin/env bash
# bench/gpu.sh [--out=DIR] [--nanogpt=PATH] [PART ...]: what a GPU can tell, in calls of nine minutes at most. It has not run on one yet.
#
# By default, in this order, so that what decides comes first:
#   limits       python -m bench.roofline: copy, products of the step, attention by PyTorch's backends
#   tests        the tests on this GPU: kernels against fp64 in every dtype, the model on them
#   sanitizer    compute-sanitizer's memcheck and racecheck over small shapes, where it is installed
#   kernels      python -m bench.kernels
#   throughput   python -m bench.throughput on the 124M, beside nanoGPT when given, each kernel taken away in turn
# In calls of their own:
#   sweep        python -m bench.sweep: tile sizes, for the tables that say "not yet tuned"
#   batches      throughput by micro-batch, 8 to 128
#   large        throughput of 350M, 774M and 1.5B; prefill and decode
#
# Needs python with torch, triton, numpy and, for the tests, pytest; no network. Each part has a time limit. All write one
# log and their JSON into DIR (bench/results by default), named by GPU and commit. A part that is finished is not run again,
# kernels goes on where it stopped: a call that was cut short is finished by repeating it.
set -u
cd "$(dirname "$0")/.."

out=bench/results
nanogpt=()
parts=()
for argument in "$@"; do
    case "$argument" in
        --out=*) out=${argument#*=} ;;
        --nanogpt=*) nanogpt=(--nanogpt "${argument#*=}") ;;
        limits | tests | sanitizer | kernels | throughput | sweep | batches | large) parts+=("$argument") ;;
        *) echo "error: '$argument' is none of --out=DIR, --nanogpt=PATH, limits, tests, sanitizer, kernels, throughput, sweep, batches, large" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(limits tests sanitizer kernels throughput)

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))' \
    2>/dev/null) || { echo "error: python3 finds no torch with a GPU here" >&2; exit 1; }
mkdir -p "$out"
prefix="$out/$gpu-$(git rev-parse --short=8 HEAD 2>/dev/null || date +%F)"
failed=0
set -o pipefail

# part, seconds at most, command: shown as it goes on, and kept in the log
run() {
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    if grep -qsx "$name" "$prefix.done"; then
        echo "== $name was finished before: take it out of $prefix.done to run it again"
        return
    fi
    echo "== $name, at most $limit s"
    if timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$prefix.log"; then
        echo "$name" >>"$prefix.done"
    else
        echo "== $name failed or ran out of time: see $prefix.log"
        failed=1
    fi
    echo "== $name took $((SECONDS - started)) s" | tee -a "$prefix.log"
}

workers=() # compiling keeps the processors busy, not the GPU
python3 -c 'import xdist' 2>/dev/null && workers=(-n 8)
pytest=(python3 -m pytest -p no:cacheprovider)
small=(tests/test_kernels.py -k "output_and_gradients and bfloat16 and not 50257 and not 50304")

for part in "${parts[@]}"; do
    case "$part" in
        limits) run limits 60 python3 -m bench.roofline --out "$prefix-limits.json" ;;
        tests) run tests 150 "${pytest[@]}" ${workers[@]+"${workers[@]}"} tests/test_kernels.py tests/test_kernels_bugs.py \
            tests/test_kernels_checks.py tests/test_model_kernels.py ;;
        sanitizer)
            if ! command -v compute-sanitizer >/dev/null; then
                echo "== sanitizer: compute-sanitizer is not installed"
                continue
            fi
            # Freed memory goes back at once, so that reading beyond a tensor is seen.
            for tool in memcheck racecheck; do
                run sanitizer-$tool 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
                    --error-exitcode 9 --target-processes all "${pytest[@]}" "${small[@]}"
            done ;;
        kernels) run kernels 150 python3 -m bench.kernels --seconds 0.1 --out "$prefix-kernels.json" ;;
        throughput) run throughput 150 python3 -m bench.throughput --ablate --batch_size 64 --seconds 8 --budget 140 \
            ${nanogpt[@]+"${nanogpt[@]}"} --out "$prefix-throughput.json" ;;
        sweep) run sweep 530 python3 -m bench.sweep --out "$prefix-sweep.json" ;;
        batches) run batches 530 python3 -m bench.throughput --seconds 10 ${nanogpt[@]+"${nanogpt[@]}"} \
            --out "$prefix-batches.json" ;;
        large)
            for size in 350M 774M 1.5B; do
                run large-$size 150 python3 -m bench.throughput --size $size --batch_size 16 --seconds 10 --budget 140 \
                    ${nanogpt[@]+"${nanogpt[@]}"} --out "$prefix-throughput-$size.json"
            done
            run generate 60 python3 -m bench.generate ${nanogpt[@]+"${nanogpt[@]}"} --out "$prefix-generate.json" ;;
    esac
done
exit $failed
