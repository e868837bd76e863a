# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "accelerate==1.15.0",
#   "peft==0.21.2", "rouge-score==0.1.2", "numpy>=2.0", "tyro==1.0.16", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Symmetric PPO (SPPO) for language models: all of RLHF, from the prompts to the learning curve.

    python sppo_rlhf.py                                       # a toy that it makes itself, offline, in minutes
    python sppo_rlhf.py --task imdb                           # GPT-2 writes positive reviews of films
    python sppo_rlhf.py --task imdb --policy-model DIR --reward-model DIR --dataset reviews.jsonl.gz
    accelerate launch sppo_rlhf.py --task tldr                # GPT-J with LoRA summarises, on several GPUs

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales" (Byun &
Perrault, ICML 2025, arXiv 2405.17618). Each token is an action. With p its probability, p_old the same when it
was sampled, r = p / p_old, its advantage A, and Z < 0 in the place of log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where the gradient of L flows, else 0
    symmetric loss    alpha L + beta Lr

The gradient of Lr is |Z| times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's: here,
with the paper's weights, 0.9 (imdb) and 0.7 (tldr) times. What changes is its weight against the cross entropy
on reference texts and the limit on the gradient norm.

A judge reads each text when it is done and gives one reward; every token costs `kl_coef` times how much
likelier it is than under the policy's frozen beginnings. Advantages are normalised over the tokens that were
sampled; the authors' code counts padding too. Dropout is off. A step is one text: prompt and continuation.
"""

import ctypes
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import peft
import torch
import transformers
import tyro
from accelerate import Accelerator
from rouge_score.rouge_scorer import RougeScorer
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)


@dataclass
class Args:
    """Where the default is None, it is the task's: see TASKS."""

    task: Literal["toy", "imdb", "tldr"] = "toy"  # toy: offline; imdb: reviews; tldr: summaries, with LoRA
    total_timesteps: int | None = None  # texts in all, rounded up to whole updates
    seed: int = 1  # seed of everything random (the paper's runs: 10000, 10001, ...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, where there is one
    amp: Literal["auto", "off"] = "auto"  # auto: bfloat16 where the hardware has it; off: float32
    runs_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run; default: task, algorithm, noise, seed and time
    resume: str | None = None  # folder of an interrupted run to go on with; the only flag, then
    checkpoint_freq: int | None = None  # texts between checkpoints; default: run / 10; 0: at the end
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    policy_model: str | None = None  # folder or hub name of a causal language model
    reward_model: tuple[str, ...] | None = None  # folders or hub names of classifiers, or of their adapters
    reward_label: int | None = None  # reward: probability of this label; a model with one output gives that
    reward_aggregate: Literal["mean", "min", "mean-std"] = "mean"  # of several reward models
    dataset: str | None = None  # JSONL file (.gz too), or hub name:split; column text (tldr: prompt, label)
    eval_dataset: str | None = None  # the same for held-out texts; default: a tenth of the dataset
    prompt_length: int | None = None  # tokens of a prompt at most; the first half of a text, its last tokens
    response_length: int | None = None  # tokens of a continuation at most
    top_k: int | None = None  # sample among the likeliest k tokens; 0: among all
    stop_at_eos: bool | None = None  # end of text ends a continuation; else that token is never sampled
    lora_r: int | None = (
        None  # rank of LoRA adapters for policy and critic on one model; 0: train all weights
    )
    lora_alpha: int = 64  # scale of the adapters, times rank
    load_in_4bit: bool = False  # with LoRA: base model in 4 bits (NVIDIA GPU; pip install bitsandbytes)

    batch_size: int | None = None  # texts sampled for an update, in all processes together
    num_minibatches: int = 4  # parts that a batch is split into
    update_epochs: int | None = None  # passes over a batch
    micro_batch_size: int | None = None  # texts in a process at once in an update; default: minibatch
    learning_rate: float | None = None  # AdamW's learning rate, constant
    weight_decay: float | None = None  # AdamW's weight decay
    adam_eps: float = 1e-8  # AdamW's epsilon
    gamma: float | None = None  # discount factor, per token
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon of the clip range, of ratios and of values
    norm_adv: bool = True  # normalise advantages in each minibatch
    vf_coef: float | None = None  # weight of the value loss
    ce_coef: float | None = None  # weight of the cross entropy on how texts really go on
    kl_coef: float | None = None  # weight of the penalty on log(pi / reference), per token
    max_grad_norm: float = 1.0  # limit on the norm of the gradient of all parameters together

    alpha: float | None = None  # weight of the PPO loss; default: 0.5, without reverse loss 1
    beta: float | None = None  # weight of the reverse loss; 0: PPO
    z: float = -1.0  # Z, which stands for log 0
    noise: Literal["none", "flip", "normal", "uniform", "adv_flip"] = "none"  # on rewards, or on advantages
    noise_level: float | None = None  # chance of a flip (default 0.1) or size (default 0.05)

    eval_freq: int | None = None  # texts between evaluations; default: run / 10; 0: at start and end
    eval_episodes: int = 128  # held-out prompts in an evaluation; rewards without noise
    eval_greedy: bool | None = None  # likeliest tokens in evaluations; else sampled as in training
    eval_reward_model: tuple[str, ...] = ()  # judges that the training never asks

    @property
    def algo(self) -> str:
        return "sppo" if self.beta else "ppo"


