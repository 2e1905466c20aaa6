"""Which heads read which features."""

from __future__ import annotations

from mefem_cli import parts
from mefem_cli.errors import NoInputError, UsageError, did_you_mean
from mefem_cli.stores.features import FeatureStore

DEFAULT_HEADS = ("linear", "mlp")
DEFAULT_HEADS_WITH_PATCHES = (*DEFAULT_HEADS, "attentive")


def chosen_heads(head: str) -> list[str]:
    """Return the heads named by `--head`, empty for `default`. Raises UsageError for an unknown one."""
    known = parts.names("probes")
    if head == "default":
        return []
    names = known if head == "all" else [name.strip() for name in head.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f'--head {head}: there is no head "{name}"{did_you_mean(name, [*known, "all"])}')
    return names


def choose_pairs(stores: list[FeatureStore], head: str, features: str | None) -> list[tuple[str, str]]:
    """Return the (head, features) to score, which all stores have.

    A head asked for by name must fit: UsageError (it never takes such features) or NoInputError (they are not stored).
    `all` and the default leave out heads that do not fit, but for one.
    """
    allowed = {name: tuple(parts.load("probes", name).FEATURES) for name in _candidates(stores, head, features)}
    known = sorted({one for several in allowed.values() for one in several})
    takers = [name for name in allowed if features is None or features in allowed[name]]
    strict = chosen_heads(head) and head != "all"
    if not takers or (strict and len(takers) < len(allowed)):
        refused = next(name for name in allowed if name not in takers)
        wanted = f"{refused} takes {' or '.join(allowed[refused])}" if strict else f"there is {', '.join(known)}"
        raise UsageError(f"--features {features}: {wanted}")
    pairs, missing = [], []
    for name in takers:
        wanted_features = [features] if features else allowed[name]
        stored = [one for one in wanted_features if all(has_features(store, one) for store in stores)]
        pairs += [(name, one) for one in stored[:1]]
        missing += [] if stored else [(name, wanted_features)]
    if missing and (strict or not pairs):
        name, wanted_features = missing[0]
        flag = "; store them with `mefem embed --patches`" if "patches" in wanted_features[0] else ""
        paths = " or ".join(str(store.path) for store in stores)
        raise NoInputError(f"head {name} wants {' or '.join(wanted_features)} features, which {paths} lacks{flag}")
    return pairs


def _candidates(stores: list[FeatureStore], head: str, features: str | None) -> list[str]:
    if named := chosen_heads(head):
        return named
    wants_patches = features is not None or all(store.has("patches") for store in stores)
    return list(DEFAULT_HEADS_WITH_PATCHES if wants_patches else DEFAULT_HEADS)


def has_features(store: FeatureStore, features: str) -> bool:
    """Return whether the store has all of `cls+mean` or the like."""
    return all(store.has(kind) for kind in features.split("+"))
