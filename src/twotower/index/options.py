"""Options of the vector index."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT


@dataclass(frozen=True, config=STRICT)
class IndexOptions:
    """The index of item vectors."""

    kind: Literal["exact", "faiss"] = "faiss"
    """`exact` scans every vector; `faiss` scans small catalogues and probes lists of large ones."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the exact answer that the index must find; its probes are tuned to it when a version is published."""
