"""What the scene of a request brings on KuaiRand, what features bring beside ids, and for whom.

    python benchmarks/context.py --data DIR [--seeds 3] [--judge SCRIPT] [--set section.key=value ...]
        [--out FILE] [--smoke]

Trains `kuairand.toml`, and ids alone with settings of their own (`IDS`), and asks for every held-out user: once, in
the context of the first held-out impression, and judged by all that the user clicks later; the same without a context;
and for each user and scene, in the context of the first impression there, judged by the clicks there. Beside them
popularity, popularity of the scene, ItemCF and EASE (Steck 2019, closed form). Figures are medians of the seeds with
their range, differences are paired over users, each seed's figures averaged first. `--judge` names a script that scores
recommendations on its own, as in `quality.py`. Prints one JSON line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.options import PopularOptions
from twotower.channels.popular import Popular
from twotower.channels.retriever import Candidates, Queries, Retriever
from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.datasets.workspace import HOLDOUT, HOLDOUT_COLD, HOLDOUT_IMPRESSIONS
from twotower.evaluate.holdout import Truth, asked_first, candidates, cold_truth, first_requests, read_truth
from twotower.evaluate.metrics import difference, score_lists
from twotower.features.columns import Bag, pointers, take
from twotower.pipeline.line import channel_of, make_samples, train_from
from twotower.pipeline.places import places
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.train.checkpoint import load_model, open_checkpoint

CONFIG = Path(__file__).parent.parent / "examples" / "kuairand.toml"
SCENE = "tab"
IDS = [
    'features.user={ user_id = { kind = "categorical" }, history = { kind = "sequence", last = 50 } }',
    'features.item={ item_id = { kind = "categorical" } }',
    "features.context={}",
    "models.same_category.attributes=[]",
    "train.epochs=1",
    "train.id_dropout=0.2",
]
"""Ids alone: who asks, what they clicked, and which item; with settings chosen for them on the same validation part."""
FEATURES, WITHOUT, IDS_ALONE = "features, in context", "features, without context", "ids alone"
POPULAR, OF_SCENE, ITEM_CF, EASE = "popular", "popular of the scene", "item_cf", "ease"
EACH_SCENE = "each user and scene"
KS = (50, 200)
METRICS = ("recall@50", "ndcg@50", "recall@200")
EASE_LAMBDA = 500.0
LEAST_REQUESTS = 100
"""A scene with fewer is left out of the table by scene."""

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Some requests (B,), in their context, and what they are judged by."""

    truth: Truth
    file: Path | None = None
    """The same for a script; None = it is not asked: it counts a user once, and all that are in the file."""
    scene: Longs | None = None
    """(B,) the scene of each request."""


