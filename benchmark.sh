#!/usr/bin/env bash
# Runs the scripts of this repository across environments, noise and seeds: one command per run, printed by --dry-run.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'END'
usage: ./benchmark.sh SUITE [options] [-- FLAGS]

suites
  quick        three continuous tasks, 200,000 steps, A2C and PPO: about an hour on two cores
  continuous   the paper's nine environments of continuous control
  atari        22 games; of the paper's 22 we know WizardOfWor only: the other games are our choice
  rlhf         language models: imdb and tldr, whose models come from the Hugging Face hub (or --envs toy, offline)
  sweep        learning rate x clip range x epochs, PPO against symmetric PPO
  noise        noise levels from 0 to 0.4, on rewards and on advantages
  robust       symmetric loss with and without layer normalisation, and with and without an ensemble of reward models
  evidence     a million steps: what explains SPPO; our variant sppo-p; PPO with known flips corrected; also takes --envs imdb
  speed        steps per second, as ratios to Stable-Baselines3's; one run at a time, on the CPU unless --device cuda

options
  --seeds N          seeds 10000, 10001, ...: N of them (default: as in the paper: continuous 30, Atari 5; other suites 3, 5 or 8)
  --jobs N           runs at a time: on the CPU in all (default: one per core), or on each GPU (default: one)
  --device D         auto, cpu or cuda, for every script (default: auto)
  --steps N          steps of each run (default: as in the paper; quick 200,000; sweep and evidence 1,000,000, except imdb)
  --envs E ...       environments, games or tasks, instead of the suite's own
  --runs-dir DIR     folder of the runs (default: runs/SUITE)
  --dry-run          print the commands, and run nothing
  --only NAME        only the run of this name
  --slurm            submit the runs as a Slurm job array (SBATCH_PARTITION, SBATCH_TIMELIMIT ... are sbatch's own)
  -- FLAGS           flags for every run, for example: -- --learning-rate 0.001; not those in which rows differ

Rerun it to continue: finished runs are skipped, interrupted ones resumed. Ctrl-C saves all of them first. On
CPUs each run gets one thread, unless OMP_NUM_THREADS says otherwise. Then: python report.py runs/SUITE
END
}
die() { echo "benchmark.sh: $1" >&2; exit 2; }

# Arguments
[[ ${1:-} ]] || { usage >&2; exit 2; }
case $1 in -h | --help) usage; exit ;; esac
suite=$1 seeds='' jobs='' device=auto steps='' envs=() runs=runs/$1 only='' dry_run='' slurm='' arguments=() extra=()
shift
while (($#)); do
    option=$1
    [[ $option = --slurm ]] || arguments+=("$option")
    shift
    case $option in
        --seeds | --jobs | --steps | --device | --runs-dir | --only)
            [[ ${1:-} && $1 != -* ]] || die "$option: give a value" ;;&
        -h | --help) usage; exit ;;
        --dry-run) dry_run=yes ;;
        --slurm) slurm=yes ;;
        --)
            [[ ${1:-} = --[a-z]* ]] || die "-- ${1:-}: give flags of the scripts, such as -- --learning-rate 0.001"
            for word; do
                [[ $word =~ ^[A-Za-z0-9_.,:=/+-]+$ ]] || die "-- '$word': letters, digits and _ . , : = / + - only"
                name=${word%%=*}
                case ${name//_/-} in
                    --env-id | --task | --seed | --noise | --run-name | --runs-dir | --resume | --device)
                        die "-- $word: set by benchmark.sh, see --help" ;;
                esac
            done
            extra=("$@") arguments+=("$@")
            break ;;
        --envs)
            while (($#)) && [[ $1 != -* ]]; do
                [[ $1 =~ ^[A-Za-z0-9_.-]+$ && $1 != Humanoid-v4 ]] ||
                    die "--envs $1: $([[ $1 = Humanoid-v4 ]] && echo 'has settings of its own, see docs/usage.md' ||
                        echo 'give the bare name, Breakout or Hopper-v4')"
                [[ " ${envs[*]} " != *" $1 "* ]] || die "--envs $1: named twice"
                envs+=("$1") arguments+=("$1")
                shift
            done
            ((${#envs[@]})) || die "--envs: name at least one" ;;
        --seeds | --jobs | --steps)
            [[ $1 =~ ^[1-9][0-9]*$ ]] || die "$option $1: give a positive whole number"
            printf -v "${option#--}" %s "$1" ;;&
        --device)
            [[ $1 =~ ^(auto|cpu|cuda)$ ]] || die "--device $1: auto, cpu or cuda"
            device=$1 ;;&
        --runs-dir)
            [[ $1 =~ ^[A-Za-z0-9_./-]+$ ]] || die "--runs-dir '$1': letters, digits and _ . / - only"
            runs=$1 ;;&
        --only) only=$1 ;;&
        --seeds | --jobs | --steps | --device | --runs-dir | --only) arguments+=("$1"); shift ;;
        *) die "$option: unknown; see ./benchmark.sh --help" ;;
    esac
