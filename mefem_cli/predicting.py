"""What `mefem predict` runs: photos -> crops -> features -> a head from a file -> predictions with intervals.

Photos are cropped by the rule and embedded by the encoder that the head learned with; another encoder is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mefem_cli import console
from mefem_cli.errors import MefemError, NoInputError, OutputError, UsageError
from mefem_cli.evaluation import saved
from mefem_cli.evaluation.evaluate import read_features
from mefem_cli.evaluation.heads import has_features
from mefem_cli.evaluation.saved import Head
from mefem_cli.parts import Given
from mefem_cli.stores import product as products
from mefem_cli.stores.crops import MANIFEST, OK, read_manifest
from mefem_cli.stores.features import FeatureStore

LATEST = Path("runs") / "latest"
DEFAULTS = {"alignment": "none"}
SAME_CROPS = ("scale", "size", "pad", "align")  # what of a crop rule decides what a crop shows
BATCH_ROWS = 512


@dataclass(frozen=True)
class PredictOptions:
    """The prediction."""

    head: str | None = None  # a head from mefem probe --save
    model: str | None = None  # its encoder, as for mefem embed; default: where the head says it was, else runs/latest
    level: Literal["0.5", "0.8", "0.9", "0.95", "0.99"] = "0.9"  # share of people whose truth the intervals are to hold


@dataclass(frozen=True)
class Prediction:
    """What is said of one face, or why nothing is."""

    source: str
    face: int
    id: str = ""
    value: float | str | None = None  # a number, or the name of a class
    low: float | None = None
    high: float | None = None
    probability: float | None = None  # of the class
    classes: tuple[str, ...] = ()  # that hold the truth at the level
    distance: float | None = None  # from the training faces, 1: 99 % of people held out lie nearer
    warnings: tuple[str, ...] = field(default=())
    reject: str = ""  # why there is no prediction


def predict(
    sources: list[str], options: PredictOptions, machine: Any, product: products.ProductOptions, given: Given
) -> Iterator[Prediction]:
    """Yield a prediction for each face, in the order of the sources; `machine` are `DeviceOptions`.

    Sources are what `mefem crop` takes, or one crops folder, or one feature store. Raises OutputError where encoder or
    crops are not those that the head learned with, NoInputError where there is nothing to read.
    """
    head = open_head(options)
    if not sources:
        raise UsageError(
            f"name photos, a crops folder or a feature store, such as mefem predict photos/ --head {head.path}"
        )
    place = Path(sources[0])
    if len(sources) == 1 and place.is_file() and place.suffix in (".h5", ".hdf5"):
        with FeatureStore.open(place) as store:
            refuse_other_encoder(head, dict(store.model), store.provenance.get("preprocessing") or {}, str(place))
            yield from of_store(head, store, options.level)
        return
    model, encoder_options = find_encoder(head, options.model, given)
    with tempfile.TemporaryDirectory(prefix="mefem-predict-") as name:
        crops = _crops(head, sources, Path(name), machine, product)
        rows = read_manifest(crops, ["id", "source", "face", "status", "reason", "detail"]).to_pylist()
        found: dict[str, Prediction] = {}
        if any(row["status"] == OK for row in rows):
            with embedded(head, crops, Path(name), model, encoder_options, machine, product) as store:
                found = {one.id: one for one in of_store(head, store, options.level)}
        for row in rows:
            yield found.get(row["id"]) or _rejected(row)


def open_head(options: PredictOptions) -> Head:
    """Return the head that `--head` names."""
    if options.head is None:
        raise UsageError("name a head: --head FILE, from `mefem probe TASK --save FILE`")
    return saved.load(Path(options.head))


# The encoder ----------------------------------------------------------------------------------------------------------


def find_encoder(head: Head, named: str | None, given: Given) -> tuple[str, Given]:
    """Return what to type after --model, and the options of the choice, for the encoder that the head learned with.

    Without `named` it is looked for where it was, then in runs/latest. Raises OutputError where `named` is another,
    NoInputError where it is nowhere.
    """
    from mefem_cli.backbones import _frozen

    origin = head.about.get("encoder") or {}
    recorded = str(origin.get("spec") or "")
    as_recorded = Given({name: one for name, one in (origin.get("options") or {}).items() if one is not None})
    wanted = head.about["model"].get("encoder")
    if named is not None:
        options = given if any(name in given for name in as_recorded.values) else as_recorded
        _refuse(head, _frozen.load(named, wanted, options), named)
        return named, options
    tried = []
    for spec, options in ((recorded, as_recorded), (str(LATEST), Given({}))):
        if not spec or spec.startswith("hf:"):  # no network unless it is named
            continue
        try:
            _refuse(head, _frozen.load(spec, wanted, options), spec)
        except MefemError:
            tried.append(spec)
            continue
        return spec, options
    where = f"is not in {' nor in '.join(tried)}" if tried else "is nowhere recorded"
    name, sha256 = (head.about["model"].get(one) for one in ("name", "sha256"))
    raise NoInputError(f"{head.path}: its encoder {name} (sha256 {str(sha256)[:16]}) {where}; name it with --model")


def _refuse(head: Head, loaded: Any, spec: str) -> None:
    sha256 = products.file_sha256(loaded.weights) if loaded.weights is not None else None
    model = {"name": loaded.name, "sha256": sha256, **loaded.details}
    if sha256 is None:
        model["spec"] = loaded.spec
    refuse_other_encoder(head, model, asdict(loaded.encoder.preprocessing), f"--model {spec}")


def refuse_other_encoder(head: Head, model: Mapping[str, Any], preprocessing: Mapping[str, Any], where: str) -> None:
    """Raise OutputError if an encoder is not the one whose features the head learned to read."""
    wanted = head.about["model"]
    if wanted.get("sha256") != model.get("sha256"):
        raise OutputError(
            f"{where} is another encoder than that of {head.path}: sha256 {model.get('sha256')}, the head learned with "
            f"{wanted.get('name')}, sha256 {wanted.get('sha256')}; name that one"
        )
    ours, theirs = (
        _plain({**model, **preprocessing})
        for model, preprocessing in ((wanted, head.about["preprocessing"]), (model, preprocessing))
    )
    changes = products.difference(ours, theirs, ignore=frozenset({"name", "spec", "ignored"}))
    if changes:
        raise OutputError(f"{where} is used otherwise than for {head.path}: {changes}; use it as then")


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as JSON has it, with what stores of an earlier mefem leave out."""
    return {**DEFAULTS, **{name: list(one) if isinstance(one, tuple) else one for name, one in record.items()}}


