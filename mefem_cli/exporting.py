"""Exporting a run's encoder for other libraries; what `mefem export` runs.

Each export is a folder: the weights in the other's layout, README.md (a model card) and export.json (what it is of).
Before it gets its name it is loaded back as its users will and compared with the run's encoder on random images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mefem_cli import console
from mefem_cli.backbones import vit
from mefem_cli.backbones.vit import ViTEncoder
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.reports import card
from mefem_cli.stores import product
from mefem_cli.stores.runs import ENCODER_FILES, Run

RECORD, CARD, WEIGHTS, ONNX_FILE = "export.json", "README.md", "model.safetensors", "model.onnx"
FORMAT, VERSION = "mefem-export", 1
TOLERANCE = 1e-4  # largest difference of a feature, fp32 on the CPU; features have a deviation of about 1
NUM_IMAGES = 4
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ExportOptions:
    """The export."""

    to: Literal["timm", "hf", "onnx", "safetensors"] = "timm"  # for timm, Hugging Face transformers (ViTModel), ONNX
    # runtimes (uint8 images to features), or the run's own layout for mefem embed
    encoder: Literal["target", "source"] | None = None  # which encoder of the run; default: target, the EMA of source
    patches: bool = False  # onnx: give the features of every patch too
    out: str | None = None  # folder of the product; default: exports/<run>-<to>
    overwrite: bool = False  # replace the product if it exists
    seed: int = 0  # of the random images that it is checked on


@dataclass
class Export:
    """An encoder on its way into a folder."""

    run: Path
    encoder: ViTEncoder
    description: dict[str, Any]  # model.json of the run
    which: str  # target or source
    options: ExportOptions
    checks: list[str] = field(default_factory=list)  # what was compared, a sentence each

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return self.encoder.num_heads

    def expected(self, images: torch.Tensor) -> Tensors:
        """Return the features of uint8 images [B, 3, S, S] that the export must give."""
        with torch.inference_mode():
            return self.encoder.features(images)


def export(path: Path, options: ExportOptions) -> Path:
    """Write the encoder of a run (its folder or one of its .safetensors files); return the folder made.

    Raises NoInputError where there is no run, UsageError for an encoder that the other library cannot hold or a missing
    package, OutputError where the folder exists, or where the export gives other features than the run's encoder.
    """
    if not path.exists():
        raise NoInputError(f"{path}: no such run; mefem pretrain makes one, type its folder")
    if path.is_file() and not (path.parent / "model.json").is_file():
        raise NoInputError(f"{path}: not of a run of mefem (no model.json beside it); type the folder of a run")
    encoder, description, weights = vit.load_encoder(path, options.encoder)
    run = weights.resolve().parent
    which = "source" if weights.name == ENCODER_FILES["source"] else "target"
    out = Path(options.out or f"exports/{run.name}-{options.to}")
    if out.exists() and not options.overwrite:
        raise OutputError(f"{out} exists; type --overwrite to replace it or -o for another place")
    if options.patches and options.to != "onnx":
        console.warn(f"--patches has no effect with --to {options.to}, whose models give all tokens")
    task = Export(run, encoder, description, which, options)
    with product.writing(out) as folder:
        folder.mkdir()
        WRITERS[options.to](task, folder)
        inputs = {str(weights.absolute()): product.file_sha256(weights)}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "to": options.to,
            "encoder": which,
            "checks": task.checks,
            **product.provenance({"patches": options.patches}, inputs, options.seed),
        }
        product.write_json(folder / RECORD, record)
        product.write_text(folder / CARD, _card(task, out.name))
        if out.exists():
            product.refuse_existing(out, True, holds=RECORD)
    return out


def _card(task: Export, name: str) -> str:
    try:
        config = Run.open(task.run).config()
    except (OSError, OutputError):
        config = dict(task.description.get("provenance", {}).get("options", {}))
    metrics = list(Run(task.run).metrics())
    return card.text(name, task.options.to, task.which, task.description, config, metrics, task.checks)


# Checking ------------------------------------------------------------------------------------------------------------


def _compare(task: Export, how: str, read: Callable[[torch.Tensor], Tensors]) -> None:
    """Run `read` on random images; raise OutputError if it gives other features than the run's encoder."""
    generator = torch.Generator().manual_seed(task.options.seed)
    size = task.encoder.image_size
    images = torch.randint(0, 256, (NUM_IMAGES, 3, size, size), dtype=torch.uint8, generator=generator)
    expected = task.expected(images)
    with torch.inference_mode():
        given = read(images)
    worst = 0.0
    for kind, features in given.items():
        if features.shape != expected[kind].shape:
            raise OutputError(f"{how} gives {kind} features {list(features.shape)}, not {list(expected[kind].shape)}")
        worst = max(worst, float((features - expected[kind]).abs().max()))
    if not worst <= TOLERANCE:
        raise OutputError(
            f"{how} gives features that differ by {worst:.2g} from those of the run, more than {TOLERANCE:g}: nothing "
            "is written; please report it"
        )
    task.checks.append(
        f"{how}: {', '.join(given)} of {NUM_IMAGES} random images differ by {worst:.1e} at most "
        f"(tolerance {TOLERANCE:g})"
    )


