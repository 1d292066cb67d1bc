"""A page of sections, written as Markdown and as one HTML file with embedded plots."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple


class Table(NamedTuple):
    """Text cells; ``best`` holds the (row, column) of each cell to mark."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()


class Section(NamedTuple):
    """A section of a report: a title, sentences, and a plot or a table."""

    title: str
    sentences: tuple[str, ...] = ()
    table: Table | None = None
    image: str | None = None


def write_page(folder: Path, name: str, title: str, sections: Sequence[Section]) -> Path:
    """Write ``NAME.md`` and ``NAME.html`` into the folder of the sections' images. Returns the path of the HTML."""
    (folder / f"{name}.md").write_text(markdown(title, sections), encoding="utf-8")
    path = folder / f"{name}.html"
    path.write_text(page(title, sections, folder), encoding="utf-8")
    return path


def markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {_escaped(title)}", ""]
    for section in sections:
        lines += [f"## {_escaped(section.title)}", ""] if section.title else []
        lines += [f"- {_escaped(text)}" for text in section.sentences] + ([""] if section.sentences else [])
        lines += [f"![{_escaped(section.title) or 'plot'}]({section.image})", ""] if section.image else []
        if section.table:
            header, rows, best = section.table
            cells = [
                [f"**{_escaped(c)}**" if (r, k) in best else _escaped(c) for k, c in enumerate(row)]
                for r, row in enumerate(rows)
            ]
            lines += [f"| {' | '.join(row)} |" for row in ([*map(_escaped, header)], ["---"] * len(header), *cells)] + [
                ""
            ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    r"""Text on one line, with what Markdown would read as a tag, a link, code, emphasis or the end of a cell escaped.

    >>> print(_escaped("a | b"), _escaped("<i>"), _escaped("item_knn [0.1, 0.2]"))
    a \| b \<i> item_knn [0.1, 0.2]
    """
    return re.sub(r"[\\|<`*]|\](?=[(\[:])", r"\\\g<0>", " ".join(text.split()))


def page(title: str, sections: Sequence[Section], folder: Path) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        name = html.escape(section.title)
        body += [f"<h2>{name}</h2>"] if name else []
        listed = [f"<li>{html.escape(text)}</li>" for text in section.sentences]
        body += ["<ul>", *listed, "</ul>"] if listed else []
        if section.image:
            data = base64.b64encode((folder / section.image).read_bytes()).decode("ascii")
            body.append(f'<figure><img alt="{name or "plot"}" src="data:image/png;base64,{data}"></figure>')
        if section.table:
            header, rows, best = section.table
            body.append(
                "<div class=scroll><table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in header) + "</tr>"
            )
            for r, row in enumerate(rows):
                marks = (" class=best" if (r, k) in best else "" for k in range(len(row)))
                body.append(
                    "<tr>" + "".join(f"<td{m}>{html.escape(c)}</td>" for c, m in zip(row, marks, strict=True)) + "</tr>"
                )
            body.append("</table></div>")
    return _PAGE.substitute(title=html.escape(title), body="\n".join(body))


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --ground: #fff; --mark: #e7f2fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --line: #30363d; --ground: #14171b; --mark: #16324a; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
ul { padding-left: 1.2rem; margin: .6rem 0; } li { margin: .3rem 0; }
figure { margin: 1rem 0; } img { width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
td.best { font-weight: 700; background: var(--mark); }
</style>
</head>
<body>
$body
</body>
</html>
""")
