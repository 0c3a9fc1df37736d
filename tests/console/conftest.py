"""One published version of a tiny world for the tests of the page."""

import json
from collections import Counter
from importlib.resources import as_file, files
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.config.load import load
from twotower.pipeline.line import run_line
from twotower.schema import columns as c
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

MARKUP = "<script>document.title = 'broken'</script><b>bold</b> & more"
"""Title of the most clicked item."""


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings beside the demo's that make everything small, and the workspace to use."""
    workspace = tmp_path_factory.mktemp("console") / "workspace"
    return [
        f"workspace.path={json.dumps(str(workspace))}",
        "models.dimension=8",
        "models.user_tower.layers=[16]",
        "models.item_tower.layers=[16]",
        "train.epochs=1",
        'models.channels=["two_tower", "item_cf", "popular"]',
    ]


@pytest.fixture(scope="session")
def workspace(overrides: list[str]) -> Path:
    """A workspace with a promoted version, in which the most clicked item has a title full of markup."""
    with as_file(files("twotower.cli") / "examples" / "demo.toml") as config:
        settings = load(config, overrides)
    folder = Path(settings.workspace.path)
    simulate_workspace(folder, WorldOptions(users=120, items=150, days=3, seed=0))
    items = pq.read_table(folder / "items.parquet")
    clicked: Counter[str] = Counter()
    for path in (folder / "events").rglob("*.parquet"):
        events = pq.ParquetFile(path).read([c.ITEM_ID, c.OUTCOME])
        clicked.update(events.filter(pc.equal(events[c.OUTCOME], c.CLICKED))[c.ITEM_ID].to_pylist())
    [(favourite, _)] = clicked.most_common(1)
    titles = pc.if_else(pc.equal(items[c.ITEM_ID], favourite), MARKUP, items["title"])
    pq.write_table(items.set_column(items.schema.get_field_index("title"), "title", titles), folder / "items.parquet")
    run_line(settings, promoted=True)
    return folder
