import csv
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasshouse.corpus.documents import Document, ReadCounts, ReadPolicy, read_documents
from glasshouse.errors import InputError

CHINESE = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。我们在学校里学习中文，老师说得很清楚。"
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lambda data: lzma.compress(data, preset=1),
    ".zst": zstandard.ZstdCompressor().compress,
}


def chinese_prose(characters: int) -> str:
    return "".join(random.Random(7).choices(CHINESE, k=characters))


def read(path: Path, **policy) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    documents = list(read_documents([path], ReadPolicy(**policy), counts))
    assert counts.unaccounted_bytes == 0
    assert counts.documents == len(documents)
    assert counts.bytes_kept == sum(len(document.text.encode()) for document in documents)
    assert all(value >= 0 for value in counts.dropped_bytes.values())
    return documents, counts


def texts(path: Path, **policy) -> list[str]:
    return [document.text for document in read(path, **policy)[0]]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet_bytes(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def encoded(rows: list[dict], suffix: str) -> bytes:
    """The same rows in one of the formats, by writers that are not ours."""
    if suffix == ".parquet":
        return parquet_bytes(rows)
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, indent=2).encode()
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_table_format_gives_the_same_documents(tmp_path, suffix, compression):
    rows = [
        {
            "id": f"r{n}",
            "text": f"{CHINESE}, number {n}, naïve",
            "license": "MIT",
            "lang": "zh",
            "source": "made",
        }
        for n in range(50)
    ]
    path = write(tmp_path / f"rows{suffix}{compression}", COMPRESS[compression](encoded(rows, suffix)))
    documents, counts = read(path)
    assert [document.text for document in documents] == [row["text"] for row in rows]
    assert {(d.licence, d.language, d.source, d.metadata["id"]) for d in documents} == {
        ("MIT", "zh", "made", f"r{n}") for n in range(50)
    }
    assert len({document.id for document in documents}) == 50
    assert counts.files == {"read": 1}
    assert [d.id for d in read(path, id_field="id")[0]] == [f"{path.name}:r{n}" for n in range(50)]


@pytest.mark.parametrize("compression", COMPRESS)
def test_plain_text_is_one_document_with_its_newlines(tmp_path, compression):
    text = "One\r\ntwo\u2028three\x85four\n\n" + chinese_prose(500_000) + "\n"
    path = write(tmp_path / f"a.txt{compression}", COMPRESS[compression](text.encode()))
    documents, counts = read(path)
    assert [(d.id, d.text) for d in documents] == [(path.name, text)]
    assert counts.bytes_read == counts.bytes_kept == len(text.encode())


def test_several_members_and_padding_are_one_file(tmp_path):
    for suffix in (".gz", ".xz", ".zst"):
        pack = COMPRESS[suffix]
        path = write(tmp_path / f"a.txt{suffix}", pack(b"one ") + pack(b"two ") + pack(b"three") + bytes(8))
        assert texts(path) == ["one two three"]


def test_text_units(tmp_path):
    stories = "First story.\nMore.\n<|endoftext|>\n\nSecond <|endoftext|> inside.\n<|endoftext|>\n<|endoftext|>\nThird"
    path = write(tmp_path / "a.txt", stories)
    documents, counts = read(path)
    assert [d.text for d in documents] == ["First story.\nMore.", "Second <|endoftext|> inside.", "Third"]
    assert [d.id for d in documents] == ["a.txt:1", "a.txt:2", "a.txt:4"]
    assert counts.dropped_rows == {"empty": 1}
    assert texts(path, text_unit="file") == [stories]
    lines = write(tmp_path / "b.txt", "a b\n\nc\u2028d\r\ne")
    assert texts(lines, text_unit="line") == ["a b", "c\u2028d", "e"]
    assert texts(write(tmp_path / "c.txt", "a\nb\n \nc\n\n\n\nd"), text_unit="paragraph") == [
        "a\nb",
        "c",
        "d",
    ]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8-sig", "naïve " + CHINESE),
        ("utf-16", "naïve " + CHINESE),
        ("utf-32", "naïve " + CHINESE),
        ("gb18030", "x" * 1_500_000 + "\n" + CHINESE + "English 123 " + CHINESE),
        ("cp1252", "x" * 1_500_000 + "\nDéjà vu — “où est l’été ?” Grüße, Mädchen, señor, ação, €5. "),
        ("utf-8", "only the last character is not ASCII: é"),
    ],
)
def test_encodings_are_found(tmp_path, encoding, text):
    documents, counts = read(write(tmp_path / "a.txt", text.encode(encoding)))
    assert [d.text for d in documents] == [text]
    assert counts.replaced_characters == 0
    expected = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)
    assert counts.encodings == {expected: 1}


