#!/usr/bin/env bash
# bench/gpu.sh [--out=DIR] [--nanogpt=PATH] [--commit=HASH] [PART ...]: what a GPU can tell, in nine minutes. It has not run on one yet.
#
# By default, in this order, so that what decides comes first:
#   limits       python -m bench.roofline: copy, products of the step, burst and sustained
#   tests        the tests on this GPU: kernels against fp64 in every dtype, the model on them
#   throughput   python -m bench.throughput on the 124M, beside nanoGPT when given, each kernel taken away in turn
#   kernels      python -m bench.kernels
#   sanitizer    compute-sanitizer's memcheck and racecheck over small shapes, where it is installed
# In calls of their own:
#   sweep        python -m bench.sweep: tile sizes, for the tables that say "not yet tuned"
#   attention    python -m bench.sweep attention: candidates for attention against what is shipped and SDPA
#   headline     the 124M beside nanoGPT for half a minute each
#   batches      throughput by micro-batch, 8 to 128
#   large        throughput of 350M, 774M and 1.5B; prefill and decode
#
# Needs python with torch, triton, numpy and, for the tests, pytest; no network. PYTHON=... chooses it. Parts share
# one log and write their JSON into DIR (bench/results by default), named by GPU and commit; where the checkout has no
# .git, --commit says which. A part that is finished is not run again, and kernels, sweep and attention go on:
# a call that was cut short is finished by repeating it, with the same DIR. On a machine that is lent for a while, take
# a DIR that is kept between calls, such as out-gpu/, and pytest-xdist: the tests take 400 to 600 s in one process (estimated).
set -u
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-8}
python=${PYTHON:-python3}

out=
nanogpt=()
parts=()
for argument in "$@"; do
    case "$argument" in
        --out=*) out=$(realpath -m "${argument#*=}") ;;
        --nanogpt=*) nanogpt=(--nanogpt "$(realpath -m "${argument#*=}")") ;;
        --commit=*) export TRITONGPT_COMMIT=${argument#*=} ;;
        limits | tests | sanitizer | kernels | throughput | sweep | attention | headline | batches | large) parts+=("$argument") ;;
        *) echo "error: '$argument' is none of --out=DIR, --nanogpt=PATH, --commit=HASH, limits, tests, throughput, kernels, sanitizer, sweep, attention, headline, batches, large" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(limits tests throughput kernels sanitizer)
cd "$(dirname "$0")/.."

gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))' \
    2>/dev/null) || { echo "error: $python finds no torch with a GPU here" >&2; exit 1; }
commit=$($python -c 'from bench.timing import commit; print((commit() or "")[:8])')
out=${out:-bench/results}
mkdir -p "$out"
prefix="$out/$gpu-${commit:-$(date +%F)}"
failed=0
deadline=540
set -o pipefail

# part, seconds at most, command: shown as it goes on, and kept in the log
run() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS
    shift 2
    if grep -qsx "$name" "$prefix.done"; then
        echo "== $name was finished before: take it out of $prefix.done to run it again"
        return
    fi
    if [ "$left" -lt 15 ]; then
        echo "== $name: no time is left, repeat the command"
        failed=1
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name, at most $limit s" | tee -a "$prefix.log"
    if timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$prefix.log"; then
        echo "$name" >>"$prefix.done"
    else
        echo "== $name failed or ran out of time: see $prefix.log"
        failed=1
    fi
    echo "== $name took $((SECONDS - started)) s" | tee -a "$prefix.log"
}

pytest=("$python" -m pytest -p no:cacheprovider)
small=(tests/test_kernels.py -k "output_and_gradients and bfloat16 and not 50257 and not 50304")
has() { $python -c "import $1" 2>/dev/null; }

for part in "${parts[@]}"; do
    case "$part" in
        limits) run limits 60 "$python" -m bench.roofline --out "$prefix-limits.json" ;;
        tests)
            has pytest || { echo "== tests: $python has no pytest"; continue; }
            workers=() # compiling keeps the processors busy, not the GPU
            has xdist && workers=(-n 8)
            run tests 170 env TORCHINDUCTOR_COMPILE_THREADS=1 "${pytest[@]}" ${workers[@]+"${workers[@]}"} \
                tests/test_kernels.py tests/test_kernels_bugs.py tests/test_kernels_checks.py tests/test_model_kernels.py ;;
        throughput) run throughput 170 "$python" -m bench.throughput --ablate --batch_size 64 --seconds 6 --budget 150 \
            ${nanogpt[@]+"${nanogpt[@]}"} --out "$prefix-throughput.json" ;;
        kernels) run kernels 140 "$python" -m bench.kernels --seconds 0.1 --out "$prefix-kernels.json" ;;
        sanitizer)
            PATH=$PATH:/usr/local/cuda/bin
            command -v compute-sanitizer >/dev/null || { echo "== sanitizer: compute-sanitizer is not installed"; continue; }
            # Freed memory goes back at once, so that reading beyond a tensor is seen.
            for tool in memcheck racecheck; do
                run sanitizer-$tool 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
                    --error-exitcode 9 --target-processes application-only "${pytest[@]}" "${small[@]}"
            done ;;
        sweep) run sweep 530 "$python" -m bench.sweep --out "$prefix-sweep.json" ;;
        attention) run attention 530 "$python" -m bench.sweep attention --out "$prefix-attention.json" ;;
        headline) run headline 300 "$python" -m bench.throughput --batch_size 64 --seconds 30 \
            ${nanogpt[@]+"${nanogpt[@]}"} --out "$prefix-headline.json" ;;
        batches) run batches 530 "$python" -m bench.throughput --seconds 10 ${nanogpt[@]+"${nanogpt[@]}"} \
            --out "$prefix-batches.json" ;;
        large)
            for size in 350M 774M 1.5B; do
                run large-$size 140 "$python" -m bench.throughput --size $size --batch_size 16 --seconds 8 --budget 120 \
                    ${nanogpt[@]+"${nanogpt[@]}"} --out "$prefix-throughput-$size.json"
            done
            run generate 100 "$python" -m bench.generate --new 128 --seconds 2 ${nanogpt[@]+"${nanogpt[@]}"} \
                --out "$prefix-generate.json" ;;
    esac
done
exit $failed
