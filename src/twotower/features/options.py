"""Options of the features, and of the store of what a server learns of users."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema import columns as c
from twotower.schema.options import STRICT, Address, Length, Name, Text, Width, at_most
from twotower.schema.secrets import without_user

LABELS = (c.ITEM_ID, c.OUTCOME, c.CLICK_TS_MS)
"""Columns of events that no request can know: as a context they would tell the model its target."""


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
    blocks: Annotated[int, Field(gt=0), at_most(100)] = 2
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
        """Refuse a tower without features, a name on both sides of the user tower, and a context that is the target."""
        if not self.item:
            raise ValueError("features.item is empty: the item tower needs a feature, such as item_id")
        if not self.user and not self.context:
            raise ValueError("features.user is empty: the user tower needs a feature, such as user_id")
        if both := sorted(self.user.keys() & self.context.keys()):
            raise ValueError(f"{both[0]} is in features.user and in features.context: rename the column in one of them")
        if labels := sorted(self.context.keys() & set(LABELS)):
            raise ValueError(f"features.context.{labels[0]} is what the model is to find, no request knows it")
        user_tower = {"user": self.user, "context": self.context}
        if problems := [*_unusable(user_tower), *_unusable({"item": self.item})]:
            raise ValueError("; ".join(problems))


def _unusable(sides: Mapping[str, Mapping[str, Feature]]) -> list[str]:
    """What is wrong with the names of the features of one tower, by side of the configuration.

    Most internal columns have prefixes that keep names apart. Two places have none: daily partitions hold the context
    beside the columns of joined events, and a tower the length of a sequence beside it. Engines ignore case.
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
        problems += [
            f"{where} takes the name {reserved} too: rename one of the columns"
            for reserved in taken
            if reserved in names
        ]
    return problems


STORE_ADDRESS = "redis://localhost:6379/0"
"""An example for the address of a store."""


@dataclass(frozen=True, config=STRICT)
class FeatureStoreOptions:
    """Where a server keeps what it learns of users and items between versions."""

    kind: Literal["lmdb", "redis"] = "lmdb"
    """`lmdb` is embedded: a folder of the workspace."""
    url: Address | None = None
    """`redis`: address of the server, such as `redis://HOST:6379/0`; `rediss://` for TLS, with parameters such as
    `?ssl_ca_certs=FILE`. User and password come from the environment: `TWOTOWER_FEATURE_STORE_USER`,
    `TWOTOWER_FEATURE_STORE_PASSWORD`."""
    name: Name = "twotower"
    """`redis`: before the store's key. Stores of several workspaces on one server need different names."""

    def __post_init__(self) -> None:
        """Refuse Redis without an address, and an address without Redis.

        Raises:
            ValueError: with what to set.
        """
        if self.kind == "redis" and not (self.url or "").startswith(("redis://", "rediss://", "unix://")):
            seen = "no address" if self.url is None else f"the address {without_user(self.url)}"
            raise ValueError(f'kind = "redis" with {seen}: set url, such as "{STORE_ADDRESS}"')
        if self.kind == "lmdb" and self.url is not None:
            raise ValueError('url is the address of a server, but kind = "lmdb" is embedded: leave it out')