# Crops and features ---------------------------------------------------------------------------------------------------


def _crops(head: Head, sources: list[str], folder: Path, machine: Any, product: products.ProductOptions) -> Path:
    """Return the crops folder that was named, or a new one below `folder` with the faces of the photos."""
    place = Path(sources[0])
    rule = head.about["crop_rule"]
    if len(sources) == 1 and (place / MANIFEST).is_file():
        _refuse_other_crops(head, place)
        return place
    from mefem_cli.faces import job
    from mefem_cli.faces.crop import CropOptions

    if rule is None:
        console.warn(f"{head.path} does not say how its faces were cropped: mefem crop's defaults are used")
    known = {one.name for one in fields(CropOptions)}
    options = CropOptions(**{name: one for name, one in (rule or {}).items() if name in known}, workers=machine.workers)
    out = folder / "crops"
    try:
        job.crop(sources, options, products.ProductOptions(out=str(out), limit=product.limit), tells_tables=False)
    except NoInputError:
        if not (out / MANIFEST).is_file():
            raise
    return out


def _refuse_other_crops(head: Head, folder: Path) -> None:
    wanted, there = head.about["crop_rule"], saved.crop_rule([str(folder)])
    if wanted is None or there is None:
        console.warn(f"{head.path} or {folder} does not say how faces were cropped: it is not compared")
        return
    ours, theirs = ({name: one[name] for name in SAME_CROPS if name in one} for one in (wanted, there))
    changes = products.difference(ours, theirs)
    if changes:
        raise OutputError(
            f"{folder}: its faces were cropped otherwise than for {head.path}: {changes}; name the photos"
        )


@contextmanager
def embedded(
    head: Head,
    crops: Path,
    folder: Path,
    model: str,
    encoder_options: Given,
    machine: Any,
    product: products.ProductOptions,
) -> Iterator[FeatureStore]:
    """Give the features of crops in a store below `folder`, in the precision that the head learned with."""
    from mefem_cli.embedding import EmbedOptions, Job

    options = EmbedOptions(
        model=[model],
        encoder=head.about["model"].get("encoder"),
        patches="patches" in head.about["features"],
        dtype=head.about["dtype"],
    )
    out = products.ProductOptions(out=str(folder / "features.h5"), seed=product.seed)
    (done,) = Job.prepare([crops], options, machine, out, encoder_options).run()
    with FeatureStore.open(done.out) as store:
        yield store


# Predictions ----------------------------------------------------------------------------------------------------------


def of_store(head: Head, store: FeatureStore, level: str) -> Iterator[Prediction]:
    """Yield what the head says of each face in a store, a few read at a time."""
    if not has_features(store, head.about["features"]):
        raise NoInputError(f"{store.path} lacks the {head.about['features']} features that {head.path} reads")
    sources = store.meta["source"] if "source" in store.meta else [""] * len(store)
    faces = store.meta["face"] if "face" in store.meta else [0] * len(store)
    for begin in range(0, len(store), BATCH_ROWS):
        rows = np.arange(begin, min(begin + BATCH_ROWS, len(store)))
        features = read_features(store, head.about["features"], rows)
        output, distance = head.predict(features), head.distance(features) / head.far
        for row, one, far in zip(rows, output, distance, strict=True):
            place = {"source": str(sources[row]), "face": int(faces[row]), "id": str(store.ids[row])}
            yield _said(head, place, one, float(far), level)


