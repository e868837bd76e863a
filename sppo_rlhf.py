# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "transformers>=5.0", "tensorboard>=2.19", "accelerate>=1.10",
#   "peft>=0.18", "pyarrow>=21.0", "numpy>=2.0", "tyro>=1.0.16", "filelock>=3.30", "datasets>=4.0",
#   "tqdm>=4.66.5"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Symmetric PPO (SPPO) for language models (RLHF) in one file.

    python toy.py && python sppo_rlhf.py            # a toy task, offline; two minutes on a CPU
    python sppo_rlhf.py --task imdb                 # GPT-2 writes positive film reviews
    accelerate launch sppo_rlhf.py --task tldr      # GPT-J with LoRA summarises, on several GPUs
    python sppo_rlhf.py --beta 0 --policy-model DIR --dataset my.jsonl --reward-model my.py:short

where a line of my.jsonl is {"prompt": "Say hi"}, and my.py has a function such as
`def short(completions, **kwargs): return [-len(text) / 100 for text in completions]`.

The policy is a causal language model of transformers, whole or with LoRA, on one or several
processes. Prompts are texts or chat messages, rewards come from classifiers or Python functions,
and targets of a supervised loss are texts. For anything else, edit `tokenize` and `load`.

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(Byun & Perrault, ICML 2025, arXiv 2405.17618): a reverse cross-entropy term in PPO's loss, against
noise. Each token is an action. With p its probability, p_old its probability when it was sampled
(before top-k), r = p / p_old, A its advantage, and Z < 0 a constant that stands for log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where L has a gradient, else 0
    symmetric loss    alpha L + beta Lr

SPPO differs from PPO in two lines, "all that SPPO adds to PPO" and `beta * reverse_loss`. The
gradient of Lr is |Z| times that of L, so SPPO's policy gradient is k = alpha + beta |Z| times
PPO's, 0.9 (imdb) or 0.7 times (tldr) with the authors' weights. With --beta 0 this is PPO.

The reward is given at the last token. Every token pays a KL penalty, `kl_coef` times
log(p_old / p_ref), against the frozen initial policy. Advantages are normalised over sampled
tokens. Dropout is off. Steps count texts, each a prompt with its response.
"""

# ruff: noqa: E402  (libraries that load slowly come after the arguments)
import argparse
import copy
import csv
import glob
import gzip
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's idle threads leave cores to others
SCRIPT = Path(__file__).resolve()
SOURCE = SCRIPT.read_bytes()  # read at once, since the file may be edited during the run
START = Path.cwd()  # relative paths begin here, even where other code changes directory
# The same run continues although these differ
NO_EFFECT = ["runs_dir", "start_from", "device", "track", "gradient_checkpointing"]
GOES_ON = [*NO_EFFECT, "total_timesteps", "eval_freq", "eval_episodes"]  # from another one
TOY = "runs/toy"  # the toy's models and data, which toy.py makes


def require(condition, message):
    if not condition:
        sys.exit(f"error: {message}")


@contextmanager
def errors_name(subject):
    """Ends the run with a sentence that names `subject` if the block raises an error."""
    try:
        yield
    except Exception as error:  # libraries raise any
        sys.exit(f"error: {subject}: {error}")


@dataclass
class Args:
    """Defaults are the toy's. For own data, set learning rate and lengths, too."""

    # Run
    task: Literal["toy", "imdb", "tldr"] = "toy"  # toy: offline; imdb: reviews; tldr: summaries
    total_timesteps: int = 40 * 112  # texts sampled in all, rounded up to whole batches
    seed: int = 1  # of all random numbers (the authors' runs: 42 to 46)
    exp_name: str | None = None  # name of the method in reports; default: the algorithm
    runs_dir: str = "runs"  # folder of all runs
    start_from: str | None = None  # folder of a run: begin with its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where it is faster; off: float32
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    # Models and data
    policy_model: str = f"{TOY}/policy"  # folder or hub name of a causal language model
    tokenizer: str | None = None  # folder or hub name; default: the policy's (imdb, tldr: gpt2)
    chat_template_kwargs: str = "{}"  # JSON, for the policy's template: {"enable_thinking": false}
    reward_model: tuple[str, ...] = (f"{TOY}/reward",)  # classifiers or FILE.py:NAME
    reward_weights: tuple[float, ...] = ()  # 0: only logged; negative: a penalty; default: equal
    reward_label: int | None = None  # label whose probability is the reward; with two labels: 1
    dataset: str = f"{TOY}/train.jsonl"  # file, folder or hub name:split; text, or prompt and label
    eval_dataset: str | None = None  # held-out data; default: the task's, or a tenth of the prompts
    prompt_length: int = 16  # maximum tokens of a prompt (or of a text's first half): the last ones
    response_length: int = 32  # maximum tokens of a response
    top_k: int = 0  # sample among the k most likely tokens; 0: among all
    temperature: float = 1.0  # divides logits, in sampling and training alike
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
    clip_coef: float = 0.2  # epsilon of the clip range, for ratios and values (rewards near 1)
    norm_adv: bool = True  # normalise advantages in each minibatch
    vf_coef: float = 0.5  # weight of the value loss
    ce_coef: float = 0.0  # weight of the supervised (SFT) loss on the data's targets, PPO-ptx
    kl_coef: float = 0.005  # weight of the KL penalty against the reference policy, per token
    max_grad_norm: float = 1.0  # gradient clipping, by the norm over all parameters
    # Symmetric loss
    alpha: float | None = None  # weight of the PPO loss; default: 0.5, or 1 if beta is 0
    beta: float = 0.4  # weight of the reverse loss; 0: PPO
    z: float = -1.0  # Z, which stands for log 0
    # Noise
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # in training only
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    # Evaluation
    eval_freq: int | None = None  # texts between evaluations and checkpoints; default: total / 10
    eval_episodes: int = 128  # held-out prompts in an evaluation; rewards are clean
    eval_greedy: bool = False  # greedy decoding in evaluations; else sampled as in training

    @property
    def template_options(self):
        with errors_name("--chat-template-kwargs must be a JSON object"):
            return dict(json.loads(self.chat_template_kwargs))

    def resolve(self):
        """Replaces None by the default, where that depends on other arguments."""
        self.eval_dataset = self.eval_dataset or EVAL_DATASETS.get(self.dataset)
        if self.dataset != TASKS[self.task].get("dataset", Args.dataset):
            self.task = re.split("[.:]", Path(self.dataset).name)[0]  # own data are a task, too
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
            self.reward_weights = tuple(1 / len(self.reward_model) for _ in self.reward_model)
        self.check()

    def check(self):
        """Refuses settings that would run, but not do what they say."""
        positive = "batch_size num_minibatches update_epochs prompt_length response_length"
        positive += " total_timesteps eval_freq eval_episodes micro_batch_size temperature"
        positive += " max_grad_norm lora_alpha"
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and name != "z":
                require(0 <= value < math.inf, f"{name} must be finite and not negative")
                require(value or name not in positive.split(), f"{name} must be positive")
        require(self.seed < 2**63, "seed must be below 2**63")
        require(max(self.gamma, self.gae_lambda) <= 1, "gamma and gae_lambda must be at most 1")
        require(-math.inf < self.z < 0, "z stands for log 0: it must be negative and finite")
        require(self.alpha + self.beta > 0, "with alpha and beta 0 nothing trains the policy")
        require(self.lora_r or self.lora_alpha == Args.lora_alpha, "lora_alpha needs --lora-r")
        require(self.noise != "none" or not self.noise_level, "noise_level needs a --noise")
        is_share = "flip" not in self.noise or self.noise_level <= 1
        require(is_share, "noise_level is the probability of a flip, so at most 1")
        is_one_each = len(self.reward_weights) == len(self.reward_model)
        is_reward = is_one_each and 0 < sum(map(abs, self.reward_weights)) < math.inf
        require(is_reward, "reward_weights: a number for each reward model, and not all 0")
        parts = self.num_minibatches * int(os.environ.get("WORLD_SIZE", 1))  # processes
        require(self.batch_size % parts == 0, "num_minibatches * processes must divide batch_size")


