"""Hostile inputs from good ones: bytes, lines and fields, JSON, Parquet tables, NumPy arrays and zip archives, changed at random.

Each function takes a `random.Random` and gives bytes: the same seed makes the same input on every machine.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import os
import pickle
import stat
import struct
import zipfile
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MARK = "executed-by-a-loaded-file"
"""A folder of this name in the working directory says that something that was loaded ran code."""

FIELDS = (
    *("", " ", "NA", "nan", "None", "inf", "-inf", "1e999", "-1e999", "1e308", "1e-400", "-0", "0", "-1", "007", "1.5"),
    *("1_000", "0x10", "½", "²", "١٢", "１", "2147483648", "9223372036854775808", "-9223372036854775808"),
    *("18446744073709551616", "9" * 400, "9" * 5000, "1e18", "1e12", "1e15", "true", "False", "null", "{}", "[]"),
    *("../../x", "/etc/passwd", "a\0b", "\ufeff", "\u2028", "\x85", "\x0b", "\x0c", "\x1c", "\x1f", "\x1b[31m", "é"),
    *('"', '""', '"a', 'a"', '"a"', '"a"b', "'", ",", "::", ":::", ";", "|", "\t", "\r", "\n", "\r\n", "\ud800", "🙂"),
    *("2024-01-31", "2024-01-31T25:00:00", "0000-00-00", "9999-12-31", "99999-01-01", "-5000-01-01", "2024-W05-3"),
    *("1970-01-01T00:00:00+99:99", "2262-04-12T00:00:00", "1677-09-20", "12:30", "=1+1", "__class__", "x" * 1000),
    *("user_id", "item_id", "rating", "timestamp", "title", "a:float", "v:float_seq", "t:token_seq", "user_id:token"),
    *("a|b", "|", "||", "(1995)", "X (١٩٩٥)", "x x", "1 2", "0.5 1", "0.5 x", "warm", "user_cold", "item_cold_state"),
)
"""What a field may be replaced by."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, 1e308, 5e-324),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "x",
        "../../x",
        "a\0b",
        "\ud800",
        "\u2028",
        "\x1b[31m",
        "9" * 5000,
    ),
    *([], [[]], [1, "a"], ["a", "a"], [None], [[1, 2], [3]], {}, {"a": {}}, {"": None}, "x" * 3000, [0] * 300),
)
"""What a value in JSON may be replaced by."""


