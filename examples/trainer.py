"""Train with transformers' Trainer and label smoothing. The attached model and the shadow learn the smoothed labels."""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

import umbra

name = os.environ.get("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
model = umbra.attach(AutoModelForCausalLM.from_pretrained(name), umbra.ShadowConfig(auxiliary_loss_weight=0.1))

texts = [f"{a} plus {b} is {a + b}." for a in range(6) for b in range(6)]
data = [tokenizer(text) for text in texts]
arguments = TrainingArguments(
    "out/trainer", num_train_epochs=2, learning_rate=1e-3, logging_steps=5, label_smoothing_factor=0.1, report_to="none"
)
trainer = umbra.ShadowTrainer(
    model=model,
    args=arguments,
    train_dataset=data[:32],
    eval_dataset=data[32:],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
print(trainer.evaluate())  # eval_loss is the attached model's, eval_shadow_loss the shadow's
trainer.save_model("out/trainer/adapter")
