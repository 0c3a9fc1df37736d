"""What this machine is, as it stands beside figures."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """The cores, the processor where Linux names it, the system and Python's version."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.machine()
    return f"{os.cpu_count()} cores, {processor}, {platform.system()}, Python {platform.python_version()}"
