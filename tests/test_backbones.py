"""Encoders of others: the features that their own code gives for their own files, and what is said of other files."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm as timm_library
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from mefem_cli import console, parts
from mefem_cli.backbones import _frozen, _tensors, _tokens, farl, franca, hf, timm, vit
from mefem_cli.errors import MefemError, NoInputError, UsageError
from mefem_cli.stores.runs import Run

WIDTH, DEPTH, HEADS, GRID = 128, 3, 2, 4
TOLERANCE = {"atol": 1e-4, "rtol": 0}
SHAPES = Path(__file__).parents[2] / "shared" / "checkpoints"


def given(**values: object) -> parts.Given:
    return parts.Given({name: str(value) for name, value in values.items()})


def images(size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def normalised(pictures: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pictures.double() / 255 - torch.tensor(mean).view(3, 1, 1)).div(torch.tensor(std).view(3, 1, 1)).float()


def random_like(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Nothing at a neutral value, so that what is left out or swapped shows; layers keep the size of what they get."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in shapes.items():
        is_matrix = len(shape) > 1 and name.endswith("weight")
        scale = (shape[0] / torch.Size(shape).numel()) ** 0.5 if is_matrix else 0.3
        neutral = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        tensors[name] = torch.randn(shape, generator=generator) * scale + neutral
    return tensors


def randomised(network: nn.Module) -> nn.Module:
    shapes = {name: tuple(one.shape) for name, one in network.state_dict().items()}
    network.load_state_dict(random_like(shapes))
    return network.eval()


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_tokens(encoder: _frozen.FrozenEncoder, pictures: torch.Tensor, tokens: torch.Tensor, has_cls: bool) -> None:
    """All features of an encoder against the reference's tokens after its last norm [B, (1 +) T, D]."""
    with torch.no_grad():
        features = encoder.features(pictures)
    patches = tokens[:, int(has_cls) :]
    torch.testing.assert_close(features["patches"], patches, **TOLERANCE)
    torch.testing.assert_close(features["mean"], patches.mean(1), **TOLERANCE)
    assert ("cls" in features) == has_cls == encoder.class_token
    if has_cls:
        torch.testing.assert_close(features["cls"], tokens[:, 0], **TOLERANCE)
    assert features["patches"].shape[1:] == (encoder.num_patches, encoder.embed_dim)
    assert all(values.dtype == torch.float32 for values in features.values())
    assert features["patches"].std() > 0.1


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    path = SHAPES / name
    if not path.is_file():
        pytest.skip(f"there is no list of tensors in {path}")
    return {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}


# FaRL ----------------------------------------------------------------------------------------------------------------


