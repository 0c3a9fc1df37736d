"""A version with both item-to-item channels, published and asked."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.options import ItemCFOptions, SwingOptions
from twotower.channels.swing import fit_swing
from twotower.config import Settings
from twotower.config.load import as_dict, parse
from twotower.pipeline.line import open_served, publish_version
from twotower.pipeline.places import places
from twotower.publish.retrieve import retrieve_file
from twotower.samples.read import open_samples

CHANGES = [
    'models.channels=["two_tower", "swing", "item_cf"]',
    "models.swing={ neighbours = 20, alpha = 2.0, recency = 0.5 }",
    'models.item_cf={ neighbours = 30, latest = 5, interest = "weight", activity = 1.0 }',
]


def test_swing_and_item_cf_answer_as_configured(own_world: Settings, tmp_path: Path) -> None:
    settings = parse(as_dict(own_world), CHANGES)
    publish_version(settings, promoted=True)
    version, samples = open_served(settings), open_samples(places(settings).samples)
    size = len(samples.items)
    weighed = ItemCFOptions(neighbours=30, latest=5, interest="weight", activity=1.0)
    fitted = {
        "swing": fit_swing(samples.clicks, size, SwingOptions(neighbours=20, alpha=2.0, recency=0.5)),
        "item_cf": fit_item_cf(samples.clicks, size, weighed, positives=samples.positives),
    }
    queries = version.queries(np.arange(100))
    for name, channel in fitted.items():
        np.testing.assert_array_equal(
            version.channels[name].retrieve(queries, 10).rows, channel.retrieve(queries, 10).rows
        )
        out = tmp_path / "out.parquet"
        count = retrieve_file(
            version, places(settings).workspace, "all", out, k=10, channel=name, exclude="clicked"
        ).users
        table = pq.read_table(out)
        assert set(table["channel"].to_pylist()) == {name}
        assert len(set(table["user_id"].to_pylist())) > count / 3  # those who clicked at all


@pytest.mark.parametrize(
    ("change", "problem"),
    [("models.swing.alpha=0", "greater than 0"), ("models.item_cf.popularity=1.5", "less than or equal to 1")],
)
def test_options_without_a_meaning_are_refused(world: Settings, change: str, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        parse(as_dict(world), [change])
