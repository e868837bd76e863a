# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "transformers>=5.0", "tensorboard>=2.19", "accelerate>=1.10",
#   "peft>=0.18", "numpy>=2.0", "tyro>=1.0.16", "filelock>=3.30", "datasets>=4.0", "tqdm>=4.66.5",
#   "pyarrow>=21.0"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Symmetric PPO (SPPO) for language models (RLHF) in one file.

    python toy.py && python sppo_rlhf.py            # a toy task, offline; two minutes on a CPU
    python sppo_rlhf.py --task imdb                 # GPT-2 writes positive film reviews
    python sppo_rlhf.py --task imdb --policy-model DIR --reward-model DIR --dataset reviews.jsonl.gz
    accelerate launch sppo_rlhf.py --task tldr      # GPT-J with LoRA summarises, on several GPUs
    python sppo_rlhf.py --task tldr --help          # all flags, with that task's defaults
    python sppo_rlhf.py --beta 0 --policy-model DIR --dataset my.jsonl --reward-model my.py:short

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

SPPO differs from PPO in two lines, "all that SPPO adds to PPO" and `beta * reverse_loss`. The
gradient of Lr is |Z| times that of L, so SPPO's policy gradient is k = alpha + beta |Z| times
PPO's, with the authors' weights 0.9 times (imdb) or 0.7 times (tldr). Adam hardly sees the scale of
a gradient. So k acts through gradient clipping, Adam's epsilon and the relative weight of a
supervised loss (imdb, tldr). With --beta 0 the script is PPO.

