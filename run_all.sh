#!/usr/bin/env bash
# Regenerates every published number: all runs, then results/*.csv, tables and figures.
#   ./run_all.sh            everything; about 60 minutes on 2 CPU cores. A run that is done is skipped.
#   ./run_all.sh --quick    the same commands with tiny settings into runs/quick, no results written
# SEEDS="1 2 3" and JOBS=2 (parallel processes with one thread each) may be set from outside.
set -euo pipefail
cd "$(dirname "$0")"
seeds=${SEEDS:-1 2 3 4 5}
jobs=${JOBS:-$(nproc)}
claims=runs/claims
quick=()
if [ "${1:-}" = --quick ]; then
    seeds=1
    claims=runs/quick
    quick=(--num-iterations 2 --warm-start-steps 20 --eval-episodes 16 --eval-every 1)
fi
export OMP_NUM_THREADS=1

run() {  # run SCRIPT ARM FLAGS..: once for every seed, in the background, at most $jobs at a time
    local script=$1 arm=$2 seed
    shift 2
    for seed in $seeds; do
        local folder=$claims/$script/$arm-$seed
        if compgen -G "$folder/*/summary.json" >/dev/null; then continue; fi
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || exit 1; done
        echo "$script $arm seed $seed"
        mkdir -p "$folder"
        python "algos/$script.py" --seed "$seed" --run-dir "$folder" --print-samples 0 \
            "$@" "${quick[@]}" >"$folder/log.txt" 2>&1 || { tail -n 5 "$folder/log.txt"; exit 1; } &
    done
}

# MS-GRPO, claim C1: which episodes are trained on. aaw is the default run.
run ms_grpo lake_aaw
run ms_grpo lake_uniform --sampling uniform
run ms_grpo lake_all --sampling all
# MS-GRPO, claim C2: what a turn is credited with, on Snake.
run ms_grpo snake_episode --env-id turnrl/Snake-v0
run ms_grpo snake_return_to_go --env-id turnrl/Snake-v0 --credit return_to_go
run ms_grpo snake_step --env-id turnrl/Snake-v0 --credit step
while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n || exit 1; done

if [ ${#quick[@]} = 0 ]; then python results/report.py; fi
