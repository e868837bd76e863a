"""benchmark.sh: its lists of commands, and what happens to runs that are killed, stopped or
fail."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tyro
from filelock import FileLock
from helpers import SETTINGS

import sppo_rlhf

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {f"{setting.script.__name__}.py": setting.script for setting in SETTINGS} | {
    "sppo_rlhf.py": sppo_rlhf
}
SUITES = ["quick", "continuous", "atari", "rlhf", "sweep", "noise", "robust", "evidence"]
ENVIRON = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
    ENVIRON.pop(name, None)
TINY = ["robust", "--envs", "InvertedDoublePendulum-v4", "--seeds", "1", "--jobs", "2", "--steps"]
STEPS = 16384
KILLED, BROKEN = (
    f"InvertedDoublePendulum-v4__{row}__10000" for row in ("dppo__none", "sppo__normal")
)


def benchmark(*arguments, env=ENVIRON, **options):
    command = [ROOT / "benchmark.sh", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


def commands(*arguments) -> list[list[str]]:
    lines = benchmark(*arguments, "--dry-run", "--jobs", os.cpu_count()).stdout.splitlines()
    assert lines.pop(0) == "export OMP_NUM_THREADS=1"
    return [shlex.split(line) for line in lines]


def resolved(command: list[str], runs_dir: Path):
    """The script's arguments, with its defaults filled in, for a command of the list."""
    script = SCRIPTS[command[1]]
    argv = [*command[2:], "--runs-dir", str(runs_dir)]
    if script is sppo_rlhf:
        return sppo_rlhf.parse_args(argv)
    return script.prepare(tyro.cli(script.Args, args=argv))


