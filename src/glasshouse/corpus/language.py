"""Which language a text is in, and what that language's writing takes for a word, a sentence end and a function word.

Three steps, cheapest first: the script decides where it belongs to one language; function words decide most longer
texts of the languages listed here; the `lingua` library, where it is installed, decides the rest. Works offline.
It does not know dialects, nor Traditional from Simplified Chinese, and calls a mixed text by its most frequent part.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lingua import LanguageDetector

# Scripts written without spaces: here a character stands for what a word is elsewhere.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"  # kana and Han
    "\U00020000-\U0003ffff"
)
PUNCTUATION = (
    "!-/:-@\\[-`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4-\u00b8\u00bb\u00bf\u060c\u061b\u061f\u06d4\u0964\u0965"
    + (
        "\u2010-\u205e\u20a0-\u20cf\u2190-\u2bff\u3001-\u3004\u3008-\u3030\u303d\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    )
)
WORD = re.compile(
    f"[{UNSPACED}]|[^\\s{PUNCTUATION}{UNSPACED}]+(?:['’][^\\s{PUNCTUATION}{UNSPACED}]+)*|[{PUNCTUATION}]"
)
SENTENCE_END = re.compile("[.!?\u2026]+[\"'”’)\\]]*(?=\\s|$)|[。！？；｡।॥؟۔]+[”’」』）]*")
CHARACTERS_PER_WORD = (
    1.6  # Han characters in a Chinese word of running text, for limits that were set in words
)

SCRIPTS = {
    "ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af\u1100-\u11ff", "th": "\u0e00-\u0e7f", "lo": "\u0e80-\u0eff",
    "bo": "\u0f00-\u0fff", "my": "\u1000-\u109f", "km": "\u1780-\u17ff", "ka": "\u10a0-\u10ff", "hy": "\u0530-\u058f",
    "el": "\u0370-\u03ff", "he": "\u0590-\u05ff", "am": "\u1200-\u137f", "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f",
    "gu": "\u0a80-\u0aff", "or": "\u0b00-\u0b7f", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff",
    "ml": "\u0d00-\u0d7f", "si": "\u0d80-\u0dff", "zh": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
}  # fmt: skip
OWN_SCRIPT = re.compile(
    "[\u0370-\u03ff\u0530-\u05ff\u0980-\u17ff\u3040-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)
SCRIPT = {language: re.compile(f"[{characters}]") for language, characters in SCRIPTS.items()}

FUNCTION_WORDS = {
    "en": "the be to of and that have with a in is it was for on are as he she they this you his her at from i not but "
    "had were we said my your there what all when one so out up if their them will then who can an",
    "de": "der die das und ist in den von zu mit sich des auf für nicht ein eine als auch es an werden aus er hat dass "
    "sie nach wird bei einer um am sind noch wie einem über ich war wir im zum dem",
    "fr": "de la le et les des en un une du est que dans qui par pour au sur pas plus ne ce il avec se sont aux été ou "
    "cette elle mais je nous vous leur ses son sa l'on c'est d'un d'une",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más pero sus le ha o este sí "
    "porque esta entre cuando muy sin sobre también fue había era son está",
    "pt": "de que e o do da em um para com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua "
    "ou quando muito nos já está eu também só pelo pela são ela",
    "it": "di che e la il un a per in una è non sono del si da con le dei al come più ma ha anche della nel alla gli "
    "lo o se questo nella delle dal sono essere stato era io",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als maar dan bij nog uit door over ze "
    "hij ik worden werd naar heeft deze wordt tot je hun haar",
    "cs": "a se v na je že o s z do i to k ve pro za by ale si po jako od nebo jsou které který jeho už byl být podle "
    "tak však bylo byla jsem až která při své více také",
    "pl": "w i na z do się nie to jest że o jak a po co dla od za przez przy ale jego tak był było być oraz które "
    "która który są tym też tylko jej już ich może",
    "ru": "и в не на что с он как это по но из у за от то же его к так все для вы бы мы она было был они только мне "
    "о или быть когда ещё уже их при также до может этот",
    "uk": "і в не на що з та як це у до за він є але від для по про вони або був було бути може його також який які "
    "її щоб при цього коли так ми ви ще",
    "ar": "في من على إلى أن عن التي هذا الذي مع هذه كان لا ما كما بعد هو أو قد بين وقد كل هي ذلك لم حيث أي كانت "
    "قبل عند حتى إن يكون غير لقد بأن وهو",
    "hi": "के में की है और से का को पर यह कि एक ने हैं भी इस नहीं हो था लिए तो जो कर या वह अपने थे साथ तक द्वारा ही गया "
    "कुछ होता करने जा उन्होंने थी",
    "sw": "na ya wa kwa ni la za katika kama hii hiyo cha au kuwa ambayo baada watu pia yake wake hakuna lakini huo "
    "moja yao zao kila sana alikuwa ambao mwa bila zaidi",
}  # fmt: skip

GOPHER_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
CHINESE_STOP_WORDS = frozenset(
    "的年在月是和日了於为為有被人中他與与也而由後后就我不这這那你她们們一上个個着說说都去"
)
JAPANESE_STOP_WORDS = frozenset("のにはをたがでとしれさあもいすなるこから")


@dataclass(frozen=True)
class Convention:
    """How a language is written, as far as quality rules need it.

    Args:
        by_character: words are not separated by spaces: measures count characters.
        stop_words: words of which running text has at least two; empty where no set is known, so no rule applies.
        terminal: what a finished line may end in.
        mean_word: shortest and longest plausible mean length of a word; None where the measure means nothing.
    """

    by_character: bool
    stop_words: frozenset[str]
    terminal: tuple[str, ...]
    mean_word: tuple[float, float] | None


LATIN_ENDS = (".", "?", "!", '"', "'")
ENDS = (
    *LATIN_ENDS,
    "…",
    "”",
    "’",
    "»",
    "。",
    "！",
    "？",
    "；",
    "：",
    "」",
    "』",
    "）",
    "｡",
    "।",
    "॥",
    "؟",
    "۔",
    "።",
    "។",
    "။",
)


@lru_cache(maxsize=256)
def convention(language: str) -> Convention:
    """How `language` (two-letter code; "" is unknown) is written.

    English has the published word list and ends of C4 and Gopher; Chinese stop words follow FineWeb-2; other
    languages have the function words above. For a language not listed the rules that need a list do not apply.
    """
    if language == "en":
        return Convention(False, GOPHER_STOP_WORDS, LATIN_ENDS, (3.0, 10.0))
    if language in ("zh", "ja"):
        return Convention(True, CHINESE_STOP_WORDS if language == "zh" else JAPANESE_STOP_WORDS, ENDS, None)
    if language in ("th", "lo", "bo", "my", "km"):
        return Convention(True, frozenset(), ENDS, None)
    words = frozenset(FUNCTION_WORDS.get(language, "").split())
    longest = 10.0 if language in ("fr", "es", "pt", "it", "nl") else 12.0
    return Convention(False, words, ENDS, (2.5, longest) if words else None)


def split_words(text: str) -> list[str]:
    """Words, single punctuation marks, and single characters of scripts without spaces, in order."""
    return WORD.findall(text)


def count_sentences(text: str) -> int:
    """Sentences, counted by their closing marks; a last sentence without one counts as well."""
    ends = list(SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(rest.strip())


@lru_cache(maxsize=1024)
def normalise_code(language: str) -> str:
    """Two-letter lower-case code of a stated language: "zh-Hans", "zho_Hans", "EN_us" and "eng" become "zh", "en"."""
    code = re.split(r"[-_]", language.strip().lower(), maxsplit=1)[0]
    three = {
        "zho": "zh",
        "cmn": "zh",
        "chi": "zh",
        "eng": "en",
        "deu": "de",
        "ger": "de",
        "fra": "fr",
        "fre": "fr",
    }
    more = {
        "spa": "es",
        "ces": "cs",
        "cze": "cs",
        "rus": "ru",
        "jpn": "ja",
        "ara": "ar",
        "arb": "ar",
        "hin": "hi",
    }
    return (
        three | more | {"swh": "sw", "swa": "sw", "por": "pt", "ita": "it", "nld": "nl", "kor": "ko"}
    ).get(code, code)


def identify_language(text: str) -> str:
    """The two-letter code of the language of a text, or "" where it cannot be told (too short, mixed, no letters).

    Looks at the first 600 characters from the first letter on.
    """
    start = (
        0
        if text[:1].isalpha()
        else next((i for i, character in enumerate(text[:2000]) if character.isalpha()), 0)
    )
    sample = text[start : start + 600]
    if OWN_SCRIPT.search(sample) and (language := identify_script(sample)):
        return language
    return vote(sample[:400].lower().split()) or identify_with_lingua(sample)


def identify_script(sample: str) -> str:
    """The language of a script that belongs to one language, where it makes up most letters; else ""."""
    han, kana = len(SCRIPT["zh"].findall(sample)), len(SCRIPT["ja"].findall(sample))
    japanese = kana > 0.1 * (han + kana)
    if 2 * (han + kana * japanese) > len(sample):  # no other script can have more: they need not be counted
        return "ja" if japanese else "zh"
    counts = {language: len(pattern.findall(sample)) for language, pattern in SCRIPT.items()}
    counts["ja"] = kana + han if japanese else 0
    language = max(counts, key=lambda code: (counts[code], code == "ja"))
    letters = sum(map(str.isalpha, sample))
    # A Han character says about as much as two Latin letters: half as many are enough.
    weight = 2 if language in ("zh", "ja") else 1
    return language if counts[language] * weight * 2 > letters + counts[language] * (weight - 1) else ""


@lru_cache(maxsize=1)
def words_to_languages() -> dict[str, tuple[str, ...]]:
    """Function word -> the languages that have it."""
    table: dict[str, list[str]] = {}
    for language, words in FUNCTION_WORDS.items():
        for word in set(words.split()):
            table.setdefault(word, []).append(language)
    return {word: tuple(languages) for word, languages in table.items()}


def vote(words: list[str]) -> str:
    """The language whose function words make up a fifth of the words, and twice as many as any other's; else ""."""
    table = words_to_languages()
    found = Counter(chain.from_iterable([table[word] for word in words if word in table]))
    ranked = found.most_common(2)
    if not ranked or ranked[0][1] < max(3, 0.2 * len(words)):
        return ""
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] >= 2 * ranked[1][1] else ""


@lru_cache(maxsize=1)
def lingua_detector() -> "LanguageDetector | None":
    """The detector of the lingua library in its small, fast mode; None where it is not installed."""
    if find_spec("lingua") is None:
        return None
    from lingua import LanguageDetectorBuilder

    builder = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode()
    return builder.with_minimum_relative_distance(0.25).build()


def identify_with_lingua(sample: str) -> str:
    """Ask lingua about the first 200 characters; "" for fewer than 40 letters, where one in ten answers is wrong."""
    detector = lingua_detector()
    sample = sample[:200]
    if detector is None or sum(map(str.isalpha, sample)) < 40:
        return ""
    language = detector.detect_language_of(sample)
    return language.iso_code_639_1.name.lower() if language else ""
