"""Runs the commands on standard input, one a line, several at a time.

    ./benchmark.sh quick --dry-run | python benchmarks/run.py --jobs 2 --runs-dir runs/quick

The same list again continues. The cores are divided among the jobs, unless OMP_NUM_THREADS is set.
docs/benchmark.md says what runs on GPUs, and how many at a time."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm


def cores(quota=Path("/sys/fs/cgroup/cpu.max")):
    """In a container or a job of a cluster, fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    try:
        microseconds, period = map(int, quota.read_text().split())
    except (OSError, ValueError):  # not in a container, or "max"
        return count
    return max(1, min(count, microseconds // period))


CORES = cores()


@dataclass
class Args:
    jobs: int = CORES  # commands at a time on the CPU
    jobs_per_gpu: int | None = None  # commands at a time on each GPU; default: four games a core
    runs_dir: Path = Path("runs")  # folder of the runs, for their logs
    dry_run: bool = False  # print the commands that are left, and run nothing


def unfinished(commands, runs_dir):
    """Those without a finished run of this very command, by the script as it is now. The script
    itself judges a broken run, which is named, and files besides it (environment, reward)."""
    finished = set()
    for path in runs_dir.glob("*/args.json"):
        summary = path.with_name("summary.json")
        try:
            begun = json.loads(path.read_bytes())
            if summary.exists() and "identity" in begun:  # else of old scripts
                dict(json.loads(summary.read_bytes()))
                digest = begun["identity"].pop("script_sha256")
                if any(name.endswith("_sha256") for name in begun["identity"]):
                    continue
                for process in [begun, *begun["continued"]]:
                    finished.add((digest, *process["command"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"{path.parent}: a broken run ({error!r})", file=sys.stderr)
    for command in commands:
        script, *flags = shlex.split(command)[1:]  # without "python"
        digest = hashlib.sha256(Path(script).read_bytes()).hexdigest()
        if (digest, script, *flags) not in finished:
            yield command


def visible_gpus():
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu for gpu in listed.split(",") if gpu not in ("", "-1")]
    import torch  # slow, so only for lists that can use a GPU

    return [str(i) for i in range(torch.cuda.device_count())]


def jobs_per_gpu(commands, cores):
    """Four games for each of a GPU's cores, at most eight runs; language models run alone."""
    most_games = 0
    for command in commands:
        script = Path(shlex.split(command)[1])
        default = re.search(r"num_envs: int = (\d+)", script.read_text(encoding="utf-8"))
        if not default:
            return 1
        flag = re.search(r"--num-envs[ =](\d+)", command)
        most_games = max(most_games, int((flag or default)[1]))
    return min(8, max(1, 4 * cores // most_games))


def start(command, gpu, threads, runs_dir):
    """Returns the process and its log, which is named after the command's main flags."""
    named = re.findall(r"--(?:env-id|task|seed|noise|exp-name) ([^ /]+)", command)
    digest = hashlib.sha256(command.encode()).hexdigest()[:8]
    log = runs_dir / "logs" / f"{'__'.join([*named, digest])}.log"
    variables = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    with open(log, "a") as file:
        print("$", command, file=file, flush=True)
        return subprocess.Popen(shlex.split(command), stdout=file, stderr=file, env=variables), log


def main():
    args = tyro.cli(Args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C
    commands = [line.strip() for line in sys.stdin if line.strip()]
    left = list(unfinished(commands, args.runs_dir))
    if args.dry_run:
        sys.stdout.writelines(f"{command}\n" for command in left)
        return
    (args.runs_dir / "logs").mkdir(parents=True, exist_ok=True)
    for_gpu = [command for command in left if re.search("--device (auto|cuda)", command)]
    gpus = visible_gpus() if for_gpu else []
    if gpus:
        gpus *= args.jobs_per_gpu or jobs_per_gpu(for_gpu, CORES // len(gpus))
    for_cpu = [command for command in left if not gpus or command not in for_gpu]
    pools = [(for_gpu if gpus else [], gpus), (for_cpu, [""] * args.jobs)]
    done = len(commands) - len(left)
    jobs = sum(min(len(waiting), len(free)) for waiting, free in pools)
    # The time left is by the mean of all runs so far; a line a second, in files one a minute
    bar = tqdm(total=len(commands), initial=done, unit="run", smoothing=0, miniters=0)
    bar.mininterval = 1 if sys.stderr.isatty() else 60
    running = []
    failed = 0
    try:
        while bar.n < len(commands):
            for waiting, free in pools:
                while waiting and free:
                    gpu = free.pop(0)
                    process, log = start(waiting.pop(0), gpu, max(1, CORES // jobs), args.runs_dir)
                    running.append((process, log, gpu, free))
            for job in [job for job in running if job[0].poll() is not None]:
                running.remove(job)
                process, log, gpu, free = job
                free.append(gpu)
                last_line = log.read_text(errors="replace").rstrip().rsplit("\n", 1)[-1]
                tqdm.write(f"failed, see {log}" if process.returncode else last_line)
                failed += process.returncode != 0
                bar.update()
            bar.update(0)
            time.sleep(0.1)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    finally:
        bar.close()
        for process, *_ in running:
            process.terminate()
            process.wait()
    if failed:
        sys.exit(f"{failed} of {len(commands)} failed")


if __name__ == "__main__":
    main()
