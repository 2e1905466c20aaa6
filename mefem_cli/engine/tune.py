"""What is settled before the first step: compiled or not, activations kept or computed again, faces at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mefem_cli.engine.device import Device

COMPILE_FROM_STEPS = 2000  # compiling takes about a minute; shorter runs do not win it back
BLOCKS = "blocks"  # the name of a transformer's stack of blocks in timm and in our predictor


def wants_compile(asked: str, device: Device, num_steps: int) -> bool:
    """Return whether to compile for `--compile auto|on|off` and the steps that are left.

    On a CPU `auto` is off: compiling takes minutes there and wins 3-5 % (ViT-S, one thread, fp32 and bf16).
    """
    return asked == "on" or (asked == "auto" and device.is_cuda and num_steps >= COMPILE_FROM_STEPS)


def compile_objective(objective: nn.Module, backend: str = "inductor") -> None:
    """Compile the forward and backward pass in place; parameters and their names stay as they are.

    Shapes never change, so one compilation serves the whole run.
    """
    objective.compile(dynamic=False, backend=backend)


def undo_compile(objective: nn.Module) -> None:
    """Go back to the eager forward pass."""
    objective._compiled_call_impl = None


def recompute_activations(objective: nn.Module) -> int:
    """Keep only the inputs of transformer blocks for the backward pass; return how many blocks that are.

    It costs a second forward pass through the blocks, about a third of the step; gradients are the same numbers.
    """
    num_blocks = 0
    for module in objective.modules():
        for block in getattr(module, BLOCKS, ()):
            if not any(parameter.requires_grad for parameter in block.parameters()):
                continue  # a target encoder keeps no activations
            # On the instance, so that neither the tree of modules nor the names of its parameters change.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            num_blocks += 1
    return num_blocks


def failed_to_compile(error: BaseException) -> bool:
    """Whether an error comes from torch.compile, such as a missing C compiler."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def blank_faces(num_faces: int, size: int, device: Device) -> torch.Tensor:
    """Return uint8 images [num_faces, 3, size, size] laid out in memory as the stream's are, for a trial."""
    return torch.zeros((num_faces, size, size, 3), dtype=torch.uint8, device=device.torch).permute(0, 3, 1, 2)
