"""Prints the commands of a pack's runs, for today's scripts.

python -m results.commands a2c/million | python benchmarks/run.py --runs-dir runs/again

Runs of edited scripts are left out.
"""

import re
import sys

from results.common import RESULTS, packed

# Of variants, and of a reward model that is only watched
REMOVED = ["--correct-flips", "--no-divide-by-p-old", "--eval-reward-model"]


def commands_of(pack):
    """Commands, and names of the runs that are left out."""
    runs, _ = packed(pack)
    commands = []
    left_out = []
    for run in runs.sort_values("seed", kind="stable").itertuples():
        command = run.command.replace("tests/sb3.py", "benchmarks/sb3.py")
        command = re.sub(r" --(run-name|exp-name|runs-dir) \S+", "", command)
        if not command.startswith("benchmarks/sb3.py"):  # which names its runs itself
            command += f" --exp-name {run.exp_name}"
        is_there = (RESULTS.parent / command.split()[0]).exists()
        if is_there and not any(flag in command for flag in REMOVED):
            commands.append(f"python {command} --runs-dir runs/again")
        else:
            left_out.append(run.run_name)
    return commands, left_out


if __name__ == "__main__":
    commands, left_out = commands_of(sys.argv[1])
    sys.stdout.writelines(f"{command}\n" for command in commands)
    if left_out:
        print("left out, of edited scripts:", *left_out, file=sys.stderr)
