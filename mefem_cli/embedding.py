"""Embedding crops with encoders into feature stores, one each; what `mefem embed` runs.

Threads decode crops and make of each what every encoder wants to see, the device encodes, and a thread writes parts of
the stores (see `stores/feature_parts.py`), which become stores at the end. So a run that was killed goes on, several
processes share the work, and the old store stays until the new one is complete.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mefem_cli import console
from mefem_cli.backbones import _frozen
from mefem_cli.embedding_store import Embedding, bytes_sha256
from mefem_cli.engine import allocator, encode
from mefem_cli.engine.device import Device, DeviceOptions, announce, choose_device
from mefem_cli.engine.distributed import World
from mefem_cli.engine.encode import Features
from mefem_cli.engine.stop import stop_signals
from mefem_cli.engine.stream import Batch, ImageStream
from mefem_cli.errors import NoInputError, Stopped, UsageError
from mefem_cli.parts import Given
from mefem_cli.stores import feature_parts, runs
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.feature_parts import Parts, PartWriter
from mefem_cli.stores.features import refuse_unstorable
from mefem_cli.stores.product import ProductOptions, parse_shard

RUNS = Path("runs")
WRITES_AHEAD = 3  # batches on their way to the disk
NAMED_AS = re.compile(r"[^\w.-]+")  # characters that a file's name is better without


@dataclass(frozen=True)
class EmbedOptions:
    """The features."""

    model: list[str] = field(default_factory=list)  # an encoder: a run, its model.safetensors, or as timm:NAME@PATH
    # one of others (see below); given again, crops are read once and each encoder gets a store; default: runs/latest
    encoder: Literal["target", "source"] | None = None  # which encoder of the run; default: target, the EMA of source
    patches: bool = False  # store the features of every patch too
    dtype: Literal["float16", "float32"] = "float16"  # precision in the store
    compress: Literal["zstd"] | None = None  # compress the store; readers then need the package hdf5plugin
    gpus: int = 1  # GPUs of this machine to embed on, one process each; without GPUs: processes on the CPU
    shard: str | None = None  # i/N: embed the i-th of N parts of the crops and leave it beside the store; when all are
    # there, the same without --shard makes the store

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus {self.gpus}: wanted 1 or more")
        if self.shard is not None and self.gpus > 1:
            raise UsageError(f"--shard {self.shard}: is for one process; leave --gpus out")
        assert self.part

    @property
    def part(self) -> tuple[int, int]:
        """Which part of how many, from 1; (1, 1) is the whole. Raises UsageError."""
        return parse_shard(self.shard)


@dataclass(frozen=True)
class Done:
    """A complete store."""

    out: Path
    crops: int  # in the store
    embedded: int  # by this run
    unreadable: int


@dataclass
class Job:
    """Crops and encoders, ready to run."""

    options: EmbedOptions
    product: ProductOptions
    crops: Crops
    embeddings: list[Embedding]
    device: Device
    stream: ImageStream
    batch_size: int
    world: World

    @classmethod
    def prepare(
        cls,
        folders: list[Path],
        options: EmbedOptions,
        machine: DeviceOptions,
        product: ProductOptions,
        given: Given | None = None,
        world: World | None = None,
    ) -> Job:
        """Load the encoders and open the crops. Raises MefemError for whatever is missing or does not fit.

        `given` holds the options of the encoders' choices (see `backbones/_frozen.py`), `world` the processes that
        share the work.
        """
        asked = _batch_size(machine.batch_size)
        specs = options.model or [str(runs.latest_run(RUNS))]
        encoders = [_frozen.load(spec, options.encoder, given) for spec in specs]
        crops = Crops.open(*(folders or _default_crops(encoders[0].description)))
        if product.limit is not None:
            crops = crops.select(range(min(product.limit, len(crops))))
        device = choose_device(machine.device, machine.precision)
        embeddings = [Embedding(loaded, crops, device, options) for loaded in encoders]
        for one, out in zip(embeddings, out_paths(product.out, [one.model for one in embeddings]), strict=True):
            one.out = out
        views = [one.view for one in embeddings]
        stream = ImageStream(crops, crops.size, machine.workers, views=views, tolerant=True)
        if asked is None and not product.dry_run:
            asked = encode.auto_batch([one.encoding for one in embeddings], [view.image_size for view in views])
        batch_size = asked or encode.AUTO_BATCH.get(device.torch.type, 256)
        return cls(options, product, crops, embeddings, device, stream, batch_size, world or World())

    def run(self) -> list[Done]:
        """Write the stores, embedding only what an existing store of the same encoder, or a killed run, lacks.

        In several processes each embeds its share, and the first one writes the stores. Raises OutputError if a store
        was made by another encoder or with other options, or holds none of these crops, or another process writes it.
        """
        if self.device.torch.type == "cpu":
            allocator.keep_freed_memory()
        if self.options.shard is not None:
            return self._run_shard()
        with ExitStack() as stack:
            self.world.agree(lambda: self._begin(stack))
            missing = {number: one.missing() for number, one in enumerate(self.embeddings) if not one.is_complete}
            missing = self.world.from_first(missing)  # a part that is written meanwhile must not change the shares
            if missing:
                announce(self.device)
                self.world.agree(lambda: self._embed(missing))
            return self.world.agree(lambda: self._finish(missing) if self.world.is_first else [])

    def _run_shard(self) -> list[Done]:
        """Write the parts of the stores that hold one share of the crops; other processes write theirs meanwhile."""
        number, count = self.options.part
        world = World(number - 1, count)
        with ExitStack() as stack:
            self._begin(stack, rank=world.rank)
            share = np.arange(len(self.crops))[world.share(len(self.crops))]
            missing = {index: np.intersect1d(one.missing(), share) for index, one in enumerate(self.embeddings)}
            if any(map(len, missing.values())):
                announce(self.device)
                self._embed(missing, world.rank)
        folders = [feature_parts.folder_of(one.out) for one in self.embeddings]
        found = [Parts(folder).unreadable for folder in folders]
        return [
            Done(folder, len(share), len(missing[index]), sum(self.crops.ids[row] in broken for row in share))
            for index, (folder, broken) in enumerate(zip(folders, found, strict=True))
        ]

    def _begin(self, stack: ExitStack, rank: int | None = None) -> None:
        """Open the old stores; the first process holds the folders of the parts for all, or a shard's for its rank."""
        for one in self.embeddings:
            one.open_old(self.product.overwrite)
            stack.callback(one.close_old)
        for one in self.embeddings:
            if one.is_complete:
                console.note(f"{one.out}: complete already")
            elif self.world.is_first:
                stack.enter_context(feature_parts.begun(one.out, one.plan(), self.product.overwrite, rank))

    def _embed(self, missing: dict[int, np.ndarray], rank: int | None = None) -> None:
        """Write parts with the features of this process's share of the rows that an encoder misses.

        A shard's `missing` is its share already; its parts are named by its rank.
        """
        rows = np.unique(np.concatenate([*missing.values()]))
        if len(rows) < len(self.crops):
            console.note(f"{len(rows)} of {len(self.crops)} crops are to be embedded")
        rows = rows[self.world.share(len(rows))]
        batches = (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))
        needs = {number: np.isin(np.arange(len(self.crops)), one) for number, one in missing.items()}
        writers = {
            number: PartWriter(
                feature_parts.folder_of(self.embeddings[number].out), self.world.rank if rank is None else rank
            )
            for number in missing
        }
        with (
            _Writing() as writing,
            console.progress("embed", len(rows)) as bar,
            stop_signals(in_a_job=self.world.size > 1) as stop,
        ):
            try:
                for batch in self.stream.batches(batches, self.device.torch):
                    for number, writer in writers.items():
                        self._embed_batch(batch, needs[number], self.embeddings[number], writer, number, writing)
                    bar.advance(len(batch.index))
                    if stop.signal:
                        break
            finally:
                writing.finish([writer.flush for writer in writers.values()])
        if stop.signal:
            _raise_stopped(stop.signal)

    def _embed_batch(
        self, batch: Batch, needs: np.ndarray, one: Embedding, writer: PartWriter, number: int, writing: _Writing
    ) -> None:
        wanted = needs[batch.index]
        broken = batch.index[wanted & ~batch.readable]
        if len(broken):
            digests = [bytes_sha256(self.crops, int(row)) for row in broken]
            writing.submit(writer.append_unreadable, [self.crops.ids[row] for row in broken], digests)
        taken = wanted & batch.readable
        if taken.any():
            images = batch.views[number]
            if not taken.all():
                images = images[torch.from_numpy(np.flatnonzero(taken)).to(images.device)]
            writing.submit(self._write, one, writer, batch.index[taken], one.encoding(images))

    def _write(self, one: Embedding, writer: PartWriter, rows: np.ndarray, features: Features) -> None:
        """Wait for features to arrive from the device, look at them and hand them on; runs in the writing thread."""
        values, largest = features.arrays()
        for kind, stored in values.items():
            refuse_unstorable(lambda at: self._describe(int(rows[at])), kind, stored, largest[kind])
        digests = self.crops.columns["crop_sha256"][rows]
        writer.append([self.crops.ids[row] for row in rows], list(digests), values)

    def _describe(self, row: int) -> str:
        return f"{self.crops.ids[row]} ({self.crops.columns['source'][row] or self.crops.describe(row)})"

    def _finish(self, missing: dict[int, np.ndarray]) -> list[Done]:
        """Make the stores of the parts."""
        done = []
        for number, one in enumerate(self.embeddings):
            if number in missing:
                num_crops, unreadable = one.finish(self.product.seed)
                embedded = sum(self.crops.ids[row] not in unreadable for row in missing[number])
                done.append(Done(one.out, num_crops, embedded, len(unreadable)))
            else:
                assert one.old is not None
                done.append(Done(one.out, len(one.old), 0, len(one.old.unreadable)))
        return done

    def print_plan(self) -> None:
        """Print on stdout what would be embedded; nothing is written."""
        for one in self.embeddings:
            plan = self._plan(one)
            if console.wants_json():
                console.emit(plan)
                continue
            from rich.table import Table

            shown = Table("plan", "", show_edge=False)
            for name, value in plan.items():
                shown.add_row(name.replace("_", " "), str(value))
            console.table(shown)

    def _plan(self, one: Embedding) -> dict[str, Any]:
        one.open_old(self.product.overwrite)
        to_embed = 0 if one.is_complete else len(one.missing())
        one.close_old()
        vectors = sum(one.encoder.num_patches if kind == "patches" else 1 for kind in one.kinds)
        num_bytes = len(self.crops) * vectors * one.encoder.embed_dim * np.dtype(self.options.dtype).itemsize
        return {
            "out": str(one.out.absolute()),
            "crops": len(self.crops),
            "to_embed": to_embed,
            "model": one.model,
            "preprocessing": one.preprocessing,
            "features": dict.fromkeys(one.kinds, one.encoder.embed_dim),
            "device": str(self.device),
            "batch_size": self.batch_size,
            "estimated_bytes": num_bytes,
            "options": asdict(self.options),
        }


