"""sppo_rlhf.py: tokens, losses and whole runs, on models small enough to be made here."""

import csv
import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import datasets
import helpers
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import PartialState
from helpers import SMALL_TEXTS as SMALL
from helpers import (
    Setting,
    call_main,
    checkpoint,
    progress,
    read_lines,
    record,
    train,
    weights,
    work_in,
)
from helpers import words as typed
from pytest import approx
from test_copies import edited
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import enjoy
import sppo_rlhf as rlhf
import toy as toy_script
from sppo_rlhf import Args, collate, generate, joined, split_rows, tokenize

CPU = torch.device("cpu")


def text_lengths(texts):  # a reward model, FILE.py:NAME
    return [len(text) for text in texts]


def constant(texts, score):
    return [score] * len(texts)


half, infinite, not_a_number, of_no_text = (
    partial(constant, score=score) for score in (0.5, math.inf, math.nan, None)
)
too_few, one_number, keyed = (
    lambda texts: [0.5], lambda texts: 0.5, lambda texts: dict.fromkeys(range(len(texts)), 0.5)
)  # fmt: skip
a_number = 3


def of_some_texts(texts):
    """Scores those of even lengths, and changes its arguments."""
    scores = [len(text.split()) if len(text) % 2 == 0 else None for text in texts]
    texts[:] = [""] * len(texts)
    return scores


# Models and runs


@pytest.fixture(scope="session")
def models(toy):
    """Models that have learnt nothing, with the toy's tokenizer: name -> folder. The classifier has
    one output and a tokenizer that pads on the left; the adapter makes a classifier of GPT-J."""
    folders = {name: toy.parent / name for name in ("gpt2", "gptj", "classifier", "adapter")}
    make_policy("GPT2", folders["gpt2"], toy, n_positions=64, **DROPOUTS)
    make_policy("GPTJ", folders["gptj"], toy, n_positions=64)
    load = AutoModelForSequenceClassification.from_pretrained
    load(folders["gpt2"], num_labels=1).save_pretrained(folders["classifier"])
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy", padding_side="left")
    tokenizer.save_pretrained(folders["classifier"])
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    adapter = peft.get_peft_model(load(folders["gptj"], num_labels=1), config)
    adapter.save_pretrained(folders["adapter"])
    return folders


def make_args(task="toy", **flags):
    args = Args(task, **rlhf.TASKS[task] | flags)
    args.resolve()
    return args


@pytest.fixture(autouse=True)
def workplace(toy, tmp_path, monkeypatch):
    """Scripts are started in `tmp_path`, which has the toy."""
    work_in(monkeypatch, tmp_path)
    Path("runs").mkdir()
    Path("runs/toy").symlink_to(toy)


def run(**flags):
    """Trains with flags over `SMALL`. Returns the run's folder."""
    return train(rlhf, make_args(**SMALL | flags, runs_dir="own"))


def load(**flags):
    """Models and arguments of a run on few texts, with flags over `SMALL`."""
    rng = random.Random(1)
    write_data("few.jsonl", text=[toy_script.toy_review(rng) for _ in range(16)])
    few = {"dataset": "few.jsonl", "eval_dataset": "few.jsonl"}
    few["reward_model"] = (f"{__file__}:text_lengths",)
    args = make_args(**SMALL | few | flags)
    return rlhf.load(args), args


def function_reward(name, **inputs):
    others = dict.fromkeys(["texts", "prompts", "completions", "completion_ids"])
    return rlhf.function_reward(name, inputs.keys() - others.keys())(**others | inputs)


def write_data(path, **columns):
    data = datasets.Dataset.from_dict(columns)
    data.to_parquet(path) if path.endswith(".parquet") else data.to_json(path)


@pytest.fixture
def summaries(models):
    """Flags for a run with LoRA on GPT-J's architecture, on posts and summaries made here."""
    rng = random.Random(3)
    posts = [toy_script.toy_review(rng) for _ in range(40)]
    labels = [f" the {rng.choice(toy_script.ASPECTS)} was dull ." for _ in posts]
    write_data("posts.jsonl", prompt=posts, label=labels)
    flags = {"task": "tldr", "dataset": "posts.jsonl", "eval_dataset": "posts.jsonl"}
    models = {"policy_model": str(models["gptj"]), "reward_model": (str(models["adapter"]),)}
    return flags | models | {"lora_r": 4, "learning_rate": 1e-2}


FAMILIES = "GPT2 GPTJ GPTNeoX OPT Llama Mistral Mixtral Qwen2 Qwen3 Qwen3_5Text Gemma Gemma2"
FAMILIES = f"{FAMILIES} Gemma3Text Phi3 Olmo2 SmolLM3 Falcon Bloom Mpt Lfm2 Granite Cohere".split()
SHAPES = {
    "GPTJ": {"rotary_dim": 4},
    "OPT": {"ffn_dim": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "Mistral": {"sliding_window": 4},  # shorter than the texts
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention"]},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 1.0},
    "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "Bloom": {"n_head": 2},  # ALiBi, as MPT
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 1},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Granite": {"logits_scaling": 8},
    "Cohere": {"logit_scale": 0.1},
}

DROPOUTS = "embd_pdrop attn_pdrop resid_pdrop dropout attention_dropout hidden_dropout layerdrop"
DROPOUTS = dict.fromkeys([*DROPOUTS.split(), "router_jitter_noise"], 0.5)


def make_policy(kind, folder, toy, **shape):
    """A policy of the family `kind` that has learnt nothing, with the toy's tokenizer."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = getattr(transformers, f"{kind}Config")(**sizes | SHAPES.get(kind, {}) | shape)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def refusal(message, is_refused=True):
    """That the block ends with this message, or, if not, that it does not."""
    return pytest.raises(SystemExit, match=message) if is_refused else nullcontext()


def read_samples(folder, data="held-out"):
    return [row for row in read_lines(folder / "samples.jsonl") if row["data"] == data]


def randomise(actor):
    """So that neither the value head nor adapters are zero."""
    torch.manual_seed(0)
    for name, parameter in actor.named_parameters():
        if "lora_" in name or name == "value_head.weight":
            nn.init.normal_(parameter, std=0.3)


def actor_critic(model, lora_r=0, dtype=torch.float32):
    args = make_args(policy_model=str(model), lora_r=lora_r)
    actor = rlhf.ActorCritic(args, CPU, dtype)
    randomise(actor)
    return actor


def random_texts(*lengths):
    """Lists of so many tokens."""
    rng = np.random.default_rng(lengths)
    return [rng.integers(2, 100, length).tolist() for length in lengths]


PROMPTS = random_texts(3, 7, 1, 5)
RESPONSES = random_texts(5, 2, 1, 5)
WITH_AND_WITHOUT_LORA = pytest.mark.parametrize("lora_r", [0, 2])


def log_probs_alone(model, prompt, tokens, temperature=1.0):
    """Log-probabilities of the tokens of one text, without padding, by a model of transformers."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    log_prob = (logits / temperature).log_softmax(-1)
    return log_prob.gather(1, torch.tensor(tokens, dtype=int)[:, None])[:, 0]


def all_alone(actor, prompts, responses, targets):
    """Log-probabilities and values of responses, and log-probabilities of targets, text by text."""
    del actor.policy.get_output_embeddings().forward  # which `patch_head` has replaced
    values = []
    for prompt, response in zip(prompts, responses):
        states = actor.critic(torch.tensor([prompt + response])).last_hidden_state
        values.append(actor.value_head(states[0, len(prompt) - 1 : -1])[:, 0])
    log_probs, target_log_probs = (
        [log_probs_alone(actor.policy, *text) for text in zip(prompts, parts)]
        for parts in (responses, targets)
    )
    return map(torch.cat, (log_probs, values, target_log_probs))


