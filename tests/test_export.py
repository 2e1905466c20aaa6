"""`mefem export`: every layout read as its users read it gives the run's features; the card; what is refused."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from synthetic import write_crops, write_run

from mefem_cli import console, exporting, main
from mefem_cli.backbones import vit
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.exporting import ExportOptions, export
from mefem_cli.reports import card

CONFIG = {
    "crops": ["/home/anna/photos of patients/crops"],
    "inputs": {"/home/anna/photos of patients/crops": "ab" * 32},
    "mask": "stripes",
    "width": 3,
    "epochs": 7,
    "lr": 0.0005,
}
EPOCHS = [
    {"kind": "epoch", "step": 0, "epoch": 0, "feature_std": 0.2, "rankme_centred": 9.0, "loss_over_position": 3.0},
    {"kind": "step", "step": 5, "epoch": 1, "loss": 0.1},
    {"kind": "epoch", "step": 10, "epoch": 1, "feature_std": 0.2, "rankme_centred": 9.0, "loss_over_position": 0.6},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "20260101-stripes")
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EPOCHS))
    return folder


def images(count: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(0, 256, (count, 3, 64, 64), dtype=np.uint8))


def expected(run: Path, which: str = "target") -> dict[str, torch.Tensor]:
    encoder, *_ = vit.load_encoder(run, which)
    with torch.inference_mode():
        return encoder.features(images())


def normalised() -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    return (images() / 255 - mean) / std


@pytest.mark.parametrize("which", ["target", "source"])
def test_timm_reads_the_folder_and_the_checkpoint(run, tmp_path, which):
    out = export(run, ExportOptions(to="timm", out=str(tmp_path / "t"), encoder=which))
    arguments = json.loads((out / "config.json").read_text())["model_args"]
    models = [
        timm.create_model(f"local-dir:{out}", pretrained=True),
        timm.create_model(
            "vit_tiny_patch16_224", checkpoint_path=str(out / "model.safetensors"), num_classes=0, **arguments
        ),
    ]
    for model in models:
        with torch.inference_mode():
            tokens = model.eval().forward_features(normalised())
            pooled = model(normalised())
        assert torch.allclose(tokens[:, 0], expected(run, which)["cls"], atol=1e-4)
        assert torch.allclose(tokens[:, 1:], expected(run, which)["patches"], atol=1e-4)
        assert torch.allclose(pooled, tokens[:, 0])
    assert timm.data.resolve_model_data_config(models[0])["crop_pct"] == 1.0
    modes = {path.stat().st_mode for path in (out / "model.safetensors", out / "config.json")}
    assert len(modes) == 1  # colleagues may read the weights if they may read the rest
    assert not torch.allclose(expected(run, "source")["cls"], expected(run, "target")["cls"], atol=1e-2)


def test_timm_reads_an_encoder_without_class_token(tmp_path):
    run = write_run(tmp_path / "run", class_token=False)
    out = export(run, ExportOptions(to="timm", out=str(tmp_path / "t")))
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.allclose(model(normalised()), expected(run)["mean"], atol=1e-4)
    with pytest.raises(UsageError, match="always has a CLS token.*--to timm"):
        export(run, ExportOptions(to="hf", out=str(tmp_path / "h")))
    assert not (tmp_path / "h").exists()


def test_transformers_reads_the_folder(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = export(run, ExportOptions(to="hf", out=str(tmp_path / "h")))
    model = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False).eval()
    with torch.inference_mode():
        tokens = model(normalised()).last_hidden_state
    assert torch.allclose(tokens[:, 0], expected(run)["cls"], atol=1e-4)
    assert torch.allclose(tokens[:, 1:], expected(run)["patches"], atol=1e-4)
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 64, "width": 64} and processor["resample"] == 3


def test_without_transformers_it_says_that_nothing_was_run(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    out = export(run, ExportOptions(to="hf", out=str(tmp_path / "h")))
    assert "pip install transformers" in capfd.readouterr().err
    assert "not run" in (out / "README.md").read_text()
    with pytest.raises(UsageError, match=r"--to onnx: wants the package onnx; .*mefem-cli\[onnx\]"):
        export(run, ExportOptions(to="onnx", out=str(tmp_path / "o")))


def test_onnxruntime_reads_any_batch_of_uint8(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = export(run, ExportOptions(to="onnx", out=str(tmp_path / "o"), patches=True))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(one.name, one.type, one.shape[1:]) for one in session.get_inputs()] == [
        ("images", "tensor(uint8)", [3, 64, 64])
    ]
    for count in (1, 3):
        given = dict(
            zip(
                [one.name for one in session.get_outputs()],
                session.run(None, {"images": images(3)[:count].numpy()}),
                strict=True,
            )
        )
        assert [*given] == ["cls", "mean", "patches"]
        for kind, features in given.items():
            assert np.allclose(features, expected(run)[kind][:count].numpy(), atol=1e-4)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json", "model.onnx"]


def test_mefem_embeds_with_the_folder(run, tmp_path):
    from mefem_cli.embedding import EmbedOptions, Job
    from mefem_cli.engine.device import DeviceOptions
    from mefem_cli.stores.features import FeatureStore
    from mefem_cli.stores.product import ProductOptions

    out = export(run, ExportOptions(to="safetensors", out=str(tmp_path / "s"), encoder="source"))
    crops = write_crops(tmp_path / "crops", 3, size=64)
    for model, which in ((out, None), (run, "source")):
        product = ProductOptions(out=str(tmp_path / f"{model.name}.h5"))
        Job.prepare([crops], EmbedOptions([str(model)], which), DeviceOptions(precision="fp32"), product).run()
    with FeatureStore.open(tmp_path / "s.h5") as one, FeatureStore.open(tmp_path / f"{run.name}.h5") as other:
        assert np.array_equal(one.read("cls"), other.read("cls"))


def test_an_export_that_gives_other_features_is_not_written(run, tmp_path, monkeypatch):
    state = exporting._state
    monkeypatch.setattr(
        exporting, "_state", lambda encoder: {**state(encoder), "norm.bias": state(encoder)["norm.bias"] + 0.01}
    )
    layouts = ["timm", "safetensors"]
    layouts += ["hf"] * (find_spec("transformers") is not None)
    layouts += ["onnx"] * all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    for to in layouts:
        with pytest.raises(OutputError, match=r"differ by 0.01.*more than 0.0001"):
            export(run, ExportOptions(to=to, out=str(tmp_path / to)))
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_data_recipe_metrics_and_limits_but_no_paths(run, tmp_path):
    out = export(run, ExportOptions(to="safetensors", out=str(tmp_path / "s")))
    page = (out / "README.md").read_text()
    for words in (
        "stripes",
        "ab" * 32,
        "**healthy**",
        "0.6",
        "Identifying",
        "Diagnosis",
        "Decisions about a person",
        "--model s",
    ):
        assert words in page
    assert "anna" not in page
    record = json.loads((out / "export.json").read_text())
    assert (record["format"], record["to"], record["encoder"]) == ("mefem-export", "safetensors", "target")
    assert "tolerance 0.0001" in record["checks"][0] and record["checks"][0] in page


def test_a_run_that_collapsed_is_called_so():
    rows = [
        EPOCHS[0],
        *({**EPOCHS[2], "feature_std": 0.01, "loss_over_position": 1.2, "epoch": 2 + one} for one in range(3)),
    ]
    assert "**collapsed**" in card.text("x", "timm", "target", {}, {}, rows, [])
    assert "None were recorded" in card.text("x", "timm", "target", {}, {}, [], [])
    first = {"kind": "epoch", "epoch": 0, "step": 0}
    untrained = card.text("x", "timm", "target", {}, {}, [first], [])
    assert "not trained" in untrained and "trained without labels" not in untrained
    assert "whether anything was learned" not in untrained


def test_tensors_that_transformers_lacks_are_named():
    with pytest.raises(UsageError, match="blocks.0.ls1.gamma"):
        exporting.to_hugging_face({"blocks.0.ls1.gamma": torch.ones(3)})


def test_what_exists_stays_unless_it_is_an_export(run, tmp_path):
    out = tmp_path / "e"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        export(run, ExportOptions(to="safetensors", out=str(out)))
    with pytest.raises(OutputError, match="not what this command makes"):
        export(run, ExportOptions(to="safetensors", out=str(out), overwrite=True))
    assert (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    for _ in range(2):
        export(run, ExportOptions(to="safetensors", out=str(out), overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


def test_the_command(run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "stdin_is_pipe", lambda: False)

    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mefem", "export", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        console.configure(console.ConsoleOptions())
        return int(end.value.code or 0), *capfd.readouterr()

    assert typed(str(run), "--to", "safetensors") == (
        0,
        f"{tmp_path / 'exports' / '20260101-stripes-safetensors'}\n",
        "",
    )
    assert typed(str(run), "--to", "tim")[0::2] == (
        2,
        'mefem export: --to tim: wanted timm|hf|onnx|safetensors; did you mean "timm"?\n',
    )
    assert typed()[0] == 3  # no runs/latest
    assert typed(str(run), "other")[0] == 2


def test_what_is_no_run_is_told_by_its_name(tmp_path):
    for name, said in {"none": "no such run", "other.safetensors": "not of a run of mefem"}.items():
        if name != "none":
            (tmp_path / name).touch()
        with pytest.raises(NoInputError, match=f"{name}: {said}") as error:
            exporting.export(tmp_path / name, exporting.ExportOptions())
        assert "--model" not in str(error.value)
