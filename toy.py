# SPDX-FileCopyrightText: 2026 The symmetric-rl-loss authors
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.11", "transformers>=5.0", "datasets>=4.0", "tqdm>=4.66.5"]
# [tool.uv]  # the versions of requirements.lock
# exclude-newer = "2026-11-17T00:00:00Z"
# constraint-dependencies = ["torch==2.13.0"]
# ///
"""Makes the toy task of sppo_rlhf.py, in runs/toy: film reviews from a grammar, and a policy and a
reward model trained on them. Needs no network; takes a minute on a CPU.

    python toy.py
"""

import random
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ASPECTS = "plot acting music script ending cast pacing dialogue camera humour".split()
GOOD = "superb moving clever funny brilliant charming gripping warm".split()
BAD = "dull clumsy weak tedious awful silly flat noisy".split()


def toy_review(rng):
    """Three to six judgements, each positive or negative with equal probability."""
    aspects = rng.sample(ASPECTS, rng.randint(3, 6))
    clauses = [f"the {aspect} was {rng.choice(GOOD + BAD)}" for aspect in aspects]
    return " and ".join(clauses) + " ."


def toy_sentiment(text):
    """Share of positive judgements, 0.5 for a text without judgements."""
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

    # Trained word pieces would differ from run to run
    words = sorted({word for review in reviews for word in review.split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = transformers.BertTokenizer({word: i for i, word in enumerate(words)})
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
    torch.set_num_threads(1)  # for models so small, threads cost more time than they save
    make_toy(Path("runs/toy"))
