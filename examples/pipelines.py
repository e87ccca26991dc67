"""Use transformers' pipelines: generate with the attached model and the detached shadow; classify."""

import os

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import umbra

name = os.environ.get("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
model = umbra.attach(AutoModelForCausalLM.from_pretrained(name)).eval()  # or umbra.load(…)
for runner in (model, model.detached()):
    generate = pipeline("text-generation", model=runner, tokenizer=tokenizer)
    print(generate("Two plus two is", max_new_tokens=8, do_sample=False))

classifier = umbra.attach(AutoModelForSequenceClassification.from_pretrained(name, num_labels=3)).eval()
print(pipeline("text-classification", model=classifier, tokenizer=tokenizer)("Two plus two is four"))