class Ease:
    """EASE over the items with a training positive."""

    name = EASE

    def __init__(self, samples: Samples, regularisation: float) -> None:
        clicks, size = samples.clicks, len(samples.items)
        self._items = np.flatnonzero(samples.item_positives)
        self._size = size
        clicked = np.zeros((len(samples.users), size), np.float32)
        clicked[np.repeat(np.arange(len(samples.users)), np.diff(clicks.indptr)), clicks.item_row] = 1
        clicked = clicked[:, self._items]
        inverse = np.linalg.inv(clicked.T @ clicked + regularisation * np.eye(len(self._items), dtype=np.float32))
        self._weights = inverse / -np.diag(inverse)
        np.fill_diagonal(self._weights, 0)

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`; whoever clicked nothing has no candidates."""
        clicked = np.zeros((len(queries), self._size), np.float32)
        counts = np.diff(queries.clicks.indptr)
        clicked[np.repeat(np.arange(len(queries)), counts), queries.clicks.rows] = 1
        scores = clicked[:, self._items] @ self._weights
        scores[clicked[:, self._items] > 0] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows, values = self._items[best], np.take_along_axis(scores, best, axis=1)
        rows[(counts == 0)[:, None] | np.isneginf(values)] = -1
        return Candidates(rows, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="changed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch")
    arguments = parser.parse_args()
    changed = [*arguments.changed, *(["train.epochs=1"] if arguments.smoke else [])]
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch) / "workspace"
        import_dataset("kuairand", arguments.data / "kuairand", workspace, ImportOptions(holdout="since:2022-05-03"))
        figures = compare(workspace, changed, 1 if arguments.smoke else arguments.seeds, arguments.judge)
    result = {
        "benchmark": "the context of a request, features and ids on KuaiRand",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "judged_by": "script" if arguments.judge else "this program",
        "changed": arguments.changed,
        "ids": IDS,
        **figures,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def compare(workspace: Path, changed: list[str], seeds: int, judge: Path | None) -> dict[str, Any]:
    """All figures of a workspace."""
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    values: dict[str, dict[str, list[dict[str, Floats]]]] = {}
    groups: dict[str, Group] = {}
    for configuration, changes in ((FEATURES, []), (IDS_ALONE, IDS)):
        for seed in range(seeds):
            settings = load(CONFIG, [f"workspace.path={workspace}", *changes, *changed, f"train.seed={seed}"])
            if seed == 0:
                make_samples(settings)
            samples = open_samples(places(settings).samples)
            trained = load_model(open_checkpoint(Path(train_from(settings, samples).checkpoint)))
            channels: dict[str, Retriever] = {configuration: channel_of(trained, samples)}
            if configuration == FEATURES:
                groups = groups or groups_of(workspace, samples)
                channels[WITHOUT] = channels[FEATURES]
            if configuration == FEATURES and seed == 0:
                channels |= baselines(samples)
            for name, channel in channels.items():
                for group, asked in groups.items():
                    context = asked.truth.context if name in (FEATURES, OF_SCENE) else {}
                    rows = candidates(samples, channel, asked.truth.user_rows, max(KS), context).rows
                    one = score_lists(rows, asked.truth.items, samples.item_positives, KS).values
                    told = {metric: round(float(one[metric].mean()), 5) for metric in METRICS}
                    if judge and asked.file:
                        told = by_script(judge, workspace, samples, asked, rows)
                    values.setdefault(group, {}).setdefault(name, []).append(one)
                    figures.setdefault(group, {}).setdefault(name, []).append(told)
                    print(group, name, seed, told, file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        group: {
            "requests": len(asked.truth.user_rows),
            "held_out": len(asked.truth.items.rows),
            "models": {
                name: {metric: summary([run[metric] for run in runs]) for metric in METRICS}
                for name, runs in figures[group].items()
            },
            "in_context_minus": {
                name: {metric: gain(values[group][FEATURES], runs, metric) for metric in METRICS}
                for name, runs in values[group].items()
                if name != FEATURES
            },
        }
        for group, asked in groups.items()
    }
    return {"groups": result, "scenes": by_scene(groups[EACH_SCENE], values[EACH_SCENE])}


def baselines(samples: Samples) -> dict[str, Retriever]:
    """Channels that nobody trains."""
    return {
        POPULAR: Popular.fit(samples),
        OF_SCENE: Popular.fit(samples, PopularOptions(segment=SCENE)),
        ITEM_CF: fit_item_cf(samples.clicks, len(samples.items)),
        EASE: Ease(samples, EASE_LAMBDA),
    }


def groups_of(workspace: Path, samples: Samples) -> dict[str, Group]:
    """Users with a training click, and those among them who come to another scene first; users without; each scene."""
    first = first_requests(workspace / HOLDOUT_IMPRESSIONS, samples)
    warm = asked_first(read_truth(workspace / HOLDOUT, samples), first)
    cold = cold_truth(workspace / HOLDOUT_COLD, c.NEW_USER, samples)
    assert cold is not None
    table = pq.read_table(workspace / HOLDOUT_COLD)
    new_users = workspace / "new_users.parquet"
    pq.write_table(table.filter(pc.equal(table[c.REASON], c.NEW_USER)), new_users)
    scene = np.asarray(warm.context[SCENE])
    return {
        "a training click": Group(warm, workspace / HOLDOUT),
        "a training click, first asked elsewhere": Group(part(warm, scene != np.bincount(scene).argmax())),
        "no training click": Group(asked_first(cold, first), new_users),
        EACH_SCENE: each_scene(workspace, samples, warm),
    }


def part(truth: Truth, chosen: npt.NDArray[np.bool_]) -> Truth:
    """Some users (B,) of a hold-out."""
    rows = np.flatnonzero(chosen)
    items = take(truth.items, rows)
    assert isinstance(items, Bag)
    return Truth(truth.user_rows[rows], items, {name: take(column, rows) for name, column in truth.context.items()})


def each_scene(workspace: Path, samples: Samples, warm: Truth) -> Group:
    """Every scene in which a user has a held-out click, asked in the context of the user's first impression there."""
    table, size = pq.read_table(workspace / HOLDOUT_IMPRESSIONS), len(samples.items)
    user = samples.users.positions.find(table[c.USER_ID].combine_chunks())
    item = samples.items.positions.find(table[c.ITEM_ID].combine_chunks())
    scene = table[SCENE].to_numpy()
    held_out = np.repeat(warm.user_rows, np.diff(warm.items.indptr)) * size + warm.items.rows
    clicked = pc.equal(table[c.OUTCOME], c.CLICKED).to_numpy() & np.isin(user * size + item, held_out)
    scenes = int(scene.max()) + 1
    asked, first = np.unique(user * scenes + scene, return_index=True)  # the impressions are in the order of time
    pairs = np.unique((user[clicked] * scenes + scene[clicked]) * size + item[clicked])
    requests, owner = np.unique(pairs // size, return_inverse=True)
    rows = table.take(pa.array(first[np.searchsorted(asked, requests)]))
    context = {one.name: one.encode(rows[one.name].combine_chunks()) for one in samples.features.context}
    items = Bag(pointers(np.bincount(owner)), (pairs % size).astype(np.int32))
    return Group(Truth(requests // scenes, items, context), scene=requests % scenes)


def by_scene(group: Group, values: dict[str, list[dict[str, Floats]]]) -> list[dict[str, Any]]:
    """Of each scene with enough requests, recall and what the context brings."""
    assert group.scene is not None
    scenes, counts = np.unique(group.scene, return_counts=True)
    return [
        {
            SCENE: int(scene),
            "requests": int(count),
            "recall@50": {
                name: round(float(np.mean([run["recall@50"][group.scene == scene].mean() for run in runs])), 5)
                for name, runs in values.items()
            },
            "in_context_minus_without": gain(values[FEATURES], values[WITHOUT], "recall@50", group.scene == scene),
        }
        for scene, count in sorted(zip(scenes, counts, strict=True), key=lambda one: -one[1])
        if count >= LEAST_REQUESTS
    ]


def gain(
    ours: list[dict[str, Floats]],
    theirs: list[dict[str, Floats]],
    metric: str,
    chosen: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """The paired difference over requests, each seed's figures averaged first."""
    kept = slice(None) if chosen is None else chosen
    means = [np.mean([run[metric][kept] for run in runs], axis=0) for runs in (ours, theirs)]
    figure = difference(means[0], means[1], 2000, 0)
    return {"value": round(figure.value, 5), "ci95": [round(bound, 5) for bound in figure.ci95 or ()]}


def by_script(judge: Path, workspace: Path, samples: Samples, asked: Group, rows: Longs) -> dict[str, float]:
    """The figures of the script for the lists (B, k) of a group."""
    owner, place = np.nonzero(rows >= 0)
    recommendations = {
        c.USER_ID: samples.users.ids.take(pa.array(asked.truth.user_rows[owner])),
        c.ITEM_ID: samples.items.ids.take(pa.array(rows[owner, place])),
        c.RANK: place + 1,
    }
    file = workspace / "recommendations.parquet"
    pq.write_table(pa.table(recommendations), file)
    command = [sys.executable, str(judge), str(file), str(asked.file), "--k", ",".join(map(str, KS))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {metric: told[metric] for metric in METRICS}


def summary(values: list[float]) -> dict[str, Any]:
    """Median and range of the seeds."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


if __name__ == "__main__":
    main()