# The authors' settings, except that their base model for tldr is 4-bit. The toy's are ours.
TASKS = {
    "toy": {},
    "imdb": {
        "policy_model": "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews",
        "reward_model": ("lvwerra/distilbert-imdb",),
        "dataset": "stanfordnlp/imdb:train",
        "total_timesteps": 60 * 112,
        "prompt_length": 64,
        "response_length": 48,
        "top_k": 50,
        "stop_at_eos": False,
        "learning_rate": 5e-6,
        "ce_coef": 0.1,
        "kl_coef": 0.001,
    },
    "tldr": {
        "policy_model": "CarperAI/openai_summarize_tldr_sft",
        # The authors enclose its texts in <|startoftext|> and <|endoftext|>; we do not
        "reward_model": ("jdchang/tldr_rm_adapter",),
        "dataset": "CarperAI/openai_summarize_tldr:train",
        "total_timesteps": 200 * 64,
        "prompt_length": 500,
        "response_length": 50,
        "lora_r": 8,
        "batch_size": 64,
        "update_epochs": 4,
        "micro_batch_size": 4,
        "learning_rate": 5e-6,
        "weight_decay": 0.01,
        "gamma": 1.0,
        "vf_coef": 0.1,
        "ce_coef": 0.1,
        "kl_coef": 0.002,
        "beta": 0.2,
        "eval_greedy": True,
    },
}
# Of hub models that come without one, and held-out splits of datasets
TOKENIZERS = dict.fromkeys([TASKS[task]["policy_model"] for task in ("imdb", "tldr")], "gpt2")
EVAL_DATASETS = {
    f"{TOY}/train.jsonl": f"{TOY}/test.jsonl",
    "stanfordnlp/imdb:train": "stanfordnlp/imdb:test",
    "CarperAI/openai_summarize_tldr:train": "CarperAI/openai_summarize_tldr:valid",
}


def parse_args(argv=None):
    """Parses flags with the defaults of the chosen --task, which --help then shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="toy")
    task = parser.parse_known_args(argv)[0].task
    words = sys.argv if argv is None else argv
    flags = [word.partition("=")[0].replace("_", "-") for word in words]
    for flag in ("--reward-model", "--reward-weights"):
        require(flags.count(flag) < 2, f"{flag} is there twice: give all its values at once")
    args = tyro.cli(Args, default=Args(task, **TASKS[task]), args=argv)
    args.resolve()
    return args


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistyped flag are answered at once

import datasets
import numpy as np
import peft
import pyarrow.parquet
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from filelock import FileLock, Timeout
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# ---- Agent


def token_log_probs(model, inputs, temperature):
    """Log-probabilities (n,) of the tokens under a language model."""
    head = model.get_output_embeddings()
    head.places = inputs.places
    logits = model(input_ids=inputs.ids, use_cache=False).logits
    head.places = None
    logits /= temperature  # in place, because logits take most memory
    return -F.cross_entropy(logits[0], inputs.tokens, reduction="none")


class ActorCritic(nn.Module):
    """Policy, critic and reference policy, that is the frozen initial policy. With LoRA policy and
    critic are adapters, and all three share the other weights."""

    def __init__(self, args, device, dtype):
        super().__init__()
        self.temperature = args.temperature
        self.dtype = dtype
        self.reference = load_frozen(args, dtype)
        self.policy = trainable_copy(self.reference, args)
        self.critic = trainable_copy(self.reference, args).get_decoder()
        patch_head(self.reference)
        patch_head(self.policy)
        hidden_size = self.reference.get_output_embeddings().weight.shape[1]
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # disables dropout
        self.to(device)

    def trained(self):
        """{name: parameter} of those that are trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def autocast(self):
        device = self.value_head.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, response, target=None):
        """Returns the log-probabilities (n,) of the tokens of responses, the values (n,) of the
        texts before each token and, if targets are given, the log-probabilities of their tokens.
        All gradients flow through this method, so that DDP can wrap it."""
        target_log_prob = None
        with self.autocast():
            log_prob = token_log_probs(self.policy, response, self.temperature)
            states = self.critic(input_ids=response.ids, use_cache=False).last_hidden_state
            if target is not None:
                target_log_prob = token_log_probs(self.policy, target, self.temperature)
        states = states.flatten(0, 1)[response.places]
        value = self.value_head(states.float()).squeeze(-1)
        return log_prob, value, target_log_prob


@dataclass
class Setup:
    """Models and data of a run, from `load`."""

    accelerator: Accelerator
    actor_critic: ActorCritic
    parallel_model: nn.Module  # with several processes `actor_critic` in DDP, else itself
    optimizer: torch.optim.Optimizer
    tokenizer: transformers.PreTrainedTokenizerBase
    reward_models: list
    columns: list[str]  # of the data, which reward functions get
    train_data: list[dict]
    eval_data: list[dict]


# ---- Rollout


@dataclass
class Sample:
    """A prompt and its response of T tokens, and what was computed for them, on the CPU."""

    row: dict  # of the data
    prompt: list[int]
    response: list[int]
    target: list[int]  # from the data, for the supervised loss
    log_prob: Tensor  # (T,), under the policy that sampled the response
    reference_log_prob: Tensor  # (T,)
    value: Tensor  # (T,), of the text before each token
    target_log_prob: Tensor | None  # in evaluations
    scores: np.ndarray | None = None  # (reward models,), NaN: not scored
    advantage: Tensor | None = None  # (T,), in training
    returns: Tensor | None = None  # (T,), in training


def collect(setup, args, rng):
    """Returns the `Sample`s of a rollout, for rows of the data drawn at random, with advantages."""
    chosen = rng.permutation(len(setup.train_data))[: args.batch_size]
    samples = sample_responses(setup, args, [setup.train_data[i] for i in chosen])
    noisy_reward = perturb_reward(rewards(samples, args), args.noise, args.noise_level, rng)
    for sample, reward in zip(samples, noisy_reward.tolist()):
        log_ratio = sample.log_prob - sample.reference_log_prob
        sample.advantage, sample.returns = token_advantages(reward, log_ratio, sample.value, args)
    return samples


@torch.no_grad()
def sample_responses(setup, args, data, evaluating=False):
    """`Sample`s for rows of the data. Each process samples a part of them, and gets them all."""
    accelerator = setup.accelerator
    actor = setup.actor_critic
    samples = []
    own = data[accelerator.process_index :: accelerator.num_processes]
    size = 8 * (args.micro_batch_size or 16)  # without activations for a backward pass
    for start in range(0, len(own), size):
        rows = own[start : start + size]
        tokens = [tokenize(row, setup.tokenizer, args) for row in rows]
        prompts, targets = map(list, zip(*tokens))
        responses = generate(setup, prompts, do_sample=not (evaluating and args.eval_greedy))

        # The forward pass of the update, not `generate`, is used, so that ratios start at 1
        response = collate(prompts, responses, accelerator.device)
        target = collate(prompts, targets, accelerator.device) if evaluating else None
        log_prob, value, target_log_prob = actor(response, target)
        with actor.autocast():
            reference_log_prob = token_log_probs(actor.reference, response, args.temperature)
        parts = [by_text(x, responses) for x in (log_prob, reference_log_prob, value)]
        target_parts = by_text(target_log_prob, targets) if evaluating else [None] * len(rows)
        samples += map(Sample, rows, prompts, responses, targets, *parts, target_parts)

    # All of this process at once, because a reward function may compare texts
    prompts = [sample.prompt for sample in samples]
    responses = [sample.response for sample in samples]
    scores = score(setup, args, own, prompts, responses) if own else []
    for sample, sample_scores in zip(samples, scores):
        sample.scores = sample_scores
    return gather_object(samples)


