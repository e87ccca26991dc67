"""Random mutations of configuration entries and of the file system (see mutations.py)."""

import json
import os
import shutil
import socket
from pathlib import Path

from support.folders import CARD, CONFIG, WEIGHTS
from support.mutations import Rng, becomes, either

# -- the configuration -------------------------------------------------------------------------------------------------


def nested(depth: int):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def weird(rng: Rng):
    """Return a value that is invalid for nearly every entry."""
    numbers = [-1, 0, 1, 3, 7, 255, 2**31, 2**63, 2**64, 10**9, 10**12, 10**15, 10**300, 10**4000, -(10**12), 0.5, 1e9]
    floats = [float("nan"), float("inf"), -float("inf"), 1e308, -0.0, 1e-320, 2.0]
    words = [
        "",
        "x",
        "0",
        "true",
        "\0",
        "\ud800",
        "影",
        "../../etc/passwd",
        "/dev/zero",
        "__import__('os')",
        "a" * 10**5,
    ]
    others = [None, True, False, [], {}, [[]], {"": {}}, nested(50), nested(400), list(range(1000)), ["x"] * 3, [1, 2]]
    return rng.choice(rng.choice([numbers, numbers, floats, words, others]))


def entries(values, path=()):
    """Yield every (container, key) of a JSON tree."""
    found = []
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        found.append((values, key))
        if isinstance(value, dict | list):
            found += entries(value)
    return found


