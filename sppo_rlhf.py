# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.0", "datasets>=4.0", "accelerate>=1.10",
#   "peft>=0.18", "rouge-score>=0.1.2", "numpy>=2.0", "tyro>=1.0", "typeguard>=4.3",
#   "filelock>=3.16", "tensorboard>=2.19", "tqdm>=4.66.5"]
# ///
"""Symmetric PPO (SPPO) for language models (RLHF) in one file.

    python sppo_rlhf.py                             # a toy task, built offline; minutes on a CPU
    python sppo_rlhf.py --task imdb                 # GPT-2 writes positive film reviews
    python sppo_rlhf.py --task imdb --policy-model DIR --reward-model DIR --dataset reviews.jsonl.gz
    accelerate launch sppo_rlhf.py --task tldr      # GPT-J with LoRA summarises, on several GPUs
    python sppo_rlhf.py --task tldr --help          # all flags, with that task's defaults

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales"
(Byun & Perrault, ICML 2025, arXiv 2405.17618), which adds a reverse cross-entropy term to the PPO
loss, meant to make training robust to noise. Each token is an action. With p its probability, p_old
its probability under the policy that sampled it, r = p / p_old, A its advantage, and Z < 0 a
constant that stands for log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where L has a gradient, else 0
    symmetric loss    alpha L + beta Lr

What SPPO adds to PPO is the block `if beta:` in `symmetric_policy_loss`. The gradient of Lr is |Z|
times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's: with the authors'
weights 0.9 (imdb) and 0.7 (tldr) times. That changes its weight relative to the supervised loss,
and its share of the clipped gradient; policy and critic have no trained weights in common.

A reward model scores prompt and response; that reward is given at the last token. Every token pays
a KL penalty, `kl_coef` times log(pi / reference policy); the reference policy is the frozen
initial policy. Advantages are normalised over sampled tokens (the authors' code counts padding
too). Dropout is off. Steps and frequencies count texts, that is a prompt and its response.
"""

import argparse
import ctypes
import hashlib
import json
import logging
import math
import os
import platform
import random
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import numpy as np
import peft
import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import concatenate, send_to_device, slice_tensors
from filelock import FileLock, Timeout
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils.peft_utils import find_adapter_config_file
from typeguard import check_type


@dataclass
class Args:
    """Defaults are for the toy task; TASKS has the defaults of the other tasks."""

    # Run
    task: Literal["toy", "imdb", "tldr"] = "toy"  # toy: offline; imdb: reviews; tldr: summaries
    total_timesteps: int = 40 * 112  # texts sampled in all, rounded up to whole batches
    seed: int = 1  # of all random numbers (the authors' runs: 42 to 46)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where the hardware has it; off: float32
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run; default: task, algorithm, noise, seed, time
    resume: str | None = None  # folder of an interrupted run to continue; takes no other flag
    evaluate: str | None = None  # folder of a run to evaluate, without training it
    checkpoint_freq: int | None = None  # texts between checkpoints; default: total / 10; 0: at end
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    # Models and data
    policy_model: str | None = None  # folder or hub name of a causal language model
    tokenizer: str | None = None  # folder or hub name; default: the policy's (imdb, tldr: gpt2)
    reward_model: tuple[str, ...] = ()  # classifiers or LoRA adapters; or functions, FILE.py:NAME
    reward_label: int = 1  # label whose probability is the reward; unused with a single output
    reward_aggregate: Literal["mean", "min", "mean-std"] = "mean"  # over several reward models
    dataset: str | None = None  # JSONL(.gz) or hub name:split; column text (tldr: prompt, label)
    eval_dataset: str | None = None  # held-out data; default: the task's, or 10% of --dataset
    prompt_length: int = 16  # maximum tokens of a prompt, cut left (toy, imdb: half of a text)
    response_length: int = 32  # maximum tokens of a response
    top_k: int = 0  # sample among the k most likely tokens; 0: among all
    stop_at_eos: bool = True  # the end-of-text token ends a response; else it is never sampled
    lora_r: int = 0  # rank of LoRA adapters, for policy and critic on one model; 0: no LoRA
    lora_alpha: int = 64  # LoRA's alpha: adapters are scaled by alpha / rank
    load_in_4bit: bool = False  # with LoRA: 4-bit base model (needs a GPU and bitsandbytes)

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
    divide_by_p_old: bool = True  # as in the paper; without the division: our bounded variant

    # Noise
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # noise in training
    noise_level: float | None = None  # flip probability (default 0.1) or scale (default 0.05)
    correct_flips: bool = False  # make flipped rewards unbiased, given the noise level

    # Evaluation
    eval_freq: int | None = None  # texts per evaluation; default: total / 10; 0: first and last
    eval_episodes: int = 128  # held-out prompts in an evaluation; rewards are clean
    eval_greedy: bool = False  # greedy decoding in evaluations; else sampled as in training
    eval_reward_model: tuple[str, ...] = ()  # held-out reward models, never trained against

    @property
    def algo(self) -> str:
        return "sppo" if self.beta else "ppo"

    @property
    def run_dir(self) -> Path:
        return Path(self.resume or Path(self.runs_dir) / self.run_name)

    @property
    def inference_batch_size(self):
        return 8 * (self.micro_batch_size or 16)  # inference takes less memory than training


# The authors' settings, except that their base model for tldr is 4-bit. The toy's are ours.
TASKS = {
    "toy": Args(),
    "imdb": Args(
        task="imdb",
        policy_model="rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews",
        reward_model=("lvwerra/distilbert-imdb",),
        dataset="stanfordnlp/imdb:train",
        total_timesteps=60 * 112,
        prompt_length=64,
        response_length=48,
        top_k=50,
        stop_at_eos=False,
        learning_rate=5e-6,
        ce_coef=0.1,
        kl_coef=0.001,
    ),
    "tldr": Args(
        task="tldr",
        policy_model="CarperAI/openai_summarize_tldr_sft",
        # The authors enclose its texts in <|startoftext|> and <|endoftext|>; we do not
        reward_model=("jdchang/tldr_rm_adapter",),
        dataset="CarperAI/openai_summarize_tldr:train",
        total_timesteps=200 * 64,
        prompt_length=500,
        response_length=50,
        lora_r=8,
        batch_size=64,
        update_epochs=4,
        micro_batch_size=4,
        learning_rate=5e-6,
        weight_decay=0.01,
        gamma=1.0,
        vf_coef=0.1,
        ce_coef=0.1,
        kl_coef=0.002,
        beta=0.2,
        eval_greedy=True,
    ),
}
# Tokenizers of hub models that come without one, and held-out splits of hub datasets.
TOKENIZERS = {
    "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews": "gpt2",
    "CarperAI/openai_summarize_tldr_sft": "gpt2",
}
EVAL_DATASETS = {
    "stanfordnlp/imdb:train": "stanfordnlp/imdb:test",
    "CarperAI/openai_summarize_tldr:train": "CarperAI/openai_summarize_tldr:valid",
}


# Noise


def perturb_reward(reward, noise, level, rng):
    """Rewards of any shape with noise: flip replaces r by 1 - r with probability `level`, normal
    adds N(0, level^2), uniform adds U(-level, level); other kinds leave rewards unchanged."""
    if noise == "flip":
        flipped = rng.random(reward.shape) < level
        return np.where(flipped, 1 - reward, reward)
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    return reward


def correct_flips(reward, level):
    """Unbiased rewards, given flips r -> 1 - r with probability `level` < 1/2: the mean of a noisy
    reward is (1 - 2 level) r + level. After Wang et al., AAAI 2020, "Reinforcement Learning with
    Perturbed Rewards"."""
    return (reward - level) / (1 - 2 * level)


