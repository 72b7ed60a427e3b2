"""Sharded training: each rank holds a part of every network, its gradients and its moments (FSDP2).

A block's weights are gathered when it runs. Its gradients are averaged over the ranks and scattered
in the backward pass. Checkpoints hold whole tensors, so they move between sharded and plain runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from harness import ranks
from harness.errors import UsageError
from harness.methods.base import Method
from harness.methods.parts.adapters import LoRAOptions
from harness.networks.compiling import transformers

if TYPE_CHECKING:  # importing them takes half as long as importing torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def check_shard(cls: type[Method], config: Any) -> None:
    """Raises UsageError if a method cannot train sharded, or if there is one rank alone.

    Frozen weights under adapters belong to a student and to its average, so they have no parts.
    """
    if not dist.is_initialized():
        raise UsageError("--shard divides networks over ranks: start the run by torchrun")
    if isinstance(config, LoRAOptions) and config.lora_rank is not None:
        raise UsageError("--shard does not know adapters: leave it or lora_rank out")
    if not cls.shards(config):
        raise UsageError(
            "the number of its passes depends on a rank's samples, so all ranks cannot gather the "
            "weights together: leave --shard out"
        )


def shard(method: Method, teacher: nn.Module, device: torch.device) -> list[FSDPModule]:
    """Shards the transformers of a method and its teacher in place; heads of its own stay whole.

    Returns:
        The sharded transformers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    before = {
        name: dict(player.module.named_parameters()) for name, player in method.players.items()
    }
    sharded: list[FSDPModule] = []
    for network in transformers([*method.networks, teacher]):
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        # Its embeddings and its head stay gathered from a pass to `gathered_no_more`, since
        # `features` runs lazily.
        sharded.append(fully_shard(network, mesh=mesh, reshard_after_forward=False))
        register_fsdp_forward_method(network, "features")
    for name, player in method.players.items():
        after = dict(player.module.named_parameters())
        _replace(player.optimizer, {p: after[key] for key, p in before[name].items()})
    method.to(device)
    return sharded


def _replace(optimizer: torch.optim.Optimizer, new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives an optimizer other parameters, and parts of its state in the place of the whole."""
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    for old, now in new.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[now] = {key: placed(x, now) for key, x in state.items()}


def gathered_no_more(sharded: Iterable[FSDPModule]) -> None:
    """Frees gathered weights, so that a network's parameters are its own parts."""
    for network in sharded:
        network.reshard()


def is_part(value: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a rank's part of a sharded one."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(state: Any, everywhere: bool = True) -> Any:
    """A nested state with whole tensors on the CPU in the place of parts. All ranks call it.

    Args:
        everywhere: whether all ranks keep what is gathered, or the first one alone.
    """
    keep = everywhere or ranks.is_first()

    def gathered(value: Any) -> Any:
        if not is_part(value):
            return value
        found = value.full_tensor()  # one after the other, so that the device holds one
        return found.cpu() if keep else None

    return tree_map_only(Tensor, gathered, state)


def placed(value: Any, like: Any) -> Any:
    """A whole value as the part of it that `like` holds; other values, and plain ones, as is."""
    if is_part(like) and isinstance(value, Tensor) and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        with ranks.together():
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    if isinstance(like, dict) and isinstance(value, dict):
        return {key: placed(item, like.get(key)) for key, item in value.items()}
    return value


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scales gradients to a norm of at most `largest`; returns the norm before."""
    parts = [p for p in parameters if is_part(p)]
    if not parts:
        return float(nn.utils.clip_grad_norm_(parameters, largest))
    plain = [p for p in parameters if not is_part(p)]
    gradients = ([p.grad for p in some if p.grad is not None] for some in (parts, plain))
    norms = [whole(nn.utils.get_total_norm(some)) for some in gradients]
    norm = torch.stack([each.to(parts[0].device) for each in norms]).norm()
    for some in (parts, plain):
        nn.utils.clip_grads_with_norm_(some, largest, norm)
    return float(norm)
