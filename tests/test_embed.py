"""`mefem embed`: features against plain timm, stores that grow, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from synthetic import write_crops, write_run

from mefem_cli import console, main, store_tools
from mefem_cli.backbones import vit
from mefem_cli.backbones._frozen import FrozenEncoder, Loaded, Preprocessing
from mefem_cli.embedding import EmbedOptions, Job, out_paths
from mefem_cli.engine import distributed
from mefem_cli.engine.device import DeviceOptions
from mefem_cli.engine.encode import Encoding
from mefem_cli.engine.stream import decode
from mefem_cli.errors import MefemError, NoInputError, OutOfMemory, OutputError, Stopped, UsageError
from mefem_cli.stores import feature_parts
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.feature_parts import Parts, begun
from mefem_cli.stores.features import FeatureStore
from mefem_cli.stores.product import ProductOptions
from mefem_cli.stores.runs import Run


@pytest.fixture
def work(tmp_path) -> Path:
    subjects = [f"s{number}" for number in range(30)]
    write_crops(tmp_path / "crops", 30, size=64, age=[float(number) for number in range(30)], subject=subjects)
    write_run(tmp_path / "run")
    return tmp_path


def embed(work: Path, *folders: str, product: dict | None = None, machine: dict | None = None, **options) -> dict:
    """Embed with one encoder and return its counts."""
    (done,) = job(work, *folders, product=product, machine=machine, **options).run()
    return {"crops": done.crops, "embedded": done.embedded, "unreadable": done.unreadable}


def job(work: Path, *folders: str, product: dict | None = None, machine: dict | None = None, **options) -> Job:
    models, world = options.pop("model", "run"), options.pop("world", None)
    specs = [str(work / one) for one in ([models] if isinstance(models, str) else models)]
    chosen = EmbedOptions(model=specs, **options)
    settings = {"precision": "fp32", **(machine or {})}
    product_options = ProductOptions(**{"out": str(work / "features.h5"), **(product or {})})
    crops = [work / folder for folder in folders or ("crops",)]
    return Job.prepare(crops, chosen, DeviceOptions(**settings), product_options, world=world)


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
    write_run(work / "plain", class_token=False)
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
    write_run(work / "other", seed=1)
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
    write_run(work / "plain", class_token=False)
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


# Several encoders -----------------------------------------------------------------------------------------------------


def test_several_encoders_read_crops_once_and_get_a_store_each(work, monkeypatch):
    write_run(work / "other", seed=1, class_token=False)
    reads = []
    read = Crops.read_bytes
    monkeypatch.setattr(Crops, "read_bytes", lambda self, row: (reads.append(row), read(self, row))[1])
    done = job(work, model=["run", "other"], product={"out": str(work / "both")}).run()
    assert [one.out for one in done] == [work / "both" / "run.h5", work / "both" / "other.h5"]
    assert sorted(reads) == list(range(30))
    for name, one in zip(("run", "other"), done, strict=True):
        embed(work, model=name, product={"out": str(work / "alone.h5"), "overwrite": True})
        assert contents(one.out) == contents(work / "alone.h5")


def test_an_encoder_that_has_some_of_the_crops_gets_the_others_only(work):
    write_run(work / "other", seed=1)
    embed(work, product={"out": str(work / "both" / "run.h5"), "limit": 10})
    done = job(work, model=["run", "other"], product={"out": str(work / "both")}).run()
    assert [(one.crops, one.embedded) for one in done] == [(30, 20), (30, 30)]
    with FeatureStore.open(done[0].out) as store:
        assert list(store.ids) == Crops.open(work / "crops").ids


def test_where_several_stores_go(work):
    assert out_paths("a.h5", [{"name": "x"}]) == [Path("a.h5")]
    same = [{"name": "m", "sha256": "1" * 64}, {"name": "m", "sha256": "2" * 64}]
    assert out_paths("to/", same) == [Path("to/m-11111111.h5"), Path("to/m-22222222.h5")]
    with pytest.raises(UsageError, match=r"name a folder or a pattern, a-\{model\}\.h5"):
        out_paths("a.h5", same)
    with pytest.raises(UsageError, match="named twice"):
        job(work, model=["run", "run"], product={"out": str(work / "both")})


class Bright(FrozenEncoder):
    """Gives the mean of each colour: anybody can compute that."""

    def __init__(self, preprocessing: Preprocessing, factor: float = 1.0):
        super().__init__()
        self.preprocessing, self.factor = preprocessing, factor
        self.embed_dim, self.num_patches, self.class_token, self.has_mean = 3, 0, True, False

    def features(self, images):
        return {"cls": images.float().mean((2, 3)) * self.factor}


def use(monkeypatch, **encoders: FrozenEncoder) -> None:
    """Stand for the encoders of a run with these, by the run's name."""

    def load(spec, encoder=None, given=None):
        name = Path(spec).name
        return Loaded(encoders[name], name, None, spec)

    monkeypatch.setattr("mefem_cli.backbones._frozen.load", load)