done

# The list: one command per run, seed by seed, so that an unfinished benchmark compares all methods on fewer seeds
games=(Alien Amidar Assault Asterix BeamRider Boxing Breakout Centipede CrazyClimber DemonAttack Freeway Frostbite
    Gopher Krull KungFuMaster MsPacman Pong Qbert RoadRunner Seaquest SpaceInvaders WizardOfWor)
mujoco_and_box2d=(Ant-v4 HumanoidStandup-v4 Walker2d-v4 Hopper-v4 HalfCheetah-v4 Swimmer-v4 InvertedDoublePendulum-v4
    BipedalWalker-v3 LunarLanderContinuous-v3)
commands=() names=() evaluations=20

kind_of() { # of script, by the name of environment, game or task
    case $1 in toy | imdb | tldr) echo rlhf ;; *-v[0-9]*) echo continuous ;; *) echo atari ;; esac
}

add() { # SCRIPT ENVIRONMENT ROW NOISE[:LEVEL] SEED FLAG...: a run
    local script=$1 env=$2 row=$3 noise=$4 seed=$5 total=$steps
    shift 5
    local name=${env}__${row}__${noise/:/-}__$seed which=(--env-id "$env") flags=("$@") word
    [[ $noise != *:* ]] || set -- "$@" --noise-level
    for word in "${extra[@]%%=*}"; do # the same flag for all rows would make them alike, under different names
        word=${word//_/-}
        [[ $word != --* || " --alpha --beta ${*/#--no-/--} " != *" ${word/#--no-/--} "* ]] ||
            die "-- $word: rows differ in it; change the rows, in benchmark.sh"
    done
    case $env in toy | imdb | tldr) which=(--task "$env") ;; esac
    case $noise in *:*) flags+=(--noise "${noise%:*}" --noise-level "${noise#*:}") ;; none) ;; *) flags+=(--noise "$noise") ;; esac
    if [[ ! $total ]]; then
        case $script/$env in # the paper's number; for Atari and RLHF that is the scripts' default
            sppo*/HumanoidStandup-v4) total=10000000 ;;
            sppo*/Walker2d-v4) total=5000000 ;;
            */*-v[0-9]*) total=2000000 ;;
        esac
    fi
    [[ ! $total ]] || flags+=(--total-timesteps "$total")
    [[ $suite != quick ]] || flags+=(--eval-freq $((total / 10)))
    [[ $script/$env != sa2c*/Swimmer-v4 ]] || flags+=(--gamma 0.9999)
    [[ $device = auto ]] || flags+=(--device "$device")
    names+=("$name")
    flags=(python "$script.py" "${which[@]}" --seed "$seed" "${flags[@]}" "${extra[@]}")
    flags+=(--runs-dir "$runs" --run-name "$name")
    commands+=("${flags[*]}")
}

