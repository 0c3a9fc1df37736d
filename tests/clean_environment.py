"""Makes an environment that holds a wheel and what it declares, and nothing else, for `make wheel`; no test.

    python tests/clean_environment.py WHEEL FOLDER

Its packages are links to those of the environment that runs this, because copying PyTorch takes a minute. A package
that the wheel does not declare is absent, so that an import of it fails; one of another version than declared is an
error.
"""

import argparse
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def site_packages(folder: Path) -> Path:
    [found] = folder.glob("lib/python3*/site-packages")
    return found


def required(wheel: Distribution) -> Iterator[Distribution]:
    """What a distribution needs, and what that needs in turn, each once.

    Raises:
        PackageNotFoundError: one is not installed here.
        SystemExit: one is of another version than declared.
    """
    todo, seen = [(wheel, "")], set()
    while todo:
        needing, extra = todo.pop()
        for requirement in map(Requirement, needing.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = distribution(requirement.name)
            if not requirement.specifier.contains(needed.version, prereleases=True):
                sys.exit(f"{needing.name} needs {requirement}, and {needed.version} is installed")
            for wanted in ("", *requirement.extras):
                if (key := (canonicalize_name(requirement.name), wanted)) not in seen:
                    seen.add(key)
                    todo.append((needed, wanted))
                    yield needed


def link(needed: Distribution, site: Path) -> None:
    """Make links to the files of a distribution; its programs are left out."""
    for file in needed.files or []:
        target = site / file
        if ".." not in file.parts and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(needed.locate_file(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    venv.create(arguments.folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(arguments.folder / "bin" / "python"), "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(arguments.wheel)], check=True)
    site = site_packages(arguments.folder)
    [wheel] = distributions(path=[str(site)])
    for needed in required(wheel):
        link(needed, site)


if __name__ == "__main__":
    main()