@pytest.mark.parametrize("suite", SUITES)
def test_every_command_of_a_suite_can_be_pasted_and_has_its_own_name(suite):
    listed = commands(suite)
    names = [command[command.index("--run-name") + 1] for command in listed]
    assert len(set(names)) == len(names) > 50
    for command in listed[:: len(listed) // 50]:
        args = tyro.cli(SCRIPTS[command[1]].Args, args=command[2:])
        assert command[0] == "python" and args.runs_dir == f"runs/{suite}"
        assert args.seed >= 10000 and args.run_name.endswith(f"__{args.seed}")
        assert f"__{args.noise}" in args.run_name


def test_suites_have_the_papers_numbers():
    for suite, envs, rows, seeds in (("continuous", 9, 8, 30), ("atari", 22, 7, 5)):
        listed = commands(suite)
        assert len(listed) == envs * rows * 2 * seeds
        assert Counter(c[c.index("--seed") + 1] for c in listed) == {
            str(10000 + i): envs * rows * 2 for i in range(seeds)
        }
        noise = Counter(c[c.index("--noise") + 1] if "--noise" in c else "none" for c in listed)
        assert (
            noise["none"] == len(listed) / 2 == noise["normal" if suite == "continuous" else "flip"]
        )
        assert ("WizardOfWor" in {c[c.index("--env-id") + 1] for c in listed}) == (suite == "atari")
    steps = {
        c[c.index("--run-name") + 1]: c[c.index("--total-timesteps") + 1]
        for c in commands("continuous")
    }
    assert steps["Walker2d-v4__sppo__none__10000"] == "5000000"
    assert (
        steps["Walker2d-v4__sa2c__none__10000"] == steps["Ant-v4__sppo__none__10000"] == "2000000"
    )
    assert steps["HumanoidStandup-v4__sppo__none__10000"] == "10000000"


@pytest.mark.parametrize("suite", SUITES)
def test_seeds_are_the_outer_loop(suite):
    seeds = [int(command[command.index("--seed") + 1]) for command in commands(suite)]
    assert seeds == sorted(seeds) and len(set(seeds)) > 1


LISTS = [*([suite] for suite in SUITES), ["evidence", "--envs", "Breakout", "imdb"]]


@pytest.mark.parametrize("arguments", LISTS, ids=" ".join)
def test_a_run_is_what_its_name_says(arguments):
    for command in commands(*arguments, "--seeds", 1):
        script = SCRIPTS[command[1]]
        if script is sppo_rlhf:
            args = script.with_defaults(script.parse_args(command[2:]))
        else:
            args = script.with_defaults(tyro.cli(script.Args, args=command[2:]))
        env, row, noise, _ = args.run_name.split("__")
        algo, *rest = row.split("-")
        settings = vars(args)
        default_level = {"none": 0.0, "normal": 0.05}.get(args.noise, 0.1)
        assert env == (args.task if script is sppo_rlhf else args.env_id)
        assert args.algo == algo
        assert settings.get("layer_norm", False) == ("layer-norm" in row)
        assert (len(settings.get("reward_model", ())) > 1) == ("ensemble" in row)
        assert settings.get("divide_by_p_old", True) == (rest != ["p"])
        assert args.correct_flips == (rest == ["corrected"])
        assert (args.alpha == (0.5 if args.beta else 1)) == (rest != ["k"])
        if env == "Swimmer-v4" and algo.endswith("a2c"):
            assert args.gamma == 0.9999
        if noise == args.noise:
            assert args.noise_level == default_level
        else:
            assert noise == f"{args.noise}-{args.noise_level:g}"
        if arguments == ["sweep"]:
            swept = f"lr{args.learning_rate:g}-clip{args.clip_coef:g}-epochs{args.update_epochs}"
            assert row == f"{algo}-{swept}"


@pytest.mark.parametrize(
    "suite, steps, seeds",
    [("quick", 200_000, 3), ("sweep", 1_000_000, 5), ("evidence", 1_000_000, 8)],
)
def test_suites_are_as_long_as_documented(suite, steps, seeds):
    listed = commands(suite)
    lengths = {command[command.index("--total-timesteps") + 1] for command in listed}
    assert lengths == {str(steps)}
    found = {command[command.index("--seed") + 1] for command in listed}
    assert found == {str(10000 + i) for i in range(seeds)}


@pytest.mark.parametrize(
    "suite, env",
    [
        ("quick", "InvertedDoublePendulum-v4"),
        ("atari", "Pong"),
        ("evidence", "Hopper-v4"),
        ("evidence", "Breakout"),
    ],
)
def test_rows_are_the_symmetric_method_and_its_single_factors(suite, env, tmp_path):
    """k = alpha + beta |Z| of the symmetric row; the others differ from the baseline in one factor
    1 / k."""
    rows = {}
    for command in commands(suite, "--envs", env, "--seeds", 1):
        if "--noise" in command and "sppo" in command[1]:
            args = resolved(command, tmp_path)
            rows[args.run_name.split("__")[1]] = vars(args)
    symmetric = rows["sppo"]
    k = symmetric["alpha"] - symmetric["beta"] * symmetric["z"]
    d = "" if env in ("Pong", "Breakout") else "d"
    plain = rows[f"{d}ppo"]
    assert plain["alpha"] == 1 and plain["beta"] == 0
    factors = {
        f"{d}ppo-norm": ["max_grad_norm"],
        f"{d}ppo-coef": ["vf_coef"] if d else ["vf_coef", "ent_coef"],
    }
    if env == "Breakout":
        del factors["ppo-norm"]
    for row, names in factors.items():
        for name in plain.keys() - {"run_name"}:
            if name in names:
                assert rows[row][name] == pytest.approx(plain[name] / k, rel=1e-5)
            else:
                assert rows[row][name] == plain[name]
    if suite == "quick":
        assert rows["dppo-k"]["alpha"] == k and rows["dppo-k"]["beta"] == 0
    if suite == "atari":
        changed = {name for name in plain if rows["ppo-authors"][name] != plain[name]}
        assert changed == {"norm_adv", "run_name"} and plain["norm_adv"]


def test_rows_of_evidence_differ_in_what_they_are_named_after(tmp_path):
    for env, rows in {
        "Hopper-v4": ["dppo", "dppo-coef", "dppo-norm", "ppo", "sppo", "sppo-p"],
        "Breakout": ["ppo", "ppo-coef", "ppo-corrected", "sppo", "sppo-p"],
    }.items():
        noisy = {}
        for command in commands("evidence", "--envs", env, "--seeds", 1):
            if "--noise" in command:
                args = resolved(command, tmp_path)
                noisy[args.run_name.split("__")[1]] = args
        assert sorted(noisy) == rows
        assert [row for row in rows if not noisy[row].divide_by_p_old] == ["sppo-p"]
        assert noisy["sppo-p"].beta == noisy["sppo"].beta > 0
        corrected = [row for row in rows if noisy[row].correct_flips]
        assert corrected == [row for row in rows if row == "ppo-corrected"]


def test_rows_of_evidence_for_reviews_have_one_k():
    rows = {}
    for command in commands("evidence", "--envs", "imdb", "Hopper-v4", "--seeds", 1):
        if "--task" in command:
            args = vars(sppo_rlhf.with_defaults(sppo_rlhf.parse_args(command[2:])))
            assert (args["noise"], args["noise_level"]) == ("flip", 0.2)
            assert args["total_timesteps"] == sppo_rlhf.TASKS["imdb"].total_timesteps
            rows[args.pop("run_name").split("__")[1]] = args
    plain = rows.pop("ppo")
    symmetric = rows.pop("sppo")
    k = symmetric["alpha"] - symmetric["beta"] * symmetric["z"]
    assert k == 20.5 and plain["alpha"] == 1 and plain["beta"] == 0
    expected = {
        "ppo-ce": ("ce_coef", plain["ce_coef"] / k),
        "ppo-norm": ("max_grad_norm", plain["max_grad_norm"] / k),
        "ppo-coef": ("vf_coef", plain["vf_coef"] / k),
        "ppo-corrected": ("correct_flips", True),
    }
    assert rows.keys() == expected.keys()
    for row, (name, value) in expected.items():
        assert rows[row].pop(name) == pytest.approx(value, rel=1e-5)
        assert rows[row] == {other: plain[other] for other in plain if other != name}


@pytest.mark.parametrize("task", ["toy", "imdb", "tldr"])
def test_rows_of_language_models_divide_what_k_divides(task):
    settings = vars(sppo_rlhf.TASKS[task]) | {"alpha": 0.5}
    k = settings["alpha"] - settings["beta"] * settings["z"]
    found = {}
    noises = set()
    for command in commands("rlhf", "--envs", task, "--seeds", 1):
        args = vars(sppo_rlhf.parse_args(command[2:]))
        noises.add(args["noise"])
        for name in ("max_grad_norm", "vf_coef", "ce_coef"):
            if args[name] != settings[name]:
                assert args["beta"] == 0
                found[name] = args[name]
    expected = {
        name: settings[name] / k
        for name in ("max_grad_norm", "vf_coef", "ce_coef")
        if settings[name]
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert noises == {"none", "adv_flip" if task == "tldr" else "flip"}


def test_options(tmp_path):
    listed = commands(
        "quick",
        "--envs",
        "Hopper-v4",
        "--seeds",
        2,
        "--steps",
        5000,
        "--runs-dir",
        tmp_path,
        "--device",
        "cpu",
    )
    assert len(listed) == 8 * 2 * 2
    for command in listed:
        args = tyro.cli(SCRIPTS[command[1]].Args, args=command[2:])
        assert (args.env_id, args.total_timesteps, args.device) == ("Hopper-v4", 5000, "cpu")
        assert args.runs_dir == str(tmp_path) and args.seed in (10000, 10001)
    only = ["--only", "Hopper-v4__sppo__none__10001"]
    assert commands("quick", *only) == [c for c in commands("quick") if c[-1] == only[1]]
    threads = benchmark("quick", "--dry-run", env=ENVIRON | {"OMP_NUM_THREADS": "3"})
    assert threads.stdout.startswith("export OMP_NUM_THREADS=3\n")
    for wrong in ("0", "two", "4,2"):
        refused = benchmark("quick", "--dry-run", env=ENVIRON | {"OMP_NUM_THREADS": wrong})
        assert refused.returncode == 2 and not refused.stdout
        (line,) = refused.stderr.splitlines()
        assert f"'{wrong}'" in line


def test_flags_after_two_dashes_are_those_of_every_run_and_win():
    flags = ["--eval-freq", "7", "--hidden-sizes", "8", "8", "--no-norm-adv", "--z", "-2"]
    plain = commands("quick", "--seeds", 1)
    changed = [
        shlex.split(line)
        for line in benchmark("quick", "--seeds", 1, "--dry-run", "--", *flags).stdout.splitlines()
    ][1:]
    assert all("--eval-freq" in command for command in plain)  # over which the flag is to win
    assert len(changed) == len(plain)
    for before, after in zip(plain, changed):
        old = vars(tyro.cli(SCRIPTS[before[1]].Args, args=before[2:]))
        if "sa2c" in after[1]:
            after = [word for word in after if word != "--no-norm-adv"]
        new = vars(tyro.cli(SCRIPTS[after[1]].Args, args=after[2:]))
        assert new["eval_freq"] == 7 and new["hidden_sizes"] == (8, 8) and new["z"] == -2
        assert new.get("norm_adv", False) is False
        for name in old.keys() - {"eval_freq", "hidden_sizes", "norm_adv", "z"}:
            assert new[name] == old[name]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fast"], "fast: no such suite"),
        (["quick", "--seeds", "many"], "--seeds many"),
        (["quick", "--jobs", "0"], "--jobs 0"),
        (["quick", "--steps"], "--steps"),
        (["quick", "--device", "tpu"], "--device tpu"),
        (["quick", "--envs"], "--envs"),
        (["quick", "--envs", "Hoper-v4"], "--envs Hoper-v4: no such environment"),
        (["quick", "--envs", "ALE/Pong-v5"], "--envs ALE/Pong-v5: give the bare name"),
        (["quick", "--envs", "Ant-v4", "Ant-v4"], "--envs Ant-v4: named twice"),
        (["continuous", "--envs", "Humanoid-v4"], "--envs Humanoid-v4: has settings of its own"),
        (["quick", "--only", "Hopper-v4"], "--only Hopper-v4: not a run of this list"),
        (["quick", "--fast"], "--fast: unknown"),
        (["quick", "--runs-dir", "a b"], "--runs-dir 'a b'"),
        (["quick", "--runs-dir", "--dry-run"], "--runs-dir: give a value"),
        (["quick", "--seeds", "--dry-run"], "--seeds: give a value"),
        (["quick", "--device", "-1"], "--device: give a value"),
        (["quick", "--only", "--slurm"], "--only: give a value"),
        (["quick", "--"], "-- : give flags of the scripts"),
        (["quick", "--", "7"], "-- 7: give flags of the scripts"),
        (["quick", "--", "--bins", "$(ls)"], "-- '.*': letters"),
        (["quick", "--", "--bins", "a b"], "-- 'a b': letters"),
        (["quick", "--", "--seed", "1"], "-- --seed: set by benchmark.sh"),
        (["quick", "--", "--run_name=x"], "-- --run_name=x: set by benchmark.sh"),
        (["quick", "--", "--bins", "7", "--device", "cpu"], "-- --device: set by benchmark.sh"),
        (["continuous", "--", "--alpha", "1"], "-- --alpha: rows differ in it"),
        (["atari", "--", "--beta=2"], "-- --beta: rows differ in it"),
        (["quick", "--", "--vf_coef", "1"], "-- --vf-coef: rows differ in it"),
        (["atari", "--", "--bins", "7", "--norm-adv"], "-- --norm-adv: rows differ in it"),
        (["sweep", "--", "--update-epochs", "3"], "-- --update-epochs: rows differ in it"),
        (["noise", "--", "--noise-level", "0.3"], "-- --noise-level: rows differ in it"),
        (["speed", "--", "--bins", "7"], "speed: takes"),
        (["sweep", "--envs", "Pong"], "sweep: Pong"),
        (["noise", "--envs", "imdb"], "noise: imdb"),
        (["robust", "--envs", "Pong"], "robust: .* not Pong"),
        (["speed", "--jobs", "2"], "speed: takes"),
    ],
)
def test_bad_input_is_one_line_and_no_work(arguments, message, tmp_path):
    shutil.copy(ROOT / "benchmark.sh", tmp_path)
    command = [tmp_path / "benchmark.sh", *arguments]
    result = subprocess.run(command, env=ENVIRON, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(f"benchmark.sh: .*{message}.*\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.sh"]


def test_a_copied_script_is_a_row_after_the_line_that_the_documentation_adds(tmp_path):
    page = (ROOT / "docs" / "benchmark.md").read_text()
    above, added = re.search(r"```diff\n (.*)\n\+(.*)\n```", page).groups()
    suite = (ROOT / "benchmark.sh").read_text()
    changed = suite.replace(above + "\n", f"{above}\n{added}\n", 1)
    assert changed != suite
    (tmp_path / "benchmark.sh").write_text(changed)
    command = ["bash", tmp_path / "benchmark.sh", "quick", "--envs", "Hopper-v4", "--seeds", "1"]
    listed = subprocess.check_output([*command, "--dry-run"], env=ENVIRON, text=True)
    rows = re.findall(r"python sppo_mine.py .* --run-name (\S+)", listed)
    assert rows == [f"Hopper-v4__mine__{noise}__10000" for noise in ("none", "normal")]


@pytest.mark.parametrize("suite", ["continuous", "atari", "rlhf"])
def test_a_copied_script_is_run_like_the_original(suite, tmp_path):
    """As long, with the same settings, and on a GPU if the original is: that decides how many
    threads it gets."""
    env = ENVIRON | {"CUDA_VISIBLE_DEVICES": "0"}
    arguments = [suite, "--seeds", "1", "--dry-run"]
    copied = re.sub(r"add (sa2c|sppo)_\w+", r"add \1_mine", (ROOT / "benchmark.sh").read_text())
    (tmp_path / "benchmark.sh").write_text(copied)
    command = ["bash", tmp_path / "benchmark.sh", *arguments]
    listed = subprocess.check_output(command, env=env, text=True)
    originals = benchmark(*arguments, env=env).stdout
    assert listed == re.sub(r"(sa2c|sppo)_\w+.py", r"\1_mine.py", originals)


@pytest.mark.parametrize("log", [None, ""], ids=["no log", "empty log"])
def test_a_copied_run_of_other_flags_is_refused(log, tmp_path):
    """Without the command beside its log, the one in its args.json counts."""
    name = "Hopper-v4__sppo__none__10000"
    arguments = ["quick", "--only", name, "--runs-dir", tmp_path]
    (command,) = commands(*arguments)
    (tmp_path / name).mkdir()
    (tmp_path / name / "args.json").write_text(json.dumps({"command": command[1:]}))
    (tmp_path / name / "summary.json").write_text(json.dumps({"finished": True}))
    if log is not None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / f"{name}.sh").write_text(log)
    assert benchmark(*arguments).returncode == 0
    other = benchmark(*arguments, "--steps", 5000)
    assert other.returncode == 2
    assert f"{name} was started by another command (python sppo_continuous.py" in other.stderr


