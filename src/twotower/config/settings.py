"""Every section and key of a configuration, with its default and a line on what it does.

This is the only place where defaults live. No other class sees these objects: the command line hands each stage plain
arguments. Keys whose values are not all available yet say so where they are used, never silently.
"""

import datetime
import itertools
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from twotower.schema import columns as c

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _at_most(most: float) -> AfterValidator:
    """Refuse a number that nothing can be made of: it would end as an overflow, or take all memory."""

    def check(value: float) -> float:
        if value > most:
            raise ValueError(f"{value:.6g} is too large: at most {most:.15g}")
        return value

    return AfterValidator(check)


def _text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{value[:100]!r} is no text that can be printed, which is needed here")
    return value


_LARGEST = 2**31 - 1
Positive = Annotated[int, Field(gt=0), _at_most(_LARGEST)]
Whole = Annotated[int, Field(ge=0), _at_most(_LARGEST)]
Threads = Annotated[int, Field(gt=0), _at_most(1024)]
Width = Annotated[int, Field(gt=0), _at_most(16_384)]
"""Of a layer or a vector."""
Length = Annotated[int, Field(gt=0), _at_most(1_000_000)]
"""Of a list that is held as a whole."""
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False), _at_most(1e12)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), _at_most(1e38)]
"""Within float32: one that is too high ends in a loss that is not finite, which says so."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _at_most(1e12)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False), _at_most(1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, AfterValidator(_text)]


def _calendar_day(day: str) -> str:
    try:
        if datetime.date.fromisoformat(day).isoformat() == day:
            return day
    except ValueError:
        pass
    raise ValueError("a day is written YYYY-MM-DD, such as 2024-01-31")


Day = Annotated[str, AfterValidator(_calendar_day)]

LABELS = (c.ITEM_ID, c.OUTCOME, c.CLICK_TS_MS)
"""Columns of events that no request can know: as a context they would tell the model its target."""


@dataclass(frozen=True, config=STRICT)
class Workspace:
    """Where the tables are and everything that the commands add."""

    path: Text = "workspace"
    """Folder with `users.parquet`, `items.parquet` and `events/`; relative to the current folder."""


@dataclass(frozen=True, config=STRICT)
class Engine:
    """What runs the batch jobs: samples and item-to-item channels."""

    name: Literal["duckdb", "spark"] = "duckdb"
    """`duckdb` is embedded; `spark` is for logs that outgrow one machine."""
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False), _at_most(1e6)] = 2.0
    """Memory of a whole batch job; beyond it the engine spills to disk. On a cluster that of the driver alone."""
    threads: Threads = 2
    """Threads of a batch job; on a cluster `options` say what there is."""
    url: Text | None = None
    """`spark`: the master, such as `local[4]`, `spark://HOST:7077` or `yarn`; absent = the threads of this machine."""
    scratch: Text | None = None
    """Folder for what a job keeps on its way, on a cluster one that all machines see; absent = beside the result."""
    options: dict[str, str] = field(default_factory=dict)
    """`spark`: further configuration, such as `{ "spark.executor.memory" = "8g" }`."""


@dataclass(frozen=True, config=STRICT)
class Categorical:
    """One value out of a vocabulary: an embedding row each."""

    kind: Literal["categorical"]
    dimension: Width | None = None
    """Width of the embedding; absent = by the size of the vocabulary, ids have `models.dimension`."""
    table: Text | None = None
    """Name of a table that features share, on both sides: one vocabulary and one embedding for all of them. `item_id`
    is that of the item ids."""


@dataclass(frozen=True, config=STRICT)
class MultiCategorical:
    """Several values out of a vocabulary: the mean of their embedding rows."""

    kind: Literal["multi_categorical"]
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Splits a string column; absent for a list column."""
    dimension: Width | None = None
    """Width of the embedding; absent = by the size of the vocabulary."""
    table: Text | None = None
    """Name of a table that features share, as of `categorical`."""


@dataclass(frozen=True, config=STRICT)
class Numeric:
    """A number."""

    kind: Literal["numeric"]
    transform: Literal["standard", "log", "buckets"] = "standard"
    """`standard`: zero mean and unit variance; `log`: the same of sign(x) log(1 + |x|); `buckets`: an embedding row for
    each quantile."""
    buckets: Length = 20
    """Number of quantiles for `buckets`."""


