"""Options of the vector index."""

from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Address

ADDRESSES: Final = {"milvus": "http://localhost:19530", "pgvector": "postgresql://localhost:5432/twotower"}
"""Examples for the addresses of vector databases, by kind."""


@dataclass(frozen=True, config=STRICT)
class IndexOptions:
    """The index of item vectors."""

    kind: Literal["exact", "faiss", "milvus", "pgvector"] = "faiss"
    """`exact` scans every vector; `faiss` scans small catalogues and probes lists of large ones; `milvus` and
    `pgvector` are databases that every version is loaded into."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the exact answer that the index must find; its probes are tuned to it when a version is published."""
    url: Address | None = None
    """Address of the database: `http://HOST:19530` of Milvus (`https` for TLS), or `postgresql://HOST:5432/DATABASE`,
    which takes parameters such as `?sslmode=verify-full`. User and password come from the environment:
    `TWOTOWER_INDEX_USER`, `TWOTOWER_INDEX_PASSWORD`."""

    def __post_init__(self) -> None:
        """Refuse a database without an address, and an address without a database.

        Raises:
            ValueError: with what to set.
        """
        example = ADDRESSES.get(self.kind)
        if example and not (self.url or "").startswith(_SCHEMES[self.kind]):
            seen = "no address" if self.url is None else f"the address {self.url}"
            raise ValueError(f'kind = "{self.kind}" with {seen}: set url, such as "{example}"')
        if self.url is not None and not example:
            raise ValueError(f'url = "{self.url}", but kind = "{self.kind}" is embedded: leave it out')


_SCHEMES: Final = {"milvus": ("http://", "https://"), "pgvector": ("postgresql://", "postgres://")}