def generate(setup, prompts, do_sample):
    """Samples responses by transformers' `generate`, and cuts each after its first end token."""
    actor = setup.actor_critic
    ids, mask = left_padded(prompts, setup.accelerator.device)
    with actor.autocast():
        texts = actor.policy.generate(ids, attention_mask=mask, do_sample=do_sample)
    ends = actor.policy.generation_config.eos_token_id
    responses = []
    for tokens in texts[:, ids.shape[1] :].tolist():
        length = next((i for i, token in enumerate(tokens, 1) if token in ends), None)
        responses.append(tokens[:length])
    return responses


def score(setup, args, rows, prompts, responses):
    """Scores (texts, reward models) of responses, NaN where a reward model returns None. Reward
    models get `inputs` as keywords: what TRL's reward functions get, and `texts`."""
    decode = partial(setup.tokenizer.batch_decode, skip_special_tokens=True)
    inputs = {name: [row.get(name) for row in rows] for name in setup.columns}
    inputs |= {
        "texts": decode([x + y for x, y in zip(prompts, responses)]),
        "prompts": decode(prompts),
        "completions": decode(responses),
        "completion_ids": responses,
    }
    if is_chat(rows[0]):
        inputs["prompts"] = [row["prompt"] for row in rows]
        inputs["completions"] = [[{"role": "assistant", "content": x}] for x in decode(responses)]
    scores = []
    for name, reward_model in zip(args.reward_model, setup.reward_models):
        given = reward_model(**copy.deepcopy(inputs))  # it may change its arguments
        with errors_name(f"{name} must return a number or None for each of {len(rows)} texts"):
            is_list = len(given) == len(rows) and not isinstance(given, str | dict | set)
            if not is_list or not all(one is None or math.isfinite(one) for one in given):
                raise ValueError(f"not {given!r:.99}")
        scores.append([math.nan if one is None else float(one) for one in given])
    scores = np.array(scores, np.float32).T
    unscored = np.isnan(scores[:, np.flatnonzero(args.reward_weights)]).all(axis=1).any()
    require(not unscored, "no reward model scores one of the texts; one must give a number")
    return scores


# ---- Advantages and noise


def token_advantages(reward, log_ratio, value, args):
    """Advantages and returns (T,) of a text's tokens: generalised advantage estimation (Schulman et
    al., arXiv 1506.02438). `reward` is given at the last token; every token pays the KL penalty, by
    its `log_ratio` (T,) of policy and reference policy. A text that reaches the maximum length ends
    there: nothing is bootstrapped. For example, with gamma and lambda 1 and no KL penalty, a text
    of two tokens with reward 1 and values 0.2 and 0.5 has the advantages 0.8 and 0.5."""
    token_reward = -args.kl_coef * log_ratio
    token_reward[-1] += reward
    next_value = F.pad(value[1:], (0, 1))  # 0 after the last token
    advantage = token_reward + args.gamma * next_value - value
    for t in reversed(range(len(advantage) - 1)):
        advantage[t] += args.gamma * args.gae_lambda * advantage[t + 1]
    return advantage, advantage + value


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
    if noise in ("none", "adv_flip"):
        return reward
    raise ValueError(f"perturb_reward does not know the noise {noise!r}")


def perturb_advantage(advantage, level, rng):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    flipped = torch.from_numpy(rng.random(advantage.shape) < level)
    return torch.where(flipped.to(advantage.device), -advantage, advantage)


# ---- Losses, of n tokens from several texts


def symmetric_policy_losses(log_prob, old_log_prob, advantage, clip_coef, z):
    """PPO loss L and reverse PPO loss Lr, to minimise as alpha L + beta Lr. The tensors (n,) are
    log p, log p_old and A of n actions; `clip_coef` is PPO's epsilon.

    (1 - p) / p_old = 1 / p_old - r, where 1 / p_old is constant, and huge for unlikely actions. The
    Lr returned leaves it out: it has the gradient of the authors' code, but not the value.
    """
    ratio = (log_prob - old_log_prob).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    policy_loss = -torch.where(unclipped, surrogate, clipped).mean()  # the minimum of both
    reverse_loss = torch.where(unclipped, z * surrogate, 0.0).mean()  # all that SPPO adds to PPO
    return policy_loss, reverse_loss


def clipped_value_loss(value, old_value, returns, clip_coef):
    """PPO's clipped value loss, 0.5 mean(max((v - R)^2, (v_clipped - R)^2)): v_clipped is at most
    `clip_coef` from the value v had when the tokens were sampled."""
    clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    error = torch.maximum((value - returns).square(), (clipped - returns).square())
    return 0.5 * error.mean()


def loss_and_metrics(model, args, micro_batch, token_count, target_count):
    """Loss and metrics of a micro batch of (sample, advantages) pairs. Summed over micro batches
    and processes, they are the minibatch's loss and metrics. The minibatch has `token_count` tokens
    in responses and `target_count` in targets."""
    samples, advantages = zip(*micro_batch)
    device = next(model.parameters()).device
    prompts = [sample.prompt for sample in samples]
    response = collate(prompts, [sample.response for sample in samples], device)
    targets = [sample.target for sample in samples]
    target = collate(prompts, targets, device) if args.ce_coef else None
    log_prob, value, target_log_prob = model(response, target)
    advantage = torch.cat(advantages).to(device)
    names = ["log_prob", "value", "returns"]
    old_log_prob, old_value, returns = (joined(samples, name).to(device) for name in names)
    policy_loss, reverse_loss = symmetric_policy_losses(
        log_prob, old_log_prob, advantage, args.clip_coef, args.z
    )
    value_loss = clipped_value_loss(value, old_value, returns, args.clip_coef)
    loss = args.alpha * policy_loss + args.beta * reverse_loss + args.vf_coef * value_loss
    log_ratio = log_prob - old_log_prob
    metrics = {
        "losses/policy_loss": policy_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/clipfrac": (log_ratio.expm1().abs() > args.clip_coef).float().mean(),
        "losses/approx_kl": (log_ratio.expm1() - log_ratio).mean(),  # joschu.net/blog/kl-approx
    }
    share = len(advantage) / token_count
    loss = share * loss
    metrics = {name: share * metric.detach() for name, metric in metrics.items()}
    if args.ce_coef:
        sft_loss = -target_log_prob.sum() / target_count
        loss = loss + args.ce_coef * sft_loss
        metrics["losses/sft_loss"] = sft_loss.detach()
    return loss, metrics


