"""Training state in shares: of each weight, gradient and optimizer number every process holds its part, for models that one card does
not hold (Zhao 2023, arXiv 2304.11277, as torch's fully_shard).

accelerate's own config asks for it (`accelerate launch --use_fsdp --fsdp_version 2`). A forward or backward gathers one block at a time.
What is written is always whole: a run in shares leaves the files of any other, and goes on from them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sdclr.engine import processes
from sdclr.errors import InputError

REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "weights stay where they are trained; set fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "set model.gradient_checkpointing: true in the run's config instead",
}
"""Settings of accelerate's that would ask for something else, as it puts them into the environment, and what to do about them."""


def asked() -> bool:
    """Whether the launcher wants shares, and there is someone to share with."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and processes.count() > 1


def refuse_other_ways(optimizer: str, precision: str) -> None:
    """Raise InputError for what cannot be trained in shares, and for what accelerate's config may ask of FSDP and is not done here."""
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise InputError("accelerate is set up for FSDP 1, and sdclr shards with FSDP 2", hint="set fsdp_version: 2")
    for name, instead in REFUSED.items():
        if parse_flag_from_env(name):
            raise InputError(f"accelerate is set up with {name.lower()}, which sdclr does not do", hint=instead)
    if optimizer == "adafactor":  # torch's has in-place norms over rows that lie in several processes
        raise InputError("adafactor cannot be trained in shares (FSDP)", hint="set optimizer.name: adamw or sgd")
    if precision == "fp16":  # each process would find a loss scale of its own
        raise InputError("fp16 cannot be trained in shares (FSDP)", hint="set model.precision: bf16 or fp32")


def shard(module: torch.nn.Module, device: torch.device) -> None:
    """Leave each process its share of a module's parameters, in place; they are gathered by the blocks its library keeps whole."""
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (processes.count(),))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    kinds: Any = module._no_split_modules or ()
    for part in reversed(list(module.modules())):  # what lies inside comes first
        if part is module or type(part).__name__ in kinds:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)


def is_sharded(module: torch.nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with every process's share of it; all must ask. What is not in shares is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor that all of them have, where `like` is in shares."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's weights, whole. Of one in shares all processes must ask; the main one gets them on the CPU, the others nothing."""
    weights = module.state_dict()
    return _gathered(weights) if is_sharded(module) else weights


def _gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor after another, so that no card has to hold them all."""
    main, found = torch.distributed.get_rank() == 0, {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if main:
            found[name] = gathered.cpu()
    return found


def load_weights(module: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    """Put weights, whole or in shares, into a module."""
    own = module.state_dict()
    module.load_state_dict({key: share_of(value, own[key]) if key in own else value for key, value in weights.items()})
