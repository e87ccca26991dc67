"""Random mutations of an adapter folder's bytes and tensors, each with its permitted outcome (see fuzz.py)."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.folders import CONFIG, WEIGHTS

Rng = random.Random
MUTATIONS: list[tuple[Callable[[Path, Rng], str | None], str]] = []


def becomes(expected: str):
    """Register a mutation under its permitted outcome."""

    def register(mutation):
        MUTATIONS.append((mutation, expected))
        return mutation

    return register


# -- bytes -------------------------------------------------------------------------------------------------------------


def either(folder: Path, rng: Rng) -> Path:
    return folder / rng.choice([CONFIG, WEIGHTS])


@becomes("any")
def flip_bytes(folder, rng):
    file = either(folder, rng)
    data = bytearray(file.read_bytes())
    start = rng.choice([0, 0, 8, 200, 0]) if file.name == WEIGHTS else 0
    end = rng.choice([9, 400, len(data), len(data)])
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        data[rng.randrange(start, max(start + 1, min(end, len(data))))] = rng.randrange(256)
    file.write_bytes(data)
    return file.name


@becomes("any")
def change_a_digit(folder, rng):
    data = bytearray((folder / CONFIG).read_bytes())
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    data[rng.choice(places)] = ord(str(rng.randrange(10)))
    (folder / CONFIG).write_bytes(data)


@becomes("refused")
def truncate(folder, rng):
    file = either(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 3, rng.randrange(len(data) - 3)])])
    return file.name


@becomes("any")
def splice(folder, rng):
    file = either(folder, rng)
    data, n = file.read_bytes(), rng.choice([1, 4, 64, 4096])
    at = rng.randrange(len(data))
    new = rng.choice([b"", rng.randbytes(n), bytes(n), data[:n], data[at : at + n] * 2, b"\xff" * n])
    file.write_bytes(data[:at] + new + data[at + rng.choice([0, n]) :])
    return file.name


@becomes("refused")
def foreign_content(folder, rng):
    file = either(folder, rng)
    other = folder / (CONFIG if file.name == WEIGHTS else WEIGHTS)
    contents = [
        b"\n", b"{}", b"[]", b"null", b"PK\x03\x04", b"\x80\x04K\x01.", b"GGUF", bytes(4096), rng.randbytes(5000),
        b"version https://git-lfs.github.com/spec/v1\n", "{}".encode("utf-16"), b"\xef\xbb\xbf{}", other.read_bytes(),
        b"[" * 10**5, b'{"a":' * 10**5,
    ]  # fmt: skip
    file.write_bytes(rng.choice(contents))
    return file.name


# -- the header of the weights -----------------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(file: Path, header: dict | str, body: bytes, size: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + body)


@becomes("refused")
def absurd_header_size(folder, rng):
    header, body = read_header(folder / WEIGHTS)
    sizes = [0, 1, 7, 10**8, 10**8 + 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, len(body) * 2]
    write_header(folder / WEIGHTS, header, body, rng.choice(sizes))


@becomes("refused")
def lie_about_a_tensor(folder, rng):
    header, body = read_header(folder / WEIGHTS)
    name = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    lies = {
        "dtype": ["F16", "F64", "I32", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "X9", "", None, 3, "f32"],
        "shape": [[], [0], [1], [-1], [2**62, 2], [2**40, 2**40], [1.5], ["4"], None, "4", {}, [end], [10**30],
                  [*entry["shape"], 1], [*entry["shape"][::-1], 2], [[4]]],
        "data_offsets": [[0, 0], [end, start], [start, end + 4], [start, 2**63], [-4, end], [start], [], None, "0",
                         [start + 1, end + 1], [0, len(body)], [0.5, 4]],
    }  # fmt: skip
    key = rng.choice(list(lies))
    entry[key] = rng.choice(lies[key])
    if rng.random() < 0.1:
        del entry[key]
    write_header(folder / WEIGHTS, header, body)
    return f"{name} {key} {entry.get(key, 'gone')}"


@becomes("refused")
def rename_a_tensor(folder, rng):
    header, body = read_header(folder / WEIGHTS)
    old = rng.choice([k for k in header if k != "__metadata__"])
    names = [
        "",
        "x",
        old.upper(),
        old + " ",
        old + "\u200b",
        old.replace("e", "е"),
        "base." + old,
        old + "s",
        "\0",
        "a" * 10**6,
    ]
    new = rng.choice([*names, old.removeprefix("shadow."), "base.lm_head.weight"])
    write_header(folder / WEIGHTS, {new if k == old else k: v for k, v in header.items()}, body)
    return f"{old} → {new[:80]!r}"


@becomes("any")
def name_a_tensor_twice(folder, rng):
    header, body = read_header(folder / WEIGHTS)
    name, other = rng.sample([k for k in header if k != "__metadata__"], 2)
    entry = header[rng.choice([name, other])]
    text = json.dumps(header)
    write_header(folder / WEIGHTS, f"{text[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}", body)


@becomes("refused")
def impossible_metadata(folder, rng):
    header, body = read_header(folder / WEIGHTS)
    deep: dict = {}
    for _ in range(rng.choice([200, 900])):
        deep = {"a": deep}
    header["__metadata__"] = rng.choice([3, [], "x", {"format": 3}, {"format": {}}, {"a": deep}])
    write_header(folder / WEIGHTS, header, body)


@becomes("same")
def other_header_same_tensors(folder, rng):
    header, body = read_header(folder / WEIGHTS)
    items = list(header.items())
    rng.shuffle(items)
    header = dict(items)
    header["__metadata__"] = rng.choice(
        [{}, {"format": "pt"}, {"author": "ñ 影"}, {str(i): "x" * 99 for i in range(99)}]
    )
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    write_header(folder / WEIGHTS, text + " " * rng.choice([0, 1, 7, 4096]), body)


# -- tensors -----------------------------------------------------------------------------------------------------------


def change_a_tensor(change: Callable[[torch.Tensor, Rng], torch.Tensor | None]):
    def mutation(folder, rng):
        weights = load_file(folder / WEIGHTS)
        name = rng.choice(sorted(weights))
        new = change(weights.pop(name), rng)
        save_file({**weights, **({} if new is None else {name: new.contiguous()})}, folder / WEIGHTS)
        return name

    mutation.__name__ = change.__name__
    return mutation


@becomes("refused")
@change_a_tensor
def not_finite(tensor, rng):
    tensor = tensor.clone().double() if rng.random() < 0.3 else tensor.clone()
    values = [float("nan"), float("inf"), -float("inf")] + [1e300, -1e39] * (tensor.dtype == torch.float64)
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(values)
    return tensor


@becomes("detected")
@change_a_tensor
def other_values(tensor, rng):
    flat = tensor.clone().view(-1)
    flat[rng.randrange(len(flat))] += 1e-3
    return rng.choice([flat.view_as(tensor), -tensor - 1, tensor * 0 + 0.5, tensor + 1e-3, tensor.flip(0) + 1e-3])


@becomes("detected")
@change_a_tensor
def other_dtype(tensor, rng):
    types = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
    return tensor.to(rng.choice([*types, torch.complex64, torch.uint8]))


@becomes("refused")
@change_a_tensor
def other_shape(tensor, rng):
    shapes = [tensor[None], tensor[:-1], tensor.reshape(-1, 1, 1), tensor[..., None], torch.cat([tensor, tensor])]
    return rng.choice([*shapes, tensor[:0], torch.tensor(1.0), tensor.new_zeros(2**18)])


@becomes("refused")
@change_a_tensor
def missing(tensor, rng):
    return None


@becomes("refused")
def added_tensor(folder, rng):
    name = rng.choice(["x", "base.lm_head.weight", "shadow.couplings.injections.99.up.weight", "shadow.heads.x", "é"])
    value = torch.zeros(rng.choice([0, 1, 999]))
    save_file({**load_file(folder / WEIGHTS), name: value}, folder / WEIGHTS)
    return name


@becomes("detected")
def swapped_tensors(folder, rng):
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    a = rng.choice([n for n in names if any(_swappable(weights, n, m) for m in names)])
    b = rng.choice([m for m in names if _swappable(weights, a, m)])
    save_file({**weights, a: weights[b], b: weights[a]}, folder / WEIGHTS)
    return f"{a} ↔ {b}"


def _swappable(weights, a: str, b: str) -> bool:
    return weights[a].shape == weights[b].shape and not torch.equal(weights[a], weights[b])
