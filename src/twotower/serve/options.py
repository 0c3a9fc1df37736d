"""Options of the server and of its funnel."""

import itertools
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.features.options import FeatureStoreOptions
from twotower.schema.options import STRICT, NotNegative, Positive, PositiveReal, Share, Text


@dataclass(frozen=True, config=STRICT)
class ImpressedFilterOptions:
    """A user's impressions beyond the latest 2000: in Bloom filters, which take some other items for shown."""

    items: Positive = 10_000
    """Items shown to one user within `impressed_window_s` that the filters are made for; of more, the error grows in
    proportion."""
    error_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of other items that is left out with them."""
    periods: Positive = 7
    """Periods that the window is cut into; an impression may be left out for up to one period longer."""


@dataclass(frozen=True, config=STRICT)
class ServeOptions:
    """The HTTP server."""

    host: Text = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the public API; 0 = any free one."""
    admin_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port of the admin verbs, on 127.0.0.1 alone; 0 = any free one."""
    exclude: Literal["clicked", "impressed", "none"] = "impressed"
    """What a user is not offered again."""
    impressed_window_s: PositiveReal = 86400.0
    """How long an impression is left out."""
    impressed_filter: ImpressedFilterOptions = field(default_factory=ImpressedFilterOptions)
    """What of a user's impressions is kept beyond the latest 2000."""
    channel_timeout_ms: PositiveReal = 200.0
    """How long a request with several channels waits for them; one that is slower is left out of the answer."""
    features: FeatureStoreOptions = field(default_factory=FeatureStoreOptions)
    """Where a server keeps what it learns of a user."""


@dataclass(frozen=True, config=STRICT)
class FunnelOptions:
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
