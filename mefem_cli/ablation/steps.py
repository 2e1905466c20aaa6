"""The three steps of a cell (pretrain, embed, probe): their options, which of them a choice uses, and keys.

An option is named as on its command's line. A name that several commands have means the first of them; another one's is
`probe.epochs`. Options that say how to run (`SHARED`) go to every step that has them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from mefem_cli import parts
from mefem_cli.errors import UsageError, did_you_mean
from mefem_cli.parts import Field

STEPS = ("pretrain", "embed", "probe")
SHARED = frozenset({"device", "precision", "workers", "limit"})
FREE = frozenset({"device", "workers", "checkpoint_every"})  # how a step runs, not what it makes: not in a key
# Set by ablate itself, or without a place in its table.
OWNED = frozenset(
    ("out", "overwrite", "resume", "dry_run", "seed", "model", "store", "by", "quiet", "json", "config", "debug")
    + ("on", "parts", "shard")
)
# Of which a cell has no score of its own, though keys hold them; the grid itself has --limit.
UNSHOWN = frozenset({"print_sbatch", "limit", "fraction", "permute"})
OF_THE_GRID = {"seed": "--seeds N", "limit": "--limit N", "out": "-o FOLDER", "on": "--on ray"}  # its own options
CHOICES = {"mask": "masks", "objective": "objectives"}  # options whose values are the files of a room
# Options that another option's value leaves without effect.
IGNORED_WITH = {("loss_weight", "uniform"): frozenset({"r0", "sigma"})}
KEY_DIGITS = 16
MODEL = "model"  # names a given encoder: no option of a grid, but part of a cell's name

Assignment = dict[str, Any]  # option -> parsed value


@cache
def options(step: str) -> dict[str, Field]:
    """Return the options of a step that a grid may set, those of all parts included, by name."""
    module = importlib.import_module(f"mefem_cli.commands.{step}")
    sources = [tuple(spec.split(":")) for spec in module.OPTIONS]
    sources += [(f"{room}.{part}", "Options") for room, part in parts.offered(module)]
    return _by_name(sources)


def _by_name(sources: Iterable[tuple[str, ...]]) -> dict[str, Field]:
    """Return the options of (module, class) pairs; of two with one name, the first."""
    found: dict[str, Field] = {}
    for module, class_name in sources:
        for option in _read_fields(module, class_name):
            if option.name not in OWNED:
                found.setdefault(option.name, option)
    return found


_read_fields = cache(parts.read_fields)  # a grid asks for the same few files again and again


def resolve_name(typed: str) -> str:
    """Return the one name of an option typed as `loss-weight` or `pretrain.mask`. Raises UsageError for an unknown one.

    >>> resolve_name("pretrain.loss-weight")
    'loss_weight'
    >>> resolve_name("probe.epochs")
    'probe.epochs'
    """
    name = typed.strip().removeprefix("--").replace("-", "_")
    step, dot, option = name.partition(".")
    if not dot:
        step, option = next(((one, name) for one in STEPS if name in options(one)), ("", name))
    if option == MODEL:
        raise UsageError("encoders are named with --model, in a grid file under `model:`")
    if option in OWNED or option in UNSHOWN:
        hint = f"; type mefem ablate {OF_THE_GRID[option]}" if option in OF_THE_GRID else ""
        raise UsageError(f"--{option.replace('_', '-')} has no place in the cells of a grid{hint}")
    if step not in STEPS or option not in options(step):
        known = options(step) if step in STEPS else {one: None for each in STEPS for one in options(each)}
        raise UsageError(f'there is no option "{typed}"{_nearest(option, known)}')
    first = next(one for one in STEPS if option in options(one))
    return option if step == first else f"{step}.{option}"


def _nearest(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else "; mefem pretrain, embed and probe --help list the options"


def parse(name: str, value: Any) -> Any:
    """Return a value of an option, text or from YAML, as its type. Raises UsageError, also for an unknown part."""
    option = _fields(name)[0][1]
    parsed = option.parse(value)
    if option.name in CHOICES and parsed not in parts.names(CHOICES[option.name]):
        raise UsageError(
            f"{option.flag} {parsed}: no such {option.name}{did_you_mean(parsed, parts.names(CHOICES[option.name]))}"
        )
    if option.name == "head":
        heads_of(parsed, None, False)
    return parsed


def _fields(name: str) -> list[tuple[str, Field]]:
    """Return the steps that a resolved name goes to, with the option's field there."""
    step, dot, option = name.partition(".")
    if dot:
        return [(step, options(step)[option])]
    holders = [(one, options(one)[name]) for one in STEPS if name in options(one)]
    return holders if name in SHARED else holders[:1]


