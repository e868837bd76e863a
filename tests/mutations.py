"""Mistakes that default tests must see. Before a slow test is made shorter or dropped, and after,
`python tests/mutations.py [WORD ...]` makes each mistake (or those whose entry has one of the
words) in a clone of what is committed, and runs the tests named there. It fails if one survives."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# File, tests (as for pytest -k) in tests/test_FILE.py, what is there once, what comes instead
MUTATIONS = r"""
analysis/compare.py: report brunner
- + (a >= b - rounding).mean(axis=-1)
+ + (a > b + rounding).mean(axis=-1)
sppo_atari.py: atari plain_emulator
- np.sign(reward), over
+ reward, over
sppo_atari.py: control to_the_last_bit
- torch.where(unclipped, z * surrogate, 0.0)
+ (z * surrogate)
sppo_atari.py: contract equals_an_uninterrupted
- np.random.default_rng([args.seed, global_step, 1])
+ np.random.default_rng()
sppo_continuous.py: copies first_ratios
- begun + 2 * batch_size
+ begun + batch_size
sppo_rlhf.py: rlhf first_ratios
- rounding = 1e-8 if
+ rounding = 1e-6 if
sa2c_atari.py: contract writes_its_files
- writer.flush()
+ pass
sppo_continuous.py: control defaults_are
- total_timesteps // 20
+ total_timesteps // 7
sppo_continuous.py: contract equals_an_uninterrupted
- torch.manual_seed(seeds[0])
+ pass
sa2c_continuous.py: contract edited_while_it_runs
- temporary.write_bytes(SOURCE)
+ temporary.write_bytes(SCRIPT.read_bytes())
benchmarks/run.py: benchmark file_of_its_run
- digest(folder / p) == d for
+ digest(folder / p.name) == d for
sppo_atari.py: stable_baselines3 ppo_takes
- + args.vf_coef * value_loss
+ + 0.9 * args.vf_coef * value_loss
sppo_rlhf.py: rlhf in_any_family
- first = i * ids.shape[1] + len(x) - 1
+ first = i * ids.shape[1] + len(x) - 2
sppo_rlhf.py: rlhf computed_by_hand
- reference_log_prob = joined(samples, "reference_log_prob")
+ reference_log_prob = joined(samples, "log_prob")
sppo_rlhf.py: rlhf micro_batches
- sft_loss = -target_log_prob.sum() / target_count
+ sft_loss = -target_log_prob.mean()
sppo_rlhf.py: rlhf written_in_the_template
- x in added and
+ x not in added and
sppo_rlhf.py: rlhf weighted_sum
- reward_model(**copy.deepcopy(inputs))
+ reward_model(**inputs)
docs/copy-and-modify.md: stable_baselines3 pages_models
-         vf_coef=0.5 / k,
+         vf_coef=0.5,
sppo_atari.py: pretended_gpu on_a_pretended_gpu
- obs), generator=generator)
+ obs), generator=generator, device='cuda')
sppo_atari.py: pretended_gpu on_a_pretended_gpu
- action[t].cpu().numpy()
+ action[t].numpy()
sa2c_atari.py: pretended_gpu on_a_pretended_gpu
- *(torch.from_numpy(x).to(device) for x in arrays)
+ *map(torch.from_numpy, arrays)
sppo_rlhf.py: pretended_gpu on_a_pretended_gpu
- batch_first=True).to(device)
+ batch_first=True)
sppo_rlhf.py: pretended_gpu on_a_pretended_gpu
- torch.tensor(prompt, device=device)
+ torch.tensor(prompt)
sppo_rlhf.py: rlhf as_computed_by_hand
- generated.scores, 1)
+ generated.logits, 1)
benchmarks/run.py: benchmark games_go_to_gpus
- .split(",")[:count]
+ .split(",")
"""
ENTRY = re.compile(r"(?m)^(.+): (\w+) (\w+)\n- (.+)\n\+ (.+)$")


def outcome(folder, file, tests, names, right, wrong):
    """What the tests say of the mistake, made in `folder`."""
    path = folder / file
    text = path.read_text()
    assert text.count(right) == 1, f"{file}: not once: {right}"
    path.write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    command += [f"tests/test_{tests}.py", "-k", names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    path.write_text(text)
    seen = re.search(r"(?m)^FAILED \S+::(\S+)", done.stdout)
    return f"seen by {seen[1]}" if done.returncode == 1 and seen else "SURVIVED"


def main(*words):
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        for entry in ENTRY.finditer(MUTATIONS):
            if not words or any(word in entry[0] for word in words):
                outcomes.append(outcome(Path(folder), *entry.groups()))
                print(f"{entry[0]}\n{outcomes[-1]}\n", flush=True)
    survived = outcomes.count("SURVIVED")
    sys.exit(f"{survived} survived" if survived else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