class _Writing:
    """One thread that does pieces of work in their order, a few behind; what fails there is raised here."""

    def __enter__(self) -> _Writing:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[None]] = deque()
        return self

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Hand on a piece of work; wait while many are on their way."""
        self._pending.append(self._thread.submit(work, *arguments))
        while len(self._pending) > WRITES_AHEAD:
            self._pending.popleft().result()

    def finish(self, last: Sequence[Callable[[], None]]) -> None:
        """Do all that was handed on up to the first failure, then `last`, and raise the failure."""
        failure: BaseException | None = None
        while self._pending:
            try:
                self._pending.popleft().result()
            except BaseException as error:
                failure = failure or error
        for work in last:
            self._thread.submit(work).result()
        if failure is not None:
            raise failure

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)


def _raise_stopped(signal_number: int) -> None:
    import signal

    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(f"stopped by signal {signal_number}; what was embedded is kept, type the same command to go on")


def out_paths(out: str | None, models: Sequence[dict[str, Any]]) -> list[Path]:
    """Return where each encoder's store goes: `out`, or with several encoders below a folder, named by the model.

    >>> [path.as_posix() for path in out_paths(None, [{"name": "a"}, {"name": "timm:b/c"}])]
    ['features/a.h5', 'features/timm-b-c.h5']
    >>> [path.as_posix() for path in out_paths("x/{model}-fp16.h5", [{"name": "a"}])]
    ['x/a-fp16.h5']
    """
    if len(models) == 1 and "{model}" not in (out or ""):
        return [Path(out or "features.h5")]
    pattern = out or "features"
    if "{model}" not in pattern:
        if pattern.endswith((".h5", ".hdf5")):
            raise UsageError(
                f"--out {out}: {len(models)} encoders make a store each; name a folder or a pattern, "
                f"{pattern.rpartition('.')[0]}-{{model}}.h5"
            )
        pattern = f"{pattern.rstrip('/')}/{{model}}.h5"
    for first, second in itertools.combinations(models, 2):
        if first == second:
            raise UsageError(f"--model: the encoder {first['name']} is named twice; name it once")
    plain = [NAMED_AS.sub("-", str(model["name"])).strip("-.") or "model" for model in models]
    digests = [str(model.get("sha256"))[:8] for model in models]
    names = [f"{name}-{digest}" if plain.count(name) > 1 else name for name, digest in zip(plain, digests, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError(f"--model: two encoders are called {plain[0]}; embed them one by one with -o")
    return [Path(pattern.replace("{model}", name)) for name in names]


def _default_crops(description: dict[str, Any]) -> list[Path]:
    """Return the crops folders that the run was trained on, where they still exist, else crops/."""
    recorded = [Path(folder) for folder in description.get("provenance", {}).get("inputs", {})]
    if recorded and all(folder.exists() for folder in recorded):
        return recorded
    if not Path("crops").exists():
        raise NoInputError("no crops: those of the run are gone and there is no crops/; name a crops folder")
    return [Path("crops")]


def _batch_size(asked: str) -> int | None:
    """Return the number asked for, None for auto."""
    if asked == "auto":
        return None
    if not asked.isdecimal() or int(asked) < 1:
        raise UsageError(f"--batch-size {asked}: wanted auto or a positive number")
    return int(asked)
