# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "transformers>=5.0", "tensorboard>=2.19", "accelerate>=1.10",
#   "peft>=0.18", "numpy>=2.0", "tyro>=1.0.16", "filelock>=3.30", "datasets>=4.0", "tqdm>=4.66.5"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Symmetric PPO (SPPO) for language models (RLHF) in one file.

    python sppo_rlhf.py                             # a toy task, built offline; minutes on a CPU
    python sppo_rlhf.py --task imdb                 # GPT-2 writes positive film reviews
    python sppo_rlhf.py --task imdb --policy-model DIR --reward-model DIR --dataset reviews.jsonl.gz
    accelerate launch sppo_rlhf.py --task tldr      # GPT-J with LoRA summarises, on several GPUs
    python sppo_rlhf.py --task tldr --help          # all flags, with that task's defaults
    python sppo_rlhf.py --task imdb --policy-model DIR --dataset my.jsonl --reward-model my.py:short

where my.jsonl has lines such as {"prompt": "Say hi"}, and my.py a function such as

    def short(completions, **kwargs):
        return [-len(text) / 100 for text in completions]

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(Byun & Perrault, ICML 2025, arXiv 2405.17618), which adds a reverse cross-entropy term to the PPO
loss, meant to make training robust to noise. Each token is an action. With p its probability, p_old
its probability when it was sampled (before top-k), r = p / p_old, A its advantage, and Z < 0 a
constant that stands for log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where L has a gradient, else 0
    symmetric loss    alpha L + beta Lr

SPPO differs from PPO in two lines, those with `reverse_loss = ` and `beta * reverse_loss`. The
gradient of Lr is |Z| times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's:
with the authors' weights 0.9 (imdb) and 0.7 (tldr) times. Policy and critic share no trained
weights, and Adam hardly sees the scale of a gradient. So the factor acts through gradient clipping
and Adam's epsilon only, unless there is a supervised loss (in imdb and tldr), whose relative weight
it changes.

A reward model scores prompt and response; that reward is given at the last token. Every token pays
a KL penalty, `kl_coef` times log(pi / reference policy); the reference policy is the frozen
initial policy. Advantages are normalised over sampled tokens (the authors' code counts padding
too). Dropout is off. Steps and frequencies count texts, that is a prompt and its response;
`return_mean` and `episodic_return` are mean rewards.
"""

# ruff: noqa: E402  (libraries that load slowly come after the arguments)
import argparse
import copy
import csv
import ctypes
import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

SOURCE = Path(__file__).read_bytes()  # read at once, since the file may be edited during the run
START = Path.cwd()  # relative paths begin here, even where a reward function changes directory
# Arguments that change no result but by rounding
NO_EFFECT = ["runs_dir", "device", "track", "gradient_checkpointing"]
TOY = "runs/toy"  # folder of the toy's models and data
# Tokenizers of hub models that come without one, and held-out splits of datasets
TOKENIZERS = {
    "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews": "gpt2",
    "CarperAI/openai_summarize_tldr_sft": "gpt2",
}
EVAL_DATASETS = {
    f"{TOY}/train.jsonl": f"{TOY}/test.jsonl",
    "stanfordnlp/imdb:train": "stanfordnlp/imdb:test",
    "CarperAI/openai_summarize_tldr:train": "CarperAI/openai_summarize_tldr:valid",
}


@dataclass
class Args:
    """Defaults are for the toy task; ImdbArgs and TldrArgs have those of the other tasks."""

    # Run
    task: Literal["toy", "imdb", "tldr"] = "toy"  # toy: offline; imdb: reviews; tldr: summaries
    total_timesteps: int = 40 * 112  # texts sampled in all, rounded up to whole batches
    seed: int = 1  # of all random numbers (the authors' runs: 42 to 46)
    exp_name: str | None = None  # name of the method in reports; default: the algorithm
    runs_dir: str = "runs"  # folder of all runs
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where the hardware has it; off: float32
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    # Models and data
    policy_model: str = f"{TOY}/policy"  # folder or hub name of a causal language model
    tokenizer: str | None = None  # folder or hub name; default: the policy's (imdb, tldr: gpt2)
    chat_template_kwargs: str = "{}"  # JSON, for the policy's template: {"enable_thinking": false}
    reward_model: tuple[str, ...] = (f"{TOY}/reward",)  # classifiers or FILE.py:NAME
    reward_weights: tuple[float, ...] = ()  # 0 only logs, negative penalises; default: the mean
    reward_label: int | None = None  # label whose probability is the reward; default: 1 of 2
    dataset: str = f"{TOY}/train.jsonl"  # JSONL(.gz) or hub name:split; text, or prompt and label
    eval_dataset: str | None = None  # held-out data; default: the task's, or 10% of --dataset
    prompt_length: int = 16  # maximum tokens of a prompt (or of the first half of a text), cut left
    response_length: int = 32  # maximum tokens of a response
    top_k: int = 0  # sample among the k most likely tokens; 0: among all
    stop_at_eos: bool = True  # end-of-text tokens end a response; else they are never sampled
    lora_r: int = 0  # rank of LoRA adapters, for policy and critic on one model; 0: no LoRA
    lora_alpha: int = 64  # LoRA's alpha: adapters are scaled by alpha / rank
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time

    # Algorithm
    batch_size: int = 112  # texts sampled for an update, over all processes
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 5  # passes over a batch
    micro_batch_size: int | None = None  # texts in a forward pass, per process; default: minibatch
    learning_rate: float = 5e-4  # AdamW's learning rate, constant
    weight_decay: float = 1e-6  # AdamW's weight decay
    adam_eps: float = 1e-5  # AdamW's epsilon
    gamma: float = 0.99  # discount factor, per token
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon of the clip range, for ratios and for values
    norm_adv: bool = True  # normalise advantages in each minibatch
    vf_coef: float = 0.5  # weight of the value loss
    ce_coef: float = 0.0  # weight of the supervised (SFT) loss on reference completions, PPO-ptx
    kl_coef: float = 0.005  # weight of the KL penalty against the reference policy, per token
    max_grad_norm: float = 1.0  # gradient clipping, by the norm over all parameters

    # Symmetric loss
    alpha: float | None = None  # weight of the PPO loss; default: 0.5, or 1 if beta is 0
    beta: float = 0.4  # weight of the reverse loss; 0: PPO
    z: float = -1.0  # Z, which stands for log 0

    # Noise
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # noise in training
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)

    # Evaluation
    eval_freq: int | None = None  # texts between evaluations and checkpoints; default: total / 10
    eval_episodes: int = 128  # held-out prompts in an evaluation; rewards are clean
    eval_greedy: bool = False  # greedy decoding in evaluations; else sampled as in training

    def __post_init__(self):
        self.eval_dataset = self.eval_dataset or EVAL_DATASETS.get(self.dataset)
        if self.alpha is None:
            self.alpha = 0.5 if self.beta else 1.0
        if self.noise_level is None:
            levels = {"none": 0.0, "normal": 0.05, "uniform": 0.05}
            self.noise_level = levels.get(self.noise, 0.1)
        if self.eval_freq is None:
            self.eval_freq = max(1, self.total_timesteps // 10)
        if self.exp_name is None:
            self.exp_name = "sppo" if self.beta else "ppo"
        if not self.reward_weights:
            self.reward_weights = (1 / len(self.reward_model),) * len(self.reward_model)
        self.check()

    def check(self):
        """Refuses settings that would run, but not do what they say. tyro prints the message."""

        def require(condition, message):
            if not condition:
                raise ValueError(message)

        counts = "batch_size num_minibatches micro_batch_size update_epochs prompt_length"
        counts += " response_length total_timesteps eval_freq eval_episodes"
        for name in counts.split():
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1")
        numbers = "seed alpha beta noise_level learning_rate weight_decay clip_coef vf_coef"
        numbers += " ce_coef kl_coef top_k lora_r"
        for name in numbers.split():
            require(0 <= getattr(self, name) < math.inf, f"{name} must be finite and not negative")
        for name in "gamma gae_lambda".split():
            require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1")
        require(self.max_grad_norm > 0, "max_grad_norm must be positive; 1e9 turns clipping off")
        require(-math.inf < self.z < 0, "z stands for log 0: negative and finite")
        require(self.alpha + self.beta > 0, "with alpha and beta 0 nothing trains the policy")
        if self.noise.endswith("flip"):
            require(self.noise_level <= 1, "noise_level is the probability of a flip, so at most 1")
        weights = self.reward_weights
        require(len(weights) == len(self.reward_model), "reward_weights: one for each reward_model")
        require(self.noise != "none" or not self.noise_level, "noise_level needs a kind of noise")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        rest = self.batch_size % (self.num_minibatches * processes)
        require(rest == 0, "num_minibatches times processes must divide batch_size")
        require(self.eval_episodes % processes == 0, "processes must divide eval_episodes")
        require(not self.track or find_spec("wandb"), "track needs wandb: pip install wandb")


# The authors' settings, except that their base model for tldr is 4-bit. The toy's are ours.


@dataclass
class ImdbArgs(Args):
    task: str = "imdb"
    policy_model: str = "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews"
    reward_model: tuple[str, ...] = ("lvwerra/distilbert-imdb",)
    dataset: str = "stanfordnlp/imdb:train"
    total_timesteps: int = 60 * 112
    prompt_length: int = 64
    response_length: int = 48
    top_k: int = 50
    stop_at_eos: bool = False
    learning_rate: float = 5e-6
    ce_coef: float = 0.1
    kl_coef: float = 0.001


@dataclass
class TldrArgs(Args):
    task: str = "tldr"
    policy_model: str = "CarperAI/openai_summarize_tldr_sft"
    # The authors enclose its texts in <|startoftext|> and <|endoftext|>; we do not
    reward_model: tuple[str, ...] = ("jdchang/tldr_rm_adapter",)
    dataset: str = "CarperAI/openai_summarize_tldr:train"
    total_timesteps: int = 200 * 64
    prompt_length: int = 500
    response_length: int = 50
    lora_r: int = 8
    batch_size: int = 64
    update_epochs: int = 4
    micro_batch_size: int = 4
    learning_rate: float = 5e-6
    weight_decay: float = 0.01
    gamma: float = 1.0
    vf_coef: float = 0.1
    ce_coef: float = 0.1
    kl_coef: float = 0.002
    beta: float = 0.2
    eval_greedy: bool = True


TASKS = {"toy": Args, "imdb": ImdbArgs, "tldr": TldrArgs}


def parse_args(argv=None):
    """Parses flags with the defaults of the chosen --task, which --help then shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="toy")
    known, _ = parser.parse_known_args(argv)
    return tyro.cli(TASKS[known.task], args=argv)


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistyped flag take no seconds

