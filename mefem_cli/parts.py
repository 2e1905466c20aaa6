"""A dataclass of options read without importing its module, so that help is fast: its fields are command-line options.

Parts (masks, objectives, backbones, probes, tasks) are files in a room; the file name is the choice on the command
line, and the fields of its `Options` dataclass are the choice's options. Adding a choice is adding one file.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mefem_cli.errors import UsageError, did_you_mean

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Field:
    """One option: its name, its annotation as written, its default and the comment beside it."""

    name: str
    annotation: str
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The option as typed in a shell, `--mask-name`."""
        return "--" + self.name.replace("_", "-")

    @property
    def alternatives(self) -> list[Any]:
        """The members of the annotation's union: type names as text, members of a Literal as `('literal', value)`."""
        members: list[Any] = []
        pending = [ast.parse(self.annotation, mode="eval").body]
        while pending:
            node = pending.pop(0)
            if isinstance(node, ast.BinOp):
                pending = [node.left, node.right, *pending]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
                literals = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                members += [("literal", ast.literal_eval(literal)) for literal in literals]
            else:
                members.append(ast.unparse(node))
        return members

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value."""
        return self.annotation == "bool"

    @property
    def is_list(self) -> bool:
        """Whether the option may be given several times."""
        return self.annotation.startswith("list[")

    @property
    def metavar(self) -> str:
        """What stands for the value in the help: `N`, `X`, `a|b|c`."""
        shown = {"int": "N", "float": "X", "str": "TEXT", "None": "none", "list[str]": "TEXT", "bool": "true|false"}
        members = [one for one in self.alternatives if one != "None" or self.default is not None]  # None: leave it out
        return "|".join(str(one[1]) if isinstance(one, tuple) else shown[one] for one in members)

    @property
    def default_text(self) -> str:
        """The default as the help shows it; empty for a switch that is off and where leaving it out means something."""
        if self.default is True:
            return "on"
        return "" if self.default is None or self.default is False or self.default == [] else str(self.default)

    def typed(self, value: Any) -> list[str]:
        """Return the option with a value as words of a command line."""
        if self.is_flag:
            return [self.flag] if value else [f"--no-{self.flag[2:]}"] * (self.default is True)
        values = value if self.is_list else [value]
        return [f"{self.flag}={'none' if one is None else one}" for one in values]

    def parse(self, given: Any) -> Any:
        """Return `given` (text from a shell or an environment variable, a value from YAML) as the field's type."""
        if given is None and self.default is None:  # an empty value in YAML; the text "None" is nobody's wish
            return None
        if self.is_flag:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if str(given).lower() in words:
                return words[str(given).lower()]
        elif self.is_list:
            items = given if isinstance(given, list | tuple) else [given] if given is not None else []
            return [str(item) for item in items]
        else:
            for alternative in self.alternatives:
                matched, value = _parse_as(alternative, given)
                if matched:
                    return value
        literals = [str(one[1]) for one in self.alternatives if isinstance(one, tuple)]
        hint = did_you_mean(str(given), literals) if literals else ""
        in_words = {"N": "a whole number", "X": "a number", "TEXT": "text"}
        wanted = "|".join(in_words.get(part, part) for part in self.metavar.split("|"))
        raise UsageError(f"{self.flag} {given}: wanted {wanted}{hint}")


def _parse_as(alternative: Any, given: Any) -> tuple[bool, Any]:
    if isinstance(alternative, tuple):
        return str(given) == str(alternative[1]), alternative[1]
    if alternative == "None":
        return given is None or str(given).lower() == "none", None
    try:
        return True, {"int": int, "float": float, "str": str}[alternative](str(given))
    except ValueError:
        return False, None


def module_path(module: str) -> Path:
    """Return the file of a module of this package, named from the package: `engine.fit`."""
    return PACKAGE / (module.replace(".", "/") + ".py")


def names(room: str) -> list[str]:
    """Return the parts in a room, sorted: the names of its files."""
    return sorted(path.stem for path in (PACKAGE / room).glob("*.py") if not path.stem.startswith("_"))


def load(room: str, name: str) -> ModuleType:
    """Import a part. Raises UsageError with the nearest name where there is no such part."""
    if name not in names(room):
        raise UsageError(f'there is no {room.rstrip("s")} "{name}"{did_you_mean(name, names(room))}')
    return importlib.import_module(f"mefem_cli.{room}.{name}")


