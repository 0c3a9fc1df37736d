"""Options of the channels."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import (
    STRICT,
    AtLeastOne,
    Length,
    NotNegative,
    Positive,
    PositiveReal,
    Share,
    Text,
    Whole,
    Width,
    at_most,
)
from twotower.towers.options import TowerOptions

Channel = Literal["two_tower", "item_cf", "swing", "popular", "mind", "mf", "als", "new_items", "same_category"]


@dataclass(frozen=True, config=STRICT)
class MFOptions:
    """Matrix factorisation: the trainer of the two towers with an id on each side and no network."""

    epochs: Positive | None = None
    """Passes over the positives; absent = `train.epochs`."""


@dataclass(frozen=True, config=STRICT)
class MindOptions:
    """Several vectors of a user, one for each interest in the click history; the rest as in the two towers."""

    interests: Annotated[int, Field(ge=2), at_most(1000)] = 4
    """A user has at most this many vectors."""
    rounds: Annotated[int, Field(gt=0), at_most(100)] = 3
    """Rounds of the routing of clicks to interests."""
    epochs: Positive | None = None
    """Passes over the positives; absent = `train.epochs`."""


@dataclass(frozen=True, config=STRICT)
class ALSOptions:
    """Implicit ALS: matrix factorisation over all pairs of users and items, clicked or not."""

    factors: Width = 64
    """Length of the factors of a user and of an item."""
    regularization: PositiveReal = 0.05
    """A greater value keeps factors nearer to zero, for users and items alike."""
    confidence: AtLeastOne = 10.0
    """Weight of a clicked item; an item that was not clicked has 1."""


@dataclass(frozen=True, config=STRICT)
class PopularOptions:
    """The most clicked items."""

    window_days: PositiveReal | None = None
    """Count the last days only, such as 0.25; absent = all days."""
    half_life_days: PositiveReal | None = None
    """A click that is this much older than the latest counts half; absent = all count alike."""
    segment: Text | None = None
    """A categorical or bucketed feature of users or context, each value of which has a list; absent = one for all."""
    prior: NotNegative = 0.0
    """Clicks that each segment gets in addition to its own, distributed as the clicks of all are, such as 30; 0 =
    none."""


@dataclass(frozen=True, config=STRICT)
class NewItemsOptions:
    """Items with few clicks or none, found by their features."""

    most_clicks: Whole = 0
    """An item with at most this many training positives is new."""


@dataclass(frozen=True, config=STRICT)
class SameCategoryOptions:
    """The most clicked items of the categories, authors, ... that a user clicked."""

    attributes: list[Text] = field(default_factory=list)
    """Categorical or multi-valued features of items; at least one where the channel is used."""
    last: Length = 50
    """This many latest clicks of a user count."""
    items: Positive = 500
    """At most this many items are kept of each category."""


@dataclass(frozen=True, config=STRICT)
class ItemCFOptions:
    """Items clicked by the same users: w_u l_ui l_uj summed over the users u of both, over
    n_i^(1 - popularity) n_j^popularity, with l the interest of a user in an item, n the sum of its squares over the
    users of an item, and w_u = (items of u)^-activity.
    """

    neighbours: Length = 200
    """This many nearest items are kept of each item."""
    latest: Length = 200
    """This many latest clicks of a user are looked up."""
    items: Positive = 500
    """Distinct items of a user that count, the latest: pairs grow with the square of their number."""
    popularity: Share = 0.3
    """Exponent of the candidate's number of users: a greater one prefers rarer items; 0.5 = the cosine."""
    activity: Annotated[float, Field(ge=0, le=2)] = 0.5
    """Exponent of the number of a user's items, which divides the user's weight; 0 = all users count alike."""
    interest: Literal["clicked", "clicks", "weight"] = "clicked"
    """Degree of interest in an item: `clicked`: 1; `clicks`: 1 + ln(number of clicks), also when asked; `weight`: the
    sum of the weights of its training rows (`samples.weight`, `samples.impressed_weight`)."""
    recency: NotNegative = 0.0
    """A click followed by c later ones counts (1 + c)^-recency; 0 = all alike."""
    normalise: bool = True
    """The similarities of an item's neighbours are divided by their sum."""


@dataclass(frozen=True, config=STRICT)
class SwingOptions:
    """Items that many pairs of users with little else in common clicked: w_u w_v / (alpha + common items of u and v)
    summed over the pairs of users of both items, over (users of the candidate)^popularity, with
    w_u = (items of u + offset)^-activity.
    """

    neighbours: Length = 100
    """This many nearest items are kept of each item."""
    latest: Length = 200
    """This many latest clicks of a user are looked up."""
    items: Positive = 500
    """Distinct items of a user that count, the latest: pairs grow with the square of their number."""
    users: Positive = 1000
    """Users of an item that count, chosen by a hash; time grows with the square of their number."""
    alpha: PositiveReal = 1.0
    """Added to the number of items that two users have in common: a greater value makes that number matter less."""
    activity: Annotated[float, Field(ge=0, le=2)] = 0.35
    """Exponent of the number of a user's items, which divides the user's weight."""
    offset: NotNegative = 5.0
    """Added to the number of a user's items."""
    popularity: Share = 0.2
    """Exponent of the candidate's number of users; 0 = Swing as published."""
    recency: NotNegative = 0.0
    """A click followed by c later ones counts (1 + c)^-recency; 0 = all alike."""
    normalise: bool = True
    """The similarities of an item's neighbours are divided by their sum."""


@dataclass(frozen=True, config=STRICT)
class ModelsOptions:
    """The channels, and the shape of the towers."""

    channels: Annotated[list[Channel], Field(min_length=1)] = field(
        default_factory=lambda: ["two_tower", "item_cf", "popular"]
    )
    """Channels to train, publish and serve."""
    rankers: list[Literal["pre_rank", "rank"]] = field(default_factory=list)
    """Rankers of the funnel to train, publish and serve; for logs that say what was shown and not clicked."""
    dimension: Width = 64
    """Length of the vectors and of the id embeddings."""
    user_tower: TowerOptions = field(default_factory=TowerOptions)
    """The tower of users and context."""
    item_tower: TowerOptions = field(default_factory=TowerOptions)
    """The tower of items."""
    mf: MFOptions = field(default_factory=MFOptions)
    """The channel `mf`."""
    mind: MindOptions = field(default_factory=MindOptions)
    """The channel `mind`."""
    als: ALSOptions = field(default_factory=ALSOptions)
    """The channel `als`."""
    popular: PopularOptions = field(default_factory=PopularOptions)
    """The channel `popular`; the baseline of an evaluation is always of all clicks."""
    new_items: NewItemsOptions = field(default_factory=NewItemsOptions)
    """The channel `new_items`."""
    same_category: SameCategoryOptions = field(default_factory=SameCategoryOptions)
    """The channel `same_category`."""
    item_cf: ItemCFOptions = field(default_factory=ItemCFOptions)
    """The channel `item_cf`."""
    swing: SwingOptions = field(default_factory=SwingOptions)
    """The channel `swing`."""
