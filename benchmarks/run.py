"""Runs the commands on standard input, one a line, several at a time.

    ./benchmark.sh quick --dry-run | python benchmarks/run.py --jobs 2 --runs-dir runs/quick

Run the same list again to continue. Jobs share the cores, unless OMP_NUM_THREADS is set."""

import contextlib
import functools
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
    """Cores for this program: in a container or a job of a cluster, fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # not in a container, or "max"
        microseconds, period = map(int, quota.read_text().split())
        count = max(1, min(count, microseconds // period))
    return count


CORES = cores()


@dataclass
class Args:
    jobs: int = CORES  # commands at a time on the CPU
    jobs_per_gpu: int | None = None  # on each GPU; default: up to four if all are games, else one
    runs_dir: Path = Path("runs")  # folder of the runs, for their logs
    dry_run: bool = False  # print the commands that are left, and run nothing


def key_of(script, *words):
    """What tells commands apart: the script's name and its flags, but for the folder of runs."""
    option = re.compile("--runs[-_]dir")
    kept = [word for before, word in zip(("", *words), words) if not option.fullmatch(before)]
    return Path(script).name, *(word for word in kept if not option.match(word))


def unfinished(commands, runs_dir):
    """The commands without a finished run. A run matches if its flags are equal and its files (the
    script, what it imported or read) are unchanged. The script's folder may have moved. Where only
    flags without an effect differ, such as --no-compile, the script finds its finished run."""

    @functools.cache
    def digest(path):
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()

    finished = {}
    for path in runs_dir.glob("*/sessions.jsonl"):
        try:
            if path.with_name("summary.json").exists():
                dict(json.loads(path.with_name("summary.json").read_bytes()))
                for session in map(json.loads, path.read_text().strip().split("\n")):
                    inside = session["directory"] + os.sep
                    files = {Path(p.removeprefix(inside)): d for p, d in session["files"].items()}
                    finished.setdefault(key_of(*session["command"]), []).append(files)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"{path.parent}: a broken run ({error!r})", file=sys.stderr)
    for command in commands:
        program, script, *words = shlex.split(command)
        if program != "python":
            raise ValueError(command)
        folder = Path(script).resolve(strict=True).parent
        recorded = finished.get(key_of(script, *words), [])
        if not any(all(digest(folder / p) == d for p, d in files.items()) for files in recorded):
            yield command


def visible_gpus():
    """The GPUs that CUDA uses: CUDA_VISIBLE_DEVICES up to the first entry that names no GPU."""
    import torch  # slow, so only for lists that can use a GPU

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return listed.split(",")[:count]


def start(command, gpu, threads, runs_dir):
    """Returns the process and its log, which is named after the command's main flags."""
    named = re.findall(r"--(?:env-id|task|seed|noise|exp-name)[ =]([^ /]+)", command)
    digest = hashlib.sha256(command.encode()).hexdigest()[:8]
    name = "__".join(named)[:200]  # a file's name may have 255 letters
    log = runs_dir / "logs" / f"{name}__{digest}.log"
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads)
    with open(log, "a") as file:
        print("$", command, file=file, flush=True)
        # Ctrl-C is for this program alone, which then ends the jobs with their children
        options = {"stdout": file, "stderr": file, "env": variables, "start_new_session": True}
        words = shlex.split(command)[1:]  # without "python", which PATH may lack
        return subprocess.Popen([sys.executable, *words], **options), log


def end(processes):
    """Interrupts jobs and their children, and kills those left after five seconds. Windows has no
    groups of processes: there it kills the jobs, and their children may stay."""
    for number in (signal.SIGINT, getattr(signal, "SIGKILL", None)):
        for process in processes:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, number) if os.name == "posix" else process.kill()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(job.poll() is None for job in processes):
            time.sleep(0.1)


def main():
    args = tyro.cli(Args)
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal does not have
    if args.jobs < 1 or (args.jobs_per_gpu is not None and args.jobs_per_gpu < 1):
        sys.exit("error: --jobs and --jobs-per-gpu must be at least 1")
    commands = list(dict.fromkeys(line.strip() for line in sys.stdin if line.strip()))
    try:
        left = list(unfinished(commands, args.runs_dir))
    except (OSError, ValueError) as error:
        sys.exit(f"error: each line must be `python SCRIPT FLAGS`: {error}")
    if args.dry_run:
        if os.name == "posix":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
        sys.stdout.writelines(f"{command}\n" for command in left)
        return
    (args.runs_dir / "logs").mkdir(parents=True, exist_ok=True)
    for_gpu = [command for command in left if re.search("--device[ =](auto|cuda)", command)]
    gpus = visible_gpus() if for_gpu else []
    if gpus:
        games = all("atari" in shlex.split(command)[1] for command in for_gpu)
        gpus *= args.jobs_per_gpu or (min(4, max(1, CORES // len(gpus))) if games else 1)
    for_cpu = [command for command in left if not gpus or command not in for_gpu]
    pools = [(for_gpu, gpus), (for_cpu, [""] * args.jobs)]
    done = len(commands) - len(left)
    jobs = sum(min(len(waiting), len(free)) for waiting, free in pools)
    print(f"{done} of {len(commands)} runs have finished, {len(left)} are left", file=sys.stderr)
    # The time left is by the mean of all runs so far. A line each second, in files each minute
    bar = tqdm(total=len(commands), initial=done, unit="run", smoothing=0, miniters=0)
    bar.mininterval = 1 if sys.stderr.isatty() else 60
    running = {}
    failed = 0
    silent = []  # without a score: a library may end a run early, without an error
    signals = []  # only noted, so that no signal interrupts the start of a run or the end of all
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
            signal.signal(number, lambda *arrived: signals.append(arrived))
    try:
        while bar.n < len(commands) and not signals:
            for waiting, free in pools:
                while waiting and free:
                    gpu = free.pop(0)
                    command = waiting.pop(0)
                    process, log = start(command, gpu, max(1, CORES // jobs), args.runs_dir)
                    running[process] = command, log, gpu, free
            for process in [process for process in running if process.poll() is not None]:
                command, log, gpu, free = running.pop(process)
                free.append(gpu)
                last_line = log.read_text(errors="replace").rstrip().rsplit("\n", 1)[-1]
                code = process.returncode
                cause = signal.strsignal(-code) if code < 0 else "failed"
                tqdm.write(f"{cause}, see {log}" if code else last_line)
                failed += code != 0
                if code == 0 and "; to play it: " not in last_line:
                    silent.append(command)
                bar.update()
            bar.update(0)
            time.sleep(0.1)
    finally:
        end(list(running))
        bar.close()
    failed += len(list(unfinished(silent, args.runs_dir)))
    if signals or failed:
        failures = f"{failed} of {len(commands)} failed"
        sys.exit("interrupted; the same command continues" if signals else failures)


if __name__ == "__main__":
    main()