def test_a_run_whose_command_cannot_be_written_has_failed(tmp_path):
    """As on a full disk: the benchmark goes on, and says so at the end."""
    name = "Hopper-v4__sppo__none__10000"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"{name}.sh").symlink_to(tmp_path / "none" / "here")
    result = benchmark("quick", "--only", name, "--runs-dir", tmp_path)
    assert result.returncode == 1
    assert f"failed: {name}: its command cannot be written" in result.stderr


@pytest.mark.parametrize("left", ["args.json", "checkpoint.pt"])
def test_a_run_whose_remains_cannot_be_moved_has_failed(left, tmp_path):
    """Killed before its first checkpoint, or with a damaged summary: both stay where they are."""
    name = "Hopper-v4__sppo__none__10000"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "broken").touch()
    folder = tmp_path / name
    folder.mkdir()
    (folder / left).touch()
    (folder / "summary.json").write_text("{")
    result = benchmark("quick", "--only", name, "--runs-dir", tmp_path)
    assert result.returncode == 1
    assert re.search(f"failed: {name}: .* cannot be moved to {tmp_path}/logs/broken", result.stderr)
    assert sorted(path.name for path in folder.iterdir()) == [left, "summary.json"]
    assert not (tmp_path / "logs" / f"{name}.log").exists()  # was not started


