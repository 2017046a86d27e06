"""Build the shipped corpus, `src/glasshouse/data`, from downloaded public data and the two hand-written primers.

    python benchmarks/build_corpus.py DATA_FOLDER [--out src/glasshouse/data]

DATA_FOLDER holds `pretrain_en/african_storybook_en.jsonl.gz`, `pretrain_en/classic_books.jsonl.xz` and
`mt/tatoeba_en_zh.tsv.gz`. The corpus is for models trained for minutes, so plainness counts for more than size: a
sentence or passage is kept only when it is short and nearly all of its words are common ones. Each document carries
its licence and its attribution. The same input gives the same bytes. Knows nothing of tokens or training.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

Document = dict[str, str]

PRIMERS = ("primer_en.jsonl", "primer_zh.jsonl")
BOOKS = {
    "Aesop's Fables": "translated by V. S. Vernon Jones, 1912",
    "The Wonderful Wizard of Oz": "1900",
    "Ozma of Oz": "1907",
    "A Kidnapped Santa Claus": "1904",
    "The Life and Adventures of Santa Claus": "1902",
    "The Happy Prince & Other Tales": "1888",
    "The Book of Dragons": "1901",
    "Five Children and It": "1902",
    "The Railway Children": "1905",
    "Through the Looking-Glass": "1871",
    "A Little Princess": "1905",
}
# Not for the model that greets a newcomer, who may be a child; whole words, English and Chinese.
UNSUITABLE = re.compile(
    r"\b(kill\w*|murder\w*|suicide|rap(e|ed|ist)|sex\w*|naked|drunk\w*|beer|wine|whisk\w+|gun|guns|shot|shoot\w*|"
    r"bomb\w*|blood\w*|hell|damn\w*|bastard|bitch|idiot\w*|stupid|hitler|nazi\w*|terroris\w+|drugs?|smoking|"
    r"cigarettes?|prison|jail|torture\w*|hang(ed|man)|slaves?|savages?|negro\w*|nigger\w*|aids|hiv|"
    r"divorc\w+|breasts?|cut off|virus|cancer|boston|australia|french)\b|"
    r"杀|自杀|死|性|裸|醉|酒|枪|血|笨|傻|蠢|毒|烟|监狱|离婚|法语|波士顿|澳大利亚",
    re.IGNORECASE,
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SENTENCE_END = re.compile(r"[.!?]+[\"')]*(?:\s|$)")
STORY_FOOTER = re.compile(r"^\* (License|Text|Illustration|Translation|Language|Adaptation|\w[\w ]*): *(.*)$")


def words(text: str) -> list[str]:
    """The lower-cased English words of a text."""
    return WORD.findall(text.lower().replace("’", "'"))


def syllables(word: str) -> int:
    """About how many syllables an English word has: vowel groups, less a silent final e."""
    groups = len(re.findall(r"[aeiouy]+", word))
    return max(1, groups - (word.endswith("e") and not word.endswith("le") and groups > 1))


def reading_grade(text: str) -> float:
    """The school grade a text is written for (Flesch and Kincaid, 1975); lower is plainer."""
    found = words(text)
    sentences = max(1, len(SENTENCE_END.findall(text)))
    return 0.39 * len(found) / sentences + 11.8 * sum(map(syllables, found)) / max(1, len(found)) - 15.59


def unfamiliar_share(text: str, common: set[str]) -> float:
    """Which share of a text's words are not common ones."""
    found = words(text)
    return sum(word not in common for word in found) / max(1, len(found))


def tidy(text: str) -> str:
    """Plain quotes and dashes, no markdown emphasis or doubled blanks, NFC."""
    for old, new in (
        ("’", "'"),
        ("‘", "'"),
        ("“", '"'),
        ("”", '"'),
        ("--", " - "),
        ("—", " - "),
        ("_", ""),
        ("*", ""),
    ):
        text = text.replace(old, new)
    return unicodedata.normalize("NFC", re.sub(r"[ \t\xa0]+", " ", text)).strip()


def read_packed(path: Path) -> Iterator[str]:
    """The lines of a .gz or .xz text file."""
    with (lzma if path.suffix == ".xz" else gzip).open(path, "rt", encoding="utf-8") as file:
        yield from file


