"""The program around the commands: help, precedence of options, exit codes, stdout and stderr, pipes, imports."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import mefem_cli
from mefem_cli import console, errors, main
from mefem_cli.console import ConsoleOptions
from mefem_cli.errors import NoInputError
from mefem_cli.parts import Given

PACKAGE = Path(mefem_cli.__file__).parent
HEAVY = (
    "torch",
    "numpy",
    "h5py",
    "sklearn",
    "mediapipe",
    "pydantic",
    "timm",
    "pyarrow",
    "PIL",
    "matplotlib",
    "yaml",
    "scipy",
)
STUB_OPTIONS = ("engine.plan:TrainOptions", "stores.product:ProductOptions", "console:ConsoleOptions")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def a_fresh_console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [*os.environ]:
        if name.startswith("MEFEM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MEFEM_DEBUG", "0")  # --debug sets it; so it is set back
    yield
    console.configure(ConsoleOptions())


@pytest.fixture
def mefem(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; return exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mefem", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        stdout, stderr = capfd.readouterr()
        return int(end.value.code or 0), stdout, stderr

    return run


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand for `mefem crop` with a command that keeps what it was given in `seen`, or raises `error`."""
    module = ModuleType("mefem_cli.commands.crop", "A command.")

    def run(arguments: list[str], given: Given) -> None:
        if module.error is not None:
            raise module.error
        module.seen = given

    module.OPTIONS, module.ARGUMENT, module.run = STUB_OPTIONS, ("sources", "What to read."), run
    module.error, module.seen = None, None
    monkeypatch.setitem(sys.modules, "mefem_cli.commands.crop", module)
    return module


# Help ----------------------------------------------------------------------------------------------------------------


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = """
import contextlib, io, sys
from mefem_cli import main
for words in ([], *([name] for name in main.COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main.dispatch([*words, "--help"])
    assert "Usage" in shown.getvalue(), words
    print(words, sorted(set(HEAVY) & {name.partition(".")[0] for name in sys.modules}))
"""
    answer = run_python("-c", f"HEAVY = {HEAVY}\n{code}")
    lines = answer.stdout.splitlines()
    assert answer.returncode == 0, answer.stderr
    assert len(lines) == 1 + len(main.COMMANDS)
    assert all(line.endswith(" []") for line in lines), answer.stdout


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_shows_every_option_with_its_help(command: str, mefem: Run) -> None:
    code, stdout, stderr = mefem(command, "--help")
    module = sys.modules[f"mefem_cli.commands.{command}"]
    shown = " ".join(stdout.split())
    assert (code, stderr) == (0, "")
    assert (module.__doc__ or "").splitlines()[0] in shown
    for title, options in main.sections(module):
        assert f"{title}:" in stdout
        for option in options:
            assert option.flag in shown
            assert option.help.split()[0] in shown


def test_the_program_lists_its_commands(mefem: Run) -> None:
    code, stdout, _ = mefem("--help")
    assert code == 0
    assert all(f"  {command}  " in stdout for command in main.COMMANDS)


def test_without_a_command_the_help_is_shown(mefem: Run) -> None:
    assert mefem() == mefem("--help")


def test_a_variable_named_like_the_version_is_no_wish_to_see_it(
    mefem: Run, stub: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEFEM_VERSION", "1")
    assert mefem("crop") == (0, "", "")
    assert stub.seen is not None


def test_the_package_is_a_program_too() -> None:
    answer = run_python("-m", "mefem_cli", "--version")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"mefem {mefem_cli.__version__}\n", "")


