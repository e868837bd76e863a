"""sppo_rlhf.py: tokens, masks, losses and whole runs, on models small enough to be made here."""

import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from filelock import FileLock
from helpers import checkpoint, digests_of, needs_gpu, progress, record, weights
from helpers import words as typed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import sppo_rlhf as rlhf
from enjoy import main as play_run

CPU = torch.device("cpu")
# Four updates of four minibatches, evaluated after 0, 16 and 32 texts
SMALL = {"total_timesteps": 32, "batch_size": 8, "num_minibatches": 2, "update_epochs": 2}
SMALL |= {"prompt_length": 8, "response_length": 10, "eval_freq": 16, "eval_episodes": 4}
SMALL |= {"amp": "off", "device": "cpu"}


def text_lengths(texts):  # a reward model, FILE.py:NAME
    return [len(text) for text in texts]


def lucky(texts):
    """Draws from all global generators."""
    return [random.random() + np.random.random() + torch.rand(1).item() for _ in texts]


def twos(texts):
    return [2.0 for _ in texts]


def infinite_scores(texts):
    return [math.inf for _ in texts]


def chat_agreement(prompts, completions, number, **kwargs):
    """1 where messages, as TRL's reward functions get them, belong together, else 0."""
    scores = []
    for prompt, (message,), n in zip(prompts, completions, number):
        same = prompt == [{"role": "user", "content": f"the plot was superb {n}"}]
        scores.append(float(same and message["role"] == "assistant" and bool(message["content"])))
    return scores


def agreement(prompts, completions, completion_ids, number, **kwargs):
    """1 where what TRL's reward functions get belongs together, else 0."""
    tokenizer = AutoTokenizer.from_pretrained("runs/toy/policy")
    scores = []
    for prompt, completion, ids, n in zip(prompts, completions, completion_ids, number):
        ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
        whole = ends == [len(ids) - 1] or (len(ids) == 10 and not ends)
        same = tokenizer.decode(ids, skip_special_tokens=True) == completion
        scores.append(float(same and whole and prompt.endswith(f" {n}")))
    return scores


# Models and runs


@pytest.fixture(scope="session")
def models(toy):
    """Models that have learnt nothing, with the toy's tokenizer: name -> folder. The classifier has
    one output and a tokenizer that pads on the left; the adapter makes a classifier of GPT-J."""
    torch.manual_seed(0)
    folders = {name: toy.parent / name for name in ("gpt2", "gptj", "classifier", "adapter")}
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    dropout = {"embd_pdrop": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.5}
    gpt2 = transformers.GPT2Config(**shape, **dropout)
    gptj = transformers.GPTJConfig(**shape, rotary_dim=4)
    for name, config in (("gpt2", gpt2), ("gptj", gptj)):
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])

    load = AutoModelForSequenceClassification.from_pretrained
    load(folders["gpt2"], num_labels=1).save_pretrained(folders["classifier"])
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folders["classifier"])
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    adapter = peft.get_peft_model(load(folders["gptj"], num_labels=1), config)
    adapter.save_pretrained(folders["adapter"])
    return folders


def work_in(monkeypatch, folder):
    """As if scripts had been started there."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(rlhf, "START", folder)


def folder_of(args):
    return rlhf.run_folder(args, digests_of(rlhf, args))


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """Trains with flags over `SMALL` as a command does, but in a folder of this `name`: begins,
    continues, or finds the run finished. Returns the folder."""
    work_in(monkeypatch, toy.parent.parent)

    def run_(name="run", **flags):
        task = rlhf.TASKS[flags.get("task", "toy")]
        args = task(**SMALL | flags)
        folder = tmp_path / name
        if not (folder / "summary.json").exists():
            setup = rlhf.load(args)
            folder.mkdir(exist_ok=True)
            rlhf.begin_session(args, digests_of(rlhf, args), folder)
            rlhf.train(setup, args, folder)
        return folder

    return run_


def interrupt(run, updates, how=KeyboardInterrupt, **flags):
    """Ends a run like a kill would, in the update after the first `updates`."""
    before = [rlhf.update] * updates

    def update(*args):
        if not before:
            raise KeyboardInterrupt
        return before.pop()(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(how):
        patch.setattr(rlhf, "update", update)
        run(**flags)


@pytest.fixture
def summaries(models, tmp_path):
    """Flags for a run with LoRA on GPT-J's architecture, on posts and summaries made here."""
    rng = random.Random(3)
    posts = [rlhf.toy_review(rng) for _ in range(40)]
    labels = [f" the {rng.choice(rlhf.ASPECTS)} was {rng.choice(rlhf.BAD)} ." for _ in posts]
    data = datasets.Dataset.from_dict({"prompt": posts, "label": labels})
    path = str(tmp_path / "posts.jsonl")
    data.to_json(path)
    flags = {"task": "tldr", "dataset": path, "eval_dataset": path, "learning_rate": 1e-2}
    models = {"policy_model": str(models["gptj"]), "reward_model": (str(models["adapter"]),)}
    return flags | models | {"lora_r": 4}


FAMILIES = "GPT2 GPTJ GPTNeoX OPT Llama Mistral Qwen2 Qwen3 Qwen3Moe Qwen3_5Text Gemma Gemma3Text"
FAMILIES = f"{FAMILIES} Phi3 Olmo2 SmolLM3 Falcon Bloom Mpt Lfm2".split()
SHAPES = {
    "GPTJ": {"rotary_dim": 4},
    "OPT": {"ffn_dim": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "Mistral": {"sliding_window": 4},  # shorter than the texts
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 8},
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention"]},
    "Gemma": {"head_dim": 8},
    "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "Bloom": {"n_head": 2},  # ALiBi, as MPT
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 1},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}


def make_policy(kind, folder, toy, **shape):
    """A policy of the family `kind` that has learnt nothing, with the toy's tokenizer."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = getattr(transformers, f"{kind}Config")(**sizes | SHAPES.get(kind, {}) | shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def call_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sppo_rlhf.py", *map(str, words)])
    rlhf.main()


def read_lines(path):
    return [json.loads(line) for line in path.open()]


def read_samples(folder):
    return read_lines(folder / "samples.jsonl")


def actor_critic(model, lora_r=0, dtype=torch.float32, **flags):
    """An ActorCritic with a value head that is not zero."""
    args = rlhf.Args(policy_model=str(model), lora_r=lora_r, **flags)
    actor = rlhf.ActorCritic(args, CPU, dtype)
    torch.manual_seed(0)
    nn.init.normal_(actor.value_head.weight)
    return actor


def reward_model(name, label=1, dtype=torch.float32):
    return rlhf.classifier_reward(str(name), rlhf.Args(reward_label=label), CPU, dtype)


def function_reward(name, *columns, metrics=None):
    return rlhf.function_reward(name, columns, metrics, CPU)


def ragged(seed=0, lengths=((3, 5), (7, 2), (1, 1), (5, 5)), tokens=5):
    """Prompts, responses, and for each text its tokens without padding and the length of its
    prompt."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt for prompt, _ in lengths)
    ids = torch.ones(len(lengths), width + tokens, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    texts = []
    for row, (prompt, response) in enumerate(lengths):
        text = torch.randint(2, 100, (prompt + response,), generator=generator)
        ids[row, width - prompt : width + response] = text
        mask[row, width - prompt : width + response] = True
        texts.append((text, prompt))
    prompts = rlhf.Tokens(ids[:, :width], mask[:, :width])
    return prompts, rlhf.Tokens(ids[:, width:], mask[:, width:]), texts


def collect(actor, prompts, uniform, top_k, eos, stop_at_eos):
    """The rollout from prompts; padding is 1."""
    length = uniform.shape[1]
    args = rlhf.Args(response_length=length, stop_at_eos=stop_at_eos)
    tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=1)
    tokenizer.batch_decode = lambda ids, **_: [""] * len(ids)
    setup = SimpleNamespace(accelerator=Accelerator(cpu=True), actor_critic=actor)
    setup.tokenizer = tokenizer
    ends = rlhf.end_tokens({}, tokenizer, actor.policy, args)
    setup.ends = torch.tensor(ends, dtype=torch.long)
    data = datasets.Dataset.from_dict({"text": [""] * len(uniform)})
    setup.reward_models = [lambda texts, **_: torch.zeros(len(texts))]
    rollout, scores = rlhf.collect_rollout(setup, args, data, prompts, uniform, top_k)
    assert scores.shape == (len(uniform), 1)
    return rollout


