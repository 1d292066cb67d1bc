"""What the README prints is what works."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    """The first Python block, on a small synthetic data set in place of ML-1M."""
    monkeypatch.setenv("METAREC_DATA_DIR", str(tmp_path))
    program = blocks("python")[0].replace('"ml-1m"', '"synthetic:400x200"')
    program = program.replace('{"Toy Story (1995)": 5, "Heat (1995)": 2}', "{1: 3.0, 2: 1.0}").replace(
        "steps=1000", "steps=50"
    )
    assert len([line for line in program.splitlines() if line.strip() and not line.startswith("import")]) <= 12
    exec(compile(program, "README.md", "exec"), {})
    assert "Recommendation(item_id=" in capsys.readouterr().out


def test_both_set_up_commands_are_there():
    commands = "\n".join(blocks("sh"))
    assert re.search(r"^python -m venv \.venv && .*pip install.* && .*metarec fit ml-1m$", commands, flags=re.MULTILINE)
    assert re.search(r"^python -m venv \.venv && .*pip install.* && .*pytest$", commands, flags=re.MULTILINE)
