"""sppo_rlhf.py: tokens, masks, losses and whole runs, on models small enough to be made here."""

import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from filelock import FileLock
from helpers import StopAfter, fake_wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

import sppo_rlhf as rlhf

SMALL = dict(total_timesteps=32, batch_size=8, num_minibatches=2, update_epochs=2, prompt_length=8)
SMALL |= dict(
    response_length=10, eval_episodes=4, eval_freq=16, amp="off", device="cpu", run_name="run"
)


@pytest.fixture(scope="session")
def models(toy):
    """Models that have learnt nothing, on the toy's tokenizers: name -> folder."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "policy")
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    shape = dict(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2) | ends
    gpt2 = transformers.GPT2Config(**shape, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    gptj = transformers.GPTJConfig(**shape, rotary_dim=4)
    folders = {name: toy.parent / "models" / name for name in ("gpt2", "gptj", "scalar", "adapter")}
    for name, config in (("gpt2", gpt2), ("gptj", gptj)):
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    reward_tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "reward")
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    bert = transformers.BertConfig(
        vocab_size=len(reward_tokenizer), max_position_embeddings=64, num_labels=1, **small
    )
    transformers.AutoModelForSequenceClassification.from_config(bert).save_pretrained(
        folders["scalar"]
    )
    reward_tokenizer.save_pretrained(folders["scalar"])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders["gptj"], num_labels=1
    )
    adapter = peft.get_peft_model(
        base, peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    )
    adapter.save_pretrained(folders["adapter"])
    folders["adapted"] = adapter
    return folders


@pytest.fixture
def run(toy, tmp_path):
    """Trains with flags over `SMALL` on the toy's texts. Returns (`train`'s result, its folder)."""

    def run_(stop=None, name="a", **flags):
        if not (tmp_path / name / "toy").exists():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "toy").symlink_to(toy)
        task = rlhf.TASKS[flags.get("task", "toy")]
        args = rlhf.prepare(replace(task, **SMALL | {"runs_dir": str(tmp_path / name)} | flags))
        return rlhf.train(args, stop or threading.Event()), Path(args.runs_dir) / args.run_name

    return run_


def resume(folder):
    return rlhf.train(rlhf.prepare(rlhf.Args(resume=str(folder))), threading.Event())


def actor_critic(model, **flags):
    torch.manual_seed(0)
    actor = rlhf.ActorCritic(
        rlhf.Args(policy_model=str(model), lora_r=flags.pop("lora_r", 0)),
        torch.device("cpu"),
        torch.float32,
    )
    torch.manual_seed(0)
    nn.init.normal_(actor.value_head.weight)
    return actor


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def weights(folder):
    return torch.cat(
        [w.flatten() for name, w in checkpoint(folder)["agent"].items() if "reference" not in name]
    )


def progress(folder):
    with (folder / "progress.csv").open() as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


def ragged(seed=0, lengths=((3, 5), (7, 2), (1, 1), (5, 5)), tokens=5):
    """Texts, prompts padded on the left and responses on the right: ids, mask, unpadded texts."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt for prompt, _ in lengths)
    ids = torch.ones(len(lengths), width + tokens, dtype=torch.long)
    mask, texts = torch.zeros_like(ids, dtype=torch.bool), []
    for row, (prompt, response) in enumerate(lengths):
        text = torch.randint(2, 100, (prompt + response,), generator=generator)
        (
            ids[row, width - prompt : width + response],
            mask[row, width - prompt : width + response],
        ) = text, True
        texts.append((text, prompt))
    return ids, mask, texts


def collect(actor, ids, mask, uniform, top_k, eos, stop_at_eos):
    """The rollout from prompts; padding is 1, every reward 0."""
    length = uniform.shape[1]
    tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=1, decode=lambda *_, **__: "")
    setup = SimpleNamespace(
        accelerator=Accelerator(cpu=True), actor_critic=actor, tokenizer=tokenizer
    )
    args = rlhf.Args(response_length=length, stop_at_eos=stop_at_eos)
    completed = F.pad(ids, (0, length)), F.pad(mask, (0, length))
    reward_models = [lambda texts: torch.zeros(len(texts))]
    return rlhf.collect_rollout(setup, args, *completed, uniform, top_k, reward_models)


def batch(ids, mask, length, log_prob, value, advantage, returns, sft_ids=None, sft_mask=None):
    """A batch for `loss_and_metrics`, and its numbers of response and completion tokens."""
    sft_mask = mask if sft_mask is None else sft_mask
    rollout = rlhf.Rollout(
        ids=ids,
        mask=mask,
        response_mask=mask[:, -length:],
        log_prob=log_prob,
        reference_log_prob=log_prob,
        value=value,
        scores=torch.zeros(len(ids), 1),
        sft_ids=ids if sft_ids is None else sft_ids,
        sft_mask=sft_mask,
    )
    tokens = mask[:, -length:].sum(), sft_mask[:, -length:].sum()
    return rlhf.Batch(rollout, advantage, returns), *tokens


# Tokens and models


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
@pytest.mark.parametrize("lora_r", [0, 2])
def test_padding_changes_nothing(models, name, lora_r):
    actor = actor_critic(models[name], lora_r=lora_r)
    ids, mask, texts = ragged()
    padded = actor.policy_log_prob(ids, mask, 5), actor.value(ids, mask, 5)
    plain = transformers.AutoModelForCausalLM.from_pretrained(models[name]).eval()
    for row, (text, prompt) in enumerate(texts):
        alone = text[None], torch.ones_like(text[None], dtype=torch.bool)
        response = len(text) - prompt
        log_prob = actor.policy_log_prob(*alone, response)[0]
        torch.testing.assert_close(padded[0][row, :response], log_prob, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            padded[1][row, :response], actor.value(*alone, response)[0], atol=1e-5, rtol=0
        )
        expected = (
            plain(text[None])
            .logits[0]
            .log_softmax(-1)[range(prompt - 1, len(text) - 1), text[prompt:]]
        )
        torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_no_fused_attention_kernel_runs(models, monkeypatch, lora_r):
    """They may return NaN for padding on the left."""

    def fused(*args, **kwargs):
        raise AssertionError("fused attention")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    actor = actor_critic(models["gpt2"], lora_r=lora_r)
    ids, mask, _ = ragged()
    actor.value(ids, mask, 5)
    actor.policy_log_prob(ids, mask, 5)
    actor.reference_log_prob(ids, mask, 5)


@pytest.mark.parametrize("top_k", [0, 1, 5])
def test_a_rollout_samples_each_token_from_the_likeliest_k(models, top_k):
    """Against a slow loop on one text at a time, without a cache."""
    actor = actor_critic(models["gpt2"])
    ids, mask, texts = ragged(lengths=((3, 0), (7, 0), (1, 0)), tokens=0)
    uniform = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    eos = 3
    rollout = collect(actor, ids, mask, uniform, top_k, eos, False)
    new_ids, new_mask, log_prob = rollout.ids, rollout.mask, rollout.log_prob
    assert torch.equal(new_ids[:, :7], ids)
    assert new_mask[:, 7:].all()
    for row, (text, _) in enumerate(texts):
        for t in range(6):
            with torch.no_grad():
                logits = actor.policy(text[None]).logits[0, -1]
            allowed = logits.clone()
            allowed[eos] = -torch.inf
            order = allowed.sort(descending=True).indices[: top_k or None]
            probabilities = allowed[order].softmax(-1).tolist()
            total, token = 0.0, None
            for candidate, p in zip(order.tolist(), probabilities):
                total += p
                if token is None and uniform[row, t] < total:
                    token = candidate
            assert new_ids[row, 7 + t] == token
            assert log_prob[row, t].item() == pytest.approx(
                logits.log_softmax(-1)[token].item(), abs=1e-5
            )
            text = torch.cat([text, torch.tensor([token])])
    torch.testing.assert_close(rollout.reference_log_prob, log_prob)
    torch.testing.assert_close(rollout.value, actor.value(new_ids, new_mask, 6))
    assert torch.equal(rollout.response_mask, new_mask[:, 7:])


