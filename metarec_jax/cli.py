"""The command line, ``metarec``. Only this module imports tyro; commands import jax themselves, to keep --help fast."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from metarec_jax import files, signals
from metarec_jax.cpu import missing_platform, tune_cpu
from metarec_jax.experiment import config
from metarec_jax.learners import registry

_SECTIONS: dict[str, Any] = {**typing.get_type_hints(config.Config), "learner": config.LearnerFlags}
_LEARNERS = "; ".join(
    f"{', '.join(name for name, row in registry.ROWS.items() if row.family == family)} ({meaning})"
    for family, meaning in registry.FAMILIES.items()
)


def _sections() -> type:
    """A dataclass of all options of a run, grouped as `config.Config`, with its names, defaults and help."""
    groups: list[tuple[str, Any, Any]] = []
    for name, section in _SECTIONS.items():
        hints = typing.get_type_hints(section)
        fields: list[tuple[str, Any, Any]] = []
        for f in dataclasses.fields(section):
            kind = hints[f.name]
            if f.metadata["flag"] == "data":
                kind = Annotated[kind, tyro.conf.Positional]
            text = {
                str: "TEXT",
                str | None: "TEXT",
                int | None: "INT",
                float | None: "FLOAT",
                tuple[str, ...] | None: "NAME [NAME ...]",
                tuple[int, int] | None: "INT INT",
            }.get(hints[f.name])
            text = {"data": "DATA", "learner": "NAME[:OPTION=VALUE...]"}.get(f.metadata["flag"], text)
            hint = "" if f.default in (None, (), True) else None
            about = f.metadata["help"].replace("LEARNERS", _LEARNERS)
            about = f"do not {about}" if f.default is True else about  # the flag is --no-...
            kind = Annotated[kind, tyro.conf.arg(help=about, metavar=text, help_behavior_hint=hint)]
            fields.append((f.metadata["flag"] or f.name, kind, dataclasses.field(default=f.default)))
        group = dataclasses.make_dataclass(name, fields)
        group.__doc__ = f"{section.__doc__}"
        groups.append((name, group, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Options", groups)


Options: Any = _sections()


def _section(options: Any, name: str) -> Any:
    fields = dataclasses.fields(_SECTIONS[name])
    return _SECTIONS[name](**{f.name: getattr(getattr(options, name), f.metadata["flag"] or f.name) for f in fields})


def configured(options: Any, *, learner: bool = True) -> config.Config:
    """The configuration of the options; without ``learner``, the flags of learners are ignored."""
    parts = {name: _section(options, name) for name in _SECTIONS}
    flags = parts.pop("learner")
    chosen = config.learner_of(flags.name, config.flags_given(flags)) if learner else config.LearnerConfig()
    return config.Config(**parts, learner=chosen)


RunDir = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="a run directory, such as runs/ml-1m")]
DataDir = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="PATH",
        help_behavior_hint="",
        help="cache of named data sets; default: METAREC_DATA_DIR, or the user's cache",
    ),
]
LikedFrom = Annotated[
    float | None,
    tyro.conf.arg(
        metavar="RATING",
        help_behavior_hint="",
        help="lowest rating that counts as relevant in rankings; default: three quarters of the scale (4 of 5), or "
        "about the upper quartile if few or nearly all ratings reach that",
    ),
]
Json = Annotated[bool, tyro.conf.arg(help="print the results as one JSON object, on the last line")]


def fit(
    options: Any,
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="", help="run directory; default: runs/NAME")
    ] = None,
    fresh: Annotated[bool, tyro.conf.arg(help="start over, and discard what the run directory holds")] = False,
    evaluate: Annotated[
        bool,
        tyro.conf.arg(
            help="train only, without a comparison with the baselines and without a report", help_behavior_hint=""
        ),
    ] = True,
    data_dir: DataDir = None,
    mesh: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="SIZES",
            help_behavior_hint="",
            help="devices to use, as data=4,model=2: 4 groups of 2 devices share the tasks, and the 2 devices of a "
            "group shard the rows of large tables; default: all devices, with tables sharded over all. Without "
            "accelerators, that many CPU devices are created",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="HOST:PORT",
            help_behavior_hint="",
            help="multi-process: address of process 0, or auto; not needed under srun and mpirun",
        ),
    ] = None,
    num_processes: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="", help="multi-process: number of processes")
    ] = None,
    process_id: Annotated[
        int | None,
        tyro.conf.arg(metavar="INT", help_behavior_hint="", help="multi-process: index of this process, from 0"),
    ] = None,
    json: Json = False,
) -> int:
    """Meta-train a recommender, compare it with baselines and write a report. The same command resumes a run.

    For example:

      metarec fit ml-1m
      metarec fit ratings.csv --user-col uid --item-features movies.csv
      metarec fit ml-1m --learner maml --inner-steps 5 --out runs/maml
      metarec fit ml-1m --mesh data=2
      srun -N 4 --ntasks-per-node 1 metarec fit ratings.parquet
    """
    from metarec_jax.commands import fit

    return fit.fit(
        configured(options),
        out=out,
        fresh=fresh,
        evaluate=evaluate,
        data_dir=data_dir,
        as_json=json,
        devices=fit.Devices(mesh, coordinator, num_processes, process_id),
    )


def evaluate(
    run: RunDir,
    seeds: Annotated[int, tyro.conf.arg(help="random draws of support and query to average over")] = 1,
    max_users: Annotated[
        int, tyro.conf.arg(help="maximum number of test users per scenario; more are sampled down")
    ] = 1000,
    liked_from: LikedFrom = None,
    max_history: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="INT",
            help_behavior_hint="",
            help="maximum number of ratings to adapt on per user; default: as in the run",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Evaluate a trained run and the baselines on held-out users and items; write report.md and report.html.

    For example:

      metarec evaluate runs/ml-1m
      metarec evaluate runs/ml-1m --seeds 5 --json
    """
    from metarec_jax.commands import evaluate

    return evaluate.evaluate(
        run, seeds=seeds, max_users=max_users, liked_from=liked_from, max_history=max_history, as_json=json
    )