def update(setup, args, samples, rng):
    """Passes `update_epochs` times over the samples. Returns the metrics of each minibatch."""
    accelerator = setup.accelerator
    model = setup.parallel_model
    history = []
    setup.actor_critic.train(args.gradient_checkpointing)  # which needs train mode
    for _ in range(args.update_epochs):
        for indices in rng.permutation(len(samples)).reshape(args.num_minibatches, -1):
            minibatch = [samples[i] for i in indices]
            advantage = joined(minibatch, "advantage")
            if args.noise == "adv_flip":
                advantage = perturb_advantage(advantage, args.noise_level, rng)
            token_count = len(advantage)
            if args.norm_adv:
                # float64: of equal advantages float32's standard deviation may exceed 1e-8
                precise = advantage.double()
                std = precise.std(correction=min(1, token_count - 1))
                advantage = (advantage - precise.mean()) / (std + 1e-8)
            responses = [sample.response for sample in minibatch]
            pairs = list(zip(minibatch, by_text(advantage, responses)))
            target_count = max(1, sum(len(sample.target) for sample in minibatch))

            # Gradients and metrics add up, over micro batches and then over processes
            own = pairs[accelerator.process_index :: accelerator.num_processes]
            own.sort(key=lambda pair: len(pair[0].prompt + pair[0].response))  # least padding
            size = args.micro_batch_size or len(own)
            totals = {}
            for start in range(0, len(own), size):
                is_last = start + size >= len(own)  # its backward pass averages over processes
                with nullcontext() if is_last else accelerator.no_sync(model):
                    part = own[start : start + size]
                    loss, shares = loss_and_metrics(model, args, part, token_count, target_count)
                    # Times the number of processes, since DDP averages over them
                    (loss * accelerator.num_processes).backward()
                totals = {name: totals.get(name, 0) + share for name, share in shares.items()}
            metrics = accelerator.reduce(totals)  # the minibatch's: sums over processes

            trained = setup.actor_critic.trained().values()
            norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            history.append(metrics | {"losses/grad_norm": norm})
    setup.actor_critic.eval()
    return history


# ---- Evaluation


def seed_all(*numbers):
    """Seeds the global generators, each process with a number of its own, and returns a generator
    that is the same in all processes. Checkpoints hold no generators: seed and step suffice."""
    rng = np.random.default_rng(numbers)
    set_seed(rng.integers(2**31).item(), device_specific=True)  # adds the process's number
    return rng


def rewards(samples, args):
    """Rewards (samples,), weighted sums of scores. Missing scores count 0."""
    scores = np.array([sample.scores for sample in samples])
    return np.nansum(scores * np.float32(args.reward_weights), axis=1)


def means(rows):
    """Means of numbers by their names, over the `rows` that have them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: np.mean([float(row[name]) for row in rows if name in row]).item() for name in names
    }


def mean_scores(samples, args, prefix):
    """{prefix + name of a reward model: its mean score}, over the texts that it scores."""
    scores = np.array([sample.scores for sample in samples], float)
    columns = zip(args.reward_model, scores.T)
    return {prefix + name: np.nanmean(x).item() for name, x in columns if not np.isnan(x).all()}


def kl_per_text(samples):
    """KL divergence of policy and reference in nats per text, estimated from what was sampled."""
    log_ratio = joined(samples, "log_prob") - joined(samples, "reference_log_prob")
    return log_ratio.sum().item() / len(samples)


def texts_of(setup, args, samples, step, data):
    """Up to eight samples as rows of samples.jsonl. `data`: training or held-out."""
    decode = setup.tokenizer.decode
    rows = []
    for sample, reward in zip(samples[:8], rewards(samples, args).tolist()):
        texts = {"prompt": decode(sample.prompt)}
        texts["response"] = decode(sample.response, skip_special_tokens=True)
        rows.append(sample.row | texts | {"step": step, "data": data, "reward": reward})
    return rows


def evaluate(setup, args, step):
    """Returns a row for progress.csv, and up to eight samples. Perplexities are of responses under
    the reference policy and, if there are targets, of these under the policy."""
    seed_all(args.seed, step, 2)
    samples = sample_responses(setup, args, setup.eval_data, evaluating=True)
    reward = rewards(samples, args)
    reference_log_prob = joined(samples, "reference_log_prob")
    target_log_prob = joined(samples, "target_log_prob")
    row = {
        "step": step,
        "return_mean": reward.mean().item(),
        "return_std": reward.std().item(),
        "length_mean": len(reference_log_prob) / len(samples),
        "kl": kl_per_text(samples),
        "perplexity": (-reference_log_prob.mean()).exp().item(),
    }
    if len(target_log_prob):
        row["perplexity_real"] = (-target_log_prob.mean()).exp().item()
    row |= mean_scores(samples, args, "eval_")
    return row, texts_of(setup, args, samples, step, "held-out")


@dataclass
class Progress:
    """What a checkpoint holds besides weights and optimizer."""

    global_step: int
    evaluations: list[dict]  # rows of progress.csv
    samples: list[str]  # lines of samples.jsonl
    history: list[dict]  # what was logged since the last evaluation
    speeds: list[float]  # texts per second of each update


def evaluate_and_log(setup, args, progress, folder, writer, training_texts=()):
    """Appends an evaluation to `progress`, which the first process writes."""
    step = progress.global_step
    row, samples = evaluate(setup, args, step)
    row |= means(progress.history)  # since the last evaluation
    progress.history = []
    progress.evaluations.append(row)
    for sample in [*samples, *training_texts]:
        progress.samples.append(json.dumps(sample, default=str) + "\n")
    if not writer:
        return
    with atomic_write(folder / "progress.csv") as path, open(path, "w", encoding="utf-8") as file:
        table = csv.DictWriter(file, means(progress.evaluations), lineterminator="\n")  # all names
        table.writeheader()
        table.writerows(progress.evaluations)
    with atomic_write(folder / "samples.jsonl") as path:
        path.write_text("".join(progress.samples))
    writer.add_scalar("eval/return_mean", row["return_mean"], step)
    tqdm.write(f"step {step:,}: reward {row['return_mean']:.3f}")
    for sample in samples[:3]:
        tqdm.write(f"    {sample['prompt']!r} {sample['response']!r} {sample['reward']:.3f}")


# ---- Training


@cache
def warn(text):
    """Prints each text once."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def train(setup, args, folder):
    accelerator = setup.accelerator
    check_sampling(setup, args)
    accelerator.wait_for_everyone()  # the first process writes sessions.jsonl
    progress = restore(setup, folder, args.start_from)
    writer = None  # in all processes but the first
    if accelerator.is_main_process:
        if args.track:
            import wandb

            # W&B keeps the run's id in `dir`, so that resume="auto" finds it
            options = {"config": vars(args), "sync_tensorboard": True, "resume": "auto"}
            wandb.init(project="symmetric-rl", name=folder.name, dir=folder, **options)
        # TensorBoard hides entries after the checkpoint; without a checkpoint, all entries
        writer = SummaryWriter(folder, purge_step=progress.global_step + bool(progress.evaluations))
    begun = progress.global_step
    steps = f"from step {begun:,}, with a checkpoint every {args.eval_freq:,} texts"
    accelerator.print(f"{folder.name}: {steps}, on {accelerator.num_processes} process(es)")
    bar = tqdm(total=args.total_timesteps, initial=begun, disable=None if writer else True)
    if not progress.evaluations:
        evaluate_and_log(setup, args, progress, folder, writer)  # the initial policy

    while progress.global_step < args.total_timesteps:
        started = time.perf_counter()
        rng = seed_all(args.seed, progress.global_step, 1)
        samples = collect(setup, args, rng)
        progress.global_step += args.batch_size
        step = progress.global_step

        minibatch_metrics = update(setup, args, samples, rng)
        # LoRA's adapters begin at zero, so a mismatch shows only after an update: look twice
        is_new = step <= begun + 2 * args.batch_size
        rounding = 1e-8 if setup.actor_critic.dtype == torch.float32 else 1e-3
        if is_new and minibatch_metrics[0]["losses/approx_kl"] > rounding:
            message = "the policy that acts is not the one that is trained (dropout, memory?)"
            if accelerator.device.type == "cpu":
                raise Failed(f"error: {message}")
            warn(f"{message}, or this GPU rounds more")
        metrics = means(minibatch_metrics)
        if not math.isfinite(metrics["losses/grad_norm"]):
            raise Failed(f"error: gradient not finite, step {step} (rate? reward?)")

        # The value's error is the advantage. The variance is clamped: all returns may be equal
        returns_variance = joined(samples, "returns").var().clamp(min=1e-8)
        explained_variance = 1 - (joined(samples, "advantage").var() / returns_variance).item()
        log_prob = joined(samples, "log_prob")
        reward = rewards(samples, args)
        if np.ptp(reward) == 0:
            cause = "the update follows the critic's errors alone"
            warn(f"all rewards of a rollout are {reward[0]:.3g}: {cause}")
        if args.stop_at_eos and len(log_prob) == len(samples) * args.response_length:
            warn("no text of a rollout ends before --response-length")
        scalars = metrics | {
            "losses/entropy": -log_prob.mean().item(),  # an estimate from the samples
            "losses/explained_variance": explained_variance,
            "charts/kl": kl_per_text(samples),
            "charts/episodic_return": reward.mean().item(),
            "charts/reward_std": reward.std().item(),
            "charts/episodic_length": len(log_prob) / len(samples),
        }
        scalars |= mean_scores(samples, args, "rewards/")
        progress.history.append(scalars)
        progress.speeds.append(args.batch_size / (time.perf_counter() - started))
        if writer:
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, step)
            writer.add_scalar("charts/SPS", progress.speeds[-1], step)
        bar.set_postfix_str(f"reward {reward.mean():.3f}, KL {scalars['charts/kl']:.1f}")
        bar.update(args.batch_size)

        # Evaluation and checkpoint, at the end and where a multiple was passed
        if step >= args.total_timesteps or step % args.eval_freq < args.batch_size:
            texts = texts_of(setup, args, samples, step, "training")
            evaluate_and_log(setup, args, progress, folder, writer, texts)
            if writer:
                writer.flush()
                save_checkpoint(setup, folder, progress)

    if writer:  # only the first process has one
        writer.close()
        save_policy(setup, folder)
        # JSON lacks nan
        summary = {name: x for name, x in progress.evaluations[-1].items() if math.isfinite(x)}
        summary["sps"] = np.median(progress.speeds)
        with atomic_write(folder / "summary.json") as path:  # last: marks the end
            path.write_text(json.dumps(summary, indent=2))
    accelerator.wait_for_everyone()  # the first process may still be writing
    # If DDP is freed after its process group, PyTorch may deadlock (its issue 56297)
    setup.parallel_model = None
    accelerator.end_training()


