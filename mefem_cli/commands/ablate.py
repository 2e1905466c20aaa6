"""A grid of options -> a table of scores.

Each cell is pretrain, embed and probe. Names a preset (table4: the ablation table of the paper; table4-fair: the same
at equal epochs, three seeds; table2 and table3: given encoders, with --model), a YAML grid file, or --vary. Writes
ablations/<name>/. Run again, it continues: finished cells are reused, failed ones tried again. -n lists the cells and
times some steps; --status shows how far it is.

Try: mefem ablate --vary mask=stripes,quadrants --vary width=2,3 --seeds 3
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.ablation.job import AblateOptions, Job
    from mefem_cli.parts import Given

ARGUMENT = (
    "preset",
    "A preset (table2, table3, table4, table4-fair) or a grid file; default: what --vary and --set say.",
)
OPTIONS = (
    "ablation.job:AblateOptions",
    "executors.options:OnOptions",
    "engine.device:DeviceOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)


def run(arguments: list[str], given: Given) -> None:
    """Run the grid, or with `--dry-run` list its cells, or with `--status` say how far it is."""
    from mefem_cli import console, parts
    from mefem_cli.ablation.job import Job

    begun = time.monotonic()
    options = given.build("ablation.job", "AblateOptions")
    product = given.build("stores.product", "ProductOptions")
    machine_options = [option.name for option in parts.read_fields("engine.device", "DeviceOptions")]
    machine = {name: given.values[name] for name in [*machine_options, "limit"] if name in given}
    if options.status:
        _show_status(arguments, options, machine, product.out)
        return
    job = Job.prepare(arguments, options, machine, product, given.build("executors.options", "OnOptions"))
    if product.dry_run:
        if other := job.other_grid():
            console.warn(other)
        _print_plan(job)
        return
    counts = job.run()
    if counts["failed"]:
        console.warn(f"{counts['failed']} of {len(job.cells) * len(job.seeds)} cells failed; run again to retry them")
    console.product(job.out, time.monotonic() - begun, crops=len(job.crops), rejects={}, **counts)


def _show_status(arguments: list[str], options: AblateOptions, machine: dict[str, Any], out: str | None) -> None:
    """Show how far the ablation is that was named, else the one begun last."""
    from pathlib import Path

    from mefem_cli.ablation import job as jobs
    from mefem_cli.ablation import status

    if out or arguments or options.vary or options.model:
        folder = Path(out) if out else jobs.folder_of(jobs.read_grid(arguments, options, machine), None)
    else:
        begun = sorted(jobs.ABLATIONS.glob(f"*/{jobs.PROVENANCE}"), key=lambda path: path.stat().st_mtime)
        folder = begun[-1].parent if begun else jobs.ABLATIONS
    status.show(folder)


def _print_plan(job: Job) -> None:
    from mefem_cli import console
    from mefem_cli.ablation import plan as plans

    plan = plans.describe(job)
    if console.wants_json():
        console.emit(plan)
        return
    console.table(plans.to_table(plan))
    print(plans.summary(plan))