def read_stories(path: Path) -> Iterator[Document]:
    """African Storybook: page marks out, hard-wrapped lines joined, the footer moved into the attribution."""
    for line in read_packed(path):
        raw = json.loads(line)
        footer: dict[str, str] = {}
        body = []
        for row in raw["text"].splitlines():
            match = STORY_FOOTER.match(row)
            if match:
                footer[match[1]] = match[2].strip()
            else:
                body.append(row)
        if footer.get("License", "").strip("[]") != "CC-BY" or footer.get("Language", "en") != "en":
            continue
        title, *pages = re.split(r"^##\s*$", "\n".join(body), flags=re.MULTILINE)
        title = tidy(title.strip().lstrip("# "))
        text = join_pages(pages)
        if len(words(text)) < 15 or UNSUITABLE.search(text):
            continue
        makers = "; ".join(
            f"{key}: {value}" for key, value in footer.items() if key not in ("License", "Language")
        )
        yield {
            "id": "african-storybook-" + raw["file"].split("/")[-1].split("_")[0],
            "text": f"{title}\n{text}",
            "source": "African Storybook",
            "licence": "CC-BY",
            "language": "en",
            "attribution": f"{title}. {makers}. African Storybook (africanstorybook.org), changed: pages joined",
        }


def join_pages(pages: Iterable[str]) -> str:
    """Pages as running text; a page that does not end a sentence keeps its line break, so nothing runs together."""
    text = ""
    for page in (tidy(" ".join(page.split())) for page in pages):
        if page:
            text += (" " if text.endswith((".", "!", "?", '"')) else "\n" if text else "") + page
    return text


