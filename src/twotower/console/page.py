"""The page at `/` and the routes that it uses beside the public API.

The page is static: HTML, CSS and JavaScript of this package, with no request to anywhere else. Recommendations, similar
items, clicks and the served version go through `/v1`, as for any other client. The routes here add what only a page for
people needs: titles and attributes of items, a user's history, users to begin with.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import Field

from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.serve.answers import json_response
from twotower.serve.bodies import Body, Id, parse_id
from twotower.serve.parts import ServerParts
from twotower.serve.request import clicks_since, find_items
from twotower.serve.users import ItemId, Recent

TITLE = "title"
"""The attribute that names an item; without it, the page shows ids."""

MAX_USERS = 100
MAX_HISTORY = 1000
MAX_ITEMS = 1000
MIN_CLICKS = 5
"""Users to begin with have at least this many clicks, where there are such users."""

_FILES = {
    "/": ("html", "text/html"),
    "/console/page.css": ("css", "text/css"),
    "/console/page.js": ("js", "text/javascript"),
}
"""End of the name and type of each static file, by its address."""
_READABLE = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_date,
    pa.types.is_timestamp,
)
_STATIC = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ItemsBody(Body):
    """Items whose attributes are asked for."""

    ids: Annotated[list[Id], Field(max_length=MAX_ITEMS)]


def add_page(app: FastAPI, parts: ServerParts) -> None:
    """Add the page at `/`, and the routes below `/console`, to the public application."""
    for path, (kind, media_type) in _FILES.items():
        _add_file(app, path, files("twotower.console").joinpath(f"page.{kind}").read_bytes(), media_type)

    @app.get("/console/meta", include_in_schema=False)
    def get_meta() -> Response:
        """Types of the ids, channels and attributes of the served version."""
        version = parts.version
        return _data(
            {
                "version": version.id,
                "users": len(version.users),
                "items": len(version.items),
                "user_id_type": _kind(version.users.ids.type),
                "item_id_type": _kind(version.items.kind),
                "channels": list(version.channels),
                "attributes": [name for name in shown_attributes(version) if name != TITLE],
            }
        )

    @app.get("/console/users", include_in_schema=False)
    def some_users(n: Annotated[int, Query(ge=1, le=MAX_USERS)] = 20) -> Response:
        """Ids of some users with clicks, spread over all."""
        version = parts.version
        clicks = np.diff(version.clicks.indptr)
        busy = np.flatnonzero(clicks >= min(MIN_CLICKS, clicks.max(initial=0)))
        chosen = busy[np.linspace(0, len(busy) - 1, min(n, len(busy))).astype(int)]
        return _data({"users": version.users.ids.take(pa.array(chosen)).to_pylist()})

    @app.get("/console/history", include_in_schema=False)
    def get_history(user_id: str, n: Annotated[int, Query(ge=1, le=MAX_HISTORY)] = 50) -> Response:
        """A user's clicks, newest first; none for someone never seen."""
        version = parts.version
        known_id = parse_id(user_id, version.users.ids.type)
        return _data(history(version, version.user_row(known_id), parts.users.get(known_id), n))

    @app.post("/console/items", include_in_schema=False)
    def get_items(body: ItemsBody) -> Response:
        """Titles and attributes of items, in the order asked."""
        version = parts.version
        return _data({"version": version.id, "items": describe(version, body.ids)})


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    def get_file() -> Response:
        """A static file."""
        return Response(content, media_type=media_type, headers=_STATIC)


def history(version: Version, user_row: int, recent: Recent, n: int) -> dict[str, Any]:
    """At most n clicks of a user, newest first: those of the log, then those that the version knows; counts of all.

    `user_row` is -1 for a user that the version does not know.
    """
    live = clicks_since(version, recent)
    start, end = version.clicks.indptr[user_row : user_row + 2].tolist() if user_row >= 0 else (0, 0)
    stored = max(start, end - max(n - len(live), 0))
    rows = version.clicks.item_row[stored:end]
    times = [*version.clicks.ts_ms[stored:end].tolist(), *(ts_ms for ts_ms, _ in live)]
    items = [*_at_rows(version, rows.astype(np.int64)), *describe(version, [item for _, item in live])]
    clicks = [
        {**item, c.TS_MS: ts_ms or None, "since_version": place >= len(rows)}
        for place, (item, ts_ms) in enumerate(zip(items, times, strict=True))
    ]
    return {
        "version": version.id,
        "known": user_row >= 0,
        "clicks": end - start + len(live),
        "since_version": len(live),
        "items": clicks[::-1][:n],
    }


def describe(version: Version, item_ids: Sequence[ItemId]) -> list[dict[str, Any]]:
    """Title and attributes of items; both are null for an item that the version does not have."""
    rows = find_items(version, item_ids)
    known = iter(_at_rows(version, rows[rows >= 0]))
    return [
        next(known) if row >= 0 else {c.ITEM_ID: item_id, TITLE: None, "attributes": None}
        for row, item_id in zip(rows.tolist(), item_ids, strict=True)
    ]


def shown_attributes(version: Version) -> list[str]:
    """Columns of the catalogue that people can read: words, numbers, times and lists of words; no vectors."""
    return [field.name for field in version.attributes.schema if field.name != c.ITEM_ID and _is_readable(field.type)]


def _at_rows(version: Version, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    names = shown_attributes(version)
    chosen = version.attributes.at(rows, [c.ITEM_ID, *names])
    return [
        {
            c.ITEM_ID: item[c.ITEM_ID],
            TITLE: item.get(TITLE),
            "attributes": {name: item[name] for name in names if name != TITLE},
        }
        for item in chosen
    ]


def _is_readable(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_readable(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return not pa.types.is_floating(kind.value_type) and _is_readable(kind.value_type)
    return any(is_of(kind) for is_of in _READABLE)


def _kind(ids: pa.DataType) -> str:
    return "int" if ids == pa.int64() else "string"


def _data(content: Any) -> Response:
    response = json_response(content)
    response.headers["Cache-Control"] = "no-store"
    return response
