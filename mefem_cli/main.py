"""The `mefem` program: commands are loaded when called; a MefemError is one line on stderr and an exit code."""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mefem_cli import __version__, parts
from mefem_cli.errors import MefemError, NoInputError, OutputError

# In the order of use. Each is a module in commands/ with a docstring (its help), `OPTIONS` (dataclasses whose fields
# are its options, as "module:class"), optionally `ARGUMENT` (name, help) and `ROOMS` (whose parts' options it offers
# too; see `parts.offered`), and `run(arguments, given)`.
COMMANDS = ("demo", "crop", "pretrain", "embed", "probe", "predict", "ablate", "show", "store", "export")
SHORT_FLAGS = {"out": "-o", "dry_run": "-n", "quiet": "-q", "null": "-0"}
INTERRUPTED, BUG = 130, 1
HELP_FLAGS = ["--help", "-h"]


class LazyGroup(TyperGroup):
    """The group of commands; a command's module is imported only when the command is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return build_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from mefem_cli.errors import UsageError, did_you_mean

            raise UsageError(f'there is no command "{args[0]}"{did_you_mean(args[0], COMMANDS)}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, parts.summary(f"commands.{name}")) for name in COMMANDS])


class SectionedCommand(TyperCommand):
    """A command whose help shows its options in one section per dataclass."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None) or "Options"
                title = "Arguments" if parameter.param_type_name == "argument" else title
                sections.setdefault(title, []).append(record)
        sections.setdefault("Options", [])
        sections["Options"] = sections.pop("Options")  # --help comes last
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def build_command(name: str) -> Any:
    """Return the Typer command of a module in commands/, its options read from the dataclasses that it names."""
    module = importlib.import_module(f"mefem_cli.commands.{name}")
    parameters: dict[str, inspect.Parameter] = {}
    if hasattr(module, "ARGUMENT"):
        argument, argument_help = module.ARGUMENT
        annotation = Annotated[list[str], typer.Argument(help=argument_help, metavar=f"[{argument.upper()}]...")]
        parameters["arguments"] = _parameter("arguments", annotation, None)
    for title, options in sections(module):
        for option in options:
            parameters[option.name] = _parameter(option.name, _annotation(option, title), None)

    def call(**values: Any) -> None:
        _run(module, name, values)

    signature = inspect.Signature(list(parameters.values()))
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters.values()}
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command(name, cls=SectionedCommand, help=inspect.getdoc(module), no_args_is_help=False)(call)
    return typer.main.get_command(app)


def sections(module: ModuleType) -> list[tuple[str, list[parts.Field]]]:
    """Return the options of a command's module by section; one that several sections have stands in the first."""
    found = []
    for spec in module.OPTIONS:
        path, _, class_name = spec.partition(":")
        found.append((parts.class_summary(path, class_name), parts.read_fields(path, class_name)))
    for room, part in parts.offered(module):
        found.insert(-1, (f"With {room.rstrip('s')} {part}", parts.read_fields(f"{room}.{part}")))
    seen: set[str] = set()
    distinct = []
    for title, options in found:
        distinct.append((title, [option for option in options if option.name not in seen]))
        seen |= {option.name for option in options}
    return [(title, options) for title, options in distinct if options]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(option: parts.Field, section: str) -> Any:
    shown = f"  [default: {option.default_text}]" if option.default_text else ""
    flags = [option.flag, SHORT_FLAGS[option.name]] if option.name in SHORT_FLAGS else [option.flag]
    if option.is_flag:
        if option.default is True:
            flags = [f"{option.flag}/--no-{option.flag[2:]}"]
        return Annotated[
            bool | None, typer.Option(*flags, help=option.help + shown, rich_help_panel=section, show_envvar=False)
        ]
    details = typer.Option(
        *flags, help=option.help + shown, metavar=option.metavar, rich_help_panel=section, show_envvar=False
    )
    return Annotated[list[str] | None, details] if option.is_list else Annotated[str | None, details]


