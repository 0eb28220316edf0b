"""Tasks whose items are rows of files or of the hub: reading, limits, and the leakage guard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from openrl_reason.data.readers import Row, iter_rows
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.tasks.base import Task, TaskItem
from openrl_reason.tasks.leakage import question_hash, refuse_overlap


class RowTask(Task):
    """A subclass says which ``columns`` it needs, makes an item of a row, and tells what of a row is the question."""

    hub_names: tuple[str, ...] = ()
    """Where the splits are when no path is given; several are read one after the other."""

    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        raise NotImplementedError

    def item_of(self, row: Row) -> TaskItem:
        """The item of a row. Raises DataError naming the row."""
        raise NotImplementedError

    def question_of(self, row: Row) -> str:
        """The text that the leakage guard compares; hashed, it is the item's :func:`~openrl_reason.tasks.leakage.item_hash`."""
        raise NotImplementedError

    def published_test_hashes(self) -> frozenset[bytes]:
        """Hashes of a published test split that no training data may contain."""
        return frozenset()

    def sources(self, split: str) -> tuple[str, ...]:
        """The files or hub names of a split. Raises ConfigError when there is none."""
        path = self.config.train_path if split == "train" else self.config.test_path
        if path:
            return (path,)
        if not self.hub_names:
            raise ConfigError(f"task {self.name}: there is no {split} data; set --task.{split}_path")
        return self.hub_names

    def load_split(self, split: str) -> list[TaskItem]:
        limit = self.config.num_train if split == "train" else self.config.num_test
        rows = list(itertools.islice(self._rows(split), limit or None))
        items = [self.item_of(row) for row in rows]
        if split == "train" and not self.config.allow_test_data_in_training:
            self._refuse_leak(rows)
        return items

    def _rows(self, split: str) -> Iterator[Row]:
        for source in self.sources(split):
            try:
                found = False
                for row in iter_rows(source, self.columns(), split=split):
                    found = True
                    yield row
            except DataError as error:
                if source in self.hub_names:
                    raise DataError(f"{error}: --task.{split}_path path/to/{split}.jsonl") from error
                raise
            if not found:
                raise DataError(f"{source} has no rows")

    def _refuse_leak(self, rows: list[Row]) -> None:
        held_out = set(self.published_test_hashes())
        if self.config.test_path:
            held_out |= {question_hash(self.question_of(row)) for row in self._rows("test")}
        if held_out:
            refuse_overlap([(row.where, self.question_of(row)) for row in rows], held_out, self.config.train_path or self.hub_names[0])


def own_id(row: Row, *columns: str) -> dict[str, Any]:
    """``{"source": where, "id": the row's own id}``, the id being the first of the columns that the row has."""
    for column in columns:
        if column and row.values.get(column) is not None:
            return {"source": row.where, "id": row.values[column]}
    return {"source": row.where}


def text_of(row: Row, column: str, what: str) -> str:
    """A column that must hold text. Raises DataError naming the row."""
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: the {what} is {str(value)[:80]!r}; expected text in column {column!r}")
    return value
