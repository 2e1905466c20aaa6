"""ijepa:PATH, I-JEPA (Assran et al. 2023): an original checkpoint, or a file or folder of Hugging Face's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mefem_cli.backbones._frozen import Loaded, Preprocessing, hint, refuse_source
from mefem_cli.backbones._tensors import (
    PATCH_PROJECTION,
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
from mefem_cli.backbones.vit import IMAGENET_MEAN, IMAGENET_STD
from mefem_cli.errors import NoInputError, UsageError

SPEC = "ijepa:PATH"
PARTS = {"target": "target_encoder.", "source": "encoder."}  # --encoder -> what names begin with in the file
NORM_EPSILON = 1e-6
HF_PROJECTION = "embeddings.patch_embeddings.projection.weight"
HF_QUERY = "attention.attention.query."
HF_HEADS = ("classifier.", "pooler.", "embeddings.mask_token")

# Hugging Face's names, timm's names.
RENAMED = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.position_embeddings": POSITIONS,
    "encoder.layer.": "blocks.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layernorm.": "norm.",
}
_HF_NAMES = re.compile("|".join(re.escape(name) for name in RENAMED))  # the first that fits, so longer ones first


def recognises(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file has I-JEPA's two encoders, or a ViT without a CLS token."""
    layouts = [*prefixes(tensors, PATCH_PROJECTION), *prefixes(tensors, HF_PROJECTION)]
    has_cls = any(name.endswith((CLS, "class_embedding")) for name in tensors)
    return bool(layouts) and not has_cls and any(POSITIONS in name or "position_embed" in name for name in tensors)


def load(argument: str, encoder: str | None = None, options: Any = None) -> Loaded:
    """Load the target encoder (or the other one, `--encoder source`) of an I-JEPA checkpoint.

    It has no CLS token: there are "patches", as the last norm leaves them, and their mean.
    """
    path = weights_file(Path(argument))
    tensors = read_tensors(path)
    if prefixes(tensors, HF_PROJECTION):
        refuse_source("a file of Hugging Face's layout", encoder)
        prefix, found, settings = _from_hugging_face(tensors, path)
    else:
        prefix, found, settings = *_from_original(tensors, path, encoder), {}
    epsilon = settings.pop("eps", NORM_EPSILON)
    network = build_as(found, path, "ijepa", tensors, norm_layer=partial(nn.LayerNorm, eps=epsilon), **settings)
    preprocessing = Preprocessing(network.patch_embed.img_size[0], IMAGENET_MEAN, IMAGENET_STD)
    frozen = TokenEncoder(network, preprocessing)
    ignored = left_aside((one for one in tensors if not one.startswith(prefix) or _is_head(one, prefix)), prefix)
    name = name_of("ijepa", path) + (":source" if encoder == "source" else "")
    return Loaded(frozen, name, path, details={"part": prefix or "encoder", "ignored": ignored})


def _from_original(tensors: Tensors, path: Path, encoder: str | None) -> tuple[str, Tensors]:
    """Return what stands before an encoder's names in a checkpoint of the original code, and its tensors."""
    there = prefixes(tensors, PATCH_PROJECTION)
    wanted = PARTS[encoder or "target"]
    chosen = [prefix for prefix in there if prefix.startswith(wanted)]
    if not chosen and not any(prefix.startswith(part) for prefix in there for part in PARTS.values()):
        chosen = there if encoder != "source" else []  # an encoder saved alone
    if len(chosen) == 1:
        found = below(tensors, chosen[0])
        if CLS in found:
            raise NoInputError(f"{path}: has a {CLS}, which I-JEPA has not{hint(path, tensors, 'ijepa')}")
        return chosen[0], found
    if not there:
        raise NoInputError(
            f"{path}: no I-JEPA encoder (no {PATCH_PROJECTION}); it has {len(tensors)} tensors "
            f"({shown(list(tensors))}){hint(path, tensors, 'ijepa')}"
        )
    others = [name for name, part in PARTS.items() if any(prefix.startswith(part) for prefix in there)]
    advice = f"type --encoder {others[0]}" if others else "leave --encoder out"
    raise UsageError(f"{path}: has no {wanted[:-1]}, only {shown([one or 'one encoder' for one in there])}; {advice}")


def _from_hugging_face(tensors: Tensors, path: Path) -> tuple[str, Tensors, dict[str, Any]]:
    """Return what stands before the names, the tensors by timm's names, and what config.json beside the file says."""
    prefix = min(prefixes(tensors, HF_PROJECTION), key=len)
    theirs = {name: one for name, one in below(tensors, prefix).items() if not _is_head(name, "")}
    found: Tensors = {}
    packed: set[str] = set()
    for name in theirs:
        if name.partition(HF_QUERY)[1]:
            names = [name.replace(".query.", part) for part in (".query.", ".key.", ".value.")]
            three = [theirs[one] for one in names if one in theirs]
            if len({one.shape for one in three}) == 1 and len(three) == 3:  # else they show as missing and unexpected
                found[_timms_name(name.replace(HF_QUERY, "attn.qkv."))] = torch.cat([one.float() for one in three])
                packed.update(names)
    found |= {_timms_name(name): one for name, one in theirs.items() if name not in packed}
    return prefix, found, _settings(path.parent / "config.json")


def _timms_name(name: str) -> str:
    return _HF_NAMES.sub(lambda match: RENAMED[match[0]], name)


def _is_head(name: str, prefix: str) -> bool:
    return name.removeprefix(prefix).startswith(HF_HEADS)


def _settings(config: Path) -> dict[str, Any]:
    """Return the heads and the epsilon of the norms, which tensors do not tell, from a Hugging Face config.json."""
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        settings = {"num_heads": int(content["num_attention_heads"]), "eps": float(content["layer_norm_eps"])}
        if settings["num_heads"] < 1:
            raise ValueError("no heads")
        return settings
    except (ValueError, KeyError, TypeError) as error:
        raise NoInputError(f"{config}: not the config.json of an I-JEPA model; get it again or remove it") from error
