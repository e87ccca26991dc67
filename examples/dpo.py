"""Train with TRL's DPOTrainer. The bare base inside the model is the reference; no second copy is loaded."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import umbra

name = os.environ.get("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
model = umbra.attach(AutoModelForCausalLM.from_pretrained(name), umbra.ShadowConfig(auxiliary_loss_weight=0.1))

data = Dataset.from_list(
    [
        {"prompt": f"{a} plus {b} is", "chosen": f" {a + b}", "rejected": f" {a + b + 1}"}
        for a in range(4)
        for b in range(4)
    ]
)
trainer = umbra.with_shadow_loss(DPOTrainer)(
    model=model,
    args=DPOConfig(
        "out/dpo",
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        bf16=torch.cuda.is_available(),  # TRL's default is True
    ),
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("out/dpo/adapter")
