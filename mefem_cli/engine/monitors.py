"""Is the encoder alive? Measures on faces that are never trained on; a JEPA loss alone does not tell.

A collapsed encoder has a tiny loss: its features vary little over faces (`feature_std`), along few directions
(`rankme`), and its predictor is no better than one that knows only the position (`loss_over_position` near 1).
In a job of several processes each measures its share of the faces, and all get the numbers of the whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from mefem_cli.engine import distributed, seeds
from mefem_cli.engine.device import Device
from mefem_cli.engine.stream import Batch, ImageStream

Values = dict[str, torch.Tensor]
Measures = Iterator[tuple[str, float | list[float]]]
RANKME_EPSILON = 1e-7
MIN_FACES = 8  # fewer monitor faces say nothing
MAX_SHARE = 0.05  # of the faces are set aside
MONITOR_BATCH = 64
SPECTRUM_LENGTH = 32
DIGITS = 6  # significant, of what is written down
# Columns that depend on the machine and the moment; all others are the same in a run that was stopped and resumed.
MACHINE_COLUMNS = frozenset(
    ["images_per_second", "data_wait", "monitor_seconds", "memory_mib", "cuda_memory_mib", "mfu"]
)


def split_monitor_faces(
    num_faces: int, subjects: np.ndarray | None, wanted: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Set aside whole subjects for monitoring; return (training rows, monitor rows), both sorted.

    At most `wanted` and at most 5 % of the faces; none if that leaves fewer than 8. A face without a subject ("", NaN,
    or `subjects` is None) is its own; subjects with more faces than are left to set aside are passed over.
    """
    quota = min(wanted, int(num_faces * MAX_SHARE))
    groups = as_groups(num_faces, subjects)
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


def why_unwatched(num_faces: int, wanted: int) -> str:
    """Return why no faces were set aside by `split_monitor_faces`."""
    if wanted < MIN_FACES:
        return f"--monitor {wanted} is fewer than the {MIN_FACES} faces that it takes"
    if int(num_faces * MAX_SHARE) < MIN_FACES:
        enough = math.ceil(MIN_FACES / MAX_SHARE)
        return f"{num_faces} faces are too few to set {MIN_FACES} of them aside, which are 5 % of {enough} or more"
    return "the people have so many faces each that none can be set aside"


def as_groups(num_faces: int, subjects: np.ndarray | None) -> np.ndarray:
    """Return the number of each face's group, int64 [num_faces]; faces without a subject share theirs with nobody."""
    if subjects is None:
        return np.arange(num_faces)
    names = np.array([str(subject) for subject in subjects])
    groups = np.unique(names, return_inverse=True)[1]
    alone = np.isin(names, ("", "nan", "None"))
    groups[alone] = groups.max() + 1 + np.arange(alone.sum())
    return np.unique(groups, return_inverse=True)[1]


# Formulas -------------------------------------------------------------------------------------------------------


def feature_std(features: torch.Tensor) -> float:
    """Return the standard deviation over faces, averaged over features, of [n, D] features."""
    return features.std(dim=0).mean().item()


def rankme(features: torch.Tensor, centred: bool = False) -> float:
    """Return the effective rank of [n, D] features: exp of the entropy of their normalised singular values.

    RankMe (Garrido et al. 2023, eq. 3): p_k = sigma_k / sum sigma + epsilon. `centred` removes the mean face first,
    which otherwise counts as one large direction. NaN for features that are not finite.
    """
    return _effective_rank(_singular_values(features, centred))


def spectrum(features: torch.Tensor) -> list[float]:
    """Return the 32 largest eigenvalues of the covariance of [n, D] features as shares of their sum, descending.

    Zeros where the features do not vary, NaN where they are not finite.
    """
    return _shares(_singular_values(features, centred=True))


def _singular_values(features: torch.Tensor, centred: bool) -> torch.Tensor:
    matrix = features.double()
    if not matrix.isfinite().all():  # LAPACK refuses them
        return torch.full((1,), math.nan, dtype=torch.float64)
    return torch.linalg.svdvals(matrix - matrix.mean(dim=0) if centred else matrix)


