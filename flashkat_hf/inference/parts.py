"""Rows of a Parquet file, written part by part, so that a run which was killed goes on with the next part."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import read_json, replacing, sync, write_text
from ..messages import extra


class Parts:
    """The folder beside a file in which its parts are made.

    A part has its name when it is whole, so every part that is there counts. The plan says of what the parts
    are; a run with another plan does not go on with them.
    """

    def __init__(self, output: Path, num_parts: int):
        self.output = output
        self.folder = output.with_name(f".{output.name}.parts")
        self.num_parts = num_parts
        self.writers: dict[int, Any] = {}

    def begin(self, plan: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, or check that its parts belong to this run; called by one process.

        Raises:
            ValueError: the file exists, or another run's parts do.
        """
        if self.output.exists() and not overwrite:
            raise ValueError(f"{self.output} exists; --overwrite replaces it")
        path = self.folder / "plan.json"
        if path.is_file():
            old = read_json(path)
            if old == json.loads(json.dumps(plan)):
                return
            if not overwrite:
                names = ", ".join(sorted(name for name in plan if old.get(name) != plan[name]))
                raise ValueError(f"{self.output} was begun with another {names}; --overwrite starts it anew")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(path, json.dumps(plan))

    def path(self, part: int) -> Path:
        return self.folder / f"{part:08}.parquet"

    def missing(self) -> list[int]:
        return [part for part in range(self.num_parts) if not self.path(part).exists()]

    def add(self, part: int, table: Any, last: bool) -> None:
        """Append rows to a part, and give it its name when they are its last ones."""
        new = self.path(part).with_suffix(".new")
        if part not in self.writers:
            self.writers[part] = extra("pyarrow.parquet").ParquetWriter(new, table.schema)
        self.writers[part].write_table(table)
        if last:
            self.writers.pop(part).close()
            sync(new)
            new.rename(self.path(part))

    def join(self) -> int:
        """Write the file from all parts, a group of rows at a time, and remove them; return its rows."""
        parquet, rows = extra("pyarrow.parquet"), 0
        schema = parquet.read_schema(self.path(0))
        with (
            replacing(self.output.absolute(), folder=False) as new,
            parquet.ParquetWriter(new, schema) as file,
        ):
            for table in self.tables(parquet):
                file.write_table(table)
                rows += len(table)
        shutil.rmtree(self.folder)
        return rows

    def tables(self, parquet: Any) -> Iterator[Any]:
        for part in range(self.num_parts):
            with parquet.ParquetFile(self.path(part)) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)