def test_each_encoder_sees_its_own_size_and_filter(work, monkeypatch):
    from PIL import Image

    sizes = {"small": Preprocessing(32, (0,), (1,), "bilinear"), "large": Preprocessing(96, (0,), (1,), "bicubic")}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in sizes}

    class Watching(Bright):
        def features(self, images):
            seen[self.name].append(images.permute(0, 2, 3, 1).numpy().copy())
            return super().features(images)

    encoders = {name: Watching(preprocessing) for name, preprocessing in sizes.items()}
    for name, encoder in encoders.items():
        encoder.name = name
    use(monkeypatch, **encoders)
    job(work, model=[*sizes], product={"out": str(work / "both")}).run()
    crops = Crops.open(work / "crops")
    for name, preprocessing in sizes.items():
        how, side = Image.Resampling[preprocessing.interpolation.upper()], preprocessing.image_size
        pictures = [Image.fromarray(decode(crops.read_bytes(row), 64)).resize((side, side), how) for row in range(30)]
        assert np.array_equal(np.concatenate(seen[name]), np.stack([np.asarray(one) for one in pictures]))
        with FeatureStore.open(work / "both" / f"{name}.h5") as store:
            assert store.provenance["preprocessing"]["interpolation"] == preprocessing.interpolation


def test_faces_are_aligned_where_the_encoder_wants_it_and_refused_without_keypoints(work, monkeypatch):
    use(monkeypatch, run=Bright(Preprocessing(112, (0,), (1,), "bilinear", "arcface")))
    with pytest.raises(NoInputError, match=r"keypoints.* 30 of 30 crops .*mefem crop"):
        job(work)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_an_overflow_names_the_crop_its_source_and_what_to_type(work, monkeypatch):
    use(monkeypatch, run=Bright(Preprocessing(64, (0,), (1,)), factor=1e4))
    with pytest.raises(OutputError, match=r"crop [0-9a-f]{16} \(photos/00\d\d.png\): .*--dtype float32 --overwrite"):
        embed(work)
    assert not (work / "features.h5").exists()
    assert embed(work, dtype="float32", product={"overwrite": True})["crops"] == 30


def test_a_run_that_failed_before_its_first_part_holds_nobody_up(work, monkeypatch):
    use(monkeypatch, run=Bright(Preprocessing(64, (0,), (1,)), factor=1e4))
    with pytest.raises(OutputError, match="float16"):
        embed(work)
    assert not list(feature_parts.folder_of(work / "features.h5").glob("*.npz"))
    assert embed(work, dtype="float32")["crops"] == 30


