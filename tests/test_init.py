"""--init: what is read from files of others, what of it is loaded, what is said, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from synthetic import write_crops

from mefem_cli import main, parts
from mefem_cli.backbones import _initial, vit
from mefem_cli.engine import checkpoint
from mefem_cli.errors import NoInputError, OutputError
from mefem_cli.objectives import mefem

NAME, SHAPE = "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}
OPTIONS = vit.Options(backbone=NAME, image_size=64, **SHAPE)


def timm_vit(class_token: bool = True, **changes) -> torch.nn.Module:
    """An encoder made and initialised by timm alone, with learned positions."""
    settings = {"img_size": 64, **SHAPE, "num_classes": 0, "class_token": class_token, "global_pool": "", **changes}
    torch.manual_seed(1)
    model = timm.create_model(NAME, **settings).eval()
    for name, values in model.named_parameters():  # nothing stays at its neutral value
        if values.requires_grad and "norm" not in name:
            torch.nn.init.normal_(values, std=0.05)
    return model


def objective_of(options: vit.Options = OPTIONS, **changes) -> mefem.MeFEm:
    torch.manual_seed(2)
    options_of_objective = mefem.Options(ema="0.9:1", predictor_depth=1, **{"mask": "quadrants", **changes})
    encoder = vit.build(options, mefem.wants_class_token(options_of_objective))
    return mefem.build(options_of_objective, encoder, parts.Given({}))


def images(size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def timm_features(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    with torch.no_grad():
        return model.forward_features((pictures / 255 - mean) / std)


def our_features(encoder: vit.ViTEncoder, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder(encoder.patchify(pictures))


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.half() for name, values in state.items()}


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "arch": NAME, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "data parallel": lambda state: {"model": {f"module.{name}": one for name, one in state.items()}},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": one for name, one in state.items()}},
    "teacher and student": lambda state: {
        part: {f"backbone.{name}": one * scale for name, one in state.items()}
        for part, scale in (("student", 0.0), ("teacher", 1.0))
    },
    "ema": lambda state: {"state_dict": {name: one * 0 for name, one in state.items()}, "state_dict_ema": state},
    "half": half,
    "bfloat16": lambda state: {name: one.bfloat16() for name, one in state.items()},
}


FLAT = ("bare", "half", "bfloat16")  # safetensors files do not nest
KINDS = [(wrapper, kind) for wrapper in WRAPPERS for kind in ("zip", "legacy")] + [(one, "safetensors") for one in FLAT]


@pytest.mark.parametrize(("wrapper", "kind"), KINDS)
def test_weights_with_timms_names_give_timms_features(wrapper, kind, tmp_path):
    """Learned positions included: both encoders compute what timm's own model computes with these weights."""
    model, path = timm_vit(), tmp_path / "weights"
    content = WRAPPERS[wrapper](model.state_dict())
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    objective = objective_of()
    start = _initial.start(objective, path)
    exact = wrapper not in ("half", "bfloat16")
    for encoder in objective.encoders().values():
        torch.testing.assert_close(
            our_features(encoder, images()), timm_features(model, images()), atol=1e-4 if exact else 0.1, rtol=1e-3
        )
        assert all(values.dtype == torch.float32 for values in encoder.state_dict().values())
    assert (start.fit.missing, start.fit.unexpected, start.fit.misshapen) == ([], [], [])
    assert any("no sin-cos" in note for note in start.fit.notes)
    assert not objective.source_encoder.vit.pos_embed.requires_grad
    assert start.predictor == "predictor: starts fresh"