# The rows of the tables. k = alpha + beta |Z| is 20.5 in continuous control, 1.5 on Atari, 0.9 for imdb and toy, 0.7
# for tldr; "norm" and "coef" are PPO with one of the settings that k changes divided by k, and nothing else.
rows_continuous() { # ENVIRONMENT NOISE SEED
    add sa2c_continuous "$1" a2c "$2" "$3" --policy gaussian
    add sa2c_continuous "$1" da2c "$2" "$3" --beta 0
    add sa2c_continuous "$1" sa2c "$2" "$3"
    add sppo_continuous "$1" ppo "$2" "$3" --policy gaussian
    add sppo_continuous "$1" dppo "$2" "$3" --beta 0
    add sppo_continuous "$1" dppo-norm "$2" "$3" --beta 0 --max-grad-norm 0.0243902
    add sppo_continuous "$1" dppo-coef "$2" "$3" --beta 0 --vf-coef 0.0243902
    add sppo_continuous "$1" sppo "$2" "$3"
    [[ $suite/$1 != quick/InvertedDoublePendulum-v4 ]] || add sppo_continuous "$1" dppo-k "$2" "$3" --alpha 20.5 --beta 0
}
rows_atari() {
    add sa2c_atari "$1" a2c "$2" "$3" --beta 0
    add sa2c_atari "$1" sa2c "$2" "$3"
    add sppo_atari "$1" ppo "$2" "$3" --beta 0
    add sppo_atari "$1" ppo-authors "$2" "$3" --beta 0 --no-norm-adv
    add sppo_atari "$1" ppo-norm "$2" "$3" --beta 0 --max-grad-norm 0.333333
    add sppo_atari "$1" ppo-coef "$2" "$3" --beta 0 --vf-coef 0.333333 --ent-coef 0.00666667
    add sppo_atari "$1" sppo "$2" "$3"
}
rows_rlhf() {
    local norm=1.11111 vf=0.555556 ce=0.111111
    [[ $1 != tldr ]] || norm=1.42857 vf=0.142857 ce=0.142857
    add sppo_rlhf "$1" ppo "$2" "$3" --beta 0
    add sppo_rlhf "$1" ppo-norm "$2" "$3" --beta 0 --max-grad-norm $norm
    add sppo_rlhf "$1" ppo-coef "$2" "$3" --beta 0 --vf-coef $vf
    [[ $1 = toy ]] || add sppo_rlhf "$1" ppo-ce "$2" "$3" --beta 0 --ce-coef $ce
    add sppo_rlhf "$1" sppo "$2" "$3"
}
rows_evidence_continuous() { # without A2C, with sppo-p, our variant without the division by p_old
    add sppo_continuous "$1" ppo "$2" "$3" --policy gaussian
    add sppo_continuous "$1" dppo "$2" "$3" --beta 0
    add sppo_continuous "$1" dppo-norm "$2" "$3" --beta 0 --max-grad-norm 0.0243902
    add sppo_continuous "$1" dppo-coef "$2" "$3" --beta 0 --vf-coef 0.0243902
    add sppo_continuous "$1" sppo "$2" "$3"
    add sppo_continuous "$1" sppo-p "$2" "$3" --no-divide-by-p-old
}
rows_evidence_atari() {
    add sppo_atari "$1" ppo "$2" "$3" --beta 0
    add sppo_atari "$1" sppo "$2" "$3"
    [[ $2 != none ]] || return 0
    add sppo_atari "$1" sppo-p "$2" "$3" --no-divide-by-p-old
    add sppo_atari "$1" ppo-corrected "$2" "$3" --beta 0 --correct-flips
    add sppo_atari "$1" ppo-coef "$2" "$3" --beta 0 --vf-coef 0.333333 --ent-coef 0.00666667
}
rows_evidence_rlhf() { # with beta 20, so that k is 20.5: at the authors' k, 0.9, there is little to explain
    add sppo_rlhf "$1" ppo "$2" "$3" --beta 0
    add sppo_rlhf "$1" sppo "$2" "$3" --beta 20
    add sppo_rlhf "$1" ppo-ce "$2" "$3" --beta 0 --ce-coef 0.00487805
    add sppo_rlhf "$1" ppo-norm "$2" "$3" --beta 0 --max-grad-norm 0.0487805
    add sppo_rlhf "$1" ppo-coef "$2" "$3" --beta 0 --vf-coef 0.0243902
    add sppo_rlhf "$1" ppo-corrected "$2" "$3" --beta 0 --correct-flips
}
main_noise() { # the scale of tldr's rewards is not known in advance, so advantages are flipped instead
    case $(kind_of "$1")/$1 in continuous/*) echo normal ;; rlhf/tldr) echo adv_flip ;; *) echo flip ;; esac
}

suite_envs() { ((${#envs[@]})) || envs=("$@"); }
for_each() { # FUNCTION: calls it with every environment and seed
    for ((seed = 10000; seed < 10000 + seeds; seed++)); do
        for env in "${envs[@]}"; do "$1" "$env" $seed; done
    done
}
clean_and_noisy() { for noise in none "$(main_noise "$1")"; do "rows_$(kind_of "$1")" "$1" "$noise" "$2"; done; }
evidence() {
    if [[ $(kind_of "$1") = rlhf ]]; then
        [[ $1 = imdb ]] || die "evidence: $1 is neither a task of continuous control, nor a game, nor imdb"
        rows_evidence_rlhf "$1" flip:0.2 "$2"
        return
    fi
    local steps=${steps:-1000000}
    for noise in none "$(main_noise "$1")"; do "rows_evidence_$(kind_of "$1")" "$1" "$noise" "$2"; done
}
sweep() {
    [[ $(kind_of "$1") = continuous ]] || die "sweep: $1 is not a task of continuous control"
    for noise in none normal; do
        for rate in 0.0001 0.0003 0.001; do
            for clip in 0.1 0.2 0.3; do
                for epochs in 5 10 20; do
                    flags=(--learning-rate "$rate" --clip-coef "$clip" --update-epochs "$epochs")
                    add sppo_continuous "$1" "dppo-lr$rate-clip$clip-epochs$epochs" $noise "$2" --beta 0 "${flags[@]}"
                    add sppo_continuous "$1" "sppo-lr$rate-clip$clip-epochs$epochs" $noise "$2" "${flags[@]}"
                done
            done
        done
    done
}
noise_levels() {
    local on_rewards=normal d=d kind
    kind=$(kind_of "$1")
    [[ $kind != rlhf ]] || die "noise: $1 is neither a task of continuous control nor a game"
    [[ $kind = continuous ]] || on_rewards=flip d=''
    for noise in none {"$on_rewards",adv_flip}:{0.05,0.1,0.2,0.4}; do
        add "sa2c_$kind" "$1" "${d}a2c" "$noise" "$2" --beta 0
        add "sa2c_$kind" "$1" sa2c "$noise" "$2"
        add "sppo_$kind" "$1" "${d}ppo" "$noise" "$2" --beta 0
        add "sppo_$kind" "$1" sppo "$noise" "$2"
    done
}
robust() {
    local judges=(--reward-model lvwerra/distilbert-imdb textattack/roberta-base-imdb textattack/bert-base-uncased-imdb)
    for noise in none "$(main_noise "$1")"; do
        case $1 in
            *-v[0-9]*)
                add sppo_continuous "$1" dppo "$noise" "$2" --beta 0
                add sppo_continuous "$1" dppo-layer-norm "$noise" "$2" --beta 0 --layer-norm
                add sppo_continuous "$1" sppo "$noise" "$2"
                add sppo_continuous "$1" sppo-layer-norm "$noise" "$2" --layer-norm ;;
            imdb)
                add sppo_rlhf "$1" ppo "$noise" "$2" --beta 0
                add sppo_rlhf "$1" ppo-ensemble "$noise" "$2" --beta 0 "${judges[@]}" --reward-aggregate min
                add sppo_rlhf "$1" sppo "$noise" "$2"
                add sppo_rlhf "$1" sppo-ensemble "$noise" "$2" "${judges[@]}" --reward-aggregate min ;;
            *) die "robust: layer normalisation is for continuous control, the ensemble for imdb; not $1" ;;
        esac
    done
}
speed() {
    local script=$1 kind=${1#*_} algo=${1%_*}
    names+=("$script")
    local work="--total-timesteps ${steps:-100000}"
    [[ $kind != atari ]] || work="--env-id Breakout --total-timesteps ${steps:-20480}"
    [[ $device = auto ]] || work+=" --device $device"
    commands+=("python benchmarks/speed.py --suite $kind --algo ${algo#s} $work --out $runs/$script")
}

case $suite in
    quick)
        : "${seeds:=3}" "${steps:=200000}"
        evaluations=10
        suite_envs InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4
        for_each clean_and_noisy ;;
    continuous) : "${seeds:=30}"; suite_envs "${mujoco_and_box2d[@]}"; for_each clean_and_noisy ;;
    atari) : "${seeds:=5}"; suite_envs "${games[@]}"; for_each clean_and_noisy ;;
    rlhf) : "${seeds:=5}"; suite_envs imdb tldr; for_each clean_and_noisy ;;
    sweep) : "${seeds:=5}" "${steps:=1000000}"; suite_envs Hopper-v4 LunarLanderContinuous-v3; for_each sweep ;;
    noise) : "${seeds:=5}"; suite_envs Hopper-v4 LunarLanderContinuous-v3 Breakout; for_each noise_levels ;;
    robust) : "${seeds:=5}"; suite_envs Hopper-v4 LunarLanderContinuous-v3 imdb; for_each robust ;;
    evidence)
        suite_envs Hopper-v4 LunarLanderContinuous-v3 InvertedDoublePendulum-v4
        : "${seeds:=8}"
        for_each evidence ;;
    speed)
        [[ ! ${envs[*]}$seeds$jobs$slurm$only${extra[*]} ]] ||
            die "speed: takes --steps, --device, --runs-dir and --dry-run only"
        evaluations=1
        for script in sppo_continuous sa2c_continuous sppo_atari sa2c_atari; do speed $script; done ;;
    *) die "$suite: no such suite; see ./benchmark.sh --help" ;;
esac
if [[ $only ]]; then
    for i in "${!names[@]}"; do
        [[ ${names[i]} != "$only" ]] || { names=("$only") commands=("${commands[i]}"); break; }
    done
    [[ ${names[*]} = "$only" ]] || die "--only $only: not a run of this list, see --dry-run"
fi

# Where runs go: those of games and language models to GPUs, if there are any, all others to the CPU
gpus=()
on_gpu() { # COMMAND...
    [[ $device = cuda || $device = auto && $suite != speed && "$* " =~ " --task "|" --env-id "[^\ -]+\  ]]
}
if on_gpu "${commands[@]}"; then
    # without the error messages of nvidia-smi, which go to stdout
    list=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1 | grep -x '[0-9]\+' || true)}
    [[ $list = -1 ]] || IFS=, read -ra gpus <<<"${list//$'\n'/,}" # -1 or empty: none, or hidden on purpose
fi
[[ ${OMP_NUM_THREADS:-1} =~ ^[1-9][0-9]*$ ]] ||
    die "OMP_NUM_THREADS is '$OMP_NUM_THREADS': needs one whole number of at least 1; or unset it"
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
on_cpu=() on_gpus=()
for i in "${!commands[@]}"; do
    if ((${#gpus[@]})) && on_gpu "${commands[i]}"; then on_gpus+=("$i"); else on_cpu+=("$i"); fi
done
threads=${OMP_NUM_THREADS:-1} slots=${jobs:-$((cores / threads > 0 ? cores / threads : 1))}
gpu_slots=$((${jobs:-1} * ${#gpus[@]}))
gpu_threads=${OMP_NUM_THREADS:-$((gpu_slots && cores / gpu_slots > 1 ? cores / gpu_slots : 1))} # for the emulators of Atari games
((${#on_gpus[@]} == 0 || ${#on_cpu[@]} > 0)) || threads=$gpu_threads
[[ $suite != speed ]] || slots=1 gpu_slots=1 # speeds are compared, so runs must not compete for cores

if [[ $dry_run ]]; then
    [[ $suite = speed ]] || echo "export OMP_NUM_THREADS=$threads"
    printf '%s\n' "${commands[@]}"
    exit
fi

# Checks, before any work starts
for tool in flock setsid; do
    command -v $tool >/dev/null || die "$tool: not found; it is part of util-linux"
done
[[ $only ]] || python - "$suite" "${envs[@]}" <<'END' || exit 2
import sys
suite, *names = sys.argv[1:]
try:
    import ale_py, gymnasium, tensorboard, torch, tyro
    if {"toy", "imdb", "tldr"} & set(names) or suite == "speed":
        import accelerate, datasets, peft, transformers
    if suite == "speed":
        import cv2, sbx, stable_baselines3
except ImportError as error:
    sys.exit(f"benchmark.sh: {error}; install first: pip install -e '.[rlhf,report,peers]'")
gymnasium.register_envs(ale_py)
for name in names:
    if not {name, f"ALE/{name}-v5"} & {"toy", "imdb", "tldr", *gymnasium.registry}:
        sys.exit(f"benchmark.sh: --envs {name}: no such environment, game or task; for instance Hopper-v4 Breakout imdb")
END
mkdir -p "$runs/logs"
shopt -s extglob
is_done() { # NAME: whether its summary is there and whole; cheap, since it is asked twice a second
    local summary=''
    [[ -f $runs/$1/summary.json ]] || return
    read -r -d '' summary <"$runs/$1/summary.json" || true # without surrounding white space
    [[ $summary =~ ^\{.*\"finished\":\ true.*\}$ ]]
}
device_of() { if [[ $1 =~ " --device "([a-z]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo auto; fi; } # COMMAND
for i in "${!names[@]}"; do # the command of a run is beside its log; where a finished run ran makes no difference
    old='' new=${commands[i]}
    if [[ -s $runs/logs/${names[i]}.sh ]]; then # empty if the disk was full
        old=$(<"$runs/logs/${names[i]}.sh")
    elif [[ -f $runs/${names[i]}/args.json ]]; then # of copies, and of runs that were started by hand
        old=$(python -c 'import json, sys; print("python", *json.load(sys.stdin)["command"])' \
            <"$runs/${names[i]}/args.json" 2>/dev/null) || true # a damaged one is what the script complains about
    fi
    [[ -d $runs/${names[i]} && $old ]] || continue
    [[ ${old// --@(device|runs-dir|out) +([^ ])/} = "${new// --@(device|runs-dir|out) +([^ ])/}" ]] ||
        die "$runs/${names[i]} was started by another command ($old): choose another --runs-dir"
    if [[ -f $runs/${names[i]}/checkpoint.pt && $(device_of "$old") != "$(device_of "$new")" ]] && ! is_done "${names[i]}"; then
        die "$runs/${names[i]}: its checkpoint continues with --device $(device_of "$old") only; give that, or choose another --runs-dir"
    fi
done

# Slurm: job arrays of the largest size allowed, those for GPUs apart; each job is this script with --only
submit() { # GPUS THREADS NAME...
    local resources=(--ntasks=1 --cpus-per-task="$2") threads=$2 first list
    (($1 == 0)) || resources+=(--gpus-per-task="$1")
    shift 2
    for ((first = 1; first <= $#; first += array_size)); do
        list=$(mktemp "$runs/logs/slurm-XXXXXX")
        printf '%s\n' "${@:first:array_size}" >"$list"
        sbatch --job-name="$suite" --array="1-$(wc -l <"$list")${jobs:+%$jobs}" --requeue "${resources[@]}" \
            --signal=B:TERM@120 --open-mode=append --output="$runs/logs/slurm-%A_%a.log" --wrap "exec env \
            OMP_NUM_THREADS=$threads ./benchmark.sh $suite --only \$(sed -n \${SLURM_ARRAY_TASK_ID}p $list) ${arguments[*]}"
    done
}
if [[ $slurm ]]; then
    command -v sbatch >/dev/null || die "--slurm: no sbatch here"
    array_size=$(scontrol show config | awk '$1 == "MaxArraySize" { print $3 - 1 }')
    for_cpu=() for_gpu=()
    for i in "${!names[@]}"; do
        if is_done "${names[i]}"; then continue; fi
        if on_gpu "${commands[i]}"; then for_gpu+=("${names[i]}"); else for_cpu+=("${names[i]}"); fi
    done
    submit 0 "${OMP_NUM_THREADS:-1}" "${for_cpu[@]}"
    submit 1 4 "${for_gpu[@]}"
    exit
fi

# Runs inherit the lock: if only this script is killed, the folder stays locked until they have ended
exec 9>"$runs/logs/lock" 8>"$runs/logs/${only:-all}.lock"
{ flock -n ${only:+-s} 9 && flock -n 8; } || die "another benchmark is running in $runs"

# The runner
say() { echo "$1" >&2 || true; } # if the terminal is gone, runs must still be saved
percent() { # NAME: sets `share`, by the run's evaluations
    local rows=() evaluations=$evaluations
    [[ $1 != @(toy|imdb|tldr)__* ]] || evaluations=11
    share=0
    if is_done "$1"; then share=100; elif [[ -f $runs/$1/progress.csv ]]; then
        mapfile -t rows <"$runs/$1/progress.csv"
        share=$((${#rows[@]} <= evaluations ? 100 * (${#rows[@]} - 1) / evaluations : 99))
    fi
}
is_locked() { [[ -f $1/lock ]] && ! flock -n "$1/lock" true; } # by a run that was started by hand
move_away() { # PATH NAME: status 1 if it cannot
    mkdir -p "$runs/logs/broken" && mv "$1" "$runs/logs/broken/$2.$(date +%s)" && return
    failed+=("${2%.summary.json}: $1 cannot be moved to $runs/logs/broken")
    return 1
}
said() { grep -E '^(│ )?[[:alpha:]]' "$runs/logs/$1.log" | grep -v helptext | tail -n 1; } # NAME: its last words, also in tyro's box
start() { # SLOT INDEX GPU
    local name=${names[$2]} command=${commands[$2]} folder=$runs/${names[$2]}
    echo "$command" >"$runs/logs/$name.sh" || { failed+=("$name: its command cannot be written"); return; }
    if [[ -d $folder ]] && ! is_locked "$folder"; then
        if [[ ! -f $folder/checkpoint.pt ]]; then # killed before its first checkpoint: begins anew
            move_away "$folder" "$name" || return 0
        elif [[ -f $folder/summary.json ]]; then # damaged, or the run would be done
            move_away "$folder/summary.json" "$name.summary.json" || return 0
        fi
    fi
    [[ ! -f $folder/checkpoint.pt ]] || command="${command%% --*} --resume $folder"
    [[ ! $3 ]] || command="env CUDA_VISIBLE_DEVICES=$3 $command"
    # setsid: Ctrl-C does not reach a run, `stop` sends it one signal; no word of a command contains blanks
    # shellcheck disable=SC2086
    setsid $command >>"$runs/logs/$name.log" 2>&1 &
    pids[$1]=$! running[$1]=$name
    [[ ! $stopping ]] || kill -TERM $! 2>/dev/null || true # if Ctrl-C came just now
}
show() { # the live line, or in a log one line whenever a run has ended
    local now=$((100 * (finished + ${#failed[@]}))) left='?' name line
    for name in "${running[@]}"; do percent "$name"; now=$((now + share)); done
    ((now <= before)) || left=$(((SECONDS - began) * (100 * ${#names[@]} - now) / (now - before)))
    [[ $left = '?' ]] || printf -v left '%d:%02d h' $((left / 3600)) $((left % 3600 / 60))
    printf -v line '%s: %d of %d done, %d running, %d failed, %s left' "$suite" "$finished" "${#names[@]}" \
        "${#running[@]}" "${#failed[@]}" "$left"
    if [[ -t 2 ]]; then printf '\r%s\e[K' "$line" >&2 || true; elif [[ ${1:-} ]]; then say "$line"; fi
}
stop() { # runs save a checkpoint at the first signal, and end at once at a second
    stopping=yes
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    say "stopping ${#pids[@]} processes: training runs save a checkpoint first; interrupt again to kill them"
}
run() { # SLOTS THREADS INDEX...: that many at a time, until nothing is left to do
    local slots=$1 slot status i ended
    [[ $suite = speed ]] || export OMP_NUM_THREADS=$2
    shift 2
    while :; do
        ended=''
        for ((slot = 0; slot < slots; slot++)); do
            if [[ ${pids[slot]:-} ]] && ! kill -0 "${pids[slot]}" 2>/dev/null; then
                status=0
                wait "${pids[slot]}" || status=$?
                if is_done "${running[slot]}"; then
                    finished=$((finished + 1))
                elif [[ ! $stopping ]]; then
                    failed+=("${running[slot]}: $( ((status > 128)) && echo "killed by signal $((status - 128))" ||
                        echo "exit status $status, $(said "${running[slot]}")")")
                    # A script that refuses its flags makes no folder; the other runs have the same flags
                    ((status != 2)) || [[ -d $runs/${running[slot]} ]] || refused=yes
                fi
                unset "pids[slot]" "running[slot]"
                ended=yes
            fi
            while (($#)) && is_done "${names[$1]}"; do shift; done
            if [[ ! ${pids[slot]:-} && ! $stopping$refused ]] && (($#)); then
                i=$1
                shift # first, since a signal may come at any time
                start "$slot" "$i" "${here[slot % (${#here[@]} ? ${#here[@]} : 1)]:-}"
            fi
        done
        ((${#pids[@]})) || break
        show "$ended"
        sleep 0.5 || true
    done
}
pids=() running=() failed=() here=() finished=0 stopping='' refused='' before=0 began=$SECONDS
for name in "${names[@]}"; do
    percent "$name"
    before=$((before + share)) finished=$((finished + share / 100))
done
trap stop INT TERM HUP
trap '' PIPE
show start
if ((${#on_gpus[@]})); then here=("${gpus[@]}"); run "$gpu_slots" "$gpu_threads" "${on_gpus[@]}"; fi
here=()
if ((${#on_cpu[@]})); then run "$slots" "$threads" "${on_cpu[@]}"; fi
show end
[[ ! -t 2 ]] || say ''
for what in "${failed[@]}"; do say "failed: $what ($runs/logs/${what%%:*}.log)"; done
[[ ! $stopping ]] || { say "stopped; run the same command to continue"; exit 130; }
[[ ! $refused ]] || say "wrong input, so nothing more was started; correct it, and run the command again"
((${#failed[@]} == 0)) || exit 1
if [[ $suite = speed ]]; then cat "$runs"/*/speed.md; else say "all done; tables and figures: python report.py $runs"; fi
