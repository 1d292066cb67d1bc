"""A file is there whole or as it was before, whatever befalls its writing."""

import errno
import hashlib
import os
import stat

import pytest

from metarec_jax import files


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    files.write_atomically(path, "before")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left"):
            files.write_atomically(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    files.write_atomically(path, b"after")
    assert path.read_bytes() == b"after"


def test_a_file_may_be_read_by_whom_the_umask_lets_read(tmp_path):
    """A shared cache is of use to nobody else where only its writer may read it."""
    before = os.umask(0o022)
    try:
        files.write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    content = os.urandom(300_000)
    files.write_atomically(tmp_path / "a", content)
    assert files.sha256(tmp_path / "a") == files.sha256(content) == hashlib.sha256(content).hexdigest()
