"""Tensors in files from elsewhere: reading them, finding an encoder among them, and loading all of it or nothing.

Files are untrusted: nothing is unpickled but tensors and plain containers, and names are shown as ASCII. Dicts may be
nested; names are joined with dots, `teacher.backbone.cls_token`.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mefem_cli.backbones import _frozen
from mefem_cli.errors import NoInputError

Tensors = dict[str, torch.Tensor]
PATCH_PROJECTION = "patch_embed.proj.weight"  # every ViT with timm's names has it
AVERAGED = ("target", "teacher", "ema", "momentum")  # of several encoders in a file the averaged one is taken
ENDINGS = (".safetensors", ".tar", ".pth", ".pt", ".bin", ".ckpt", ".onnx")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face, in the order of preference
PICKLE, ZIP = b"\x80", b"PK"  # what files of torch begin with
MAX_NESTING, MAX_TENSORS = 4, 100_000
SHOWN_NAMES, SHOWN_CHARACTERS = 3, 60
MAX_GROUPS, REASON_CHARACTERS = 20, 120


# Reading -------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, given: str = "") -> Tensors:
    """Return all tensors of a safetensors or torch file by their dotted names, on the CPU and read when they are used.

    Raises NoInputError, in whose message `given` stands before the path, for a file that is damaged or holds more than
    tensors and plain containers.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        is_pickle = head[:1] == PICKLE or head[:2] == ZIP
    except OSError as error:
        raise NoInputError(f"{given}{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise NoInputError(f"{given}{path}: is empty; get the file again")
    if head[8:] == b"{":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise NoInputError(
                f"{given}{path}: cannot be read as safetensors ({_first_line(error)}); it is damaged or cut short; "
                "get the file again"
            ) from error
    content = _load_torch(path, given, is_pickle)
    if not isinstance(content, Mapping):
        raise NoInputError(f"{given}{path}: holds a {type(content).__name__}, not tensors by name")
    tensors = dict(_named_tensors(content))
    if len(tensors) > MAX_TENSORS:
        raise NoInputError(f"{given}{path}: holds more than {MAX_TENSORS:,} tensors; that is no encoder")
    return tensors


def _load_torch(path: Path, given: str, is_pickle: bool) -> Any:
    """Return what `torch.save` wrote; `is_pickle`: it begins as such files do.

    A zip is mapped into memory, so only what is used of it takes any.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _refuse_compressed(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except (Exception, MemoryError) as error:  # torch's reader raises whatever a damaged file makes it do
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused and is_pickle:  # of a text torch reads letters as if they were instructions
            raise NoInputError(
                f"{given}{path}: holds {refused[1][:SHOWN_CHARACTERS]} beside tensors; that is not unpickled, as it "
                "could run code; save its state dict alone, best as .safetensors, and name that file"
            ) from error
        raise NoInputError(
            f"{given}{path}: cannot be read as a safetensors or torch file ({_first_line(error)}); "
            + (
                "type --model onnx:PATH for it"
                if path.suffix == ".onnx"
                else "it is damaged, cut short or none; get the file again"
            )
        ) from error


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip that unpacks to more than its size; torch does not compress."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("a zip with compressed members")


def _first_line(error: BaseException) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # before that torch explains itself
    first = (text.splitlines() or [type(error).__name__])[0]
    return ascii(first.partition(". ")[0])[1:-1][:REASON_CHARACTERS]


def _named_tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors of nested dicts with their dotted names; one more than are allowed at most."""
    pending: list[tuple[str, int, Mapping[Any, Any]]] = [("", 0, content)]
    seen: set[int] = set()  # a dict may hold itself, or one dict a thousand times
    count = 0
    while pending:
        prefix, depth, tree = pending.pop()
        if id(tree) in seen:
            continue
        seen.add(id(tree))
        for key, value in tree.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{key}", value.detach()
                count += 1
                if count > MAX_TENSORS:
                    return
            elif isinstance(value, Mapping) and depth < MAX_NESTING:
                pending.append((f"{prefix}{key}.", depth + 1, value))


def weights_file(path: Path) -> Path:
    """Return a file with tensors: `path`, or the one in a folder of Hugging Face's layout.

    Raises NoInputError where there is none, or where it comes in several parts.
    """
    if not path.exists():
        raise NoInputError(f"{path}: no such file")
    if not path.is_dir():
        return path
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not found:
        in_parts = any((path / f"{name}.index.json").is_file() for name in FOLDER_FILES)
        why = "its weights come in several files, which is not supported" if in_parts else "no weights in this folder"
        raise NoInputError(f"{path}: {why}; name one of {' or '.join(FOLDER_FILES)}")
    return found[0]


def name_of(choice: str, path: Path) -> str:
    """Return what an encoder is called: the choice and the name of its file, or of the folder that it fills.

    >>> name_of("ijepa", Path("IN1K-vit.h.14-300e.pth.tar")), name_of("ijepa", Path("/vith14_1k/model.safetensors"))
    ('ijepa:IN1K-vit.h.14-300e', 'ijepa:vith14_1k')
    """
    name = path.absolute().parent.name if path.name in FOLDER_FILES else path.name
    while name.lower().endswith(ENDINGS):
        name = name.rpartition(".")[0]
    return f"{choice}:{name}"


# Finding -------------------------------------------------------------------------------------------------------------


def preferred(prefixes: Iterable[str]) -> str:
    """Return what stands before the encoder to take of several: an averaged one, else the one with the shortest name.

    >>> preferred(["student.backbone.", "teacher.backbone."]), preferred(["model.decoder.", "model."])
    ('teacher.backbone.', 'model.')
    """
    return min(prefixes, key=lambda one: (not any(word in one.lower() for word in AVERAGED), len(one), one))


def prefixes(tensors: Iterable[str], name: str) -> list[str]:
    """Return what stands before a name in a file, for each time that it is there.

    >>> prefixes(["module.cls_token", "head.weight", "xcls_token"], "cls_token")
    ['module.']
    """
    return [one.removesuffix(name) for one in tensors if one == name or one.endswith(f".{name}")]


def below(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


def left_aside(names: Iterable[str], prefix: str = "") -> dict[str, int]:
    """Return how many names there are with each beginning: a record of what in a file is not used.

    The beginning is one component longer than the encoder's `prefix`, or than what both have in common.

    >>> left_aside(["teacher.head.0.weight", "teacher.head.0.bias", "teacher.body.mask", "opt.lr"], "teacher.body.")
    {'opt': 1, 'teacher.body.mask': 1, 'teacher.head': 2}
    """
    root = prefix.split(".")[:-1]
    counts: Counter[str] = Counter()
    for name in names:
        components = name.split(".")
        common = 0
        while common < min(len(root), len(components)) and root[common] == components[common]:
            common += 1
        counts[shown_name(".".join(components[: common + 1]))] += 1
    return dict(sorted(counts.items())[:MAX_GROUPS])


# Loading -------------------------------------------------------------------------------------------------------------


def load_exactly(
    network: nn.Module,
    found: Tensors,
    path: Path,
    choice: str,
    described: str,
    whole: Tensors | None = None,
    named: Callable[[str], str] = str,
) -> None:
    """Make the tensors of a file, cast to float32, those of a network, which may be on the `meta` device.

    `whole` is all that the file holds, by its own names, where `found` has other names or is a part of it; `named`
    gives a name of `found` as the file has it. Raises NoInputError if one is missing, left over, of another shape or
    not finite: it says what does not fit what is `described`, and which choice other than `choice` the file looks like.
    """
    expected = network.state_dict()
    complaints = misfits(expected, found, named)
    if complaints:
        hint = _of_a_run(path) or _frozen.hint(path, found if whole is None else whole, choice)
        raise NoInputError(f"{path}: does not fit {described}{hint} ({complaints})")
    values = {name: one.to(expected[name].dtype, copy=True).contiguous() for name, one in found.items()}
    for name, one in values.items():
        if not one.isfinite().all():
            raise NoInputError(f"{path}: {shown_name(name)} holds numbers that are not finite; get the file again")
    network.load_state_dict(values, assign=True)


def _of_a_run(path: Path) -> str:
    is_run = path.name in FOLDER_FILES and (path.parent / "model.json").is_file()
    return f"; it is of a run of mefem: type --model {path.parent}" if is_run else ""


def misfits(expected: Mapping[str, torch.Tensor], found: Tensors, named: Callable[[str], str] = str) -> str:
    """Return which tensors are missing, unexpected and of another shape, a few of each and how many; "" if none.

    They are told as `named` gives their names.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and not fits(found[name], expected[name])]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    said = [f"{len(names)} {kind}: {shown([*map(named, names)])}" for kind, names in kinds.items() if names]
    if misshapen:
        first = misshapen[0]
        said.append(f"{shown_name(named(first))} is {list(found[first].shape)}, wanted {list(expected[first].shape)}")
    return "; ".join(said)


def fits(one: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a tensor has the shape that is wanted and numbers of its own, as many as its shape says."""
    is_plain = one.layout == torch.strided and one.device.type == "cpu"
    same_kind = one.is_floating_point() == expected.is_floating_point() and one.shape == expected.shape
    return is_plain and same_kind and one.numel() * one.itemsize <= one.untyped_storage().nbytes()


# Names ---------------------------------------------------------------------------------------------------------------


def shown(names: list[str]) -> str:
    """Return a few names and how many more there are."""
    rest = f", and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(map(shown_name, names[:SHOWN_NAMES])) + rest


def shown_name(name: str) -> str:
    """Return a name without control characters, which a terminal would obey."""
    return ascii(name)[1:-1][:SHOWN_CHARACTERS]