@dataclass(frozen=True, config=STRICT)
class Sequence:
    """Items in the order of time, sharing the table of item ids.

    `history` is what the user clicked before the request; any other name is a list column of item ids of
    `users.parquet`.
    """

    kind: Literal["sequence"]
    last: Length = 50
    """How many of the latest items count."""
    encoder: Literal["mean", "attention", "transformer"] = "mean"
    """How they become one vector: their mean; a mean weighted by item and age; a small transformer that knows their
    order."""
    heads: Length = 2
    """`attention`, `transformer`: ways to look at the sequence; of a transformer a divisor of `models.dimension`."""
    blocks: Annotated[int, Field(gt=0), _at_most(100)] = 2
    """`transformer`: how deep it is."""


@dataclass(frozen=True, config=STRICT)
class Vector:
    """A ready-made vector, of a text or an image, say."""

    kind: Literal["vector"]
    size: Width
    """Its length."""


KINDS = {
    "categorical": Categorical,
    "multi_categorical": MultiCategorical,
    "numeric": Numeric,
    "sequence": Sequence,
    "vector": Vector,
}
Feature = Annotated[Categorical | MultiCategorical | Numeric | Sequence | Vector, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class Features:
    """Columns that enter the towers, by name."""

    user: dict[str, Feature] = field(
        default_factory=lambda: {"user_id": Categorical("categorical"), "history": Sequence("sequence")}
    )
    """Columns of `users.parquet`, and `history`."""
    item: dict[str, Feature] = field(default_factory=lambda: {"item_id": Categorical("categorical")})
    """Columns of `items.parquet`."""
    context: dict[str, Feature] = field(default_factory=dict)
    """Columns of `events/`, and keys of a request's `context`; they enter the user tower."""

    def __post_init__(self) -> None:
        """Refuse what no pair of towers could be built from.

        Raises:
            ValueError: a tower without features, a name on both sides of the user tower, a context that is the target.
        """
        if not self.item:
            raise ValueError("features.item is empty: the item tower needs a feature, such as item_id")
        if not self.user and not self.context:
            raise ValueError("features.user is empty: the user tower needs a feature, such as user_id")
        if both := sorted(self.user.keys() & self.context.keys()):
            raise ValueError(f"{both[0]} is in features.user and in features.context: rename the column in one of them")
        if labels := sorted(self.context.keys() & set(LABELS)):
            raise ValueError(f"features.context.{labels[0]} is what the model is to find, no request knows it")
        if problems := [
            *_unusable({"user": self.user, "context": self.context}),
            *_unusable({"item": self.item}),
        ]:
            raise ValueError("; ".join(problems))


def _unusable(sides: Mapping[str, Mapping[str, Feature]]) -> list[str]:
    """What is wrong with the names of the features of one tower, by side of the configuration.

    Columns have prefixes inside, so that no other name is one of ours. Two places have none: in daily partitions the
    context stands beside the columns of joined events, and in a tower the length of a sequence stands beside it. Upper
    and lower case are one to the engines.
    """
    problems = []
    kinds = {f"features.{side}.{name}": (side, name, kind) for side, of in sides.items() for name, kind in of.items()}
    names = {name for _, name, _ in kinds.values()}
    seen: dict[str, str] = {}
    for where, (side, name, kind) in kinds.items():
        if not name.strip() or not name.isprintable():
            problems.append(f"features.{side} has the name {name!r}: a name is text that can be printed")
        if side == "context" and name.casefold() in c.JOINED:
            problems.append(
                f"{where}: joined events have a column {name.casefold()} of their own, so give yours another name. "
                f"Taken are {', '.join(c.JOINED)}"
            )
        if (other := seen.setdefault(name.casefold(), where)) != where:
            problems.append(f"{other} and {where} differ in upper and lower case alone: rename one of the columns")
        taken = [f"{name}{end}" for end in (".length", ".row")] if isinstance(kind, Sequence) else [".popularity"]
        problems += [f"{where} takes the name {one} too: rename one of the columns" for one in taken if one in names]
    return problems


@dataclass(frozen=True, config=STRICT)
class Hot:
    """Down-sampling of hot items among the positives; r is an item's clicks over the mean of all clicked items."""

    form: Literal["none", "sqrt", "power", "word2vec"] = "none"
    """Share of an item's clicks that is kept, at most 1: `sqrt`: (threshold / r)^0.5; `power`: (threshold / r)^power;
    `word2vec`: (threshold / r)^0.5 + threshold / r."""
    threshold: PositiveReal = 3.0
    """From which r on an item is hot."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Of `power`; 1 = all hot items end up with the same number."""


@dataclass(frozen=True, config=STRICT)
class Cold:
    """Over-sampling of cold items among the positives; r is an item's clicks over the mean of all clicked items."""

    form: Literal["none", "sqrt", "power"] = "none"
    """How often an item's click is fed, at least once: `sqrt`: (threshold / r)^0.5; `power`: (threshold / r)^power."""
    threshold: PositiveReal = 0.3
    """Up to which r an item is cold."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Of `power`."""
    most: Annotated[float, Field(ge=1, allow_inf_nan=False), _at_most(1000)] = 4.0
    """How often a click is fed at most."""


def _check_whole(total: float) -> None:
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"the shares sum to {total:g}, where 1 is due; absent ones have their defaults")


