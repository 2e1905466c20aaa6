"""Weights to start from: an encoder in a file of tensors from elsewhere, and what of it fits ours.

A torch file may nest its tensors (`state_dict`, `model`, `encoder` and `target_encoder` of I-JEPA, `module.` of data
parallel training): names are joined with dots, and an encoder is found by its patch projection, whatever stands before
that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mefem_cli.backbones import vit
from mefem_cli.backbones._tensors import PATCH_PROJECTION, Tensors, preferred, read_tensors, shown, shown_name
from mefem_cli.backbones.vit import ViTEncoder
from mefem_cli.errors import NoInputError, OutputError
from mefem_cli.stores import product
from mefem_cli.stores.runs import ENCODER_FILES, Run

GIVEN = "--init "  # before a path in messages
POSITIONS, CLS = "pos_embed", "cls_token"
PREDICTOR = "objective.predictor."  # in a checkpoint of ours
SAME_POSITIONS = 2e-3  # half precision is this far off
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # timm's ViTs by their width


@dataclass(frozen=True)
class Fit:
    """Which tensors of a file's encoder were loaded into ours, by name, and which were not."""

    loaded: list[str]
    missing: list[str]  # in the file: left as initialised
    unexpected: list[str]  # in the file: not used
    misshapen: list[str]  # of another shape, which is said, or no numbers: left as initialised
    notes: list[str]  # on positions and CLS token


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    path: Path  # the file with the encoder
    sha256: str
    prefix: str  # what stands before the encoder's names in the file
    fit: Fit
    predictor: str  # where it comes from

    def lines(self) -> list[str]:
        """Return what a user should know, a line each."""
        fit = self.fit
        within = f" ({shown_name(self.prefix)}*)" if self.prefix else ""
        total = len(fit.loaded) + len(fit.missing) + len(fit.misshapen)
        kinds = {
            "tensors not in the file, as initialised": fit.missing,
            "tensors of another shape, as initialised": fit.misshapen,
            "tensors of the file that are not used": fit.unexpected,
        }
        return [
            f"starts from {self.path}{within}: {len(fit.loaded)} of {total} tensors of the encoder",
            *(f"{kind}: {len(names)} ({shown(names)})" for kind, names in kinds.items() if names),
            *fit.notes,
            self.predictor,
        ]


def start(objective: Any, path: Path) -> Start:
    """Start all encoders of an objective, and its predictor where a run has one that fits, from `path`.

    `path` is a run folder, or a safetensors or torch file. Raises NoInputError where there is nothing to read and
    OutputError where no block of it fits.
    """
    weights, num_heads = _locate(path)
    tensors = read_tensors(weights, GIVEN)
    prefix, found = find_encoder(tensors, weights)
    encoders = list(objective.encoders().values())
    if num_heads not in (None, encoders[0].num_heads):  # shapes do not tell
        raise OutputError(
            f"--init {path}: does not fit the options: its encoder has other heads; type --num-heads {num_heads}"
        )
    fit = [load_what_fits(encoder, found, weights) for encoder in encoders][0]
    predictor = "predictor: there is none"
    if hasattr(objective, "predictor"):
        predictor = _start_predictor(objective.predictor, tensors, weights)
    return Start(weights.absolute(), product.file_sha256(weights), prefix, fit, predictor)


def _locate(path: Path) -> tuple[Path, int | None]:
    """Return the file that holds the encoder, and its number of heads where a run of ours says it."""
    if not path.is_file() and not path.is_dir():
        raise NoInputError(f"--init {path}: no such file or run folder")
    folder = path if path.is_dir() else path.parent
    if (folder / "model.json").is_file() and (path.is_dir() or path.name in ENCODER_FILES.values()):
        try:
            encoder, _, weights = vit.load_encoder(path)
        except (KeyError, TypeError) as error:
            raise NoInputError(f"--init {folder / 'model.json'}: not the description of a mefem model") from error
        return weights, encoder.num_heads
    if not path.is_dir():
        return path, None
    if Run(path).checkpoint_path.is_file():  # not finished
        return Run(path).checkpoint_path, None
    raise NoInputError(f"--init {path}: no run folder (neither model.json nor last.ckpt in it); name a run or a file")


# Finding -------------------------------------------------------------------------------------------------------------