def _said(head: Head, place: dict[str, Any], output: Any, distance: float, level: str) -> Prediction:
    warnings = [f"far from the training faces ({distance:.2f} of what 99 % stay under)"] if distance > 1 else []
    width = head.half_width(level)
    if head.classes:
        best = int(np.argmax(output))
        held = tuple(name for name, share in zip(head.classes, output, strict=True) if 1 - share <= width)
        return Prediction(
            **place,
            value=head.classes[best],
            probability=float(output[best]),
            classes=held,
            distance=distance,
            warnings=tuple(warnings),
        )
    value, statistics = float(output), head.about["labels"]
    if not statistics["min"] <= value <= statistics["max"]:
        warnings.append(f"beyond the labels learned from ({statistics['min']:.4g} to {statistics['max']:.4g})")
    ends = (value - width, value + width) if np.isfinite(width) else (None, None)
    return Prediction(**place, value=value, low=ends[0], high=ends[1], distance=distance, warnings=tuple(warnings))


def _rejected(row: Mapping[str, Any]) -> Prediction:
    reason = row["reason"] or "unreadable"
    detail = f" ({row['detail']})" if row["detail"] else ""
    return Prediction(row["source"] or "", row["face"] or 0, row["id"], reject=f"{reason}{detail}")


# Output ---------------------------------------------------------------------------------------------------------------


def columns(head: Head) -> tuple[str, ...]:
    """Return the columns of the CSV."""
    values = ("prediction", "probability", "classes") if head.classes else ("prediction", "low", "high")
    return ("source", "face", *values, "warning", "reject")


def as_row(one: Prediction) -> dict[str, Any]:
    """Return a prediction as the cells of the CSV; numbers have six digits."""
    cells = {
        "source": one.source,
        "face": one.face,
        "prediction": one.value,
        "low": one.low,
        "high": one.high,
        "probability": one.probability,
        "classes": "|".join(one.classes),
        "warning": "; ".join(one.warnings),
        "reject": one.reject,
    }
    return {
        name: f"{cell:.6g}" if isinstance(cell, float) else "" if cell is None else cell for name, cell in cells.items()
    }


def as_json(one: Prediction, head: Head) -> dict[str, Any]:
    """Return a prediction as a JSON object."""
    shared = {"source": one.source, "face": one.face, "id": one.id, "task": head.about["task"], "prediction": one.value}
    if head.classes:
        shared |= {"probability": one.probability, "classes": list(one.classes)}
    else:
        shared |= {"low": one.low, "high": one.high, "unit": head.about["unit"]}
    return {**shared, "distance": one.distance, "warnings": list(one.warnings), "reject": one.reject}


def describe(head: Head) -> dict[str, Any]:
    """Return the card of a head as a JSON object."""
    about = head.about
    scores = {name: [one["value"], one["low"], one["high"]] for name, one in about["scores"].items()}
    return {
        "task": about["task"],
        "kind": about["kind"],
        "unit": about["unit"],
        "classes": about["classes"],
        "head": f"{about['head']} on {about['features']}",
        "model": about["model"],
        "encoder": (about.get("encoder") or {}).get("spec"),
        "crop_rule": about["crop_rule"],
        "learned_from": about["labels"],
        "scores_out_of_fold": scores,
        "chosen_among": about["chosen_among"],
        "half_widths": about["half_widths"],
        "must_not_be_used_for": about["must_not_be_used_for"],
    }


def card(head: Head) -> str:
    """Return the card of a head as lines of text."""
    about, labels = head.about, head.about["labels"]
    unit = f" {about['unit']}" if about["unit"] else ""
    spread = (
        ", ".join(f"{count} {name}" for name, count in labels["counts"].items())
        if head.classes
        else f"{about['task']} {labels['min']:.4g} to {labels['max']:.4g}{unit}, mean {labels['mean']:.4g}"
    )
    rule = about["crop_rule"] or {}
    rows = {
        "predicts": f"{about['task']}{unit}, {about['head']} on {about['features']} features",
        "learned from": f"{labels['n']} faces of {labels['n_groups']} people: {spread}",
        "out of fold": "; ".join(_score(name, one) for name, one in about["scores"].items()),
        "chosen among": ", ".join(about["chosen_among"]),
        "encoder": f"{about['model'].get('name')}, sha256 {about['model'].get('sha256')}",
        "found at": (about.get("encoder") or {}).get("spec") or "unknown: name it with --model",
        "crops": ", ".join(f"{name} {one}" for name, one in rule.items()) or "unknown",
        "not for": about["must_not_be_used_for"][0],
    }
    lines = [f"{name:14}{one}" for name, one in rows.items()]
    return "\n".join([*lines, *(f"{'':14}{one}" for one in about["must_not_be_used_for"][1:])])


def _score(name: str, one: Mapping[str, float | None]) -> str:
    value, low, high = ("-" if one[side] is None else f"{one[side]:.3f}" for side in ("value", "low", "high"))
    return f"{name} {value} [{low}, {high}]"
