"""A fitted head in one file, `mefem probe bmi --save bmi.head`, for `mefem predict`: safetensors with a JSON header.

The head is fitted on all labelled faces; what it chooses, it chooses as in the protocol, on inner folds of people. The
header says what it predicts, from which encoder's features of which crops, how well (out of fold), how far errors reach
and how far the training faces lie from their centre. It holds no face and no feature of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from mefem_cli import parts, probes
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.evaluation import conformal
from mefem_cli.evaluation.folds import assign_folds, strata
from mefem_cli.evaluation.job import Job, Results
from mefem_cli.evaluation.numbers import SHOWN
from mefem_cli.evaluation.pair import StorePair
from mefem_cli.evaluation.problem import INNER_FOLDS, Problem
from mefem_cli.evaluation.score import Score
from mefem_cli.evaluation.streaming import StreamedTokens, open_features
from mefem_cli.probes import State
from mefem_cli.stores import product
from mefem_cli.stores.crops import PROVENANCE
from mefem_cli.stores.features import FeatureStore

FORMAT, VERSION = "mefem-head", 1
BLOCK_ROWS = 256  # streamed rows held at once
HEADER = "mefem"  # the entry of the safetensors header
LEVELS = ("0.5", "0.8", "0.9", "0.95", "0.99")  # of prediction intervals
FAR_LEVEL = 0.99  # of held-out training faces lie nearer than the bound
UNITS = {"bmi": "kg/m2", "age": "years", "age_est": "years", "age_years": "years"}
KEEPS_FACES = "knn"  # it would be the features of all training faces
CROP_RULE = (
    "detector",
    "min_score",
    "faces",
    "scale",
    "size",
    "min_size",
    "pad",
    "align",
    "frame",
    "quality",
    "format",
)
MUST_NOT = (
    "Diagnosis, treatment or triage: it is no medical device.",
    "Decisions about a person: hiring, insurance, credit, schooling, policing, migration, access to services.",
    "Identifying or watching people, or telling what they have not disclosed.",
    "People unlike those it learned from (other ages, countries, cameras): its intervals do not hold there.",
    "Faces of people who did not agree to it, and of children without their guardians' consent.",
)


@dataclass(frozen=True)
class KeepOptions:
    """What is kept."""

    save: str | None = None  # also fit the head on all labelled faces and write it to this file, for mefem predict
    faces: bool = True  # show crops in the report.html of --out


@dataclass(frozen=True)
class Head:
    """A head from a file."""

    path: Path
    about: Mapping[str, Any]  # the header
    state: State
    centre: State  # of the training features: `mean`, `scale` (D,), `whitening` [D, D]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, none of a number."""
        return tuple(self.about["classes"])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return numbers (m,) or class probabilities [m, C] from features [m, D], of tokens [m, T, D]."""
        return parts.load("probes", self.about["head"]).predict(self.state, features)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Return how far features lie from those it learned from, (m,): Mahalanobis; beyond `far` is unusual."""
        return _distance(self.centre, _vectors(features))

    @property
    def far(self) -> float:
        """The distance that 99 % of people held out of the training faces stay under."""
        return float(self.about["far"])

    def half_width(self, level: str) -> float:
        """Return how far a prediction interval reaches, of classes the largest 1 - p in the set; infinite: unknown."""
        width = self.about["half_widths"][level]
        return float("inf") if width is None else float(width)


# Writing --------------------------------------------------------------------------------------------------------------