def gradient(actor, loss):
    parameters = [p for p in actor.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([x.flatten() for x in found if x is not None])


def assert_near(found, expected, share=1e-3):
    assert expected.isfinite().all()
    assert expected.norm() > 0
    assert (found - expected).norm() < share * expected.norm()


# Tokens


@pytest.mark.parametrize(("kind", "lora_r"), [*product(FAMILIES, [0, 2]), ("Mamba", 0)])
def test_padding_changes_nothing_in_any_family(toy, kind, lora_r):
    """Nor do dropout or gradient checkpointing, against the plain model on each text alone."""
    make_policy(kind, kind, toy, **DROPOUTS)
    flags = {"lora_r": lora_r, "stop_at_eos": False, "gradient_checkpointing": True}
    setup, args = load(policy_model=kind, **flags)
    setup.tokenizer.add_special_tokens({"pad_token": "<none>"})
    actor = setup.actor_critic
    randomise(actor)
    targets = random_texts(2, 0, 4, 1)
    texts = [collate(PROMPTS, parts, CPU) for parts in (RESPONSES, targets)]
    layers = next(x for x in actor.critic.modules() if isinstance(x, nn.ModuleList))
    calls = []
    next(layers[0].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    log_prob, value, target_log_prob = actor.train()(*texts)
    found = gradient(actor, log_prob.sum() + value.sum() + target_log_prob.sum())
    assert len(calls) == 2
    actor.eval()
    reference_log_prob = rlhf.token_log_probs(actor.reference, texts[0], 1.0)
    assert torch.allclose(reference_log_prob, log_prob) == (lora_r == 0)
    rlhf.check_sampling(setup, args)

    expected, values, targets_expected = all_alone(actor, PROMPTS, RESPONSES, targets)
    assert_close(log_prob, expected, atol=1e-4, rtol=0)
    assert_close(value, values, atol=1e-4, rtol=0)
    assert_close(target_log_prob, targets_expected, atol=1e-4, rtol=0)
    assert_near(found, gradient(actor, expected.sum() + values.sum() + targets_expected.sum()))


def one_place_on(*texts):
    inputs = collate(*texts)
    return inputs._replace(places=inputs.places + 1)


@pytest.mark.parametrize("fault", ["cache", "mask", "temperature", "side", "places"])
def test_a_policy_that_samples_otherwise_is_refused(models, monkeypatch, fault):
    """GPT-2 that is wrong where it has a cache or padding, and mistakes in a copy of the script."""
    forward = transformers.GPT2LMHeadModel.forward
    pad = rlhf.pad_sequence

    def wrong(model, input_ids, attention_mask=None, **inputs):
        output = forward(model, input_ids, attention_mask=attention_mask, **inputs)
        is_padded = attention_mask is not None and not attention_mask.all()
        if is_padded if fault == "mask" else fault == "cache" and input_ids.shape[1] == 1:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", wrong)
    if fault == "places":
        monkeypatch.setattr(rlhf, "collate", one_place_on)
    if fault == "side":
        monkeypatch.setattr(
            rlhf, "pad_sequence", lambda *x, **y: pad(*x, **y | {"padding_side": "right"})
        )
    setup, args = load(policy_model=str(models["gpt2"]), top_k=3, temperature=2.0)
    if fault == "temperature":
        setup.actor_critic.policy.generation_config.temperature = 1.0
    with refusal("gpt2 samples otherwise than it is trained, by .* nats a token$"):
        rlhf.check_sampling(setup, args)


@pytest.mark.parametrize(("top_k", "temperature"), [(3, 1.0), (0, 3.0)])
def test_each_token_is_sampled_as_often_as_is_probable(models, top_k, temperature):
    """Among the likeliest k, if asked for."""
    flags = {"top_k": top_k, "temperature": temperature, "response_length": 1}
    setup, _ = load(policy_model=str(models["gpt2"]), **flags)
    plain = AutoModelForCausalLM.from_pretrained(models["gpt2"]).eval()
    p = (plain(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1).detach()
    if top_k:
        p[p.argsort()[:-top_k]] = 0
    torch.manual_seed(0)
    tokens = torch.tensor(generate(setup, [[5, 6, 7]] * 10_000, do_sample=True))[:, 0]
    counts = tokens.bincount(minlength=len(p))
    assert ((counts > 0) <= (p > 0)).all()
    assert_close(counts / 10_000, p / p.sum(), atol=0.02, rtol=0)


def test_all_end_tokens_of_the_policy_end_a_response(models):
    """One is out of the vocabulary. Without --stop-at-eos none of them is sampled."""
    shutil.copytree(models["gpt2"], "policy")
    Path("policy/generation_config.json").write_text('{"eos_token_id": [5, 9, 1000000]}')
    ends = {AutoTokenizer.from_pretrained("policy").eos_token_id, 5, 9}
    flags = {"policy_model": "policy", "response_length": 50}
    torch.manual_seed(0)
    responses = generate(load(**flags)[0], PROMPTS * 50, do_sample=True)
    assert {response[-1] for response in responses if len(response) < 50} == ends
    assert not any(ends & set(response[:-1]) for response in responses)
    setup, _ = load(**flags, stop_at_eos=False)
    responses = generate(setup, PROMPTS * 50, do_sample=True)
    assert {len(response) for response in responses} == {50}
    assert not ends & set(sum(responses, []))


def test_in_bfloat16_the_last_layers_are_in_float32(models):
    actor = actor_critic(models["gpt2"], dtype=torch.bfloat16)
    text = collate(PROMPTS, RESPONSES, CPU)
    log_prob, value, _ = actor(text)
    with actor.autocast():
        policy_states, critic_states = (
            decoder(input_ids=text.ids).last_hidden_state.flatten(0, 1)[text.places].float()
            for decoder in (actor.policy.get_decoder(), actor.critic)
        )
    expected = (policy_states @ actor.policy.lm_head.weight.T).log_softmax(-1)
    expected = expected.gather(-1, text.tokens[:, None])[:, 0]
    assert_close(log_prob, expected, atol=1e-5, rtol=0)
    assert not torch.equal(log_prob, actor_critic(models["gpt2"])(text)[0])
    assert_close(value, actor.value_head(critic_states)[:, 0])


def test_with_lora_policy_and_critic_are_adapters_on_one_frozen_model(models):
    """Adapters have float32, the frozen model has not. Each loss trains its own adapter."""
    actor = actor_critic(models["gptj"], 2, torch.bfloat16)
    for name, parameter in actor.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "value_head" in name)
        assert (parameter.dtype == torch.float32) == parameter.requires_grad
    log_prob, value, _ = actor(collate(PROMPTS, RESPONSES, CPU))
    for loss, expected in ((log_prob, {"policy"}), (value, {"critic", "value_head"})):
        actor.zero_grad()
        loss.sum().backward()
        learning = {name for name, p in actor.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in learning} == expected


def test_models_that_do_not_fit_are_refused(models, monkeypatch):
    """Those that lack weights, a tokenizer or positions. Texts of exactly so many tokens fit."""
    shutil.copytree(models["adapter"], "adapter")
    file = "adapter/adapter_model.safetensors"
    saved = safetensors.torch.load_file(file)
    renamed = {name.replace("lora_A", "lora_C"): weight for name, weight in saved.items()}
    safetensors.torch.save_file(renamed, file)
    shutil.copytree(models["gpt2"], "adapted")
    shutil.copy("adapter/adapter_config.json", "adapted")
    shutil.copytree(models["gpt2"], "bare", ignore=shutil.ignore_patterns("token*"))
    write_data("few.jsonl", text=[f"the plot {i} was dull" for i in range(40)])
    few = "--dataset few.jsonl --eval-episodes 4 --total-timesteps 1 --batch-size 4".split()
    refusals = [
        (["--reward-model", "runs/toy/policy"], "policy lacks 1 weights, such as score.weight"),
        (["--reward-model", "./adapter"], "adapter lacks 4 weights, such as base_model"),
        (["--policy-model", "adapted"], "adapted has an adapter_config.json: merge it"),
        (["--device", "cuda"], "there is no GPU"),
        (["--prompt-length", "40"], "has 64 positions, not 72"),
        (["--policy-model", "./nowhere"], "error: ./nowhere: Repo id must "),  # no such folder
        (["--reward-model", "./nowhere"], "error: ./nowhere: Repo id must "),
        (["--reward-model", f"{__file__}:constant"], "constant gets texts, "),
        (["--reward-model", f"{__file__}:nothing"], "test_rlhf.py has no function nothing"),
        (["--reward-model", f"{__file__}:a_number"], "test_rlhf.py has no function a_number"),
        (["--chat-template-kwargs", "{a: 1}"], "error: --chat-template-kwargs must be a JSON obj"),
        (["--dataset", "few.json"], "error: few.json: [Errno 2] No such file"),
        (["--reward-model", "nowhere.py:a"], "nowhere.py: no such file"),
        (["--policy-model", "bare"], "bare has no tokenizer"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in refusals:
        assert message in call_main(monkeypatch, rlhf, *few, *words)
        assert not list(Path("runs").glob("few__*"))
    assert call_main(monkeypatch, rlhf, *few, "--prompt-length", 32) == 0


TEXT = "the plot was superb and the cast was dull ."
END = "<|endoftext|>"


@pytest.mark.parametrize(("template", "rows", "prompts", "targets"), [
    ("$A", {"prompt": [TEXT], "label": [" it was"]}, [TEXT], [f" it was{END}"]),
    ("$A", {"prompt": [TEXT], "label": [1]}, [TEXT], [""]),  # a class
    ("$A", {"prompt": ["", "\n", END]}, [END, "\n", END], [""] * 3),
    ("<s> $A", {"prompt": [TEXT, f"<s>{TEXT}", ""], "label": [TEXT, TEXT, ""]},
     [f"<s>{TEXT}", f"<s>{TEXT}", "<s>"], [f"{TEXT}{END}", f"{TEXT}{END}", ""]),
    ("<e> <s> $A <e>", {"prompt": [TEXT], "label": [TEXT]}, [f"{END}<s>{TEXT}"], [f"{TEXT}{END}"]),
])  # fmt: skip
def test_prompts_and_targets_are_the_tokens_of_texts(toy, template, rows, prompts, targets):
    """With what the tokenizer writes before a text, but for what it writes after it."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy", bos_token="<s>")
    special = {"<s>": tokenizer.bos_token_id, "<e>": tokenizer.eos_token_id}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=list(special.items())
    )
    args = Args(prompt_length=40, response_length=40)
    rows = datasets.Dataset.from_dict(rows).to_list()
    new = [tokenize(row, tokenizer, args) for row in rows]
    plain = AutoTokenizer.from_pretrained(toy / "policy", bos_token="<s>")
    texts = zip(plain(prompts)["input_ids"], plain(targets)["input_ids"])
    assert new == [*texts]

    start = [special[word] for word in template.partition("$A")[0].split()]
    ids = plain(TEXT)["input_ids"]
    first, second = tokenize({"text": TEXT}, tokenizer, args)
    assert first + second == [*start, *ids, tokenizer.eos_token_id]
    assert len(first) == len(start + ids) // 2
    new = tokenize({"text": TEXT}, tokenizer, replace(args, prompt_length=4))
    assert new == (start + first[len(start) - 4 :], second)
    new = tokenize({"text": TEXT}, tokenizer, replace(args, response_length=3))
    assert new == (first, second[:3])


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}so{% endif %}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(toy):
    """A turn ends with a token that is not the end of text."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy", bos_token="<s>")
    turns = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.chat_template = CHATML
    return tokenizer


CHAT = [{"role": "user", "content": "the plot"}]
BEGUN = {"role": "assistant", "content": "it was"}
ASKED = "<|user|>the plot<|end|>\n<|assistant|>"


@pytest.mark.parametrize(("template", "text", "end"), [
    (CHATML, ASKED, "<|end|>"),
    ("<s>" + CHATML, f"<s>{ASKED}", "<|end|>"),
    (CHATML.replace("<|end|>", ""), ASKED.replace("<|end|>", ""), None),
])  # fmt: skip
def test_chat_is_written_in_the_template(chat_tokenizer, template, text, end):
    """With the tools of its row. A response may end as its turns do. There is no target."""
    chat_tokenizer.chat_template = template
    args = Args(prompt_length=40)
    prompt, target = tokenize({"prompt": CHAT, "label": "was dull"}, chat_tokenizer, args)
    assert chat_tokenizer.decode(prompt) == text
    assert target == []
    token = rlhf.turn_end(chat_tokenizer, args)
    assert (token and chat_tokenizer.convert_ids_to_tokens(token)) == end
    args = Args(prompt_length=40, chat_template_kwargs='{"enable_thinking": true}')
    prompt, _ = tokenize({"prompt": CHAT}, chat_tokenizer, args)
    assert chat_tokenizer.decode(prompt) == f"{text}so"
    chat_tokenizer.chat_template = "{% if tools %}<s>{% endif %}" + template
    prompt, _ = tokenize({"prompt": CHAT, "tools": [{"name": "f"}]}, chat_tokenizer, args)
    assert chat_tokenizer.decode(prompt) == f"<s>{text}so"


def read(tokenizer, rows, **flags):
    """Loads rows, as a run does."""
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = Args(dataset="a.jsonl", **{"prompt_length": 99} | flags)
    return rlhf.load_rows("a.jsonl", Accelerator(cpu=True), tokenizer, args)


def said(role, content="the plot", **others):
    return {"role": role, "content": content} | others


def test_the_end_of_a_turn_is_no_white_space(chat_tokenizer):
    """Which is an added token of some tokenizers."""
    chat_tokenizer.add_tokens(["\n\n"])
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"
    assert rlhf.turn_end(chat_tokenizer, Args()) is None


def test_messages_are_the_prompt_if_the_last_one_is_not_the_assistants(chat_tokenizer):
    """Reward functions get the column `messages`, too."""
    (row,) = read(chat_tokenizer, [{"messages": [*CHAT, BEGUN, *CHAT], "n": 3}])
    assert row["prompt"] == row["messages"] == [*CHAT, BEGUN, *CHAT]
    for odd in ({"messages": CHAT, "prompt": "the plot"}, {"messages": "[{}]"}):
        with refusal("row 1: its 'messages' are no list, or have a 'prompt' beside them$"):
            read(chat_tokenizer, [odd])
    with refusal("^error: a.jsonl, row 2: the last message is the assistant's"):
        read(chat_tokenizer, [{"messages": CHAT}, {"messages": [*CHAT, BEGUN]}])
    with refusal("a.jsonl, row 1: .*chat_template is not set"):
        chat_tokenizer.chat_template = None
        read(chat_tokenizer, [{"prompt": CHAT}])


@pytest.mark.parametrize(("content", "chat", "is_refused"), [
    ("m.content if m.role != 'system'", [said("system", "so"), *CHAT], True),
    ("m.content", [said("user", None)], True),
    ("m.content | trim", [said("user", " the plot\n")], False),
    ("m.content or m.tool_calls", [said("a", None, tool_calls=[{"name": "f"}]), *CHAT], False),
    ("m.content | tojson", [said("tool", '{"a":\n"é"}'), *CHAT], False),
])  # fmt: skip
def test_messages_that_do_not_reach_the_policy_are_refused(
    chat_tokenizer, content, chat, is_refused
):
    """But a template may change white space."""
    chat_tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {content} }}}}{{% endfor %}}"
    with refusal("row 1: the chat template drops what '.*' says, or it is no text$", is_refused):
        read(chat_tokenizer, [{"prompt": chat}])


