"""timm:NAME[@PATH], any model of timm (DINOv2, DINOv3, CLIP, SigLIP, MAE, ResNet, ...) with its own preprocessing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mefem_cli.backbones._frozen import FrozenEncoder, Loaded, Preprocessing, refuse_source
from mefem_cli.backbones._tensors import (
    FOLDER_FILES,
    Tensors,
    below,
    left_aside,
    load_exactly,
    misfits,
    preferred,
    prefixes,
    read_tensors,
    weights_file,
)
from mefem_cli.backbones._tokens import Normalise, TokenEncoder
from mefem_cli.errors import NoInputError, UsageError

SPEC = "timm:NAME@PATH"
RANDOM, SEED = "random", 0  # instead of a path: untrained, a baseline
WRAPPERS = ("state_dict_ema.", "state_dict.", "model_ema.", "model.", "teacher.", "module.", "backbone.")
TYPICAL = (
    "blocks.0.norm1.weight",
    "blocks.0.attn.qkv.weight",
    "layer1.0.conv1.weight",
    "stages.0.blocks.0.norm.weight",
)
TAKEN_FROM_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "num_classes", "classifier")
MAX_IMAGE_SIZE = 4096  # px


@dataclass(frozen=True)
class Options:
    """A model of timm."""

    timm_image_size: int | None = None  # side of its input, px; default: the model's own


def recognises(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file has names that several families of timm have, and none of the other choices."""
    return any(name.endswith(TYPICAL) for name in tensors)


def load(argument: str, encoder: str | None, options: Options) -> Loaded:
    """Load a timm model by its name, with the weights of a file that timm's authors, or the model's, publish.

    Where `forward_features` gives tokens there are "patches", their "mean", and "cls" if there is a CLS token or an
    attention pool. Other models (convolutions, hierarchies) give "cls" alone: what their own head would read.
    """
    refuse_source("a timm model", encoder)
    name, _, path_text = argument.partition("@")
    _refuse_unknown(name)
    is_random = path_text == RANDOM
    path = None if is_random else weights_file(Path(path_text)) if path_text else _cached(name)
    network, config = _create(name, options, path)
    details: dict[str, Any] = {"architecture": name, "center_crop": "none: a crop is the face already"}
    if path is None:
        details |= {"weights": RANDOM, "seed": SEED}
    else:
        details["ignored"] = _load_weights(network, read_tensors(path), path, name)
    frozen = _with_features(network.eval(), _preprocessing(name, config))
    return Loaded(frozen, f"timm:{name}@{RANDOM}" if is_random else f"timm:{name}", path, details=details)