# Tokens


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_changes_nothing_in_any_family(toy, tmp_path, kind, lora_r):
    """Log-probabilities of responses and references, values and samples, against the plain model on
    each text alone; with LoRA, adapters are not zero. No gradient is NaN."""
    make_policy(kind, tmp_path, toy)
    actor = actor_critic(tmp_path, lora_r)
    for name, parameter in actor.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    prompts, responses, texts = ragged()
    _, references, _ = ragged(1, lengths=((3, 2), (7, 5), (1, 4), (5, 1)))
    log_prob, value, real_log_prob = actor(prompts, responses, references)
    log_probs = [log_prob, real_log_prob]
    (sum(log_probs) + value).sum().backward()
    for parameter in actor.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    reference_log_prob = rlhf.token_log_probs(actor.reference, prompts, responses)
    assert torch.allclose(reference_log_prob, log_probs[0]) == (lora_r == 0)

    uniform = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        samples, acting_log_prob = actor.generate(prompts, uniform, 0, torch.tensor([0]), 1, False)
    log_probs_of_samples = actor(prompts, samples)[0]
    torch.testing.assert_close(acting_log_prob, log_probs_of_samples, atol=1e-4, rtol=0)
    samples = samples.ids

    for row, (text, length) in enumerate(texts):
        prompt = text[:length]
        for tokens, log_prob in zip((responses, references), log_probs):
            own = tokens.ids[row][tokens.mask[row]]
            logits = actor.policy(torch.cat([prompt, own])[None]).logits[0, length - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, own[:, None])[:, 0]
            torch.testing.assert_close(log_prob[row, : len(own)], expected, atol=1e-4, rtol=0)
        sampled = prompt
        for t in range(5):
            logits = actor.policy(sampled[None]).logits[:, -1]
            logits[:, 0] = -torch.inf
            token = rlhf.sample_token(logits, uniform[row, t].view(1, 1), 0)[0]
            sampled = torch.cat([sampled, token])
        assert torch.equal(samples[row], sampled[length:])
        hidden = actor.critic(text[None]).last_hidden_state[0, length - 1 : -1]
        expected = actor.value_head(hidden)[:, 0]
        torch.testing.assert_close(value[row, : len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
def test_each_token_gets_its_share_of_the_uniform_numbers(top_k):
    """Of 20,000 from 0 to the last float32 below 1, within two. Those of a token are an interval:
    this inverts a CDF."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    logits[[0, 6]] = -torch.inf
    p = logits.double().exp().numpy()
    if top_k:
        p[np.argsort(p)[:-top_k]] = 0
    uniform = torch.linspace(0, 1 - 2**-24, 20_000)[:, None]
    tokens = rlhf.sample_token(logits.repeat(20_000, 1), uniform, top_k)[:, 0]
    counts = np.bincount(tokens, minlength=7)
    np.testing.assert_allclose(counts, 20_000 * p / p.sum(), atol=2)
    assert (np.diff(tokens) != 0).sum() == np.count_nonzero(p) - 1


@pytest.mark.parametrize("top_k", [0, 1, 5])
def test_a_rollout_samples_token_by_token(models, top_k):
    """Against a slow loop on one text at a time, without a cache."""
    actor = actor_critic(models["gpt2"])
    plain = AutoModelForCausalLM.from_pretrained(models["gpt2"]).eval()
    prompts, _, texts = ragged(lengths=((3, 0), (7, 0), (1, 0)), tokens=0)
    uniform = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    eos = 3
    rollout = collect(actor, prompts, uniform, top_k, eos, False)
    for row, (text, _) in enumerate(texts):
        for t in range(6):
            logits = plain(text[None]).logits[0, -1]
            allowed = logits.clone()
            allowed[[eos, plain.generation_config.eos_token_id]] = -torch.inf
            token = rlhf.sample_token(allowed[None], uniform[row, t].view(1, 1), top_k)[0]
            assert rollout.response.ids[row, t] == token
            expected = logits.log_softmax(-1)[token]  # of all tokens, not only of the likeliest k
            torch.testing.assert_close(rollout.log_prob[row, t, None], expected, atol=1e-5, rtol=0)
            text = torch.cat([text, token])
    assert rollout.response.mask.all()
    torch.testing.assert_close(rollout.reference_log_prob, rollout.log_prob)
    torch.testing.assert_close(rollout.value, actor(prompts, rollout.response)[1])


@pytest.mark.parametrize("others", [None, 7, "list"])
def test_all_end_tokens_of_the_policy_end_a_response(models, others):
    """As in transformers' own `generate`; one is out of the vocabulary. The rest is padding.
    Without --stop-at-eos none of them is sampled."""
    actor = actor_critic(models["gpt2"])
    prompts, _, _ = ragged(lengths=((3, 0), (7, 0)) * 4, tokens=0)
    uniform = torch.rand(8, 20, generator=torch.Generator().manual_seed(1))
    actor.policy.generation_config.eos_token_id = None
    endless = collect(actor, prompts, uniform, 0, 10**6, True).response.ids
    common = endless.flatten().bincount().argsort(descending=True)[:3].tolist()
    eos = common[0]
    ends = {None: [eos], 7: [eos, common[1]], "list": [eos, *common[1:], 10**6]}[others]
    config = {None: None, 7: common[1], "list": ends[1:]}[others]
    actor.policy.generation_config.eos_token_id = config
    rollout = collect(actor, prompts, uniform, 0, eos, True)
    for tokens, mask, free in zip(*rollout.response, endless):
        first = next((i + 1 for i, token in enumerate(free) if token in ends), 20)
        assert mask.sum() == first
        assert torch.equal(tokens[:first], free[:first])
        assert not mask[first:].any() and (tokens[first:] == 1).all()
    unending = collect(actor, prompts, uniform, 0, eos, False).response
    assert unending.mask.all()
    assert not np.isin(unending.ids, ends).any()


def test_texts_cost_what_they_are_long(models, monkeypatch):
    """Those of a part are sampled until the last has ended, and scored without padding; the limit
    changes nothing else. Parts of other lengths are one rollout."""
    actor = actor_critic(models["gpt2"])
    prompts, _, _ = ragged(lengths=((3, 0), (7, 0), (1, 0), (2, 0)), tokens=0)
    uniform = torch.rand(4, 60, generator=torch.Generator().manual_seed(1))
    endless = collect(actor, prompts, uniform[:, :40], 0, 10**6, True).response.ids
    eos, *others = endless[:, 12].tolist()  # a token of each row
    actor.policy.generation_config.eos_token_id = others
    whole = collect(actor, prompts, uniform[:, :40], 0, eos, True)
    longest = whole.response.mask.sum(1).max().item()
    assert longest < 40
    tokens = record(monkeypatch, rlhf, "sample_token")
    scored = record(monkeypatch, rlhf, "token_log_probs")
    longer = collect(actor, prompts, uniform, 0, eos, True)
    assert len(tokens) == longest
    assert {continuation.ids.shape[1] for (_, _, continuation), _ in scored} == {longest}
    assert not longer.response.mask[:, longest:].any()
    rows = SimpleNamespace(split=lambda _: torch.arange(4).split(1))
    monkeypatch.setattr(rlhf, "process_rows", lambda *_: rows)
    one_by_one = collect(actor, prompts, uniform, 0, eos, True)
    for rollout in (longer, one_by_one):
        for part, expected in zip(rollout.response, whole.response):
            assert torch.equal(part[:, :40], expected)
        sampled = whole.response.mask
        for part, expected in zip(rollout[1:], whole[1:]):
            part = part[:, :40][sampled]
            torch.testing.assert_close(part, expected[sampled], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_begins_at_one_however_a_batch_is_split(models, dtype):
    """And without padding. Dropout is off, too, for which the configuration asks."""
    actor = actor_critic(models["gpt2"], dtype=dtype)
    actor.policy.generation_config.eos_token_id = list(range(0, 400, 8))
    prompts, targets, _ = ragged(lengths=((3, 4), (7, 2), (1, 1), (2, 4)))
    uniform = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    rollout = collect(actor, prompts, uniform, 5, 3, True)
    assert len(rollout.response.mask.sum(1).unique()) > 1
    batch = rlhf.Batch(prompts, targets, rollout, rollout.value, rollout.value)
    for rows in ([0, 1, 2, 3], [0, 3], [2]):
        part = rlhf.take(batch, rows)
        old, sampled = part.rollout, part.rollout.response.mask
        whole = (prompts.mask, targets.mask, rollout.response.mask)
        for mask, all_rows in zip((part.prompt.mask, part.target.mask, sampled), whole):
            assert mask.any(0).all() and mask.sum() == all_rows[rows].sum()
        log_prob, value, _ = actor(part.prompt, old.response)
        for new, before in ((log_prob, old.log_prob), (value, old.value)):
            torch.testing.assert_close(new[sampled], before[sampled], atol=1e-5, rtol=0)


def test_in_bfloat16_the_last_layers_are_in_float32(models):
    actor = actor_critic(models["gpt2"], dtype=torch.bfloat16)
    texts = ragged()[:2]
    log_prob, value, _ = actor(*texts)
    with actor.autocast():
        policy_states = rlhf.predicting_states(actor.policy.get_decoder(), *texts)
        critic_states = rlhf.predicting_states(actor.critic, *texts)
    expected = actor.policy.lm_head(policy_states.float()).log_softmax(-1)
    expected = expected.gather(-1, texts[1].ids[..., None])[..., 0]
    torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=0)
    assert not torch.equal(log_prob, actor_critic(models["gpt2"])(*texts)[0])
    torch.testing.assert_close(value, actor.value_head(critic_states.float())[..., 0])


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Falcon", "Gemma3Text"])
def test_checkpointing_changes_no_gradient(toy, tmp_path, kind, lora_r):
    """Nor does dropout, be it a module (GPT-2) or a number. Layers are computed once more, those of
    policy and critic with their own adapters, which are not zero."""
    dropouts = (
        "embd_pdrop attn_pdrop resid_pdrop dropout attention_dropout hidden_dropout layerdrop"
    )
    make_policy(kind, tmp_path, toy, **dict.fromkeys(dropouts.split(), 0.5))
    texts = ragged()[:2]
    gradients, calls = [], []
    for flag in (False, True):
        actor = actor_critic(tmp_path, lora_r, gradient_checkpointing=flag)
        torch.manual_seed(0)
        for name, parameter in actor.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        layers = next(x for x in actor.critic.modules() if isinstance(x, nn.ModuleList))
        part = next(layers[0].children())
        part.register_forward_pre_hook(lambda *_, flag=flag: calls.append(flag))
        log_prob, value, _ = actor.train(flag)(*texts)
        (log_prob.sum() + value.square().sum()).backward()
        gradients.append({name: p.grad for name, p in actor.named_parameters() if p.requires_grad})
    assert calls == [False, True, True]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_of_a_multimodal_model_the_language_part_learns(toy, run, tmp_path, lora_r):
    """All that is trained has a gradient, without which DDP stops. The rest is saved as it was."""
    make_policy("Gemma3Text", tmp_path / "text", toy)
    text = transformers.AutoConfig.from_pretrained(tmp_path / "text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    parts = {"text_config": text, "vision_config": vision}
    config = transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "both")
    AutoTokenizer.from_pretrained(toy / "policy").save_pretrained(tmp_path / "both")
    actor = actor_critic(tmp_path / "both", lora_r)
    log_prob, value, _ = actor(*ragged()[:2])
    (log_prob.sum() + value.sum()).backward()
    learning = {name for name, p in actor.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in actor.named_parameters() if p.grad is not None}
    assert len(learning) > 10 and not any("vision" in name for name in learning)
    folder = run(policy_model=str(tmp_path / "both"), lora_r=lora_r, total_timesteps=8)
    if not lora_r:
        saved = AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict()
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "both").state_dict()
        assert all(torch.equal(saved[name], before[name]) for name in saved if "vision" in name)


def test_lora_roles_are_adapters_on_one_frozen_model(models):
    actor = actor_critic(models["gptj"], lora_r=2)
    plain = actor_critic(models["gptj"])
    texts = ragged()[:2]
    for name, parameter in actor.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "value_head" in name)
        if name.startswith("policy.") and "lora_B" in name:
            nn.init.normal_(parameter)
    log_prob, value, _ = actor(*texts)
    initial, plain_value, _ = plain(*texts)
    torch.testing.assert_close(rlhf.token_log_probs(actor.reference, *texts), initial)
    torch.testing.assert_close(value, plain_value)
    assert (log_prob - initial).abs().max() > 0.1

    silent = actor_critic(models["gptj"], lora_r=2, lora_alpha=0)
    silent.load_state_dict(actor.state_dict())
    torch.testing.assert_close(silent(*texts)[0], initial)

    log_prob, value, _ = actor(*texts)
    for loss, expected in ((log_prob, {"policy"}), (value, {"critic", "value_head"})):
        actor.zero_grad()
        loss.sum().backward()
        learning = {name for name, p in actor.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in learning} == expected

    for parameter in actor_critic(models["gptj"], 2, torch.bfloat16).parameters():
        assert (parameter.dtype == torch.float32) == parameter.requires_grad


def test_models_that_do_not_fit_are_refused_before_a_folder_is_made(
    toy, models, tmp_path, monkeypatch
):
    """A language model has no head for scores, and a classifier none for tokens. An adapter may
    have other names. What a library refuses, it says by itself."""
    work_in(monkeypatch, toy.parent.parent)
    adapter = tmp_path / "adapter"
    shutil.copytree(models["adapter"], adapter)
    file = adapter / "adapter_model.safetensors"
    saved = safetensors.torch.load_file(file)
    renamed = {name.replace("lora_A", "lora_C"): weight for name, weight in saved.items()}
    safetensors.torch.save_file(renamed, file)
    policy, reward = f"{rlhf.TOY}/policy", f"{rlhf.TOY}/reward"
    refusals = []
    for kind in ("T5", "Llava"):
        config = getattr(transformers, f"{kind}Config")()
        config.save_pretrained(tmp_path / kind)
        words = ["--policy-model", tmp_path / kind, "--tokenizer", policy]
        refusals.append((words, f"Unrecognized configuration class.*{kind}Config"))
    (tmp_path / "custom").mkdir()
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(own))
    custom = [tmp_path / "custom", "--tokenizer", policy]
    refusals += [
        (["--policy-model", *custom], "custom contains custom code"),
        (["--reward-model", *custom], "custom contains custom code"),
        (["--reward-model", policy], "policy lacks 1 weights, such as score.weight$"),
        (["--policy-model", reward, "--tokenizer", policy], r"reward lacks \d+ weights, such as"),
        (["--device", "cuda"], "there is no GPU$"),
        (["--prompt-length", "40"], "has 64 positions for up to 72 tokens$"),
        (["--policy-model", "./none/policy"], "'./none/policy'"),
        (["--reward-model", "./none/reward"], "'./none/reward'"),
        (["--reward-model", "none.py:own"], "No such file.*none.py"),
        (["--chat-template-kwargs", '{"brief": true}'], "no chat template with 'brief' is used$"),
        (["--dataset", "./none/texts.jsonl"], "none/texts.jsonl"),
        (["--reward-model", reward, adapter], "adapter lacks 4 weights, such as .*lora_A.weight$"),
    ]
    for label in (-1, 2):
        words = ["--reward-label", label]
        refusals.append((words, f"reward: --reward-label must be one of {{0.*, not {label}$"))
    for words, message in refusals:
        with pytest.raises((SystemExit, OSError, ValueError), match=message):
            call_main(monkeypatch, *words, "--runs-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    make_policy("GPT2", tmp_path / "exact", toy)
    tokenizer.add_tokens("<image>")  # as Gemma 3's, of which the text models have no embedding
    tokenizer.save_pretrained(tmp_path / "exact")
    words = ["--eval-episodes", 4, "--total-timesteps", 1]
    words += ["--policy-model", tmp_path / "exact", "--batch-size", 4]
    call_main(monkeypatch, *words, "--runs-dir", tmp_path / "runs")


@pytest.mark.parametrize("kind", ["Bert", "T5", "GPT2", "DebertaV2"])
def test_the_tokenizer_of_a_folder_without_one_is_refused(toy, models, tmp_path, monkeypatch, kind):
    """AutoTokenizer makes one, with which every text is [UNK], "▁ <unk> ▁ <unk>", or nothing. Of a
    policy and of each reward model, before a folder is made."""
    work_in(monkeypatch, toy.parent.parent)
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    shutil.copytree(models["gpt2"], policy, ignore=shutil.ignore_patterns("tokenizer*"))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, pad_token_id=0, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(reward)
    refusals = [["--reward-model", f"{rlhf.TOY}/reward", reward]]
    if kind == "GPT2":
        refusals += [["--policy-model", policy]]
    for words in refusals:
        with pytest.raises(SystemExit, match=f"^error: {words[-1]} has no tokenizer"):
            call_main(monkeypatch, *words, "--runs-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("kind", "flags"), {
    "Granite": {"logits_scaling": 8},
    "Cohere": {"logit_scale": 0.1},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 1.0},
    "Mamba": {"state_size": 4},
}.items())  # fmt: skip
def test_policies_with_other_logits_or_without_a_cache_are_refused(run, toy, tmp_path, kind, flags):
    make_policy(kind, tmp_path / kind, toy, **flags)
    with pytest.raises(SystemExit, match=f"^error: .*{kind} scales or caps its logits, or does"):
        run(policy_model=str(tmp_path / kind))


def test_a_text_is_a_prompt_and_its_continuation_a_post_one_and_its_summary(toy):
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    eos = tokenizer.eos_token_id
    texts = ["the plot was superb and the cast was dull . i loved it .", "the", ""]
    args = rlhf.Args(prompt_length=4, response_length=5)
    prompts, completions = rlhf.tokenize({"text": texts}, tokenizer, args)
    long, short, _ = tokenizer(texts)["input_ids"]
    half = len(long) // 2
    assert prompts.ids[0].tolist() == long[half - 4 : half]
    assert completions.ids[0].tolist() == long[half : half + 5]
    text = rlhf.join(prompts, completions)
    assert text.ids[1][text.mask[1]].tolist() == [eos, *short, eos]
    assert text.ids[2][text.mask[2]].tolist() == [eos, eos]
    assert text.mask[1].tolist() == [False] * 3 + [True] * 3 + [False] * 3

    rows = {"prompt": ["the plot was dull"], "label": [" was not dull"]}
    args = rlhf.Args(prompt_length=3, response_length=9)
    text = rlhf.join(*rlhf.tokenize(rows, tokenizer, args))
    prompt, label = (tokenizer(texts[0])["input_ids"] for texts in rows.values())
    assert text.ids[text.mask].tolist() == [*prompt[-3:], *label, eos]


def test_a_start_token_stays_and_stays_the_only_one(toy):
    """Of tokenizers like Llama's. A chat template may have written it into the text."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    plain = tokenizer("the plot was superb and the cast was dull .")["input_ids"]
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    text = "the plot was superb and the cast was dull ."
    prompts = [text, f"<s>{text}", "the", "<s>the"]
    args = rlhf.Args(prompt_length=4, response_length=30)
    rows = {"prompt": prompts, "label": [text] * 4}
    prompt, completion = rlhf.tokenize(rows, tokenizer, args)
    kept = [ids[mask].tolist() for ids, mask in zip(*prompt)]
    assert kept == [[bos, *plain[-3:]]] * 2 + [[bos, plain[0]]] * 2
    assert bos not in completion.ids

    texts = rlhf.tokenize({"text": prompts[:2]}, tokenizer, replace(args, prompt_length=40))
    for ids, mask in zip(*rlhf.join(*texts)):
        assert ids[mask].tolist() == [bos, *plain, tokenizer.eos_token_id]

    tokenizer = AutoTokenizer.from_pretrained(toy / "policy", bos_token="<s>")  # writes none
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = {"prompt": [[{"role": "user", "content": text}]]}
    assert rlhf.tokenize(rows, tokenizer, args)[0].ids.tolist() == [[bos, *plain[-3:]]]


def test_a_tokenizer_may_know_digits_only():
    """And leave out all else. Its texts have no start."""
    digits = {str(digit): digit for digit in range(10)} | {"<e>": 10}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(digits, []))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<e>", pad_token="<e>"
    )
    prompt, _ = rlhf.tokenize({"prompt": ["1+2"]}, tokenizer, rlhf.Args())
    assert prompt.ids.tolist() == [[1, 2]]


