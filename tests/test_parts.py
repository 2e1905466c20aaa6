"""Options: what is read from a dataclass's source equals the dataclass; values of every type are parsed or refused."""

from __future__ import annotations

import ast
import importlib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mefem_cli
from mefem_cli import main, parts
from mefem_cli.errors import UsageError
from mefem_cli.parts import Field, Given

PACKAGE = Path(mefem_cli.__file__).parent
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


def option_classes() -> list[tuple[str, str]]:
    """Return (module, class) of every options dataclass in the package, whoever uses it."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_options = isinstance(node, ast.ClassDef) and node.name.endswith("Options") and node.decorator_list
            if is_options and "dataclass" in ast.unparse(node.decorator_list[0]):
                found.append((module, node.name))
    return found


def field(annotation: str, default: object = None) -> Field:
    return Field("an_option", annotation, default, "what it does")


# Reading without importing -------------------------------------------------------------------------------------------


def test_there_are_options_in_every_room_and_command() -> None:
    modules = {module for module, _ in option_classes()}
    assert {"masks.stripes", "objectives.mefem", "backbones.vit", "probes.attentive", "faces.crop"} <= modules


@pytest.mark.parametrize(("module", "class_name"), option_classes())
def test_fields_read_from_source_are_those_of_the_dataclass(module: str, class_name: str) -> None:
    options_class = getattr(importlib.import_module(f"mefem_cli.{module}"), class_name)
    assert is_dataclass(options_class)
    read = parts.read_fields(module, class_name)
    assert [one.name for one in read] == [one.name for one in fields(options_class)]
    for one, true in zip(read, fields(options_class), strict=True):
        default = true.default_factory() if true.default_factory is not MISSING else true.default
        assert one.default == default and type(one.default) is type(default), one.name
        assert one.annotation == ast.unparse(ast.parse(true.type, mode="eval").body)


@pytest.mark.parametrize(("module", "class_name"), option_classes())
def test_every_option_has_a_help_comment_and_every_class_a_title(module: str, class_name: str) -> None:
    assert parts.class_summary(module, class_name)
    for one in parts.read_fields(module, class_name):
        assert len(one.help) > 5, one.name
        assert one.is_flag or one.metavar


@pytest.mark.parametrize(("module", "class_name"), option_classes())
def test_every_default_is_a_value_that_its_option_takes(module: str, class_name: str) -> None:
    for one in parts.read_fields(module, class_name):
        given_text = list(one.default) if one.is_list else one.default
        assert one.parse(given_text) == one.default, one.name


def test_a_comment_may_go_on_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""A part."""\n\n\nclass Options:\n    """What it does."""\n\n'
    source += "    width: int = 3  # of a stripe,\n    # in patches\n    spread: float = 0.1  # a share\n"
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "part.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(parts, "PACKAGE", tmp_path)
    assert [one.help for one in parts.read_fields("room.part")] == ["of a stripe, in patches", "a share"]
    assert parts.class_summary("room.part") == "What it does"
    assert parts.summary("room.part") == "A part."
    assert parts.names("room") == ["part"]


def test_a_room_hides_files_that_begin_with_an_underscore() -> None:
    assert parts.names("masks") == ["multiblock", "quadrants", "stripes"]
    with pytest.raises(UsageError, match='did you mean "stripes"'):
        parts.load("masks", "strips")


# Parsing -------------------------------------------------------------------------------------------------------------


@given(st.integers())
def test_whole_numbers(number: int) -> None:
    assert field("int", 0).parse(str(number)) == number
    assert field("int | None").parse(number) == number
    parsed = field("float", 0.0).parse(str(number))
    assert isinstance(parsed, float) and parsed == float(number)


@given(st.floats(allow_nan=False))
def test_numbers_come_back_exactly(number: float) -> None:
    assert field("float", 0.0).parse(repr(number)) == number
    assert field("float | None").parse(number) == number


