#!/usr/bin/env bash
# Prints the suite's commands, in the order in which they run:
#     bash results/atari/games.sh | python benchmarks/run.py --runs-dir runs/atari-games
quoted="Alien Centipede Gravitar MsPacman NameThisGame Qbert UpNDown CrazyClimber"
others="Gopher StarGunner VideoPinball WizardOfWor Assault Asterix BeamRider Breakout"
others+=" DemonAttack RoadRunner"

run() { # GAME SEED FLAG...
    echo "python sppo_atari.py --env-id $1 --seed $2 --total-timesteps 500000" \
        "--eval-freq 100000 --runs-dir runs/atari-games ${*:3}"
}
authors_comparison() { # SEED
    for game in $quoted; do
        run $game $1 --beta 0 --no-norm-adv --exp-name ppo-authors
        run $game $1 --beta 0 --exp-name ppo
        run $game $1 --exp-name sppo
    done
}
loss() { # FLAG...
    for game in $others; do
        run $game 10000 "$@" --beta 0 --exp-name ppo
        run $game 10000 "$@" --exp-name sppo
    done
}
authors_comparison 10000
loss
loss --noise flip --noise-level 0.1
authors_comparison 10001
