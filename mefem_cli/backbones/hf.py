"""hf:OWNER/NAME[/FILE], fetched from Hugging Face, such as hf:boretsyury/MeFEm; nothing else uses the network."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from mefem_cli import console
from mefem_cli.backbones import ijepa, mefem, timm
from mefem_cli.backbones._frozen import Loaded
from mefem_cli.backbones._tensors import ENDINGS, FOLDER_FILES
from mefem_cli.errors import NoInputError, UsageError

SPEC = "hf:OWNER/NAME"
CONFIG = "config.json"


def load(argument: str, encoder: str | None = None, options: Any = None) -> Loaded:
    """Fetch a file (once: it stays in Hugging Face's cache) and load it.

    A repository of timm, or of I-JEPA in Hugging Face's layout, says so in its config.json; any other is taken for
    MeFEm's: a timm ViT's tensors.
    """
    owner, _, rest = argument.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise UsageError(f"hf:{argument}: wanted OWNER/NAME or OWNER/NAME/FILE, such as hf:boretsyury/MeFEm")
    repository = f"{owner}/{name}"
    config: dict[str, Any] = {}
    if not file:
        file, has_config = _choose(repository)
        if has_config:
            config = _read_config(_fetch(repository, CONFIG))
    path = _fetch(repository, file)
    if "architecture" in config:
        tag = (config.get("pretrained_cfg") or {}).get("tag")
        model = f"{config['architecture']}.{tag}" if tag else str(config["architecture"])
        loaded = timm.load(f"{model}@{path}", encoder, timm.Options())
    elif config.get("model_type") == "ijepa":
        loaded = ijepa.load(str(path), encoder)
    else:
        loaded = mefem.load(str(path), encoder)
    loaded.name = f"hf:{repository}" + ("" if file in FOLDER_FILES else f"/{file}")
    loaded.details |= {"repository": repository, "file": file, "revision": _revision(path)}
    return loaded


def _choose(repository: str) -> tuple[str, bool]:
    """Return the file with weights in a repository, the smallest of several, and whether it has a config.json."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repository, files_metadata=True).siblings or []
    except Exception as error:
        raise _refused(f"hf:{repository}", error) from error
    sizes = {one.rfilename: one.size or 0 for one in siblings if one.rfilename.endswith(ENDINGS)}
    sizes = {file: size for file, size in sizes.items() if not file.endswith(".onnx")}
    if not sizes:
        raise NoInputError(f"hf:{repository}: no weights in it ({', '.join(ENDINGS)}); name its FILE")
    usual = [file for file in FOLDER_FILES if file in sizes]
    file = usual[0] if usual else min(sizes, key=lambda one: (sizes[one], one))
    if not usual and len(sizes) > 1:
        others = ", ".join(sorted(set(sizes) - {file}))
        console.note(f"hf:{repository}: takes {file}, the smallest; there is also {others} (type hf:{repository}/FILE)")
    return file, any(one.rfilename == CONFIG for one in siblings)


def _fetch(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:
        raise _refused(f"hf:{repository}/{file}", error) from error


def _refused(what: str, error: Exception) -> NoInputError:
    """Return one line for what the library raises when it finds no network, no repository or no right to it."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return NoInputError(f"{what}: cannot be fetched ({reason[:200]}); get the file yourself and type mefem:PATH")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NoInputError(f"{path}: not a config.json; name the FILE with the weights") from error
    return content if isinstance(content, dict) else {}


def _revision(path: Path) -> str:
    """Return the commit of a file in the cache, `.../snapshots/<commit>/FILE`, or "" where it lies elsewhere."""
    components = PurePosixPath(path.as_posix()).parts
    return components[components.index("snapshots") + 1] if "snapshots" in components else ""