import datasets
import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    concatenate,
    find_batch_size,
    recursively_apply,
    send_to_device,
    slice_tensors,
)
from filelock import FileLock
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# Noise


def perturb_reward(reward, noise, level, rng):
    """Rewards of any shape with noise: flip replaces r by 1 - r with probability `level`, normal
    adds N(0, level^2), uniform adds U(-level, level)."""
    if noise == "flip":
        flipped = rng.random(reward.shape) < level
        return np.where(flipped, 1 - reward, reward)
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    return reward


def perturb_advantage(advantage, level, rng):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    flipped = torch.from_numpy(rng.random(advantage.shape) < level)
    return torch.where(flipped.to(advantage.device), -advantage, advantage)


# Texts


class Tokens(NamedTuple):
    """Texts of B rows, at most N tokens long. Prompts are padded on the left, what continues them
    on the right."""

    ids: Tensor  # (B, N)
    mask: Tensor  # (B, N), false at padding


class Rollout(NamedTuple):
    """Responses of at most T tokens, and what was computed for them."""

    response: Tokens
    acting_log_prob: Tensor  # (B, T), of sampled tokens, by the pass that sampled them
    log_prob: Tensor  # (B, T), the same, computed as in training: ratios start at 1
    reference_log_prob: Tensor  # (B, T), of sampled tokens under the reference policy
    value: Tensor  # (B, T), of the text before each token


class Batch(NamedTuple):
    """What an update learns from."""

    prompt: Tokens
    target: Tokens  # texts of the data, which the supervised loss imitates
    rollout: Rollout
    advantage: Tensor  # (B, T)
    returns: Tensor  # (B, T)


# Losses


def masked_mean(x, mask, count=None):
    """Sum of `x` where `mask` is true, both of any shape, divided by `count`: by default, by the
    number of its terms."""
    if count is None:
        count = mask.sum()
    return torch.where(mask, x, 0).sum() / count


def symmetric_policy_losses(log_prob, old_log_prob, advantage, mask, clip_coef, z, count=None):
    """PPO loss L and reverse PPO loss Lr, scalars to minimise as alpha L + beta Lr.

    Tensors (batch, tokens): `log_prob`, `old_log_prob`: log pi of each token, now and when it was
    sampled; `advantage`; `mask`: true at sampled tokens, over which the means are taken. Numbers:
    `clip_coef`: PPO's epsilon; `z` < 0; `count`: tokens of the minibatch that these are a part of.

    (1 - p) / p_old = 1 / p_old - r; its first term is constant, huge for unlikely tokens, and left
    out of the returned Lr, which therefore has the paper's gradient but not its value.
    """
    ratio = torch.where(mask, log_prob - old_log_prob, 0.0).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    policy_loss = -masked_mean(torch.where(unclipped, surrogate, clipped), mask, count)
    # All that SPPO adds to PPO
    reverse_loss = masked_mean(torch.where(unclipped, z * surrogate, 0.0), mask, count)
    return policy_loss, reverse_loss


def clipped_value_loss(value, old_value, returns, mask, clip_coef, count=None):
    """PPO's clipped value loss, 0.5 mean(max((v - R)^2, (v_clipped - R)^2)): v_clipped is at most
    `clip_coef` from the value v had when the tokens were sampled."""
    clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    error = (value - returns).square()
    clipped_error = (clipped - returns).square()
    larger = torch.maximum(error, clipped_error)
    return 0.5 * masked_mean(larger, mask, count)


def loss_and_metrics(model, args, batch, response_count, target_count):
    """Loss and metrics of a micro batch: sums over its tokens, divided by the number of tokens in
    the minibatch, so that results of all micro batches and processes add up to the minibatch's."""
    old = batch.rollout
    mask = old.response.mask
    target = batch.target if args.ce_coef else None
    log_prob, value, target_log_prob = model(batch.prompt, old.response, target)
    policy_loss, reverse_loss = symmetric_policy_losses(
        log_prob, old.log_prob, batch.advantage, mask, args.clip_coef, args.z, response_count
    )
    value_loss = clipped_value_loss(
        value, old.value, batch.returns, mask, args.clip_coef, response_count
    )
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss
    log_ratio = log_prob.detach() - old.log_prob
    clipped = log_ratio.expm1().abs() > args.clip_coef
    metrics = {
        "policy_loss": policy_loss,
        "reverse_loss": reverse_loss,
        "value_loss": value_loss,
        "clipfrac": masked_mean(clipped, mask, response_count),
        # joschu.net/blog/kl-approx.html
        "approx_kl": masked_mean(log_ratio.expm1() - log_ratio, mask, response_count),
    }
    if args.ce_coef:
        sft_loss = -masked_mean(target_log_prob, target.mask, target_count)
        loss = loss + args.ce_coef * sft_loss
        metrics["sft_loss"] = sft_loss
    return loss, metrics


# Advantages


def token_advantages(reward, log_prob, reference_log_prob, value, mask, args):
    """Advantages and returns (batch, tokens): generalised advantage estimation over sampled tokens
    (Schulman et al., arXiv 1506.02438), zero elsewhere.

    `reward` (batch,) is given at the last token of a text; every token pays the KL penalty. All
    else is (batch, tokens), `mask` true at sampled tokens. A text that reaches the maximum length
    ends there: nothing is bootstrapped. For example, with gamma and lambda 1 and no KL penalty, a
    text of two tokens with reward 1 and values 0.2 and 0.5 has the advantages 0.8 and 0.5.
    """
    batch_size, length = mask.shape
    last = mask.sum(1) - 1
    token_reward = -args.kl_coef * (log_prob - reference_log_prob)
    token_reward[torch.arange(batch_size), last] += reward
    advantage = torch.zeros_like(value)
    next_value = torch.zeros_like(reward)
    next_advantage = torch.zeros_like(reward)
    for t in reversed(range(length)):
        sampled = mask[:, t]
        delta = token_reward[:, t] + args.gamma * next_value - value[:, t]
        estimate = delta + args.gamma * args.gae_lambda * next_advantage
        advantage[:, t] = torch.where(sampled, estimate, 0)
        next_advantage = advantage[:, t]
        next_value = torch.where(sampled, value[:, t], 0)
    returns = torch.where(mask, advantage + value, 0)
    return advantage, returns


