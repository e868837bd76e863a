# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "accelerate==1.15.0",
#   "peft==0.21.2", "rouge-score==0.1.2", "numpy>=2.0", "tyro==1.0.16", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Symmetric PPO (SPPO) for language models: all of RLHF, from the prompts to the learning curve.

    python sppo_rlhf.py                                      # a toy that it makes itself, offline, in minutes
    python sppo_rlhf.py --task imdb                          # GPT-2 writes positive reviews of films
    python sppo_rlhf.py --task imdb --policy-model DIR --reward-model DIR --dataset reviews.jsonl.gz
    accelerate launch sppo_rlhf.py --task tldr               # GPT-J with LoRA summarises, on several GPUs

From "Symmetric Reinforcement Learning Loss for Robust Learning on Diverse Tasks and Model Scales" (Byun &
Perrault, ICML 2025, arXiv 2405.17618). Each token is an action. With p its probability, p_old the same when
it was sampled, r = p / p_old, its advantage A, and Z < 0 in the place of log 0:

    PPO loss          L  = -mean( min(A r, A clip(r, 1 - eps, 1 + eps)) )
    reverse PPO loss  Lr = -mean( m A Z (1 - p) / p_old ),  m = 1 where the gradient of L flows, else 0
    symmetric loss    alpha L + beta Lr

The gradient of Lr is |Z| times that of L, so SPPO's policy gradient is (alpha + beta |Z|) times PPO's: with
the paper's weights 0.9 (imdb) and 0.7 (tldr) times. What changes is its weight against the cross entropy on
reference texts, the value loss where weights are shared, and the limit on the gradient norm.

A judge gives each text one reward, at its end; every token costs `kl_coef` times how much likelier it is than
under the policy's frozen beginnings, the reference. Advantages are normalised over the tokens sampled; the
authors' code counts padding too. Dropout is off. A step is one text: prompt and continuation.
"""

import ctypes
import json
import logging
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
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from types import SimpleNamespace
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file


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
    tokenizer: str | None = None  # folder or hub name of the policy's tokenizer; default: the policy's
    reward_model: tuple[str, ...] | None = None  # folders or hub names of classifiers, or of LoRA adapters
    reward_label: int | None = None  # reward: probability of this label; a model with one output gives that
    reward_aggregate: Literal["mean", "min", "mean-std"] = "mean"  # of several reward models
    dataset: str | None = None  # JSONL file (.gz too), or hub name:split; column text (tldr: prompt, label)
    eval_dataset: str | None = None  # the same for held-out texts; default: a tenth of the dataset
    prompt_length: int | None = None  # tokens of a prompt at most; the first half of a text, its last tokens
    response_length: int | None = None  # tokens of a continuation at most
    top_k: int | None = None  # sample among the likeliest k tokens; 0: among all
    stop_at_eos: bool | None = None  # end of text ends a continuation; else that token is never sampled
    lora_r: int | None = None  # rank of the adapters of policy and critic on one model; 0: no LoRA
    lora_alpha: int = 64  # scale of the adapters, times rank
    load_in_4bit: bool = False  # with LoRA: base model in 4 bits (on a GPU; pip install bitsandbytes)

    batch_size: int | None = None  # texts sampled for an update, in all processes together
    num_minibatches: int = 4  # parts that a batch is split into
    update_epochs: int | None = None  # passes over a batch
    micro_batch_size: int | None = None  # texts in a process at once in an update; default: minibatch
    learning_rate: float | None = None  # AdamW's learning rate, constant
    weight_decay: float | None = None  # AdamW's weight decay
    adam_eps: float = 1e-5  # AdamW's epsilon
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


# The paper's settings for imdb and tldr (there in 4 bits, too); those of the toy are ours.
TASKS = {
    "toy": dict(
        total_timesteps=40 * 112, reward_label=1, prompt_length=16, response_length=32, top_k=0,
        stop_at_eos=True, lora_r=0, batch_size=112, update_epochs=5, learning_rate=5e-4, weight_decay=1e-6,
        gamma=0.99, vf_coef=0.5, ce_coef=0.0, kl_coef=0.005, beta=0.4, eval_greedy=False,
    ),
    "imdb": dict(
        policy_model="rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews", tokenizer="gpt2", reward_label=1,
        reward_model=("lvwerra/distilbert-imdb",), dataset="stanfordnlp/imdb:train",
        eval_dataset="stanfordnlp/imdb:test", total_timesteps=60 * 112, prompt_length=64, response_length=48,
        top_k=50, stop_at_eos=False, lora_r=0, batch_size=112, update_epochs=5, learning_rate=5e-6,
        weight_decay=1e-6, gamma=0.99, vf_coef=0.5, ce_coef=0.1, kl_coef=0.001, beta=0.4, eval_greedy=False,
    ),
    "tldr": dict(
        policy_model="CarperAI/openai_summarize_tldr_sft", reward_model=("jdchang/tldr_rm_adapter",),
        tokenizer="gpt2", reward_label=0, dataset="CarperAI/openai_summarize_tldr:train",
        eval_dataset="CarperAI/openai_summarize_tldr:valid", total_timesteps=200 * 64, prompt_length=500,
        response_length=50, top_k=0, stop_at_eos=True, lora_r=8, batch_size=64, update_epochs=4,
        micro_batch_size=4, learning_rate=5e-6, weight_decay=0.01, gamma=1.0, vf_coef=0.1, ce_coef=0.1,
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
GOOD = ["superb", "moving", "clever", "funny", "brilliant", "charming", "gripping", "warm"]
BAD = ["dull", "clumsy", "weak", "tedious", "awful", "silly", "flat", "noisy"]
TOY_POSITIONS = 64


def toy_review(rng: random.Random) -> str:
    """Five opinions, each as likely good as bad; good is a good word, or "not" and a bad one."""
    opinions = []
    for aspect in rng.sample(ASPECTS, 5):
        negated, words = rng.random() < 0.25, rng.choice((GOOD, BAD))
        opinions.append(f"the {aspect} was {'not ' * negated}{rng.choice(words)}")
    return "{} and {} . {} but {} . {} .".format(*opinions)


def toy_sentiment(text: str) -> float:
    """Share of good opinions in a text, by the grammar's own truth; 0.5 where there is none."""
    words = text.split()
    signs = [(b in GOOD) != (a == "not") for a, b in zip(["", *words], words) if b in GOOD + BAD]
    return sum(signs) / len(signs) if signs else 0.5