class Payload:
    """Pickled, it makes a folder as soon as it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def raw(rng: Random, good: bytes) -> bytes:
    """A few bytes flipped, put in, taken out, repeated, or cut off."""
    bad = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(bad) + 1)
        span = rng.choice((1, 1, 2, 4, 8, 64))
        how = rng.randrange(6)
        if how == 0 and at < len(bad):
            bad[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            bad[at : at + span] = bytes(rng.choice((0, 10, 13, 34, 44, 58, 127, 128, 255)) for _ in range(span))
        elif how == 2:
            bad[at:at] = rng.randbytes(span)
        elif how == 3:
            del bad[at : at + span]
        elif how == 4:
            bad[at:at] = bad[max(0, at - span) : at] * rng.choice((1, 2, 50))
        elif rng.random() < 0.3:
            del bad[at:]
        elif at + 8 <= len(bad):
            bad[at : at + 8] = struct.pack("<q", rng.choice((0, -1, 2**31 - 1, 2**40, 2**62, -(2**63))))
    return bytes(bad)


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def text(rng: Random, good: bytes) -> bytes:
    """Fields and lines changed; now and then the encoding, the delimiter or the line ends."""
    whole = good.decode("utf-8", "surrogateescape")
    delimiter = max(("::", "\t", ",", ";", "|"), key=lambda d: whole.count(d) * len(d))
    rows = [line.split(delimiter) for line in whole.splitlines()]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not rows:
            break
        k = rng.randrange(len(rows))
        row, how = rows[k], rng.randrange(9)
        if how <= 3:
            row[rng.randrange(len(row))] = rng.choice(FIELDS)
        elif how == 4:
            row.insert(rng.randrange(len(row) + 1), rng.choice(FIELDS))
        elif how == 5 and len(row) > 1:
            del row[rng.randrange(len(row))]
        elif how == 6:
            rows.insert(k, list(rows[rng.randrange(len(rows))]))
        elif how == 7:
            del rows[k]
        else:  # a whole column
            at, value = rng.randrange(len(row)), rng.choice(FIELDS)
            for other in rows[rng.randrange(2) :]:
                if at < len(other):
                    other[at] = value
    if rng.random() < 0.05:
        delimiter = rng.choice(("::", "\t", ",", ";", "|", ", ", " ", "\x1f", ""))
    end = rng.choice(("\r\n", "\r", "\n\n", "\x0b", "\u2028")) if rng.random() < 0.1 else "\n"
    out = end.join(delimiter.join(row) for row in rows) + ("" if rng.random() < 0.1 else end)
    how = rng.random()
    if how < 0.02:
        return out.encode("utf-16", "replace")
    if how < 0.04:
        return b"\xef\xbb\xbf" + out.encode("utf-8", "replace")
    if how < 0.06:
        return out.encode("latin-1", "replace")
    if how < 0.07:
        return out.encode("utf-8", "replace") + rng.choice((b'"', b"x", b",")) * rng.choice((10, 140_000, 300_000))
    if how < 0.12:
        return raw(rng, out.encode("utf-8", "replace"))
    return out.encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace")


def as_json(rng: Random, good: bytes) -> bytes:
    """Values, names and nesting of JSON changed; numbers that no computer holds; bytes now and then."""
    if rng.random() < 0.1:
        return raw(rng, good)
    value = json.loads(good)
    spare = rng.choice(("7" * 5000, "1e999", "-1e999", "NaN", "1" + "0" * 400, "-0.0", "[" * 100_000, '{"a":' * 5000))
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed(rng, value)
    out = json.dumps(value)
    if rng.random() < 0.2:
        out = out.replace('"$spare"', spare)
    return out.replace('"$spare"', "null").encode()


def _changed(rng: Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice((*VALUES, "$spare", "$spare")))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, how = rng.choice(keys), rng.random()
    if how < 0.1:
        del value[key]
    elif how < 0.15 and isinstance(value, dict):
        value[rng.choice(("", "__class__", "name", "x" * 2000, "\ud800", "rating", key + "s"))] = value.pop(key)
    elif how < 0.2 and isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    elif how < 0.25:
        value[key] = [value[key]]
    elif how < 0.5:
        value[key] = copy.deepcopy(rng.choice((*VALUES, "$spare")))
    else:
        value[key] = _changed(rng, value[key])
    return value


def _column(rng: Random, rows: int) -> pa.Array | pa.ChunkedArray:
    """A Parquet column of any type that there is, some values missing."""
    whole = [rng.choice((None, 0, 1, 2, 7, -1, 100)) for _ in range(rows)]
    wide = [rng.choice((None, 0, 1, 2**62, -(2**63), 2**31)) for _ in range(rows)]
    texts = [rng.choice((None, *FIELDS[:60])) for _ in range(rows)]
    texts = [None if t is None else t.encode("utf-8", "replace").decode() for t in texts]
    small = pa.array(whole, pa.int64())
    makers: tuple[Any, ...] = (
        lambda: small,
        lambda: small.cast(rng.choice((pa.int8(), pa.int16(), pa.int32(), pa.float32(), pa.float64()))),
        lambda: pa.array(wide, pa.int64()),
        lambda: pa.array(
            [None if w is None else abs(w) for w in whole], rng.choice((pa.uint8(), pa.uint16(), pa.uint32()))
        ),
        lambda: pa.array([None if w is None else min(2 * abs(w), 2**64 - 1) for w in wide], pa.uint64()),
        lambda: pa.array(
            [rng.choice((None, 0.5, 1e308, -1e308, float("inf"), float("nan"), 1e-320)) for _ in range(rows)]
        ),
        lambda: pa.array(np.array([rng.choice((0.5, 1, 65504)) for _ in range(rows)], np.float16)),
        lambda: pa.array(texts, rng.choice((pa.string(), pa.large_string(), pa.string_view()))),
        lambda: pa.array(texts).dictionary_encode(),
        lambda: pa.array([rng.choice((None, b"", b"\xff\0", b"ab")) for _ in range(rows)], pa.binary()),
        lambda: pa.array([rng.choice((None, True, False)) for _ in range(rows)]),
        lambda: pa.array([None] * rows, pa.null()),
        lambda: pa.array([rng.choice((None, [], [1, 2], [None])) for _ in range(rows)], pa.list_(pa.int64())),
        lambda: pa.array([rng.choice((None, [], [0.5, 2.5], [1.5])) for _ in range(rows)], pa.list_(pa.float64())),
        lambda: pa.array([rng.choice((None, [], ["a", "b"], ["a|b"])) for _ in range(rows)], pa.list_(pa.string())),
        lambda: pa.array(
            [rng.choice((None, [[1.5]], [[], [2.5]])) for _ in range(rows)], pa.list_(pa.list_(pa.float64()))
        ),
        lambda: pa.array(
            [rng.choice((None, {"a": 1}, {"a": None})) for _ in range(rows)], pa.struct([("a", pa.int64())])
        ),
        lambda: pa.array([rng.choice((None, [("a", 1)])) for _ in range(rows)], pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(
            wide, pa.timestamp(rng.choice(("s", "ms", "us", "ns")), rng.choice((None, "UTC", "Mars/X", "+25:00")))
        ),
        lambda: pa.array([rng.choice((None, 0, 2**31 - 1, -(2**31), 10_000)) for _ in range(rows)], pa.date32()),
        lambda: pa.array([rng.choice((None, 0, 1, 86_399)) for _ in range(rows)], pa.time32("s")),
        lambda: pa.array(whole, pa.duration("s")),
        lambda: small.cast(pa.decimal128(38, 2)),
    )
    return rng.choice(makers)()


def table(rng: Random, good: bytes) -> bytes:
    """Columns of a Parquet file replaced by ones of any type, renamed or repeated; the footer's text or any byte changed."""
    how = rng.random()
    if how < 0.3:
        return raw(rng, good)
    if how < 0.4:  # the footer: the last eight bytes say how long it is
        length = int.from_bytes(good[-8:-4], "little")
        return good[: -8 - length] + raw(rng, good[-8 - length : -8]) + good[-8:]
    frame = pq.read_table(io.BytesIO(good))
    columns, names = list(frame.columns), list(frame.column_names)
    for _ in range(rng.choice((1, 1, 2, 3))):
        k = rng.randrange(len(names))
        if rng.random() < 0.8:
            columns[k] = _column(rng, frame.num_rows)
        elif rng.random() < 0.5:
            names[k] = rng.choice((*names, "", "a.b", "\u2028", "Title", "user_id", "x" * 3000, "rating"))
        else:
            columns.append(columns[k])
            names.append(rng.choice((names[k], f"{names[k]}.x", "item_id")))
    metadata = dict(frame.schema.metadata or {})
    if rng.random() < 0.05:
        metadata |= {b"pandas": b'{"index_columns": ["x"], "columns": [{"name": 1}]}', b"ARROW:schema": b"AAAA"}
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    if rng.random() < 0.1:  # how old versions of Arrow kept types of Python: in a pickle
        k = rng.randrange(len(fields))
        extension = {b"ARROW:extension:name": rng.choice((b"arrow.py_extension_type", b"arrow.json", b"pandas.period"))}
        extension[b"ARROW:extension:metadata"] = pickle.dumps(Payload())
        fields[k] = fields[k].with_metadata(extension)
    made = pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata))
    sink = io.BytesIO()
    try:
        pq.write_table(
            made.slice(0, rng.choice((made.num_rows, made.num_rows, 1, 0))),
            sink,
            compression=rng.choice(("none", "snappy", "gzip", "zstd")),
            use_dictionary=rng.random() < 0.5,
            row_group_size=rng.choice((1, 3, 1000)),
        )
    except pa.ArrowInvalid:  # a time beyond what a Parquet file can hold
        return raw(rng, good)
    return raw(rng, sink.getvalue()) if rng.random() < 0.1 else sink.getvalue()