@dataclass(frozen=True, config=STRICT)
class Easy:
    """Shares of the sources of easy negatives, sum 1."""

    in_batch: Share = 1.0
    """The other positives of the batch."""
    uniform: Share = 0.0
    """Drawn evenly from the catalogue."""
    clicks: Share = 0.0
    """Drawn by clicks to the power `alpha`."""

    def __post_init__(self) -> None:
        """Refuse shares that are no division of a whole."""
        _check_whole(self.in_batch + self.uniform + self.clicks)


@dataclass(frozen=True, config=STRICT)
class Hard:
    """Shares of the sources of hard negatives, sum 1."""

    pre_rank_rejected: Share = 0.5
    """Dropped by the pre-ranker."""
    rank_rejected: Share = 0.5
    """In the tail of the ranker's order."""
    impressed: Share = 0.0
    """Shown and not clicked: refused."""

    def __post_init__(self) -> None:
        """Refuse shares that are no division of a whole, and shown items."""
        if self.impressed:
            raise ValueError(
                "an impressed item is no negative of retrieval: it was good enough to be shown, and the ranker learns "
                "from it. samples.negatives.impressed_as_negatives_for_experiments shows what it does to a model"
            )
        _check_whole(self.pre_rank_rejected + self.rank_rejected)


@dataclass(frozen=True, config=STRICT)
class Negatives:
    """What a positive is compared with."""

    easy: Easy = field(default_factory=Easy)
    """Shares of the easy ones."""
    alpha: Share = 0.75
    """Exponent of clicks."""
    count: Positive | None = None
    """Easy negatives of a positive; absent = the whole batch where `in_batch` has a share, else 1024; 4 where each
    row has its own."""
    shared: bool = True
    """One set of easy negatives for all rows of a batch; false = one for each row, hard ones among its `count`."""
    frequency: Literal["counts", "streaming"] = "counts"
    """Where q of in-batch negatives comes from: the counts of the rows as fed, or an estimate from their stream."""
    hard: Hard = field(default_factory=Hard)
    """Shares of the hard ones."""
    hard_share: Share | None = None
    """Hard ones among all; absent = half where the log has them, else none."""
    hard_count: Length = 8
    """Hard ones of a positive in a step, where the easy ones are shared."""
    hard_most: Length = 20
    """Hard ones of a positive that are kept of each source."""
    impressed_as_negatives_for_experiments: bool = False
    """Use shown-but-not-clicked rows as negatives, which is wrong: for experiments that show it."""
    uncorrected_for_experiments: bool = False
    """Every easy negative counts alike, however often it is drawn (no log q): for experiments that show what the
    correction does."""


