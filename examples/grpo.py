"""Train with TRL's GRPOTrainer. The attached model samples; the shadow trains on the same samples and rewards."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import umbra

name = os.environ.get("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
model = umbra.attach(AutoModelForCausalLM.from_pretrained(name), umbra.ShadowConfig(auxiliary_loss_weight=0.1))


def brevity(completions: list[str], **_: object) -> list[float | None]:
    """Return a toy reward that favours short answers."""
    return [-float(len(text)) for text in completions]


data = Dataset.from_list([{"prompt": f"{a} plus {b} is"} for a in range(4) for b in range(2)])
arguments = GRPOConfig(
    "out/grpo",
    num_generations=4,
    max_completion_length=16,
    beta=0.04,  # the KL divergence from the bare base
    learning_rate=1e-4,
    logging_steps=1,
    report_to="none",
    bf16=torch.cuda.is_available(),  # TRL's default is True
)
trainer = umbra.with_shadow_loss(GRPOTrainer)(
    model=model, reward_funcs=brevity, args=arguments, train_dataset=data, processing_class=tokenizer
)
trainer.train()
trainer.save_model("out/grpo/adapter")