def arrays(rng: Random, good: bytes) -> bytes:
    """An .npz file with arrays of other shapes and types, pickles among them, and headers that lie."""
    if rng.random() < 0.3:
        return raw(rng, good)
    with np.load(io.BytesIO(good)) as stored:
        held: dict[str, Any] = {name: stored[name] for name in stored.files}
    name = rng.choice(list(held))
    how, out = rng.randrange(8), {}
    if how == 0:
        held[name] = np.array([Payload()] * len(held[name]), object)
    elif how == 1:
        held[name] = held[name].astype(rng.choice((np.float32, np.int64, np.uint8, np.complex64, "U5", bool)))
    elif how == 2:
        held[name] = held[name].reshape(rng.choice(((1, -1), (-1, 1))))
    elif how == 3:
        held[name] = np.array(rng.choice((0, 7, -1)), np.int32)
    elif how == 4:
        held[name][rng.randrange(len(held[name]))] = rng.choice((-1, 2**31 - 1, 1, len(held[name])))
    elif how == 5:
        held[rng.choice(("x", "../../x", ""))] = held.pop(name)
    elif how == 6:
        length = rng.choice((len(held[name]) + 1, 0, 1))
        held[name] = np.resize(held[name], length)
    else:
        shape = rng.choice(("(1000000000000,)", "(-1,)", "(2, 2)", "(" * 500, "(1e9,)", "()", "5", "None", "(True,)"))
        kind = rng.choice(("'<i4'", "'|O'", "'<f8'", "'<U5'", "'<U999999999'", "[('a', '<i4')]", "None"))
        head = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}"
        head = head.ljust(117) + "\n"
        out[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + held[name].tobytes()
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2))) as z:
        for key, value in held.items():
            member = io.BytesIO()
            np.save(member, value, allow_pickle=True)
            z.writestr(f"{key}.npy", out.get(key, member.getvalue()))
    return sink.getvalue()