def ijepa_checkpoint() -> tuple[dict, torch.nn.Module]:
    """The layout of the I-JEPA code: two encoders and a predictor behind `module.`, no CLS token, sin-cos positions."""
    target, source = timm_vit(class_token=False), timm_vit(class_token=False)
    with torch.no_grad():
        for model, scale in ((target, 1.0), (source, 0.5)):
            model.pos_embed.copy_(vit.sincos_positions(48, 4)[None])
            for name, values in model.named_parameters():
                if name != "pos_embed":
                    values.mul_(scale)
    encoders = {
        part: {f"module.{name}": one for name, one in model.state_dict().items()}
        for part, model in (("encoder", source), ("target_encoder", target))
    }
    predictor = {"module.mask_token": torch.zeros(1, 1, 24), "module.predictor_embed.weight": torch.zeros(24, 48)}
    rest = {"opt": {"state": {}, "param_groups": [{"lr": 0.1}]}, "scaler": None, "epoch": 3, "loss": 0.2, "lr": 0.1}
    return {**encoders, "predictor": predictor, **rest}, target


def test_an_ijepa_checkpoint_starts_both_encoders_from_its_target_encoder(tmp_path):
    content, target = ijepa_checkpoint()
    torch.save(content, tmp_path / "IN1K-vit.pth.tar")
    objective = objective_of(cls_prob=None)
    start = _initial.start(objective, tmp_path / "IN1K-vit.pth.tar")
    for encoder in objective.encoders().values():
        torch.testing.assert_close(our_features(encoder, images()), timm_features(target, images()))
    assert start.prefix == "target_encoder.module."
    assert start.fit.notes == []
    assert len(start.fit.loaded) == len(target.state_dict()) - 1  # positions are there already


def test_a_class_token_that_ijepa_lacks_starts_fresh_and_is_said_to(tmp_path):
    torch.save(ijepa_checkpoint()[0], tmp_path / "ijepa.pth")
    objective, untouched = objective_of(), objective_of()
    start = _initial.start(objective, tmp_path / "ijepa.pth")
    assert start.fit.missing == ["cls_token"]
    assert "CLS token" in "\n".join(start.lines())
    for one, other in ((objective, untouched), (objective.target_encoder, untouched.target_encoder)):
        name = "source_encoder.vit.cls_token" if one is objective else "vit.cls_token"
        assert torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert torch.equal(objective.source_encoder.vit.pos_embed, untouched.source_encoder.vit.pos_embed)


