"""HTTP: `POST /v1/events`."""

from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import Field

from twotower.logs import Event
from twotower.logs.events import CATALOGUE, ITEM, USER, Click, Content, Impression, LoggedRequest, check_event
from twotower.publish.version import Version
from twotower.schema.errors import DataError, shown
from twotower.schema.tables import is_id
from twotower.serve.answers import json_response
from twotower.serve.bodies import Body
from twotower.serve.parts import ServerParts

EVENTS_PATH = "/v1/events"
MAX_EVENTS = 10_000


class EventsBody(Body):
    """Raw events for the log."""

    events: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_EVENTS)]


def add_events(app: FastAPI, parts: ServerParts) -> None:
    """Add `POST /v1/events`."""

    @app.post(EVENTS_PATH, status_code=202)
    def post_events(body: EventsBody) -> Response:
        """Put events into the log; they count from the user's next request on."""
        version, now_ms = parts.version, parts.clock_ms()
        acks = parts.append(
            [_checked(document, f"events[{place}]", version, now_ms) for place, document in enumerate(body.events)]
        )
        duplicates = sum(ack.duplicate for ack in acks)
        parts.metrics.events.labels("accepted").inc(len(acks) - duplicates)
        parts.metrics.events.labels("duplicate").inc(duplicates)
        return json_response({"accepted": len(acks), "duplicates": duplicates}, 202)


def _checked(document: dict[str, Any], where: str, version: Version, now_ms: int) -> Event:
    """An event that this server can use.

    Raises:
        DataError: the log would refuse it; its ids are of another type; it is a click without an item.
    """
    try:
        event = Event.from_json(document)
        if event.type in (USER, ITEM) or event.user_id == CATALOGUE:
            raise DataError(f"type {shown(event.type)} is the server's own: PUT or DELETE /v1/items/ID or /v1/users/ID")
        check_event(event, now_ms)
        known = version.users.ids.type
        if not is_id(event.user_id, known):
            raise DataError(f"user_id {shown(event.user_id)}, but the ids of users are {known}")
        _check_items(event.content, event.type, version)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return event


def _check_items(content: Content, kind: str, version: Version) -> None:
    if not isinstance(content, LoggedRequest | Click | Impression):
        return
    if content.items is None and not isinstance(content, LoggedRequest):
        raise DataError(f"{kind} of nothing: name item_id, or a list of items")
    known = version.items.kind
    for item in content.items or ():
        if not is_id(item, known):
            raise DataError(f"item {shown(item)}, but the ids of items are {known}")
