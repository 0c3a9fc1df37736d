"""Names of the files of samples, of their columns, and of what stands before a column's name."""

from typing import Final

FORMAT: Final = 3

ITEMS_FILE: Final = "items.arrow"
USERS_FILE: Final = "users.arrow"
CLICKS_FILE: Final = "clicks.arrow"
POSITIVES_FILE: Final = "positives.arrow"
IMPRESSIONS_FILE: Final = "impressions.arrow"

USER_ROW: Final = "user_row"
ITEM_ROW: Final = "item_row"
HISTORY_COUNT: Final = "history"
COPIES: Final = "copies"
CLICKS: Final = "clicks"
POSITIVES: Final = "positives"
LABEL: Final = "is_clicked"

FEATURE: Final = "feature."
"""Before the name of an encoded column of users or items."""
CONTEXT: Final = "context."
"""Before the name of a context column, raw or encoded."""
HARD: Final = "hard."
"""Before the name of a source: how many hard negatives of it each positive has, and the file that lists them."""
WEIGHED_BY: Final = "weighed_by"
"""The column that weighs a positive."""

NO_POSITION: Final = 0
"""Position of an item when the log does not say where it was shown."""
NO_HISTORY: Final = -1
"""History count of data without time: the trainer draws histories anew each epoch."""
