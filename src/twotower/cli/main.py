"""`twotower`: the commands.

The last line on stdout is one JSON object; progress goes to stderr. Exit code 0, 1 (failed) or 2 (usage). A command
imports its stages when it runs: torch, Ibis and ONNX Runtime take seconds to load, and `--help` should not.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer

from twotower.config.load import load
from twotower.config.settings import Settings
from twotower.datasets.options import EventTime, ImportOptions, Unit
from twotower.schema.errors import ConfigError, DataError, TwotowerError
from twotower.worlds.options import WorldOptions

app = typer.Typer(
    help="Two-tower retrieval, from click logs to a served candidate list.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
versions_app = typer.Typer(help="List, check, promote and roll back published versions.", no_args_is_help=True)
app.add_typer(versions_app, name="versions")
export_app = typer.Typer(help="Vectors and towers of a version for other systems.", no_args_is_help=True)
app.add_typer(export_app, name="export")
lab_app = typer.Typer(help="Experiments that test the claims behind the system.", no_args_is_help=True)
app.add_typer(lab_app, name="lab")
update_app = typer.Typer(help="Learn from what happened since: through the day, or a whole day.", no_args_is_help=True)
app.add_typer(update_app, name="update")

ConfigFile = Annotated[
    Path | None,
    typer.Option("-c", "--config", help="Configuration (TOML), or the name of an example; absent = the defaults."),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
UserColumn = Annotated[str | None, typer.Option(help="The column of user ids.")]
ItemColumn = Annotated[str | None, typer.Option(help="The column of item ids.")]
TimeColumn = Annotated[str | None, typer.Option(help="The column of times, if it is not ts_ms.")]
TimeUnit = Annotated[
    Unit | None, typer.Option("--unit", "--time-unit", help="Unit of a time column of numbers; absent = ms.")
]
IndexKind = Literal["milvus", "pgvector"]
Promote = Annotated[bool, typer.Option("--promote/--no-promote", help="Serve the version at once.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"twotower {installed_version('twotower')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Two-tower retrieval, from click logs to a served candidate list."""


def answer(document: Any) -> None:
    """Print the JSON result, such as a report, as the last line of stdout."""
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY).decode() + "\n")
    sys.stdout.flush()