@dataclass(frozen=True, config=STRICT)
class Samples:
    """Which events become training rows."""

    first_day: Day | None = None
    """First day of positives; absent = the first of the log."""
    last_day: Day | None = None
    """Last day, of positives and of histories; absent = the last of the log."""
    days: Positive | None = None
    """Positives of so many days up to the last, in place of `first_day`; absent = no such limit."""
    untrained_users: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of users, by a hash of their ids, whom nothing is trained on, by no update either: the gate of updates
    judges on them. 0 where no update is to run, for a comparison on a fixed data set."""
    hot: Hot = field(default_factory=Hot)
    """Down-sampling of hot items."""
    cold: Cold = field(default_factory=Cold)
    """Over-sampling of cold items."""
    seed: Whole = 0
    """Of the rows that are dropped, repeated or kept by chance."""
    weight: Text | None = None
    """Column of events that weighs a positive; absent = all weigh 1."""
    impressed_weight: Annotated[float, Field(ge=0, allow_inf_nan=False), _at_most(1e9)] = 0.0
    """Weight of a shown, not clicked item as a weak positive."""
    vocabulary_room: Annotated[float, Field(ge=0, allow_inf_nan=False), _at_most(100)] = 0.1
    """Spare rows of an id table for ids to come, as a share of the known ones."""
    negatives: Negatives = field(default_factory=Negatives)
    """What a positive is compared with."""


@dataclass(frozen=True, config=STRICT)
class Tower:
    """One tower: its features, a network, a projection, the L2 norm."""

    network: Literal["dnn", "dcn", "none"] = "dnn"
    """`dnn`: fully connected layers; `dcn`: crosses of features beside them; `none`: the features, each of width
    `models.dimension`, are added, without layers or projection."""
    layers: list[Width] = field(default_factory=lambda: [256, 128])
    """`dnn`, `dcn`: widths of the fully connected layers; empty = none."""
    crosses: Annotated[int, Field(gt=0), _at_most(100)] = 2
    """`dcn`: how many cross layers; each adds products of one more feature."""


Channel = Literal["two_tower", "item_cf", "swing", "popular", "mind", "mf", "als", "new_items", "same_category"]


@dataclass(frozen=True, config=STRICT)
class MF:
    """Matrix factorisation: the trainer of the two towers with an id on each side and no network."""

    epochs: Positive | None = None
    """Passes over the positives; absent = `train.epochs`."""


@dataclass(frozen=True, config=STRICT)
class Mind:
    """Several vectors of a user, one for each interest in the click history; the rest as in the two towers."""

    interests: Annotated[int, Field(ge=2), _at_most(1000)] = 4
    """The most vectors of a user."""
    rounds: Annotated[int, Field(gt=0), _at_most(100)] = 3
    """Of the routing of clicks to interests."""
    sharpness: PositiveReal = 20.0
    """In training, interests are weighted by a softmax of so many times their cosine to the positive."""
    epochs: Positive | None = None
    """Passes over the positives; absent = `train.epochs`."""


@dataclass(frozen=True, config=STRICT)
class Als:
    """Implicit ALS: matrix factorisation over all pairs of users and items, clicked or not."""

    factors: Width = 64
    """Numbers of a user and of an item."""
    regularization: PositiveReal = 0.05
    """Greater = factors nearer to zero."""
    confidence: AtLeastOne = 10.0
    """Weight of a clicked item, where one that was not clicked weighs 1."""
    iterations: Positive = 15
    """Rounds in which users and items are solved for in turn."""


@dataclass(frozen=True, config=STRICT)
class Popular:
    """The most clicked items."""

    window_days: PositiveReal | None = None
    """Count the last days alone, such as 0.25; absent = all."""
    half_life_days: PositiveReal | None = None
    """A click that is so much older than the latest counts half; absent = all count alike."""
    segment: Text | None = None
    """A categorical or bucketed feature of users or context, each value of which has a list; absent = one for all."""
    prior: NotNegative = 0.0
    """Clicks that each segment is given besides its own, shared out as the clicks of all are, such as 30; 0 = none."""


@dataclass(frozen=True, config=STRICT)
class NewItems:
    """Items that have hardly been clicked, by their features."""

    most_clicks: Whole = 0
    """An item of at most so many training positives is new."""


@dataclass(frozen=True, config=STRICT)
class SameCategory:
    """The most clicked items of the categories, authors, ... that a user clicked."""

    attributes: list[Text] = field(default_factory=list)
    """Categorical or multi-valued features of items; at least one where the channel is used."""
    last: Length = 50
    """A user's latest clicks that count."""
    items: Positive = 500
    """Items kept of each category."""


@dataclass(frozen=True, config=STRICT)
class ItemCF:
    """Items clicked by the same users: w_u l_ui l_uj summed over the users u of both, over
    n_i^(1 - popularity) n_j^popularity, with l the interest of a user in an item, n the sum of its squares over the
    users of an item, and w_u = (items of u)^-activity.
    """

    neighbours: Length = 200
    """Nearest items kept of each item."""
    latest: Length = 200
    """A user's latest clicks that are looked up."""
    items: Positive = 500
    """Distinct items of a user that count, the latest."""
    popularity: Share = 0.3
    """How much the popularity of a candidate counts against it; 0.5 = the cosine."""
    activity: Annotated[float, Field(ge=0, le=2)] = 0.5
    """How much the number of a user's items counts against each; 0 = not at all."""
    interest: Literal["clicked", "clicks", "weight"] = "clicked"
    """Degree of interest in an item: `clicked`: 1; `clicks`: 1 + ln(number of clicks), also when asked; `weight`: the
    sum of the weights of its training rows (`samples.weight`, `samples.impressed_weight`)."""
    recency: NotNegative = 0.0
    """A click that c later ones followed counts (1 + c)^-recency; 0 = all alike."""
    normalise: bool = True
    """The similarities of an item's neighbours are divided by their sum."""


