"""Makes a folder with sums of two numbers below 100, of which some are held out, and a small GPT-2
that has learnt them in part.

    python benchmarks/sums.py sums
"""

import json
import random
import sys
from pathlib import Path

import torch
import transformers

NUMBERS = 100
HELD_OUT = 512


def make(folder, steps=700):
    """Writes train.jsonl and test.jsonl, with the columns `prompt` and `label`, and policy/, after
    `steps` of supervised training on 64 sums each."""
    rng = random.Random(1)
    pairs = [(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    rng.shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a, b in pairs]
    folder.mkdir(parents=True)
    for name, part in ("test", rows[:HELD_OUT]), ("train", rows[HELD_OUT:]):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)

    texts = [row["prompt"] + row["label"] + "<|endoftext|>" for row in rows]
    tokenizer = transformers.GPT2Tokenizer(pad_token="<|pad|>")
    tokenizer = tokenizer.train_new_from_iterator(texts, 258, show_progress=False)  # bytes
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(1)
    policy = transformers.AutoModelForCausalLM.from_config(config)
    tokens["labels"] = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(HELD_OUT, len(rows), (64,))
        batch = {name: tensor[chosen] for name, tensor in tokens.items()}
        policy(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