def test_messages_are_not_cut_and_have_no_targets(chat_tokenizer):
    longest = len(chat_tokenizer(ASKED)["input_ids"])
    rows = [{"prompt": CHAT, "label": "was dull"}]
    read(chat_tokenizer, rows, prompt_length=longest)
    with refusal(f"messages are not cut: they need --prompt-length {longest}$"):
        read(chat_tokenizer, rows, prompt_length=longest - 1)
    with refusal("--ce-coef needs .*; messages have none"):
        read(chat_tokenizer, rows, ce_coef=0.1)
    with refusal("no chat template has .'enable_thinking'"):
        load(chat_template_kwargs='{"enable_thinking": false}')


def test_reward_models_get_messages_where_prompts_are(chat_tokenizer):
    rows = [{"prompt": [said("system", "so"), *CHAT]}, {"prompt": CHAT}]
    prompts = [tokenize(row, chat_tokenizer, Args(prompt_length=40))[0] for row in rows]
    ids = [chat_tokenizer(" dull")["input_ids"]] * 2
    seen = []
    setup = SimpleNamespace(tokenizer=chat_tokenizer, columns=["prompt"])
    setup.reward_models = [lambda **inputs: seen.append(inputs) or [0.0, 0.0]]
    rlhf.score(setup, make_args(), rows, prompts, ids)
    assert seen[0]["prompts"] == [row["prompt"] for row in rows]
    assert seen[0]["completion_ids"] == ids
    assert seen[0]["completions"] == [[said("assistant", " dull")]] * 2


