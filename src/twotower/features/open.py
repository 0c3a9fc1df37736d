"""The configured feature store."""

from pathlib import Path

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
    try:
        from twotower.features.redis_store import RedisFeatureStore
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'serve.feature_store.kind = "redis" needs a client that is not installed ({error}): '
            'pip install "twotower[redis]"'
        ) from None
    assert options.url is not None  # as the section itself says
    return RedisFeatureStore(options.url, options.name)
