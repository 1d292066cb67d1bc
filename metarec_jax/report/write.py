"""The report of an evaluation: Markdown, one HTML file with embedded plots, and text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from metarec_jax.evaluation import diagnostics
from metarec_jax.evaluation.diagnostics import Convergence
from metarec_jax.evaluation.intervals import FEWEST_USERS
from metarec_jax.evaluation.metrics import higher_is_better
from metarec_jax.evaluation.results import Difference, Estimate, Report
from metarec_jax.report import plots
from metarec_jax.report.pages import Section, Table, write_page
from metarec_jax.report.plots import metric_title, scenario_title

_GAINS = {"exp": "2^r - 1", "linear": "r", "square": "r^2 - 1", "binary": "1 for a relevant item, else 0"}


def main_metrics(report: Report) -> list[str]:
    """The main metrics that the report has: errors, nDCG over the query, nDCG and recall over all candidates."""
    present = {m for scenarios in report.summary().values() for row in scenarios.values() for m in row}
    return [m for m in _main(report) if m in present]


def _main(report: Report) -> list[str]:
    topn, whole = report.settings["topn"], report.settings["catalogue_topn"]
    n = 5 if 5 in topn else topn[-1] if topn else 0
    metrics = ["mae", "rmse_pooled", f"ndcg@{n}"]
    return metrics + ([f"catalogue_ndcg@{min(whole)}", f"catalogue_recall@{max(whole)}"] if whole else [])


def metric_table(report: Report, metric: str) -> Table:
    """Mean ± standard error of every method in every scenario; the best of each column is marked."""
    summary = report.summary()
    best: set[tuple[int, int]] = set()
    scenarios = [s for s in report.scenarios if any(metric in summary[m].get(s, {}) for m in report.methods)]
    cells = [[summary[m].get(s, {}).get(metric) for s in scenarios] for m in report.methods]
    for column, scenario in enumerate(scenarios):
        winner = summary[str(report.best(metric, scenario))][scenario][metric].mean
        best |= {(r, column + 1) for r, row in enumerate(cells) if (e := row[column]) and abs(e.mean - winner) < 1e-9}
    rows = tuple((name, *(_cell(e) for e in row)) for name, row in zip(report.methods, cells, strict=True))
    return Table(("method", *(scenario_title(s) for s in scenarios)), rows, frozenset(best))


def terminal_table(report: Report) -> str:
    """The main metrics and the findings as aligned text; ``*`` marks the best of a column."""
    blocks = [*metric_blocks(report), "\n".join(findings(report))]
    return "\n\n".join(block for block in blocks if block)


def metric_blocks(report: Report) -> list[str]:
    """A block of aligned text for each main metric, under a line that names it; ``*`` marks the best of a column."""
    blocks = []
    for metric in main_metrics(report):
        direction = "higher is better" if higher_is_better(metric) else "lower is better"
        head = f"{metric_title(metric)}: {_mean_of(metric)}, {_of_gain(report, metric)}{direction}, * best"
        blocks.append("\n".join([head, aligned(metric_table(report, metric)), *footnotes(report, metric)]))
    return blocks + [line for line in [" ".join(missing(report))] if line]


def footnotes(report: Report, metric: str) -> list[str]:
    """Why a table of this metric has no value for some methods, and how many tasks it excludes."""
    summary, lines = report.summary(), []
    scenarios = [s for s in report.scenarios if any(metric in summary[m].get(s, {}) for m in report.methods)]
    dashes = [m for m in report.methods if any(metric not in summary[m].get(s, {}) for s in scenarios)]
    ranking = [m for m in dashes if m in report.settings["ranking_only"]]
    if ranking:
        lines.append(f"-: the scores of {', '.join(ranking)} are not ratings, so they have no rating error.")
    if others := [m for m in dashes if m not in ranking]:
        lines.append(f"-: {', '.join(others)}: the metric is undefined for every task.")
    counts = report.counts()
    without = {s: counts[s]["no_answer"].get(metric, 0) for s in scenarios}
    some = [f"{n:,} of {counts[s]['tasks']:,} ({scenario_title(s)})" for s, n in without.items() if n]
    if some and metric in report.metrics and metric not in ("mae", "rmse", "squared_error"):
        lines.append(f"Tasks excluded because {_undefined(report, metric)}: {', '.join(some)}.")
    return lines


def missing(report: Report) -> list[str]:
    """A line for each main ranking metric that is undefined for all tasks of some scenarios."""
    summary, lines = report.summary(), []
    for metric in _main(report):
        absent = [s for s in report.scenarios if not any(metric in summary[m].get(s, {}) for m in report.methods)]
        if metric in report.metrics and absent and metric not in ("mae", "rmse_pooled"):
            which = "any scenario" if absent == report.scenarios else ", ".join(map(scenario_title, absent))
            lines.append(f"No {metric_title(metric)} for {which}: {_undefined(report, metric)} in any task.")
    return lines


def _undefined(report: Report, metric: str) -> str:
    if metric.startswith("ndcg") and report.settings["gain"] != "binary":
        return "all query items have the lowest rating"
    return f"no query item is relevant ({report.settings['relevant']})"


def _of_gain(report: Report, metric: str) -> str:
    return f"gain {gain_title(report)}, " if metric.startswith("ndcg") else ""


def gain_title(report: Report) -> str:
    """The gain of nDCG over the query, as a formula."""
    gain, span = report.settings["gain"], report.settings["rating_range"]
    if gain == "scaled":
        return f"2^g - 1, with g the rating rescaled from {span[0]:g}..{span[1]:g} to 0..5"
    return _GAINS[gain]


def comparison_table(report: Report, metric: str) -> Table:
    """Paired differences of each method to the best baseline, with 95% intervals; those that are better are marked."""
    differences = {(d.method, d.scenario): d for d in report.compare([metric])}
    scenarios = [s for s in report.scenarios if any(key[1] == s for key in differences)]
    rivals = [report.best_baseline(metric, s) for s in scenarios]
    ours = [m for m in report.methods if any(key[0] == m for key in differences)]
    rows, better = [], set()
    for r, name in enumerate(ours):
        cells = [differences.get((name, s)) for s in scenarios]
        rows.append((name, *map(_gap_cell, cells)))
        better |= {(r, k + 1) for k, d in enumerate(cells) if d is not None and d.better}
    header = ("method", *(f"{scenario_title(s)}, vs. {b}" for s, b in zip(scenarios, rivals, strict=True)))
    return Table(header, tuple(rows), frozenset(better))


def aligned(table: Table) -> str:
    """A table as text; ``*`` marks its best cells.

    >>> print(aligned(Table(("method", "MAE"), (("als", "0.7"), ("random", "1.4")), frozenset({(0, 1)}))))
    method  MAE
    als     0.7 *
    random  1.4
    """
    header, rows, best = table
    marked = [tuple(c + (" *" if (r, k) in best else "  ") for k, c in enumerate(row)) for r, row in enumerate(rows)]
    lines = [header, *marked]
    widths = [max(len(line[k].rstrip()) for line in lines) for k in range(len(header))]
    return "\n".join(
        "  ".join(c.rstrip().ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def findings(report: Report) -> list[str]:
    """How often each method is better than the best baseline, then a sentence per scenario and main metric.

    Recall is not compared.
    """
    metrics = [m for m in main_metrics(report) if m in report.metrics and "recall" not in m]
    compared = report.compare(metrics)
    lines = []
    for name in [m for m in report.methods if m not in report.baselines]:
        mine = [d for d in compared if d.method == name]
        verdicts = [_verdict(d) for d in mine if d.users >= FEWEST_USERS]
        if verdicts:
            better, worse = verdicts.count("better"), verdicts.count("worse")
            lines.append(
                f"{name} against the best baseline of each comparison: better in {better} of {len(verdicts)}, worse in "
                f"{worse}, no significant difference in {len(verdicts) - better - worse}."
            )
        elif mine:
            why = too_few(max(d.users for d in mine))
            lines.append(f"{name} against the best baseline of each comparison: no verdict, {why}.")
    lines += [_comparison(d, report) for d in compared]
    return lines or ["No method and baseline were measured on the same scenario, so none are compared."]


def adaptation_findings(report: Report) -> list[str]:
    """The gain from the support: each method that is not a baseline, with the whole support and without support."""
    lines = []
    before, after, metrics = report.summary(0), report.summary(), main_metrics(report)
    for name in [m for m in report.methods if m not in report.baselines]:
        for scenario in report.scenarios:
            if not metrics or metrics[0] not in before[name].get(scenario, {}):
                continue
            gain = report.adaptation_gain(name, metrics[0], scenario)
            start, end = (summary[name][scenario][metrics[0]].mean for summary in (before, after))
            effect = "it adapts" if gain.better else "no significant gain"
            if gain.users < FEWEST_USERS:
                effect = f"no verdict, {too_few(gain.users)}"
            support = report.rows(name, scenario)["support"].median()
            lines.append(
                f"{scenario_title(scenario)}: the support (median size {support:g}) changes {metric_title(metrics[0])} "
                f"of {name} from {start:.3f} to {end:.3f}, a difference of {_interval(gain)}: {effect}. "
                f"{_along_the_curve(report, name, metrics[0], scenario)}".rstrip()
            )
    return lines


def _along_the_curve(report: Report, name: str, metric: str, scenario: str) -> str:
    """Sentences on the curve of one method: its values, where it reaches half of its gain, where it leads."""
    curve = report.curve(metric, scenario)
    mine = curve[curve["method"] == name].set_index("shown")
    if len(mine) < 2:
        return ""
    values, points = mine["mean"].to_numpy(), [int(k) for k in mine.index]
    sign = 1 if higher_is_better(metric) else -1
    means = ", ".join(f"{value:.3f} with {k}" for value, k in zip(values, points, strict=True))
    users = f"Users with {points[-1]} or more support examples ({int(mine['tasks'].max()):,})"
    text = f"{users}, by the number shown: {means}."
    gain = sign * (values - values[0])
    if gain[-1] > 0:
        text += f" Half of that gain is reached with {points[int((gain >= gain[-1] / 2).argmax())]}."
    rival = report.best_baseline(metric, scenario)
    if rival is not None and (curve["method"] == rival).any():
        theirs = curve[curve["method"] == rival].set_index("shown")["mean"].reindex(points).to_numpy()
        ahead = [str(k) for k, gap in zip(points, sign * (values - theirs), strict=True) if gap > 0]
        sizes = "every number" if len(ahead) == len(points) else f"{', '.join(ahead)}" if ahead else "none"
        text += f" Its mean is better than that of {rival} with the same number shown: {sizes}."
    return text


def write_report(
    report: Report,
    run_dir: str | Path,
    *,
    history: Sequence[Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
    data_facts: Mapping[str, Any] | None = None,
    title: str | None = None,
    by_inner_steps: Report | None = None,
    convergence: Mapping[str, Convergence] | None = None,
    inner_lr: Mapping[str, float | None] | None = None,
) -> Path:
    """Write ``report.md``, ``report.html`` (one file with embedded plots) and ``plots/*.png`` into a folder.

    Args:
      run_dir: the folder; it is created if absent.
      history: rows of the training log: ``step``, ``loss`` and ``validation_...``.
      config: settings of the run, printed as a table.
      data_facts: statistics of the data set, printed as a table.
      title: title of the page; the name of the folder by default.
      by_inner_steps: an evaluation of the same parameters after other numbers of inner steps, which name its methods.
      convergence: convergence of the inner loop, by learner; inner_lr: the inner rates in training, for the remedy.

    Returns:
      The path of ``report.html``.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plots_in = folder / "plots"
    sections = [
        Section("Findings", tuple(findings(report))),
        *measured_sections(report, plots_in),
        *_steps_sections(report, by_inner_steps),
        *convergence_sections(convergence or {}, plots_in, inner_lr or {}),
        *_training_sections(history or [], plots_in),
        *method_sections(report),
        *(facts_section(name, facts) for name, facts in (("Data", data_facts), ("Configuration", config)) if facts),
    ]
    return write_page(folder, "report", title or f"Report of {folder.resolve().name}", sections)


def measured_sections(report: Report, folder: Path) -> list[Section]:
    """Every main metric by scenario, then by support size; writes the plots into ``folder``, which is named plots."""
    metrics, sections = main_metrics(report), []
    for metric in metrics:
        name = f"scenarios_{metric.replace('@', '_')}.png"
        drawn = metric != "rmse_pooled" and plots.scenario_dots(report, metric, folder / name)
        direction = "higher" if higher_is_better(metric) else "lower"
        caption = f"{_mean_of(metric).capitalize()}; {_of_gain(report, metric)}{direction} is better."
        image = f"plots/{name}" if drawn else None
        notes = (caption, *footnotes(report, metric))
        sections.append(Section(metric_title(metric), notes, metric_table(report, metric), image))
    sections += [Section("Not in the tables", tuple(absent))] if (absent := missing(report)) else []
    curves = [m for m in metrics if m in report.metrics]
    images = [f"cold_start_{m.replace('@', '_')}.png" for m in curves[:2]]
    drawn_curves = [n for m, n in zip(curves, images, strict=False) if plots.cold_start_curve(report, m, folder / n)]
    sections.append(Section("Quality by support size", tuple(adaptation_findings(report))))
    return sections + [Section("", (), None, f"plots/{name}") for name in drawn_curves]


def convergence_sections(
    convergence: Mapping[str, Convergence], folder: Path, inner_lr: Mapping[str, float | None]
) -> list[Section]:
    """Curves of the inner loop, with the findings of each learner; empty if no learner takes inner steps."""
    if not convergence:
        return []
    lines = [
        f"{name}: {line}" if len(convergence) > 1 else line
        for name, curves in convergence.items()
        for line in diagnostics.findings(curves, inner_lr=inner_lr.get(name))
    ]
    drawn = plots.inner_loop(convergence, folder / "inner_loop.png")
    return [Section("Convergence of the inner loop", tuple(lines), None, "plots/inner_loop.png" if drawn else None)]


def method_sections(report: Report) -> list[Section]:
    """The evaluation protocol, the tasks, and the time per method."""
    return [
        Section("Evaluation protocol", tuple(_method_notes(report))),
        Section("Tasks", (), _counts_table(report)),
        Section("Time", (), _times_table(report)),
    ]


def facts_section(name: str, facts: Mapping[str, Any]) -> Section:
    """Named facts as a table."""
    return Section(name, (), Table(("", "value"), tuple((str(k), _text(v)) for k, v in facts.items())))


def _steps_sections(report: Report, by_inner_steps: Report | None) -> list[Section]:
    if by_inner_steps is None:
        return []
    caption = "The trained parameters after each number of inner steps; 0 is the prior, before any rating is seen."
    return [Section("By inner steps", (caption,), metric_table(by_inner_steps, main_metrics(report)[0]))]


def _training_sections(history: Sequence[Mapping[str, Any]], folder: Path) -> list[Section]:
    if not plots.learning_curve(history, folder / "learning_curve.png"):
        return []
    return [Section("Training", (_selection(history),), None, "plots/learning_curve.png")]


def _comparison(d: Difference, report: Report) -> str:
    summary = report.summary()
    mine, rival = summary[d.method][d.scenario][d.metric].mean, summary[d.baseline][d.scenario][d.metric].mean
    tied = report.tied(d.metric, d.scenario, d.baseline)
    best = f"the best baseline, {d.baseline}" + (f" (tied with {', '.join(tied)})" if tied else "")
    metric, _, among = metric_title(d.metric).partition(", ")
    whose = d.method + (f" among {among}" if among else "")
    return (
        f"{scenario_title(d.scenario)}: {metric} of {whose} is {mine:.3f}, that of {best}, is {rival:.3f}. "
        f"The difference is {_interval(d)} over {d.tasks:,} tasks{_verdict_of(d)}."
    )


def _verdict_of(d: Difference) -> str:
    if d.users < FEWEST_USERS:
        return f": no verdict, {too_few(d.users)}"
    return f" and {'excludes' if d.better or d.worse else 'includes'} zero: {_verdict(d)}"


def _verdict(d: Difference) -> str:
    return "better" if d.better else "worse" if d.worse else "no significant difference"


def too_few(users: int) -> str:
    """The reason why ``users`` users are too few for a verdict.

    >>> too_few(1)
    '1 user, at least 10 are required'
    """
    return f"{users} user{'s' * (users != 1)}, at least {FEWEST_USERS} are required"


def _mean_of(metric: str) -> str:
    """What a cell of a table shows."""
    return "over all query ratings ± standard error" if metric == "rmse_pooled" else "mean ± standard error over users"


def _interval(d: Difference) -> str:
    if isnan(d.low):
        return f"{d.mean:+.4f} (no interval)"
    p = "p < 0.001" if d.p_value < 0.001 else f"p = {d.p_value:.3f}"
    return f"{d.mean:+.4f} (95% interval {d.low:+.4f} to {d.high:+.4f}, {p})"


def _cell(e: Estimate | None) -> str:
    return "-" if e is None else f"{e.mean:.3f}" if isnan(e.se) else f"{e.mean:.3f} ±{e.se:.3f}"


def _gap_cell(d: Difference | None) -> str:
    if d is None:
        return "-"
    return f"{d.mean:+.3f}" if isnan(d.low) else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _selection(history: Sequence[Mapping[str, Any]]) -> str:
    last = max(int(row["step"]) for row in history)
    names = sorted({k for row in history for k in row if k.startswith("validation_")})
    if not names:
        return f"Trained for {last:,} steps without validation; the final parameters are used."
    chosen = next((n for n in ("validation_error", "validation_loss") if n in names), names[0])
    metric = chosen.removeprefix("validation_")
    tried = [(float(row[chosen]), int(row["step"])) for row in history if row.get(chosen) is not None]
    value, step = (max if plots.rises(metric) else min)(tried, key=lambda pair: pair[0])
    return (
        f"Trained for {last:,} steps. Of {len(tried):,} validations, step {step:,} has the best "
        f"{plots.validation_title(history, metric)}, {value:.4f}, and its parameters are used. Validation tasks are "
        "separate from the test tasks scored here."
    )


def _method_notes(report: Report) -> list[str]:
    s, scored = report.settings, len(report.seeds)
    clip = s["rating_range"]
    lines = [
        "Every number is a mean over tasks; a task is one user. Intervals are 95% t-intervals over users. Differences "
        "are paired, on the same tasks, and p is that of the paired t-test. The best baseline is the one with the best "
        "mean on these same tasks, which favours the baselines.",
        f"nDCG uses the gain {s['gain']}: {gain_title(report)}; over all candidates the gain is 1 for a relevant item. "
        f"Relevant items: {s['relevant']}. Ties are broken at random.",
        'A ranking metric without "all candidates" in its name ranks only the few query items of a task, all of them '
        "rated: even a random order scores high, so compare the differences between methods.",
    ]
    if clip:
        lines.append(
            f"Rating errors use predictions clipped to {clip[0]:g}..{clip[1]:g}; rankings use unclipped predictions."
        )
    if s["catalogue_topn"]:
        lines.append(
            f"Rankings of all candidates are over all {s['catalogue_items']:,} items except the known history of the "
            "user, including the support. Items that the user never rated count as irrelevant, so these values are low."
            + (
                " A rating predictor ranks first what a user would rate highly, not what the user is likely to rate."
                if clip
                else ""
            )
        )
        if new := s.get("rank_new_items"):
            lines.append(
                f"{' and '.join(map(scenario_title, new))}: the query items are new, so the candidates are the "
                f"{s['new_items']:,} items that training did not see, except the support; otherwise known items would "
                "fill every list. A method that represents an item only by its id gives all new items the same score "
                "and ranks them at random."
            )
    if s["ranking_only"]:
        lines.append(f"The scores of {', '.join(s['ranking_only'])} are not ratings, so they have no rating errors.")
    if liked := [name for name in s["ranking_only"] if name.endswith("_liked")]:
        lines.append(f"{', '.join(liked)}: fitted on the relevant ratings alone, each a click, for lists.")
    lines.append(
        f"Seeds: {', '.join(map(str, report.seeds))}."
        + (" The tasks of one user form one cluster in all intervals." if scored > 1 else "")
    )
    return lines + [f"Note: {note}." for note in report.notes]


def _counts_table(report: Report) -> Table:
    rows = []
    for name, c in report.counts().items():
        missing = max((n for metric, n in c["no_answer"].items() if "recall" in metric), default=0)
        numbers = (f"{n:,}" for n in (c["tasks"], c["users"], c["queries"]))
        rows.append((scenario_title(name), *numbers, f"{c['median_support']:g}", f"{missing:,}"))
    header = ("scenario", "tasks", "users", "query examples", "median support", "tasks without a relevant item")
    return Table(header, tuple(rows))


def _times_table(report: Report) -> Table:
    rows = [
        (name, f"{1e6 * t['seconds_per_user']:,.1f}", f"{t['first_call_seconds']:.1f}")
        for name, t in report.times.items()
    ]
    header = ("method", "adapt and predict, µs per user", "first calls (compilation), s")
    return Table(header, tuple(rows))


def _text(value: Any, inner: bool = False) -> str:
    """A value as table text; nested mappings are in brackets."""
    if isinstance(value, Mapping):
        text = (", " if inner else "; ").join(f"{k}: {_text(v, True)}" for k, v in value.items())
        return f"({text})" if inner else text or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v, True) for v in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