def test_a_text_ends_with_its_end_of_text(models):
    actor = actor_critic(models["gpt2"])
    ids, mask, _ = ragged(lengths=((3, 0), (7, 0)) * 4, tokens=0)
    uniform = torch.rand(8, 20, generator=torch.Generator().manual_seed(1))
    greedy = collect(actor, ids, mask, uniform, 0, 50, True).ids[:, 7:]
    eos = greedy[0, 4].item()  # declared to be the end of text, it comes in the middle
    rollout = collect(actor, ids, mask, uniform, 0, eos, True)
    new_ids, new_mask = rollout.ids[:, 7:], rollout.response_mask
    lengths = set()
    for tokens, there in zip(new_ids.tolist(), new_mask.tolist()):
        length = tokens.index(eos) + 1 if eos in tokens else 20
        assert there == [True] * length + [False] * (20 - length)
        assert tokens[length:] == [1] * (20 - length)
        lengths.add(length)
    assert len(lengths) > 1
    never = collect(actor, ids, mask, uniform, 0, eos, False)
    assert eos not in never.ids[:, 7:]
    assert never.response_mask.all()


def test_the_ratio_begins_at_one_with_any_padding_and_dropout_off(models):
    actor = actor_critic(models["gpt2"])  # its configuration asks for dropout
    ids, mask, _ = ragged(lengths=((3, 0), (7, 0), (1, 0), (2, 0)), tokens=0)
    uniform = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    rollout = collect(actor, ids, mask, uniform, 5, 3, True)
    ids, mask, log_prob = rollout.ids, rollout.mask, rollout.log_prob
    for rows in ([0, 1, 2, 3], [0, 3], [2]):
        new = actor(ids[rows], mask[rows], 9)[0]
        ratio = (new - log_prob[rows]).exp()[mask[rows, -9:]]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_lora_roles_are_adapters_on_one_model(models):
    actor = actor_critic(models["gptj"], lora_r=2)
    ids, mask, _ = ragged()
    for name, parameter in actor.named_parameters():
        if "lora_B.policy" in name:
            nn.init.normal_(parameter)
    policy, reference = actor.policy_log_prob(ids, mask, 5), actor.reference_log_prob(ids, mask, 5)
    plain = actor_critic(models["gptj"])
    torch.testing.assert_close(reference, plain.policy_log_prob(ids, mask, 5))
    torch.testing.assert_close(actor.value(ids, mask, 5), plain.value(ids, mask, 5))
    assert (policy - reference).abs().max() > 0.1
    log_prob, value, _ = actor(ids, mask, 5)
    (log_prob.sum() + value.sum()).backward()
    moved = {
        name
        for name, p in actor.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert {name.split(".")[-2] for name in moved if "lora" in name} == {"policy", "critic"}
    assert all("lora_" in name or "value_head" in name for name in moved)
    assert all(
        p.requires_grad == ("lora_" in n or "value_head" in n) for n, p in actor.named_parameters()
    )


# Reward models


def test_a_reward_model_reads_texts_with_its_own_tokenizer(toy):
    reward_model = rlhf.RewardModel(str(toy / "reward"), 1, torch.device("cpu"), torch.float32)
    texts = ["the plot was superb .", "the plot was dull .", ""]
    scores = reward_model(texts)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(toy / "reward").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "reward")
    for text, score in zip(texts, scores):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert score.item() == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert scores[0] > 0.5 > scores[1]
    other = rlhf.RewardModel(str(toy / "reward"), 0, torch.device("cpu"), torch.float32)(texts)
    torch.testing.assert_close(scores + other, torch.ones(3))


def test_a_reward_model_reads_the_end_of_a_text_that_is_too_long(toy):
    reward_model = rlhf.RewardModel(str(toy / "reward"), 1, torch.device("cpu"), torch.float32)
    bad, praise = " the plot was noisy ." * 20, " the cast was superb ." * 4
    good_at_the_end, good_at_the_start = reward_model([bad + praise, praise + bad])
    assert good_at_the_end > good_at_the_start


