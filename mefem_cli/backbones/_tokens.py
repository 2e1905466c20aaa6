"""Encoders made of timm's VisionTransformer: features of its tokens, and one as large as the tensors of a file say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mefem_cli.backbones._attention import speed_up_attention
from mefem_cli.backbones._frozen import FrozenEncoder, Preprocessing
from mefem_cli.backbones._tensors import PATCH_PROJECTION, Tensors, load_exactly
from mefem_cli.errors import NoInputError

POSITIONS, CLS = "pos_embed", "cls_token"
HEAD_SIZE = 64  # features of an attention head; shapes do not tell, and these widths have other heads:
NUM_HEADS = {1280: 16, 1408: 16, 1664: 16}  # ViT-H, and g and G of "Scaling Vision Transformers"
# Blocks by width, as published, so that a file that lacks whole blocks is not taken for a smaller network.
DEPTHS = {192: 12, 384: 12, 768: 12, 1024: 24, 1280: 32, 1408: 40, 1536: 40, 1664: 48}
BLOCK = re.compile(r"blocks\.(\d{1,3})\.")


class TokenEncoder(FrozenEncoder):
    """Features of the tokens that a network's `forward_features` returns: [B, prefix tokens + T, D].

    "cls" is the CLS token or else what an attention pool makes of the tokens, where there is one; other prefix tokens,
    such as registers, are left out. All are as the network's last norm leaves them; `projection` [D, P], if any, is
    applied to every token after it.
    """

    has_mean = True

    def __init__(self, network: Any, preprocessing: Preprocessing, projection: torch.Tensor | None = None):
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.pooled = getattr(network, "attn_pool", None) is not None  # SigLIP's: it stands for a CLS token
        self.has_cls_token = getattr(network, "cls_token", None) is not None
        self.class_token = self.has_cls_token or self.pooled
        self.num_prefix_tokens = int(network.num_prefix_tokens)
        self.embed_dim = int(network.num_features if projection is None else projection.shape[1])
        self.num_patches = int(network.patch_embed.num_patches)
        self.register_buffer("projection", projection)
        self.projection: torch.Tensor | None
        self.normalise = Normalise(preprocessing)
        speed_up_attention(network.blocks)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "cls" [B, D] (where there is a CLS token), "mean" [B, D] and "patches" [B, T, D] of uint8 images."""
        tokens = self.network.forward_features(self.normalise(images))
        if self.projection is not None:
            tokens = tokens @ self.projection.to(tokens.dtype)
        patches = tokens[:, self.num_prefix_tokens :].float()
        features = {"mean": patches.mean(1), "patches": patches}
        if self.has_cls_token:
            features["cls"] = tokens[:, 0].float()
        elif self.pooled:
            features["cls"] = self.network.forward_head(tokens, pre_logits=True).float()
        return features


class Normalise(nn.Module):
    """uint8 [B, 3, S, S] -> float32: values between 0 and 1, less the mean, divided by the standard deviation."""

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise a batch."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def build_as(
    found: Tensors, path: Path, choice: str, whole: Tensors, named: Callable[[str], str] = str, **settings: Any
) -> Any:
    """Return a timm VisionTransformer whose sizes are those of tensors with timm's names, and with these tensors.

    `whole` is all that the file holds, by its own names; `named` gives a name of `found` as the file has
    it. `settings` are further arguments of VisionTransformer; `num_heads` is by the width unless it is among them. The
    image size follows from the positions. Raises NoInputError where tensors are missing, left over or do not fit.
    """
    from timm.models.vision_transformer import VisionTransformer

    sizes = _sizes(found)
    if sizes is None:  # whatever is wrong is told by comparing with a usual one
        sizes = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "class_token": True}
    sizes = {**sizes, **settings}
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise NoInputError(
            f"{path}: {sizes['embed_dim']} features a token cannot be split into {sizes['num_heads']} heads"
        )
    network = on_meta(lambda: VisionTransformer(**sizes, num_classes=0, global_pool=""))
    described = f"a {choice} encoder of {sizes['depth']} blocks of {sizes['embed_dim']} features"
    load_exactly(network, found, path, choice, described, whole, named)
    return network


def on_meta(build: Callable[[], Any]) -> Any:
    """Return a network whose tensors take no memory and no time until a file's take their place."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):  # older versions of timm compute numbers while they build
        return build()


def _sizes(found: Tensors) -> dict[str, Any] | None:
    """Return the sizes of a ViT from its tensors' shapes, None where they are not those of one."""
    names = (PATCH_PROJECTION, POSITIONS, "blocks.0.mlp.fc1.weight")
    if any(name not in found for name in names):
        return None
    projection, positions, hidden = (found[name].shape for name in names)
    if len(projection) != 4 or len(positions) != 3 or len(hidden) != 2 or not all(projection):
        return None
    width, patch = projection[0], projection[-1]
    num_prefix_tokens = int(CLS in found)
    grid = math.isqrt(max(positions[1] - num_prefix_tokens, 1))
    num_blocks = 1 + max((int(match[1]) for match in map(BLOCK.match, found) if match), default=0)
    return {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": DEPTHS.get(width, num_blocks),
        "num_heads": num_heads(width),
        "mlp_ratio": (hidden[0] + 0.5) / width,  # VisionTransformer rounds the product down
        "qkv_bias": "blocks.0.attn.qkv.bias" in found,
        "class_token": bool(num_prefix_tokens),
    }


def num_heads(width: int) -> int:
    """Return how many attention heads a ViT of a width has, as its authors and timm have it.

    >>> num_heads(384), num_heads(1024), num_heads(1280)
    (6, 16, 16)
    """
    return NUM_HEADS.get(width, max(1, width // HEAD_SIZE))