@pytest.mark.parametrize("template", ["$A <|e|>", "<|e|> $A <|e|>", "<|e|> $A"])
def test_an_end_token_that_the_tokenizer_appends_does_not_end_a_prompt(toy, template):
    """One that the text itself has, as after a turn of a chat, stays, and so does a start token
    that is the same."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    end = tokenizer.eos_token_id
    text = "the plot was superb and the cast was dull ."
    plain = tokenizer(text)["input_ids"]
    start = [end] if template.startswith("<") else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|e|>", end)]
    )
    appended = [end] if template.endswith(">") else []
    assert tokenizer(text)["input_ids"] == [*start, *plain, *appended]
    args = rlhf.Args(prompt_length=40, response_length=40)
    rows = {"prompt": [text, f"{text}<|endoftext|>", ""], "label": [text] * 3}
    prompt, completion = rlhf.tokenize(rows, tokenizer, args)
    kept = [ids[mask].tolist() for ids, mask in zip(*prompt)]
    assert kept == [[*start, *plain], [*start, *plain, end], [end]]
    assert completion.ids[completion.mask].tolist() == [*plain, end] * 3
    (ids,), (mask,) = rlhf.join(*rlhf.tokenize({"text": [text]}, tokenizer, args))
    assert ids[mask].tolist() == [*start, *plain, end]


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if brief %}so{% endif %}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(toy):
    """A turn ends with a token that is not the end of text."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    turns = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.chat_template = CHATML
    return tokenizer


CHAT = [{"role": "user", "content": "the plot"}]


@pytest.mark.parametrize("stop", [True, False])
def test_a_turn_ends_as_the_template_says(chat_tokenizer, stop):
    """Responses, also of a base model that names the end of text only, and references. A template
    that closes no turn leaves it at the end of text."""
    args = rlhf.Args(response_length=9)
    end = chat_tokenizer.convert_tokens_to_ids("<|end|>")
    eos = chat_tokenizer.eos_token_id
    if not stop:
        chat_tokenizer.chat_template = CHATML.replace("<|end|>", "")
    rows = {"prompt": [CHAT], "label": [" was dull"]}
    _, references = rlhf.tokenize(rows, chat_tokenizer, args)
    label = chat_tokenizer(" was dull")["input_ids"]
    assert references.ids[references.mask].tolist() == [*label, end if stop else eos]
    base = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))
    base.get_output_embeddings = lambda: nn.Linear(1, len(chat_tokenizer))
    assert set(rlhf.end_tokens(rows, chat_tokenizer, base, args)) == {eos, end if stop else eos}
    assert set(rlhf.end_tokens({"prompt": ["a"]}, chat_tokenizer, base, args)) == {eos}


@pytest.mark.parametrize(("messages", "flags", "text"), [
    ([], {}, "<|user|>the plot<|end|>\n<|assistant|>"),
    ([{"role": "assistant", "content": "it was"}], {},
     "<|user|>the plot<|end|>\n<|assistant|>it was"),
    ([], {"chat_template_kwargs": '{"brief": true}'},
     "<|user|>the plot<|end|>\n<|assistant|>so"),
    ([], {"chat_template_kwargs": '{"brief": false}'},
     "<|user|>the plot<|end|>\n<|assistant|>"),
])  # fmt: skip
def test_a_turn_that_was_begun_is_continued(chat_tokenizer, messages, flags, text):
    """A template's own variables are flags."""
    args = rlhf.Args(prompt_length=40, **flags)
    prompt, _ = rlhf.tokenize({"prompt": [CHAT + messages]}, chat_tokenizer, args)
    assert chat_tokenizer.decode(prompt.ids[0]) == text


def test_a_completion_has_the_turn_that_was_begun(chat_tokenizer):
    """As in TRL, so that classifiers read one turn of it."""
    begun = [*CHAT, {"role": "assistant", "content": "it was"}]
    rows = {"prompt": [begun, CHAT]}
    args = rlhf.Args(prompt_length=40)
    prompt, _ = rlhf.tokenize(rows, chat_tokenizer, args)
    ids = torch.tensor([chat_tokenizer(" dull")["input_ids"]] * 2)
    response = rlhf.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    inputs = rlhf.reward_inputs(rows, chat_tokenizer, prompt, response)
    assert inputs["prompts"] == [CHAT, CHAT]
    contents = [message["content"] for (message,) in inputs["completions"]]
    assert contents == ["it was dull", " dull"]
    assert inputs["completion_ids"] == ids.tolist()


# Reward models


@pytest.mark.parametrize("multi_label", [False, True])
def test_scores_are_probabilities_of_a_label(toy, tmp_path, multi_label):
    """Against transformers' own pipeline, with the model's own tokenizer."""
    folder = tmp_path / "reward"
    shutil.copytree(toy / "reward", folder)
    if multi_label:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.problem_type = "multi_label_classification"
        config.save_pretrained(folder)
    texts = ["the plot was superb and the cast was warm .", "the cast was awful .", ""]
    classify = transformers.pipeline("text-classification", str(folder), top_k=None)
    expected = [{score["label"]: score["score"] for score in scores} for scores in classify(texts)]
    for label, name in enumerate(("LABEL_0", "LABEL_1")):
        scores = reward_model(folder, label)(texts).tolist()
        assert scores == pytest.approx([score[name] for score in expected], abs=1e-5)


