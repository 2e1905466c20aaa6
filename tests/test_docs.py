"""The documentation is true: files, commands, options, links, names of code, licences."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mefem_cli import errors, main
from mefem_cli.faces import detector
from mefem_cli.reports import reference

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mefem_cli"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILE_LINE = re.compile(r"^([\w/]+\.py) {2,}(\S.*)$")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
CODE_NAME = re.compile(r"`([\w/]+\.py): ([\w.]+)`")  # such as `masks/stripes.py: Stripes.draw`


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# The list of files ---------------------------------------------------------------------------------------------------


def listed_files() -> dict[str, str]:
    listing = read(ROOT / "README.md").partition("## The files")[2].split("```")[1]
    lines = [line for line in listing.splitlines()[1:] if line.strip()]
    matches = [FILE_LINE.match(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    names = [match[1] for match in matches if match]
    assert max(Counter(names).values()) == 1
    return {match[1]: match[2] for match in matches if match}


def test_readme_lists_every_file_of_the_package_once() -> None:
    existing = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    listed = set(listed_files())
    assert listed == existing, f"not listed: {sorted(existing - listed)}; gone: {sorted(listed - existing)}"


def test_readme_gives_the_two_commands_and_the_four_lines_on_its_first_screens() -> None:
    beginning = "\n".join(read(ROOT / "README.md").splitlines()[:60])
    for line in (
        "pip install . && mefem demo",
        'pip install ".[dev]" && pytest',
        "mefem crop photos/",
        "mefem pretrain --mask stripes --width 3",
        "mefem embed | mefem probe bmi",
        "mefem ablate table4",
        "apt-get install libegl1 libgles2 libgl1 libglib2.0-0",
    ):
        assert line in beginning
    assert detector.SYSTEM_PACKAGES in beginning


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in read(script).splitlines()]
    assert [line for line in lines if line.startswith("run pip install")] == ['run pip install --quiet ".[dev]"']
    assert lines[-1] == "run pytest"  # a reader of the log finds pytest's summary at its end


# The reference -------------------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_program_says() -> None:
    assert read(ROOT / "docs" / "cli.md") == reference.text(), (
        "type: python -m mefem_cli.reports.reference > docs/cli.md"
    )


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_option_of_every_command_is_documented(command: str) -> None:
    page = read(ROOT / "docs" / "cli.md")
    section = re.split(r"^## ", page.partition(f"\n## mefem {command}\n")[2], flags=re.MULTILINE)[0]
    module = importlib.import_module(f"mefem_cli.commands.{command}")
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    for _, options in main.sections(module):
        for option in options:
            (row,) = [line for line in rows if re.search(rf"`{option.flag}[ `]", line)]
            assert option.help.replace("|", "\\|") in row


def test_every_exit_code_is_documented() -> None:
    page = read(ROOT / "docs" / "cli.md").partition("## Exit codes")[2]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MefemError)]
    assert documented == {0, main.BUG, main.INTERRUPTED} | {kind.exit_code for kind in kinds}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_in_the_pages_exist_with_their_options(page: Path) -> None:
    for line in commands_shown(read(page)):
        for piece in line.split("|"):
            words = piece.split("#")[0].split()
            if "mefem" not in words:
                continue
            words = words[words.index("mefem") + 1 :]
            if not words or words[0].startswith(("-", "[")):
                continue
            assert words[0] in main.COMMANDS, line
            module = importlib.import_module(f"mefem_cli.commands.{words[0]}")
            offered = [option for _, options in main.sections(module) for option in options]
            known = {option.flag for option in offered} | {"--help"}
            known |= {f"--no-{option.flag[2:]}" for option in offered if option.default is True}
            known |= set(main.SHORT_FLAGS.values())
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= known, f"{line}: {sorted(used - known)}"


def commands_shown(text: str) -> Iterator[str]:
    """Yield the lines of code blocks that begin with `mefem`, a line ending in a backslash joined with the next."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"^(    |\$ )(MEFEM_\w+=\S+ )*(pip install \. && )?mefem ", line):
            yield line


# Links and names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(read(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert linked.is_relative_to(ROOT)
        if anchor:
            assert anchor in {slug(title) for title in re.findall(r"^#+ (.+)$", read(linked), flags=re.MULTILINE)}


def slug(title: str) -> str:
    """Return the anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_code_in_the_pages_exist(page: Path) -> None:
    for file, name in CODE_NAME.findall(read(page)):
        path = (PACKAGE.parent if file.startswith("tests/") else PACKAGE) / file
        assert path.is_file(), f"{page.name}: {file}"
        assert name in defined(path), f"{page.name}: {file} has no {name}"


def test_the_method_names_its_code() -> None:
    assert len(set(CODE_NAME.findall(read(ROOT / "docs" / "method.md")))) >= 20


@cache
def defined(path: Path) -> set[str]:
    """Return functions, classes, their members and constants of a module."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                found.update(prefix + one.id for one in names if isinstance(one, ast.Name))

    visit(ast.parse(read(path)).body, "")
    return found


# Licences ------------------------------------------------------------------------------------------------------------


def test_licence_and_notice() -> None:
    assert "Apache License" in read(ROOT / "LICENSE")
    notice = read(PACKAGE / "faces" / "assets" / "NOTICE")
    listed = dict(reversed(line.split()) for line in notice.splitlines() if re.match(r"[0-9a-f]{64} ", line))
    models = {path.name: path for path in (PACKAGE / "faces" / "assets").glob("*.tflite")}
    assert set(listed) == set(models) and len(models) == 2
    for name, path in models.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name]
    assert dict(detector.MODELS.values()) == listed
