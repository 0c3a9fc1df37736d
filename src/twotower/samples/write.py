"""The files of samples that have a row for each event, written in an order that has no ties."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
from ibis import _

from twotower.features.columns import to_arrow
from twotower.features.fitted import Fitted
from twotower.samples.columns_file import write_columns
from twotower.samples.fitting import as_stored
from twotower.samples.known import KnownEvents
from twotower.samples.names import CONTEXT, COPIES, HARD, HISTORY_COUNT, ITEM_ROW, LABEL, USER_ROW
from twotower.schema import columns as c

_ROWS = {USER_ROW: pa.int32(), ITEM_ROW: pa.int32(), HISTORY_COUNT: pa.int32()}


def write_positives(
    known: KnownEvents, path: Path, positives: Any, context: Sequence[Fitted], sources: Sequence[str]
) -> None:
    """One row for each positive, in the order of time, context encoded."""
    by_time = [c.REQUEST_TS_MS, c.EVENT_SEQ, USER_ROW, ITEM_ROW]
    order = by_time if known.timed else [USER_ROW, ITEM_ROW, c.EVENT_SEQ]
    hard = {f"{HARD}{source}": pa.int32() for source in sources}
    kinds = {**_ROWS, COPIES: pa.int32(), c.WEIGHT: pa.float32(), c.TS_MS: pa.int64(), **hard}
    _write_encoded(known, path, positives.order_by(order), kinds, context)


def write_impressions(known: KnownEvents, path: Path, shown: Any, context: Sequence[Fitted]) -> None:
    """One row for each item that was shown, in the order of time, a request's by position, context encoded."""
    order = [c.REQUEST_TS_MS, USER_ROW, c.POSITION, c.EVENT_SEQ, ITEM_ROW, LABEL]
    kinds = {**_ROWS, LABEL: pa.int8(), c.POSITION: pa.int32(), c.TS_MS: pa.int64()}
    _write_encoded(known, path, shown.order_by(order), kinds, context)


def _write_encoded(
    known: KnownEvents, path: Path, rows: Any, kinds: Mapping[str, pa.DataType], context: Sequence[Fitted]
) -> None:
    """Rows in their order: some columns as they are, those of the context encoded."""
    features = {f"{CONTEXT}{feature.name}": feature for feature in context}
    at = _[c.REQUEST_TS_MS] if known.timed else ibis.literal(0, "int64")
    rows = rows.mutate(**{HISTORY_COUNT: _[HISTORY_COUNT].cast("int32"), c.TS_MS: at}).select(*kinds, *features)

    def encoded() -> Iterator[pa.RecordBatch]:
        for batch in known.engine.batches(rows):
            columns = {name: batch.column(name) for name in kinds}
            for name, feature in features.items():
                columns[name] = to_arrow(feature.encode(as_stored(known.context[name], batch.column(name))))
            yield pa.record_batch(columns)

    encodings = {name: _of_any_length(to_arrow(feature.absent(1)).type) for name, feature in features.items()}
    write_columns(path, pa.schema({**kinds, **encodings}), encoded())


def _of_any_length(kind: pa.DataType) -> pa.DataType:
    """The type of an encoded column in a file of any length."""
    return pa.large_list(kind.value_type) if pa.types.is_list(kind) else kind


def write_clicks(known: KnownEvents, path: Path, clicks: Any) -> None:
    """Every user's clicked items in the order of time, users in the order of their rows."""
    at = _[c.CLICK_TS_MS] if known.timed else ibis.literal(0, "int64")
    by_time = [USER_ROW, c.CLICK_TS_MS, c.EVENT_SEQ, ITEM_ROW]
    order = by_time if known.timed else [USER_ROW, ITEM_ROW, c.EVENT_SEQ]
    chosen = clicks.order_by(order).mutate(**{c.TS_MS: at}).select(ITEM_ROW, c.TS_MS)
    write_columns(path, pa.schema({ITEM_ROW: pa.int32(), c.TS_MS: pa.int64()}), known.engine.batches(chosen))