def perturb_advantage(advantage, level, generator):
    """Advantages of any shape, the sign of each flipped with probability `level`."""
    uniform = torch.rand(advantage.shape, generator=generator, device=generator.device)
    flipped = uniform.to(advantage.device) < level
    return torch.where(flipped, -advantage, advantage)


# Models


class ActorCritic(nn.Module):
    """Policy, critic and reference policy, that is the frozen initial policy.

    Without LoRA these are three models. With LoRA they are one model with two adapters, "policy"
    and "critic"; with both disabled it is the reference policy.

    Throughout, `ids` and `mask` (batch, tokens) are texts; `mask` is false at padding, which may be
    on both sides. Results are for the last `length` tokens, the response: (batch, length), float32.
    """

    def __init__(self, args, device, dtype):
        super().__init__()
        self.dtype = dtype
        self.lora = args.lora_r > 0
        config = AutoConfig.from_pretrained(args.policy_model)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel
        quantization = None
        if args.load_in_4bit:
            quantization = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4"
            )
        load_model = partial(
            load_pretrained,
            AutoModelForCausalLM,
            args.policy_model,
            config=config,
            dtype=dtype if self.lora else torch.float32,
            quantization_config=quantization,
            # Fused kernels may return NaN for padding on the left, which attends to nothing, and
            # on a CPU, in bfloat16, they make updates slower
            attn_implementation="eager",
        )
        self.policy = load_model()
        if self.lora:
            adapter = peft.LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha)
            self.policy.requires_grad_(False)
            self.policy.add_adapter(adapter, "policy")
            self.policy.add_adapter(adapter, "critic")
            self.adapter_parameters = [
                parameter for name, parameter in self.policy.named_parameters() if "lora_" in name
            ]
            for parameter in self.adapter_parameters:  # bfloat16 would round small updates away
                parameter.data = parameter.data.float()
            self.activate_adapter("policy")
        else:
            self.critic = load_model().base_model
            self.reference = load_model().requires_grad_(False)
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # disables dropout, for good
        self.to(device)

    def activate_adapter(self, name):
        if self.lora:
            self.policy.set_adapter(name)
            for parameter in self.adapter_parameters:
                parameter.requires_grad_(True)  # peft has frozen the other adapter

    def autocast(self):
        device = self.value_head.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, ids, mask, length, sft_ids=None, sft_mask=None):
        """Log-probabilities and values of responses and, given `sft_ids`, log-probabilities of
        reference completions. Gradients flow only here, so it is called through DDP's wrapper."""
        sft_log_prob = None
        with self.autocast():
            log_prob = self.policy_log_prob(ids, mask, length)
            value = self.value(ids, mask, length)
            if sft_ids is not None:
                sft_log_prob = self.policy_log_prob(sft_ids, sft_mask, length)
        return log_prob, value, sft_log_prob

    def policy_log_prob(self, ids, mask, length):
        self.activate_adapter("policy")
        return token_log_prob(self.policy, ids, mask, length)

    def reference_log_prob(self, ids, mask, length):
        if not self.lora:
            return token_log_prob(self.reference, ids, mask, length)
        self.policy.disable_adapters()
        log_prob = token_log_prob(self.policy, ids, mask, length)
        self.policy.enable_adapters()
        return log_prob

    def value(self, ids, mask, length):
        """Values of the texts before each of the last `length` tokens."""
        self.activate_adapter("critic")
        # transformers' base_model: all but the head, with the adapters
        critic = self.policy.base_model if self.lora else self.critic
        hidden = predicting_states(critic, ids, mask, length)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)

    def generate(self, ids, mask, uniform, top_k, eos, pad, stop_at_eos):
        """Samples responses to prompts that are padded on the left. Returns ids and mask of prompts
        and responses, (batch, prompt tokens + length). `uniform` (batch, length), as
        in `sample_token`, is an argument so that samples do not depend on how batches are split."""
        self.activate_adapter("policy")
        cache = None
        new_ids = ids
        alive = torch.ones_like(mask[:, :1])
        for t in range(uniform.shape[1]):
            output = self.policy.base_model(
                input_ids=new_ids,
                attention_mask=mask.long(),
                position_ids=position_ids(mask)[:, -new_ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = float32_logits(self.policy, output.last_hidden_state[:, -1])
            if not stop_at_eos:
                logits[:, eos] = -math.inf
            new_ids = sample_token(logits, uniform[:, t : t + 1], top_k)
            new_ids = torch.where(alive, new_ids, pad)
            ids = torch.cat([ids, new_ids], 1)
            mask = torch.cat([mask, alive], 1)
            alive = alive & (new_ids != eos)
        return ids, mask


def position_ids(mask):
    """Position of each token in its text, not counting padding on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def predicting_states(transformer, ids, mask, length):
    """Final hidden states (batch, length, hidden size) that predict the last `length` tokens:
    those of the tokens just before them."""
    first_column = int(mask.any(0).int().argmax())  # before it, there is only padding
    ids = ids[:, first_column:-1]
    mask = mask[:, first_column:-1]
    output = transformer(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
    )
    return output.last_hidden_state[:, -length:]


def float32_logits(model, hidden):
    """Logits in float32: the 8 significant bits of bfloat16 are too few for ratios near 1."""
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight.float(), bias)


def token_log_prob(model, ids, mask, length):
    """Log-probabilities (batch, length), float32, of the last `length` tokens."""
    logits = float32_logits(model, predicting_states(model.base_model, ids, mask, length))
    tokens = ids[:, -length:]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return -loss.view_as(tokens)


def sample_token(logits, uniform, top_k):
    """Inverse-CDF sampling: tokens (batch, 1) from `logits` (batch, vocabulary), among the `top_k`
    most likely ones (0: among all), given `uniform` (batch, 1) in [0, 1)."""
    vocabulary = logits.shape[-1]
    top = logits.topk(min(top_k or vocabulary, vocabulary))
    cumulative = top.values.softmax(-1, dtype=torch.float64).cumsum(-1)
    rank = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    return top.indices.gather(1, rank)


class RewardModel:
    """Text in, score out, with a tokenizer of its own. `name`: a classifier, or a LoRA adapter with
    a single output; `label`: the label whose probability is the score, unless the model has a
    single output."""

    def __init__(self, name, label, device, dtype):
        self.label = label
        base = name
        with loading(name):
            if find_adapter_config_file(name):
                base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
                self.model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
                    name, num_labels=1, dtype=dtype
                )
            else:
                self.model = load_pretrained(AutoModelForSequenceClassification, name, dtype=dtype)
            self.model.to(device)
        config = self.model.config
        require(
            config.num_labels == 1 or label < config.num_labels,
            f"--reward-label {label}: {name} has {config.id2label}",
        )
        tokenizer = load_tokenizer(base)
        config.pad_token_id = tokenizer.pad_token_id
        positions = getattr(config, "max_position_embeddings", -1)  # XLNet has no limit and says -1
        if positions > 0:
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, texts):
        """Scores (texts,). Texts that are too long are truncated on the left."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.model.device)).logits.float()
        if logits.shape[1] == 1:
            return logits[:, 0]
        if self.model.config.problem_type == "multi_label_classification":
            return logits.sigmoid()[:, self.label]
        return logits.softmax(-1)[:, self.label]


class RewardFunction:
    """A Python function as a reward model: it takes a list of texts and returns one score for each.
    `name`: the file and the function in it, FILE.py:NAME."""

    def __init__(self, name, device):
        self.name = name
        self.device = device
        path, _, function = name.rpartition(":")
        with loading(name):
            self.function = runpy.run_path(path)[function]

    def __call__(self, texts):
        """Scores (texts,). Raises RunError if the function fails."""
        try:
            scores = torch.tensor(self.function(texts), dtype=torch.float32, device=self.device)
            require(scores.shape == (len(texts),), f"{len(texts)} texts, scores {scores.shape}")
        except Exception as error:  # any exception is possible in a user's function
            raise RunError(f"{self.name}: {error!r:.300}") from error
        return scores


def load_reward_model(name, label, device, dtype):
    if ".py:" in name:
        return RewardFunction(name, device)
    return RewardModel(name, label, device, dtype)


def aggregate(scores, how):
    """Rewards (texts,) from the scores (texts, models) of an ensemble: mean, min or mean-std."""
    if how == "min":
        return scores.amin(1)
    if how == "mean-std":
        return scores.mean(1) - scores.std(1, correction=0)
    return scores.mean(1)


# Losses


def masked_sum(x, mask):
    """Sum of `x` where `mask` is true, both of any shape."""
    return torch.where(mask, x, 0).sum()


def masked_mean(x, mask):
    """Mean of `x` where `mask` is true, both of any shape."""
    return masked_sum(x, mask) / mask.sum()


def symmetric_policy_loss(
    log_prob, old_log_prob, advantage, mask, clip_coef, alpha, beta, z, divide_by_p_old=True
):
    """alpha * PPO loss + beta * reverse PPO loss, a scalar to minimise (arXiv 2405.17618).

    Tensors (batch, tokens): `log_prob`, `old_log_prob`: log pi of each token, now and when it was
    sampled; `advantage`; `mask`: true at sampled tokens, over which the mean is taken.
    Numbers: `clip_coef`: PPO's epsilon; `alpha`, `beta` >= 0; `z` < 0.

    (1 - p) / p_old is written 1 / p_old - r: the first term has no gradient but may be huge. Judge
    this loss by its gradient, not its value. If `divide_by_p_old` is false (our variant, not in the
    paper), the reverse loss is bounded and gives likely tokens more weight.
    """
    ratio = torch.where(mask, log_prob - old_log_prob, 0.0).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    objective = alpha * torch.where(unclipped, surrogate, clipped)
    if beta:  # all that symmetric PPO adds to PPO
        if divide_by_p_old:
            reverse = advantage * z * ((-old_log_prob).exp() - ratio)
        else:
            reverse = advantage * z * (1 - log_prob.exp())
        objective = objective + beta * torch.where(unclipped, reverse, 0.0)
    return -masked_mean(objective, mask)


def clipped_value_loss(value, old_value, returns, mask, clip_coef):
    """PPO's clipped value loss: half the mean over tokens of the larger of two squared errors, one
    of the value, one of the value with its change clipped."""
    clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    error = torch.maximum((value - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(error, mask)


class Rollout(NamedTuple):
    """Prompts and responses of B texts, at most P and T tokens long."""

    ids: Tensor  # (B, P + T), prompts padded on the left, responses on the right
    mask: Tensor  # (B, P + T), false at padding
    response_mask: Tensor  # (B, T), the last columns of `mask`
    log_prob: Tensor  # (B, T), of sampled tokens under the policy that sampled them, before top-k
    reference_log_prob: Tensor  # (B, T), of sampled tokens under the reference policy
    value: Tensor  # (B, T), of the text before each token
    scores: Tensor  # (B, reward models)
    sft_ids: Tensor  # (B, P + T), the same prompts with reference completions
    sft_mask: Tensor  # (B, P + T)


class Batch(NamedTuple):
    """What an update learns from."""

    rollout: Rollout
    advantage: Tensor  # (B, T)
    returns: Tensor  # (B, T)


def loss_and_metrics(model, args, batch, response_tokens, completion_tokens):
    """Loss and metrics of a micro batch: sums over its tokens, divided by the number of tokens in
    the minibatch, so that results of all micro batches and processes add up to the minibatch's."""
    rollout = batch.rollout
    mask = rollout.response_mask
    length = mask.shape[1]
    sft = (rollout.sft_ids, rollout.sft_mask) if args.ce_coef else ()
    log_prob, value, sft_log_prob = model(rollout.ids, rollout.mask, length, *sft)
    policy_loss = symmetric_policy_loss(
        log_prob,
        rollout.log_prob,
        batch.advantage,
        mask,
        args.clip_coef,
        args.alpha,
        args.beta,
        args.z,
        args.divide_by_p_old,
    )
    value_loss = clipped_value_loss(value, rollout.value, batch.returns, mask, args.clip_coef)
    # policy_loss and value_loss are means over these texts' tokens; mask.sum() makes them sums
    loss = mask.sum() * (policy_loss + args.vf_coef * value_loss) / response_tokens

    with torch.no_grad():
        # For logging: the two losses of symmetric_policy_loss, without alpha and beta
        log_ratio = log_prob - rollout.log_prob
        ratio = log_ratio.exp()
        surrogate = batch.advantage * ratio
        clipped = batch.advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        # The part of the reverse loss that has a gradient: m A Z r or, undivided, m A Z p
        reverse = torch.where(surrogate <= clipped, args.z * surrogate, 0.0)
        if not args.divide_by_p_old:
            reverse = reverse * rollout.log_prob.exp()
        sums = {
            "policy_loss": -masked_sum(torch.minimum(surrogate, clipped), mask),
            "reverse_loss": masked_sum(reverse, mask),
            "value_loss": value_loss * mask.sum(),
            "clipfrac": masked_sum((ratio - 1).abs() > args.clip_coef, mask),
            "approx_kl": masked_sum(ratio - 1 - log_ratio, mask),  # joschu.net/blog/kl-approx.html
        }
        metrics = {name: total / response_tokens for name, total in sums.items()}
    if args.ce_coef:
        sft_loss = -masked_sum(sft_log_prob, rollout.sft_mask[:, -length:]) / completion_tokens
        loss = loss + args.ce_coef * sft_loss
        metrics["sft_loss"] = sft_loss.detach()
    return loss, metrics


# Advantages


def token_advantages(reward, log_prob, reference_log_prob, value, mask, args):
    """Advantages and returns (batch, tokens): generalised advantage estimation over sampled tokens
    (Schulman et al., arXiv 1506.02438), zero elsewhere.

    `reward` (batch,) is given at the last token of a text; every token pays the KL penalty. All
    else is (batch, tokens), `mask` true at sampled tokens. A text that reaches the maximum length
    ends there: nothing is bootstrapped.
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
    centred = advantage - masked_mean(advantage, mask)
    variance = masked_sum(centred.square(), mask) / (mask.sum() - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


# Rollout


def process_rows(accelerator, count, size):
    """Indices of this process's share of `count` rows, split into parts of at most `size`."""
    with accelerator.split_between_processes(torch.arange(count)) as rows:
        return rows.split(size)


@torch.no_grad()
def collect_rollout(setup, args, sft_ids, sft_mask, uniform, top_k, reward_models):
    """Samples responses to the prompts of texts (B, P + T) and scores them; each process does its
    share. Returns the rollout of all processes, on the CPU. `uniform` (B, T) as in `generate`."""
    actor_critic = setup.actor_critic
    tokenizer = setup.tokenizer
    device = setup.accelerator.device
    length = args.response_length
    parts = []
    for rows in process_rows(setup.accelerator, len(uniform), args.inference_batch_size):
        part_sft_ids = sft_ids[rows].to(device)
        part_sft_mask = sft_mask[rows].to(device)
        with actor_critic.autocast():
            ids, mask = actor_critic.generate(
                part_sft_ids[:, :-length],  # the prompts, without completions
                part_sft_mask[:, :-length],
                uniform[rows].to(device),
                top_k,
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
                args.stop_at_eos,
            )
            # Computed as in the update, not by `generate`, so that ratios start at 1.
            log_prob = actor_critic.policy_log_prob(ids, mask, length)
            reference_log_prob = actor_critic.reference_log_prob(ids, mask, length)
            value = actor_critic.value(ids, mask, length)
        texts = decode(tokenizer, ids, mask)
        scores = torch.stack([reward_model(texts) for reward_model in reward_models], 1)
        if not scores.isfinite().all():
            raise RunError(
                f"{' '.join(args.reward_model + args.eval_reward_model)}: scores that are not"
                f" finite, with the means {scores.mean(0).tolist()}"
            )
        part = Rollout(
            ids=ids,
            mask=mask,
            response_mask=mask[:, -length:],
            log_prob=log_prob,
            reference_log_prob=reference_log_prob,
            value=value,
            scores=scores,
            sft_ids=part_sft_ids,
            sft_mask=part_sft_mask,
        )
        parts.append(part)
    rollout = setup.accelerator.gather(concatenate(parts))
    return send_to_device(rollout, "cpu")


# Update


def accumulate_gradient(setup, args, minibatch):
    """Computes the gradient of a minibatch, in micro batches on all processes. Returns metrics,
    means over the tokens of the minibatch."""
    accelerator = setup.accelerator
    size, length = minibatch.advantage.shape
    response_tokens = minibatch.rollout.response_mask.sum()
    completion_tokens = minibatch.rollout.sft_mask[:, -length:].sum()
    micro_batches = process_rows(accelerator, size, args.micro_batch_size or size)
    totals = {}
    for rows in micro_batches:
        micro_batch = send_to_device(slice_tensors(minibatch, rows), accelerator.device)
        is_last = rows is micro_batches[-1]  # DDP averages gradients in that backward pass only
        with nullcontext() if is_last else accelerator.no_sync(setup.model):
            loss, metrics = loss_and_metrics(
                setup.model, args, micro_batch, response_tokens, completion_tokens
            )
            # The loss is already divided by the tokens of all processes: undo DDP's averaging.
            accelerator.backward(loss * accelerator.num_processes)
        for name, metric in metrics.items():
            totals[name] = totals.get(name, 0) + metric
    return accelerator.reduce(totals, "sum")


def update(setup, args, batch, generator):
    """`update_epochs` passes over the batch. Returns metrics, means over minibatches."""
    history = []
    for _ in range(args.update_epochs):
        order = torch.randperm(args.batch_size, generator=generator)
        for rows in order.split(args.batch_size // args.num_minibatches):
            minibatch = slice_tensors(batch, rows)
            mask = minibatch.rollout.response_mask
            raw = minibatch.advantage
            if args.noise == "adv_flip":
                raw = perturb_advantage(raw, args.noise_level, generator)
            advantage = normalize(raw, mask) if args.norm_adv else raw
            minibatch = minibatch._replace(advantage=advantage)

            metrics = accumulate_gradient(setup, args, minibatch)
            metrics["grad_norm"] = setup.accelerator.clip_grad_norm_(
                setup.model.parameters(), args.max_grad_norm
            )
            metrics["clipped_gradients"] = metrics["grad_norm"] > args.max_grad_norm
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            metrics["advantage_sign_flips"] = masked_mean((raw > 0) != (advantage > 0), mask)
            history.append(metrics)
    return {name: np.mean([float(m[name]) for m in history]) for name in history[0]}


# Evaluation


@torch.no_grad()
def evaluate(setup, args, step):
    """Returns a row for progress.csv, and up to eight samples.

    The row has the reward, and what it may have cost: the KL divergence from the reference policy
    in nats per text (an estimate, biased where sampling is filtered), perplexities and distinct-n.
    """
    T = args.response_length
    sft_ids, sft_mask = tokenize(setup.eval_data, setup.tokenizer, args)
    generator = torch.Generator().manual_seed(args.seed + step)
    uniform = torch.rand(args.eval_episodes, T, generator=generator)
    top_k = 1 if args.eval_greedy else args.top_k
    rollout = collect_rollout(setup, args, sft_ids, sft_mask, uniform, top_k, setup.reward_models)
    mask = rollout.response_mask
    first_heldout = len(args.reward_model)  # a column of `scores`
    reward = aggregate(rollout.scores[:, :first_heldout], args.reward_aggregate)
    log_ratio = rollout.log_prob - rollout.reference_log_prob
    sft_log_prob = completion_log_prob(setup, args, sft_ids, sft_mask)
    prompts = decode(setup.tokenizer, sft_ids[:8, :-T], sft_mask[:8, :-T])
    responses = decode(setup.tokenizer, rollout.ids[:, -T:], mask)

    row = {
        "step": step,
        "return_mean": reward.mean().item(),
        "return_std": reward.std(correction=0).item(),
        "length_mean": mask.sum().item() / args.eval_episodes,
        "episodes": args.eval_episodes,
        "kl": masked_sum(log_ratio, mask).item() / args.eval_episodes,
        # Responses under the reference policy, then reference completions under the policy
        "perplexity": perplexity(rollout.reference_log_prob, mask),
        "perplexity_real": perplexity(sft_log_prob, sft_mask[:, -T:]),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
    }
    for name, score in zip(args.eval_reward_model, rollout.scores[:, first_heldout:].mean(0)):
        row[f"heldout_{Path(name).name}"] = score.item()
    if args.task == "toy":
        row["sentiment"] = sum(map(toy_sentiment, responses)) / len(responses)
    if args.task == "tldr":
        row |= rouge(setup.eval_data["label"], responses)

    samples = [
        {"step": step, "prompt": prompt, "response": response, "reward": score}
        for prompt, response, score in zip(prompts, responses, reward.tolist())
    ]
    return row, samples


def completion_log_prob(setup, args, sft_ids, sft_mask):
    """Log-probabilities (texts, T) of reference completions under the policy."""
    device = setup.accelerator.device
    parts = []
    size = args.inference_batch_size
    for ids, mask in zip(sft_ids.split(size), sft_mask.split(size)):
        with setup.actor_critic.autocast():
            log_prob = setup.actor_critic.policy_log_prob(
                ids.to(device), mask.to(device), args.response_length
            )
        parts.append(log_prob.cpu())
    return torch.cat(parts)


def perplexity(log_prob, mask):
    """Perplexity per token, over tokens where `mask` is true."""
    return (-masked_mean(log_prob, mask)).exp().item()


def distinct_n(texts, n):
    """Share of distinct n-grams among all n-grams of words (Li et al., arXiv 1510.03055)."""
    ngrams = []
    for text in texts:
        words = text.split()
        for i in range(len(words) - n + 1):
            ngrams.append(tuple(words[i : i + n]))
    return len(set(ngrams)) / max(1, len(ngrams))


def rouge(references, responses):
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L."""
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, responses)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


# Training


@dataclass
class Progress:
    """What a checkpoint holds besides weights, optimizer and random number generators."""

    global_step: int = 0
    evaluations: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    recent_rewards: list[float] = field(default_factory=list)  # of the last 100 texts
    train_seconds: float = 0.0  # without start-up and evaluation
    wall_seconds: float = 0.0


def train(args: Args, stop: threading.Event, setup: "Setup | None" = None) -> dict | None:
    """A run, with arguments from `prepare`. Returns the content of summary.json, or None if `stop`
    came first. `setup`: what `load` returned, if it has been called already. Raises RunError if the
    run can't continue, UsageError if its checkpoint is damaged, OSError if a file can't be
    written."""
    setup = setup or load(args)
    accelerator = setup.accelerator
    generator = torch.Generator().manual_seed(args.seed)  # prompts, sampling, minibatches, adv_flip
    rng = np.random.default_rng(args.seed)  # reward noise
    progress = Progress()
    if (args.run_dir / "checkpoint.pt").is_file():
        progress = restore(setup, args, generator, rng)
    first_step = progress.global_step
    writer = None  # in all processes but the first
    if accelerator.is_main_process:
        if args.track:
            with usable("--track"):
                start_tracking(args)
        # TensorBoard hides what was logged after the checkpoint or, if there is none, everything
        purge_step = first_step + 1 if first_step else 0
        writer = SummaryWriter(args.run_dir, purge_step=purge_step)
        writer.add_text("hyperparameters", f"```\n{json.dumps(vars(args), indent=2)}\n```")
    progress_bar = tqdm(
        total=args.total_timesteps,
        initial=first_step,
        unit=" texts",
        disable=None if writer else True,
    )
    started = setup.started - progress.wall_seconds  # as if never interrupted
    stopping = False

    while True:
        # Evaluation (also one that an interrupted run did not finish) and checkpoint
        step = progress.global_step
        finished = step >= args.total_timesteps
        evaluated = progress.evaluations and progress.evaluations[-1]["step"] == step
        evaluation_due = step == 0 or finished or due(args.eval_freq, step, args.batch_size)
        if evaluation_due and not evaluated and not stopping:
            evaluate_and_log(setup, args, progress, writer)
        checkpoint_due = finished or stopping or due(args.checkpoint_freq, step, args.batch_size)
        # A run resumed at its end has something new only if it lacked its last evaluation
        changed = step > first_step or (finished and not evaluated)
        if accelerator.is_main_process and checkpoint_due and changed:
            progress.wall_seconds = time.perf_counter() - started
            save_checkpoint(setup, args, generator, rng, progress)
        if finished or stopping:
            break

        # Rollout; random numbers are drawn for the global batch, then sharded
        iteration_started = time.perf_counter()
        rows = torch.randperm(len(setup.train_data), generator=generator)[: args.batch_size]
        sft_ids, sft_mask = tokenize(setup.train_data.select(rows.tolist()), setup.tokenizer, args)
        uniform = torch.rand(args.batch_size, args.response_length, generator=generator)
        reward_models = setup.reward_models[: len(args.reward_model)]
        rollout = collect_rollout(
            setup, args, sft_ids, sft_mask, uniform, args.top_k, reward_models
        )
        step += args.batch_size
        progress.global_step = step

        # Advantages
        reward = aggregate(rollout.scores, args.reward_aggregate)
        noisy_reward = perturb_reward(reward.numpy(), args.noise, args.noise_level, rng)
        if args.correct_flips:
            noisy_reward = correct_flips(noisy_reward, args.noise_level)
        advantage, returns = token_advantages(
            torch.as_tensor(noisy_reward, dtype=reward.dtype),
            rollout.log_prob,
            rollout.reference_log_prob,
            rollout.value,
            rollout.response_mask,
            args,
        )

        # Update
        batch = Batch(rollout, advantage, returns)
        metrics = update(setup, args, batch, generator)
        for name, parameter in trained_parameters(setup).items():
            if not parameter.isfinite().all():
                raise RunError(
                    f"weights not finite ({name}) after step {step}, gradient norm "
                    f"{metrics['grad_norm']:g}; lower --learning-rate or --beta in a new run"
                )
        progress.train_seconds += time.perf_counter() - iteration_started
        progress.recent_rewards = [*progress.recent_rewards, *reward.tolist()][-100:]

        # Logging
        scalars = {f"losses/{name}": metric for name, metric in metrics.items()}
        scalars |= rollout_metrics(rollout, reward, advantage, returns)
        scalars["charts/SPS"] = step / progress.train_seconds
        if writer:
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, step)
        progress_bar.set_postfix_str(f"reward {reward.mean():.3f}, KL {scalars['charts/kl']:.1f}")
        progress_bar.update(args.batch_size)

        if stop.is_set():
            accelerator.set_trigger()
        stopping = accelerator.check_trigger()  # in any process

    if writer:
        writer.close()
    if stopping:
        return None
    last = progress.evaluations[-1]
    summary = {
        "script": Path(__file__).name,
        "algo": args.algo,
        "env_id": args.task,
        **vars(args),
        "first_return_mean": progress.evaluations[0]["return_mean"],
        "final_return_mean": last["return_mean"],
        "final_return_std": last["return_std"],
        "train_return_last100": np.mean(progress.recent_rewards),
        "sps": progress.global_step / progress.train_seconds,
        "wall_s": progress.wall_seconds,
        "finished": True,
    }
    if writer:  # only the first process has one
        save_policy(setup, args.run_dir)
        # Written last, since summary.json marks a run as finished
        save(args.run_dir / "summary.json", json.dumps(summary, indent=2))
    return summary


def rollout_metrics(rollout, reward, advantage, returns):
    """What TensorBoard shows of a batch; entropy and KL are estimates from its samples."""
    mask = rollout.response_mask
    return {
        "losses/entropy": -masked_mean(rollout.log_prob, mask),
        "losses/explained_variance": 1 - advantage[mask].var() / returns[mask].var(),
        "losses/advantage_largest": advantage.abs().max(),
        "charts/kl": masked_sum(rollout.log_prob - rollout.reference_log_prob, mask) / len(mask),
        "charts/episodic_return": reward.mean(),
        "charts/episodic_length": mask.sum() / len(mask),
    }


def evaluate_and_log(setup, args, progress, writer):
    """Appends an evaluation to `progress`; the first process writes progress.csv, samples.jsonl and
    TensorBoard."""
    row, samples = evaluate(setup, args, progress.global_step)
    progress.evaluations.append(row)
    progress.samples += samples
    if not writer:
        return
    save_progress(args.run_dir / "progress.csv", progress.evaluations)
    tqdm.write(f"step {row['step']:,}: reward {row['return_mean']:.3f}")
    samples_jsonl = "".join(json.dumps(sample) + "\n" for sample in progress.samples)
    save(args.run_dir / "samples.jsonl", samples_jsonl)
    for name, value in row.items():
        writer.add_scalar(f"eval/{name}", value, row["step"])


def evaluate_run(args: Args) -> None:
    """Evaluates the policy of the run in the folder `args.evaluate`; prints samples and scores."""
    run = evaluated_args(args, "seed", "device", "eval_episodes")
    setup = load(run)
    progress = restore(setup, run, torch.Generator(), np.random.default_rng())
    row, samples = evaluate(setup, run, progress.global_step)
    for sample in samples:
        setup.accelerator.print(
            f"{sample['reward']:.3f}", f"{sample['prompt']} [{sample['response'].strip()}]"
        )
    row["return_standard_error"] = row["return_std"] / max(1, run.eval_episodes - 1) ** 0.5
    for name, value in row.items():
        setup.accelerator.print(f"{name}: {value:.4g}")


# What follows is plumbing, not part of the algorithm.


def due(every, step, stride):
    """Whether a multiple of `every` lies in the last `stride` steps; never if `every` is 0."""
    return every > 0 and step % every < stride


# The toy task: film reviews from a grammar, and a policy and a noisy reward model trained on them.

ASPECTS = "plot acting music script ending cast pacing dialogue camera humour".split()
GOOD = "superb moving clever funny brilliant charming gripping warm".split()
BAD = "dull clumsy weak tedious awful silly flat noisy".split()
TOY_POSITIONS = 64
TOY_HELD_OUT = 256


def toy_review(rng):
    """Five judgements, each positive or negative with equal probability; "not" negates a word."""
    clauses = []
    for aspect in rng.sample(ASPECTS, 5):
        negation = "not " if rng.random() < 0.25 else ""
        words = rng.choice((GOOD, BAD))
        clauses.append(f"the {aspect} was {negation}{rng.choice(words)}")
    return "{} and {} . {} but {} . {} .".format(*clauses)


def toy_sentiment(text):
    """True sentiment by the grammar: share of positive judgements, 0.5 where there are none."""
    signs = []
    negated = False
    for word in text.split():
        if word in GOOD or word in BAD:
            signs.append((word in GOOD) != negated)
        negated = word == "not"
    return sum(signs) / len(signs) if signs else 0.5


def toy_labels(texts, rng):
    """1 for positive texts, 0 for negative ones; a tenth of the labels are wrong."""
    coins = [rng.random() for _ in texts]
    labels = []
    for text, coin in zip(texts, coins):
        sentiment = toy_sentiment(text)
        is_positive = coin > 0.5 if sentiment == 0.5 else sentiment > 0.5
        is_wrong = rng.random() < 0.1
        labels.append(int(is_positive != is_wrong))
    return labels


def make_toy(folder):
    """Makes train.jsonl, test.jsonl, policy/ and reward/ in `folder`, unless it exists. The seed is
    fixed, so that runs with different seeds have the same models."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    rng = random.Random(1)
    reviews = [toy_review(rng) for _ in range(4000)]
    splits = {"train": reviews[:-TOY_HELD_OUT], "test": reviews[-TOY_HELD_OUT:]}
    for name, texts in splits.items():
        data = datasets.Dataset.from_dict({"text": texts})
        data.to_json(temporary / f"{name}.jsonl")
    # The reward model must be able to score texts that are not finished.
    truncated = [" ".join(review.split()[: rng.randint(1, 45)]) for review in reviews]
    labels = toy_labels(truncated, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        make_toy_models(reviews, truncated, labels, temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(temporary)


def make_toy_models(reviews, truncated, labels, folder):
    gpt2 = transformers.GPT2Tokenizer(pad_token="<|pad|>")
    gpt2 = gpt2.train_new_from_iterator(reviews, 400, show_progress=False)
    bert = transformers.BertTokenizer()
    bert = bert.train_new_from_iterator(reviews, 400, show_progress=False)
    reward_config = transformers.BertConfig(
        vocab_size=len(bert),
        max_position_embeddings=TOY_POSITIONS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
    )
    policy_config = transformers.GPT2Config(
        vocab_size=len(gpt2),
        n_positions=TOY_POSITIONS,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=gpt2.eos_token_id,
        eos_token_id=gpt2.eos_token_id,
    )
    reward_model = AutoModelForSequenceClassification.from_config(reward_config)
    policy = AutoModelForCausalLM.from_config(policy_config)

    ended = [review + gpt2.eos_token for review in reviews]
    policy_data = gpt2(ended, padding=True, return_tensors="pt")
    is_padding = policy_data["attention_mask"] == 0
    policy_data["labels"] = policy_data["input_ids"].masked_fill(is_padding, -100)
    train_toy_model(policy, policy_data, 400, 3e-3, gpt2, folder / "policy")

    reward_data = bert(truncated, padding=True, return_tensors="pt")
    reward_data["labels"] = torch.tensor(labels)
    train_toy_model(reward_model, reward_data, 1200, 1e-3, bert, folder / "reward")


def train_toy_model(model, data, steps, learning_rate, tokenizer, folder):
    """Supervised training on all but the held-out rows of `data`; saves model and tokenizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    title = f"making the toy's {folder.name} model"
    for _ in tqdm(range(steps), title, disable=None, leave=False):
        rows = torch.randint(len(data["labels"]) - TOY_HELD_OUT, (32,))
        batch = {name: tensor[rows] for name, tensor in data.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Loading


@dataclass
class Setup:
    """Models and data of a run, from `load`."""

    started: float  # time.perf_counter()
    accelerator: Accelerator
    actor_critic: ActorCritic
    model: nn.Module  # `actor_critic`, wrapped in DDP if there are several processes
    optimizer: torch.optim.Optimizer
    tokenizer: transformers.PreTrainedTokenizerBase
    # Those of --reward-model, then those of --eval-reward-model, used in evaluations only
    reward_models: list[RewardModel | RewardFunction]
    train_data: datasets.Dataset
    eval_data: datasets.Dataset


def load(args):
    """Loads models and data and makes the run's folder. Raises UsageError: what is wrong."""
    started = time.perf_counter()
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # see ActorCritic.autocast
    accelerator.wait_for_everyone()  # until the first has made the toy
    device = accelerator.device
    bfloat16 = args.amp == "auto" and has_bfloat16(device)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    if cpu:
        keep_freed_memory()
    tokenizer = load_tokenizer(args.tokenizer)
    require(tokenizer.eos_token, f"{args.tokenizer}: this tokenizer has no end-of-text token")
    train_data, eval_data = load_data(args)
    reward_dtype = dtype if args.lora_r else torch.float32  # with LoRA, models are large
    reward_models = [
        load_reward_model(name, args.reward_label, device, reward_dtype)
        for name in args.reward_model + args.eval_reward_model
    ]
    torch.manual_seed(args.seed)  # initial weights of LoRA
    with loading(args.policy_model):
        actor_critic = ActorCritic(args, device, dtype)
    # `float32_logits` applies the model's last layer itself, and nothing that may come after it
    ids = tokenizer.encode("It was", return_tensors="pt").to(device)
    with torch.no_grad(), actor_critic.autocast():
        output = actor_critic.policy(ids, output_hidden_states=True)
        logits = float32_logits(actor_critic.policy, output.hidden_states[-1])
    require(
        (logits - output.logits).abs().max() < 0.02 * logits.abs().max(),
        f"--policy-model {args.policy_model}: scales or caps its logits, which is not supported",
    )
    positions = getattr(actor_critic.policy.config, "max_position_embeddings", math.inf)
    require(
        args.prompt_length + args.response_length <= positions,
        f"--prompt-length, --response-length: {args.policy_model} has only {positions} positions",
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in actor_critic.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        fused=True,
    )
    model, optimizer = accelerator.prepare(actor_critic, optimizer)
    if accelerator.is_main_process and not args.resume:
        make_run_dir(args)
    return Setup(
        started=started,
        accelerator=accelerator,
        actor_critic=actor_critic,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        reward_models=reward_models,
        train_data=train_data,
        eval_data=eval_data,
    )


@contextmanager
def loading(name):
    """Turns any error while loading `name` into a UsageError of one line."""
    try:
        yield
    except Exception as error:  # a network, a hub or a parser may fail in any way
        raise UsageError(
            f"{name}: cannot be loaded from disk or from the hub: {error!r:.300}"
        ) from error


def load_pretrained(auto_class, name, **options):
    """Loads a model. Refuses a checkpoint without all its weights, which transformers would fill in
    at random."""
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    require(not missing, f"the checkpoint lacks {missing}, which {type(model).__name__} needs")
    return model


def load_tokenizer(name):
    """The tokenizer of a model. It pads on the right, which shifts no positions, and with the
    end-of-text token if it has no padding token (masks tell the two apart)."""
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(
            TOKENIZERS.get(name, name), truncation_side="left", padding_side="right"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # AutoTokenizer makes an empty tokenizer for a folder that has none
    require(
        tokenizer.tokenize("word"),
        f"{name}: no tokenizer there; for a policy, give one with --tokenizer",
    )
    return tokenizer


def load_data(args):
    """Training data, and `eval_episodes` held-out rows. Raises UsageError: what is wrong."""
    train_data = load_dataset(args.dataset, args.task)
    if args.eval_dataset:
        eval_data = load_dataset(args.eval_dataset, args.task)
    else:
        parts = train_data.train_test_split(test_size=0.1, seed=0)
        train_data = parts["train"]
        eval_data = parts["test"]
    require(
        args.batch_size <= len(train_data),
        f"--batch-size {args.batch_size}: more than the {len(train_data)} training texts",
    )
    require(
        args.eval_episodes <= len(eval_data),
        f"--eval-episodes {args.eval_episodes}: more than the {len(eval_data)} held-out texts",
    )
    return train_data, eval_data.shuffle(seed=0).select(range(args.eval_episodes))


def load_dataset(name, task):
    with loading(name):
        if Path(name).is_file():
            data = datasets.load_dataset("json", data_files=name, split="train")
        else:
            hub_name, _, split = name.partition(":")
            data = datasets.load_dataset(hub_name, split=split or "train")
    columns = {"prompt", "label"} if task == "tldr" else {"text"}
    missing = sorted(columns - set(data.column_names))
    require(not missing, f"{name}: lacks {missing}; it has {data.column_names}")
    return data


def tokenize(rows, tokenizer, args):
    """Prompts with reference completions, ids and mask (texts, tokens): prompts padded on the left;
    completions, the last `response_length` columns, on the right."""
    prompts = []
    completions = []
    for row in rows:
        if args.task == "tldr":
            prompt = tokenizer.encode(row["prompt"], verbose=False)
            completion = tokenizer.encode(row["label"], verbose=False, add_special_tokens=False)
        else:
            ids = tokenizer.encode(row["text"], verbose=False)
            half = len(ids) // 2
            prompt = ids[:half]
            completion = ids[half:]
        prompt = prompt[-args.prompt_length :] or [tokenizer.eos_token_id]
        completion = [*completion, tokenizer.eos_token_id][: args.response_length]
        prompts.append(prompt)
        completions.append(completion)
    left = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    right = tokenizer.pad(
        {"input_ids": completions},
        padding_side="right",
        padding="max_length",
        max_length=args.response_length,
        return_tensors="pt",
    )
    ids = torch.cat([left["input_ids"], right["input_ids"]], 1)
    mask = torch.cat([left["attention_mask"], right["attention_mask"]], 1)
    return ids, mask.bool()


def decode(tokenizer, ids, mask):
    """Texts of the tokens where `mask` is true, without special ones."""
    return [
        tokenizer.decode(row[row_mask], skip_special_tokens=True)
        for row, row_mask in zip(ids, mask)
    ]


# Saving


def save(path, content):
    """Writes text, bytes or, with torch.save, any object atomically: a temporary file, then a
    rename. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    elif isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what PyTorch raises if the disk is full
            raise OSError(f"{temporary}: {error!r}") from error
    os.replace(temporary, path)


@contextmanager
def usable(what):
    """Turns any exception into a UsageError that names `what`: a run's file, or a flag."""
    try:
        yield
    except Exception as error:  # files and environments may raise anything
        raise UsageError(f"{what}: cannot be used: {error!r:.300}") from error


def load_checkpoint(path):
    """Loads a checkpoint, after a test of its checksums, which torch.load ignores."""
    require(zipfile.ZipFile(path).testzip() is None, "damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def trained_parameters(setup):
    return {
        name: parameter.detach()
        for name, parameter in setup.actor_critic.named_parameters()
        if parameter.requires_grad
    }


def save_checkpoint(setup, args, generator, rng, progress):
    content = {
        "agent": trained_parameters(setup),
        "optimizer": setup.optimizer.state_dict(),
        "generator": generator.get_state(),
        "rng": rng.bit_generator.state,
        "progress": vars(progress),
    }
    save(args.run_dir / "checkpoint.pt", content)


def restore(setup, args, generator, rng):
    path = args.run_dir / "checkpoint.pt"
    with usable(path):
        content = load_checkpoint(path)
        same_names = content["agent"].keys() == trained_parameters(setup).keys()
        require(same_names, "weights of another model")
        setup.actor_critic.load_state_dict(content["agent"], strict=False)  # others are frozen
        setup.optimizer.load_state_dict(content["optimizer"])
        generator.set_state(content["generator"])
        rng.bit_generator.state = content["rng"]
        return Progress(**content["progress"])


def save_policy(setup, run_dir):
    """Writes policy/, the trained policy or its adapter, which `from_pretrained` loads."""
    folder = run_dir / "policy"
    temporary = run_dir / "policy.tmp"
    setup.actor_critic.activate_adapter("policy")  # the active adapter is the one saved
    setup.actor_critic.policy.save_pretrained(temporary)
    setup.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run killed just before its summary
    temporary.rename(folder)


def start_tracking(args):
    """Mirrors TensorBoard to Weights & Biases."""
    import_module("wandb").init(
        project="symmetric-rl",
        id=args.run_name,
        name=args.run_name,
        config=vars(args),
        resume="allow",
        sync_tensorboard=True,
    )


def save_progress(path, evaluations):
    """Writes progress.csv; `evaluations`: dicts, all with the same keys."""
    lines = [",".join(evaluations[0])]
    for row in evaluations:
        lines.append(",".join(map(str, row.values())))
    save(path, "\n".join(lines) + "\n")


def git(*command):
    """What git prints in the script's folder; None without git or a repository."""
    folder = Path(__file__).resolve().parent
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def describe_machine():
    """Command, script, commit, versions and hardware, to reproduce a run."""
    script = Path(__file__).resolve()
    versions = {package.name: package.version for package in metadata.distributions()}
    versions["python"] = platform.python_version()
    return {
        "command": sys.argv,
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "script_status": git("status", "--short", "--", script),  # "" if unchanged since the commit
        "commit": git("describe", "--always", "--dirty", "--abbrev=40"),
        "versions": versions,
        "hardware": {
            "platform": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.is_available() and torch.cuda.get_device_name(),
        },
    }


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


# Arguments


class UsageError(ValueError):
    """Wrong input; the message says what is wrong and what to do."""


class RunError(RuntimeError):
    """A run that can't continue; the message says why."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


def require_range(args, names, low, high):
    """Raises UsageError unless all arguments in `names` are between `low` and `high`."""
    for name in names.split():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')} {value}"
        inside = low <= value <= high and value is not True  # `true` in args.json counts as 1
        require(inside, f"{flag}: must be between {low:g} and {high:g}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Parses flags with the defaults of the chosen --task, which --help then shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="toy")
    known, _ = parser.parse_known_args(argv)
    return tyro.cli(Args, args=argv, default=TASKS[known.task])


def prepare(args: Args) -> Args:
    """Checks arguments, fills in defaults that depend on others, makes the toy. Raises UsageError:
    what is wrong, what to do."""
    if args.resume is not None:
        args = resumed_args(args)
    args = with_defaults(args)
    check(args)
    parts = int(os.environ.get("WORLD_SIZE", 1)) * args.num_minibatches
    require(
        args.batch_size % parts == 0,
        f"--batch-size: must be a multiple of {parts}, minibatches times processes",
    )
    require(not args.track or util.find_spec("wandb"), "--track: pip install wandb")
    require(
        args.resume or not os.path.exists(args.run_dir),
        f"{args.run_dir}: File exists; try another --run-name or --runs-dir",
    )
    # Only the first process makes the toy; there is no Accelerator yet to ask which it is
    if args.task == "toy" and os.environ.get("RANK", "0") == "0":
        with usable(args.runs_dir):
            make_toy(Path(args.runs_dir) / "toy")
    return args


def resumed_args(args: Args) -> Args:
    """The arguments of the interrupted run that `args.resume` names."""
    require(
        replace(args, resume=None) == Args(),
        "--resume reuses the flags in the args.json of the run: leave out all others",
    )
    folder = Path(args.resume)
    begun = os.path.isfile(folder / "args.json")
    finished = os.path.isfile(folder / "summary.json")
    require(begun and not finished, f"--resume {folder}: not the folder of an interrupted run")
    return saved_args(folder, resume=args.resume)


def saved_args(folder: Path, **given) -> Args:
    """The arguments in a run's args.json, overridden by `given`, and checked like flags."""
    path = folder / "args.json"
    with usable(path):
        saved = json.loads(path.read_text())["args"]
        names = {field.name for field in fields(Args)}
        require(saved.keys() == names, "a run of another script, or of another version of it")
        for field in fields(Args):
            if isinstance(saved[field.name], list):
                saved[field.name] = tuple(saved[field.name])
            check_type(saved[field.name], field.type)
        args = Args(**saved | given)
        check(args)
    return args


def evaluated_args(args: Args, *names: str) -> Args:
    """The arguments of the run in `args.evaluate`, overridden by the flags in `names`."""
    given = {name: getattr(args, name) for name in names}
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    require(args == Args(evaluate=args.evaluate, **given), f"--evaluate takes only {flags}")
    check(with_defaults(args))
    # `resume` makes that folder the `run_dir`, wherever it was during training
    settings = {"resume": args.evaluate, "device": "cpu"} | given
    return saved_args(Path(args.evaluate), **settings)


def with_defaults(args: Args) -> Args:
    """A copy with the defaults that depend on other arguments filled in."""
    args = replace(args)
    if args.task == "toy":
        toy = Path(args.runs_dir) / "toy"
        args.policy_model = args.policy_model or str(toy / "policy")
        args.reward_model = args.reward_model or (str(toy / "reward"),)
        if args.dataset is None:
            args.dataset = str(toy / "train.jsonl")
            args.eval_dataset = args.eval_dataset or str(toy / "test.jsonl")
    args.tokenizer = args.tokenizer or args.policy_model
    args.eval_dataset = args.eval_dataset or EVAL_DATASETS.get(args.dataset)
    if args.alpha is None:
        args.alpha = 0.5 if args.beta else 1.0
    if args.noise_level is None:
        levels = {"none": 0.0, "normal": 0.05, "uniform": 0.05}
        args.noise_level = levels.get(args.noise, 0.1)
    tenth = max(1, args.total_timesteps // 10)
    if args.eval_freq is None:
        args.eval_freq = tenth
    if args.checkpoint_freq is None:
        args.checkpoint_freq = tenth
    if args.run_name is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.task}__{args.algo}__{args.noise}__{args.seed}__{stamp}"
        args.run_name = f"{Path(__file__).stem}__{name}"
    return args


def check(args: Args) -> None:
    """Raises UsageError for an argument that is out of range or contradicts another."""
    require_range(args, "total_timesteps", 1, 1e12)
    require_range(args, "prompt_length response_length batch_size num_minibatches", 1, 1e6)
    require_range(args, "eval_episodes lora_alpha", 1, 1e6)
    require_range(args, "update_epochs", 1, 1000)
    if args.micro_batch_size is not None:
        require_range(args, "micro_batch_size", 1, 1e6)
    require_range(args, "seed reward_label eval_freq checkpoint_freq", 0, 1e18)
    require_range(args, "top_k lora_r", 0, 1e6)
    require_range(args, "alpha beta vf_coef ce_coef kl_coef weight_decay", 0, 1e9)
    require_range(args, "learning_rate adam_eps clip_coef max_grad_norm", 1e-30, 1e12)
    require_range(args, "gamma gae_lambda noise_level", 0, 1)
    require_range(args, "z", -1e9, -1e-9)  # negative, since it stands for log 0
    require(
        args.noise != "none" or not args.noise_level, "--noise-level: choose a kind with --noise"
    )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    require(
        args.eval_episodes % processes == 0,
        f"--eval-episodes: must be a multiple of {processes}, the number of processes",
    )
    if args.correct_flips:
        flips = args.noise == "flip" and args.noise_level < 0.5
        require(flips, "--correct-flips: needs --noise flip and a --noise-level below 0.5")
    cuda = torch.cuda.is_available()
    require(args.device != "cuda" or cuda, "--device cuda: no GPU here; use cpu")
    plain = Path(args.run_name).name == args.run_name and args.run_name.isprintable()
    require(
        plain and args.run_name not in ("", ".."),
        f"--run-name {args.run_name!r}: give the plain name of a folder",
    )
    require(args.runs_dir.isprintable(), f"--runs-dir {args.runs_dir!r}: not a printable name")
    heldout = [Path(name).name for name in args.eval_reward_model]
    require(len(set(heldout)) == len(heldout), "--eval-reward-model: two models with the same name")
    if args.load_in_4bit:
        require(
            args.lora_r > 0 and cuda and util.find_spec("bitsandbytes"),
            "--load-in-4bit: needs --lora-r > 0, a GPU and bitsandbytes (pip install bitsandbytes)",
        )


def make_run_dir(args: Args) -> None:
    content = {"args": vars(args)} | describe_machine()
    try:
        args.run_dir.mkdir(parents=True)
    except OSError as error:
        advice = "try another --run-name or --runs-dir"
        raise UsageError(f"{args.run_dir}: {error.strerror}; {advice}") from error
    try:
        save(args.run_dir / "args.json", json.dumps(content, indent=2))
    except OSError as error:
        shutil.rmtree(args.run_dir)
        raise UsageError(f"{args.run_dir}: {error.strerror}") from error


def fail(message, status):
    # print would write into the progress bar, which is still there
    tqdm.write(" ".join(f"error: {message}".splitlines()), file=sys.stderr)
    sys.exit(status)


def main() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        args = parse_args()
        if args.evaluate is not None:
            evaluate_run(args)
            return
        args = prepare(args)
        setup = load(args)
    except UsageError as error:
        fail(error, 2)
    except RunError as error:  # from --evaluate
        fail(error, 1)
    stop = threading.Event()

    def request_stop(signum, frame):
        stop.set()
        signal.signal(signum, signal.SIG_DFL)  # a second signal kills

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    # No traceback from TensorBoard's thread: `writer` raises its error in the main thread
    threading.excepthook = lambda details: None
    resume = shlex.join(["python", sys.argv[0], "--resume", str(args.run_dir)])
    lock = nullcontext()
    if setup.accelerator.is_main_process:
        lock = FileLock(args.run_dir / "lock", blocking=False)
    try:
        with lock:
            summary = train(args, stop, setup)
    except Timeout:
        fail(f"{args.run_dir}: another process is at work on this run", 2)
    except UsageError as error:
        fail(error, 2)
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        fail(f"{error}; to continue from the last checkpoint: {resume}", 1)
    setup.accelerator.wait_for_everyone()  # the first process may still be writing
    setup.accelerator.end_training()
    if summary is None:
        setup.accelerator.print(f"interrupted; to continue: {resume}", file=sys.stderr)
        sys.exit(130)
    setup.accelerator.print(
        f"{args.task} {args.algo}: reward {summary['first_return_mean']:.3f} -> "
        f"{summary['final_return_mean']:.3f}, {summary['sps']:.1f} texts/s, {args.run_dir}"
    )


if __name__ == "__main__":
    main()
