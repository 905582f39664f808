"""Whether another distribution has been installed over this package.

On the package index the name "fastgpt" belongs to another library; this one is "fastgpt-kernels".
If both are installed, the later one has overwritten files of the earlier one.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

NAME = "fastgpt-kernels"


def conflict() -> str | None:
    """One sentence about the other library if it is installed over this one, else None."""
    try:
        other = importlib.metadata.distribution("fastgpt")
        record = other.read_text("RECORD") or ""  # pip's list of files; a checkout has none
        ours = Path(__file__).parent / "__init__.py"
        if f"{ours.parent.name}/{ours.name}," not in record:
            return None
        there = Path(str(other.locate_file("fastgpt"))) / ours.name
        if not there.exists() or not there.samefile(ours):
            return None
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    return (
        f"another library, the distribution fastgpt {other.version}, is installed into the same "
        f"folder: pip uninstall fastgpt, then pip install --force-reinstall --no-deps {NAME}"
    )