# Usage errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("corp",), 'there is no command "corp"; did you mean "crop"?'),
        (("crop", "--detektor", "auto", "photos"), "--detector"),
        (("crop", "--detector", "shrt", "photos"), 'wanted auto|short|full|none; did you mean "short"?'),
        (("crop", "--size", "many", "photos"), "--size many: wanted a whole number"),
        (("crop", "--size", "0", "photos"), "--size 0: wanted 1 or more"),
        (("crop",), "mefem crop FOLDER"),
        (("crop", "photos", "--size"), "--size"),
        (("probe", "bmi", "--head", "lineer"), 'there is no head "lineer"; did you mean "linear"?'),
        (("demo", "--people", "3"), "--people 3: wanted 40 or more"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(words: tuple[str, ...], told: str, mefem: Run) -> None:
    code, stdout, stderr = mefem(*words)
    assert (code, stdout) == (2, "")
    assert told in stderr
    assert stderr.startswith("mefem") and stderr.count("\n") == 1, stderr


# Exit codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("what"), 2),
        (errors.NoInputError("what"), 3),
        (errors.OutputError("what"), 4),
        (errors.OutOfMemory("what"), 5),
        (errors.Diverged("what"), 6),
        (errors.Stopped("what"), 75),
    ],
)
def test_errors_that_a_user_can_mend_have_their_codes(
    error: Exception, code: int, mefem: Run, stub: ModuleType
) -> None:
    stub.error = error
    assert mefem("crop") == (code, "", "mefem crop: what\n")


