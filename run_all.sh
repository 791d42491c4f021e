#!/usr/bin/env bash
# All runs, then results/<script>.csv, and all tables and figures. (The other results/*.csv: tests/benchmarks,
# docs/figures/credit.png: results/credit.py; the estimator page: results/estimators.py.)
# Arms of a primary comparison have ten seeds, others five.
#   ./run_all.sh            everything; about 8 hours on 2 CPU cores (half of all `seconds` in results/). A run that is
#                           done is skipped.
#   ./run_all.sh --quick    the same commands with tiny settings into runs/quick, no results written
#   ./run_all.sh --list     only says which commands these are, one line for every arm
# SEEDS="1 2 3" (of all claims), JOBS=2 (parallel processes with one thread each; default: the cores),
# SCRIPTS="igpo tree_grpo" and ARMS="lake_*" (all by default) may be set from outside: the rows of results/
# that are not run again stay.
set -euo pipefail
cd "$(dirname "$0")"
jobs=${JOBS:-$(nproc)}
scripts=${SCRIPTS:-ms_grpo gigpo ufo turn_budget igpo tree_grpo st_ppo seeupo archer cross}
claims=runs/claims
quick=() quick_archer=()
if [ "${1:-}" = --quick ]; then
    claims=runs/quick
    quick=(--num-iterations 2 --num-prompts 8 --warm-start-steps 10 --eval-episodes 4 --eval-every 2
           --max-turns 3)  # a warm start of 10 steps knows nothing: longer episodes show no more
    quick_archer=(--actor-warm-up 1 --critic-steps 2)
fi
export OMP_NUM_THREADS=1
trap 'kill $(jobs -rp) 2>/dev/null || true' EXIT  # a failed run ends the others

finish() {  # wait for all; 127: none is left
    local code
    while true; do
        code=0
        wait -n || code=$?
        if [ $code = 127 ]; then return 0; elif [ $code != 0 ]; then exit 1; fi
    done
}

if [ "${1:-}" = --list ]; then list=1; else list=; fi

