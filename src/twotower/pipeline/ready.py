"""Checks before anything is computed: a configuration, a workspace or a machine with which a command must fail.

Every command that samples, trains, evaluates or publishes begins with them. What depends on samples is checked when
they are opened, before the first step of training (`check_samples`).
"""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.datasets.workspace import HOLDOUT, HOLDOUT_IMPRESSIONS, ITEMS, USERS
from twotower.evaluate.held_out import read_held_out
from twotower.evaluate.holdout import check_truth
from twotower.evaluate.ranking import SHOWN
from twotower.features.feature_set import HISTORY
from twotower.features.options import Feature, Sequence
from twotower.publish.version import unavailable
from twotower.samples.spark_engine import find_java
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import TEMPORARY
from twotower.schema.tables import check_entities, require_columns
from twotower.stream.rows import read_schema

MADE = ("samples", "checkpoints", "versions")
"""Folders of a workspace that commands make."""
EXTRAS = {
    "als": ("als", ("implicit", "scipy", "threadpoolctl")),
    "swing": ("swing", ("numba",)),
    "spark": ("spark", ("pyspark", "pandas")),
    "--trials": ("tune", ("optuna",)),
}
"""By what needs it: the extra, and the modules that it installs."""


def check_ready(settings: Settings, *, trained: bool = False, evaluated: bool = False, trials: bool = False) -> None:
    """Refuse what must fail later.

    `trained`: the channels are to be trained, fitted or published. `evaluated`: something is to be judged on the
    hold-out of the workspace. `trials`: settings are to be chosen by trials.

    Raises:
        ConfigError: a value that is not available, a library that is not installed, a column that does not exist.
        DataError: a table is missing or of another form; the hold-out cannot judge; a place cannot be written.
    """
    check_available(settings)
    needed = [
        *(settings.models.channels if trained else ()),
        *(["spark"] if settings.engine.name == "spark" else ()),
        *(["--trials"] if trials else ()),
    ]
    if missing := [problem for name in needed if name in EXTRAS and (problem := _missing(name))]:
        raise ConfigError("; ".join(missing))
    if settings.engine.name == "spark":
        find_java(os.environ.get("JAVA_HOME"))
    workspace = Path(settings.workspace.path)
    _check_places(workspace)
    users, items = (_schema(workspace / name, key) for name, key in ((USERS, c.USER_ID), (ITEMS, c.ITEM_ID)))
    if problems := [*_absent(settings.features.user, users, "user"), *_absent(settings.features.item, items, "item")]:
        raise ConfigError("; ".join(problems))
    unavailable(items.empty_table())
    if evaluated:
        _check_holdout(settings, workspace)


def _missing(name: str) -> str | None:
    """What is not installed that a channel or an engine needs."""
    extra, modules = EXTRAS[name]
    absent = [module for module in modules if find_spec(module) is None]
    return f"{name} needs {', '.join(absent)}: pip install 'twotower[{extra}]'" if absent else None


def _check_places(workspace: Path) -> None:
    """Refuse a workspace that nothing can be written to.

    Raises:
        DataError: it is no folder, or cannot be written; a file stands where a folder is made.
    """
    if not workspace.is_dir():
        raise DataError(f"{workspace} is no workspace, there is no such folder: make one with `import` or `simulate`")
    try:
        with tempfile.TemporaryDirectory(dir=workspace, prefix=TEMPORARY):
            pass
    except OSError as error:
        raise DataError(f"{workspace} cannot be written: {error.strerror}") from None
    for name in MADE:
        if (workspace / name).exists() and not (workspace / name).is_dir():
            raise DataError(f"{workspace / name} is a file, where the folder of {name} is made: remove it")


def _schema(path: Path, id_column: str) -> pa.Schema:
    schema = read_schema(path)
    require_columns(schema, [id_column], path.name)
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{path} has the column {repeated[0]} more than once: give each its own name")
    return schema


def _absent(features: dict[str, Feature], schema: pa.Schema, side: str) -> Iterator[str]:
    for name, kind in features.items():
        is_history = side == "user" and name == HISTORY and isinstance(kind, Sequence)
        if name not in schema.names and not is_history:
            yield f"features.{side}.{name}: no such column; there are {', '.join(schema.names)}"


def _check_holdout(settings: Settings, workspace: Path) -> None:
    """Refuse a hold-out that cannot judge.

    Raises:
        DataError: it is not there, has no row of a user and an item of the workspace, or lacks a column.
    """
    users, items = (
        check_entities(pq.ParquetFile(workspace / name).read([key]), key, name)
        for name, key in ((USERS, c.USER_ID), (ITEMS, c.ITEM_ID))
    )
    check_truth(workspace / HOLDOUT, users.column(c.USER_ID), items.column(c.ITEM_ID))
    impressions = workspace / HOLDOUT_IMPRESSIONS
    if impressions.exists():
        read = list(settings.features.context) if settings.evaluate.context or settings.models.rankers else []
        asked = [c.USER_ID, c.REQUEST_TS_MS] if read else []
        read_held_out(impressions, [*asked, *(SHOWN if settings.models.rankers else ()), *read])
