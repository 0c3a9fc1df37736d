"""How well the updater learns: the figures of its reports, for `/metrics`, `/v1/version` and the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twotower.schema.clock import HOUR_MS
from twotower.serve.snapshots import Snapshots


@dataclass(frozen=True)
class Hour:
    """recall@20 of the positives of an hour, measured before they were trained on."""

    ts_ms: int
    """The beginning of the hour."""
    recall: float
    positives: int
    """How many were judged."""


@dataclass(frozen=True)
class Monitors:
    """Figures of the served version and its deltas."""

    freshness_s: float | None
    """Age of the latest event that was learned; None before the first."""
    recall_next: tuple[Hour, ...]
    """The latest hours, in order."""
    unknown_user_share: float | None
    """Share of the latest delta's positives whose user has no embedding; None without a positive."""
    unknown_item_share: float | None
    popularity_drift: float | None
    """Distance of the latest positives from the version's clicks: 0 = alike, 1 = nothing in common."""
    gated: int
    """How many of the latest deltas the gate rejected."""
    held_back: Mapping[str, int]
    """Positives of the latest delta that were not trained, by the bound that they exceed."""


def monitors(snapshots: Snapshots, now_ms: int) -> Monitors:
    """The figures as they are now."""
    report, watermark_ms = snapshots.report, snapshots.watermark_ms
    hours: Mapping[int, Any] = report["recall"]
    return Monitors(
        None if watermark_ms is None else (now_ms - watermark_ms) / 1000,
        tuple(Hour(hour * HOUR_MS, hits / count, count) for hour, (hits, count) in sorted(hours.items()) if count),
        _share(report, "without_user_row"),
        _share(report, "without_item_row"),
        report.get("drift"),
        len(snapshots.gated),
        report.get("held_back", {}),
    )


def _share(report: Mapping[str, Any], name: str) -> float | None:
    return report[name] / report["positives"] if report.get("positives") else None
