"""Ranks: the processes of one run, as torchrun starts them. Each takes its share of every batch.

torchrun puts a rank's number and their count into RANK and WORLD_SIZE. Without them there is one
rank, and every function here returns what it was given.

All ranks execute the same code. They divide what is long by sample number: trajectories, training,
sampling and features. The first rank alone takes locks, writes files and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.errors import HarnessError, RankLost

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=7)
"""How long ranks wait for what one of them does alone. A rank that ends is noticed at once."""
_patient: Any = None
"""The group of such waiting; None stands for the group of all."""
_alone = False
"""Whether the first rank works while the others wait for its answer."""


def count() -> int:
    """The number of ranks that work together now."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def number() -> int:
    """This rank's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank writes and prints."""
    return number() == 0


def started() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_number() -> int:
    """This rank's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the ranks that torchrun started work together; one process works as ever.

    Args:
        device: where gradients are; on a GPU NCCL reduces them.
    """
    if not started():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    global _patient
    with together():
        dist.init_process_group(backend)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # after an error it would wait for the other ranks


@contextmanager
def together() -> Iterator[None]:
    """Turns what a collective operation raises when a rank has ended into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RankLost(
            f"rank {number()} of {dist.get_world_size() if dist.is_initialized() else '?'}: "
            "another rank has ended; the same command resumes the run from its last checkpoint"
        ) from error


def add(tensors: Sequence[Tensor]) -> None:
    """Adds up tensors over all ranks in place, in one message for each type."""
    if count() == 1:
        return
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    for kind in kinds:
        same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        with together():
            dist.all_reduce(flat)
        for tensor, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))


def anywhere(*flags: bool) -> list[bool]:
    """For each flag whether it is set on any rank."""
    found = torch.tensor([float(flag) for flag in flags])
    add([found])
    return [bool(some) for some in found]


def told_by_first(compute: Callable[[], T]) -> T:
    """What the first rank computes, on every rank; it works as if it were alone.

    An error of ours that it raises is raised on every rank.
    """
    global _alone
    if count() == 1:
        return compute()
    answer: list[Any] = [None, None]
    if is_first():
        _alone = True
        try:
            answer[0] = compute()
        except HarnessError as error:
            answer[1] = error
        finally:
            _alone = False
    with together():
        dist.broadcast_object_list(answer, group=_patient)
    if answer[1] is not None:
        answer[1].told = not is_first()  # the first rank prints it
        raise answer[1]
    return answer[0]


def each(compute: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map(compute, items)`, for which the ranks take turns and tell each other the results.

    Results are tensors on the CPU, or containers of them.
    """
    if count() == 1:
        yield from map(compute, items)
        return
    rest = iter(items)
    while turn := list(islice(rest, count())):
        mine = compute(turn[number()]) if number() < len(turn) else None
        found: list[Any] = [None] * count()
        with together():
            dist.all_gather_object(found, mine, group=_patient)
        yield from found[: len(turn)]


def wait() -> None:
    """Returns once every rank is here."""
    if count() > 1:
        with together():
            dist.barrier(group=_patient)