def recommend(
    run: RunDir,
    rate: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(
            metavar="ITEM=RATING",
            help="a rating of the new user, of an item by its id or title; may be repeated. If several items share a "
            "title, use the id",
        ),
    ] = (),
    user: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(
            metavar="FEATURE=VALUE",
            help="a feature of the new user, such as age=25, in the units of the data; may be repeated. Several values "
            "of a feature are separated by |, as in War|Drama",
        ),
    ] = (),
    history: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="", help="table of new users and their ratings")
    ] = None,
    user_features: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="", help="table of user features, one row per new user"),
    ] = None,
    user_col: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="TEXT",
            help_behavior_hint="",
            help="column of user ids in these tables; default: as in the data of the run, or a usual name",
        ),
    ] = None,
    item_col: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="", help="column of item ids or titles")
    ] = None,
    rating_col: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="", help="column of ratings")
    ] = None,
    timestamp_col: Annotated[
        str | None,
        tyro.conf.arg(metavar="TEXT", help_behavior_hint="", help="column of timestamps, by which rows are ordered"),
    ] = None,
    top: Annotated[int, tyro.conf.arg(aliases=["-n"], help="number of items to recommend")] = 10,
    by: Annotated[
        Literal["list", "rating"],
        tyro.conf.arg(
            help="order of the items: list, by what the user may like; rating, by the predicted rating",
        ),
    ] = "list",
    only: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="PATH", help_behavior_hint="", help="file of ids or titles, one per line: recommend only these"
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="", help="file of ids or titles never to recommend"),
    ] = None,
    where: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(
            metavar="FEATURE=VALUE",
            help="recommend only items with this feature, such as genre=Comedy; several values are separated by |, "
            "several features all apply",
        ),
    ] = (),
    min_ratings: Annotated[int, tyro.conf.arg(help="recommend only items with as many ratings in the data")] = 0,
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="PATH",
            help_behavior_hint="",
            help="write a file (.csv, .json, .jsonl or .parquet) instead of printing",
        ),
    ] = None,
    why: Annotated[
        bool, tyro.conf.arg(help="do not list the feedback that most changed each score", help_behavior_hint="")
    ] = True,
    json: Json = False,
) -> int:
    """Recommend items to new users, from their ratings of a few items.

    For example:

      metarec recommend runs/ml-1m --rate "Toy Story (1995)=5" --rate "Heat (1995)=2" -n 10
      metarec recommend runs/ml-1m --user age=25 --user gender=F
      metarec recommend runs/ml-1m --history new_users.csv -n 10 --out recs.csv
    """
    from metarec_jax.commands import recommend

    return recommend.recommend(
        run,
        rate=rate,
        user=user,
        history=history,
        user_features=user_features,
        columns={"user": user_col, "item": item_col, "rating": rating_col, "timestamp": timestamp_col},
        top=top,
        by=by,
        filters=recommend.Filters(only, exclude, where, min_ratings),
        out=out,
        why=why,
        as_json=json,
    )


