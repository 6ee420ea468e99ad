"""Several processes that train one model: DDP keeps a whole model in each, FSDP2 a part of every weight.

Every process draws the same batch and trains on its own rows of it, so that the losses are those of one process, but for the
order of sums.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfkern.ending import InputError

KINDS = ("none", "ddp", "fsdp")
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, and which of them this one is."""

    kind: str = "none"
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def parts(self, batch: Batch, accumulate: int) -> list[Batch]:
        """The rows of this process, in parts to be run one after the other."""
        cut = zip(*(x.chunk(accumulate * self.count) for x in batch), strict=True)
        return list(cut)[self.rank :: self.count]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What runs in the place of the model. FSDP2 changes the model itself: each block's weights become one unit."""
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.count,))
            blocks = next(part for name, part in model.named_modules() if name.split(".")[-1] == "blocks")
            for part in (*blocks, model):
                fully_shard(part, mesh=mesh)
        return model

    @contextlib.contextmanager
    def exchanging(self, runs: nn.Module, on: bool) -> Iterator[None]:
        """Whether gradients are exchanged in the backward within the block: once for all parts, in the last of them."""
        if self.kind == "fsdp":
            runs.set_requires_gradient_sync(on)
        with runs.no_sync() if self.kind == "ddp" and not on else contextlib.nullcontext():
            yield

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            torch.distributed.all_reduce(x)
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in one process or more."""
        return flag if self.count == 1 else bool(self.total(torch.tensor(float(flag), device=device)).item())

    def gathered(self, x: object) -> list:
        """What each process has, by rank."""
        if self.count == 1:
            return [x]
        every: list = [None] * self.count
        torch.distributed.all_gather_object(every, x)
        return every


def whole(x: Tensor) -> Tensor:
    """A tensor with all its parts, on every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def placed(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as another one is, which every process has."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def joined(kind: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that torchrun started, and the device of this one. InputError where it started none, or too many."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "none":
        if started > 1:
            raise InputError(f"torchrun started {started} processes: add --distributed ddp, or fsdp to split the weights, too")
        yield Ranks(), device
        return
    if not started:
        raise InputError(
            f"--distributed {kind} needs processes that torchrun starts: "
            f"torchrun --nproc-per-node 2 -m tfkern.cli train … --distributed {kind}"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(kind, torch.distributed.get_rank(), started), device
    finally:
        torch.distributed.destroy_process_group()