def test_a_bug_leaves_its_traceback_in_a_file(
    mefem: Run, stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stub.error = ZeroDivisionError("by nought")
    code, stdout, stderr = mefem("crop", "photos")
    (log,) = tmp_path.iterdir()
    assert (code, stdout) == (1, "")
    assert stderr == f"mefem crop: a bug: ZeroDivisionError: by nought; the traceback is in {log}\n"
    assert "in run" in log.read_text() and "'photos'" in log.read_text()


def test_debug_shows_the_traceback(mefem: Run, stub: ModuleType) -> None:
    stub.error = errors.NoInputError("nothing there")
    code, _, stderr = mefem("crop", "--debug")
    assert code == 3
    assert stderr.startswith("Traceback") and stderr.endswith("mefem crop: nothing there\n")


def test_ctrl_c_is_130(mefem: Run, stub: ModuleType) -> None:
    stub.error = KeyboardInterrupt()
    code, stdout, stderr = mefem("crop")
    assert (code, stdout) == (130, "")
    assert "Ctrl-C" in stderr and stderr.count("\n") == 1


def test_a_full_disk_is_no_bug(mefem: Run, stub: ModuleType) -> None:
    stub.error = OSError(28, "No space left on device", "/photos/crops")
    code, _, stderr = mefem("crop")
    assert code == 4
    assert stderr == "mefem crop: /photos/crops: No space left on device; free some space or name another --out\n"


def test_a_reader_that_leaves_is_no_error(mefem: Run, stub: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # else this process would lose its stdout
    stub.error = BrokenPipeError(32, "Broken pipe")  # as the system raises it
    assert mefem("crop") == (0, "", "")


def test_no_usable_input_is_3_and_a_foreign_output_is_4(mefem: Run, tmp_path: Path) -> None:
    photos, taken = tmp_path / "photos", tmp_path / "taken"
    for folder in (photos, taken):
        folder.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert mefem("crop", str(photos))[0] == 3
    assert mefem("crop", str(tmp_path / "phptos"))[0] == 3
    (photos / "anna.jpg").write_bytes(b"")
    code, stdout, stderr = mefem("crop", str(photos), "-o", str(taken), "--overwrite")
    assert (code, stdout) == (4, "")
    assert "no crops folder" in stderr
    assert (taken / "thesis.txt").exists()
    assert mefem("probe", "bmi", "--store", str(tmp_path / "none.h5"))[0] == 3


# Precedence ----------------------------------------------------------------------------------------------------------


def test_flags_win_over_variables_over_the_file_over_defaults(
    mefem: Run, stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("epochs: 1\nwarmup-epochs: 1\nlr: 1e-4\ncrop:\n  lr: 2e-4\n  dry_run: true\nprobe: {folds: 3}\n")
    monkeypatch.setenv("MEFEM_CROP_EPOCHS", "2")
    monkeypatch.setenv("MEFEM_CROP_WARMUP_EPOCHS", "2")
    monkeypatch.setenv("MEFEM_PRETRAIN_MONITOR", "7")  # another command's
    assert mefem("crop", "--config", str(config), "--epochs", "3") == (0, "", "")
    options = stub.seen.build("engine.plan", "TrainOptions")
    product = stub.seen.build("stores.product", "ProductOptions")
    assert options.epochs == 3  # flag
    assert options.warmup_epochs == 2.0  # variable
    assert options.lr == 2e-4  # file, the command's own section
    assert options.monitor == 1024  # default
    assert product.dry_run is True and product.overwrite is False


def test_variables_that_are_no_options_are_named(mefem: Run, stub: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEFEM_CROP_EPOCH", "2")
    monkeypatch.setenv("MEFEM_PROBE_EPOCH", "2")  # another command's
    code, _, told = mefem("crop")
    assert code == 0
    assert "MEFEM_CROP_EPOCH is no option of mefem crop; did you mean MEFEM_CROP_EPOCHS?" in told
    assert "PROBE" not in told
    assert mefem("crop", "--quiet")[2] == ""


def test_the_file_itself_may_be_named_by_a_variable(
    mefem: Run, stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "options.yaml").write_text("seed: 5\n")
    monkeypatch.setenv("MEFEM_CROP_CONFIG", str(tmp_path / "options.yaml"))
    assert mefem("crop")[0] == 0
    assert stub.seen.build("stores.product", "ProductOptions").seed == 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("epoch: 3\n", 'crop has no option "epoch"; did you mean "epochs"?'),
        ("epochs: [1\n", "cannot be read as YAML"),
        ("- epochs\n", "wanted a table of options"),
        ("crop: 3\n", "`crop` should hold a table of options"),
        ("epochs: three\n", "--epochs three: wanted a whole number"),
        ("quiet: perhaps\n", "--quiet perhaps: wanted true|false"),
        (None, "cannot be read"),
    ],
)
def test_errors_in_the_file(content: str | None, told: str, mefem: Run, tmp_path: Path, stub: ModuleType) -> None:
    config = tmp_path / "options.yaml"
    if content is not None:
        config.write_text(content)
    stub.run = lambda arguments, given: given.build("engine.plan", "TrainOptions")
    code, stdout, stderr = mefem("crop", "--config", str(config))
    assert (code, stdout) == (2, "")
    assert told in stderr and stderr.count("\n") == 1


def test_an_empty_file_sets_nothing(mefem: Run, stub: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("# nothing yet\nout:\n")
    assert mefem("crop", "--config", str(tmp_path / "options.yaml"))[0] == 0
    assert stub.seen.build("stores.product", "ProductOptions").out is None


# stdout and stderr ---------------------------------------------------------------------------------------------------


def test_a_product_is_one_line_or_one_object(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console.product(tmp_path, 1.23456, crops=3)
    assert capfd.readouterr().out == f"{tmp_path}\n"
    console.configure(ConsoleOptions(json=True))
    console.product(Path("crops"), 1.23456, crops=3, rejects={"small": 1})
    written = json.loads(capfd.readouterr().out)
    assert written == {"out": str(Path("crops").absolute()), "seconds": 1.235, "crops": 3, "rejects": {"small": 1}}


def test_json_has_no_nan(capfd: pytest.CaptureFixture[str]) -> None:
    row = {"r2": float("nan"), "folds": [1.0, float("inf")], "low": {"deep": (-float("inf"), 2)}, 3: "ä\n", "on": True}
    console.emit(row)
    stdout, stderr = capfd.readouterr()
    assert stdout.count("\n") == 1 and stderr == ""
    assert json.loads(stdout) == {"r2": None, "folds": [1.0, None], "low": {"deep": [None, 2]}, "3": "ä\n", "on": True}


def test_quiet_silences_notes_and_progress(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_LINE_SECONDS", 0.0)

    def work() -> str:
        console.note("a note")
        with console.progress("crop", 2) as bar:
            bar.advance(2, "2 crops")
        stdout, stderr = capfd.readouterr()
        assert stdout == ""
        return stderr

    told = work()
    assert told.startswith("a note\ncrop: 2/2, ") and told.endswith("/s 2 crops\n")
    console.configure(ConsoleOptions(quiet=True))
    assert work() == ""


# The pipe ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make stdin a pipe; the function writes a text into it and closes it."""
    saved = os.dup(0)
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(0), encoding="utf-8"))

    def write(text: str) -> None:
        os.write(writing, text.encode())
        os.close(writing)

    yield write
    sys.stdin.close()
    os.dup2(saved, 0)
    os.close(saved)


@pytest.mark.parametrize("form", ["{}\n", "\n{}", '{{"out": "{}", "seconds": 1.5}}\n', "  {}  \nmore\n"])
def test_a_path_arrives_as_a_line_or_as_json(form: str, pipe: Callable[[str], None], tmp_path: Path) -> None:
    assert console.stdin_is_pipe()
    pipe(form.format(tmp_path))
    assert console.read_pipe("a crops folder") == tmp_path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "made nothing"),
        ("\n \n", "made nothing"),
        ("/no/such/folder\n", "no existing path; wanted a crops folder"),
        ('{"row": "score"}\n', 'JSON without "out"'),
        ("{cut short\n", 'JSON without "out"'),
    ],
)
def test_nothing_usable_arrives(text: str, told: str, pipe: Callable[[str], None]) -> None:
    pipe(text)
    with pytest.raises(NoInputError, match=told):
        console.read_pipe("a crops folder")