@pytest.mark.parametrize("name", ["classifier", "adapter"])
def test_a_single_output_is_the_score(models, name):
    """Also of an adapter, which is put on its base; and whatever other texts there are, although
    GPT-2 has learnt positions, which padding on the left would shift."""
    base = models["gptj" if name == "adapter" else "classifier"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if name == "adapter":
        model = peft.PeftModel.from_pretrained(model, models["adapter"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ["the plot was superb .", "the plot was superb but the cast was dull ."]
    scores = reward_model(models[name])(texts)
    for text, score in zip(texts, scores):
        expected = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0, 0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-5)
    rounded = reward_model(models[name], dtype=torch.bfloat16)
    torch.testing.assert_close(rounded(texts), scores, rtol=0.1, atol=0.1)


def test_a_classifier_reads_a_text_as_if_it_were_alone(toy, tmp_path):
    """Decoders are read at the last token, where nothing says what padding is: also where the text
    closes with the token that pads."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy", pad_token=None)
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "num_labels": 1}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(transformers.LlamaConfig(**shape)).eval()
    model.save_pretrained(tmp_path)
    texts = ["the plot was superb .<|endoftext|>", "the plot<|endoftext|>", "the cast was dull"]
    alone = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
    torch.testing.assert_close(reward_model(tmp_path)(texts), torch.stack(alone))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("labels", [2, 3])
def test_of_more_than_two_labels_one_is_asked_for(toy, tmp_path, models, labels, adapter):
    """The reward of two is that of label 1. An adapter has as many as its head has rows."""
    load = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(0)
    model = load(models["gptj"], num_labels=labels)
    folder = tmp_path / "reward"
    if adapter:
        config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    else:
        AutoTokenizer.from_pretrained(models["gptj"]).save_pretrained(folder)
    model.save_pretrained(folder)
    text = "the plot was dull"
    ids = AutoTokenizer.from_pretrained(models["gptj"])(text, return_tensors="pt")
    expected = model.eval()(**ids).logits.softmax(-1)[0]
    for label in range(labels):
        assert reward_model(folder, label)([text]).item() == pytest.approx(expected[label].item())
    if labels == 2:
        assert reward_model(folder, None)([text]).item() == pytest.approx(expected[1].item())
    else:
        with pytest.raises(SystemExit, match="--reward-label must be one of {0: .*, not None$"):
            reward_model(folder, None)


def test_a_text_that_is_too_long_loses_its_beginning(toy):
    """The toy's BERT has 64 positions, two of them for special tokens."""
    words = ["dull" if i % 7 else "superb" for i in range(200)]
    score = reward_model(toy / "reward")
    end = score([" ".join(words[-62:])])
    assert torch.equal(score([" ".join(words)]), end)
    assert not torch.equal(score([" ".join(words[:62])]), end)


def test_of_several_regressions_the_labels_is_the_score(toy, tmp_path):
    folder = tmp_path / "reward"
    load = AutoModelForSequenceClassification.from_pretrained
    shutil.copytree(toy / "reward", folder)
    load(toy / "reward", problem_type="regression").save_pretrained(folder)
    text = "the plot was superb ."
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    expected = load(folder).eval()(**ids).logits[0]
    scores = [reward_model(folder, label)([text]).item() for label in (0, 1)]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_classifier_reads_messages_in_its_own_template(toy, tmp_path):
    """With the special tokens of the template only. Without one it reads the text."""
    folder = tmp_path / "reward"
    shutil.copytree(toy / "reward", folder)
    inputs = {"texts": ["user\nthe plot"], "prompts": [[{"role": "user", "content": "the plot"}]]}
    inputs["completions"] = [[{"role": "assistant", "content": "was dull"}]]
    plain = reward_model(folder)
    assert torch.equal(plain(**inputs), plain(["user\nthe plot"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "[CLS]{% for m in messages %} {{ m.content }}{% endfor %}[SEP]"
    tokenizer.save_pretrained(folder)
    assert torch.equal(reward_model(folder)(**inputs), plain(["the plot was dull"]))


def test_a_function_gets_what_trl_gives_it(run, tmp_path):
    """Of its own row, in training and in evaluations, whatever the split."""
    rows = {"prompt": [f"the plot was superb {i}" for i in range(40)], "number": list(range(40))}
    data = datasets.Dataset.from_dict(rows | {"label": [" and moving"] * 40})
    path = str(tmp_path / "data.jsonl")
    data.to_json(path)
    function = f"{__file__}:agreement"
    flags = {"reward_model": (function,), "micro_batch_size": 1, "batch_size": 16}
    folder = run(dataset=path, prompt_length=20, **flags)
    assert {row["return_mean"] for row in progress(folder)} == {1}
    assert progress(folder)[-1]["charts/episodic_return"] == 1


def test_a_prompt_is_a_chat_or_alone(toy, tmp_path, monkeypatch):
    """Messages are read in the policy's chat template, as in TRL. Without labels there are no
    references."""
    policy = tmp_path / "policy"
    shutil.copytree(toy / "policy", policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = (
        "{% for m in messages %}the {{ m.role }} was {{ m.content }} .{% endfor %}"
        "{% if add_generation_prompt %} but the cast was{% endif %}"
    )
    tokenizer.save_pretrained(policy)
    texts = [f"the plot was superb {i}" for i in range(40)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    args = rlhf.Args(prompt_length=30, response_length=5)
    prompt, references = rlhf.tokenize({"prompt": chats}, tokenizer, args)
    for text, ids, mask in zip(texts, *prompt):
        written = f"the user was {text} . but the cast was"
        assert ids[mask].tolist() == tokenizer(written)["input_ids"]
    assert not references.mask.any()

    path = str(tmp_path / "data.jsonl")
    datasets.Dataset.from_dict({"prompt": chats, "number": range(40)}).to_json(path)
    words = ["--policy-model", policy, "--dataset", path, "--prompt-length", 30]
    words += ["--reward-model", f"{__file__}:chat_agreement", "--runs-dir", tmp_path / "runs"]
    words += ["--total-timesteps", 16, "--batch-size", 16, "--eval-episodes", 4]
    call_main(monkeypatch, *words)
    (folder,) = (tmp_path / "runs").iterdir()
    row = progress(folder)[-1]
    assert (row["return_mean"], row["charts/episodic_return"]) == (1, 1)
    assert "perplexity_real" not in row
    prompt = read_samples(folder)[0]["prompt"]
    assert re.fullmatch(r"the user was the plot was superb \d+ \. but the cast was", prompt)


def test_a_reward_function_is_imported_with_its_neighbours(tmp_path):
    """It gives one score for each text."""
    (tmp_path / "own_sibling.py").write_text("length = len")
    own = (
        "import own_sibling\ndef own(texts): return [own_sibling.length(text) for text in texts]\n"
    )
    (tmp_path / "own_rewards.py").write_text(own + "def too_few(texts): return [0.5]")
    file = f"{tmp_path}/own_rewards.py"
    for _ in range(2):
        assert function_reward(f"{file}:own")(texts=["ab", "abc"]).tolist() == [2, 3]
    with pytest.raises(AttributeError, match="no attribute 'none'$"):
        function_reward(f"{file}:none")
    with pytest.raises(SystemExit, match="^error: .*:too_few must return a list of 2 scores"):
        function_reward(f"{file}:too_few")(texts=["ab", "abc"])


@pytest.mark.parametrize("file", ["reward.v2.py", "json.py", "my-reward.py"])
def test_a_file_of_any_name_has_reward_functions(tmp_path, file):
    """Also one of a name that another folder's or an installed module has, and each its own."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        function = f"def own(texts): return [{folder!r} == 'b' for _ in texts]"
        (tmp_path / folder / file).write_text(function)
    first, second = (function_reward(f"{tmp_path}/{folder}/{file}:own") for folder in "ab")
    for _ in range(2):
        assert (first(texts=["x"]).item(), second(texts=["x"]).item()) == (0, 1)
    assert json.loads("1") == 1


OWN_ARGUMENTS = """
def named(completions, answer): return [float(answer[0] == 3)]
def with_default(texts, answer=None, other=5): return [float(answer[0] == 3 and other == 5)]
def whatever(**kwargs): return [float(kwargs["answer"][0] == 3 and "texts" in kwargs)]
def logging(texts, log_metric):
    log_metric("words", len(texts[0].split()))
    return [1.0]
def unknown(completions, solution, **kwargs): return [0.0]
def unknown_hook(completions, log_extra): return [0.0]
"""


def test_a_function_gets_the_arguments_that_it_names(tmp_path):
    """It may log metrics by TRL's hook. One that is not there is named before any work."""
    (tmp_path / "own_arguments.py").write_text(OWN_ARGUMENTS)
    file = f"{tmp_path}/own_arguments.py"
    inputs = {"texts": ["ab cd"], "prompts": ["ab"], "completions": [" cd"]}
    metrics = {}
    for name in ("named", "with_default", "whatever", "logging"):
        function = function_reward(f"{file}:{name}", "answer", metrics=metrics)
        assert function(answer=[3], **inputs).tolist() == [1]
    assert metrics == {"words": [2.0]}
    for name, missing in {"unknown": "solution", "unknown_hook": "log_extra"}.items():
        with pytest.raises(SystemExit, match=f":{name}: missing .*'{missing}'; there are .*answer"):
            function_reward(f"{file}:{name}", "answer")


def test_trls_own_reward_functions_run(tmp_path):
    own = "from trl.rewards import get_repetition_penalty_reward\n"
    (tmp_path / "trls.py").write_text(f"{own}penalty = get_repetition_penalty_reward(2)")
    reward = function_reward(f"{tmp_path}/trls.py:penalty", "label")
    inputs = dict.fromkeys(["texts", "prompts", "completions", "label"], ["", ""])
    assert reward(completion_ids=[[1, 2, 3, 4], [5] * 5], **inputs).tolist() == [0, -0.75]


WORD_REWARDS = """
from functools import partial

def share(texts, word, log_metric):
    log_metric("words", len(texts[0].split()))
    shares = [text.split().count(word) / len(text.split()) for text in texts]
    texts.clear()
    return shares

dull, superb = partial(share, word="dull"), partial(share, word="superb")
count = lambda texts: [len(text.split()) for text in texts]
"""


@pytest.mark.parametrize("weights", [(), (2.0, 0.0, -0.5)])
def test_the_reward_is_the_weighted_sum_or_else_the_mean(run, tmp_path, monkeypatch, weights):
    """In training and in evaluations. Each is logged under its own name, and gets lists that no
    other changes."""
    (tmp_path / "word_rewards.py").write_text(WORD_REWARDS)
    names = tuple(f"{tmp_path}/word_rewards.py:{name}" for name in ("dull", "superb", "count"))
    rewards = record(monkeypatch, rlhf, "token_advantages")
    flags = {"total_timesteps": 8, "learning_rate": 0.0, "reward_model": names}
    folder = run(reward_weights=weights, eval_episodes=8, **flags)
    row = progress(folder)[-1]
    scores = [row[f"rewards/{name}"] for name in names]
    expected = np.dot(scores, weights or (1 / 3, 1 / 3, 1 / 3))
    assert row["charts/episodic_return"] == pytest.approx(expected, rel=1e-5)
    assert rewards[0][0][0].mean().item() == pytest.approx(expected, rel=1e-5)
    assert row["rewards/words"] == int(row["rewards/words"]) > 5
    samples = read_samples(folder)[-8:]
    words = [(x["prompt"] + x["response"]).split() for x in samples]
    for sample, text in zip(samples, words):
        found = [text.count("dull") / len(text), text.count("superb") / len(text), len(text)]
        reward = np.dot(found, weights or (1 / 3, 1 / 3, 1 / 3))
        assert sample["reward"] == pytest.approx(reward, abs=1e-5)


# Losses and advantages


def random_tokens(batch=6, tokens=5):
    """New and old log-probabilities, advantages and a mask."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(batch, tokens, generator=generator, dtype=torch.float64)
    advantage = torch.randn(batch, tokens, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    return new.requires_grad_(), old, advantage, torch.arange(tokens) < lengths


def test_the_losses_are_the_papers_up_to_a_constant():
    """Means over sampled tokens; the constant is the part of Lr without p."""
    new, old, advantage, mask = random_tokens()
    z = -2.0
    losses = []
    reverse_losses = []
    for log_p, log_p_old, a in zip(*(x[mask].tolist() for x in (new, old, advantage))):
        p, p_old = math.exp(log_p), math.exp(log_p_old)
        r = p / p_old
        clipped = a * min(max(r, 0.8), 1.2)
        constant = -a * z / p_old
        losses.append(-min(a * r, clipped))
        reverse_losses.append(-a * z * (1 - p) / p_old - constant if a * r <= clipped else 0)
    assert 0 < np.count_nonzero(reverse_losses) < len(losses) < mask.numel()
    policy_loss, reverse_loss = rlhf.symmetric_policy_losses(new, old, advantage, mask, 0.2, z)
    assert policy_loss.item() == pytest.approx(np.mean(losses), rel=1e-12)
    assert reverse_loss.item() == pytest.approx(np.mean(reverse_losses), rel=1e-12)


@pytest.mark.parametrize("padding", [0.0, math.inf, math.nan])
def test_the_reverse_gradient_is_ppos_times_z_and_none_flows_from_padding(padding):
    new, old, advantage, mask = random_tokens()
    advantage = advantage.masked_fill(~mask, padding)
    old = old.masked_fill(~mask, -200.0)
    losses = rlhf.symmetric_policy_losses(new, old, advantage, mask, 0.2, -3.0)
    ppo, reverse = (torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in losses)
    assert ppo[mask].abs().max() > 0.01
    torch.testing.assert_close(reverse[mask], 3 * ppo[mask], rtol=1e-12, atol=1e-15)
    assert (ppo[~mask] == 0).all()
    assert (reverse[~mask] == 0).all()


def test_the_value_loss_is_clipped_around_the_old_value():
    value, old, returns, mask = random_tokens()
    errors = []
    for v, o, r in zip(value[mask].tolist(), old[mask].tolist(), returns[mask].tolist()):
        clipped = min(max(v, o - 0.2), o + 0.2)
        errors.append(0.5 * max((v - r) ** 2, (clipped - r) ** 2))
    loss = rlhf.clipped_value_loss(value, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-12)


def test_advantages_against_sums_over_the_tokens_of_each_text():
    rng = np.random.default_rng(0)
    gamma, lam, kl_coef = 0.9, 0.8, 0.3
    lengths = [7, 1, 4, 2, 6]
    reward = torch.from_numpy(rng.normal(size=5))
    log_prob, reference, value = torch.from_numpy(rng.normal(size=(3, 5, 7)))
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    args = rlhf.Args(gamma=gamma, gae_lambda=lam, kl_coef=kl_coef)
    advantage, returns = rlhf.token_advantages(reward, log_prob, reference, value, mask, args)
    for b, length in enumerate(lengths):
        rewards = [-kl_coef * (log_prob[b, t] - reference[b, t]).item() for t in range(length)]
        rewards[-1] += reward[b].item()
        values = [*value[b, :length].tolist(), 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            assert advantage[b, t].item() == pytest.approx(expected)
            assert returns[b, t].item() == pytest.approx(expected + values[t])
    assert (advantage[~mask] == 0).all()


def test_the_loss_is_the_sum_of_its_parts_and_a_share_of_the_minibatch():
    """Texts with half of a minibatch's sampled tokens, and a quarter of its target tokens."""
    new, old, advantage, mask = random_tokens()
    sft_mask = mask.flip(1)
    response, target = rlhf.Tokens(None, mask), rlhf.Tokens(None, sft_mask)
    rollout = rlhf.Rollout(response, None, old, None, new + 1)
    batch = rlhf.Batch(None, target, rollout, advantage, returns=new + 2)
    args = rlhf.Args(alpha=0.6, beta=0.5, z=-2.0, vf_coef=0.3, ce_coef=0.7)

    def model(prompt, *texts):
        assert texts == (response, target)
        return new, new + 1, old

    loss, metrics = rlhf.loss_and_metrics(model, args, batch, 2 * mask.sum(), 4 * sft_mask.sum())
    policy_loss, reverse_loss = rlhf.symmetric_policy_losses(new, old, advantage, mask, 0.2, -2.0)
    sft_loss = -old[sft_mask].mean()
    ratio = (new - old).exp()[mask]
    parts = {
        "policy_loss": 0.5 * policy_loss,
        "reverse_loss": 0.5 * reverse_loss,
        "value_loss": 0.5 * torch.tensor(0.5),  # half of an error of 1, squared
        "sft_loss": 0.25 * sft_loss,
        "clipfrac": 0.5 * ((ratio - 1).abs() > 0.2).double().mean(),
        "approx_kl": 0.5 * (ratio - 1 - ratio.log()).mean(),
    }
    assert metrics.keys() == parts.keys()
    for name, part in parts.items():
        assert metrics[name].item() == pytest.approx(part.item(), rel=1e-6)
    expected = 0.5 * (0.6 * policy_loss + 0.5 * reverse_loss + 0.3 * 0.5) + 0.25 * 0.7 * sft_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_kl_and_entropy_are_estimated_from_sampled_tokens():
    log_prob, reference, advantage, mask = random_tokens()
    response = rlhf.Tokens(None, mask)
    rollout = SimpleNamespace(response=response, log_prob=log_prob, reference_log_prob=reference)
    metrics = rlhf.rollout_metrics(rollout, advantage, advantage, advantage)
    divergence = (log_prob - reference)[mask].sum().item()
    assert metrics["charts/kl"].item() == pytest.approx(divergence / len(mask))
    assert metrics["losses/entropy"].item() == pytest.approx(-log_prob[mask].mean().item())


def test_the_explained_variance_of_a_constant_reward_is_a_number():
    """Returns and advantages that differ by rounding only, or not at all."""
    _, _, rounding, mask = random_tokens()
    rollout = SimpleNamespace(response=rlhf.Tokens(None, mask), log_prob=rounding)
    rollout.reference_log_prob = rounding
    for noise in (0.0, 1e-9):
        advantage, returns = 0.5 + 100 * noise * rounding, 1 + noise * rounding
        metrics = rlhf.rollout_metrics(rollout, advantage, advantage, returns)
        assert metrics["losses/explained_variance"].item() == pytest.approx(1, abs=1e-5)


# Runs


@pytest.mark.parametrize(("length", "counted"), [(7, True), (11, False)])
def test_prompts_that_lose_their_beginning_are_counted(run, tmp_path, capsys, length, counted):
    path = str(tmp_path / "data.jsonl")
    rows = [{"prompt": "the plot" + " was" * (i % 10), "label": "dull"} for i in range(20)]
    datasets.Dataset.from_list(rows).to_json(path)
    flags = {"dataset": path, "eval_dataset": path, "eval_episodes": 20, "total_timesteps": 8}
    run(prompt_length=length, **flags)
    output = capsys.readouterr().out
    for kind in ("training", "held-out"):
        assert f"--prompt-length cuts {8 * counted} of 20 {kind} prompts (left)\n" in output


@pytest.mark.parametrize("text", ["", "\n", "<|endoftext|>"])
def test_a_prompt_may_be_next_to_nothing(run, tmp_path, text):
    """It is the end of text, then."""
    path = str(tmp_path / "data.jsonl")
    datasets.Dataset.from_dict({"prompt": [text] * 20, "label": [1] * 20}).to_json(path)
    rows = progress(run(dataset=path, eval_dataset=path, eval_episodes=20))
    assert max(row["length_mean"] for row in rows) > 1 and "perplexity_real" not in rows[-1]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl.gz", "folder", "saved", "hub"])
def test_data_come_in_many_formats(tmp_path, monkeypatch, kind):
    rows = {"prompt": ["the, plot", "the\nplot"], "label": [" was", "dull"]}
    data = datasets.Dataset.from_dict(rows)
    work_in(monkeypatch, tmp_path)
    name = f"data.{kind}"
    if kind == "hub":
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **b: asked.append((a, b)) or data)
        for name in ("me/sums", "me/sums:test", "gsm8k:main:test"):
            rlhf.load_dataset(name)
        hub = [("me/sums",), ("me/sums",), ("gsm8k", "main")]
        assert asked == [(a, {"split": s}) for a, s in zip(hub, ("train", "test", "test"))]
        return
    if kind == "folder":  # such as a clone from the hub
        other = datasets.Dataset.from_dict({"prompt": ["other"], "label": ["one"]})
        data.to_parquet("data.folder/data/test-00000-of-00001.parquet")
        other.to_parquet("data.folder/data/train-00000-of-00001.parquet")
        datasets.DatasetDict(train=other, test=data).save_to_disk("both")
        for folder in ("data.folder", "both"):
            assert rlhf.load_dataset(f"{folder}:test")[:] == rows
            assert rlhf.load_dataset(folder)[:] == other[:]
        return
    writers = {"csv": data.to_csv, "parquet": data.to_parquet, "saved": data.save_to_disk}
    writers["tsv"] = lambda name: data.to_csv(name, sep="\t")
    writers["jsonl.gz"] = lambda name: data.to_json(name, compression="gzip")
    writers[kind](name)
    assert rlhf.load_dataset(name)[:] == rows


@pytest.mark.parametrize(("data", "message"), [
    ({"prompt": ["a", None]}, None),
    ({"prompt": [3, 4]}, None),
    ({"text": ["a", None]}, None),
    ({"prompt": ["a", "a"]}, "--ce-coef needs a column 'label' of texts"),
    ({"prompt": ["a", "a"], "label": ["a", None]}, "--ce-coef needs a column 'label' of texts"),
    ({"prompt": ["a", "a"], "label": [1, 0]}, "--ce-coef needs a column 'label' of texts"),
    ({"review": ["a", "a"]}, "no column 'prompt' or 'text' in the data, only .*review"),
])  # fmt: skip
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_data_without_texts_end_a_run_before_it_begins(run, tmp_path, flag, data, message):
    """Tokenizers say what they cannot read."""
    good, bad = str(tmp_path / "good.jsonl"), str(tmp_path / "bad.jsonl")
    datasets.Dataset.from_dict({"text": ["a"] * 8}).to_json(good)
    datasets.Dataset.from_dict({name: values * 4 for name, values in data.items()}).to_json(bad)
    flags = {"dataset": good, "eval_dataset": good, flag: bad}
    with pytest.raises((SystemExit, TypeError, ValueError), match=message):
        run(ce_coef=1.0, **flags)
    assert not (tmp_path / "run").exists()


def test_without_held_out_data_a_tenth_is_held_out(tmp_path):
    path = str(tmp_path / "texts.jsonl")
    datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(200)]}).to_json(path)
    args = rlhf.Args(dataset=path, batch_size=180, eval_episodes=20)
    train_data, eval_data = rlhf.load_data(args)
    assert len(train_data) == 180
    assert len(set(train_data["text"]) | set(eval_data["text"])) == 200
    other_train_data, other_eval_data = rlhf.load_data(replace(args, seed=2))
    assert other_train_data["text"] == train_data["text"]
    assert other_eval_data["text"] == eval_data["text"]


@pytest.mark.parametrize(("rows", "kept", "flags"), [
    (200, "180 rows of training data and 20", {"batch_size": 184, "eval_episodes": 20}),
    (200, "180 rows of training data and 20", {"batch_size": 180, "eval_episodes": 21}),
    (8, "8 rows of training data and 8", {"batch_size": 4, "eval_episodes": 9}),
])  # fmt: skip
def test_too_few_rows_are_refused_before_a_folder_is_made(
    toy, tmp_path, monkeypatch, rows, kept, flags
):
    """Also where a tenth of them is held out."""
    work_in(monkeypatch, toy.parent.parent)
    path = str(tmp_path / "texts.jsonl")
    datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(rows)]}).to_json(path)
    words = ["--dataset", path, "--runs-dir", tmp_path / "runs"]
    if rows == 8:
        words += ["--eval-dataset", path]
    for name, count in flags.items():
        words += [f"--{name.replace('_', '-')}", count]
    too_few = " and ".join(f"--{name.replace('_', '-')} {n}" for name, n in flags.items())
    with pytest.raises(SystemExit, match=f"^error: {kept} held out are too few for {too_few}$"):
        call_main(monkeypatch, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["dataset", "policy_model", "reward_model"])
