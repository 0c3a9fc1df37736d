"""Imports every module of the installed package, for `make wheel`; no test, it needs nothing but the package.

An adapter of an external system needs that system's client, and the lab needs its libraries. Both are extras, and
where they are not installed, they are what is missing.
"""

import importlib
import pkgutil

import twotower
import twotower_lab

CLIENTS = {
    "twotower.features.redis_store": "redis",
    "twotower.index.milvus": "grpc",
    "twotower.index.pgvector": "psycopg",
    "twotower.logs.kafka": "confluent_kafka",
    "twotower.logs.redis": "redis",
}
LAB = ("jinja2", "markupsafe", "matplotlib", "scipy")


def is_without_its_client(name: str) -> bool:
    """Import a module; whether it is an adapter whose client is not installed.

    Raises:
        ModuleNotFoundError: something else is missing.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != CLIENTS.get(name) and not (name.startswith("twotower_lab.") and error.name in LAB):
            raise
        return True
    return False


if __name__ == "__main__":
    found = [
        module.name
        for package in (twotower, twotower_lab)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    modules = [name for name in found if name != "twotower.__main__"]
    without = [name for name in modules if is_without_its_client(name)]
    rest = f"; {', '.join(without)} without their clients" if without else ""
    print(f"{len(modules) - len(without)} modules import from {twotower.__path__[0]}{rest}")
