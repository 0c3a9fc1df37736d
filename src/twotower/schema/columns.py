"""The names of columns and the values of `outcome`, said once for every stage."""

from typing import Final

USER_ID: Final = "user_id"
ITEM_ID: Final = "item_id"

EVENT_SEQ: Final = "event_seq"
REQUEST_ID: Final = "request_id"
REQUEST_TS_MS: Final = "request_ts_ms"
CLICK_TS_MS: Final = "click_ts_ms"
OUTCOME: Final = "outcome"
POSITION: Final = "position"
SCORE: Final = "score"
CHANNEL: Final = "channel"
WEIGHT: Final = "weight"
PROBABILITY: Final = "probability"
"""With which a rejected item was put into the request's record; 1 for what was shown."""
PROPENSITY: Final = "propensity"
"""With which exploration drew an item for its place; null elsewhere."""

# Further columns of a shard.
VERSION: Final = "version"
DELTA_SEQ: Final = "delta_seq"
HISTORY: Final = "history"
"""The items that the user had clicked, oldest first, as the request knew them."""
CONTEXT: Final = "context."
"""Before the name of a context value in a shard; a daily partition has the name alone."""
FEATURES: Final = "features."
"""Before the name of a user feature that came with a request."""
ROW: Final = "row"
"""The number of a row in its partition, through all shards."""

EVENT_TYPE: Final = "event_type"
"""A context of imported events, where the source knows it: view, click, like, cart, purchase or dislike."""

TS_MS: Final = "ts_ms"
REASON: Final = "reason"
RANK: Final = "rank"
VECTOR: Final = "vector"

AVAILABLE: Final = "available"
"""An optional boolean column of `items.parquet`: an item for which it is false is never retrieved."""

DATE: Final = "date"
"""The partition key of `events/`, a day of UTC, or `unknown` without a time."""
UNKNOWN_DATE: Final = "unknown"

# How far an item came in its request's funnel.
PRE_RANK_REJECTED: Final = "pre_rank_rejected"
RANK_REJECTED: Final = "rank_rejected"
RANKED_NOT_SHOWN: Final = "ranked_not_shown"
IMPRESSED: Final = "impressed"
CLICKED: Final = "clicked"
OUTCOMES: Final = (PRE_RANK_REJECTED, RANK_REJECTED, RANKED_NOT_SHOWN, IMPRESSED, CLICKED)

JOINED: Final = (
    EVENT_SEQ,
    REQUEST_ID,
    USER_ID,
    ITEM_ID,
    REQUEST_TS_MS,
    CLICK_TS_MS,
    OUTCOME,
    WEIGHT,
    POSITION,
    SCORE,
    CHANNEL,
    PROBABILITY,
    PROPENSITY,
    DATE,
)
"""The names that joined events have for themselves, in imported files and in those of the joiner."""

# Why a held-out positive is in `holdout_cold.parquet`.
NEW_USER: Final = "new_user"
NEW_ITEM: Final = "new_item"
