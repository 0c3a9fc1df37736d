"""`serve`: the server of `twotower.serve` with the page of `twotower.console`, out of a configuration."""

import os
from collections.abc import Callable

from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.console.page import add_page
from twotower.features.bloom import Shape
from twotower.logs import open_log
from twotower.pipeline.places import places
from twotower.serve.funnel import Sizes
from twotower.serve.run import Address, run_server

TOKEN = "TWOTOWER_ADMIN_TOKEN"


def serve(settings: Settings, ready: Callable[[Address], None]) -> None:
    """Serve the promoted version of a workspace until a signal ends it."""
    check_available(settings)
    where, options, log = places(settings), settings.serve, settings.stream.log
    funnel = settings.funnel
    window_ms, kept = int(options.impressed_window_s * 1000), options.impressed_filter
    run_server(
        versions=where.versions,
        deltas=where.deltas,
        open_log=lambda: open_log(log.kind, where.log, log.url, log.name, log.partitions, log.sync, log.sync_s),
        store_folder=where.feature_store,
        erase_every_s=log.erase_every_s,
        host=options.host,
        port=options.port,
        admin_port=options.admin_port,
        admin_token=os.environ.get(TOKEN) or None,
        exclude=options.exclude,
        impressed_window_ms=window_ms,
        impressed_shape=Shape.of(window_ms, kept.periods, kept.items, kept.error_rate),
        channel_timeout_ms=options.channel_timeout_ms,
        sizes=Sizes(funnel.retrieve, funnel.pre_rank, funnel.rank, funnel.explore_share, funnel.logged, funnel.cosine),
        page=funnel.page,
        extend=add_page,
        ready=ready,
    )
