"""What a JPEG's headers tell, without decoding it: how large it is, and whether it has any peculiarity."""

from __future__ import annotations

from PIL import ExifTags, Image

_APP0, _APP1, _APP14, _SCAN = 0xE0, 0xE1, 0xEE, 0xDA
_TABLES = {0xDB, 0xC4}
"""Of quantization, and of Huffman codes. Decoders differ in what they make of a JPEG that lacks one."""

_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive, all Huffman-coded."""

_KNOWN = {*_TABLES, *_FRAMES, *range(0xE0, 0xF0), 0xDD, 0xFE}
"""What else is between start and scan: applications' segments, the restart interval, comments."""

_JFIF_BYTES = 14
_YCBCR = 1
"""Adobe's number for it; others stand for RGB and CMYK."""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Give width and height of a plain JPEG; None of anything else.

    Plain is what decoders hardly differ about: complete from its tables to its end marker, of one frame, of 8
    bits, grey or YCbCr, upright. What its scans hold is not looked at. Source: ITU-T T.81, annex B.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    at, size = 2, None
    seen: set[int] = set()
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _SCAN:
            return size if seen >= _TABLES else None
        segment = data[at + 4 : at + 2 + length]
        again = marker in _FRAMES and seen & _FRAMES
        if marker not in _KNOWN or again or length < 2 or _is_peculiar(marker, segment):
            return None
        if marker in _FRAMES:
            size = _plain_frame(segment)
        seen.add(marker)
        at += 2 + length
    return None


def _is_peculiar(marker: int, segment: bytes) -> bool:
    if marker == _APP0:
        return segment.startswith(b"JFIF") and len(segment) < _JFIF_BYTES
    if marker == _APP1:  # Pillow finds an orientation in XMP, too
        return b"tiff:Orientation" in segment or not _is_upright(segment)
    return marker == _APP14 and segment[:5] == b"Adobe" and segment[11:12] != bytes([_YCBCR])


def _plain_frame(segment: bytes) -> tuple[int, int] | None:
    bits, height, width, channels = segment[:1], segment[1:3], segment[3:5], segment[5:6]
    named_rgb = segment[6:15:3] == b"RGB"
    size = int.from_bytes(width), int.from_bytes(height)
    plain = bits == b"\x08" and channels in (b"\x01", b"\x03") and not named_rgb and all(size)
    return size if plain else None


def _is_upright(segment: bytes) -> bool:
    if not segment.startswith(b"Exif\0\0"):
        return True
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # whatever the damage makes Pillow's reader stumble over: let Pillow see to it
        return False
