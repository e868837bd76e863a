#!/usr/bin/env bash
# Runs the scripts of this repository over environments, methods, noise and seeds: writes a list of
# commands, which benchmarks/run.py runs several at a time. --dry-run prints the unfinished ones.
[ "${BASH_VERSION:-}" ] || { echo "benchmark.sh needs bash: run ./benchmark.sh" >&2; exit 2; }
set -e
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")"

[[ ! ${1:---help} =~ ^(-h|--help)$ ]] || exec cat <<'END'
usage: ./benchmark.sh SUITE [options] [-- FLAGS]

suites
  tiny         one task, 50,000 steps, PPO, DPPO and SPPO, five seeds: eight minutes on two cores
  quick        three tasks of continuous control, 200,000 steps: one to three hours on two cores
  continuous   the paper's nine tasks of continuous control, 30 seeds
  atari        22 games, 5 seeds; the first twelve are the paper's, according to public reviews
  rlhf         language models: imdb and tldr, 5 seeds (offline: python toy.py, then --envs toy)
  evidence     three tasks, a million steps, 8 seeds: what explains SPPO (--envs: Breakout, imdb)
  sweep        learning rate x clip range, DPPO and SPPO, two tasks, 200,000 steps, 5 seeds

options
  --seeds N        seeds 10000, 10001, ...: N of them
  --envs E ...     environments, games or language tasks instead of the suite's own
  --methods M ...  these methods of the suite only, such as dppo sppo
  --steps N        steps of each run
  --jobs N         runs at a time: on the CPU (default: one a core), and on each GPU (see the docs)
  --device D       of games and language models: auto, cpu or cuda; control stays on the CPU
  --runs-dir DIR   folder of the runs (default: runs/SUITE)
  --dry-run        print the commands that are left, one a line, and run nothing
  -- FLAGS         flags for every command, for example: -- --learning-rate 0.001

The same command again continues: finished runs are skipped. Then: python report.py runs/SUITE
END
die() { echo "benchmark.sh: $1" >&2; exit 2; }
value() { [[ ${2:--} != -* ]] || die "$1: give a value"; echo "$2"; }
number() { [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1: give a positive whole number"; echo "$2"; }

suite=$1 seeds='' envs='' methods='' steps='' jobs='' device=auto runs=runs/$1 dry_run='' extra=()
shift
while (($#)); do
    case $1 in
        --dry-run) dry_run=yes; shift; continue ;;
        --) shift; extra=("$@"); break ;;
        --seeds) seeds=$(number "$@") ;;
        --steps) steps=$(number "$@") ;;
        --jobs) jobs=$(number "$@") ;;
        --device) device=$(value "$@") ;;
        --runs-dir) runs=$(value "$@") ;;
        --envs) envs=$(value "$@"); while [[ ${3:--} != -* ]]; do envs+=" $3"; shift; done ;;
        --methods) methods=$(value "$@"); while [[ ${3:--} != -* ]]; do methods+=" $3"; shift; done ;;
        *) die "$1: unknown; see ./benchmark.sh --help" ;;
    esac
    shift 2
done