def test_shellcheck():
    for script in ("benchmark.sh", ".ci/run"):
        subprocess.run(["shellcheck", ROOT / script], check=True, env=ENVIRON)


def summaries(runs: Path) -> dict[str, tuple]:
    """{run: what must not change once it has finished}."""
    return {
        path.parent.name: (
            path.read_bytes(),
            path.stat().st_mtime_ns,
            (path.parent / "progress.csv").read_bytes(),
        )
        for path in runs.glob("*/summary.json")
    }


def running(runs: Path) -> dict[str, int]:
    """{run: process} of the scripts that write there now."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if any(word.endswith(".py") for word in words[:3]) and str(runs) in " ".join(words):
            name = (
                words[words.index("--run-name") + 1]
                if "--run-name" in words
                else Path(words[-2]).name
            )
            found[name] = int(path.parent.name)
    return found


def wait_for(condition, seconds: float = 120):
    started = time.monotonic()
    while not (result := condition()):
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return result


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A benchmark during which a run is killed, and the same one started again, and again."""
    runs = tmp_path_factory.mktemp("runs") / "tiny"
    (runs / BROKEN).mkdir(parents=True)  # of a run killed before its first checkpoint
    (runs / BROKEN / "args.json").write_text("{}")
    arguments = [*TINY, STEPS, "--runs-dir", runs]
    command = [ROOT / "benchmark.sh", *map(str, arguments)]
    with subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, text=True) as first:
        wait_for((runs / KILLED / "checkpoint.pt").exists)
        os.kill(running(runs)[KILLED], signal.SIGKILL)
        meanwhile = [benchmark(*arguments), benchmark(*arguments, "--only", BROKEN)]
        first_errors = first.communicate(timeout=300)[1]
    before, rows_before = summaries(runs), (runs / KILLED / "progress.csv").read_text()
    elsewhere = benchmark(*arguments, "--device", "cpu")
    second = benchmark(*arguments)
    after = summaries(runs)
    third = benchmark(*arguments)
    return dict(locals())