def check(job: Job, path: Path, overwrite: bool) -> None:
    """Raise UsageError where the job makes no single head, OutputError where `path` is taken: before the first fit."""
    if len(job.problems) > 1:
        tasks = ", ".join(several[0].task for several in job.problems[:4])
        raise UsageError(f"--save {path}: a head predicts one label; name one task, not {tasks}")
    if len(job.stores) > 1 or isinstance(job.stores[0], StorePair):
        raise UsageError(f"--save {path}: a head learns from one store; name one --store")
    if job.options.aggregate:
        raise UsageError(f"--save {path}: a head predicts from one photo; leave --aggregate out")
    if all(head == KEEPS_FACES for head, _ in job.pairs):
        raise UsageError(
            f"--save {path}: a {KEEPS_FACES} head is the features of all its faces, which should not travel; type "
            "--head linear, mlp or attentive"
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists; type --overwrite to replace it or name another --save")


def best_score(results: Results) -> Score:
    """Return the score of the head to keep: the best out of fold, of those that can be kept."""
    kept = [score for score in results.scores if score.head != KEEPS_FACES]
    values = [score.metrics[SHOWN[score.kind][0]].value for score in kept]
    return kept[int(np.argmax(np.nan_to_num(values, nan=-np.inf)))]


def save(path: Path, job: Job, results: Results, head_options: Mapping[str, Any], record: Mapping[str, Any]) -> Score:
    """Fit the best head on all faces of the job and write it; return the score it had out of fold."""
    score = best_score(results)
    (store,), ((problem,),) = job.stores, job.problems
    read = open_features(store, score.features, problem.rows, job.options.max_memory)
    inner = _inner_folds(problem)
    rows = np.arange(len(read))
    fold = probes.Fold(
        read, rows, rows[:0], problem.target, inner, len(problem.classes), problem.seed, job.options.device
    )
    module = parts.load("probes", score.head)
    fitted = module.fit_predict(fold, head_options.get(score.head) or module.Options())
    centre, far = _training_centre(_vectors(read), inner, problem.group)
    about = {
        **_what(score, problem, store),
        "chosen": fitted.chosen,
        "chosen_among": [f"{one.head} on {one.features}" for one in results.scores],
        "scores": {name: _known(vars(one)) for name, one in score.metrics.items()},
        "baseline": _known(score.baseline),
        "half_widths": _half_widths(score),
        "far": far,
        "labels": _label_statistics(problem),
        "must_not_be_used_for": list(MUST_NOT),
        "provenance": dict(record),
    }
    _write(path, about, fitted.state, centre)
    return score


def _what(score: Score, problem: Problem, store: FeatureStore) -> dict[str, Any]:
    """Return what the head predicts and what its features are."""
    record = store.provenance
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": score.task,
        "kind": score.kind,
        "classes": list(problem.classes),
        "unit": UNITS.get(score.task, ""),
        "head": score.head,
        "features": score.features,
        "model": dict(store.model),
        "encoder": record.get("encoder") or {},
        "preprocessing": record.get("preprocessing") or {},
        "dtype": store.dtype,
        "crop_rule": crop_rule(record.get("inputs") or {}),
    }


