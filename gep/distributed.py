"""What ranks say to each other: seeds, sums, gathers. On one process every function here is the identity."""

import random
import signal
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# Comparing sizes costs a host sync on an accelerator, so there only the first gathers of a process are
# checked: a loader that hands out unequal batches does so from its first steps, or drops its last batch.
_CHECKED_GATHERS = 4
_gathers = 0


def is_distributed() -> bool:
    """True inside a torch.distributed process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number in [0, world_size)."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def seed_all(seed: int, *, per_rank: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices).

    Args:
        seed: any integer >= 0.
        per_rank: True mixes the rank in, so that dropout and noise differ between ranks; rank 0 of one
            process gets the same stream as rank 0 of many. False (weights' initial values) gives every rank
            the same stream.
    """
    mixed = int(np.random.SeedSequence([seed, rank() if per_rank else 0]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(mixed)


def all_agree(flag: bool) -> bool:
    """True on every rank as soon as one rank says True: how ranks agree to stop. Syncs with the device."""
    if not is_distributed():
        return flag
    votes = torch.tensor(float(flag), device=_collective_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def ignore_signals(worker_id: int = 0) -> None:
    """A DataLoader's worker_init_fn: SIGINT and SIGTERM are for the training process, which ends in order.

    Without it Ctrl-C ends the workers at once, and a run of several ranks may still want their next batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a same-shaped tensor over ranks, on every rank; no gradient. The input is not modified."""
    if not is_distributed():
        return tensor.detach()
    total = tensor.detach().to(_collective_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum of a same-shaped tensor over ranks, on every rank; no gradient, no host sync."""
    if not is_distributed():
        return tensor.detach()
    result = tensor.detach().to(_collective_device(), copy=True)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result.to(tensor.device)


def gather_objects(value: Any) -> list[Any]:
    """The picklable values of all ranks in rank order, on every rank. Slow: for log points and errors."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of all ranks on dim 0, without gradient.

    Args:
        tensor: (n, ...), the same shape and dtype on every rank.
    Returns:
        (world_size * n, ...) in rank order; the tensor itself (detached) on one process.
    Raises:
        ValueError: the ranks hold different numbers of rows.
    """
    if not is_distributed():
        return tensor.detach()
    return _all_gather(tensor.detach())


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of all ranks on dim 0; gradients flow back to the rank each row came from.

    The backward pass sums over ranks what each rank's loss says about a row. DDP then divides by the number
    of ranks, so with per-rank mean losses of equal size the weights receive the exact gradient of the global
    mean.

    Args:
        tensor: (n, ...), the same shape and dtype on every rank.
    Returns:
        (world_size * n, ...) in rank order; the tensor itself on one process.
    Raises:
        ValueError: the ranks hold different numbers of rows.
    """
    if not is_distributed():
        return tensor
    return _GatherWithGrad.apply(tensor)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # All-reduce and slice: gloo has no reduce-scatter in the oldest torch supported.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def _all_gather(tensor: Tensor) -> Tensor:
    global _gathers
    if tensor.ndim == 0:
        raise ValueError("gather needs a tensor with a first dimension; give a scalar as value[None]")
    _gathers += 1
    if tensor.device.type == "cpu" or _gathers <= _CHECKED_GATHERS:
        sizes = gather_objects(tuple(tensor.shape))
        if len(set(sizes)) > 1:
            raise ValueError(
                f"gather: ranks hold different shapes {sizes}; give every rank the same number of samples "
                "(batch_size divisible by the number of processes, last batch dropped)"
            )
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _collective_device() -> torch.device:
    """Where small tensors must live for the process group's backend."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