def test_a_long_wait_is_explained(
    pipe: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert console.PIPE_NOTICE_SECONDS == 2.0
    monkeypatch.setattr(console, "PIPE_NOTICE_SECONDS", 0.05)
    threading.Timer(0.5, pipe, [f"{tmp_path}\n"]).start()
    assert console.read_pipe("a feature store") == tmp_path
    assert "waiting for a feature store" in capfd.readouterr().err


def test_a_waiting_command_is_stopped_by_ctrl_c() -> None:
    waiting = subprocess.Popen(
        [sys.executable, "-m", "mefem_cli", "probe", "bmi"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with waiting:
        assert waiting.stderr is not None and waiting.stdout is not None
        begun = time.monotonic()
        told = waiting.stderr.readline()
        assert "waiting for a feature store" in told
        assert time.monotonic() - begun > 1.9
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(60) == 130
        assert "Ctrl-C" in waiting.stderr.read()
        assert waiting.stdout.read() == ""


# Imports -------------------------------------------------------------------------------------------------------------


@cache
def imports() -> dict[str, set[str]]:
    """Return what each module of the package imports from it, within functions too, but not for the type checker."""
    paths = {_module_name(path): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported: set[str] = set()
        for node in _nodes_that_run(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mefem_cli"):
                wholes = [f"{node.module}.{one.name}" for one in node.names]
                imported |= {whole if whole in paths else str(node.module) for whole in wholes}
            elif isinstance(node, ast.Import):
                imported |= {one.name for one in node.names if one.name.startswith("mefem_cli")}
        found[name] = imported - {name}
    return found


def _module_name(path: Path) -> str:
    words = ["mefem_cli", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(words).removesuffix(".__init__")


def _nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _nodes_that_run(child)


def test_there_are_no_import_cycles() -> None:
    graph = imports()
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in finished:
            for imported in sorted(graph.get(name, ())):
                visit(imported, (*path, name))
            finished.add(name)

    for name in graph:
        visit(name, ())
    assert len(finished) > 50


# What each room may import, beside itself, errors and the version; arrows point from commands to rooms to stores.
GROUND = {"parts", "console"}
ALLOWED = {
    "stores": set(),
    "engine": {"stores", "console"},
    "masks": set(),
    "objectives": {"masks", "backbones", "engine"} | GROUND,
    "backbones": {"engine", "stores"} | GROUND,
    "probes": {"engine"} | GROUND,
    "tasks": {"stores"},  # tables that come with a data set
    "faces": {"stores", "reports", "executors"} | GROUND,
    "evaluation": {"probes", "tasks", "stores", "engine"} | GROUND,
}


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    inside = {name: imported for name, imported in imports().items() if name.startswith(f"mefem_cli.{room}")}
    assert inside
    for name, imported in inside.items():
        rooms = {one.split(".")[1] for one in imported if "." in one}
        assert rooms <= ALLOWED[room] | {room, "errors"}, f"{name} imports {sorted(imported)}"


def test_nobody_imports_commands_or_the_program_but_who_runs_them() -> None:
    runs_commands = {"mefem_cli.__main__", "mefem_cli.demo", "mefem_cli.reports.reference"}
    runs_commands |= {"mefem_cli.executors.parts", "mefem_cli.executors.warm"}
    for name, imported in imports().items():
        assert not any(one.startswith("mefem_cli.commands.") for one in imported), name
        assert "mefem_cli.main" not in imported or name in runs_commands, name
        assert not any(one.startswith(("examples", "tests")) for one in imported), name
