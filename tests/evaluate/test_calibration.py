import numpy as np
import pytest

from twotower.evaluate.calibration import (
    Platt,
    auc,
    calibration_error,
    fit_platt,
    log_loss,
    reliability,
    sigmoid,
)
from twotower.schema.errors import DataError


def drawn(count: int, scale: float, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds, and clicks of probability sigmoid(scale * log-odds + offset)."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-1, 2, count)
    return logits, (generator.random(count) < sigmoid(scale * logits + offset)).astype(np.float64)


@pytest.mark.parametrize(("scale", "offset"), [(0.5, 0.8), (1.0, 0.0), (2.0, -1.5)])
def test_a_known_miscalibration_is_found_and_undone(scale: float, offset: float) -> None:
    logits, clicked = drawn(100_000, scale, offset)
    platt = fit_platt(logits, clicked)
    assert platt.scale == pytest.approx(scale, rel=0.03)
    assert platt.offset == pytest.approx(offset, abs=0.05)
    before, after = (calibration_error(p, clicked) for p in (sigmoid(logits), platt.probability(logits)))
    assert after < 0.004
    if (scale, offset) != (1.0, 0.0):
        assert before > 10 * after


def test_the_scaling_of_greatest_likelihood_has_no_gradient_left() -> None:
    logits, clicked = drawn(1000, 0.7, 0.2)
    wrong = fit_platt(logits, clicked).probability(logits) - clicked
    assert abs(wrong.sum()) < 1e-6
    assert abs((wrong * logits).sum()) < 1e-6


def test_scaling_keeps_the_order_of_scores() -> None:
    logits, clicked = drawn(2000, 0.5, 1.0)
    p = fit_platt(logits, clicked).probability(logits)
    np.testing.assert_array_equal(np.argsort(p, kind="stable"), np.argsort(logits, kind="stable"))
    assert auc(p, clicked) == auc(logits, clicked)


def test_scores_that_fall_with_clicks_are_refused() -> None:
    logits, clicked = drawn(2000, -1.0, 0.0)
    with pytest.raises(DataError, match="no better than chance"):
        fit_platt(logits, clicked)


def test_scores_that_part_clicks_perfectly_still_have_a_scaling() -> None:
    platt = fit_platt(np.array([-1.0, -2.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite([platt.scale, platt.offset]).all()
    assert platt.scale > 1


def test_calibration_error_by_hand() -> None:
    # two bins: mean probability .15 where half are clicked, .85 where all are
    p, clicked = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.0, 1.0, 1.0, 1.0])
    assert calibration_error(p, clicked, bins=2) == pytest.approx((0.35 + 0.15) / 2)
    assert [row["clicked"] for row in reliability(p, clicked, bins=2)] == [0.5, 1.0]


def test_equal_probabilities_share_a_bin_whatever_their_order() -> None:
    p, clicked = np.full(100, 0.3), np.repeat([0.0, 1.0], [70, 30])
    assert calibration_error(p, clicked) == pytest.approx(0, abs=1e-12)
    assert len(reliability(p, clicked)) == 1


def test_auc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(1)
    scores, clicked = generator.integers(8, size=60).astype(float), (generator.random(60) < 0.4).astype(float)
    ones, others = scores[clicked == 1], scores[clicked == 0]
    pairs = (ones[:, None] > others) + 0.5 * (ones[:, None] == others)
    assert auc(scores, clicked) == pytest.approx(pairs.mean())
    assert np.isnan(auc(scores, np.ones(60)))


def test_log_loss_by_hand() -> None:
    assert log_loss(np.array([0.5, 0.25]), np.array([1.0, 0.0])) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)


def test_great_log_odds_do_not_overflow() -> None:
    with np.errstate(all="raise"):
        assert Platt(1.0, 0.0).probability(np.array([-600.0, 600.0])).tolist() == [pytest.approx(0, abs=1e-200), 1.0]