@contextmanager
def command() -> Iterator[None]:
    """Set up logging, and turn our errors into a sentence on stderr and an exit code."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it would tell of every request
    try:
        yield
    except TwotowerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(1) from None


def stage(run: Callable[[Settings], Any], config: Path | None, overrides: list[str] | None) -> None:
    """Load the configuration, run a stage, print its report."""
    with command():
        answer(run(load(config, overrides or [])))


DATASETS_HELP = (
    "interactions (your own), or a public data set: movielens-100k, movielens-1m, movielens-25m, movielens-32m, "
    "amazon-reviews-2023, kuairand, kuairec, globo, mind, taobao, yelp, gowalla, retailrocket, lastfm-2k, lastfm-1k"
)


@app.command()
def init(
    files: Annotated[list[Path], typer.Argument(help="Clicks, and where you have them users and items; or folders.")],
    out: Annotated[Path, typer.Option(help="Folder for twotower.toml and the workspace.")],
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    unit: TimeUnit = None,
    timezone: Annotated[str, typer.Option(help="Of times that do not say a zone, such as Asia/Shanghai.")] = "UTC",
) -> None:
    """Look at your files, say what each column is, and write a configuration for `import -c`."""
    from twotower.cli.init import init_files
    from twotower.datasets.propose import Hints

    with command():
        answer(init_files(files, out, Hints(user_column, item_column, time_column, unit, timezone)))


@app.command("import")
def import_(
    dataset: Annotated[str | None, typer.Argument(help=f"{DATASETS_HELP}; not with -c")] = None,
    source: Annotated[Path | None, typer.Argument(help="The data set's own folder, archive or file.")] = None,
    out: Annotated[Path | None, typer.Option(help="The workspace to make; with -c, its workspace.path.")] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="A file with a section [import].")] = None,
    holdout: Annotated[
        str | None, typer.Option(help="time:Q, since:DATE, leave-one-out, pause:DAYS or, without time, random:SHARE")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="A file of held-out positives.")] = None,
    positive: Annotated[str | None, typer.Option(help="all (the default), or the lowest rating that counts.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day to read, YYYY-MM-DD.")] = None,
    users: Annotated[Path | None, typer.Option(help="interactions: a table of users.")] = None,
    items: Annotated[Path | None, typer.Option(help="interactions: a table of items.")] = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    unit: TimeUnit = None,
    timezone: Annotated[str | None, typer.Option(help="-c: zone of times that do not say one.")] = None,
    without_time: Annotated[
        bool, typer.Option("--without-time", help="interactions: events have no time, whatever a column looks like.")
    ] = False,
) -> None:
    """Make a workspace out of a public data set or of your own files."""
    from twotower.cli.init import import_configured
    from twotower.datasets.files import Overrides as ImportOverrides
    from twotower.datasets.importers import import_dataset
    from twotower.datasets.workspace import as_text

    with command():
        if config is not None:
            if dataset is not None or any((test, until, users, items, without_time)):
                raise ConfigError(
                    "-c brings the files of its section [import]: give no data set, --test, --until, --users, --items "
                    "or --without-time beside it"
                )
            said = ImportOverrides(user_column, item_column, time_column, unit, timezone, positive, holdout)
            report = import_configured(config, out, said)
        else:
            if dataset is None or source is None or out is None:
                raise ConfigError("give a data set, its folder and --out, or -c FILE (`twotower init` writes one)")
            if user_column or item_column or timezone:
                raise ConfigError("--user-column, --item-column and --timezone go with -c FILE")
            options = ImportOptions(
                holdout=holdout,
                test=test,
                positive=positive or "all",
                until=until,
                users=users,
                items=items,
                event_time=EventTime(time_column, unit or "ms", without_time),
            )
            report = import_dataset(dataset, source, out, options)
        typer.echo(as_text(report), err=True)
        answer(report)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="The workspace to make.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = WorldOptions.users,
    items: Annotated[int, typer.Option(help="Number of items.")] = WorldOptions.items,
    days: Annotated[int, typer.Option(help="Number of days; the last is held out.")] = WorldOptions.days,
    seed: Annotated[int, typer.Option(help="The same seed gives the same world.")] = WorldOptions.seed,
    like: Annotated[str, typer.Option(help="default, or near to a real log: kuairand, globo.")] = WorldOptions.like,
) -> None:
    """Make a workspace out of a simulated world."""
    from twotower.worlds.simulate import simulate_workspace

    with command():
        answer(simulate_workspace(out, WorldOptions(users=users, items=items, days=days, seed=seed, like=like)))


@app.command()
def samples(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Build positives, histories, counts and encoded features from a workspace."""
    from twotower.pipeline.line import build_samples

    stage(build_samples, config, overrides)


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Choose settings by this many trials first.")] = None,
) -> None:
    """Train the two towers; a killed run goes on from its last checkpoint."""
    from twotower.pipeline.line import train_model
    from twotower.pipeline.tune import tune

    stage(train_model if trials is None else lambda settings: tune(settings, trials), config, overrides)


@app.command()
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    channels: Annotated[bool, typer.Option("--channels", help="All channels, what each adds, and the fused list.")] = (
        False
    ),
) -> None:
    """Judge the latest checkpoint on the hold-out, beside popularity and ItemCF."""
    from twotower.pipeline.line import evaluate_channels_of, evaluate_model

    stage(evaluate_channels_of if channels else evaluate_model, config, overrides)


