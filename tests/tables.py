"""Small tables of interactions, written to files in every way, for the tests of readers."""

from pathlib import Path

import pytest

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.readers import read

ROWS = [("u1", 10, 5.0, 100), ("u2", 10, 3.0, 200), ("u1", 7, 1.5, 300)]


def rows_of(data: Interactions) -> list[tuple]:
    """The interactions with the ids that the user gave."""
    columns = [data.users.decode(data.user).tolist(), data.items.decode(data.item).tolist()]
    columns += [a.tolist() for a in (data.rating, data.timestamp) if a is not None]
    return list(zip(*columns, strict=True))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def text(delimiter: str, header: tuple[str, ...] | None = ("userId", "movieId", "rating", "timestamp")) -> str:
    lines = [*([header] if header else []), *ROWS]
    return "".join(delimiter.join(map(str, line)) + "\n" for line in lines)


def refused(path: Path, **options) -> str:
    with pytest.raises(MetarecError) as caught:
        read(path, **options)
    return str(caught.value)
