"""What runs in each process of a `Pair`: functions of one rank's side."""
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tiny import gradients, label_count, make, partly_labelled, tokens
from umbra.anatomy import locate


def batch(rank=None, rows=5, length=11):
    ids = tokens(rows, length)
    labels = partly_labelled(ids)
    items = label_count(labels)
    if rank is not None:
        cut = slice(0, 1) if rank == 0 else slice(1, rows)
        ids, labels = ids[cut], labels[cut]
    return {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(items)}


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def step(engine, name="llama", options=None, **fields):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make(name, **(options or {}), **fields).train()
    wrapped = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "blocks":
        for block in [*locate(model.base).blocks]:
            fully_shard(block)
        fully_shard(model)
    elif engine == "root":
        fully_shard(model)
    loss = wrapped(**batch(rank)).loss * world
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / world, {n.replace("module.", ""): full(g) for n, g in gradients(model).items()}