A reward model scores prompt and response. The reward is given at the last token. Every token pays
a KL penalty, `kl_coef` times log(p_old / p_ref), against the frozen initial policy. Advantages are
normalised over sampled tokens (the authors' code counts padding, too). Dropout is off. Steps count
texts, that is a prompt and its response. `return_mean` and `episodic_return` are mean rewards.
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
from collections import Counter
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
TOY = "runs/toy"  # the toy's models and data, which toy.py makes
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


def require(condition, message):
    if not condition:
        sys.exit(f"error: {message}")


@contextmanager
def explained(subject):
    """Ends the run with a sentence if an error is raised in the block."""
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
    start_from: str | None = None  # folder of a finished run: begin with its checkpoint
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
        with explained("chat_template_kwargs must be a JSON object"):
            return dict(json.loads(self.chat_template_kwargs))

    def resolve(self):
        """Replaces None by the default, where that depends on other arguments."""
        self.eval_dataset = self.eval_dataset or EVAL_DATASETS.get(self.dataset)
        if self.dataset != TASKS[self.task].get("dataset", Args.dataset):
            self.task = re.split("[.:]", Path(self.dataset).name)[0]  # own data: the file's name
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
        positive = (
            "batch_size num_minibatches update_epochs prompt_length response_length lora_alpha "
            "total_timesteps eval_freq eval_episodes micro_batch_size temperature max_grad_norm"
        )
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and name != "z":
                require(0 <= value < math.inf, f"{name} must be finite and not negative")
                require(value or name not in positive.split(), f"{name} must be positive")
        require(max(self.gamma, self.gae_lambda) <= 1, "gamma and gae_lambda must be at most 1")
        require(self.lora_r or self.lora_alpha == Args.lora_alpha, "lora_alpha needs --lora-r")
        require(-math.inf < self.z < 0, "z stands for log 0: it must be negative and finite")
        require(self.alpha + self.beta > 0, "with alpha and beta 0 nothing trains the policy")
        if self.noise.endswith("flip"):
            require(self.noise_level <= 1, "noise_level is the probability of a flip, so at most 1")
        weights = self.reward_weights
        require(0 < len(weights) == len(self.reward_model), "reward_weights: one each, one or more")
        require(0 < sum(map(abs, weights)) < math.inf, "reward_weights must be finite, not all 0")
        require(self.noise != "none" or not self.noise_level, "noise_level needs a --noise")
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


def parse_args(argv=None):
    """Parses flags with the defaults of the chosen --task, which --help then shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="toy")
    task = parser.parse_known_args(argv)[0].task
    words = sys.argv if argv is None else argv
    flags = [word.partition("=")[0].replace("_", "-") for word in words]
    for flag in "--reward-model", "--reward-weights":
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
from filelock import FileLock
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@cache
def warn(text):
    """Says each text once."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


# ---- A row as tokens. Data are lists of rows {column: value}


def prompt_kind(row):
    """What a row has: "messages", a list in `prompt`; "prompt", a text; "text", whose first half is
    the prompt; or "", nothing that can be used. A text that looks like a JSON list is refused."""
    if not isinstance(row, dict):
        return ""
    name = "prompt" if "prompt" in row else "text"
    value = row.get(name)
    if name == "prompt" and value and isinstance(value, list):
        is_chat = all(isinstance(one, dict) and "role" in one for one in value)
        return "messages" if is_chat else ""
    is_text = isinstance(value, str) and not re.match(r"\s*\[\s*\{\s*[\"']", value)
    return name if is_text and (value.strip() or name == "prompt") else ""


def with_prompt(row):
    """A row that has only `messages` gets a `prompt`. If the last message is the assistant's, it is
    no part of the prompt: its text is the `label`, unless the row has one."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if prompt_kind({"prompt": messages}) != "messages" or prompt_kind(row) == "messages":
        return row
    if prompt_kind(row):
        raise ValueError(f"it has 'messages' and a text as its '{prompt_kind(row)}': remove one")
    *before, last = messages
    if last["role"] == "assistant":
        others = [name for name, value in last.items() if value and name not in ("role", "content")]
        if others:
            warn(f"of the last message only the text is a label, without {', '.join(others)}")
        label = last.get("content") if row.get("label") is None else row["label"]
        return row | {"prompt": before, "label": label}
    return row | {"prompt": messages}


def start_tokens(tokenizer):
    """Tokens that the tokenizer adds before a text. Tokens that it adds after a text are left out,
    because a response follows the prompt."""
    probe = tokenizer(tokenizer.eos_token, return_special_tokens_mask=True)
    return probe["input_ids"][: probe["special_tokens_mask"].index(0)]


def encode(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)  # long texts are cut


def answered(messages, text):
    """Messages with a text as the answer. If the last one is the assistant's, the text continues
    it. Otherwise it is a new turn."""
    turn = {"role": "assistant", "content": ""}
    if messages[-1]["role"] == "assistant":
        *messages, turn = messages
    return [*messages, turn | {"content": turn["content"] + text}]


def in_template(row, tokenizer, options, **begins):
    """The messages of a row as a text, in the tokenizer's chat template. Raises an error if one of
    them says something that is no text, or if the template drops what it says."""
    tools = row.get("tools") or None
    render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False, **options)
    marked = []
    for i, one in enumerate(row["prompt"]):
        content = one.get("content")
        if content is None and one.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"the content of a message is no text: {one!r:.99}")
        marked.append(one | {"content": content and f"*{i}*"})
    text = render(marked)
    for one in marked:
        if one["content"] not in text:
            raise ValueError(f"the chat template drops what {one['role']!r} says")
    return render(row["prompt"], **begins)


def turn_end(tokenizer, options):
    """The token with which the chat template ends an assistant's turn. If it has none, the
    end-of-text token."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "*b*"}]
    text = in_template({"prompt": chat}, tokenizer, options)
    after = encode(text.rpartition("*b*")[2], tokenizer)
    added = tokenizer.added_tokens_decoder  # white space, too
    ends = (token for token in after if token in added and added[token].content.strip())
    return next(ends, tokenizer.eos_token_id)


def chat_tokens(row, label, tokenizer, args):
    """Prompt and target of messages, as lists of tokens. The prompt ends with the beginning of the
    response. The target is what the chat template writes behind it if the response is the label."""
    options = args.template_options
    continues = row["prompt"][-1]["role"] == "assistant"
    begins = {"add_generation_prompt": not continues, "continue_final_message": continues}
    asked = in_template(row, tokenizer, options, **begins)
    prompt = encode(asked, tokenizer)
    if not label:
        return prompt, []
    answer = row | {"prompt": answered(row["prompt"], label)}
    text = in_template(answer, tokenizer, options).rstrip()  # new lines may stand for an end
    if not text.startswith(asked):
        found = "the chat template writes no label behind the prompt"
        if "enable_thinking" in tokenizer.chat_template:
            found += """; --chat-template-kwargs '{"enable_thinking": false}' may help"""
        if args.ce_coef:
            raise ValueError(found)
        warn(f"no target: {found}")
        return prompt, []
    if label.strip() not in text[len(asked) :]:
        warn("the chat template drops a part of a label, such as its thoughts")
    end = turn_end(tokenizer, options)
    tokens = [*encode(text, tokenizer), end]
    if tokens[: len(prompt)] != prompt:  # a token of it has become one with the next
        tokens = [*prompt, *encode(text[len(asked) :], tokenizer), end]
    return prompt, tokens[len(prompt) : tokens.index(end, len(prompt)) + 1]


def tokenize(row, tokenizer, args):
    """Returns the prompt and the target of a row, as lists of tokens, and the length of the prompt
    before it is cut: to the start tokens of a text, then its last ones, `prompt_length` in all. The
    target is the first `response_length` tokens of the label, or of a text's second half, if any.
    """
    kind = prompt_kind(row)
    end = tokenizer.eos_token_id
    start = []
    target = []
    label = row.get("label")  # a text (in CSV always), or a class
    label = label if isinstance(label, str) and label.strip() else ""
    if kind == "messages":
        prompt, target = chat_tokens(row, label, tokenizer, args)
    else:
        prompt = encode(row[kind], tokenizer)
        start = start_tokens(tokenizer)
        if prompt[: len(start)] != start:
            prompt = start + prompt
        if kind == "text":
            half = len(prompt) // 2
            target = [*prompt[half:], end]
            prompt = prompt[:half]
        elif label:
            target = [*encode(label, tokenizer), end]
    length = len(prompt)
    if length > args.prompt_length:
        prompt = start + prompt[length + len(start) - args.prompt_length :]
    return prompt or [end], target[: args.response_length], length


# ---- Models


class Inputs(NamedTuple):
    """Prompts and continuations, as models read them. The continuations have n tokens."""

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


def token_log_probs(model, inputs, temperature):
    """Log-probabilities (n,) of the tokens under a language model."""
    head = model.get_output_embeddings()
    head.places = inputs.places
    logits = model(input_ids=inputs.ids, use_cache=False).logits
    head.places = None
    logits /= temperature  # in place, because logits take most memory
    return -F.cross_entropy(logits[0], inputs.tokens, reduction="none")


def trainable_copy(model, args):
    """A copy of a frozen language model, to be trained; of a multimodal model, only the language
    part is. With LoRA only an adapter is, on peft's default layers of the family, else on all
    linear layers; the other weights are shared."""
    if args.lora_r:
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        config = peft.LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            target_modules=defaults.get(model.config.model_type, "all-linear"),
            task_type="CAUSAL_LM",
        )
        # A copy shares the weights in `shared`. Adapters are in float32
        trained = peft.get_peft_model(copy.deepcopy(model, shared), config)
        folder = Path(START, args.policy_model)
        if folder.exists():  # the adapter finds its base from wherever it is loaded
            config.base_model_name_or_path = str(folder)
    else:
        trained = copy.deepcopy(model).requires_grad_()
    used = nn.ModuleList([trained.get_decoder(), trained.get_output_embeddings()])
    for parameter in set(trained.parameters()) - set(used.parameters()):
        parameter.requires_grad_(False)
    return trained