def test_whatever_needs_the_toy_makes_it(tmp_path, monkeypatch, flag):
    """Also one's own data with the toy's models. Where nothing needs it, nobody waits for it."""
    work_in(monkeypatch, tmp_path)
    (tmp_path / "runs").mkdir()
    made = []

    monkeypatch.setattr(rlhf, "make_toy", made.append)
    own = {"dataset": "own.jsonl", "policy_model": "own", "reward_model": ("own",)}
    for flags in (own, own | {flag: getattr(rlhf.Args(), flag)}):
        before = len(made)
        rlhf.prepare(rlhf.Args(**flags))
        assert len(made) - before == (flags != own)


def test_a_run_leaves_what_it_promises(run):
    """In progress.csv, means of what was logged since the evaluation before."""
    folder = run(noise="uniform", ce_coef=0.1)
    files = "checkpoint.pt events policy progress.csv samples.jsonl sessions.jsonl sppo_rlhf.py"
    names = sorted(path.name.split(".out")[0] for path in folder.iterdir())
    assert names == [*files.split(), "summary.json"]
    (session,) = read_lines(folder / "sessions.jsonl")
    assert session["args"]["noise_level"] == 0.05
    assert (folder / session["script"]).read_text() == Path(rlhf.__file__).read_text()
    rows = progress(folder)
    summary = json.loads((folder / "summary.json").read_text())
    speed = summary.pop("sps")
    assert summary == rows[-1]
    assert [row["step"] for row in rows] == [0, 16, 32]
    assert [sample["step"] for sample in read_samples(folder)] == [0] * 4 + [16] * 4 + [32] * 4

    columns = {name for name in rows[0] if "/" in name and not name.startswith("eval_")}
    assert len(columns) == 15
    events = EventAccumulator(str(folder)).Reload()
    for name in columns:
        values = [scalar.value for scalar in events.Scalars(name)]
        assert rows[1][name] == pytest.approx(np.mean(values[:2]), rel=1e-5)
        assert rows[2][name] == pytest.approx(np.mean(values[2:]), rel=1e-5)
    speeds = [scalar.value for scalar in events.Scalars("charts/SPS")]
    assert speed == pytest.approx(np.median(speeds), rel=1e-5)
    scores = [scalar.value for scalar in events.Scalars("eval/return_mean")]
    assert scores == pytest.approx([row["return_mean"] for row in rows])


