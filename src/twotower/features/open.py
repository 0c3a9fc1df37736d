"""The configured feature store."""

import importlib
from pathlib import Path
from typing import Any

from twotower.features.options import FeatureStoreOptions
from twotower.features.store import FeatureStore, LmdbFeatureStore
from twotower.schema.errors import ConfigError


def open_store(options: FeatureStoreOptions, folder: Path) -> FeatureStore:
    """A feature store; `folder` is for the files of an `lmdb` one.

    Raises:
        ConfigError: a client that is not installed, or an address that cannot be read.
        FeatureStoreError: it cannot be opened.
    """
    if options.kind == "lmdb":
        return LmdbFeatureStore(folder)
    assert options.url is not None  # as the section itself says
    store: FeatureStore = _client().RedisFeatureStore(options.url, options.name)
    return store


def describe_store(options: FeatureStoreOptions) -> str:
    """What keeps the store, and its version; it is not opened, which would take it from a running server.

    Raises:
        ConfigError: a client that is not installed, or an address that cannot be read.
        FeatureStoreError: the server does not answer, or refuses.
    """
    described: str = "LMDB, embedded" if options.url is None else _client().describe(options.url)
    return described


def _client() -> Any:
    try:
        return importlib.import_module("twotower.features.redis_store")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'serve.feature_store.kind = "redis" needs a client that is not installed ({error}): '
            'pip install "twotower[redis]"'
        ) from None
