"""The plots of a report: learning curve, cold-start curve, scenarios; drawn without a display, on white."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from metarec_jax.evaluation.diagnostics import Convergence
from metarec_jax.evaluation.metrics import higher_is_better
from metarec_jax.evaluation.results import Report

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""For the methods that are not baselines: the palette of Okabe and Ito, which colour-blind readers can distinguish."""
_BEST, _OTHER, _INK, _SOFT = "#3C3C3C", "#8C8C8C", "#222222", "#6B6B6B"
_DIVERGED = 2.0
"""Upper end of the plot of an inner loop, relative to the first value."""
_SCENARIOS = {
    "user_cold": "New users",
    "item_cold": "New items",
    "both_cold": "New users, new items",
    "warm": "Known users, known items",
}
_FAMILIES = {
    "mae": "MAE",
    "rmse": "RMSE per user",
    "rmse_pooled": "RMSE",
    "auc": "AUC",
    "ndcg": "nDCG",
    "mrr": "MRR",
    "map": "MAP",
}
_IN_POINTS = {"mae", "rmse", "rmse_pooled"}


def scenario_title(name: str) -> str:
    """The title of a scenario.

    >>> scenario_title("user_cold")
    'New users'
    """
    return _SCENARIOS.get(name, name.replace("_", " "))


def metric_title(name: str) -> str:
    """The title of a metric.

    >>> metric_title("catalogue_hit_rate@10"), metric_title("ndcg@5"), metric_title("mae")
    ('hit rate@10, all candidates', 'nDCG@5', 'MAE')
    """
    whole = name.startswith("catalogue_")
    family, at, n = name.removeprefix("catalogue_").partition("@")
    words = _FAMILIES.get(family) or family.replace("_", " ")
    return f"{words}{at}{n}" + (", all candidates" if whole else "")


def _axis_title(name: str) -> str:
    return metric_title(name) + (" (rating points)" if name in _IN_POINTS else "")


def candidates(report: Report, scenario: str) -> str:
    """The number of candidates when a scenario ranks all of them: "3,706 items", "741 new items"."""
    new = scenario in report.settings.get("rank_new_items", ())
    return f"{report.settings['new_items' if new else 'catalogue_items']:,}{' new' if new else ''} items"


def method_colors(report: Report, best: str | None) -> dict[str, str]:
    """A colour for each method that is not a baseline, near-black for the best baseline, grey for the other ones."""
    ours = [name for name in report.methods if name not in report.baselines]
    colors = {name: COLORS[k % len(COLORS)] for k, name in enumerate(ours)}
    return {name: colors.get(name, _BEST if name == best else _OTHER) for name in report.methods}


