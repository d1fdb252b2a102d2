"""Training state in shares: of each weight, gradient and optimizer number every process holds its part, for models that one card does
not hold (Zhao 2023, arXiv 2304.11277, as torch's fully_shard).

accelerate's own config asks for it (`accelerate launch --use_fsdp --fsdp_version 2`). A forward or backward gathers one block at a time.
What is written is always whole: a run in shares leaves the files of any other, and goes on from them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sdclr.config.schema import RunConfig
from sdclr.engine import processes
from sdclr.errors import InputError
from sdclr.model import adapters

REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "weights stay where they are trained; set fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "set model.gradient_checkpointing: true in the run's config instead",
    "FSDP_IGNORED_MODULES": "every trained weight is shared out; leave fsdp_ignored_modules out",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "all processes share one model; leave parallelism_config out",
    "ACCELERATE_DYNAMO_BACKEND": "nothing is compiled in shares; set dynamo_backend: no",
}
"""Settings of accelerate's that would ask for something else, as it puts them into the environment, and what to do about them."""
NOT_SET = ("", "0", "n", "no", "f", "false", "off", "none")
"""Words of a launcher that say no."""


def asked() -> bool:
    """Whether the launcher wants shares, and there is someone to share with."""
    return _set("ACCELERATE_USE_FSDP") and processes.count() > 1


def refuse_other_ways(config: RunConfig, precision: str) -> None:
    """Raise InputError for what cannot be trained in shares (in the forward's `precision`), and for what accelerate's config may ask of
    FSDP and is not done here."""
    optimizer = config.optimizer.name
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise InputError("accelerate is set up for FSDP 1, and sdclr shards with FSDP 2", hint="set fsdp_version: 2")
    for name, instead in REFUSED.items():
        if _set(name):
            raise InputError(f"accelerate is set up with {name.lower()}, which sdclr does not do", hint=instead)
    if config.lora.rank:  # frozen weights in bf16 and trained ones in fp32 do not go into one block
        raise InputError("a LoRA cannot be trained in shares (FSDP)", hint="start it without --use_fsdp")
    if optimizer in ("adafactor", "adamw8bit"):  # norms over rows, and scales of blocks, that lie in several processes
        raise InputError(f"{optimizer} cannot be trained in shares (FSDP)", hint="set optimizer.name: adamw or sgd")
    if config.model.precision == "full_bf16":  # what is rounded up would depend on how many share it out
        raise InputError("full_bf16 cannot be trained in shares (FSDP)", hint="set model.precision: bf16 or fp32")
    if precision == "fp16":  # each process would find a loss scale of its own
        raise InputError("fp16 cannot be trained in shares (FSDP)", hint="set model.precision: bf16 or fp32")
    if config.sample.at_troughs:  # one process draws, and has a part of the weights
        raise InputError("sample.at_troughs cannot be done in shares (FSDP)", hint="set sample.at_troughs: false")
    if (
        config.data.aspect == "buckets"
    ):  # a step has as many forwards as its pictures have shapes, and all must gather as often
        raise InputError("pictures of many shapes cannot be trained in shares (FSDP)", hint="set data.aspect: square")


def let_every_process_load() -> None:
    """Before a model is read: accelerate's launcher asks transformers by default to read it in one process alone, and older ones then
    leave whatever lies in memory in the others. Also says to accelerate which FSDP is meant, where nobody else has."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    os.environ.setdefault("FSDP_VERSION", "2")


def shard(module: torch.nn.Module, device: torch.device, precision: str) -> None:
    """Leave each process its share of a module's parameters, in place; they are gathered by the blocks its library keeps whole.

    With `precision` bf16 they are gathered as bf16, and gradients summed in fp32: what autocast casts is kept for the backward, whole.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (processes.count(),))
    reshard = _set("FSDP_RESHARD_AFTER_FORWARD", "true")
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()
    kinds: Any = module._no_split_modules or ()
    for part in reversed(list(module.modules())):  # what lies inside comes first
        if part is module or type(part).__name__ in kinds:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)


def is_sharded(module: torch.nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with every process's share of it; all must ask. What is not in shares is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor, where `like` is in shares; all must ask."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def weights_of(module: torch.nn.Module, wanted: bool) -> dict[str, torch.Tensor]:
    """What is trained of a module, whole, for the process that wants it. Weights in shares are gathered on the CPU, and all must ask."""
    if is_sharded(module):
        return copy_of(module, wanted)
    return adapters.weights_of(module) if wanted else {}


def copy_of(module: torch.nn.Module, wanted: bool) -> dict[str, torch.Tensor]:
    """As `weights_of`, copied to the CPU: what training does next does not change it. One by one, so that no card holds all of them."""
    found = {}
    for name, tensor in adapters.weights_of(module).items():
        tensor = whole(tensor.detach())
        if wanted:
            found[name] = tensor.to("cpu", copy=True)
    return found


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put whole weights into a module; all processes of one in shares must."""
    own = adapters.weights_of(module)
    adapters.put(module, {key: share_of(value, own[key]) if key in own else value for key, value in weights.items()})


def _set(name: str, otherwise: str = "") -> bool:
    return os.environ.get(name, otherwise).lower() not in NOT_SET