def read_pairs(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Tatoeba: (English, Chinese, attribution of the English, attribution of the Chinese) of each line."""
    for line in read_packed(path):
        english, chinese, credit = line.rstrip("\n").split("\t")
        found = re.search(r"#(\d+ \([^)]*\)) & #(\d+ \([^)]*\))", credit)
        if found and credit.startswith("CC-BY 2.0 (France)"):
            yield tidy(english), tidy(chinese).replace(" ", ""), found[1], found[2]


def is_simplified(text: str) -> bool:
    """Whether a Chinese text uses only characters of the mainland's basic set, so not traditional ones."""
    try:
        text.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return not re.search(r"[A-Za-z]", text)


def plain_pairs(
    pairs: Iterable[tuple[str, str, str, str]], common: set[str]
) -> Iterator[tuple[str, str, str, str]]:
    """The pairs of whole, short sentences in common words and simplified characters; each sentence once."""
    seen: set[str] = set()
    for english, chinese, *credits in pairs:
        count = len(words(english))
        whole = english.endswith((".", "?", "!")) and chinese.endswith(("。", "？", "！"))
        key = re.sub(r"\W", "", english.lower())
        if not whole or not 3 <= count <= 12 or key in seen or chinese in seen:
            continue
        if UNSUITABLE.search(english) or UNSUITABLE.search(chinese) or re.search(r"\d", english + chinese):
            continue
        if is_simplified(chinese) and unfamiliar_share(english, common) == 0:
            seen.update((key, chinese))
            yield english, chinese, credits[0], credits[1]


def group_pairs(
    pairs: list[tuple[str, str, str, str]], size: int = 6
) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Sentences about one thing, together: each goes to the rarest of its words that enough other sentences share.

    A document of unrelated sentences teaches a model to change the subject; one or two left over make none.
    """
    frequency = Counter(word for english, *_ in pairs for word in set(words(english)))
    groups: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for pair in pairs:
        candidates = [word for word in words(pair[0]) if frequency[word] >= 4 and len(word) > 2]
        if candidates:
            groups[min(candidates, key=lambda word: (frequency[word], word))].append(pair)
    for word in sorted(groups):
        members = sorted(groups[word], key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
        for start in range(0, len(members) - 2, size):
            yield f"{word}-{start // size + 1}", members[start : start + size]


def sentence_documents(pairs: list[tuple[str, str, str, str]]) -> Iterator[Document]:
    """For each group of pairs an English document and a Chinese one with the same sentences in the same order."""
    for name, members in group_pairs(pairs):
        for language, text_column, glue in (("en", 0, " "), ("zh", 1, "")):
            credits = ", ".join("#" + pair[text_column + 2] for pair in members)
            yield {
                "id": f"tatoeba-{language}-{name}",
                "text": glue.join(pair[text_column] for pair in members),
                "source": "Tatoeba",
                "licence": "CC-BY-2.0-FR",
                "language": language,
                "attribution": f"tatoeba.org {credits}",
            }


def read_passages(path: Path, common: set[str], grade: float, unfamiliar: float) -> Iterator[Document]:
    """The plain passages of the chosen books: whole paragraphs, about 120 to 220 words, in reading order."""
    for line in read_packed(path):
        book = json.loads(line)
        if book["title"] not in BOOKS:
            continue
        number = 0
        for chapter in re.split(r"^#+ .*$", book["text"], flags=re.MULTILINE)[3:]:
            for text in cut_passages(chapter):
                number += 1
                plain = reading_grade(text) <= grade and unfamiliar_share(text, common) <= unfamiliar
                if plain and not UNSUITABLE.search(text):
                    yield {
                        "id": f"{re.sub('[^a-z]+', '-', book['title'].lower())}-{number:04d}",
                        "text": text,
                        "source": f"{book['title']} ({book['author']})",
                        "licence": "Public domain",
                        "language": "en",
                        "attribution": f"{book['author']}, {book['title']}, {BOOKS[book['title']]}; a passage of it",
                    }


def cut_passages(chapter: str) -> Iterator[str]:
    """Whole paragraphs gathered into passages of at least 120 words; one longer than 220 is left out."""
    gathered: list[str] = []
    for paragraph in re.split(r"\r?\n\s*\r?\n", chapter):
        text = tidy(" ".join(paragraph.split()))
        if not text or re.fullmatch(r"[\W\d]+", text) or text.startswith(("TRANSLATION", "[Illustration")):
            continue
        gathered.append(text)
        count = len(words(" ".join(gathered)))
        if count >= 120:
            if count <= 220:
                yield "\n".join(gathered)
            gathered = []
    if len(words(" ".join(gathered))) >= 40:
        yield "\n".join(gathered)


def common_words(texts: Iterable[str], least: int) -> set[str]:
    """The words that occur at least `least` times."""
    counts = Counter(word for text in texts for word in words(text))
    return {word for word, count in counts.items() if count >= least}


def read_primer(path: Path) -> list[Document]:
    """A hand-written primer as it stands."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build(data: Path, primers: Path) -> dict[str, list[Document]]:
    """Every downloaded part of the corpus, by file name; the primers decide, with the stories, what is plain."""
    primer = [document["text"] for name in PRIMERS for document in read_primer(primers / name)]
    stories = list(read_stories(data / "pretrain_en/african_storybook_en.jsonl.gz"))
    pairs = list(read_pairs(data / "mt/tatoeba_en_zh.tsv.gz"))
    told = [*primer, *(story["text"] for story in stories)]
    storied = common_words(told, 2)
    common = storied | common_words((pair[0] for pair in pairs), 12)
    sentences = list(sentence_documents(list(plain_pairs(pairs, storied))))
    passages = read_passages(data / "pretrain_en/classic_books.jsonl.xz", common, grade=5.0, unfamiliar=0.1)
    parts = {
        "african_storybook_en.jsonl.gz": stories,
        "tatoeba_en.jsonl.gz": [document for document in sentences if document["language"] == "en"],
        "tatoeba_zh.jsonl.gz": [document for document in sentences if document["language"] == "zh"],
        "books_en.jsonl.gz": list(passages),
    }
    return without_repeats(parts, primer)


def without_repeats(
    parts: dict[str, list[Document]], primer: list[str], length: int = 20
) -> dict[str, list[Document]]:
    """Leave out each document that shares `length` words (or Chinese characters) in a row with an earlier one."""
    seen = {run for text in primer for run in runs(text, length)}
    kept: dict[str, list[Document]] = {}
    for name, documents in parts.items():
        kept[name] = []
        for document in documents:
            found = runs(document["text"], length)
            if seen.isdisjoint(found):
                kept[name].append(document)
                seen |= found
    return kept


def runs(text: str, length: int) -> set[int]:
    """Digests of every run of `length` words or Chinese characters of a text."""
    units = re.findall(r"[a-z']+|[\u4e00-\u9fff]", text.lower())
    pieces = (" ".join(units[start : start + length]) for start in range(len(units) - length + 1))
    return {int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest()) for piece in pieces}


def pack(documents: list[Document]) -> bytes:
    """Documents as gzipped JSON lines; no time stamp, so that the same documents give the same bytes."""
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    return gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0)


def summarise(documents: list[Document]) -> dict[str, object]:
    """What `sources.json` says of one file; several values of a field are listed."""

    def one_of(field: str) -> str:
        return "; ".join(sorted({document[field] for document in documents}))

    return {
        "documents": len(documents),
        "text_bytes": sum(len(document["text"].encode()) for document in documents),
        "language": one_of("language"),
        "licence": one_of("licence"),
        "source": one_of("source"),
    }


def write_corpus(data: Path, out: Path) -> None:
    """Write the downloaded parts and `sources.json` beside the primers in `out`."""
    parts = build(data, out)
    for name, documents in parts.items():
        (out / name).write_bytes(pack(documents))
    everything = {name: read_primer(out / name) for name in PRIMERS} | parts
    summary = {name: summarise(documents) for name, documents in everything.items()}
    (out / "sources.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name, facts in summary.items():
        print(f"{name:32} {facts['documents']:6} documents {facts['text_bytes']:9,} bytes of text")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the downloaded public data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src/glasshouse/data")
    arguments = parser.parse_args()
    write_corpus(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
