"""`mefem embed`: features against plain timm, stores that grow, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from synthetic import write_crops

from mefem_cli import parts
from mefem_cli.backbones import vit
from mefem_cli.embedding import EmbedOptions, Job
from mefem_cli.engine.device import DeviceOptions
from mefem_cli.engine.stream import decode
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.objectives import mefem
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.features import FeatureStore
from mefem_cli.stores.product import ProductOptions
from mefem_cli.stores.runs import Run

BACKBONE = vit.Options("vit_tiny_patch16_224", image_size=64, patch_size=8, depth=2, embed_dim=48, num_heads=3)


def make_run(folder: Path, seed: int = 0, class_token: bool = True) -> Path:
    """A finished run without training: two encoders that differ."""
    torch.manual_seed(seed)
    encoder = vit.build(BACKBONE, class_token)
    objective = mefem.build(
        mefem.Options(cls_prob=0.5 if class_token else None, predictor_depth=1), encoder, parts.Given({"width": 2})
    )
    with torch.no_grad():
        for parameter in objective.target_encoder.parameters():
            parameter.add_(0.01)
    run = Run.create(folder, {})
    vit.save_encoder(run, objective.encoders(), {}, {"inputs": {}})
    return folder


@pytest.fixture
def work(tmp_path) -> Path:
    subjects = [f"s{number}" for number in range(30)]
    write_crops(tmp_path / "crops", 30, size=64, age=[float(number) for number in range(30)], subject=subjects)
    make_run(tmp_path / "run")
    return tmp_path


def embed(work: Path, *folders: str, product: dict | None = None, machine: dict | None = None, **options) -> dict:
    chosen = EmbedOptions(model=str(work / options.pop("model", "run")), **options)
    settings = {"precision": "fp32", **(machine or {})}
    product_options = ProductOptions(**{"out": str(work / "features.h5"), **(product or {})})
    crops = [work / folder for folder in folders or ("crops",)]
    return Job.prepare(crops, chosen, DeviceOptions(**settings), product_options).run()


@pytest.mark.parametrize(("which", "file"), [(None, "model.safetensors"), ("source", "source.safetensors")])
def test_features_equal_plain_timm_on_the_same_weights(work, which, file):
    embed(work, encoder=which, patches=True, dtype="float32", machine={"batch_size": "7"})
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=0
    )
    plain.load_state_dict(load_file(work / "run" / file))
    plain.eval()
    crops = Crops.open(work / "crops")
    pixels = torch.stack([torch.from_numpy(decode(crops.read_bytes(row), 64).copy()) for row in range(30)]).permute(
        0, 3, 1, 2
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    with torch.inference_mode():
        expected = plain.forward_features((pixels / 255 - mean) / std).numpy()
    with FeatureStore.open(work / "features.h5") as store:
        assert list(store.ids) == crops.ids
        assert np.allclose(store.read("cls"), expected[:, 0], atol=1e-4)
        assert np.allclose(store.read("mean"), expected[:, 1:].mean(1), atol=1e-4)
        assert np.allclose(store.read("patches"), expected[:, 1:], atol=1e-4)


def test_labels_and_manifest_columns_travel_along(work):
    assert embed(work) == {"crops": 30, "embedded": 30, "unreadable": 0}
    with FeatureStore.open(work / "features.h5") as store:
        assert store.labels["age"].tolist() == [float(number) for number in range(30)]
        assert store.labels["subject"][7] == "s7"
        assert store.meta["source"][3] == "photos/0003.png"
        assert store.dtype == "float16"
        assert store.provenance["model"]["encoder"] == "target"
        assert store.provenance["inputs"] == Crops.open(work / "crops").inputs()
        assert store.provenance["preprocessing"]["image_size"] == 64


def test_a_model_without_class_token_writes_no_cls(work):
    make_run(work / "plain", class_token=False)
    embed(work, model="plain")
    with FeatureStore.open(work / "features.h5") as store:
        assert (store.has("cls"), store.has("mean")) == (False, True)


def test_again_it_embeds_only_what_is_new(work):
    embed(work)
    with FeatureStore.open(work / "features.h5") as store:
        before = store.read("mean")
    stamp = (work / "features.h5").stat().st_mtime_ns
    assert embed(work)["embedded"] == 0
    assert (work / "features.h5").stat().st_mtime_ns == stamp
    write_crops(work / "more", 5, size=64, seed=1)
    assert embed(work, "crops", "more") == {"crops": 35, "embedded": 5, "unreadable": 0}
    with FeatureStore.open(work / "features.h5") as store:
        assert np.array_equal(store.read("mean")[:30], before)
        assert list(store.ids) == Crops.open(work / "crops", work / "more").ids
        assert np.isnan(store.labels["age"][30:]).all()


def test_another_model_or_option_is_refused(work):
    embed(work)
    make_run(work / "other", seed=1)
    for options in ({"model": "other"}, {"encoder": "source"}, {"patches": True}, {"dtype": "float32"}):
        with pytest.raises(OutputError, match="--overwrite"):
            embed(work, **options)
    write_crops(work / "elsewhere", 5, size=64, seed=9)
    with pytest.raises(OutputError, match="holds other crops"):
        embed(work, "elsewhere")
    assert embed(work, "elsewhere", product={"overwrite": True})["crops"] == 5


def test_unreadable_crops_are_left_out_and_counted(work, capsys):
    (work / "crops" / "images" / "0004.jpg").write_bytes(b"\xff\xd8broken")
    assert embed(work) == {"crops": 29, "embedded": 29, "unreadable": 1}
    with FeatureStore.open(work / "features.h5") as store:
        assert store.labels["age"].tolist() == [float(number) for number in range(30) if number != 4]
    assert "0004.jpg" in capsys.readouterr().err
    for path in (work / "crops" / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(NoInputError):
        embed(work, product={"out": str(work / "none.h5")})
    assert not (work / "none.h5").exists()


def test_what_is_no_model_is_said(work):
    with pytest.raises(NoInputError, match="no such run"):
        embed(work, model="nowhere")
    with pytest.raises(NoInputError, match="no run folder"):
        embed(work, model="crops")
    Run.create(work / "unfinished", {"mask": "stripes"})
    with pytest.raises(NoInputError, match="--resume -o"):
        embed(work, model="unfinished")
    description = json.loads((work / "run" / "model.json").read_text())
    (work / "run" / "model.json").write_text(json.dumps({**description, "version": 99}))
    with pytest.raises(UsageError, match="newer mefem"):
        embed(work)


def test_weights_that_do_not_fit_are_named(work):
    make_run(work / "plain", class_token=False)
    shutil.copy(work / "plain" / "model.safetensors", work / "run" / "model.safetensors")
    with pytest.raises(OutputError, match="cls_token"):
        embed(work)
    (work / "run" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(NoInputError, match="safetensors"):
        embed(work)


def test_limit_takes_the_first_crops(work):
    assert embed(work, product={"limit": 4})["crops"] == 4


@pytest.mark.parametrize("batch_size", ["0", "-3", "many"])
def test_impossible_batches_are_refused(work, batch_size):
    with pytest.raises(UsageError, match="--batch-size"):
        embed(work, machine={"batch_size": batch_size})
