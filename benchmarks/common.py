"""What the benchmarks share: arguments, the machine, one JSON document, commands of the program as processes."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.schema.machine import machine

EXAMPLES = Path(__file__).parent.parent / "examples"


def arguments_of(text: str | None, smoke: str, *, data: bool = False) -> argparse.ArgumentParser:
    """Arguments of a benchmark: `--out`, `--smoke`, which does what `smoke` says, and `--data` where it is needed."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        made.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    made.add_argument("--out", type=Path, help="also write the result to this file")
    made.add_argument("--smoke", action="store_true", help=f"{smoke}: shows that it runs, measures nothing")
    return made


def finish(arguments: argparse.Namespace, benchmark: str, **found: Any) -> None:
    """Write the result with the machine's description, and print it as one JSON line."""
    result = {"benchmark": benchmark, "smoke": arguments.smoke, "machine": machine(), **found}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def note(*words: Any) -> None:
    """Progress, on stderr."""
    print(*words, file=sys.stderr, flush=True)


def over_runs(values: Sequence[float], ranged: str = "range") -> dict[str, Any]:
    """Median and range of the runs."""
    return {"median": statistics.median(values), ranged: [min(values), max(values)]}


def run(arguments: Sequence[object], environment: dict[str, str] | None = None) -> Any:
    """Run a program and give the last line of its output, parsed, or None; `environment` is all that it sees."""
    command = [str(word) for word in arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


def twotower(*arguments: str) -> dict[str, Any]:
    """Run a command of the program and give its JSON line."""
    found: dict[str, Any] = run([sys.executable, "-m", "twotower", *arguments])
    return found


def options(config: str, changes: Sequence[str]) -> list[str]:
    """A configuration of the examples with changes, as arguments of a command."""
    return ["-c", str(EXAMPLES / config), *(word for change in changes for word in ("--set", change))]


def make_catalogue(workspace: Path, rng: Any, users: int, items: int) -> tuple[Any, Any, Callable[[int], Any]]:
    """Write users and items into a new workspace; gives their ids, and what draws rows of items by a Zipf law."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    workspace.mkdir(parents=True)
    people = {"user_id": np.arange(users) * 7 + 1, "age": rng.integers(12, 80, users)}
    things = {"item_id": np.arange(items) * 3 + 1, "category": rng.integers(0, 50, items)}
    pq.write_table(pa.table(people), workspace / "users.parquet")
    pq.write_table(pa.table(things), workspace / "items.parquet")
    chances = 1 / np.arange(1, items + 1)
    edges = np.cumsum(chances / chances.sum())

    def draw(count: int) -> Any:
        return np.minimum(np.searchsorted(edges, rng.random(count)), items - 1)

    return people["user_id"], things["item_id"], draw


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of the program beside this one, ended by a signal."""
    command = [sys.executable, "-m", "twotower", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        try:
            yield running
        finally:
            running.terminate()


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """A server with these options; gives its address when it is ready."""
    with process("serve", *arguments) as running:
        assert running.stdout is not None
        yield json.loads(running.stdout.readline())["url"]