def of(name: str) -> list[str]:
    """Return the steps that an option, by its resolved name, goes to."""
    if name == MODEL:
        return ["embed"]
    return [step for step, _ in _fields(name)]


def split(assignment: Assignment, model: str = "") -> dict[str, Assignment]:
    """Return for each step the options that it uses; heads are named one by one, and patches stored if they want them.

    With a `model` there is no pretraining, and its choice has options of its own. Raises UsageError where a head does
    not take the features asked for.
    """
    given: dict[str, Assignment] = {step: {} for step in STEPS}
    for name, value in assignment.items():
        for step, option in _fields(name):
            given[step][option.name] = value
    probe, embed = given["probe"], given["embed"]
    features = probe.get("features")
    heads = heads_of(probe.get("head", "default"), features, embed.get("patches", False))
    probe["head"] = ",".join(heads)
    if reads_patches(probe):
        embed["patches"] = True
    wanted = {step: used(step, given[step], model) for step in STEPS if step != "pretrain" or not model}
    return {step: {name: given[step][name] for name in wanted.get(step, ()) if name in given[step]} for step in STEPS}


def reads_patches(probe: Assignment) -> bool:
    """Return whether a head of a probe, named one by one, reads the features of patches."""
    return any("patches" in features for _, features in reads(probe))


def reads(probe: Assignment, has_cls: bool = True) -> list[tuple[str, str]]:
    """Return each head of a probe, named one by one, with its features: those asked for, else its default."""
    defaults = {
        head: next(one for one in _features_of(head) if has_cls or "cls" not in one)
        for head in probe["head"].split(",")
    }
    return [(head, probe.get("features") or default) for head, default in defaults.items()]


def trains_cls(pretrain: Assignment) -> bool:
    """Return whether these options train a CLS token."""
    return settled("pretrain", pretrain).get("cls_prob", 0) is not None


def used(step: str, given: Assignment, model: str = "") -> dict[str, Field]:
    """Return the options that have an effect in a step, given the others: those of its parts, and of no others."""
    module = importlib.import_module(f"mefem_cli.commands.{step}")
    chosen = {name: given.get(name, option.default) for name, option in options(step).items()}
    sources = [tuple(spec.split(":")) for spec in module.OPTIONS]
    if step == "pretrain":
        sources.append((f"objectives.{chosen['objective']}", "Options"))
        if "mask" in _by_name(sources):
            sources.append((f"masks.{chosen['mask']}", "Options"))
        sources += [(f"{room}.{part}", "Options") for room, part in parts.offered(module) if room == "backbones"]
    if step == "embed" and model:
        choice = model.partition(":")[0]
        sources += [(f"{room}.{part}", "Options") for room, part in parts.offered(module) if part == choice]
    if step == "probe":
        sources += [(f"probes.{head}", "Options") for head in chosen["head"].split(",")]
    ignored = {name for (option, value), names in IGNORED_WITH.items() if chosen.get(option) == value for name in names}
    return {name: option for name, option in _by_name(sources).items() if name not in ignored}


def heads_of(head: str, features: str | None, patches: bool) -> list[str]:
    """Return the heads that `mefem probe` would take; attentive is a default only where patches are stored.

    Raises UsageError where none, or not every head asked for by name, takes the features.
    """
    from mefem_cli.evaluation.heads import DEFAULT_HEADS, DEFAULT_HEADS_WITH_PATCHES, chosen_heads

    defaults = DEFAULT_HEADS_WITH_PATCHES if patches or features is not None else DEFAULT_HEADS
    takes = {name: _features_of(name) for name in chosen_heads(head) or defaults}
    takers = [name for name in takes if features is None or features in takes[name]]
    is_named = head not in ("default", "all")
    if not takers or (is_named and len(takers) < len(takes)):
        refused = next(name for name in takes if name not in takers)
        known = sorted({one for several in takes.values() for one in several})
        wanted = f"{refused} takes {' or '.join(takes[refused])}" if is_named else f"there is {', '.join(known)}"
        raise UsageError(f"--features {features}: {wanted}")
    return takers


@cache
def _features_of(head: str) -> tuple[str, ...]:
    """Return the features that a head takes, its default first."""
    return tuple(parts.read_constant(f"probes.{head}", "FEATURES"))


def settled(step: str, given: Assignment, model: str = "") -> Assignment:
    """Return all options that determine what a step makes, defaults filled in."""
    wanted = used(step, given, model)
    return {name: given.get(name, option.default) for name, option in wanted.items() if name not in FREE}


def key(*content: Any) -> str:
    """Return hex digits that differ where the content (JSON values) differs."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def arguments(given: Mapping[str, Any], step: str) -> list[str]:
    """Return options as words of a command line."""
    return [word for name, value in given.items() for word in options(step)[name].typed(value)]
