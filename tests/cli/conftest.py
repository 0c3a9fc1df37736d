import json
from collections.abc import Callable
from typing import Any

import pytest

from twotower.cli.main import app

Run = Callable[..., Any]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; gives its JSON, which is all that stdout may hold."""

    def ran(*arguments: object, code: int = 0) -> Any:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert (ended.value.code or 0) == code, captured.err
        ran.err = captured.err
        if code and not captured.out:
            return None
        assert captured.out.count("\n") == 1, captured.out
        return json.loads(captured.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))

    return ran
