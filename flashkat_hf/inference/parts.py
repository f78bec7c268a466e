"""Rows of a Parquet file, written part by part, so that a run which was killed goes on with the next part."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import read_json, replacing, sync, write_text
from ..messages import extra, one_line

GROUP_BYTES = 2**26  # of rows that are joined at once, a row group of the file


class Parts:
    """The folder beside a file in which its parts are made, in Arrow's format, which is written faster.

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
        return self.folder / f"{part:08}.arrow"

    def missing(self) -> list[int]:
        return [part for part in range(self.num_parts) if not self.path(part).exists()]

    def add(self, part: int, table: Any, last: bool) -> None:
        """Append rows to a part, and give it its name when they are its last ones."""
        new = self.path(part).with_suffix(".new")
        if part not in self.writers:
            self.writers[part] = extra("pyarrow").ipc.new_file(new, table.schema)
        self.writers[part].write_table(table)
        if last:
            self.writers.pop(part).close()
            sync(new)
            new.rename(self.path(part))

    def join(self) -> int:
        """Write the file from all parts, a group of rows at a time, and remove them; return its rows.

        Raises:
            ValueError: in one line, a part is broken; it is removed.
        """
        parquet, rows = extra("pyarrow.parquet"), 0
        with self._opened(0) as part:
            schema = part.schema
        with (
            replacing(self.output.absolute(), folder=False) as new,
            parquet.ParquetWriter(new, schema) as file,
        ):
            for group in self.groups():
                file.write_table(group)
                rows += len(group)
        shutil.rmtree(self.folder)
        return rows

    def groups(self) -> Iterator[Any]:
        """Yield the rows of all parts in order; a group ends with the batch by which it has `GROUP_BYTES`."""
        table, batches, size = extra("pyarrow").Table, [], 0
        for number in range(self.num_parts):
            with self._opened(number) as part:
                for batch in map(part.get_batch, range(part.num_record_batches)):
                    batches.append(batch)
                    size += batch.nbytes
                    if size >= GROUP_BYTES:
                        yield table.from_batches(batches)
                        batches, size = [], 0
        if batches:
            yield table.from_batches(batches)

    @contextmanager
    def _opened(self, part: int) -> Iterator[Any]:
        pyarrow, path = extra("pyarrow"), self.path(part)
        try:
            with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_file(file) as reader:
                yield reader
        except pyarrow.ArrowInvalid as error:
            path.unlink()
            problem = one_line(error)
            raise ValueError(
                f"{path} is broken ({problem}): it is removed, and the same command makes it anew"
            ) from error
