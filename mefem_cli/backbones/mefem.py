"""mefem:PATH, the published MeFEm encoders: a timm ViT's tensors, perhaps wrapped and in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mefem_cli.backbones._frozen import Loaded, Preprocessing, hint, refuse_source
from mefem_cli.backbones._tensors import (
    PATCH_PROJECTION,
    below,
    left_aside,
    name_of,
    preferred,
    prefixes,
    read_tensors,
    weights_file,
)
from mefem_cli.backbones._tokens import CLS, TokenEncoder, build_as
from mefem_cli.backbones.vit import IMAGENET_MEAN, IMAGENET_STD
from mefem_cli.errors import NoInputError

SPEC = "mefem:PATH"
JEPA_ENCODERS = ("target_encoder.", "encoder.")  # in I-JEPA's own checkpoints
HEADS = ("head.", "fc_norm.")  # of a classifier; not the encoder's


def recognises(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file has a plain ViT with timm's names and a CLS token."""
    found = [name for name in tensors if name.endswith("blocks.0.mlp.fc1.weight")]
    scaled = any(name.endswith("blocks.0.ls1.gamma") for name in tensors)
    return bool(found) and not scaled and bool(prefixes(tensors, CLS)) and bool(prefixes(tensors, PATCH_PROJECTION))


def load(argument: str, encoder: str | None = None, options: Any = None) -> Loaded:
    """Load `MeFEm-S.pth.tar` or `MeFEm-B.pth.tar`, or what else has a plain timm ViT's names."""
    refuse_source(SPEC, encoder)
    path = weights_file(Path(argument))
    tensors = read_tensors(path)
    prefix = preferred(prefixes(tensors, PATCH_PROJECTION) or [""])
    if prefix.startswith(JEPA_ENCODERS):
        raise NoInputError(f"{path}: has the encoders of I-JEPA{hint(path, tensors, 'mefem')}")
    found = {name: one for name, one in below(tensors, prefix).items() if not name.startswith(HEADS)}
    network = build_as(found, path, "mefem", tensors)
    preprocessing = Preprocessing(network.patch_embed.img_size[0], IMAGENET_MEAN, IMAGENET_STD)
    frozen = TokenEncoder(network, preprocessing)
    ignored = left_aside((name for name in tensors if name.removeprefix(prefix) not in found), prefix)
    return Loaded(frozen, name_of("mefem", path), path, details={"part": prefix, "ignored": ignored})