def _create(name: str, options: Options, path: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return a network of timm without a classifier, and its data config: what its input is to be."""
    from timm.data import resolve_model_data_config

    size = options.timm_image_size
    if size is not None and not 1 <= size <= MAX_IMAGE_SIZE:
        raise UsageError(f"--timm-image-size {size}: wanted 1 to {MAX_IMAGE_SIZE}")
    arguments, overlay = _config_beside(path, name.partition(".")[0])
    if size is not None:
        arguments["img_size"] = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            network = _build(name, arguments, overlay)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"timm:{name}: cannot be built ({reason[:200]}); type a name of timm.list_models()"
            ) from error
    config = resolve_model_data_config(network)
    if size is not None:
        config["input_size"] = (3, size, size)
    return network, config


def _build(name: str, arguments: dict[str, Any], overlay: dict[str, Any]) -> Any:
    import timm

    try:
        return timm.create_model(name, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
    except TypeError:
        if "img_size" not in arguments:
            raise
    others = {key: value for key, value in arguments.items() if key != "img_size"}  # convolutions take any size
    return timm.create_model(name, num_classes=0, pretrained_cfg_overlay=overlay, **others)


def _refuse_unknown(name: str) -> None:
    from difflib import get_close_matches

    import timm

    family = name.partition(".")[0]
    if not timm.is_model(family):
        nearest = get_close_matches(family, timm.list_models(), n=1)
        advice = f'did you mean "{nearest[0]}"?' if nearest else "timm.list_models() names them all"
        raise UsageError(f'timm:{name}: timm has no model "{family}"; {advice}')


def _config_beside(path: Path | None, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a config.json beside the weights, as timm writes it, says of this architecture and its input."""
    if path is None or path.name not in FOLDER_FILES or not (path.parent / "config.json").is_file():
        return {}, {}
    try:
        content = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        if content.get("architecture") != family:
            return {}, {}
        given = content.get("pretrained_cfg", {})
        overlay = {name: given[name] for name in TAKEN_FROM_CONFIG if given.get(name) is not None}
        overlay |= {name: tuple(overlay[name]) for name in ("input_size", "mean", "std") if name in overlay}
        return dict(content.get("model_args", {})), overlay
    except (ValueError, TypeError, AttributeError) as error:
        raise NoInputError(f"{path.parent / 'config.json'}: not the config.json of a timm model") from error


def _preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UsageError(f"timm:{name}: takes {channels} x {height} x {width}, crops are square and have 3 colours")
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return Preprocessing(height, tuple(config["mean"]), tuple(config["std"]), interpolation)


def _cached(name: str) -> Path:
    """Return the weights of a model if an earlier download left them on this machine. Raises NoInputError if not."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UsageError(f"timm:{name}: {error}") from error
    if known is None:
        raise UsageError(f"timm:{name}: timm knows no weights of it; type timm:{name}@PATH or timm:{name}@{RANDOM}")
    repository = getattr(known, "hf_hub_id", None)
    if repository == "timm/":
        repository += f"{known.architecture}.{known.tag}" if known.tag else known.architecture
    for file in [known.hf_hub_filename] if repository and known.hf_hub_filename else FOLDER_FILES:
        found = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(found, str):
            return Path(found)
    where = f" from {known.url}" if getattr(known, "url", None) else ""
    fetch = f"--model hf:{repository} to fetch them, or " if repository else ""
    raise NoInputError(
        f"timm:{name}: its weights are not on this machine, and nothing is fetched unasked; type {fetch}"
        f"--model timm:{name}@PATH with the file{where}"
    )


def _load_weights(network: Any, tensors: Tensors, path: Path, name: str) -> dict[str, int]:
    """Load a file's tensors, with timm's names or in a layout that timm converts; return what is left aside."""
    expected = network.state_dict()
    anchors = prefixes(tensors, max(expected, key=len))
    prefix = preferred(anchors) if anchors else _wrapper(tensors)
    heads = _heads(network)
    inside = below(tensors, prefix)
    found = {key: one for key, one in inside.items() if key in expected or not key.startswith(heads)}
    if misfits(expected, found):
        converted = _converted(network, inside)
        if converted is not None and not misfits(expected, converted):
            found = converted
    found |= {key: one for key, one in expected.items() if key.endswith("num_batches_tracked") and key not in found}
    load_exactly(network, found, path, "timm", f"timm's {name}", tensors)
    return left_aside((key for key in tensors if not key.startswith(prefix) or _is_head(key, prefix, heads)), prefix)


def _heads(network: Any) -> tuple[str, ...]:
    """Return what the names of a classifier's tensors begin with."""
    known = network.pretrained_cfg.get("classifier") or ()
    return tuple(f"{head}." for head in ([known] if isinstance(known, str) else known))


def _is_head(name: str, prefix: str, heads: tuple[str, ...]) -> bool:
    return bool(heads) and name.removeprefix(prefix).startswith(heads)


def _wrapper(tensors: Tensors) -> str:
    """Return the usual words before all names of a file's model."""
    prefix = ""
    while word := next((one for one in WRAPPERS if any(name.startswith(prefix + one) for name in tensors)), ""):
        prefix += word
    return prefix


def _converted(network: Any, found: Tensors) -> Tensors | None:
    """Return tensors as timm converts the layouts of other authors, and other grids of positions; None if it cannot."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        converted = convert(
            {name: one.float() if one.is_floating_point() else one for name, one in found.items()}, network
        )
    except Exception:  # written for the files of known authors: on others it fails in any way
        return None
    expected = network.state_dict()
    heads = _heads(network)
    return {name: one for name, one in converted.items() if name in expected or not name.startswith(heads)}


def _with_features(network: Any, preprocessing: Preprocessing) -> FrozenEncoder:
    """Wrap a network by what its `forward_features` gives for one image."""
    size = preprocessing.image_size
    try:
        with torch.inference_mode():
            given = network.forward_features(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"--timm-image-size {size}: {str(error).splitlines()[0][:200]}") from error
    num_patches = getattr(getattr(network, "patch_embed", None), "num_patches", None)
    num_prefix_tokens = getattr(network, "num_prefix_tokens", None)
    if num_patches is None or num_prefix_tokens is None or not isinstance(given, torch.Tensor):
        return PooledEncoder(network, preprocessing)
    has_tokens = given.shape == (1, num_prefix_tokens + num_patches, network.num_features)
    return TokenEncoder(network, preprocessing) if has_tokens else PooledEncoder(network, preprocessing)


class PooledEncoder(FrozenEncoder):
    """A network's one vector for an image, pooled as its own classifier would read it: "cls" alone."""

    num_patches = 0
    class_token = True
    has_mean = False

    def __init__(self, network: Any, preprocessing: Preprocessing):
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.embed_dim = int(getattr(network, "head_hidden_size", network.num_features))
        self.normalise = Normalise(preprocessing)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "cls" [B, D] of uint8 images."""
        given = self.network.forward_features(self.normalise(images))
        return {"cls": self.network.forward_head(given, pre_logits=True).float()}