def _split(task: Export, tokens: torch.Tensor) -> Tensors:
    """Return the features in tokens [B, N, D], the CLS token first if there is one."""
    patches = tokens[:, int(task.encoder.class_token) :]
    features = {"mean": patches.mean(1), "patches": patches}
    return {"cls": tokens[:, 0], **features} if task.encoder.class_token else features


def _normalised(encoder: ViTEncoder, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    return (images.float() / 255 - mean) / std


def _state(encoder: ViTEncoder) -> Tensors:
    return {name: value.detach().float().contiguous() for name, value in encoder.vit.state_dict().items()}


# The layouts ---------------------------------------------------------------------------------------------------------


def _to_safetensors(task: Export, folder: Path) -> None:
    """The run's own layout: model.safetensors and model.json, for `mefem embed --model FOLDER`."""
    vit.save_tensors(_state(task.encoder), folder / WEIGHTS)
    product.write_json(folder / "model.json", {**task.description, "encoder": "target", "exported_encoder": task.which})
    again, *_ = vit.load_encoder(folder)
    _compare(task, "the folder read by mefem", again.features)


def model_arguments(task: Export) -> dict[str, Any]:
    """Return what `timm.create_model` wants beside the name."""
    encoder, options = task.encoder, task.encoder.options
    arguments: dict[str, Any] = {"img_size": encoder.image_size, "patch_size": encoder.patch_size}
    sizes = {"depth": options.depth, "embed_dim": options.embed_dim, "num_heads": options.num_heads}
    arguments |= {name: size for name, size in sizes.items() if size is not None}
    if not encoder.class_token:
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return arguments


def _to_timm(task: Export, folder: Path) -> None:
    """model.safetensors with timm's names (fixed positions included), config.json as timm's hub writes it."""
    import timm

    encoder, arguments = task.encoder, model_arguments(task)
    vit.save_tensors(_state(encoder), folder / WEIGHTS)
    pretrained = {
        "input_size": [3, encoder.image_size, encoder.image_size],
        "fixed_input_size": True,
        "interpolation": encoder.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": encoder.options.backbone,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": arguments.get("global_pool", "token"),
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    product.write_json(folder / "config.json", config)
    weights = str(folder / WEIGHTS)
    model: Any = timm.create_model(encoder.options.backbone, checkpoint_path=weights, num_classes=0, **arguments).eval()
    _compare(
        task,
        "timm.create_model with this checkpoint",
        lambda images: _split(task, model.forward_features(_normalised(encoder, images))),
    )


HF_NAMES = (  # timm's name -> that of transformers' ViTModel; q, k and v are one matrix in timm
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
    (r"blocks\.(\d+)\.norm1\.(weight|bias)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(weight|bias)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"encoder.layer.\1.attention.attention.{}.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", r"encoder.layer.\1.output.dense.\2"),
)


def to_hugging_face(state: Tensors) -> Tensors:
    """Return timm's ViT tensors under the names of transformers' ViTModel. Raises UsageError for what it lacks."""
    renamed: Tensors = {}
    for name, tensor in state.items():
        matches = [(re.fullmatch(pattern, name), new) for pattern, new in HF_NAMES]
        found = next(((match, new) for match, new in matches if match), None)
        if found is None:
            raise UsageError(f"--to hf: transformers' ViT has nothing like {name}; type --to timm")
        new_name = found[0].expand(found[1])
        if "{}" in new_name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[new_name.format(part)] = piece.contiguous()
        else:
            renamed[new_name] = tensor
    return renamed


def _to_hf(task: Export, folder: Path) -> None:
    """A folder that transformers' ViTModel.from_pretrained reads."""
    encoder = task.encoder
    if not encoder.class_token:
        raise UsageError("--to hf: transformers' ViT always has a CLS token, and this encoder none; type --to timm")
    vit.save_tensors(to_hugging_face(_state(encoder)), folder / WEIGHTS, metadata={"format": "pt"})
    block = encoder.vit.blocks[0]
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.vit.blocks),
        "num_attention_heads": task.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.vit.norm.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": block.attn.qkv.bias is not None,
        "torch_dtype": "float32",
    }
    size = {"height": encoder.image_size, "width": encoder.image_size}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    product.write_json(folder / "config.json", config)
    product.write_json(folder / "preprocessor_config.json", processor)
    if find_spec("transformers") is None:
        console.warn("transformers is not installed, so the export is not checked; type pip install transformers")
        task.checks.append("transformers was not installed: the file was written by name and not run")
        return
    from transformers import ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    model, report = loaded
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise OutputError(f"--to hf: transformers does not find what it wants ({wrong}); please report it")
    _compare(
        task,
        "transformers.ViTModel.from_pretrained",
        lambda images: _split(task, model.eval()(_normalised(encoder, images)).last_hidden_state),
    )


class _FromPixels(nn.Module):
    """uint8 images [B, 3, S, S] to a tuple of features, in operations that ONNX has."""

    def __init__(self, model: Any, encoder: ViTEncoder, kinds: list[str]):
        super().__init__()
        self.model, self.kinds, self.class_token = model, kinds, encoder.class_token
        self.register_buffer("mean", torch.tensor(encoder.mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(encoder.std).view(3, 1, 1) * 255)
        self.mean: torch.Tensor
        self.std: torch.Tensor

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return `kinds` of features."""
        tokens = self.model.forward_features((images.float() - self.mean) / self.std)
        patches = tokens[:, int(self.class_token) :]
        features = {"cls": tokens[:, 0], "mean": patches.mean(1), "patches": patches}
        return tuple(features[kind] for kind in self.kinds)


def _to_onnx(task: Export, folder: Path) -> None:
    """model.onnx: `images` uint8 [batch, 3, S, S], RGB, to `cls`, `mean` and perhaps `patches`, any batch."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UsageError(f"--to onnx: wants the package {package}; type pip install 'mefem-cli[onnx]'")
    import timm

    encoder = task.encoder
    plain = timm.create_model(encoder.options.backbone, num_classes=0, **model_arguments(task)).eval()
    plain.load_state_dict(_state(encoder))
    kinds = ["cls"] * encoder.class_token + ["mean"] + ["patches"] * task.options.patches
    images = torch.zeros((2, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    path = folder / ONNX_FILE
    _write_onnx(_FromPixels(plain, encoder, kinds).eval(), images, kinds, path)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def read(images: torch.Tensor) -> Tensors:
        return dict(zip(kinds, map(torch.from_numpy, session.run(kinds, {"images": images.numpy()})), strict=True))

    _compare(task, "onnxruntime", read)
    _compare_one_by_one(task, read)


def _compare_one_by_one(task: Export, read: Callable[[torch.Tensor], Tensors]) -> None:
    """Check that the batch is free: single images must give what they give together."""

    def apart(images: torch.Tensor) -> Tensors:
        pieces = [read(images[row : row + 1]) for row in range(len(images))]
        return {kind: torch.cat([piece[kind] for piece in pieces]) for kind in pieces[0]}

    _compare(task, "onnxruntime, one image at a time", apart)


def _write_onnx(model: nn.Module, images: torch.Tensor, kinds: list[str], path: Path) -> None:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(
                model,
                (images,),
                str(path),
                input_names=["images"],
                output_names=kinds,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        finally:
            logging.disable(logging.NOTSET)


WRITERS: dict[str, Callable[[Export, Path], None]] = {
    "timm": _to_timm,
    "hf": _to_hf,
    "onnx": _to_onnx,
    "safetensors": _to_safetensors,
}
