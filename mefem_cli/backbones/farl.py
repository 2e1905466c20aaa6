"""farl:PATH, FaRL (Zheng et al. 2022): the visual tower of a CLIP, trained on faces and captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mefem_cli.backbones._frozen import Loaded, Preprocessing, hint, refuse_source
from mefem_cli.backbones._tensors import (
    Tensors,
    below,
    left_aside,
    name_of,
    prefixes,
    read_tensors,
    shown,
    weights_file,
)
from mefem_cli.backbones._tokens import CLS, POSITIONS, TokenEncoder, build_as
from mefem_cli.errors import NoInputError

SPEC = "farl:PATH"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORM_EPSILON = 1e-5
ANCHOR = "visual.class_embedding"  # every CLIP ViT has it
PROJECTION = "proj"

# CLIP's names, timm's names.
RENAMED = {
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
RESBLOCK = "transformer.resblocks."


@dataclass(frozen=True)
class Options:
    """A FaRL encoder."""

    projected: bool = False  # features in the space shared with captions (512), not the tower's own (768)


def recognises(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file has the visual tower of a CLIP ViT."""
    return bool(prefixes(tensors, ANCHOR))


def load(argument: str, encoder: str | None, options: Options) -> Loaded:
    """Load the visual tower of a FaRL checkpoint, or of OpenAI's CLIP with the same names.

    "cls" is ln_post(x[:, 0]), "patches" are ln_post of the other tokens; with `projected` all are multiplied by the
    tower's projection. What is not below `visual.` (the tower for captions, heads) is left aside.
    """
    refuse_source(SPEC, encoder)
    path = weights_file(Path(argument))
    tensors = read_tensors(path)
    anchors = prefixes(tensors, ANCHOR)
    if not anchors:
        raise NoInputError(
            f"{path}: no FaRL encoder (no {ANCHOR}); it has {len(tensors)} tensors "
            f"({shown(list(tensors))}){hint(path, tensors, 'farl')}"
        )
    prefix = min(anchors, key=len) + "visual."
    tower = below(tensors, prefix)
    projection = tower.pop(PROJECTION, None)
    network = build_as(
        renamed(tower),
        path,
        "farl",
        tensors,
        lambda name: prefix + clips_name(name),
        pre_norm=True,
        act_layer=QuickGELU,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPSILON),
    )
    if options.projected and (projection is None or projection.ndim != 2 or len(projection) != network.num_features):
        raise NoInputError(f"{path}: has no {prefix}{PROJECTION} that fits; leave --projected out")
    preprocessing = Preprocessing(network.patch_embed.img_size[0], CLIP_MEAN, CLIP_STD)
    chosen = projection.float() if options.projected and projection is not None else None
    frozen = TokenEncoder(network, preprocessing, chosen)
    ignored = left_aside((name for name in tensors if not name.startswith(prefix)), prefix)
    details = {"part": prefix, "projected": options.projected, "ignored": ignored}
    return Loaded(frozen, name_of("farl", path), path, details=details)


def renamed(tower: Tensors) -> Tensors:
    """Return a CLIP visual tower's tensors by timm's names; what is none of it keeps its name and shape."""
    found = {}
    for name, one in tower.items():
        if name == "class_embedding" and one.ndim == 1:
            found[CLS] = one[None, None]
        elif name == "positional_embedding" and one.ndim == 2:
            found[POSITIONS] = one[None]
        else:
            new = name.replace(RESBLOCK, "blocks.") if name.startswith(RESBLOCK) else name
            found[_OLD_NAMES.sub(lambda match: RENAMED[match[0]], new)] = one
    return found


def clips_name(name: str) -> str:
    """Return the name in a CLIP visual tower of what timm calls `name`.

    >>> clips_name("blocks.3.attn.qkv.bias"), clips_name("norm.weight"), clips_name("norm_pre.bias")
    ('transformer.resblocks.3.attn.in_proj_bias', 'ln_post.weight', 'ln_pre.bias')
    """
    if name in (CLS, POSITIONS):
        return "class_embedding" if name == CLS else "positional_embedding"
    beginning = RESBLOCK if name.startswith("blocks.") else ""
    rest = name.removeprefix("blocks.")
    for clips, timms in sorted(RENAMED.items(), key=lambda pair: -len(pair[1])):
        if f".{timms}" in f".{rest}":
            return beginning + f".{rest}".replace(f".{timms}", f".{clips}", 1)[1:]
    return beginning + rest


_OLD_NAMES = re.compile("|".join(re.escape(name) for name in RENAMED))


class QuickGELU(nn.Module):
    """CLIP's activation, x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return x * torch.sigmoid(1.702 * x)
