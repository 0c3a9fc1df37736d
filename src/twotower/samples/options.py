"""Options of the samples and of the engine that makes them."""

import math
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Day, Length, Positive, PositiveReal, Share, Text, Threads, Whole, at_most


@dataclass(frozen=True, config=STRICT)
class EngineOptions:
    """What runs the batch jobs: samples and item-to-item channels."""

    name: Literal["duckdb", "spark"] = "duckdb"
    """`duckdb` is embedded; `spark` is for logs that outgrow one machine."""
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False), at_most(1e6)] = 2.0
    """Memory of a whole batch job; beyond it the engine spills to disk. On a cluster, memory of the driver alone."""
    threads: Threads = 2
    """Threads of a batch job on this machine; on a cluster, `options` set them."""
    url: Text | None = None
    """`spark`: the master, such as `local[4]`, `spark://HOST:7077` or `yarn`; absent = the threads of this machine."""
    scratch: Text | None = None
    """Folder for intermediate results, on a cluster one that all machines see; absent = beside the result."""
    options: dict[str, str] = field(default_factory=dict)
    """`spark`: further configuration, such as `{ "spark.executor.memory" = "8g" }`."""


@dataclass(frozen=True, config=STRICT)
class HotOptions:
    """Down-sampling of hot items among the positives; r is an item's clicks over the mean of all clicked items."""

    form: Literal["none", "sqrt", "power", "word2vec"] = "none"
    """Share of an item's clicks that is kept, at most 1: `sqrt`: (threshold / r)^0.5; `power`: (threshold / r)^power;
    `word2vec`: (threshold / r)^0.5 + threshold / r."""
    threshold: PositiveReal = 3.0
    """An item is hot from this r on."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Exponent of the form `power`; 1 = all hot items end up with the same number of clicks."""


@dataclass(frozen=True, config=STRICT)
class ColdOptions:
    """Over-sampling of cold items among the positives; r is an item's clicks over the mean of all clicked items."""

    form: Literal["none", "sqrt", "power"] = "none"
    """How often an item's click is fed, at least once: `sqrt`: (threshold / r)^0.5; `power`: (threshold / r)^power."""
    threshold: PositiveReal = 0.3
    """An item is cold up to this r."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Exponent of the form `power`."""
    most: Annotated[float, Field(ge=1, allow_inf_nan=False), at_most(1000)] = 4.0
    """A click is fed at most this often."""


def _check_whole(total: float) -> None:
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"the shares sum to {total:g}, where 1 is expected; absent ones have their defaults")


@dataclass(frozen=True, config=STRICT)
class EasyShares:
    """Shares of the sources of easy negatives, sum 1."""

    in_batch: Share = 1.0
    """The other positives of the batch."""
    uniform: Share = 0.0
    """Drawn evenly from the catalogue."""
    clicks: Share = 0.0
    """Drawn by clicks to the power `alpha`."""

    def __post_init__(self) -> None:
        """Refuse shares whose sum is not 1."""
        _check_whole(self.in_batch + self.uniform + self.clicks)


@dataclass(frozen=True, config=STRICT)
class HardShares:
    """Shares of the sources of hard negatives, sum 1."""

    pre_rank_rejected: Share = 0.5
    """Dropped by the pre-ranker."""
    rank_rejected: Share = 0.5
    """In the tail of the ranker's order."""

    def __post_init__(self) -> None:
        """Refuse shares whose sum is not 1."""
        _check_whole(self.pre_rank_rejected + self.rank_rejected)


@dataclass(frozen=True, config=STRICT)
class NegativesOptions:
    """Negatives: the items that a positive is compared with."""

    easy: EasyShares = field(default_factory=EasyShares)
    """Shares of the sources of easy negatives."""
    alpha: Share = 0.75
    """Exponent of the clicks by which `easy.clicks` draws."""
    count: Positive | None = None
    """Easy negatives of a positive; absent = the whole batch where `in_batch` has a share, else 1024; or 4 where each
    row has its own."""
    shared: bool = True
    """One set of easy negatives for all rows of a batch; false = a set for each row, whose `count` includes the hard
    ones."""
    frequency: Literal["counts", "streaming"] = "counts"
    """Source of q of in-batch negatives: the counts of the rows as fed, or an estimate from their stream."""
    hard: HardShares = field(default_factory=HardShares)
    """Shares of the sources of hard negatives."""
    hard_share: Share | None = None
    """Share of hard negatives among all; absent = half where the log has them, else none."""
    hard_count: Length = 8
    """Hard negatives of a positive in a step, where the easy ones are shared."""
    hard_most: Length = 20
    """At most this many hard negatives of a request are kept of each source."""
    impressed_as_negatives_for_experiments: bool = False
    """Use shown, not clicked items as negatives, which is wrong: for experiments that show it."""
    uncorrected_for_experiments: bool = False
    """Leave out the correction by log_q, so that every easy negative counts alike: for experiments that show what the
    correction does."""


@dataclass(frozen=True, config=STRICT)
class SamplesOptions:
    """Which events become training rows."""

    first_day: Day | None = None
    """First day of positives; absent = the first day of the log. Histories reach further back."""
    last_day: Day | None = None
    """Last day of positives and of histories; absent = the last day of the log."""
    days: Positive | None = None
    """Take positives of this many days up to the last, in place of `first_day`; absent = no such limit."""
    held_out_users: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of held-out users, by a hash of their ids: no training and no update ever uses them, so that the quality
    gate of the updates can judge on them. Where it is absent and the file has an `[update]` section, it is 0.01. It
    cannot be changed between a bootstrap and its updates."""
    hot: HotOptions = field(default_factory=HotOptions)
    """Down-sampling of hot items."""
    cold: ColdOptions = field(default_factory=ColdOptions)
    """Over-sampling of cold items."""
    seed: Whole = 0
    """Seed of the rows that are dropped, repeated or kept by chance."""
    weight: Text | None = None
    """Column of events that holds the weight of a positive; absent = all have 1."""
    impressed_weight: Annotated[float, Field(ge=0, allow_inf_nan=False), at_most(1e9)] = 0.0
    """Weight of a shown, not clicked item as a weak positive."""
    vocabulary_room: Annotated[float, Field(ge=0, allow_inf_nan=False), at_most(100)] = 0.1
    """Spare rows of an id table for future ids, as a share of the known ids."""
    negatives: NegativesOptions = field(default_factory=NegativesOptions)
    """Negatives: the items that a positive is compared with."""

    def __post_init__(self) -> None:
        """Refuse two beginnings."""
        if self.days is not None and self.first_day is not None:
            raise ValueError(
                f"samples.first_day = {self.first_day} and samples.days = {self.days} both choose a beginning: give one"
            )