def read_json(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def write_json(folder: Path, values: dict, **style) -> None:
    (folder / CONFIG).write_text(json.dumps(values, **style))


def pick_entry(values: dict, rng: Rng):
    """Return a random entry, mostly from the most relevant part."""
    part = rng.choice(["shadow", "shadow_model_config", "shadow_model_config", "base", None])
    chosen = entries(values[part]) if part and isinstance(values.get(part), dict) else entries(values)
    return rng.choice(chosen or entries(values))


@becomes("any")
def weird_value(folder, rng):
    values = read_json(folder)
    container, key = pick_entry(values, rng)
    container[key] = weird(rng)
    write_json(folder, values)
    return f"{key}: {str(container[key])[:60]}"


@becomes("any")
def huge_size(folder, rng):
    values = read_json(folder)
    sizes = [(c, k) for part in ("shadow", "shadow_model_config") for c, k in entries(values[part])
             if type(c[k]) is int or k == "rank" or str(k).startswith(("shadow_", "num_"))]  # fmt: skip
    container, key = rng.choice(sizes)
    container[key] = rng.choice([10**5, 10**6, 10**7, 10**9, 2**31 - 1, 2**40, 10**15])
    write_json(folder, values)
    return f"{key}: {container[key]}"


@becomes("any")
def nudged_number(folder, rng):
    values = read_json(folder)
    numbers = [(c, k) for c, k in entries(values) if type(c[k]) in (int, float)]
    container, key = rng.choice(numbers)
    x = container[key]
    container[key] = rng.choice([x + 1, x - 1, -x, 2 * x, x * (1 + 1e-9), float(x), str(x), [x], x + 0.5])
    write_json(folder, values)
    return f"{key}: {x} → {container[key]}"


@becomes("any")
def dropped_or_renamed_entry(folder, rng):
    values = read_json(folder)
    container, key = pick_entry(values, rng)
    value = container.pop(key)
    if isinstance(container, dict) and rng.random() < 0.6:
        container[rng.choice([key.upper(), key + "s", " " + key, key + "\u0301", "", key[::-1]])] = value
    write_json(folder, values)
    return str(key)


@becomes("any")
def added_entry(folder, rng):
    values = read_json(folder)
    key = rng.choice(["auto_map", "rnk", "quantization_config", "trust_remote_code", "layers", "num_labels", "_name", "é",
                      "torch_dtype", "dtype", "attn_implementation", "_attn_implementation", "return_dict", "num_experts",
                      "sliding_window", "is_decoder", "tie_word_embeddings", "gradient_checkpointing", "output_attentions",
                      "pruned_heads", "__class__", "self", "base_config_key", "per_layer_config"])  # fmt: skip
    rng.choice([values, values["shadow"], values["shadow_model_config"], values["base"]])[key] = weird(rng)
    write_json(folder, values)
    return key


@becomes("any")
def other_model_type(folder, rng):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    values = read_json(folder)
    place = values[rng.choice(["shadow_model_config", "shadow_model_config", "base"])]
    place["model_type"] = rng.choice([*rng.sample(sorted(CONFIG_MAPPING_NAMES), 3), "../llama", "llama\0", "LLAMA", ""])
    write_json(folder, values)
    return place["model_type"]


@becomes("refused")
def entry_given_twice(folder, rng):
    text = (folder / CONFIG).read_text()
    values = json.loads(text)
    key = rng.choice(sorted(values))
    again = f"{json.dumps(key)}: {json.dumps(rng.choice([values[key], None, 3]))}"
    (folder / CONFIG).write_text(f"{{{again}, {text[1:]}" if rng.random() < 0.5 else f"{text.rstrip()[:-1]}, {again}}}")
    return key


@becomes("same")
def other_text_same_entries(folder, rng):
    values = read_json(folder)
    items = list(values.items())
    rng.shuffle(items)
    shadow = list(values["shadow"].items())
    rng.shuffle(shadow)
    values = {**dict(items), "shadow": dict(shadow), **rng.choice([{}, {"author": "影", "notes": [1, {"a": None}]}])}
    write_json(folder, values, indent=rng.choice([None, 0, 1, "\t"]), ensure_ascii=rng.random() < 0.5)
    with (folder / CONFIG).open("a") as file:
        file.write(rng.choice(["", "\n\n", " \t\r\n"]))


@becomes("same")
def other_facts_about_the_origin(folder, rng):
    values = read_json(folder)
    facts = {"umbra_version": "9.9.9", "base_model_name_or_path": "/no/such/base", "adapter_id": "0" * 32}
    key = rng.choice(list(facts))
    values[key] = facts[key]
    write_json(folder, values)
    return key


# -- the file system ---------------------------------------------------------------------------------------------------


@becomes("refused")
def something_else_in_place_of_a_file(folder, rng):
    file = either(folder, rng)
    file.unlink()
    kind = rng.choice(
        ["nothing", "folder", "pipe", "socket", "loop", "dangling", "to a folder", "zero", "null", "random", "tty"]
    )
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as endpoint:
            here = os.open(folder, os.O_RDONLY)
            endpoint.bind(f"/proc/self/fd/{here}/{file.name}")
            os.close(here)
    elif kind != "nothing":
        targets = {"loop": file.name, "dangling": "gone", "to a folder": ".", "zero": "/dev/zero", "null": "/dev/null",
                   "random": "/dev/urandom", "tty": "/dev/ptmx"}  # fmt: skip
        file.symlink_to(targets[kind])
    return f"{file.name}: {kind}"


@becomes("same")
def linked_from_elsewhere(folder, rng):
    """Replace files by links to blobs outside the folder, as in the hub's cache."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, name in enumerate([CONFIG, WEIGHTS, CARD]):
        (folder / name).rename(blobs / str(i))
        link = rng.choice([(folder / name).symlink_to, (folder / name).hardlink_to])
        link(blobs / str(i))


@becomes("same")
def leftovers(folder, rng):
    """Add leftovers of killed saves and unrelated files."""
    staged, committed = folder / ".umbra-staged-x1", folder / ".umbra-commit"
    kind = rng.choice(
        ["staged", "empty commit", "whole commit", "linked commit", "file as commit", "pickles", "no card", "card"]
    )
    if kind == "staged":
        staged.mkdir()
        (staged / CONFIG).write_bytes(rng.randbytes(99))
    elif kind == "empty commit":
        committed.mkdir()
    elif kind == "whole commit":
        shutil.copytree(folder, committed)
        (folder / rng.choice([CONFIG, WEIGHTS])).write_bytes(b"half")
    elif kind == "linked commit":
        (folder.parent / "other").mkdir()
        (folder.parent / "other" / CONFIG).write_text("{}")
        committed.symlink_to(folder.parent / "other")
    elif kind == "file as commit":
        committed.write_text("x")
    elif kind == "pickles":
        for name in ("adapter_model.bin", "pytorch_model.bin", "model.safetensors", "config.json", "\n☂ .py"):
            (folder / name).write_bytes(rng.randbytes(99))
    else:
        (folder / CARD).unlink()
        if kind == "card":
            (folder / CARD).write_bytes(rng.randbytes(9999))
    return kind


@becomes("refused")
def a_commit_of_something_else(folder, rng):
    committed = folder / ".umbra-commit"
    committed.mkdir()
    (committed / rng.choice([CONFIG, WEIGHTS])).write_bytes(rng.choice([b"", b"{}", rng.randbytes(500)]))


@becomes("refused")
def sparse_giant(folder, rng):
    file = either(folder, rng)
    os.truncate(file, rng.choice([2**27, 2**35, 2**40]))
    return file.name
