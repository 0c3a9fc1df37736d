"""`serve`: the server of `twotower.serve` with the page of `twotower.console`, out of a configuration."""

import logging
from collections.abc import Callable

from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.console.page import add_page
from twotower.pipeline.places import places
from twotower.schema.secrets import ADMIN_TOKEN, secret
from twotower.serve.run import Address, run_server

log = logging.getLogger(__name__)


def serve(settings: Settings, ready: Callable[[Address], None] | None = None) -> None:
    """Serve the promoted version of a workspace until a signal ends it.

    `ready` is called with the addresses when requests are answered; None = they are logged.

    Raises:
        VersionError: there is no version to serve.
        ConfigError: a port is taken.
    """
    check_available(settings)
    run_server(
        places(settings),
        settings.stream.log,
        settings.serve,
        settings.funnel,
        admin_token=secret(ADMIN_TOKEN),
        extend=add_page,
        ready=ready or (lambda address: log.info("serving %s at %s", address.version, address.url)),
    )
