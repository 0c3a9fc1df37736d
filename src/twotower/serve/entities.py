"""HTTP: users and items that are put or deleted while the server runs.

What is put goes into the log, where all servers and the updater see it, and from there over the served version. This
server takes it up before it answers, the others within a fifth of a second.
"""

import uuid
from typing import Any

import pyarrow as pa
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from twotower.features.feature_set import encode_request
from twotower.logs import Event, EventLog, EventLogError
from twotower.logs.events import CATALOGUE, NOBODY, item_deleted, item_event, user_deleted, user_event
from twotower.publish.overlay import check_item
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import DataError, cut
from twotower.serve.app import json_response, parse_id, problem
from twotower.serve.request import find_items
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import RecentUsers


class ItemBody(BaseModel):
    """An item."""

    model_config = ConfigDict(extra="forbid")

    features: dict[str, Any] | None = Field(
        None, description="All its attributes, by name; they replace what it had. Absent = they stay, for a known item."
    )
    available: StrictBool | None = Field(None, description="false = it is not retrieved; absent = as it was.")


class UserBody(BaseModel):
    """A user."""

    model_config = ConfigDict(extra="forbid")

    features: dict[str, Any] = Field(
        default_factory=dict, description="All features by name; they replace what they had."
    )


def add_entities(
    app: FastAPI,
    snapshots: Snapshots,
    event_log: EventLog,
    users: RecentUsers,
    clock_ms: ClockMs = now_ms,
) -> None:
    """Add the routes `PUT|DELETE /v1/items/{id}` and `/v1/users/{id}`."""

    def _write(event: Event) -> None:
        ack = event_log.append([event])[0]
        try:
            users.catch_up([ack.partition])
        except DataError as error:  # the log's damage, not the sender's
            raise EventLogError(f"it is in the log, but the log cannot be read: {error}") from error
        snapshots.refresh()

    @app.put("/v1/items/{item_id:path}")
    def put_item(item_id: str, body: ItemBody) -> Response:
        """Put an item: it is retrieved from its features at once, without training."""
        version = snapshots.version
        one = _entity_id(item_id, version.items.kind, "item")
        if body.features is None:
            if find_items(version, [one])[0] < 0:
                raise DataError(f"item {cut(item_id)} is new: give its features, {{}} if nothing is known of it")
        else:
            check_item(version, body.features)
        _write(item_event(uuid.uuid4().hex, clock_ms(), one, body.features, body.available))
        return _answer(snapshots, c.ITEM_ID, one)

    @app.delete("/v1/items/{item_id:path}")
    def delete_item(item_id: str) -> Response:
        """Delete an item: it is in no answer any more."""
        version = snapshots.version
        one = _entity_id(item_id, version.items.kind, "item")
        entity = users.entities.items.get(one)
        if entity.deleted if entity is not None else find_items(version, [one])[0] < 0:
            return problem(404, f"there is no item {cut(item_id)}")
        _write(item_deleted(uuid.uuid4().hex, clock_ms(), one))
        return _answer(snapshots, c.ITEM_ID, one)

    @app.put("/v1/users/{user_id:path}")
    def put_user(user_id: str, body: UserBody) -> Response:
        """Put a user with their features."""
        version = snapshots.version
        one = _entity_id(user_id, version.users.ids.type, "user")
        own = [feature for feature in version.features.user_columns if feature.name != c.USER_ID]
        encode_request(own, body.features, "features")
        _write(user_event(uuid.uuid4().hex, clock_ms(), one, body.features))
        return _answer(snapshots, c.USER_ID, one)

    @app.delete("/v1/users/{user_id:path}")
    def delete_user(user_id: str) -> Response:
        """Delete a user: features, clicks and impressions are forgotten, and the log erases their events."""
        one = _entity_id(user_id, snapshots.version.users.ids.type, "user")
        _write(user_deleted(uuid.uuid4().hex, clock_ms(), one))
        return _answer(snapshots, c.USER_ID, one)


def _entity_id(text: str, kind: pa.DataType, what: str) -> int | str:
    one = parse_id(text, kind)
    if one in ("", CATALOGUE, NOBODY):
        raise DataError(f"{text!r} is no id of a {what}")
    return one


def _answer(snapshots: Snapshots, name: str, one: int | str) -> Response:
    version = snapshots.version
    return json_response({name: one, "version": version.id, "delta_seq": version.delta_seq})
