"""The published quality rules of Gopher, C4 and FineWeb, per language, and the few that a small corpus needs.

Each rule measures one thing and has one limit. Limits are those of datatrove 0.10 (Gopher: arXiv 2112.11446, tables
in appendix A; C4: JMLR 21-074; FineWeb: arXiv 2406.17557); those for Chinese follow FineWeb-2's `cmn_Hani` settings
(arXiv 2506.20920). Rules on the length of words do not apply where words are not separated by spaces.

Own code instead of datatrove's filter blocks: those split words with spaCy (and jieba for Chinese), which no light
installation has, and know one language per pipeline. The tests hold the verdicts against those blocks, given the
same words. It knows nothing of files or of other documents.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from glasshouse.corpus.measures import (
    View,
    alphabetic_share,
    broken_lines,
    ends_in_ellipsis,
    finished_line_share,
    has_long_word,
    is_short,
    lacks_end,
    loop_share,
    outside,
    paragraphs,
    plain_word_count,
    readable_share,
    repeated,
    repeated_gram_share,
    repeated_line_share,
    sentence_count,
    share_of_lines,
    short_line_share,
    starts_with_bullet,
    stop_words,
    top_gram_share,
    unbroken_share,
)
from glasshouse.corpus.personal_data import KINDS, Kind
from glasshouse.errors import InputError

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
NEVER = float("-inf")


@dataclass(frozen=True)
class Rule:
    """Drop a document whose measure is above `most` or below `least`.

    Args:
        name: as it stands in the waterfall.
        measure: what is measured.
        most, least: the limits.
        by_character: the limits for languages without spaces, (most, least); None: the same.
        off_by_character: the rule means nothing in languages without spaces.
    """

    name: str
    measure: Callable[[View], float]
    most: float = float("inf")
    least: float = float("-inf")
    by_character: tuple[float, float] | None = None
    off_by_character: bool = False

    def fails(self, view: View) -> float | None:
        """The measured value where the document must go, else None."""
        if view.convention.by_character and self.off_by_character:
            return None
        most, least = (self.most, self.least)
        if view.convention.by_character and self.by_character:
            most, least = self.by_character
        value = self.measure(view)
        return value if value > most or value < least else None

    def with_limit(self, limit: float) -> "Rule":
        """The same rule with another limit, for every language."""
        above = self.most != float("inf")
        return Rule(self.name, self.measure, limit if above else self.most, self.least if above else limit)


@dataclass(frozen=True)
class LineRule:
    """Change or remove single lines: `change(view, line)` gives the new line, or None to remove it."""

    name: str
    change: Callable[[View, str], str | None]


def keep_unless(name: str, removes: Callable[[View, str], bool]) -> LineRule:
    """The rule that removes the lines for which `removes(view, line)` is true."""
    return LineRule(name, lambda view, line: None if removes(view, line) else line)


# By name, so that a rule keeps its measure when its limit is changed. Limits: (every language, by character).
GENTLE = (
    Rule("no_text", lambda view: float(any(map(str.isalnum, view.text))), least=1),
    Rule("broken_characters", lambda view: view.text.count("\ufffd") / max(1, len(view.text)), most=0.05),
    Rule("few_letters", readable_share, least=0.3),
    Rule("unbroken_text", unbroken_share, most=0.5, off_by_character=True),
    Rule("repeated_text", loop_share, most=0.9),
)
GOPHER_REPETITION = (
    Rule("gopher_repeated_paragraphs", lambda v: repeated(paragraphs(v))[0] / len(paragraphs(v)), 0.3),
    Rule("gopher_repeated_paragraph_characters", lambda v: repeated(paragraphs(v))[1] / len(v.text), 0.2),
    Rule("gopher_repeated_lines", lambda v: repeated(broken_lines(v))[0] / len(broken_lines(v)), 0.3),
    Rule("gopher_repeated_line_characters", lambda v: repeated(broken_lines(v))[1] / len(v.text), 0.2),
    *(
        Rule(f"gopher_top_{n}_gram", partial(top_gram_share, length=n), most, by_character=(chinese, NEVER))
        for n, most, chinese in ((2, 0.2, 0.256), (3, 0.18, 0.201), (4, 0.16, 0.171))
    ),
    *(
        Rule(
            f"gopher_repeated_{n}_grams",
            partial(repeated_gram_share, length=n),
            most,
            by_character=(chinese, NEVER),
        )
        for n, most, chinese in zip(
            range(5, 11),
            (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
            (0.198, 0.182, 0.167, 0.154, 0.14, 0.127),
            strict=True,
        )
    ),
)
GOPHER_QUALITY = (
    Rule("gopher_short_document", plain_word_count, least=50),
    Rule("gopher_long_document", plain_word_count, most=100_000),
    Rule("gopher_word_length", outside, most=0.0, off_by_character=True),
    Rule("gopher_hashes", lambda v: v.text.count("#") / max(1, v.word_count), 0.1),
    Rule("gopher_ellipses", lambda v: (v.text.count("...") + v.text.count("…")) / max(1, v.word_count), 0.1),
    Rule("gopher_bullets", lambda v: share_of_lines(v, starts_with_bullet), 0.9),
    Rule("gopher_ellipsis_lines", lambda v: share_of_lines(v, ends_in_ellipsis), 0.3),
    Rule("gopher_few_alphabetic", alphabetic_share, least=0.8, by_character=(-NEVER, 0.735)),
    Rule("gopher_stop_words", stop_words, least=2),
)
C4 = (
    LineRule("c4_line_spaces", lambda view, line: line),  # lines are stripped; the rules below see them so
    keep_unless("c4_long_words", has_long_word),
    keep_unless("c4_short_lines", is_short),
    LineRule("c4_citations", lambda view, line: CITATION.sub("", line)),
    keep_unless("c4_unfinished_lines", lacks_end),
    Rule("c4_lorem_ipsum", lambda view: float("lorem ipsum" in view.text.lower()), most=0),
    keep_unless("c4_javascript", lambda view, line: "javascript" in line.lower()),
    Rule("c4_curly_bracket", lambda view: view.text.count("{"), most=0),
    keep_unless("c4_policy_lines", lambda view, line: any(phrase in line.lower() for phrase in POLICY)),
    Rule("c4_few_sentences", sentence_count, least=5),
)
FINEWEB = (
    Rule("fineweb_unfinished_lines", finished_line_share, least=0.12, by_character=(-NEVER, 0.106)),
    Rule("fineweb_short_lines", short_line_share, most=0.67),
    Rule("fineweb_repeated_characters", repeated_line_share, most=0.01),
    Rule(
        "fineweb_line_breaks",
        lambda v: v.text.count("\n") / max(1, v.word_count),
        0.3,
        by_character=(0.178, NEVER),
    ),
)
PROFILES: dict[str, tuple[Rule | LineRule, ...]] = {
    "none": (),
    "gentle": GENTLE,
    "web": (*GENTLE, *GOPHER_REPETITION, *GOPHER_QUALITY, *C4, *FINEWEB),
}


def choose_rules(
    profile: str, skip: tuple[str, ...], thresholds: Mapping[str, float]
) -> list[Rule | LineRule]:
    """The rules of a profile without those skipped, with other limits where some are given.

    Raises:
        InputError: no such profile, or a limit for a rule that has none.
    """
    if profile not in PROFILES:
        raise InputError(f"no cleaning profile {profile!r}", "profile", f"use one of {', '.join(PROFILES)}")
    known = {rule.name: rule for rule in PROFILES[profile]}
    for name in thresholds:
        if not isinstance(known.get(name), Rule):
            limits = ", ".join(name for name, rule in known.items() if isinstance(rule, Rule))
            raise InputError(f"no limit {name!r} in profile {profile}", "thresholds", f"use one of {limits}")
    chosen = [rule for name, rule in known.items() if name not in skip]
    return [
        rule.with_limit(thresholds[rule.name]) if isinstance(rule, Rule) and rule.name in thresholds else rule
        for rule in chosen
    ]


@dataclass
class Judgement:
    """What the rules made of one text: the text that is left, the rule that dropped it ("" if kept) and why, and
    the changes, as (rule, bytes added, first line changed)."""

    text: str
    dropped_by: str
    why: str
    changes: list[tuple[str, int, str]]


def judge(text: str, language: str, rules: Sequence[Rule | LineRule]) -> Judgement:
    """Apply rules in order until one drops the document.

    Args:
        text: the document.
        language: two-letter code, "" when unknown.
        rules: from `choose_rules`.
    """
    view, changes = View(text, language), []
    for rule in rules:
        if not view.text and rule.name != "no_text":
            break  # a document without text always goes, and the measures divide by its length
        if isinstance(rule, Rule):
            value = rule.fails(view)
            if value is not None:
                return Judgement(view.text, rule.name, f"{value:.3g}", changes)
        else:
            changed, example = change_lines(view, rule)
            if changed != view.text:
                added = len(changed.encode()) - len(view.text.encode())
                changes.append((rule.name, added, example))
                view = View(changed, language)
    return Judgement(view.text, "" if view.text else "nothing_left", "", changes)


def change_lines(view: View, rule: LineRule) -> tuple[str, str]:
    """The text after a line rule, and the first line that it changed."""
    lines = [line.strip() for line in view.text.splitlines()]
    changed = [rule.change(view, line) for line in lines]
    example = next((line for line, new in zip(lines, changed, strict=True) if new != line and line), "")
    return "\n".join(line for line in changed if line is not None).strip(), example


@dataclass(frozen=True)
class CleanRules:
    """Which cleaning rules act, and how hard. Every rule can be switched off: by its field or by `skip`.

    Args:
        profile: quality rules. "gentle" drops only what is no text at all, so that short sentences, poems, lists and
            children's stories stay; "web" applies the published rules of Gopher, C4 and FineWeb in full, per
            language, as for pages crawled from the web; "none" applies no quality rule.
        skip: names of rules to switch off, as they stand in waterfall.json.
        thresholds: other limits for rules, by name, for instance {"gopher_short_document": 20}.
        normalise: mend line endings, and remove control characters, byte order marks, trailing spaces and runs of
            more than two blank lines. Never touches words, case, punctuation or full-width forms.
        unicode_form: "NFC" (an accented letter is one character, however it was typed) or "none".
        identify_language: tell the language of documents that do not state theirs.
        languages: keep only documents in these languages (two-letter codes); empty keeps all. A document whose
            language cannot be told is kept.
        exact_duplicates: drop documents that repeat an earlier one but for case and white space.
        near_duplicates: "verified" drops a document whose 5-grams overlap those of an earlier one with a real Jaccard
            similarity of `near_duplicate_similarity` or more; "published" is FineWeb's MinHash (14 buckets of 8
            hashes, unverified, about 0.72); "none" drops none.
        near_duplicate_similarity: for "verified". 0.55 is where 5 % of the words differ.
        near_duplicate_ngram: words (characters in Chinese, Japanese, Thai) in a row that make one 5-gram.
        near_duplicate_minimum: documents of fewer words (characters) are only compared exactly: two short sentences
            that differ in one word say different things.
        personal_data: kinds of personal data to replace, see `personal_data`; empty replaces none.
        evaluation_sets: files whose texts must not be trained on: documents that share a 13-gram with them are dropped.
        evaluation_ngram: words in a row that count as overlap.
        evaluation_ngram_characters: the same in Chinese, Japanese and Thai, in characters.
    """

    profile: Literal["gentle", "web", "none"] = "gentle"
    skip: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    normalise: bool = True
    unicode_form: Literal["NFC", "none"] = "NFC"
    identify_language: bool = True
    languages: tuple[str, ...] = ()
    exact_duplicates: bool = True
    near_duplicates: Literal["verified", "published", "none"] = "verified"
    near_duplicate_similarity: float = 0.55
    near_duplicate_ngram: int = 5
    near_duplicate_minimum: int = 20
    personal_data: tuple[Kind, ...] = ()
    evaluation_sets: tuple[str, ...] = ()
    evaluation_ngram: int = 13
    evaluation_ngram_characters: int = 20


def list_rules(rules: CleanRules) -> list[tuple[str, str]]:
    """The (stage, rule) pairs that act, in order."""
    quality = [rule.name for rule in quality_rules(rules)]
    languages = ["language"] if rules.languages else []
    stages = {
        "normalise": ["normalise"] if rules.normalise or rules.unicode_form != "none" else [],
        "language": languages,
        "quality": [*quality, "nothing_left"] if quality else [],
        "exact_duplicates": ["exact_duplicates"] if rules.exact_duplicates else [],
        "near_duplicates": ["near_duplicates"] if rules.near_duplicates != "none" else [],
        "evaluation_overlap": ["evaluation_overlap"] if rules.evaluation_sets else [],
        "personal_data": ["personal_data"] if rules.personal_data else [],
    }
    return [(stage, name) for stage, names in stages.items() for name in names if name not in rules.skip]


def has_stage(rules: CleanRules, stage: str) -> bool:
    """Whether a stage has any rule that acts."""
    return any(stage == known for known, _ in list_rules(rules))


def check_rules(rules: CleanRules) -> None:
    """Refuse rules that cannot be meant.

    Raises:
        InputError: a name in `skip` that is no rule, a limit without its rule, numbers out of range.
    """
    every = {name for profile in PROFILES.values() for rule in profile for name in (rule.name,)}
    every |= {
        "normalise",
        "language",
        "exact_duplicates",
        "near_duplicates",
        "evaluation_overlap",
        "personal_data",
    }
    if unknown := [name for name in rules.skip if name not in every]:
        raise InputError(
            f"no cleaning rule {unknown[0]!r}", "skip", f"use some of {', '.join(sorted(every))}"
        )
    choose_rules(rules.profile, rules.skip, rules.thresholds)
    if not 0 < rules.near_duplicate_similarity <= 1:
        raise InputError(
            "near_duplicate_similarity must lie above 0 and at most at 1",
            str(rules.near_duplicate_similarity),
        )
    for name in ("near_duplicate_ngram", "evaluation_ngram", "evaluation_ngram_characters"):
        if getattr(rules, name) < 1:
            raise InputError(f"{name} must be at least 1", str(getattr(rules, name)))
    if strange := [kind for kind in rules.personal_data if kind not in KINDS]:
        raise InputError(
            f"no kind of personal data {strange[0]!r}", "personal_data", f"use some of {', '.join(KINDS)}"
        )


def quality_rules(rules: CleanRules) -> list[Rule | LineRule]:
    """The quality rules that act."""
    return choose_rules(rules.profile, rules.skip, rules.thresholds)
