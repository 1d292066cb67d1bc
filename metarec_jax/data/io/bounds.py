"""Limits on the size of a file after loading: a file that unpacks to far more than its size is refused.

Real tables stay far below the limits: compression shrinks ratings to a third or a tenth, seldom to a fiftieth.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.messages import one_line

ROOM = 64 * 2**20
"""Bytes that any file may unpack to."""
SWELL = 200
"""Bytes that a larger file may unpack to, as a multiple of its size."""
COLUMNS = 10_000
LINE = 1 << 23
"""Characters of the longest line."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE | re.DOTALL)
P = ParamSpec("P")
T = TypeVar("T")
_OPEN: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bz2": bz2.open}


class _Counted(io.RawIOBase):
    """A stream that raises after ``most`` bytes."""

    def __init__(self, stream: Any, most: int, path: Path) -> None:
        self._stream, self._left, self._path = stream, most, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise swollen(self._path)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def opened(path: Path, packed: str) -> BinaryIO:
    """The bytes of a file, unpacked if ``packed`` is "gzip" or "bz2".

    Reading raises MetarecError if the file unpacks to more than `ROOM` bytes and more than `SWELL` times its size.
    """
    if packed not in _OPEN:
        return path.open("rb")
    most = max(ROOM, SWELL * path.stat().st_size)
    return io.BufferedReader(_Counted(_OPEN[packed](path, "rb"), most, path), 1 << 18)


def local(path: str | Path) -> Path:
    """The path to open; ``~`` is the user's home.

    Raises:
      MetarecError: it is a URL.
    """
    if (url := _URL.fullmatch(str(path))) is not None:
        whole = str(path) if "://" in str(path) else f"{url[1]}://{url[2]}"  # a `Path` has lost one of the slashes
        raise MetarecError(f"{whole} is a URL, expected a local file. Download it and pass the path of the file")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of no user ("~nobody")
        return Path(path)


def broken(path: Path, error: Exception) -> MetarecError:
    if isinstance(error, FileNotFoundError):
        return MetarecError(f"there is no file {path}. Check the path")
    if isinstance(error, PermissionError):
        return MetarecError(f"no permission to read {path}. Change its permissions (chmod +r)")
    if isinstance(error, EOFError) or "runcated" in str(error) or "end-of-stream" in str(error):
        return MetarecError(f"{path} ends in the middle of its compressed data: it is truncated. Download it again")
    if isinstance(error, MemoryError):
        return MetarecError(f"{path} does not fit into memory. Use a part of it, or a larger machine")
    return MetarecError(f"{path} cannot be read ({one_line(error)}). Download or write it again")


def fits(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a reader whose first argument is a path: a MemoryError becomes a MetarecError that names the file."""

    @functools.wraps(read)
    def bounded(*args: P.args, **options: P.kwargs) -> T:
        try:
            return read(*args, **options)
        except MemoryError as error:
            raise broken(Path(str(args[0])), error) from error

    return bounded


def swollen(path: Path) -> MetarecError:
    return MetarecError(
        f"{path} unpacks to more than {SWELL} times its size, which is not plausible for a table. "
        "If it is a table, unpack it and pass the unpacked file"
    )


def read_json(path: Path, most: int = 2**24) -> Any:
    """The content of a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, is nested too deeply, or is larger than ``most`` bytes.
    """
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path.name} is larger than {most} bytes")
    return parse_json(raw)


def parse_json(raw: bytes | str) -> Any:
    """`json.loads`; every failure is a ValueError."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def read_arrays(path: Path, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Some int32 vectors of an .npz file, whose lengths the caller knows; sizes in the file are not trusted.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or holds other types or lengths under these names.
    """
    vectors = {}
    try:
        with zipfile.ZipFile(path) as z:
            for name, size in sizes.items():
                member = z.getinfo(f"{name}.npy")
                if member.file_size > 4 * size + 1024:
                    raise ValueError(
                        f"{name} in {path.name}: expected {4 * size} bytes and a header, got {member.file_size} bytes"
                    )
                vectors[name] = _vector(z.read(member), name, size)
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and its decompressors raise unrelated types on damaged files
        raise ValueError(f"{path.name} cannot be read ({one_line(error)})") from error
    return vectors


def _vector(raw: bytes, name: str, size: int) -> np.ndarray:
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is in another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if shape != (size,) or dtype != np.int32 or len(raw) - stream.tell() != 4 * size:
        raise ValueError(f"{name}: expected int32[{size}], got {dtype}{list(shape)}")
    return np.frombuffer(raw, np.dtype("<i4"), offset=stream.tell()).astype(np.int32)
