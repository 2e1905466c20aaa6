"""Encoders that features are taken from: what each offers, and `load`, which reads what is typed after --model.

A choice is a file in this room. `--model farl:PATH` is answered by `farl.load("PATH", encoder, options)`, where
`options` is an instance of that file's `Options`, if it has any; its constant `SPEC` says how it is typed, and
`farl.recognises(tensors)` whether tensors of a file look like its own. What is typed without such a prefix is `vit`: a
run of ours or one of its .safetensors files. Encoders are in evaluation mode, in float32, and want no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mefem_cli import parts
from mefem_cli.errors import UsageError, did_you_mean

ROOM, OURS = "backbones", "vit"
NO_ALIGNMENT, ARCFACE = "none", "arcface"
PREFIX = re.compile(r"([a-z_]{2,}):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Preprocessing:
    """How a crop becomes an encoder's input, as its authors feed it; a feature store records it (`asdict`)."""

    image_size: int  # side of the input, px
    mean: tuple[float, ...]  # of red, green and blue, of values between 0 and 1
    std: tuple[float, ...]
    interpolation: str = "bicubic"  # or "bilinear": how crops of another size are resampled
    alignment: str = NO_ALIGNMENT  # or "arcface": by five points; see `_alignment.py`


class FrozenEncoder(nn.Module):
    """An encoder that gives features of images; normalising them is its own affair."""

    preprocessing: Preprocessing
    embed_dim: int  # D
    num_patches: int  # T, row-major; 0: no patches
    class_token: bool  # whether there is "cls", one vector for the whole image
    has_mean: bool  # whether there is "mean", the mean of the patches

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return float32 features of uint8 images [B, 3, S, S]: "cls" and "mean" [B, D], "patches" [B, T, D].

        What the encoder does not have is not there.
        """
        raise NotImplementedError


@dataclass
class Loaded:
    """An encoder and what tells it from others."""

    encoder: FrozenEncoder
    name: str  # for people: the run's folder, "farl:FaRL-Base-Patch16-LAIONFace20M-ep16"
    weights: Path | None  # the file whose sha256 identifies it; None: there is none, `details` says why
    spec: str = ""  # as typed after --model
    options: dict[str, Any] = field(default_factory=dict)  # of the choice, as given or by default
    description: dict[str, Any] = field(default_factory=dict)  # model.json of a run of ours, else empty
    details: dict[str, Any] = field(default_factory=dict)  # JSON: what of the file was taken, and with which options

    @property
    def origin(self) -> dict[str, Any]:
        """What to load to get the same encoder again from anywhere on this machine: spec and options, as JSON."""
        return {"spec": absolute(self.spec), "options": self.options}


def split(spec: str) -> tuple[str, str]:
    """Return the choice that a --model names and what stands behind its colon.

    >>> split("runs/latest"), split("./odd:name")
    (('vit', 'runs/latest'), ('vit', './odd:name'))
    """
    match = PREFIX.fullmatch(spec)
    if match is None:
        return OURS, spec
    known = [name for name in parts.names(ROOM) if name != OURS]
    if match[1] not in known:
        if Path(spec).exists():
            return OURS, spec
        raise UsageError(f'--model {spec}: there is no encoder "{match[1]}:"{did_you_mean(match[1], known)}')
    if not match[2]:
        raise UsageError(f"--model {spec} names no file; type --model {_spec(match[1])}")
    return match[1], match[2]


def absolute(spec: str) -> str:
    """Return what is typed after --model with its path made absolute and links followed; other specs as they are.

    >>> absolute("timm:vit_small_patch16_224@random")
    'timm:vit_small_patch16_224@random'
    """
    name, argument = split(spec)
    before, at, path = argument.rpartition("@") if name == "timm" else ("", "", argument)
    if not path or not Path(path).exists():
        return spec
    return ("" if name == OURS else f"{name}:") + before + at + str(Path(path).resolve())


def load(spec: str, encoder: str | None = None, given: parts.Given | None = None) -> Loaded:
    """Load the encoder that is typed after --model, onto the CPU.

    `encoder` is "target" (also None) or "source", where a file holds both; `given` holds the options of the choice.
    Raises NoInputError for a file that is missing, damaged or of another family, UsageError for what does not exist.
    """
    name, argument = split(spec)
    module = parts.load(ROOM, name)
    options = None
    if name != OURS and parts.read_fields(f"{ROOM}.{name}"):
        options = (given or parts.Given({})).build(f"{ROOM}.{name}")
    loaded: Loaded = module.load(argument, encoder, options)
    loaded.spec, loaded.options = spec, dict(vars(options)) if options is not None else {}
    loaded.encoder.eval().requires_grad_(False)
    return loaded


def refuse_source(spec: str, encoder: str | None) -> None:
    """Raise UsageError if the source encoder is asked for of a choice that has one encoder."""
    if encoder == "source":
        raise UsageError(f"--encoder source: {spec} has one encoder only; leave --encoder out")


def hint(path: Path, tensors: Mapping[str, torch.Tensor], choice: str = "") -> str:
    """Return `; it looks like a file of ...` and what to type where tensors look like those of another choice.

    `tensors` go by the names in the file. The first choice that recognises them counts: "" if that is `choice`.
    """
    for name in parts.names(ROOM):
        recognises = getattr(parts.load(ROOM, name), "recognises", None)
        if recognises is not None and recognises(tensors):
            if name == choice:
                return ""
            return f"; it looks like a file of {name}: type --model {_spec(name).replace('PATH', str(path))}"
    return ""


def _spec(name: str) -> str:
    """Return how a choice is typed, `farl:PATH`."""
    return str(parts.read_constant(f"{ROOM}.{name}", "SPEC"))