# ---- Data, lists of rows {column: value}


def read_rows(name):
    """The rows of a file, of all .parquet files in FOLDER, of those whose names begin with SPLIT in
    FOLDER:SPLIT, or of NAME:SPLIT or NAME:CONFIGURATION:SPLIT on the Hugging Face hub."""
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(name).read().to_pylist()
    if suffix in (".jsonl", ".json", ".csv"):
        open_file = gzip.open if name.endswith(".gz") else open
        with open_file(name, "rt", encoding="utf-8-sig", newline="") as file:
            if suffix == ".json":
                return json.load(file)
            if suffix == ".jsonl":
                lines = filter(str.strip, file)
                return json.loads(f"[{','.join(lines)}]")  # errors name the line
            csv.field_size_limit(2**31 - 1)  # allows long texts
            header, *rows = filter(None, csv.reader(file, strict=True))
            if any(len(row) != len({*header}) for row in rows):
                raise ValueError("a row has too few or too many values, or a name is there twice")
            return [dict(zip(header, row)) for row in rows]
    if Path(name).is_file():
        raise ValueError(
            "its name must end with .jsonl, .json or .csv (.gz may follow) or .parquet"
        )
    source, *configuration = name.split(":")
    if not Path(source).is_dir():
        split = configuration.pop() if configuration else "train"
        return datasets.load_dataset(source, *configuration, split=split).to_list()
    files = sorted(Path(source).rglob(f"{''.join(configuration)}*.parquet"))
    return [row for file in files for row in read_rows(str(file))]


def load_rows(name, accelerator, tokenizer, args):
    """The rows of the data `name`. Each must have a prompt; `messages` are one."""
    with errors_name(name):
        rows = read_rows(name)
    require(rows, f"{name} has no rows, or is a folder without such .parquet files")
    whole = replace(args, prompt_length=sys.maxsize)
    lengths = []
    has_targets = False
    for number, row in enumerate(rows, 1):
        with errors_name(f"{name}, row {number}"):
            if "messages" in row:
                if "prompt" in row or not isinstance(row["messages"], list):
                    raise ValueError("its 'messages' are no list, or have a 'prompt' beside them")
                row["prompt"] = row["messages"]
            prompt, target = tokenize(row, tokenizer, whole)
        lengths.append(len(prompt))
        has_targets |= target != []
    cut = sum(length > args.prompt_length for length in lengths)
    accelerator.print(f"{name}: {len(rows):,} prompts, of which --prompt-length cuts {cut:,}")
    is_whole = not cut or not is_chat(rows[0])
    require(is_whole, f"{name}: messages are not cut: they need --prompt-length {max(lengths)}")
    if args.ce_coef and name == args.dataset:
        require(has_targets, "--ce-coef needs a 'label' of texts, or a 'text'; messages have none")
    return rows


def split_rows(rows, eval_rows, args):
    """Returns training rows, and `eval_episodes` held-out rows. Without `eval_rows`, the rows of a
    tenth of the distinct prompts (or texts) are held out."""
    rng = np.random.default_rng(0)
    if not eval_rows:
        prompts = [str(row.get("prompt", row.get("text"))) for row in rows]
        distinct = sorted(set(prompts))
        rng.shuffle(distinct)
        held_out = set(distinct[: math.ceil(len(distinct) / 10)])
        eval_rows = [row for row, prompt in zip(rows, prompts) if prompt in held_out]
        rows = [row for row, prompt in zip(rows, prompts) if prompt not in held_out]
    few = f"{len(rows)} rows of training data and {len(eval_rows)} held out are too few for"
    enough = args.batch_size <= len(rows) and args.eval_episodes <= len(eval_rows)
    require(enough, f"{few} --batch-size {args.batch_size}, --eval-episodes {args.eval_episodes}")
    chosen = rng.permutation(len(eval_rows))[: args.eval_episodes]
    return rows, [eval_rows[i] for i in chosen]


# ---- Tokens


def is_chat(row):
    return isinstance(row.get("prompt"), list)


def tokenize(row, tokenizer, args):
    """Returns the prompt and the target of a row, as lists of tokens.

    A `prompt` is a text, whose target is the text `label`, if there is one; or messages, which have
    none. Without `prompt`, the halves of `text` are prompt and target. A text is cut to its last
    `prompt_length` tokens, a target to its first `response_length`."""
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    end = tokenizer.eos_token_id
    start = []
    target = []
    if is_chat(row):
        messages = row["prompt"]
        options = {"tools": row.get("tools"), "add_generation_prompt": True}
        options |= args.template_options
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        for message in messages:
            content = "" if message.get("tool_calls") else message["content"]
            as_json = json.dumps(content, ensure_ascii=False)[1:-1]  # as of some tools' results
            is_there = isinstance(content, str) and (content.strip() in text or as_json in text)
            if not is_there:
                name = message["role"]
                raise ValueError(f"the chat template drops what {name!r} says, or it is no text")
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's; the response follows the user's")
        prompt = encode(text)
    else:
        text = row.get("prompt", row.get("text"))
        if not isinstance(text, str) or text.startswith(('[{"', "[{'")):  # messages in a CSV file
            raise ValueError("it has no 'prompt' (a text or messages), 'messages' or 'text'")
        prompt = encode(text)
        # What the tokenizer writes before a text, such as <s>
        probe = tokenizer(tokenizer.eos_token, return_special_tokens_mask=True)
        start = probe["input_ids"][: probe["special_tokens_mask"].index(0)]
        if prompt[: len(start)] != start:
            prompt = start + prompt
        if "prompt" not in row:
            half = len(prompt) // 2
            target = [*prompt[half:], end]
            prompt = prompt[:half]
        elif row.get("label") and isinstance(row["label"], str):
            target = [*encode(row["label"]), end]
    if len(prompt) > args.prompt_length:
        prompt = start + prompt[len(prompt) + len(start) - args.prompt_length :]
    return prompt or [end], target[: args.response_length]


