"""HTTP: users and items that are put or deleted while the server runs.

A change goes into the log, which all servers and the updater read. This server applies it before it answers, the others
within a fifth of a second.
"""

import uuid
from typing import Any

import pyarrow as pa
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import Field, StrictBool

from twotower.features.feature_set import encode_request
from twotower.logs import Event
from twotower.logs.events import CATALOGUE, NOBODY, item_deleted, item_event, user_deleted, user_event
from twotower.publish.overlay import check_item
from twotower.schema import columns as c
from twotower.schema.errors import DataError, cut
from twotower.serve.answers import json_response, problem
from twotower.serve.bodies import Body, parse_id
from twotower.serve.parts import ServerParts
from twotower.serve.request import find_items


class ItemBody(Body):
    """An item."""

    features: dict[str, Any] | None = Field(
        None, description="All its attributes, by name; they replace what it had. Absent = they stay, for a known item."
    )
    available: StrictBool | None = Field(None, description="false = it is not retrieved; absent = as it was.")


class FeaturesBody(Body):
    """A user."""

    features: dict[str, Any] = Field(
        default_factory=dict, description="All features by name; they replace what they had."
    )


def add_entities(app: FastAPI, parts: ServerParts) -> None:
    """Add the routes `PUT|DELETE /v1/items/{id}` and `/v1/users/{id}`."""

    def written(name: str, entity_id: int | str, event: Event) -> Response:
        parts.append([event])
        parts.snapshots.refresh()
        version = parts.version
        return json_response({name: entity_id, "version": version.id, "delta_seq": version.delta_seq})

    @app.put("/v1/items/{item_id:path}")
    def put_item(item_id: str, body: ItemBody) -> Response:
        """Put an item: it is retrieved from its features at once, without training."""
        version = parts.version
        known_id = _entity_id(item_id, version.items.kind, "item")
        if body.features is not None:
            check_item(version, body.features)
        elif find_items(version, [known_id])[0] < 0:
            raise DataError(f"item {cut(item_id)} is new: give its features, {{}} if nothing is known of it")
        event = item_event(uuid.uuid4().hex, parts.clock_ms(), known_id, body.features, body.available)
        return written(c.ITEM_ID, known_id, event)

    @app.delete("/v1/items/{item_id:path}")
    def delete_item(item_id: str) -> Response:
        """Delete an item: it is in no answer any more."""
        version = parts.version
        known_id = _entity_id(item_id, version.items.kind, "item")
        entity = parts.users.entities.items.get(known_id)
        if entity.deleted if entity is not None else find_items(version, [known_id])[0] < 0:
            return problem(404, f"there is no item {cut(item_id)}")
        return written(c.ITEM_ID, known_id, item_deleted(uuid.uuid4().hex, parts.clock_ms(), known_id))

    @app.put("/v1/users/{user_id:path}")
    def put_user(user_id: str, body: FeaturesBody) -> Response:
        """Put a user with their features."""
        version = parts.version
        known_id = _entity_id(user_id, version.users.ids.type, "user")
        own = [feature for feature in version.features.user_columns if feature.name != c.USER_ID]
        encode_request(own, body.features, "features")
        return written(c.USER_ID, known_id, user_event(uuid.uuid4().hex, parts.clock_ms(), known_id, body.features))

    @app.delete("/v1/users/{user_id:path}")
    def delete_user(user_id: str) -> Response:
        """Delete a user: features, clicks and impressions are forgotten, and the log erases their events."""
        known_id = _entity_id(user_id, parts.version.users.ids.type, "user")
        return written(c.USER_ID, known_id, user_deleted(uuid.uuid4().hex, parts.clock_ms(), known_id))


def _entity_id(text: str, kind: pa.DataType, what: str) -> int | str:
    entity_id = parse_id(text, kind)
    if entity_id in ("", CATALOGUE, NOBODY):
        raise DataError(f"{text!r} is no id of a {what}")
    return entity_id
