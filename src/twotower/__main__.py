"""`python -m twotower` is `twotower`."""

from twotower.cli.main import main

main()
