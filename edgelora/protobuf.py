"""Walk protobuf's wire format: no message is built, so a hostile file costs no memory. Source: the protobuf encoding guide."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """One field of a message: where its payload lies, and the number it is where it is a varint."""

    number: int
    begin: int
    end: int
    value: int | None


def fields(data: mmap.mmap, at: int, end: int) -> Iterator[Field]:
    """The fields between two offsets; ValueError where the bytes make no sense."""
    while at < end:
        tag, at = varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        begin, value = at, None
        if wire == 0:
            value, at = varint(data, at, end)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            length, begin = varint(data, at, end)
            at = begin + length
        else:
            raise ValueError(f"byte {begin} is no protobuf")
        if number == 0 or at > end:
            raise ValueError(f"a field at byte {begin} goes past its end")
        yield Field(number, begin, at, value)


def varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"a number at byte {at} goes past its end")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number at byte {at} is too long")