def make_toy(folder: Path) -> None:
    """Makes train.jsonl, test.jsonl, policy/ and reward/ in `folder`, unless it is there; from one seed, so
    that runs with different seeds have the same models. A tenth of the judge's labels are wrong."""
    if folder.exists():
        return
    temporary, rng = folder.with_name(f"{folder.name}.{os.getpid()}.tmp"), random.Random(1)
    reviews = [toy_review(rng) for _ in range(4000)]
    datasets.Dataset.from_dict({"text": reviews[:-256]}).to_json(temporary / "train.jsonl")
    datasets.Dataset.from_dict({"text": reviews[-256:]}).to_json(temporary / "test.jsonl")
    texts = [" ".join(text.split()[: rng.randint(1, 45)]) for text in reviews]  # which may stop anywhere
    truth = [toy_sentiment(text) + rng.random() / 100 > 0.505 for text in texts]  # a draw is decided by lot
    labels = [int(is_good != (rng.random() < 0.1)) for is_good in truth]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gpt2, bert = transformers.GPT2Tokenizer(pad_token="<|pad|>"), transformers.BertTokenizer()
        gpt2, bert = (t.train_new_from_iterator(reviews, 400, show_progress=False) for t in (gpt2, bert))
        data = gpt2([text + gpt2.eos_token for text in reviews], padding=True, return_tensors="pt")
        data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
        judge_data = bert(texts, padding=True, return_tensors="pt") | {"labels": torch.tensor(labels)}
        eos, pad = gpt2.eos_token_id, gpt2.pad_token_id
        shape = dict(vocab_size=len(gpt2), n_positions=TOY_POSITIONS, n_embd=64, n_layer=2, n_head=2)
        config = transformers.GPT2Config(**shape, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)
        shape = dict(vocab_size=len(bert), max_position_embeddings=TOY_POSITIONS, hidden_size=64)
        shape |= dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        judge_config = transformers.BertConfig(**shape, id2label={0: "NEGATIVE", 1: "POSITIVE"})
        judge = AutoModelForSequenceClassification.from_config(judge_config)
        for name, steps, learning_rate, tokenizer, batch, model in (
            ("policy", 400, 3e-3, gpt2, data, AutoModelForCausalLM.from_config(config)),
            ("reward", 1200, 1e-3, bert, judge_data, judge),
        ):
            optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
            for _ in tqdm(range(steps), desc=f"making the toy's {name} model", disable=None, leave=False):
                rows = torch.randint(len(reviews) - 256, (32,))
                model(**{key: value[rows] for key, value in batch.items()}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.save_pretrained(temporary / name)
            tokenizer.save_pretrained(temporary / name)
    try:
        temporary.rename(folder)
    except OSError:  # another run was quicker
        shutil.rmtree(temporary)


class ActorCritic(nn.Module):
    """Policy, critic, and the reference, the policy's frozen beginnings: three models; or, with LoRA, one
    with two adapters, which is the reference when both are off.

    All is called through `forward`, since that is where DDP and FSDP bring weights and gradients together.
    `ids` and `mask` (batch, tokens) are texts; the mask is false at padding, which may be on both sides.
    """

    def __init__(self, args: Args, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.lora = dtype, args.lora_r > 0
        options = {"config": AutoConfig.from_pretrained(args.policy_model)}
        if getattr(options["config"], "activation_function", None) == "gelu_new":
            options["config"].activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel
        if device.type == "cpu":  # in bfloat16 an update takes less time than with fused attention
            options["attn_implementation"] = "eager"
        if args.load_in_4bit:
            four_bits = dict(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")
            options["quantization_config"] = transformers.BitsAndBytesConfig(**four_bits)
        options["dtype"] = dtype if self.lora else torch.float32
        load_model = partial(AutoModelForCausalLM.from_pretrained, args.policy_model, **options)
        self.policy = load_model().requires_grad_(not self.lora)
        if self.lora:
            for name in ("policy", "critic"):  # without dropout, which is off anyway
                self.policy.add_adapter(peft.LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha), name)
            self.adapters = [p for name, p in self.policy.named_parameters() if "lora_" in name]
            for parameter in self.adapters:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        else:
            self.critic, self.reference = load_model().base_model, load_model().requires_grad_(False)
        self.value_head = nn.Linear(options["config"].hidden_size, 1)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)
        self._no_split_modules, self.tie_weights = self.policy._no_split_modules, self.policy.tie_weights
        self.eval().to(device)  # dropout stays off

    def model(self, role: str):
        if not self.lora:
            return getattr(self, role)
        self.policy.disable_adapters() if role == "reference" else self.policy.enable_adapters()
        if role != "reference":
            self.policy.set_adapter(role)
        for parameter in self.adapters:  # the one that is off has been frozen
            parameter.requires_grad_(True)
        return self.policy

    def forward(self, method: str, *arguments):
        half = self.dtype == torch.bfloat16
        with torch.autocast(self.value_head.weight.device.type, torch.bfloat16, enabled=half):
            return getattr(self, method)(*arguments)

    def inputs(self, ids, mask, start: int = 0) -> dict:
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # of each token in its text
        return dict(input_ids=ids, attention_mask=mask.long(), position_ids=positions[:, start:])

    def predictors(self, ids, mask) -> dict:
        """Inputs without the last tokens, which predict nothing, and without padding before all texts."""
        start = int(mask.any(0).int().argmax())
        return self.inputs(ids[:, start:-1], mask[:, start:-1]) | {"use_cache": False}

    def logits(self, role: str, inputs: dict, length: int):
        """Logits (batch, length, vocabulary) of the last positions, in float32: bfloat16 has but 8 bits."""
        model = self.model(role)
        hidden = model.base_model(**inputs)
        head, last = model.get_output_embeddings(), hidden.last_hidden_state[:, -length:].float()
        with torch.autocast(last.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return F.linear(last, head.weight.float(), bias), hidden.past_key_values

    def log_prob(self, role: str, ids, mask, length: int):
        """Log-probabilities (batch, length), float32, of the last `length` tokens."""
        logits, _ = self.logits(role, self.predictors(ids, mask), length)
        tokens = ids[:, -length:]
        return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def value(self, ids, mask, length: int):
        """Values (batch, length), float32, of the texts before each of the last `length` tokens."""
        hidden = self.model("critic").base_model(**self.predictors(ids, mask)).last_hidden_state
        return self.value_head(hidden[:, -length:]).squeeze(-1).float()

    def update(self, ids, mask, length: int, *reference):
        """Log-probabilities, values and, given ids and mask of reference texts, those texts' too."""
        log_prob, value = self.log_prob("policy", ids, mask, length), self.value(ids, mask, length)
        return log_prob, value, self.log_prob("policy", *reference, length) if reference else None

    @torch.no_grad()
    def rollout(self, ids, mask, uniform, top_k: int, eos: int, stop_at_eos: bool, pad: int):
        """Goes on with prompts, padded on the left. For each new token `uniform` (batch, length), in [0, 1),
        chooses among the likeliest `top_k`, or all if that is 0, so that equal numbers give equal texts.
        Returns ids and mask (batch, tokens + length) and, for new tokens (batch, length): log-probabilities,
        the same under the reference, and values; all in one pass as in the update, so that ratios begin at 1.
        """
        cache, new, length = None, ids, uniform.shape[1]
        alive = torch.ones_like(ids[:, 0], dtype=torch.bool)
        for chance in uniform.unbind(1):
            inputs = self.inputs(new, mask, -new.shape[1]) | {"past_key_values": cache, "use_cache": True}
            logits, cache = self.logits("policy", inputs, 1)
            logits = logits[:, 0]
            if not stop_at_eos:
                logits[:, eos] = -math.inf
            logits, candidates = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
            cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
            choice = (cumulative <= chance[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
            new = candidates.gather(1, choice).where(alive[:, None], pad)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, alive[:, None]], 1)
            if stop_at_eos:
                alive = alive & (new[:, 0] != eos)
        log_probs = (self.log_prob(role, ids, mask, length) for role in ("policy", "reference"))
        return ids, mask, *log_probs, self.value(ids, mask, length)


class RewardModel:
    """A judge with a tokenizer of its own: text in, score out. `name`: a classifier, or an adapter of one."""

    def __init__(self, name: str, label: int, device: torch.device, dtype: torch.dtype):
        base, auto, options = name, AutoModelForSequenceClassification, {"dtype": dtype}
        if find_adapter_config_file(name):
            base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
            auto, options["num_labels"] = peft.AutoPeftModelForSequenceClassification, 1
        self.model, self.label = auto.from_pretrained(name, **options).to(device).eval(), label
        self.tokenizer = load_tokenizer(base)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Scores (texts,): the probability of the label; of a model with one output, that. Reads the ends."""
        room = getattr(self.model.config, "max_position_embeddings", math.inf)
        length = min(self.tokenizer.model_max_length, room)
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        batch = batch.to(self.model.device)
        logits = self.model(**batch).logits.float()
        return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.label]


def load_tokenizer(name: str):
    """With the end of text as padding where it has no token for that: masks tell them apart."""
    tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not tokenizer("word", add_special_tokens=False)["input_ids"]:  # what comes of a folder without one
        raise ValueError("no tokenizer is there; name another with --tokenizer")
    return tokenizer


def aggregate(scores: torch.Tensor, how: str) -> torch.Tensor:
    """Rewards (texts,): mean, min or mean-std of the scores (texts, judges) that an ensemble gave them."""
    if how == "min":
        return scores.amin(1)
    return scores.mean(1) - (scores.std(1, correction=0) if how == "mean-std" else 0)


def load(args: Args) -> SimpleNamespace:
    """Models, on the device, and data: what rollouts, updates and evaluations need."""
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # as ActorCritic sees to that
    accelerator.wait_for_everyone()  # the first process makes the toy
    keep_freed_memory() if cpu else None
    torch.manual_seed(args.seed)  # of LoRA's first weights
    device = accelerator.device
    fast = torch.cpu.get_capabilities().get("avx512_bf16") if cpu else torch.cuda.is_bf16_supported(False)
    dtype = torch.bfloat16 if args.amp == "auto" and fast else torch.float32
    judge_dtype = dtype if args.lora_r else torch.float32  # large models, as LoRA is for them
    names = (*args.reward_model, *args.eval_reward_model)
    judges = [RewardModel(name, args.reward_label, device, judge_dtype) for name in names]
    model = ActorCritic(args, device, dtype)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = dict(lr=args.learning_rate, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable.values(), **adamw))
    (texts, held_out), tokenizer = load_data(args), load_tokenizer(args.tokenizer or args.policy_model)
    return SimpleNamespace(
        accelerator=accelerator, device=device, model=model, optimizer=optimizer, judges=judges, texts=texts,
        held_out=held_out, tokenizer=tokenizer, trainable=set(trainable),
    )  # fmt: skip


def load_data(args: Args) -> list[datasets.Dataset]:
    """Texts to train on, and `eval_episodes` held-out ones. Raises ValueError: what is wrong, what to do."""
    parts, columns = [], {"prompt", "label"} if args.task == "tldr" else {"text"}
    for name in (args.dataset, args.eval_dataset) if args.eval_dataset else (args.dataset,):
        hub_name, _, split = name.partition(":")
        source = dict(path="json", data_files=name) if Path(name).is_file() else dict(path=hub_name)
        try:
            parts.append(datasets.load_dataset(**source, split=split or "train"))
        except Exception as error:  # a network, a hub or a parser may fail in any way
            raise ValueError(f"{name}: not a JSONL file nor on the hub: {str(error)[:200]!r}") from error
        if missing := columns - set(parts[-1].column_names):
            raise ValueError(f"{name}: lacks {sorted(missing)}; it has {parts[-1].column_names}")
    if not args.eval_dataset:
        parts = list(parts[0].train_test_split(test_size=0.1, seed=0).values())
    for flag, part in zip(("batch_size", "eval_episodes"), parts):
        if (needed := getattr(args, flag)) > len(part):
            raise ValueError(f"--{flag.replace('_', '-')} {needed}: more than the {len(part)} texts for that")
    return [parts[0], parts[1].shuffle(seed=0).select(range(args.eval_episodes))]


def tokenize(rows: datasets.Dataset, tokenizer, args: Args):
    """Texts as people wrote them, ids and mask (texts, tokens): prompts, padded on the left, and in the last
    `response_length` columns how they go on, padded on the right."""
    prompts, references, eos = [], [], tokenizer.eos_token_id
    for row in rows:
        if args.task == "tldr":
            prompt = tokenizer(row["prompt"], verbose=False)["input_ids"]
            reference = tokenizer(row["label"], verbose=False, add_special_tokens=False)["input_ids"]
        else:  # the first half of a review, and how it goes on
            ids = tokenizer(row["text"], verbose=False)["input_ids"]
            prompt, reference = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        prompts.append(prompt[-args.prompt_length :] or [eos])
        references.append([*reference, eos][: args.response_length])
    options = dict(padding="max_length", max_length=args.response_length, return_tensors="pt")
    left = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    right = tokenizer.pad({"input_ids": references}, padding_side="right", **options)
    ids, mask = (torch.cat([left[key], right[key]], 1) for key in ("input_ids", "attention_mask"))
    return ids, mask.bool()


def masked_mean(x, mask):
    """Mean of `x` where `mask` is true, both of any shape."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def symmetric_policy_loss(log_prob, old_log_prob, advantage, mask, clip_coef, alpha, beta, z):
    """alpha * PPO loss + beta * reverse PPO loss, a scalar to minimise (arXiv 2405.17618).

    Tensors (batch, tokens): `log_prob`, `old_log_prob`: log pi of each token, now and when it was sampled;
    `advantage`: its advantage; `mask`: true where there is a token that was sampled, over which the mean is.
    Numbers: `clip_coef`: PPO's epsilon; `alpha`, `beta` >= 0; `z` < 0.

    (1 - p) / p_old is written 1 / p_old - r: the first term has no gradient but may be huge. Judge this loss
    by its gradient, not its value.
    """
    ratio = torch.where(mask, log_prob - old_log_prob, 0.0).exp()
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


def token_advantages(reward, log_prob, reference_log_prob, value, sampled, args: Args):
    """Advantages and returns (texts, tokens), from rewards (texts,) and arrays (texts, tokens) of sampled
    tokens. Each token pays for leaving the reference, the last one of a text earns its reward."""
    last = sampled & ~np.pad(sampled, ((0, 0), (0, 1)))[:, 1:]
    penalty = np.where(sampled, args.kl_coef * (log_prob - reference_log_prob), 0)
    value = np.pad(np.where(sampled, value, 0), ((0, 0), (0, 1)))
    none = np.zeros_like(last)  # every text ends, after as many tokens as there may be, too
    arrays = (last * reward[:, None] - penalty, value, none, last, none)
    advantage, returns = compute_gae(*(x.T for x in arrays), args.gamma, args.gae_lambda)
    return advantage.T, returns.T


def loss_and_metrics(model, args: Args, texts: dict, advantage, share: dict):
    """Loss of some texts of a minibatch, and what to log: means over tokens, times the `share` that they have
    in all tokens of the minibatch. `texts`: tensors (texts, tokens), `advantage` (texts, sampled tokens)."""
    length, old_log_prob, returns = advantage.shape[1], texts["log_prob"], texts["returns"]
    references = [texts[name] for name in ("reference_ids", "reference_mask") if name in texts]
    sampled = texts["mask"][:, -length:]
    log_prob, value, reference_log_prob = model("update", texts["ids"], texts["mask"], length, *references)
    samples = (log_prob, old_log_prob, advantage, sampled, args.clip_coef)
    policy_loss = symmetric_policy_loss(*samples, args.alpha, args.beta, args.z)
    clipped = texts["value"] + (value - texts["value"]).clamp(-args.clip_coef, args.clip_coef)
    errors = torch.maximum((value - returns).square(), (clipped - returns).square())
    value_loss = 0.5 * masked_mean(errors, sampled)
    loss = share["mask"] * (policy_loss + args.vf_coef * value_loss)
    with torch.no_grad():
        ratio = (log_prob - old_log_prob).exp()
        flows = advantage * ratio <= advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        metrics = {
            "policy": symmetric_policy_loss(*samples, 1.0, 0.0, args.z), "value": value_loss.detach(),
            "reverse": masked_mean(torch.where(flows, args.z * advantage * ratio, 0.0), sampled),
            "clip_fraction": masked_mean(((ratio - 1).abs() > args.clip_coef).float(), sampled),
            "approx_kl": masked_mean(ratio - 1 - (log_prob - old_log_prob), sampled),  # joschu.net/blog
        }  # fmt: skip
        metrics = {name: share["mask"] * metric for name, metric in metrics.items()}
    if references:
        cross_entropy = -share["reference_mask"] * masked_mean(reference_log_prob, references[1][:, -length:])
        loss, metrics["cross_entropy"] = loss + args.ce_coef * cross_entropy, cross_entropy.detach()
    return loss, metrics


def accumulate_gradient(setup: SimpleNamespace, args: Args, batch: dict, rows, advantage) -> dict:
    """Adds up the gradient of a minibatch, `rows` of a batch. Each process takes every nth text, some at a
    time; the mean over processes of gradients and metrics is that of the minibatch as a whole."""
    accelerator, world, length = setup.accelerator, setup.accelerator.num_processes, advantage.shape[1]
    masks = [name for name in batch if name.endswith("mask")]
    counts, metrics = {name: batch[name][rows, -length:].sum() for name in masks}, {}
    mine = torch.arange(accelerator.process_index, len(rows), world)
    parts = mine.split(args.micro_batch_size or len(rows))
    for part in parts:
        texts = {name: x[rows[part]] for name, x in batch.items()}
        share = {name: texts[name][:, -length:].sum() * world / counts[name] for name in masks}
        with nullcontext() if part is parts[-1] else accelerator.no_sync(setup.model):
            loss, new = loss_and_metrics(setup.model, args, texts, advantage[part], share)
            accelerator.backward(loss)
        metrics = {name: metrics.get(name, 0) + metric for name, metric in new.items()}
    return metrics


def generate(setup: SimpleNamespace, judges, prompts, mask, uniform, args: Args, top_k: int) -> list:
    """Goes on with prompts (texts, tokens), each process with its part, and has the first `judges` judge the
    texts, None: all. Returns what `rollout` does, and scores (texts, judges), of all processes together."""
    accelerator, tokenizer = setup.accelerator, setup.tokenizer
    size = len(prompts) // accelerator.num_processes
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    ends = (tokenizer.eos_token_id, args.stop_at_eos, tokenizer.pad_token_id)
    parts = []
    for inputs in zip(*(x[mine].split(8 * (args.micro_batch_size or 16)) for x in (prompts, mask, uniform))):
        rollout = setup.model("rollout", *(x.to(setup.device) for x in inputs), top_k, *ends)
        texts = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in zip(*rollout[:2])]
        parts.append((*rollout, torch.stack([judge(texts) for judge in setup.judges[:judges]], 1)))
    return [accelerator.gather(torch.cat(x)) for x in zip(*parts)]


@torch.no_grad()
def evaluate(setup: SimpleNamespace, args: Args, step: int) -> tuple[dict, list[dict]]:
    """A row for progress.csv, and samples. Reward and what it may have cost: the KL divergence from the
    reference in nats a text (an estimate, biased where sampling is filtered), perplexities, and the shares of
    distinct words and pairs of words."""
    T, decode = args.response_length, partial(setup.tokenizer.decode, skip_special_tokens=True)
    real = tokenize(setup.held_out, setup.tokenizer, args)
    prompts, uniform = [x[:, :-T] for x in real], torch.Generator().manual_seed(args.seed + step)
    uniform = torch.rand(args.eval_episodes, T, generator=uniform)
    top_k = 1 if args.eval_greedy else args.top_k
    ids, mask, log_prob, reference, _, scores = generate(setup, None, *prompts, uniform, args, top_k)
    sampled, judging = mask[:, -T:], len(args.reward_model)
    reward = aggregate(scores[:, :judging], args.reward_aggregate)
    parts = zip(*(x.to(setup.device).split(8 * (args.micro_batch_size or 16)) for x in real))
    real_log_prob = torch.cat([setup.model("log_prob", "policy", *part, T) for part in parts])
    row = {
        "step": step, "return_mean": reward.mean().item(), "return_std": reward.std(correction=0).item(),
        "length_mean": sampled.sum(1).float().mean().item(), "episodes": args.eval_episodes,
        "kl": torch.where(sampled, log_prob - reference, 0).sum(1).mean().item(),
        "perplexity": (-masked_mean(reference, sampled)).exp().item(),  # of samples, to the reference
        "perplexity_real": (-masked_mean(real_log_prob, real[1][:, -T:].to(setup.device))).exp().item(),
    }  # fmt: skip
    texts = [decode(x[m]) for x, m in zip(ids[:, -T:], sampled)]
    for n in (1, 2):
        grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)))]
        row[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    for name, score in zip(args.eval_reward_model, scores[:, judging:].mean(0)):
        row[f"judge_{Path(name).name}"] = score.item()
    if args.task == "toy":
        row["sentiment"] = sum(map(toy_sentiment, texts)) / len(texts)
    if args.task == "tldr":
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        rouge = [scorer.score(label, text) for label, text in zip(setup.held_out["label"], texts)]
        row |= {name: sum(r[name].fmeasure for r in rouge) / len(rouge) for name in rouge[0]}
    triples = zip((decode(x[m]) for x, m in zip(*prompts)), texts, reward.tolist())
    columns = ("step", "prompt", "continuation", "reward")
    return row, [dict(zip(columns, (step, *triple))) for _, triple in zip(range(8), triples)]


def write_evaluations(run_dir: Path, writer, evaluations: list[dict], samples: list[dict]) -> None:
    """Writes progress.csv and samples.jsonl, all of them, and the last evaluation to TensorBoard."""
    row, lines = evaluations[-1], [evaluations[-1], *(row.values() for row in evaluations)]
    save(run_dir / "progress.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    save(run_dir / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    for name in row.keys() - {"step", "episodes"}:
        writer.add_scalar(f"eval/{name}", row[name], row["step"])
    table = [list(samples[0]), ["---"] * 4, *(s.values() for s in samples if s["step"] == row["step"])]
    cells = ([" ".join(str(x).replace("|", " ").split()) for x in line] for line in table)
    writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in cells), row["step"])


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


