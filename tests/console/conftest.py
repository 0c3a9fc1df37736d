"""One published version of a tiny world for the tests of the page."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.pipeline.line import publish_version
from twotower.schema import columns as c

MARKUP = "<script>document.title = 'broken'</script><b>bold</b> & more"
"""Title of the most clicked item."""


@pytest.fixture(scope="session")
def workspace(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a promoted version, in which the most clicked item has a title full of markup."""
    folder = tmp_path_factory.mktemp("console") / "workspace"
    shutil.copytree(world.workspace.path, folder)
    items = pq.read_table(folder / "items.parquet")
    clicked: Counter[str] = Counter()
    for path in (folder / "events").rglob("*.parquet"):
        events = pq.ParquetFile(path).read([c.ITEM_ID, c.OUTCOME])
        clicked.update(events.filter(pc.equal(events[c.OUTCOME], c.CLICKED))[c.ITEM_ID].to_pylist())
    [(favourite, _)] = clicked.most_common(1)
    titles = pc.if_else(pc.equal(items[c.ITEM_ID], favourite), MARKUP, items["title"])
    pq.write_table(items.set_column(items.schema.get_field_index("title"), "title", titles), folder / "items.parquet")
    publish_version(replace(world, workspace=replace(world.workspace, path=str(folder))), promoted=True)
    return folder


@pytest.fixture(scope="session")
def options(workspace: Path, as_trained: list[str]) -> list[str]:
    """The options of a command by which its configuration is that of this workspace."""
    return [*as_trained, "--set", f"workspace.path={json.dumps(str(workspace))}"]