@dataclass(frozen=True, config=STRICT)
class Swing:
    """Items that many pairs of users with little else in common clicked: w_u w_v / (alpha + common items of u and v)
    summed over the pairs of users of both items, over (users of the candidate)^popularity, with
    w_u = (items of u + offset)^-activity.
    """

    neighbours: Length = 100
    """Nearest items kept of each item."""
    latest: Length = 200
    """A user's latest clicks that are looked up."""
    items: Positive = 500
    """Distinct items of a user that count, the latest."""
    users: Positive = 1000
    """Users of an item that count, chosen by a hash; time grows with its square."""
    alpha: PositiveReal = 1.0
    """Greater = it matters less how much two users have in common."""
    activity: Annotated[float, Field(ge=0, le=2)] = 0.35
    """How much the number of a user's items counts against each pair."""
    offset: NotNegative = 5.0
    """Added to that number."""
    popularity: Share = 0.2
    """How much the popularity of a candidate counts against it; 0 = Swing as published."""
    recency: NotNegative = 0.0
    """A click that c later ones followed counts (1 + c)^-recency; 0 = all alike."""
    normalise: bool = True
    """The similarities of an item's neighbours are divided by their sum."""


@dataclass(frozen=True, config=STRICT)
class Models:
    """The recall channels and the shape of the towers."""

    channels: Annotated[list[Channel], Field(min_length=1)] = field(
        default_factory=lambda: ["two_tower", "item_cf", "popular"]
    )
    """Channels to train, publish and serve."""
    rankers: list[Literal["pre_rank", "rank"]] = field(default_factory=list)
    """Rankers of the funnel to train, publish and serve; for logs that say what was shown and not clicked."""
    dimension: Width = 64
    """Length of the vectors, and of the id embeddings."""
    user_tower: Tower = field(default_factory=Tower)
    """The tower of users and context."""
    item_tower: Tower = field(default_factory=Tower)
    """The tower of items."""
    mf: MF = field(default_factory=MF)
    """The channel `mf`."""
    mind: Mind = field(default_factory=Mind)
    """The channel `mind`."""
    als: Als = field(default_factory=Als)
    """The channel `als`."""
    popular: Popular = field(default_factory=Popular)
    """The channel `popular`; the baseline of an evaluation is always of all clicks."""
    new_items: NewItems = field(default_factory=NewItems)
    """The channel `new_items`."""
    same_category: SameCategory = field(default_factory=SameCategory)
    """The channel `same_category`."""
    item_cf: ItemCF = field(default_factory=ItemCF)
    """The channel `item_cf`."""
    swing: Swing = field(default_factory=Swing)
    """The channel `swing`."""


@dataclass(frozen=True, config=STRICT)
class PreRank:
    """The pre-ranker: an early-fusion network that scores all candidates, trained on what was shown, clicked or not."""

    history: Literal["mean", "target"] = "mean"
    """How it reads sequences of items: their mean; or each weighted by how it meets the candidate (DIN)."""
    attention: Width = 16
    """`target`: hidden units of that weight."""
    network: Literal["dnn", "dcn"] = "dnn"
    """`dnn`: fully connected layers; `dcn`: crosses of features beside them."""
    layers: list[Width] = field(default_factory=lambda: [64])
    """Widths of the fully connected layers; empty = none."""
    crosses: Annotated[int, Field(gt=0), _at_most(100)] = 2
    """`dcn`: how many cross layers."""
    positions: Length = 50
    """Positions of a page that have a bias of their own; later ones share that of the last."""
    batch_size: Positive = 512
    """Impressions in a step."""
    epochs: Positive = 1
    """Passes over the impressions."""
    learning_rate: Rate = 0.001
    """Of the network (Adam)."""
    table_learning_rate: Rate = 0.02
    """Of the embedding tables (row-wise Adagrad)."""
    position_learning_rate: Rate = 0.05
    """Of the biases of positions (Adam)."""
    weight_decay: NotNegative = 0.0
    """Of the network, decoupled."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of hidden units left out in training."""
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ids replaced by the unknown id in training, and of contexts made missing."""
    calibration_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The latest impressions are not trained on: log-odds are scaled to fit them."""


@dataclass(frozen=True, config=STRICT)
class Rank(PreRank):
    """The ranker: the same network, larger, for what the pre-ranker keeps."""

    history: Literal["mean", "target"] = "target"
    """How it reads sequences of items: their mean; or each weighted by how it meets the candidate (DIN)."""
    layers: list[Width] = field(default_factory=lambda: [128, 64])
    """Widths of the fully connected layers; empty = none."""