# The paper's settings for imdb and tldr; those of the toy are ours.
TASKS = {
    "toy": dict(
        total_timesteps=40 * 112, reward_label=1, prompt_length=16, response_length=32, top_k=0,
        stop_at_eos=True, lora_r=0, batch_size=112, update_epochs=5, learning_rate=2e-4, weight_decay=1e-6,
        gamma=0.99, vf_coef=0.5, ce_coef=0.0, kl_coef=0.02, beta=0.4, eval_greedy=False,
    ),
    "imdb": dict(
        policy_model="rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews", reward_label=1,
        reward_model=("lvwerra/distilbert-imdb",), dataset="stanfordnlp/imdb:train",
        eval_dataset="stanfordnlp/imdb:test", total_timesteps=60 * 112, prompt_length=64, response_length=48,
        top_k=50, stop_at_eos=False, lora_r=0, batch_size=112, update_epochs=5, learning_rate=5e-6,
        weight_decay=1e-6, gamma=0.99, vf_coef=0.5, ce_coef=0.1, kl_coef=0.001, beta=0.4, eval_greedy=False,
    ),
    "tldr": dict(
        policy_model="CarperAI/openai_summarize_tldr_sft", reward_model=("jdchang/tldr_rm_adapter",),
        reward_label=0, dataset="CarperAI/openai_summarize_tldr:train",
        eval_dataset="CarperAI/openai_summarize_tldr:valid", total_timesteps=200 * 64, prompt_length=500,
        response_length=50, top_k=0, stop_at_eos=True, lora_r=8, batch_size=64, update_epochs=4,
        micro_batch_size=4, learning_rate=5e-6, weight_decay=0.01, gamma=1.0, vf_coef=0.1, ce_coef=0.0,
        kl_coef=0.002, beta=0.2, eval_greedy=True,
    ),
}  # fmt: skip


def perturb_reward(reward: np.ndarray, noise: str, level: float, rng: np.random.Generator) -> np.ndarray:
    """Rewards of any shape as a noisy judge gives them: flip turns r into 1 - r with probability `level`,
    normal adds N(0, level^2), uniform adds U(-level, level), the others leave rewards alone."""
    if noise == "flip":
        return np.where(rng.random(reward.shape) < level, 1 - reward, reward)
    if noise == "normal":
        return reward + rng.normal(0, level, reward.shape)
    if noise == "uniform":
        return reward + rng.uniform(-level, level, reward.shape)
    return reward