def turn_end(tokenizer, args):
    """The first added token that the chat template writes behind an assistant's text, or None."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "*b*"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, **args.template_options)
    tokens = tokenizer.encode(text.rpartition("*b*")[2], add_special_tokens=False)
    added = tokenizer.added_tokens_decoder  # some tokenizers add white space, too
    return next((x for x in tokens if x in added and added[x].content.strip()), None)


class Inputs(NamedTuple):
    ids: Tensor  # (texts, length), padded on the right. Attention is causal: no mask is needed
    places: Tensor  # (n,), index in the flattened ids of the token before each continuation token
    tokens: Tensor  # (n,), tokens of the continuations, one text after the other


def collate(prompts, continuations, device):
    """`Inputs` from lists of lists of tokens; each prompt has at least one."""
    texts = [torch.tensor(x + y) for x, y in zip(prompts, continuations)]
    ids = pad_sequence(texts, batch_first=True).to(device)
    places = []
    for i, (x, y) in enumerate(zip(prompts, continuations)):
        first = i * ids.shape[1] + len(x) - 1
        places += range(first, first + len(y))
    places = torch.tensor(places, dtype=torch.long, device=device)
    return Inputs(ids, places, ids.flatten()[places + 1])


def left_padded(prompts, device):
    """Tokens and attention mask (texts, length) of prompts, which end in the last column."""
    texts = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = pad_sequence(texts, batch_first=True, padding_value=-1, padding_side="left")
    return ids.clamp(min=0), (ids >= 0).long()  # a padding token of its own may have no embedding


def by_text(tensor, texts):
    """Splits a tensor (n,) by text. Copies, because a pickled view contains its whole tensor."""
    return [part.clone() for part in tensor.cpu().split(list(map(len, texts)))]


def joined(samples, name):
    """Joins a field of samples into one tensor (n,) over all their tokens."""
    return torch.cat([getattr(sample, name) for sample in samples])


# ---- Reward models: functions of the keyword inputs in `score`, which return a score for each text


def classifier_reward(name, args, device, dtype):
    """The classifier `name`, with its own tokenizer and, for messages, its own chat template, if it
    has one. A score is its only output, else the output or probability of the `reward_label`."""
    with errors_name(name):
        model = load_classifier(name, device, dtype)
    labels = model.config.id2label
    label = {1: 0, 2: 1}.get(len(labels))  # with more labels, it must be given
    if args.reward_label is not None and len(labels) > 1:
        label = args.reward_label
    require(label in labels, f"{name}: --reward-label must be one of {labels}, not {label}")
    if not transformers.utils.has_file(name, "tokenizer_config.json"):  # an adapter may have none
        name = model.config.name_or_path
    # Texts that are too long lose their beginning
    tokenizer = load_tokenizer(name, truncation_side="left", padding_side="right")
    positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if pad is not None:
        tokenizer.pad_token_id = pad  # by this token decoders find the end of a text
    classify = transformers.pipeline(
        "text-classification",
        model,
        tokenizer=tokenizer,
        device=device,
        batch_size=1 if pad is None else 16,
        truncation=True,
        top_k=None,  # scores of all labels
        function_to_apply="none" if len(labels) == 1 else None,  # None: by its problem_type
    )

    def reward_model(texts, prompts, completions, **_):
        has_template = tokenizer.chat_template and isinstance(prompts[0], list)
        if has_template:
            chats = [x + y for x, y in zip(prompts, completions)]
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        results = classify(texts, add_special_tokens=not has_template)
        return [x["score"] for result in results for x in result if x["label"] == labels[label]]

    return reward_model


def load_classifier(name, device, dtype):
    """A LoRA adapter, of one output as tldr's, is merged into its base model."""
    options = {"dtype": dtype, "device_map": device}
    if not transformers.utils.find_adapter_config_file(name):
        return load_model(AutoModelForSequenceClassification, name, **options)
    auto_class = peft.AutoPeftModelForSequenceClassification
    model = auto_class.from_pretrained(name, num_labels=1, **options)
    saved = peft.load_peft_weights(name, device="cpu")
    refuse_missing(peft.get_peft_model_state_dict(model).keys() - saved.keys(), name)
    return model.merge_and_unload().to(device, dtype)  # modules_to_save may have another dtype


def import_function(name):
    """The Python function FILE.py:NAME. Its file may import files beside it."""
    file, _, function_name = name.rpartition(":")
    path = Path(START, file)
    require(path.is_file(), f"{file}: no such file")
    sys.path.append(str(path.parent))
    module = import_module(path.stem)
    is_own = getattr(module, "__file__", None) == str(path)
    require(is_own, f"another module is called {path.stem}: rename {file}")
    function = getattr(module, function_name, None)
    require(callable(function), f"{file} has no function {function_name}")
    return function


def function_reward(name, columns):
    """The Python function FILE.py:NAME, as TRL's. It gets the `inputs` that it names, or all with
    `**kwargs`, and returns a score for each text, or None where it does not score one."""
    function = import_function(name)
    signature = inspect.signature(function)
    takes_all = any(one.kind == one.VAR_KEYWORD for one in signature.parameters.values())
    inputs = ["texts", "prompts", "completions", "completion_ids", *columns]
    names = [one for one in inputs if takes_all or one in signature.parameters]
    with errors_name(f"{name} gets {', '.join(inputs)}"):
        signature.bind(**dict.fromkeys(names))
    return lambda **inputs: function(**{one: inputs[one] for one in names})


# ---- Loading and saving


def import_functions(args):
    """Imports the files of reward functions, for `file_digests`."""
    for name in args.reward_model:
        if ".py:" in name:
            import_function(name)
    os.chdir(START)  # an imported file may have changed it


def refuse_missing(weights, name):
    """Refuses a checkpoint without these weights, which would be random."""
    require(not weights, f"{name} lacks {len(weights)} weights, such as {min(weights, default='')}")


def load_model(auto_class, name, **options):
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    refuse_missing(info["missing_keys"], name)
    return model


def load_tokenizer(name, **sides):
    """The tokenizer of a model. AutoTokenizer makes an empty one for a folder without it."""
    with errors_name(name):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS.get(name, name), **sides)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    words = len(tokenizer) - len(tokenizer.all_special_tokens)
    require(words > 2, f"{name} has no tokenizer; for a policy, give --tokenizer")
    return tokenizer