@dataclass(frozen=True, config=STRICT)
class Train:
    """How the towers are trained."""

    loss: Literal["pointwise", "triplet_hinge", "triplet_logistic", "sampled_softmax", "corrected_log_q", "bsl"] = (
        "sampled_softmax"
    )
    """What is minimised."""
    temperature: PositiveReal = 0.07
    """Divides the cosine in a softmax: `sampled_softmax`, `corrected_log_q`, `bsl`."""
    positive_temperature: PositiveReal | None = None
    """`bsl`: divides the positive's cosine; absent = as `temperature`."""
    margin: PositiveReal = 0.4
    """`triplet_hinge`: by how much a positive is to be nearer than a negative."""
    sigma: PositiveReal = 10.0
    """`triplet_logistic`: multiplies the difference of the cosines."""
    scale: AtLeastOne = 10.0
    """`pointwise`: initial scale of the cosine; it is learned."""
    pointwise_negatives: PositiveReal = 3.0
    """`pointwise`: weight of all negatives of a positive over its own."""
    popularity: NotNegative = 0.0
    """`sampled_softmax`, `corrected_log_q`, `bsl`: how much more than the softmax says items of many clicks are
    preferred: candidates are ordered by log P(item | user) + this x log P(item), by two numbers more in all vectors.
    Choose it on a validation part, 0 to 0.6. With `half_life_days`, older clicks count for less here, too."""
    batch_size: Positive = 4096
    """Positives in a step."""
    epochs: Positive = 10
    """Passes over the positives in the bootstrap; a full update is always one."""
    seed: Whole = 0
    """Of the initial weights, the order of rows and whatever else is drawn."""
    learning_rate: Rate = 0.001
    """Of the networks (Adam)."""
    table_learning_rate: Rate = 0.05
    """Of the embedding tables (row-wise Adagrad)."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear`: both rates fall to zero over the whole run."""
    weight_decay: NotNegative = 0.0
    """Of the networks, decoupled."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a tower's hidden units left out in training."""
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ids replaced by the unknown id in training, so that new users and items get their features' vector."""
    horizon: Whole = 0
    """A training row's history ends up to so many clicks before its request, drawn evenly: 0 teaches what is clicked
    next, more teaches what is clicked later too. For data with time."""
    half_life_days: PositiveReal | None = None
    """Days before the latest request after which a positive counts half; absent = age does not matter."""
    order: Literal["shuffled", "time"] = "shuffled"
    """Of the positives of an epoch. `time`: as they were clicked, each day's last ones are learned last; for data with
    time."""
    checkpoint_s: PositiveReal = 60.0
    """Seconds between checkpoints that a killed run resumes from."""
    threads: Threads = 2
    """Threads of a step."""

    def __post_init__(self) -> None:
        """Refuse a preference that the loss cannot have.

        Raises:
            ValueError: the loss is no softmax.
        """
        if self.popularity and self.loss not in ("sampled_softmax", "corrected_log_q", "bsl"):
            raise ValueError(
                f"popularity = {self.popularity:g} is for a softmax, and the loss is {self.loss}: set it to 0"
            )


@dataclass(frozen=True, config=STRICT)
class Span:
    """The values that a key may take: `{ low = 0.05, high = 0.2, log = true }` or `{ choices = [64, 128] }`."""

    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None
    log: bool = False
    """Even on a logarithmic scale."""
    whole: bool = False
    """Whole numbers alone."""
    choices: list[Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is neither a range nor a list.

        Raises:
            ValueError: no range, an empty one or list, both, or a logarithm of numbers below 0.
        """
        ranged = self.low is not None and self.high is not None
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("give low and high, or choices that are not empty")
        elif not ranged:
            raise ValueError("give low and high, or choices that are not empty")
        elif not (self.low or 0) < (self.high or 0):
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        elif self.log and (self.low or 0) <= 0:
            raise ValueError(f"log needs numbers above 0, and low = {self.low:g}")


@dataclass(frozen=True, config=STRICT)
class Tune:
    """What `twotower train --trials N` tries, and how it judges."""

    space: dict[str, Span] = field(default_factory=dict)
    """Keys of this file, such as `"train.temperature"`, with the values that they may take; without any, the number of
    epochs alone is chosen."""
    holdout: Text | None = None
    """What of the training events is validation, for `twotower fuse` too: `time:Q`, `since:DAY`, `leave-one-out`,
    `pause:DAYS` or, without time, `random:SHARE`; absent = as the workspace's own hold-out was cut."""
    metric: Annotated[str, Field(pattern=r"^(recall|ndcg|hit)@[1-9]\d{0,5}$")] = "recall@50"
    """What is to be greatest: `recall@K`, `ndcg@K` or `hit@K`."""
    patience: Positive = 3
    """A trial ends after so many epochs that were no better than its best."""
    seed: Whole = 0
    """Of the search."""


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """How a model is judged."""

    k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [10, 20, 50, 200])
    """Cut-offs of the metrics."""
    bootstrap: Length = 1000
    """Resamples of users behind an interval."""
    context: bool = True
    """Ask each held-out user in the context of their first held-out request, where the hold-out has impressions and the
    model features of contexts; false = without a context."""
    channels_k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [200, 500, 2000])
    """Cut-offs of `evaluate --channels`; those above the size of the catalogue are cut to it."""