@pytest.mark.slow
def test_a_killed_run_is_reported_and_does_not_stop_the_others(history):
    assert history["first"].returncode == 1
    assert f"failed: {KILLED}: killed by signal 9 " in history["first_errors"]
    assert "7 of 8 done, 0 running, 1 failed" in history["first_errors"]
    assert len(history["before"]) == 7 and KILLED not in history["before"]


@pytest.mark.slow
def test_started_again_every_run_finishes_once_and_the_others_are_untouched(history):
    assert history["second"].returncode == 0, history["second"].stderr
    assert history["after"].keys() == history["before"].keys() | {KILLED}
    assert {name: history["after"][name] for name in history["before"]} == history["before"]
    runs = history["runs"]
    assert {path.name for path in runs.iterdir()} == history["after"].keys() | {"logs"}
    rows = (runs / KILLED / "progress.csv").read_text()
    assert rows.startswith(
        history["rows_before"]
    )  # resumed, not begun anew: nothing lost, nothing doubled
    steps = [int(line.split(",")[0]) for line in rows.splitlines()[1:]]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    assert json.loads((runs / KILLED / "summary.json").read_text())["resume"] == str(runs / KILLED)
    for name in history["before"]:
        assert json.loads((runs / name / "summary.json").read_text())["resume"] is None


@pytest.mark.slow
def test_a_finished_benchmark_has_nothing_to_do(history):
    assert history["third"].returncode == 0 and "8 of 8 done" in history["third"].stderr
    assert summaries(history["runs"]) == history["after"]


@pytest.mark.slow
def test_a_second_start_in_the_same_folder_refuses(history):
    for result in history["meanwhile"]:
        assert result.returncode == 2
        message = "benchmark.sh: another benchmark is running in .*\n"
        assert re.fullmatch(message, result.stderr)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_anew(history):
    assert [
        path.name.split(".")[0] for path in (history["runs"] / "logs" / "broken").iterdir()
    ] == [BROKEN.split(".")[0]]


