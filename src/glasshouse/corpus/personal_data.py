"""Personal data with a recognisable form: found in text and replaced by tags.

Kinds: e-mail, telephone, IPv4 and IPv6 address, payment card (issuer prefix and Luhn), IBAN (length of its country and
mod 97), Chinese resident number (date and check character) and Chinese mobile. What has a checksum must pass it; what
has none must be written as people write it: a bare run of digits is a telephone number only after a word like "phone",
never for its length alone. Digits are ASCII digits; the 15-digit resident numbers of before 1999 have no check and
are not searched.

Time is linear in the text, whatever it holds: every search starts at a digit, an "@" or a ":" and looks at a bounded
number of characters around it, so text without them costs next to nothing.
Knows nothing of names, addresses, dates of birth or anything else that only its meaning makes personal.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple, get_args

Kind = Literal["email", "iban", "chinese_id", "card", "chinese_mobile", "ip", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the order is also who wins where two would overlap
TAGS: dict[Kind, str] = {
    "email": "<EMAIL>",
    "iban": "<IBAN>",
    "chinese_id": "<CHINESE_ID>",
    "card": "<CARD>",
    "chinese_mobile": "<PHONE>",
    "ip": "<IP>",
    "phone": "<PHONE>",
}

# Lengths by country: the IBAN registry of SWIFT (ISO 13616).
_IBAN_TABLE = (
    "NO15 BE16 DK18 FI18 FK18 FO18 GL18 NL18 SD18 MK19 SI19 AT20 BA20 EE20 KZ20 LT20 LU20 MN20 XK20 CH21 HR21 LI21 "
    "LV21 BG22 BH22 CR22 DE22 GB22 GE22 IE22 ME22 RS22 VA22 AE23 GI23 IL23 IQ23 OM23 SO23 TL23 AD24 CZ24 ES24 MD24 "
    "PK24 RO24 SA24 SE24 SK24 TN24 VG24 LY25 PT25 ST25 IS26 TR26 BI27 DJ27 FR27 GR27 IT27 MC27 MR27 SM27 AL28 AZ28 "
    "BY28 CY28 DO28 GT28 HN28 HU28 LB28 NI28 PL28 SV28 BR29 EG29 PS29 QA29 UA29 JO30 KW30 MU30 YE30 MT31 SC31 LC32 "
    "RU33"
)
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _IBAN_TABLE.split()}
_FILE_NAMES = "png jpg jpeg gif svg webp bmp ico js css html htm py md txt json xml pdf zip"
_FILE_ENDINGS = frozenset(_FILE_NAMES.split())
_CARD_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12,15}"  # Discover
    r"|35\d{14,17}|(?:2131|1800)\d{11}"  # JCB
    r"|3(?:0[0-5]|095|[689]\d)\d{11,16}"  # Diners Club
    r"|62\d{14,17}|81\d{14,17}|220[0-4]\d{12,15}"  # UnionPay, Mir
    r"|(?:5[0678]\d\d|6304|6759|676[1-3])\d{8,15}"  # Maestro
)
# Country calling codes: ITU-T E.164.
_CALLING_CODE = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|21[1-8]|2[2-69]\d|35\d|37\d|38\d|42\d|50\d|59\d|67\d|68\d"
    r"|69\d|80\d|85\d|87\d|88\d|96\d|97\d|99\d"
)
_LETTERS = r"A-Za-z\u00c0-\u024f"
_LOCAL_REVERSED = re.compile(rf"[{_LETTERS}0-9_%+-][{_LETTERS}0-9._%+'-]{{0,63}}")
_DOMAIN = re.compile(
    rf"(?:[{_LETTERS}0-9](?:[{_LETTERS}0-9-]{{0,61}}[{_LETTERS}0-9])?\.)+([A-Za-z]{{2,24}})(?![A-Za-z0-9])"
)
_IBAN_START = re.compile(r"[0-9]{2}(?<=[A-Za-z]{2}[0-9]{2})(?<![0-9A-Za-z][A-Za-z]{2}[0-9]{2})")
_IBAN_REST = re.compile(r"(?:[ ]?[0-9A-Za-z]){11,30}")
_COLONS = re.compile(r":(?::|[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:)")
_IPV6_LEFT_REVERSED = re.compile(r"[0-9A-Fa-f:]{0,40}")
_IPV6_RIGHT = re.compile(r"[0-9A-Fa-f:.]{0,40}")
_NUMBERS = re.compile(
    r"[0-9][0-9 ().+/\u00a0\u2010-\u2013-]{5,}[0-9]"
)  # anything with digits worth a closer look

# Not inside a word, a longer number, a decimal or a dotted name.
_BEFORE = r"(?<![0-9A-Za-z_@#=])(?<![0-9A-Za-z]\.)(?<![0-9][\u00a0\u2010-\u2013-])"
_AFTER = r"(?![0-9A-Za-z_@])(?![.-][0-9])"
_CHINESE_ID = re.compile(_BEFORE + r"[1-9][0-9]{5}(?:18|19|20)[0-9]{9}[0-9Xx](?![0-9A-Za-z])")
_CARD = re.compile(
    _BEFORE + r"(?:[0-9]{12,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?"
    r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})" + _AFTER
)
_CHINESE_MOBILE = re.compile(
    r"(?<![0-9A-Za-z_@#=+.])(?<![0-9]-)(?:(?:\+|00)?86[ -]?)?"
    r"1(?:3[0-9]|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])([ -]?)[0-9]{4}\1[0-9]{4}" + _AFTER
)
_IPV4 = re.compile(
    r"(?<![0-9A-Za-z_.-])(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}"
    r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?![0-9A-Za-z_-])(?!\.[0-9])"
)
_EXTENSION = r"(?:[ ,]{0,2}(?:x|ext\.?|extension)[ ]?[0-9]{1,5})?"
_SEPARATOR = r"[ .\u00a0\u2010-\u2013/-]"
_PHONE = re.compile(
    # +44 (0)20 7946 0958, 001-212-555-0100
    rf"(?<![0-9A-Za-z_+@=])(?:\+|\((?=\+[0-9]{{1,3}}\))\+|00(?=[1-9]))(?P<international>[0-9](?:{_SEPARATOR}?[()]?{_SEPARATOR}?[0-9]){{6,16}})"
    rf"{_EXTENSION}{_AFTER}"
    # (212) 555-0100, (08) 8747 6301
    rf"|(?<![0-9A-Za-z_])(?<![0-9] )(?:1[ -])?\((?P<area>[0-9]{{1,3}}|0[0-9]{{3,4}})\)[ -]?"
    rf"(?P<local>[0-9]{{2,4}}(?:[ .-]?[0-9]{{2,4}}){{1,3}}){_EXTENSION}{_AFTER}"
    # 212-555-0100, 212.555.0100, 1-212-555-0100
    rf"|{_BEFORE}(?<![0-9] )(?:1[.-])?[2-9][0-9]{{2}}([.-])[0-9]{{3}}\4[0-9]{{4}}{_EXTENSION}{_AFTER}"
    # 020 7946 0958, 0755-83123456, 01 23 45 67 89
    rf"|{_BEFORE}(?<![0-9] )(?P<trunk>0[1-9][0-9]{{0,4}}(?:[ /\u00a0\u2010-\u2013-][0-9]{{2,8}}){{1,4}})"
    rf"{_EXTENSION}{_AFTER}"
    # 01.23.45.67.89
    rf"|{_BEFORE}(?<![0-9] )0[1-9](?:\.[0-9]{{2}}){{4}}{_AFTER}"
    # whatever stands after a word for telephone
    rf"|{_BEFORE}(?P<bare>[0-9](?:{_SEPARATOR}?[()]?[0-9]){{6,14}}){_EXTENSION}{_AFTER}"
)
_PHONE_WORDS = re.compile(
    r"(?:(?<![A-Za-z])(?:(?:tele)?(?:phone|fax)|mobile|hotline|whatsapp|landline|answering|tel|cell"
    r"|(?:call|dial|ring|text|reach)(?: me| us| them)?"
    r"|(?:desk|office|home|work|direct)(?=:))(?![A-Za-z])"
    r"|电话|電話|手机|手機|热线|熱線|传真|傳真|致电|联系方式|拨打|撥打)[^0-9A-Za-z]{0,4}"
    r"(?:(?:number|no|nr|is|at|on|me|us|:|号码|号|是|为)[^0-9A-Za-z]{0,3}){0,3}$",
    re.IGNORECASE,
)
_PHONE_WORD_AFTER = re.compile(
    r"[ -]{0,2}\(?(?:office|fax|mobile|cell|home|desk|work|phone|tel)\b\)?[ ]*(?=[\n,;.|\\]|$)", re.IGNORECASE
)
_OTHER_WORDS = re.compile(
    r"(?:(?<![A-Za-z])(?:isbn|issn|doi|pmid|arxiv|order|invoice|serial|tracking|part|version|ver|v|release|build"
    r"|sections?|chapter|clause|figure|table|patent|sku|ssn)|订单|编号|序列|版本|第)"
    r"[^0-9A-Za-z]{0,3}(?:(?:number|no|nr|id|is|was|13|10|号|号码|为|是)[^0-9A-Za-z]{0,3}){0,3}$",
    re.IGNORECASE,
)
_UNITED_STATES_SOCIAL_SECURITY = re.compile(r"[0-9]{3}-[0-9]{2}-[0-9]{4}")


class Match(NamedTuple):
    """One find: text[start:end] is of this kind."""

    kind: Kind
    start: int
    end: int


def redact(text: str, kinds: Collection[Kind] = KINDS) -> tuple[str, Counter[Kind]]:
    """Replace personal data by the tags of `TAGS`.

    Args:
        text: any text.
        kinds: what to replace.

    Returns:
        The text, and how many of each kind were replaced. A second pass finds nothing more.
    """
    counts: Counter[Kind] = Counter()
    parts: list[str] = []
    position = 0
    for kind, start, end in find(text, kinds):
        parts += (text[position:start], TAGS[kind])
        counts[kind] += 1
        position = end
    if not parts:
        return text, counts
    return "".join((*parts, text[position:])), counts


def find(text: str, kinds: Collection[Kind] = KINDS) -> list[Match]:
    """All personal data of some kinds, in order and without overlaps.

    Where two kinds would overlap, the one that comes first in `KINDS` is taken, whether it was asked for or not: a
    mobile number in an e-mail address is no telephone.
    """
    found: list[Match] = []
    if "@" in text:
        found += _find_emails(text)
    if ":" in text:
        found += _find_ipv6(text)
    for start in _IBAN_START.finditer(text):
        found += _find_iban(text, start.start() - 2)
    for run in _NUMBERS.finditer(text):
        if _worth_a_look(run[0]):
            found += _find_numbers(text, *run.span())
    if len(found) > 1:
        found = _without_overlaps(found)
    return [match for match in found if match.kind in kinds]


def _without_overlaps(found: list[Match]) -> list[Match]:
    found.sort(key=lambda match: (match.start, KINDS.index(match.kind), -match.end))
    kept: list[Match] = []
    for match in found:
        if not kept or match.start >= kept[-1].end:
            kept.append(match)
        elif KINDS.index(match.kind) < KINDS.index(kept[-1].kind):
            kept[-1] = match
    return kept


def _find_emails(text: str) -> Iterator[Match]:
    at = text.find("@")
    end = 0
    while at >= 0:
        local = _LOCAL_REVERSED.match(text[max(at - 64, end) : at][::-1])
        domain = _DOMAIN.match(text, at + 1, at + 255) if local else None
        if local and domain and domain[1].lower() not in _FILE_ENDINGS:
            start = at - len(local[0].rstrip("._%+'-"))
            end = domain.end()
            if start < at:
                yield Match("email", start, end)
        at = text.find("@", max(at + 1, end))


def _find_ipv6(text: str) -> Iterator[Match]:
    end = 0
    for colons in _COLONS.finditer(text):
        if colons.start() < end:
            continue
        left = _IPV6_LEFT_REVERSED.match(text[max(colons.start() - 40, end) : colons.start()][::-1])
        right = _IPV6_RIGHT.match(text, colons.end())
        start = colons.start() - (len(left[0]) if left else 0)
        stop = right.end() if right else colons.end()
        word = text[start - 1 : start] + text[stop : stop + 1]
        end = stop
        for candidate in (text[start:stop], text[start:stop].rstrip("."), text[start:stop].rstrip(".:")):
            if not re.search(r"[0-9A-Za-z_]", word, re.ASCII) and _is_ipv6(candidate):
                yield Match("ip", start, start + len(candidate))
                break


def _is_ipv6(candidate: str) -> bool:
    """A valid address that is written in full, or begins as addresses in use do; never a namespace, a time or a MAC."""
    try:
        address = ipaddress.IPv6Address(candidate)
    except ValueError:
        return False
    if "::" not in candidate:
        return any(len(group) > 2 for group in candidate.split(":"))
    in_use = (
        address.is_global or address.is_private or address.is_link_local or address.ipv4_mapped is not None
    )
    first = int(address) >> 112
    prefixed = (
        first >> 13 == 1 or first >> 9 == 0x7E or first >> 6 == 0x3FA or address.ipv4_mapped is not None
    )
    return in_use and prefixed and any(letter.isdigit() for letter in candidate)


def _find_iban(text: str, start: int) -> Iterator[Match]:
    length = _IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
    rest = _IBAN_REST.match(text, start + 4) if length else None
    if not rest:
        return
    end, left = start, length
    while left and end < rest.end():
        left -= text[end] != " "
        end += 1
    after = text[end : end + 1]
    if not left and not (after.isascii() and after.isalnum()) and is_iban(text[start:end].replace(" ", "")):
        yield Match("iban", start, end)


def _worth_a_look(run: str) -> bool:
    """Seven digits or more, or the three dots of an IPv4 address; most runs are years, dates and amounts."""
    return len(run) >= 11 or run.count(".") == 3 or sum(map(run.count, "0123456789")) >= 7


def _find_numbers(text: str, start: int, end: int) -> Iterator[Match]:
    """What a run of digits and separators holds; a little more on both sides belongs to it (a plus, an X)."""
    for kind, pattern, is_valid in _NUMBER_KINDS:
        for match in pattern.finditer(text, max(start - 2, 0), end + 16):
            if match.start() < end and is_valid(match):
                yield Match(kind, *match.span())


def is_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it (ISO/IEC 7812-1, annex B)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_iban(number: str) -> bool:
    """Whether a number without spaces has its country's length and the check digits of ISO 7064 mod 97-10."""
    number = number.upper()
    if _IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(letter, 36)) for letter in number[4:] + number[:4])) % 97 == 1