# Reward models

CLASSIFIERS = {  # kind: (folder of the base, changes of its configuration)
    "two labels": ("runs/toy/reward", {}),
    "left padding": ("classifier", {}),
    "no padding token": ("llama", {"num_labels": 1}),
    "three labels": ("classifier", {"num_labels": 3, "ignore_mismatched_sizes": True}),
    "adapter": ("gptj", {"num_labels": 1}),
}


def make_classifier(kind, toy, models):
    """Saves it in classifier/, and returns it and its tokenizer. An adapter has its own, too."""
    base, changes = CLASSIFIERS[kind]
    base = models.get(base, base)
    if kind == "no padding token":
        make_policy("Llama", base, toy, max_position_embeddings=64, pad_token_id=None)
        AutoTokenizer.from_pretrained(base, pad_token=None).save_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, **changes)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind == "adapter":
        config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        special = [("<e>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <e>", special_tokens=special
        )
    model.save_pretrained("classifier")
    tokenizer.save_pretrained("classifier")
    return model.eval(), tokenizer


def classifier_scores(texts, label=None, dtype=torch.float32, **inputs):
    args = Args(reward_label=label)
    reward_model = rlhf.classifier_reward("classifier", args, CPU, dtype)
    return reward_model(**{"texts": texts, "prompts": texts, "completions": texts} | inputs)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_scores_a_text_alike_alone_and_in_a_batch(toy, models, kind):
    """Also where it closes with the token that pads. One that is too long loses its beginning."""
    model, tokenizer = make_classifier(kind, toy, models)
    texts = [f"{TEXT}{END}", f"the plot{END}", "the cast was warm", " ".join([TEXT] * 20)]
    texts += ["the cast was awful ."] * 20
    tokenizer.truncation_side = "left"
    logits = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        logits.append(model(**ids).logits[0].detach())
    expected = torch.stack(logits)
    config = model.config
    if config.num_labels > 1:
        expected = expected.softmax(-1)
    assert len(expected.unique()) > 4
    for label in range(config.num_labels):
        scores = torch.tensor(classifier_scores(texts, label))
        assert_close(scores, expected[:, label], atol=1e-5, rtol=1e-5)
        rounded = torch.tensor(classifier_scores(texts, label, torch.bfloat16))
        assert_close(rounded, scores, rtol=0.1, atol=0.1)
    if config.num_labels < 3:  # the reward of two is that of label 1
        assert classifier_scores(texts) == scores.tolist()
    else:
        with pytest.raises(SystemExit, match="--reward-label must be one of {0: .*, not None$"):
            classifier_scores(texts)


def test_a_classifier_reads_messages_in_its_own_template():
    """With the special tokens of the template only. Without one it reads the text."""
    shutil.copytree("runs/toy/reward", "classifier")
    inputs = {"texts": ["user\nthe plot"], "prompts": [[{"role": "user", "content": "the plot"}]]}
    inputs["completions"] = [[{"role": "assistant", "content": "was dull"}]]
    text = classifier_scores(["user\nthe plot"])
    assert classifier_scores(**inputs) == text
    tokenizer = AutoTokenizer.from_pretrained("classifier")
    tokenizer.chat_template = "[CLS]{% for m in messages %} {{ m.content }}{% endfor %}[SEP]"
    tokenizer.save_pretrained("classifier")
    assert classifier_scores(**inputs) == classifier_scores(["the plot was dull"])


def test_a_reward_function_gets_all_texts_of_a_rollout_at_once():
    """Whatever the size of micro batches, and what belongs to them. Each sample gets its score."""
    setup, args = load(micro_batch_size=1)
    seen = []

    def rank(texts):
        return [sorted(texts).index(text) for text in texts]

    setup.reward_models = [lambda **inputs: seen.append(inputs) or rank(inputs["texts"])]
    samples = rlhf.sample_responses(setup, args, setup.train_data)
    (inputs,) = seen
    decode = partial(setup.tokenizer.decode, skip_special_tokens=True)
    assert inputs == {
        "texts": [decode(x.prompt + x.response) for x in samples],
        "prompts": [decode(x.prompt) for x in samples],
        "completions": [decode(x.response) for x in samples],
        "completion_ids": [x.response for x in samples],
        "text": [x.row["text"] for x in samples],
    }
    for x in samples:
        assert (x.prompt, x.target) == tokenize(x.row, setup.tokenizer, args)
    assert [x.scores for x in samples] == rank(inputs["texts"])
    assert len(samples) > 8
    assert rlhf.sample_responses(setup, args, []) == []  # a process without texts of its own


OWN_REWARDS = """
import own_neighbour
from trl.rewards import get_repetition_penalty_reward

trls = get_repetition_penalty_reward(2)

def own(texts): return [own_neighbour.length(text) for text in texts]
def with_default(texts, answer=None, other=5): return [float(answer[0] == 3 and other == 5)] * 2
def whatever(**kwargs): return [float(kwargs["answer"][0] == 3 and "texts" in kwargs)] * 2
"""


def test_a_reward_file_may_import_files_beside_it():
    """It gets the arguments that it names, may be TRL's, and may be a link."""
    Path("stored").write_text(OWN_REWARDS)
    Path("links").mkdir()
    Path("links/own_neighbour.py").write_text("length = len")
    Path("links/own_rewards.py").symlink_to("../stored")
    file = "links/own_rewards.py"
    inputs = {"texts": ["ab", "abc"], "completions": ["b", "bc"], "answer": [3, 3]}
    assert function_reward(f"{file}:own", **inputs) == [2, 3]
    for name in ("with_default", "whatever"):
        assert function_reward(f"{file}:{name}", **inputs) == [1, 1]
    repeating = {"completions": ["", ""], "completion_ids": [[1, 2, 3, 4], [5] * 5]}
    assert function_reward(f"{file}:trls", **inputs | repeating) == [0, -0.75]


def test_relative_paths_begin_where_the_script_was_started(tmp_path):
    start = Path.cwd()
    Path("leaving.py").write_text("import os\nos.chdir('/')\ndef own(texts): pass")
    rlhf.import_functions(make_args(reward_model=(f"{tmp_path}/leaving.py:own",)))
    assert Path.cwd() == start


@pytest.mark.parametrize("weights", [(), (2.0, 10.0, -0.5)])
def test_the_reward_is_the_weighted_sum_or_else_the_mean(monkeypatch, weights):
    """A function may return None for texts that others score, and change its arguments."""
    names = tuple(f"{__file__}:{name}" for name in ("of_some_texts", "text_lengths", "of_no_text"))
    collected = record(monkeypatch, rlhf, "sample_responses")
    advantages = record(monkeypatch, rlhf, "token_advantages")
    flags = {"total_timesteps": 8, "reward_model": names, "eval_episodes": 8}
    row = progress(run(reward_weights=weights, **flags))[-1]
    decode = AutoTokenizer.from_pretrained("runs/toy/policy").decode
    total = ["charts/episodic_return", "return_mean"]
    prefixes = ["rewards/", "eval_"]
    for (_, samples), mean, prefix in zip(collected[-2:], total, prefixes):  # training, its end
        texts = [decode(x.prompt + x.response, skip_special_tokens=True) for x in samples]
        scores = np.array([of_some_texts([*texts]), text_lengths(texts)], float)
        found = ~np.isnan(scores[0])
        assert found.any()
        assert not found.all()
        rewards = np.dot(weights[:2] or (1 / 3, 1 / 3), np.nan_to_num(scores))
        expected = {mean: rewards.mean(), f"{prefix}{names[1]}": scores[1].mean()}
        expected[f"{prefix}{names[0]}"] = scores[0, found].mean()
        assert {name: row[name] for name in expected} == approx(expected, rel=1e-5)
    paid = np.mean([args[0] for args, _ in advantages])
    assert paid == approx(row["charts/episodic_return"])


@pytest.mark.parametrize(("names", "message"), [
    (["of_some_texts"], "no reward model scores one of the texts; one must give a number$"),
    *((["text_lengths", name], f":{name} must return a number or None for each of 4 texts: ")
      for name in ("infinite", "not_a_number", "too_few", "one_number", "keyed")),
])  # fmt: skip
def test_scores_that_are_no_numbers_are_refused(names, message):
    with pytest.raises(SystemExit, match=message):
        run(reward_model=tuple(f"{__file__}:{name}" for name in names))


def test_what_a_rollout_cannot_teach_is_said(capsys):
    """Once, at the first such rollout."""
    messages = ["all rewards of a rollout are 0.5: the update", "no text of a rollout ends before"]
    for reward, length, counts in (("text_lengths", 50, [0, 0]), ("half", 1, [1, 1])):
        rlhf.warn.cache_clear()
        flags = {"reward_model": (f"{__file__}:{reward}",), "response_length": length}
        run(**flags)
        errors = capsys.readouterr().err
        assert [errors.count(f"warning: {message}") for message in messages] == counts
    rlhf.warn.cache_clear()
    run(**flags, stop_at_eos=False)
    assert messages[1] not in capsys.readouterr().err


# Losses and advantages


@pytest.mark.parametrize("length", [1, 9])
def test_advantages_are_sums_over_the_tokens_of_a_text(length):
    log_ratio, value = torch.randn(2, length, dtype=torch.float64)
    args = Args(gamma=0.9, gae_lambda=0.7, kl_coef=0.3)
    advantage, returns = rlhf.token_advantages(2.0, log_ratio, value, args)
    deltas = -0.3 * log_ratio - value
    deltas[:-1] += 0.9 * value[1:]
    deltas[-1] += 2.0
    for t in range(length):
        expected = sum((0.9 * 0.7) ** (s - t) * deltas[s] for s in range(t, length))
        assert_close(advantage[t], expected)
        assert_close(returns[t], expected + value[t])


def test_a_rollout_logs_kl_entropy_length_deviation_and_explained_variance(monkeypatch):
    collected = record(monkeypatch, rlhf, "sample_responses")
    row = progress(run(total_timesteps=8))[-1]
    _, samples = collected[1]  # that of the training
    scores = [sample.scores[0] for sample in samples]
    assert row["charts/reward_std"] == approx(np.std(scores), rel=1e-5)
    log_prob = joined(samples, "log_prob")
    log_ratio = log_prob - joined(samples, "reference_log_prob")
    assert row["charts/kl"] == approx(log_ratio.sum().item() / 8, abs=1e-5)
    assert row["losses/entropy"] == approx(-log_prob.mean().item(), rel=1e-5)
    assert row["charts/episodic_length"] == len(log_prob) / 8
    value = joined(samples, "value")
    returns = joined(samples, "returns")
    explained = 1 - (returns - value).var().item() / returns.var().item()
    assert row["losses/explained_variance"] == approx(explained, abs=1e-4)


# Runs


ODD = [
    {"prompt": "the, plot", "n": 3, "long": 2**53 + 1, "code": "007", "date": "2037-05-06"},
    {"prompt": "the\nplot", "none": None, "label": "", "nested": [[1, 2.5]]},
    {"prompt": "a" * 2**18, "info": {"é": 1}, "long": -1, "date": "2037"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv"])
def test_a_reward_function_gets_the_values_of_the_file(name):
    """With their types, also from Windows. In CSV all are texts."""
    path = Path(name)
    expected = ODD
    lines = [json.dumps(row) for row in ODD]
    if name == "a.jsonl":
        path.write_text("\r\n".join(["", lines[0], "", *lines[1:]]), "utf-8-sig")
    elif name == "a.json.gz":
        path.write_bytes(gzip.compress(json.dumps(ODD, indent=1).encode()))
    else:
        columns = dict.fromkeys(name for row in ODD for name in row)
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, columns)  # ends lines with CRLF
            table.writeheader()
            table.writerows(ODD)
        expected = [{name: str(row.get(name) or "") for name in columns} for row in ODD]
    assert json.dumps(rlhf.read_rows(name)) == json.dumps(expected)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}', " row 2: it has no 'prompt'"),
    ("a.jsonl", '{"prompt": "a"}\n{"question": "b"}', " row 2: it has no 'prompt'"),
    ("a.csv", "text\n[{'role': 'user'}]\n", " row 1: it has no 'prompt'"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"', " .* line 2 "),
    ("a.csv", "prompt,label\na,b\nc,d,e\n", " a row has too few or too many values, or"),
    ("a.csv", "prompt,label\na,b\nc\n", " a row has too few or too many values, or"),
    ("a.csv", "prompt,n,prompt\na,b,c\n", " a row has .* or a name is there twice"),
    ("a.csv", 'prompt,label\na,"b\nc,d\n', " unexpected end of data"),
    ("a.txt", "the plot", " its name must end with .jsonl, .json or .csv "),
])  # fmt: skip
def test_data_that_cannot_be_used_are_refused(name, content, message):
    """With the row, where it is one's."""
    Path(name).write_text(content)
    with refusal(f"^error: {name}(:|,){message}"):
        load(dataset=name)