def test_the_largest_number_of_float16_is_no_overflow(work, monkeypatch):
    class Constant(Bright):
        def features(self, images):
            return {"cls": torch.full((len(images), 3), self.factor)}

    use(monkeypatch, run=Constant(Preprocessing(64, (0,), (1,)), factor=65519.0))  # rounds to 65504
    assert embed(work)["crops"] == 30
    use(monkeypatch, run=Constant(Preprocessing(64, (0,), (1,)), factor=65520.0))  # rounds to infinity
    with pytest.raises(OutputError, match=r"6.55e\+04, more than float16 holds"):
        embed(work, product={"out": str(work / "more.h5")})
    use(monkeypatch, run=Constant(Preprocessing(64, (0,), (1,)), factor=float("nan")))
    with pytest.raises(NoInputError, match="not finite"):
        embed(work, product={"out": str(work / "nan.h5")}, dtype="float32")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_and_goes_on(work, monkeypatch, capsys, error):
    class Hungry(Bright):
        def features(self, images):
            taken.append(len(images))
            if len(images) > 5:
                raise error
            return super().features(images)

    taken: list[int] = []
    use(monkeypatch, run=Hungry(Preprocessing(64, (0,), (1,))))
    embed(work, machine={"batch_size": "16"})
    assert taken == [16, 8, 4, 4, 4, 4, 4, 4, 4, 2]  # found out once, then 16 and 14 crops
    assert "going on with 4" in capsys.readouterr().err
    use(monkeypatch, run=Bright(Preprocessing(64, (0,), (1,))))
    embed(work, product={"out": str(work / "plenty.h5")})
    assert contents(work / "features.h5") == contents(work / "plenty.h5")


def test_out_of_memory_with_one_face_ends_the_run(work, monkeypatch):
    class Starving(Bright):
        def features(self, images):
            raise torch.OutOfMemoryError("no")

    use(monkeypatch, run=Starving(Preprocessing(64, (0,), (1,))))
    with pytest.raises(OutOfMemory, match="one face at a time"):
        embed(work)


def test_other_errors_of_an_encoder_rise(work, monkeypatch):
    class Wrong(Bright):
        def features(self, images):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    use(monkeypatch, run=Wrong(Preprocessing(64, (0,), (1,))))
    with pytest.raises(RuntimeError, match="mat1"):
        embed(work)


def test_unreadable_crops_are_not_tried_again_until_they_change(work, monkeypatch):
    broken = work / "crops" / "images" / "0004.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    assert embed(work)["unreadable"] == 1
    stamp = (work / "features.h5").stat().st_mtime_ns
    assert embed(work) == {"crops": 29, "embedded": 0, "unreadable": 1}
    assert (work / "features.h5").stat().st_mtime_ns == stamp
    with FeatureStore.open(work / "features.h5") as store:
        assert store.unreadable == {Crops.open(work / "crops").ids[4]: hashlib.sha256(whole[:200]).hexdigest()}
    broken.write_bytes(whole)
    assert embed(work) == {"crops": 30, "embedded": 1, "unreadable": 0}
    with FeatureStore.open(work / "features.h5") as store:
        assert store.unreadable == {}
        assert list(store.labels["age"]) == [*(float(one) for one in range(30) if one != 4), 4.0]


# Stops and processes --------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, list]:
    """All data sets of a store."""
    found: dict[str, list] = {}

    def take(name, node):
        if isinstance(node, h5py.Dataset):
            found[name] = node[()].tolist()

    with h5py.File(path) as file:
        file.visititems(take)
    assert {"id", "mean"} <= found.keys() or "cls" in found
    return json.loads(json.dumps(found, default=bytes.decode))


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mefem_cli.embedding", "timm", "test_embed"])


def in_process(work: Path, at: int, how: str, **options) -> int:
    """Embed in a process that sends itself a signal at a batch, each of which becomes a part; return its exit code."""
    process = CONTEXT.Process(target=_stopped, args=(work, at, how, options))
    process.start()
    process.join(240)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _stopped(work: Path, at: int, how: str, options: dict) -> None:
    torch.set_num_threads(1)
    feature_parts.PART_BYTES = 1
    forward, count = Encoding.__call__, [0]

    def killed(self: Encoding, images: torch.Tensor) -> Any:
        count[0] += 1
        if count[0] == at:
            time.sleep(0.3)  # for the writing thread
            os.kill(os.getpid(), getattr(signal, how))
        return forward(self, images)

    Encoding.__call__ = killed
    try:
        embed(work, machine={"batch_size": "4"}, **options)
    except (MefemError, KeyboardInterrupt) as error:
        os._exit(distributed.exit_code(error))