def archive(rng: Random, good: bytes) -> bytes:
    """A zip file whose members lie outside, link, repeat, swell, or are packed in another way."""
    if rng.random() < 0.5:
        return raw(rng, good)
    with zipfile.ZipFile(io.BytesIO(good)) as z:
        members = [(info.filename, z.read(info)) for info in z.infolist()]
    k = rng.randrange(len(members))
    name, body = members[k]
    how = rng.randrange(6)
    if how == 0:
        members.append((rng.choice(("../../x", "/etc/x", "a\\..\\b", "x" * 2000, name)), b"x"))
    elif how == 1:
        members[k] = (rng.choice(("../" + name, name.upper(), name + "/", "")), body)
    elif how == 2:
        members[k] = (name, text(rng, body))
    elif how == 3:
        members[k] = (name, body + bytes(rng.choice((1000, 1_000_000))))
    elif how == 4:
        del members[k]
    sink = io.BytesIO()
    ways = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(sink, "w", rng.choice(ways)) as z:
        for member, content in members:
            info = zipfile.ZipInfo(member)
            info.compress_type = rng.choice(ways)
            if how == 5 and member == name:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                content = b"/etc/passwd"
            z.writestr(info, content)
    return raw(rng, sink.getvalue()) if rng.random() < 0.3 else sink.getvalue()


def packed(rng: Random, name: str, content: bytes) -> bytes:
    """A file's bytes as its name says they are packed; sometimes twice over, cut off, or damaged inside."""
    pack = gzip.compress if name.endswith(".gz") else bz2.compress if name.endswith(".bz2") else None
    if pack is None:
        return content
    how = rng.random()
    if how < 0.1:
        return pack(content[: len(content) // 2]) + pack(content[len(content) // 2 :])
    if how < 0.15:
        return content
    out = pack(content)
    if how < 0.2:
        return out + rng.choice((b"\0" * 10, b"rubbish", out))
    return raw(rng, out) if how < 0.4 else out
