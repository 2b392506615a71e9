#!/usr/bin/env bash
# bench/gpu.sh [--out=DIR] [--nanogpt=PATH] [--commit=HASH] [--parts=NAME,NAME...]: run everything that needs a GPU.
#
# Without --parts it runs these four, in about six minutes with 16 processors, on a GPU of 80 GB in eight:
#   tests      run the tests on this GPU: the kernels against fp64, the model on the kernels
#   warm       compile everything that the next two parts time, and check the operations
#   step       time a training step of the 124M beside nanoGPT's (if given), without each kernel in turn, and by part
#   kernels    time the operations, each at the shape that decides how fast the 124M trains
# `tests` and `warm` need processors more than the GPU, so they run side by side, on a GPU of 80 GB one after
# the other. Nothing is timed until both are done.
# What matters most is timed first.
#
# Ask for the others by name, in a call of their own:
#   sweep      try tile sizes, for the tables that say "not tuned"
#   sanitizer  run compute-sanitizer's memcheck and racecheck on small shapes, if it is installed
#   curve      train the 124M for 1,000 steps, on our kernels and on PyTorch's, and draw both losses
#   all-kernels  time the operations at every shape
#   headline   time the 124M beside nanoGPT for half a minute each
#   batches    time the step by micro-batch, 8 to 128
#   large      time the step of 350M, 774M and 1.5B
#   generate   time prefill and decode
#
# It needs python with torch, triton and numpy, for the tests pytest and better pytest-xdist, for the curve matplotlib; it
# needs no network.
# PYTHON=... chooses the python. The results go to DIR (bench/results by default) as JSON files, named by GPU and commit,
# beside one log. If the checkout has no .git, name the commit by --commit. A part that is done is not run again, so
# repeat the command, with the same DIR, to finish a call that was cut short: `sweep` and the kernels go on where they stopped.
# A modified tree always starts again.
set -uo pipefail
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
known=" tests warm step kernels sweep sanitizer curve all-kernels headline batches large generate "

out=bench/results
nanogpt=()
parts=tests,warm,step,kernels
for argument in "$@"; do
    case "$argument" in
        --out=*) out=$(realpath -m "${argument#*=}") ;;
        --nanogpt=*) nanogpt=(--nanogpt "$(realpath -m "${argument#*=}")") ;;
        --commit=*) export TRITONGPT_COMMIT=${argument#*=} ;;
        --parts=*) parts=${argument#*=} ;;
        *) echo "error: '$argument' is not one of --out=DIR, --nanogpt=PATH, --commit=HASH, --parts=NAME,NAME" >&2; exit 2 ;;
    esac
done
for part in ${parts//,/ }; do
    case "$known" in
        *" $part "*) ;;
        *) echo "error: '$part' is not one of the parts:$known" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."

gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))' \
    2>/dev/null) || { echo "error: $python finds no torch with a GPU here" >&2; exit 1; }
commit=$($python -c 'from bench.timing import commit; print(commit() or "")')
case "$commit" in
    *-dirty) commit=${commit:0:8}-dirty-$(date +%H%M%S) ;; # a modified tree may have changed since its last run
    *) commit=${commit:0:8} ;;
esac
mkdir -p "$out"
prefix="$out/$gpu-${commit:-$(date +%F)}"
processors=$(nproc)
failed=0
deadline=540

# run NAME SECONDS COMMAND...: run a part for at most SECONDS, show what it prints, and append it to the log.
run() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code=0
    shift 2
    if grep -qsx "$name" "$prefix.done"; then
        echo "== $name is done: delete its line in $prefix.done to run it again"
        return 0
    fi
    if [ "$left" -lt 15 ]; then
        echo "== $name: no time is left, repeat the command"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name, at most $limit s" | tee -a "$prefix.log"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$prefix.log" || code=1
    if [ $code = 0 ]; then
        echo "$name" >>"$prefix.done"
    else
        echo "== $name failed or ran out of time: see $prefix.log"
    fi
    echo "== $name took $((SECONDS - started)) s" | tee -a "$prefix.log"
    return $code
}

gigabytes=$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)')
throughput=("$python" -m bench.throughput ${nanogpt[@]+"${nanogpt[@]}"})
pytest=("$python" -m pytest -p no:cacheprovider)
small=(tests/test_kernels.py -k "output_and_gradients and bfloat16")
side=() # the processes that run side by side
finish_side() {
    for process in ${side[@]+"${side[@]}"}; do wait "$process" || failed=1; done
    side=()
}

