"""Choosing settings by trials on a part of the training events, never on the test set.

Each trial is a whole training, with its own samples where a key needs them, until the metric has not risen for some
epochs. The best settings, with their number of epochs, then train on all events. Trials are kept in a journal, so that
a search that was killed or is asked for more trials goes on.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twotower.config.load import as_dict, parse
from twotower.config.settings import Settings
from twotower.datasets.validation import hold_out_validation
from twotower.evaluate.holdout import held_out, judge
from twotower.pipeline.line import build_samples, channel_of, train_from, train_model
from twotower.pipeline.places import places
from twotower.pipeline.ready import check_ready
from twotower.pipeline.recorded import fixed_by_samples
from twotower.samples.build import MADE_WITH
from twotower.samples.read import Samples, open_samples
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import MANIFEST, read_json, sha256, whole_file, write_json
from twotower.towers.two_tower import TwoTower
from twotower.train.options import Span
from twotower.train.towers import TrainReport

log = logging.getLogger(__name__)

TUNING = "tuning"
JOURNAL = "journal.log"
TRIALS = "trials.json"
EPOCHS = "epochs"
VALUES = "values"
SETTINGS = "settings"
_DECIDING = ("features", "samples", "models", "train", "tune", "evaluate")
"""Sections that make one search another."""


@dataclass(frozen=True)
class TuneReport:
    """What `twotower train --trials N` prints: the final training, and how it was chosen."""

    checkpoint: str
    rows: int
    rows_per_s: float
    loss: float
    seconds: float
    channels: dict[str, Any]
    """The other trained channels, by name, with the fields of `TrainReport`."""
    rankers: dict[str, Any]
    """The trained rankers likewise."""
    trials: int
    """Ended trials, those of earlier calls included."""
    metric: str
    value: float
    """Metric of the best trial, on the validation part."""
    best: dict[str, Any]
    """Its keys and values, `train.epochs` among them."""
    table: str
    """File with all trials."""


def tune(settings: Settings, trials: int) -> TuneReport:
    """Try the keys of `tune.space` on a validation split, and train with the best values on everything.

    The first trial is the configuration as it is. `trials` counts ended ones, those of earlier calls of the same search
    included. The table of all trials is written as JSON and as Markdown.

    Raises:
        ConfigError: Optuna is not installed, or `tune` names keys that do not exist or belong to no training.
        DataError: no trial ended well.
    """
    check_ready(settings, trained=True, trials=True)
    _check_space(settings)
    study, folder = _open_study(settings)
    validation = validation_workspace(settings, folder)
    while (done := len(_ended(study))) < trials:
        log.info("trial %d of %d", done + 1, trials)
        trial = study.ask()
        chosen = _ask(trial, settings.tune.space) if done else {}
        trial.set_user_attr(SETTINGS, chosen)
        try:
            values = _try(with_values(settings, {**chosen, "workspace.path": str(validation)}))
        except (ConfigError, DataError) as error:
            log.warning("trial %d failed: %s", trial.number, error)
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=_optuna().trial.TrialState.FAIL)
            if not chosen:
                raise
            continue
        trial.set_user_attr(VALUES, values)
        trial.set_user_attr(EPOCHS, 1 + values.index(max(values)))
        study.tell(trial, max(values))
        log.info("trial %d: %s %.4f after %d epochs with %s", trial.number, settings.tune.metric, max(values),
                 trial.user_attrs[EPOCHS], chosen or "the configuration as it is")  # fmt: skip
    rows = _table(study, settings.tune.metric)
    write_json(folder / TRIALS, rows)
    with whole_file((folder / TRIALS).with_suffix(".md")) as temporary:
        temporary.write_text(_markdown(rows), encoding="utf-8")
    best = {**rows[0]["settings"], "train.epochs": rows[0][EPOCHS]}
    log.info("best: %s", json.dumps(best))
    final = with_values(settings, best)
    build_samples(final)
    trained: TrainReport = train_model(final, asked=settings)
    return TuneReport(
        **asdict(trained), trials=len(rows), metric=settings.tune.metric, value=rows[0]["value"], best=best,
        table=str(folder / TRIALS),
    )  # fmt: skip


def validation_workspace(settings: Settings, folder: Path) -> Path:
    """A workspace of another one's training events, part of them held out; it is made only once."""
    validation = folder / "workspace"
    if not validation.exists():
        report = hold_out_validation(Path(settings.workspace.path), validation, settings.tune.holdout)
        log.info("validation: %d events to learn from, %d held out", report.events, report.holdout)
    return validation


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """A configuration with other values of some dotted keys.

    Raises:
        ConfigError: a key or value that no configuration has.

    >>> with_values(parse({}), {"train.epochs": 3, "train.loss": "bsl"}).train.epochs
    3
    """
    document = as_dict(settings)
    for key, value in values.items():
        *names, last = key.split(".")
        section = document
        for name in names:
            section = section.setdefault(name, {})
        section[last] = value
    return parse(document, where="tune.space")