def test_what_does_not_fit_is_counted_and_named(tmp_path):
    """A head, a layer scale, another patch, another grid, a block too many and one too few, whole numbers."""
    state = timm_vit(img_size=96, patch_size=8, depth=3, num_classes=5).state_dict()
    state["blocks.0.ls1.gamma"] = torch.ones(48)
    state["norm.weight"] = torch.ones(48, dtype=torch.int64)
    del state["blocks.1.norm1.bias"]
    torch.save(state, tmp_path / "weights.pth")
    objective, untouched = objective_of(), objective_of().source_encoder.vit.state_dict()
    start = _initial.start(objective, tmp_path / "weights.pth")
    fit = start.fit
    assert fit.missing == ["blocks.1.norm1.bias"]
    assert {name for name in fit.unexpected if not name.startswith("blocks.2.")} == {
        "head.weight",
        "head.bias",
        "blocks.0.ls1.gamma",
    }
    assert sum(name.startswith("blocks.2.") for name in fit.unexpected) == 12
    assert [one.split()[0] for one in fit.misshapen] == ["patch_embed.proj.weight", "norm.weight"]
    assert "[48, 3, 8, 8], here [48, 3, 16, 16]" in fit.misshapen[0]
    assert "another grid" in fit.notes[0]
    now = objective.source_encoder.vit.state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight", "norm.weight", "blocks.1.norm1.bias"):
        assert torch.equal(now[name], untouched[name])
    for name in fit.loaded:
        assert torch.equal(now[name], state[name])
    assert len(fit.loaded) + 3 + 1 == len(now)
    text = "\n".join(start.lines())
    assert "not in the file, as initialised: 1 (blocks.1.norm1.bias)" in text
    assert "that are not used: 15 (" in text
    assert "of another shape, as initialised: 2 (" in text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"embed_dim": 192, "depth": 12, "num_heads": 3}, "type --backbone vit_tiny_patch16_224"),
        ({"embed_dim": 72, "depth": 3}, "type --embed-dim 72 --depth 3"),
        ({"embed_dim": 72, "depth": 1, "patch_size": 8}, "type --embed-dim 72 --depth 1 --patch-size 8"),
    ],
)
def test_another_width_is_refused_with_the_options_that_fit(changes, advice, tmp_path):
    torch.save(timm_vit(**changes).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(OutputError, match="does not fit the options") as caught:
        _initial.start(objective_of(), tmp_path / "weights.pth")
    assert str(caught.value).endswith(advice)
    assert "\n" not in str(caught.value)


# Files that mean harm, or are broken -----------------------------------------------------------------------------


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(how, tmp_path):
    content = {"state_dict": timm_vit().state_dict(), "args": Bomb(tmp_path / "gone-off")}
    if how == "bare pickle":
        (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "gone-off"), protocol=2))
    else:
        torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(NoInputError, match=r"holds posix\.mkdir beside tensors; that is not unpickled") as caught:
        _initial.start(objective_of(), tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gone-off").exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_that_was_cut_off_or_altered_is_one_line(kind, tmp_path):
    state, path = {f"blocks.{n}.x": torch.ones(40) for n in range(4)} | {"patch_embed.proj.weight": torch.ones(9)}, None
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    damaged = [whole[: len(whole) * part // 12] for part in range(12)]
    for position in torch.randint(len(whole), (60,), generator=generator).tolist():
        damaged.append(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            tensors = _initial.read_tensors(path)
            assert number >= 12  # an altered byte may lie in the numbers
            assert all(isinstance(one, torch.Tensor) for one in tensors.values())
        except NoInputError as error:
            assert "\n" not in str(error)


def test_a_small_zip_that_unpacks_to_much_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"patch_embed.proj.weight": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    with pytest.raises(NoInputError, match="compressed"):
        _initial.start(objective_of(), tmp_path / "small.pth")


def test_tensors_that_claim_to_be_huge_cost_nothing_and_do_not_fit(tmp_path):
    state = timm_vit().state_dict()
    state["norm.weight"] = torch.zeros(1).expand(1 << 50)
    state["pos_embed"] = torch.zeros(1).expand(1, 1 << 40, 48)
    torch.save(state, tmp_path / "weights.pth")
    start = _initial.start(objective_of(), tmp_path / "weights.pth")
    assert start.fit.misshapen == [f"norm.weight [{1 << 50}], here [48]"]
    assert "another grid" in start.fit.notes[0]


def test_dicts_that_hold_themselves_end(tmp_path):
    inner: dict = {"model": timm_vit().state_dict()}
    inner["again"] = inner
    layer = inner
    for _ in range(5):
        layer = {f"{number}": layer for number in range(2000)}
    torch.save(layer, tmp_path / "weights.pth")
    with pytest.raises(NoInputError, match="no encoder with timm's names"):  # nested deeper than anyone does
        _initial.start(objective_of(), tmp_path / "weights.pth")
    torch.save(inner, tmp_path / "weights.pth")
    assert _initial.start(objective_of(), tmp_path / "weights.pth").prefix == "model."


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    state = timm_vit().state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 3] = float("nan")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(NoInputError, match=r"blocks\.1\.mlp\.fc1\.weight holds numbers that are not finite"):
        _initial.start(objective_of(), tmp_path / "weights.safetensors")


def test_what_is_no_encoder_is_said_to_be_none(tmp_path):
    torch.save({"\x1b[2J\n" + "x" * 500: torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(NoInputError, match="no encoder with timm's names") as caught:
        _initial.start(objective_of(), tmp_path / "other.pth")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(NoInputError, match="holds a list"):
        _initial.start(objective_of(), tmp_path / "list.pth")
    (tmp_path / "page.html").write_text("<html>404</html>")
    with pytest.raises(NoInputError, match="cannot be read as a safetensors or torch file"):
        _initial.start(objective_of(), tmp_path / "page.html")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(NoInputError, match="--init"):
            _initial.start(objective_of(), path)


# A run starts from another -----------------------------------------------------------------------------------------

TINY = f"--backbone {NAME} --depth 1 --embed-dim 24 --num-heads 2 --image-size 32 --patch-size 8 --width 1"
TINY += " --predictor-depth 1 --precision fp32 --batch-size 16 --workers 1"


def pretrain(*words: str | Path) -> None:
    main.dispatch(["pretrain", *TINY.split(), *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Crops, and a run `first` on them whose two encoders and predictor differ from their beginning."""
    folder = tmp_path_factory.mktemp("init")
    write_crops(folder / "crops", 48, size=32)
    pretrain(folder / "crops", "-o", folder / "first", "--epochs", "2")
    return folder


def weights_of(run: Path, part: str) -> dict[str, torch.Tensor]:
    state = checkpoint.load(run / "last.ckpt")["objective"]
    return {name.removeprefix(part): one for name, one in state.items() if name.startswith(part)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("file", ["", "model.safetensors", "source.safetensors", "last.ckpt"])
def test_a_run_starts_from_the_encoder_and_the_predictor_of_another(folder, file, capsys):
    out = folder / f"second-{file}"
    pretrain(folder / "crops", "-o", out, "--epochs", "0", "--seed", "7", "--init", folder / "first" / file)
    expected = load_file(folder / "first" / ("source.safetensors" if "source" in file else "model.safetensors"))
    assert equal(load_file(out / "model.safetensors"), expected)
    assert equal(load_file(out / "source.safetensors"), expected)
    assert equal(weights_of(out, "predictor."), weights_of(folder / "first", "predictor."))
    config = yaml.safe_load((out / "config.yaml").read_text())
    weights = folder / "first" / (file or "model.safetensors")
    assert config["init_sha256"] == _initial.product.file_sha256(weights)
    assert config["init"] == str(folder / "first" / file).rstrip("/")
    described = json.loads((out / "model.json").read_text())
    assert described["provenance"]["inputs"][config["init"]] == config["init_sha256"]
    err = capsys.readouterr().err
    assert f"starts from {weights}" in err
    assert f"predictor: from {folder / 'first' / 'last.ckpt'}" in err
    assert "starts from" in (out / "run.log").read_text()


def test_a_predictor_of_another_size_starts_fresh_and_is_said_to(folder, capsys):
    for name, words in (("plain", ()), ("from-first", ("--init", folder / "first"))):
        pretrain(folder / "crops", "-o", folder / name, "--epochs", "0", "--predictor-depth", "2", *words)
    assert "predictor: starts fresh, as the one in" in capsys.readouterr().err
    assert equal(weights_of(folder / "plain", "predictor."), weights_of(folder / "from-first", "predictor."))


def test_other_heads_are_refused_though_the_shapes_are_equal(folder):
    with pytest.raises(OutputError, match="type --num-heads 2"):
        pretrain(folder / "crops", "-o", folder / "heads", "--num-heads", "4", "--init", folder / "first")
    assert not (folder / "heads").exists()


def test_a_resumed_run_does_not_read_the_file_again(folder, capsys):
    """It is gone by then. Before the first checkpoint it is wanted, and has to be the same one."""
    save_file(load_file(folder / "first" / "model.safetensors"), folder / "weights.safetensors")
    out = folder / "stopped"
    pretrain(folder / "crops", "-o", out, "--epochs", "1", "--init", folder / "weights.safetensors")
    (folder / "weights.safetensors").unlink()
    capsys.readouterr()
    pretrain("--resume", "-o", out, "--epochs", "2")
    assert "starts from" not in capsys.readouterr().err
    described = json.loads((out / "model.json").read_text())
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert described["provenance"]["inputs"][config["init"]] == config["init_sha256"]
    (out / "model.json").unlink()
    with pytest.raises(OutputError, match="init was"):
        pretrain("--resume", "-o", out, "--init", folder / "first")
    (out / "last.ckpt").unlink()
    with pytest.raises(NoInputError, match="no such file"):
        pretrain("--resume", "-o", out)
    save_file(load_file(folder / "first" / "source.safetensors"), folder / "weights.safetensors")
    with pytest.raises(OutputError, match="init-sha256 was"):
        pretrain("--resume", "-o", out)
