"""The card of a run: figures equal to the files', whatever is missing; data that cannot break it; the same bytes twice."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from glasshouse.card import plots
from glasshouse.card.facts import spread
from glasshouse.card.model import UNMEASURED
from glasshouse.card.page import (
    Code,
    Listing,
    Paragraph,
    Table,
    escape_html,
    escape_markdown,
    render_html,
    render_markdown,
)
from glasshouse.card.plots import Series, draw_bars, draw_lines, smooth, thin
from glasshouse.card.quantity import duration, energy, scaled, share, short
from glasshouse.errors import InputError
from glasshouse.files import write_json, write_manifest
from glasshouse.report import write_report
from glasshouse.run import Run, create_run

HOSTILE = (
    '<script>alert(1)</script> | **b** `c` $x$ [l](http://evil.example/x) &amp; "q" \x1b[2J \u202e ~~~ ```'
)
MODEL = {
    "vocab_size": 512, "embedding_dim": 64, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "feed_forward_dim": 192, "context_length": 128,
}  # fmt: skip
VOID = {"meta", "use", "path", "link", "br"}


def make_corpus(folder: Path, source: str = "Stories", licence: str = "CC-BY-4.0") -> Run:
    run = create_run(folder, "prepare", {"documents": ["texts"], "tokenizer": None, "seed": 3}, [])
    run.corpus_path.mkdir()
    side = {"documents": 185, "bytes": 13675, "tokens": 4580}
    held_out = {"documents": 15, "bytes": 1109, "tokens": 390}
    write_json(run.corpus_path / "corpus.json", {
        "format": 1, "vocab_size": 512, "splits": {"train": side, "validation": held_out},
        "languages": {"en": {"train": side, "validation": held_out}}, "licences": {licence: 200}, "sources": {source: 150, "Other": 50},
    })  # fmt: skip
    rule = {"stage": "quality", "rule": "few_letters", "documents_in": 220, "documents_kept": 200, "documents_dropped": 20,
            "documents_changed": 3, "bytes_in": 16000, "bytes_added": 0, "bytes_kept": 14784, "bytes_dropped": 1216,
            "examples": [{"id": "a.txt", "text": HOSTILE + "\ud800"}]}  # fmt: skip
    waterfall = {
        "documents_in": 220, "bytes_in": 16000, "documents_out": 200, "bytes_out": 14784, "rules": [rule],
        "stages": [{"stage": "quality", "documents": 200, "bytes": 14784, "sha256": "5" * 64}],
        "read": {"documents": 220, "encodings": {"ascii": 220}, "examples": {}}, "facts": {"languages": {"en": 220}},
    }  # fmt: skip
    (run.corpus_path / "waterfall.json").write_text(json.dumps(waterfall))
    pieces = {
        "train": {**side, "bytes_per_token": 3.1115},
        "validation": {**held_out, "bytes_per_token": 2.9573},
    }
    write_json(run.corpus_path / "tokenizer_report.json", {
        "vocab_size": 512, "languages": {"en": pieces}, "bytes_per_token": {"train": 3.1115, "validation": 2.9573},
    })  # fmt: skip
    write_manifest(run.corpus_path)
    run.finish(seed=3, seconds=2.5)
    return run


def make_run(folder: Path, corpus: Run, sample: str = "sat on the mat.") -> Run:
    """A finished pretraining run of 60 steps with its evaluation."""
    recipe = {"corpus": str(corpus.path), "sample_prompt": "The cat", "isolate_documents": True, "seed": 7}
    run = create_run(folder, "pretrain", recipe, [corpus.path])
    run.update(
        shape={"model": MODEL, "rows": 16, "context": 64, "steps": 60}, seed=7, matmul_rate=48.8e9, baseline_memory=400_000_000,
        predicted={"parameters": 132416, "flops": 5.18e10, "memory": 15_600_000, "seconds": 43.6, "joules": 784.7,
                   "method": "three steps timed on this machine; 18 W assumed"},
        device={"kind": "cpu", "dtype": "bfloat16", "threads": 2, "world_size": 1},
        optimization={"optimizer": "muon", "learning_rate": 0.01, "matrix_learning_rate": 0.03, "weight_decay": 0.1, "clip": 1.0,
                      "warmup": 0.02, "decay": 0.4},
    )  # fmt: skip
    for step in range(1, 61):
        run.log({"step": step, "loss": 6 / step, "bits_per_byte": 3 / step, "learning_rate": 0.01, "seconds": 2.0 * step, "tokens": 1024 * step,
                 "tokens_per_second": 500.0 + step, "utilization": 0.123, "memory": 405_000_000} | ({"spike": True} if step == 30 else {}))  # fmt: skip
        if step % 20 == 0:
            loss = {20: 0.95, 40: 0.8125, 60: 0.9}[step]
            run.log(
                {
                    "step": step,
                    "validation_loss": loss,
                    "validation_bits_per_byte": loss / 2,
                    "gap": loss - 0.5,
                    "sample": f"{sample} {step}",
                }
            )
    run.model_path.mkdir()
    write_json(run.model_path / "config.json", {"model_type": "llama"})
    write_manifest(run.model_path)
    run.finish(
        parameters=132416, steps=60, tokens=61440, seconds=130.5, memory=405_000_000, predicted_memory=415_600_000, energy=2349.0,
        energy_method="18 W assumed", flops=5.18e10, best={"step": 40, "validation_bits_per_byte": 0.40625},
    )  # fmt: skip
    run.attach("evaluation", {
        "digest": run.digest(), "command": "glasshouse evaluate base", "seed": 0, "device": "cpu bfloat16",
        "held_out": {"documents": 15, "tokens": 390, "bytes": 1109, "digest": "9" * 64, "corpus": "c" * 64},
        "bits_per_byte": {"value": 0.5487, "low": 0.4188, "high": 0.6861},
        "baseline": {"name": "5-gram, modified Kneser-Ney", "tokens": 4580, "value": 0.7881, "low": 0.7379, "high": 0.8342},
        "difference": {"value": -0.2394, "low": -0.3441, "high": -0.1347, "p": 0.001, "verdict": "the model is better", "method": "paired"},
        "train": {"value": 0.3981, "low": 0.2563, "high": 0.5512, "gap": 0.1506, "gap_low": 0.1, "gap_high": 0.2},
        "languages": [{"name": "en", "documents": 10, "bytes": 700, "value": 0.5111, "low": None, "high": None, "baseline": 0.7222},
                      {"name": "zh", "documents": 5, "bytes": 409, "value": 0.6333, "low": 0.5, "high": 0.7, "baseline": 0.8444}],
        "sources": [], "method": "95 % bootstrap", "units": {"nats": [1.0], "bytes": [2], "languages": []},
    })  # fmt: skip
    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Run:
    return make_corpus(tmp_path / "runs" / "corpus")


@pytest.fixture
def run(tmp_path: Path, corpus: Run) -> Run:
    return make_run(tmp_path / "runs" / "base", corpus)


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Drawing takes most of the time of a card: only the tests that ask for `with_plots` draw."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def with_plots():
    assert plots.can_draw(), "the tests need matplotlib"


class Page(HTMLParser):
    """What a browser would see: the elements, their attributes, and whether they close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data


