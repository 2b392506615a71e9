#!/usr/bin/env bash
# bench/gpu.sh [--out=DIR] [--nanogpt=PATH] [PART ...]: what a GPU can tell, in one command of nine minutes at most. It has not run on one yet.
#
#   tests        the tests on this GPU: kernels against fp64 in every dtype, the model on them
#   kernels      python -m bench.kernels
#   throughput   python -m bench.throughput on the 124M, each kernel taken away in turn, beside nanoGPT when given
#   sweep        python -m bench.sweep: tile sizes; not part of the default
#   large        throughput of 350M, 774M and 1.5B; not part of the default
#
# Needs python with torch, triton, numpy and, for the tests, pytest; no network. Each part has a time limit and writes
# its log and its JSON into DIR (bench/results by default); a part whose JSON is there is not run again, so a call that
# was cut short is finished by repeating it.
set -u
cd "$(dirname "$0")/.."

out=bench/results
nanogpt=()
parts=()
for argument in "$@"; do
    case "$argument" in
        --out=*) out=${argument#*=} ;;
        --nanogpt=*) nanogpt=(--nanogpt "${argument#*=}") ;;
        tests | kernels | throughput | sweep | large) parts+=("$argument") ;;
        *) echo "error: '$argument' is none of --out=DIR, --nanogpt=PATH, tests, kernels, throughput, sweep, large" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels throughput)

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))' \
    2>/dev/null) || { echo "error: python3 finds no torch with a GPU here" >&2; exit 1; }
mkdir -p "$out"
prefix="$out/$gpu-$(date +%F)"
failed=0

# part, seconds at most, command: the log is shown as it grows
run() {
    local name=$1 limit=$2
    shift 2
    echo "== $name, at most $limit s"
    if ! timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$prefix-$name.log"; then
        echo "== $name failed or ran out of time: see $prefix-$name.log"
        failed=1
    fi
}
set -o pipefail
workers=() # compiling keeps the processors busy, not the GPU
python3 -c 'import xdist' 2>/dev/null && workers=(-n 8)

for part in "${parts[@]}"; do
    if [ -e "$prefix-$part.json" ]; then
        echo "== $part: $prefix-$part.json is there already"
        continue
    fi
    case "$part" in
        tests) run tests 170 python3 -m pytest "${workers[@]}" -p no:cacheprovider tests/test_kernels.py tests/test_kernels_bugs.py \
            tests/test_kernels_checks.py tests/test_model_kernels.py ;;
        kernels) run kernels 200 python3 -m bench.kernels --seconds 0.1 --out "$prefix-kernels.json" ;;
        throughput) run throughput 170 python3 -m bench.throughput --ablate --batch_size 64 --seconds 10 \
            "${nanogpt[@]}" --out "$prefix-throughput.json" ;;
        sweep) run sweep 540 python3 -m bench.sweep --out "$prefix-sweep.json" ;;
        large) for size in 350M 774M 1.5B; do
            run large 170 python3 -m bench.throughput --size $size --batch_size 16 --seconds 15 "${nanogpt[@]}" \
                --out "$prefix-throughput-$size.json"
        done ;;
    esac
done
exit $failed
