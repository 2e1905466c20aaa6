"""One command in parts on a cluster: `mefem crop` and `mefem embed` with `--on ray --parts N`.

Each part is the same command with `--shard i/N`, as a piece of work that is done again where a machine is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mefem_cli import console, errors
from mefem_cli.errors import MefemError
from mefem_cli.executors import Launch, Lost
from mefem_cli.executors.locks import claimed
from mefem_cli.executors.options import PartsOptions
from mefem_cli.parts import Given

LEAST_PARTS = 2


@dataclass(frozen=True)
class Part:
    """A command, and the folder that it works in, which no other attempt may."""

    words: tuple[str, ...]
    folder: Path
    name: str  # of its log

    @property
    def log(self) -> Path:
        """Where its stderr goes."""
        return self.folder / f"{self.name}.log"


def run_part(part: Part, launch: Launch) -> int:
    """Run a part and return its exit code."""
    part.folder.mkdir(parents=True, exist_ok=True)
    with claimed(part.folder, launch) as lock:
        return launch(part.words, part.log, lock)


def run_parts(
    options: PartsOptions, make: Callable[[int, int], Part], folder: Path, wants_gpu: bool = False
) -> list[tuple[Part, int]]:
    """Run the parts that `make(i, N)` makes, i from 1; return them with their exit codes.

    `folder` exists and is seen by all machines. Raises MefemError where Ray or a machine is not fit for it.
    """
    from mefem_cli.executors.on_ray import OnRay

    cluster = OnRay(options.on, None, wants_gpu, folder)
    count = options.parts or max(LEAST_PARTS, cluster.num_machines)
    codes: dict[Part, int] = {}
    with console.progress("parts", count) as bar:

        def take(part: Part, result: int | Lost) -> None:
            if isinstance(result, Lost):
                raise MefemError(f"{part.name}: {result.reason}; type the same again to go on")
            codes[part] = result
            bar.advance()

        cluster.run(run_part, [make(number, count) for number in range(1, count + 1)], take)
    return sorted(codes.items(), key=lambda item: item[0].folder)


def refuse(part: Part, code: int) -> MefemError:
    """Return the error that ended a part, as its process told it."""
    lines = part.log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, MefemError)]
    kind = next((one for one in kinds if one.exit_code == code), MefemError)
    return kind(f"part {part.name}: {told.partition(': ')[2] or told}")


def words_of(command: ModuleType, given: Given, leave_out: Collection[str]) -> list[str]:
    """Return the options that were given to a command, from wherever they came, as words of a command line."""
    from mefem_cli.main import sections

    words: list[str] = []
    for _, options in sections(command):
        for option in options:
            if option.name in given and option.name not in leave_out:
                words += option.typed(option.parse(given.values[option.name]))
    return words
