"""Any timm VisionTransformer, run on any subset of its tokens; the encoder of MeFEm.

Pre-norm, fixed 2-D sin-cos positions, CLS position zero. The state dict has timm's own names, so that
`timm.create_model(name, ...).load_state_dict(...)` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mefem_cli.backbones._frozen import FrozenEncoder, Loaded, Preprocessing, hint
from mefem_cli.engine import checkpoint
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.stores import product
from mefem_cli.stores.runs import ENCODER_FILES, Run, describe_model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PLAIN_VITS = "try vit_tiny_patch16_224, vit_small_patch16_224 or vit_base_patch16_224"


@dataclass(frozen=True)
class Options:
    """The encoder."""

    backbone: str = "vit_small_patch16_224"  # any timm ViT by its name
    image_size: int = 224  # side of the encoder's input, px; crops are resampled to it
    patch_size: int = 16  # side of a patch, px
    depth: int | None = None  # number of blocks; default: the backbone's own
    embed_dim: int | None = None  # features of a token; default: the backbone's own
    num_heads: int | None = None  # attention heads; default: the backbone's own

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: wanted 1 or more")


def build(options: Options, class_token: bool = True) -> ViTEncoder:
    """Return an untrained encoder. Raises UsageError for an unknown or unfit backbone or sizes that do not fit."""
    if options.image_size < 1 or options.patch_size < 1 or options.image_size % options.patch_size:
        raise UsageError(
            f"--image-size {options.image_size} --patch-size {options.patch_size}: the patch must divide the image; "
            f"try --image-size {max(1, options.image_size // max(options.patch_size, 1)) * max(options.patch_size, 1)}"
        )
    from mefem_cli.backbones._attention import speed_up_attention

    vit = _create_timm_vit(options, class_token)
    speed_up_attention(vit.blocks)
    return ViTEncoder(vit, options)


def _create_timm_vit(options: Options, class_token: bool) -> Any:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    names = timm.list_models("*vit*")
    if options.backbone not in names:
        raise UsageError(f'--backbone: timm has no ViT "{options.backbone}"{_nearest(options.backbone, names)}')
    overrides = {"depth": options.depth, "embed_dim": options.embed_dim, "num_heads": options.num_heads}
    settings: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    try:
        vit = timm.create_model(
            options.backbone,
            img_size=options.image_size,
            patch_size=options.patch_size,
            num_classes=0,
            class_token=class_token,
            global_pool="",
            **settings,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--backbone {options.backbone}: cannot be built with these options ({error})") from error
    fits = isinstance(vit, VisionTransformer) and isinstance(vit.norm_pre, nn.Identity) and vit.num_reg_tokens == 0
    if not fits or vit.pos_embed is None or getattr(vit, "no_embed_class", False):
        raise UsageError(f"--backbone {options.backbone}: not a plain pre-norm VisionTransformer; {PLAIN_VITS}")
    return vit


def _nearest(given: str, names: Sequence[str]) -> str:
    """Return what to type for a name that timm does not have."""
    begun = sorted((name for name in names if name.startswith(f"{given}_patch")), key=len)  # vit_tiny
    near = begun[:1] or get_close_matches(given, [name for name in names if name.startswith("vit_")], n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; {PLAIN_VITS}"


class ViTEncoder(FrozenEncoder):
    """A timm VisionTransformer whose tokens are the CLS token, if any, at index 0 and the patches behind it.

    `vit` keeps timm's parameter names. Positions are fixed, hence no gradient and no weight decay.
    """

    has_mean = True

    def __init__(self, vit: Any, options: Options):
        super().__init__()
        self.vit = vit
        self.options = options
        self.image_size: int = options.image_size
        self.patch_size: int = options.patch_size
        self.grid_size: int = options.image_size // options.patch_size
        self.num_patches: int = self.grid_size**2
        self.embed_dim: int = vit.embed_dim
        self.num_heads: int = vit.blocks[0].attn.num_heads
        self.class_token: bool = vit.cls_token is not None
        self.preprocessing = Preprocessing(options.image_size, IMAGENET_MEAN, IMAGENET_STD)
        self.mean, self.std, self.interpolation = IMAGENET_MEAN, IMAGENET_STD, self.preprocessing.interpolation
        positions = sincos_positions(self.embed_dim, self.grid_size)
        if self.class_token:
            positions = torch.cat([torch.zeros(1, self.embed_dim), positions])
        vit.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.register_buffer("_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(3, 1, 1), persistent=False)
        self._mean: torch.Tensor
        self._std: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """All tokens of an image: the patches and the CLS token, if any."""
        return self.num_patches + int(self.class_token)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Cut and normalise images: uint8 [B, 3, S, S] -> float32 [B, num_patches, 3 * p * p], row-major patches."""
        side, patch = self.grid_size, self.patch_size
        blocks = images.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # [B, 3, L, p, L, p]
        pixels = blocks.permute(0, 2, 4, 1, 3, 5).contiguous()  # [B, L, L, 3, p, p]; moved while they are small
        normalised = pixels.float().div_(255).sub_(self._mean).div_(self._std)
        return normalised.flatten(3).flatten(1, 2)

    def forward(self, patches: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Encode some or all tokens.

        `patches` come from `patchify`; `tokens` are int64 indices [B, n], CLS at 0 where there is one; None means
        all. Returns [B, n, D]: what timm's `forward_features` returns when `tokens` is None. `tokens` [K * B, n] hold
        K choices for every image and give [K * B, n, D]; see `gather_tokens`.
        """
        if tokens is None:
            embedded = self._embed(patches) + self.vit.pos_embed[:, int(self.class_token) :]
            if self.class_token:
                cls = (self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(len(patches), -1, -1)
                embedded = torch.cat([cls.to(embedded.dtype), embedded], dim=1)
        else:
            embedded = self._embed_some(patches, tokens)
        return self.vit.norm(self.vit.blocks(self.vit.norm_pre(embedded)))

    def _embed(self, patches: torch.Tensor) -> torch.Tensor:
        """The patch convolution as a matrix product, so that only the patches at hand are multiplied."""
        projection = self.vit.patch_embed.proj
        return functional.linear(patches, projection.weight.flatten(1), projection.bias)

    def _embed_some(self, patches: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        is_cls = tokens.eq(0) if self.class_token else None
        index = (tokens - int(self.class_token)).clamp(min=0)
        embedded = self._embed(gather_tokens(patches, index))  # [B, n, D]
        if is_cls is not None:  # the CLS token stands wherever the mask put it, if it is in the source at all
            embedded = torch.where(is_cls[..., None], self.vit.cls_token.to(embedded.dtype), embedded)
        return embedded + self.vit.pos_embed[0][tokens]

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `cls` [B, D] (where there is a CLS token), `mean` [B, D] and `patches` [B, T, D] of uint8 images."""
        encoded = self(self.patchify(images)).float()
        patches = encoded[:, int(self.class_token) :]
        features = {"mean": patches.mean(1), "patches": patches}
        return {"cls": encoded[:, 0], **features} if self.class_token else features


def gather_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick tokens: [B, N, D] at int64 [B, n] -> [B, n, D].

    An index [K * B, n] picks K times from every image, row k * B + b from image b, and gives [K * B, n, D].
    """
    num_images, num_tokens, _ = tokens.shape
    first = torch.arange(0, num_images * num_tokens, num_tokens, device=index.device)  # of each image
    rows = index.view(-1, num_images, index.shape[1]) + first[:, None]
    # Whole rows are copied; torch.gather would look up every number.
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, -1)


def sincos_positions(dim: int, grid_size: int) -> torch.Tensor:
    """Return fixed positions, float32 [L * L, dim], row-major.

    The first half of the features encodes the column, the second the row, each as sines then cosines of the
    coordinate times 10000^(-2k/(dim/2)), k = 0 ... dim/4 - 1 (the 2-D form of "Attention is all you need" used by MAE
    and I-JEPA). Raises UsageError if 4 does not divide `dim`.
    """
    if dim % 4:
        raise UsageError(f"{dim} features per token: 2-D sin-cos positions want a multiple of 4")
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # [L, dim / 4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [L, dim / 2]
    columns = wave[None, :, :].expand(grid_size, -1, -1)
    rows = wave[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def save_tensors(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode of any new file; the library's own are for their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(state, path, metadata)
    path.chmod(mode)


def save_encoder(
    run: Run, encoders: dict[str, ViTEncoder], crop_rule: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """Write a run's encoders with timm's parameter names, then model.json, which describes and completes them."""
    for name, encoder in encoders.items():
        state = {key: value.detach().cpu().contiguous() for key, value in encoder.vit.state_dict().items()}
        with product.writing(run.path / ENCODER_FILES[name]) as temporary:
            save_tensors(state, temporary)
    first_name, encoder = next(iter(encoders.items()))
    run.write_model(
        {
            **asdict(encoder.options),  # depth, width and heads as asked: None is the backbone's own
            "class_token": encoder.class_token,
            "embed_dim": encoder.embed_dim,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "interpolation": encoder.interpolation,
            "crop_rule": crop_rule,
            "encoder": first_name,
            "provenance": provenance,
        }
    )


def load_encoder(path: Path, which: str | None = None) -> tuple[ViTEncoder, dict[str, Any], Path]:
    """Load an encoder from a run folder or one of its .safetensors files.

    Returns the encoder, its model.json and the weights' file. `which` is "target" (the default) or "source". Raises
    NoInputError where there is no finished model, UsageError for a newer one, OutputError for weights that do not fit.
    """
    folder, description = describe_model(path)
    weights = path if path.suffix == ".safetensors" else folder / ENCODER_FILES[which or description["encoder"]]
    names = ("backbone", "image_size", "patch_size", "depth", "embed_dim", "num_heads")
    options = Options(**{name: description[name] for name in names})
    encoder = build(options, class_token=description["class_token"])
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise NoInputError(f"{weights}: cannot be read as safetensors ({error})") from error
    checkpoint.load_into(encoder.vit, state, weights)
    return encoder.eval().requires_grad_(False), description, weights


def load(argument: str, encoder: str | None = None, options: None = None) -> Loaded:
    """Load an encoder of ours for `mefem embed`; see `load_encoder`.

    Raises NoInputError for a file of another family, which it names.
    """
    path = Path(argument)
    if path.is_file() and not (path.suffix == ".safetensors" and (path.parent / "model.json").is_file()):
        if (path.parent / "model.json").is_file():
            raise NoInputError(f"{path}: not an encoder, but beside one; type --model {path.parent}")
        raise NoInputError(f"{path}: not an encoder of a run of mefem (no model.json beside it){_hint(path)}")
    if (
        path.is_file()
        and encoder is not None
        and path.name == ENCODER_FILES["target" if encoder == "source" else "source"]
    ):
        raise UsageError(f"--encoder {encoder}: {path} is the other one; name the run's folder or leave --encoder out")
    vit_encoder, description, weights = load_encoder(path, encoder)
    which = "source" if weights.name == ENCODER_FILES["source"] else "target"
    folder = weights.resolve().parent.name
    name = folder if which == "target" else f"{folder}:source"
    return Loaded(vit_encoder, name, weights, description=description, details={"encoder": which})


def _hint(path: Path) -> str:
    """Return what to type for a file of someone else."""
    from mefem_cli.backbones._tensors import read_tensors

    if path.suffix == ".onnx":
        return f"; type --model onnx:{path}"
    try:
        return hint(path, read_tensors(path))
    except NoInputError as error:
        return f" ({error})"