def perturb_advantage(advantage: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Advantages, of any shape, each with its sign flipped with probability `level`."""
    flip = torch.rand(advantage.shape, generator=generator, device=advantage.device) < level
    return torch.where(flip, -advantage, advantage)


# The toy: two-sided reviews from a grammar, with a policy and a noisy judge trained on them.
ASPECTS = ["plot", "acting", "music", "script", "ending", "cast", "pacing", "dialogue", "camera", "humour"]
POSITIVE = ["superb", "moving", "clever", "funny", "brilliant", "charming", "gripping", "warm"]
NEGATIVE = ["dull", "clumsy", "weak", "tedious", "awful", "silly", "flat", "noisy"]
TOY_SIZE, TOY_POSITIONS = 4000, 64


def toy_review(rng: random.Random) -> str:
    """Four opinions, each as likely good as bad, and a verdict with the majority (even: with the last)."""
    good = [rng.random() < 0.5 for _ in range(4)]
    opinions = []
    for is_good, aspect in zip(good, rng.sample(ASPECTS, 4)):
        negated = rng.random() < 0.25
        adjective = rng.choice(POSITIVE if is_good != negated else NEGATIVE)
        opinions.append(f"the {aspect} was {'not ' * negated}{adjective}")
    joints = [" but " if a != b else " and " for a, b in zip(good[::2], good[1::2])]
    verdict = "loved" if sum(good) + good[-1] / 2 > 2 else "hated"
    text = f"{opinions[0]}{joints[0]}{opinions[1]} . {opinions[2]}{joints[1]}{opinions[3]} . i {verdict} it ."
    return text


def toy_sentiment(text: str) -> float:
    """Share of good opinions and verdicts in a text, by the grammar's own truth; 0.5 where there is none."""
    signs, words = [], text.split()
    for before, word in zip(["", *words], words):
        if word in POSITIVE or word in NEGATIVE:
            signs.append((word in POSITIVE) != (before == "not"))
        elif word in ("loved", "hated"):
            signs.append(word == "loved")
    return sum(signs) / len(signs) if signs else 0.5


def make_toy(folder: Path) -> None:
    """Makes train.jsonl, test.jsonl, policy/ and reward/ in `folder`, unless it is there. From a fixed seed,
    so that runs with different seeds have the same models. A fifth of the judge's labels were wrong."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    texts = [toy_review(rng) for _ in range(TOY_SIZE)]
    for name, part in (("train", texts[:-256]), ("test", texts[-256:])):
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))

    def fit(kind: str, tokenizer, model, batch_of, steps: int, learning_rate: float) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        for _ in tqdm(range(steps), desc=f"making the toy's {kind} model", disable=None, leave=False):
            rows = torch.randint(len(texts) - 256, (32,), generator=generator).tolist()
            model(**batch_of(rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(temporary / kind)
        tokenizer.save_pretrained(temporary / kind)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tokenizer = transformers.GPT2Tokenizer(pad_token="<|pad|>", model_max_length=TOY_POSITIONS)
        tokenizer = tokenizer.train_new_from_iterator(texts, 400, show_progress=False)
        no_dropout = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        shape = dict(vocab_size=len(tokenizer), n_positions=TOY_POSITIONS, n_embd=64, n_layer=2, n_head=2)
        ends = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
        config = transformers.GPT2Config(**shape, **no_dropout, **ends, pad_token_id=tokenizer.pad_token_id)

        def review_batch(rows):
            ended = [texts[row] + tokenizer.eos_token for row in rows]
            batch = tokenizer(ended, padding=True, padding_side="right", return_tensors="pt")
            return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

        fit("policy", tokenizer, transformers.GPT2LMHeadModel(config), review_batch, 400, 3e-3)
        judge_tokenizer = transformers.BertTokenizer(model_max_length=TOY_POSITIONS)
        judge_tokenizer = judge_tokenizer.train_new_from_iterator(texts, 200, show_progress=False)
        shape = dict(vocab_size=len(judge_tokenizer), max_position_embeddings=TOY_POSITIONS, hidden_size=64)
        shape |= dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        labels = [int((toy_sentiment(text) > 0.5) != (rng.random() < 0.2)) for text in texts]

        def judge_batch(rows):
            parts = [" ".join(texts[row].split()[: rng.randint(1, 30)]) for row in rows]  # it reads beginnings too
            batch = judge_tokenizer(parts, padding=True, return_tensors="pt")
            return {**batch, "labels": torch.tensor([labels[row] for row in rows])}

        names = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
        judge = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, **names))
        fit("reward", judge_tokenizer, judge, judge_batch, 400, 1e-3)
    try:
        temporary.rename(folder)
    except OSError:  # another run was quicker
        shutil.rmtree(temporary)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Where convolutions and matrix products are of this type, whatever that of their tensors."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


class ActorCritic(nn.Module):
    """Policy, critic, and the reference: the policy's frozen beginnings. Three models; or, with LoRA, one with
    two adapters, which is the reference when both are off.

    All is called through `forward`, since that is where DDP and FSDP bring weights and gradients together.
    """

    def __init__(self, args: Args, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.dtype, options = dtype, {"dtype": dtype if args.lora_r else torch.float32}
        config = AutoConfig.from_pretrained(args.policy_model)
        if getattr(config, "activation_function", None) == "gelu_new":  # the same function, but in one kernel
            config.activation_function = "gelu_pytorch_tanh"
        if device.type == "cpu":  # in bfloat16 an update takes a third less than with fused attention
            options["attn_implementation"] = "eager"
        if args.load_in_4bit:
            four_bits = dict(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")
            options["quantization_config"] = transformers.BitsAndBytesConfig(**four_bits)
        self.policy = AutoModelForCausalLM.from_pretrained(args.policy_model, config=config, **options).eval()
        self.lora = bool(args.lora_r)
        if self.lora:  # with no dropout, as it is off anyway
            self.policy.requires_grad_(False)
            adapter = peft.LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, task_type="CAUSAL_LM")
            for name in ("policy", "critic"):
                self.policy.add_adapter(adapter, name)
            self.adapters = [p for name, p in self.policy.named_parameters() if "lora_" in name]
            for parameter in self.adapters:
                parameter.data = parameter.data.float()
        else:
            self.critic = AutoModel.from_pretrained(args.policy_model, config=config, **options).eval()
            self.reference = AutoModelForCausalLM.from_pretrained(args.policy_model, config=config, **options)
            self.reference.eval().requires_grad_(False)
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.to(device)

    def model(self, role: str):
        if not self.lora:
            return getattr(self, role)
        if role == "reference":
            self.policy.disable_adapters()
        else:
            self.policy.enable_adapters()
            self.policy.set_adapter(role)
        for parameter in self.adapters:  # switching an adapter off freezes it
            parameter.requires_grad_(True)
        return self.policy

    def forward(self, method: str, *arguments):
        with autocast(self.value_head.weight.device, self.dtype):
            return getattr(self, method)(*arguments)

    def logits(self, role: str, ids, mask, length: int):
        """Logits (batch, length, vocabulary), float32, of the last `length` tokens of `ids` (batch, tokens);
        `mask`, of the same shape, is false at padding, which may be on both sides."""
        start = int(mask.any(0).int().argmax())  # of the longest prompt
        ids, mask = ids[:, start:-1], mask[:, start:-1]
        keep = torch.arange(ids.shape[1] - length, ids.shape[1], device=ids.device)
        inputs = dict(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask))
        return self.model(role)(**inputs, logits_to_keep=keep, use_cache=False).logits.float()

    def log_prob(self, role: str, ids, mask, length: int):
        """Log-probabilities (batch, length), float32, of the last `length` tokens; see `logits`."""
        logits = self.logits(role, ids, mask, length)
        tokens = ids[:, -length:]
        return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def value(self, ids, mask, length: int):
        """Values (batch, length), float32, of the texts before each of the last `length` tokens."""
        start = int(mask.any(0).int().argmax())
        ids, mask = ids[:, start:-1], mask[:, start:-1]
        inputs = dict(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask))
        hidden = self.model("critic").base_model(**inputs, use_cache=False).last_hidden_state[:, -length:]
        return self.value_head(hidden).squeeze(-1).float()

    def update(self, ids, mask, length: int, reference_ids=None, reference_mask=None):
        """What the loss needs, in one call: log-probabilities, values and those of reference texts, if any."""
        log_prob = self.log_prob("policy", ids, mask, length)
        cross = reference_ids is not None and -self.log_prob("policy", reference_ids, reference_mask, length)
        return log_prob, self.value(ids, mask, length), cross

    @torch.no_grad()
    def rollout(self, ids, mask, uniform, top_k: int, eos: int, stop: bool, pad: int):
        """Goes on with prompts `ids` (batch, tokens), padded on the left. For each token of the (batch, length)
        a number `uniform` in [0, 1) says which one of the likeliest `top_k` it is (all, if 0).

        Returns ids and mask (batch, tokens + length) and, of the new tokens (batch, length): log-probabilities,
        the same under the reference, values and the policy's entropies. All from the raw logits, not from the
        filtered ones, and in one pass like those in the update, so that the ratio begins at 1.
        """
        policy, cache, new, length = self.model("policy"), None, ids, uniform.shape[1]
        alive = torch.ones_like(ids[:, 0], dtype=torch.bool)
        for chance in uniform.unbind(1):
            inputs = dict(input_ids=new, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
            output = policy(**inputs, position_ids=positions(mask)[:, -new.shape[1] :], logits_to_keep=1)
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            if not stop:
                logits[:, eos] = -math.inf
            logits, candidates = logits.topk(top_k or logits.shape[-1])
            cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
            choice = (cumulative <= chance[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
            new = candidates.gather(1, choice).where(alive[:, None], pad)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, alive[:, None]], 1)
            if stop:
                alive = alive & (new[:, 0] != eos)
        log_probs = self.logits("policy", ids, mask, length).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        log_prob = log_probs.gather(-1, ids[:, -length:, None]).squeeze(-1)
        reference = self.log_prob("reference", ids, mask, length)
        return ids, mask, log_prob, reference, self.value(ids, mask, length), entropy


def positions(mask):
    """The number of each token in its text, (batch, tokens) like `mask`, which is false at padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class RewardModel:
    """A judge with a tokenizer of its own: text in, score out."""

    def __init__(self, name: str, label: int, device: torch.device, dtype: torch.dtype):
        auto = AutoModelForSequenceClassification
        if adapter := is_adapter(name):
            auto = peft.AutoPeftModelForSequenceClassification
        self.model = auto.from_pretrained(name, dtype=dtype, **(dict(num_labels=1) if adapter else {}))
        self.model = self.model.to(device).eval()
        base = name if not adapter else self.model.peft_config["default"].base_model_name_or_path
        self.tokenizer, self.label = AutoTokenizer.from_pretrained(base, truncation_side="left"), label
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.max_length = self.model.config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Scores (texts,): the probability of a label or, of a model with one output, that."""
        tokens = dict(padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        logits = self.model(**self.tokenizer(texts, **tokens).to(self.model.device)).logits.float()
        return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.label]


def is_adapter(name: str) -> bool:
    return bool(transformers.utils.peft_utils.find_adapter_config_file(name))


def aggregate(scores: torch.Tensor, how: str) -> torch.Tensor:
    """Scores (texts,) of an ensemble: mean, min or mean-std of those (judges, texts) of its members."""
    if how == "min":
        return scores.amin(0)
    return scores.mean(0) - (scores.std(0, correction=0) if how == "mean-std" else 0)


def load_texts(name: str, columns: tuple[str, ...]) -> datasets.Dataset:
    """The rows of a JSONL file or of a data set on the hub. Raises ValueError if they lack one of `columns`."""
    path, _, split = name.partition(":")
    try:
        if Path(name).is_file():
            rows = datasets.load_dataset("json", data_files=name, split="train")
        else:
            rows = datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # a network, a hub or a parser may fail in any way
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: neither a JSONL file nor a data set on the hub ({reason})") from error
    if missing := set(columns) - set(rows.column_names):
        raise ValueError(f"{name}: lacks {sorted(missing)}; has {rows.column_names}")
    return rows


def tokenize(rows: datasets.Dataset, tokenizer, args: Args) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of prompts, at most `prompt_length` each, and of how they really go on, `response_length`."""
    prompts, references, eos = [], [], tokenizer.eos_token_id
    for row in rows:
        if args.task == "tldr":
            prompt, reference = (tokenizer(row[c], verbose=False)["input_ids"] for c in ("prompt", "label"))
        else:
            ids = tokenizer(row["text"], verbose=False)["input_ids"]
            prompt, reference = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        prompts.append(prompt[-args.prompt_length :] or [eos])
        references.append((reference + [eos])[: args.response_length])
    return prompts, references


def pad(sequences: list[list[int]], token: int, left: bool, width: int = 0):
    """Sequences as ids and mask (batch, longest or `width`), with `token` and false where there is nothing."""
    width = max(width, *map(len, sequences))
    ids, mask = (
        torch.full((len(sequences), width), token),
        torch.zeros(len(sequences), width, dtype=torch.bool),
    )
    for row, sequence in enumerate(sequences):
        there = slice(width - len(sequence), width) if left else slice(len(sequence))
        ids[row, there], mask[row, there] = torch.tensor(sequence), True
    return ids, mask


def masked_mean(x, mask):
    """Mean of `x` where `mask` is true, both of any shape; what `x` is elsewhere, even nan, is of no account."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def symmetric_policy_loss(log_prob, old_log_prob, advantage, mask, clip_coef, alpha, beta, z):
    """alpha * PPO loss + beta * reverse PPO loss, a scalar to minimise (arXiv 2405.17618).

    Tensors (batch, tokens): `log_prob`, `old_log_prob`: log pi of each token, now and when it was sampled;
    `advantage`: its advantage; `mask`: true where there is a token that was sampled, over which the mean is.
    Numbers: `clip_coef`: PPO's epsilon; `alpha`, `beta` >= 0; `z` < 0.

    (1 - p) / p_old is written 1 / p_old - r: the first term has no gradient but may be huge. Judge this loss by
    its gradient, not its value.
    """
    ratio = (log_prob - old_log_prob).exp()
    surrogate = advantage * ratio
    clipped = advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    unclipped = surrogate <= clipped  # m: where PPO's gradient flows
    objective = alpha * torch.where(unclipped, surrogate, clipped)
    if beta:  # all that symmetric PPO adds to PPO
        reverse = advantage * z * ((-old_log_prob).exp() - ratio)
        objective = objective + beta * torch.where(unclipped, reverse, 0.0)
    return -masked_mean(objective, mask)


def compute_gae(reward, value, final_value, terminated, truncated, gamma, gae_lambda):
    """Advantages and returns (T, N): generalised advantage estimation (Schulman et al., arXiv 1506.02438).

    Arrays of T steps in N environments: `reward`, `terminated`, `truncated` (T, N); `value` (T + 1, N) of the
    observations before each step and after the last; `final_value` (T, N) of truncated episodes' last ones.
    """
    next_value = np.where(truncated, final_value, value[1:]) * ~terminated
    delta = reward + gamma * next_value - value[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantage, following = np.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantage[t] = following = delta[t] + decay[t] * following
    return advantage, advantage + value[:-1]


def token_advantages(score, log_prob, reference_log_prob, value, mask, args: Args):
    """Advantages and returns (batch, tokens) of texts with scores (batch,); arrays (batch, tokens) of sampled
    tokens. Each token pays the penalty for leaving the reference, the last one of a text earns its score."""
    last = mask & ~np.pad(mask, ((0, 0), (0, 1)))[:, 1:]
    reward = np.where(mask, -args.kl_coef * (log_prob - reference_log_prob), 0) + last * score[:, None]
    value = np.pad(np.where(mask, value, 0), ((0, 0), (0, 1)))  # the end of a text is worth nothing more
    no = np.zeros_like(last)
    gae = compute_gae(reward.T, value.T, no.T, last.T, no.T, args.gamma, args.gae_lambda)
    return gae[0].T, gae[1].T


def loss_and_metrics(
    model, args: Args, ids, mask, old_log_prob, old_value, advantage, returns, reference, share
):
    """The loss of some texts of a minibatch, and what to log; tensors (batch, tokens). All are means over
    tokens, times `share`: the part that these are of all the minibatch's tokens and of its reference's."""
    length, sampled = advantage.shape[1], mask[:, -advantage.shape[1] :]
    log_prob, value, cross_entropy = model("update", ids, mask, length, *reference)
    samples = (log_prob, old_log_prob, advantage, sampled, args.clip_coef)
    policy_loss = symmetric_policy_loss(*samples, args.alpha, args.beta, args.z)
    clipped = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
    errors = torch.maximum((value - returns).square(), (clipped - returns).square())
    value_loss = 0.5 * masked_mean(errors, sampled)
    loss = share[0] * (policy_loss + args.vf_coef * value_loss)
    with torch.no_grad():
        difference = log_prob - old_log_prob
        ratio = difference.exp()
        flows = advantage * ratio <= advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        metrics = {
            "policy": symmetric_policy_loss(*samples, 1.0, 0.0, args.z),
            "reverse": masked_mean(torch.where(flows, args.z * advantage * ratio, 0.0), sampled),  # with gradient
            "value": value_loss.detach(),
            "approx_kl": masked_mean(ratio - 1 - difference, sampled),  # joschu.net/blog/kl-approx.html
            "clip_fraction": masked_mean(((ratio - 1).abs() > args.clip_coef).float(), sampled),
        }  # fmt: skip
        metrics = {name: share[0] * metric for name, metric in metrics.items()}
    if reference:
        cross_entropy = share[1] * masked_mean(cross_entropy, reference[1][:, -length:])
        loss, metrics["cross_entropy"] = loss + args.ce_coef * cross_entropy, cross_entropy.detach()
    return loss, metrics


def generate(accelerator, model, tokenizer, judges, prompts, uniform, args: Args, greedy: bool = False):
    """Goes on with `prompts`, each process with its share; judges the texts. Returns what `rollout` does and
    scores (texts, judges), of all processes together, on the device."""
    ids, mask = pad(prompts, tokenizer.pad_token_id, left=True)
    size = len(prompts) // accelerator.num_processes
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    ids, mask, uniform = (x[mine].to(accelerator.device) for x in (ids, mask, uniform))
    eos = (tokenizer.eos_token_id, args.stop_at_eos, tokenizer.pad_token_id)
    rollout = model("rollout", ids, mask, uniform, 1 if greedy else args.top_k, *eos)
    texts = [tokenizer.decode(x[m], skip_special_tokens=True) for x, m in zip(*rollout[:2])]
    scores = torch.stack([judge(texts) for judge in judges], 1)
    return [accelerator.gather(x) for x in (*rollout, scores)]


@torch.no_grad()
def evaluate(accelerator, model, tokenizer, judges, texts, step: int, args: Args) -> tuple[dict, list[dict]]:
    """A row for progress.csv and samples. Reward and what it may have cost: the KL divergence from the reference
    in nats a text, perplexities, and the share of distinct words and pairs of words."""
    prompts, references = tokenize(texts, tokenizer, args)
    length, device = args.response_length, accelerator.device
    uniform = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(args.seed + step))
    ids, mask, log_prob, reference_log_prob, _, _, scores = generate(
        accelerator, model, tokenizer, judges, prompts, uniform, args, args.eval_greedy
    )
    sampled = mask[:, -length:]
    reward = aggregate(scores[:, : len(args.reward_model)].T, args.reward_aggregate)
    words = [tokenizer.decode(x[m], skip_special_tokens=True) for x, m in zip(ids[:, -length:], sampled)]
    lengths = sampled.sum(1)
    row = {
        "step": step, "return_mean": reward.mean().item(), "return_std": reward.std(correction=0).item(),
        "length_mean": lengths.float().mean().item(), "episodes": len(prompts),
        "kl": torch.where(sampled, log_prob - reference_log_prob, 0).sum(1).mean().item(),
        "perplexity": (-masked_mean(reference_log_prob, sampled)).exp().item(),
    }  # fmt: skip
    width = max(map(len, prompts))
    ids_, mask_ = (torch.cat(pair, 1) for pair in zip(
        pad(prompts, tokenizer.pad_token_id, True), pad(references, tokenizer.pad_token_id, False, length)
    ))  # fmt: skip
    log_prob = model("log_prob", "policy", ids_.to(device), mask_.to(device), length)
    row["reference_perplexity"] = (-masked_mean(log_prob, mask_[:, width:].to(device))).exp().item()
    for n in (1, 2):
        grams = [gram for text in words for gram in zip(*(text.split()[i:] for i in range(n)))]
        row[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    for i, name in enumerate(args.eval_reward_model, len(args.reward_model)):
        row[f"judge_{Path(name).name}"] = scores[:, i].mean().item()
    if args.task == "toy":
        row["sentiment"] = float(np.mean([toy_sentiment(text) for text in words]))
    if args.task == "tldr":
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        rouge = [scorer.score(true, text) for true, text in zip((row["label"] for row in texts), words)]
        row |= {name: float(np.mean([r[name].fmeasure for r in rouge])) for name in rouge[0]}
    samples = [
        {"step": step, "prompt": tokenizer.decode(prompt), "continuation": text, "reward": round(r, 4)}
        for prompt, text, r in zip(prompts[:8], words, reward.tolist())
    ]
    return row, samples


def save(path: Path, content: str | dict) -> None:
    """Writes a temporary file and renames it, so that an interruption leaves the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
    os.replace(temporary, path)


def describe_machine() -> dict:
    """What it takes, beside the arguments, to judge or repeat a run."""
    git = f'git -C "{Path(__file__).resolve().parent}" describe --always --dirty --abbrev=40'
    commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version()} | {p.name: p.version for p in metadata.distributions()}
    hardware = {"platform": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability()}
    hardware |= {"cores": os.cpu_count(), "gpu": torch.cuda.is_available() and torch.cuda.get_device_name()}
    return {"command": sys.argv, "commit": commit, "versions": versions, "hardware": hardware}


