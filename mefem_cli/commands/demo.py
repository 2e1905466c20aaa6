"""The whole road on imaginary people, in minutes: photos -> crops -> encoder -> features -> scores.

Renders photos of people whose BMI, age, sex and skin tone are known, runs crop, pretrain, embed and probe on them,
showing each command line before it runs, and ends with a table and mefem-demo/report.html. Needs no data, no network
and no GPU. Stopped, it goes on when run again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mefem_cli.demo import Demo
    from mefem_cli.parts import Given

OPTIONS = ("demo:DemoOptions", "console:ConsoleOptions")


def run(arguments: list[str], given: Given) -> None:
    """Run the demo, or with `--dry-run` say what it would do."""
    from mefem_cli import console
    from mefem_cli.demo import Demo

    begun = time.monotonic()
    demo = Demo(given.build("demo", "DemoOptions"), given.build("console", "ConsoleOptions"))
    if demo.options.dry_run:
        demo.check_folder()
        _print_plan(demo)
        return
    demo.run()

    from mefem_cli.reports import demo as report
    from mefem_cli.reports.demo_results import Results

    results = Results.read(demo.scores)
    page = report.write(demo, results)
    seconds = time.monotonic() - begun
    _tell_times(demo, seconds)
    if console.wants_json():
        console.product(demo.out, seconds, report=str(page.absolute()), rejects=demo.rejects, **results.as_json())
        return
    console.table(results.table())
    print(f"\n{results.outcome()}\n")
    print("\n".join(report.wrapped(results.meaning())))
    print(f"\n{page.absolute()}")


def _print_plan(demo: Demo) -> None:
    from mefem_cli import console

    plan = demo.plan()
    if console.wants_json():
        console.emit(plan)
        return
    print(f"{plan['out']}: {plan['photos']} photos of {plan['people']} imaginary people")
    print(f"about {plan['estimated_seconds'] / 60:.1f} min on 2 cores, {plan['estimated_bytes'] / 1e6:.0f} MB\n")
    for line in plan["commands"]:
        print(f"$ {line}")


def _tell_times(demo: Demo, seconds: float) -> None:
    from mefem_cli import console

    console.note("")
    for name, taken in [*demo.seconds.items(), ("all", seconds)]:
        console.note(f"{taken:7.1f} s  {name}")
    console.note("")