def test_sppo_is_ppo_with_another_weight_to_the_last_bit(run):
    """alpha L + beta Lr has the gradient of (alpha + beta) L; doubling alpha rounds nothing."""

    def trained(name, **weights):
        flags = {"learning_rate": 1e-2, "noise": "adv_flip", "total_timesteps": 16}
        folder = run(name, **flags, **weights)
        assert progress(folder)[-1]["losses/clipfrac"] > 0.1  # the mask counts
        return (folder / "policy/model.safetensors").read_bytes(), read_samples(folder)

    sppo = trained("sppo", alpha=0.5, beta=0.5)
    assert trained("ppo", beta=0.0) == sppo
    assert trained("half", alpha=0.5, beta=0.0) != sppo


def test_the_saved_policy_is_a_folder_like_any_other(run):
    folder = run(learning_rate=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer("the plot was superb", return_tensors="pt")["input_ids"]
    text = rlhf.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    texts = [rlhf.Tokens(*(x[:, part] for x in text)) for part in (slice(1), slice(1, None))]
    actor = actor_critic(f"{rlhf.TOY}/policy")
    initial, *_ = actor(*texts)
    actor.load_state_dict(checkpoint(folder)["agent"], strict=False)
    trained, *_ = actor(*texts)
    assert (trained - initial).abs().max() > 0.01
    loaded = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    log_prob = loaded(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_prob, trained, atol=1e-5, rtol=0)


def test_the_saved_tokenizer_pads_and_truncates_as_before(run, toy, tmp_path):
    """In training its sides do not matter."""
    folder = tmp_path / "policy"
    shutil.copytree(toy / "policy", folder)
    flags = {"total_timesteps": 8, "ce_coef": 0.1, "response_length": 40}  # some are padded
    usual = run("usual", **flags)
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, truncation_side=side)
        tokenizer.save_pretrained(folder)
        trained = run(side, policy_model=str(folder), **flags)
        saved = AutoTokenizer.from_pretrained(trained / "policy")
        assert (saved.padding_side, saved.truncation_side) == (side, side)
        assert (trained / "progress.csv").read_bytes() == (usual / "progress.csv").read_bytes()