def learning_curve(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Plot the training loss, the validation metric that selects, with a ring at its best step, and the others by name.

    Returns False, and writes no file, with fewer than two steps of loss.
    """
    train = _series(history, "loss")
    if len(train) < 2:
        return False
    names = list(dict.fromkeys(k for row in history for k in row if k.startswith("validation_")))
    names = [name for name in names if len(_series(history, name)) > 1]
    first = next((n for n in ("validation_error", "validation_loss") if n in names), names[0] if names else "")
    rest = [n for n in names if n != first and n.split("_")[1] == next(m for m in names if m != first).split("_")[1]]
    figure, axes = _figure(1 + bool(first) + bool(rest), 3.5)
    _title(
        figure,
        "Learning curve",
        "training loss as logged (light) and its running mean" + ("; ring: the selected step" if first else ""),
    )
    step, loss = train.T
    axes[0].plot(step, loss, color=COLORS[0], alpha=0.25, lw=1)
    axes[0].plot(step, _smooth(loss), color=COLORS[0], lw=2)
    _named(axes[0], "Training", "query loss")
    low, high = np.percentile(loss, [0, 95])
    top = max(high + 0.25 * (high - low or 1), min(loss.max() + 0.05 * (high - low), high + 2 * (high - low)))
    axes[0].set_ylim(low - 0.08 * (high - low or 1), top)  # a much higher start is cut off
    if first:
        step, value = _series(history, first).T
        metric = first.removeprefix("validation_")
        best = int(np.argmax(value) if rises(metric) else np.argmin(value))
        axes[1].plot(step, value, color=COLORS[1], lw=2, marker="o", ms=3.5)
        axes[1].plot(step[best], value[best], "o", ms=11, mfc="none", mec=_INK, mew=1.4)
        axes[1].margins(y=0.15)
        note = f"best {value[best]:.4f} at step {step[best]:,.0f}"
        _named(axes[1], "Validation", validation_title(history, metric), note)
    if rest:
        shared = metric_title(rest[0].split("_")[1])
        ends = []
        for k, name in enumerate(rest):
            step, value = _series(history, name).T
            word = name.removeprefix("validation_").partition("_")[2]
            word = scenario_title(word) if word else metric_title(name.removeprefix("validation_"))
            axes[2].plot(step, value, color=COLORS[k % len(COLORS)], lw=2)
            ends.append((float(value[-1]), word, COLORS[k % len(COLORS)]))
        _named(axes[2], "Validation by scenario", shared)
        _end_labels(axes[2], ends)
    for ax in axes:
        ax.set_xlabel("outer step", color=_SOFT)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _save(figure, path)


def validation_title(history: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The title of a validation metric; "error" is the mean over scenarios of the metric logged by scenario."""
    by_scenario = [k.split("_")[1] for row in history for k in row if k.startswith("validation_") and k.count("_") > 1]
    if metric == "error" and by_scenario:
        return f"{metric_title(by_scenario[0])}, mean over scenarios"
    return metric_title(metric)


def rises(metric: str) -> bool:
    """Whether a larger value of a validation metric is better; its name may end in a scenario."""
    return not metric.startswith(("error", "loss", "mae", "rmse", "mse"))


def cold_start_curve(report: Report, metric: str, path: Path) -> bool:
    """Plot a metric by support size, one panel per scenario. Returns False, and writes no file, without such rows."""
    curves = {s: report.curve(metric, s) for s in report.scenarios}
    curves = {s: curve for s, curve in curves.items() if curve["shown"].nunique() > 1}
    if not curves:
        return False
    figure, axes = _figure(len(curves), 4.0)
    better = "higher" if higher_is_better(metric) else "lower"
    note = "the same users at every point of a panel; bands: 95% intervals; each panel has its own scale"
    _title(figure, "Quality by support size", f"{metric_title(metric)}, {better} is better; {note}")
    for ax, (scenario, curve) in zip(axes, curves.items(), strict=True):
        best = report.best_baseline(metric, scenario)
        colors, points = method_colors(report, best), sorted(curve["shown"].unique())
        last = curve[curve["shown"] == points[-1]].set_index("method")["mean"]
        hidden = [m for m in _off_scale(report, metric, [last]) if m != best]
        limits: list[float] = []
        drawn: dict[tuple[float, ...], list[str]] = {}  # lines that coincide share one label
        for name in sorted(report.methods, key=lambda n: (n not in report.baselines, n == best)):
            line = curve[curve["method"] == name].sort_values("shown")
            if line.empty or name in hidden:
                continue
            strong = name not in report.baselines or name == best
            at, width = range(len(points)), 2.4 if strong else 1.1
            ax.plot(at, line["mean"], color=colors[name], lw=width, marker="o", ms=4 if strong else 0)
            limits.append(float(line["mean"].iloc[-1]))
            if strong:
                limits += [line["low"].min(), line["high"].max()]
                ax.fill_between(at, line["low"], line["high"], color=colors[name], alpha=0.15, lw=0)
            drawn.setdefault(tuple(line["mean"].round(5)), []).insert(0, name)
        ax.set_xticks(range(len(points)), [str(k) for k in points])
        ax.set_xlim(-0.2, len(points) - 1 + 0.2)
        aside = f"\noff the scale: {', '.join(hidden)}" if hidden else ""
        ax.set_xlabel(f"support examples shown{aside}", color=_SOFT)
        _named(ax, scenario_title(scenario), _axis_title(metric), f"{curve['tasks'].max():,} tasks")
        pad = 0.06 * (max(limits) - min(limits) or 1)
        ax.set_ylim(min(limits) - pad, max(limits) + pad)  # weaker methods may leave the panel
        _end_labels(ax, [(line[-1], ",\n".join(names), colors[names[0]]) for line, names in drawn.items()])
    return _save(figure, path)


def scenario_dots(report: Report, metric: str, path: Path) -> bool:
    """Plot mean and 95% interval of every method, best on top, one panel per scenario. False without the metric."""
    summary = report.summary()
    scenarios = [s for s in report.scenarios if any(metric in summary[m].get(s, {}) for m in report.methods)]
    if not scenarios:
        return False
    rows = max(sum(metric in summary[m].get(s, {}) for m in report.methods) for s in scenarios)
    figure, axes = _figure(len(scenarios), 1.9 + 0.3 * rows)
    sign = 1 if higher_is_better(metric) else -1
    _title(
        figure,
        f"{metric_title(metric)} by scenario",
        f"mean and 95% interval over users; {'higher' if sign > 0 else 'lower'} is better; best on top; "
        "each panel has its own scale",
    )
    for ax, scenario in zip(axes, scenarios, strict=True):
        best = report.best_baseline(metric, scenario)
        colors = method_colors(report, best)
        values = {m: summary[m][scenario][metric] for m in report.methods if metric in summary[m].get(scenario, {})}
        order = sorted(values, key=lambda m: (sign * values[m].mean, -report.methods.index(m)))
        hidden = _off_scale(report, metric, [{m: e.mean for m, e in values.items()}])
        shown = [values[m] for m in order if m not in hidden]
        low, high = min(e.low for e in shown), max(e.high for e in shown)
        pad = 0.06 * (high - low or 1)
        for y, name in enumerate(order):
            e, strong = values[name], name not in report.baselines or name == best
            if name in hidden:
                edge, ha = (high + pad, "right") if e.mean > high else (low - pad, "left")
                arrow = f"{e.mean:.3f} →" if e.mean > high else f"← {e.mean:.3f}"
                ax.text(edge, y, arrow, ha=ha, va="center", color=_SOFT, fontsize=9)
                continue
            ax.plot(
                [e.low, e.high], [y, y], color=colors[name], lw=3 if strong else 1.6, solid_capstyle="round", alpha=0.55
            )
            ax.plot(e.mean, y, "o", color=colors[name], ms=8 if strong else 5.5)
            ax.annotate(
                f"{e.mean:.3f}",
                (e.mean, y),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=colors[name],
            )
        ax.set_yticks(range(len(order)), order)
        for label, name in zip(ax.get_yticklabels(), order, strict=True):
            label.set_color(_SOFT if colors[name] == _OTHER else colors[name])
            label.set_fontweight("bold" if name not in report.baselines else "normal")
        ax.set_ylim(-0.6, len(order) - 0.3)
        ax.set_xlim(low - pad, high + pad)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color="#E6E6E6", lw=0.8)
        ax.set_xlabel(_axis_title(metric), color=_SOFT)
        tasks = max(e.tasks for e in values.values())
        among = f", {candidates(report, scenario)}" if metric.startswith("catalogue_") else ""
        _named(ax, scenario_title(scenario), "", f"{tasks:,} tasks{among}")
    return _save(figure, path)