for part in ${parts//,/ }; do
    case "$part" in
        tests) ;;
        warm) [ "$gigabytes" -ge 100 ] || finish_side ;; # both at once may not fit into 80 GB
        *) finish_side ;;
    esac
    case "$part" in
        tests)
            $python -c "import pytest" 2>/dev/null || { echo "== tests: $python has no pytest"; continue; }
            workers=()
            $python -c "import xdist" 2>/dev/null && workers=(-n $(((processors + 1) / 2)))
            run tests 140 env TORCHINDUCTOR_COMPILE_THREADS=1 "${pytest[@]}" ${workers[@]+"${workers[@]}"} \
                tests/test_model_kernels.py tests/test_kernels.py tests/test_kernels_bugs.py \
                tests/test_kernels_checks.py \
                tests/test_bench.py::test_the_clock_waits_for_the_gpu_and_empties_its_cache &
            side+=($!) ;;
        warm)
            export TORCHINDUCTOR_COMPILE_THREADS=$(((processors + 2) / 3))
            run warm-step 140 "${throughput[@]}" --warm --ablate --batch_size 64 &
            side+=($!)
            run warm-kernels 140 "$python" -m bench.kernels --warm --few &
            side+=($!)
            export TORCHINDUCTOR_COMPILE_THREADS=$processors ;;
        step) run step 130 "${throughput[@]}" --ablate --batch_size 64 --seconds 5 --budget 105 \
            --out "$prefix-throughput.json" || failed=1 ;;
        kernels) run kernels 90 "$python" -m bench.kernels --few --seconds 0.1 --out "$prefix-kernels.json" || failed=1 ;;
        sweep) run sweep 530 "$python" -m bench.sweep --out "$prefix-sweep.json" || failed=1 ;;
        sanitizer)
            PATH=$PATH:/usr/local/cuda/bin
            command -v compute-sanitizer >/dev/null || { echo "== sanitizer: compute-sanitizer is not installed"; continue; }
            # Memory that is freed goes back at once, so that the tool sees a read beyond a tensor.
            for tool in memcheck racecheck; do
                run sanitizer-$tool 265 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
                    --error-exitcode 9 --target-processes application-only "${pytest[@]}" "${small[@]}" || failed=1
            done ;;
        curve)
            [ -f data/stdlib_char/train.bin ] || "$python" -m train.prepare stdlib_char || { failed=1; continue; }
            # GPT-2's vocabulary, so that the loss costs what it costs in a real run. The same seed gives both the
            # same weights and batches. The checkpoints stay out of DIR: each has 1.5 GB.
            for spec in triton torch; do
                folder=out-curve-$spec-${commit:-none}
                run curve-$spec 260 "$python" -m train train_gpt2 --dataset=stdlib_char --vocab_size=50304 \
                    --batch_size=64 --gradient_accumulation_steps=1 --max_iters=1000 --lr_decay_iters=1000 \
                    --warmup_iters=100 --eval_interval=500 --eval_iters=20 --init_from=auto --kernels=$spec \
                    --out_dir="$folder" || failed=1
                cp "$folder/metrics.jsonl" "$prefix-curve-$spec.jsonl" || failed=1
            done
            "$python" -m train.plot out-curve-{triton,torch}-"${commit:-none}" --out="$prefix-curve.svg" || failed=1 ;;
        all-kernels) run all-kernels 530 "$python" -m bench.kernels --seconds 0.1 --out "$prefix-kernels.json" || failed=1 ;;
        headline) run headline 300 "${throughput[@]}" --batch_size 64 --seconds 30 --out "$prefix-headline.json" || failed=1 ;;
        batches)
            for size in 8 16 32 64 128; do
                run batch-$size 175 "${throughput[@]}" --batch_size $size --seconds 5 --budget 150 \
                    --out "$prefix-batch-$size.json" || failed=1
            done ;;
        large)
            for size in 350M 774M 1.5B; do
                run large-$size 175 "${throughput[@]}" --size $size --batch_size 16 --seconds 8 --budget 150 \
                    --out "$prefix-throughput-$size.json" || failed=1
            done ;;
        generate) run generate 100 "$python" -m bench.generate --new 128 --seconds 2 ${nanogpt[@]+"${nanogpt[@]}"} \
            --out "$prefix-generate.json" || failed=1 ;;
    esac
done
finish_side
exit $failed