@pytest.mark.parametrize("top_k", [1, 3])
def test_an_evaluation_by_hand(run, toy, models, monkeypatch, top_k):
    """Rewards by an ensemble, means of its models and of one that is only watched, responses, KL
    divergence and perplexities, of a trained policy. Some responses and targets end early."""
    ensemble = (str(models["classifier"]), f"{rlhf.TOY}/reward")
    watched = f"{__file__}:text_lengths"
    flags = {"reward_model": (*ensemble, watched), "reward_weights": (0.5, 0.5, 0.0)}
    flags |= {"reward_label": 0}
    flags |= {"response_length": 30, "learning_rate": 3e-3, "total_timesteps": 16}
    with monkeypatch.context() as patch:
        top_ks = record(patch, rlhf, "sample_token")
        folder = run(top_k=3, eval_greedy=top_k == 1, **flags)
    assert {args[2] for args, _ in top_ks} == {3, top_k}  # in training and in evaluations
    row = progress(folder)[-1]
    samples = read_samples(folder)[-4:]
    texts = [sample["prompt"] + sample["response"] for sample in samples]
    scores = [reward_model(name, 0)(texts) for name in ensemble]
    rewards = torch.stack(scores).mean(0)
    assert [sample["reward"] for sample in samples] == pytest.approx(rewards.tolist(), abs=1e-5)
    assert row["return_mean"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert row["return_std"] == pytest.approx(rewards.std(correction=0).item(), abs=1e-4)
    for name, score in zip(ensemble, scores):
        assert row[f"eval_{name}"] == pytest.approx(score.mean().item(), abs=1e-5)
    assert row[f"eval_{watched}"] == np.mean(text_lengths(texts))

    load = AutoModelForCausalLM.from_pretrained
    policy, reference = load(folder / "policy").eval(), load(toy / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    uniform = torch.from_numpy(np.random.default_rng([1, 16, 2]).random((4, 30)))
    log_probs, reference_log_probs, real_log_probs = [], [], []
    for i, text in enumerate(rlhf.load_data(rlhf.Args(eval_episodes=4))[1]["text"]):
        review = tokenizer(text)["input_ids"]
        half = len(review) // 2
        ids = review[half - 8 : half]
        assert tokenizer.decode(ids) == samples[i]["prompt"]
        while len(ids) < 38 and ids[-1] != tokenizer.eos_token_id:
            logits = policy(torch.tensor([ids])).logits[:, -1]
            token = rlhf.sample_token(logits, uniform[i, len(ids) - 8].view(1, 1), top_k).item()
            log_probs.append(logits.log_softmax(-1)[0, token].item())
            logits = reference(torch.tensor([ids])).logits[0, -1]
            reference_log_probs.append(logits.log_softmax(-1)[token].item())
            ids.append(token)
        assert tokenizer.decode(ids[8:], skip_special_tokens=True) == samples[i]["response"]
        real = torch.tensor([*review, tokenizer.eos_token_id])[half - 8 :][:28]
        log_prob = policy(real[None]).logits[0, 7:-1].log_softmax(-1)
        real_log_probs += log_prob.gather(1, real[8:, None])[:, 0].tolist()
    assert len(log_probs) < 4 * 30 > len(real_log_probs) != len(log_probs)
    assert row["length_mean"] == len(log_probs) / 4
    kl = np.sum(log_probs) - np.sum(reference_log_probs)
    assert row["kl"] == pytest.approx(kl / 4, abs=1e-4)
    assert row["perplexity"] == pytest.approx(np.exp(-np.mean(reference_log_probs)), rel=1e-4)
    assert row["perplexity_real"] == pytest.approx(np.exp(-np.mean(real_log_probs)), rel=1e-4)


@pytest.mark.parametrize(("updates", "step"), [(1, 0), (3, 16)])
def test_the_same_command_continues_to_the_bit(run, summaries, updates, step):
    """Interrupted before the first checkpoint, and an update after one (with LoRA). A reward
    function draws from global generators."""
    flags = {"noise": "normal", "ce_coef": 0.1, "eval_freq": 16}
    if step:
        flags |= summaries
    flags["reward_model"] = (*flags.get("reward_model", ()), f"{__file__}:lucky")
    whole = run(name="whole", **flags)
    folder = whole.with_name("run")
    interrupt(run, updates, **flags)
    assert (folder / "checkpoint.pt").exists() == (step > 0)
    run(**flags)
    for name in ("progress.csv", "samples.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert torch.equal(weights(folder), weights(whole))


@needs_gpu
@pytest.mark.parametrize("amp", ["off", "auto"])
def test_on_a_gpu_a_run_is_continued(run, amp):
    flags = {"device": "cuda", "amp": amp}
    interrupt(run, 3, **flags)
    folder = run(**flags)
    assert len(read_lines(folder / "sessions.jsonl")) == 2
    assert [row["step"] for row in progress(folder)] == [0, 16, 32]


def test_the_optimizer_gets_its_settings(run, monkeypatch):
    """Where gradients are clipped to nothing, weights only decay, in four steps."""
    loads = record(monkeypatch, rlhf, "load")
    flags = {"learning_rate": 0.1, "weight_decay": 0.2, "adam_eps": 0.3, "max_grad_norm": 1e-30}
    run(total_timesteps=8, **flags)
    ((_, setup),) = loads
    assert setup.optimizer.param_groups[0]["eps"] == 0.3
    initial = AutoModelForCausalLM.from_pretrained(f"{rlhf.TOY}/policy").state_dict()
    for model in (setup.actor_critic.policy, setup.actor_critic.critic):
        for name, parameter in model.named_parameters():
            name = name if name in initial else f"transformer.{name}"
            torch.testing.assert_close(parameter.detach(), 0.98**4 * initial[name])
    assert setup.actor_critic.value_head.weight.abs().max() < 1e-20  # it was zero


def test_seeds_and_evaluations_have_random_numbers_of_their_own(run):
    flags = {"learning_rate": 0.0, "total_timesteps": 16, "eval_freq": 8}
    one, two = (run(name=str(seed), seed=seed, **flags) for seed in (1, 2))
    for name in ("return_mean", "charts/episodic_return"):
        values = [row[name] for folder in (one, two) for row in progress(folder)[1:]]
        assert len(set(values)) == 4


@pytest.mark.parametrize("amp", ["off", "auto"])
def test_a_policy_that_is_trained_with_dropout_is_not_the_one_that_acts(
    run, models, monkeypatch, capsys, amp
):
    """In float32 on a CPU that ends the run, elsewhere it warns."""
    init = rlhf.ActorCritic.__init__
    monkeypatch.setattr(rlhf, "has_bfloat16", lambda device: True)

    def with_dropout(actor, *args):
        init(actor, *args)
        actor.policy.transformer.drop.p = 0.5

    flags = {"policy_model": str(models["gpt2"]), "gradient_checkpointing": True, "amp": amp}
    run("without", total_timesteps=8, **flags)
    assert "the policy that acts" not in capsys.readouterr().err
    monkeypatch.setattr(rlhf.ActorCritic, "__init__", with_dropout)
    if amp == "off":
        with pytest.raises(SystemExit, match="^error: the policy that acts is not the one that is"):
            run(total_timesteps=8, **flags)
    else:
        run(total_timesteps=8, **flags)
        assert "warning: the policy that acts is not the one" in capsys.readouterr().err


def test_a_checkpoint_is_whole_or_not_there(run, tmp_path):
    interrupt(run, 3)

    def save_half(_, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save_half)
        run()
    assert checkpoint(tmp_path / "run")["progress"]["global_step"] == 16
    run()
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_gradient_that_is_not_finite_ends_the_run(run, tmp_path):
    """After one step the weights are too large; the next has no gradient."""
    with pytest.raises(SystemExit, match="the gradient is not finite at step 8; lower --learn"):
        run(learning_rate=1e38)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_command_finds_its_run_again(run, tmp_path, monkeypatch, capsys):
    """`run` has changed to a folder with the toy. Other flags make another run."""
    command = typed(SMALL | {"runs_dir": tmp_path})
    call_main(monkeypatch, *command)
    first, *_, outcome = capsys.readouterr().out.splitlines()[2:]
    (folder,) = tmp_path.iterdir()
    assert first == f"{folder.name}: from step 0, with a checkpoint every 16 texts"
    assert outcome.startswith(f"{folder}: reward {progress(folder)[-1]['return_mean']:.3f}, ")
    assert outcome.endswith(f"; to watch it: python PATH/TO/enjoy.py {folder}")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    call_main(monkeypatch, *command)
    assert capsys.readouterr().out == outcome + "\n"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    call_main(monkeypatch, *command, "--learning-rate", "0.1")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_at_work_is_refused_before_its_models_are_loaded_again(run, tmp_path, monkeypatch):
    folder = folder_of(rlhf.Args(runs_dir=str(tmp_path)))
    folder.mkdir()
    monkeypatch.setattr(rlhf, "load", lambda args: pytest.fail("loaded"))
    with FileLock(folder / "lock"), pytest.raises(SystemExit, match="is at work on .*__sppo__none"):
        call_main(monkeypatch, "--runs-dir", tmp_path)


def test_after_an_interrupt_the_same_command_continues(run, tmp_path, monkeypatch, capsys):
    """From the last checkpoint, that of the last evaluation."""
    command = typed(SMALL | {"runs_dir": tmp_path})
    for updates in (1, 3):
        interrupt(lambda: call_main(monkeypatch, *command), updates, SystemExit)
        assert ": from step 0, " in capsys.readouterr().out
    call_main(monkeypatch, *command)
    (folder,) = tmp_path.iterdir()
    assert f"{folder.name}: from step 16, " in capsys.readouterr().out
    sessions = read_lines(folder / "sessions.jsonl")
    assert [session["run"] for session in sessions] == [folder.name] * 3


def test_what_a_run_reads_is_part_of_its_name(tmp_path, monkeypatch):
    """The files of reward functions, those that they import, local models and data: what is edited
    makes another run, and other files do not."""
    work_in(monkeypatch, tmp_path)
    function = "def own(texts): return [0.5] * len(texts)"
    contents = {"own_training.py": function, "own_other.py": "from own_part import own"}
    contents |= {"own_part.py": function, "texts.jsonl": "{}", "saved/1": "a", "saved/2": "b"}
    contents |= {"policy/model.safetensors": "p", "reward/model.safetensors": "r"}
    contents |= {"words/tokenizer.json": "w"}
    for name, content in contents.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    flags = {"policy_model": "policy", "dataset": "texts.jsonl", "eval_dataset": "saved:test"}
    flags |= {"reward_model": ("own_training.py:own", "reward", "own_other.py:own")}
    flags |= {"tokenizer": "words"}
    args = rlhf.Args(**flags)
    rlhf.prepare(args)
    folder = folder_of(args)
    assert {str(tmp_path / name) for name in contents} <= set(digests_of(rlhf, args))
    for name, content in contents.items():
        Path(name).write_text(content + " ")
        assert folder_of(args) != folder
        Path(name).write_text(content)
        for other in ("other.py", "policy/.cache/other", "saved/__pycache__/1"):
            Path(other).parent.mkdir(exist_ok=True)
            Path(other).write_text(content)
        assert folder_of(rlhf.Args(**flags)) == folder
    monkeypatch.chdir("/")  # as a reward function may do
    assert folder_of(args) == folder
    Path(tmp_path, "saved/1").rename(tmp_path / "saved/3")
    assert folder_of(args) != folder


@pytest.mark.parametrize("held_out", [True, False])
def test_reading_data_leaves_them_as_they_are(tmp_path, monkeypatch, held_out):
    """Where they are split or shuffled: else the same command would be another run."""
    work_in(monkeypatch, tmp_path)
    for name in ("one", "two"):
        datasets.Dataset.from_dict({"text": ["a"] * 200}).save_to_disk(name)
    flags = {"policy_model": "own", "reward_model": ("own",), "dataset": "one"}
    args = rlhf.Args(**flags, eval_dataset="two" if held_out else None, eval_episodes=20)
    rlhf.prepare(args)
    folder = folder_of(args)
    rlhf.load_data(args)
    assert folder_of(args) == folder


def test_the_environment_does_not_divide_gradients(run, monkeypatch):
    """Launchers of DeepSpeed set this."""
    norms = []
    for number in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", number)
        norms.append(progress(run(number, total_timesteps=8))[-1]["losses/grad_norm"])
    assert norms[0] == norms[1]


def test_the_default_name_tells_runs_by_all_that_may_change_results(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf, "find_spec", lambda name: True)
    work_in(monkeypatch, tmp_path)
    folder = folder_of(rlhf.Args())
    name = re.escape(str(tmp_path / "runs/toy__sppo__none__1__"))
    assert re.fullmatch(name + "[0-9a-f]{8}", str(folder))
    others = {"runs_dir": "elsewhere", "track": True, "device": "cpu"}
    others |= {"gradient_checkpointing": True}
    assert folder_of(rlhf.Args(**others)) == tmp_path / "elsewhere" / folder.name
    assert set(rlhf.NO_EFFECT) == others.keys()
    for flags in ({"learning_rate": 1.0}, {"amp": "off"}, {"reward_model": ("a", "b")}):
        assert folder_of(rlhf.Args(**flags)) != folder
    monkeypatch.setattr(rlhf, "SOURCE", rlhf.SOURCE + b"\n")
    assert folder_of(rlhf.Args()) != folder


def enjoy(monkeypatch, capsys, *words):
    """What enjoy.py prints: lines of stdout, and stderr."""
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["enjoy.py", *map(str, words)])
        patch.setitem(sys.modules, "sppo_rlhf", rlhf)  # puts it back after the run's copy
        play_run()
    output = capsys.readouterr()
    return output.out.splitlines(), output.err


@pytest.mark.parametrize("lora", [False, True])
def test_enjoy_repeats_the_last_evaluation(run, summaries, tmp_path, monkeypatch, capsys, lora):
    """Of a run at work, before its first checkpoint and after it, and of a finished run."""
    flags = SMALL | {"seed": 7, "runs_dir": tmp_path / "runs"}
    if lora:
        flags |= summaries | {"reward_model": summaries["reward_model"][0]}
    words = typed(flags)
    for updates, step in (1, 0), (3, 16), (None, 32):
        if updates:
            interrupt(lambda: call_main(monkeypatch, *words), updates, SystemExit)
        else:
            call_main(monkeypatch, *words)
        (folder,) = (tmp_path / "runs").iterdir()
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        lines, errors = enjoy(monkeypatch, capsys, folder, "--seed", 7, "--episodes", 4)
        assert "warning: " not in errors
        row = progress(folder)[-1]
        assert f"step: {step}" in lines
        for name in ("return_mean", "kl", "perplexity_real"):
            assert f"{name}: {row[name]:.4g}" in lines
        assert lines[-1].startswith(f"{folder}: reward {row['return_mean']:.3f} (")
        assert lines.pop(0).endswith(" training prompts (left)")
        assert lines.pop(0).endswith("cuts 4 of 4 held-out prompts (left)")
        for line, sample in zip(lines, read_samples(folder)[-4:]):
            assert line.startswith(f"{sample['reward']:.3f} {sample['prompt']} [")
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_enjoy_plays_an_edited_copy_of_the_newest_run(run, monkeypatch, capsys):
    """Trained on a GPU, and played without one, with random numbers of its own."""
    call_main(monkeypatch, *typed(SMALL | {"total_timesteps": 8}))
    folder = max(Path("runs").glob("toy__*"), key=lambda path: path.stat().st_mtime)
    older = Path(shutil.copytree(folder, "runs/older"))
    os.utime(older / "samples.jsonl", (0, 0))
    sessions = folder / "sessions.jsonl"
    sessions.write_text(sessions.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    script = folder / "sppo_rlhf.py"
    script.write_text(script.read_text().replace("samples[:8]", "samples[:3]"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines, errors = enjoy(monkeypatch, capsys, "--episodes", 12)
    assert errors == ""
    assert lines[-1].startswith(f"{folder.absolute()}: reward 0.")
    assert lines[5] == "step: 8"
    monkeypatch.chdir("runs")
    lines_there, _ = enjoy(monkeypatch, capsys, folder.name, "--episodes", 12)
    assert lines_there == lines  # by the trained agent, wherever it is played
    others, _ = enjoy(monkeypatch, capsys, folder.absolute(), "--episodes", 12, "--seed", 2)
    assert not set(others[2:5]) & set(lines)
    for path in (folder, older):
        shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_end_ends_all_processes_of_a_run(toy, tmp_path, processes):
    """No checkpoint is lost."""
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    launch = launch if processes > 1 else []
    command = [sys.executable, *launch, rlhf.__file__, "--runs-dir", tmp_path / "runs"]
    command += typed(SMALL | {"total_timesteps": 8000, "eval_freq": 80})
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = tmp_path / "output"
    with output.open("w") as file:
        options = {"cwd": toy.parent.parent, "env": alone, "stdout": file, "stderr": file}
        process = subprocess.Popen(command, **options)
        while not list(tmp_path.glob("runs/*/checkpoint.pt")) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == (1 if launch else -signal.SIGTERM)
    assert 'sppo_rlhf.py", line' not in output.read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    with FileLock(folder / "lock", blocking=False):  # no process is left
        assert checkpoint(folder)["progress"]["global_step"] >= 80


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_scores_that_are_not_finite_are_refused(run, weight):
    """Also those that are only watched."""
    models = (f"{__file__}:text_lengths", f"{__file__}:infinite_scores")
    with pytest.raises(ValueError, match="not finite"):
        run(reward_model=models, reward_weights=(1.0, weight))


def test_rewards_are_noisy_in_training_and_clean_in_reports(run, monkeypatch):
    calls = record(monkeypatch, rlhf, "token_advantages")
    flags = {"total_timesteps": 8, "learning_rate": 0.0}
    clean = progress(run(name="clean", **flags))[-1]
    flipped = progress(run(name="flipped", noise="flip", noise_level=1.0, **flags))[-1]
    clean_reward, flipped_reward = (args[0] for args, _ in calls)
    torch.testing.assert_close(flipped_reward, 1 - clean_reward)
    assert clean["charts/episodic_return"] == pytest.approx(clean_reward.mean().item())
    for name in ("return_mean", "return_std", "charts/episodic_return"):
        assert flipped[name] == clean[name]


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_advantages_are_normalised_after_flips_drawn_anew_each_epoch(run, monkeypatch, level):
    """Over sampled tokens."""
    perturbations = record(monkeypatch, rlhf, "perturb_advantage")
    gradients = record(monkeypatch, rlhf, "accumulate_gradient")
    run(noise="adv_flip" if level else "none", noise_level=level, response_length=40)
    lengths = set()
    for (_, _, minibatch), _ in gradients:
        advantage = minibatch.advantage[minibatch.rollout.response.mask]
        lengths.add(len(advantage))
        assert advantage.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantage.std().item() == pytest.approx(1, abs=1e-3)
    assert min(lengths) < 4 * 40  # some texts end early
    assert len(perturbations) == (len(gradients) if level else 0)
    flips = [noisy != args[0] for args, noisy in perturbations]
    if level:  # first tokens are always sampled
        assert len({tuple(flipped[:, 0].tolist()) for flipped in flips}) > 4
        sampled = torch.cat([args[0] != 0 for args, _ in perturbations])
        assert torch.cat(flips)[sampled].float().mean() == pytest.approx(level, abs=0.05)


def test_micro_batches_add_up_to_the_minibatch(run, monkeypatch):
    """Gradients and metrics, of texts with different numbers of tokens."""
    accumulate_gradient = rlhf.accumulate_gradient
    results = []

    def recording(setup, args, minibatch):
        assert len(minibatch.rollout.response.mask.sum(1).unique()) > 1
        for size in (None, 1, 3):
            setup.optimizer.zero_grad()
            metrics = accumulate_gradient(setup, replace(args, micro_batch_size=size), minibatch)
            gradients = [p.grad.flatten() for p in setup.model.parameters() if p.requires_grad]
            results.append({"gradient": torch.cat(gradients), **metrics})
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "accumulate_gradient", recording)
    with pytest.raises(KeyboardInterrupt):
        run(ce_coef=0.1, response_length=40)
    whole, *split = results
    assert whole["gradient"].abs().max() > 1e-2
    for result in split:
        torch.testing.assert_close(result, whole, rtol=1e-4, atol=1e-6)


def test_summaries_with_lora(run, models, summaries):
    folder = run(**summaries)
    rows = progress(folder)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(rows[-1]["kl"]) > 1e-3
    state = checkpoint(folder)["agent"]
    assert all("lora_" in name or "value_head" in name for name in state)
    assert all(weight.any() for weight in state.values())
    base = AutoModelForCausalLM.from_pretrained(models["gptj"])
    adapted = peft.PeftModel.from_pretrained(base, folder / "policy").base_model.model
    saved = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(saved) == sum(name.startswith("policy.") for name in state)
    for name, weight in saved.items():
        assert torch.equal(weight, state[f"policy.base_model.model.{name}"])


@pytest.mark.parametrize(("kind", "layers"), {
    "Llama": "self_attn.q_proj self_attn.v_proj",  # peft's default
    "Phi3": "mlp.down_proj mlp.gate_up_proj self_attn.o_proj self_attn.qkv_proj",  # it has none
    "Qwen3Moe": None,  # none either, and experts are no layers
}.items())  # fmt: skip
def test_the_adapter_of_any_family_is_merged_into_its_model(
    run, toy, tmp_path, monkeypatch, kind, layers
):
    """What was trained is what is saved."""
    make_policy(kind, tmp_path / kind, toy)
    words = ["--policy-model", tmp_path / kind, "--lora-r", 2, "--learning-rate", 0.1]
    words += ["--total-timesteps", 8, "--batch-size", 8, "--eval-episodes", 4]
    call_main(monkeypatch, *words, "--runs-dir", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    args = read_lines(folder / "sessions.jsonl")[0]["args"]
    trained = rlhf.ActorCritic(rlhf.Args(**args), CPU, torch.float32)
    trained.load_state_dict(checkpoint(folder)["agent"], strict=False)
    ids = torch.arange(12).view(2, 6)
    expected = trained.policy(ids).logits
    saved = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "policy")
    if layers:
        adapted = {name.split(".", 3)[3] for name in saved.targeted_module_names}
        assert adapted == set(layers.split())
    torch.testing.assert_close(saved.eval()(ids).logits, expected)
    merged = saved.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    with trained.policy.disable_adapter():
        assert (trained.policy(ids).logits - expected).abs().max() > 0.01


def test_an_adapter_is_no_policy_until_it_is_merged(run, summaries, tmp_path):
    """As the page says."""
    flags = summaries | {"total_timesteps": 8}
    adapter = run(**flags) / "policy"
    with pytest.raises(ValueError, match="Unrecognized model in .*policy"):
        run(**flags | {"policy_model": str(adapter)}, name="adapter")
    page = Path(rlhf.__file__).with_name("docs") / "language-models.md"
    load, merge = re.search(r"`(peft.*?)` loads it, and its `(.*?)`", page.read_text()).groups()
    code = f"{load}.{merge}".replace("runs/NAME/policy", str(adapter))
    exec(code.replace("merged", str(tmp_path / "merged")), {"peft": peft})
    flags |= {"policy_model": str(tmp_path / "merged"), "tokenizer": summaries["policy_model"]}
    assert run(name="other", **flags).exists()


def test_reward_models_that_are_watched_do_not_change_the_training(run, models, summaries):
    """Loading a LoRA adapter draws random numbers, as the policy's own initial weights do."""
    watched = (str(models["adapter"]), str(models["classifier"]))
    without = weights(run(name="without", **summaries))
    flags = summaries | {"reward_model": summaries["reward_model"] + watched}
    flags["reward_weights"] = (1.0, 0.0, 0.0)
    assert torch.equal(weights(run(name="with", **flags)), without)
    assert not torch.equal(weights(run(name="other", seed=2, **summaries)), without)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["toy", "tldr"])
def test_two_processes_do_what_one_does(run, summaries, tmp_path, task):
    """The same texts, and weights within rounding, which Adam magnifies near zero gradients."""
    flags = {"ce_coef": 0.1, "noise": "normal", "adam_eps": 1e-4, "micro_batch_size": 1}
    if task == "tldr":
        flags |= summaries
    one = run(**flags)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *launch.split(), rlhf.__file__]
    command += ["--runs-dir", tmp_path / "runs"]
    for name, value in (SMALL | flags).items():
        values = value if isinstance(value, tuple) else [str(value)]
        command += [f"--{name.replace('_', '-')}", *values]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    (two,) = (tmp_path / "runs").iterdir()
    for line in ("step 0: ", "step 16: ", "step 32: ", f"{two}: reward "):  # one of them speaks
        assert output.count(line) == 1
    before, after = ([x["response"] for x in read_samples(folder)] for folder in (one, two))
    assert before == after
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-5)


def test_ddp_is_freed_before_its_process_group(run, monkeypatch):
    """Else a process may never end: DDP's destructor, which holds the GIL, would wait for a thread
    of the process group that waits for the GIL."""
    wrappers = []
    alive = []
    load = rlhf.load

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *texts):
            return self.module(*texts)

    def wrapping_load(args):
        setup = load(args)
        setup.model = Wrapper(setup.model)
        wrappers.append(weakref.ref(setup.model))
        return setup

    monkeypatch.setattr(rlhf, "load", wrapping_load)
    monkeypatch.setattr(Accelerator, "end_training", lambda _: alive.append(wrappers[0]()))
    run(total_timesteps=8)
    assert alive == [None]


