"""franca:PATH, Franca (Venkataramanan et al. 2025): the teacher of a DINOv2-style ViT with SwiGLU and LayerScale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mefem_cli.backbones._frozen import Loaded, Preprocessing, refuse_source
from mefem_cli.backbones._tensors import (
    PATCH_PROJECTION,
    Tensors,
    below,
    left_aside,
    name_of,
    preferred,
    prefixes,
    read_tensors,
    weights_file,
)
from mefem_cli.backbones._tokens import TokenEncoder, build_as
from mefem_cli.backbones.vit import IMAGENET_MEAN, IMAGENET_STD

SPEC = "franca:PATH"
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")  # of layers wrapped in chunks: the second number counts all blocks
MASK_TOKEN = "mask_token"  # stands for hidden patches in training
HEADS = ("dino_head.", "ibot_head.", "head.")
RENAMED = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}  # Franca's names, timm's


def recognises(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file has blocks in chunks or the two layers of DINOv2's SwiGLU."""
    return any(name.endswith("mlp.w12.weight") or CHUNKED.search(name) for name in tensors)


def load(argument: str, encoder: str | None = None, options: Any = None) -> Loaded:
    """Load the teacher of a Franca checkpoint, or its encoder alone.

    "cls" and "patches" are as the last norm leaves them. Positions are the file's own, on its own grid: 16 x 16
    patches of 14 px for the published models.
    """
    refuse_source(SPEC, encoder)
    path = weights_file(Path(argument))
    tensors = read_tensors(path)
    prefix = preferred(prefixes(tensors, PATCH_PROJECTION) or [""])
    kept = {name: one for name, one in below(tensors, prefix).items() if not name.startswith((*HEADS, MASK_TOKEN))}
    found = renamed(kept)
    network = build_as(found, path, "franca", tensors, init_values=1e-5, **_swiglu(found))
    preprocessing = Preprocessing(network.patch_embed.img_size[0], IMAGENET_MEAN, IMAGENET_STD)
    frozen = TokenEncoder(network, preprocessing)
    ignored = left_aside((name for name in tensors if name.removeprefix(prefix) not in kept), prefix)
    details = {"part": prefix, "ignored": ignored}
    return Loaded(frozen, name_of("franca", path), path, details=details)


def renamed(found: Tensors) -> Tensors:
    """Return tensors by timm's names: blocks in one row, the layers of SwiGLU as those of an MLP."""
    result = {}
    for name, one in found.items():
        new = CHUNKED.sub(r"blocks.\1.", name) if name.startswith("blocks.") else name
        for old, timms in RENAMED.items():
            new = new.replace(old, timms)
        result[new] = one
    return result


def _swiglu(found: Tensors) -> dict[str, Any]:
    """Return what makes the MLPs of a ViT gated, if its second layer takes half of what its first gives.

    SwiGLU (Shazeer 2020): (silu(x W1) * x W2) W3 with W1 and W2 packed in one layer, W1 first.
    """
    from timm.layers import SwiGLUPacked

    first, second = (found.get(f"blocks.0.mlp.fc{index}.weight") for index in (1, 2))
    is_gated = first is not None and second is not None and first.shape[:1] == (2 * second.shape[-1],)
    return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if is_gated else {}