def inner_loop(convergence: Mapping[str, Convergence], path: Path) -> bool:
    """Plot support loss, query loss and gradient norm by inner step, one colour per learner, relative to their start.

    A ring marks the number of steps in training. Returns False, and writes no file, without a learner.
    """
    if not convergence:
        return False
    figure, axes = _figure(3, 3.6)
    note = "means over validation tasks; ring: inner steps in training; a curve that leaves the panel has diverged"
    _title(figure, "Convergence of the inner loop", note)
    panels = (
        ("Support", "loss, relative to that before adaptation", "support_loss"),
        ("Query", "loss, relative to that before adaptation", "query_loss"),
        ("Inner gradient", "norm, relative to the first", "gradient_norm"),
    )
    for ax, (title, ylabel, what) in zip(axes, panels, strict=True):
        ends, highest = [], 1.0
        for k, (name, c) in enumerate(convergence.items()):
            values = np.array(getattr(c, what)) / (getattr(c, what)[0] or 1.0)
            shown = np.where(np.isfinite(values), np.clip(values, None, _DIVERGED), _DIVERGED)
            color = COLORS[k % len(COLORS)]
            ax.plot(c.steps, shown, color=color, lw=2, marker="o", ms=3)
            ax.plot(c.trained, shown[c.steps.index(c.trained)], "o", ms=10, mfc="none", mec=color, mew=1.4)
            ends.append((float(shown[-1]), name.replace(":", "\n"), color))
            highest = max(highest, float(shown.max()))
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.08 * highest)
        _named(ax, title, ylabel)
        _end_labels(ax, ends)
        ax.set_xlabel("inner steps", color=_SOFT)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _save(figure, path)