def crop_rule(folders: Mapping[str, Any] | Sequence[str]) -> dict[str, Any] | None:
    """Return how the faces in crops folders were cropped; None where a folder is gone or folders differ."""
    found = []
    for folder in folders:
        try:
            options = json.loads((Path(folder) / PROVENANCE).read_text(encoding="utf-8"))["options"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found.append({name: options[name] for name in CROP_RULE if name in options})
    return found[0] if found and all(one == found[0] for one in found) else None


def _inner_folds(problem: Problem) -> np.ndarray:
    people = np.unique(problem.group, return_inverse=True)[1]
    num_folds = min(INNER_FOLDS, int(people.max()) + 1)
    by_value = strata(problem.target, bool(problem.classes), num_folds)
    return assign_folds(people, by_value, num_folds, [problem.seed, 5])


def _half_widths(score: Score) -> dict[str, float | None]:
    """Return the split-conformal bound of out-of-fold errors at each level; None where there are too few people."""
    errors, group = conformal.errors(score.predictions), score.predictions.group
    return _known({level: conformal.quantile(errors, group, float(level)) for level in LEVELS})


def _known(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON has them: what is not finite is None."""
    return {name: float(value) if np.isfinite(value) else None for name, value in numbers.items()}


def _label_statistics(problem: Problem) -> dict[str, Any]:
    people = len(np.unique(problem.group))
    found: dict[str, Any] = {"n": len(problem.target), "n_groups": people}
    if problem.classes:
        counts = np.bincount(problem.target, minlength=len(problem.classes))
        return {**found, "counts": dict(zip(problem.classes, counts.tolist(), strict=True))}
    names = ("mean", "std", "min", "max")
    return {**found, **{name: float(getattr(problem.target, name)()) for name in names}}


# How far a face lies from those learned from --------------------------------------------------------------------------


def _vectors(features: np.ndarray | StreamedTokens) -> np.ndarray:
    """Return one vector a face, float64 [m, D]: of tokens their mean."""
    if isinstance(features, StreamedTokens):
        parts_of = np.array_split(np.arange(len(features)), 1 + len(features) // BLOCK_ROWS)
        return np.concatenate([_vectors(features[rows]) for rows in parts_of])
    return features.mean(axis=1, dtype=np.float64) if features.ndim == 3 else features.astype(np.float64)


def _training_centre(vectors: np.ndarray, inner: np.ndarray, group: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """Return the centre and spread of features [n, D], and the distance that 99 % of people held out stay under."""
    distance = np.zeros(len(vectors))
    for number in np.unique(inner):
        held_out = inner == number
        distance[held_out] = _distance(_centre(vectors[~held_out]), vectors[held_out])
    bound = conformal.quantile(distance, group, FAR_LEVEL)
    return _centre(vectors), bound if np.isfinite(bound) else float(distance.max())


def _centre(vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean and scale (D,) of features [n, D], and what whitens them [D, D].

    The covariance is shrunk (Ledoit and Wolf 2004), so that it has an inverse where faces are fewer than features.
    """
    from sklearn.covariance import ledoit_wolf

    mean, scale = probes.scaling(vectors)
    covariance, _ = ledoit_wolf((vectors - mean) * scale, assume_centered=True)
    squares, directions = np.linalg.eigh(covariance)
    whitening = directions / np.sqrt(np.maximum(squares, 1e-6))
    return {name: one.astype(np.float32) for name, one in (("mean", mean), ("scale", scale), ("whitening", whitening))}


def _distance(centre: State, vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(((vectors - centre["mean"]) * centre["scale"]) @ centre["whitening"], axis=1)


# The file -------------------------------------------------------------------------------------------------------------


def _write(path: Path, about: Mapping[str, Any], state: State, centre: State) -> None:
    tensors = {f"state/{name}": np.array(one, order="C") for name, one in state.items()}
    tensors |= {f"centre/{name}": np.array(one, order="C") for name, one in centre.items()}
    with product.writing(path) as temporary:
        temporary.write_bytes(serialise(tensors, metadata={HEADER: json.dumps(about)}))


def load(path: Path) -> Head:
    """Read a head. Raises NoInputError for a file that is none or damaged, UsageError for one of a newer mefem."""
    if not path.is_file():
        raise NoInputError(f"--head {path}: there is no such file; make one with `mefem probe TASK --save {path}`")
    wanted = "wanted a head from `mefem probe --save`"
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if about["format"] != FORMAT:
            raise ValueError
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise NoInputError(f"--head {path}: not a head or damaged; {wanted}") from error
    if about.get("version", VERSION) > VERSION:
        raise UsageError(f"--head {path}: written by a newer mefem; upgrade with `pip install -U mefem-cli`")
    sides = [
        {name.partition("/")[2]: one for name, one in tensors.items() if name.startswith(side)}
        for side in ("state/", "centre/")
    ]
    head = Head(path, about, sides[0], sides[1])
    try:
        _try(head)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, UsageError) as error:
        raise NoInputError(f"--head {path}: damaged ({type(error).__name__}: {error}); {wanted}") from error
    return head


def _try(head: Head) -> None:
    """Read a blank face; what is missing in the file or does not fit raises."""
    about, width = head.about, len(head.centre["mean"])
    blank = np.zeros((1, 1, width) if "patches" in about["features"] else (1, width), np.float32)
    if head.predict(blank).shape != ((1, len(head.classes)) if head.classes else (1,)):
        raise ValueError("predictions of another shape")
    needed = ("task", "kind", "unit", "model", "preprocessing", "dtype", "crop_rule", "scores", "chosen_among")
    missing = [name for name in needed if name not in about]
    if missing:
        raise KeyError(", ".join(missing))
    head.distance(blank)
    [head.half_width(level) for level in LEVELS]
    about["labels"]["n" if head.classes else "min"] + head.far + len(about["must_not_be_used_for"])
    about["model"].get("name")
