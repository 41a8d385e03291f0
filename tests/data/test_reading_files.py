from __future__ import annotations

import gzip

import pytest

from camtl.data import read_table
from camtl.errors import UsageError

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_json_lines(write):
    path = write("a.jsonl", '{"text": "one\u2028two", "label": 1}\n\n{"text": "é", "more": null}\n')
    table = read_table(path)
    # U+2028 is no end of line; the blank line counts in line numbers.
    assert table.columns == {"text": ["one\u2028two", "é"], "label": [1, None], "more": [None, None]}
    assert table.where(1) == f"{path}, line 3"
    assert len(table) == 2


def test_byte_order_mark(write):
    assert read_table(write("a.jsonl", BOM + b'{"text": "x"}\n')).columns == {"text": ["x"]}
    assert read_table(write("a.csv", BOM + b"text,label\nx,1\n")).columns == {"text": ["x"], "label": ["1"]}
    assert read_table(write("a.tsv", BOM + b"text\tlabel\nx\t1\n")).columns == {"text": ["x"], "label": ["1"]}
    assert read_table(write("a.json", BOM + b'[{"text": "x"}]')).columns == {"text": ["x"]}


def test_gzip(write):
    assert read_table(write("a.jsonl.gz", gzip.compress(b'{"text": "x"}'))).columns == {"text": ["x"]}
    assert read_table(write("A.CSV.GZ", gzip.compress(b"t\nx\n"))).columns == {"t": ["x"]}
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    for broken in (b"no gzip", whole[: len(whole) // 2]):
        with pytest.raises(UsageError, match=r"b\.jsonl\.gz: not a whole gzip file"):
            read_table(write("b.jsonl.gz", broken))


def test_json_list_and_lines_called_json(write):
    assert read_table(write("a.json", '[{"t": "x"}, {"t": "y"}]')).columns == {"t": ["x", "y"]}
    assert read_table(write("b.json", '{"t": "x"}\n{"t": "y"}\n')).columns == {"t": ["x", "y"]}


def test_csv_with_quotes_commas_and_line_breaks(write):
    path = write("a.csv", 'text,label\r\n"one, two",0\r\n"she said ""no""\nand left",1\r\n\r\nNA,null\r\n')
    table = read_table(path)
    assert table.columns == {
        "text": ["one, two", 'she said "no"\nand left', "NA"],
        "label": ["0", "1", "null"],
    }
    assert [table.lines[i] for i in range(3)] == [2, 3, 6]


def test_tsv_as_in_glue_where_quotes_mean_nothing(write):
    table = read_table(write("a.tsv", 'a\tb\n" The end\tsaid "he"\n"x ""y"" z"\t"\n'))
    assert table.columns == {"a": ['" The end', 'x "y" z'], "b": ['said "he"', '"']}
    assert table.lines == [2, 3]


def test_tsv_with_a_quoted_tab(write):
    table = read_table(write("a.tsv", 'a\tb\n"x\ty"\t1\n'))
    assert table.columns == {"a": ["x\ty"], "b": ["1"]}


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x", "y"], "label": [0, 1]}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert table.columns == {"text": ["x", "y"], "label": [0, 1]}
    assert table.where(1).endswith("a.parquet, row 2")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"t": 1}\n{"t": 1\n', ["line 2", "not JSON", "column"]),
        ("a.jsonl", b'{"t": 1}\n\n[1, 2]\n', ["line 3", "[1, 2]"]),
        ("a.jsonl", b'{"t": 1}\n{"t": "\xe9"}\n', ["line 2", "UTF-8", "0xe9"]),
        ("a.jsonl", b"", ["no rows"]),
        ("a.jsonl", b"\n\n", ["no rows"]),
        ("a.json", b'[{"t": 1},\n{"t" 1}]', ["line 2", "not JSON"]),
        ("a.json", b"[1]", ["list of objects"]),
        ("a.json", b"", ["no rows"]),
        ("a.csv", b"text,label\nx,1\none, two,1\n", ["line 3", "3 fields", "2 columns", "double quotes"]),
        ("a.csv", b'text,label\nx,1\n"open,1\n', ["line 3", "quotes"]),
        ("a.csv", b"text,text\nx,1\n", ["line 1", "each name once"]),
        ("a.csv", b"text,label\n", ["no rows"]),
        ("a.csv", b"", ["no rows"]),
        ("a.csv", b"text\nx\n\xff\n", ["line 3", "UTF-8"]),
        ("a.tsv", b"a\tb\nx\t1\ny\n", ["line 3", "1 fields"]),
        ("a.parquet", b"no parquet", ["not a Parquet file"]),
        ("a.txt", b"x", [".jsonl", ".parquet"]),
    ],
)
def test_broken_files(write, name, content, words):
    path = write(name, content)
    with pytest.raises(UsageError) as caught:
        read_table(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_table(tmp_path / "none.jsonl")
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(UsageError, match="folder"):
        read_table(tmp_path / "f.csv")


def test_a_field_may_be_longer_than_the_csv_module_allows(write):
    text = "word " * 40_000
    table = read_table(write("a.csv", f'text,label\n"{text}",1\nshort,0\n'))
    assert table.columns == {"text": [text, "short"], "label": ["1", "0"]}