def normalize(advantage, mask):
    """Advantages with mean 0 and standard deviation 1 where `mask` is true."""
    advantage = advantage.double()  # where all are equal, a rounding error of float32 exceeds 1e-8
    centred = advantage - masked_mean(advantage, mask)
    degrees_of_freedom = (mask.sum() - 1).clamp(min=1)
    variance = masked_mean(centred.square(), mask, degrees_of_freedom)
    return (centred / (variance.sqrt() + 1e-8)).float()


# Training


def without_padding(tensors, mask):
    """Drops the columns of tensors (B, N), also nested in tuples, where no row of `mask` (B, N) is
    true."""
    used = mask.any(0)
    return recursively_apply(lambda tensor: tensor[:, used], tensors)


def take(batch, rows):
    """Rows of a batch, without what is padding in all of them. On the CPU: how many columns are
    left depends on the data, and on a GPU asking would mean waiting."""
    prompt, target, rollout, advantage, returns = slice_tensors(batch, rows)
    of_response = (rollout, advantage, returns)
    return Batch(
        without_padding(prompt, prompt.mask),
        without_padding(target, target.mask),
        *without_padding(of_response, rollout.response.mask),
    )


def accumulate_gradient(setup, args, minibatch):
    """Computes the gradient of a minibatch, in micro batches on all processes. Returns metrics,
    means over the tokens of the minibatch."""
    accelerator = setup.accelerator
    size = len(minibatch.advantage)
    mask = minibatch.rollout.response.mask
    lengths = minibatch.prompt.mask.sum(1) + mask.sum(1)
    own_rows = process_rows(accelerator, size)
    by_length = own_rows[lengths[own_rows].argsort()]  # least padding
    micro_batches = by_length.split(args.micro_batch_size or size)
    totals = {}
    for rows in micro_batches:
        micro_batch = send_to_device(take(minibatch, rows), accelerator.device)
        is_last = rows is micro_batches[-1]  # processes exchange gradients after that one only
        with nullcontext() if is_last else accelerator.no_sync(setup.model):
            loss, metrics = loss_and_metrics(
                setup.model, args, micro_batch, mask.sum(), minibatch.target.mask.sum()
            )
            # DDP averages over processes, though the loss is a share of the minibatch's already
            (loss * accelerator.num_processes).backward()
        for name, metric in metrics.items():
            totals[name] = totals.get(name, 0) + metric.detach()
    return accelerator.reduce(totals, "sum")


