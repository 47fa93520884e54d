"""Files as records: lines of JSON, plain or compressed, rows of Parquet, rows of a `datasets` source, one at a time.

The paper says nothing of files. This room does not know what a document is: `documents.py` makes them of records.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, cast

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".md", ".parquet", ".py", ".txt")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that `LINES` names, numbered from 1, unless blank. ValueError, naming it, if damaged."""
    number = 0
    try:
        with closing(_open(path)) as file:
            for number, line in enumerate(file, start=1):  # noqa: B007 (named in the error)
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged after line {number}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged after line {number}: {error}") from error  # so pyarrow says it


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"), 2**20)  # type: ignore[arg-type]
    return path.open("rb")


def rows(path: Path, columns: tuple[str, ...], required: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, with those of `columns` that it has.

    Raises ValueError, naming the file, where it is damaged or lacks the column `required`.
    """
    _pyarrow(path)
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if required not in names:
                raise ValueError(f"no column {required!r}; it has {', '.join(names)}")
            for batch in file.iter_batches(batch_size=256, columns=[n for n in columns if n in names]):
                yield from batch.to_pylist()
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path}: {error}") from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: reading this needs a package: pip install pyarrow") from error
    return pyarrow


def dataset_shards(dataset: str, config: str | None, split: str) -> int:
    """How many files or shards a streamed dataset has."""
    return _stream(dataset, config, split).num_shards


def dataset_rows(dataset: str, config: str | None, split: str, shard: int, num_shards: int) -> Iterator[dict[str, Any]]:
    """Rows of one shard of a streamed dataset."""
    yield from _stream(dataset, config, split).shard(num_shards=num_shards, index=shard)


def _stream(dataset: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"dataset {dataset!r} needs a package: pip install datasets") from error
    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {dataset!r}, config {config!r}, split {split!r}: {error}") from error