def data(options: Any, data_dir: DataDir = None, json: Json = False) -> int:
    """Describe a data set: counts, density, ratings, cold-start statistics, and rows dropped on reading.

    For example:

      metarec data ml-1m
      metarec data ratings.csv --user-col uid --json
    """
    from metarec_jax.commands import data

    section = config.DataConfig
    values = {f.name: getattr(options, f.metadata["flag"] or f.name) for f in dataclasses.fields(section)}
    return data.data(section(**values), data_dir=data_dir, as_json=json)


def compare(
    options: Any,
    learners: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME [NAME ...]",
            help_behavior_hint="",
            help="meta-learners, separated by spaces or commas; options follow the name, as maml:inner_steps=1; "
            f"default: {', '.join(name for name, row in registry.ROWS.items() if row.compared)}, if they suit the data",
        ),
    ] = None,
    baselines: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME [NAME ...]",
            help_behavior_hint="",
            help="baselines besides the trivial ones; default: all closed-form baselines that suit the data. Run only "
            "if named: sgd_mf, factorization_machine, two_tower, deepfm, trained for as many steps as the learners",
        ),
    ] = None,
    seeds: Annotated[
        int, tyro.conf.arg(help="random splits of the users; each is trained and evaluated separately")
    ] = 1,
    max_users: Annotated[
        int, tyro.conf.arg(help="maximum number of test users per scenario; more are sampled down")
    ] = 1000,
    support_curve: Annotated[
        tuple[int, ...], tyro.conf.arg(metavar="[INT ...]", help="support sizes to evaluate as well")
    ] = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50),
    recommend: Annotated[bool, tyro.conf.arg(help="recommend a method, with the reason")] = False,
    max_ms: Annotated[
        float | None,
        tyro.conf.arg(
            metavar="MS", help_behavior_hint="", help="with --recommend: maximum latency per user, in milliseconds"
        ),
    ] = None,
    max_mib: Annotated[
        float | None,
        tyro.conf.arg(
            metavar="MIB", help_behavior_hint="", help="with --recommend: maximum size of the parameters, in MiB"
        ),
    ] = None,
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="", help="folder; default: runs/compare-NAME")
    ] = None,
    fresh: Annotated[bool, tyro.conf.arg(help="measure everything again, and discard what the folder holds")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> int:
    """Compare many methods on one data set over several seeds in one table, and recommend one of them.

    The result of each method and seed is kept, so that an interrupted or extended comparison continues.

    For example:

      metarec compare ml-100k --learners ridge,maml --seeds 3
      metarec compare ratings.csv --user-col uid --recommend --max-ms 1
      metarec compare ml-100k --learners maml maml:first_order=true --baselines als deepfm
    """
    from metarec_jax.experiment.compare import run as compare

    return compare.compare(
        configured(options, learner=False),
        flags=config.flags_given(_section(options, "learner")),
        learners=learners,
        baselines=baselines,
        seeds=seeds,
        max_users=max_users,
        support_curve=support_curve,
        recommend=recommend,
        max_ms=max_ms,
        max_mib=max_mib,
        out=out,
        fresh=fresh,
        data_dir=data_dir,
        as_json=json,
    )


# The class of the options is generated, so these annotations are set here.
_FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.arg(name=""))
fit.__annotations__["options"] = Annotated[(Options, *_FLAT)]  # type: ignore[misc]
compare.__annotations__["options"] = Annotated[(Options, *_FLAT)]  # type: ignore[misc]
data.__annotations__["options"] = Annotated[(typing.get_type_hints(Options)["data"], *_FLAT)]  # type: ignore[misc]