def update(setup, args, batch, rng):
    """`update_epochs` passes over the batch. Returns the metrics of each minibatch."""
    history = []
    setup.actor_critic.train(args.gradient_checkpointing)  # which needs this mode
    for _ in range(args.update_epochs):
        order = torch.from_numpy(rng.permutation(args.batch_size))
        for rows in order.split(args.batch_size // args.num_minibatches):
            minibatch = slice_tensors(batch, rows)
            mask = minibatch.rollout.response.mask
            raw = minibatch.advantage
            if args.noise == "adv_flip":
                raw = perturb_advantage(raw, args.noise_level, rng)
            advantage = normalize(raw, mask) if args.norm_adv else raw
            minibatch = minibatch._replace(advantage=advantage)

            metrics = accumulate_gradient(setup, args, minibatch)
            parameters = setup.model.parameters()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            metrics["clipped_gradients"] = metrics["grad_norm"] > args.max_grad_norm
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            metrics["norm_sign_changes"] = masked_mean((raw > 0) != (advantage > 0), mask)
            history.append(metrics)
    setup.actor_critic.eval()
    return history


def means(rows):
    """Means of numbers by their names, over the `rows` that have them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: np.mean([float(row[name]) for row in rows if name in row]).item() for name in names
    }


@dataclass
class Progress:
    """What a checkpoint holds besides weights and optimizer."""

    global_step: int = 0
    speeds: list[float] = field(default_factory=list)  # texts per second of each update
    evaluations: list[dict] = field(default_factory=list)  # rows of progress.csv
    samples: list[dict] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)  # what was logged since the last evaluation


# The path of a batch of B texts, with responses of T tokens. It is on the CPU, the same in all
# processes; in_parts and accumulate_gradient give each process its share, in parts that fit into
# memory. `setup`, a Setup (Loading), has models, tokenizer and data.
#   tokenize (Rollout): rows of the data -> prompts, targets
#   collect_rollout (Rollout): prompts -> a Rollout, scores (B, reward models). In parts:
#       ActorCritic.generate (Models), which samples by sample_token
#       token_log_probs of the reference policy; ActorCritic.forward: log-probabilities, values
#       reward_inputs, then each reward model
#   train: scores, reward_weights -> rewards (B,), by perturb_reward (Noise)
#   token_advantages (Advantages): -> advantages, returns (B, T)
#   update: a Batch -> minibatches; perturb_advantage, normalize, the optimizer's step
#   accumulate_gradient: a minibatch -> micro batches, by take; loss_and_metrics (Losses)
# evaluate takes the first two of these steps with held-out prompts.


def train(setup, args, folder):
    accelerator = setup.accelerator
    progress = restore(setup, folder)
    writer = None  # in all processes but the first
    if accelerator.is_main_process:
        if args.track:
            import wandb

            wandb.init(
                project="symmetric-rl",
                name=folder.name,
                config=vars(args),
                sync_tensorboard=True,
                dir=folder,
                resume="auto",  # one id per `dir`
            )
        # TensorBoard hides what was logged after the checkpoint; without one, everything
        purge_step = progress.global_step + 1 if progress.global_step else 0
        writer = SummaryWriter(folder, purge_step=purge_step)
    begun = f"{folder.name}: from step {progress.global_step:,}"
    accelerator.print(f"{begun}, with a checkpoint every {args.eval_freq:,} texts")
    progress_bar = tqdm(
        total=args.total_timesteps,
        initial=progress.global_step,
        unit=" texts",
        disable=None if writer else True,
    )
    if not progress.evaluations:
        evaluate_and_log(setup, args, progress, folder, writer)  # the initial policy

    while progress.global_step < args.total_timesteps:
        # Rollout. Seed and step determine all random numbers, so checkpoints hold no generators.
        # They are drawn for the global batch, then sharded
        started = time.perf_counter()
        rng = np.random.default_rng([args.seed, progress.global_step, 1])
        transformers.set_seed(rng.integers(2**31).item())  # for functions and layers that draw
        rows = rng.permutation(len(setup.train_data))[: args.batch_size]
        data = setup.train_data.select(rows.tolist())
        uniform = torch.from_numpy(rng.random((args.batch_size, args.response_length)))
        setup.reward_metrics.clear()  # of the batch before and of evaluations
        prompts, targets = tokenize(data[:], setup.tokenizer, args)
        rollout, scores = collect_rollout(setup, args, data, prompts, uniform, args.top_k)
        progress.global_step += args.batch_size

        # Advantages
        reward = scores @ torch.tensor(args.reward_weights)
        noisy_reward = perturb_reward(reward.numpy(), args.noise, args.noise_level, rng)
        advantage, returns = token_advantages(
            torch.as_tensor(noisy_reward, dtype=reward.dtype),
            rollout.log_prob,
            rollout.reference_log_prob,
            rollout.value,
            rollout.response.mask,
            args,
        )

        # Update
        batch = Batch(prompts, targets, rollout, advantage, returns)
        minibatch_metrics = update(setup, args, batch, rng)
        metrics = means(minibatch_metrics)
        step = progress.global_step
        if step == args.batch_size:
            check_first_minibatch(setup, rollout, minibatch_metrics[0]["approx_kl"])
        if not math.isfinite(metrics["grad_norm"]):
            sys.exit(f"error: the gradient is not finite at step {step}; lower --learning-rate")

        # Log
        scalars = {f"losses/{name}": metric for name, metric in metrics.items()}
        for name, scalar in rollout_metrics(rollout, reward, advantage, returns).items():
            scalars[name] = scalar.item()
        for name, score in zip(args.reward_model, scores.mean(0)):
            scalars[f"rewards/{name}"] = score.item()
        for name, values in setup.reward_metrics.items():  # from TRL's log_metric
            scalars[f"rewards/{name}"] = np.mean(values).item()
        progress.history.append(scalars)
        progress.speeds.append(args.batch_size / (time.perf_counter() - started))
        if writer:
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, step)
            writer.add_scalar("charts/SPS", progress.speeds[-1], step)
        progress_bar.set_postfix_str(f"reward {reward.mean():.3f}, KL {scalars['charts/kl']:.1f}")
        progress_bar.update(args.batch_size)

        # Evaluation and checkpoint
        finished = step >= args.total_timesteps
        if finished or step % args.eval_freq < args.batch_size:  # passed a multiple
            evaluate_and_log(setup, args, progress, folder, writer)
            if writer:
                save_checkpoint(setup, folder, progress)

    if writer:  # only the first process has one
        writer.close()
        save_policy(setup, folder)
        row = progress.evaluations[-1]
        summary = {name: x for name, x in row.items() if math.isfinite(x)}  # as JSON wants
        summary["sps"] = float(np.median(progress.speeds))
        with atomic_write(folder / "summary.json") as path:  # last: marks the end
            path.write_text(json.dumps(summary, indent=2))
    accelerator.wait_for_everyone()  # the first process may still be writing
    # If DDP is freed after its process group, PyTorch may deadlock (its issue 56297)
    setup.model = None
    accelerator.end_training()


def rollout_metrics(rollout, reward, advantage, returns):
    """What to log of a batch; entropy and KL are estimates from its samples."""
    mask = rollout.response.mask
    log_ratio = rollout.log_prob - rollout.reference_log_prob
    # advantage = return - value; the returns of a constant reward differ by rounding only
    unexplained = advantage[mask].var() / returns[mask].var().clamp(min=1e-8)
    return {
        "losses/entropy": -masked_mean(rollout.log_prob, mask),
        "losses/explained_variance": 1 - unexplained,
        "charts/kl": masked_mean(log_ratio, mask, len(mask)),
        "charts/episodic_return": reward.mean(),
        "charts/episodic_length": mask.sum() / len(mask),
    }


def evaluate_and_log(setup, args, progress, folder, writer):
    """Appends an evaluation to `progress`; the first process writes progress.csv, samples.jsonl and
    TensorBoard."""
    step = progress.global_step
    row, samples = evaluate(setup, args, step)
    row |= means(progress.history)  # since the last evaluation
    progress.history = []
    progress.evaluations.append(row)
    progress.samples += samples
    if not writer:
        return
    with atomic_write(folder / "progress.csv") as path, open(path, "w", encoding="utf-8") as file:
        columns = dict.fromkeys(name for row in progress.evaluations for name in row)
        table = csv.DictWriter(file, columns, lineterminator="\n")  # the first row has fewer
        table.writeheader()
        table.writerows(progress.evaluations)
    with atomic_write(folder / "samples.jsonl") as path:
        path.write_text("".join(json.dumps(sample) + "\n" for sample in progress.samples))
    writer.add_scalar("eval/return_mean", row["return_mean"], step)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        writer.add_scalar("charts/gpu_memory_GiB", peak, step)
    tqdm.write(f"step {step:,}: reward {row['return_mean']:.3f}")


# Models


class ActorCritic(nn.Module):
    """Policy, critic and reference policy, that is the frozen initial policy.

    Without LoRA these are three models. With LoRA policy and critic are adapters: all three share
    the other weights.

    Throughout, prompts, responses and targets are `Tokens`. Results are for the T tokens of a
    response or target: (B, T), float32.
    """

    def __init__(self, args, device, dtype):
        super().__init__()
        self.dtype = dtype
        self.reference = load_frozen(args, device, dtype)
        self.policy = trainable_copy(self.reference, args)
        self.critic = trainable_copy(self.reference, args).get_decoder()
        # Not the configuration's hidden_size, since OPT-350m projects its states
        hidden_size = self.policy.get_output_embeddings().weight.shape[1]
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # disables dropout
        self.to(device)

    def autocast(self):
        device = self.value_head.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, prompt, response, target=None):
        """Log-probabilities of the response, values of the texts before each of its tokens, and
        log-probabilities of the target, if given. All gradients flow through here, so that DDP can
        wrap it."""
        target_log_prob = None
        with self.autocast():
            log_prob = token_log_probs(self.policy, prompt, response)
            hidden = predicting_states(self.critic, prompt, response)
            if target is not None:
                target_log_prob = token_log_probs(self.policy, prompt, target)
        value = self.value_head(hidden.float()).squeeze(-1)
        return log_prob, value, target_log_prob

    def generate(self, prompt, uniform, top_k, ends, padding, stop_at_eos):
        """Samples responses of at most T tokens, until all have ended. Returns them, padded to T
        with the token `padding`, and their log-probabilities before top-k. `ends`: tokens that end
        a response. `uniform` (B, T), as in `sample_token`, is an argument so that samples do not
        depend on how batches are split."""
        ids = torch.full(uniform.shape, padding, device=uniform.device)
        sampled = torch.zeros_like(ids, dtype=torch.bool)
        log_prob = torch.zeros_like(ids, dtype=torch.float32)
        cache = None
        new_ids, mask = prompt
        alive = torch.ones_like(mask[:, :1])
        for t in range(uniform.shape[1]):
            hidden, cache = run_transformer(self.policy.get_decoder(), Tokens(new_ids, mask), cache)
            logits = float32_logits(self.policy, hidden[:, -1])
            log_probs = logits.log_softmax(-1)
            if not stop_at_eos:
                logits[:, ends] = -math.inf
            new_ids = sample_token(logits, uniform[:, t : t + 1], top_k)
            new_ids = torch.where(alive, new_ids, padding)
            ids[:, t] = new_ids[:, 0]
            sampled[:, t] = alive[:, 0]
            log_prob[:, t] = log_probs.gather(1, new_ids)[:, 0]
            mask = torch.cat([mask, alive], 1)  # also of the tokens in the cache
            alive = alive & ~torch.isin(new_ids, ends)
            if not alive.any():
                break
        return Tokens(ids, sampled), log_prob


def load_frozen(args, device, dtype):
    """The initial policy, whose weights do not change."""
    config = transformers.AutoConfig.from_pretrained(args.policy_model, trust_remote_code=False)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel
    if args.gradient_checkpointing:  # needs train mode, in which there must be no dropout
        text_config = config.get_text_config()
        for name in vars(text_config):
            if "drop" in name:
                setattr(text_config, name, 0.0)
    # There fused kernels are slower, and round differently with other padding
    eager = device.type == "cpu" and dtype == torch.bfloat16
    model = load_pretrained(
        AutoModelForCausalLM,
        args.policy_model,
        config=config,
        dtype=dtype if args.lora_r else torch.float32,
        attn_implementation="eager" if eager else None,
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False)


def trainable_copy(model, args):
    """A copy of a frozen language model, to be trained. With LoRA only an adapter is, on peft's
    default layers of the family, or on all linear ones where it has none; the rest is shared. Of a
    multimodal model only the language part is trained."""
    if args.lora_r:
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        config = peft.LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            target_modules=defaults.get(model.config.model_type, "all-linear"),
            task_type="CAUSAL_LM",
        )
        # What is in `shared` is not copied. Adapters are in float32
        trained = peft.get_peft_model(copy.deepcopy(model, shared), config)
    else:
        trained = copy.deepcopy(model).requires_grad_()
    used = nn.ModuleList([trained.get_decoder(), trained.get_output_embeddings()])
    for parameter in set(trained.parameters()) - set(used.parameters()):
        parameter.requires_grad_(False)
    return trained


def run_transformer(transformer, tokens, cache=None, use_cache=True):
    """Final hidden states (B, N, hidden size) of N tokens, and the cache. The mask of `tokens` also
    has columns for those in `cache`, which precede them."""
    names = inspect.signature(transformer.forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"  # the name up to 5.23
    options = {cache_name: cache, "use_cache": use_cache}
    if "position_ids" in names:  # else there are distances only (ALiBi)
        positions = (tokens.mask.cumsum(1) - 1).clamp(min=0)  # padding does not count
        options["position_ids"] = positions[:, -tokens.ids.shape[1] :]
    output = transformer(input_ids=tokens.ids, attention_mask=tokens.mask, **options)
    return output.last_hidden_state, output.get(cache_name)


def predicting_states(transformer, prompt, continuation):
    """Final hidden states (B, T, hidden size) that predict the tokens of a continuation: those of
    the tokens just before them. For [1 2 3] and its continuation [4 5], the states of 3 and 4."""
    hidden, _ = run_transformer(transformer, join(prompt, continuation), use_cache=False)
    return hidden[:, prompt.ids.shape[1] - 1 : -1]


def float32_logits(model, hidden):
    """Logits (tokens, vocabulary) in float32: the 8 significant bits of bfloat16 are too few for
    ratios near 1. Flattened, because PyTorch multiplies a three-dimensional slice as a batch, at
    half the speed."""
    head = model.get_output_embeddings()
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.flatten(0, -2).float(), weight, bias)


def token_log_probs(model, prompt, continuation):
    """Log-probabilities (B, T) of the tokens of a continuation, float32."""
    logits = float32_logits(model, predicting_states(model.get_decoder(), prompt, continuation))
    log_prob = -F.cross_entropy(logits, continuation.ids.flatten(), reduction="none")
    return log_prob.view_as(continuation.ids)


def sample_token(logits, uniform, top_k):
    """Inverse-CDF sampling: tokens (batch, 1) from `logits` (batch, vocabulary), among the `top_k`
    most likely ones (0: among all), given `uniform` (batch, 1) in [0, 1)."""
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probability = logits.softmax(-1, dtype=torch.float64)
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:]  # 1, but for rounding
    return torch.searchsorted(cumulative, uniform * total, right=True)


# Reward models


def load_classifier(name, device, dtype):
    """A classifier, or a LoRA adapter of one on its base, with all its weights."""
    options = {"dtype": dtype, "device_map": device, "trust_remote_code": False}
    try:
        peft.PeftConfig.from_pretrained(name)
    except ValueError:  # not an adapter
        return load_pretrained(AutoModelForSequenceClassification, name, **options)
    saved = peft.load_peft_weights(name, device="cpu")
    heads = sorted(weight for weight in saved if "lora_" not in weight)  # the last layer comes last
    labels = len(saved[heads[-1]]) if heads else 1
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        name, num_labels=labels, low_cpu_mem_usage=True, **options
    )
    refuse_missing(peft.get_peft_model_state_dict(model).keys() - saved.keys(), name)
    return model.to(device, dtype)  # its own weights may be saved in another


def classifier_reward(name, args, device, dtype):
    """A reward model, a function from texts to scores (texts,), with its own tokenizer and, where
    prompts are messages, its own chat template, if it has one. Scores are the classifier's single
    output, that of the label if these are regressions, else the probability of the label."""
    model = load_classifier(name, device, dtype)
    config = model.config
    label = {1: 0, 2: 1}.get(config.num_labels)
    if args.reward_label is not None and config.num_labels > 1:
        label = args.reward_label
    if label not in range(config.num_labels):
        sys.exit(f"error: {name}: --reward-label must be one of {config.id2label}, not {label}")
    is_regression = config.num_labels == 1 or config.problem_type == "regression"
    # An adapter has that of its base. Padding on the right shifts no positions
    sides = {"truncation_side": "left", "padding_side": "right"}
    tokenizer = load_tokenizer(config.name_or_path, **sides)
    one_by_one = config.pad_token_id is None  # then decoders cannot tell where a text ends
    if not one_by_one:
        config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    encode = partial(tokenizer, padding=True, truncation=True, return_tensors="pt")

    @torch.no_grad()
    def reward_model(texts, prompts=(None,), completions=(None,), **_):
        """Texts that are too long are truncated on the left."""
        in_template = tokenizer.chat_template and isinstance(prompts[0], list)
        if in_template:
            chats = [prompt + completion for prompt, completion in zip(prompts, completions)]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
        logits = []
        for part in [[text] for text in texts] if one_by_one else [texts]:
            inputs = encode(part, add_special_tokens=not in_template)  # which has them
            logits.append(model(**inputs.to(device)).logits.float())
        logits = torch.cat(logits)
        if is_regression:
            return logits[:, label]
        if config.problem_type == "multi_label_classification":
            return logits.sigmoid()[:, label]
        return logits.softmax(-1)[:, label]

    return reward_model


def import_function(name):
    """The Python function FILE.py:NAME. Its module is named by the file's path, since two folders
    may have a file of one name."""
    file, _, function_name = name.rpartition(":")
    path = str(Path(file).resolve())
    if path not in sys.modules:
        sys.path.append(str(Path(path).parent))
        spec = spec_from_file_location(path, path)
        sys.modules[path] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path])
    return getattr(sys.modules[path], function_name)


def function_reward(name, columns, metrics, device):
    """A reward model, as above, from the Python function FILE.py:NAME. It gets what it names, with
    `**kwargs` all of it: `texts`, prompts and responses together; what TRL gives reward functions,
    that is `prompts` and `completions`, messages or texts without special tokens, `completion_ids`,
    with the end of text, and `log_metric`; the `columns` of the data."""
    function = import_function(name)
    signature = inspect.signature(function)
    takes_all = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())

    def log_metric(metric, value):
        metrics.setdefault(metric, []).append(float(value))

    def named(inputs):
        inputs = inputs | {"log_metric": log_metric}
        return {key: x for key, x in inputs.items() if takes_all or key in signature.parameters}

    given = ["texts", "prompts", "completions", "completion_ids", *columns]
    try:
        signature.bind(**named(dict.fromkeys(given)))
    except TypeError as error:
        sys.exit(f"error: {name}: {error}; there are {', '.join(given)}")

    def reward_model(**inputs):
        count = len(inputs["texts"])
        scores = function(**named(inputs))
        if len(scores) != count:
            sys.exit(f"error: {name} must return a list of {count} scores, one for each text")
        return torch.tensor(scores, dtype=torch.float32, device=device)

    return reward_model


# Rollout


def tokenize(rows, tokenizer, args):
    """Prompts, and targets, padded to `response_length`; without labels all of them is padding."""
    start, prompts, targets = token_ids(rows, tokenizer, args)
    prompts = [cut_left(ids, args.prompt_length, start) for ids in prompts]
    prompts = [ids or [tokenizer.eos_token_id] for ids in prompts]
    length = args.response_length
    targets = [ids[:length] for ids in targets]
    pad = partial(tokenizer.pad, return_tensors="pt")
    left = pad({"input_ids": prompts}, padding_side="left")
    right = pad({"input_ids": targets}, "max_length", length, padding_side="right")
    return tuple(Tokens(x["input_ids"], x["attention_mask"].bool()) for x in (left, right))


def token_ids(rows, tokenizer, args):
    """Tokens that start a text, prompts, and targets, of any length. `rows`: column -> values;
    `prompt`, texts or messages, and `label`, or else `text`, whose first half is the prompt."""
    # What the tokenizer writes before a text; what it may write after one must not end a prompt
    probe = tokenizer(tokenizer.eos_token or "a", return_special_tokens_mask=True)
    start = probe["input_ids"][: probe["special_tokens_mask"].index(0)]
    end = tokenizer.eos_token_id
    if has_messages(rows):
        prompts = [chat_tokens(chat, tokenizer, args) for chat in rows["prompt"]]
        start = start or [tokenizer.bos_token_id]  # templates write it, too
        end = turn_end(tokenizer, args)
    else:
        texts = rows["prompt"] if "prompt" in rows else rows["text"]
        plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts = [ids if ids[: len(start)] == start else start + ids for ids in plain]
    targets = [[] for _ in prompts]
    if "prompt" not in rows:
        targets = [[*ids[len(ids) // 2 :], end] for ids in prompts]
        prompts = [ids[: len(ids) // 2] for ids in prompts]
    elif has_labels(rows):
        labels = tokenizer(rows["label"], add_special_tokens=False)["input_ids"]
        targets = [[*ids, end] for ids in labels]
    return start, prompts, targets


def has_messages(rows):
    return isinstance(rows.get("prompt", [None])[0], list)


def has_labels(rows):
    """Whether `label` is a text, not a class, in all rows."""
    return all(isinstance(label, str) for label in rows.get("label", [None]))


def chat_tokens(chat, tokenizer, args):
    """Tokens of messages and of the beginning of the response: a new turn, or the last one, if it
    is the assistant's, such as "<think>"."""
    continues = chat[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        chat,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        return_dict=False,
        **json.loads(args.chat_template_kwargs),
    )


def turn_end(tokenizer, args):
    """The token with which the chat template ends an assistant's turn, else the end of text."""
    said = "***"
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    options = json.loads(args.chat_template_kwargs)
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    special = [token for token in after if token in tokenizer.added_tokens_decoder]
    return special[0] if special else tokenizer.eos_token_id


def end_tokens(rows, tokenizer, policy, args):
    """Tokens that end a response: those of tokenizer and policy, as in transformers' `generate`,
    and for messages also the end of a turn, which a policy that is no chat model does not name."""
    ends = [tokenizer.eos_token_id]
    if has_messages(rows):
        ends.append(turn_end(tokenizer, args))
    own = policy.generation_config.eos_token_id
    ends += own if isinstance(own, list) else [own]
    vocabulary = len(policy.get_output_embeddings().weight)
    return [token for token in ends if token is not None and token < vocabulary]


def cut_left(ids, length, start):
    """The last `length` of the tokens `ids`. If they begin with the tokens `start`, so does what is
    kept."""
    kept = ids[-length:]
    if ids[: len(start)] == start:
        kept[: len(start)] = start
    return kept


def join(*parts):
    """Texts that follow each other, in one row each."""
    return Tokens(*(torch.cat(tensors, 1) for tensors in zip(*parts)))


def decode(tokenizer, tokens):
    """Texts without special tokens, of which padding is one."""
    return tokenizer.batch_decode(tokens.ids, skip_special_tokens=True)


def process_rows(accelerator, count):
    """Indices of this process's share of `count` rows."""
    with accelerator.split_between_processes(torch.arange(count)) as rows:
        return rows


def in_parts(setup, args, function, *tensors):
    """Tensors that `function` computes from some rows of `tensors`: for all of them, on the CPU.
    Each process does its share, in parts that fit into memory."""
    accelerator = setup.accelerator
    size = 8 * (args.micro_batch_size or 16)  # inference takes less memory than training
    parts = []
    for rows in process_rows(accelerator, find_batch_size(tensors)).split(size):
        part = send_to_device(slice_tensors(tensors, rows), accelerator.device)
        parts.append(function(*part))
    return send_to_device(accelerator.gather(concatenate(parts)), "cpu")


@torch.no_grad()
def collect_rollout(setup, args, data, prompts, uniform, top_k):
    """Samples responses to `prompts`, those in B rows of `data`, and scores them. Returns the
    rollout and scores (B, reward models), of all processes, on the CPU. `uniform` (B, T) as in
    `generate`."""
    actor = setup.actor_critic
    pad_token = setup.tokenizer.pad_token_id

    def sample_and_score(rows, prompt, uniform):
        with actor.autocast():
            response, acting_log_prob = actor.generate(
                prompt, uniform, top_k, setup.ends, pad_token, args.stop_at_eos
            )
            sampled = without_padding(response, response.mask)
            reference_log_prob = token_log_probs(actor.reference, prompt, sampled)
        # Computed as in the update, not by `generate`, so that ratios start at 1
        log_prob, value, _ = actor(prompt, sampled)
        inputs = reward_inputs(data[rows.tolist()], setup.tokenizer, prompt, sampled)
        # A reward function may change its arguments
        scores = [reward_model(**copy.deepcopy(inputs)) for reward_model in setup.reward_models]
        scores = torch.stack(scores, 1)
        if not scores.isfinite().all():
            raise ValueError(f"scores that are not finite, with the means {scores.mean(0)}")
        pad = partial(F.pad, pad=(0, args.response_length - value.shape[1]))
        rollout = Rollout(
            response, acting_log_prob, pad(log_prob), pad(reference_log_prob), pad(value)
        )
        return rollout, scores

    rows = torch.arange(len(uniform))  # of `data`
    return in_parts(setup, args, sample_and_score, rows, prompts, uniform)


def reward_inputs(rows, tokenizer, prompt, response):
    """What reward models get, by name: the columns of the data, and as many texts."""
    ids, sampled = send_to_device(response, "cpu")
    inputs = rows | {
        "texts": decode(tokenizer, join(prompt, response)),
        "prompts": decode(tokenizer, prompt),
        "completions": decode(tokenizer, response),
        "completion_ids": [row[kept].tolist() for row, kept in zip(ids, sampled)],
    }
    if has_messages(rows):
        inputs["prompts"] = []
        for i, chat in enumerate(rows["prompt"]):
            text = inputs["completions"][i]
            if chat[-1]["role"] == "assistant":  # as in TRL, its turn belongs to the completion
                *chat, turn = chat
                text = turn["content"] + text
            inputs["prompts"].append(chat)
            inputs["completions"][i] = [{"role": "assistant", "content": text}]
    return inputs


def check_first_minibatch(setup, rollout, approx_kl):
    """Stops a run that an edit has broken. Before the first step, the pass that samples, its
    repetition in `collect_rollout` and the one that is trained give the same log-probabilities."""
    log_ratio = rollout.log_prob - rollout.acting_log_prob
    acting_kl = masked_mean(log_ratio.expm1() - log_ratio, rollout.response.mask)
    difference = acting_kl.item() + approx_kl.item()
    is_float32 = setup.actor_critic.dtype == torch.float32
    if difference > (1e-8 if is_float32 else 1e-3):  # rounding on CPUs: 3e-13, 6e-5
        found = f"the policy that acts is not the one that is trained ({difference:.1e})"
        if is_float32 and setup.accelerator.device.type == "cpu":
            sys.exit(f"error: {found}")
        tqdm.write(f"warning: {found}, unless this hardware rounds more", file=sys.stderr)


# Evaluation


@torch.no_grad()
def evaluate(setup, args, step):
    """Returns a row for progress.csv, and up to eight samples.

    The row has the reward, and what it may have cost: the KL divergence from the reference policy
    in nats per text (an estimate, biased where sampling is filtered) and perplexities: of responses
    under the reference policy, and of targets, where there are labels, under the policy.
    """
    rng = np.random.default_rng([args.seed, step, 2])
    uniform = torch.from_numpy(rng.random((args.eval_episodes, args.response_length)))
    transformers.set_seed(rng.integers(2**31).item())
    top_k = 1 if args.eval_greedy else args.top_k
    data = setup.eval_data
    prompts, targets = tokenize(data[:], setup.tokenizer, args)
    rollout, scores = collect_rollout(setup, args, data, prompts, uniform, top_k)
    mask = rollout.response.mask
    reward = scores @ torch.tensor(args.reward_weights)
    log_ratio = rollout.log_prob - rollout.reference_log_prob

    row = {
        "step": step,
        "return_mean": reward.mean().item(),
        "return_std": reward.std(correction=0).item(),
        "length_mean": mask.sum().item() / args.eval_episodes,
        "kl": masked_mean(log_ratio, mask, args.eval_episodes).item(),
        "perplexity": (-masked_mean(rollout.reference_log_prob, mask)).exp().item(),
    }
    if targets.mask.any():
        policy_log_probs = partial(token_log_probs, setup.actor_critic.policy)
        with setup.actor_critic.autocast():
            target_log_prob = in_parts(setup, args, policy_log_probs, prompts, targets)
        row["perplexity_real"] = (-masked_mean(target_log_prob, targets.mask)).exp().item()
    for name, score in zip(args.reward_model, scores.mean(0)):
        row[f"eval_{name}"] = score.item()

    prompt_texts = decode(setup.tokenizer, prompts)
    responses = decode(setup.tokenizer, rollout.response)
    samples = [
        {"step": step, "prompt": prompt, "response": response, "reward": score}
        for prompt, response, score in zip(prompt_texts, responses, reward.tolist())
    ]
    return row, samples[:8]


# What follows is plumbing, not part of the algorithm.


# Loading


@dataclass
class Setup:
    """Models and data of a run, from `load`."""

    accelerator: Accelerator
    actor_critic: ActorCritic
    model: nn.Module  # `actor_critic`, wrapped in DDP if there are several processes
    optimizer: torch.optim.Optimizer
    tokenizer: transformers.PreTrainedTokenizerBase
    ends: Tensor  # tokens that end a response
    reward_models: list
    reward_metrics: dict  # what reward functions have logged, name -> values
    train_data: datasets.Dataset
    eval_data: datasets.Dataset


def prepare(args):
    """Imports reward functions and makes the toy, for the digests. Silences libraries."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: there is no GPU")
    datasets.disable_caching()  # in the folder of the data, of which digests are taken
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in args.reward_model:
        if ".py:" in name:
            import_function(name)
    os.chdir(START)  # which an imported file may have left
    if f"{TOY}/" in str(vars(args)):  # its data or a model of it
        with FileLock(f"{TOY}.lock"):  # other processes wait, and then find it
            make_toy(Path(TOY))


def load(args):
    """Loads models and data."""
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # but see ActorCritic.autocast
    device = accelerator.device
    bfloat16 = args.amp == "auto" and has_bfloat16(device)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    if cpu:
        keep_freed_memory()
    train_data, eval_data = load_data(args)
    first_row = train_data[:1]
    tokenizer = load_tokenizer(args.tokenizer or args.policy_model)
    template = str(tokenizer.chat_template) if has_messages(first_row) else ""
    for name in json.loads(args.chat_template_kwargs):
        if name not in template:
            sys.exit(f"error: --chat-template-kwargs: no chat template with {name!r} is used")
    reward_dtype = dtype if args.lora_r else torch.float32  # with LoRA, models are large
    reward_models = []
    reward_metrics = {}
    for name in args.reward_model:
        if ".py:" in name:
            reward_model = function_reward(name, first_row, reward_metrics, device)
        else:
            reward_model = classifier_reward(name, args, device, reward_dtype)
        reward_models.append(reward_model)
    torch.manual_seed(args.seed)  # initial weights of LoRA
    actor_critic = ActorCritic(args, device, dtype)
    for kind, data in {"training": train_data, "held-out": eval_data}.items():
        cut = count_cut(data, tokenizer, args)
        accelerator.print(f"--prompt-length cuts {cut:,} of {len(data):,} {kind} prompts (left)")
    check_policy(actor_critic.policy, args, tokenize(eval_data[:], tokenizer, args)[0])
    optimizer = torch.optim.AdamW(
        [parameter for parameter in actor_critic.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        fused=True,
    )
    ends = end_tokens(first_row, tokenizer, actor_critic.policy, args)
    return Setup(
        accelerator=accelerator,
        actor_critic=actor_critic,
        model=accelerator.prepare(actor_critic),
        optimizer=optimizer,
        tokenizer=tokenizer,
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        reward_models=reward_models,
        reward_metrics=reward_metrics,
        train_data=train_data,
        eval_data=eval_data,
    )


@torch.no_grad()
def check_policy(policy, args, prompts):
    """Refuses a policy that has too few positions or no cache, or whose own logits for a text
    differ from ours for the same text with padding before it, the last token's from the cache. The
    text is as long as there may be, and consists of the tokens of `prompts`."""
    length = args.prompt_length + args.response_length
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", length)
    if positions < length:
        sys.exit(f"error: {args.policy_model} has {positions} positions for up to {length} tokens")
    ids = torch.from_numpy(np.resize(prompts.ids[prompts.mask], (1, length))).to(policy.device)
    padding = length // 8
    mask = torch.arange(length, device=ids.device)[None] >= padding
    transformer = policy.get_decoder()
    states, cache = run_transformer(transformer, Tokens(ids[:, :-1], mask[:, :-1]))
    is_same = False
    if cache is not None:
        last_state, _ = run_transformer(transformer, Tokens(ids[:, -1:], mask), cache)
        logits = float32_logits(policy, torch.cat([states[:, padding:], last_state], 1))
        expected = policy(ids[:, padding:]).logits[0]
        # Rounding to bfloat16 alone gives 0.02 with 28 layers
        tolerance = 0.1 if policy.dtype == torch.bfloat16 else 0.001
        difference = (logits - expected).abs().max()
        is_same = difference <= tolerance * expected.abs().max()  # no: NaN
    if not is_same:
        sys.exit(
            f"error: {args.policy_model} scales or caps its logits, or does not leave out padding, "
            "or has no cache of keys and values: not supported"
        )


def load_pretrained(auto_class, name, **options):
    """Loads a model, with all its weights."""
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    refuse_missing(info["missing_keys"], name)
    return model


def refuse_missing(names, source):
    """Refuses a checkpoint without weights of these `names`, which would stay random."""
    if names:
        sys.exit(f"error: {source} lacks {len(names)} weights, such as {min(names)}")


def load_tokenizer(name, **sides):
    """The tokenizer of a model. It pads with the end-of-text token if it has no padding token
    (masks tell the two apart). Refuses the empty one that AutoTokenizer makes for a folder without
    its files."""
    options = sides | {"trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS.get(name, name), **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    words = len(tokenizer) - len(tokenizer.all_special_tokens)
    if words < 3:  # the empty one of T5 has one, that of DeBERTa two
        sys.exit(f"error: {name} has no tokenizer (for a policy: --tokenizer)")
    return tokenizer


def load_data(args):
    """Training data, and `eval_episodes` held-out rows."""
    train_data = load_dataset(args.dataset)
    if args.eval_dataset:
        eval_data = load_dataset(args.eval_dataset)
    else:
        train_data, eval_data = train_data.train_test_split(test_size=0.1, seed=0).values()
    if args.batch_size > len(train_data) or args.eval_episodes > len(eval_data):
        sys.exit(
            f"error: {len(train_data)} rows of training data and {len(eval_data)} held out are too "
            f"few for --batch-size {args.batch_size} and --eval-episodes {args.eval_episodes}"
        )
    return train_data, eval_data.shuffle(seed=0).select(range(args.eval_episodes))


def load_dataset(name):
    """`name`: a file, whose suffix says of what kind; or NAME:SPLIT or NAME:CONFIGURATION:SPLIT, of
    a folder of files, one that `datasets` has saved, or a hub name."""
    path = Path(name).resolve()
    source, *configuration = name.split(":")
    split = configuration.pop() if configuration else "train"
    if path.is_file():
        return datasets.load_dataset(str(path.parent), data_files=path.name, split="train")
    try:
        data = datasets.load_from_disk(source)
        return data[split] if isinstance(data, dict) else data
    except FileNotFoundError:  # not saved by `datasets`
        return datasets.load_dataset(source, *configuration, split=split)


def count_cut(data, tokenizer, args):
    """Number of prompts longer than `prompt_length`. All texts are tokenized for it, so that a
    value that is not text ends the run before it begins."""
    if not {"prompt", "text"} & set(data.column_names):
        sys.exit(f"error: no column 'prompt' or 'text' in the data, only {data.column_names}")
    cut = 0
    for rows in data.iter(1000):
        _, prompts, targets = token_ids(rows, tokenizer, args)
        cut += sum(len(ids) > args.prompt_length for ids in prompts)
        if args.ce_coef and not any(targets):
            sys.exit("error: --ce-coef needs a column 'label' of texts, one for each prompt")
    return cut


def has_bfloat16(device):
    """Whether this hardware computes in bfloat16 and does not merely emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def keep_freed_memory():
    """Tells glibc to keep freed memory. By default it goes back to the system, and each 4 KiB
    costs a page fault when needed again: a quarter of the time of an update on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


# Saving


def trained_parameters(setup):
    return {
        name: parameter.detach()
        for name, parameter in setup.actor_critic.named_parameters()
        if parameter.requires_grad
    }


def save_checkpoint(setup, folder, progress):
    checkpoint = {
        "agent": trained_parameters(setup),
        "optimizer": setup.optimizer.state_dict(),
        "progress": vars(progress),
    }
    with atomic_write(folder / "checkpoint.pt") as path:
        torch.save(checkpoint, path)
        load_checkpoint(path)  # an edit may save what can't be read back


def restore(setup, folder):
    """Continues from the checkpoint of a run, if it has one. Returns its `Progress`."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return Progress()
    checkpoint = load_checkpoint(path)
    for name, parameter in trained_parameters(setup).items():
        parameter.copy_(checkpoint["agent"][name])
    setup.optimizer.load_state_dict(checkpoint["optimizer"])
    return Progress(**checkpoint["progress"])


def save_policy(setup, run_folder):
    """Writes policy/, the trained policy or its adapter, which `from_pretrained` loads."""
    folder = run_folder / "policy"
    temporary = run_folder / "policy.tmp"
    setup.actor_critic.policy.save_pretrained(temporary)
    setup.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run killed just before its summary
    temporary.rename(folder)


def file_digests():
    """{path: SHA-256} of the files that decide what a run does: this script, and imported files
    that are the user's own. A program that imports this script is not part of the run."""
    python = {Path(os.__file__).parent, Path(sys.base_prefix, "DLLs")}  # DLLs: on Windows
    # Installed packages, debuggers, and what editors and systems run at each start
    foreign = "site-packages dist-packages debugpy pydev sitecustomize.py usercustomize.py".split()
    digests = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        is_foreign = python & set(file.parents) or set(foreign) & set(file.parts)
        is_compiled = name.startswith("torch.") or name.endswith(".inductor_entry_cpp")
        if file.is_file() and not (is_foreign or is_compiled or name == "__main__"):
            digests[str(file.resolve())] = hashlib.sha256(file.read_bytes()).hexdigest()
    digests[str(Path(__file__).resolve())] = hashlib.sha256(SOURCE).hexdigest()
    return digests


def local_digests(args):
    """The same of the files of local data and models, without byte code and hidden files, such as
    caches."""
    names = [args.dataset, args.eval_dataset, args.policy_model, args.tokenizer, *args.reward_model]
    digests = {}
    for name in filter(None, names):
        root = Path(START, name)
        root = root if root.exists() else Path(START, name.split(":")[0])
        for path in [root, *root.rglob("*")]:
            inside = path.relative_to(root).parts
            is_hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
            if path.is_file() and not is_hidden:
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while block := file.read(2**24):
                        digest.update(block)
                digests[str(path.resolve())] = digest.hexdigest()
    return digests


def run_folder(args, digests):
    """Folder of a run. Its name ends with a hash of arguments and files: so the same command finds
    its run again, and a changed script starts a new one."""
    kept = {name: value for name, value in vars(args).items() if name not in NO_EFFECT}
    files = sorted((Path(path).name, digest) for path, digest in digests.items())
    digest = hashlib.sha256(json.dumps([kept, files]).encode()).hexdigest()
    name = f"{args.task}__{args.exp_name}__{args.noise}__{args.seed}"
    name = re.sub(r'[<>:"/\\|?*]', "-", name)  # Windows refuses these characters
    return Path(START, args.runs_dir, f"{name}__{digest[:8]}")


def load_checkpoint(path):
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # any is possible here
        cause = "it is damaged, or has more than tensors and Python's own types"
        sys.exit(f"error: {path} can't be read: {cause}: {error!r:.200}")


@contextmanager
def atomic_write(path):
    """Yields the path of a temporary file that then replaces `path`: no file is half written."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb+") as file:  # Windows syncs only what can be written
        os.fsync(file.fileno())
    try:
        os.replace(temporary, path)
    except PermissionError:  # on Windows, while a spreadsheet, for one, has the file open
        time.sleep(5)
        os.replace(temporary, path)


def begin_session(args, digests, folder):
    """Adds a line to the run's sessions.jsonl, with what is needed to reproduce it, and copies this
    script into its folder."""
    script = Path(__file__).resolve()
    versions = {"torch": torch.__version__}  # with its kind of build
    for package in distributions():
        if str(package.name).replace("-", "_") in sys.modules:
            versions.setdefault(package.name, package.version)
    session = {
        "run": folder.name,
        "script": script.name,
        "args": vars(args),
        "command": sys.argv,
        "files": digests,
        "directory": str(script.parent),
        "working_directory": str(START),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    path = folder / "sessions.jsonl"
    earlier = path.read_text() if path.exists() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(earlier + json.dumps(session) + "\n")
    with atomic_write(folder / script.name) as temporary:
        temporary.write_bytes(SOURCE)


def main():
    args = parse_args()
    prepare(args)
    digests = file_digests() | local_digests(args)
    folder = run_folder(args, digests)
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        sys.exit(f"error: TensorBoard can't write to a folder of this name: {error}")
    setup = None
    if not folder.exists():  # what is wrong with a new run leaves no folder
        setup = load(args)
    is_first = os.environ.get("RANK", "0") == "0"  # only this process writes files
    lock = nullcontext()
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / "lock", blocking=False).acquire()
        except OSError as error:
            found = f"another process is at work on {folder}, or it cannot be locked"
            sys.exit(f"error: {found}: {error}")
    with lock:
        if not (folder / "summary.json").exists():
            if is_first:
                begin_session(args, digests, folder)
            try:
                train(setup or load(args), args, folder)
            except KeyboardInterrupt:
                sys.exit("interrupted; the same command continues from its last checkpoint, if any")
    if is_first:
        summary = json.loads((folder / "summary.json").read_text())
        score = f"reward {summary['return_mean']:.3f}, {summary['sps']:,.1f} texts/s"
        folder = Path(args.runs_dir, folder.name)  # as it was typed
        enjoy = Path(sys.argv[0]).with_name("enjoy.py")
        enjoy = enjoy if Path(START, enjoy).exists() else "PATH/TO/enjoy.py"
        print(f"{folder}: {score}; to watch it: python {enjoy} {folder}")


# The toy task: film reviews from a grammar, and a policy and a reward model trained on them.

ASPECTS = "plot acting music script ending cast pacing dialogue camera humour".split()
GOOD = "superb moving clever funny brilliant charming gripping warm".split()
BAD = "dull clumsy weak tedious awful silly flat noisy".split()


def toy_review(rng):
    """Three to six judgements, each positive or negative with equal probability."""
    aspects = rng.sample(ASPECTS, rng.randint(3, 6))
    clauses = [f"the {aspect} was {rng.choice(GOOD + BAD)}" for aspect in aspects]
    return " and ".join(clauses) + " ."


def toy_sentiment(text):
    """Share of positive judgements, 0.5 where there are none."""
    positive = [word in GOOD for word in text.split() if word in GOOD + BAD]
    return sum(positive) / len(positive) if positive else 0.5


def make_toy(folder):
    """Makes train.jsonl, test.jsonl, policy/ and reward/ in `folder`, unless it exists. The seed is
    fixed, so that runs with different seeds have the same models."""
    if folder.exists():
        return
    temporary = Path(f"{folder}.tmp")
    rng = random.Random(1)
    torch.manual_seed(1)
    reviews = [toy_review(rng) for _ in range(4000)]
    held_out = [toy_review(rng) for _ in range(256)]
    for name, texts in {"train": reviews, "test": held_out}.items():
        datasets.Dataset.from_dict({"text": texts}).to_json(temporary / f"{name}.jsonl")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape["max_position_embeddings"] = 64

    tokenizer = transformers.GPT2Tokenizer(pad_token="<|pad|>")
    tokenizer = tokenizer.train_new_from_iterator(reviews, 400, show_progress=False)
    end = tokenizer.eos_token_id
    shape["vocab_size"] = len(tokenizer)
    config = transformers.GPT2Config(bos_token_id=end, eos_token_id=end, **shape)
    ended = [review + tokenizer.eos_token for review in reviews]
    data = tokenizer(ended, padding=True, return_tensors="pt")
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    policy = AutoModelForCausalLM.from_config(config)
    train_toy_model(policy, data, 400, 3e-3, tokenizer, temporary / "policy")

    tokenizer = transformers.BertTokenizer()
    tokenizer = tokenizer.train_new_from_iterator(reviews, 400, show_progress=False)
    shape["vocab_size"] = len(tokenizer)
    config = transformers.BertConfig(intermediate_size=128, **shape)
    # The reward model must be able to score texts that are not finished
    begun = [" ".join(review.split()[: rng.randint(1, 30)]) for review in reviews]
    data = tokenizer(begun, padding=True, return_tensors="pt")
    data["labels"] = torch.tensor([int(rng.random() < toy_sentiment(text)) for text in begun])
    reward_model = AutoModelForSequenceClassification.from_config(config)
    train_toy_model(reward_model, data, 1200, 1e-3, tokenizer, temporary / "reward")
    temporary.rename(folder)


def train_toy_model(model, data, steps, learning_rate, tokenizer, folder):
    """Supervised training; saves model and tokenizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in tqdm(range(steps), f"making the toy's {folder.name} model", disable=None, leave=False):
        rows = torch.randint(len(data["labels"]), [32])
        batch = {name: tensor[rows] for name, tensor in data.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
