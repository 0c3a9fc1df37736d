"""A loss and a channel of your own, trained, judged and fused beside ours.

    python examples/own_parts.py

Nothing in the package knows of this file. A loss is a function of `Scores`; a channel is any object with a `name` and a
method `retrieve`.
"""

import sys
import tempfile

import numpy as np
import torch

import twotower as tt


def squared_hinge(scores: tt.Scores) -> torch.Tensor:
    """max(0, 0.4 + cos(negative) - cos(positive))^2, as a weighted mean over the negatives of each row: (b, 1)."""
    behind = torch.relu(0.4 + scores.negatives - scores.positive) ** 2
    return (behind * scores.weight).sum(dim=1, keepdim=True) / scores.total


class LatestClicks:
    """Items in the order of their latest click, the same for every user."""

    name = "latest_clicks"

    def __init__(self, samples: tt.Samples) -> None:
        clicks = samples.clicks
        latest = np.zeros(len(samples.items), np.int64)
        np.maximum.at(latest, clicks.item_row, clicks.ts_ms)
        self._order = np.lexsort((np.arange(len(latest)), -latest))

    def retrieve(self, queries: tt.Queries, k: int) -> tt.Candidates:
        """See `twotower.Retriever`: B users, k candidates each, without those that a user is not offered."""
        rows = np.full((len(queries), k), -1)
        for user in range(len(queries)):
            start, end = queries.exclude.indptr[user : user + 2]
            offered = self._order[~np.isin(self._order, queries.exclude.rows[start:end])][:k]
            rows[user, : len(offered)] = offered
        scores = np.where(rows >= 0, -np.arange(k, dtype=np.float32), -np.inf).astype(np.float32)
        return tt.Candidates(rows, scores)


def main() -> None:
    """Train with the loss, then judge and fuse the channel beside the configured ones."""
    with tempfile.TemporaryDirectory() as folder:
        tt.simulate(f"{folder}/world", users=400, items=300, days=4, seed=1)
        settings = tt.load(
            {"models": {"channels": ["two_tower", "popular"], "dimension": 16}, "train": {"epochs": 2}},
            {"evaluate.channels_k": [50], "fusion.k": [50]},
            workspace=f"{folder}/world",
        )
        tt.build_samples(settings)
        tt.train_model(settings, loss=squared_hinge)

        def own(samples: tt.Samples) -> dict[str, tt.Retriever]:
            return {"latest_clicks": LatestClicks(samples)}

        chosen = tt.choose_fusion(settings, own)
        report = tt.evaluate_channels(settings, own)
        for name, recall in report["recall"].items():
            print(f"{name:14} recall@50 {recall['50']['value']:.3f}", file=sys.stderr)
        print(sorted(chosen.weights))


if __name__ == "__main__":
    main()