def _check_space(settings: Settings) -> None:
    """Refuse keys that do not exist or that no trial could change, before the first trial."""
    for key, span in settings.tune.space.items():
        if key.partition(".")[0] not in ("features", "samples", "models", "train") or key == "train.epochs":
            raise ConfigError(
                f"tune.space: {key} is no key of features, samples, models or train"
                + ("; epochs are chosen by tune.patience" if key == "train.epochs" else "")
            )
        ends: list[Any] = span.choices or [span.low, span.high]
        for value in ends:
            with_values(settings, {key: int(value) if span.whole else value})


def _optuna() -> Any:
    try:
        import optuna  # an extra
    except ImportError:
        raise ConfigError("--trials needs Optuna: pip install 'twotower[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _open_study(settings: Settings) -> tuple[Any, Path]:
    """The study of this configuration and these events, and its folder; another configuration has another one."""
    optuna = _optuna()
    digest = identity(settings, _DECIDING)
    folder = Path(settings.workspace.path) / TUNING / digest
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=digest,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=settings.tune.seed, n_startup_trials=8),
    )
    return study, folder


def identity(settings: Settings, sections: Sequence[str]) -> str:
    """A digest of what distinguishes a search: some sections of its configuration, and its events.

    Raises:
        DataError: the workspace has no events.
    """
    workspace = Path(settings.workspace.path)
    if not (workspace / "events").is_dir():
        raise DataError(f"{workspace} is no workspace, it has no events: make one with `import` or `simulate`")
    document = {key: value for key, value in as_dict(settings).items() if key in sections}
    events = {
        str(path.relative_to(workspace)): sha256(path) for path in sorted((workspace / "events").rglob("*.parquet"))
    }
    return hashlib.sha256(json.dumps([document, events], sort_keys=True).encode()).hexdigest()[:12]


def _ask(trial: Any, space: dict[str, Span]) -> dict[str, Any]:
    """The values of a trial. In the journal lists are JSON, because Optuna keeps only single values."""
    chosen: dict[str, Any] = {}
    for key, span in sorted(space.items()):
        if span.choices is not None:
            chosen[key] = json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in span.choices]))
        elif span.whole:
            chosen[key] = trial.suggest_int(key, int(span.low or 0), int(span.high or 0), log=span.log)
        else:
            chosen[key] = trial.suggest_float(key, span.low, span.high, log=span.log)
    return chosen


def _try(settings: Settings) -> list[float]:
    """The metric after each epoch, until it has not risen for `patience` of them."""
    where = places(settings)
    samples = _samples_for(settings)
    truth = held_out(where.workspace, samples, settings.evaluate.context)
    values: list[float] = []

    def stop_early(epoch: int, model: TwoTower) -> bool:
        values.append(judge(samples, channel_of(model, samples), truth, settings.tune.metric))
        log.info("epoch %d: %s %.4f", epoch, settings.tune.metric, values[-1])
        return epoch - values.index(max(values)) > settings.tune.patience

    shutil.rmtree(where.checkpoints, ignore_errors=True)
    try:
        train_from(settings, samples, stop_early=stop_early)
    finally:
        shutil.rmtree(where.checkpoints, ignore_errors=True)
    return values


def _samples_for(settings: Settings) -> Samples:
    """The samples of a trial, built again where it needs others than the trial before."""
    where = places(settings)
    manifest = where.samples / MANIFEST
    if not manifest.exists() or read_json(manifest).get(MADE_WITH) != fixed_by_samples(settings):
        build_samples(settings)
    return open_samples(where.samples)


def _ended(study: Any) -> list[Any]:
    state = _optuna().trial.TrialState
    return [trial for trial in study.trials if trial.state in (state.COMPLETE, state.FAIL)]


def _table(study: Any, metric: str) -> list[dict[str, Any]]:
    """Trials as rows, the best first, those that failed last.

    Raises:
        DataError: all have failed.
    """
    rows = [
        {
            "trial": trial.number,
            "metric": metric,
            "value": trial.value,
            EPOCHS: trial.user_attrs.get(EPOCHS),
            "seconds": round(trial.duration.total_seconds(), 1),
            "settings": trial.user_attrs[SETTINGS],
            VALUES: trial.user_attrs.get(VALUES, []),
            "error": trial.user_attrs.get("error"),
        }
        for trial in _ended(study)
    ]
    rows.sort(key=lambda row: (row["value"] is None, -(row["value"] or 0), row["trial"]))
    if rows[0]["value"] is None:
        raise DataError(f"all {len(rows)} trials failed, the first with: {rows[0]['error']}")
    return rows


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The table of `_table`; settings that a trial did not choose are `as it is`."""
    keys = sorted({key for row in rows for key in row["settings"]})
    head = ["trial", rows[0]["metric"], "epochs", "seconds", *keys]
    table: list[list[Any]] = [head, ["---"] * len(head)]
    for row in rows:
        value = "failed" if row["value"] is None else f"{row['value']:.4f}"
        chosen = [row["settings"].get(key, "as it is") for key in keys]
        table.append([row["trial"], value, row[EPOCHS] or "", row["seconds"], *chosen])
    shown = ((f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) for cells in table)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in shown)