def test_encodings_of_real_text(shared_data, tmp_path):
    """Chinese prose as gb18030 and Western European prose as windows-1252, by the whole article."""
    wrong = []
    with lzma.open(shared_data / "pretrain_zh/wikipedia_zh.jsonl.xz", "rt", encoding="utf-8") as file:
        chinese = [json.loads(next(file))["text"] for _ in range(300)]
    with gzip.open(shared_data / "mt/flores200_dev_12langs.tsv.gz", "rt", encoding="utf-8") as file:
        header, *rows = [line.rstrip("\n").split("\t") for line in file]
    western = [
        "\n".join(row[place] for row in rows[start : start + 20])
        for place in range(len(header))
        if header[place][:2] in ("de", "fr", "es") or header[place][:3] in ("deu", "fra", "spa")
        for start in range(0, 960, 20)
    ]
    assert len(western) == 144
    for encoding, samples in (("gb18030", chinese), ("cp1252", western)):
        for number, text in enumerate(samples):
            path = write(tmp_path / f"{encoding}{number}.txt", text.encode(encoding, "ignore"))
            if read(path)[1].encodings != {encoding: 1}:
                wrong.append(path.name)
    assert len(wrong) <= 4, wrong  # of 444


def test_named_encoding_wins_and_unknown_ones_are_refused(tmp_path):
    text = "Привет, мир. Как дела?"
    path = write(tmp_path / "a.txt", text.encode("koi8-r"))
    assert texts(path, encoding="koi8-r") == [text]
    with pytest.raises(InputError, match="unknown encoding"):
        texts(path, encoding="no-such")


def test_undecodable_bytes_are_replaced_and_counted(tmp_path):
    text = (CHINESE * 30_000).encode()
    damaged = text[:1_000_000] + b"\xff\xfe" + text[1_000_000 - 1_000_000 % 3 :] + "\ufffd".encode()
    documents, counts = read(write(tmp_path / "a.txt", damaged))
    assert documents[0].text.count("\ufffd") == counts.replaced_characters + 1
    assert 1 <= counts.replaced_characters <= 4
    assert counts.encodings == {"utf-8": 1}
    assert "a.txt" in counts.examples["replaced_characters"][0]


def test_nul_is_removed_and_counted(tmp_path):
    documents, counts = read(write(tmp_path / "a.txt", b"ab\0cd" * 10 + b"x" * 1000))
    assert documents[0].text == "abcd" * 10 + "x" * 1000
    assert counts.dropped_bytes["nul"] == 10
    escaped = write(tmp_path / "a.jsonl", '{"text": "a\\u0000b \\ud83d\\ude00 \\ud800 \u00e9"}\n')
    documents, counts = read(escaped)
    assert documents[0].text == "ab \U0001f600 \ufffd \u00e9"
    assert counts.replaced_characters == 1


