from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.cli.line import latest_checkpoint, offline_channel, open_served, places, run_line
from twotower.config import Settings
from twotower.config.load import as_dict, parse
from twotower.models.channel import VectorChannel
from twotower.models.queries import queries_of_users
from twotower.samples.read import open_samples
from twotower.serve.request import Asked, retrieve
from twotower.serve.users import Recent


@pytest.mark.parametrize("encoder", ["attention", "transformer"])
def test_a_version_answers_as_the_trained_towers_do_whatever_encodes_histories(
    encoder: str, own_world: Settings, tmp_path: Path
) -> None:
    changes = [
        f'features.user.history.encoder="{encoder}"',
        'models.user_tower.network="dcn"',
        'models.channels=["two_tower", "mind", "new_items", "als", "mf", "same_category", "popular"]',
        "models.mf.epochs=2",
        "models.als.factors=8",
        'models.same_category.attributes=["category", "author"]',
        'models.popular={ window_days = 1, segment = "device" }',
        "train.epochs=1",
    ]
    settings = parse(as_dict(own_world), changes)
    run_line(settings, promoted=True)
    samples, version = open_samples(places(settings).samples), open_served(settings)
    rows = np.arange(60)
    queries = queries_of_users(samples.features, samples.users, samples.clicks, rows, {}, None)
    for name in ("two_tower", "mind", "mf"):
        served = version.channels[name]
        assert isinstance(served, VectorChannel)
        trained = offline_channel(samples, latest_checkpoint(settings, name), name)
        np.testing.assert_allclose(served.user_vectors(queries), trained.user_vectors(queries), atol=1e-5)
    assert version.channels["mind"].user_vectors(queries).shape == (60, 4, settings.models.dimension)  # type: ignore[attr-defined]
    assert latest_checkpoint(settings, "mf").manifest["progress"]["epoch"] == 2
    # The same user asks twice, with and without a click that the version has not seen.
    user_id = samples.users.ids[int(np.argmax(np.diff(samples.clicks.indptr)))].as_py()
    asked = Asked(20, "none", user_id)
    now = int(version.watermark_ms or 0) + 1000
    before = retrieve(version, asked, Recent(), now, 1000)
    clicked = samples.items.ids[0].as_py()
    after = retrieve(version, asked, Recent(clicks=((now, clicked),)), now, 1000)
    assert [item.item_id for item in before.items] != [item.item_id for item in after.items]
    assert before.failed_channels == []
    assert {name for item in before.items for name in item.channels} >= {"two_tower", "mind", "mf", "als", "popular"}
    new = retrieve(version, Asked(20, "none", user_id, channels=["new_items"]), Recent(), now, 1000)
    assert new.items
    found = version.items.find(pa.array([item.item_id for item in new.items]))
    assert (samples.item_positives[found] == 0).all()
    nobody = retrieve(version, Asked(20, "none"), Recent(), now, 1000)
    assert len(nobody.items) == 20