class ActorCritic(nn.Module):
    """Policy, critic and reference policy, that is the frozen initial policy.

    Without LoRA these are three models. With LoRA policy and critic are adapters: all three share
    the other weights.
    """

    def __init__(self, args, device, dtype):
        super().__init__()
        self.temperature = args.temperature
        self.dtype = dtype
        self.reference = load_frozen(args, dtype)
        self.policy = trainable_copy(self.reference, args)
        self.critic = trainable_copy(self.reference, args).get_decoder()
        patch_head(self.reference)
        patch_head(self.policy)
        # Measured, because the configurations of OPT-350m and RemBERT give another size
        token = torch.zeros(1, 1, dtype=torch.long, device=self.critic.device)
        hidden_size = self.critic(token).last_hidden_state.shape[-1]
        self.value_head = nn.Linear(hidden_size, 1)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)
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
    model: nn.Module  # `actor_critic`, wrapped in DDP if there are several processes
    optimizer: torch.optim.Optimizer
    tokenizer: transformers.PreTrainedTokenizerBase
    reward_models: list
    columns: list[str]  # of the data, for reward models
    train_data: list[dict]
    eval_data: list[dict]


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


# ---- Rollout


def padded(setup, prompts):
    inputs = setup.tokenizer.pad(
        {"input_ids": prompts}, padding_side="left", return_attention_mask=True, return_tensors="pt"
    )
    inputs["input_ids"] *= inputs["attention_mask"]  # id 0: a padding token may have no embedding
    return inputs.to(setup.actor_critic.policy.device)


