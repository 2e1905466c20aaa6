"""The command line reference, from the program itself: `python -m mefem_cli.reports.reference > docs/cli.md`.

Like the help it reads the options without importing what they belong to.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

from mefem_cli import errors, main
from mefem_cli.parts import Field

LEAD = """# Command line

<!-- Written by `python -m mefem_cli.reports.reference > docs/cli.md`; a test compares this page with the program. -->

    mefem [--version] [--help] COMMAND [ARGUMENTS] [OPTIONS]

Every option may be given in four places; the first that has it wins: the flag, the environment variable
`MEFEM_<COMMAND>_<OPTION>` (`MEFEM_PRETRAIN_LR=1e-3`), the file named by `--config` (`lr: 1e-3`, flat or below the
command's name), the default. Options marked "repeatable" may be given several times. `mefem COMMAND --help` says the
same as this page."""

EXIT_CODES_LEAD = """## Exit codes

An error is one line on stderr: what was given, what is wrong, what to type. `--debug` adds the traceback.

| code | meaning |
|---:|---|"""


def text() -> str:
    """Return the page."""
    blocks = [LEAD, *(_command(name) for name in main.COMMANDS), "\n".join([EXIT_CODES_LEAD, *_exit_codes()])]
    return "\n\n".join(blocks) + "\n"


def _command(name: str) -> str:
    module = importlib.import_module(f"mefem_cli.commands.{name}")
    blocks = [f"## mefem {name}", inspect.getdoc(module) or "", f"    {_usage(name, module)}"]
    if hasattr(module, "ARGUMENT"):
        argument, help_text = module.ARGUMENT
        blocks.append(f"`{argument.upper()}`: {help_text}")
    for title, options in main.sections(module):
        rows = ["| option | default | |", "|---|---|---|", *(_row(option) for option in options)]
        blocks.append("\n".join([f"**{title}**", "", *rows]))
    return "\n\n".join(blocks)


def _usage(name: str, module: ModuleType) -> str:
    words = ["mefem", name]
    if hasattr(module, "ARGUMENT"):
        words.append(f"[{module.ARGUMENT[0].upper()}]...")
    return " ".join([*words, "[OPTIONS]"])


def _row(option: Field) -> str:
    flags = [option.flag]
    if option.name in main.SHORT_FLAGS:
        flags.insert(0, main.SHORT_FLAGS[option.name])
    if option.default is True:
        flags.append(f"--no-{option.flag[2:]}")
    typed = [f"`{flag}`" if option.is_flag else f"`{flag} {option.metavar}`" for flag in flags]
    default = f"`{option.default_text}`" if option.default_text else ""
    repeatable = " (repeatable)" if option.is_list else ""
    cells = (", ".join(typed), default, option.help + repeatable)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _exit_codes() -> Iterator[str]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MefemError)]
    meanings = {kind.exit_code: (inspect.getdoc(kind) or "") for kind in kinds if kind is not errors.MefemError}
    meanings[0] = "Done. Rejects of `mefem crop` and failed cells of `mefem ablate` are told, and change no code."
    meanings[main.BUG] = "A bug, or an installation that is not whole; of a bug the traceback is in the file named."
    meanings[main.INTERRUPTED] = (
        "Stopped by Ctrl-C; typed again, the command completes its work (`mefem pretrain` with `--resume`)."
    )
    for code in sorted(meanings):
        yield f"| {code} | {meanings[code]} |"


if __name__ == "__main__":
    print(text(), end="")
