"""Train in a custom loop with two micro-batches per step. Both losses are normalised by the step's label count."""

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import umbra

name = os.environ.get("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = umbra.attach(AutoModelForCausalLM.from_pretrained(name), umbra.ShadowConfig(auxiliary_loss_weight=0.1))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def batch(texts):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


texts = [f"{a} plus {b} is {a + b}." for a in range(6) for b in range(6)]
model.train()
for step in range(5):
    micro = [batch(texts[i : i + 4]) for i in range(8 * (step % 4), 8 * (step % 4) + 8, 4)]
    items = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micro)
    for inputs in micro:
        out = model(**inputs, num_items_in_batch=items)
        out.loss.backward()  # task + λ · shadow
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {out.loss:.3f}, including the shadow's {0.1 * out.shadow_loss:.3f}")
model.save_pretrained("out/loop/adapter")
