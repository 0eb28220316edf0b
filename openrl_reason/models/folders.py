"""New model folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from openrl_reason.errors import ConfigError


@contextlib.contextmanager
def new_model_folder(output_dir: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside ``output_dir``; when the block ends well, it takes that name by a rename.

    Raises ConfigError, before anything is written, if ``output_dir`` is a file or holds something and ``overwrite`` is false.
    If the block raises, ``output_dir`` is as it was."""
    output = Path(output_dir).absolute()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir={str(output_dir)!r} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output_dir={str(output_dir)!r} is not empty; choose another folder or pass --overwrite true")
    staging = output.with_name(f".{output.name}.new-{uuid.uuid4().hex[:8]}")
    retired = output.with_name(f".{output.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"output_dir={str(output_dir)!r} cannot be made: {error.strerror}") from None
    try:
        yield staging
        if output.exists():
            output.rename(retired)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if retired.exists():
            if output.exists():
                shutil.rmtree(retired, ignore_errors=True)
            else:  # the second rename failed
                retired.rename(output)