def prepare(
    data: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="DATA [DATA ...]",
            help_behavior_hint="",
            help="CSV or Parquet files, folders or glob patterns that together hold one table",
        ),
    ],
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="", help="folder of the store; default: stores/NAME"),
    ] = None,
    user_col: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="TEXT", help_behavior_hint="", help="column of user ids; default: detected by its usual names"
        ),
    ] = None,
    item_col: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="", help="column of item ids")
    ] = None,
    rating_col: Annotated[
        str | None,
        tyro.conf.arg(metavar="TEXT", help_behavior_hint="", help="column of ratings; '' for clicks, without ratings"),
    ] = None,
    timestamp_col: Annotated[
        str | None,
        tyro.conf.arg(metavar="TEXT", help_behavior_hint="", help="column of timestamps; '' for data without times"),
    ] = None,
    implicit: Annotated[bool, tyro.conf.arg(help="ignore ratings: every row is a positive")] = False,
    partitions: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="INT", help_behavior_hint="", help="files of histories; default: one per 5 million interactions"
        ),
    ] = None,
    memory_limit: Annotated[
        str, tyro.conf.arg(metavar="SIZE", help="memory for sorting; the process uses about 1 GB more")
    ] = "2GB",
    fresh: Annotated[bool, tyro.conf.arg(help="replace an existing store")] = False,
    json: Json = False,
) -> int:
    """Convert a table that is larger than memory to a task store; metarec fit STORE then streams it.

    For example:

      metarec prepare ratings.parquet --out stores/ratings
      metarec prepare logs/2024-*.csv.gz --user-col uid --memory-limit 8GB
    """
    from metarec_jax.commands import prepare

    return prepare.prepare(
        data,
        out=out,
        user_col=user_col,
        item_col=item_col,
        rating_col=rating_col,
        timestamp_col=timestamp_col,
        implicit=implicit,
        partitions=partitions,
        memory=memory_limit,
        fresh=fresh,
        as_json=json,
    )


def learners(
    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="", help="learners to describe; default: all"),
    ] = (),
    json: Json = False,
) -> int:
    """List the meta-learners: the feedback each requires, its source paper, and its options with their defaults.

    For example:

      metarec learners
      metarec learners leo maml
    """
    from metarec_jax.commands import learners

    return learners.learners(names, as_json=json)


def doctor(data_dir: DataDir = None) -> int:
    """Show versions, devices, threads, caches and disk space, and which optional packages are missing.

    For example:

      metarec doctor
    """
    from metarec_jax.commands import doctor

    return doctor.doctor(data_dir=data_dir)


_COMMANDS: dict[str, Callable[..., int]] = {
    "fit": fit,
    "evaluate": evaluate,
    "recommend": recommend,
    "compare": compare,
    "data": data,
    "prepare": prepare,
    "learners": learners,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C (SIGINT), 143 after SIGTERM.

    With ``--debug`` anywhere among the arguments, or METAREC_DEBUG=1, an error is printed with its traceback.
    """
    try:
        with signals.heard():
            return _command(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, signals.Interrupted) else signal.SIGINT
        signals.print_end(number)
        return 128 + number


def _command(args: Sequence[str]) -> int:
    debug = "--debug" in args or os.environ.get("METAREC_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    tune_cpu()
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="metarec",
            description="Recommend items to new users, from a table of interactions. Start with: metarec fit ml-1m\n\n"
            "With --debug, or METAREC_DEBUG=1, every command also prints the traceback of an error.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _refusal(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return 2


def _refusal(error: Exception) -> str | None:
    """The message of an error that the user can correct; None for a fault of this program."""
    from metarec_jax.core import MetarecError

    if isinstance(error, MetarecError):
        return str(error)
    if isinstance(error, OSError | MemoryError):
        return files.cause(error)
    return missing_platform()


def run() -> None:
    """The program `metarec`.

    A failed process of a multi-process run exits at once, since the normal exit would wait for the others. So does a
    process that a signal ended, since the normal exit would wait for threads that still compute.
    """
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status in signals.STATUSES:
        sys.stdout.flush()
        os._exit(status)
    if status and "jax" in sys.modules:
        from metarec_jax.training.devices import processes

        processes.leave(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