def test_json_lines_end_at_newline_only(tmp_path):
    rows = [{"text": f"a\u2028b\x85c\u2029d\x0b\x0c\x1c {n}"} for n in range(5)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert texts(path) == [row["text"] for row in rows]


def test_bad_json_lines_are_counted_with_their_line(tmp_path):
    lines = [
        '{"text": "one"}',
        "{torn",
        "",
        '{"text": 5}',
        '{"other": "x"}',
        '"bare"',
        '{"text": ""}',
        "[1]",
        "NaN",
    ]
    deep = "[" * 200_000
    documents, counts = read(write(tmp_path / "a.jsonl", "\n".join([*lines, deep, '{"text": "last"}'])))
    assert [(d.id, d.text) for d in documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:6", "bare"),
        ("a.jsonl:11", "last"),
    ]
    assert counts.dropped_rows == {"invalid_json": 2, "no_text": 4, "empty": 1}
    assert counts.examples["invalid_json"][0].startswith("a.jsonl:2 ")


def test_json_shapes(tmp_path):
    one = write(tmp_path / "one.json", '{"text": "alone", "title": "T", "long": "' + "x" * 2000 + '"}')
    assert [(d.text, d.metadata) for d in read(one)[0]] == [("alone", {"title": "T"})]
    nested = write(
        tmp_path / "nested.json", json.dumps({"version": 2, "data": [{"text": "a"}, {"text": "b"}]})
    )
    assert [(d.id, d.text) for d in read(nested)[0]] == [("nested.json:1", "a"), ("nested.json:2", "b")]
    assert texts(write(tmp_path / "strings.json", '["a", "b,]", ["no"]]')) == ["a", "b,]"]
    assert texts(write(tmp_path / "stream.json", '{"text": "a"}\n{"text":\n"b"} {"text": "c"}')) == [
        "a",
        "b",
        "c",
    ]
    assert texts(write(tmp_path / "lists.json", '[{"text": ["a", "b"]}]')) == ["a\nb"]


def test_json_arrays_are_streamed_and_broken_ones_end_where_they_break(tmp_path):
    rows = [{"text": f"{n} " + CHINESE * (n % 700)} for n in range(1000)]
    whole = json.dumps(rows, ensure_ascii=False, indent=1)
    assert texts(write(tmp_path / "a.json", whole)) == [row["text"] for row in rows]
    documents, counts = read(write(tmp_path / "b.json", whole[: len(whole) // 2]))
    assert 400 < len(documents) < 900
    assert counts.dropped_rows == {"invalid_json": 1}
    documents, counts = read(write(tmp_path / "c.json", whole.replace('"text": "500 ', 'oops "500 ')))
    assert len(documents) == 500
    assert counts.examples["invalid_json"][0].startswith("c.json:15")


def test_tables(tmp_path):
    quoted = write(tmp_path / "a.csv", 'text,n\n"a ""b""\nc, d",1\n\n"x"y",2\nshort\ne,3,4\nlast,5\n')
    documents, counts = read(quoted)
    assert [(d.id, d.text) for d in documents] == [
        ("a.csv:2", 'a "b"\nc, d'),
        ("a.csv:6", "short"),
        ("a.csv:8", "last"),
    ]
    assert counts.dropped_rows == {"invalid_row": 2}
    tsv = write(tmp_path / "b.tsv", 'n\tText\n1\t"quoted" start\n2\tsay "no\n')
    assert texts(tsv) == ['"quoted" start', 'say "no']
    bare = write(tmp_path / "c.tsv", "1\tfirst\n2\tsecond\n")
    assert texts(bare, text_field="#2") == ["first", "second"]
    assert read(write(tmp_path / "d.csv", 'text\n"never closed\n\n' + "x\n" * 1000))[1].dropped_rows == {
        "invalid_row": 1
    }


def test_missing_field_names_those_that_are_there(tmp_path):
    for name, content in {
        "a.jsonl": b'{"words": "x", "label": 1}\n',
        "a.csv": b"words,label\nx,1\n",
        "a.json": b'[{"words": "x", "label": 1}]',
        "a.parquet": parquet_bytes([{"words": "x", "label": 1}]),
    }.items():
        path = write(tmp_path / name, content)
        with pytest.raises(InputError, match=r"words, label.*text_field"):
            texts(path)
        with pytest.raises(InputError, match=r"no field wrds"):
            texts(path, text_field="wrds")
        assert texts(path, text_field="words") == ["x"]


def test_html_keeps_what_a_reader_reads(tmp_path):
    page = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style><script>var x;</script></head><body>
    <nav>Home | About</nav><h1>Head &amp; more</h1><p>First <b>bold</b> and<br>broken.<!-- no --></p>
    <ul><li>One</li><li>二</li></ul>tail<footer>Copyright</footer></body></html>"""
    expected = "Head & more\nFirst bold and\nbroken.\nOne\n二\ntail"
    assert texts(write(tmp_path / "a.html", page)) == [expected]
    chinese = page.replace("<head>", '<head><meta charset="big5">').replace("二", "繁體中文網頁內容說明")
    documents, counts = read(write(tmp_path / "b.htm", chinese.encode("big5")))
    assert "繁體中文網頁內容說明" in documents[0].text
    assert counts.encodings == {"big5": 1}
    deep = "<div>" * 50_000 + "deep" + "</div>" * 50_000
    assert read(write(tmp_path / "c.html", f"<p>before</p>{deep}"))[0][0].text.startswith("before")
    assert read(write(tmp_path / "d.html", "<html></html>"))[1].dropped_rows == {"empty": 1}
    assert texts(
        write(tmp_path / "e.html", '<?xml version="1.0" encoding="utf-8"?><html><body>é</body></html>')
    ) == ["é"]


def test_long_texts_are_split_or_refused(tmp_path):
    words = " ".join(f"word{n}" for n in range(100_000))
    for content in (words, words.replace(" ", "\n"), CHINESE * 10_000):
        path = write(tmp_path / "a.txt", content)
        documents, counts = read(path, document_bytes=100_000)
        assert "".join(d.text for d in documents) == content
        assert len(documents) == -(-len(content.encode()) // 100_000)
        assert max(len(d.text.encode()) for d in documents) <= 100_000
        assert [d.id for d in documents] == [f"a.txt/{n}" for n in range(1, len(documents) + 1)]
        if content is words:
            assert all(d.text.endswith(" ") for d in documents[:-1])
        documents, counts = read(path, document_bytes=100_000, long_text="refuse")
        assert not documents
        assert counts.dropped_rows == {"too_long": 1}


def test_long_records_are_refused_and_the_next_ones_read(tmp_path):
    rows = [{"text": "first"}, {"text": "x" * 3_000_000}, {"text": "last"}]
    for suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
        path = write(tmp_path / f"a{suffix}", encoded(rows, suffix))
        documents, counts = read(path, document_bytes=100_000)
        assert [d.text for d in documents] == ["first", "last"], suffix
        assert counts.dropped_rows["too_long"] >= 1
        assert counts.examples["too_long"][0].startswith(f"a{suffix}:")


def test_a_line_of_50_megabytes(tmp_path):
    line = (CHINESE + " ") * 400_000
    assert len(line.encode()) > 50 * 10**6
    text = write(tmp_path / "a.txt", line)
    assert "".join(texts(text)) == line
    rows = write(tmp_path / "a.jsonl", f'{{"text": "{line}"}}\n{{"text": "next"}}\n')
    documents, counts = read(rows)
    assert [d.text for d in documents] == ["next"]
    assert counts.dropped_bytes["too_long"] > 50 * 10**6


def test_torn_files_keep_the_rows_before_and_say_so(tmp_path):
    rows = [{"text": f"{n} {random.Random(n).random()} {CHINESE}"} for n in range(20_000)]
    whole = encoded(rows, ".jsonl")
    for suffix in (".gz", ".xz", ".zst"):
        packed = COMPRESS[suffix](whole)
        documents, counts = read(write(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) * 3 // 4]))
        assert 1000 < len(documents) < 20_000, suffix
        assert [d.text for d in documents] == [row["text"] for row in rows[: len(documents)]]
        assert counts.files == {"torn": 1}
        assert "documents before stay" in counts.examples["torn"][0]
        documents, counts = read(write(tmp_path / f"a.txt{suffix}", packed[: len(packed) * 3 // 4]))
        assert not documents
        assert counts.dropped_bytes["torn"] == counts.bytes_read + counts.bytes_recoded > 10**6
        flipped = (
            packed[: len(packed) // 2]
            + bytes([packed[len(packed) // 2] ^ 255])
            + packed[len(packed) // 2 + 1 :]
        )
        assert read(write(tmp_path / f"b.jsonl{suffix}", flipped))[1].files.keys() <= {"torn", "bomb", "read"}
        assert read(write(tmp_path / f"c.txt{suffix}", b"not compressed at all"))[1].files == {"torn": 1}
    torn = write(tmp_path / "a.parquet", parquet_bytes(rows)[:-100])
    assert read(torn)[1].files == {"torn": 1}


def bomb(suffix: str, megabytes: int) -> bytes:
    zeros = b"a" * 2**20
    if suffix == ".gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb") as file:
            for _ in range(megabytes):
                file.write(zeros)
        return buffer.getvalue()
    compressor = (
        lzma.LZMACompressor() if suffix == ".xz" else zstandard.ZstdCompressor(level=19).compressobj()
    )
    return b"".join([compressor.compress(zeros) for _ in range(megabytes)]) + compressor.flush()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_bombs_are_refused_by_name(tmp_path, suffix):
    packed = bomb(suffix, 70)
    assert len(packed) < 400_000
    for name in ("a.txt", "a.jsonl"):
        documents, counts = read(write(tmp_path / f"{name}{suffix}", packed))
        assert not documents
        assert counts.files == {"bomb": 1}
        assert counts.bytes_read < 40 * 2**20
        assert name in counts.examples["bomb"][0]
    assert len(texts(tmp_path / f"a.txt{suffix}", compression_ratio=10**6)) == 5
    assert read(tmp_path / f"a.txt{suffix}", compression_ratio=10**6, file_bytes=2**26)[1].files == {
        "bomb": 1
    }


def test_memory_stays_flat(tmp_path):
    """160 MB of text in one line, read within 120 MB beyond what imports take."""
    write(tmp_path / "a.txt.gz", bomb(".gz", 160))
    program = (
        "import sys, resource, lxml.html, pyarrow.parquet\n"
        "from glasshouse.corpus.documents import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "counts = ReadCounts()\n"
        "for document in read_documents([sys.argv[1]], ReadPolicy(compression_ratio=10**6), counts): pass\n"
        "assert counts.bytes_kept == 160 * 2**20\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.txt.gz")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 120_000  # KiB


def test_binary_and_empty_files_are_left_out(tmp_path):
    folder = tmp_path / "mixed"
    write(folder / "noise.txt", random.Random(1).randbytes(10_000))
    write(folder / "picture.txt", b"\x89PNG\r\n\x1a\n" + b"text " * 100)
    write(folder / "wide.txt", "no mark at all".encode("utf-16-le"))
    write(folder / "empty.txt", b"")
    write(folder / "empty.jsonl.gz", gzip.compress(b""))
    write(folder / "blank.txt", b" \n\n ")
    write(folder / "good.md", "# Good\n")
    write(folder / "photo.jpg", b"x")
    documents, counts = read(folder)
    assert [d.id for d in documents] == ["mixed/good.md"]
    assert counts.files == {"binary": 3, "empty": 2, "read": 2, "unknown_format": 1}
    assert counts.dropped_rows == {"empty": 1}
    assert len(counts.examples["binary"]) == 3
    json.dumps(counts.as_report())


def test_folders_are_read_in_order_and_ids_are_stable(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a.txt", "c.txt", ".hidden/x.txt", "b/.y.txt", "skip/me.txt"):
        write(tmp_path / "root" / name, f"text of {name}")
    documents, counts = read(tmp_path / "root", exclude=("skip*",))
    assert [d.id for d in documents] == ["root/a.txt", "root/b/a.txt", "root/b/z.txt", "root/c.txt"]
    assert [d.source for d in documents] == ["root", "root/b", "root/b", "root"]
    assert counts.files == {"read": 4, "hidden": 2, "excluded": 1}
    matched = list(read_documents([str(tmp_path / "root" / "**" / "a.t?t")], ReadPolicy(), ReadCounts()))
    assert sorted(d.text for d in matched) == ["text of a.txt", "text of b/a.txt"]
    counts = ReadCounts()
    twice = list(
        read_documents([tmp_path / "root/a.txt", tmp_path / "root"], ReadPolicy(exclude=("skip*",)), counts)
    )
    assert len(twice) == 4
    assert counts.files["repeated"] == 1


def test_roots_of_one_name_keep_their_ids_apart(tmp_path):
    for parent in ("x", "y"):
        write(tmp_path / parent / "data/a.txt", parent)
    found = read_documents([tmp_path / "x/data", tmp_path / "y/data"], ReadPolicy(), ReadCounts())
    assert [d.id for d in found] == ["data/a.txt", "data/a.txt~2"]


def test_links_are_left_out_unless_asked_for(tmp_path):
    write(tmp_path / "outside/secret.txt", "outside")
    write(tmp_path / "root/a.txt", "inside")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root", target_is_directory=True)
    (tmp_path / "root/out").symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / "root/secret.txt").symlink_to(tmp_path / "outside/secret.txt")
    (tmp_path / "root/gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "root/pipe.txt")
    documents, counts = read(tmp_path / "root")
    assert [d.text for d in documents] == ["inside"]
    assert counts.files == {"read": 1, "link": 4, "not_a_file": 1}
    documents, counts = read(tmp_path / "root", follow_links=True)
    assert [d.text for d in documents] == ["inside", "outside"]
    assert counts.files == {"read": 2, "link": 1, "not_a_file": 2, "repeated": 1}


def test_licence_and_source_of_each_document(tmp_path):
    root = tmp_path / "root"
    write(root / "LICENSE", "Permission is hereby granted,\n free of charge, to any person")
    write(root / "plain.txt", "a")
    write(
        root / "books/sources.json",
        json.dumps({"*.txt": {"license": "CC0-1.0", "language": "fr"}, "b.md": "CC-BY-4.0"}),
    )
    write(root / "books/a.txt", "a")
    write(root / "books/b.md", "b")
    write(
        root / "books/c.jsonl",
        '{"text": "c", "license": "GPL", "source": "there"}\n{"text": "d", "license": null}\n',
    )
    write(root / "own/ATTRIBUTION.md", "Under https://creativecommons.org/licenses/by-sa/3.0/ by A")
    write(root / "own/d.txt", "d")
    write(root / "own/notice of a meeting.txt", "kept")
    documents, counts = read(root)
    found = {d.id: (d.licence, d.language, d.source) for d in documents}
    assert found == {
        "root/plain.txt": ("MIT", "", "root"),
        "root/books/a.txt": ("CC0-1.0", "fr", "root/books"),
        "root/books/b.md": ("CC-BY-4.0", "", "root/books"),
        "root/books/c.jsonl:1": ("GPL", "", "there"),
        "root/books/c.jsonl:2": ("MIT", "", "root/books/c.jsonl"),
        "root/own/d.txt": ("CC-BY-SA-3.0", "", "root/own"),
        "root/own/notice of a meeting.txt": ("CC-BY-SA-3.0", "", "root/own"),
    }
    assert counts.files["notice"] == 3
    write(root / "books/sources.json", "{torn")
    with pytest.raises(InputError, match=r"sources\.json"):
        texts(root)


def test_what_cannot_be_found_is_said(tmp_path):
    for name in ("nothing.txt", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no such file"):
            texts(tmp_path / name)
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(InputError, match="nothing to read there"):
            texts(path)
    assert texts(write(tmp_path / "README", "any name will do")) == ["any name will do"]


def test_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r'pip install "\.\[corpus\]"'):
        texts(write(tmp_path / "a.txt.zst", b"x"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
        st.lists(
            st.sampled_from(
                ['{"text": "é', '"}', "\n", "[", "]", ",", '"', "a", "\0", "\ufeff", "<p>", "\r"]
            ),
            max_size=40,
        ).map(lambda parts: "".join(parts).encode()),
    ),
    suffix=st.sampled_from(
        [".txt", ".jsonl", ".json", ".csv", ".tsv", ".html", ".txt.gz", ".jsonl.zst", ".csv.xz", ".parquet"]
    ),
    limit=st.sampled_from([8, 100, 10**6]),
    unit=st.sampled_from(["auto", "file", "line", "paragraph"]),
    long_text=st.sampled_from(["split", "refuse"]),
    packed=st.booleans(),
)
def test_any_bytes_are_accounted_for(tmp_path, content, suffix, limit, unit, long_text, packed):
    if packed:
        content = COMPRESS.get("." + suffix.rpartition(".")[2], COMPRESS[""])(content)
    path = write(tmp_path / f"a{suffix}", content)
    counts = ReadCounts()
    policy = ReadPolicy(document_bytes=limit, text_unit=unit, long_text=long_text)
    try:
        kept = [document.text for document in read_documents([path], policy, counts)]
    except InputError:
        return  # no field for the text: said, not lost
    assert counts.unaccounted_bytes == 0
    assert counts.bytes_kept == sum(len(text.encode()) for text in kept)
    assert sum(counts.files.values()) == 1