def is_chinese_id(number: str) -> bool:
    """Whether 18 characters hold a birth date that exists and the check character of GB 11643 (ISO 7064 mod 11-2)."""
    year, month, day = int(number[6:10]), int(number[10:12]), int(number[12:14])
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = 28 + leap if month == 2 else 30 if month in (4, 6, 9, 11) else 31
    if not (1 <= month <= 12 and 1 <= day <= days and 11 <= int(number[:2]) <= 91):
        return False
    weighted = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[weighted % 11] == number[17].upper()


def _is_card(match: re.Match[str]) -> bool:
    digits = match[0].replace(" ", "").replace("-", "")
    return bool(_CARD_ISSUERS.fullmatch(digits)) and len(set(digits)) > 1 and is_luhn(digits)


def _is_ipv4(match: re.Match[str]) -> bool:
    """Not a version or a section number, nor one of the addresses that every machine has."""
    address = match[0]
    sections = all(len(part) == 1 for part in address.split(".")[:3])
    if sections or address.startswith(("0.", "127.")) or address == "255.255.255.255":
        return False
    return not _OTHER_WORDS.search(match.string, max(match.start() - 30, 0), match.start())


def _is_phone(match: re.Match[str]) -> bool:
    number = match["international"] or match["trunk"] or match["bare"] or ""
    digits = re.sub(r"[^0-9]", "", number)
    before = max(match.start() - 40, 0)
    if number[-2:-1] in (".", "-"):  # +35236450.6 is an amount
        return False
    if match["international"]:
        code = _CALLING_CODE.match(digits)
        return code is not None and 8 <= len(digits) - ("(0)" in match[0]) <= 15
    if match["bare"]:
        named = _PHONE_WORDS.search(match.string, before, match.start())
        return bool(named or _PHONE_WORD_AFTER.match(match.string, match.end()))
    if match["trunk"] and (not 9 <= len(digits) <= 12 or _UNITED_STATES_SOCIAL_SECURITY.fullmatch(number)):
        return False
    if (
        match["area"]
        and not 7 <= len(match["area"]) + sum(letter.isdigit() for letter in match["local"]) <= 12
    ):
        return False
    return not _OTHER_WORDS.search(match.string, before, match.start())


_NUMBER_KINDS: tuple[tuple[Kind, re.Pattern[str], Callable[[re.Match[str]], bool]], ...] = (
    ("chinese_id", _CHINESE_ID, lambda match: is_chinese_id(match[0])),
    ("card", _CARD, _is_card),
    ("chinese_mobile", _CHINESE_MOBILE, lambda match: True),
    ("ip", _IPV4, _is_ipv4),
    ("phone", _PHONE, _is_phone),
)
