"""TRL's PPO on the work of sppo_rlhf.py: a yardstick for speed.

    pip install -e ".[rlhf,peers]"
    python benchmarks/trl_ppo.py --policy-model DIR --reward-model DIR --dataset reviews.jsonl.gz

Prompts of 64 tokens, 48 new ones, 112 texts an update, 5 epochs of 4 minibatches, a value model, no
checkpointing of activations. TRL's reward model must have the policy's tokenizer, and one output.
Writes runs/trl/summary.json with texts a second, start-up not counted."""

import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import tyro
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sppo_rlhf  # noqa: E402


@dataclass
class Args:
    policy_model: str
    reward_model: str
    dataset: str
    total_timesteps: int = 336  # texts
    amp: Literal["auto", "off"] = "off"  # auto: bfloat16
    device: Literal["cpu", "cuda"] = "cpu"
    runs_dir: str = "runs"


class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_train_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.started


def main(args: Args):
    run_dir = Path(args.runs_dir, "trl")
    if (run_dir / "summary.json").exists():
        sys.exit(f"error: {run_dir}: a finished run; choose another --runs-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.policy_model, padding_side="left")
    settings = sppo_rlhf.Args(**sppo_rlhf.TASKS["imdb"])  # prompts of 64 tokens
    rows = sppo_rlhf.read_rows(args.dataset)
    prompts = [sppo_rlhf.tokenize(row, tokenizer, settings)[0] for row in rows]
    prompts = datasets.Dataset.from_dict({"input_ids": prompts})
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.policy_model) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
        for name in (args.policy_model, args.reward_model)
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            use_cpu=args.device == "cpu",
            bf16=args.amp == "auto",
            gradient_checkpointing=False,
            per_device_train_batch_size=112,
            gradient_accumulation_steps=1,
            num_mini_batches=4,
            num_ppo_epochs=5,
            local_rollout_forward_batch_size=112,
            total_episodes=args.total_timesteps,
            response_length=48,
            temperature=1.0,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            learning_rate=5e-6,
            vf_coef=0.5,
            gamma=0.99,
            kl_coef=0.001,
            max_grad_norm=1.0,
        )
        PPOTrainer(
            config,
            tokenizer,
            policy,
            reference,
            reward,
            prompts,
            value,
            eval_dataset=prompts,
            callbacks=[clock],
        ).train()
    texts = math.ceil(args.total_timesteps / 112) * 112  # whole updates
    sps = texts / clock.seconds
    (run_dir / "summary.json").write_text(json.dumps({"sps": sps}))
    print(f"TRL: {sps:.2f} texts/s")


if __name__ == "__main__":
    main(tyro.cli(Args))
