"""`mefem embed ... --on ray --parts N`: shares of the crops embedded by machines of a cluster into one store.

The shares lie beside the store (see `stores/feature_parts.py`); the last piece of work makes the store of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

from mefem_cli import console
from mefem_cli.backbones import _frozen
from mefem_cli.embedding import RUNS, Done, EmbedOptions
from mefem_cli.errors import OutputError, UsageError
from mefem_cli.executors import parts
from mefem_cli.executors.options import PartsOptions
from mefem_cli.executors.parts import Part
from mefem_cli.parts import Given
from mefem_cli.stores import feature_parts, runs
from mefem_cli.stores.features import FeatureStore
from mefem_cli.stores.product import ProductOptions, lock

NOT_OF_A_PART = frozenset(("on", "parts", "out", "model", "shard", "resume", "quiet", "json", "config", "debug"))
WORK = "ray"  # of the folder with the parts: logs and locks of the shares


def embed(
    command: ModuleType,
    folders: list[Path],
    given: Given,
    options: EmbedOptions,
    output: ProductOptions,
    on: PartsOptions,
) -> list[Done]:
    """Embed in parts on a cluster. Raises MefemError as `mefem embed` does, and for what has no parts."""
    _refuse_what_has_no_parts(options, output)
    out = Path(output.out or "features.h5").absolute()
    model = _frozen.absolute(options.model[0] if options.model else str(runs.latest_run(RUNS)))
    folder = feature_parts.folder_of(out)
    if output.overwrite:
        _throw_away(folder)
    before = _known(out) if not output.overwrite else 0
    words = ["embed", *map(str, folders), *parts.words_of(command, given, NOT_OF_A_PART), f"--model={model}"]
    words += ["--quiet", "-o", str(out)]

    def make(number: int, count: int) -> Part:
        name = f"{number}-{count}"
        return Part((*words, f"--shard={number}/{count}"), folder / WORK / name, name)

    def make_store(number: int, count: int) -> Part:
        return Part(tuple(words), out.parent / f".{out.name}.ray", "store")

    folder.mkdir(parents=True, exist_ok=True)
    wants_gpu = str(given.values.get("device", "auto")).startswith(("auto", "cuda"))
    for part, code in parts.run_parts(on, make, folder, wants_gpu):
        if code:
            console.note(f"the whole is in {part.log}")
            raise parts.refuse(part, code)
    one = PartsOptions(on.on, 1)
    for part, code in parts.run_parts(one, make_store, out.parent, wants_gpu):
        if code:
            raise parts.refuse(part, code)
        shutil.rmtree(part.folder, ignore_errors=True)
    with FeatureStore.open(out) as store:
        return [Done(out, len(store), len(store) - before, len(store.unreadable))]


def _refuse_what_has_no_parts(options: EmbedOptions, output: ProductOptions) -> None:
    if len(options.model) > 1:
        raise UsageError(f"--on ray: one encoder at a time; {len(options.model)} are named with --model")
    if "{model}" in (output.out or ""):
        raise UsageError(f"--on ray: wants the store's own path with -o; given {output.out}")
    for name, is_given in (("--shard", options.shard is not None), ("--gpus", options.gpus > 1)):
        if is_given:
            raise UsageError(f"--on ray and {name}: leave one out")


def _throw_away(folder: Path) -> None:
    """Remove the parts of an earlier time, unless another process writes them."""
    if not folder.exists():
        return
    with (folder / feature_parts.LOCK).open("w") as file:
        if not lock(file):
            raise OutputError(f"{folder}: another mefem embed writes it now; wait for it or name another -o")
        shutil.rmtree(folder)


def _known(out: Path) -> int:
    if not out.exists():
        return 0
    with FeatureStore.open(out) as store:
        return len(store)