def test_a_model_with_one_output_gives_that_and_an_adapter_is_put_on_its_base(models):
    texts = ["the plot was superb .", "i hated it ."]
    score = rlhf.RewardModel(str(models["scalar"]), 0, torch.device("cpu"), torch.float32)(texts)
    assert score.shape == (2,)
    adapted = rlhf.RewardModel(str(models["adapter"]), 0, torch.device("cpu"), torch.float32)
    tokenizer, model = adapted.tokenizer, models["adapted"].eval()
    for text, score in zip(texts, adapted(texts)):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_score_does_not_depend_on_other_texts(models, toy, tmp_path):
    """GPT-2 has learned positions, which padding on the left would shift."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        models["gpt2"], num_labels=1
    )
    model.save_pretrained(tmp_path / "left")
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "policy", padding_side="left")
    tokenizer.save_pretrained(tmp_path / "left")
    reward_model = rlhf.RewardModel(str(tmp_path / "left"), 0, torch.device("cpu"), torch.float32)
    text = "it was good"
    alone = reward_model([text])
    beside = reward_model([text, "the plot was superb but the cast was dull ."])
    assert beside[0].item() == pytest.approx(alone.item(), abs=1e-5)


def test_a_model_without_a_tokenizer_has_that_of_the_table(models, toy, tmp_path, monkeypatch):
    for name in ("gptj", "adapter"):
        shutil.copytree(models[name], tmp_path / name)
    for path in (tmp_path / "gptj").glob("*token*"):
        path.unlink()
    base = str(tmp_path / "gptj")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(rlhf.UsageError, match="no tokenizer there"):
        rlhf.load_tokenizer(base)
    monkeypatch.setitem(rlhf.TOKENIZERS, base, str(toy / "policy"))
    adapted = rlhf.RewardModel(str(tmp_path / "adapter"), 0, torch.device("cpu"), torch.float32)
    expected = rlhf.RewardModel(str(models["adapter"]), 0, torch.device("cpu"), torch.float32)
    texts = ["it was good"]
    torch.testing.assert_close(adapted(texts), expected(texts))


def test_an_ensemble():
    scores = torch.tensor([[0.2, 0.4, 0.9], [0.5, 0.5, 0.5]])
    assert rlhf.aggregate(scores, "mean").tolist() == pytest.approx([0.5, 0.5])
    assert rlhf.aggregate(scores, "min").tolist() == pytest.approx([0.2, 0.5])
    std = ((0.3**2 + 0.1**2 + 0.4**2) / 3) ** 0.5
    assert rlhf.aggregate(scores, "mean-std").tolist() == pytest.approx([0.5 - std, 0.5])


@pytest.mark.parametrize(("text", "sentiment"), [
    ("the plot was superb but the cast was not superb . the script was funny .", 2 / 3),
    ("was dull . was not warm .", 0.0), ("not dull", 1.0), ("the the", 0.5), ("", 0.5),
])  # fmt: skip
def test_true_sentiment(text, sentiment):
    assert rlhf.toy_sentiment(text) == pytest.approx(sentiment)


# Loss and advantages


def random_tokens(seed=0, batch=6, tokens=5):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(batch, tokens, generator=generator, dtype=torch.float64) * 3
    new = old + torch.randn(batch, tokens, generator=generator, dtype=torch.float64) * 0.3
    advantage = torch.randn(batch, tokens, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    return new.requires_grad_(), old, advantage, torch.arange(tokens) < lengths


def test_the_loss_is_a_mean_over_sampled_tokens():
    new, old, advantage, mask = random_tokens()
    alpha, beta, z, clip = 0.5, 0.4, -2.0, 0.2
    total, count = 0.0, 0
    for b in range(6):
        for t in range(5):
            if mask[b, t]:
                p, p_old, a = new[b, t].exp().item(), old[b, t].exp().item(), advantage[b, t].item()
                r = p / p_old
                clipped = a * min(max(r, 1 - clip), 1 + clip)
                loss = -min(a * r, clipped)
                reverse = -a * z * (1 - p) / p_old if a * r <= clipped else 0
                total, count = total + alpha * loss + beta * reverse, count + 1
    assert 10 < count < 30
    loss = rlhf.symmetric_policy_loss(new, old, advantage, mask, clip, alpha, beta, z)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)


def test_the_gradient_is_ppos_times_k_and_nothing_flows_from_padding():
    new, old, advantage, mask = random_tokens()
    for hidden in (0.0, torch.inf, torch.nan):
        a, o = advantage.masked_fill(~mask, hidden), old.masked_fill(~mask, -200.0)
        ppo = torch.autograd.grad(
            rlhf.symmetric_policy_loss(new, o, a, mask, 0.2, 1.0, 0.0, -1.0), new
        )[0]
        symmetric = rlhf.symmetric_policy_loss(new, o, a, mask, 0.2, 0.5, 0.4, -3.0)
        gradient = torch.autograd.grad(symmetric, new)[0]
        assert ppo[mask].abs().max() > 0.01
        torch.testing.assert_close(
            gradient[mask], (0.5 + 0.4 * 3) * ppo[mask], rtol=1e-12, atol=1e-15
        )
        assert (gradient[~mask] == 0).all()


def test_advantages_against_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    B, T, gamma, lam, kl_coef = 5, 7, 0.9, 0.8, 0.3
    reward = torch.from_numpy(rng.normal(size=B))
    log_prob, reference, value = torch.from_numpy(rng.normal(size=(3, B, T)))
    lengths = [7, 1, 4, 2, 6]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    args = rlhf.Args(gamma=gamma, gae_lambda=lam, kl_coef=kl_coef)
    advantage, returns = rlhf.token_advantages(reward, log_prob, reference, value, mask, args)
    for b, length in enumerate(lengths):
        penalty = kl_coef * (log_prob - reference)[b, :length]
        rewards = (-penalty).tolist()
        rewards[-1] += reward[b].item()
        values = [*value[b, :length].tolist(), 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            assert advantage[b, t].item() == pytest.approx(expected)
            assert returns[b, t].item() == pytest.approx(expected + values[t])
    assert (advantage[~mask] == 0).all()


def test_value_loss_is_clipped_around_the_old_value(models):
    actor = actor_critic(models["gpt2"])
    ids, mask, _ = ragged()
    value = actor.value(ids, mask, 5).detach()
    generator = torch.Generator().manual_seed(0)
    old, returns = (
        value + torch.randn(4, 5, generator=generator),
        value + torch.randn(4, 5, generator=generator),
    )
    zeros = torch.zeros(4, 5)
    args = rlhf.Args(alpha=1.0, beta=0.0, vf_coef=0.5, clip_coef=0.2)
    minibatch = batch(ids, mask, 5, zeros, old, zeros, returns)
    _, metrics = rlhf.loss_and_metrics(actor, args, *minibatch)
    errors = []
    for v, o, r, there in zip(*(x.flatten().tolist() for x in (value, old, returns, mask[:, -5:]))):
        clipped = o + min(max(v - o, -0.2), 0.2)
        errors += [0.5 * max((v - r) ** 2, (clipped - r) ** 2)] if there else []
    assert metrics["value_loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_reference_completions(toy):
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "policy")
    rows = [
        {"text": "the plot was superb and the cast was dull . i loved it ."},
        {"text": "the"},
        {"text": ""},
    ]
    args = rlhf.Args(task="toy", prompt_length=4, response_length=5)
    ids, mask = rlhf.tokenize(rows, tokenizer, args)
    whole = tokenizer(rows[0]["text"])["input_ids"]
    half = len(whole) // 2
    assert ids[0].tolist() == [*whole[half - 4 : half], *whole[half : half + 5]]
    eos = tokenizer.eos_token_id
    assert ids[1][mask[1]].tolist() == [eos, *tokenizer("the")["input_ids"], eos]
    assert ids[2][mask[2]].tolist() == [eos, eos]
    assert mask.tolist()[1] == [False] * 3 + [True] * 3 + [False] * 3


def test_the_loss_is_the_sum_of_its_parts_and_a_share_of_the_minibatch(models):
    """Against sums over tokens, with a reference text of another length for each text."""
    actor = actor_critic(models["gpt2"])
    ids, mask, _ = ragged()
    real_ids, real_mask, _ = ragged(seed=1, lengths=((3, 1), (2, 5), (4, 4), (1, 2)))
    generator = torch.Generator().manual_seed(0)
    new, value = actor.policy_log_prob(ids, mask, 5), actor.value(ids, mask, 5)
    real = actor.policy_log_prob(real_ids, real_mask, 5)
    old, advantage = (
        new + 0.3 * torch.randn(4, 5, generator=generator),
        torch.randn(4, 5, generator=generator),
    )
    value, old = value.detach(), old.detach()
    args = rlhf.Args(alpha=1.0, beta=0.0, vf_coef=0.3, ce_coef=0.7, clip_coef=0.2)
    part, tokens, completion_tokens = batch(
        ids, mask, 5, old, value, advantage, value + 2, real_ids, real_mask
    )
    loss, metrics = rlhf.loss_and_metrics(actor, args, part, 2 * tokens, 4 * completion_tokens)
    ratio = (new - old).exp()
    ppo = (
        -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))[mask[:, -5:]]
        .mean()
        .item()
    )
    sft_loss = -real[real_mask[:, -5:]].mean().item()
    expected = 0.5 * (ppo + 0.3 * 0.5 * 2**2) + 0.25 * 0.7 * sft_loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["policy_loss"].item() == pytest.approx(0.5 * ppo, rel=1e-5)
    assert metrics["sft_loss"].item() == pytest.approx(0.25 * sft_loss, rel=1e-5)
    clipped = ((ratio - 1).abs() > 0.2)[mask[:, -5:]].float().mean().item()
    assert metrics["clipfrac"].item() == pytest.approx(0.5 * clipped)
    assert 0 < clipped < 1


def test_in_bfloat16_the_ratio_begins_at_one_and_log_probs_are_close(models):
    actor = actor_critic(models["gpt2"])
    ids, mask, _ = ragged(lengths=((3, 0), (7, 0), (1, 0), (2, 0)), tokens=0)
    exact = actor.policy_log_prob(*(x.repeat(1, 2) for x in (ids, mask)), 7)
    actor.dtype = torch.bfloat16
    with actor.autocast():
        rounded = actor.policy_log_prob(*(x.repeat(1, 2) for x in (ids, mask)), 7)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.3
    uniform = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    rollout = collect(actor, ids, mask, uniform, 5, 3, False)
    ratio = (actor(rollout.ids, rollout.mask, 9)[0] - rollout.log_prob).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_in_bfloat16_the_value_head_is_in_float32(models):
    actor = actor_critic(models["gpt2"])
    torch.nn.init.normal_(actor.value_head.weight)
    ids, mask, _ = ragged(lengths=((3, 0), (7, 0), (1, 0), (2, 0)), tokens=0)
    actor.dtype = torch.bfloat16
    with actor.autocast():
        value = actor.value(ids, mask, 3)
        hidden = rlhf.predicting_states(actor.critic, ids, mask, 3)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, actor.value_head(hidden.float()).squeeze(-1))


# Runs


def test_a_run_leaves_what_it_promises(run, toy):
    summary, folder = run(seed=7, noise="uniform", ce_coef=0.1)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    expected = {
        "script": "sppo_rlhf.py",
        "algo": "sppo",
        "env_id": "toy",
        "seed": 7,
        "noise": "uniform",
    }
    expected |= {
        "noise_level": 0.05,
        "alpha": 0.5,
        "beta": 0.4,
        "z": -1.0,
        "total_timesteps": 32,
        "finished": True,
    }
    assert {name: summary[name] for name in expected} == expected
    assert {"final_return_std", "train_return_last100", "sps", "wall_s"} <= set(summary)
    rows = progress(folder)
    assert [row["step"] for row in rows] == [0, 16, 32]
    assert list(rows[0])[:5] == ["step", "return_mean", "return_std", "length_mean", "episodes"]
    assert rows[-1]["return_mean"] == summary["final_return_mean"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [16] * 4 + [32] * 4
    assert set(samples[0]) == {"step", "prompt", "response", "reward"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    losses = "policy_loss reverse_loss value_loss sft_loss entropy approx_kl clipfrac grad_norm"
    names = {
        f"losses/{name}"
        for name in (
            losses + " clipped_gradients explained_variance advantage_sign_flips advantage_largest"
        ).split()
    }
    names |= {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "kl")} | {
        "eval/kl"
    }
    assert names <= set(events.Tags()["scalars"])
    assert not list(folder.glob("*.tmp"))


def test_the_trained_policy_is_a_folder_like_any_other(run, toy):
    _, folder = run(learning_rate=1e-2)
    trained, before = (
        transformers.AutoModelForCausalLM.from_pretrained(x)
        for x in (folder / "policy", toy / "policy")
    )
    state = checkpoint(folder)["agent"]
    for name, weight in trained.named_parameters():
        assert torch.equal(weight, state[f"policy.{name}"])
    assert (trained.transformer.wte.weight - before.transformer.wte.weight).abs().max() > 1e-3
    assert (
        len(transformers.AutoTokenizer.from_pretrained(folder / "policy"))
        == trained.config.vocab_size
    )
    again = {"run_name": "next", "policy_model": str(folder / "policy")}
    args = rlhf.Args(**SMALL | {"runs_dir": str(folder.parent)} | again)
    loaded = rlhf.load(rlhf.prepare(args)).actor_critic.policy
    assert torch.equal(loaded.transformer.wte.weight, trained.transformer.wte.weight)


def test_evaluation_by_hand(run, toy):
    """Perplexities, distinct-n and reward models from the samples of the first evaluation."""
    _, folder = run(eval_greedy=True, eval_reward_model=(str(toy / "reward"),))
    row = progress(folder)[0]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()][:4]
    words = [sample["response"].split() for sample in samples]
    assert row["distinct_1"] == pytest.approx(
        len({w for ws in words for w in ws}) / sum(map(len, words))
    )
    pairs = [pair for ws in words for pair in zip(ws, ws[1:])]
    assert row["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    truth = [rlhf.toy_sentiment(sample["response"]) for sample in samples]
    assert row["sentiment"] == pytest.approx(np.mean(truth))
    reward_model = rlhf.RewardModel(str(toy / "reward"), 1, torch.device("cpu"), torch.float32)
    scores = reward_model([sample["prompt"] + sample["response"] for sample in samples])
    assert [sample["reward"] for sample in samples] == pytest.approx(scores.tolist(), abs=1e-5)
    assert row["return_mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert row["heldout_reward"] == row["return_mean"]
    policy = transformers.AutoModelForCausalLM.from_pretrained(toy / "policy").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "policy")
    log_probs, lengths = [], []
    for sample in samples:
        prompt = tokenizer(sample["prompt"])["input_ids"]
        ids, length = torch.tensor([prompt]), 0
        while length < 10:
            with torch.no_grad():
                log_prob = policy(ids).logits[0, -1].log_softmax(-1)
            log_probs.append(log_prob.max().item())
            ids, length = torch.cat([ids, log_prob.argmax().view(1, 1)], 1), length + 1
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        lengths.append(length)
        assert (
            tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True) == sample["response"]
        )
    assert row["length_mean"] == pytest.approx(np.mean(lengths))
    assert row["perplexity"] == pytest.approx(np.exp(-np.mean(log_probs)), rel=1e-4)


def test_every_evaluation_is_printed(run, capsys):
    _, folder = run()
    printed = capsys.readouterr().out.splitlines()
    for row, line in zip(progress(folder), printed, strict=True):
        assert line == f"step {row['step']:,.0f}: reward {row['return_mean']:.3f}"


def test_equal_seeds_give_equal_runs_and_others_do_not(run):
    a, b, c = (run(name=name, seed=seed)[1] for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(weights(a), weights(b))
    assert (a / "progress.csv").read_bytes() == (b / "progress.csv").read_bytes()
    assert not torch.equal(weights(a), weights(c))


def test_interrupted_and_resumed_a_run_is_the_same_to_the_bit(run):
    flags = dict(noise="normal", ce_coef=0.1)
    _, whole = run(name="whole", **flags)
    stopped, folder = run(name="broken", stop=StopAfter(2), **flags)
    assert stopped is None
    assert not (folder / "summary.json").exists()
    assert resume(folder)["finished"]
    for name in ("progress.csv", "samples.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert torch.equal(weights(folder), weights(whole))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_run_begins_alike_and_is_resumed(run):
    flags = {"eval_greedy": True, "amp": "off"}
    _, on_cpu = run(name="cpu", **flags)
    _, folder = run(name="gpu", device="cuda", stop=StopAfter(2), **flags)
    assert resume(folder)["finished"]
    first, expected = progress(folder)[0], progress(on_cpu)[0]
    assert first["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-2)


def test_a_stopped_run_leaves_a_due_evaluation_to_its_resumption(run):
    """So that its checkpoint is there at once."""
    _, folder = run(stop=StopAfter(2))
    assert [row["step"] for row in progress(folder)] == [0]
    assert checkpoint(folder)["progress"]["global_step"] == 16
    resume(folder)
    assert [row["step"] for row in progress(folder)] == [0, 16, 32]


def test_stopped_in_its_last_update_a_run_is_not_finished(run):
    _, whole = run(name="whole")
    stopped, folder = run(name="broken", stop=StopAfter(4))
    assert stopped is None
    before = checkpoint(folder)["progress"]
    assert before["global_step"] == 32
    summary = resume(folder)
    assert summary["finished"]
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    # the last evaluation counts, in time and in the last checkpoint
    after = checkpoint(folder)["progress"]
    assert after["wall_seconds"] == summary["wall_s"] > before["wall_seconds"]
    assert [row["step"] for row in after["evaluations"]] == [0, 16, 32]


def test_checkpoints_change_nothing(run):
    """Adam's state, asked for before it has one, would come from a step with no gradient."""
    often, never = (
        run(name=name, checkpoint_freq=n)[1] for name, n in (("often", 8), ("never", 0))
    )
    assert torch.equal(weights(often), weights(never))