with_seeds() {  # the seeds of the arms that follow
    if [ ${#quick[@]} = 0 ]; then seeds=${SEEDS:-$*}; else seeds=1; fi
}

run() {  # run CLAIMS ARM FLAGS..: once for every seed, in the background, at most $jobs at a time. CLAIMS
    # is the script whose claims these are; ALGO=x runs another one.
    local claim=$1 script=${ALGO:-$1} arm=$2 seed
    shift 2
    if [ "$list" ]; then printf '%s %s python algos/%s.py ' "$claim" "$arm" "$script"
        if [ $# -gt 0 ]; then printf '%q ' "$@"; fi; echo; return; fi
    set -- "$@" "${quick[@]}"
    if [ "$script" = archer ]; then set -- "$@" "${quick_archer[@]}"; fi
    [[ " $scripts " == *" $claim "* && $arm == ${ARMS:-*} ]] || return 0
    for seed in $seeds; do
        local folder=$claims/$claim/$arm-$seed
        if compgen -G "$folder/*/summary.json" >/dev/null; then continue; fi
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || exit 1; done
        echo "$claim $arm seed $seed"
        mkdir -p "$folder"
        python "algos/$script.py" --seed "$seed" --run-dir "$folder" --print-samples 0 \
            "$@" >"$folder/log.txt" 2>&1 || { tail -n 5 "$folder/log.txt"; exit 1; } &
    done
}

# MS-GRPO: which episodes are trained on, where returns are graded: Snake of 20 turns, a quarter of the episodes
# drawn (A); what a turn is credited with, where pay comes late, with every episode: larger lakes (B) and the tool
# desk with the whole history (C). Ten seeds for the primary comparisons; learning rates chosen on seeds 11 and 12
# from 1e-4, 3e-4 and 1e-3 (results/rates.csv). lake_aaw is the default run, lake_kl is held to the start policy.
with_seeds 1 2 3 4 5
run ms_grpo lake_aaw
run ms_grpo lake_kl --kl-coefficient 0.01
snake=(--env-id turnrl/Snake-v0 --env-kwargs '{"max_turns": 20}' --max-turns 20 --episodes-per-update 32)
large=(--env-kwargs '{"size": 6, "max_turns": 16}' --max-turns 16 --warm-start-steps 800
       --num-iterations 40 --max-generated-tokens 40000)
orders=(--env-id turnrl/ToolDesk-v0 --max-turn-tokens 6 --history-turns None --warm-start-steps 550
        --num-iterations 40 --max-generated-tokens 25000 --learning-rate 1e-3)
with_seeds 1 2 3 4 5 6 7 8 9 10
run ms_grpo snake_aaw "${snake[@]}"
run ms_grpo snake_uniform "${snake[@]}" --sampling uniform
run ms_grpo large_episode "${large[@]}" --sampling all --learning-rate 1e-3
run ms_grpo large_step "${large[@]}" --sampling all --credit step --learning-rate 1e-4
run ms_grpo desk_episode "${orders[@]}" --sampling all
run ms_grpo desk_step "${orders[@]}" --sampling all --credit step
with_seeds 1 2 3 4 5
run ms_grpo large_return_to_go "${large[@]}" --sampling all --credit return_to_go --learning-rate 1e-3
run ms_grpo desk_return_to_go "${orders[@]}" --sampling all --credit return_to_go
# GiGPO: what a turn is compared with, on Frozen Lake (A; lake_gigpo is the default run), on larger lakes (B) and
# on the tool desk with the whole history (C). gigpo: also with turns that saw the same; episode: MS-GRPO's credit;
# no_anchors: also with all turns of the group. Ten seeds; learning rates chosen on seeds 11 and 12 (docs/log.md).
with_seeds 1 2 3 4 5 6 7 8 9 10
run gigpo lake_gigpo
run gigpo lake_episode --step-weight 0 --learning-rate 1e-3
run gigpo lake_no_anchors --anchors none
run gigpo lake_mean --scale none
run gigpo large_gigpo "${large[@]}" --learning-rate 1e-3
run gigpo large_episode "${large[@]}" --step-weight 0
run gigpo large_no_anchors "${large[@]}" --anchors none --learning-rate 1e-3
run gigpo desk_gigpo "${orders[@]}"
run gigpo desk_episode "${orders[@]}" --step-weight 0
run gigpo desk_no_anchors "${orders[@]}" --anchors none
# UFO: five answers in training or one (A), and the first answer (B); penalty and decay (C). words_turns5 is the
# default run: half of the problems are number words, which the start policy can read but samples badly, so that
# the first answer can improve; the other half it cannot calculate. With one answer an episode has a third of the
# tokens, so more iterations for about as many tokens. Learning rates chosen on seeds 11 and 12.
with_seeds 1 2 3 4 5 6 7 8 9 10
run ufo words_turns5
run ufo words_turns1 --max-turns 1 --num-iterations 180 --eval-every 30
with_seeds 1 2 3 4 5
run ufo words_no_penalty --repetition-penalty 0
run ufo words_constant --decay-base 1
# Turn budgets: what closes a thought, before training (A) and after it (B; think_turn is the default run); turn limits
# before (C) and after training (D). Ten seeds for the primary comparisons. Learning rates chosen on seeds 11 and 12
# from 1e-4, 3e-4 and 1e-3 (results/rates.csv).
with_seeds 1 2 3 4 5 6 7 8 9 10
run turn_budget think_turn
run turn_budget think_none --cap none
with_seeds 1 2 3 4 5
run turn_budget think_penalty --cap none --overrun-penalty 0.1
run turn_budget think_turn_penalty --overrun-penalty 0.1
run turn_budget think_episode --cap episode
run turn_budget think_none_drop --cap none --drop-thoughts
with_seeds 1 2 3 4 5 6 7 8 9 10
turns=(--env-kwargs '{"regime": "turns"}' --max-turns 8 --context-limit 160 --reminder --warm-start-steps 700
       --num-iterations 24 --eval-every 8 --learning-rate 1e-4)
run turn_budget limit_none "${turns[@]}"
run turn_budget limit_dynamic "${turns[@]}" --turn-limit dynamic
with_seeds 1 2 3 4 5
run turn_budget limit_fixed "${turns[@]}" --turn-limit fixed
# IGPO: do gains help, where three people are asked for at once, so that success is rare at first, and the first
# right searches already raise the belief (A)? middle_both is the default run. Ten seeds for the primary comparison,
# whose learning rates were chosen on seeds 11 and 12 from 1e-4, 3e-4 and 1e-3 (results/rates.csv); the others have
# the same rate.
with_seeds 1 2 3 4 5 6 7 8 9 10
people=(--env-kwargs '{"regime": "parts", "wrong": 0.2, "premature": 0.2}' --warm-start-steps 550
        --warm-start-episodes 8192 --num-iterations 40 --learning-rate 1e-3)
run igpo parts_prob "${people[@]}" --belief prob
run igpo parts_outcome "${people[@]}" --reward-source outcome
with_seeds 1 2 3 4 5
run igpo parts_log_prob "${people[@]}"
run igpo parts_joint "${people[@]}" --joint
run igpo parts_gain "${people[@]}" --belief prob --reward-source information_gain
run igpo middle_both
# Tree-GRPO: trees or chains, all tokens (A); share of tokens kept (B; tree_top50 is the default run). Learning rates
# chosen from 1e-4, 3e-4 and 1e-3 on seeds 11 and 12 for each of the shares and for chains (results/rates.csv).
with_seeds 1 2 3 4 5 6 7 8 9 10
every=(--keep-top-entropy 1 --learning-rate 1e-3)
run tree_grpo tree_all "${every[@]}"
run tree_grpo tree_chains4 "${every[@]}" --chains --learning-rate 3e-4
with_seeds 1 2 3 4 5
run tree_grpo tree_chains6 "${every[@]}" --group-size 6 --forks 0 --learning-rate 3e-4
run tree_grpo tree_intra "${every[@]}" --advantage intra
run tree_grpo tree_inter "${every[@]}" --advantage inter
run tree_grpo tree_top50
run tree_grpo tree_top20 --keep-top-entropy 0.2 --learning-rate 3e-4
run tree_grpo tree_bottom80 --keep-top-entropy 0.2 --invert-entropy-mask --learning-rate 3e-4
# ST-PPO on the tool desk: 2 optimizer steps per batch (A; desk_st_ppo is the default run); 32 steps, each variant with
# the rate chosen for so many on seeds 11 and 12 (results/rates.csv), on fresh batches (B) and on batches of four
# iterations ago, or two (C); 32 steps with the default rate, for 2, where PPO collapses (D); how s_ppo scales there,
# and a usual cure (E); 32 steps without Adam (F). Ten seeds for the primary comparisons.
steps=(--num-epochs 4 --num-minibatches 8 --num-iterations 20 --eval-every 2)
plain=("${steps[@]}" --sgd --learning-rate 0.1)
with_seeds 1 2 3 4 5 6 7 8 9 10
for pair in st_ppo=1e-4 ppo=3e-4; do
    variant=(--variant "${pair%=*}" "${steps[@]}")
    run st_ppo "fresh_${pair%=*}" "${variant[@]}" --learning-rate "${pair#*=}"
    run st_ppo "late_${pair%=*}" "${variant[@]}" --learning-rate 1e-4 --staleness 4
    run st_ppo "hot_${pair%=*}" "${variant[@]}"
done
with_seeds 1 2 3 4 5
run st_ppo late2_st_ppo "${steps[@]}" --learning-rate 1e-4 --staleness 2
run st_ppo late2_ppo --variant ppo "${steps[@]}" --learning-rate 1e-4 --staleness 2
for pair in s_ppo=1e-4 turn_ppo=1e-4; do
    variant=(--variant "${pair%=*}" "${steps[@]}")
    run st_ppo "fresh_${pair%=*}" "${variant[@]}" --learning-rate "${pair#*=}"
    run st_ppo "late_${pair%=*}" "${variant[@]}" --learning-rate 1e-4 --staleness 4
    run st_ppo "hot_${pair%=*}" "${variant[@]}"
done
run st_ppo desk_st_ppo
run st_ppo desk_ppo --variant ppo
run st_ppo hot_s_triggered --variant s_ppo --scale triggered "${steps[@]}"
run st_ppo hot_s_step --variant s_ppo --scale step "${steps[@]}"
run st_ppo hot_target_kl --variant ppo --target-kl 0.05 "${steps[@]}"
run st_ppo sgd_ppo --variant ppo "${plain[@]}"
run st_ppo sgd_s_ppo --variant s_ppo "${plain[@]}"
# SeeUPO: is the last turn first better, and do the weights M matter, in a game made for it? With steps so long
# that a turn nearly finds its best response (A), without Adam's momentum (B), with the paper's clip (C).
# gspo_N takes N steps on all turns at once: 8 (4) use a token as often, 24 (12) are as many optimizer steps.
# Then against GSPO and GRPO (the ratio of a turn or of a token) on the tool desk (D, E; desk_reverse is the
# default run) and on questions (F, G): with as many optimizer steps as the longest episode has turns (8 or 6),
# and with one, where every token is used once.
with_seeds 1 2 3 4 5 6 7 8 9 10
together=(--order together)
trust=(--env-id turnrl/Trust-v0 --env-kwargs '{"rounds": 3}' --max-turns 3 --max-turn-tokens 1 --plain-rewards
       --warm-start-steps 60 --eval-every 2)
long=("${trust[@]}" --num-iterations 8 --learning-rate 1e-3 --clip-low 0.9 --clip-high 10 --steps-per-turn 8)
clip=("${trust[@]}" --num-iterations 12 --learning-rate 1e-3 --steps-per-turn 4)
run seeupo trust_reverse "${long[@]}"
run seeupo trust_natural "${long[@]}" --order natural
run seeupo trust_random "${long[@]}" --order random
run seeupo trust_unweighted "${long[@]}" --no-sequential-weights
run seeupo trust_gspo_8 "${long[@]}" "${together[@]}"
run seeupo trust_gspo_24 "${long[@]}" "${together[@]}" --steps-per-turn 24
run seeupo trust0_reverse "${long[@]}" --adam-beta1 0
run seeupo trust0_natural "${long[@]}" --adam-beta1 0 --order natural
run seeupo trust0_random "${long[@]}" --adam-beta1 0 --order random
run seeupo trust0_gspo_8 "${long[@]}" --adam-beta1 0 "${together[@]}"
run seeupo trust0_gspo_24 "${long[@]}" --adam-beta1 0 "${together[@]}" --steps-per-turn 24
run seeupo clip_reverse "${clip[@]}"
run seeupo clip_natural "${clip[@]}" --order natural
run seeupo clip_random "${clip[@]}" --order random
run seeupo clip_unweighted "${clip[@]}" --no-sequential-weights
run seeupo clip_released "${clip[@]}" --released
run seeupo clip_gspo_4 "${clip[@]}" "${together[@]}"
run seeupo clip_gspo_12 "${clip[@]}" "${together[@]}" --steps-per-turn 12
question=(--env-id turnrl/SearchQA-v0 --max-turn-tokens 8)
run seeupo desk_reverse
run seeupo desk_gspo_8 "${together[@]}" --steps-per-turn 8
run seeupo desk_gspo_1 "${together[@]}" --learning-rate 3e-4
run seeupo question_reverse "${question[@]}" --learning-rate 3e-4
run seeupo question_gspo_6 "${question[@]}" --learning-rate 3e-4 "${together[@]}" --steps-per-turn 6
run seeupo question_gspo_1 "${question[@]}" --learning-rate 1e-3 "${together[@]}"
with_seeds 1 2 3 4 5
run seeupo desk_grpo_8 "${together[@]}" --steps-per-turn 8 --ratio token
run seeupo desk_grpo_1 "${together[@]}" --learning-rate 3e-4 --ratio token
run seeupo question_grpo_6 "${question[@]}" --learning-rate 3e-4 "${together[@]}" --steps-per-turn 6 --ratio token
run seeupo question_grpo_1 "${question[@]}" --learning-rate 1e-3 "${together[@]}" --ratio token
# ArCHer, in the maze without a history: other scripts for as many episodes, 16 in each of 30 iterations (A), and
# what its critic is made of (B, with the smaller rate of the default run). Learning rates of A chosen from 1e-4, 3e-4
# and 1e-3 on seeds 11 and 12 by the mean return over the run (results/rates.csv). A turn has two tokens, so 0.975 per
# token is ArCHer's discount.
with_seeds 1 2 3 4 5 6 7 8 9 10
maze=(--env-id turnrl/Maze-v0 --max-turns 30 --max-turn-tokens 2 --warm-start-steps 200
      --warm-start-learning-rate 2e-3 --tiny-init-std 0.1 --history-turns 0 --num-iterations 30 --eval-every 3)
run archer maze_archer --learning-rate 1e-3
ALGO=st_ppo run archer maze_ppo "${maze[@]}" --variant ppo --num-prompts 16 --num-epochs 4 --discount 0.975 \
    --gae-lambda 0.95 --learning-rate 3e-4
ALGO=ms_grpo run archer maze_grpo "${maze[@]}" --sampling all --num-prompts 4 --group-size 4 --learning-rate 1e-3
with_seeds 1 2 3 4 5
run archer maze_default
run archer maze_monte_carlo --value-target monte_carlo
run archer maze_one_critic --num-critics 1
run archer maze_small_buffer --replay-turns 500
run archer maze_ended --no-bootstrap-truncated
# Cross table: every script in every game it fits, with the whole history, from the same warm starts, until so many
# tokens are generated. Learning rates chosen from 1e-4, 3e-4 and 1e-3 on seeds 11 and 12 (results/rates.csv).
cross() {  # cross GAME "SCRIPT=LEARNING_RATE .." FLAGS..
    local pair flags
    for pair in $2; do
        flags=("${@:3}" --learning-rate "${pair#*=}" --num-iterations 2000 --eval-every 2000 --save-every 2000)
        case ${pair%=*} in
            ms_grpo) flags+=(--sampling all --history-turns None) ;;  # plain GRPO
            gigpo) flags+=(--history-turns None) ;;
            archer) flags+=(--history-turns None --num-prompts 64) ;;  # as many episodes as st_ppo
        esac
        ALGO=${pair%=*} run cross "$1_${pair%=*}" "${flags[@]}"
    done
}
cross lake "ms_grpo=3e-4 gigpo=3e-4 tree_grpo=3e-4 st_ppo=1e-3 seeupo=3e-4 archer=3e-4" --env-id turnrl/FrozenLake-v0 \
    --max-turns 8 --max-turn-tokens 8 --warm-start-steps 300 --max-generated-tokens 30000
cross search "ms_grpo=1e-3 gigpo=1e-3 igpo=1e-3 tree_grpo=1e-3 st_ppo=1e-3 seeupo=3e-4" --env-id turnrl/SearchQA-v0 \
    --max-turns 8 --max-turn-tokens 8 --warm-start-steps 300 --max-generated-tokens 40000
cross desk "ms_grpo=3e-4 gigpo=1e-3 tree_grpo=1e-3 st_ppo=3e-4 seeupo=1e-4" --env-id turnrl/ToolDesk-v0 \
    --max-turns 8 --max-turn-tokens 6 --warm-start-steps 400 --max-generated-tokens 25000
finish
if [ ${#quick[@]} = 0 ] && [ ! "$list" ]; then python results/report.py; fi
