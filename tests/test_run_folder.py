"""The run folder as a place: what replaces what, who may write, the link to the last run, and who may read."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from synthetic import write_crops

from mefem_cli.engine import checkpoint
from mefem_cli.errors import OutputError, UsageError
from mefem_cli.parts import Given
from mefem_cli.pretraining import Job
from mefem_cli.stores import runs
from mefem_cli.stores.runs import Run

TINY = {
    "backbone": "vit_tiny_patch16_224",
    "depth": "1",
    "embed_dim": "24",
    "num_heads": "3",
    "image_size": "32",
    "patch_size": "8",
    "predictor_depth": "1",
    "batch_size": "20",
    "device": "cpu",
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def crops_folder(tmp_path_factory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data") / "crops", 40, size=32)


@pytest.fixture(scope="module")
def trained(crops_folder, tmp_path_factory) -> Path:
    """A finished run of two epochs; copy it to change it."""
    return pretrain([crops_folder], out=tmp_path_factory.mktemp("runs") / "trained", epochs="2").path


def pretrain(folders: list[Path], **options) -> Run:
    options = {name: str(value) for name, value in options.items()}
    given = Given({**({} if "resume" in options else TINY), **options})
    job = Job.prepare(folders, given, given.build("stores.product", "ProductOptions"))
    job.train()
    return job.run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_resume_that_is_refused_leaves_the_finished_run_as_it_was(trained):
    before = contents(trained)
    with pytest.raises(OutputError, match="--epochs 1; type a larger number"):
        pretrain([], out=trained, resume="true", epochs="1")
    assert contents(trained) == before

    damaged = trained.with_name("damaged")
    shutil.copytree(trained, damaged)
    last = damaged / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    before = contents(damaged)
    with pytest.raises(OutputError, match="damaged"):
        pretrain([], out=damaged, resume="true", epochs="3")
    assert contents(damaged) == before


def test_the_link_to_the_last_run_is_no_place_for_a_run_but_a_name_for_one(crops_folder, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for place in (tmp_path / "latest", tmp_path / "runs" / "latest"):
        with pytest.raises(UsageError, match="kept for a link"):
            pretrain([crops_folder], out=place, epochs="1", overwrite="true")
        assert not place.exists()
    Run(run).become_latest()
    longer = pretrain([], out=tmp_path / "latest", resume="true", epochs="3")
    assert longer.path == run
    assert (run / "model.json").is_file()
    longer.become_latest()
    assert os.readlink(tmp_path / "latest") == "run"


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    """torch says `[enforce fail at inline_container.cc:671] . unexpected pos 2752000 vs 2751888`."""

    def fail(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2 vs 1")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match="cannot be written .the disk seems full.; free some space and type --resume"):
        checkpoint.save(tmp_path / "last.ckpt", {})


def test_resume_by_itself_takes_runs_and_neither_links_nor_what_was_set_aside(tmp_path):
    for name in ("old", ".old.replaced"):
        Run.create(tmp_path / name, {"crops": []})
    (tmp_path / "latest").symlink_to("old")
    assert runs.newest_unfinished(tmp_path) == tmp_path / "old"


def test_an_overwritten_run_is_kept_until_the_new_one_is_finished(crops_folder, trained, tmp_path, capsys, monkeypatch):
    run, aside = tmp_path / "run", tmp_path / ".run.replaced"
    shutil.copytree(trained, run)
    before = contents(run)

    def fail(job, folder):
        raise OSError(28, "No space left on device")

    for epochs in ("1", "3"):  # the second replaces one that never finished
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(Job, "save_encoders", fail)
            pretrain([crops_folder], out=run, epochs=epochs, overwrite="true")
        assert f"kept as {aside} until this one is finished" in capsys.readouterr().err
        assert contents(aside) == before
        assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == int(epochs)
        assert not Run(run).is_finished
    pretrain([], out=run, resume="true")
    assert Run(run).is_finished
    assert not aside.exists()


def test_only_runs_are_replaced_and_that_is_told_before_training(crops_folder, trained, tmp_path):
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "me.jpg").write_bytes(b"precious")
    given = Given({**TINY, "out": str(mine), "overwrite": "true", "dry_run": "true"})
    with pytest.raises(OutputError, match="name another -o"):
        Job.prepare([crops_folder], given, given.build("stores.product", "ProductOptions"))
    (tmp_path / ".run.replaced").mkdir()
    (tmp_path / ".run.replaced" / "me.jpg").write_bytes(b"precious")
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(OutputError, match="name another -o"):
        runs.set_aside(tmp_path / "run")
    assert (tmp_path / ".run.replaced" / "me.jpg").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert runs.set_aside(empty) is None


def test_a_run_is_trained_by_one_job_at_a_time(crops_folder, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = contents(run)
    with Run(run).locked():
        for options in ({"resume": "true", "epochs": "3"}, {"overwrite": "true"}):
            with pytest.raises(OutputError, match="another mefem pretrain is at work there"):
                pretrain([] if "resume" in options else [crops_folder], out=run, **options)
            assert contents(run) == before
    pretrain([], out=run, resume="true", epochs="3")


def test_encoders_may_be_read_by_whom_other_files_of_the_run_may_be_read(trained):
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in trained.iterdir() if path.is_file()}
    assert set(modes) >= {"model.safetensors", "source.safetensors", "last.ckpt"}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize(("options", "why"), [({}, "40 faces are too few"), ({"monitor": "3"}, "--monitor 3 is fewer")])
def test_a_run_that_nobody_watches_says_so_in_words(crops_folder, tmp_path, capsys, options, why):
    run = pretrain([crops_folder], out=tmp_path / "run", epochs="1", **options)
    assert f"warning: nothing will tell whether this run is healthy: {why}" in capsys.readouterr().err
    page = (run.path / "report.html").read_text()
    assert why in page
    assert "Not measured" in page


def test_a_limit_that_leaves_nothing_of_a_folder_says_so(crops_folder, tmp_path, capsys):
    other = write_crops(tmp_path / "other", 5, size=32, seed=1)
    pretrain([crops_folder, other], out=tmp_path / "run", epochs="0", limit="40")
    assert f"--limit 40 takes the first crops, and none of {other}" in capsys.readouterr().err
    pretrain([crops_folder, other], out=tmp_path / "run2", epochs="0", limit="41")
    assert "--limit" not in capsys.readouterr().err