def test_prompts_that_are_cut_are_counted(chat_tokenizer, capsys):
    longest = len(chat_tokenizer(TEXT)["input_ids"])
    for length, count in ((longest, 0), (longest - 1, 1)):
        read(chat_tokenizer, [{"prompt": "the plot"}, {"prompt": TEXT}], prompt_length=length)
        said = f"a.jsonl: 2 prompts, of which --prompt-length cuts {count}\n"
        assert said in capsys.readouterr().out
    with refusal("^error: no runs/toy/none: run toy.py, if it is a flag's default$"):
        run(policy_model="runs/toy/none")


def test_a_supervised_loss_needs_targets_in_the_training_data():
    write_data("a.jsonl", prompt=["a"] * 8)
    with refusal("^error: --ce-coef needs a 'label' of texts, or a 'text'"):
        load(dataset="a.jsonl", ce_coef=1.0)


def test_a_split_of_the_data_is_named(monkeypatch):
    """Of a folder, of which otherwise all files are read, or on the hub."""
    rows = [{"prompt": "the, plot", "n": "2037-05-06"}, {"prompt": "the\nplot", "n": "0027"}]
    data = datasets.Dataset.from_list(rows)
    folder = Path("clone[1]/data")
    folder.mkdir(parents=True)
    for name in ("test-00000-of-00001", "other"):
        data.to_parquet(name)
        Path(name).rename(folder / f"{name}.parquet")
    assert rlhf.read_rows("clone[1]:test") == rows
    assert rlhf.read_rows("clone[1]/data") == rows * 2
    with refusal("has no rows, or is a folder without such .parquet files$"):
        load(eval_dataset="clone[1]:train")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **b: asked.append((a, b)) or data)
    for name in ("me/sums", "gsm8k:main:test"):
        assert rlhf.read_rows(name) == rows
    assert asked == [(("me/sums",), {"split": "train"}), (("gsm8k", "main"), {"split": "test"})]


