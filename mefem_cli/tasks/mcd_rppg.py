"""MCD-rPPG: blood markers, blood pressure and saturation of 600 people, in five patient-disjoint folds.

Labels come with the crops (`mefem crop --labels db.csv`), under the names below. Folds are those of `--folds FILE`,
else of a label `fold`, else five made by the usual protocol; each keeps a patient's videos together.

Egorov et al. 2025, "Gaze into the heart: a multi-view video dataset for rPPG and health biomarkers estimation",
arXiv:2508.17924; the data: huggingface.co/datasets/kyegorov/mcd_rppg. Of the 25 columns of its `db.csv`, the authors'
notebook Intro_to_mcd.ipynb (github.com/ksyegorov/mcd_rppg) shows patient_id, upper_ap, lower_ap and saturation; that
the others are named hemoglobin, glycated_hemoglobin and cholesterol was read from public loaders of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mefem_cli.errors import NoInputError
from mefem_cli.tasks import Faces, Protocol, Values, numbers, reject_outside

# target: the names that its label may have, plausible values, unit
MARKERS: dict[str, tuple[tuple[str, ...], tuple[float, float], str]] = {
    "hemoglobin": (("hemoglobin", "haemoglobin"), (3, 250), "g/dl or g/l"),
    "glycated_hemoglobin": (("glycated_hemoglobin", "hba1c"), (3, 20), "%"),
    "cholesterol": (("cholesterol", "total_cholesterol"), (1, 20), "mmol/l"),
    "systolic": (("systolic", "upper_ap", "sbp"), (50, 260), "mmHg"),
    "diastolic": (("diastolic", "lower_ap", "dbp"), (20, 160), "mmHg"),
    "saturation": (("saturation", "spo2"), (50, 100), "%"),
}
# MAE of the data set's own video model, column "Model" of Table 5, on other splits and other faces than here: shown as
# published. The paper's constant prediction, column "Baseline", has 0.43, 0.66, 13.78, 7.50 and 0.98. It is silent on
# hemoglobin and on r2.
PUBLISHED_MAE = {
    "glycated_hemoglobin": 0.41,
    "cholesterol": 0.60,
    "systolic": 12.82,
    "diastolic": 8.39,
    "saturation": 0.98,
}
PATIENTS = ("patient_id", "patient", "subject", "subject_id")


def protocol(faces: Faces, options: None = None) -> Protocol:
    """Return those of the six targets that the store has."""
    targets = {}
    for target, (names, bounds, unit) in MARKERS.items():
        name = _first(names, faces.labels)
        values = numbers(faces.labels[name]) if name else None
        if values is None:
            continue
        kept = reject_outside(target, values, *bounds, unit)
        published = {"mae": PUBLISHED_MAE[target]} if target in PUBLISHED_MAE else {}
        targets[target] = Values(kept.values, kept.notes, "regression", published=published)
    if not targets:
        raise NoInputError(
            f"task mcd_rppg: there is no label {', '.join(MARKERS)}; give the data set's table to "
            "`mefem crop --labels` or `mefem store labels`"
        )
    missing = [name for name in MARKERS if name not in targets]
    notes = (f"mcd_rppg: the store has no {', '.join(missing)}",) if missing else ()
    patients = _first(PATIENTS, faces.labels)
    split = None
    if "fold" in faces.labels:
        folds = faces.labels["fold"]
        is_number = folds.dtype.kind == "f"
        split = np.array(["" if one != one else f"{one:g}" if is_number else str(one) for one in folds], dtype=object)
    return Protocol(targets, split, faces.labels[patients] if patients else None, notes=notes)


def _first(names: tuple[str, ...], labels: Mapping[str, np.ndarray]) -> str | None:
    return next((name for name in names if name in labels), None)