def generate(setup, prompts, do_sample):
    """Samples a response to each prompt by transformers' `generate`, with the settings in the
    policy's generation_config, and cuts it after its first end token."""
    actor = setup.actor_critic
    inputs = padded(setup, prompts)
    with actor.autocast():
        ids = actor.policy.generate(**inputs, do_sample=do_sample)
    ends = actor.policy.generation_config.eos_token_id
    responses = []
    for tokens in ids[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
        responses.append(tokens[:length])
    return responses


def score(setup, args, rows, prompts, responses):
    """Scores (texts, reward models) of responses. Reward models get `inputs`, with the data's
    columns, as keywords."""
    decode = partial(setup.tokenizer.batch_decode, skip_special_tokens=True)
    inputs = {name: [row.get(name) for row in rows] for name in setup.columns}
    inputs |= {
        "texts": decode([x + y for x, y in zip(prompts, responses)]),
        "prompts": decode(prompts),
        "completions": decode(responses),
        "completion_ids": responses,
    }
    for i, row in enumerate(rows):
        if prompt_kind(row) == "messages":
            *before, turn = answered(row["prompt"], inputs["completions"][i])
            inputs["prompts"][i] = before
            inputs["completions"][i] = [turn]  # with all of the turn's text
    # A reward function may change its arguments
    scores = [reward_model(**copy.deepcopy(inputs)) for reward_model in setup.reward_models]
    for name, its_scores in zip(args.reward_model, scores):
        finite = all(one is None or math.isfinite(one) for one in its_scores)
        require(finite, f"a score of {name} is not finite")
    scores = np.array(scores, np.float32).T  # None becomes NaN
    unscored = np.isnan(scores[:, np.flatnonzero(args.reward_weights)]).all(1).any()
    require(not unscored, "no reward model scores one of the texts; one must give a number")
    return scores


def by_text(tensor, texts):
    """Splits a tensor (n,) over the tokens of all texts into one tensor for each text. They are
    copies, because a pickled view contains its whole tensor."""
    return [part.clone() for part in tensor.cpu().split(list(map(len, texts)))]


@torch.no_grad()
def sample_responses(setup, args, data, evaluating=False):
    """Samples responses to the prompts of the rows `data`. Each process samples a part, and gets
    all `Sample`s."""
    accelerator = setup.accelerator
    actor = setup.actor_critic
    samples = []
    own = data[accelerator.process_index :: accelerator.num_processes]
    size = 8 * (args.micro_batch_size or 16)  # without activations for a backward pass
    for start in range(0, len(own), size):
        rows = own[start : start + size]
        tokens = [tokenize(row, setup.tokenizer, args) for row in rows]
        prompts, targets, _ = map(list, zip(*tokens))
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


def collect(setup, args, rng):
    """A rollout for rows of the data that are drawn at random, with advantages. Returns its
    `Sample`s."""
    chosen = rng.permutation(len(setup.train_data))[: args.batch_size]
    samples = sample_responses(setup, args, [setup.train_data[i] for i in chosen])
    noisy_reward = perturb_reward(rewards(samples, args), args.noise, args.noise_level, rng)
    for sample, reward in zip(samples, noisy_reward.tolist()):
        log_ratio = sample.log_prob - sample.reference_log_prob
        sample.advantage, sample.returns = token_advantages(reward, log_ratio, sample.value, args)
    return samples


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


def token_advantages(reward, log_ratio, value, args):
    """Advantages and returns (T,) of a text's tokens: generalised advantage estimation (Schulman et
    al., arXiv 1506.02438).

    `reward` is given at the last token; every token pays the KL penalty, by its `log_ratio` (T,) of
    policy and reference policy. A text that reaches the maximum length ends there: nothing is
    bootstrapped. For example, with gamma and lambda 1 and no KL penalty, a text of two tokens with
    reward 1 and values 0.2 and 0.5 has the advantages 0.8 and 0.5.
    """
    token_reward = -args.kl_coef * log_ratio
    token_reward[-1] += reward
    next_value = F.pad(value[1:], (0, 1))  # 0 after the last token
    advantage = token_reward + args.gamma * next_value - value
    for t in reversed(range(len(advantage) - 1)):
        advantage[t] += args.gamma * args.gae_lambda * advantage[t + 1]
    return advantage, advantage + value


def joined(samples, name):
    """Joins a field of samples into one tensor (n,) over all their tokens."""
    return torch.cat([getattr(sample, name) for sample in samples])


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
            totals = Counter()
            for start in range(0, len(own), size):
                is_last = start + size >= len(own)  # its backward pass averages over processes
                with nullcontext() if is_last else accelerator.no_sync(setup.model):
                    loss, metrics = loss_and_metrics(
                        setup.model, args, own[start : start + size], token_count, target_count
                    )
                    # Times the number of processes, since DDP averages over them
                    (loss * accelerator.num_processes).backward()
                totals.update(metrics)  # adds
            metrics = dict(accelerator.reduce(totals))  # sums; a Counter's |= drops negative ones

            norm = nn.utils.clip_grad_norm_(setup.model.parameters(), args.max_grad_norm)
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
    """{prefix + name of a reward model: its mean score}, of the texts that have a score by it."""
    columns = zip(args.reward_model, np.array([sample.scores for sample in samples]).T)
    return means([{prefix + name: x} for name, xs in columns for x in xs[~np.isnan(xs)]])


def kl_per_text(samples):
    """KL divergence between policy and reference policy, in nats per text. It is an estimate, and
    biased where sampling is filtered or greedy."""
    log_ratio = joined(samples, "log_prob") - joined(samples, "reference_log_prob")
    return log_ratio.sum().item() / len(samples)


def texts_of(setup, args, samples, step, data):
    """Up to eight samples as rows of samples.jsonl. `data`: training or held-out."""
    decode = setup.tokenizer.decode
    rows = []
    for sample, reward in zip(samples[:8], rewards(samples, args).tolist()):
        response = decode(sample.response, skip_special_tokens=True)
        texts = {"prompt": decode(sample.prompt), "response": response}
        rows.append(sample.row | texts | {"step": step, "data": data, "reward": reward})
    return rows


def evaluate(setup, args, step):
    """Returns a row for progress.csv, and up to eight samples. The row has the reward and what it
    costs: the KL divergence, the perplexity of responses under the reference policy and, if there
    are targets, their perplexity under the policy."""
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
    task: list  # data, reward models and their weights: what its scores are of
    speeds: list[float]  # texts per second of each update
    evaluations: list[dict]  # rows of progress.csv
    samples: list[str]  # lines of samples.jsonl
    history: list[dict]  # what was logged since the last evaluation


def evaluate_and_log(setup, args, progress, folder, writer, training_texts=()):
    """Appends an evaluation to `progress`. The first process writes progress.csv, samples.jsonl and
    TensorBoard."""
    step = progress.global_step
    row, samples = evaluate(setup, args, step)
    row |= means(progress.history)  # since the last evaluation
    progress.history = []
    progress.evaluations.append(row)
    shown = [*samples, *training_texts]
    progress.samples += [json.dumps(sample, default=str) + "\n" for sample in shown]
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
        text = f"{sample['prompt']} [{sample['response']}] {sample['reward']:.3f}"
        tqdm.write(f"    {text!r:.200}")


# ---- Training


def train(setup, args, folder):
    accelerator = setup.accelerator
    check_sampling(setup, args)
    task = [args.dataset, args.eval_dataset, *args.reward_model, *args.reward_weights]
    progress = restore(setup, folder, args.start_from)
    if progress.task != task:  # scores so far, if any, are another task's
        progress = Progress(progress.global_step, task, [], [], [], [])
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
                resume="auto",  # W&B keeps the run's id in `dir`
            )
        # TensorBoard hides entries after the checkpoint; without a checkpoint, all entries
        writer = SummaryWriter(folder, purge_step=progress.global_step + bool(progress.evaluations))
    steps = f"from step {progress.global_step:,}, with a checkpoint every {args.eval_freq:,} texts"
    accelerator.print(f"{folder.name}: {steps}, on {accelerator.num_processes} process(es)")
    progress_bar = tqdm(
        total=args.total_timesteps,
        initial=progress.global_step,
        disable=None if writer else True,
    )
    if not progress.evaluations:
        evaluate_and_log(setup, args, progress, folder, writer)  # the initial policy

    begun = progress.global_step
    while progress.global_step < args.total_timesteps:
        started = time.perf_counter()
        rng = seed_all(args.seed, progress.global_step, 1)
        samples = collect(setup, args, rng)
        progress.global_step += args.batch_size
        step = progress.global_step

        minibatch_metrics = update(setup, args, samples, rng)
        # In a session's first two rollouts (LoRA begins at 0). Rounding: 3e-13; bfloat16: 6e-5
        limit = 1e-8 if setup.actor_critic.dtype == torch.float32 else 1e-3
        is_new = step <= begun + 2 * args.batch_size
        if is_new and minibatch_metrics[0]["losses/approx_kl"] > limit:
            found = "the policy that acts is not the one that is trained (dropout, memory?)"
            require(accelerator.device.type != "cpu", found)
            warn(f"{found}, or this GPU rounds more")
        metrics = means(minibatch_metrics)
        if not math.isfinite(metrics["losses/grad_norm"]):
            raise Diverged(f"error: gradient not finite, step {step} (rate? reward?)")

        # The value's error is the advantage. The variance is clamped: all returns may be equal
        returns_variance = joined(samples, "returns").var().clamp(min=1e-8)
        unexplained = joined(samples, "advantage").var() / returns_variance
        log_prob = joined(samples, "log_prob")
        reward = rewards(samples, args)
        if np.ptp(reward) == 0:
            warn(f"all rewards of a rollout are {reward[0]:.3g}, so there is nothing to learn from")
        scalars = metrics | {
            "losses/entropy": -log_prob.mean().item(),  # an estimate from the samples
            "losses/explained_variance": 1 - unexplained.item(),
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
        progress_bar.set_postfix_str(f"reward {reward.mean():.3f}, KL {scalars['charts/kl']:.1f}")
        progress_bar.update(args.batch_size)

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
    setup.model = None
    accelerator.end_training()


# ---- Reading data


def load_dataset(name):
    """Loads NAME:SPLIT or NAME:CONFIGURATION:SPLIT with `datasets`. NAME is a folder of Parquet
    files, a folder that `datasets` saved, or a hub name."""
    source, *configuration = name.split(":")
    split = configuration.pop() if configuration else "train"
    try:
        data = datasets.load_from_disk(source)
    except FileNotFoundError:  # not saved by `datasets`
        data = datasets.load_dataset(source, *configuration, split=split)
        has_types = not Path(source).is_dir() or data.info.builder_name == "parquet"
        require(has_types, f"{source} is no folder of Parquet files: give a file")
        return data
    if isinstance(data, dict):
        return data[split]
    require(source == name, f"{source} has no splits: leave out the split")
    return data


def read_csv(file):
    """The rows of a CSV file. All values are texts."""
    csv.field_size_limit(2**31 - 1)  # allows long texts
    reader = csv.DictReader(file, strict=True)
    rows = []
    for row in reader:
        if [*row] != reader.fieldnames or None in row.values():
            raise ValueError(f"line {reader.line_num} lacks values or has more, or a name is twice")
        rows.append(row)
    return rows


def read_json(file):
    """The rows of a JSON file: a list of objects, or an object in each line."""
    text = file.read()
    if not text.lstrip().startswith("["):
        text = "[" + re.sub(r"\n(?=.*\S)", ",\n", text.lstrip()) + "]"  # errors name lines
    return json.loads(text)


def without_nulls(value):
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def read_table(rows):
    """In a table each object has the keys of all. What its chat template sees gets rid of those
    that are null."""
    for row in rows:
        for name in row.keys() & {"prompt", "messages", "tools"}:
            row[name] = without_nulls(row[name])
    return rows


def read_rows(name):
    """The rows of a file, which is CSV, JSON or Parquet, or those of `load_dataset`."""
    path = Path(name)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    read = {".csv": read_csv, ".json": read_json, ".jsonl": read_json}.get(suffix)
    if not path.is_file():
        require(path.exists() or not read and suffix != ".parquet", f"{name}: no such file")
        return read_table(load_dataset(name).to_list())
    if suffix == ".parquet":
        return read_table(pyarrow.parquet.ParquetFile(path).read().to_pylist())
    if not read:
        raise ValueError("its name must end with .csv, .json, .jsonl (.gz may follow) or .parquet")
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        return read(file)


def load_rows(name, accelerator, tokenizer, args):
    """The rows of the data `name`. Refuses what cannot be used, and messages that are too long: a
    cut would remove the beginning of their template."""
    with explained(f"{name} can't be read"):
        rows = [with_prompt(row) for row in read_rows(name)]
    require(rows, f"{name} has no rows")
    kind = prompt_kind(rows[0])
    is_chat = kind == "messages"
    words = re.findall(r"\w+", str(is_chat and tokenizer.chat_template))
    for option in args.template_options:
        require(option in words, f"--chat-template-kwargs: no chat template has {option!r}")
    whole = replace(args, response_length=sys.maxsize)
    targets = cut_targets = cut = longest = 0
    distinct = set()
    for i, row in enumerate(rows, 1):
        if not kind or prompt_kind(row) != kind:
            needs = "a 'prompt' (a text, or messages), 'messages' or a 'text', as all rows"
            sys.exit(f"error: row {i} of {name} needs {needs}: {row!r:.99}")
        with explained(f"row {i} of {name}"):
            prompt, target, length = tokenize(row, tokenizer, whole)
        distinct.add(hash(tuple(prompt)))  # takes less memory than the tokens
        targets += bool(target)
        cut_targets += len(target) > args.response_length
        cut += length > args.prompt_length
        longest = max(longest, length)
    if args.ce_coef and name == args.dataset:
        require(targets, "--ce-coef needs a column 'label' of texts in the training data")
    found = f"{len(rows):,} prompts, {len(distinct):,} distinct, {cut:,} cut"
    accelerator.print(f"{name}: {found}; {targets:,} targets, {cut_targets:,} cut")
    require(not is_chat or not cut, f"{name}: to keep messages whole, --prompt-length {longest}")
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
    enough = args.batch_size <= len(rows) and args.eval_episodes <= len(eval_rows)
    few = f"{len(rows)} rows of training data and {len(eval_rows)} held out are too few for"
    require(enough, f"{few} --batch-size {args.batch_size}, --eval-episodes {args.eval_episodes}")
    chosen = rng.permutation(len(eval_rows))[: args.eval_episodes]
    return rows, [eval_rows[i] for i in chosen]


# ---- Reward models: functions of the keyword inputs in `score`, which return a score for each text


def classifier_reward(name, args, device, dtype):
    """The classifier `name`, with its own tokenizer and, where prompts are messages, its own chat
    template, if it has one. The score is its output, if it has only one. Otherwise the score is the
    label's output in a regression, and the label's probability in a classification."""
    with explained(name):
        model = load_classifier(name, device, dtype)
    config = model.config
    label = {1: 0, 2: 1}.get(config.num_labels)
    if args.reward_label is not None and config.num_labels > 1:
        label = args.reward_label
    labels = config.id2label
    require(label in labels, f"{name}: --reward-label must be one of {labels}, not {label}")
    config.id2label = {i: str(i) for i in labels}  # several labels may have one name
    # An adapter may have no tokenizer. Texts that are too long lose their beginning
    if not transformers.utils.has_file(name, "tokenizer_config.json"):
        name = config.name_or_path
    tokenizer = load_tokenizer(name, truncation_side="left", padding_side="right")
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    has_padding = pad is not None and pad >= 0  # without it decoders do not find a text's end
    if has_padding:
        tokenizer.pad_token_id = pad  # decoders look for this token
    classify = transformers.pipeline(
        "text-classification",
        model,
        tokenizer=tokenizer,
        device=device,
        batch_size=16 if has_padding else 1,
        truncation=True,
        top_k=None,  # scores of all labels
        function_to_apply="none" if config.num_labels == 1 else None,  # None: by its problem_type
    )

    def reward_model(texts, prompts, completions, **_):
        has_template = tokenizer.chat_template and isinstance(prompts[0], list)
        with explained(name):
            if has_template:
                chats = [{"prompt": x + y} for x, y in zip(prompts, completions)]
                texts = [in_template(chat, tokenizer, {}) for chat in chats]
            results = classify(texts, add_special_tokens=not has_template)
        return [x["score"] for result in results for x in result if x["label"] == str(label)]

    return reward_model


def import_function(name):
    """The Python function FILE.py:NAME."""
    file, _, function_name = name.rpartition(":")
    path = Path(file).resolve()
    sys.path.append(str(path.parent))
    module = import_module(path.stem)
    is_own = getattr(module, "__file__", None) == str(path)
    require(is_own, f"{file}: no such file, or another module is called {path.stem}: rename it")
    return getattr(module, function_name)


def function_reward(name, columns):
    """The Python function FILE.py:NAME. It gets the inputs that it names, or all with `**kwargs`.
    Inputs are `texts` (prompt and response together), TRL's `prompts`, `completions` (messages, or
    texts without special tokens) and `completion_ids`, and the columns of the data. It returns a
    score for each text, or None where it does not score one."""
    function = import_function(name)
    signature = inspect.signature(function)
    takes_all = any(one.kind == one.VAR_KEYWORD for one in signature.parameters.values())
    inputs = ["texts", "prompts", "completions", "completion_ids", *columns]
    names = [key for key in inputs if takes_all or key in signature.parameters]
    require(len({*names}) == len(names), f"{name}: in the data, rename a column of {inputs[:4]}")
    with explained(f"{name} gets {', '.join(inputs)}"):
        signature.bind(**dict.fromkeys(names))

    def reward_model(**inputs):
        count = len(inputs["texts"])  # the function may change the list
        scores = function(**{key: inputs[key] for key in names})
        with explained(f"{name} must return a score for each of {count} texts"):
            if isinstance(scores, dict | str | set) or len(scores) != count:
                raise ValueError(f"not {scores!r:.99}")
            return [None if one is None else float(one) for one in scores]

    return reward_model


# ---- Loading and saving


def refuse_missing(names, source):
    """Refuses a checkpoint without weights of these `names`, which would stay random."""
    if names:
        sys.exit(f"error: {source} lacks {len(names)} weights, such as {min(names)}")


def load_pretrained(auto_class, name, **options):
    """Loads a model, with all its weights. A classifier may have no others. A language model may
    lose some, such as a value head."""
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    refuse_missing(info["missing_keys"], name)
    unused = auto_class is AutoModelForSequenceClassification and info["unexpected_keys"]
    require(not unused, f"{name} is no plain classifier; unused weights: {unused}")
    return model


def load_tokenizer(name, **sides):
    """The tokenizer of a model. It pads with the end-of-text token if it has no padding token.
    Refuses the empty tokenizer that AutoTokenizer makes for a folder without tokenizer files."""
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS.get(name, name), **sides)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    words = len(tokenizer) - len(tokenizer.all_special_tokens)
    # An empty tokenizer of T5 has one word, of DeBERTa two
    require(words > 2, f"{name} has no tokenizer; for a policy, give --tokenizer")
    return tokenizer


