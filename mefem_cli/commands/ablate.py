"""A grid of options -> a table of scores.

Each cell is pretrain, embed and probe. Names a preset (table4: the ablation table of the paper), a YAML grid file, or
--vary. Writes ablations/<name>/ with results.csv and results.md. Run again, it continues: finished cells are reused,
failed ones tried again.

Try: mefem ablate --vary mask=stripes,quadrants --vary width=2,3 --seeds 3
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mefem_cli.ablation.job import Job
    from mefem_cli.parts import Given

ARGUMENT = ("preset", "A preset (table4) or a grid file; default: what --vary and --set say.")
OPTIONS = (
    "ablation.job:AblateOptions",
    "executors.options:OnOptions",
    "engine.device:DeviceOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)


def run(arguments: list[str], given: Given) -> None:
    """Run the grid, or with `--dry-run` list its cells."""
    from mefem_cli import console, parts
    from mefem_cli.ablation.job import Job

    begun = time.monotonic()
    options = given.build("ablation.job", "AblateOptions")
    product = given.build("stores.product", "ProductOptions")
    machine_options = [option.name for option in parts.read_fields("engine.device", "DeviceOptions")]
    machine = {name: given.values[name] for name in [*machine_options, "limit"] if name in given}
    job = Job.prepare(arguments, options, machine, product, given.build("executors.options", "OnOptions"))
    if product.dry_run:
        _print_plan(job)
        return
    counts = job.run()
    if counts["failed"]:
        console.warn(f"{counts['failed']} of {len(job.cells) * len(job.seeds)} cells failed; run again to retry them")
    console.product(job.out, time.monotonic() - begun, crops=len(job.crops), rejects={}, **counts)


def _print_plan(job: Job) -> None:
    from mefem_cli import console

    plan = job.plan()
    if console.wants_json():
        console.emit(plan)
        return
    console.table(_plan_table(plan))
    print(_plan_summary(plan))


def _plan_table(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("cell", "pretraining", "epochs", "steps", "heads", "features", "state", show_edge=False)
    for cell in plan["cells"]:
        num_steps = "?" if cell["steps"] is None else f"{cell['steps']:,}"
        states = ", ".join(dict.fromkeys(cell["states"]))
        heads, features = cell["head"].replace(",", ", "), cell["features"] or "default"
        table.add_row(cell["cell"], cell["pretraining"][:6], str(cell["epochs"]), num_steps, heads, features, states)
    return table


def _plan_summary(plan: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, plan["seeds"]))
    machine = f"on GPUs {', '.join(plan['gpus'])}" if plan["gpus"] else "without a GPU"
    return (
        f"cells: {len(plan['cells'])}, scored on {', '.join(plan['tasks'])} of {plan['crops']:,} faces\n"
        f"pretrainings: {plan['pretrainings']} (seeds {seeds}), of which {plan['to_train']} to train: "
        f"about {plan['steps']:,} steps, {plan['jobs']} at once {machine}\n"
        f"-> {plan['out']}"
    )