@dataclass(frozen=True, config=STRICT)
class Fusion:
    """How the channels' candidates become one list, and what `twotower fuse` chooses; `serve.fusion` is the method."""

    weights: dict[Channel, NotNegative] = field(default_factory=dict)
    """By channel; one without weighs 1. 0 = its items only fill places that all others leave free. Absent = what
    `twotower fuse` chose, or else all weigh 1."""
    constants: dict[Channel, NotNegative] = field(default_factory=dict)
    """`rrf`: of weight / (constant + rank), by channel; one without has 60. Small = its first ones count most."""
    reserved: dict[Channel, Share] = field(default_factory=dict)
    """By channel, the least share of the places of the one list that it has, such as `{ new_items = 0.05 }`, so that
    new items are shown before anything is known of them; set by hand, whatever the weights are."""
    depth: Length = 1000
    """Candidates that each channel is asked for where several are fused, and at least as many as are wanted."""
    k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [200, 500])
    """Lengths of the list at which `twotower fuse` raises recall, their mean."""
    users: Positive = 5000
    """Users of validation that it looks at, at most, evenly from all parts."""
    parts: Positive = 1
    """Validation parts that it looks at: each is held out of what the one after it left to learn from, such as a day
    and the days before it. More show what holds on other days than one."""


@dataclass(frozen=True, config=STRICT)
class Index:
    """The index of item vectors."""

    kind: Literal["exact", "faiss", "milvus", "pgvector"] = "faiss"
    """`exact` scans every vector; `faiss` scans small catalogues and probes lists of large ones."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the exact answer that the index must find; its probes are tuned to it when a version is published."""


@dataclass(frozen=True, config=STRICT)
class FeatureStore:
    """Where a server keeps what it learns of a user."""

    kind: Literal["lmdb", "redis"] = "lmdb"
    """`lmdb` is embedded."""
    url: Text | None = None
    """Address of an external store."""


@dataclass(frozen=True, config=STRICT)
class ImpressedFilter:
    """A user's impressions beyond the latest 2000: in Bloom filters, which take some other items for shown."""

    items: Positive = 10_000
    """Items shown to one user within `impressed_window_s` that the filters are made for; of more, the error grows in
    proportion."""
    error_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of other items that is left out with them."""
    periods: Positive = 7
    """Periods that the window is cut into; an impression may be left out for up to one period longer."""


@dataclass(frozen=True, config=STRICT)
class Serve:
    """The HTTP server."""

    host: Text = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the public API; 0 = any free one."""
    admin_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port of the admin verbs, on 127.0.0.1 alone; 0 = any free one."""
    fusion: Literal["quota", "rrf"] = "rrf"
    """How channels become one list, unless `twotower fuse` has chosen; see `[fusion]`."""
    exclude: Literal["clicked", "impressed", "none"] = "impressed"
    """What a user is not offered again."""
    impressed_window_s: PositiveReal = 86400.0
    """How long an impression is left out."""
    impressed_filter: ImpressedFilter = field(default_factory=ImpressedFilter)
    """What of a user's impressions is kept beyond the latest 2000."""
    channel_timeout_ms: PositiveReal = 200.0
    """How long a request with several channels waits for them; one that is slower is left out of the answer."""
    features: FeatureStore = field(default_factory=FeatureStore)
    """Where a server keeps what it learns of a user."""