@pytest.mark.slow
def test_runs_of_other_settings_are_not_taken_for_finished(history):
    result = benchmark(*TINY, 4096, "--runs-dir", history["runs"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "was started by another command" in result.stderr
    assert summaries(history["runs"]) == history["after"]


@pytest.mark.slow
def test_another_device_is_not_another_setting(history):
    result = benchmark(*TINY, STEPS, "--runs-dir", history["runs"], "--device", "cpu")
    assert result.returncode == 0 and "8 of 8 done" in result.stderr


@pytest.mark.slow
def test_an_interrupted_run_is_not_continued_on_another_device(history):
    """Its checkpoint knows the device, and `--resume` takes no other flag."""
    result = history["elsewhere"]
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{KILLED}: its checkpoint continues with --device auto only" in result.stderr


@pytest.fixture(scope="module")
def repaired(history, tmp_path_factory):
    """A finished benchmark of which files of three runs were damaged, started again."""
    runs = tmp_path_factory.mktemp("repaired") / "runs"
    shutil.copytree(history["runs"], runs)
    cut, anew, lost = sorted(history["after"])[:3]
    summary = (runs / cut / "summary.json").read_bytes()
    (runs / cut / "summary.json").write_bytes(summary[: len(summary) // 2])
    (runs / anew / "summary.json").write_bytes(b"")
    (runs / anew / "checkpoint.pt").unlink()
    (runs / lost / "summary.json").unlink()
    (runs / lost / "checkpoint.pt").write_bytes(b"no checkpoint")
    before = summaries(runs)
    result = benchmark(*TINY, STEPS, "--runs-dir", runs)
    return dict(locals())


@pytest.mark.slow
def test_a_damaged_summary_is_no_finished_run(repaired, history):
    """With a checkpoint the run is resumed, without it is begun anew."""
    runs = repaired["runs"]
    for name in (repaired["cut"], repaired["anew"]):
        summary = json.loads((runs / name / "summary.json").read_text())
        resumed = str(runs / name) if name == repaired["cut"] else None
        assert summary["finished"] and summary["resume"] == resumed
        assert (runs / name / "progress.csv").read_bytes() == history["after"][name][2]
    broken = {path.name.rsplit(".", 1)[0] for path in (runs / "logs" / "broken").iterdir()}
    assert broken >= {f"{repaired['cut']}.summary.json", repaired["anew"]}
    others = repaired["before"].keys() - {repaired["cut"], repaired["anew"]}
    assert len(others) == 5
    assert {name: summaries(runs)[name] for name in others} == {
        name: repaired["before"][name] for name in others
    }


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_in_the_words_of_the_script(repaired):
    runs, lost, result = repaired["runs"], repaired["lost"], repaired["result"]
    assert result.returncode == 1 and "7 of 8 done, 0 running, 1 failed" in result.stderr
    (failed,) = re.findall("failed: (.*)", result.stderr)
    said = (runs / "logs" / f"{lost}.log").read_text().splitlines()[-1]
    assert said.startswith("error: ") and f"{lost}/checkpoint.pt" in said
    assert failed == f"{lost}: exit status 2, {said} ({runs}/logs/{lost}.log)"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning-rate", "-1"], "error: --learning-rate -1.0: must be between"),
        (["--no-such-flag", "3"], "Unrecognized options: --no-such-flag, 3"),
        (["--num-envs", "many"], "Error parsing --num-envs: invalid literal for int()"),
    ],
)
def test_the_first_refused_flag_ends_it(flags, said, tmp_path):
    """And says why. Nothing is left that a second start would take for a run."""
    arguments = ["quick", "--envs", "Pendulum-v1", "--seeds", 1, "--jobs", 1]
    result = benchmark(*arguments, "--runs-dir", tmp_path / "runs", "--", *flags)
    assert result.returncode == 1 and "0 of 16 done, 0 running, 1 failed" in result.stderr
    (failed,) = re.findall("failed: (.*)", result.stderr)
    assert failed.startswith("Pendulum-v1__a2c__none__10000: exit status 2, ") and said in failed
    assert "wrong input, so nothing more was started" in result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["logs"]


@pytest.mark.parametrize(
    "summary, done",
    [
        ('{"sps": 1.0, "finished": true}', True),
        ('{\n  "sps": 1.0,\n  "finished": true\n}\n', True),
        ('{\n  "finished": true,\n  "commit": "abc"\n}', True),
        ('{\n  "sps": 1.0,\n  "finished": true\n', False),
        ('  "sps": 1.0,\n  "finished": true\n}', False),
        ('{\n  "sps": 1.0,\n  "finished": false\n}', False),
        ('{\n  "sps": 1.0\n}', False),
        ("\0" * 100, False),
        ("", False),
        (None, False),
    ],
    ids=range(10),
)
def test_a_run_is_done_if_its_summary_is_whole(summary, done, stub, tmp_path):
    """The stub begins anew what is not done."""
    runs, name = tmp_path / "runs", "Hopper-v4__sppo__none__10000"
    (runs / name).mkdir(parents=True)
    if summary is not None:
        (runs / name / "summary.json").write_text(summary)
    arguments = ["quick", "--only", name, "--runs-dir", runs]
    result = benchmark(*arguments, env=stub | {"AT_ONCE": "1"})
    assert result.returncode == 0, result.stderr
    assert ((runs / name / "summary.json").read_text() == summary) == done


def test_a_folder_in_which_another_process_runs_is_not_moved_away(stub, tmp_path):
    """Without a checkpoint yet. A lock that nobody holds any more is no obstacle."""
    names = [f"Hopper-v4__{row}__none__10000" for row in ("dppo", "sppo")]
    for name in names:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "mine").touch()
        (tmp_path / "runs" / name / "lock").touch()
    with FileLock(tmp_path / "runs" / names[0] / "lock"):
        arguments = ["quick", "--envs", "Hopper-v4", "--seeds", 1, "--runs-dir", tmp_path / "runs"]
        result = benchmark(*arguments, env=stub | {"AT_ONCE": "1"})
    assert result.returncode == 1 and result.stderr.count("failed: ") == 1
    assert f"failed: {names[0]}: exit status 1, FileExistsError" in result.stderr
    assert (tmp_path / "runs" / names[0] / "mine").exists()
    assert not (tmp_path / "runs" / names[1] / "mine").exists()


def heed_interrupts():
    """What a shell starts in the background, pytest for one, ignores Ctrl-C, and so would its
    children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def started():
    """Starts a benchmark. Returns its process once two runs have begun to train."""
    processes = []

    def started_(runs: Path, **options):
        command = [ROOT / "benchmark.sh", *TINY, "1000000", "--runs-dir", str(runs)]
        options |= {"env": ENVIRON, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, preexec_fn=heed_interrupts, **options)
        processes.append((process, runs))
        wait_for(lambda: len(list(runs.glob("*/events*"))) == 2)
        time.sleep(1)
        return process

    yield started_
    for process, runs in processes:
        process.kill()
        process.wait()
        for pid in running(runs).values():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_saves_all_runs(signum, started, tmp_path):
    """From a terminal Ctrl-C reaches the whole process group, so here too; and who reads the
    messages may be gone by then, as with `| tee`."""
    process = started(tmp_path, stderr=subprocess.PIPE)
    if signum == signal.SIGTERM:
        process.stderr.close()
    os.killpg(process.pid, signum)
    if signum == signal.SIGINT:
        errors = process.communicate(timeout=60)[1]
        assert "run the same command to continue" in errors and "failed:" not in errors
    assert process.wait(60) == 130
    assert not running(tmp_path)
    saved = list(tmp_path.glob("*/checkpoint.pt"))
    assert len(saved) == 2 and not list(tmp_path.glob("*/summary.json"))
    name = saved[0].parent.name  # and goes on from there
    with subprocess.Popen(
        [ROOT / "benchmark.sh", *TINY, "1000000", "--runs-dir", str(tmp_path), "--only", name],
        env=ENVIRON,
    ) as again:
        wait_for(lambda: name in running(tmp_path))
        again.terminate()
    assert (tmp_path / "logs" / f"{name}.sh").exists() and not (
        tmp_path / "logs" / "broken"
    ).exists()


@pytest.mark.slow
def test_runs_outlive_a_killed_benchmark_and_keep_others_out(started, tmp_path):
    process = started(tmp_path, stderr=subprocess.DEVNULL)
    process.kill()
    process.wait()
    assert len(running(tmp_path)) == 2
    second = benchmark(*TINY, 1000000, "--runs-dir", tmp_path)
    assert second.returncode == 2 and "another benchmark is running" in second.stderr


STUB = """#!{python}
import json, os, pathlib, sys, time
if sys.argv[1] == "-":  # the check of what is installed
    sys.exit()
flags = sys.argv[2:]
folder = pathlib.Path(flags[flags.index("--runs-dir") + 1], flags[flags.index("--run-name") + 1])
folder.mkdir()
waiting, began = folder.parent / "waiting", time.time()
waiting.mkdir(exist_ok=True)
(waiting / folder.name).touch()
while len(list(waiting.iterdir())) < int(os.environ["AT_ONCE"]) and time.time() < began + 60:
    time.sleep(0.05)
time.sleep(0.2)
record = dict(gpu=os.environ.get("CUDA_VISIBLE_DEVICES"), threads=os.environ["OMP_NUM_THREADS"])
record |= dict(began=began, ended=time.time(), flags=flags, finished=True)
(folder / "summary.json").write_text(json.dumps(record))
"""


@pytest.fixture
def stub(tmp_path):
    """An environment in which python only notes when and where it ran, on a machine with two
    GPUs."""
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("python", STUB.format(python=sys.executable)),
        ("nvidia-smi", "#!/bin/sh\necho 0; echo 1\n"),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return ENVIRON | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "arguments, gpus, at_once",
    [
        (["atari", "--envs", "Pong", "--jobs", "2"], {"0": 7, "1": 7}, 4),
        (["atari", "--envs", "Pong", "--jobs", "3", "--device", "cpu"], {None: 14}, 3),
        (["continuous", "--envs", "Hopper-v4", "--jobs", "4"], {None: 16}, 4),
        pytest.param(
            ["noise", "--envs", "Hopper-v4", "Pong", "--jobs", "1"],
            {"0": 18, "1": 18, None: 36},
            1,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_jobs_are_spread_over_gpus_or_cores(arguments, gpus, at_once, stub, tmp_path):
    """The first `at_once` wait for each other, and would wait in vain if there were not as many."""
    env = stub | {"AT_ONCE": str(at_once)}
    result = benchmark(*arguments, "--seeds", 1, "--runs-dir", tmp_path / "runs", env=env)
    assert result.returncode == 0, result.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    counts = Counter(record["gpu"] for record in records)
    assert counts.keys() == gpus.keys() and counts[None] == gpus.get(None, 0)
    assert sum(counts.values()) == sum(gpus.values())
    for gpu in gpus:
        of_gpu = [record for record in records if record["gpu"] == gpu]
        running = [sum(a["began"] <= b["began"] < a["ended"] for a in of_gpu) for b in of_gpu]
        assert len(of_gpu) > 2 and max(running) == (at_once / 2 if gpu and at_once > 1 else at_once)
        assert gpu or {record["threads"] for record in of_gpu} == {"1"}


@pytest.mark.parametrize(
    "visible, nvidia_smi, gpus, threads",
    [("", True, {""}, {"1"}), ("-1", True, {"-1"}, {"1"}), ("3,5", False, {"3", "5"}, None)],
)
def test_gpus_are_those_that_are_visible(visible, nvidia_smi, gpus, threads, stub, tmp_path):
    """Without nvidia-smi, too, as in some containers. Hidden ones count as none."""
    if not nvidia_smi:
        (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    env = stub | {"AT_ONCE": "1", "CUDA_VISIBLE_DEVICES": visible}
    result = benchmark(
        *("atari", "--envs", "Pong", "--seeds", 1, "--runs-dir", tmp_path / "runs"), env=env
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert len(records) == 14 and {record["gpu"] for record in records} == gpus
    assert not threads or {record["threads"] for record in records} == threads


def test_an_nvidia_smi_that_fails_means_no_gpus(stub, tmp_path):
    """It writes its error to standard output."""
    message = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    (tmp_path / "bin" / "nvidia-smi").write_text(f'#!/bin/sh\necho "{message}"\nexit 9\n')
    env = stub | {"AT_ONCE": "1"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    result = benchmark(
        *("atari", "--envs", "Pong", "--seeds", 1, "--runs-dir", tmp_path / "runs"), env=env
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert [record["gpu"] for record in records] == [None] * 14


SBATCH = """#!/bin/sh
for word; do :; done
printf %s "$word" >{wrapped}
"""  # the last word, that after --wrap


def test_a_job_of_slurm_is_the_same_run_with_the_same_flags(stub, tmp_path):
    """Without a Slurm: sbatch only notes the command of a job, which is then the second job's."""
    wrapped = tmp_path / "wrapped"
    for name, text in (
        ("sbatch", SBATCH.format(wrapped=wrapped)),
        ("scontrol", "#!/bin/sh\necho MaxArraySize = 1001\n"),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    runs, flags = tmp_path / "runs", ["--bins", "7", "--z", "-2"]
    arguments = ["quick", "--envs", "Hopper-v4", "--seeds", 1, "--runs-dir", runs, "--slurm"]
    submitted = benchmark(*arguments, "--", *flags, env=stub)
    assert submitted.returncode == 0, submitted.stderr
    env = stub | {"SLURM_ARRAY_TASK_ID": "2", "AT_ONCE": "1"}
    subprocess.run(["bash", wrapped], env=env, cwd=ROOT, check=True, capture_output=True)
    (folder,) = (path.parent for path in runs.glob("*/summary.json"))
    listed = benchmark(*arguments[:-1], "--dry-run", "--", *flags, env=stub).stdout.splitlines()
    assert shlex.split(listed[2])[2:] == json.loads((folder / "summary.json").read_text())["flags"]
    assert " ".join(flags) in listed[2]


def test_slurm_gives_gpus_to_those_runs_that_can_use_one(stub, tmp_path):
    """Two arrays: games with a GPU each, continuous control without."""
    submitted = tmp_path / "submitted"
    for name, text in (
        ("sbatch", f'#!/bin/sh\necho "$@" | head -n 1 >>{submitted}\n'),
        ("scontrol", "#!/bin/sh\necho MaxArraySize = 1001\n"),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    arguments = ["noise", "--envs", "Hopper-v4", "Breakout", "--seeds", 1]
    result = benchmark(*arguments, "--runs-dir", tmp_path / "runs", "--slurm", env=stub)
    assert result.returncode == 0, result.stderr
    for_cpu, for_gpu = submitted.read_text().splitlines()
    assert "--cpus-per-task=1 " in for_cpu and "--gpus-per-task" not in for_cpu
    assert "--cpus-per-task=4 --gpus-per-task=1 " in for_gpu
    listed = commands(*arguments)
    for line, script in ((for_cpu, "continuous"), (for_gpu, "atari")):
        number = sum(script in command[1] for command in listed)
        assert f" --array=1-{number} " in line and number > 0


def slurm_conf(folder: Path) -> str:
    user, host = os.popen("id -un").read().strip(), os.popen("hostname -s").read().strip()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MaxArraySize=4
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@pytest.mark.skipif(
    not (shutil.which("slurmctld") and shutil.which("slurmd")),
    reason="no Slurm here: apt install slurm-wlm",
)
@pytest.mark.slow
def test_slurm_runs_what_is_not_finished(history, tmp_path):
    """A Slurm of one node, whose arrays are too short for all runs at once."""
    runs = tmp_path / "runs"
    shutil.copytree(history["runs"], runs)
    missing = [name for name in history["after"] if "layer-norm" not in name]
    for name in missing:
        shutil.rmtree(runs / name)
    kept = summaries(runs)
    (tmp_path / "slurm.conf").write_text(slurm_conf(tmp_path))
    env = ENVIRON | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    host = os.popen("hostname -s").read().strip()
    daemons = [
        subprocess.Popen(daemon, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for daemon in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host])
    ]
    try:
        wait_for(
            lambda: (
                "idle" in subprocess.run(["sinfo"], env=env, capture_output=True, text=True).stdout
            )
        )
        submitted = benchmark(*TINY, STEPS, "--runs-dir", runs, "--slurm", env=env)
        assert submitted.returncode == 0, submitted.stderr
        assert submitted.stdout.count("Submitted batch job") == 2
        squeue = dict(args=["squeue", "-h"], env=env, capture_output=True, check=True)
        wait_for(lambda: not subprocess.run(**squeue).stdout)
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
    logs = "".join(path.read_text() for path in (runs / "logs").glob("slurm-*.log"))
    assert summaries(runs).keys() == kept.keys() | set(missing), logs
    assert {name: summaries(runs)[name] for name in kept} == kept
    assert len(list((runs / "logs").glob("slurm-*.log"))) == 4


SPEED = [sys.executable, ROOT / "benchmarks" / "speed.py", "--repeats", "1"]


@pytest.mark.slow
def test_speed_is_compared_with_the_peers(tmp_path):
    flags = ["--total-timesteps", "4096", "--out", tmp_path]
    command = [*SPEED, "--env-id", "InvertedDoublePendulum-v4", *flags]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    page = (tmp_path / "speed.md").read_text()
    assert re.search(r"(?m)^\| Stable-Baselines3 \| .* \| 1.00 \| 1.00 \|$", page)
    for method in ("SBX", "ours, Gaussian PPO", r"ours, SPPO \(11 bins\)"):
        ratio = re.search(rf"(?m)^\| {method} \| [\d,]+ \(.*\) \| ([\d.]+) \|", page)[1]
        assert float(ratio) > 0
    assert json.loads((tmp_path / "summary.json").read_text())["finished"]


@pytest.mark.slow
def test_a_comparison_of_speed_says_what_failed_and_why():
    command = [*SPEED, "--env-id", "Nowhere-v4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: benchmarks/sb3.py --algo ppo --env-id Nowhere-v4")
    assert "Environment `Nowhere` doesn't exist" in result.stderr


@pytest.mark.slow
def test_an_interrupted_comparison_of_speed_leaves_nothing_behind(tmp_path):
    env = ENVIRON | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(SPEED, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running = ["pgrep", "-f", f"sb3.py .*{tmp_path}"]
    wait_for(lambda: subprocess.run(running, stdout=subprocess.DEVNULL).returncode == 0)
    process.terminate()
    assert process.wait(30) == 1
    assert subprocess.run(running, stdout=subprocess.DEVNULL).returncode == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_parts_of_an_atari_step_add_up_to_less_than_the_step(monkeypatch):
    """1100 steps are two rollouts of 1024."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import speed

    parts = speed.parts_of_an_atari_step("Breakout", "off", 1100)
    during = {name: times[0] for name, times in parts.items()}
    assert 0 < during["rest"] < during["a whole step"] / 2
