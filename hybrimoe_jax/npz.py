"""`.npz` archives, read after what they claim was held against the file: a few megabytes may name any number."""

from __future__ import annotations

import math
import os
import zipfile
from typing import Any

import numpy as np

LEAST, RATIO = 64 << 20, 50
"""A compressed file may unpack to so many bytes, and to so many times its own. Traces of real runs reach 10 times."""


def most_bytes(size: int) -> int:
    """That a compressed file of `size` bytes may unpack to."""
    return LEAST + RATIO * size


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Its arrays by name; nothing is unpickled.

    ValueError for what is no such archive, for arrays of other sizes than they say, and for one that unpacks to far
    more than a real one; what zipfile, zlib and NumPy raise for a damaged one, and OSError.
    """
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError("a single array, not an .npz archive")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size, total = os.fstat(file.fileno()).st_size, sum(member.file_size for member in members)
            if total > most_bytes(size):
                raise ValueError(f"its {size} bytes would unpack to {total}")
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(set(names)) < len(names):
                raise ValueError("an array is there twice")
            return {name: _array(archive, member) for name, member in zip(names, members, strict=True)}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        _check_size(file, member)
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_size(file: Any, member: zipfile.ZipInfo) -> None:
    """ValueError where the header's shape and type are not those of the bytes behind it."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"{member.filename} is of version {version}")
    shape, _, dtype = readers[version](file)
    needed, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if dtype.hasobject or needed != there or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename} is {dtype} {list(shape)}, and {there} bytes are there")
