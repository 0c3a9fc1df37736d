"""Options of the server and of its funnel."""

import itertools
from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.features.options import FeatureStoreOptions
from twotower.schema.options import STRICT, Exclude, NotNegative, Positive, PositiveReal, Share, Text


@dataclass(frozen=True, config=STRICT)
class ServeOptions:
    """The HTTP server."""

    host: Text = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the public API; 0 = any free one."""
    admin_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port of the admin verbs, on 127.0.0.1 alone; 0 = any free one."""
    exclude: Exclude = "impressed"
    """What a user is not offered again."""
    impressed_window_s: PositiveReal = 86400.0
    """How long an impression is left out."""
    impressed_items: Positive = 10_000
    """Expected number of impressions of one user within `impressed_window_s`. Those beyond the latest 2000 are kept in
    filters that leave out 1 % of other items by mistake; with more of them the error grows in proportion."""
    start_without_index: bool = False
    """Start, and take up versions, although their vector database does not answer: its channels are left out of answers
    until it does."""
    channel_timeout_ms: PositiveReal = 200.0
    """How long a request with several channels waits for them; one that is slower is left out of the answer."""
    feature_store: FeatureStoreOptions = field(default_factory=FeatureStoreOptions)
    """Where the server keeps what it learns of users and items between versions."""


@dataclass(frozen=True, config=STRICT)
class FunnelOptions:
    """How many candidates each stage of `POST /v1/recommend` hands on to the next."""

    retrieve: Positive = 2000
    """Candidates of the fused list, for the pre-ranker."""
    pre_rank: Positive = 200
    """The pre-ranker's best, for the ranker; without a pre-ranker, this many are retrieved."""
    rank: Positive = 50
    """The ranker's best, good enough to be shown; the others of its order are its tail."""
    page: Positive = 10
    """Items of a page, unless a request says otherwise."""
    explore_share: Share = 0.1
    """Share of requests whose last place goes to a candidate without a place, drawn evenly."""
    logged: Positive = 20
    """Items of each other outcome than `impressed` in a request's record."""
    cosine: NotNegative = 4.0
    """Rankers order by their log-odds plus this weight times the two towers' cosine, because they know little of what
    was never shown. 0 = by their log-odds alone."""

    def __post_init__(self) -> None:
        """Refuse stages that widen.

        Raises:
            ValueError: a stage lets more items through than it gets.
        """
        sizes = {name: getattr(self, name) for name in ("retrieve", "pre_rank", "rank", "page")}
        for (before, most), (name, size) in itertools.pairwise(sizes.items()):
            if size > most:
                raise ValueError(f"{name} = {size}, but {before} = {most}: a stage cannot hand on more than it gets")