def _share(work: Path, rank: int, options: dict) -> None:
    torch.set_num_threads(1)
    world = distributed.join(rank, 2, f"file://{work / 'meeting'}")
    console.configure(console.ConsoleOptions(quiet=True))
    forward, encoded = Encoding.__call__, []
    Encoding.__call__ = lambda self, images: (encoded.append(len(images)), forward(self, images))[1]
    done = [asdict(one) for one in job(work, world=world, **options).run()]
    (work / f"{rank}.json").write_text(json.dumps([done, sum(encoded)], default=str))
    torch.distributed.destroy_process_group()


def command(work: Path, monkeypatch, *words: str) -> int:
    """Run `mefem embed` in this process and return its exit code."""
    line = ["mefem", "embed", "crops", "--model", "run", "--precision", "fp32", "--batch-size", "4", *words]
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as end:
        main.main()
    console.configure(console.ConsoleOptions())
    return int(end.value.code or 0)


def test_killed_and_run_again_it_makes_the_store_of_an_undisturbed_run(work):
    (work / "crops" / "images" / "0001.jpg").write_bytes(b"\xff\xd8broken")
    assert in_process(work, 5, "SIGKILL", patches=True) == -signal.SIGKILL
    assert not (work / "features.h5").exists()
    folder = feature_parts.folder_of(work / "features.h5")
    kept = Parts(folder)
    assert 4 <= len(kept) < 29 and len(kept.unreadable) == 1
    with pytest.raises(OutputError, match="was begun differently: dtype was float16, is float32.*--overwrite"):
        embed(work, patches=True, dtype="float32", machine={"batch_size": "4"})
    done = embed(work, patches=True, machine={"batch_size": "4"})
    assert done == {"crops": 29, "embedded": 29 - len(kept), "unreadable": 1}
    assert not folder.exists()
    embed(work, patches=True, machine={"batch_size": "4"}, product={"out": str(work / "whole.h5")})
    assert contents(work / "features.h5") == contents(work / "whole.h5")


def test_killed_while_it_appends_it_leaves_the_old_store(work):
    embed(work, product={"limit": 10}, machine={"batch_size": "4"})
    before = (work / "features.h5").read_bytes()
    assert in_process(work, 3, "SIGKILL") == -signal.SIGKILL
    assert (work / "features.h5").read_bytes() == before
    assert embed(work, machine={"batch_size": "4"})["crops"] == 30
    embed(work, product={"out": str(work / "whole.h5")}, machine={"batch_size": "4"})
    assert np.allclose(
        FeatureStore.open(work / "features.h5").read("cls"), FeatureStore.open(work / "whole.h5").read("cls")
    )


def test_a_signal_stops_between_batches_and_keeps_what_is_done(work):
    assert in_process(work, 3, "SIGTERM") == Stopped.exit_code
    assert len(Parts(feature_parts.folder_of(work / "features.h5"))) == 12
    assert in_process(work, 2, "SIGINT") == 130
    assert embed(work)["embedded"] == 30 - 20


