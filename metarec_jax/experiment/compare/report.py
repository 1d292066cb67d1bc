"""The results of ``metarec compare``: tables in the terminal, a page, JSON, and a recommended method."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from metarec_jax.baselines.closed_form import BASELINES, LISTS
from metarec_jax.core import MetarecError
from metarec_jax.data.describe import describe
from metarec_jax.data.interactions import Interactions
from metarec_jax.evaluation import diagnostics
from metarec_jax.evaluation.intervals import FEWEST_USERS
from metarec_jax.evaluation.metrics import higher_is_better
from metarec_jax.evaluation.results import Report
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import inner_rate
from metarec_jax.experiment.compare.cells import Cell
from metarec_jax.experiment.compare.choice import (
    Choice,
    Cost,
    Gap,
    by_support,
    choose,
    join,
    mean_cost,
    over_seeds,
    overall,
)
from metarec_jax.report.pages import Section, Table, write_page
from metarec_jax.report.plots import metric_title, scenario_title
from metarec_jax.report.write import (
    aligned,
    comparison_table,
    convergence_sections,
    facts_section,
    findings,
    main_metrics,
    measured_sections,
    method_sections,
    metric_blocks,
    too_few,
)


def write_and_print(
    table: Mapping[tuple[str, int], Cell],
    names: Sequence[str],
    ours: Mapping[str, configs.Config],
    data: Interactions,
    folder: Path,
    *,
    recommend: bool,
    max_ms: float | None,
    max_mib: float | None,
) -> dict[str, Any]:
    """Write ``compare.md``, ``compare.html`` and ``compare.json`` and print the tables.

    Args:
      table: cells by method and seed; names: names of the methods, simplest first.
      ours: the learners, with the settings of each.
      recommend: also recommend a method within ``max_ms`` and ``max_mib``.

    Returns:
      The content of ``compare.json``.

    Raises:
      MetarecError: no method was measured under all seeds, or none is within the budgets.
    """
    seeds = sorted({seed for _, seed in table})
    failed = _failed(table, names, seeds)
    measured = [name for name in names if name not in failed]
    report = _merged(table, measured, seeds, failed)
    costs = {name: mean_cost([_cost(table[name, seed]) for seed in seeds]) for name in measured}
    curves = {name: c for name in measured if (c := table[name, seeds[0]].convergence) is not None}
    metric = main_metric(report)
    rates = {name: inner_rate(ours[name], data) for name in curves}
    remedies = {name: diagnostics.remedy(c, inner_lr=rates[name]) for name, c in curves.items()}
    warnings = {name: remedy for name, remedy in remedies.items() if remedy is not None}
    lines, choice = [], None
    if recommend:
        choice = choose(report, costs, metric, measured, max_ms=max_ms, max_mib=max_mib)
        lines = [*advice(choice, report, costs, failed), next_step(choice, report, ours)]
    against = comparison_table(report, metric)
    title = f"{metric_title(metric)} minus that of the best baseline of the scenario, 95% interval, * better"
    print("\n\n".join([*metric_blocks(report), *([f"{title}\n{aligned(against)}"] if against.rows else [])]))
    print(f"\nCost\n{aligned(cost_table(costs))}")
    for name, reason in failed.items():
        print(f"not in the table: {name}: {reason}")
    for name, warning in warnings.items():
        print(f"{name}: {warning}")
    print("".join(f"\n{line}" for line in lines), end="\n" if lines else "")
    images = folder / "plots"
    sections = [
        *([Section("Recommended method", tuple(lines))] if lines else []),
        Section("Findings", tuple(_summary(report))),
        *measured_sections(report, images),
        Section(title.partition(",")[0], ("Paired, on the same tasks.",), against if against.rows else None),
        Section("Cost", _COST, cost_table(costs)),
        *([Section("Not in the table", tuple(f"{n}: {r}" for n, r in failed.items()))] if failed else []),
        *convergence_sections(curves, images, rates),
        *method_sections(report),
        facts_section("Data", describe(data)),
        *([facts_section("Configuration", configs.to_dict(next(iter(ours.values()))))] if ours else []),
    ]
    page = write_page(folder, "compare", f"{data.name}: {len(measured)} methods compared", sections)
    results = report.to_json() | {
        "main_metric": metric,
        "costs": {name: c._asdict() for name, c in costs.items()},
        "failed": failed,
        "convergence": {name: diagnostics.to_json(c) for name, c in curves.items()},
        "diverges": warnings,
        "choice": None if choice is None else _plain(choice),
        "folder": str(folder),
    }
    directories.write_json(folder / "compare.json", results)
    print(f"\nreport: {page}")
    return results


def next_step(choice: Choice, report: Report, ours: Mapping[str, configs.Config]) -> str:
    """The command that trains the recommended method; of a plain method, how Python fits it, and the best learner.

    Args:
      ours: the learners by name, each with its configuration.
    """
    if choice.method in ours:
        return f"next: {_fit_command(choice.method, ours[choice.method])}"
    home = "baselines" if choice.method in (*BASELINES, *LISTS) else "baselines.trained"
    plain = (
        f"{choice.method} is a plain method, which metarec fit does not train; Python fits and serves it "
        f"(mr.fit_baselines, mr.Recommender; metarec_jax.{home})"
    )
    means = {name: overall(report, name, choice.metric) for name in ours if name in report.methods}
    known = {name: mean for name, mean in means.items() if mean is not None}
    if not known:
        return plain
    best = (max if higher_is_better(choice.metric) else min)(known, key=lambda name: known[name])
    return f"{plain}. The best learner here is {best}; next: {_fit_command(best, ours[best])}"


def _fit_command(name: str, config: configs.Config) -> str:
    implicit = " --implicit" if config.data.implicit else ""
    return f"metarec fit {shlex.quote(config.data.name)}{implicit} --learner {shlex.quote(name)}"


_COST = (
    "Training: time to fit, including tuning, warm start and compilation; mean over seeds.",
    "One user: latency to adapt to a single user and score the query, median of 30 calls. In batches: time per user "
    "with up to 256 users at once.",
    "Parameters: size of everything fitted. Per user: size of the adapted state of one user.",
)


def main_metric(report: Report) -> str:
    """The metric that decides: MAE for ratings, nDCG over all candidates for clicks."""
    metrics = [m for m in main_metrics(report) if m in report.metrics]
    return next((m for m in metrics if m == "mae"), next((m for m in metrics if "catalogue_ndcg" in m), metrics[0]))


def cost_table(costs: Mapping[str, Cost]) -> Table:
    """Time and memory of each method."""
    rows = tuple(
        (
            name,
            f"{c.train_seconds:.1f}",
            f"{c.latency_ms:.3f}",
            f"{c.batch_ms:.4f}",
            f"{c.parameters_mib:.2f}",
            f"{c.user_kib:.2f}",
        )
        for name, c in costs.items()
    )
    header = ("method", "training, s", "one user, ms", "in batches, ms per user", "parameters, MiB", "per user, KiB")
    return Table(header, rows)


def advice(choice: Choice, report: Report, costs: Mapping[str, Cost], failed: Mapping[str, str]) -> list[str]:
    """The recommended method and the reasons, in five lines."""
    c, metric = choice, metric_title(choice.metric)
    took, mean = costs[c.method], overall(report, c.method, c.metric)
    users = int(report.per_task["user"].nunique())
    lines = [
        f"Use {c.method}: mean {metric} {mean:.3f} over the scenarios, {took.latency_ms:.2g} ms per user, "
        f"{took.parameters_mib:.2g} MiB, trained in {took.train_seconds:.0f} s."
    ]
    if c.gap is None and c.over_simpler:
        lines.append(f"It has the best mean of all candidates; each simpler one is shown to be worse: {_nearest(c)}.")
    elif c.gap is None:
        lines.append("It has the best mean of all candidates, and none is simpler.")
    else:
        lines.append(
            f"{c.best} has the best mean, {overall(report, c.best, c.metric):.3f}; its advantage over the simpler "
            f"{c.method} is {_formatted(c.gap)}: "
            + ("not shown to be above zero." if c.gap.users >= FEWEST_USERS else f"no verdict: {too_few(c.gap.users)}.")
        )
    lines.append(
        f"Measured on {users:,} test users over {len(report.seeds)} seed{'s' * (len(report.seeds) > 1)}; more --seeds "
        "narrow the intervals. The tables list the methods from the simplest."
    )
    scenario = "user_cold" if "user_cold" in report.scenarios else report.scenarios[0]
    candidates = [name for name in report.methods if name not in c.left_out]
    along = by_support(report, c.metric, scenario, candidates) if c.metric in report.metrics else []
    if along:
        parts = []
        for name, group in groupby(along, key=lambda pair: pair[1]):
            shown = [k for k, _ in group]
            parts.append(f"{name} with {shown[0]}" + (f" to {shown[-1]}" if len(shown) > 1 else ""))
        lines.append(f"{scenario_title(scenario)}, best mean by support size: {', '.join(parts)}.")
    out = [f"{name} ({why})" for name, why in [*c.left_out.items(), *failed.items()]]
    lines.append(f"Not candidates: {', '.join(out)}." if out else "All methods were candidates.")
    return lines


def _nearest(choice: Choice) -> str:
    name, least = min(choice.over_simpler.items(), key=lambda pair: pair[1].mean)
    return f"{name}, the nearest, by {_formatted(least)}"


def _formatted(gap: Gap) -> str:
    return f"{gap.mean:.4f} (95% interval {gap.low:+.4f} to {gap.high:+.4f})"


def _plain(choice: Choice) -> dict[str, Any]:
    over = {name: g._asdict() for name, g in choice.over_simpler.items()}
    return choice._asdict() | {"gap": None if choice.gap is None else choice.gap._asdict(), "over_simpler": over}


def _failed(table: Mapping[tuple[str, int], Cell], names: Sequence[str], seeds: Sequence[int]) -> dict[str, str]:
    """Methods that were not measured under every seed, with the first reason."""
    failed = {}
    for name in names:
        reasons = [(seed, reason) for seed in seeds if (reason := table[name, seed].failed) is not None]
        if reasons:
            with_seeds = (
                f" (under {len(reasons)} of {len(seeds)} seeds, first under seed {reasons[0][0]})"
                if len(seeds) > 1
                else ""
            )
            failed[name] = f"{reasons[0][1]}{with_seeds}"
    return failed


def _merged(
    table: Mapping[tuple[str, int], Cell], measured: Sequence[str], seeds: Sequence[int], failed: Mapping[str, str]
) -> Report:
    if not measured:
        name, reason = next(iter(failed.items()))
        raise MetarecError(f"no method could be measured; {name}: {reason}")
    return over_seeds([join([_report(table[name, seed]) for name in measured]) for seed in seeds])


def _report(cell: Cell) -> Report:
    assert cell.report is not None
    return cell.report


def _cost(cell: Cell) -> Cost:
    assert cell.cost is not None
    return cell.cost


def _summary(report: Report) -> list[str]:
    """How often each learner is better than the best baseline, and the best method of each scenario."""
    ours = [name for name in report.methods if name not in report.baselines]
    lines = findings(report)[: len(ours)] if ours else []
    for scenario in report.scenarios:
        best = {metric_title(m): report.best(m, scenario) for m in main_metrics(report)}
        named = ", ".join(f"{metric} {name}" for metric, name in best.items() if name)
        lines.append(f"{scenario_title(scenario)}, best mean: {named}.")
    return lines
