"""Mended files of images: without the metadata of a PNG, JPEG or TIFF, and with the end that a JPEG may lack."""

import hashlib
import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Literal

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
_MAX_PARTS = 10_000  # chunks of a PNG or segments of a JPEG that are looked at
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # no pixel depends on any other chunk
_EXIF = 0xE1  # the JPEG segments of EXIF and of Adobe, which tells how colours are coded
_ADOBE = 0xEE
_ADOBE_BYTES = 12  # of a whole one
#: the tags of a TIFF that pixels depend on, its orientation among them
_TIFF_PIXELS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 293, 301, 317, 320, 321),
    *(322, 323, 324, 325, 332, 333, 334, 338, 339, 340, 341, 347, 512, 513, 514, 529, 530, 531, 532),
}
_TIFF_ENTRY = 12  # bytes
_TAILS = 6  # what is put behind a JPEG to see whether pixels are missing
_TAIL_BYTES = 2**12  # an MCU of any bytes takes a few hundred
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # but for restarts, which lie within a scan


def without_metadata(data: bytes) -> bytes:
    """A PNG, a JPEG or a TIFF without metadata but for its orientation; any other file as it is."""
    if data.startswith(PNG_SIGNATURE):
        return _png_without_metadata(data)
    if data.startswith(JPEG_SIGNATURE):
        return _jpeg_without_metadata(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        return _tiff_without_metadata(data, "little" if data.startswith(b"II") else "big")
    return data


def _png_without_metadata(data: bytes) -> bytes:
    """With pixels, palette, transparency and sound EXIF; what follows an incomplete chunk is left as it is."""
    parts = [PNG_SIGNATURE]
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data) and len(parts) < _MAX_PARTS:
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        kind = data[position + 4 : position + 8]
        is_sound = kind == b"eXIf" and zlib.crc32(data[position + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        if kind in _PNG_PIXELS or is_sound:
            parts.append(data[position:end])
        position = end
    return b"".join([*parts, data[position:]])


def _jpeg_without_metadata(data: bytes) -> bytes:
    """Of the application segments EXIF and a whole one of Adobe stay; what follows the first scan is left as it is."""
    parts = [JPEG_SIGNATURE]
    position = len(JPEG_SIGNATURE)
    while data[position : position + 1] == b"\xff" and len(parts) < _MAX_PARTS:
        kind = data[position + 1 : position + 2]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        end = position + 2 + length
        if kind in (b"\xff", b"\xda") or length < 2 or end > len(data):
            break
        if not _is_metadata(kind[0], data[position + 4 : end]):
            parts.append(data[position:end])
        position = end
    return b"".join([*parts, data[position:]])


def _is_metadata(kind: int, segment: bytes) -> bool:
    """Whether a segment of a JPEG is a comment or an application's, and none that stays."""
    is_needed = (kind == _EXIF and segment.startswith(b"Exif\0\0")) or (
        kind == _ADOBE and segment.startswith(b"Adobe") and len(segment) >= _ADOBE_BYTES
    )
    return (kind == 0xFE or 0xE0 <= kind <= 0xEF) and not is_needed


def _tiff_without_metadata(data: bytes, order: Literal["little", "big"]) -> bytes:
    """The first page, with those entries of its directory that pixels depend on."""
    start = int.from_bytes(data[4:8], order)
    number = int.from_bytes(data[start : start + 2], order)
    end = start + 2 + number * _TIFF_ENTRY
    if end + 4 > len(data):
        return data
    entries = [data[entry : entry + _TIFF_ENTRY] for entry in range(start + 2, end, _TIFF_ENTRY)]
    needed = [entry for entry in entries if int.from_bytes(entry[:2], order) in _TIFF_PIXELS]
    directory = len(needed).to_bytes(2, order) + b"".join(needed) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]


def tails(body: bytes) -> Iterator[bytes]:
    """Bytes to put behind a JPEG: where all its pixels are there they change none, else they change the missing ones.

    Every second of them begins with the restart marker that would come next.
    """
    for number in range(_TAILS):
        noise = hashlib.shake_128(bytes([number])).digest(_TAIL_BYTES).replace(b"\xff", b"\xfe")
        yield noise if number % 2 == 0 else _next_restart(body) + noise


def _next_restart(body: bytes) -> bytes:
    scan = body.rfind(b"\xff\xda")
    places = [body.rfind(bytes([0xFF, 0xD0 + restart]), scan) for restart in range(8)]
    following = (places.index(max(places)) + 1) % 8 if max(places) >= 0 else 0
    return bytes([0xFF, 0xD0 + following])


def has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG bring every coefficient of every component, to its last bit."""
    missing: set[tuple[int, int]] = set()
    position = len(JPEG_SIGNATURE)
    scans = 0
    for _ in range(_MAX_PARTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            break
        kind = data[marker.start() + 1]
        start = marker.end() + 2
        segment = data[start : marker.end() + int.from_bytes(data[marker.end() : start], "big")]
        position = start + len(segment)
        if kind in (0xC0, 0xC1, 0xC2) and len(segment) > 5:
            components = segment[6:18:3]
            missing = set(itertools.product(components, range(64)))
        if kind == 0xDA and len(segment) >= 4:
            first, last, bits = segment[-3:]
            scans += 1
            if bits & 0x0F == 0:
                missing -= set(itertools.product(segment[1:-3:2][:4], range(first, min(last, 63) + 1)))
    return scans > 0 and not missing