def test_two_processes_make_the_store_of_one(work):
    (work / "crops" / "images" / "0004.jpg").write_bytes(b"\xff\xd8broken")
    processes = [CONTEXT.Process(target=_share, args=(work, rank, {"patches": True})) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    ((done,), first), (nothing, second) = (json.loads((work / f"{rank}.json").read_text()) for rank in range(2))
    assert (done["crops"], done["embedded"], nothing) == (29, 29, [])
    assert (first, second) == (14, 15)  # of 30, one of the first half is broken
    assert not feature_parts.folder_of(work / "features.h5").exists()
    embed(work, patches=True, product={"out": str(work / "one.h5")}, machine={"batch_size": "4"})
    one, two = contents(work / "one.h5"), contents(work / "features.h5")
    assert one["id"] == two["id"] and one["labels/age"] == two["labels/age"]
    for kind in ("cls", "mean", "patches"):
        assert np.allclose(one[kind], two[kind], atol=2e-3)


def test_two_runs_do_not_write_one_store(work):
    with (
        begun(work / "features.h5", job(work).embeddings[0].plan(), False),
        pytest.raises(OutputError, match="another mefem embed writes it now"),
    ):
        embed(work)


def test_a_part_that_a_power_cut_damaged_is_embedded_anew(work, capsys):
    in_process(work, 5, "SIGKILL")
    folder = feature_parts.folder_of(work / "features.h5")
    first, *_ = sorted(folder.glob("*.npz"))
    first.write_bytes(first.read_bytes()[:300])
    assert embed(work)["crops"] == 30
    assert "is damaged" in capsys.readouterr().err


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_store(work, monkeypatch, capfd):
    write_run(work / "other", seed=1)
    assert command(work, monkeypatch, "--model", "other", "-o", "{model}-f.h5", "-q") == 0
    assert capfd.readouterr() == (f"{work / 'run-f.h5'}\n{work / 'other-f.h5'}\n", "")


def test_options_without_effect_are_told(work, monkeypatch, capfd):
    assert command(work, monkeypatch, "--projected") == 0
    assert "--projected has no effect here" in capfd.readouterr().err


def test_a_dry_run_touches_nothing(work, monkeypatch, capfd):
    before = sorted(work.rglob("*"))
    assert command(work, monkeypatch, "-n", "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert (plan["crops"], plan["to_embed"], plan["estimated_bytes"]) == (30, 30, 30 * 2 * 48 * 2)
    assert sorted(work.rglob("*")) == before


@pytest.mark.slow
def test_gpus_starts_processes_and_prints_one_line(work):
    line = ["embed", "crops", "--model", "run", "--gpus", "2", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "mefem_cli", *line],
        cwd=work,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["embedded"] == 30


def test_labels_joined_later_stay_when_crops_come_in(work):
    embed(work, product={"limit": 10})
    (work / "bmi.csv").write_text("path,bmi\n" + "".join(f"{number:04d}.png,{number + 20}\n" for number in range(10)))
    store_tools.attach(work / "features.h5", work / "bmi.csv", None, None)
    embed(work)
    with FeatureStore.open(work / "features.h5") as store:
        assert store.labels["bmi"][:10].tolist() == [float(number + 20) for number in range(10)]
        assert np.isnan(store.labels["bmi"][10:]).all()
        assert store.labels["age"][29] == 29


def test_features_that_wait_for_the_disk_do_not_keep_all_tokens_in_memory(work):
    encoding = job(work, dtype="float32").embeddings[0].encoding
    values = encoding(torch.zeros(4, 3, 64, 64, dtype=torch.uint8)).values
    for kind, one in values.items():
        assert one.untyped_storage().nbytes() == 4 * 48 * 4, kind


def test_a_part_serves_only_crops_of_the_same_bytes(tmp_path):
    writer = feature_parts.PartWriter(tmp_path)
    writer.append(["a", "b"], ["1" * 64, "2" * 64], {"cls": np.ones((2, 3), np.float16)})
    writer.flush()
    writer.append(["a"], ["3" * 64], {"cls": np.ones((1, 3), np.float16)})
    writer.flush()
    parts = Parts(tmp_path)
    ids, digests = ["b", "a", "a", "b", "c"], ["2" * 64, "3" * 64, "1" * 64, "1" * 64, "1" * 64]
    assert parts.locate(ids, digests).tolist() == [1, 2, 0, -1, -1]