def save_policy(actor_critic: ActorCritic, tokenizer, state: dict, folder: Path) -> None:
    """Writes the trained policy, or its adapter, as a folder that `from_pretrained` loads."""
    temporary = folder.with_name(folder.name + ".tmp")
    weights = {name[7:]: weight for name, weight in state.items() if name.startswith("policy.")}
    actor_critic.model("policy").save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed just then
    temporary.rename(folder)


def train(args: Args, stop: threading.Event) -> dict | None:
    """A run, with arguments from `prepare`. Returns what is in summary.json, or None if `stop` came first."""
    started = time.perf_counter()
    setup = load(args)
    accelerator, model, optimizer, device = setup.accelerator, setup.model, setup.optimizer, setup.device
    main, run_dir = accelerator.is_main_process, Path(args.resume or Path(args.runs_dir) / args.run_name)
    generator = torch.Generator().manual_seed(args.seed)  # of all but weights and noisy rewards
    rng = np.random.default_rng(args.seed)  # noise on rewards
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    global_step, evaluations, samples, recent, train_seconds, wall_seconds = 0, [], [], [], 0.0, 0.0
    if (run_dir / "checkpoint.pt").is_file():
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=False)
        states = {"model_state_dict": state["agent"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer.optimizer, **states, options=options)
        generator.set_state(state["generator"])
        rng.bit_generator.state = state["rng"]
        global_step, evaluations, samples, recent, train_seconds, wall_seconds = state["progress"]
    if args.track and main:
        run = {"project": "symmetric-rl", "id": args.run_name, "name": args.run_name, "config": vars(args)}
        import_module("wandb").init(**run, resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1) if main else None
    total, B, T = args.total_timesteps, args.batch_size, args.response_length
    progress_bar = tqdm(total=total, initial=global_step, unit=" texts", disable=None if main else True)
    finished, stopping, metrics = False, False, []
    while True:
        # Evaluation and checkpoint, at the start and when a multiple of their frequency has been passed
        freqs = (args.eval_freq, args.checkpoint_freq)  # no checkpoint before Adam has a state
        eval_due, save_due = (metrics and freq and global_step % freq < B for freq in freqs)
        if not evaluations or (eval_due or finished) and evaluations[-1]["step"] < global_step:
            row, new_samples = evaluate(setup, args, global_step)
            evaluations, samples = [*evaluations, row], [*samples, *new_samples]
            if main:
                write_evaluations(run_dir, writer, evaluations, samples)
        wall = wall_seconds + time.perf_counter() - started
        if save_due or finished or stopping:
            agent, optimizer_state = get_state_dict(model, optimizer.optimizer, options=options)
            agent = {name: weight for name, weight in agent.items() if name in setup.trainable}
        if finished and main:
            save_policy(accelerator.unwrap_model(model), setup.tokenizer, agent, run_dir / "policy")
            summary = {"script": Path(__file__).name, "algo": args.algo, "env_id": args.task} | vars(args) | {
                "first_return_mean": evaluations[0]["return_mean"], "final_return_mean": row["return_mean"],
                "final_return_std": row["return_std"], "train_return_last100": float(np.mean(recent)),
                "sps": global_step / train_seconds, "wall_s": wall, "finished": True,
            }  # fmt: skip
            save(run_dir / "summary.json", json.dumps(summary, indent=2))
        if main and (save_due or finished or stopping):
            save(run_dir / "checkpoint.pt", {
                "agent": agent, "optimizer": optimizer_state,
                "generator": generator.get_state(), "rng": rng.bit_generator.state,
                "progress": (global_step, evaluations, samples, recent, train_seconds, wall),
            })  # fmt: skip
        if finished or stopping:
            writer.close() if main else None
            return summary if finished and main else None

        # Rollout; what is random is drawn for all processes, of which each does its part
        iteration_started = time.perf_counter()
        rows = torch.randperm(len(setup.texts), generator=generator)[:B]
        real = tokenize(setup.texts.select(rows.tolist()), setup.tokenizer, args)
        prompts, uniform = [x[:, :-T] for x in real], torch.rand(B, T, generator=generator)
        generated = generate(setup, len(args.reward_model), *prompts, uniform, args, args.top_k)
        batch = dict(zip(("ids", "mask", "log_prob", "reference_log_prob", "value"), generated))
        global_step += B

        # Advantages
        reward = aggregate(generated[-1], args.reward_aggregate).cpu().numpy()
        noisy = perturb_reward(reward, args.noise, args.noise_level, rng)
        log_prob, reference, value = (x.cpu().numpy() for x in generated[2:5])
        sampled = batch["mask"][:, -T:].cpu()
        gae = token_advantages(noisy, log_prob, reference, value, sampled.numpy(), args)
        advantage, returns = (torch.as_tensor(x, dtype=torch.float32) for x in gae)
        batch["returns"] = returns.to(device)
        if args.ce_coef:
            batch |= zip(("reference_ids", "reference_mask"), (x.to(device) for x in real))

        # Update
        metrics, sign_flips = [], []
        for _ in range(args.update_epochs):
            order = torch.randperm(B, generator=generator).view(args.num_minibatches, -1)
            mb_adv, mb_sampled = advantage[order], sampled[order]  # (minibatch, text, token)
            if args.noise == "adv_flip":
                mb_adv = perturb_advantage(mb_adv, args.noise_level, generator)
            if args.norm_adv:  # over the tokens that were sampled, of all processes
                count = mb_sampled.sum((1, 2), keepdim=True).clamp(min=2)
                mean = (mb_adv * mb_sampled).sum((1, 2), keepdim=True) / count
                variance = ((mb_adv - mean) * mb_sampled).square().sum((1, 2), keepdim=True) / (count - 1)
                sign_flips.append(masked_mean(((mb_adv > 0) != (mb_adv > mean)).float(), mb_sampled))
                mb_adv = (mb_adv - mean) / (variance.sqrt() + 1e-8)
            for rows, adv in zip(order, mb_adv.to(device)):
                metrics.append(accumulate_gradient(setup, args, batch, rows, adv))
                metrics[-1]["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        if not math.isfinite(metrics[-1]["grad_norm"]):
            sys.exit(f"error: gradient not finite at step {global_step}; lower --learning-rate or --beta")
        finished = global_step >= total
        stopping = accelerator.reduce(torch.tensor(float(stop.is_set()), device=device)).item() > 0
        stop.set() if stopping else None  # which a signal to another process may have asked for
        train_seconds += time.perf_counter() - iteration_started
        recent = [*recent, *reward.tolist()][-100:]

        # Logging
        scalars = {f"losses/{k}": torch.stack([m[k] for m in metrics]).mean() for k in metrics[0]}
        scalars = {name: accelerator.reduce(x, "mean").item() for name, x in scalars.items()}
        there, kl = sampled.numpy(), np.where(sampled, log_prob - reference, 0).sum(1).mean()
        scalars["losses/entropy"] = -log_prob[there].mean()  # an estimate, like the KL
        scalars["losses/explained_variance"] = 1 - np.var(gae[0][there]) / np.var(gae[1][there])
        scalars["losses/advantage_sign_flips"] = torch.tensor(sign_flips or [0.0]).mean().item()
        scalars["losses/advantage_largest"] = abs(gae[0]).max()
        scalars |= {"charts/SPS": global_step / train_seconds, "charts/kl": kl}
        scalars |= {"charts/episodic_return": reward.mean(), "charts/episodic_length": there.sum(1).mean()}
        for name, scalar in scalars.items() if main else ():
            writer.add_scalar(name, scalar, global_step)
        progress_bar.update(min(global_step, total) - progress_bar.n)
        progress_bar.set_postfix_str(f"reward {reward.mean():.3f}, KL {kl:.1f}")


def check_models(args: Args) -> None:
    """Raises ValueError if models or data sets are not there or do not fit."""
    for name in (args.policy_model, *args.reward_model, *args.eval_reward_model):
        try:
            adapter = name != args.policy_model and find_adapter_config_file(name)
            config = (peft.PeftConfig if adapter else AutoConfig).from_pretrained(name)
            own = name == args.policy_model and args.tokenizer or name
            tokenizer = load_tokenizer(config.base_model_name_or_path if adapter else own)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{name}: not to be had, here or from the hub: {str(error)[:200]!r}") from error
        if name == args.policy_model:
            if tokenizer.eos_token is None:
                raise ValueError(f"{name}: its tokenizer has no end-of-text token; give it one")
            room = getattr(config, "max_position_embeddings", math.inf)
            if room < args.prompt_length + args.response_length:
                raise ValueError(f"--prompt-length, --response-length: {name} has but {room} positions")
        elif not adapter and args.reward_label >= config.num_labels > 1:
            raise ValueError(f"--reward-label {args.reward_label}: {name} has {config.id2label}")
    load_data(args)


def prepare(args: Args) -> Args:
    """Checks arguments, fills in defaults, makes the folder. Raises ValueError: what is wrong, what to do."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
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
    settings = TASKS[args.task]
    tenth = max(1, (args.total_timesteps or settings["total_timesteps"]) // 10)
    defaults = settings | {"eval_freq": tenth, "checkpoint_freq": tenth} | {
        "alpha": 1.0 if args.beta == 0 else 0.5,
        "noise_level": {"none": 0.0, "normal": 0.05, "uniform": 0.05}.get(args.noise, 0.1),
    }  # fmt: skip
    toy = Path(args.runs_dir) / "toy"
    if args.task == "toy":
        defaults |= {"policy_model": str(toy / "policy"), "reward_model": (str(toy / "reward"),)}
        defaults |= {"dataset": str(toy / "train.jsonl"), "eval_dataset": str(toy / "test.jsonl")}
    defaults["eval_dataset"] = None if args.dataset else defaults.get("eval_dataset")
    defaults["tokenizer"] = None if args.policy_model else defaults.get("tokenizer")
    args = replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
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
    world, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    size = world * args.num_minibatches
    for wrong, message in (
        (args.batch_size % size, f"--batch-size: not a multiple of {size}, the minibatches of all processes"),
        (args.eval_episodes % world, f"--eval-episodes: not a multiple of {world}, the processes"),
        (args.noise == "none" and args.noise_level > 0, "--noise-level: choose a kind with --noise"),
        (args.device == "cuda" and not cuda, "--device cuda: no GPU here; use cpu"),
        (args.load_in_4bit and not (args.lora_r and cuda and util.find_spec("bitsandbytes")),
         "--load-in-4bit: needs --lora-r > 0, a GPU and bitsandbytes (pip install bitsandbytes)"),
        (args.track and not util.find_spec("wandb"), "--track: pip install wandb"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    if os.environ.get("RANK", "0") != "0":  # one of several processes, which wait for the first
        return args
    run_dir = Path(args.resume or Path(args.runs_dir) / args.run_name)
    try:
        make_toy(toy) if args.task == "toy" else None
        check_models(args)
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    except OSError as error:
        raise ValueError(f"{run_dir}: {error.strerror}; try another --run-name or --runs-dir") from error
    if not args.resume:
        save(run_dir / "args.json", json.dumps({"args": vars(args)} | describe_machine(), indent=2))
    return args


def main() -> None:
    try:
        args = prepare(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):  # the first one asks for a checkpoint, a second one kills
        signal.signal(signum, lambda signum, _: (stop.set(), signal.signal(signum, signal.SIG_DFL)))
    run_dir = args.resume or Path(args.runs_dir) / args.run_name
    if summary := train(args, stop):
        score = "{env_id} {algo}: reward {first_return_mean:.3f} -> {final_return_mean:.3f}"
        print(f"{score.format(**summary)}, {summary['sps']:.1f} texts/s, {run_dir}")
    elif stop.is_set():  # else not the first of several processes
        print(f"interrupted; to go on: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
