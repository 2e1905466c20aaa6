"""The model card of an exported encoder: what it is, of which data and recipe, how well, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mefem_cli.engine import alarm

Row = Mapping[str, Any]
LOADING = {
    "timm": """import timm

model = timm.create_model("local-dir:{name}", pretrained=True)  # pixels / 255, then mean and std as in config.json
tokens = model.forward_features(images)  # [B, N, {dim}]""",
    "hf": """from transformers import ViTImageProcessor, ViTModel

model = ViTModel.from_pretrained("{name}", add_pooling_layer=False)
tokens = model(**ViTImageProcessor.from_pretrained("{name}")(pictures, return_tensors="pt")).last_hidden_state""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{name}/model.onnx")
features = session.run(None, {{"images": images}})  # uint8 [B, 3, {size}, {size}], RGB""",
    "safetensors": """mefem embed crops/ --model {name}""",
}
LIMITS = """## What it must not be used for

- **Identifying or verifying persons**, finding a person in a collection, or surveillance of any kind. It was not
  trained for that, and features of faces are biometric data all the same: store and share them as such.
- **Diagnosis, treatment or triage.** It is no medical device. What is read from a face (body mass index, age, blood
  markers) is an estimate with a wide interval, for research on groups.
- **Decisions about a person**: hiring, insurance, credit, schooling, policing, migration, access to services.
- **Inferring what a person has not disclosed**: ethnicity, religion, orientation, political opinion, emotion, health.
- Faces of people who did not agree to it, and of children without their guardians' consent.

Before any use, measure errors on your own population, by sex, age and skin tone: features of faces carry the biases of
the pictures they were learned from."""
METRICS = {
    "loss_over_position": "loss over that of a predictor that knows only the position (under 1: it sees the face)",
    "loss_over_mean": "loss over that of a constant prediction",
    "feature_std": "deviation of features over faces (0: collapsed)",
    "rankme": "effective number of directions of the features",
    "rankme_centred": "the same, around their mean",
    "monitor_faces": "faces set aside to measure this",
}
RECIPE = (
    *("objective", "mask", "width", "cls_prob", "loss_weight", "r0", "sigma", "backbone", "image_size", "patch_size"),
    *("depth", "embed_dim", "num_heads", "predictor_depth", "predictor_width", "epochs", "warmup_epochs", "batch_size"),
    *("lr", "weight_decay", "ema", "precision", "seed"),
)


def text(
    name: str,
    to: str,
    which: str,
    description: Row,
    config: Row,
    metrics: Sequence[Row],
    checks: Sequence[str],
) -> str:
    """Return the card as Markdown.

    `description` is the run's model.json, `config` its resolved options, `metrics` the rows of its metrics.jsonl.
    """
    dim, size = description.get("embed_dim"), description.get("image_size")
    loading = LOADING[to].format(name=name, dim=dim, size=size)
    language = "bash" if to == "safetensors" else "python"
    blocks = [
        _front_matter(to),
        f"# {name}",
        f"A face encoder, {description.get('backbone')} with {dim} features at {size} px, {_trained(metrics)} by "
        f"[mefem](https://pypi.org/project/mefem-cli/) {description.get('provenance', {}).get('mefem', '')} "
        f"({config.get('objective', 'mefem')}). It is the {which} encoder of the run.",
        f"```{language}\n{loading}\n```",
        _input(description),
        "## Data\n\n" + _data(description, config),
        "## Recipe\n\n" + _table([(one, config[one]) for one in RECIPE if config.get(one) is not None]),
        "## Metrics\n\n" + _metrics(metrics),
        LIMITS,
        "## Checks\n\n" + "\n".join(f"- {one}" for one in checks),
    ]
    return "\n\n".join(blocks) + "\n"


def _trained(metrics: Sequence[Row]) -> str:
    steps = [row["step"] for row in metrics if isinstance(row.get("step"), int)]
    return "not trained: as it was before its first step," if steps and not any(steps) else "trained without labels"


def _front_matter(to: str) -> str:
    library = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "safetensors": "mefem"}[to]
    return f"---\nlibrary_name: {library}\ntags:\n- face\n- self-supervised\n- feature-extraction\n---"


def _input(description: Row) -> str:
    crop = description.get("crop_rule") or {}
    rule = f"square crops centred on the face, side {crop['side']}" if crop.get("side") else "square crops of faces"
    mean, std = (list(description.get(name, [])) for name in ("mean", "std"))
    return (
        f"Input: {rule}, sRGB, {description.get('image_size')} px ({description.get('interpolation')}); pixels from 0 "
        f"to 1, less the mean {mean}, over the deviation {std}."
    )


def _data(description: Row, config: Row) -> str:
    """Return the fingerprint of the crops: names without their paths, which may tell of people and places."""
    inputs = config.get("inputs") or description.get("provenance", {}).get("inputs") or {}
    if not inputs:
        return "Unknown: the run does not say."
    rows = [(Path(path).name, f"`{digest}`") for path, digest in inputs.items()]
    return "Crops, and the sha256 of their manifests:\n\n" + _table(rows)


def _metrics(metrics: Sequence[Row]) -> str:
    epochs = [row for row in metrics if row.get("kind") == "epoch"]
    if not epochs:
        return "None were recorded."
    verdict, last = alarm.judge(epochs), epochs[-1]
    there = {name: meaning for name, meaning in METRICS.items() if isinstance(last.get(name), int | float)}
    known = [(f"{meaning} (`{name}`)", f"{last[name]:.4g}") for name, meaning in there.items()]
    lead = f"After epoch {last.get('epoch')} (step {last.get('step')}): **{verdict.kind}**. {verdict.meaning}"
    if not known:
        return lead
    return f"{lead}\n\n{_table(known)}\n\nThese say whether anything was learned, not how well a label can be read."


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    escaped = [(str(name), str(value).replace("|", "\\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in escaped)])
