"""For all tests: an order in which several workers end together, and folders that all of them share."""

import gc
import os

import pytest
from filelock import FileLock

gc.set_threshold(100_000, 20, 20)  # what the tests import stays

LONG = ("tests/e2e/", "tests/workers/", "tests/test_security.py", "tests/rewards/test_judge.py")


def pytest_collection_modifyitems(items):
    """Whole runs first. A worker takes the next file when it is free (``--dist loadfile``), and short ones at the end leave no worker idle."""
    items.sort(key=lambda item: next((rank for rank, place in enumerate(LONG) if item.nodeid.startswith(place)), len(LONG)))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(name, make)``: a path that ``make(path)`` has filled, the same one in all workers of a test run. Those that come second wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's folder lies in the folder of the run

    def path_of(name, make):
        path, made = folder / name, folder / f"{name}.made"
        with FileLock(folder / f"{name}.lock"):
            if not made.exists():
                make(path)
                made.touch()
        return path

    return path_of