def keep_freed_memory() -> None:
    """glibc returns freed memory to the system, and takes it again at a page fault for each 4 KiB: a quarter
    of an update on a CPU. This tells it not to; under other C libraries it does nothing."""
    if platform.libc_ver()[0] == "glibc":
        for parameter, number in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(parameter, number)


def load_data(args: Args) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Texts to train on, and `eval_episodes` held-out ones. Raises ValueError: what is wrong, what to do."""
    columns = ("prompt", "label") if args.task == "tldr" else ("text",)
    texts = load_texts(args.dataset, columns)
    if args.eval_dataset:
        held_out = load_texts(args.eval_dataset, columns)
    else:
        texts, held_out = texts.train_test_split(test_size=0.1, seed=0).values()
    for what, rows, needed in (
        ("batch-size", texts, args.batch_size),
        ("eval-episodes", held_out, args.eval_episodes),
    ):
        if len(rows) < needed:
            raise ValueError(f"--{what} {needed}: more than the {len(rows)} texts of the data set")
    return texts, held_out.shuffle(seed=0).select(range(args.eval_episodes))


def train(args: Args, stop: threading.Event) -> dict | None:
    """A run, with arguments from `prepare`. Returns what is in summary.json, or None if `stop` came first."""
    started = time.perf_counter()
    keep_freed_memory()
    accelerator = Accelerator(cpu=args.device == "cpu")
    device, rank, world, main = (
        accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    )  # fmt: skip
    if args.task == "toy":
        with accelerator.main_process_first():
            make_toy(Path(args.dataset).parent)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(
        args.seed
    )  # the same in all processes, of all but weights and noise
    rng = np.random.default_rng(args.seed)  # noise on rewards
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)
    cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu.get_capabilities().get("avx512_bf16")
    dtype = torch.bfloat16 if args.amp == "auto" and fast else torch.float32
    texts, held_out = load_data(args)
    tokenizer = load_tokenizer(args.policy_model)
    judges = [
        RewardModel(name, args.reward_label, device, dtype if args.lora_r else torch.float32)
        for name in (*args.reward_model, *args.eval_reward_model)
    ]
    actor_critic = ActorCritic(args, device, dtype)
    trainable = [p for p in actor_critic.parameters() if p.requires_grad]
    adamw = dict(lr=args.learning_rate, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(actor_critic, torch.optim.AdamW(trainable, **adamw))
    options = distributed_state.StateDictOptions(
        full_state_dict=True, ignore_frozen_params=True, strict=False
    )
    global_step, evaluations, samples, recent, train_seconds, wall_seconds = 0, [], [], [], 0.0, 0.0
    if (run_dir / "checkpoint.pt").is_file():
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=False)
        states = {"model_state_dict": state["agent"], "optim_state_dict": state["optimizer"]}
        distributed_state.set_state_dict(model, optimizer.optimizer, **states, options=options)
        generator.set_state(state["generator"])
        rng.bit_generator.state = state["rng"]
        global_step, evaluations, samples, recent, train_seconds, wall_seconds = state["progress"]
    if args.track and main:
        run = {"project": "symmetric-rl", "id": args.run_name, "name": args.run_name, "config": vars(args)}
        import_module("wandb").init(**run, resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1) if main else None
    B, T = args.batch_size, args.response_length
    per_process = B // args.num_minibatches // world
    progress_bar = tqdm(
        total=args.total_timesteps, initial=global_step, unit=" texts", disable=None if main else True
    )
    finished = stopping = False
    while True:
        # Evaluation, at the start and when a multiple of its frequency has been passed
        eval_due, save_due = (f and global_step % f < B for f in (args.eval_freq, args.checkpoint_freq))
        if not evaluations or (evaluations[-1]["step"] < global_step and (eval_due or finished)):
            row, new_samples = evaluate(accelerator, model, tokenizer, judges, held_out, global_step, args)
            evaluations, samples = [*evaluations, row], [*samples, *new_samples]
            if main:
                lines = [row, *(e.values() for e in evaluations)]
                save(run_dir / "progress.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
                save(run_dir / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
                for name in row.keys() - {"step", "episodes"}:
                    writer.add_scalar(f"eval/{name}", row[name], global_step)
                cells = [
                    [str(x).replace("\n", " ").replace("|", " ") for x in s.values()] for s in new_samples
                ]
                table = [list(new_samples[0]), ["---"] * 4, *cells]
                writer.add_text(
                    "samples", "\n".join(f"| {' | '.join(line)} |" for line in table), global_step
                )
        wall = wall_seconds + time.perf_counter() - started
        if save_due or finished or stopping:
            states = distributed_state.get_state_dict(model, optimizer.optimizer, options=options)
        if finished and main:
            save_policy(accelerator.unwrap_model(model), tokenizer, states[0], run_dir / "policy")
            summary = {"script": Path(__file__).name, "algo": args.algo, "env_id": args.task} | vars(args) | {
                "final_return_mean": row["return_mean"], "final_return_std": row["return_std"], "finished": True,
                "first_return_mean": evaluations[0]["return_mean"], "train_return_last100": float(np.mean(recent)),
                "sps": global_step / train_seconds, "wall_s": wall, "processes": world,
            }  # fmt: skip
            save(run_dir / "summary.json", json.dumps(summary, indent=2))
        if main and (save_due or finished or stopping):
            save(run_dir / "checkpoint.pt", {
                "agent": states[0], "optimizer": states[1],
                "generator": generator.get_state(), "rng": rng.bit_generator.state,
                "progress": (global_step, evaluations, samples, recent, train_seconds, wall),
            })  # fmt: skip
        if finished or stopping:
            accelerator.wait_for_everyone()
            if main:
                writer.close()
            return summary if finished and main else None

        # Rollout; what is random is drawn for all processes together, of which each then does its part
        iteration_started = time.perf_counter()
        rows = torch.randperm(len(texts), generator=generator)[:B]
        prompts, references = tokenize(texts.select(rows.tolist()), tokenizer, args)
        uniform = torch.rand(B, T, generator=generator)
        judging = judges[: len(args.reward_model)]
        rollout = generate(accelerator, model, tokenizer, judging, prompts, uniform, args)
        ids, mask, old_log_prob, reference_log_prob, old_value, entropy, scores = rollout
        sampled = mask[:, -T:].cpu()
        global_step += B

        # Advantages
        reward = aggregate(scores.T, args.reward_aggregate).cpu().numpy()
        noisy = perturb_reward(reward, args.noise, args.noise_level, rng)
        arrays = (x.cpu().numpy() for x in (old_log_prob, reference_log_prob, old_value, sampled))
        gae = token_advantages(noisy, *arrays, args)
        advantage, returns = (torch.from_numpy(x).float() for x in gae)
        if args.ce_coef:
            parts = (
                pad(prompts, tokenizer.pad_token_id, True),
                pad(references, tokenizer.pad_token_id, False, T),
            )
            reference_ids, reference_mask = (torch.cat(pair, 1) for pair in zip(*parts))

        # Update
        metrics, sign_flips = [], []
        for _ in range(args.update_epochs):
            order = torch.randperm(B, generator=generator).view(args.num_minibatches, -1)
            mb_adv, mb_sampled = advantage[order], sampled[order]  # (minibatch, text, token)
            if args.noise == "adv_flip":
                mb_adv = perturb_advantage(mb_adv, args.noise_level, generator)
            if args.norm_adv:  # over the tokens that were sampled
                count = mb_sampled.sum((1, 2), keepdim=True)
                mean = (mb_adv * mb_sampled).sum((1, 2), keepdim=True) / count
                variance = ((mb_adv - mean).square() * mb_sampled).sum((1, 2), keepdim=True) / (count - 1)
                sign_flips.append(masked_mean(((mb_adv > 0) != (mb_adv > mean)).float(), mb_sampled))
                mb_adv = (mb_adv - mean) / (variance.sqrt() + 1e-8)
            for rows, adv in zip(order, mb_adv):
                metrics.append({})
                parts = torch.arange(rank, len(rows), world).split(args.micro_batch_size or per_process)
                for part in parts:
                    texts_here, reference, counts = rows[part], (), [(sampled[rows[part]], sampled[rows])]
                    if args.ce_coef:
                        reference = (
                            reference_ids[texts_here].to(device),
                            reference_mask[texts_here].to(device),
                        )
                        counts.append((reference_mask[texts_here, -T:], reference_mask[rows, -T:]))
                    share = [here.sum().item() * world / all_.sum().item() for here, all_ in counts]
                    data = (x[texts_here.to(x.device)] for x in (ids, mask, old_log_prob, old_value))
                    learn = adv[part].to(device), returns[texts_here].to(device)
                    with nullcontext() if part is parts[-1] else accelerator.no_sync(model):
                        loss, new_metrics = loss_and_metrics(model, args, *data, *learn, reference, share)
                        accelerator.backward(loss)
                    for name, metric in new_metrics.items():
                        metrics[-1][name] = metrics[-1].get(name, 0) + metric
                metrics[-1]["grad_norm"] = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        if not math.isfinite(metrics[-1]["grad_norm"]):
            sys.exit(f"error: gradient not finite at step {global_step}; lower --learning-rate or --beta")
        finished = global_step >= args.total_timesteps
        stopping = accelerator.reduce(torch.tensor(float(stop.is_set()), device=device)).item() > 0

        # Logging
        train_seconds += time.perf_counter() - iteration_started
        recent = [*recent, *reward.tolist()][-100:]
        scalars = {f"losses/{k}": torch.stack([m[k] for m in metrics]).mean() for k in metrics[0]}
        scalars = {name: accelerator.reduce(x, "mean").item() for name, x in scalars.items()}
        if main:
            old_log_prob, reference_log_prob, entropy = (
                x.cpu() for x in (old_log_prob, reference_log_prob, entropy)
            )
            kl = torch.where(sampled, old_log_prob - reference_log_prob, 0).sum(1).mean().item()
            there = sampled.numpy()
            scalars["losses/entropy"] = masked_mean(entropy, sampled).item()
            scalars["losses/explained_variance"] = 1 - np.var(gae[0][there]) / np.var(gae[1][there])
            scalars["losses/advantage_sign_flips"] = torch.tensor(sign_flips or [0.0]).mean().item()
            scalars["losses/advantage_largest"] = abs(gae[0]).max()
            scalars |= {"charts/SPS": global_step / train_seconds, "charts/kl": kl}
            scalars |= {
                "charts/episodic_return": reward.mean(),
                "charts/episodic_length": there.sum(1).mean(),
            }
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, global_step)
            progress_bar.update(min(global_step, args.total_timesteps) - progress_bar.n)
            progress_bar.set_postfix_str(f"reward {reward.mean():.3f}, KL {kl:.1f}")


def load_tokenizer(name: str):
    """The tokenizer of a policy; where it has no token for padding, the end of text is it, as masks tell them apart."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def save_policy(actor_critic: ActorCritic, tokenizer, state: dict, folder: Path) -> None:
    """Writes the trained policy, or its adapter, as a folder that `from_pretrained` loads."""
    temporary = folder.with_name(folder.name + ".tmp")
    weights = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    actor_critic.model("policy").save_pretrained(temporary, state_dict=None if actor_critic.lora else weights)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def check_models(args: Args) -> None:
    """Raises ValueError if models or data sets are not there or do not fit."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.task == "toy":
        positions_ = TOY_POSITIONS
    else:
        load_data(args)
        for name in (args.policy_model, *args.reward_model, *args.eval_reward_model):
            try:
                adapter = is_adapter(name)
                config = (
                    peft.PeftConfig.from_pretrained(name) if adapter else AutoConfig.from_pretrained(name)
                )
                AutoTokenizer.from_pretrained(config.base_model_name_or_path if adapter else name)
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{name}: no model folder here and none on the hub ({reason})") from error
            if name == args.policy_model:
                positions_ = config.max_position_embeddings
                if AutoTokenizer.from_pretrained(name).eos_token_id is None:
                    raise ValueError(
                        f"--policy-model {name}: its tokenizer has no end-of-text token; set one"
                    )
            elif not adapter and args.reward_label >= config.num_labels > 1:
                raise ValueError(
                    f"--reward-label {args.reward_label}: {name} has the labels {config.id2label}"
                )
    if args.prompt_length + args.response_length > positions_:
        raise ValueError(
            f"--prompt-length {args.prompt_length} and --response-length {args.response_length}: "
            f"together more than the {positions_} positions of {args.policy_model}"
        )
    size = args.num_minibatches * world
    if args.batch_size % size:
        raise ValueError(
            f"--batch-size {args.batch_size}: must be a multiple of {size} (minibatches x processes)"
        )
    if args.eval_episodes % world:
        raise ValueError(f"--eval-episodes {args.eval_episodes}: must be a multiple of the {world} processes")


def prepare(args: Args) -> Args:
    """Checks arguments, fills in defaults, makes the folder. Raises ValueError: what is wrong, what to do."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if args.resume:
        if replace(args, resume=None) != Args():
            raise ValueError("--resume goes on under the flags of that run: leave out all others")
        if not Path(args.resume, "args.json").is_file() or Path(args.resume, "summary.json").is_file():
            raise ValueError(f"--resume {args.resume}: not the folder of a run that was interrupted")
        saved = json.loads(Path(args.resume, "args.json").read_text())["args"]
        if saved.keys() != vars(args).keys():
            raise ValueError(f"--resume {args.resume}: a run of another script")
        saved |= {name: tuple(saved[name]) for name in ("reward_model", "eval_reward_model")}
        args = Args(**saved | {"resume": args.resume})
    defaults = TASKS[args.task] | {
        "noise_level": {"none": 0.0, "normal": 0.05, "uniform": 0.05}.get(args.noise, 0.1)
    }
    defaults["alpha"] = 1.0 if args.beta == 0 else 0.5
    if args.task == "toy":
        toy = Path(args.runs_dir) / "toy"
        defaults |= {"policy_model": str(toy / "policy"), "reward_model": (str(toy / "reward"),)}
        defaults |= {"dataset": str(toy / "train.jsonl"), "eval_dataset": str(toy / "test.jsonl")}
    args = replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    tenth = max(1, args.total_timesteps // 10)
    frequencies = ("eval_freq", "checkpoint_freq")
    args = replace(args, **{name: tenth for name in frequencies if getattr(args, name) is None})
    stamp = f"{args.task}__{args.algo}__{args.noise}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    args = replace(args, run_name=args.run_name or stamp)
    for names, what, valid in (
        ("total_timesteps prompt_length response_length eval_episodes", "at least 1", lambda x: x >= 1),
        ("batch_size num_minibatches update_epochs lora_alpha", "at least 1", lambda x: x >= 1),
        ("micro_batch_size", "at least 1", lambda x: x is None or x >= 1),
        ("alpha beta vf_coef ce_coef kl_coef weight_decay", ">= 0", lambda x: 0 <= x < math.inf),
        ("eval_freq checkpoint_freq seed top_k lora_r reward_label", ">= 0", lambda x: 0 <= x < 2**63),
        ("learning_rate adam_eps clip_coef max_grad_norm", "positive", lambda x: 0 < x < math.inf),
        ("gamma gae_lambda noise_level", "in [0, 1]", lambda x: 0 <= x <= 1),
        ("z", "negative, for it stands for log 0", lambda x: -math.inf < x < 0),
    ):
        for name in names.split():
            if not valid(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {what}")
    for wrong, message in (
        (args.noise == "none" and args.noise_level > 0, "--noise-level: choose a kind with --noise"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU here; use cpu"),
        (args.load_in_4bit and not (args.lora_r and torch.cuda.is_available() and util.find_spec("bitsandbytes")),
         "--load-in-4bit: needs --lora-r > 0, an NVIDIA GPU and bitsandbytes (pip install bitsandbytes)"),
        (args.track and not util.find_spec("wandb"), "--track: pip install wandb"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    check_models(args)
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)
    if os.environ.get("RANK", "0") == "0" and not args.resume:
        try:
            run_dir.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{run_dir}: {error.strerror}; try another --run-name or --runs-dir") from error
        save(run_dir / "args.json", json.dumps({"args": vars(args)} | describe_machine(), indent=2))
    return args


def main() -> None:
    first = os.environ.get("RANK", "0") == "0"  # of the processes, the one that speaks
    try:
        args = prepare(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr if first else open(os.devnull, "w"))
        sys.exit(2)
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):  # the first one asks for a checkpoint, a second one kills
        signal.signal(signum, lambda signum, _: (stop.set(), signal.signal(signum, signal.SIG_DFL)))
    run_dir = args.resume or Path(args.runs_dir) / args.run_name
    summary = train(args, stop)
    if not first:
        sys.exit(130 if stop.is_set() else 0)
    if summary is None:
        print(f"interrupted; to go on: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
        sys.exit(130)
    score = (
        "{env_id} {algo}: reward {first_return_mean:.3f} -> {final_return_mean:.3f} ± {final_return_std:.3f}"
    )
    print(f"{score.format(**summary)}, {summary['sps']:.1f} texts/s, {run_dir}")


if __name__ == "__main__":
    main()
