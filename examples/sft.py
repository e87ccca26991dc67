"""Train with TRL's SFTTrainer on packed conversations."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import umbra

name = os.environ.get("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
model = umbra.attach(AutoModelForCausalLM.from_pretrained(name), umbra.ShadowConfig(auxiliary_loss_weight=0.1))

data = Dataset.from_list(
    [{"prompt": f"What is {a} plus {b}?", "completion": f" {a + b}"} for a in range(6) for b in range(6)]
)
trainer = umbra.with_shadow_loss(SFTTrainer)(
    model=model,
    args=SFTConfig(
        "out/sft",
        packing=True,
        max_length=128,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        bf16=torch.cuda.is_available(),  # TRL's default is True
    ),
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("out/sft/adapter")
