"""Imports every module of the installed package, for `make wheel`; no test, it needs nothing but the package."""

import importlib
import pkgutil

import twotower

if __name__ == "__main__":
    found = [module.name for module in pkgutil.walk_packages(twotower.__path__, "twotower.")]
    modules = [name for name in found if name != "twotower.__main__"]
    for name in modules:
        importlib.import_module(name)
    print(f"{len(modules)} modules import from {twotower.__path__[0]}")
