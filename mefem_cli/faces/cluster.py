"""`mefem crop ... --on ray --parts N`: parts of the sources cropped by machines of a cluster, then merged.

The parts stay beside the crops folder, in `.<name>.parts/`, their crops linked rather than copied: run again, each
takes in what is new.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

from mefem_cli import console
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.executors import parts
from mefem_cli.executors.options import PartsOptions
from mefem_cli.executors.parts import Part
from mefem_cli.faces import job, merge
from mefem_cli.faces.crop import CropOptions
from mefem_cli.faces.inputs import STDIN
from mefem_cli.parts import Given
from mefem_cli.stores import product
from mefem_cli.stores.crops import MANIFEST, PROVENANCE
from mefem_cli.stores.product import ProductOptions

# Of the merged folder, or not to be cut into parts.
NOT_OF_A_PART = frozenset(
    ("on", "parts", "out", "overwrite", "resume", "labels", "max_rejects", "quiet", "json", "config", "debug")
)
CROPS = "crops"  # the crops folder of a part


def crop(
    command: ModuleType,
    arguments: list[str],
    given: Given,
    options: CropOptions,
    output: ProductOptions,
    on: PartsOptions,
) -> job.CropReport:
    """Crop in parts on a cluster and merge them. Raises MefemError as `mefem crop` does, and for what has no parts."""
    _refuse_what_has_no_parts(arguments, options, output)
    out = Path(output.out or job.DEFAULT_OUT).absolute()
    job.check_output(out, output.overwrite)
    folder = out.with_name(f".{out.name}.parts")
    if not output.overwrite and out.exists() and any(out.iterdir()) and not _is_made_of(out, folder):
        raise OutputError(f"{out} was not made in parts; name another --out")
    if output.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    _refuse_another_count(folder, on)
    words = parts.words_of(command, given, NOT_OF_A_PART | ({"key"} if options.labels else set()))

    def make(number: int, count: int) -> Part:
        name = f"{number}-{count}"
        out_words = [f"--shard={number}/{count}", "--quiet", "-o", str(folder / name / CROPS)]
        return Part(("crop", *arguments, *words, *out_words), folder / name, name)

    folder.mkdir(parents=True, exist_ok=True)
    done = [_crops_of(part, code) for part, code in parts.run_parts(on, make, folder)]
    crops = [str(one) for one in done if one is not None]
    if len(crops) < parts.LEAST_PARTS:
        raise NoInputError("so few photos are no work for a cluster; type the same without --on")
    merged = CropOptions(merge=True, labels=options.labels, key=options.key, max_rejects=options.max_rejects)
    return merge.merge(crops, merged, ProductOptions(out=str(out), overwrite=_is_stale(out, crops), seed=output.seed))


def _refuse_what_has_no_parts(arguments: list[str], options: CropOptions, output: ProductOptions) -> None:
    if STDIN in arguments:
        raise UsageError("--on ray: a list on stdin cannot be cut into parts; name a table with a column path")
    if not arguments:
        raise UsageError("no photos named; type mefem crop FOLDER --on ray")
    for name, is_given in (("--merge", options.merge), ("--shard", options.shard), ("--limit", output.limit)):
        if is_given:
            raise UsageError(f"--on ray and {name}: leave one out")


def _refuse_another_count(folder: Path, on: PartsOptions) -> None:
    counts = {path.name.partition("-")[2] for path in folder.glob("*-*")}
    if counts and on.parts is not None and counts != {str(on.parts)}:
        raise OutputError(f"{folder} holds {', '.join(sorted(counts))} parts; type that --parts, or --overwrite")


def _crops_of(part: Part, code: int) -> Path | None:
    """Return the crops folder of a part, None if no source fell to it. Raises MefemError if it failed."""
    crops = part.folder / CROPS
    if code == 0 or (code == NoInputError.exit_code and (crops / MANIFEST).is_file()):  # complete, without a face
        return crops
    if code == NoInputError.exit_code and "for --shard" in str(parts.refuse(part, code)):
        return None
    console.note(f"the whole is in {part.log}")
    raise parts.refuse(part, code)


def _is_made_of(out: Path, folder: Path) -> bool:
    """Return whether a crops folder was merged from parts that lie in a folder."""
    try:
        inputs = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any(Path(one).is_relative_to(folder) for one in inputs)


def _is_stale(out: Path, crops: list[str]) -> bool:
    """Return whether a merged folder is there and a part has changed since."""
    if not (out / PROVENANCE).is_file():
        return out.is_dir() and any(out.iterdir())
    inputs = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))["inputs"]
    return any(inputs.get(f"{one}/{MANIFEST}") != product.file_sha256(Path(one) / MANIFEST) for one in crops)