def offered(command: ModuleType) -> list[tuple[str, str]]:
    """Return the parts whose options a command offers as (room, part).

    Its `ROOMS` name rooms, all of whose parts are meant, or one part as `backbones.vit`; its `LEFT_OUT` names parts
    of those rooms that are not.
    """
    found = []
    for entry in getattr(command, "ROOMS", ()):
        room, _, part = entry.partition(".")
        found += [(room, one) for one in ([part] if part else names(room))]
    left_out = getattr(command, "LEFT_OUT", ())
    return [(room, part) for room, part in found if f"{room}.{part}" not in left_out]


def summary(module: str) -> str:
    """Return the first line of a module's docstring without importing it."""
    return (ast.get_docstring(_parsed(module)) or "").partition("\n")[0]


def first_paragraph(module: str) -> str:
    """Return the first paragraph of a module's docstring as one line, without importing it."""
    return " ".join((ast.get_docstring(_parsed(module)) or "").partition("\n\n")[0].split())


def read_fields(module: str, class_name: str = "Options") -> list[Field]:
    """Return the fields of a dataclass without importing its module; none where the module has no such class.

    The help of a field is the comment behind it, which may go on in comment lines of its own below.
    """
    lines = module_path(module).read_text(encoding="utf-8").splitlines()
    return [
        Field(node.target.id, ast.unparse(node.annotation), _literal_default(node), _comment(lines, node))
        for node in _class_body(module, class_name)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def class_summary(module: str, class_name: str = "Options") -> str:
    """Return the first line of a class's docstring without importing its module, or an empty text."""
    body = _class_body(module, class_name)
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return str(body[0].value.value).partition("\n")[0].rstrip(".")
    return ""


def read_constant(module: str, name: str) -> Any:
    """Return a literal constant of a module, such as a head's `FEATURES`, without importing it."""
    for node in _parsed(module).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{module} has no constant {name}")


@cache  # a module's summary and fields are asked for apart
def _parsed(module: str) -> ast.Module:
    return ast.parse(module_path(module).read_text(encoding="utf-8"))


def _class_body(module: str, class_name: str) -> list[ast.stmt]:
    classes = [node for node in _parsed(module).body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return classes[0].body if classes else []


def _literal_default(node: ast.AnnAssign) -> Any:
    if isinstance(node.value, ast.Call):  # field(default_factory=list), the only call allowed
        return []
    assert node.value is not None, f"option {ast.unparse(node.target)} has no default"
    return ast.literal_eval(node.value)


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    assert node.end_lineno is not None
    comment = lines[node.end_lineno - 1].partition("  # ")[2].strip()
    for line in lines[node.end_lineno :]:
        if not line.strip().startswith("# "):
            break
        comment += " " + line.strip()[2:]
    return comment


@dataclass
class Given:
    """The options that were given (flags, environment, config file), not yet parsed, and which of them were used."""

    values: dict[str, Any]
    used: set[str] = field(default_factory=set)

    def build(self, module: str, class_name: str = "Options") -> Any:
        """Return an instance of a module's options dataclass from what was given; defaults fill the rest.

        Raises UsageError for a value of another type than the field's.
        """
        options_class = getattr(importlib.import_module(f"mefem_cli.{module}"), class_name)
        values = {
            one.name: one.parse(self.values[one.name]) for one in read_fields(module, class_name) if one.name in self
        }
        self.used |= {one.name for one in fields(options_class)}
        return options_class(**values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    @property
    def unused(self) -> list[str]:
        """Options that were given but that nothing built so far has."""
        return sorted(set(self.values) - self.used)


def parse_yaml(text: str) -> Any:
    """Return what YAML says. Raises yaml.YAMLError, also for a key that stands twice in one table."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes no key twice; YAML itself would silently keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[str, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                if key.value in lines:
                    first = lines[key.value]
                    raise yaml.YAMLError(f'the key "{key.value}" stands there twice, in lines {first} and {line}')
                lines[key.value] = line
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)  # noqa: S506 - it is a SafeLoader


def read_config(path: str, command: str, known: Iterable[str], other_commands: Iterable[str]) -> dict[str, Any]:
    """Return the options in a YAML file: flat, or under the command's name. Raises UsageError for unknown ones."""
    import yaml

    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path}: wanted a table of options, such as `mask: stripes`")
    flat = {key: value for key, value in content.items() if key not in set(other_commands)}
    section = flat.pop(command, None) or {}
    if not isinstance(section, Mapping):
        raise UsageError(f"--config {path}: `{command}` should hold a table of options")
    options = {str(key).replace("-", "_"): value for key, value in {**flat, **section}.items()}
    known = set(known)
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f'--config {path}: {command} has no option "{name}"{hint}')
    return options
