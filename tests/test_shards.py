"""Tar shards: the index against tarfile and GNU tar, samples against webdataset, hostile and damaged archives."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import tarfile
import threading
import tracemalloc
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mefem_cli.errors import MefemError, OutputError
from mefem_cli.stores import samples, shards
from mefem_cli.stores.shard_writer import Place, ShardWriter
from mefem_cli.stores.shards import DamagedShard, Member, ShardReader

BLOCK, RECORD = 512, 10_240
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder/" + "long name " * 30 + ".jpg"
needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")

parts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=120).map(lambda name: os.fsdecode(re.sub(rb"[\0/]", b"_", name))),  # not UTF-8
    st.sampled_from(["a", "long " * 40, "x" * 99, "y" * 100, "z" * 101, "é" * 60]),
)
names = st.lists(parts, min_size=1, max_size=4).map("/".join)
sizes = st.one_of(st.sampled_from([0, 1, 511, 512, 513, 1024]), st.integers(0, 3000))
entries = st.lists(st.tuples(names, sizes), max_size=8)


def tar_of(files, form=tarfile.GNU_FORMAT, **fields) -> bytes:
    """Return a tar that tarfile wrote; `files` are (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def with_checksum(header: bytes) -> bytes:
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def header_of(name=b"a.jpg", size=b"00000000000\0", kind=b"0", magic=b"ustar\x0000", prefix=b"") -> bytes:
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8 + kind
    return with_checksum((fields.ljust(257, b"\0") + magic).ljust(345, b"\0") + prefix.ljust(167, b"\0"))


def pax_of(records: bytes, kind=b"x") -> bytes:
    return header_of(b"pax", b"%011o\0" % len(records), kind) + records + bytes(-len(records) % BLOCK)


def record(keyword: bytes, value: bytes) -> bytes:
    rest = len(keyword) + len(value) + 3  # a space, an equals sign and a newline
    length = next(n for n in range(rest, rest + 9) if n == rest + len(str(n)))
    return b"%d %s=%s\n" % (length, keyword, value)


def listed(path) -> tuple[list[Member], str]:
    """Return the members of a shard, and what is wrong with it."""
    found = []
    try:
        for member in shards.members(path):
            found.append(member)
    except DamagedShard as error:
        return found, error.detail
    return found, ""


@pytest.fixture
def shard(tmp_path):
    """Write bytes as a shard, return its path."""

    def write(content: bytes) -> Path:
        path = tmp_path / "shard.tar"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that examples of a property test write over and over."""
    return tmp_path_factory.mktemp("shards")


# The index


@pytest.mark.parametrize("form", FORMATS)
@given(files=entries)
@settings(max_examples=60, deadline=None)
@example(files=[("a.jpg", 0), (LONG, 512), ("b", 513)])
def test_members_are_those_of_tarfile(folder, form, files):
    content = random.Random(0).randbytes(3000)
    path = folder / f"{form}.tar"
    try:
        path.write_bytes(tar_of([(name, content[:size]) for name, size in files], FORMATS[form]))
    except ValueError:  # this format cannot spell the name
        return
    with tarfile.open(path) as archive:
        wanted = [Member(one.name, one.offset_data, one.size) for one in archive]
    assert list(shards.members(path)) == wanted
    assert [(member.name, member.size) for member in wanted] == files
    table = shards.index(path)
    assert [os.fsdecode(name) for name in table["name"].to_pylist()] == [member.name for member in wanted]
    assert table["offset"].to_pylist() == [member.offset for member in wanted]
    assert table["size"].to_pylist() == [member.size for member in wanted]


@needs_tar
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_members_of_gnu_tar(tmp_path, form):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    short = [b"a.jpg", b"caf\xe9.jpg", "ä€😀.png".encode(), b"line\nbreak.jpg"]
    long = [b"y" * 120 + b".jpg", "é".encode() * 110] if form != "v7" else []
    if form == "ustar":
        long = [b"y" * 90 + b".jpg"]
    for index, name in enumerate([*short, *long]):
        Path(os.fsdecode(bytes(source / "sub") + b"/" + name)).write_bytes(b"%d" % index * 700)
    path = tmp_path / "shard.tar"
    subprocess.run(["tar", f"--format={form}", "-cf", path, "-C", source, "sub"], check=True)
    with path.open("rb") as file:
        found = {name: os.pread(file.fileno(), size, offset) for name, offset, size in shards.members(path)}
    assert found == {os.fsdecode(b"sub/" + name): b"%d" % i * 700 for i, name in enumerate([*short, *long])}


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_member_of_more_than_8_gib(tmp_path, form):
    size = 9 << 30
    info = tarfile.TarInfo("film.mp4")
    info.size = size
    header = info.tobuf(FORMATS[form])
    path = tmp_path / "shard.tar"
    with path.open("wb") as file:
        file.write(header)
        file.seek(size, os.SEEK_CUR)  # a hole
        file.write(tar_of([("b.jpg", b"b")]))
    assert list(shards.members(path)) == [
        Member("film.mp4", len(header), size),
        Member("b.jpg", len(header) + size + BLOCK, 1),
    ]


def test_other_members_are_counted_and_stepped_over(shard):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        kinds = [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
        for index, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{index}")
            info.type, info.linkname = kind, "target " * 30
            archive.addfile(info)
        for kind in (tarfile.CONTTYPE, tarfile.AREGTYPE, b"V"):
            info = tarfile.TarInfo(f"{kind!r}.jpg")
            info.type, info.size = kind, 3
            archive.addfile(info, io.BytesIO(b"abc"))
    skipped: Counter[str] = Counter()
    found = list(shards.members(shard(buffer.getvalue()), skipped))
    assert [(one.name, one.size) for one in found] == [("b'7'.jpg", 3), ("b'\\x00'.jpg", 3)]
    assert skipped == {"hard link": 1, "symbolic link": 1, "device": 3, "special member": 1}


@needs_tar
@pytest.mark.parametrize("form", [["gnu"], ["pax", "--sparse-version=0.0"], ["pax", "--sparse-version=0.1"], ["pax"]])
def test_sparse_files_are_skipped_and_what_follows_is_found(tmp_path, form):
    with (tmp_path / "holes").open("wb") as file:
        for index in range(40):  # more pieces than a header has room for
            file.seek(index << 16)
            file.write(b"data" * 1024)
        file.truncate(1 << 22)
    (tmp_path / "b.jpg").write_bytes(b"b" * 700)
    path = tmp_path / "shard.tar"
    subprocess.run(
        ["tar", f"--format={form[0]}", *form[1:], "-S", "-cf", path, "holes", "b.jpg"], check=True, cwd=tmp_path
    )
    if path.stat().st_size > 1 << 20:
        pytest.skip("this file system keeps no holes")
    skipped: Counter[str] = Counter()
    (found,) = shards.members(path, skipped)
    assert (found.name, found.size, skipped) == ("b.jpg", 700, {"sparse file": 1})


def test_old_and_odd_headers(shard):
    old = header_of(b"old.jpg", b"          3 ", b"\0", magic=b"") + b"abc".ljust(BLOCK, b"\0")
    folder = header_of(b"folder/", kind=b"\0", magic=b"")
    prefix = header_of(b"b.jpg", prefix=b"2024/may")
    # GNU tar writes times where POSIX tar has the prefix
    times = header_of(b"c.jpg", magic=b"ustar  \0", prefix=b"14123456712\x0014123456712\0")
    name = b"\xe9" * 50  # some programs took the bytes of the checksum as signed
    signed = header_of(name)
    total = sum(byte - 256 * (byte > 127) for byte in signed[:148] + b" " * 8 + signed[156:])
    signed = signed[:148] + b"%06o\0 " % total + signed[156:]
    found, damage = listed(shard(old + folder + prefix + times + signed + bytes(1024)))
    wanted = ["old.jpg", "2024/may/b.jpg", "c.jpg", os.fsdecode(name)]
    assert ([one.name for one in found], damage) == (wanted, "")
    assert found[0] == Member("old.jpg", BLOCK, 3)


def test_small_members_are_read_ahead_once_and_large_ones_passed_over(shard, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, size, advice: asked.append((begin, size, advice)))
    monkeypatch.setattr(shards, "READ_AHEAD", 8192)
    monkeypatch.setattr(shards, "READ_AHEAD_BELOW", 4096)
    path = shard(tar_of([(f"{index}", b"x" * 600) for index in range(100)]))
    assert len(list(shards.members(path))) == 100
    end = 100 * 3 * BLOCK
    first = 3 * BLOCK
    assert asked == [(begin, 8192, os.POSIX_FADV_WILLNEED) for begin in range(first, end + 4096, 8192)]
    asked.clear()
    assert len(list(shards.members(shard(tar_of([(f"{index}", b"x" * 4096) for index in range(20)]))))) == 20
    assert not asked


# Damage


def test_a_tar_cut_anywhere_gives_its_whole_members_and_says_so(shard):
    files = [("a.jpg", b"a" * 700), (LONG, b"b" * 512), ("ä" * 80, b""), ("d.jpg", b"d" * 1025)]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = shard(tar_of(files, form))
        whole = list(shards.members(path))
        assert len(whole) == 4
        end = whole[-1].offset + 3 * BLOCK
        for cut in range(end + 2 * BLOCK, -1, -1):
            os.truncate(path, cut)
            found, damage = listed(path)
            assert found == [one for one in whole if one.offset + one.size <= cut]
            assert bool(damage) == (cut < end + BLOCK), cut
            assert damage.startswith(("cut short", "not a tar" if cut else "empty")) or not damage


def test_a_changed_byte_in_a_header_is_noticed(shard):
    content = tar_of([("a.jpg", b"a" * 600), ("b.jpg", b"b"), ("c.jpg", b"c")])
    whole = list(shards.members(shard(content)))
    at = whole[1].offset - BLOCK
    for index in range(at, at + BLOCK):
        changed = bytearray(content)
        changed[index] ^= 0x11
        found, damage = listed(shard(bytes(changed)))
        is_slack = index - at in (154, 155)  # a zero and a space end the checksum; many programs write others
        assert is_slack or (found, damage) == (whole[:1], f"damaged: no header at byte {at}")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "empty"),
        (b"<html>", "not a tar"),
        (b"\xff\xd8\xff" + bytes(5000), "not a tar"),
        (gzip.compress(tar_of([("a", b"")]), mtime=0), "compressed with gzip; unpack it with gunzip first"),
        (bz2.compress(tar_of([("a", b"")])), "compressed with bzip2; unpack it with bunzip2 first"),
        (lzma.compress(tar_of([("a", b"")])), "compressed with xz; unpack it with unxz first"),
        (bytes.fromhex("28b52ffd") + bytes(600), "compressed with zstd; unpack it with unzstd first"),
        (tar_of([("a", b"")]) * 2, "something follows its end at byte 512; tars are joined with tar -A, not with cat"),
        (header_of(size=b"77777777777\0") + bytes(1024), "cut short: 'a.jpg' has 8589934591 bytes, 1024 are there"),
        (
            header_of(size=b"\x80" + b"\xff" * 11),
            "cut short: 'a.jpg' has 309485009821345068724781055 bytes, 0 are there",
        ),
        (header_of(size=b"\xff" * 12) + bytes(1024), "damaged: b'" + "\\xff" * 12 + "' in a header is no number"),
        (header_of(size=b"-0000000001\0") + bytes(1024), "damaged: b'-0000000001\\x00' in a header is no number"),
        (header_of(size=b"0o000000001\0") + bytes(1024), "damaged: b'0o000000001\\x00' in a header is no number"),
        (header_of(size=b"00000000009\0") + bytes(1024), "damaged: b'00000000009\\x00' in a header is no number"),
        (header_of(size=b"77777777777\0", kind=b"L"), "damaged: the extended header at byte 0 has 8589934591 bytes"),
        (pax_of(b"99999 path=a\n"), "damaged: an extended header says b'99999 path=a\\n'"),
        (pax_of(b"0 path=a\n"), "damaged: an extended header says b'0 path=a\\n'"),
        (pax_of(b"-9 path=a\n"), "damaged: an extended header says b'-9 path=a\\n'"),
        (pax_of(b"9 pathab\n"), "damaged: an extended header says b'9 pathab\\n'"),
        (pax_of(b"nonsense"), "damaged: an extended header says b'nonsense'"),
        (pax_of(record(b"size", b"-1")), "damaged: an extended header says that a size is b'-1'"),
        (pax_of(record(b"size", b"9" * 5000)), "damaged: an extended header says that a size is b'" + "9" * 40 + "'"),
        (pax_of(record(b"size", b"7")) + header_of() + b"abc", "cut short: 'a.jpg' has 7 bytes, 3 are there"),
        (pax_of(record(b"path", b"b")), "cut short: the mark at the end of a tar is missing"),
    ],
)
def test_what_is_wrong_is_said(shard, content, detail):
    path = shard(content)
    assert listed(path) == ([Member("a", 512, 0)] if "follows" in detail else [], detail)
    with pytest.raises(MefemError, match=re.escape(f"{path}: {detail}")):
        list(shards.members(path))


def test_what_is_no_file_is_said_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    assert listed(tmp_path / "pipe.tar") == ([], "not a file")
    assert listed(tmp_path) == ([], "not a file")
    assert listed(tmp_path / "none.tar") == ([], "No such file or directory")


def test_a_long_run_of_extended_headers_is_read_in_little_memory(shard):
    headers = [pax_of(record(b"comment%d" % index, b"x" * 100_000)) for index in range(100)]
    path = shard(b"".join(headers) + header_of(b"a.jpg") + bytes(1024))
    del headers
    tracemalloc.start()
    try:
        assert [one.name for one in shards.members(path)] == ["a.jpg"]
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    path = shard(pax_of(record(b"a", b"b")) * 20_000 + header_of(b"a.jpg") + bytes(1024))  # tarfile runs out of stack
    assert [one.name for one in shards.members(path)] == ["a.jpg"]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_the_bytes_it_ends_and_stays_in_the_file(folder, data):
    """Bytes change, and checksums are made to fit again."""
    content = bytearray(tar_of([("a.jpg", b"a" * 600), (LONG, b"b"), ("ä", b"c")], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.integers(0, len(content) // BLOCK - 1)) * BLOCK
        start = block + data.draw(st.one_of(st.sampled_from([0, 100, 124, 156, 257, 345, 482]), st.integers(0, 511)))
        new = data.draw(
            st.one_of(st.binary(max_size=20), st.sampled_from([b"\x80", b"0", b"x", b"L", b"S", b"77777777"]))
        )
        content[start : start + len(new)] = new
        if data.draw(st.booleans()):
            content[block : block + BLOCK] = with_checksum(bytes(content[block : block + BLOCK]))
    path = folder / "fuzzed.tar"
    path.write_bytes(content)
    found, damage = listed(path)
    assert all(0 < one.offset <= one.offset + one.size <= len(content) for one in found)
    assert "\n" not in damage
    try:
        assert sum(len(sample.files) for sample in samples.samples(path)) <= len(found)
    except DamagedShard as error:
        assert error.detail == damage


def test_is_tar():
    for form in FORMATS.values():
        assert shards.is_tar(tar_of([(LONG[-90:], b"x")], form)[:BLOCK])
    assert shards.is_tar(tar_of([]))
    assert shards.is_tar(header_of(b"v7", magic=b""))
    others = [b"", b"\xff\xd8\xff\xe0", bytes(511), b"text " * 200, b" " * 512, b"0" * 512, b"PK\3\4" + bytes(600)]
    assert not any(shards.is_tar(start) for start in others)
    assert not shards.is_tar(header_of()[:511])
    assert not shards.is_tar(header_of().replace(b"a.jpg", b"b.jpg"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.jpg", ""),
        ("./2024/a b/ä.jpg", ""),
        ("a..b/..c", ""),
        ("caf\udce9.jpg", ""),
        ("", "folder"),
        ("a/", "folder"),
        ("a/.", "folder"),
        ("/etc/passwd", "absolute"),
        ("\\\\server\\share", "absolute"),
        ("C:\\a.jpg", "absolute"),
        ("c:a.jpg", "absolute"),
        ("..", "out of"),
        ("../a", "out of"),
        ("a/../../b", "out of"),
        ("a\\..\\..\\b", "out of"),
        ("a\0.jpg", "zero"),
        ("a/" + "é" * 128, "255 bytes"),
    ],
)
def test_unsafe_names(name, reason):
    assert reason in shards.unsafe_name(name)
    assert bool(reason) == bool(shards.unsafe_name(name))


@given(st.text(st.sampled_from("a./\\:\0"), max_size=12))
@settings(max_examples=500)
def test_a_safe_name_stays_below_the_folder(name):
    if not shards.unsafe_name(name):
        assert os.path.normpath(f"/out/{name}").startswith("/out/")


# Samples


def reference_samples(found: list[Member]) -> list[tuple[str, list[str]]]:
    """Webdataset's rule on names without hidden or doubled ones: the regular expression is its `base_plus_ext`."""
    groups: list[tuple[str, list[str]]] = []
    for member in found:
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
        if match and groups and groups[-1][0] == match[1]:
            groups[-1][1].append(match[2].lower())
        elif match:
            groups.append((match[1], [match[2].lower()]))
    return groups


def keys_and_extensions(path) -> list[tuple[str, list[str]]]:
    return [(sample.key, list(sample.files)) for sample in samples.samples(path)]


stems = st.sampled_from(["a", "b", "00/a", "00/b", "./a", "x.y/a", "0.1/b-2", "é"])
suffixes = st.sampled_from(["", ".jpg", ".JSON", ".txt", ".seg.png", ".tar.gz"])


@given(st.lists(st.tuples(stems, suffixes).map("".join), max_size=12, unique_by=str.lower))
@settings(max_examples=200, deadline=None)
def test_samples_are_those_of_the_rule(folder, members):
    path = folder / "samples.tar"
    path.write_bytes(tar_of([(name, b"") for name in members]))
    found = keys_and_extensions(path)
    assert [one for one in found if one[1] != [""]] == reference_samples(list(shards.members(path)))
    assert [key for key, extensions in found if extensions == [""]] == [
        name for name in members if "." not in name.rpartition("/")[2]
    ]


def test_samples_are_those_of_webdataset(tmp_path):
    tariterators = pytest.importorskip("webdataset.tariterators")
    with ShardWriter(tmp_path, bytes_per_shard=20_000) as writer:
        for index in range(20):
            key = f"{'x' * 120 if index % 5 == 0 else 'folder.d'}/{index:05d}"
            writer.add_sample(key, {"jpg": b"j" * 700 * index, "seg.png": b"p", "json": b"{}"})
        writer.add("README", b"")
        writer.add("__index__/00.json", b"{}")
    paths = sorted(tmp_path.glob("*.tar"))
    assert len(paths) > 3
    with ExitStack() as stack:
        opened = [{"url": path.name, "stream": stack.enter_context(path.open("rb"))} for path in paths]
        wanted = list(tariterators.group_by_keys(tariterators.tar_file_expander(opened)))
    assert len(wanted) == 20
    found = []
    for path in paths:
        for sample in samples.samples(path):
            if sample.key != "README":
                contents = {name: ShardReader().read(path, one.offset, one.size) for name, one in sample.files.items()}
                found.append({"__key__": sample.key, **contents})
    assert found == [{name: one[name] for name in one if name != "__url__"} for one in wanted]


def test_a_doubled_extension_begins_another_sample_and_hidden_files_are_none(shard, monkeypatch):
    files = [
        "a.jpg",
        "a.json",
        "README",
        "a.JPG",
        "._a.jpg",
        "a.txt",
        ".git/b.jpg",
        "./c.jpg",
        "../d.jpg",
        "__m__/e.jpg",
    ]
    path = shard(tar_of([(name, b"") for name in files]))
    skipped: Counter[str] = Counter()
    found = [(sample.key, [one.name for one in sample.files.values()]) for sample in samples.samples(path, skipped)]
    wanted = [("README", ["README"]), ("a", ["a.jpg", "a.json"]), ("a", ["a.JPG", "a.txt"])]
    assert found == [*wanted, ("./c", ["./c.jpg"]), ("../d", ["../d.jpg"])]
    assert skipped == {"hidden": 2, "webdataset's own": 1}
    monkeypatch.setattr(samples, "MAX_FILES_A_SAMPLE", 2)
    path = shard(tar_of([(f"a.{index}", b"") for index in range(5)]))
    assert [len(sample.files) for sample in samples.samples(path)] == [2, 2, 1]


def test_the_samples_before_the_damage_are_given(shard):
    content = tar_of([("a.jpg", b"a"), ("a.json", b"{}"), ("b.jpg", b"b"), ("b.json", b"{}")])
    path, seen = shard(content[: 7 * BLOCK]), []
    with pytest.raises(DamagedShard, match="cut short: 'b.json' has 2 bytes, 0 are there"):
        for sample in samples.samples(path):
            seen.append((sample.key, list(sample.files)))
    assert seen == [("a", ["jpg", "json"]), ("b", ["jpg"])]


# Labels


def labels_of(shard, **contents: bytes) -> tuple[dict, str]:
    path = shard(tar_of([(f"a.{extension}", content) for extension, content in contents.items()]))
    (sample,) = samples.samples(path)
    with path.open("rb") as file:
        return samples.sample_labels(sample, file.fileno())


def test_the_fields_of_a_json_sidecar_are_labels(shard):
    fields = {
        "age": 31,
        "bmi": 22.5,
        "smoker": True,
        "sex": "f",
        "note": None,
        "id": 2**53 + 1,
        "box": [1, 2.5],
        "scan": {"site": "Köln"},
        "exif": "GPS",
        "": "no name",
    }
    labels, remark = labels_of(
        shard, jpg=b"", json=json.dumps(fields).encode(), txt="\ufeffa face\n".encode(), cls=b"3\n"
    )
    assert labels == {
        "txt": "a face",
        "cls": 3.0,
        "age": 31.0,
        "bmi": 22.5,
        "smoker": 1.0,
        "sex": "f",
        "note": None,
        "id": "9007199254740993",
        "box": "[1, 2.5]",
        "scan": '{"site": "Köln"}',
    }
    assert all(type(value) in (str, float, type(None)) for value in labels.values())
    assert remark == ""


@pytest.mark.parametrize(
    ("content", "labels", "remark"),
    [
        (b"", {}, "json is no JSON"),
        (b'{"a": 1', {}, "json is no JSON"),
        (b"\xff\xfe\xff{", {}, "json is no JSON"),
        (b"[" * 100_000, {}, "json is no JSON"),
        (b'{"a": %s}' % (b"9" * 5000), {}, "json is no JSON"),
        (b"[1, 2]", {}, "json is no JSON object"),
        (b"3", {}, "json is no JSON object"),
        (b'{"a": NaN, "b": 1e999, "c": -Infinity}', {"a": None, "b": None, "c": None}, ""),
        (b'{"a\\u0000b": "\\ud800x\\u0000"}', {"ab": "?x"}, ""),
        (b'{"l": ["\\ud800"]}', {"l": '["?"]'}, ""),
        (json.dumps({"x" * 201: 1, "y" * 200: 1}).encode(), {"y" * 200: 1.0}, ""),
        (b" " * (1 << 20) + b"{}", {}, "json is not used, it has 1048578 bytes"),
    ],
)
def test_odd_json_is_a_remark_and_no_crash(shard, content, labels, remark):
    assert labels_of(shard, jpg=b"", json=content) == (labels, remark)


def test_json_of_any_depth_is_a_label_or_a_remark():
    """Writing a value as text takes more of the stack than reading it."""
    read = samples.SIDECARS["json"]
    remarks = [read(b'{"a": %s%s}' % (b"[" * depth, b"]" * depth))[1] for depth in range(500, 1100)]
    assert (remarks[0], remarks[-1], set(remarks)) == ("", "is no JSON", {"", "is no JSON"})


def test_labels_are_limited_in_number(shard):
    labels, remark = labels_of(shard, json=json.dumps(dict.fromkeys(map(str, range(300)), 1)).encode(), cls=b"cat")
    assert list(labels) == ["cls", *map(str, range(256))]
    assert labels["cls"] == "cat"
    assert remark == "json has 300 fields, 256 are used"
    assert labels_of(shard, txt=b"\xff \0 caf\xc3\xa9") == ({"txt": "\ufffd  café"}, "")
    assert labels_of(shard, jpg=b"") == ({}, "")


# Writing


def written(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return what tarfile finds in the shards of a folder: shard -> name -> content."""
    found = {}
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as archive:
            found[path.name] = {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    return found


@given(entries)
@settings(max_examples=60, deadline=None)
@example([("x" * 300, 5), ("y" * 150 + "/" + "z" * 99, 512), ("caf\udce9", 0)])
def test_what_is_written_is_read_by_tarfile(folder, files):
    out = folder / "written"
    shutil.rmtree(out, ignore_errors=True)
    files = {name: random.Random(size).randbytes(size) for name, size in files if not shards.unsafe_name(name)}
    with ShardWriter(out) as writer:
        places = {name: writer.add(name, content) for name, content in files.items()}
    if not files:
        assert not out.exists()
        return
    assert written(out) == {"00000.tar": files}
    content = (out / "00000.tar").read_bytes()
    assert {name: content[place.offset :][: place.size] for name, place in places.items()} == files
    assert list(shards.members(out / "00000.tar")) == [Member(name, *place[1:]) for name, place in places.items()]


def test_the_bytes_are_those_of_tarfile(tmp_path):
    files = [("a.jpg", b"a" * 700), ("folder/" * 20 + "b.jpg", b"b" * 512), ("ä.jpg", b"")]
    for folder in ("one", "two"):
        with ShardWriter(tmp_path / folder) as writer:
            for name, content in files:
                writer.add(name, content)
    wanted = tar_of(files, tarfile.USTAR_FORMAT)
    assert len(wanted) % RECORD == 0
    assert (tmp_path / "one" / "00000.tar").read_bytes() == (tmp_path / "two" / "00000.tar").read_bytes() == wanted


@needs_tar
def test_gnu_tar_unpacks_it(tmp_path):
    names = ["a.jpg", "sub/ä.jpg", "caf\udce9.jpg", "x" * 200 + ".jpg", "y" * 130 + "/z.jpg", "n" * 150 + "\udcff"]
    with ShardWriter(tmp_path / "shards") as writer:
        for index, name in enumerate(names):
            writer.add(name, b"%d" % index * 1000)
    (tmp_path / "out").mkdir()
    done = subprocess.run(["tar", "-xvf", tmp_path / "shards/00000.tar", "-C", tmp_path / "out"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    for index, name in enumerate(names):
        path = tmp_path / "out" / name
        assert path.read_bytes() == b"%d" % index * 1000
        assert (path.stat().st_mode & 0o777, path.stat().st_mtime) == (0o644, 0)


def test_shards_are_cut_between_samples(tmp_path):
    with ShardWriter(tmp_path, bytes_per_shard=2 * RECORD, first=7) as writer:
        places = [writer.add_sample(f"{index}", {"jpg": b"j" * 6_000, "json": b"{}"}) for index in range(3)]
        places.append(writer.add_sample("large", {"jpg": b"j" * 50_000, "json": b"{}"}))
        places.append(writer.add_sample("last", {"jpg": b"j", "json": b"{}"}))
    assert places[0] == {"jpg": Place("00007.tar", 512, 6_000), "json": Place("00007.tar", 512 + 6_144 + 512, 2)}
    assert [one["jpg"].shard for one in places] == [one["json"].shard for one in places]
    assert [one["jpg"].shard[:5] for one in places] == ["00007", "00007", "00008", "00009", "00010"]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {"00007.tar": 2 * RECORD, "00008.tar": RECORD, "00009.tar": 6 * RECORD, "00010.tar": RECORD}
    assert [len(files) for files in written(tmp_path).values()] == [4, 2, 2, 2]


def test_the_end_of_a_shard_counts(tmp_path):
    """Two zero blocks follow the files; the whole fills records of 20 blocks."""
    for second, sizes in ((17 * BLOCK, [2 * RECORD]), (18 * BLOCK, [2 * RECORD, 2 * RECORD])):
        with ShardWriter(tmp_path / str(second), bytes_per_shard=2 * RECORD) as writer:
            writer.add("a.jpg", bytes(19 * BLOCK))  # with its header one record
            writer.add("b.jpg", bytes(second))
        paths = sorted((tmp_path / str(second)).iterdir())
        assert [path.stat().st_size for path in paths] == sizes
        assert [one.name for path in paths for one in shards.members(path)] == ["a.jpg", "b.jpg"]


def test_a_shard_gets_its_name_when_complete_and_leaves_nothing_after_an_error(tmp_path):
    (tmp_path / ".00003.tar.123.tmp").write_bytes(b"of a writer that was killed")
    with pytest.raises(KeyError), ShardWriter(tmp_path, bytes_per_shard=RECORD) as writer:
        assert not list(tmp_path.iterdir())
        writer.add("a.jpg", b"a" * 6_000)
        assert not list(tmp_path.glob("*.tar"))
        writer.add("b.jpg", b"b" * 6_000)
        assert [path.name for path in tmp_path.glob("[0-9]*")] == ["00000.tar"]
        raise KeyError
    assert written(tmp_path) == {"00000.tar": {"a.jpg": b"a" * 6_000}}


def test_a_full_disk_is_told(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OutputError, match=r"00000\.tar cannot be written: File too large; make room"):  # noqa: SIM117
            with ShardWriter(tmp_path) as writer:
                for index in range(5):
                    writer.add(f"{index}.jpg", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), ShardWriter(tmp_path / "file") as writer:
        writer.add("a", b"")


@pytest.mark.parametrize("key", ["a.b", "../a", "/a", "a/", ".a", ""])
def test_a_key_that_would_not_come_back_is_a_mistake(tmp_path, key):
    with pytest.raises(AssertionError), ShardWriter(tmp_path) as writer:
        writer.add_sample(key, {"jpg": b""})


# Reading


@pytest.fixture
def ten_shards(tmp_path) -> list[tuple[Path, int, bytes]]:
    """(path, offset, content) of one member in each of ten shards."""
    found = []
    for index in range(10):
        content = random.Random(index).randbytes(5_000)
        with ShardWriter(tmp_path, first=index) as writer:
            place = writer.add("a.jpg", content)
        found.append((tmp_path / place.shard, place.offset, content))
    return found


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_few_files_stay_open_and_all_are_closed_in_the_end(ten_shards):
    before = num_open()
    reader = ShardReader(max_open=3)
    for _ in range(2):
        assert [reader.read(path, offset, 5_000) for path, offset, _ in ten_shards] == [one[2] for one in ten_shards]
        assert num_open() == before + 3
    assert pickle.loads(pickle.dumps(reader)).read(*ten_shards[0][:2], 10) == ten_shards[0][2][:10]
    del reader
    assert num_open() == before


def test_threads_share_a_reader(ten_shards):
    reader, wrong = ShardReader(max_open=2), []

    def read(seed: int) -> None:
        for path, offset, content in random.Random(seed).choices(ten_shards, k=400):
            if reader.read(path, offset, 5_000) != content:
                wrong.append(path)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_on(ten_shards):
    reader = ShardReader()
    contents = [reader.read(path, offset, 5_000) for path, offset, _ in ten_shards]
    child = os.fork()
    if not child:
        same = all([reader.read(path, offset, 5_000) for path, offset, _ in ten_shards] == contents for _ in range(50))
        os._exit(0 if same else 1)
    for _ in range(50):
        assert [reader.read(path, offset, 5_000) for path, offset, _ in ten_shards] == contents
    assert os.waitpid(child, 0)[1] == 0


def test_a_shard_made_anew_is_read_anew(ten_shards):
    reader = ShardReader()
    path, offset, content = ten_shards[0]
    assert reader.read(path, offset, 5_000) == content
    with ShardWriter(path.parent) as writer:
        writer.add("a.jpg", b"new" * 2_000)
    assert reader.read(path, offset, 5_000) == (b"new" * 2_000)[:5_000]
    path.unlink()
    with pytest.raises(DamagedShard, match="No such file"):
        reader.read(path, offset, 5_000)


@pytest.mark.parametrize(("offset", "size"), [(0, 1 << 60), (10_240, 1), (1 << 62, 1), (-1, 5), (0, -1)])
def test_bytes_that_are_not_there(ten_shards, offset, size):
    with pytest.raises(DamagedShard, match="it has 10240"):
        ShardReader().read(ten_shards[0][0], offset, size)
