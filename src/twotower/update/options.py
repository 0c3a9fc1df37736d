"""Options of the updates."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, NotNegative, Positive, PositiveReal, Rate, Whole


@dataclass(frozen=True, config=STRICT)
class GateOptions:
    """What a delta or a full version must keep to go live."""

    k: Positive = 50
    """Of the recall of the users whom nothing is trained on (`samples.untrained_users`)."""
    margin: NotNegative = 0.02
    """How much that recall may fall below what is served."""
    least: Positive = 100
    """Positives of these users from which on it is judged."""
    window: Positive = 1000
    """Latest positives of these users that are judged."""
    most_move: PositiveReal = 10.0
    """Largest change of a row in one delta, in lengths of a typical row."""
    most_length: PositiveReal = 50.0
    """Longest row, in lengths of a typical row."""
    most_alike: PositiveReal = 0.2
    """How much the mean cosine of two items may rise above that of the version: more is a collapse."""
    index_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the exact answer that what is served must find, on golden queries."""
    most_accumulated: PositiveReal = 1e6
    """Largest optimizer accumulator of a row that moved, in those of the version's largest: beyond it the row would
    hardly move again."""
    most_rise: PositiveReal = 0.5
    """How much the share of lists of 20 (of a fixed sample of 64 users) that an item is in may rise within a window of
    `update.bounds`, beyond what its users explain. An item that rises further is learned nothing of in that delta."""
    rise_least: Positive = 20
    """Positives of an item within that window from which on its rise is judged."""


@dataclass(frozen=True, config=STRICT)
class BoundsOptions:
    """Positives that the incremental update trains within a window of event time, at most. Those beyond are counted
    (`held_back`) and not trained.
    """

    window_min: Positive = 60
    """Minutes of event time that are counted together."""
    pair: Positive = 3
    """Of one user on one item."""
    user: Positive = 100
    """Of one user."""
    item: Positive = 50
    """Of one item, whatever the others have; more where `item_share` allows it."""
    item_share: PositiveReal = 0.25
    """Of one item, as a share of the positives of all other items."""


@dataclass(frozen=True, config=STRICT)
class UpdateOptions:
    """What learns through the day, and every night."""

    tables: list[Literal["user_id", "item_id"]] = field(default_factory=lambda: ["user_id", "item_id"])
    """ID embeddings that the incremental update trains."""
    rows: Positive = 4096
    """Rows of the shards that one delta is made of at most."""
    batch_size: Positive = 256
    """Positives in a step at most."""
    learning_rate: Rate | None = None
    """Of the rows that move; absent = `train.table_learning_rate`."""
    negatives: Positive = 1024
    """Of a step, from the sources of `samples.negatives.easy`; `in_batch` = the stream's latest positives."""
    negatives_move: bool = False
    """The items that are negatives of a step move too, away from its users. Without it only the rows of its positive
    pairs move, and what was popular stays so until the next full update: for news it is to be true."""
    recent: Positive = 4096
    """Latest positives that negatives are drawn from."""
    admit_after: Positive = 2
    """Positives after which a new id has an embedding of its own."""
    seed: Whole = 0
    """Of the negatives."""
    follow_s: PositiveReal = 0.25
    """`update incremental --follow`: pause between two looks at the shards."""
    fold_every: Whole = 250
    """Deltas after which all that was learned is folded into one, so that a long chain is opened fast; 0 = never."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`update full`: what yesterday's optimizer accumulators are multiplied by."""
    evict_after_days: Positive | None = 30
    """`update full`: an id without a positive for so many days loses its embedding; absent = none does."""
    bounds: BoundsOptions = field(default_factory=BoundsOptions)
    """What one user and one item can move."""
    gate: GateOptions = field(default_factory=GateOptions)
    """What a delta must keep."""
