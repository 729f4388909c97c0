"""For which processor and which system a program was built, from the first bytes of an ELF file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "arm64", 243: "riscv64"}  # e_machine
# What kernels (`uname -m`) and Android (`ro.product.cpu.abilist`) call them.
NAMES = {
    **{"aarch64": "arm64", "arm64": "arm64", "arm64-v8a": "arm64", "armv8l": "arm", "armv7l": "arm", "armv6l": "arm", "armeabi-v7a": "arm"},
    **{"x86_64": "x86_64", "amd64": "x86_64", "i686": "x86", "i386": "x86", "x86": "x86", "riscv64": "riscv64"},
}
_PT_INTERP = 3
_HEADER_BYTES = 1 << 16  # program headers follow the file's header, and the name of the loader follows them


@dataclass(frozen=True)
class Program:
    """`machine` is one of MACHINES, or the number of another; `loader` is '' where the program needs none."""

    machine: str
    loader: str

    @property
    def for_android(self) -> bool:
        """Whether Android can load it: with its own loader, or with none."""
        return not self.loader or self.loader.startswith(("/system/", "/apex/"))


def read(path: Path) -> Program | None:
    """What an ELF file says of itself; None for another file, a script for instance."""
    with path.open("rb") as stream:
        head = stream.read(_HEADER_BYTES)
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    end = "<" if head[5] == 1 else ">"
    (machine,) = struct.unpack_from(f"{end}H", head, 18)
    return Program(MACHINES.get(machine, f"machine {machine}"), _loader(head, end, wide=head[4] == 2))


def _loader(head: bytes, end: str, wide: bool) -> str:
    offset_at, size_at, kind = (32, 54, "Q") if wide else (28, 42, "I")
    (table,) = struct.unpack_from(f"{end}{kind}", head, offset_at)
    size, count = struct.unpack_from(f"{end}HH", head, size_at)
    for index in range(count):
        entry = table + index * size
        if entry + size > len(head) or size < 32:
            return ""
        if struct.unpack_from(f"{end}I", head, entry)[0] == _PT_INTERP:
            start, length = (struct.unpack_from(f"{end}{kind}", head, entry + at)[0] for at in ((8, 32) if wide else (4, 16)))
            return head[start : start + length].rstrip(b"\0").decode("ascii", "replace")
    return ""