def cards(run: Run) -> tuple[str, str]:
    """The two cards as text, without Markdown's backslashes."""
    write_report(run)
    markdown = (run.path / "README.md").read_text(encoding="utf-8")
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return re.sub(r"\\([^\w\s])", r"\1", markdown), page.text


def front_matter(run: Run) -> dict:
    text = (run.path / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures_are_those_of_the_files(run: Run):
    expected = [
        "132,416", "2 layers, width 64", "60 of 60", "61,440", "13.7 kB of text (en)",  # what it is
        "0.549", "0.419 to 0.686", "0.788", "0.738 to 0.834", "-0.239", "-0.344 to -0.135", "the model is better",  # results
        "n = 15 held-out documents", "390 tokens", "0.511", "0.722", "0.500 to 0.700", "too little text",
        "51.8 GFLOP", "43.6 s", "2 min 10 s", "416 MB", "405 MB", "0.218 Wh", "0.652 Wh", "2.99", "0.97",  # cost
        "13.4 passes over 4,580 training tokens", "0.151 bits per byte (0.100 to 0.200)",  # limits
        "0.400 nats per token at the last validation, 0.312 at the best, which was at step 40 of 60",
        "of step 40, the best validation", "48.8 GFLOP/s", "12.3 %", "560", "Stories", "75.0 %", "few letters",
        "seed 7", "glasshouse 0.", run.read()["digest"], "step 30: loss 0.200 stands out",
    ]  # fmt: skip
    for card in cards(run):
        for words in expected:
            assert words in card, words


def test_samples_are_shown_as_they_came_first_to_last(run: Run):
    for card in cards(run):
        places = [card.index(f"sat on the mat. {step}") for step in (20, 40, 60)]
        assert places == sorted(places)


def test_what_is_not_measured_says_so_and_nothing_is_promised(run: Run):
    for card in cards(run):
        for limit, why in UNMEASURED:
            assert limit in card
            assert f"not measured yet: {why}" in card
        assert not re.search(r"\b(unbiased|safe|private|explained|More Information Needed)\b", card, re.I)


def test_plots_are_drawn_and_the_card_stands_without_matplotlib(
    run: Run, with_plots, monkeypatch: pytest.MonkeyPatch
):
    cards(run)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    markdown, text = cards(run)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<svg" not in page
    assert "0.549" in text
    for card in (markdown, text):
        assert "pip install '.[report]'" in card


def test_a_corpus_has_a_card(corpus: Run):
    for card in cards(corpus):
        for words in (
            "13.7 kB in 185 documents", "4,580 tokens", "few letters", "220", "20", "14.8 kB", "92.4 %", "2.96", "3.11", "CC-BY-4.0", "a.txt",
            "glasshouse pretrain --corpus corpus", "5" * 64,
        ):  # fmt: skip
            assert words in card, words
    head = front_matter(corpus)
    assert head["license"] == ["cc-by-4.0"]
    assert head["task_categories"] == ["text-generation"]


def test_other_reports_are_shown_as_they_are(run: Run):
    run.attach(
        "audit",
        {
            "digest": "other",
            "leakage": {"found": 3, "rate": 0.01234},
            "cases": [{"name": HOSTILE, "n": 1}],
            "long": list(range(99)),
        },
    )
    for card in cards(run):
        assert "Report: audit" in card
        assert "leakage.rate" in card
        assert "0.01234" in card
        assert "99 values" in card
        assert "of other weights" in card


def test_an_evaluation_of_other_weights_is_marked(run: Run):
    report = run.reports()["evaluation"]
    run.attach("evaluation", {**report, "digest": "f" * 64})
    for card in cards(run):
        assert "measured on other weights" in card
    assert "model-index" not in front_matter(run)


# -------------------------------------------------------------------------------------------------------- front matter


def test_front_matter_is_what_the_hub_reads(run: Run):
    cards(run)
    head = front_matter(run)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert head["license"] == "other"
    assert head["language"] == ["en"]
    assert head["datasets"] == ["other", "stories"]
    [result] = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.5487
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((run.path / "README.md").read_text(encoding="utf-8"))
    [found] = card.data.eval_results
    assert (found.metric_value, found.metric_type) == (0.5487, "bits_per_byte")


@pytest.mark.parametrize(
    ("facts", "said", "task", "command"),
    [
        ({"stage": "finetune", "method": "lora", "base": "runs/base", "examples": {"kept": 52}},
         "fine-tuned (lora) from base on 52 examples", "text-generation", "glasshouse chat"),
        ({"model_shape": {"num_encoder_layers": 4, "num_decoder_layers": 4, "embedding_dim": 128}},
         "An encoder-decoder", "translation", "glasshouse translate"),
        ({"shape": {"model": {"head": "masked", "vocab_size": 100}}}, "to guess hidden tokens", "fill-mask", "AutoModelForMaskedLM"),
    ],
)  # fmt: skip
def test_the_card_says_what_kind_of_model_it_is(run: Run, facts: dict, said: str, task: str, command: str):
    run.update(**facts)
    write_report(run)
    text = (run.path / "README.md").read_text(encoding="utf-8")
    assert said in text
    assert command in text
    assert front_matter(run)["pipeline_tag"] == task
    assert "It continues text" not in text


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("Apache-2.0", ("apache-2.0", None)),
        ("our own terms", ("other", "our own terms")),
        ("", ("other", "not-declared")),
    ],
)
def test_the_card_says_the_licence_that_was_named(run: Run, named: str, expected: tuple[str, str | None]):
    run.update(licence=named)
    write_report(run)
    head = front_matter(run)
    assert (head["license"], head.get("license_name")) == expected


