"""What is a video: by the end of its name, and by its first bytes. And whether an MP4 file lacks its index."""

from __future__ import annotations

import io
from typing import BinaryIO

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv"})
VIDEO_SUFFIXES |= {".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".3gp", ".3g2"}
VIDEO_SUFFIXES |= {".f4v", ".ogv", ".h264", ".264", ".hevc", ".h265", ".265"}

# Brands of ISO base media files without video: pictures (HEIF, AVIF, Canon raw, JPEG 2000) and sound
OTHER_BRANDS = frozenset({"heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "mif2", "msf1", "miaf", "avif"})
OTHER_BRANDS |= {"avis", "crx", "jp2", "jpx", "jpm", "M4A", "M4B", "M4P", "F4A"}
OLD_QUICKTIME = frozenset({b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
SIGNATURES = (
    b"\x1a\x45\xdf\xa3",  # EBML: Matroska, WebM
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG-1 and 2 video
    b"\x00\x00\x01\xb0",  # MPEG-4 video
    b"\x00\x00\x00\x01\x67",  # H.264: sequence parameters,
    b"\x00\x00\x01\x67",
    b"\x00\x00\x00\x01\x09",  # or an access unit delimiter before them
    b"\x00\x00\x01\x09",
    b"\x00\x00\x00\x01\x40\x01",  # HEVC: video parameters
    b"\x00\x00\x01\x40\x01",
    b"FLV\x01",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF: WMV
)
MOST_BOXES = 1000  # of an MP4 file that are looked at; whole ones have a few before their index, or one of a fragment


def begins_like_video(start: bytes) -> bool:
    """Return whether the first bytes of a file (64 will do) are those of a video.

    >>> begins_like_video(bytes.fromhex("00000018") + b"ftypisom")
    True
    >>> begins_like_video(bytes.fromhex("00000018") + b"ftypheic")
    False
    """
    if start[4:8] == b"ftyp":
        return start[8:12].decode("latin-1").strip() not in OTHER_BRANDS
    if start.startswith(b"RIFF"):
        return start[8:12] == b"AVI "
    if start.startswith(b"OggS"):
        return b"\x80theora" in start[:64]
    return start.startswith(SIGNATURES) or start[4:8] in OLD_QUICKTIME or _begins_like_transport_stream(start)


def _begins_like_transport_stream(start: bytes) -> bool:
    """Return whether a packet header of MPEG-TS, plain or after a time stamp of 4 bytes (M2TS), stands at the start."""
    if start.startswith(b"GIF8"):
        return False
    for offset, size in ((0, 188), (4, 192)):
        header = start[offset : offset + 4]
        if len(header) < 4 or header[0] != 0x47 or header[1] & 0x80 or header[3] & 0xC0 or not header[3] & 0x30:
            continue
        if len(start) > offset + size:
            return start[offset + size] == 0x47
        return not all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    return False


def lacks_index(file: BinaryIO) -> bool:
    """Return whether an MP4 or QuickTime file has no `moov` box, often its last one, which tells where all is."""
    end, at = file.seek(0, io.SEEK_END), 0
    for _ in range(MOST_BOXES):
        file.seek(at)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if at == 0 and kind != b"ftyp" and kind not in OLD_QUICKTIME:
            return False
        if size == 1:  # a long one
            size = int.from_bytes(header[8:], "big")
        if size == 0 and len(header) >= 8 and kind != b"moov":  # up to the end
            return True
        if size < 8 or kind == b"moov":
            return False
        at += size
        if at >= end:
            return True
    return False
