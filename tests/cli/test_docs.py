import re
from pathlib import Path

import typer.main

from twotower.cli.main import app

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


LAB = {"lab list", "lab run", "lab report"}


def commands() -> dict[str, list[str]]:
    """Every command of the program, and the names of its options."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {})
        for part, leaf in (
            {f"{name} {sub}": leaf for sub, leaf in inner.items()}.items() if inner else [(name, command)]
        ):
            found[part] = [option for parameter in leaf.params for option in parameter.opts]
    return found


def test_the_page_lists_every_command_and_no_other() -> None:
    assert re.findall(r"^\| `([a-z]+(?: [a-z]+)?)` \|", PAGE, re.MULTILINE) == sorted(
        commands(), key=lambda name: PAGE.index(f"| `{name}` |")
    )


def test_every_command_but_those_that_make_a_workspace_takes_a_configuration() -> None:
    assert {name for name, options in commands().items() if "--set" not in options} == {
        "init",
        "import",
        "simulate",
    } | LAB
    assert {name for name, options in commands().items() if "--config" not in options} == {
        "init",
        "simulate",
        "demo",
    } | LAB


def test_the_options_that_the_page_names_exist() -> None:
    known = {option for options in commands().values() for option in options} | {"--no-promote", "--help", "--version"}
    assert set(re.findall(r"`?(--[a-z]+(?:-[a-z]+)*)", PAGE)) <= known
