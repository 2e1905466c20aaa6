"""Look into feature stores, merge them, join labels to them, export their vectors.

mefem store info [STORE]...: crops, features, encoder and labels. mefem store merge A B -o C: stores of one encoder
and different crops as one. mefem store labels STORE TABLE: the columns of a CSV or Parquet table become labels.
mefem store export STORE -o FILE.parquet (or .npz): ids, labels, CLS and mean features for other programs. Without
STORE, info and export read the pipe or features.h5.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mefem_cli.parts import Given
    from mefem_cli.store_tools import StoreOptions

ARGUMENT = ("verb store", "info, merge, labels or export; then stores, and for labels a table.")
OPTIONS = ("store_tools:StoreOptions", "console:ConsoleOptions")

DEFAULT_STORE = "features.h5"
USES = {  # which options a verb takes
    "info": (),
    "merge": ("out", "overwrite"),
    "labels": ("out", "overwrite", "key"),
    "export": ("out", "overwrite", "features"),
}


def run(arguments: list[str], given: Given) -> None:
    """Do what the first argument says."""
    from mefem_cli import console
    from mefem_cli.errors import UsageError, did_you_mean

    if not arguments:
        raise UsageError("name what to do: info, merge, labels or export, as in mefem store info features.h5")
    verb, *rest = arguments
    if verb not in USES:
        hint = f"; type mefem store info {verb}" if verb.endswith((".h5", ".hdf5")) else did_you_mean(verb, USES)
        raise UsageError(f'mefem store does not know "{verb}"{hint}')
    for name in ("out", "overwrite", "key", "features"):
        if name in given and name not in USES[verb]:
            console.warn(f"--{name} has no effect with {verb}")
    options = given.build("store_tools", "StoreOptions")
    {"info": _info, "merge": _merge, "labels": _labels, "export": _export}[verb](rest, options)


def _info(arguments: list[str], options: StoreOptions) -> None:
    from mefem_cli import console, store_tools

    for path in _stores(arguments):
        known = store_tools.summary(path)
        if console.wants_json():
            console.emit(known)
            continue
        from rich.table import Table

        shown = Table(show_header=False, show_edge=False)
        for row in store_tools.summary_rows(known):
            shown.add_row(*row)
        console.table(shown)


def _merge(arguments: list[str], options: StoreOptions) -> None:
    from pathlib import Path

    from mefem_cli import console, store_tools

    begun, out = time.monotonic(), _out(options, "merged.h5")
    count = store_tools.merge([Path(one) for one in arguments], out, options.overwrite)
    console.product(out, time.monotonic() - begun, crops=count)


def _labels(arguments: list[str], options: StoreOptions) -> None:
    from pathlib import Path

    from mefem_cli import console, store_tools
    from mefem_cli.errors import UsageError

    if len(arguments) != 2:
        raise UsageError("labels: name a store and a table, as in mefem store labels features.h5 labels.csv")
    begun = time.monotonic()
    store, table = map(Path, arguments)
    out = Path(options.out) if options.out else None
    path, count = store_tools.attach(store, table, options.key, out, options.overwrite)
    console.product(path, time.monotonic() - begun, labelled=count)


def _export(arguments: list[str], options: StoreOptions) -> None:
    from mefem_cli import console, store_tools
    from mefem_cli.errors import UsageError

    begun, out = time.monotonic(), _out(options, "features.parquet")
    stores = _stores(arguments)
    if len(stores) > 1:
        raise UsageError(f"export: one store at a time, not {len(stores)}; merge them first")
    count = store_tools.export(stores[0], out, options.features, options.overwrite)
    console.product(out, time.monotonic() - begun, crops=count)


def _out(options: StoreOptions, example: str) -> Path:
    from pathlib import Path

    from mefem_cli.errors import UsageError

    if options.out is None:
        raise UsageError(f"name where it goes, such as -o {example}")
    return Path(options.out)


def _stores(arguments: list[str]) -> list[Path]:
    from pathlib import Path

    from mefem_cli import console

    if arguments:
        return [Path(one) for one in arguments]
    if console.stdin_is_pipe():
        return console.read_pipe_all("a feature store")
    return [Path(DEFAULT_STORE)]
