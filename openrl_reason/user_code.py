"""Functions that a user names by file or module. Standard library only: small worker processes import it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(source: str, function: str) -> Callable[..., Any]:
    """The function of ``path/to/file.py`` or of a module. Runs that code, so it is for processes that may be killed.

    A file is imported under its own name, with its folder on the search path, so that it can import what lies beside it. Raises ValueError if
    there is no such function, and whatever the code raises."""
    if source.endswith(".py"):
        path = Path(source).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{source} has no function {function!r}")
    return found