@pytest.mark.slow
def test_the_toy_learns_reward_and_true_sentiment(tmp_path, monkeypatch):
    """The toy's models get their whole training. A full run has 40 updates, and adds some 0.2 to the
    reward. In runs of twelve, of several seeds and versions, it rose by 0.165 or more, the true
    sentiment by 0.47 or more."""
    work_in(monkeypatch, tmp_path)
    sentiment = "from sppo_rlhf import toy_sentiment\n"
    sentiment += "def true(completions): return [toy_sentiment(text) for text in completions]"
    Path("sentiment.py").write_text(sentiment)
    words = ["--total-timesteps", 12 * 112, "--eval-freq", 12 * 112, "--device", "cpu"]
    words += ["--reward-model", "runs/toy/reward", "sentiment.py:true", "--reward-weights", 1, 0]
    call_main(monkeypatch, *words, "--runs-dir", "own")
    (folder,) = Path("own").iterdir()
    first, last = progress(folder)
    assert last["return_mean"] - first["return_mean"] > 0.12
    assert last["eval_sentiment.py:true"] - first["eval_sentiment.py:true"] > 0.3
    assert 0 < last["kl"] < 20


def test_one_process_makes_the_toy_and_others_wait(toy, monkeypatch):
    work_in(monkeypatch, toy.parent.parent)
    calls = record(monkeypatch, rlhf, "make_toy")
    other = threading.Thread(target=rlhf.prepare, args=(rlhf.Args(),))
    with FileLock(f"{rlhf.TOY}.lock"):
        other.start()
        other.join(0.5)
        assert other.is_alive() and not calls
    other.join()
    assert len(calls) == 1


def test_where_the_toy_cannot_be_locked_an_error_says_so(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    work_in(monkeypatch, tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available"):
        call_main(monkeypatch)


def test_begun_again_a_run_logs_its_first_evaluation_once(run, tmp_path):
    """TensorBoard orders files by the second."""
    interrupt(run, 0, total_timesteps=8)
    time.sleep(1)
    run(total_timesteps=8)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [scalar.step for scalar in events.Scalars("eval/return_mean")] == [0, 8]


# Arguments


def test_defaults_depend_on_the_task_and_on_other_flags():
    for task, kind in rlhf.TASKS.items():
        assert rlhf.parse_args([f"--task={task}", "--gamma", "0.5"]) == kind(gamma=0.5)
    sppo = rlhf.parse_args([])
    ppo = rlhf.Args(beta=0.0, noise="flip")
    assert (sppo.alpha, sppo.noise_level, sppo.exp_name, sppo.eval_freq) == (0.5, 0.0, "sppo", 448)
    assert (ppo.alpha, ppo.noise_level, ppo.exp_name) == (1.0, 0.1, "ppo")
    assert rlhf.Args(dataset="a").eval_dataset is None
    assert rlhf.ImdbArgs().eval_dataset == "stanfordnlp/imdb:test"


def test_the_authors_settings():
    names = "total_timesteps batch_size num_minibatches update_epochs prompt_length response_length"
    names += " top_k lora_r lora_alpha learning_rate weight_decay adam_eps gamma gae_lambda"
    names += " clip_coef vf_coef ce_coef kl_coef max_grad_norm alpha beta z"
    imdb = [6720, 112, 4, 5, 64, 48, 50, 0, 64, 5e-6, 1e-6, 1e-5, 0.99, 0.95]
    imdb += [0.2, 0.5, 0.1, 0.001, 1, 0.5, 0.4, -1]
    tldr = [12800, 64, 4, 4, 500, 50, 0, 8, 64, 5e-6, 0.01, 1e-5, 1, 0.95]
    tldr += [0.2, 0.1, 0.1, 0.002, 1, 0.5, 0.2, -1]
    for args, values in ((rlhf.ImdbArgs(), imdb), (rlhf.TldrArgs(), tldr)):
        assert [getattr(args, name) for name in names.split()] == values


def test_help_shows_the_defaults_of_the_task(capsys):
    rewards = {"toy": "toy/reward", "tldr": "jdchang/tldr_rm_adapter"}
    for task, reward in rewards.items():
        with pytest.raises(SystemExit):
            rlhf.parse_args(["--task", task, "--help"])
        assert reward in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--help", "--no-such-flag"])
def test_a_mistyped_flag_waits_for_no_library(tmp_path, word):
    """Here PyTorch cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, rlhf.__file__, word], env=environment, capture_output=True
    )
    assert done.returncode == (0 if word == "--help" else 2)


@pytest.mark.parametrize(("flags", "message"), {
    "--num-minibatches 16": "num_minibatches times processes must divide batch_size",
    "--eval-episodes 7": "processes must divide eval_episodes",
    "--z 1": "z stands for log 0",
    "--prompt-length 0": "prompt_length must be at least 1",
    "--micro-batch-size 0": "micro_batch_size must be at least 1",
    "--batch-size 0": "batch_size must be at least 1",
    "--lora-r -1": "lora_r must be finite and not negative",
    "--seed -1": "seed must be finite and not negative",
    "--kl-coef nan": "kl_coef must be finite and not negative",
    "--learning-rate -1": "learning_rate must be finite and not negative",
    "--z nan": "z stands for log 0",
    "--alpha 0 --beta 0": "with alpha and beta 0 nothing trains the policy",
    "--noise flip --noise-level 1.5": "noise_level is the probability of a flip, so at most 1",
    "--gamma -1": "gamma must be between 0 and 1",
    "--gae-lambda 95": "gae_lambda must be between 0 and 1",
    "--max-grad-norm 0": "max_grad_norm must be positive; 1e9 turns clipping off",
    "--max-grad-norm nan": "max_grad_norm must be positive; 1e9 turns clipping off",
    "--track": "track needs wandb: pip install wandb",
    "--reward-weights 1 2": "reward_weights: one for each reward_model",
}.items())  # fmt: skip
def test_flags_that_would_mean_something_else_are_refused(flags, message, monkeypatch, capsys):
    """By each of two processes."""
    monkeypatch.setattr(rlhf, "find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_:
        rlhf.parse_args(flags.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