def _effective_rank(singular_values: torch.Tensor) -> float:
    share = singular_values / singular_values.sum().clamp(min=torch.finfo(torch.float64).tiny) + RANKME_EPSILON
    return torch.exp(-(share * share.log()).sum()).item()


def _shares(singular_values: torch.Tensor) -> list[float]:
    eigenvalues = singular_values.square()  # times n - 1, which cancels
    total = eigenvalues.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (eigenvalues / total)[:SPECTRUM_LENGTH].tolist()


def by_ring(values: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return the sum of [N] values over the tokens of each ring, [rings]; tokens without a radius (NaN) are left out.

    Ring k holds the patches whose centres are k to k + 1 patches from the image centre.
    """
    has_place = ~radius.isnan()
    ring = radius[has_place].long()
    return torch.zeros(int(ring.max()) + 1, dtype=values.dtype).index_add_(0, ring, values[has_place])


def relative_distance(target: nn.Module, source: nn.Module) -> float:
    """Return |source - target| / |target| over the parameters that are trained in `source`, all as one vector.

    NaN for two networks that differ in more than their values.
    """
    targets, sources = list(target.parameters()), list(source.parameters())
    if [one.shape for one in targets] != [one.shape for one in sources]:
        return math.nan
    pairs = [(one.detach(), other.detach()) for one, other in zip(targets, sources, strict=True) if other.requires_grad]
    if not pairs:
        return math.nan
    apart = torch.stack([(other - one).norm() for one, other in pairs]).norm()
    return (apart / torch.stack([one.norm() for one, _ in pairs]).norm()).item()


# Measures over the faces ----------------------------------------------------------------------------------------


def health(
    objective: Any, stream: ImageStream, monitor: np.ndarray, reference: np.ndarray, device: Device, seed: int
) -> Measures:
    """Yield (name, value) measured on the monitor faces; masks are the same ones at every call.

    `reference` are training faces whose mean target per position is what the blind predictors predict. Crops that
    cannot be read are left out. Values are numbers, or lists of them for the spectra and the rings.
    """
    begun = time.perf_counter()
    for name, value in _measure(objective, stream, monitor, reference, device, seed):
        yield name, [_rounded(one) for one in value] if isinstance(value, list) else _rounded(value)
    yield "monitor_seconds", round(time.perf_counter() - begun, 3)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


@torch.no_grad()
def _measure(
    objective: Any, stream: ImageStream, monitor: np.ndarray, reference: np.ndarray, device: Device, seed: int
) -> Measures:
    objective.eval()
    encoders = list(objective.encoders().values())
    features = pooled_features(encoders[0], stream, monitor, device)
    yield "monitor_faces", len(features["rows"])
    for kind, suffix in (("mean", ""), ("cls", "_cls")):
        if kind in features:
            centred = _singular_values(features[kind], centred=True)
            yield f"feature_std{suffix}", feature_std(features[kind])
            yield f"rankme{suffix}", rankme(features[kind])
            yield f"rankme_centred{suffix}", _effective_rank(centred)
            yield f"spectrum{suffix}", _shares(centred)
    if hasattr(objective, "baselines"):
        yield from _losses(objective, stream, monitor, reference, device, seed)
    if len(encoders) > 1:
        yield "ema_distance", relative_distance(*encoders[:2])
    objective.train()


@torch.no_grad()
def pooled_features(encoder: Any, stream: ImageStream, rows: np.ndarray, device: Device) -> Values:
    """Return `mean` and, where there is a CLS token, `cls` features of the readable crops among `rows`, in order.

    float32 [n, D] on the CPU each, beside `rows`, int64 [n]: which crops they are.
    """

    def measure(number: int, batch: Batch) -> Values:
        with device.autocast():
            values = encoder.features(batch.images)
        pooled = {kind: values[kind].float().cpu() for kind in ("mean", "cls") if kind in values}
        return pooled | {"rows": torch.from_numpy(batch.index)}

    pieces = _over_batches(stream, rows, device, measure)
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _losses(
    objective: Any, stream: ImageStream, monitor: np.ndarray, reference: np.ndarray, device: Device, seed: int
) -> Measures:
    """Yield the loss on the monitor faces, beside those of predictors that see nothing, and where it is incurred."""
    mean_target = device.put(_mean_target(objective, stream, reference, device))

    def measure(number: int, batch: Batch) -> Values:
        num_faces = len(batch.index)
        draws = device.put(objective.draw(num_faces, seeds.torch_generator(seed, seeds.MONITOR, number)))
        with device.autocast():
            values = objective.baselines(batch.images, draws, mean_target)
        values["faces"] = torch.ones(())
        sums = {name: value.cpu().double() for name, value in values.items()}  # by token; the others are means
        return {name: value if value.ndim else value * num_faces for name, value in sums.items()}

    sums = _sums(_over_batches(stream, monitor, device, measure))
    loss, position, mean = (sums[name].item() for name in ("model", "position", "mean"))
    num_faces = sums["faces"].item()
    yield "monitor_loss", loss / num_faces
    yield "position_loss", position / num_faces
    yield "loss_over_position", _ratio(loss, position)
    yield "loss_over_mean", _ratio(loss, mean)
    if "count_by_token" in sums:
        yield from _losses_by_place(sums, objective.token_radius())


def _losses_by_place(sums: Values, radius: torch.Tensor) -> Measures:
    """Yield the unweighted loss of the CLS token and of each ring of patches, and its ratio to that of the position."""
    loss, position, count = (sums[f"{name}_by_token"] for name in ("model", "position", "count"))
    loss_rings, position_rings, count_rings = (by_ring(one, radius) for one in (loss, position, count))
    is_cls = radius.isnan()
    if is_cls.any():
        loss_cls, position_cls, count_cls = (one[is_cls].sum().item() for one in (loss, position, count))
        yield "loss_cls", _ratio(loss_cls, count_cls)
        yield "cls_over_position", _ratio(loss_cls, position_cls)
    yield "loss_rings", (loss_rings / count_rings).tolist()
    yield "rings_over_position", (loss_rings / position_rings).tolist()


def _ratio(value: float, of: float) -> float:
    return value / of if of else math.nan


def _mean_target(objective: Any, stream: ImageStream, reference: np.ndarray, device: Device) -> torch.Tensor:
    """Return the mean target at each position over the reference faces, float32 [N, D] on the CPU."""

    def measure(number: int, batch: Batch) -> Values:
        with device.autocast():
            total = objective.token_targets(batch.images).sum(0).cpu().double()
        return {"target": total, "faces": torch.tensor(float(len(batch.index)))}

    sums = _sums(_over_batches(stream, reference, device, measure))
    return (sums["target"] / sums["faces"]).float()


def _over_batches(
    stream: ImageStream, rows: np.ndarray, device: Device, measure: Callable[[int, Batch], Values]
) -> list[Values]:
    """Return `measure(number, batch)` of every batch of `rows`, without the crops that cannot be read.

    Each process measures its share of the batches; all of them get all values.
    """
    world = distributed.world()
    batches = np.array_split(rows, math.ceil(len(rows) / MONITOR_BATCH))  # even: none of a few crops, all corrupt
    numbers = range(world.rank, len(batches), world.size)
    mine = {}
    for number, batch in zip(numbers, stream.batches((batches[one] for one in numbers), device.torch), strict=True):
        mine[number] = measure(number, _readable(batch))
    return list(world.merge(mine).values())


def _sums(pieces: list[Values]) -> Values:
    return {name: torch.stack([piece[name] for piece in pieces]).sum(0) for name in pieces[0]}


def _readable(batch: Batch) -> Batch:
    """Return a batch without the copies that stand in for unreadable crops."""
    if batch.readable.all():
        return batch
    kept = np.flatnonzero(batch.readable)
    images = batch.images[torch.from_numpy(kept).to(batch.images.device)]
    return Batch(images, batch.index[kept], batch.readable[kept])