def test_without_held_out_data_a_tenth_is_held_out():
    """Of distinct prompts, whatever the seed. Too few rows are refused."""
    rows = [{"text": f"text {i}"} for i in range(200)]
    args = make_args(dataset="a", batch_size=180, eval_episodes=20)
    train_data, eval_data = split_rows(rows * 2, [], args)
    assert len(train_data) == 360
    assert len(eval_data) == 20
    assert not {row["text"] for row in train_data} & {row["text"] for row in eval_data}
    assert split_rows(rows * 2, [], replace(args, seed=2)) == (train_data, eval_data)
    first = sorted(rows, key=lambda row: row["text"])[:20]
    for held_out in (eval_data, split_rows(rows, first + rows, args)[1]):
        assert sum(row in first for row in held_out) < 10  # it is drawn
    split_rows(rows, [], args)  # enough
    with refusal("^error: .* and 20 held out are too few for --batch-size"):
        split_rows(rows, [], replace(args, batch_size=184))


def test_the_saved_policy_samples_as_in_training(models):
    """Neither the generation configuration that came with it nor the
    tokenizer's sides change a run."""
    shutil.copytree(models["gpt2"], "policy")
    Path("policy/generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    sides = {"padding_side": "left", "truncation_side": "left"}
    tokenizer = AutoTokenizer.from_pretrained("policy", **sides)
    tokenizer.save_pretrained("policy")
    flags = {"total_timesteps": 8, "ce_coef": 0.1, "response_length": 40}  # some are padded
    flags["gradient_checkpointing"] = True
    usual = run(policy_model=str(models["gpt2"]), **flags)
    trained = run(policy_model="policy", **flags)
    assert helpers.sha256(trained / "progress.csv") == helpers.sha256(usual / "progress.csv")
    saved = AutoTokenizer.from_pretrained(trained / "policy")
    assert {name: getattr(saved, name) for name in sides} == sides
    sampling = transformers.GenerationConfig.from_pretrained(trained / "policy")
    assert set(sampling.eos_token_id) == {tokenizer.eos_token_id}
    assert sampling.do_sample
    assert sampling.temperature == 1
    assert sampling.top_k == 0
    assert sampling.pad_token_id == tokenizer.pad_token_id


@WITH_AND_WITHOUT_LORA
def test_the_saved_policy_writes_what_the_run_wrote(chat_tokenizer, toy, lora_r):
    """It ends where the run ended, and the base's own settings for sampling are not used."""
    make_policy("Llama", "chat", toy)
    model = AutoModelForCausalLM.from_pretrained("chat")
    model.resize_token_embeddings(len(chat_tokenizer))
    model.save_pretrained("chat")
    chat_tokenizer.save_pretrained("chat")
    own = {"repetition_penalty": 9.0, "min_new_tokens": 7, "eos_token_id": 3}
    Path("chat/generation_config.json").write_text(json.dumps(own))
    write_data("a.jsonl", prompt=[[said("user", f"the plot {i}")] for i in range(40)])
    flags = {"policy_model": "chat", "lora_r": lora_r, "eval_greedy": True}
    flags |= {"dataset": "a.jsonl", "eval_dataset": "a.jsonl", "prompt_length": 40}
    flags |= {"reward_model": (f"{__file__}:text_lengths",), "response_length": 30}
    folder = run(**flags, total_timesteps=8, learning_rate=0.01)
    config = transformers.GenerationConfig.from_pretrained(folder / "policy")
    pipe = transformers.pipeline(
        "text-generation", str(folder / "policy"), model_kwargs={"generation_config": config}
    )
    samples = read_samples(folder)[-4:]
    for sample in samples:
        (written,) = pipe(sample["prompt"], do_sample=False, return_full_text=False)
        assert written["generated_text"] == sample["response"]
    with refusal("only some of the prompts are messages"):
        load(**flags | {"eval_dataset": "runs/toy/test.jsonl"})


@pytest.mark.parametrize("eval_greedy", [False, True])
def test_an_evaluation_is_as_computed_by_hand(toy, monkeypatch, eval_greedy):
    """`--temperature` divides all logits, those of targets, too, not only of the likeliest k.
    Training samples in any case."""
    reward_model = f"{__file__}:text_lengths"
    flags = {"reward_model": (reward_model,), "response_length": 30, "learning_rate": 3e-3}
    flags |= {"top_k": 3, "temperature": 2.0, "total_timesteps": 16, "eval_greedy": eval_greedy}
    collected = record(monkeypatch, rlhf, "sample_responses")
    advantages = record(monkeypatch, rlhf, "token_advantages")
    folder = run(**flags)
    row = progress(folder)[-1]
    samples = read_samples(folder)
    assert [sample["step"] for sample in samples] == [0] * 4 + [16] * 4
    samples = samples[4:]
    rewards = np.array(text_lengths([sample["prompt"] + sample["response"] for sample in samples]))
    assert [sample["reward"] for sample in samples] == rewards.tolist()
    assert row["return_mean"] == approx(rewards.mean())
    assert row["return_std"] == approx(rewards.std())
    assert row[f"eval_{reward_model}"] == approx(rewards.mean())

    def begins_greedily(model, sample):
        logits = model(torch.tensor([sample.prompt])).logits[0, -1]
        return logits.argmax() == sample.response[0]

    load = AutoModelForCausalLM.from_pretrained
    policy = load(folder / "policy").eval()
    reference = load(toy / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(toy / "policy")
    log_probs = []
    reference_log_probs = []
    target_log_probs = []
    (_, initial), (_, first), (_, second), (_, evaluated) = collected
    for sample, shown in zip(evaluated, samples):
        assert tokenizer.decode(sample.response, skip_special_tokens=True) == shown["response"]
        text = sample.prompt, sample.response, 2.0
        log_probs += log_probs_alone(policy, *text).tolist()
        reference_log_probs += log_probs_alone(reference, *text).tolist()
        target_log_probs += log_probs_alone(policy, sample.prompt, sample.target, 2.0).tolist()
    assert len(log_probs) < 4 * 30
    assert len(log_probs) != len(target_log_probs)
    assert row["length_mean"] == len(log_probs) / 4
    kl = np.sum(log_probs) - np.sum(reference_log_probs)
    assert row["kl"] == approx(kl / 4, abs=1e-4)
    assert row["perplexity"] == approx(np.exp(-np.mean(reference_log_probs)), rel=1e-4)
    assert row["perplexity_real"] == approx(np.exp(-np.mean(target_log_probs)), rel=1e-4)

    assert all(begins_greedily(reference, sample) for sample in initial) == eval_greedy
    assert not all(begins_greedily(reference, sample) for sample in first)
    # Training: of other prompts each time, and what has become likelier pays for it
    assert [sample.prompt for sample in first] != [sample.prompt for sample in second]
    for ((_, log_ratio, *_), _), sample in zip(advantages, [*first, *second], strict=True):
        assert torch.equal(log_ratio, sample.log_prob - sample.reference_log_prob)
    assert log_ratio.abs().max() > 1e-3
    shown = read_samples(folder, "training")
    assert [(x["step"], x["reward"]) for x in shown] == [(16, x.scores[0]) for x in second]


def test_samples_show_prompts_with_their_special_tokens(monkeypatch):
    """And the data's other columns, also of types that JSON lacks."""
    collected = record(monkeypatch, rlhf, "sample_responses")
    columns = {"prompt": [f"{END}the plot {i}" for i in range(8)], "day": [date(2037, 5, 6)] * 8}
    write_data("few.parquet", **columns)
    folder = run(dataset="few.parquet", eval_dataset="few.parquet", total_timesteps=8)
    assert len({sample.row["prompt"] for sample in collected[1][1]}) == 8  # each once in a batch
    samples = read_samples(folder)
    assert all(re.fullmatch(rf"{re.escape(END)}the plot \d", x["prompt"]) for x in samples)
    assert not any(END in x["response"] for x in samples)
    assert {x["day"] for x in samples} == {"2037-05-06"}
    assert "perplexity_real" not in progress(folder)[-1]  # without targets


def test_the_optimizer_gets_its_settings():
    settings_ = {"learning_rate": 0.1, "weight_decay": 0.2, "adam_eps": 0.3}
    setup, _ = load(lora_r=2, lora_alpha=6, **settings_)
    adapter = setup.actor_critic.policy.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (2, 6)
    (group,) = setup.optimizer.param_groups
    assert [group[name] for name in ("lr", "weight_decay", "eps")] == [0.1, 0.2, 0.3]


def test_seeds_and_evaluations_have_random_numbers_of_their_own(monkeypatch):
    calls = record(monkeypatch, rlhf, "set_seed")
    for seed in (1, 2):
        run(seed=seed, total_timesteps=16, eval_freq=8)
    assert len(calls) == 10
    assert len({seed for (seed,), _ in calls}) == 10
    draws = []
    for index in (0, 1):  # of two processes
        monkeypatch.setattr(PartialState(), "process_index", index)
        draws.append((rlhf.seed_all(1, 2).random(), torch.rand(1).item()))
    assert draws[0][0] == draws[1][0]
    assert draws[0][1] != draws[1][1]


NOT_THE_SAME = "^error: the policy that acts is not the one that is"


@pytest.mark.parametrize(("amp", "shift", "rollout", "stops"), [
    ("off", 2e-4, 1, True), ("off", 1e-4, 1, False), ("off", 2e-4, 3, False),
    ("auto", 0.06, 2, True), ("auto", 0.03, 2, False),
])  # fmt: skip
def test_the_first_ratios_are_1_up_to_rounding(monkeypatch, amp, shift, rollout, stops):
    """Up to a KL divergence of 1e-8 in float32, and of 1e-3 in bfloat16, in two rollouts. A shift s
    of log-probabilities gives s ** 2 / 2."""
    rollouts = itertools.count(1)

    def shifted_update(setup, args, samples, rng):
        if next(rollouts) == rollout:
            for sample in samples:
                sample.log_prob += shift
        return update(setup, args, samples, rng)

    monkeypatch.setattr(rlhf, "has_bfloat16", lambda device: True)
    update = rlhf.update
    monkeypatch.setattr(rlhf, "update", shifted_update)
    with refusal(NOT_THE_SAME, stops):
        run(amp=amp, total_timesteps=24)


def test_enjoy_repeats_the_last_evaluation(monkeypatch, capsys):
    """Of a run at work."""
    setting = Setting(rlhf, SMALL | {"seed": 7}, "")
    folder = setting.interrupt("own", 3)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "sppo_rlhf", rlhf)  # puts it back after the run's copy
    call_main(monkeypatch, enjoy, folder, "--seed", 7, "--episodes", 4)
    output = capsys.readouterr()
    assert "warning: " not in output.err
    row = progress(folder)[-1]
    expected = [f"{x['reward']:.3f} {x['prompt']} [" for x in read_samples(folder)[-4:]]
    expected += [f"{name}: {row[name]:.4g}" for name in ("step", "return_mean", "kl")]
    expected.append(f"{folder}: reward {row['return_mean']:.3f} (")
    for text in expected:
        assert f"\n{text}" in f"\n{output.out}"


def test_rewards_are_noisy_in_training_and_clean_in_reports(monkeypatch):
    calls = record(monkeypatch, rlhf, "token_advantages")
    flags = {"total_timesteps": 8, "learning_rate": 0.0}
    clean = progress(run(**flags))[-1]
    flipped = progress(run(noise="flip", noise_level=1.0, **flags))[-1]
    rewards = np.array([args[0] for args, _ in calls])
    np.testing.assert_allclose(rewards[8:], 1 - rewards[:8], rtol=1e-5)
    assert clean["charts/episodic_return"] == approx(rewards[:8].mean())
    for name in ("return_mean", "return_std", "charts/episodic_return"):
        assert flipped[name] == clean[name]


def test_advantages_are_normalised_after_flips_drawn_anew_each_epoch(monkeypatch):
    """Over sampled tokens."""
    perturbations = record(monkeypatch, rlhf, "perturb_advantage")
    losses = record(monkeypatch, rlhf, "loss_and_metrics")
    run(noise="adv_flip", noise_level=0.5, response_length=40)
    lengths = set()
    for (_, _, pairs, *_), _ in losses:
        advantage = torch.cat([advantage for _, advantage in pairs])
        lengths.add(len(advantage))
        assert advantage.mean().item() == approx(0, abs=1e-5)
        assert advantage.std(correction=1).item() == approx(1, abs=1e-3)
    assert min(lengths) < 4 * 40  # some texts end early
    assert len(perturbations) == len(losses)
    flips = [noisy != args[0] for args, noisy in perturbations]
    assert len({tuple(flipped[:4].tolist()) for flipped in flips}) > 4
    assert torch.cat(flips).float().mean() == approx(0.5, abs=0.05)
    run(num_minibatches=8, response_length=1)


@WITH_AND_WITHOUT_LORA
def test_micro_batches_add_up_to_the_minibatch(models, monkeypatch, lora_r):
    """Gradients and metrics, against the losses by the plain model on each text alone."""
    flags = {"ce_coef": 0.1, "num_minibatches": 1, "update_epochs": 1}
    flags |= {"lora_r": lora_r, "norm_adv": False, "z": -2.0}
    setup, args = load(policy_model=str(models["gpt2"]), response_length=40, **flags)
    actor = setup.actor_critic
    randomise(actor)
    generator = torch.Generator().manual_seed(3)  # a loss is negative
    samples = rlhf.sample_responses(setup, args, setup.train_data)
    for i, sample in enumerate(samples):
        length = len(sample.response)
        for name in ("advantage", "returns"):
            setattr(sample, name, torch.randn(length, generator=generator))
        sample.log_prob += 0.3 * torch.randn(length, generator=generator)
        sample.value += torch.randn(length, generator=generator)  # so that clipping matters
        if i % 3 == 0:
            sample.target = []
    assert len({len(sample.response) for sample in samples}) > 1
    learning = [p for p in actor.parameters() if p.requires_grad]
    gradients = []

    def step():
        gradients.append(torch.cat([p.grad.flatten() for p in learning]))

    monkeypatch.setattr(setup.optimizer, "step", step)
    history = []
    limits = {None: 1e9, 1: 0.01, 3: 1e9}  # of the gradient's norm, by the size of micro batches
    for size, limit in limits.items():
        sized = replace(args, micro_batch_size=size, max_grad_norm=limit)
        history += rlhf.update(setup, sized, samples, np.random.default_rng(0))

    texts = zip(*((x.prompt, x.response, x.target) for x in samples))
    log_prob, value, target_log_prob = all_alone(actor, *texts)
    old, old_value, advantage, returns = (
        joined(samples, name) for name in ("log_prob", "value", "advantage", "returns")
    )
    ratio = (log_prob - old).exp()
    surrogate = ratio * advantage
    clipped = ratio.clamp(0.8, 1.2) * advantage
    policy_loss = -torch.minimum(surrogate, clipped).mean()
    reverse_loss = torch.where(surrogate <= clipped, -2 * surrogate, 0).mean()
    clipped = old_value + (value - old_value).clamp(-0.2, 0.2)
    value_loss = 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2).mean()
    sft_loss = -target_log_prob.mean()
    loss = 0.5 * policy_loss + 0.4 * reverse_loss + 0.5 * value_loss + 0.1 * sft_loss
    expected = gradient(actor, loss)
    numbers = {"policy_loss": policy_loss, "reverse_loss": reverse_loss, "value_loss": value_loss}
    numbers |= {"sft_loss": sft_loss, "grad_norm": expected.norm()}
    numbers["clipfrac"] = ((ratio - 1).abs() > 0.2).float().mean()
    numbers["approx_kl"] = (ratio - 1 - ratio.log()).mean()
    for limit, found, metrics in zip(limits.values(), gradients, history, strict=True):
        assert_near(found, min(1, limit / expected.norm().item()) * expected)
        for name, number in numbers.items():
            assert float(metrics[f"losses/{name}"]) == approx(number.item(), rel=1e-3)


