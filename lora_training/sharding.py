"""FSDP: every process keeps a part of every network's weights and asks the others for the rest, block by block.

Launched with an accelerate configuration of `distributed_type: FSDP`. It is torch's `fully_shard` on the blocks of the UNet;
weights are saved whole, so that files and checkpoints are those of any other run.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


def shard_mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The processes that share the weights; None if the launch did not ask for FSDP, or there is one process.

    Raises:
        ValueError: FSDP's first version was asked for, or a CPU whose torch has no FSDP for it (2.6 has none).
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("Only FSDP's second version is supported: set fsdp_version: 2 in accelerate's configuration.")
    if accelerator.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):  # which FSDP calls
        raise ValueError(
            f"torch {torch.__version__} has no FSDP on a CPU. Take a newer torch, a GPU, or "
            "examples/accelerate/two_processes_cpu.yaml, where every process has all weights."
        )
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard(network: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Split the network's weights between the processes, in place; its parameters are new ones afterwards."""
    for module in list(network.modules()):
        if isinstance(module, _BLOCKS):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all processes; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, on the device of `like` and split as it is."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
