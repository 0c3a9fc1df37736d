from types import SimpleNamespace

from twotower.serve.monitors import Hour, monitors


def test_figures_are_shares_of_what_the_updater_counted() -> None:
    report = {
        "recall": {1001: [3, 4], 1000: [0, 2], 1002: [0, 0]},
        "positives": 8,
        "without_user_row": 2,
        "without_item_row": 0,
        "drift": 0.5,
        "held_back": {"pair": 3},
    }
    found = monitors(SimpleNamespace(report=report, watermark_ms=7000, gated=("one",)), 9500)  # type: ignore[arg-type]
    assert found.freshness_s == 2.5
    assert found.recall_next == (Hour(3_600_000_000, 0.0, 2), Hour(3_603_600_000, 0.75, 4))
    assert (found.unknown_user_share, found.unknown_item_share) == (0.25, 0.0)
    assert (found.popularity_drift, found.gated) == (0.5, 1)
    assert found.held_back == {"pair": 3}


def test_before_the_first_delta_little_is_known() -> None:
    found = monitors(SimpleNamespace(report={"recall": {}}, watermark_ms=None, gated=()), 9500)  # type: ignore[arg-type]
    assert found == type(found)(None, (), None, None, None, 0, {})