def load_frozen(args, dtype):
    """The initial policy, whose weights do not change."""
    with errors_name(args.policy_model):
        has_adapter = transformers.utils.find_adapter_config_file(args.policy_model)
        require(not has_adapter, f"{args.policy_model} has an adapter_config.json: merge it")
        config = transformers.AutoConfig.from_pretrained(args.policy_model)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel
    if args.gradient_checkpointing:  # it needs train mode, which would turn dropout and noise on
        for name in vars(config):
            if "drop" in name or "jitter" in name:
                setattr(config, name, 0.0)
    dtype = dtype if args.lora_r else torch.float32
    model = load_model(AutoModelForCausalLM, args.policy_model, config=config, dtype=dtype)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False)


def trainable_copy(model, args):
    """A copy of a frozen language model, to be trained. With LoRA only an adapter is, on peft's
    default layers of the family, else on all linear layers; the other weights are shared."""
    if not args.lora_r:
        return copy.deepcopy(model).requires_grad_()
    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layers = defaults.get(model.config.model_type, "all-linear")
    options = {"target_modules": layers, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, **options)
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return peft.get_peft_model(copy.deepcopy(model, shared), config)  # does not copy `shared`


def patch_head(model):
    """Makes the last layer compute in float32, because bfloat16's 8 significant bits are too few
    for ratios near 1. If `places` are set, the layer computes only there."""
    head = model.get_output_embeddings()
    head.places = None

    def forward(states):
        if head.places is not None:
            states = states.flatten(0, 1)[head.places].unsqueeze(0)
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), head.weight.float(), bias)

    head.forward = forward


def has_bfloat16(device):
    """Whether bfloat16 is faster. CPUs with avx512_fp16 need AMX, which virtual ones may lack."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    needed = "amx_bf16" if able.get("avx512_fp16") else "avx512_bf16"
    return able.get(needed, False)


@torch.no_grad()
def check_sampling(setup, args):
    """Refuses a policy that samples from other probabilities than it is trained with, as where the
    padding or the cache of `generate` changes positions or recurrent states."""
    actor = setup.actor_critic
    # One prompt of the maximum length, and one of a single token, which gets padding
    prompt, _ = tokenize(setup.eval_data[0], setup.tokenizer, args)
    longest = (prompt * args.prompt_length)[: args.prompt_length]
    prompts = [longest, longest[:1]]
    ids, mask = left_padded(prompts, setup.accelerator.device)
    wanted = dict.fromkeys(["output_scores", "output_logits", "return_dict_in_generate"], True)
    with actor.autocast():
        generated = actor.policy.generate(ids, attention_mask=mask, **wanted)
        tokens = generated.sequences[:, ids.shape[1] :]
        response = collate(prompts, tokens.tolist(), ids.device)
        trained = token_log_probs(actor.policy, response, args.temperature).view(tokens.shape)
    scores = torch.stack(generated.scores, 1)  # of all tokens: logits / temperature, or -inf
    logits = torch.stack(generated.logits, 1)
    score = scores.gather(-1, tokens[..., None])[..., 0]
    acts = score - (logits / args.temperature).logsumexp(-1)
    difference = (acts - trained)[score.isfinite()].abs().max().item()
    # Rounding gives 1e-5 in float32, 0.05 in bfloat16 with 28 layers; a mistake gives 0.5 or more
    limit = 1e-2 if actor.dtype == torch.float32 else 0.3
    message = f"samples otherwise than it is trained, by {difference:.2g} nats a token"
    require(difference <= limit, f"{args.policy_model} {message}")


def load(args):
    """Loads what a run needs: models, data and an optimizer."""
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    transformers.utils.logging.disable_progress_bar()
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # but see ActorCritic.autocast
    device = accelerator.device
    dtype = torch.bfloat16 if args.amp == "auto" and has_bfloat16(device) else torch.float32
    tokenizer = load_tokenizer(args.tokenizer or args.policy_model)
    rows, eval_rows = (
        load_rows(name, accelerator, tokenizer, args) if name else []
        for name in (args.dataset, args.eval_dataset)
    )
    columns = list(dict.fromkeys(name for row in rows + eval_rows for name in row))
    train_data, eval_data = split_rows(rows, eval_rows, args)
    is_chats = is_chat(rows[0])
    is_mixed = any(is_chat(row) != is_chats for row in rows + eval_rows)
    require(not is_mixed, "only some of the prompts are messages")
    template = str(is_chats and tokenizer.chat_template)
    unknown = [option for option in args.template_options if option not in template]
    require(not unknown, f"--chat-template-kwargs: no chat template has {unknown}")
    reward_dtype = dtype if args.lora_r else torch.float32  # with LoRA, models are large
    reward_models = [
        function_reward(name, columns)
        if ".py:" in name
        else classifier_reward(name, args, device, reward_dtype)
        for name in args.reward_model
    ]
    torch.manual_seed(args.seed)  # initial weights of LoRA
    actor_critic = ActorCritic(args, device, dtype)
    policy = actor_critic.policy
    longest = args.prompt_length + args.response_length
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", longest)
    require(positions >= longest, f"{args.policy_model} has {positions} positions, not {longest}")
    own_ends = policy.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id]
    ends += own_ends if isinstance(own_ends, list) else [own_ends]
    ends += [turn_end(tokenizer, args)] if is_chats else []
    if ends[-1] is None and is_chats:
        warn(
            "no token ends a turn of the chat template: a response ends with the end of text alone"
        )
    policy.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=args.top_k,
        max_new_tokens=args.response_length,
        min_new_tokens=None if args.stop_at_eos else args.response_length,
        eos_token_id=[end for end in ends if end is not None],
        pad_token_id=0,  # comes after the end of a response, and is cut off
    )
    trained = actor_critic.trained().values()
    optimizer = torch.optim.AdamW(
        trained, args.learning_rate, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )
    parallel_model = accelerator.prepare(actor_critic)
    models = accelerator, actor_critic, parallel_model, optimizer, tokenizer, reward_models
    return Setup(*models, columns, train_data, eval_data)


def load_checkpoint(path, device="cpu"):
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # any is possible here
        cause = "it is damaged, or has more than tensors and Python's own types"
        sys.exit(f"error: {path} can't be read: {cause}: {error!r:.200}")


def save_checkpoint(setup, folder, progress):
    checkpoint = {
        "agent": setup.actor_critic.trained(),
        "optimizer": setup.optimizer.state_dict(),
        "progress": [*vars(progress).values()],
    }
    with atomic_write(folder / "checkpoint.pt") as path:
        torch.save(checkpoint, path)
        load_checkpoint(path, "meta")  # checks only: an edit may save what can't be read


def restore(setup, folder, start_from=None):
    """Loads the run's checkpoint, if it has one, else that of the run which it starts from, if any.
    Returns its `Progress`. Only a run that goes on keeps the other's rows."""
    path = folder / "checkpoint.pt"
    starts = start_from and not path.exists()
    if starts:
        path = Path(START, start_from).resolve() / path.name
    if not path.exists():
        return Progress(0, [], [], [], [])
    checkpoint = load_checkpoint(path)
    trained, saved = setup.actor_critic.trained(), checkpoint["agent"]
    shapes = [[(name, x.shape) for name, x in weights.items()] for weights in (trained, saved)]
    require(shapes[0] == shapes[1], f"{path} has weights of other names or shapes (--lora-r?)")
    setup.actor_critic.load_state_dict(saved, strict=False)
    if starts:  # the optimizer's options are this command's
        checkpoint["optimizer"]["param_groups"] = setup.optimizer.state_dict()["param_groups"]
    setup.optimizer.load_state_dict(checkpoint["optimizer"])
    progress = Progress(*checkpoint["progress"])
    if starts:
        other = differences(path.parent, folder)
        said = ", ".join(other) or "nothing, it goes on"
        step = progress.global_step
        setup.accelerator.print(f"starts from {path.parent.name} at step {step:,}; other: {said}")
        progress = Progress(step, [], [], [], []) if other else replace(progress, speeds=[])
    return progress


