#!/usr/bin/env bash
# One visit to a GPU, part by part; each takes under 9 minutes, prints its table last and keeps all in OUTPUT_FOLDER.
#   benchmarks/gpu_visit.sh PART... OUTPUT_FOLDER
# Parts: facts tests tune linear attention cycle context batch profile prefill
#   OFFICIAL=path   a checkout of the official implementation, for the parts cycle and context
#   SHAPE=qwen3-8b  PYTHON=python3
# A part that fails does not stop the next one; the exit status says whether any did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

(($# >= 2)) || { sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}"; exit 2; }
parts=("${@:1:$#-1}")
out=${*: -1}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
shape=${SHAPE:-qwen3-8b}
official=${OFFICIAL:+--official $OFFICIAL}
export PYTHONPATH=. TOKENIZERS_PARALLELISM=false
status=0

run() { # NAME COMMAND...: at most 530 s, output kept and its end shown
    local name=$1 started=$SECONDS
    shift
    timeout --kill-after=10 530 "$@" >"$out/$name.log" 2>&1
    local rc=$?
    tail -n 40 "$out/$name.log"
    echo "== $name: exit $rc after $((SECONDS - started)) s, full output in $name.log"
    ((rc == 0)) || status=1
}

for part in "${parts[@]}"; do
    case $part in
        facts) run facts "$python" -c "
import torch
from benchmarks.common import copy_bandwidth, environment
device = torch.device('cuda')
print(environment(device), f'{copy_bandwidth(device) / 1e9:.0f} GB/s copy')" ;;
        tests) run tests "$python" -m pytest -q -x -p no:cacheprovider -m gpu tests ;;
        # the first run is timed; the second says whether the winners are the same. The user's files stay as they are.
        tune) for n in 1 2; do
            ORTHRUS_TRITON_CONFIG_DIR=$out/configs run "tune_$n" "$python" -m orthrus_triton.cli autotune --shape "$shape" \
                --dtype bf16 --budget 5m --repeat 3 --export "$out/tuned.json"
        done ;;
        linear) run linear "$python" -m benchmarks.linear --out "$out" ;;
        attention) run attention "$python" -m benchmarks.attention --out "$out" ;;
        # one context, everybody
        cycle) run cycle "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1 $official --out "$out" ;;
        # 2k to 32k, who keeps up
        context) run context "$python" -m benchmarks.cycle --shape "$shape" --context 2048,8192,32768 --batch 1 --cycles 20 \
            --providers ours,ours-ar,official $official --out "$out/context" ;;
        batch) run batch "$python" -m benchmarks.cycle --shape "$shape" --context 2048 --batch 1,2,4,8,16,32,64 --cycles 15 \
            --providers ours,ours-ar --out "$out/batch" ;;
        profile) for mode in consensus ar; do
            run "profile_$mode" "$python" -m benchmarks.kernel_list --shape "$shape" --mode $mode --out "$out"
        done ;;
        # time to first token of long prompts: the ttft_s column
        prefill) run prefill "$python" -m benchmarks.cycle --shape "$shape" --context 8192,65536,131072 --batch 1 --cycles 8 \
            --providers ours --out "$out/prefill" ;;
        *) echo "unknown part $part" >&2; status=2 ;;
    esac
done
exit $status
