"""The list of sources on disk, and what is asked of it by hashes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mefem_cli.errors import UsageError
from mefem_cli.faces import listing
from mefem_cli.faces.listing import SourceList, without_repeats
from mefem_cli.faces.source import Given, GivenFace, Source

paths = st.binary(min_size=1, max_size=6).filter(lambda raw: b"\0" not in raw).map(os.fsdecode)
numbers = st.integers(0, 2**62)
sources = st.builds(Source, name=paths, path=paths, size=numbers, mtime=numbers, member=paths, offset=numbers)


def listed(items) -> SourceList:
    made = SourceList()
    for source in items:
        made.append(source)
    made.close()
    return made


@given(st.lists(sources, max_size=12), st.data())
def test_what_goes_in_comes_out(items, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "BATCH", 3)
        made = listed(items)
        assert list(made) == items
        positions = sorted(data.draw(st.sets(st.integers(0, len(items) - 1)))) if items else []
        assert list(made.take(np.array(positions, dtype=np.int64))) == [items[one] for one in positions]


@given(st.lists(st.sampled_from("abcde"), max_size=10))
def test_a_source_named_twice_is_read_once(names):
    kept = without_repeats(listed(Source(name, f"/{name}") for name in names))
    assert [source.name for source in kept] == list(dict.fromkeys(names))


def test_two_files_of_one_name_are_refused():
    with pytest.raises(UsageError, match="/x/a and /y/a would share one id, as both are p/a"):
        without_repeats(listed([Source("p/a", "/x/a"), Source("p/b", "/x/b"), Source("p/a", "/y/a")]))


@pytest.mark.parametrize("change", ["path", "member", "problem", "given"])
def test_state_changes_with_everything_that_matters(change):
    from dataclasses import replace

    source = Source("n", "/p", 1, 2)
    assert replace(source, **{change: "x"}).state != source.state
    assert replace(source, size=3).state != source.state != replace(source, mtime=3).state
    assert replace(source, name="other").state == source.state


labels = st.dictionaries(st.text(max_size=4), st.none() | st.floats(allow_nan=False) | st.text(max_size=4), max_size=3)
boxes = st.none() | st.tuples(*[st.floats(-1e6, 1e6)] * 4)
faces = st.builds(GivenFace, box=boxes, problem=st.text(max_size=3), labels=st.none() | labels)
pairs = st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(st.builds(Given, labels=st.none() | labels, faces=st.lists(faces).map(tuple), segment=pairs, point=pairs))
def test_what_is_given_survives_as_text(what):
    assert Given.from_json(what.to_json()) == what
