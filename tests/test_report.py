"""The report says in words and pictures what the rows hold."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from metarec_jax.evaluation.results import ALL, Report
from metarec_jax.report.pages import Section, Table, write_page
from metarec_jax.report.write import (
    adaptation_findings,
    findings,
    main_metrics,
    metric_table,
    terminal_table,
    write_report,
)

PNG = b"\x89PNG\r\n\x1a\n"


def made_up(gain=0.05, tasks=60, catalogue=True, curve=(0, 1, 4), scenarios=("user_cold", "item_cold")):
    """Errors drawn around 0.8 (ours, less ``gain``), 0.8 and 1.4, less as more support is shown."""
    rng, rows = np.random.default_rng(0), []
    for scenario in scenarios:
        base = rng.normal(0.8, 0.1, tasks)
        for shown in (ALL, *curve):
            left = 0.0 if shown == ALL else 0.3 / (1 + shown)
            for method, shift in (("ours", -gain), ("bias", 0.0), ("random", 0.6)):
                error = base + shift + left + 0.02 * rng.normal(size=tasks)
                frame = {
                    "method": method,
                    "scenario": scenario,
                    "seed": 0,
                    "task": np.arange(tasks),
                    "user": np.arange(tasks),
                    "shown": shown,
                    "support": 10,
                    "queries": 10,
                    "mae": error,
                    "squared_error": error**2,
                    "ndcg@5": 1 - error / 4,
                }
                if catalogue:
                    frame |= {"catalogue_ndcg@10": error / 50 if shown == ALL else np.nan}
                    frame |= {"catalogue_recall@20": error / 20 if shown == ALL else np.nan}
                rows.append(pd.DataFrame(frame))
    per_task = pd.concat(rows, ignore_index=True)
    per_task["method"] = pd.Categorical(per_task["method"], ["ours", "bias", "random"])
    per_task["scenario"] = pd.Categorical(per_task["scenario"], list(scenarios))
    settings = {
        "gain": "exp",
        "relevant": "target >= 4",
        "rating_range": [1.0, 5.0],
        "topn": [1, 5],
        "catalogue_topn": [10, 20] if catalogue else [],
        "catalogue_items": 100,
        "new_items": 20,
        "rank_new_items": ["item_cold"],
        "curve": list(curve),
        "ranking_only": [],
    }
    times = {name: {"seconds_per_user": 2e-6, "first_call_seconds": 0.5} for name in ("ours", "bias", "random")}
    return Report(per_task, settings, ("bias", "random"), times, ("warm: no tasks, left out",))


HISTORY = [{"step": 10 * k, "loss": 1 / k, "validation_error": abs(k - 4) / 10 + 0.7} for k in range(1, 8)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = write_report(
        made_up(),
        folder,
        history=HISTORY,
        config={"learner": {"name": "ridge"}},
        data_facts={"users": 6040},
        title="<t>",
    )
    return folder, path.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


def test_terminal_table_marks_the_best_and_lines_up():
    text = terminal_table(made_up())
    block = text.split("\n\n")[0].splitlines()
    assert block[0].startswith("MAE: mean ± standard error over users, lower is better")
    ours, bias, random = block[2:]
    assert ours.count("*") == 2  # best in both scenarios
    assert "*" not in bias + random
    assert len({line.index("±") for line in (ours, bias, random)}) == 1
    assert re.search(r"ours +0\.7\d\d ±0\.0\d\d \*", ours)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_dash_and_tasks_left_out_are_explained():
    whole = made_up()
    rows, popular = whole.per_task.copy(), whole.per_task["method"] == "random"
    rows.loc[popular, ["mae", "squared_error"]] = np.nan
    rows.loc[rows["task"] < 7, ["ndcg@5", "catalogue_recall@20"]] = np.nan
    rows.loc[rows["scenario"] == "item_cold", "catalogue_ndcg@10"] = np.nan
    text = terminal_table(Report(rows, whole.settings | {"ranking_only": ["random"]}, ("bias", "random"), whole.times))
    mae, pooled, ndcg, _, recall, gone = text.split("\n\n")[:6]
    for block in (mae, pooled):
        assert block.endswith("-: the scores of random are not ratings, so they have no rating error.")
    assert "gain 2^r - 1, higher is better" in ndcg
    why = "Tasks excluded because all query items have the lowest rating"
    assert ndcg.endswith(f"{why}: 7 of 60 (New users), 7 of 60 (New items).")
    assert "no query item is relevant (target >= 4): 7 of 60" in recall
    assert gone == "No nDCG@10, all candidates for New items: no query item is relevant (target >= 4) in any task."
    assert "Tasks excluded" not in terminal_table(whole)


def test_the_gain_of_a_scale_of_its_own_is_told(tmp_path):
    whole = made_up(catalogue=False, curve=(0,), scenarios=("user_cold",))
    settings = whole.settings | {"gain": "scaled", "rating_range": [-10.0, 10.0]}
    report = Report(whole.per_task, settings, whole.baselines, whole.times)
    assert "gain 2^g - 1, with g the rating rescaled from -10..10 to 0..5" in terminal_table(report)
    write_report(report, tmp_path)
    assert "nDCG uses the gain scaled: 2^g - 1, with g the rating" in (tmp_path / "report.md").read_text(
        encoding="utf-8"
    )


def test_ties_are_all_best():
    table = metric_table(made_up().__class__(**{**made_up().__dict__, "per_task": _equal(made_up().per_task)}), "mae")
    assert table.best == {(r, c) for r in (0, 1, 2) for c in (1, 2)}


def _equal(per_task):
    return per_task.assign(mae=1.0)


def test_main_metrics_are_those_that_are_there():
    assert main_metrics(made_up()) == ["mae", "rmse_pooled", "ndcg@5", "catalogue_ndcg@10", "catalogue_recall@20"]
    assert main_metrics(made_up(catalogue=False)) == ["mae", "rmse_pooled", "ndcg@5"]


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (0.05, "excludes zero: better."),
        (-0.05, "excludes zero: worse."),
        (0.0, "includes zero: no significant difference."),
    ],
)
def test_words_follow_the_interval(gain, verdict):
    said = findings(made_up(gain))
    assert len(said) == 7  # a count; two scenarios, each by MAE, nDCG and nDCG of all candidates
    mae = next(s for s in said if s.startswith("New users: MAE of ours"))
    assert verdict in mae
    assert "of the best baseline, bias" in mae
    assert "over 60 tasks" in mae


@pytest.mark.parametrize("gain", [0.05, -0.05])
@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_few_users_give_no_verdict(tasks, gain):
    report = made_up(gain, tasks=tasks)
    told = findings(report)
    why = f"no verdict, {tasks} user{'s' * (tasks > 1)}, at least 10 are required."
    assert told[0] == f"ours against the best baseline of each comparison: {why}"
    assert len(told) == 7
    assert all(line.endswith(why) for line in told)
    for line in [*told, *adaptation_findings(report), terminal_table(report)]:
        assert "nan" not in line
        assert not re.search("excludes|includes|better\\.|it adapts", line)


@pytest.mark.parametrize("tasks", [10, 12, 30])
def test_the_verdict_follows_p(tasks):
    for gain in (0.002, 0.006, 0.02):
        for d in made_up(gain, tasks=tasks).compare(["mae"]):
            assert (d.better or d.worse) == (d.p_value < 0.05) == (d.low > 0 or d.high < 0)


def test_ties_between_baselines_are_told():
    whole = made_up()
    rows = whole.per_task
    same = rows.assign(mae=np.where(rows["method"] == "ours", rows["mae"], 0.9))
    told = findings(Report(same, whole.settings, ("bias", "random"), whole.times))
    assert "of the best baseline, bias (tied with random), is 0.900" in told[1]


def test_the_curve_is_told_in_words():
    """left = 0.3 / (1 + k): 0.3, 0.15, 0.06 with 0, 1, 4; half of the gain of 0.24 is 0.12, reached with 1."""
    told = adaptation_findings(made_up())[0]
    assert "median size 10" in told
    assert "Users with 4 or more support examples (60)" in told
    assert "Half of that gain is reached with 1." in told
    assert "better than that of bias with the same number shown: every number." in told


def test_no_method_to_compare_is_said():
    whole = made_up()
    only = Report(whole.per_task, whole.settings, ("ours", "bias", "random"), whole.times)
    assert "No method and baseline were measured on the same scenario" in findings(only)[0]


def test_files_are_written(page):
    folder, _, _ = page
    plots = {p.name for p in (folder / "plots").iterdir()}
    assert {"learning_curve.png", "cold_start_mae.png", "scenarios_mae.png", "scenarios_catalogue_ndcg_10.png"} <= plots
    assert all((folder / "plots" / name).read_bytes().startswith(PNG) for name in plots)


def test_page_stands_alone(page):
    _, html, _ = page
    assert html.count("data:image/png;base64,") == html.count("<img")
    assert html.count("<img") >= 6
    assert "http" not in html
    assert "<script" not in html
    assert "prefers-color-scheme: dark" in html
    assert "&lt;t&gt;" in html
    assert "<t>" not in html


@pytest.mark.parametrize(
    "said",
    [
        "2^r - 1",
        "target >= 4",
        "clipped to 1..5",
        "95% t-intervals over users",
        "favours the baselines",
        "all 100 items except the known history of the user",
        "separate from the test tasks",
        "warm: no tasks, left out",
        "it adapts",
        "the query items are new, so the candidates are the 20 items that training did not see",
        "step 40 has the best error, 0.7000, and its parameters are used",
        "6040",
        "excludes zero: better",
    ],
)
def test_report_says_how_it_was_measured(page, said):
    _, html, markdown = page
    assert said in markdown
    assert said.replace(">", "&gt;") in html


HOSTILE = [
    "BODY",
    "TITLE and BODY",
    "$body {body} %s \\1 {{",
    "</title><script>alert(1)</script>",
    "a | b\nc\r\n| d",
    "[x](javascript:y) `*_ & &amp; \"q\" 'q'",
    "\\|",
    "中 \U0001f600",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_reaches_the_reader_as_it_is(tmp_path, text):
    """Read back with a parser: each place holds the text, nothing else moved, and no tag came of it."""
    section = Section(text, (text,), Table(("method", text), (("ours", text),), frozenset({(0, 1)})))
    page = write_page(tmp_path, "report", text, [section, Section("Last", ("the end",))]).read_text(encoding="utf-8")
    cells = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            cells.append([tag, ""])

        def handle_data(self, data):
            if cells:
                cells[-1][1] += data

    Reader().feed(page)
    read = [(tag, " ".join(content.split())) for tag, content in cells]
    plain = " ".join(text.split())
    for tag in ("title", "h1", "h2", "li", "td", "th"):
        assert plain in [content for name, content in read if name == tag], tag
    assert "script" not in dict(read)
    assert [content for name, content in read if name == "h2"] == [plain, "Last"]
    assert [content for name, content in read if name == "li"] == [plain, "the end"]
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert sum(line.startswith("## ") for line in lines) == 2
    assert sum(line.startswith("- ") for line in lines) == 2
    rows = [line for line in lines if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows] == [3, 3, 3]  # bars that no backslash escapes
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(javascript", "\n".join(lines))


def test_markdown_images_exist_and_tables_are_square(page):
    folder, _, markdown = page
    images = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(images) >= 6
    assert all((folder / image).is_file() for image in images)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_a_bare_report_needs_no_history_no_curve_and_no_catalogue(tmp_path):
    write_report(made_up(catalogue=False, curve=(0,), scenarios=("user_cold",)), tmp_path)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"scenarios_mae.png", "scenarios_ndcg_5.png"}
    assert "Learning curve" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_history_without_validation_is_told(tmp_path):
    history = [{"step": k, "loss": 1.0} for k in range(5)]
    write_report(made_up(catalogue=False, curve=(0,), scenarios=("user_cold",)), tmp_path, history=history)
    assert "without validation" in (tmp_path / "report.md").read_text(encoding="utf-8")
