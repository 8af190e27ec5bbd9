"""One random change of bytes, of a safetensors file, or of an archive of arrays (`.npz`)."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from random import Random

from .hostile import Hostile

EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f")


def change_bytes(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """Bits flipped, bytes overwritten, a part deleted or repeated, the end cut off, or the rest of another file appended."""
    if not data:
        return other
    at, length = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 64, 1000])
    change = rng.randrange(9)
    if change == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if change == 1:
        extreme = rng.choice(EXTREMES)
        return data[:at] + extreme + data[at + len(extreme) :]
    if change == 2:
        return data[:at] + data[at + length :]
    if change == 3:
        return data[: at + length] + data[at:]
    if change == 4:
        return data[:at]
    if change == 5:
        return data[:at] + other[rng.randrange(len(other) + 1) :]
    if change == 6:
        return data[:at] + rng.choice(words.words).encode("utf-8", "surrogatepass") + data[at:]
    if change == 7:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    return rng.choice([b"", b"\0", data * 2, other, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")])


def change_safetensors(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """A change of the header's tree, of its length, or of the bytes."""
    from .mutate_json import JSON_TEXT, change_json

    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, body = data[8 : 8 + length], data[8 + length :]
        json.loads(header)
        donor = other[8 : 8 + struct.unpack("<Q", other[:8])[0]]
    except (struct.error, ValueError, RecursionError):
        return change_bytes(rng, data, other, words)
    if rng.random() < 0.3:
        return change_bytes(rng, data, other, words)
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    changed = change_json(rng, header, donor, words)
    assert JSON_TEXT  # the header is JSON too
    return struct.pack("<Q", len(changed)) + changed + body


def change_npz(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    """A change of one member: its name, its header, its bytes, how it is stored; or of the bytes of the archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # noqa: BLE001 - a damaged archive, in many ways
        return change_bytes(rng, data, other, words)
    if rng.random() < 0.2 or not members:
        return change_bytes(rng, data, other, words)
    number = rng.randrange(len(members))
    name, content = members[number]
    change, method = rng.randrange(8), zipfile.ZIP_STORED
    if change == 0:
        members[number] = (rng.choice(words.words)[:60_000].encode("utf-8", "replace").decode().strip("\0") or "zqy", content)
    elif change == 1:
        members.append((name, change_bytes(rng, content, other, words)))
    elif change == 2:
        del members[number]
    elif change == 3:
        members[number] = (name, content + b"\0" * 2_000_000)
        method = zipfile.ZIP_DEFLATED
    elif change == 4:
        members[number] = (name, change_bytes(rng, content, other, words))
    else:
        members[number] = (name, _change_header(rng, content))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([method, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


SHAPES = (
    "()",
    "(0,)",
    "(-1,)",
    "(2, 5)",
    "(2**40,)",
    "(99999999999,)",
    "(1" + "0" * 400 + ",)",
    "(1.5,)",
    "'x'",
    "(" * 500,
    "(2,)*9",
)
TYPES = ("'|O'", "'<U9'", "'<c16'", "'<f8'", "'<i8'", "'|b1'", "'<M8[s]'", "[('a', '<f4')]", "'zqy'", "'<f4', 'zqy': 1", "None")


def _change_header(rng: Random, content: bytes) -> bytes:
    """Another shape, dtype or order in the header of an array, its length corrected."""
    found = re.search(rb"\{.*\}", content[:500])
    if found is None:
        return content
    text = found[0].decode("latin1")
    if rng.random() < 0.5:
        text = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': {rng.choice(SHAPES)}", text)
    else:
        text = re.sub(r"'descr': '[^']*'", lambda _: f"'descr': {rng.choice(TYPES)}", text)
    header = (text + "\n").encode("latin1")
    return content[:8] + struct.pack("<H", min(len(header), 65_535)) + header + content[found.end() + 1 :]
