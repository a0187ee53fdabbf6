#!/usr/bin/env bash
# The runs of docs/first-runs.md, one after another; a finished run is skipped, an interrupted one goes on.
#   studies/first-runs.sh ../shared/data/glue runs/first
set -euo pipefail
data=${1:?folder of the GLUE data} out=${2:-runs/first} loralab=${LORALAB:-.venv/bin/loralab}

run() {  # run NAME, then the flags of `loralab train`
    local folder=$out/$1; shift
    [ -f "$folder/result.json" ] && return
    local resume=(); [ -f "$folder/run.json" ] && resume=(--resume)
    $loralab train --data "$data" --out "$folder" --dtype bfloat16 --speed off "$@" "${resume[@]}"
}

for seed in 0 1 2; do
    run rte-minilm-lora-$seed --task rte --method lora --epochs 4 --seed $seed
    run rte-minilm-full-$seed --task rte --method full --epochs 4 --seed $seed
done
run sst2-minilm-lora --task sst2 --method lora --epochs 1
run sst2-minilm-full --task sst2 --method full --epochs 1
run mrpc-minilm-lora --task mrpc --method lora --epochs 5
run mrpc-minilm-full --task mrpc --method full --epochs 4
run stsb-minilm-lora --task stsb --method lora --lr 2e-3 --epochs 3
run stsb-minilm-lora-qv --task stsb --method lora --targets attention-qv --lr 2e-3 --epochs 3
run cola-minilm-lora --task cola --method lora --epochs 4
run cola-minilm-lora-qv --task cola --method lora --targets attention-qv --epochs 4
run cola-mpnet-lora-qv --task cola --model mpnet --method lora --targets attention-qv --rank 8 --alpha 16 --batch-size 32 --lr 1e-3 --epochs 3
