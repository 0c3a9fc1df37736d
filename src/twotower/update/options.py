"""Options of the updates."""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.samples.options import SamplesOptions
from twotower.schema.options import STRICT, NotNegative, Positive, PositiveReal, Rate, Whole
from twotower.train.options import TrainOptions


@dataclass(frozen=True, config=STRICT)
class GateOptions:
    """What a delta or a full version must keep to go live."""

    k: Positive = 50
    """The gate judges recall@k of the held-out users (`samples.held_out_users`)."""
    margin: NotNegative = 0.02
    """Largest fall of that recall below what is served."""
    min_positives: Positive = 100
    """Recall is judged only once the held-out users have this many positives."""
    window: Positive = 1000
    """Number of latest positives of the held-out users that recall is measured on."""
    max_move: PositiveReal = 10.0
    """Largest change of a row in one delta, as a multiple of the length of a typical row."""
    max_length: PositiveReal = 50.0
    """Largest length of a row, as a multiple of the length of a typical row."""
    max_mean_cosine_rise: PositiveReal = 0.2
    """Largest rise of the mean cosine of two items above that of the version: more is a collapse."""
    max_rise: PositiveReal = 0.5
    """Largest rise, within a window of `update.bounds`, of the share of lists of 20 (of a fixed sample of 64 users)
    that contain an item, beyond what its users explain. The delta learns nothing of an item that rises further."""


@dataclass(frozen=True, config=STRICT)
class BoundsOptions:
    """At most this many positives within a window of event time are trained by the incremental update. Those beyond
    are counted (`held_back`) and not trained.
    """

    pair: Positive = 3
    """Positives of one user on one item."""
    user: Positive = 100
    """Positives of one user."""
    item: Positive = 50
    """Positives of one item, whatever the others have; more where `item_share` allows it."""
    item_share: PositiveReal = 0.25
    """Positives of one item, as a share of the positives of all other items."""


@dataclass(frozen=True, config=STRICT)
class UpdateOptions:
    """What learns through the day, and every night. A file with this section keeps 1 % of the users out of all
    training, so that the gate can judge on them (`samples.held_out_users`).
    """

    tables: list[Literal["user_id", "item_id"]] = field(default_factory=lambda: ["user_id", "item_id"])
    """ID embeddings that the incremental update trains."""
    rows_per_delta: Positive = 4096
    """Largest number of rows of the shards that one delta is made of."""
    batch_size: Positive = 256
    """Largest number of positives in a step."""
    learning_rate: Rate | None = None
    """Learning rate of the embedding rows that the update trains; absent = `train.table_learning_rate`."""
    negatives: Positive = 1024
    """Negatives of a step, from the sources of `samples.negatives.easy`; `in_batch` = the stream's latest positives."""
    negatives_move: bool = False
    """The embeddings of a step's negatives move too, away from its users. Without it only the rows of positive pairs
    move, and popular items keep their score until the next full update. Set this to true for news."""
    recent: Positive = 4096
    """Number of latest positives that negatives are drawn from."""
    admit_after: Positive = 2
    """Positives after which a new id has an embedding of its own."""
    seed: Whole = 0
    """Seed of the negatives."""
    follow_s: PositiveReal = 0.25
    """`update incremental --follow`: pause between two looks at the shards."""
    fold_every: Whole = 250
    """Deltas after which all that was learned is folded into one, so that a long chain is opened fast; 0 = never."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`update full`: factor by which yesterday's optimizer accumulators are multiplied."""
    evict_after_days: Positive | None = 30
    """`update full`: an id without a positive for this many days loses its embedding; absent = none does."""
    bounds: BoundsOptions = field(default_factory=BoundsOptions)
    """What one user and one item can move."""
    gate: GateOptions = field(default_factory=GateOptions)
    """What a delta must keep."""


@dataclasses.dataclass(frozen=True)
class ChainOptions:
    """The sections that say how the chain of a version learns."""

    update: UpdateOptions
    train: TrainOptions
    samples: SamplesOptions
    hide_clicked: bool
    """Recall is measured without what a user clicked before, as it is served."""