@given(TEXT)
def test_text_stays_as_it_is(text: str) -> None:
    assert field("str", "auto").parse(text) == text
    assert field("list[str]", []).parse([text, text]) == [text, text]


@given(TEXT)
def test_whatever_is_typed_is_parsed_or_refused_in_one_line(text: str) -> None:
    for annotation in ("int", "float | None", "bool", "Literal['auto', 'bf16'] | None", "Literal['a'] | int"):
        try:
            field(annotation).parse(text)
        except UsageError as error:
            assert str(error).startswith(f"--an-option {text}: wanted ")


@given(st.sampled_from(["true", "True", "yes", "1", True, 1]), st.sampled_from(["false", "FALSE", "no", "0", False, 0]))
def test_switches(on: object, off: object) -> None:
    assert field("bool", False).parse(on) is True
    assert field("bool", True).parse(off) is False


def test_a_switch_refuses_other_words() -> None:
    with pytest.raises(UsageError, match=r"--an-option maybe: wanted true\|false"):
        field("bool", False).parse("maybe")


def test_literals_keep_their_type_and_suggest() -> None:
    choice = field("Literal['circular', 'uniform']", "circular")
    assert choice.parse("uniform") == "uniform"
    assert choice.metavar == "circular|uniform"
    with pytest.raises(UsageError, match='did you mean "circular"'):
        choice.parse("circle")
    assert field("Literal[1, 2]", 1).parse("2") == 2


def test_none_is_a_word_where_the_default_is_something_else() -> None:
    probability = field("float | None", 0.5)
    assert probability.parse("none") is None and probability.parse(None) is None
    assert probability.metavar == "X|none"
    assert field("int | None").metavar == "N"


@pytest.mark.parametrize("annotation", ["str | None", "int | None", "Literal['a', 'b'] | None"])
def test_an_empty_value_in_yaml_is_as_if_the_option_were_not_there(annotation: str) -> None:
    assert field(annotation).parse(None) is None
    assert field("list[str]", []).parse(None) == []


def test_defaults_are_shown_where_they_are_values() -> None:
    assert field("int", 0).default_text == "0"
    assert field("float", 0.0).default_text == "0.0"
    assert field("bool", True).default_text == "on"
    silent = (field("bool", False), field("str | None"), field("list[str]", []))
    assert [one.default_text for one in silent] == ["", "", ""]


# Building ------------------------------------------------------------------------------------------------------------


def test_given_builds_several_dataclasses_and_knows_what_nothing_used() -> None:
    chosen = Given({"width": "4", "quiet": True, "epochs": "3"})
    assert chosen.build("masks.stripes").width == 4
    assert chosen.build("console", "ConsoleOptions").quiet is True
    assert chosen.unused == ["epochs"]
    assert "width" in chosen and "seed" not in chosen


def test_a_command_offers_rooms_without_the_parts_left_out_or_single_parts() -> None:
    command = ModuleType("command")
    assert parts.offered(command) == []
    command.ROOMS, command.LEFT_OUT = ("probes", "backbones.vit"), ("probes.knn", "probes.mlp")
    assert parts.offered(command) == [("probes", "attentive"), ("probes", "linear"), ("backbones", "vit")]


@pytest.mark.parametrize("command", main.COMMANDS)
def test_an_option_is_listed_once_under_the_first_section_that_has_it(command: str) -> None:
    module = importlib.import_module(f"mefem_cli.commands.{command}")
    sections = main.sections(module)
    listed = [option.name for _, options in sections for option in options]
    assert len(set(listed)) == len(listed)
    specs = [tuple(spec.split(":")) for spec in module.OPTIONS]
    specs += [(f"{room}.{part}", "Options") for room, part in parts.offered(module)]
    everything = {option.name for path, class_name in specs for option in parts.read_fields(path, class_name)}
    assert set(listed) == everything
    assert sections[-1][0] == parts.class_summary("console", "ConsoleOptions")