add() { # SCRIPT METHOD FLAG...: prints the command of a run
    local script=$1 method=$2 which=--env-id total=$steps own flag
    shift 2
    [[ ! $methods || " $methods " = *" $method "* ]] || return 0
    [[ $noise = none ]] || set -- "$@" --noise "$noise"
    [[ $script/$env != sa2c*/Swimmer-v* ]] || set -- "$@" --gamma 0.9999
    [[ $kind = continuous ]] || set -- "$@" --device "$device"
    [[ $kind != rlhf ]] || which=--task
    # Given to all, these would make methods alike, divide by another k, or give clean runs noise
    own="--alpha --beta --z --ent-coef --policy $which --noise-level --seed --total-timesteps"
    own+=" --exp-name --runs-dir --dry-run $*"
    for flag in "${extra[@]%%=*}"; do
        flag=${flag//_/-}
        [[ $flag != --* || " ${own//--no-/--} " != *" ${flag/#--no-/--} "* ]] ||
            die "-- $flag: not for all commands: the suite or an option sets it, or what goes with it"
    done
    [[ $total || $kind = rlhf ]] || case $suite/$script/$env in # the paper's number, if no other
        tiny/*) total=50000 ;;
        quick/* | sweep/*) total=200000 ;;
        evidence/*) total=1000000 ;;
        */sa2c*/*-v[0-9]*) total=2000000 ;;
        */HumanoidStandup-v*) total=10000000 ;;
        */Walker2d-v*) total=5000000 ;;
        */*-v[0-9]*) total=2000000 ;;
    esac
    set -- "$which" "$env" --seed "$seed" "$@" ${total:+--total-timesteps "$total"}
    [[ ! $suite/$total =~ ^(tiny|quick|sweep)/. ]] || set -- "$@" --eval-freq $(((total + 9) / 10))
    set -- "$@" --exp-name "$method" --runs-dir "$runs" "${extra[@]}"
    echo "python $script.py$(LC_ALL=C.UTF-8 printf ' %q' "$@")" # in quotes that Python reads, too
}

# k = alpha + beta |Z| is 20.5 in continuous control, 1.5 on Atari, 0.9 for imdb and toy, 0.7 for
# tldr. "norm", "coef" and "ce" are PPO with one setting divided by k (Atari: "coef" with two).
tiny_continuous() {
    add sppo_continuous ppo --policy gaussian
    add sppo_continuous dppo --beta 0
    add sppo_continuous sppo
}
evidence_continuous() {
    add sppo_continuous ppo --policy gaussian
    add sppo_continuous dppo --beta 0
    add sppo_continuous dppo-norm --beta 0 --max-grad-norm 0.0243902
    add sppo_continuous dppo-coef --beta 0 --vf-coef 0.0243902
    add sppo_continuous sppo
}
methods_continuous() {
    add sa2c_continuous a2c --policy gaussian
    add sa2c_continuous da2c --beta 0
    add sa2c_continuous sa2c
    evidence_continuous
    [[ $suite/$env != quick/Inverted* ]] || add sppo_continuous dppo-k --alpha 20.5 --beta 0
}
methods_atari() {
    add sa2c_atari a2c --beta 0
    add sa2c_atari sa2c
    add sppo_atari ppo --beta 0
    add sppo_atari ppo-authors --beta 0 --no-norm-adv
    add sppo_atari ppo-norm --beta 0 --max-grad-norm 0.333333
    add sppo_atari ppo-coef --beta 0 --vf-coef 0.333333 --ent-coef 0.00666667
    add sppo_atari sppo
}
methods_rlhf() {
    local norm=1.11111 coef=0.555556 ce=0.111111
    [[ $env != tldr ]] || norm=1.42857 coef=0.142857 ce=0.142857
    add sppo_rlhf ppo --beta 0
    add sppo_rlhf ppo-norm --beta 0 --max-grad-norm $norm
    add sppo_rlhf ppo-coef --beta 0 --vf-coef $coef
    [[ $env = toy ]] || add sppo_rlhf ppo-ce --beta 0 --ce-coef $ce
    add sppo_rlhf sppo
}
evidence_atari() {
    add sppo_atari ppo --beta 0
    add sppo_atari sppo
    [[ $noise = none ]] || add sppo_atari ppo-coef --beta 0 --vf-coef 0.333333 --ent-coef 0.00666667
}
evidence_rlhf() { # with beta 20, so that k is 20.5: at the authors' k, 0.9, there is little to see
    case $noise in none) return 0 ;; adv_flip) die "evidence: not with $env" ;; esac
    add sppo_rlhf ppo --noise-level 0.2 --beta 0
    add sppo_rlhf sppo --noise-level 0.2 --beta 20
    [[ $env = toy ]] || add sppo_rlhf ppo-ce --noise-level 0.2 --beta 0 --ce-coef 0.00487805
    add sppo_rlhf ppo-norm --noise-level 0.2 --beta 0 --max-grad-norm 0.0487805
    add sppo_rlhf ppo-coef --noise-level 0.2 --beta 0 --vf-coef 0.0243902
}
sweep_continuous() {
    for lr in 0.0001 0.0003 0.001; do
        for clip in 0.1 0.2 0.3; do
            add sppo_continuous dppo-lr$lr-clip$clip --beta 0 --learning-rate $lr --clip-coef $clip
            add sppo_continuous sppo-lr$lr-clip$clip --learning-rate $lr --clip-coef $clip
        done
    done
}

list() { # SUITE SEEDS ENVIRONMENT...: seed by seed, so that half a list compares all methods
    local set=$1 last=$((9999 + ${seeds:-$2})) seed env kind noise noisy
    shift 2
    for seed in $(seq 10000 $last); do
        for env in ${envs:-"$@"}; do
            env=${env%NoFrameskip-v4} # the same game, with another name
            case $env in
                ALE/*) die "$env: give the game, such as Breakout (sticky actions: sppo_atari.py --help)" ;;
                Humanoid-v*) die "$env: has settings of its own, see docs/control.md" ;;
                *:* | *-v[0-9]*) kind=continuous noisy=normal ;; # MODULE:ID, too
                tldr) kind=rlhf noisy=adv_flip ;; # its rewards have no known scale
                toy | imdb) kind=rlhf noisy=flip ;;
                *) kind=atari noisy=flip ;;
            esac
            declare -F "${set}_$kind" >/dev/null || die "$suite: not with $env"
            for noise in none $noisy; do "${set}_$kind"; done
        done
    done
}
three=(InvertedDoublePendulum-v4 LunarLanderContinuous-v3 Hopper-v4)
others=(Ant-v4 HumanoidStandup-v4 Walker2d-v4 HalfCheetah-v4 Swimmer-v4 BipedalWalker-v3)
case $suite in
    tiny) commands=$(list tiny 5 InvertedDoublePendulum-v4) ;;
    quick) commands=$(list methods 3 "${three[@]}") ;;
    continuous) commands=$(list methods 30 "${three[@]}" "${others[@]}") ;;
    atari) commands=$(list methods 5 Alien Centipede CrazyClimber Gopher Gravitar MsPacman \
        NameThisGame Qbert StarGunner UpNDown VideoPinball WizardOfWor Assault Asterix BeamRider \
        Breakout DemonAttack Frostbite Pong RoadRunner Seaquest SpaceInvaders) ;;
    rlhf) commands=$(list methods 5 imdb tldr) ;;
    evidence) commands=$(list evidence 8 "${three[@]}") ;;
    sweep) commands=$(list sweep 5 Hopper-v4 LunarLanderContinuous-v3) ;;
    *) die "$suite: no such suite; see ./benchmark.sh --help" ;;
esac
for method in $methods; do
    [[ $commands = *"--exp-name $method "* ]] || die "--methods $method: $suite has no such method"
done
[[ $commands ]] || die "$suite: not with $envs"
set -- --runs-dir "$runs" ${dry_run:+--dry-run} ${jobs:+--jobs "$jobs" --jobs-per-gpu "$jobs"}
[[ $dry_run || $commands != *"--task toy "* || -d runs/toy || ${extra[*]} = *--dataset* ]] ||
    die "no runs/toy; this makes it: python toy.py"
exec "$(command -v python || echo python3)" benchmarks/run.py "$@" <<<"$commands"
