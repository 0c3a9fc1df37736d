"""`serve`: the server of `twotower.serve` with the page of `twotower.console`, out of a configuration."""

import os
from collections.abc import Callable

from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.console.page import add_page
from twotower.pipeline.places import places
from twotower.serve.run import Address, run_server

TOKEN = "TWOTOWER_ADMIN_TOKEN"


def serve(settings: Settings, ready: Callable[[Address], None]) -> None:
    """Serve the promoted version of a workspace until a signal ends it."""
    check_available(settings)
    run_server(
        places(settings),
        settings.stream.log,
        settings.serve,
        settings.funnel,
        admin_token=os.environ.get(TOKEN) or None,
        extend=add_page,
        ready=ready,
    )