@dataclass(frozen=True, config=STRICT)
class Funnel:
    """What `POST /v1/recommend` does with candidates: each stage hands so many on to the next."""

    retrieve: Positive = 2000
    """Candidates of the fused list, for the pre-ranker."""
    pre_rank: Positive = 200
    """The pre-ranker's best, for the ranker; without a pre-ranker so many are retrieved."""
    rank: Positive = 50
    """The ranker's best, good enough to be shown; the others of its order are its tail."""
    page: Positive = 10
    """Items of a page, unless a request says otherwise."""
    explore_share: Share = 0.1
    """Of requests, whose last place goes to a candidate that has no place, drawn evenly."""
    logged: Positive = 20
    """Items of each outcome but `impressed` that a request's record has."""
    cosine: NotNegative = 4.0
    """Rankers order by their log-odds plus so many times the two towers' cosine: they know little of what was never
    shown. 0 = by their log-odds alone."""

    def __post_init__(self) -> None:
        """Refuse stages that widen.

        Raises:
            ValueError: a stage lets more items through than it gets.
        """
        sizes = {name: getattr(self, name) for name in ("retrieve", "pre_rank", "rank", "page")}
        for (before, most), (name, size) in itertools.pairwise(sizes.items()):
            if size > most:
                raise ValueError(f"{name} = {size}, but {before} = {most}: a stage cannot hand on more than it gets")


@dataclass(frozen=True, config=STRICT)
class EventLog:
    """The append-only log of raw events."""

    kind: Literal["local", "redis", "kafka"] = "local"
    """`local` is embedded."""
    url: Text | None = None
    """Address of an external log: `redis://HOST:6379/0`, or `HOST:9092` of Kafka's brokers, with commas."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "twotower"
    """`redis`, `kafka`: before the log's keys, or the name of its topic."""
    partitions: Positive = 4
    """Partitions by user, fixed when a log is made."""
    sync: Literal["always", "interval", "never"] = "always"
    """When an event counts as on disk: `always` flushes before it is acknowledged, `interval` flushes every `sync_s`
    seconds, `never` leaves it to the operating system (safe from a killed process, not from a power cut). A Redis
    server that does less is refused; Kafka acknowledges what all its replicas have."""
    sync_s: PositiveReal = 1.0
    """Seconds between flushes with `interval`."""
    erase_every_s: PositiveReal = 3600.0
    """Seconds between passes of the server over the log in which it erases the events of deleted users; a pass reads
    the whole log, and is made only if somebody was deleted since the last. In Kafka only retention erases."""


@dataclass(frozen=True, config=STRICT)
class Stream:
    """Events as they happen."""

    log: EventLog = field(default_factory=EventLog)
    """The append-only log of raw events."""
    window_s: PositiveReal = 600.0
    """How long a click may follow its request: what was not clicked leaves the joiner then. Event time."""
    lateness_s: NotNegative = 30.0
    """How far events may be out of order; a click waits so long for a request that comes after it."""
    late_s: NotNegative = 3600.0
    """How long after its window a request is remembered: a click that comes then still gets what was logged with it."""
    idle_s: NotNegative = 600.0
    """A partition of the log without new events no longer holds back the others once they are this far ahead of it, in
    event time."""
    shard_events: Positive = 10_000
    """Events of the log that one shard is made of at most."""
    merged_mb: Positive = 256
    """Shards of one hour are merged up to this size."""
    follow_s: PositiveReal = 0.25
    """`join --follow`: pause between two looks at the log."""


@dataclass(frozen=True, config=STRICT)
class Gate:
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
class Bounds:
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
class Update:
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
    bounds: Bounds = field(default_factory=Bounds)
    """What one user and one item can move."""
    gate: Gate = field(default_factory=Gate)
    """What a delta must keep."""


@dataclass(frozen=True, config=STRICT)
class Settings:
    """A whole configuration: one section a stage."""

    workspace: Workspace = field(default_factory=Workspace)
    engine: Engine = field(default_factory=Engine)
    features: Features = field(default_factory=Features)
    samples: Samples = field(default_factory=Samples)
    models: Models = field(default_factory=Models)
    train: Train = field(default_factory=Train)
    pre_rank: PreRank = field(default_factory=PreRank)
    rank: Rank = field(default_factory=Rank)
    tune: Tune = field(default_factory=Tune)
    evaluate: Evaluate = field(default_factory=Evaluate)
    fusion: Fusion = field(default_factory=Fusion)
    index: Index = field(default_factory=Index)
    serve: Serve = field(default_factory=Serve)
    funnel: Funnel = field(default_factory=Funnel)
    stream: Stream = field(default_factory=Stream)
    update: Update = field(default_factory=Update)
