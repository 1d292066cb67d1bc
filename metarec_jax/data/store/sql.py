"""The columns of a table of interactions as SQL, checked and counted in one pass.

The rules are those of `data.io.readers` for integer ids, missing values and times. This module only composes SQL text;
`metarec_jax.data.store.prepare` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import NO_TIME
from metarec_jax.data.io.columns import MISSING, no_rating, option
from metarec_jax.data.io.spelling import COMMA, EXACT, ROUNDED, THOUSANDS, WHOLE
from metarec_jax.data.store.ingest import Source
from metarec_jax.messages import shown

_WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
_FLOATS = ("FLOAT", "DOUBLE")
_NUMBERS = (*_FLOATS, "DECIMAL")
_SPELLED = ("UBIGINT", "HUGEINT", "UHUGEINT", "UUID", "BOOLEAN", "DATE", "TIMESTAMP", "TIME", "ENUM")
"""Types whose ids are kept as text."""
_UNITS = ((10**17, 10**9, "nano"), (10**14, 10**6, "micro"), (10**11, 10**3, "milli"))


class Checked(NamedTuple):
    """The result of a pass over the rows: SQL that selects the valid ones.

    Attributes:
      columns: SQL by name: user, and optionally rating and time.
      item: the unchanged column of items; item_kind: its type.
      where: conditions that some rows do not meet.
      read: number of rows.
      notes: what is dropped or changed, one line each.
    """

    columns: dict[str, str]
    item: str
    item_kind: str
    where: tuple[str, ...]
    read: int
    notes: tuple[str, ...]

    @property
    def condition(self) -> str:
        return f" WHERE {' AND '.join(self.where)}" if self.where else ""


Run = Callable[[str], list[Any]]
"""Executes SQL and returns its rows."""


def check(run: Run, relation: str, table: Source, *, commas: bool = False) -> Checked:
    """One pass over the rows: counts missing and invalid values, and determines the kinds of users and times.

    Args:
      relation: SQL of the table, such as ``read_parquet([...])``.
      commas: ratings have decimal commas.

    Raises:
      MetarecError: a column has an unsuitable type or is constant or empty, or a value is not a number or a time.
    """
    roles, source = table.roles, _name(table)
    types = {str(row[0]): _kind(str(row[1])) for row in run(f"DESCRIBE SELECT * FROM {relation}")}
    user, kind = _id(quoted(roles.user), types[roles.user], source, roles.user, "user"), types[roles.user]
    _id("raw", types[roles.item], source, roles.item, "item")
    wanted = {"read": "count(*)"} | {f"user_{f}": f"{f}({user})" for f in ("count", "min", "max")}
    wanted |= {"user_whole": f"count_if({_spelled(user)})"} if table.dialect is not None else {}
    wanted |= {"user_fractions": f"count_if({user} != floor({user}))"} if kind in _NUMBERS else {}
    wanted |= {"user_rounded": _rounded(user, kind), "user_such": _such(user, kind)}
    rating, times = "", dict[str, str]()
    if roles.rating is not None:
        given, rating = _number(roles.rating, types[roles.rating], commas)
        finite = f"CASE WHEN isfinite({rating}) THEN {rating} END"
        wanted |= {"rating_given": f"count({given})"}
        wanted |= {f"rating_{f}": f"{f}({finite})" for f in ("count", "min", "max")}
        if types[roles.rating] == "VARCHAR":
            wrong = f"CASE WHEN {rating} IS NULL THEN {given} END"
            wanted |= {"rating_wrong": f"count({wrong})", "rating_such": f"min({wrong})"}
    if roles.timestamp is not None:
        given, times = _times(roles.timestamp, types[roles.timestamp], source)
        wanted |= {"time_given": f"count({given})"} | {f"time_{kind}": f"count({time})" for kind, time in times.items()}
        wanted |= {f"not_{k}": f"min(CASE WHEN {time} IS NULL THEN {given} END)" for k, time in times.items()}
        if "number" in times:
            wanted |= {f"time_{unit}": f"count_if(abs({times['number']}) >= {least})" for least, _, unit in _UNITS}
    found = dict(zip(wanted, run(f"SELECT {', '.join(wanted.values())} FROM {relation}")[0], strict=True))
    read = int(found["read"])
    if not read:
        raise MetarecError(f"{source} has no rows, expected one row per interaction. Check the file")
    notes, lost = list(table.notes), {roles.user: read - found["user_count"]}
    if found.get("user_fractions"):
        raise _fractions(source, roles.user, found["user_fractions"], "user")
    if found["user_rounded"]:
        raise _were_rounded(source, roles.user, found["user_rounded"], found["user_such"])
    if kind in _NUMBERS or (table.dialect is not None and found["user_whole"] == found["user_count"]):
        user = _integer(user, kind)
    elif found.get("user_whole"):
        notes.append(_mixed(roles.user, found["user_whole"]))
    if found["user_min"] == found["user_max"]:
        raise MetarecError(
            f"{source}, column {shown(roles.user)}: all rows belong to one user ({shown(found['user_min'])}); "
            f"meta-learning requires at least two. Name another column with {option('user')}"
        )
    columns, conditions = {"user": user}, [f"{user} IS NOT NULL"] if found["user_count"] < read else []
    if roles.rating is not None:
        if found.get("rating_wrong"):
            if not commas and table.dialect is not None and _has_commas(run, relation, given, found["rating_wrong"]):
                checked = check(run, relation, table, commas=True)
                note = f"decimal commas, such as {shown(found['rating_such'])}, are read as decimal points"
                return checked._replace(notes=(f"column {shown(roles.rating)}: {note}", *checked.notes))
            raise MetarecError(
                f"{source}, column {shown(roles.rating)}: {found['rating_wrong']} values are not 32-bit numbers, "
                f"such as {shown(found['rating_such'])}. Correct them, or name another column with {option('rating')}"
            )
        if found["rating_min"] == found["rating_max"]:
            raise MetarecError(
                f"{source}, column {shown(roles.rating)}: all ratings are {shown(found['rating_min'])}, so there is "
                "nothing to predict. If a row means that the user chose the item, use --implicit (implicit=True in "
                "Python)"
            )
        columns["rating"], lost[roles.rating] = rating, read - found["rating_given"]
        notes += _no_rating(run, relation, rating)
        lost[f"{roles.rating} that is finite"] = found["rating_given"] - found["rating_count"]
        conditions += [f"isfinite({rating})"] if found["rating_count"] < read else []
    if roles.timestamp is not None and found["time_given"] == 0:
        notes.append(f"column {shown(roles.timestamp)} is empty: read without timestamps")
    elif roles.timestamp is not None:
        columns["time"], remarks = _settled(roles.timestamp, times, found, source)
        notes += remarks
        if timeless := read - found["time_given"]:
            least = f"{NO_TIME + 1}::BIGINT - 1"  # the literal itself is too large
            columns["time"] = f"coalesce({columns['time']}, {least})"
            notes.append(f"{timeless} rows have no time: kept, but --order time requires a time in every row")
    notes += [f"rows dropped: {count} without a {name}" for name, count in lost.items() if count]
    return Checked(columns, quoted(roles.item), types[roles.item], tuple(conditions), read, tuple(notes))


def number_items(run: Run, relation: str, table: Source, checked: Checked) -> tuple[str, ...]:
    """Create the tables ``items`` (id; its row is its rowid + 1) and ``item_rows`` (raw value, row). Returns notes.

    Values are trimmed and checked once per distinct value, not once per row.

    Raises:
      MetarecError: ids are fractions, or there is no id.
    """
    source, name, kind = _name(table), table.roles.item, checked.item_kind
    item, raw = _id("raw", kind, source, name, "item"), f"SELECT {checked.item} AS raw, count(*) AS n"
    run(f"CREATE TABLE seen AS {raw} FROM {relation}{checked.condition} GROUP BY 1")
    fractions = f"sum(n) FILTER (WHERE {item} != floor({item}))" if kind in _NUMBERS else "0"
    counted = f"sum(n), sum(n) FILTER (WHERE {item} IS NOT NULL), sum(n) FILTER (WHERE {_spelled(item)}), {fractions}"
    read, given, whole, broken = (int(n or 0) for n in run(f"SELECT {counted} FROM seen")[0])
    notes = []
    if broken:
        raise _fractions(source, name, broken, "item")
    if not given:
        raise MetarecError(f"{source}: no row has a value in every required column. Complete the rows")
    if (rounded := run(f"SELECT {_rounded(item, kind)}, {_such(item, kind)} FROM seen")[0])[0]:
        raise _were_rounded(source, name, *rounded)
    if kind in _NUMBERS or (table.dialect is not None and whole == given):
        item = _integer(item, kind)
    elif table.dialect is not None and whole:
        notes.append(_mixed(name, whole))
    if given < read:
        notes.append(f"rows dropped: {read - given} without a {name}")
    run(f"CREATE TABLE named AS SELECT raw, {item} AS id FROM seen")  # so that the join below is over plain columns
    run("CREATE TABLE items AS SELECT DISTINCT id FROM named WHERE id IS NOT NULL ORDER BY id")
    rows = "SELECT raw, (items.rowid + 1)::INTEGER AS row FROM named JOIN items ON named.id = items.id"
    run(f"CREATE TABLE item_rows AS {rows}")
    return tuple(notes)


def _name(table: Source) -> str:
    return str(table.files[0]) if len(table.files) == 1 else f"{table.files[0]} and others"


def _fractions(source: str, name: str, count: int, side: str) -> MetarecError:
    return MetarecError(
        f"{source}, column {shown(name)}: expected ids, got {count} fractions. Name another column with {option(side)}"
    )


def _mixed(name: str, rows: int) -> str:
    return f"column {shown(name)} mixes numbers (on {rows} rows) and text: all ids are kept as text"


def _spelled(value: str) -> str:
    """SQL: whether text spells an integer, as in `spelling.whole`."""
    return f"regexp_full_match({value}::VARCHAR, {literal(WHOLE)})"


def _integer(value: str, kind: str) -> str:
    """SQL that casts ids of whole numbers to integers; text loses its decimal point first."""
    return f"({value})::BIGINT" if kind in _NUMBERS else f"regexp_replace({value}, '[.]0*$', '')::BIGINT"


def _is_rounded(value: str, kind: str) -> str:
    """SQL: whether an id passed through a float that cannot represent it, as in `spelling.was_rounded`."""
    if kind in _FLOATS:
        return f"abs({value}) >= {2**24 if kind == 'FLOAT' else 2**EXACT}"
    if kind != "VARCHAR":
        return "false"
    power = f"(contains(lower({value}), 'e') OR abs(TRY_CAST({value} AS DOUBLE)) >= {2**EXACT})"
    return f"(regexp_full_match({value}, {literal(ROUNDED)}) AND {power})"


def _rounded(value: str, kind: str) -> str:
    """SQL: the number of rounded ids; 0 for text that is not all numbers."""
    some = f"count_if({_is_rounded(value, kind)})"
    if kind != "VARCHAR":
        return some
    return f"CASE WHEN count({value}) = count(TRY_CAST({value} AS DOUBLE)) THEN {some} ELSE 0 END"


def _such(value: str, kind: str) -> str:
    """SQL: an example of a rounded id."""
    return f"min(CASE WHEN {_is_rounded(value, kind)} THEN {value} END)"


def _were_rounded(source: str, name: str, count: int, such: Any) -> MetarecError:
    return MetarecError(
        f"{source}, column {shown(name)}: {count} ids such as {shown(such)} were rounded by a float, so that several "
        "may coincide. Write the column again as whole numbers or as text, without powers of ten"
    )


def _kind(spelled: str) -> str:
    """``_kind("DECIMAL(18,3)")`` is ``"DECIMAL"``; of a list it is ``"LIST"``."""
    return "LIST" if spelled.endswith("]") else spelled.split("(")[0]


def _id(column: str, kind: str, source: str, name: str, side: str) -> str:
    """SQL of an id: a whole number or text; NULL if missing."""
    if kind in _WHOLE:
        return f"{column}::BIGINT"
    if kind in _FLOATS:
        return f"CASE WHEN isfinite({column}) THEN {column} END"
    if kind == "DECIMAL":
        return column
    if kind == "VARCHAR" or kind.startswith(_SPELLED):
        return _text(column)
    if kind == "BLOB":
        return _text(f"decode({column})")
    raise MetarecError(
        f"{source}, column {shown(name)}: values of type {kind} cannot be ids. Name another column with {option(side)}"
    )


def _text(column: str) -> str:
    """SQL of text, stripped of blanks; NULL if missing."""
    trimmed = f"trim({column}::VARCHAR, E' \\t\\r\\n')"
    return f"CASE WHEN {trimmed} NOT IN ({', '.join(map(literal, MISSING))}) THEN {trimmed} END"


def _no_rating(run: Run, relation: str, rating: str) -> list[str]:
    """The note of `columns.no_rating`, if ratings have at most 1000 values."""
    finite = f"FROM {relation} WHERE isfinite({rating})"
    counted = f"SELECT {rating} AS r, count(*) {finite} GROUP BY r ORDER BY r LIMIT 1001"
    values, counts = (np.array(column) for column in zip(*run(counted), strict=True))
    odd = no_rating(values, counts) if len(values) <= 1000 else None
    return [odd] if odd is not None else []


def _has_commas(run: Run, relation: str, value: str, wrong: int) -> bool:
    """Whether the values that are not numbers have decimal commas, as in `spelling.decimal_commas`."""
    comma, thousands = (f"count_if(regexp_full_match({value}, {literal(p)}))" for p in (COMMA, THOUSANDS))
    counted = run(f"SELECT {comma}, {thousands}, count_if(contains({value}, '.')) FROM {relation}")[0]
    return counted[0] == wrong and counted[1] < wrong and not counted[2]


def _number(name: str, kind: str, commas: bool) -> tuple[str, str]:
    """SQL of a value (NULL if missing), and of the value as a 32-bit number (NULL if it is not one)."""
    column = quoted(name)
    if kind == "FLOAT":
        return f"CASE WHEN NOT isnan({column}) THEN {column} END", column
    if kind == "DOUBLE":
        return f"CASE WHEN NOT isnan({column}) THEN {column} END", f"TRY_CAST({column} AS FLOAT)"
    given = _text(column) if kind == "VARCHAR" else column
    given = f"replace({given}, ',', '.')" if commas else given
    return given, f"TRY_CAST({given} AS FLOAT)"


def _times(name: str, kind: str, source: str) -> tuple[str, dict[str, str]]:
    """SQL of a value, and of the value as a time by kind, "number" or "date" (in seconds); NULL if it is not one."""
    column = quoted(name)
    if kind == "DATE" or kind.startswith("TIMESTAMP"):
        zoned = kind if kind == "TIMESTAMP WITH TIME ZONE" else "TIMESTAMP"
        return column, {"date": f"floor(epoch({column}::{zoned}))::BIGINT"}
    if kind in _WHOLE or kind in ("UBIGINT", "HUGEINT"):
        return column, {"number": column if kind == "BIGINT" else f"TRY_CAST({column} AS BIGINT)"}
    given = _text(column) if kind == "VARCHAR" else column
    given = f"CASE WHEN NOT isnan({column}) THEN {column} END" if kind in _FLOATS else given
    whole = f"TRY_CAST(trunc(TRY_CAST({given} AS DOUBLE)) AS BIGINT)"
    if kind in _FLOATS or kind == "DECIMAL":
        return given, {"number": whole}
    if kind == "VARCHAR":
        date = f"floor(epoch(TRY_CAST({given} AS TIMESTAMPTZ)))::BIGINT"
        return given, {"number": f"coalesce(TRY_CAST({given} AS BIGINT), {whole})", "date": date}
    raise MetarecError(
        f"{source}, column {shown(name)}: values of type {kind} cannot be times. Name another column with "
        f"{option('timestamp')}, or an empty name for no timestamps"
    )


def _settled(name: str, times: dict[str, str], found: dict[str, Any], source: str) -> tuple[str, list[str]]:
    """SQL in seconds of the kind of `_times` that the column has, and notes on it."""
    kind = max(times, key=lambda k: found[f"time_{k}"])
    if found[f"time_{kind}"] < found["time_given"]:
        wrong, such = found["time_given"] - found[f"time_{kind}"], shown(found[f"not_{kind}"])
        fault = (
            "neither seconds since 1970 nor an ISO date"
            if not found[f"time_{kind}"]
            else (
                "not numbers of seconds, unlike the others" if kind == "number" else "not ISO dates, unlike the others"
            )
        )
        raise MetarecError(
            f"{source}, column {shown(name)}: {wrong} values such as {such} are {fault}. Correct them, or name another "
            f"column with {option('timestamp')}, or an empty name for no timestamps"
        )
    value = times[kind]
    if kind == "number":
        for _, divisor, unit in _UNITS:
            if 2 * found[f"time_{unit}"] > found["time_given"]:  # the median is in this unit
                note = f"column {shown(name)} was read as {unit}seconds and divided by {divisor:,}"
                return f"(({value}) - (({value}) % {divisor} + {divisor}) % {divisor}) // {divisor}", [note]
    return value, []


def quoted(name: str) -> str:
    """A name in SQL. ``quoted('a"b')`` is ``"a""b"``."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Text in SQL. ``literal("it's")`` is ``'it''s'``."""
    return "'" + text.replace("'", "''") + "'"