def load_classifier(name, device, dtype):
    """Loads a classifier with all its weights. A LoRA adapter of a classifier is merged into its
    base model."""
    options = {"dtype": dtype, "device_map": device}
    if not transformers.utils.find_adapter_config_file(name):
        return load_pretrained(AutoModelForSequenceClassification, name, **options)
    heads = peft.PeftConfig.from_pretrained(name).modules_to_save or []
    saved = peft.load_peft_weights(name, device="cpu")
    sizes = [len(weight) for key, weight in saved.items() if set(heads) & set(key.split("."))]
    labels = min(sizes, default=1)  # the last layer is the narrowest
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        name, num_labels=labels, **options
    )
    refuse_missing(peft.get_peft_model_state_dict(model).keys() - saved.keys(), name)
    return model.merge_and_unload().to(device, dtype)  # modules_to_save may have another dtype


def load_frozen(args, dtype):
    """The initial policy, whose weights do not change."""
    with explained(args.policy_model):
        has_adapter = transformers.utils.find_adapter_config_file(args.policy_model)
        require(not has_adapter, f"{args.policy_model} has an adapter_config.json: merge it")
        config = transformers.AutoConfig.from_pretrained(args.policy_model)
    own_config = copy.deepcopy(config)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel
    if args.gradient_checkpointing:  # it needs train mode, which would turn dropout and noise on
        text_config = config.get_text_config()
        for name in vars(text_config):
            if "drop" in name or "jitter" in name:
                setattr(text_config, name, 0.0)
    dtype = dtype if args.lora_r else torch.float32
    model = load_pretrained(AutoModelForCausalLM, args.policy_model, config=config, dtype=dtype)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.own_config = own_config  # for `save_policy`
    return model.requires_grad_(False)


