"""A feature store + a label -> scores with intervals.

A task is a label of the store, or bmi (also from weight_kg and height_cm), age, or a data set's protocol: celeba,
fairface, mcd_rppg, utkface (celeba.Smiling is one of its targets). Each face is predicted by a head that never saw its
person; intervals are 95 % bootstraps over people. Reads the pipe or features.h5; writes nothing without -o.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mefem_cli.evaluation.job import Job, Results
    from mefem_cli.parts import Given
    from mefem_cli.stores.product import ProductOptions

ARGUMENT = ("task", "Tasks or labels, several at once: bmi, age, or any label in the store.")
OPTIONS = (
    "evaluation.options:ProbeOptions",
    "evaluation.saved:KeepOptions",
    "stores.product:ProductOptions",
    "console:ConsoleOptions",
)
ROOMS = ("probes", "tasks")

DEFAULT_STORE = "features.h5"


def run(arguments: list[str], given: Given) -> None:
    """Probe, or with `--dry-run` say what would be probed."""
    from pathlib import Path

    from mefem_cli import console, parts
    from mefem_cli.errors import UsageError
    from mefem_cli.evaluation import job as jobs
    from mefem_cli.evaluation import saved
    from mefem_cli.evaluation.heads import chosen_heads
    from mefem_cli.stores import product

    options = given.build("evaluation.options", "ProbeOptions")
    keep = given.build("evaluation.saved", "KeepOptions")
    output = given.build("stores.product", "ProductOptions")
    chosen_heads(options.head)  # a typo should not wait for the pipe
    if not arguments:
        raise UsageError(f"name a task, such as `mefem probe bmi`{_labels_hint(options.store)}")
    if output.out and not output.overwrite:
        product.refuse_existing(Path(output.out), overwrite=False, holds="scores.json")

    task_options = {
        name: given.build(f"tasks.{name}")
        for name in parts.names("tasks")
        if parts.read_fields(f"tasks.{name}") and any(task.partition(".")[0] == name for task in arguments)
    }
    stores = jobs.open_pairs(options) if options.train_store else jobs.open_stores(_paths(options.store))
    job = jobs.Job.prepare(stores, arguments, options, output.seed, output.limit, task_options)
    head_options = {head: given.build(f"probes.{head}") for head, _ in job.pairs}
    if keep.save:
        saved.check(job, Path(keep.save), output.overwrite)
    for name in [*given.unused, *(["resume"] if output.resume else [])]:
        console.warn(f"--{name.replace('_', '-')} has no effect here")
    for note in job.notes:
        console.warn(note)
    if output.dry_run:
        _print_plan(job)
        return
    with console.progress("probe", job.num_fits) as bar:
        results = job.run(head_options, after_fold=lambda fitted: bar.advance(status=fitted))
    _print_results(results)
    if output.out:
        _write_folder(Path(output.out), job, results, output, keep.faces)
    if keep.save:
        score = saved.save(Path(keep.save), job, results, head_options, _record(job, output))
        of_all = f", the best of {len(results.scores)} out of fold" if len(results.scores) > 1 else ""
        console.note(f"wrote {keep.save}: {score.head} on {score.features}{of_all}, fitted on all faces")


def _labels_hint(stores: list[str]) -> str:
    from pathlib import Path

    from mefem_cli.evaluation.labels import known_names
    from mefem_cli.stores.features import FeatureStore

    path = Path(stores[0] if stores else DEFAULT_STORE)
    if not path.is_file():
        return ""
    with FeatureStore.open(path) as store:
        return known_names("", store.labels)


def _paths(given: list[str]) -> list[Path]:
    from pathlib import Path

    from mefem_cli import console

    if given:
        return [Path(one) for one in given]
    if console.stdin_is_pipe():
        return console.read_pipe_all("a feature store")
    return [Path(DEFAULT_STORE)]


def _print_plan(job: Job) -> None:
    from mefem_cli import console
    from mefem_cli.evaluation import report

    if console.wants_json():
        for row in report.plan(job):
            console.emit(row)
    else:
        console.table(report.plan_table(job))


def _print_results(results: Results) -> None:
    from mefem_cli import console
    from mefem_cli.evaluation import report

    for note in results.notes:
        console.note(note)
    if console.wants_json():
        for row in report.rows(results):
            console.emit(row)
    else:
        for number, table in enumerate(report.tables(results)):
            if number:
                print()
            console.table(table)


def _record(job: Job, output: ProductOptions) -> dict[str, Any]:
    from dataclasses import asdict

    from mefem_cli.stores import product

    record = product.provenance(asdict(job.options), job.inputs, output.seed, job.options.device)
    return {**record, "models": [store.provenance.get("model") for store in job.stores]}


def _write_folder(folder: Path, job: Job, results: Results, output: ProductOptions, show_faces: bool) -> None:
    from mefem_cli import console
    from mefem_cli.evaluation import report
    from mefem_cli.reports import probe as pages
    from mefem_cli.stores import product

    record = _record(job, output)
    page = pages.page(results, job.stores, record, show_faces)
    product.refuse_existing(folder, output.overwrite, holds="scores.json")
    report.save(folder, results, record)
    product.write_text(folder / pages.REPORT, page)
    console.note(f"wrote {folder}: {pages.REPORT}, scores.json, predictions.parquet, provenance.json")