@app.command()
def fuse(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Choose how channels become one list, on a validation split of the training events."""
    from twotower.pipeline.fuse import fuse as choose

    stage(choose, config, overrides)


@app.command()
def publish(config: ConfigFile = None, overrides: Overrides = None, promote: Promote = True) -> None:
    """Make a version out of the latest checkpoint."""
    from twotower.pipeline.line import publish_version

    stage(lambda settings: publish_version(settings, promoted=promote), config, overrides)


@app.command()
def run(config: ConfigFile = None, overrides: Overrides = None, promote: Promote = True) -> None:
    """Samples, train, evaluate, publish: everything at once."""
    from twotower.pipeline.line import run_line

    stage(lambda settings: run_line(settings, promoted=promote), config, overrides)


@app.command()
def retrieve(
    out: Annotated[Path, typer.Option(help="The file to write: .parquet, .csv or .jsonl.")],
    users: Annotated[str, typer.Option(help="A file with user_id (.parquet, .csv or .jsonl), or all.")] = "all",
    k: Annotated[int, typer.Option(help="Items of each user.")] = 50,
    channel: Annotated[str, typer.Option(help="A channel of the version, or fused.")] = "fused",
    exclude: Annotated[str, typer.Option(help="clicked, impressed or none")] = "clicked",
    version: Annotated[str | None, typer.Option(help="A version; absent = the served one.")] = None,
    no_deltas: Annotated[
        bool,
        typer.Option("--no-deltas", help="The version alone: without what was learned, put or deleted since."),
    ] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write recommendations for many users."""
    from twotower.pipeline.line import open_served
    from twotower.pipeline.places import places
    from twotower.pipeline.updating import open_as_served
    from twotower.publish.retrieve import check_retrieval, retrieve_file

    def write(settings: Settings) -> dict[str, Any]:
        check_retrieval(users, k, out, exclude)
        served = open_served(settings, version) if no_deltas else open_as_served(settings, version)
        workspace = places(settings).workspace
        report = retrieve_file(served, workspace, users, out, k=k, channel=channel, exclude=exclude)
        source = {"version": served.id, "delta_seq": served.delta_seq, "channel": channel}
        return {"out": str(out), **asdict(report), **source}

    stage(write, config, overrides)


VectorsFile = Annotated[Path, typer.Option(help="The file to write: .parquet, .jsonl, .csv or .npy.")]
VectorChannelName = Annotated[str, typer.Option("--channel", help="A channel with vectors: two_tower, mf or mind.")]
VersionName = Annotated[str | None, typer.Option("--version", help="A version; absent = the served one.")]


@export_app.command("items")
def export_items(
    out: VectorsFile,
    channel: VectorChannelName = "two_tower",
    version: VersionName = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write the vectors of all items that can be retrieved."""
    from twotower.pipeline.versions import export_vectors, open_version

    def write(settings: Settings) -> dict[str, Any]:
        return export_vectors(lambda: open_version(settings, version), out, channel)

    stage(write, config, overrides)


@export_app.command("users")
def export_users(
    out: VectorsFile,
    users: Annotated[str, typer.Option(help="A file with user_id (.parquet, .csv or .jsonl), or all.")] = "all",
    channel: VectorChannelName = "two_tower",
    version: VersionName = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write the vectors of users."""
    from twotower.pipeline.versions import export_vectors, open_version

    def write(settings: Settings) -> dict[str, Any]:
        return export_vectors(lambda: open_version(settings, version), out, channel, users)

    stage(write, config, overrides)


@export_app.command("towers")
def export_towers(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    channel: VectorChannelName = "two_tower",
    version: VersionName = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write both towers into a folder that computes vectors from raw features without PyTorch."""
    from twotower.pipeline.versions import open_version

    stage(lambda settings: asdict(open_version(settings, version).export_towers(out, channel)), config, overrides)


@versions_app.command("list")
def versions_list(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """All versions, and which one is served."""
    from twotower.pipeline.places import places
    from twotower.publish.publish import current, list_versions

    def listed(settings: Settings) -> dict[str, Any]:
        folder = places(settings).versions
        if not folder.parent.is_dir():
            raise DataError(f"{folder.parent} is no workspace: make one with `twotower import` or `twotower simulate`")
        return {"current": current(folder), "versions": list_versions(folder)}

    stage(listed, config, overrides)


@versions_app.command("verify")
def versions_verify(
    version: Annotated[str | None, typer.Argument()] = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """Check the files of a version and of its deltas, and replay its golden queries."""
    from twotower.pipeline.places import places
    from twotower.publish.delta import verify_chain
    from twotower.publish.publish import current_path, existing_path, verify

    with command():
        where = places(load(config, overrides or []))
        path = existing_path(where.versions, version) if version else current_path(where.versions)
        problems = verify(path) or verify_chain(where.deltas, path)
        answer({"version": path.name, "ok": not problems, "problems": problems})
        if problems:
            raise typer.Exit(1)


@versions_app.command("promote")
def versions_promote(version: str, config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Serve a version, after checking it."""
    from twotower.pipeline.places import places
    from twotower.publish.publish import promote

    def promoted(settings: Settings) -> dict[str, Any]:
        promote(places(settings).versions, version)
        return {"current": version}

    stage(promoted, config, overrides)


@versions_app.command("rollback")
def versions_rollback(
    version: Annotated[str | None, typer.Argument()] = None, config: ConfigFile = None, overrides: Overrides = None
) -> None:
    """Serve an earlier version again: the given one, or the parent of the served one."""
    from twotower.pipeline.places import places
    from twotower.publish.publish import roll_back

    stage(lambda settings: {"current": roll_back(places(settings).versions, version)}, config, overrides)


@app.command()
def prune(
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Also remove versions: all but this many, the served one and its parent."),
    ] = None,
    dry_run: DryRun = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Drop the collections of a vector database that no version names; with --keep, remove old versions first."""
    from twotower.pipeline.places import places
    from twotower.publish.prune import prune as prune_versions

    def pruned(settings: Settings) -> dict[str, Any]:
        where = places(settings)
        return asdict(prune_versions(where.versions, where.deltas, settings.index, keep, dry_run=dry_run))

    stage(pruned, config, overrides)


@app.command()
def doctor(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Say what is installed, what this machine can do, and whether what the configuration names answers."""
    from rich.console import Console

    from twotower.pipeline.doctor import as_table, examine

    with command():
        report = examine(load(config, overrides or []))
        Console(stderr=True).print(as_table(report))
        for problem in report.problems:
            typer.echo(f"error: {problem}", err=True)
        answer(asdict(report))
        if not report.ok:
            raise typer.Exit(1)


@app.command()
def serve(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Serve the promoted version over HTTP; the JSON line comes when it is ready."""
    from twotower.pipeline.serving import serve as serve_settings

    with command():
        serve_settings(load(config, overrides or []), answer)


@app.command()
def visit(
    url: Annotated[str, typer.Option(help="Of the running server.")],
    day: Annotated[int, typer.Option(help="Of the world, from 0; it may lie after the simulated log.")],
    requests: Annotated[int | None, typer.Option(help="So many requests only; absent = all of the day.")] = None,
    page: Annotated[int, typer.Option(help="Items of a page.")] = 8,
    put: Annotated[bool, typer.Option("--put", help="Put the day's new items to the server first.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Let the users of a simulated world meet a running server for a day: they ask, see pages and click."""
    from twotower.cli.visit import visit_server

    stage(lambda settings: visit_server(settings, url, day, requests, page, put), config, overrides)


@app.command()
def join(
    config: ConfigFile = None,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on for ever; a signal ends it.")] = False,
    flush: Annotated[
        bool, typer.Option("--flush", help="At the end, close windows that are still open: no more clicks will come.")
    ] = False,
    share: Annotated[str, typer.Option(help="K/N: the K-th of N joiners, each has every N-th partition.")] = "1/1",
) -> None:
    """Join the event log into TFRecord shards and daily partitions."""
    from twotower.pipeline.streaming import join_log

    stage(lambda settings: join_log(settings, follow=follow, flush=flush, share=share), config, overrides)


@update_app.command("incremental")
def update_incremental(
    config: ConfigFile = None,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on for ever; a signal ends it.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Learn ID embeddings from the joined samples since the served version, in deltas that servers take up."""
    from twotower.pipeline.updating import learn

    stage(lambda settings: learn(settings, follow=follow, dry_run=dry_run), config, overrides)


@update_app.command("full")
def update_full(config: ConfigFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Learn every whole day since, from yesterday's full parameters; publish and promote with what came after it."""
    from twotower.pipeline.full import update_full as run_full

    stage(lambda settings: run_full(settings, dry_run=dry_run), config, overrides)


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Folder of a public data set; absent = a simulated world.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the workspace.")] = Path("demo"),
    check: Annotated[bool, typer.Option("--check", help="Ask, click, ask again, and end.")] = False,
    index: Annotated[
        IndexKind | None, typer.Option(help="Keep item vectors in a database, which is started here.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """The whole line on a simulated world, ending in a running server and a page."""
    from twotower.cli.databases import database
    from twotower.cli.demo import demo as run_demo

    with command(), ExitStack() as started:
        options = overrides or []
        if index is not None:
            url = started.enter_context(database(index, out / index))
            options = [f'index.kind="{index}"', f"index.url={json.dumps(url)}", *options]
        run_demo(data, out, options, check, answer)


@lab_app.command("list")
def lab_list() -> None:
    """All experiments, with their arms and claims."""
    with command():
        answer({"experiments": _lab().listed()})


@lab_app.command("run")
def lab_run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Experiments, or all.")],
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds of other experiments stays.")],
    seeds: Annotated[int | None, typer.Option(help="Seeds of each data set; absent = its own number.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny worlds, one seed: to see that everything runs.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of real logs; absent = $TWOTOWER_DATA, else ../shared/data.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes beside each other.")] = os.cpu_count() or 1,
) -> None:
    """Run experiments; an interrupted run goes on where it was."""
    with command():
        answer(_lab().run(names, out, seeds=seeds, smoke=smoke, data=data, jobs=jobs))


@lab_app.command("report")
def lab_report(out: Annotated[Path, typer.Option(help="Folder of results.")]) -> None:
    """Write the page of all results that a folder holds, without running anything."""
    with command():
        answer(_lab().write_report(out))


def _lab() -> Any:
    """The lab, whose libraries are an extra.

    Raises:
        ConfigError: they are not installed.
    """
    if missing := [name for name in ("jinja2", "matplotlib", "scipy") if find_spec(name) is None]:
        raise ConfigError(f"the lab needs {' and '.join(missing)}: pip install 'twotower[lab]'")
    from twotower_lab import run

    return run


def main() -> None:
    """Run the command line; wrong usage exits with 2. SIGTERM ends a command like Ctrl-C, so that it cleans up.

    Threads that wait for each other spin for a short while and then sleep. Spinning for long, as by default, they keep
    the cores of a busy machine from those that they wait for: training then takes many times as long. torch reads this
    when it loads.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