def prepare(args):
    """Checks the device, and imports reward functions."""
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    transformers.utils.logging.disable_progress_bar()
    for name in args.reward_model:
        if ".py:" in name:
            import_function(name)
    os.chdir(START)  # an imported file may have changed it


def has_bfloat16(device):
    """Whether bfloat16 is faster. Intel's CPUs with avx512_fp16 need AMX, which may be hidden."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    needed = "amx_bf16" if able.get("avx512_fp16") else "avx512_bf16"
    return able.get(needed, False)


def end_tokens(row, tokenizer, policy, args):
    """Tokens that end a response: the end-of-text tokens of tokenizer and policy, for messages also
    the token that ends a turn, which a policy that is no chat model does not name."""
    ends = [tokenizer.eos_token_id]
    if prompt_kind(row) == "messages":
        ends += [turn_end(tokenizer, args.template_options)]
    own = policy.generation_config.eos_token_id
    ends += own if isinstance(own, list) else [own]
    vocabulary = len(policy.get_output_embeddings().weight)
    return [token for token in ends if token is not None and token < vocabulary]


@torch.no_grad()
def check_sampling(setup, args):
    """Refuses a policy that samples from other probabilities than it is trained with, as where the
    padding or the cache of `generate` changes positions or recurrent states."""
    actor = setup.actor_critic
    prompts = [tokenize(row, setup.tokenizer, args)[0] for row in setup.eval_data]
    # One prompt of the maximum length, and one of a single token, which gets padding
    longest = (max(prompts, key=len) * args.prompt_length)[: args.prompt_length]
    prompts = [longest, longest[:1]]
    with actor.autocast():
        generated = actor.policy.generate(
            **padded(setup, prompts), output_logits=True, return_dict_in_generate=True
        )
        tokens = generated.sequences[:, len(longest) :]
        response = collate(prompts, tokens.tolist(), actor.policy.device)
        trained = token_log_probs(actor.policy, response, 1.0).view(tokens.shape)
    acts = -F.cross_entropy(torch.stack(generated.logits, -1).float(), tokens, reduction="none")
    difference = (acts - trained).abs().max().item()
    # Rounding gives 1e-5 in float32, 0.05 in bfloat16 with 28 layers; a mistake gives 0.5 or more
    limit = 1e-2 if actor.dtype == torch.float32 else 0.3
    found = f"samples otherwise than it is trained, by {difference:.2g} nats a token"
    require(difference <= limit, f"{args.policy_model} {found}")


def load(args):
    """Loads models and data."""
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # but see ActorCritic.autocast
    device = accelerator.device
    dtype = torch.bfloat16 if args.amp == "auto" and has_bfloat16(device) else torch.float32
    tokenizer = load_tokenizer(args.tokenizer or args.policy_model)
    require(tokenizer.eos_token, "the tokenizer has no end-of-text token: give --tokenizer")
    rows, eval_rows = [
        load_rows(name, accelerator, tokenizer, args) if name else []
        for name in [args.dataset, args.eval_dataset]
    ]
    are_chats = {prompt_kind(part[0]) == "messages" for part in (rows, eval_rows) if part}
    require(len(are_chats) == 1, "of training and held-out data only one has messages")
    counts = Counter(name for row in rows + eval_rows for name in row)
    for name, count in counts.items():
        lacking = len(rows + eval_rows) - count
        if lacking:
            warn(f"{lacking:,} rows lack {name!r}, which is None there")
    columns = list(counts)
    data = split_rows(rows, eval_rows, args)
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
    text_config = policy.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", longest)
    if "longrope" in str(text_config):  # it changes all positions in longer texts
        positions = text_config.original_max_position_embeddings
    require(positions >= longest, f"{args.policy_model} has {positions} positions, not {longest}")
    policy.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=args.top_k,
        max_new_tokens=args.response_length,
        min_new_tokens=None if args.stop_at_eos else args.response_length,
        eos_token_id=end_tokens(rows[0], tokenizer, policy, args),
        pad_token_id=0,  # comes after the end of a response, and is cut off
    )
    trained = actor_critic.trained().values()
    optimizer = torch.optim.AdamW(
        trained, args.learning_rate, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )
    count = sum(parameter.numel() for parameter in trained)
    layers = {name.rpartition(".")[2] for name in getattr(policy, "targeted_module_names", [])}
    adapters = ", ".join(sorted(layers)) or "none"
    accelerator.print(f"{args.policy_model}: trains {count:,} parameters; adapters on {adapters}")
    model = accelerator.prepare(actor_critic)
    return Setup(
        accelerator, actor_critic, model, optimizer, tokenizer, reward_models, columns, *data
    )


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
        "progress": vars(progress),
    }
    with atomic_write(folder / "checkpoint.pt") as path:
        torch.save(checkpoint, path)
        load_checkpoint(path, "meta")  # checks only: an edit may save what can't be read


def restore(setup, folder, start_from=None):
    """Continues from the checkpoint of a run, if it has one, or else begins with that of the run
    `start_from`, if any. Returns its `Progress`."""
    path = folder / "checkpoint.pt"
    starts = start_from and not path.exists()
    if starts:
        path = Path(START, start_from, path.name)
    if not path.exists():
        return Progress(0, [], [], [], [], [])
    checkpoint = load_checkpoint(path)
    trained, saved = setup.actor_critic.trained(), checkpoint["agent"]
    shapes = [[(name, x.shape) for name, x in weights.items()] for weights in (trained, saved)]
    require(shapes[0] == shapes[1], f"{path} has weights of other names or shapes (--lora-r?)")
    setup.actor_critic.load_state_dict(saved, strict=False)
    if starts:  # the optimizer's options are this command's
        checkpoint["optimizer"]["param_groups"] = setup.optimizer.state_dict()["param_groups"]
        checkpoint["progress"]["speeds"] = []
    setup.optimizer.load_state_dict(checkpoint["optimizer"])
    return Progress(**checkpoint["progress"])


def save_policy(setup, run_folder):
    """Writes policy/: the trained policy or its adapter, for `from_pretrained`, its tokenizer, and
    how it was sampled, which transformers does not read with an adapter by itself."""
    folder = run_folder / "policy"
    temporary = run_folder / "policy.tmp"
    policy = setup.actor_critic.policy
    policy.config = setup.actor_critic.reference.own_config
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
    """{path: SHA-256} of the files of local data and models, without byte code and hidden files,
    such as caches."""
    names = [args.dataset, args.eval_dataset, args.policy_model, args.tokenizer, *args.reward_model]
    for name in args.reward_model:
        adapter = Path(START, name, "adapter_config.json")
        if adapter.exists():
            names.append(json.loads(adapter.read_text())["base_model_name_or_path"])
    digests = {}
    for name in filter(None, names):
        root = Path(START, name)
        root = root if root.exists() else Path(START, name.split(":")[0])
        found = root.exists() or not name.startswith(f"{TOY}/")
        require(found, f"no {name}: run toy.py, if it is a flag's default")
        inside = glob.glob(f"{glob.escape(str(root))}/**", recursive=True)  # no hidden files
        for path in map(Path, [root, *inside]):
            if path.is_file() and "__pycache__" not in path.parts:
                # A map, because a model may be larger than memory. Empty files have none
                content = np.memmap(path, mode="r") if path.stat().st_size else b""
                digests[str(path.resolve())] = hashlib.sha256(content).hexdigest()
    return digests


def start_digest(args):
    """{path: SHA-256} of the checkpoint that a run starts from: of a finished run with fewer steps.
    {} without `start_from`."""
    if not args.start_from:
        return {}
    folder = Path(START, args.start_from)
    if not (folder / "summary.json").exists():
        sys.exit(f"error: {args.start_from} has no finished run; others go on by their own command")
    step = json.loads((folder / "summary.json").read_text())["step"]
    if step >= args.total_timesteps:
        sys.exit(f"error: {args.start_from} has {step:,} of --total-timesteps already: give more")
    path = folder / "checkpoint.pt"
    return {str(path): hashlib.sha256(np.memmap(path, mode="r")).hexdigest()}


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


class Diverged(SystemExit):
    """Ends a run whose gradient, observation or return is not finite."""


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
    try:
        prepare(args)
        digests = file_digests() | local_digests(args) | start_digest(args)
        folder = run_folder(args, digests)
        summary_path = folder / "summary.json"
        setup = None if folder.exists() else load(args)  # an error in input leaves no folder
        is_first = os.environ.get("RANK", "0") == "0"  # only this process writes files
        lock = nullcontext()
        if is_first:
            with explained(f"another process is at work on {folder}, or locking fails"):
                lock = FileLock(folder / "lock", blocking=False).acquire()  # makes the folder, too
        with lock:
            if not summary_path.exists():
                if is_first:
                    begin_session(args, digests, folder)
                train(setup or load(args), args, folder)
    except Diverged as end:
        if is_first:
            with atomic_write(folder / "diverged.txt") as path:  # for reports
                path.write_text(f"{end}\n")
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from its last checkpoint, if any")
    if is_first:
        summary = json.loads(summary_path.read_text())
        score = f"reward {summary['return_mean']:.3f}, {summary['sps']:,.1f} texts/s"
        name = f"{args.runs_dir}/{folder.name}"  # as it was typed
        print(f"{name}: {score}; to play it: python enjoy.py {name}")


if __name__ == "__main__":
    main()