@pytest.mark.parametrize(("kind", "layers"), {
    "GPTJ": "attn.q_proj attn.v_proj",  # peft's default
    "Phi3": "mlp.down_proj mlp.gate_up_proj self_attn.o_proj self_attn.qkv_proj",  # it has none
}.items())  # fmt: skip
def test_the_adapter_of_any_family_is_merged_into_its_model(toy, kind, layers):
    """What was trained, in policy and critic, is what is saved."""
    make_policy(kind, kind, toy)
    flags = {"policy_model": kind, "lora_r": 2, "learning_rate": 0.1}
    folder = run(**flags, total_timesteps=8)
    state = checkpoint(folder)["agent"]
    assert all("lora_" in name or "value_head" in name for name in state)
    assert all(weight.any() for weight in state.values())
    trained = rlhf.ActorCritic(make_args(**flags), CPU, torch.float32)
    trained.load_state_dict(state, strict=False)
    ids = torch.arange(12).view(2, 6)
    expected = trained.policy(ids).logits
    saved = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "policy")
    adapted = {".".join(name.split(".")[-2:]) for name in saved.targeted_module_names}
    assert adapted == set(layers.split())
    assert_close(saved.eval()(ids).logits, expected)
    merged = saved.merge_and_unload()(ids).logits
    assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    with trained.policy.disable_adapter():
        assert (trained.policy(ids).logits - expected).abs().max() > 0.01