def test_front_matter_takes_any_name(tmp_path: Path):
    corpus = make_corpus(tmp_path / "runs" / "corpus", source=HOSTILE, licence="weird: licence\n---\n")
    run = make_run(tmp_path / "runs" / 'ba: "se" #\n---', corpus)
    for each in (run, corpus):
        write_report(each)
        text = (each.path / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
        assert head["language"] == ["en"]
    assert head["license"] == ["other"]


# ----------------------------------------------------------------------------------------------------- data that attacks


def test_data_cannot_break_the_page(tmp_path: Path):
    corpus = make_corpus(tmp_path / "runs" / "corpus", source=HOSTILE, licence=HOSTILE)
    run = make_run(tmp_path / "runs" / "base", corpus, sample=HOSTILE + "\n| a | b |\n---\n# head")
    run.update(seed=HOSTILE, code_version=HOSTILE)
    for each in (run, corpus):
        write_report(each)
        page = Page((each.path / "report.html").read_text(encoding="utf-8"))
        assert not {"script", "a", "img", "iframe", "link", "object", "form"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert "<script>alert(1)</script>" in page.text  # shown, not obeyed
        markdown = (each.path / "README.md").read_text(encoding="utf-8")
        prose = re.sub(r"(`{3,}).*?\n\1(?=\n|$)", "", markdown, flags=re.S)
        assert "<script" not in re.sub(r"`[^`\n]*`", "", prose)
        assert not re.search(r"(?<!\\)\]\(http", prose)
        assert "\x1b" not in markdown
        assert "\u202e" not in markdown
        for table in re.findall(r"(?:^\|.*\|\n)+", prose, re.M):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(widths) == 1, table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>", "&lt;b&gt;"),
        ("a|b", "a\\|b"),
        ("# head", "\\# head"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
        ("0.5", "0.5"),
        ("-0.5", "-0.5"),
        ("two\nlines", "two<br>lines"),
        ("&lt;", "&amp;lt;"),
        ("http://x.y", "http\\://x.y"),
        ("back\\slash", "back\\\\slash"),
        ("\x00\u202e\ud800", "\ufffd\ufffd\ufffd"),
    ],
)
def test_markdown_shows_text_and_does_nothing_else(text: str, expected: str):
    assert escape_markdown(text) == expected


def test_code_with_backticks_stays_code():
    blocks = [Paragraph(Code("a``b`")), Listing("```\n# x\n````", "sh"), Table(("a",), [(Code("x|y"),)])]
    markdown = render_markdown("t", blocks)
    assert "``` a``b` ```" in markdown
    assert "`````sh\n```\n# x\n````\n`````" in markdown
    assert "| `x\\|y` |" in markdown
    assert escape_html("<a href='x'>") == "&lt;a href=&#x27;x&#x27;&gt;"
    assert "&lt;i&gt;" in render_html("<i>", blocks)


def test_the_page_loads_nothing(run: Run, corpus: Run, with_plots):
    for each in (run, corpus):
        write_report(each)
        text = (each.path / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        loaded = [
            value
            for name, value in page.attributes
            if name in ("src", "href", "srcset", "data", "poster", "xlink:href")
        ]
        assert all(value and value.startswith("#") for value in loaded), loaded
        assert "@import" not in text
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
        assert "http://" not in text.replace("http://evil.example", "")
        assert "https://" not in text
        assert "default-src 'none'" in text


# ------------------------------------------------------------------------------------------------- what can be missing


def test_a_stopped_run_says_so_at_the_top(run: Run):
    facts = run.read()
    for key in (
        "parameters",
        "tokens",
        "seconds",
        "memory",
        "flops",
        "energy",
        "steps",
        "best",
        "digest",
        "predicted_memory",
    ):
        facts.pop(key)
    write_json(run.path / "run.json", {**facts, "status": "stopped"})
    shutil.rmtree(run.path / "reports")
    run.keep_metrics(25)
    for card in cards(run):
        assert card.index("not finished (status: stopped)") < card.index("A decoder-only language model")
        assert "25 of 60 steps are logged" in card
        assert "glasshouse pretrain --resume --out base" in card
        assert "132,416 weights" in card
        assert "25,600" in card
        assert "not measured yet. Measure them with" in card
        assert "not measured yet: the run is not finished" in card
        assert "50.0 s" in card


def test_a_run_that_has_only_begun_has_a_card(tmp_path: Path, corpus: Run):
    run = create_run(tmp_path / "runs" / "new", "pretrain", {"corpus": str(corpus.path)}, [corpus.path])
    for card in cards(run):
        assert "not finished (status: running)" in card
        assert "the run holds no metrics" in card
    unprepared = create_run(tmp_path / "runs" / "raw", "prepare", {"documents": ["x"]}, [])
    for card in cards(unprepared):
        assert "not finished" in card
        assert "The corpus is not there" in card


def test_missing_or_changed_parents_are_said(run: Run, corpus: Run, tmp_path: Path):
    shutil.move(corpus.path, tmp_path / "gone")
    for card in cards(run):
        assert "is not at the recorded place" in card
        assert "Stories" not in card
        assert "0.549" in card
        assert run.read()["parents"][0]["digest"] in card
    make_corpus(corpus.path, source="Another corpus")
    for card in cards(run):
        assert "is no longer the same" in card
        assert "Another corpus" not in card


def test_a_run_made_from_a_bare_corpus_folder_finds_it(tmp_path: Path, corpus: Run):
    bare = shutil.copytree(corpus.corpus_path, tmp_path / "bare")
    run = create_run(tmp_path / "runs" / "new", "pretrain", {"corpus": str(bare)}, [bare])
    run.update(corpus_digest=corpus.digest())
    for card in cards(run):
        assert "Stories" in card
    run.update(corpus_digest="0" * 64)
    for card in cards(run):
        assert "Stories" not in card


def test_a_moved_pair_of_runs_finds_its_corpus_beside_it(run: Run, corpus: Run, tmp_path: Path):
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    for card in cards(Run(tmp_path / "elsewhere" / "base")):
        assert "Stories" in card
        assert str(tmp_path) not in card.split("All settings")[0]


def test_missing_and_torn_files_are_noted(run: Run):
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 61, "loss": 0.')
    for card in cards(run):
        assert "1 line(s) of metrics.jsonl could not be read" in card
        assert "0.549" in card
    (run.path / "reports" / "evaluation.json").write_text('{"bits')
    (run.path / "recipe.yaml").write_text("pretrain: [")
    for card in cards(run):
        assert "evaluation.json could not be read" in card
        assert "recipe.yaml is missing or could not be read" in card
        assert "not measured yet. Measure them with" in card
    (run.path / "metrics.jsonl").unlink()
    for card in cards(run):
        assert "the run holds no metrics" in card
    (run.path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="torn or altered"):
        write_report(run)


def test_values_of_the_wrong_kind_are_not_measured(run: Run, with_plots):
    facts = run.read()
    write_json(
        run.path / "run.json",
        {
            **facts,
            "seconds": "soon",
            "memory": None,
            "flops": {"a": 1},
            "device": 3,
            "parents": "x",
            "shape": [],
        },
    )
    report = run.reports()["evaluation"]
    run.attach(
        "evaluation",
        {**report, "bits_per_byte": "good", "languages": 3, "baseline": {"value": [1]}, "train": None},
    )
    run.log({"step": "x", "loss": None})
    run.log({"step": 61, "loss": None, "skipped": "loss is not finite", "learning_rate": None})
    for card in cards(run):
        assert "not measured" in card
        assert "step 61: loss is not finite" in card


# -------------------------------------------------------------------------------------------------------- same, whole


def test_the_same_files_give_the_same_bytes(run: Run, with_plots):
    write_report(run)
    first = [(run.path / name).read_bytes() for name in ("README.md", "report.html")]
    write_report(run)
    assert [(run.path / name).read_bytes() for name in ("README.md", "report.html")] == first


def test_nothing_else_is_left_in_the_folder(run: Run):
    before = {path.name for path in run.path.iterdir()}
    write_report(run)
    assert {path.name for path in run.path.iterdir()} - before == {"README.md", "report.html"}


# ------------------------------------------------------------------------------------------------------------- parts


def test_plots_take_the_colours_of_the_page_and_keep_their_ids_apart(with_plots):
    line = Series("a $x$ <b>", [1, 2, 3], [3.0, 1.0, 2.0])
    one, two = draw_lines("one", [line], "unit"), draw_lines("two", [line], "unit")
    assert "var(--accent)" in one
    assert not re.search(r"#0102\d\d", one)
    assert "http" not in one
    assert "a $x$ &lt;b&gt;" in one
    assert not set(re.findall(r'id="([^"]+)"', one)) & set(re.findall(r'id="([^"]+)"', two))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one)
    assert targets
    assert {one or two for one, two in targets} <= set(re.findall(r'id="([^"]+)"', one))
    bars = draw_bars("bars", ["model", "baseline"], [0.5, 0.75], [(0.4, 0.6), None], "bits per byte")
    assert "0.500" in bars
    assert "0.750" in bars


def test_smoothing_begins_at_the_first_value_and_follows():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    smoothed = smooth([4.0, 0.0, 0.0])
    assert smoothed[0] == pytest.approx(4.0)
    assert 0 < smoothed[2] < smoothed[1] < 4


def test_thinning_keeps_the_extremes():
    y = [0.0] * 10_000
    y[1234], y[777] = 50.0, -50.0
    x, kept = thin(list(range(10_000)), y)
    assert len(x) <= plots.MOST_POINTS
    assert (1234, 50.0) in zip(x, kept, strict=True)
    assert (777, -50.0) in zip(x, kept, strict=True)
    assert x == sorted(x)


def test_spreading_keeps_first_and_last():
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (scaled(404_946_944, "B"), "405 MB"),
        (scaled(999_700, "B"), "1.00 MB"),
        (scaled(12, "B"), "12 B"),
        (scaled(5.18e10, "FLOP"), "51.8 GFLOP"),
        (scaled(float("nan"), "B"), "not measured"),
        (scaled(True, "B"), "not measured"),
        (duration(43.59), "43.6 s"),
        (duration(132.7), "2 min 13 s"),
        (duration(179.8), "3 min 0 s"),
        (duration(7261), "2 h 1 min"),
        (duration(None), "not measured"),
        (energy(784.7), "0.218 Wh"),
        (energy(7.2e6), "2.00 kWh"),
        (share(1, 3), "33.3 %"),
        (share(2, 5550), "< 0.1 %"),
        (share(0, 10), "0.0 %"),
        (share(1, 0), "not measured"),
        (short({"a": [1, 2], "b": 0.123456}), "a: 2 values, b: 0.1235"),
        (short([1, 2, 3]), "1, 2, 3"),
        (short(None), "none"),
        (short("x" * 600), "x" * 500 + "…"),
    ],
)
def test_numbers_are_written_as_people_read_them(shown: str, expected: str):
    assert shown == expected
