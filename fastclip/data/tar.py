"""The members of a tar file that nobody vouches for: headers only, bounded memory, never backwards, on after damage.

Python's `tarfile` allocates what a header asks for (a long-name header may ask for 10 GB), follows links, and gives up
at the first damage. This walk reads 512 bytes a member with `os.pread`, takes what is a plain file with a harmless
name, and counts everything else by cause:

| cause | meaning |
|---|---|
| truncated_shard | the file ends inside a member or before its end mark |
| damaged_shard | blocks that are no headers; the walk goes on at the next valid one |
| concatenated_shard | more members behind the end mark (`cat a.tar b.tar`), which are used |
| unreadable_shard | not a single valid header |
| unsafe_name | a name that climbs, is absolute, without a stem, or longer than the cap |
| link_member, special_member | a link; a device, pipe or sparse file |
| oversized_member, oversized_header | more than the caps below |
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 64 << 10  # of a long name's member
MAX_NAME_BYTES = 1024
_CHUNK = 1 << 20
_ZEROS = bytes(BLOCK)
_ZERO_CHUNK = bytes(_CHUNK)
_MAGIC, _MAGIC_AT = b"ustar", 257
_FILES, _LINKS, _FOLDER = b"0\0" + b"7", b"12", b"5"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_UNUSABLE = b"/"  # the name of a member whose long name was refused


class Member(NamedTuple):
    """A plain file in a tar: where its content lies."""

    name: str
    offset: int
    size: int


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def plain_members(file: int, length: int, counts: Counter[str]) -> Iterator[Member]:
    """The plain files of the tar open as descriptor `file`, `length` bytes long, in their order; see the table above.

    What is left out, and what is odd, is added to `counts`.
    """
    offset, long_name, pax_size = 0, b"", None
    seen, ended = False, False
    causes: set[str] = set()  # of the shard as a whole, each counted once
    while offset < length:
        block = os.pread(file, BLOCK, offset)
        if block == _ZEROS:
            ended, offset = True, _skip_zeros(file, offset)
            continue
        header = _parse(block)
        if header is None:
            causes.add("truncated_shard" if len(block) < BLOCK else "damaged_shard")
            offset, long_name, pax_size, ended = _next_header(file, offset + 1, length), b"", None, False
            continue
        if ended:
            causes.add("concatenated_shard")
            ended = False
        seen = True
        data, size = offset + BLOCK, header.size if pax_size is None else pax_size
        has_content = header.kind not in b"123456"
        offset = data + -(-size // BLOCK) * BLOCK if has_content else data
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if size > MAX_HEADER_BYTES:
                counts["oversized_header"] += 1
                long_name = _UNUSABLE
                if offset > length:
                    offset = _next_header(file, data, length)
            elif header.kind == _LONG_NAME:
                long_name = os.pread(file, size, data).rstrip(b"\0")
            elif header.kind == _PAX:
                records = _pax_records(os.pread(file, size, data))
                long_name, pax_size = records.get(b"path", long_name), _pax_number(records.get(b"size"))
                if any(key.startswith(b"GNU.sparse") for key in records):
                    long_name = _UNUSABLE
            continue
        name, long_name, pax_size = long_name or header.name, b"", None
        if has_content and data + size > length:
            causes.add("truncated_shard")
            counts["oversized_member"] += size > MAX_MEMBER_BYTES
            offset = _next_header(file, data, length)
        elif cause := _objection(name, header.kind, size):
            counts[cause] += 1
        elif header.kind != _FOLDER:
            yield Member(name.decode("utf-8", "surrogateescape"), data, size)
    if not seen:
        causes = {"unreadable_shard"}
    elif not ended and "truncated_shard" not in causes:
        causes.add("truncated_shard")
    counts.update(causes)


def _objection(name: bytes, kind: bytes, size: int) -> str | None:
    """The cause to leave a member out, or None."""
    if kind in _LINKS:
        return "link_member"
    if kind not in _FILES and kind != _FOLDER:
        return "special_member"
    climbs = name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name
    if climbs or len(name) > MAX_NAME_BYTES or (kind != _FOLDER and not _stem(name)):
        return "unsafe_name"
    if size > MAX_MEMBER_BYTES:
        return "oversized_member"
    return None


def _stem(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[0]


def _parse(block: bytes) -> _Header | None:
    """The header in `block`, or None where its checksum says that there is none."""
    if len(block) < BLOCK:
        return None
    size, checksum = _number(block[124:136]), _number(block[148:156])
    if size is None or checksum is None or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name = block[:100].partition(b"\0")[0]
    if block[_MAGIC_AT : _MAGIC_AT + 6] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(name, size, block[156:157])


def _number(field: bytes) -> int | None:
    """An octal field, or GNU's base 256; None where it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """The records `length key=value` of a pax header, up to the first that is none."""
    records: dict[bytes, bytes] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or len(length) > 6 or not len(length) < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        records[key], content = value, content[int(length) :]
    return records


def _pax_number(text: bytes | None) -> int | None:
    return int(text[:18]) if text is not None and text.isdigit() else None


def _skip_zeros(file: int, offset: int) -> int:
    """The first block behind `offset` that is not all zero, or the end of the file."""
    while chunk := os.pread(file, _CHUNK, offset):
        if chunk != _ZERO_CHUNK[: len(chunk)]:
            return offset + (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK
        offset += len(chunk)
    return offset


def _next_header(file: int, offset: int, length: int) -> int:
    """Where the next valid header at or behind `offset` begins, on any byte (what is appended to a truncated tar does
    not keep to its blocks); else `length`."""
    least = offset
    while offset < length:
        chunk = os.pread(file, _CHUNK, offset)
        place = chunk.find(_MAGIC)
        while place >= 0:
            start = offset + place - _MAGIC_AT
            if start >= least and _parse(os.pread(file, BLOCK, start)) is not None:
                return start
            place = chunk.find(_MAGIC, place + 1)
        if len(chunk) < _CHUNK:
            break
        offset += _CHUNK - len(_MAGIC) + 1
    return length