def _run(module: ModuleType, name: str, values: dict[str, Any]) -> None:
    """Resolve the options (flags, environment, config file; defaults fill the rest later) and run the command."""
    from mefem_cli import console

    arguments = list(values.pop("arguments", None) or [])
    given = {key: value for key, value in values.items() if value is not None and value != []}
    if "config" in given:
        others = set(COMMANDS) - {name}
        given = {**parts.read_config(given["config"], name, values, others), **given}
    chosen = parts.Given(given)
    options = chosen.build("console", "ConsoleOptions")
    console.configure(options)
    _warn_of_unknown_variables(name, values)
    if options.debug:
        os.environ["MEFEM_DEBUG"] = "1"
    try:
        module.run(arguments, chosen)
    except BrokenPipeError:  # of which Typer would make exit code 1
        console.ignore_stdout()


def _warn_of_unknown_variables(command: str, options: Iterable[str]) -> None:
    """Say that a variable of the environment, named like an option's, is none."""
    from difflib import get_close_matches

    from mefem_cli import console

    prefix = f"MEFEM_{command.upper()}_"
    known = [prefix + option.upper() for option in options]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known:
            nearest = "".join(f"; did you mean {one}?" for one in get_close_matches(name, known, n=1))
            console.warn(f"the environment variable {name} is no option of mefem {command}{nearest}")


app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.callback(context_settings={"help_option_names": HELP_FLAGS})
def mefem() -> None:
    """Self-supervised face embeddings for medicine and anthropometry.

    photos -> crops -> encoder -> features -> scores with intervals. Try: mefem demo. Version: mefem --version
    """


def dispatch(arguments: list[str]) -> Any:
    """Run one command line and return its exit code or None; errors rise.

    A command is called without the group above it: to convert the group's own options Typer would load pydantic,
    90 ms, before the help of any command.
    """
    if arguments == ["--version"]:
        print(f"mefem {__version__}")
        return None
    name = arguments[0]
    if name not in COMMANDS:
        return typer.main.get_command(app)(arguments, standalone_mode=False)
    return build_command(name)(
        arguments[1:],
        prog_name=f"mefem {name}",
        standalone_mode=False,
        auto_envvar_prefix=f"MEFEM_{name.upper()}",
        help_option_names=HELP_FLAGS,
    )


def main() -> None:
    """Run the program: exit codes as in the docs, one line for what a user can mend."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")  # paths are bytes; some are no UTF-8
    try:
        code = dispatch(sys.argv[1:] or ["--help"])
        if code == INTERRUPTED:  # Typer makes a silent exit code of Ctrl-C
            raise KeyboardInterrupt
    except MefemError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail("stopped by Ctrl-C; run the same command again to go on", INTERRUPTED)
    except BrokenPipeError:
        from mefem_cli import console

        console.ignore_stdout()
        code = 0
    except OSError as error:
        code = _report_bug(error) if error.errno is None else _fail(*_explained(error))
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own usage errors
            code = _fail(error.format_message().replace("\n", " "), getattr(error, "exit_code", 2))
        else:
            code = _report_bug(error)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: OSError) -> tuple[str, int]:
    """Return one line and the exit code for what the system refused: room, an input, or a place to write."""
    assert error.errno is not None
    what = f"{error.filename or 'writing the product'}: {os.strerror(error.errno)}"  # HDF5 puts lines into the message
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}; free some space or name another --out", OutputError.exit_code
    if isinstance(error.filename, str) and not os.access(error.filename, os.R_OK) and os.path.lexists(error.filename):
        return f"{what}; make it readable or leave it out", NoInputError.exit_code
    return f"{what}; mend that or name another --out", OutputError.exit_code


def _fail(message: str, code: int) -> int:
    if os.environ.get("MEFEM_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    print(f"mefem {command}".rstrip() + f": {message}", file=sys.stderr)
    return code


def _report_bug(error: Exception) -> int:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="mefem-bug-", suffix=".log", delete=False) as log:
        log.write(f"mefem {__version__}: {sys.argv}\n")
        traceback.print_exc(file=log)
    return _fail(f"a bug: {type(error).__name__}: {str(error)[:200]}; the traceback is in {log.name}", BUG)