def clip_shapes(width: int = WIDTH, depth: int = DEPTH, grid: int = GRID) -> dict[str, tuple[int, ...]]:
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
    }
    norms = {f"ln_{one}.{kind}": (width,) for one in ("pre", "post") for kind in ("weight", "bias")}
    return {
        "class_embedding": (width,),
        "positional_embedding": (grid**2 + 1, width),
        "proj": (width, 48),
        "conv1.weight": (width, 3, 16, 16),
        **norms,
        **{f"transformer.resblocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
    }


def clip_tokens(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """CLIP's visual tower after ln_post, written from its description with torch's own attention."""
    width = len(state["class_embedding"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    x = functional.conv2d(x, state["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], dim=1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for number in range(sum(name.endswith("ln_1.weight") for name in state)):
        block = f"transformer.resblocks.{number}"
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        beginning = f"{block}.attn."
        attention.load_state_dict(
            {name.removeprefix(beginning): one for name, one in state.items() if name.startswith(beginning)}
        )
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        hidden = functional.linear(
            norm(x, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"]
        )
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
        x = x + functional.linear(hidden, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return norm(x, "ln_post").detach()


def farl_file(path: Path, **others: torch.Tensor) -> tuple[dict[str, torch.Tensor], Path]:
    state = random_like(clip_shapes())
    content = {**{f"visual.{name}": one for name, one in state.items()}, **others}
    return state, saved({"state_dict": content}, path)


def test_farl_gives_what_clips_visual_tower_gives(tmp_path):
    state, path = farl_file(
        tmp_path / "FaRL-ep16.pth", logit_scale=torch.ones(()), **{"ln_final.weight": torch.ones(8)}
    )
    loaded = _frozen.load(f"farl:{path}")
    pictures = images(16 * GRID)
    expected = clip_tokens(state, normalised(pictures, farl.CLIP_MEAN, farl.CLIP_STD))
    assert_tokens(loaded.encoder, pictures, expected, has_cls=True)
    assert (loaded.name, loaded.weights, loaded.spec) == ("farl:FaRL-ep16", path, f"farl:{path}")
    assert loaded.details == {
        "part": "state_dict.visual.",
        "projected": False,
        "ignored": {"state_dict.ln_final": 1, "state_dict.logit_scale": 1},
    }
    assert loaded.encoder.preprocessing == _frozen.Preprocessing(
        64, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", "none"
    )
    projected = _frozen.load(f"farl:{path}", None, given(projected="true"))
    assert_tokens(projected.encoder, pictures, expected @ state["proj"], has_cls=True)
    assert projected.encoder.embed_dim == 48 and projected.details["projected"]


def test_farl_gives_what_open_clip_gives(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        transformer = pytest.importorskip("open_clip.transformer")
    state, path = farl_file(tmp_path / "farl.pth")
    tower = transformer.VisionTransformer(
        64, 16, WIDTH, DEPTH, HEADS, 4.0, output_dim=48, act_layer=transformer.QuickGELU, output_tokens=True
    ).eval()
    tower.load_state_dict(state)
    pictures = images(64)
    with torch.no_grad():
        cls, patches = tower(normalised(pictures, farl.CLIP_MEAN, farl.CLIP_STD))
        projected = _frozen.load(f"farl:{path}", None, given(projected="true")).encoder.features(pictures)
        tokens = _frozen.load(f"farl:{path}").encoder.features(pictures)
    torch.testing.assert_close(projected["cls"], cls, **TOLERANCE)
    torch.testing.assert_close(tokens["patches"], patches, **TOLERANCE)


def test_farl_has_the_published_tensors(tmp_path, monkeypatch):
    shapes = published_shapes("farl_vitb16_visual_keys.json")
    state = {f"state_dict.{name}": torch.zeros(shape, dtype=torch.half) for name, shape in shapes.items()}
    monkeypatch.setattr(farl, "read_tensors", lambda path: dict(state))
    (tmp_path / "farl.pth").touch()
    encoder = _frozen.load(f"farl:{tmp_path / 'farl.pth'}").encoder
    assert (encoder.embed_dim, encoder.num_patches, len(encoder.network.blocks)) == (768, 196, 12)
    assert encoder.network.blocks[0].attn.num_heads == 12
    assert encoder.preprocessing.image_size == 224
    state.pop("state_dict.visual.transformer.resblocks.11.ln_1.bias")
    with pytest.raises(NoInputError, match=r"1 missing: state_dict.visual.transformer.resblocks.11.ln_1.bias"):
        _frozen.load(f"farl:{tmp_path / 'farl.pth'}")


# Franca --------------------------------------------------------------------------------------------------------------


def franca_shapes(width: int = WIDTH, depth: int = DEPTH, patch: int = 14) -> dict[str, tuple[int, ...]]:
    hidden = 344  # (int(4 * 128 * 2 / 3) + 7) // 8 * 8
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "ls1.gamma": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.w12.weight": (2 * hidden, width),
        "mlp.w12.bias": (2 * hidden,),
        "mlp.w3.weight": (width, hidden),
        "mlp.w3.bias": (width,),
        "ls2.gamma": (width,),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, GRID**2 + 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **{f"blocks.{i // 2}.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def franca_tokens(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A DINOv2-style ViT with SwiGLU after its last norm, written from its description on the published names."""
    width = state["cls_token"].shape[-1]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    blocks = [name.removesuffix(".ls1.gamma") for name in state if name.endswith("ls1.gamma")]
    for block in sorted(blocks, key=lambda name: int(name.split(".")[2])):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + state[f"{block}.ls1.gamma"] * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        first, second = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.w12").chunk(2, dim=-1)
        x = x + state[f"{block}.ls2.gamma"] * linear(functional.silu(first) * second, f"{block}.mlp.w3")
    return norm(x, "norm")


@pytest.mark.parametrize("prefix", ["teacher.backbone.", "teacher.module.backbone.", "teacher.", "model.", ""])
def test_franca_gives_what_its_formulas_give(prefix, tmp_path):
    state = random_like(franca_shapes())
    content: dict = {"iteration": 3}
    target = content
    for word in [word for word in prefix.split(".") if word][:1]:
        target = content.setdefault(word, {})
    rest = prefix.partition(".")[2]
    target.update({f"{rest}{name}": one for name, one in state.items()})
    target["dino_head.last_layer.weight"] = torch.zeros(4, 4)
    if prefix.startswith("teacher"):
        content["student"] = {f"{rest}{name}": one * 0 for name, one in state.items()}
    loaded = _frozen.load(f"franca:{saved(content, tmp_path / 'franca_vitl14.pth')}")
    pictures = images(14 * GRID)
    expected = franca_tokens(state, normalised(pictures, vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    assert_tokens(loaded.encoder, pictures, expected, has_cls=True)
    ignored = loaded.details["ignored"]
    assert any("dino_head" in name for name in ignored) and ignored[f"{prefix}mask_token"] == 1
    assert ("student" in ignored) == prefix.startswith("teacher")


def unchunked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {re.sub(r"blocks\.\d+\.(\d+)", r"blocks.\1", name): one for name, one in state.items()}


def test_franca_gives_what_timms_dinov2_gives(tmp_path):
    state = random_like(franca_shapes())
    model = timm_library.create_model(
        "vit_giant_patch14_dinov2", img_size=14 * GRID, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=5.377
    ).eval()
    names = {"w12": "fc1", "w3": "fc2"}
    model.load_state_dict(
        {
            re.sub(r"\.(w12|w3)\.", lambda match: f".{names[match[1]]}.", name): one
            for name, one in unchunked(state).items()
            if name != "mask_token"
        }
    )
    pictures = images(14 * GRID)
    with torch.no_grad():
        expected = model.forward_features(normalised(pictures, vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    path = saved({"teacher": {f"backbone.{name}": one for name, one in state.items()}}, tmp_path / "franca.pth")
    assert_tokens(_frozen.load(f"franca:{path}").encoder, pictures, expected, has_cls=True)


def dinov2_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Franca's tensors as Hugging Face's DINOv2 has them in its files."""
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "w12": "weights_in",
        "w3": "weights_out",
    }
    result = {}
    for name, one in unchunked(state).items():
        new = f"layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        for old, theirs in names.items():
            new = new.replace(old, theirs)
        parts_of_it = one.chunk(3) if "attn.qkv" in new else [one]
        for kind, rows in zip(("query", "key", "value"), parts_of_it, strict=False):
            result[new.replace("attn.qkv", f"attention.attention.{kind}")] = rows.clone()
    return result


def test_franca_gives_what_the_dinov2_of_transformers_gives(tmp_path):
    state = random_like(franca_shapes())
    with warnings.catch_warnings(action="ignore"):
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=14 * GRID, patch_size=14,
            use_swiglu_ffn=True, layer_norm_eps=1e-6,
        )  # fmt: skip
        config.save_pretrained(tmp_path / "dinov2")
        save_file(dinov2_layout(state), tmp_path / "dinov2" / "model.safetensors", metadata={"format": "pt"})
        model, info = transformers.Dinov2Model.from_pretrained(tmp_path / "dinov2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pictures = images(14 * GRID)
    with torch.no_grad():
        expected = model.eval()(normalised(pictures, vit.IMAGENET_MEAN, vit.IMAGENET_STD)).last_hidden_state
    path = saved({"teacher": {f"backbone.{name}": one for name, one in state.items()}}, tmp_path / "franca.pth")
    assert_tokens(_frozen.load(f"franca:{path}").encoder, pictures, expected, has_cls=True)


def test_franca_has_the_published_tensors():
    shapes = published_shapes("franca_vitl14_keys_chunked.json")
    found = {name: torch.empty(shape) for name, shape in shapes.items() if name != "mask_token"}  # takes no memory yet
    found = franca.renamed(found)
    sizes = _tokens._sizes(found)
    network = _tokens.on_meta(
        lambda: timm_library.models.VisionTransformer(**sizes, init_values=1.0, num_classes=0, **franca._swiglu(found))
    )
    assert _tensors.misfits(network.state_dict(), found) == ""
    assert (sizes["img_size"], sizes["depth"], sizes["num_heads"]) == (224, 24, 16)
    assert network.patch_embed.num_patches == 256
    found.pop("blocks.23.mlp.fc2.bias")
    assert _tensors.misfits(network.state_dict(), found) == "1 missing: blocks.23.mlp.fc2.bias"


# I-JEPA --------------------------------------------------------------------------------------------------------------


def timms_vit(class_token: bool = False, **changes: object) -> nn.Module:
    settings = {"img_size": 64, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
    return randomised(
        timm_library.create_model(
            "vit_small_patch16_224",
            class_token=class_token,
            global_pool="token" if class_token else "avg",
            fc_norm=False,
            **{**settings, **changes},
        )
    )


def timms_tokens(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(normalised(pictures, vit.IMAGENET_MEAN, vit.IMAGENET_STD))


@pytest.mark.parametrize("module", ["module.", ""])
def test_ijepa_gives_what_timm_gives_from_either_encoder(module, tmp_path):
    target = timms_vit()
    source = {name: one * 0.9 for name, one in target.state_dict().items()}
    content = {
        "target_encoder": {f"{module}{name}": one for name, one in target.state_dict().items()},
        "encoder": {f"{module}{name}": one for name, one in source.items()},
        "predictor": {f"{module}mask_token": torch.zeros(1, 1, 8)},
        "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 300,
    }
    path = saved(content, tmp_path / "IN1K-vit.h.14-300e.pth.tar")
    pictures = images(64)
    loaded = _frozen.load(f"ijepa:{path}")
    assert_tokens(loaded.encoder, pictures, timms_tokens(target, pictures), has_cls=False)
    assert loaded.details["part"] == f"target_encoder.{module}"
    assert loaded.details["ignored"] == {"encoder": len(source), "opt": 1, "predictor": 1}
    other = _frozen.load(f"ijepa:{path}", "source")
    target.load_state_dict(source)
    assert_tokens(other.encoder, pictures, timms_tokens(target, pictures), has_cls=False)
    assert (loaded.name, other.name) == ("ijepa:IN1K-vit.h.14-300e", "ijepa:IN1K-vit.h.14-300e:source")


def test_ijepa_of_transformers_gives_the_same_features(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        transformers = pytest.importorskip("transformers")
        config = transformers.IJepaConfig(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=300, image_size=64,
            layer_norm_eps=1e-3,
        )  # fmt: skip
        model = randomised(transformers.IJepaModel(config))
        model.save_pretrained(tmp_path / "ijepa_small")
    pictures = images(64)
    with torch.no_grad():
        expected = model(normalised(pictures, vit.IMAGENET_MEAN, vit.IMAGENET_STD)).last_hidden_state
    loaded = _frozen.load(f"ijepa:{tmp_path / 'ijepa_small'}")  # heads and epsilon are in its config.json only
    assert_tokens(loaded.encoder, pictures, expected, has_cls=False)
    assert loaded.name == "ijepa:ijepa_small" and loaded.weights.name == "model.safetensors"


def hf_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names as Hugging Face's I-JEPA has them, written down once more."""
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "blocks.": "encoder.layer.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    result = {}
    for name, one in state.items():
        new = name
        for old, theirs in names.items():
            new = new.replace(old, theirs)
        if new.startswith("norm."):
            new = f"layernorm.{new.removeprefix('norm.')}"
        if "attn.qkv" in new:
            for part, rows in zip(("query", "key", "value"), one.chunk(3), strict=True):
                result[new.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
        else:
            result[new] = one
    return result


def test_hugging_faces_layout_is_read_and_must_be_whole(tmp_path):
    model = timms_vit()
    state = hf_layout(model.state_dict())
    path = tmp_path / "model.safetensors"
    wrapped = {**{f"ijepa.{name}": one for name, one in state.items()}, "classifier.weight": torch.zeros(3, WIDTH)}
    save_file(wrapped, path)
    loaded = _frozen.load(f"ijepa:{path}")
    pictures = images(64)
    assert_tokens(loaded.encoder, pictures, timms_tokens(model, pictures), has_cls=False)
    assert loaded.details["ignored"] == {"classifier": 1}
    lone = "encoder.layer.1.attention.attention.query.weight"
    for gone in (lone, lone.replace("query", "key")):
        save_file({name: one for name, one in state.items() if name != gone}, path)
        with pytest.raises(NoInputError, match=r"1 missing: blocks.1.attn.qkv.weight; 2 unexpected"):
            _frozen.load(f"ijepa:{path}")
    with pytest.raises(UsageError, match="has one encoder only; leave --encoder out"):
        _frozen.load(f"ijepa:{path}", "source")


# MeFEm and timm ------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 66},
    "model": lambda state: {"model": state},
    "module": lambda state: {"state_dict": {f"module.{name}": one for name, one in state.items()}},
    "half": lambda state: {name: one.half() for name, one in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("choice", ["mefem", "timm"])
def test_published_encoders_give_what_timm_gives(choice, wrapper, tmp_path):
    """A bare `vit_tiny_patch16_224` for both: whole size, so that it is `timm.create_model(NAME)` as published."""
    model = randomised(timm_library.create_model("vit_tiny_patch16_224", num_classes=0))
    if wrapper == "half":
        model.load_state_dict({name: one.half().float() for name, one in model.state_dict().items()})
    state = {**model.state_dict(), "head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    path = saved(WRAPPERS[wrapper](state), tmp_path / "MeFEm-S.pth.tar")
    loaded = _frozen.load(f"mefem:{path}" if choice == "mefem" else f"timm:vit_tiny_patch16_224@{path}")
    pictures = images(224, 1)
    mean, std = (vit.IMAGENET_MEAN, vit.IMAGENET_STD) if choice == "mefem" else ((0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        expected = model.forward_features(normalised(pictures, mean, std))
    assert_tokens(loaded.encoder, pictures, expected, has_cls=True)
    assert sum(loaded.details["ignored"].values()) == 2  # the head, named
    assert all("head" in name for name in loaded.details["ignored"])
    assert loaded.name == ("mefem:MeFEm-S" if choice == "mefem" else "timm:vit_tiny_patch16_224")


def test_a_file_that_lacks_a_block_is_no_smaller_network(tmp_path):
    state = timm_library.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    path = saved({name: one for name, one in state.items() if "blocks.11." not in name}, tmp_path / "less.pth")
    with pytest.raises(NoInputError, match=r"12 missing: blocks.11.norm1.weight, .*, and 9 more"):
        _frozen.load(f"mefem:{path}")


@pytest.mark.parametrize(
    ("name", "prefix_tokens", "has_cls"),
    [
        ("vit_small_patch14_reg4_dinov2", 5, True),
        ("vit_small_patch16_dinov3", 5, True),
        ("deit_tiny_distilled_patch16_224", 2, True),
        ("vit_base_patch16_rpn_224", 0, False),
    ],
)
def test_timms_prefix_tokens_are_no_patches(name, prefix_tokens, has_cls):
    if not timm_library.is_model(name):
        pytest.skip(f"timm {timm_library.__version__} has no {name}")
    loaded = _frozen.load(f"timm:{name}@random", None, given(timm_image_size=112))
    network = loaded.encoder.network
    with torch.no_grad():
        for values in network.parameters():  # registers and the CLS token begin alike
            values.add_(torch.randn_like(values) * 0.02)
    preprocessing = loaded.encoder.preprocessing
    pictures = images(112, 1)
    with torch.no_grad():
        tokens = network.forward_features(normalised(pictures, preprocessing.mean, preprocessing.std))
    first = tokens[:, :1] if has_cls else tokens[:, :0]
    assert_tokens(loaded.encoder, pictures, torch.cat([first, tokens[:, prefix_tokens:]], 1), has_cls)
    assert (loaded.weights, loaded.details["weights"]) == (None, "random")


@pytest.mark.parametrize("name", ["resnet10t", "vit_base_patch16_siglip_224"])
def test_what_timms_own_head_reads_is_cls_where_there_is_no_cls_token(name):
    encoder = _frozen.load(f"timm:{name}@random", None, given(timm_image_size=64)).encoder
    preprocessing = encoder.preprocessing
    pictures = images(64, 2)
    with torch.no_grad():
        expected = encoder.network(normalised(pictures, preprocessing.mean, preprocessing.std))  # without a classifier
        features = encoder.features(pictures)
    torch.testing.assert_close(features["cls"], expected, **TOLERANCE)
    assert set(features) == ({"cls"} if name == "resnet10t" else {"cls", "mean", "patches"})
    assert (encoder.num_patches, encoder.has_mean) == ((0, False) if name == "resnet10t" else (16, True))
    assert encoder.embed_dim == features["cls"].shape[1]


def test_timms_preprocessing_is_its_own():
    for name in ("vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_clip_224.openai", "resnet18"):
        loaded = _frozen.load(f"timm:{name}@random") if name == "resnet18" else None
        network = timm_library.create_model(name, num_classes=0, depth=1) if loaded is None else loaded.encoder.network
        config = timm_library.data.resolve_model_data_config(network)
        preprocessing = timm._preprocessing(name, config)
        assert preprocessing.image_size == config["input_size"][-1]
        assert (preprocessing.mean, preprocessing.std) == (config["mean"], config["std"])
        assert preprocessing.interpolation == config["interpolation"]


def test_timm_converts_the_files_of_other_authors(tmp_path):
    """DINOv2's own file has a mask token; another grid of positions is resampled; convolutions have counters."""
    model = randomised(timm_library.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0))
    path = saved({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14.pth")
    loaded = _frozen.load(f"timm:vit_small_patch14_dinov2@{path}", None, given(timm_image_size=56))
    pictures = images(56)
    with torch.no_grad():
        expected = model.forward_features(normalised(pictures, vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    assert_tokens(loaded.encoder, pictures, expected, has_cls=True)
    larger = _frozen.load(f"timm:vit_small_patch14_dinov2@{path}", None, given(timm_image_size=84))
    assert larger.encoder.num_patches == 36
    network = timm_library.create_model("resnet10t", num_classes=7)
    state = {name: one for name, one in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    loaded = _frozen.load(f"timm:resnet10t@{saved({'model': state}, tmp_path / 'resnet.pth')}")
    assert loaded.details["ignored"] == {"model.fc": 2}


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(1)
    first, after = _frozen.load("timm:resnet10t@random").encoder.features(images(64)), torch.rand(1)
    second = _frozen.load("timm:resnet10t@random").encoder.features(images(64))
    torch.manual_seed(1)
    assert torch.equal(first["cls"], second["cls"]) and torch.equal(after, torch.rand(1))


def test_a_folder_of_timms_layout_says_its_own_preprocessing(tmp_path):
    model = timm_library.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 64},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64], "tag": "x"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocessing = _frozen.load(f"timm:vit_tiny_patch16_224@{tmp_path}").encoder.preprocessing
    assert preprocessing == _frozen.Preprocessing(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), preprocessing.interpolation)


# Ours ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    options = vit.Options("vit_tiny_patch16_224", image_size=64, depth=1, embed_dim=48, num_heads=3)
    run = Run(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    vit.save_encoder(run, {"target": vit.build(options), "source": vit.build(options)}, {}, {"inputs": {}})
    return run.path


def test_what_has_no_prefix_is_a_run_of_ours(run_folder):
    loaded = _frozen.load(str(run_folder))
    assert isinstance(loaded.encoder, vit.ViTEncoder)
    assert (loaded.name, loaded.weights.name, loaded.details) == ("one", "model.safetensors", {"encoder": "target"})
    assert loaded.description["backbone"] == "vit_tiny_patch16_224"
    assert loaded.encoder.preprocessing == _frozen.Preprocessing(64, vit.IMAGENET_MEAN, vit.IMAGENET_STD)
    assert not loaded.encoder.training and not any(one.requires_grad for one in loaded.encoder.parameters())
    for spec, which in ((run_folder, "source"), (run_folder / "source.safetensors", None)):
        other = _frozen.load(str(spec), which)
        assert (other.name, other.weights.name) == ("one:source", "source.safetensors")
    with pytest.raises(UsageError, match="is the other one"):
        _frozen.load(str(run_folder / "model.safetensors"), "source")


# What is refused -----------------------------------------------------------------------------------------------------


def families(folder: Path) -> dict[str, Path]:
    """A file of each choice, by the choice."""
    ijepa_state = {f"module.{name}": one for name, one in timms_vit().state_dict().items()}
    return {
        "farl": farl_file(folder / "farl.pth")[1],
        "franca": saved(
            {"teacher": {f"backbone.{name}": one for name, one in random_like(franca_shapes()).items()}},
            folder / "franca.pth",
        ),
        "ijepa": saved({"encoder": ijepa_state, "target_encoder": ijepa_state}, folder / "ijepa.pth"),
        "mefem": saved(timms_vit(class_token=True).state_dict(), folder / "mefem.pth"),
        "timm": saved(timm_library.create_model("resnet10t").state_dict(), folder / "resnet.pth"),
    }


def test_a_file_of_another_family_is_told(tmp_path):
    files = families(tmp_path)
    for family, path in files.items():
        typed = f"timm:NAME@{path}" if family == "timm" else f"{family}:{path}"
        for choice in ["", *files]:
            spec = f"timm:vit_small_patch16_224@{path}" if choice == "timm" else f"{choice}:{path}".lstrip(":")
            if choice == family:
                continue
            with pytest.raises(NoInputError) as error:
                _frozen.load(spec)
            assert f"it looks like a file of {family}: type --model {typed}" in str(error.value), spec
            assert "\n" not in str(error.value) and len(str(error.value)) < 700
        if family != "timm":
            assert _frozen.load(f"{family}:{path}").encoder.embed_dim == WIDTH


def test_tensors_that_do_not_fit_are_named_and_counted(tmp_path):
    state = timms_vit(class_token=True).state_dict()
    del state["norm.weight"], state["blocks.2.mlp.fc2.bias"]
    state["blocks.1.norm1.weight"] = torch.zeros(7)
    state["\x1b[31mred"] = torch.zeros(1)
    with pytest.raises(NoInputError) as error:
        _frozen.load(f"mefem:{saved(state, tmp_path / 'odd.pth')}")
    message = str(error.value)
    assert "2 missing: blocks.2.mlp.fc2.bias, norm.weight; 1 unexpected: \\x1b[31mred; " in message
    assert "1 of another shape: blocks.1.norm1.weight; blocks.1.norm1.weight is [7], wanted [128]" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.0.extra.weight": torch.zeros(1)}, r"\(1 unexpected: blocks.0.extra.weight\)"),
        ({"norm.bias": torch.zeros(3)}, r"\(1 of another shape: norm.bias; norm.bias is \[3\], wanted \[128\]\)"),
        ({"norm.bias": torch.zeros(128, dtype=torch.int64)}, "1 of another shape: norm.bias"),
        ({"norm.bias": torch.zeros(1).expand(128)}, "1 of another shape: norm.bias"),
    ],
)
def test_one_tensor_too_many_or_too_odd_is_enough(change, said, tmp_path):
    state = {**timms_vit(class_token=True).state_dict(), **change}
    with pytest.raises(NoInputError, match=said):
        _frozen.load(f"mefem:{saved(state, tmp_path / 'odd.pth')}")


@pytest.mark.parametrize("choice", ["farl", "franca", "ijepa", "mefem"])
def test_numbers_that_are_not_finite_are_refused(choice, tmp_path):
    path = families(tmp_path)[choice]
    content = torch.load(path)
    tensors = next(iter(content.values())) if choice != "mefem" else content
    name = next(name for name in tensors if name.endswith(("norm.weight", "ln_post.weight")))
    tensors[name][0] = float("nan")
    if choice == "ijepa":
        content["target_encoder"] = tensors
    with pytest.raises(NoInputError, match="norm.weight holds numbers that are not finite"):
        _frozen.load(f"{choice}:{saved(content, path)}")


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("choice", ["farl", "franca", "ijepa", "mefem", "timm"])
def test_damaged_and_dangerous_files_give_one_line(choice, tmp_path):
    def refused(path: Path) -> str:
        argument = f"resnet10t@{path}" if choice == "timm" else str(path)
        with pytest.raises(NoInputError) as error:
            _frozen.load(f"{choice}:{argument}")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    whole = families(tmp_path)[choice].read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "damaged, cut short or none" in refused(cut)
    save_file({"a": torch.zeros(9)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    assert "damaged or cut short" in refused(tmp_path / "cut.safetensors")
    for protocol in (2, 4):
        (tmp_path / "code.pth").write_bytes(pickle.dumps(Runs(f"touch {tmp_path}/ran"), protocol=protocol))
        refused(tmp_path / "code.pth")
    saved({"state_dict": Runs(f"touch {tmp_path}/ran")}, tmp_path / "zip.pth")
    assert "could run code" in refused(tmp_path / "zip.pth")
    assert not (tmp_path / "ran").exists()
    assert "no such file" in refused(tmp_path / "missing.pth")
    assert "no weights in this folder" in refused(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "is empty; get the file again" in refused(tmp_path / "empty.pth")
    (tmp_path / "text.yaml").write_text("crops: 3\nx: 4\n")  # "c" means an import in a pickle
    assert "could run code" not in refused(tmp_path / "text.yaml")


def test_the_reason_of_a_cut_file_ends_with_a_sentence(tmp_path):
    path = saved({"a": torch.zeros(9)}, tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        NoInputError, match=r"central directory\); it is damaged, cut short or none; get the file again"
    ):
        _frozen.load(f"mefem:{path}")


def test_a_file_of_the_family_that_lacks_a_tensor_is_not_sent_elsewhere(tmp_path):
    for family, path in families(tmp_path).items():
        content = torch.load(path, weights_only=True)
        state = content
        while not isinstance(next(iter(state.values())), torch.Tensor):
            state = next(reversed(state.values()))
        del state[next(name for name in reversed(state) if name.endswith("1.bias"))]
        spec = f"timm:resnet10t@{path}" if family == "timm" else f"{family}:{path}"
        saved(content, path)
        with pytest.raises(NoInputError, match="missing") as error:
            _frozen.load(spec)
        assert "looks like" not in str(error.value), error.value


def test_farl_names_tensors_as_its_file_does(tmp_path):
    state = {f"visual.{name}": one for name, one in random_like(clip_shapes()).items()}
    del state["visual.ln_post.bias"], state["visual.transformer.resblocks.1.attn.in_proj_bias"]
    state["visual.transformer.resblocks.0.mlp.c_fc.bias"] = torch.zeros(7)
    with pytest.raises(NoInputError) as error:
        _frozen.load(f"farl:{saved({'state_dict': state}, tmp_path / 'farl.pth')}")
    beginning = "state_dict.visual."
    assert f"{beginning}transformer.resblocks.1.attn.in_proj_bias" in str(error.value)
    assert f"{beginning}ln_post.bias" in str(error.value)
    assert f"{beginning}transformer.resblocks.0.mlp.c_fc.bias is [7], wanted [512]" in str(error.value)


def test_another_file_of_a_run_leads_to_its_folder(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    path = saved({"a": torch.zeros(9)}, tmp_path / "last.ckpt")
    with pytest.raises(NoInputError, match=f"not an encoder, but beside one; type --model {tmp_path}"):
        _frozen.load(str(path))


def test_a_runs_folder_behind_a_prefix_is_told(tmp_path):
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(NoInputError, match=f"it is of a run of mefem: type --model {tmp_path} "):
        _frozen.load(f"mefem:{tmp_path}")


def test_what_is_typed_wrongly_is_told():
    for spec, said in {
        "fral:x.pth": 'no encoder "fral:"; did you mean "farl"?',
        "vit:x": 'no encoder "vit:"',
        "farl:": "names no file; type --model farl:PATH",
        "timm:resnet10tt@random": 'timm has no model "resnet10tt"; did you mean "resnet10t"?',
        "timm:qqqq@random": 'timm has no model "qqqq"; timm.list_models() names them all',
        "timm:resnet10t.x@random": "cannot be built",
        "timm:resnet10t@x.pth": "x.pth: no such file",
        "hf:MeFEm": "wanted OWNER/NAME",
    }.items():
        with pytest.raises(MefemError, match=re.escape(said)) as error:
            _frozen.load(spec)
        assert "\n" not in str(error.value)


# The network is used for hf: alone -----------------------------------------------------------------------------------


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repository, file: cached.get((repository, file))
    )
    cached: dict[tuple[str, str], str] = {}
    return cached


def test_timm_fetches_nothing_but_takes_what_was_fetched(no_cache, tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k"
    with pytest.raises(NoInputError) as error:
        _frozen.load(f"timm:{name}")
    assert f"type --model hf:timm/{name} to fetch them, or --model timm:{name}@PATH" in str(error.value)
    save_file(timm_library.create_model(name, num_classes=0).state_dict(), tmp_path / "model.safetensors")
    no_cache[(f"timm/{name}", "model.safetensors")] = str(tmp_path / "model.safetensors")
    assert _frozen.load(f"timm:{name}").weights == tmp_path / "model.safetensors"


def test_hf_fetches_one_file_and_its_config(monkeypatch, tmp_path, capsys):
    import huggingface_hub

    folder = tmp_path / "hub" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    fetched = []

    def download(repository: str, file: str) -> str:
        fetched.append((repository, file))
        if not (folder / file).exists():
            raise OSError("404 Client Error\nnot found")
        return str(folder / file)

    files = {"README.md": 1, "MeFEm-B.pth.tar": 30, "MeFEm-S.pth.tar": 20}
    siblings = lambda: [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub,
        "HfApi",
        lambda: SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings())),
    )
    saved(timms_vit(class_token=True).state_dict(), folder / "MeFEm-S.pth.tar")
    console.configure(console.ConsoleOptions())
    loaded = _frozen.load("hf:boretsyury/MeFEm")
    assert fetched == [("boretsyury/MeFEm", "MeFEm-S.pth.tar")]
    assert "takes MeFEm-S.pth.tar, the smallest; there is also MeFEm-B.pth.tar" in capsys.readouterr().err
    assert loaded.name == "hf:boretsyury/MeFEm/MeFEm-S.pth.tar" and loaded.details["revision"] == "abc123"
    with pytest.raises(
        NoInputError, match=r"hf:boretsyury/MeFEm/MeFEm-B.pth.tar: cannot be fetched \(404 Client Error\)"
    ):
        _frozen.load("hf:boretsyury/MeFEm/MeFEm-B.pth.tar")

    files.clear()
    files.update({"model.safetensors": 9, "pytorch_model.bin": 9, "config.json": 1})
    save_file(timm_library.create_model("resnet10t").state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "pretrained_cfg": {"mean": [0, 0, 0]}})
    )
    loaded = _frozen.load("hf:timm/resnet10t.c3_in1k")
    assert loaded.encoder.preprocessing.mean == (0, 0, 0) and loaded.name == "hf:timm/resnet10t.c3_in1k"

    save_file(hf_layout(timms_vit().state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "ijepa", "num_attention_heads": 2, "layer_norm_eps": 1e-6})
    )
    assert not _frozen.load("hf:facebook/ijepa").encoder.class_token
    assert hf._revision(Path("weights.pth")) == ""


# The room ------------------------------------------------------------------------------------------------------------


def test_every_choice_is_a_file_that_says_how_it_is_typed():
    for name in parts.names("backbones"):
        module = importlib.import_module(f"mefem_cli.backbones.{name}")
        assert callable(module.load)
        if name != "vit":
            assert module.SPEC.startswith(f"{name}:")
            assert parts.summary(f"backbones.{name}").startswith(f"{name}:")
    options = [field.name for name in parts.names("backbones") for field in parts.read_fields(f"backbones.{name}")]
    assert len(options) == len(set(options))