def test_lora_runs_are_resumed_to_the_bit(run, models, tmp_path):
    flags = summarisation(tmp_path, models)
    _, whole = run(name="whole", **flags)
    _, folder = run(name="broken", stop=StopAfter(2), **flags)
    resume(folder)
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()
    assert torch.equal(weights(folder), weights(whole))


def test_an_ensemble_trains_and_a_held_out_reward_model_is_evaluated(run, toy, models):
    names = (str(toy / "reward"), str(models["scalar"]))
    _, folder = run(reward_model=names, reward_aggregate="min", eval_reward_model=names[:1])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()][:4]
    texts = [sample["prompt"] + sample["response"] for sample in samples]
    a, b = (rlhf.RewardModel(name, 1, torch.device("cpu"), torch.float32)(texts) for name in names)
    assert [sample["reward"] for sample in samples] == pytest.approx(
        torch.minimum(a, b).tolist(), abs=1e-5
    )
    assert progress(folder)[0]["heldout_reward"] == pytest.approx(a.mean().item(), abs=1e-5)


def test_held_out_reward_models_do_not_change_the_training(run, models, tmp_path):
    """Loading a LoRA adapter draws random numbers, as the policy's own initial weights do."""
    flags = summarisation(tmp_path, models)
    _, without = run(name="without", **flags)
    _, with_one = run(name="with", eval_reward_model=(str(models["adapter"]),), **flags)
    assert "heldout_adapter" in progress(with_one)[0]
    assert torch.equal(weights(with_one), weights(without))


