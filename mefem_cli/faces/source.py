"""One thing to read: a picture or a video, as a file or as a member of a tar shard, with what is known beforehand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from mefem_cli.faces.geometry import Box
from mefem_cli.stores.crops import path_to_text

Label = str | float | None
WHOLE_FILE = -1

DAMAGED_SHARD = "tar shard: "  # begins the problem of a source that stands for what of a shard cannot be read


@dataclass(frozen=True, slots=True)
class GivenFace:
    """A face that a table knows of: its box (x, y, width, height in px), or what is wrong with it, and its labels."""

    box: Box | None = None
    problem: str = ""  # why there is no box: the reject `bad-box`
    labels: dict[str, Label] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What a table or a sidecar says about a source."""

    labels: dict[str, Label] | None = None  # of the whole source
    faces: tuple[GivenFace, ...] = ()  # if any, they are cropped and nothing is detected
    segment: tuple[float, float] | None = None  # of a video, seconds
    point: tuple[float, float] | None = None  # the face wanted is the one nearest; x, y as shares of width and height

    def to_json(self) -> str:
        """Return compact text from which `from_json` makes an equal object; "" where nothing is given.

        >>> Given.from_json(Given(labels={"age": 31.0}).to_json()).labels
        {'age': 31.0}
        """
        if self is NOTHING:
            return ""
        said = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")) if said else ""

    @classmethod
    def from_json(cls, text: str) -> Given:
        """Return what `to_json` wrote."""
        if not text:
            return NOTHING
        said: dict[str, Any] = json.loads(text)
        faces = tuple(
            GivenFace(tuple(face["box"]) if face["box"] else None, face["problem"], face["labels"])
            for face in said.get("faces", ())
        )
        pairs = {name: tuple(said[name]) for name in ("segment", "point") if name in said}
        return cls(labels=said.get("labels"), faces=faces, **pairs)


NOTHING = Given()


@dataclass(frozen=True, slots=True)
class Source:
    """A picture or video to read. `name` makes its id: the argument's base name / the path below it."""

    name: str
    path: str  # absolute; of the tar shard, for a member of one
    size: int = 0  # bytes; of the member
    mtime: int = 0  # ns; of the shard
    problem: str = ""  # why it cannot be read, if that is known already
    member: str = ""  # its name in the shard
    offset: int = WHOLE_FILE  # where its content begins there
    given: str = ""  # `Given.to_json()`

    @property
    def place(self) -> str:
        """What the manifest calls the source: the file's path, or the shard's path / the member's name."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def state(self) -> int:
        """A 63-bit hash of all that makes the source another one when it changes."""
        parts = (self.path, self.member, str(self.size), str(self.mtime), str(self.offset), self.problem, self.given)
        return hash63(*parts)


def hash63(*texts: str) -> int:
    """Return a non-negative 63-bit hash of texts: equal on every machine, as good as never equal for distinct texts.

    >>> hash63("a", "b") == hash63("ab")
    False
    """
    content = "\0".join(texts).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def printable(path: str) -> str:
    r"""Return a path for a message: one line, no control characters, whatever its bytes.

    >>> printable("a\nb.jpg")
    'a\\nb.jpg'
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in path_to_text(path))
