"""Is the encoder alive? Measures on faces that are never trained on; a JEPA loss alone does not tell.

A collapsed encoder has a tiny loss: its features vary little over faces (`feature_std`), along few directions
(`rankme`), and its predictor is no better than one that knows only the position (`loss_over_position` near 1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from mefem_cli.engine import seeds
from mefem_cli.engine.device import Device
from mefem_cli.engine.stream import ImageStream

RANKME_EPSILON = 1e-7
MIN_FACES = 8  # fewer monitor faces say nothing
MAX_SHARE = 0.05  # of the faces are set aside
MONITOR_BATCH = 64


def split_monitor_faces(
    num_faces: int, subjects: np.ndarray | None, wanted: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Set aside whole subjects for monitoring; return (training rows, monitor rows), both sorted.

    At most `wanted` and at most 5 % of the faces; none if that leaves fewer than 8. A face without a subject ("", NaN,
    or `subjects` is None) is its own; subjects with more faces than are left to set aside are passed over.
    """
    quota = min(wanted, int(num_faces * MAX_SHARE))
    groups = _as_groups(num_faces, subjects)
    chosen = np.zeros(num_faces, dtype=bool)
    if quota >= MIN_FACES:
        sizes = np.bincount(groups)
        order = seeds.numpy_generator(seed, seeds.MONITOR).permutation(len(sizes))
        left, taken = quota, []
        for group in order:
            if sizes[group] <= left:
                taken.append(group)
                left -= sizes[group]
            if not left:
                break
        chosen = np.isin(groups, taken)
    if chosen.sum() < MIN_FACES:
        chosen[:] = False
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _as_groups(num_faces: int, subjects: np.ndarray | None) -> np.ndarray:
    """Return the number of each face's group, int64 [num_faces]; faces without a subject share theirs with nobody."""
    if subjects is None:
        return np.arange(num_faces)
    names = np.array([str(subject) for subject in subjects])
    groups = np.unique(names, return_inverse=True)[1]
    alone = np.isin(names, ("", "nan", "None"))
    groups[alone] = groups.max() + 1 + np.arange(alone.sum())
    return np.unique(groups, return_inverse=True)[1]


def feature_std(features: torch.Tensor) -> float:
    """Return the standard deviation over faces, averaged over features, of [n, D] features."""
    return features.std(dim=0).mean().item()


def rankme(features: torch.Tensor, centred: bool = False) -> float:
    """Return the effective rank of [n, D] features: exp of the entropy of their normalised singular values.

    RankMe (Garrido et al. 2023, eq. 3): p_k = sigma_k / sum sigma + epsilon. `centred` removes the mean face first,
    which otherwise counts as one large direction.
    """
    matrix = features.double()
    if centred:
        matrix = matrix - matrix.mean(dim=0)
    singular_values = torch.linalg.svdvals(matrix)
    share = singular_values / singular_values.sum().clamp(min=torch.finfo(torch.float64).tiny) + RANKME_EPSILON
    return torch.exp(-(share * share.log()).sum()).item()


@torch.no_grad()
def health(
    objective: Any, stream: ImageStream, monitor: np.ndarray, reference: np.ndarray, device: Device, seed: int
) -> Iterator[tuple[str, float]]:
    """Yield (name, value) measured on the monitor faces; masks are the same ones at every call.

    `reference` are training faces whose mean target per position is what the blind predictors predict.
    """
    objective.eval()
    encoder = next(iter(objective.encoders().values()))
    features: dict[str, list[torch.Tensor]] = defaultdict(list)
    for batch in stream.batches(_in_batches(monitor), device.torch):
        with device.autocast():
            for kind, values in encoder.features(batch.images).items():
                if kind in ("cls", "mean"):
                    features[kind].append(values.float().cpu())
    for kind, suffix in (("mean", ""), ("cls", "_cls")):
        if kind in features:
            stacked = torch.cat(features[kind])
            yield f"feature_std{suffix}", feature_std(stacked)
            yield f"rankme{suffix}", rankme(stacked)
            yield f"rankme_centred{suffix}", rankme(stacked, centred=True)
    if hasattr(objective, "baselines"):
        yield from _loss_ratios(objective, stream, monitor, reference, device, seed)
    objective.train()


def _loss_ratios(
    objective: Any, stream: ImageStream, monitor: np.ndarray, reference: np.ndarray, device: Device, seed: int
) -> Iterator[tuple[str, float]]:
    total: torch.Tensor | float = 0.0
    for batch in stream.batches(_in_batches(reference), device.torch):
        with device.autocast():
            total = total + objective.token_targets(batch.images).double().sum(0)
    mean_target = (total / len(reference)).float()  # type: ignore[union-attr]
    sums: dict[str, float] = defaultdict(float)
    for number, batch in enumerate(stream.batches(_in_batches(monitor), device.torch)):
        draws = to_device(objective.draw(len(batch.index), seeds.torch_generator(seed, seeds.MONITOR, number)), device)
        with device.autocast():
            for name, loss in objective.baselines(batch.images, draws, mean_target).items():
                sums[name] += loss.item() * len(batch.index)
    yield "monitor_loss", sums["model"] / len(monitor)
    yield "loss_over_position", sums["model"] / sums["position"]
    yield "loss_over_mean", sums["model"] / sums["mean"]


def _in_batches(rows: np.ndarray) -> Iterable[np.ndarray]:
    return (rows[start : start + MONITOR_BATCH] for start in range(0, len(rows), MONITOR_BATCH))


def to_device(draws: Any, device: Device) -> Any:
    """Move drawn tensors, nested in lists, tuples, dicts or dataclasses, to the device."""
    return map_tensors(draws, lambda tensor: tensor.to(device.torch, non_blocking=True))


def map_tensors(tree: Any, function: Any) -> Any:
    """Apply a function to every tensor nested in lists, tuples, dicts or dataclasses."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return type(tree)(**{name: map_tensors(value, function) for name, value in vars(tree).items()})