def find_encoder(tensors: Tensors, path: Path) -> tuple[str, Tensors]:
    """Return what stands before an encoder's names in a file, and its tensors by timm's names.

    Of several the averaged one (a target, teacher or EMA) is taken, else the one with the shortest name. Raises
    NoInputError where there is none.
    """
    prefixes = [name.removesuffix(PATCH_PROJECTION) for name in tensors if name.endswith(PATCH_PROJECTION)]
    if not prefixes:
        raise NoInputError(
            f"--init {path}: no encoder with timm's names in it (no {PATCH_PROJECTION}); it has "
            f"{len(tensors)} tensors ({shown(list(tensors))})"
        )
    prefix = preferred(prefixes)
    return prefix, {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


# Loading -------------------------------------------------------------------------------------------------------------


def load_what_fits(encoder: ViTEncoder, found: Tensors, path: Path) -> Fit:
    """Copy the tensors whose names and shapes fit into an encoder, in its own precision.

    Raises OutputError if no tensor of a block fits, NoInputError for numbers that are not finite.
    """
    ours: Tensors = {name: one for name, one in encoder.vit.state_dict().items() if name != POSITIONS}
    loaded = [name for name in ours if name in found and _fits(found[name], ours[name])]
    if not any(name.startswith("blocks.") for name in loaded):
        raise OutputError(f"--init {path}: does not fit the options: {_what_would_fit(found)}")
    for name in loaded:
        _copy(found[name], ours[name], name, path)
    unfit = [name for name in ours if name in found and name not in loaded]
    notes = _load_positions(encoder, found.get(POSITIONS), path)
    if CLS in ours and CLS not in found:
        notes = [*notes, "CLS token: not in the file (I-JEPA has none); it starts fresh"]
    return Fit(
        loaded=loaded,
        missing=[name for name in ours if name not in found],
        unexpected=[name for name in found if name not in ours and name != POSITIONS],
        misshapen=[f"{name} {list(found[name].shape)}, here {list(ours[name].shape)}" for name in unfit],
        notes=notes,
    )


def _fits(one: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether a tensor has our shape and numbers of its own that can be copied."""
    is_plain = one.is_floating_point() and one.layout == torch.strided and one.device.type == "cpu"
    return one.shape == ours.shape and is_plain


def _copy(one: torch.Tensor, ours: torch.Tensor, name: str, path: Path) -> None:
    values = one.float()
    if not values.isfinite().all():
        raise NoInputError(f"--init {path}: {name} holds numbers that are not finite; name another file")
    ours.copy_(values)


def _load_positions(encoder: ViTEncoder, positions: torch.Tensor | None, path: Path) -> list[str]:
    """Take over positions on the same grid, which stay fixed; say so where they are not what they would be anyway."""
    if positions is None:
        return []
    ours = encoder.vit.pos_embed.data  # [1, N, D]
    num_patches, patches = encoder.num_patches, ours[:, -encoder.num_patches :]
    extra = positions.shape[1] - num_patches if positions.ndim == 3 else -1
    if extra not in (0, 1) or not _fits(positions[:, extra:], patches):
        return ["positions: of another grid; they stay the fixed ones of this one"]
    if (positions[:, extra:].float() - patches).abs().max() < SAME_POSITIONS:
        return []
    _copy(positions[:, extra:], patches, POSITIONS, path)
    if extra and encoder.class_token:
        _copy(positions[:, :1], ours[:, :1], POSITIONS, path)
    return ["positions: those of the file, which are no sin-cos ones; they stay fixed"]


def _start_predictor(predictor: nn.Module, tensors: Tensors, weights: Path) -> str:
    """Load the predictor of the checkpoint that was given or lies beside the encoder, if all of it fits."""
    if not any(name.startswith(PREDICTOR) for name in tensors):
        checkpoint = Run(weights.parent).checkpoint_path
        if weights.name not in ENCODER_FILES.values() or not checkpoint.is_file():
            return "predictor: starts fresh"
        weights, tensors = checkpoint, read_tensors(checkpoint, GIVEN)
    found = {name.removeprefix(PREDICTOR): one for name, one in tensors.items() if name.startswith(PREDICTOR)}
    ours: Tensors = predictor.state_dict()
    if found.keys() != ours.keys() or not all(_fits(found[name], ours[name]) for name in ours):
        return f"predictor: starts fresh, as the one in {weights} is of another size"
    for name in ours:
        _copy(found[name], ours[name], PREDICTOR + name, weights)
    return f"predictor: from {weights}"


def _what_would_fit(found: Tensors) -> str:
    """Say what a file's encoder is and which options make such a one."""
    projection = found[PATCH_PROJECTION]
    blocks = [int(match[1]) for match in (re.match(r"blocks\.(\d{1,4})\.", name) for name in found) if match]
    if projection.ndim != 4 or not blocks:
        return f"its {PATCH_PROJECTION} is {list(projection.shape)} and it has {len(set(blocks))} blocks"
    width, patch, depth = projection.shape[0], projection.shape[-1], max(blocks) + 1
    options = f"--backbone vit_{SIZES[width]}_patch16_224" if width in SIZES else f"--embed-dim {width}"
    if width not in SIZES or depth != (24 if width == 1024 else 12):
        options += f" --depth {depth}"
    if patch != 16:
        options += f" --patch-size {patch}"
    return f"it has {depth} blocks of {width} features and patches of {patch} px; type {options}"