def test_labels_of_a_multi_label_classifier_are_independent(toy, tmp_path):
    folder = tmp_path / "classifier"
    shutil.copytree(toy / "reward", folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.problem_type = "multi_label_classification"
    config.save_pretrained(folder)
    texts = ["the plot was superb .", "the cast was awful .", "the music was not dull ."]
    classify = transformers.pipeline("text-classification", str(folder), top_k=None)
    expected = []
    for scores in classify(texts):
        expected += [score["score"] for score in scores if score["label"] == "POSITIVE"]
    reward_model = rlhf.RewardModel(str(folder), 1, torch.device("cpu"), torch.float32)
    assert reward_model(texts).tolist() == pytest.approx(expected, abs=1e-5)


def test_reward_models_with_and_without_a_maximal_length(toy, models, tmp_path):
    """BERT here has 64 positions, two of them for special tokens; XLNet has no limit."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "reward")
    config = transformers.XLNetConfig(
        vocab_size=len(tokenizer), d_model=8, n_layer=1, n_head=1, d_inner=8, num_labels=1
    )
    xlnet = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    xlnet.save_pretrained(tmp_path / "xlnet")
    tokenizer.save_pretrained(tmp_path / "xlnet")
    words = ["dull" if i % 7 else "superb" for i in range(200)]
    long = " ".join(words)

    def scores(name, text):
        return rlhf.RewardModel(str(name), 0, torch.device("cpu"), torch.float32)([text])

    assert torch.equal(
        scores(models["scalar"], long), scores(models["scalar"], " ".join(words[-62:]))
    )
    ids = tokenizer(long, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 202
    assert scores(tmp_path / "xlnet", long) == pytest.approx(xlnet(ids).logits.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [(transformers.GraniteConfig, {"logits_scaling": 8}), (transformers.CohereConfig, {})],
)
def test_policies_that_scale_their_logits_are_refused(run, toy, tmp_path, kind, scale):
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "policy")
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16)
    shape |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    folder = tmp_path / "scaled"
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape, **ends, **scale))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(rlhf.UsageError, match="scaled: scales or caps its logits"):
        run(policy_model=str(folder))
    assert not (tmp_path / "a" / "run").exists()


def test_posts_and_their_summaries(toy):
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "policy")
    rows = [{"prompt": "the plot was dull", "label": " was not dull"}]
    ids, mask = rlhf.tokenize(
        rows, tokenizer, replace(rlhf.TASKS["tldr"], prompt_length=3, response_length=9)
    )
    prompt, label = (tokenizer(rows[0][c])["input_ids"] for c in ("prompt", "label"))
    assert ids[0][mask[0]].tolist() == [*prompt[-3:], *label, tokenizer.eos_token_id]


def test_a_killed_run_goes_on_from_its_checkpoint_without_doubled_evaluations(run):
    _, whole = run(name="whole")
    _, folder = run(name="killed", stop=StopAfter(2))
    with (folder / "progress.csv").open("a") as file:
        file.write("24" + ",-5.5" * 10 + "\n")
    (folder / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    resume(folder)
    assert (folder / "progress.csv").read_bytes() == (whole / "progress.csv").read_bytes()


def test_the_summary_is_the_last_thing_written(run, monkeypatch):
    written, save = [], rlhf.save

    def recording(path, content):
        written.append(path.name)
        assert path.name != "summary.json" or (path.parent / "policy" / "config.json").is_file()
        save(path, content)

    monkeypatch.setattr(rlhf, "save", recording)
    run()
    assert written[-2:] == ["checkpoint.pt", "summary.json"]


def test_killed_just_before_its_summary_a_run_only_writes_that(run):
    summary, folder = run()
    before = (folder / "checkpoint.pt").read_bytes(), (folder / "progress.csv").read_bytes()
    (folder / "summary.json").unlink()
    resumed = resume(folder)
    assert json.dumps(resumed) == json.dumps(summary | {"resume": str(folder)})
    assert (
        (folder / "checkpoint.pt").read_bytes(),
        (folder / "progress.csv").read_bytes(),
    ) == before
    assert (folder / "summary.json").read_text() == json.dumps(resumed, indent=2)


def test_infinite_weights_never_replace_a_checkpoint(run, tmp_path, monkeypatch):
    """The weights become infinite in the last step of the third of four updates."""
    update = rlhf.update
    updates = []

    def failing_update(setup, *arguments):
        metrics = update(setup, *arguments)
        updates.append(1)
        if len(updates) == 3:
            with torch.no_grad():
                setup.actor_critic.value_head.weight[0, 0] = math.inf
        return metrics

    monkeypatch.setattr(rlhf, "update", failing_update)
    with pytest.raises(rlhf.RunError, match=r"not finite \(value_head.weight\).* after step 24,"):
        run(checkpoint_freq=8)
    folder = tmp_path / "a" / "run"
    assert checkpoint(folder)["progress"]["global_step"] == 16
    assert weights(folder).isfinite().all()


def test_a_run_killed_before_its_first_checkpoint_logs_its_beginning_once(
    run, tmp_path, monkeypatch
):
    def killed(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, "update", killed)
        with pytest.raises(ZeroDivisionError):
            run()
    folder = tmp_path / "a" / "run"
    time.sleep(1)  # TensorBoard sorts its files by the second, and then by a number, as a text
    resume(folder)
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("eval/return_mean")] == [0, 16, 32]


@pytest.mark.parametrize("damage", ["half", "garbage", "missing", "flipped"])
def test_a_damaged_checkpoint_is_named_and_left_alone(run, models, damage):
    _, folder = run(stop=StopAfter(2))
    path = folder / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        path.write_bytes(bytes(range(256)) * 99)
    elif damage == "missing":
        state = checkpoint(folder)
        del state["agent"]["value_head.weight"]
        torch.save(state, path)
    else:
        weight = checkpoint(folder)["agent"]["value_head.weight"]
        position = content.index(weight.numpy().tobytes())
        path.write_bytes(content[:position] + b"\x01" + content[position + 1 :])
    before = path.read_bytes()
    with pytest.raises(rlhf.UsageError, match=f"{path}: cannot be used: "):
        resume(folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"task": "nonsense"}, {"batch_size": "8"}, {"gamma": 2.0}, {"micro_batch_size": True}],
)
def test_damaged_arguments_are_named(run, change):
    _, folder = run(stop=StopAfter(2))
    saved = json.loads((folder / "args.json").read_text())
    saved["args"].update(change)
    (folder / "args.json").write_text(json.dumps(saved))
    with pytest.raises(rlhf.UsageError, match=f"{folder / 'args.json'}: cannot be used: "):
        resume(folder)


def test_a_run_is_resumed_by_one_process_at_a_time(run, monkeypatch, capsys):
    _, folder = run(stop=StopAfter(2))
    monkeypatch.setattr(sys, "argv", ["sppo_rlhf.py", "--resume", str(folder)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()  # of the run above
    with FileLock(folder / "lock"), pytest.raises(SystemExit) as exit_:
        rlhf.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {folder}: another process is at work on this run\n"


def test_a_lack_of_memory_is_one_line_and_the_run_can_continue(run, monkeypatch, capsys):
    _, folder = run(stop=StopAfter(2))
    monkeypatch.setattr(sys, "argv", ["sppo_rlhf.py", "--resume", str(folder)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()  # of the run above

    def failing_update(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(rlhf, "update", failing_update)
        rlhf.main()
    assert exit_.value.code == 1
    reason, _, advice = capsys.readouterr().err.partition(
        "; to continue from the last checkpoint: "
    )
    assert reason.endswith("error: CUDA out of memory. Tried to allocate 2 GiB.")
    assert advice
    assert resume(folder)["finished"]


def test_tracking_that_fails_is_one_line(run, monkeypatch):
    def failing_init(**arguments):
        raise RuntimeError("no API key")

    fake_wandb(monkeypatch, failing_init)
    with pytest.raises(rlhf.UsageError, match="--track: cannot be used: .*no API key"):
        run(track=True)


REWARDS = """
def length(texts):
    return [float(len(text)) for text in texts]

def infinite(texts):
    return [float("inf") for _ in texts]

calls = []
def infinite_later(texts):
    calls.append(1)
    return [float("inf") if len(calls) > 2 else 0.5 for _ in texts]

def short(texts):
    return [1.0]

def failing(texts):
    raise KeyError("no key")
"""


def test_a_python_function_is_a_reward_model_too(run, toy, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    length = f"{tmp_path / 'rewards.py'}:length"
    models = (length, str(toy / "reward"))
    _, folder = run(reward_model=models, eval_reward_model=(length,))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()][:4]
    texts = [sample["prompt"] + sample["response"] for sample in samples]
    judge = rlhf.RewardModel(str(toy / "reward"), 1, torch.device("cpu"), torch.float32)
    expected = [(len(text) + score) / 2 for text, score in zip(texts, judge(texts).tolist())]
    assert [sample["reward"] for sample in samples] == pytest.approx(expected, abs=1e-5)
    lengths = np.mean([len(text) for text in texts])
    assert progress(folder)[0]["heldout_rewards.py:length"] == pytest.approx(lengths)


@pytest.mark.parametrize(
    ("function", "message"),
    [("infinite", "not finite"), ("short", r"8 texts, scores"), ("failing", "KeyError")],
)
def test_a_reward_function_that_fails_is_named(run, tmp_path, function, message):
    (tmp_path / "rewards.py").write_text(REWARDS)
    name = f"{tmp_path / 'rewards.py'}:{function}"
    with pytest.raises(rlhf.RunError, match=f"{name}: .*{message}"):
        run(reward_model=(name,), eval_episodes=8)


@pytest.mark.parametrize("heldout", [False, True])
def test_an_infinite_score_is_noticed_whatever_becomes_of_it(run, tmp_path, heldout):
    """The smaller of two scores may be finite, and held-out models give no reward."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    length, infinite = (f"{tmp_path / 'rewards.py'}:{name}" for name in ("length", "infinite"))
    flags = {"reward_model": (length, infinite), "reward_aggregate": "min"}
    if heldout:
        flags = {"reward_model": (length,), "eval_reward_model": (infinite,)}
    with pytest.raises(rlhf.RunError, match="rewards.py:infinite: scores that are not finite"):
        run(**flags)


def test_an_infinite_score_in_training_ends_the_run(run, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    name = f"{tmp_path / 'rewards.py'}:infinite_later"
    with pytest.raises(rlhf.RunError, match="not finite, with the means"):
        run(reward_model=(name,), eval_freq=0)
    assert len(progress(tmp_path / "a" / "run")) == 1


def test_a_reward_function_that_is_not_there_is_a_usage_error(run, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    name = f"{tmp_path / 'rewards.py'}:nothing"
    with pytest.raises(rlhf.UsageError, match=f"{name}: cannot be loaded"):
        run(reward_model=(name,))
    assert not (tmp_path / "a" / "run").exists()


def test_evaluate_repeats_the_last_evaluation(run, monkeypatch, capsys):
    _, folder = run()
    capsys.readouterr()  # its evaluations
    before = sorted(path.name for path in folder.iterdir())
    arguments = ["--evaluate", str(folder), "--eval-episodes", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sppo_rlhf.py", *arguments])
    rlhf.main()
    lines = capsys.readouterr().out.splitlines()
    last = progress(folder)[-1]
    for name in ("return_mean", "kl", "sentiment"):
        assert f"{name}: {last[name]:.4g}" in lines
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()][-4:]
    for line, sample in zip(lines, samples):
        assert line.startswith(f"{sample['reward']:.3f} {sample['prompt']} [")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_flags_are_over_the_defaults_of_their_task():
    for task, defaults in rlhf.TASKS.items():
        assert rlhf.parse_args(["--task", task]) == defaults
        assert rlhf.parse_args([f"--task={task}", "--gamma", "0.5"]) == replace(defaults, gamma=0.5)
    assert rlhf.parse_args([]) == rlhf.Args()


@pytest.mark.parametrize(("task", "flags", "expected"), [
    ("toy", {}, {"alpha": 0.5, "noise_level": 0.0, "eval_freq": 448, "checkpoint_freq": 448}),
    ("toy", {"beta": 0.0, "noise": "flip"}, {"alpha": 1.0, "noise_level": 0.1}),
    ("toy", {"dataset": "a"}, {"eval_dataset": None}),
    ("imdb", {"noise": "normal"}, {"eval_dataset": "stanfordnlp/imdb:test", "noise_level": 0.05}),
    ("imdb", {"policy_model": "a", "dataset": "b"}, {"tokenizer": "a", "eval_dataset": None}),
    ("imdb", {"policy_model": "a", "tokenizer": "gpt2"}, {"tokenizer": "gpt2"}),
])  # fmt: skip
def test_defaults_that_depend_on_other_flags(task, flags, expected):
    args = vars(rlhf.with_defaults(replace(rlhf.TASKS[task], **flags)))
    assert {name: args[name] for name in expected} == expected


def test_a_finished_run_is_neither_resumed_nor_written_over(run):
    _, folder = run()
    with pytest.raises(ValueError, match="not the folder of an interrupted run"):
        resume(folder)
    with pytest.raises(ValueError, match="File exists"):
        run()


def test_sppo_is_ppo_with_alpha_k(run, monkeypatch):
    """In float64, since Adam would magnify the rounding of float32."""
    original = rlhf.ActorCritic.__init__

    def in_float64(self, *arguments):
        original(self, *arguments)
        self.double()

    monkeypatch.setattr(rlhf.ActorCritic, "__init__", in_float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    k = 0.5 + 20.0
    coefs = dict(ce_coef=0.1, max_grad_norm=0.5)
    scaled = dict(ce_coef=0.1 / k, vf_coef=0.5 / k, max_grad_norm=0.5 / k, adam_eps=1e-5 / k)
    runs = {
        "sppo": run(name="sppo", alpha=0.5, beta=20.0, **coefs)[1],
        "scaled": run(name="scaled", alpha=k, beta=0.0, **coefs)[1],
        "rest": run(name="rest", alpha=1.0, beta=0.0, **scaled)[1],
        "ppo": run(name="ppo", alpha=1.0, beta=0.0, **coefs)[1],
    }
    symmetric = weights(runs["sppo"])
    for name in ("scaled", "rest"):
        assert (runs[name] / "samples.jsonl").read_text() == (
            runs["sppo"] / "samples.jsonl"
        ).read_text()
        torch.testing.assert_close(weights(runs[name]), symmetric, rtol=0, atol=1e-7)
    assert (weights(runs["ppo"]) - symmetric).abs().max() > 1e-5


def test_micro_batches_add_up_to_the_minibatch(run):
    whole, parts = (
        weights(run(name=str(n), micro_batch_size=n, ce_coef=0.1)[1]) for n in (None, 1)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)


def torchrun(folder, *flags):
    """Two processes on the CPU; returns what they printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        port,
    ]
    flags = [*flags, "--amp", "off", "--runs-dir", str(folder), "--run-name", "run"]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, rlhf.__file__, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | alone,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", ["toy", "tldr"])
def test_two_processes_do_what_one_does(run, toy, models, tmp_path, task):
    """The same texts, and weights within rounding, which Adam magnifies near zero gradients."""
    flags = dict(ce_coef=0.1, noise="flip", adam_eps=1e-4, micro_batch_size=1)
    flags |= summarisation(tmp_path, models) if task == "tldr" else {}
    _, one = run(**flags)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "toy").symlink_to(toy)
    small = {
        name: x for name, x in (SMALL | flags).items() if name not in ("amp", "device", "run_name")
    }
    words = [
        str(word)
        for name, x in small.items()
        for word in (f"--{name.replace('_', '-')}", *(x if isinstance(x, tuple) else [x]))
    ]
    code, output = torchrun(tmp_path / "two", *words)
    assert code == 0, output[-3000:]
    for line in ("step 0: ", "step 16: ", "step 32: ", f"{task} sppo: "):  # one of them speaks
        assert output.count(line) == 1
    two = tmp_path / "two" / "run"
    assert (two / "samples.jsonl").read_text().count("\n") == 12
    before, after = (
        [json.loads(line)["response"] for line in (x / "samples.jsonl").open()] for x in (one, two)
    )
    assert before == after
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-5)


def summarisation(folder, models):
    """Flags for GPT-J's architecture with LoRA on posts and summaries that are made here."""
    rng = rlhf.random.Random(3)
    rows = (
        {"prompt": f"POST: {rlhf.toy_review(rng)} TL;DR:", "label": " i loved it ."}
        for _ in range(40)
    )
    path = folder / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(
        task="tldr",
        policy_model=str(models["gptj"]),
        reward_model=(str(models["adapter"]),),
        dataset=str(path),
        eval_dataset=str(path),
        learning_rate=1e-2,
    )


def test_summaries_with_lora(run, models, tmp_path):
    summary, folder = run(**summarisation(tmp_path, models))
    assert summary["env_id"] == "tldr"
    rows = progress(folder)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(rows[-1]["kl"]) > 1e-3
    assert {"rouge1", "rouge2", "rougeL"} <= set(rows[0])
    state = checkpoint(folder)["agent"]
    assert all("lora_" in name or "value_head" in name for name in state)
    for adapter in ("policy", "critic"):
        assert all(w.abs().max() > 0 for name, w in state.items() if f"lora_B.{adapter}" in name)
    base = transformers.AutoModelForCausalLM.from_pretrained(models["gptj"])
    base.load_adapter(str(folder / "policy"))
    loaded = {name: p for name, p in base.named_parameters() if "lora_" in name}
    assert len(loaded) > 0
    for name, weight in loaded.items():
        assert torch.equal(weight, state["policy." + name.replace("default", "policy")])


def test_the_reward_is_noisy_in_training_and_clean_in_what_is_reported(run, monkeypatch):
    learnt = {}
    original = rlhf.token_advantages

    def recording(reward, *arguments):
        learnt.setdefault(name, []).append(reward)
        return original(reward, *arguments)

    monkeypatch.setattr(rlhf, "token_advantages", recording)
    for name, flags in {"clean": {}, "flipped": dict(noise="flip", noise_level=1.0)}.items():
        summary, folder = run(name=name, total_timesteps=8, eval_freq=0, **flags)
        learnt[name + " reported"] = summary["train_return_last100"]
    np.testing.assert_allclose(learnt["flipped"][0], 1 - learnt["clean"][0])
    assert (
        learnt["clean reported"]
        == learnt["flipped reported"]
        == pytest.approx(learnt["clean"][0].mean())
    )


@pytest.mark.parametrize("noise", ["none", "adv_flip"])
def test_advantages_flip_before_normalisation_anew_every_time(run, monkeypatch, noise):
    seen, perturb_advantage = [], rlhf.perturb_advantage

    def recording(advantage, level, generator):
        noisy = perturb_advantage(advantage, level, generator)
        seen.append((noisy != advantage).float().mean().item())
        return noisy

    monkeypatch.setattr(rlhf, "perturb_advantage", recording)
    run(noise=noise)
    assert len(seen) == (16 if noise == "adv_flip" else 0)  # minibatches
    assert all(0 < share < 0.4 for share in seen)
    assert len(set(seen)) > 1 or not seen


def test_advantages_are_normalised_over_sampled_tokens(run, monkeypatch):
    learnt, original = [], rlhf.accumulate_gradient

    def recording(setup, args, minibatch):
        learnt.append(minibatch.advantage[minibatch.rollout.response_mask])
        return original(setup, args, minibatch)

    monkeypatch.setattr(rlhf, "accumulate_gradient", recording)
    run(response_length=40)
    assert min(len(advantage) for advantage in learnt) < 8 // 2 * 40  # texts end early
    for advantage in learnt:
        assert advantage.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantage.std().item() == pytest.approx(1, abs=1e-3)


def test_responses_may_be_empty(run, toy, monkeypatch):
    """A policy that says nothing: each text is its prompt and an end of text."""
    policy = toy.parent / "silent"
    if not policy.exists():
        shutil.copytree(toy / "policy", policy)
        model = transformers.AutoModelForCausalLM.from_pretrained(policy)
        eos = model.config.eos_token_id
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.transformer.ln_f.weight.data.zero_()
        model.transformer.ln_f.bias.data.fill_(1.0)
        model.lm_head.weight.data.fill_(0.0)
        model.lm_head.weight.data[eos] = 1.0
        model.save_pretrained(policy)
    summary, folder = run(policy_model=str(policy), learning_rate=1e-9)
    assert progress(folder)[0]["length_mean"] == 1
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    assert all(sample["response"] == "" for sample in samples)
    assert progress(folder)[0]["sentiment"] == 0.5
    assert np.isfinite(summary["final_return_mean"])


@pytest.mark.slow
def test_the_toy_learns_reward_and_true_sentiment(run, tmp_path):
    """A full run has 40 updates; half of it is enough to see it. Its models are trained fully."""
    rlhf.make_toy(tmp_path / "a" / "toy")
    defaults = rlhf.TASKS["toy"]
    flags = {
        name: getattr(defaults, name)
        for name in ("batch_size", "update_epochs", "prompt_length", "response_length")
    }
    _, folder = run(
        **flags, num_minibatches=4, total_timesteps=20 * 112, eval_freq=0, eval_episodes=128
    )
    first, last = progress(folder)
    assert last["return_mean"] - first["return_mean"] > 0.2
    assert last["sentiment"] - first["sentiment"] > 0.2
    assert last["distinct_1"] > 0.5 * first["distinct_1"]
    assert 0 < last["kl"] < 20


# Errors


def local(toy, models):
    flags = ["--task", "imdb", "--prompt-length", "16", "--eval-episodes", "16"]
    flags += ["--policy-model", str(toy / "policy"), "--reward-model", str(toy / "reward")]
    return [*flags, "--dataset", str(toy / "train.jsonl")]


@pytest.mark.parametrize(("flags", "message"), {
    "--policy-model {none}": "cannot be loaded",
    "--reward-model {none}": "cannot be loaded",
    "--reward-model {policy}": "lacks ['score.weight'], which GPT2ForSequenceClassification needs",
    "--policy-model {reward} --tokenizer {policy}": "which BertLMHeadModel needs",
    "--dataset {none}": "from disk or from the hub",
    "--dataset {other}": "lacks ['text']; it has ['words']",
    "--dataset {broken}": "broken.jsonl",
    "--dataset {short}": "--batch-size 112: more than the 45 training texts",
    "--eval-dataset {none}": "from disk or from the hub",
    "--tokenizer {folder}": "give one with --tokenizer",
    "--reward-label 2": "{0: 'NEGATIVE', 1: 'POSITIVE'}",
    "--prompt-length 60": "has only 64 positions",
    "--batch-size 10": "must be a multiple of 4",
    "--batch-size 0": "--batch-size 0: must be between 1 and",
    "--num-minibatches 0": "--num-minibatches 0: must be between 1 and",
    "--micro-batch-size 0": "--micro-batch-size 0: must be between 1 and",
    "--beta -1": "--beta -1.0: must be between 0 and",
    "--z 1": "--z 1.0: must be between",
    "--noise flip --noise-level 1.5": "--noise-level 1.5: must be between 0 and 1",
    "--noise-level 0.1": "choose a kind with --noise",
    "--learning-rate 0": "--learning-rate 0.0: must be between",
    "--load-in-4bit": "bitsandbytes",
    "--device cuda": "no GPU here",
    "--resume nowhere": "leave out",
    "--run-name ../x": "give the plain name of a folder",
    "--micro-batch-size 4294967296": "--micro-batch-size 4294967296: must be between 1 and",
    "--lora-r 99999999": "--lora-r 99999999: must be between 0 and",
    "--runs-dir /dev/null": "/dev/null",
    "--runs-dir a\udcff": "not a printable name",
}.items(), ids=str)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    toy, models, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text\n')
    (tmp_path / "short.jsonl").write_text('{"text": "a b c"}\n' * 50)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("other", "broken", "short", "none")}
    files |= {"policy": toy / "policy", "reward": toy / "reward"}
    files["folder"] = tmp_path / "config"  # a model's, without a tokenizer
    transformers.GPT2Config().save_pretrained(files["folder"])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(
        sys, "argv", ["sppo_rlhf.py", *local(toy, models), *flags.format(**files).split()]
    )
    with pytest.raises(SystemExit) as exit_:
        rlhf.main()
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""
    assert not list(Path().iterdir())


def test_a_toy_that_cannot_be_written_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sppo_rlhf.py", "--runs-dir", "/dev/null"])
    with pytest.raises(SystemExit):
        rlhf.main()
    err = capsys.readouterr().err
    assert err.startswith("error: /dev/null")
    assert err.count("\n") == 1


def test_a_checkpoint_of_another_script_is_not_resumed(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"args": {"env_id": "Hopper-v4"}}))
    with pytest.raises(ValueError, match="a run of another script"):
        resume(tmp_path)


def test_a_signal_stops_the_training(toy, tmp_path, monkeypatch, capsys):
    """In this process, by calling the handler in the second of four updates."""
    (tmp_path / "toy").symlink_to(toy)
    handlers = {}
    update = rlhf.update
    updates = []

    def interrupted_update(*arguments):
        updates.append(1)
        if len(updates) == 2:
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        return update(*arguments)

    monkeypatch.setattr(rlhf, "update", interrupted_update)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    words = ["sppo_rlhf.py", "--runs-dir", str(tmp_path)]
    for name, value in (SMALL | {"eval_freq": 0}).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_:
        rlhf.main()
    assert exit_.value.code == 130
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["progress"]["global_step"] == 16


@pytest.mark.slow
def test_a_signal_stops_with_a_checkpoint_and_says_how_to_go_on(toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    command = [
        sys.executable,
        rlhf.__file__,
        "--runs-dir",
        tmp_path,
        "--run-name",
        "r",
        "--eval-freq",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--total-timesteps", "1000000"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 90
    while not (tmp_path / "r" / "progress.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'r'}" in stderr
    assert "Traceback" not in stderr
    assert checkpoint(tmp_path / "r")["progress"]["global_step"] > 0


def test_several_processes_want_a_batch_that_they_can_share(run, monkeypatch):
    """But evaluate a run with any batch."""
    _, folder = run()
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = rlhf.Args(evaluate=str(folder), eval_episodes=6)
    assert rlhf.evaluated_args(args, "seed", "device", "eval_episodes").batch_size == 8
    with pytest.raises(ValueError, match="--batch-size: must be a multiple of 12"):
        rlhf.prepare(rlhf.Args(eval_episodes=6))
    with pytest.raises(ValueError, match="--eval-episodes: must be a multiple of 3"):
        rlhf.prepare(rlhf.Args(batch_size=120))