def _series(history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    rows = [
        (float(r["step"]), float(r[name])) for r in history if r.get(name) is not None and r.get("step") is not None
    ]
    return np.array([row for row in rows if np.isfinite(row).all()]).reshape(-1, 2)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the curve; the window shrinks at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _off_scale(report: Report, metric: str, means: Sequence[Mapping[str, float] | Any]) -> list[str]:
    """Baselines so much worse than all other methods that they would flatten the plot."""
    sign, hidden = (1 if higher_is_better(metric) else -1), set()
    for values in means:
        worth = {m: sign * float(values[m]) for m in report.methods if m in values}
        ordered = sorted(worth.values(), reverse=True)
        if not ordered:
            continue
        spread = ordered[0] - ordered[len(ordered) // 2]
        worst = min((v for m, v in worth.items() if m not in report.baselines), default=ordered[0])
        far = max(4 * spread, 0.1 * abs(ordered[0]), ordered[0] - worst)
        hidden |= {m for m, v in worth.items() if m in report.baselines and ordered[0] - v > far}
    return [m for m in report.methods if m in hidden]


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``panels`` panels of this height: up to 3 in one row, 4 in two rows, for a page 11 inches wide."""
    columns = panels if panels < 4 else 2 if panels == 4 else 3
    rows = -(-panels // columns)
    size = max(6.4, (4.4 if columns == 3 else 5.6) * columns), height * rows + 0.7
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[panels:]:
        ax.remove()
    axes = axes[:panels]
    for ax in axes:
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color("#BBBBBB")
        ax.grid(axis="y", color="#E6E6E6", lw=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=_SOFT, length=0, labelsize=9.5)
    _layout(figure).set(w_pad=0.12, wspace=0.05, h_pad=0.12)
    return figure, axes


def _layout(figure: Figure) -> ConstrainedLayoutEngine:
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    return engine


def _title(figure: Figure, title: str, subtitle: str) -> None:
    height = figure.get_size_inches()[1]
    _layout(figure).set(rect=(0, 0, 1, 1 - 0.68 / height))
    figure.text(0.012, 1 - 0.12 / height, title, ha="left", va="top", fontsize=14, fontweight="bold", color=_INK)
    figure.text(0.012, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9.5, color=_SOFT)


def _named(ax: Axes, title: str, ylabel: str, note: str = "") -> None:
    ax.set_title(title, loc="left", fontsize=11, color=_INK, pad=8)
    if note:
        ax.set_title(note, loc="right", fontsize=9, color=_SOFT, pad=8)
    if ylabel:
        ax.set_ylabel(ylabel, color=_SOFT)


def _end_labels(ax: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write names at the ends of the lines, inside the panel, moved apart if they would overlap."""
    low, high = ax.get_ylim()
    ordered = sorted(labels)
    half = [0.029 * (high - low) * (1 + name.count("\n")) for _, name, _ in ordered]
    places = [y for y, _, _ in ordered]
    for _ in range(200):
        places = [min(max(y, low + h), high - h) for y, h in zip(places, half, strict=True)]
        for k in range(len(places) - 1):
            lack = half[k] + half[k + 1] - (places[k + 1] - places[k])
            if lack > 1e-12:
                places[k], places[k + 1] = places[k] - lack / 2, places[k + 1] + lack / 2
    for y, (_, name, color) in zip(places, ordered, strict=True):
        weak = color == _OTHER
        ax.annotate(
            name,
            (1.0, y),
            (3, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=9 if weak else 10,
            color=_SOFT if weak else color,
            fontweight="normal" if weak or color == _BEST else "bold",
        )


def _save(figure: Figure, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
