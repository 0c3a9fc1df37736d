from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.options import SamplesOptions
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c

TYPES: dict[str, pa.DataType] = {
    c.EVENT_SEQ: pa.int64(),
    c.REQUEST_TS_MS: pa.int64(),
    c.CLICK_TS_MS: pa.int64(),
    c.OUTCOME: pa.string(),
}
Rows = Sequence[Mapping[str, Any]]
World = Callable[..., Path]
Build = Callable[..., Samples]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A workspace with the given users, items and files of events, by path below `events/`."""

    def make(
        users: Mapping[str, Any],
        items: Mapping[str, Any],
        files: Mapping[str, Rows],
        name: str = "workspace",
        types: Mapping[str, pa.DataType] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        pq.write_table(pa.table(dict(users)), folder / "users.parquet")
        pq.write_table(pa.table(dict(items)), folder / "items.parquet")
        for path, rows in files.items():
            (folder / "events" / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(as_table(rows, types or {}), folder / "events" / path)
        return folder

    return make


def as_table(rows: Rows, types: Mapping[str, pa.DataType]) -> pa.Table:
    types = {**TYPES, **types}
    return pa.table({name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]})


@pytest.fixture
def build() -> Build:
    """The samples of a workspace, beside its tables; options are those of a section or of the function."""

    def run(workspace: Path, features: Features | None = None, **options: Any) -> Samples:
        own = {name: options.pop(name) for name in list(options) if name not in SamplesOptions.__dataclass_fields__}
        section = SamplesOptions(**{"held_out_users": 0.0, **options})
        build_samples(workspace, workspace / "samples", features or Features(), 8, section, **own)
        return open_samples(workspace / "samples")

    return run