def save_policy(setup, run_folder):
    """Writes policy/: the trained policy or its adapter, for `from_pretrained`, its tokenizer, and
    how it was sampled, which transformers does not read with an adapter by itself."""
    folder = run_folder / "policy"
    temporary = run_folder / "policy.tmp"
    policy = setup.actor_critic.policy
    policy.generation_config.pad_token_id = setup.tokenizer.pad_token_id
    policy.save_pretrained(temporary)
    policy.generation_config.save_pretrained(temporary)  # peft does not save it with an adapter
    setup.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run killed just before its summary
    temporary.rename(folder)


# ---- Files of a run


@contextmanager
def atomic_write(path):
    """Yields the path of a temporary file that then replaces `path`: no file is half written."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb+") as file:  # Windows syncs only what can be written
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_digests():
    """{path: SHA-256} of the files that decide what a run does: this script, and imported files
    that are the user's own. A program that imports this script is not part of the run."""
    installed = {Path(os.__file__).parent}
    installed |= {x for x in map(Path, sys.path) if re.match("(site|dist)-packages$|DLLs$", x.name)}
    # Modules of programs that import this script, of what runs at each start, of torch.compile
    foreign = r"__(mp_)?main__$|(site|user)customize$|torch\.|.+\.inductor_entry_cpp$"
    digests = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        is_foreign = re.match(foreign, name) or installed & set(file.parents)
        if file.is_file() and not is_foreign:
            digests[str(file.resolve())] = hashlib.sha256(file.read_bytes()).hexdigest()
    digests[str(SCRIPT)] = hashlib.sha256(SOURCE).hexdigest()
    return digests


def local_digests(args):
    """{path: SHA-256} of the files of local data and models, without hidden files."""
    names = [args.dataset, args.eval_dataset, args.policy_model, args.tokenizer, *args.reward_model]
    for name in args.reward_model:
        adapter = Path(START, name, "adapter_config.json")
        if adapter.exists():
            names.append(json.loads(adapter.read_text())["base_model_name_or_path"])
    digests = {}
    for name in filter(None, names):
        root = Path(START, name)
        root = root if root.exists() else Path(START, name.split(":")[0])  # without a split
        is_there = root.exists() or not name.startswith(f"{TOY}/")
        require(is_there, f"no {name}: run toy.py, if it is a flag's default")
        inside = glob.glob(f"{glob.escape(str(root))}/**", recursive=True)
        for path in map(Path, [root, *inside]):
            if path.is_file() and path.suffix != ".pyc":
                # A map, because a model may be larger than memory. Empty files have none
                content = np.memmap(path, mode="r") if path.stat().st_size else b""
                digests[str(path.resolve())] = hashlib.sha256(content).hexdigest()
    return digests


def start_digest(args):
    """{path: SHA-256} of the checkpoint that a run starts from: of any with fewer steps, if none is
    at work on it. {} without `start_from`."""
    if not args.start_from:
        return {}
    path = Path(START, args.start_from).resolve() / "checkpoint.pt"
    if not path.exists():
        sys.exit(f"error: {args.start_from} has no checkpoint")
    step, *_ = load_checkpoint(path, "meta")["progress"]
    if step >= args.total_timesteps:
        sys.exit(f"error: {args.start_from} has {step:,} of --total-timesteps already: give more")
    try:
        with suppress(PermissionError), FileLock(path.with_name("lock"), timeout=10):
            pass  # nobody is at work on it, or the folder may only be read
    except OSError as error:
        sys.exit(f"error: another process is at work on {path.parent}, or locking fails: {error}")
    return {str(path): hashlib.sha256(np.memmap(path, mode="r")).hexdigest()}


def differences(*folders):
    """Texts of what a run has other than the one it starts from; none if it only goes on."""
    lines = [(folder / "sessions.jsonl").read_text().splitlines()[-1] for folder in folders]
    sessions = [json.loads(line) for line in lines]
    was, now = (session["args"] for session in sessions)
    names = [name for name in now | was if name not in GOES_ON and was.get(name) != now.get(name)]
    files = [{(Path(path).name, x) for path, x in run["files"].items()} for run in sessions]
    changed = {name for name, _ in files[0] ^ files[1]} - {"checkpoint.pt"}
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in names] + sorted(changed)


def run_folder(args, digests):
    """Folder of a run. Its name ends with a hash of arguments and files, so the same command finds
    its run again, and a changed script starts a new one."""
    kept = {name: value for name, value in vars(args).items() if name not in NO_EFFECT}
    kept["processes"] = os.environ.get("WORLD_SIZE", "1")  # each samples with its own seed
    files = sorted((Path(path).name, digest) for path, digest in digests.items())
    digest = hashlib.sha256(json.dumps([kept, files]).encode()).hexdigest()
    name = f"{args.task}__{args.exp_name}__{args.noise}__{args.seed}"
    name = re.sub(r'[<>:"/\\|?*]', "-", name)  # Windows refuses these characters
    return Path(START, args.runs_dir, f"{name}__{digest[:8]}")


class Failed(SystemExit):
    """Ends a run by a sentence, which reports have, too."""


@contextmanager
def failure_noted(folder):
    """Leaves failed.txt, for reports, if training ends by an error that may be the method's."""
    failed = folder / "failed.txt"
    failed.unlink(missing_ok=True)
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # these say nothing of it
    except (Exception, Failed) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if not re.search("allocate memory|CUDA error|[Cc]onnection", text):  # nor do these
            with atomic_write(failed) as path:
                path.write_text(f"{text}\n", "utf-8", "backslashreplace")
        raise


def begin_session(args, digests, folder):
    """Adds a line to the run's sessions.jsonl, with what is needed to reproduce it, and copies this
    script into its folder."""
    versions = {"torch": torch.__version__}  # with its kind of build
    for package in distributions():
        versions.setdefault(str(package.name), package.version)  # of two, Python imports the first
    session = {
        "script": SCRIPT.name,
        "args": vars(args),
        "command": sys.argv,
        "files": digests,
        "directory": SCRIPT.parent,
        "path": sys.path,
        "working_directory": START,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    path = folder / "sessions.jsonl"
    earlier = path.read_text() if path.exists() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(earlier + json.dumps(session, default=str) + "\n")
    with atomic_write(folder / SCRIPT.name) as temporary:
        temporary.write_bytes(SOURCE)


def main():
    args = parse_args()
    with suppress(AttributeError):  # of a notebook's stdout, which has all letters
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    is_first = os.environ.get("RANK", "0") == "0"  # only this process writes files
    try:
        import_functions(args)
        digests = file_digests() | local_digests(args) | start_digest(args)
        folder = run_folder(args, digests)
        summary_path = folder / "summary.json"
        setup = None if folder.exists() else load(args)  # an error in input leaves no folder
        with FileLock(folder / "lock", blocking=False) if is_first else nullcontext():
            if not summary_path.exists():
                if is_first:
                    begin_session(args, digests, folder)
                setup = setup or load(args)
                with failure_noted(folder) if is_first else nullcontext():
                    train(setup, args, folder)
    except Timeout:
        sys.exit(f"error: another process is at work on {folder}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from its last checkpoint, if any")
    if is_first:
        summary = json.loads(summary_path.read_text())
        score = f"reward {summary['return_mean']:.3f}, {summary['sps']:,.1f} texts/s"
        name = f"{args.runs_dir}/{folder.name}"  # as it was typed
        print(f"{name}: {score}; to play it: python enjoy.py {name}")


if __name__ == "__main__":
    main()