def test_a_run_starts_from_weights_of_its_own_shapes(models):
    flags = {"policy_model": str(models["gptj"]), "lora_r": 1}
    folder = run(**flags, total_timesteps=8)
    with refusal("has weights of other names or shapes"):
        run(**flags | {"lora_r": 2, "start_from": str(folder)})


def stopping_at_a_kl_divergence(limit, folder):
    """A copy of the script with the page's edit."""
    page = (Path(rlhf.__file__).parent / "docs/copy-and-modify.md").read_text()
    line, below = re.search(r"`(if metrics.+?)` becomes .* above `(.+?)`", page).groups()
    line = line.replace("0.02", f"{limit:.9f}")
    return edited(rlhf, folder, (f"    {below}\n", f"        {line}\n    {below}\n"))


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_an_update_stops_at_the_kl_divergence_of_a_minibatch(monkeypatch, tmp_path, share):
    """Of its micro batches together, after an epoch. The limit is from a run without them."""
    updates = record(monkeypatch, rlhf, "update")
    flags = {"total_timesteps": 8, "update_epochs": 3, "learning_rate": 3e-3}
    run(**flags)
    limit = share * updates[0][1][1]["losses/approx_kl"].item()
    script = stopping_at_a_kl_divergence(limit, tmp_path / "copy")
    updates = record(monkeypatch, script, "update")
    train(script, make_args(**SMALL | flags | {"micro_batch_size": 1}))
    assert (len(updates[0][1]) == 2) == (share < 1)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["toy", "tldr", "stopping"])
def test_two_processes_train_the_same_weights_as_one(summaries, task, tmp_path):
    """With one text for each process to sample, and minibatches that are whole batches: else the
    processes would sample and divide them otherwise than one does. So does the page's edit that
    stops an update at a KL divergence."""
    flags = {"ce_coef": 0.1, "adam_eps": 1e-4, "micro_batch_size": 1, "top_k": 1}
    flags |= {"num_minibatches": 1, "eval_greedy": True}
    script = rlhf
    if task == "tldr":
        flags |= summaries
    if task == "stopping":
        script = stopping_at_a_kl_divergence(1e-4, tmp_path / "copy")
        flags |= {"update_epochs": 9, "learning_rate": 1e-4}
    one = train(script, make_args(**SMALL | flags, runs_dir="own"))
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *launch.split(), script.__file__, "--runs-dir", "two"]
    command += typed(SMALL | flags)
    only = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=only)
    assert done.returncode == 0, done.stderr[-3000:]
    (two,) = Path("two").iterdir()
    before, after = (sorted(x["response"] for x in read_samples(x)) for x in (one, two))
    assert before == after
    assert_close(weights(two), weights(one), rtol=0, atol=2e-5)
    for row, expected in zip(progress(two), progress(one), strict=True):
        assert row == approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)


@pytest.mark.slow
def test_the_toy_learns_its_reward(monkeypatch):
    """In twelve updates, of three seeds, it rose by 0.22 or more."""
    Path(rlhf.TOY).unlink()
    toy_script.make_toy(Path(rlhf.TOY))
    words = ["--total-timesteps", 12 * 112, "--eval-freq", 12 * 112, "--device", "cpu"]
    call_main(monkeypatch, rlhf, *words, "--runs-dir", "own")
    (folder,) = Path("own").iterdir()
    first, last = progress(folder)
    assert last["return_mean"] - first["return_mean"] > 0.2
    assert 0 < last["kl"] < 20


# Arguments


def test_defaults_depend_on_the_task_and_on_other_flags(capsys):
    for task in rlhf.TASKS:
        assert rlhf.parse_args([f"--task={task}", "--gamma", "0.5"]) == make_args(task, gamma=0.5)
    sppo = rlhf.parse_args([])
    ppo = make_args(beta=0.0, noise="flip")
    assert sppo.alpha == 0.5
    assert sppo.noise_level == 0.0
    assert sppo.exp_name == "sppo"
    assert sppo.eval_freq == 448
    assert ppo.alpha == 1.0
    assert ppo.noise_level == 0.1
    assert ppo.exp_name == "ppo"
    own = make_args(dataset="a/mine.parquet")
    assert own.eval_dataset is None
    assert own.task == "mine"
    assert make_args("imdb").eval_dataset == "stanfordnlp/imdb:test"
    with refusal("--reward-model is there twice"):
        rlhf.parse_args(["--reward-model", "a.py:a", "--reward_model=b.py:b"])
    with pytest.raises(SystemExit, match="^0$"):
        rlhf.parse_args(["--task", "tldr", "--help"])
    assert "jdchang/tldr_rm_adapter" in capsys.readouterr().out


AUTHORS = {
    "imdb": "total_timesteps=6720 batch_size=112 num_minibatches=4 update_epochs=5 "
    "prompt_length=64 response_length=48 top_k=50 lora_r=0 learning_rate=5e-06 "
    "weight_decay=1e-06 gamma=0.99 vf_coef=0.5 ce_coef=0.1 kl_coef=0.001 beta=0.4 "
    "stop_at_eos=False eval_greedy=False",
    "tldr": "total_timesteps=12800 batch_size=64 num_minibatches=4 update_epochs=4 "
    "prompt_length=500 response_length=50 top_k=0 lora_r=8 learning_rate=5e-06 "
    "weight_decay=0.01 gamma=1.0 vf_coef=0.1 ce_coef=0.1 kl_coef=0.002 beta=0.2 "
    "stop_at_eos=True eval_greedy=True",
}
COMMON = "adam_eps=1e-05 gae_lambda=0.95 clip_coef=0.2 max_grad_norm=1.0 alpha=0.5 z=-1.0 seed=1 "
COMMON += "lora_alpha=64 temperature=1.0 norm_adv=True eval_episodes=128 device=auto amp=auto"


@pytest.mark.parametrize("task", AUTHORS)
def test_the_settings_of_a_task_are_the_authors(task):
    settings = {f"{name}={value}" for name, value in vars(make_args(task)).items()}
    assert set(f"{COMMON} {AUTHORS[task]}".split()) <= settings
