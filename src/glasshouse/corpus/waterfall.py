"""The report of a cleaning: what each rule kept and dropped, with examples, and a hash of what left each stage.

A tally is what one piece of work saw; tallies of the pieces of a corpus, added in order, give the same report as
one piece over the whole corpus. It knows nothing of what the rules are.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5
EXAMPLE_CHARACTERS = 160


@dataclass
class Tally:
    """What one piece of work did to its documents: plain counts that can be pickled and added up.

    `dropped` and `changed` count documents per rule, `dropped_bytes` UTF-8 bytes; `added_bytes` is negative where
    a rule shortened the text. `digests` holds, per stage, the SHA-256 of every document that left it, in order.
    """

    seed: int = 0
    documents: int = 0
    size: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    added_bytes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    left_bytes: Counter[str] = field(default_factory=Counter)
    digests: dict[str, bytearray] = field(default_factory=dict)
    facts: dict[str, Counter[str]] = field(default_factory=dict)

    def enter(self, size: int) -> None:
        """One document of `size` bytes came in."""
        self.documents += 1
        self.size += size

    def drop(self, rule: str, size: int, identity: str, example: str) -> None:
        """`rule` dropped a document of `size` bytes; `example` shows why, in one line."""
        self.dropped[rule] += 1
        self.dropped_bytes[rule] += size
        self.show(rule, identity, example)

    def change(self, rule: str, added: int, identity: str, example: str) -> None:
        """`rule` changed a document, adding `added` bytes (negative: removing)."""
        self.changed[rule] += 1
        self.added_bytes[rule] += added
        self.show(rule, identity, example)

    def show(self, rule: str, identity: str, example: str) -> None:
        """Offer an example: the five with the smallest seeded hash are kept, a uniform sample of all offered.

        A sample by smallest hash (bottom-k) equals a reservoir sample, and two of them can be joined.
        """
        if self.wants(rule, identity):
            sample = self.examples.setdefault(rule, [])
            sample.append((self.priority(rule, identity), identity, shorten(example)))
            sample.sort()
            del sample[EXAMPLES:]

    def wants(self, rule: str, identity: str) -> bool:
        """Whether an example of this document would be kept so far."""
        sample = self.examples.get(rule, [])
        return len(sample) < EXAMPLES or self.priority(rule, identity) < sample[-1][0]

    def priority(self, rule: str, identity: str) -> int:
        """The seeded hash by which examples are chosen."""
        key = f"{self.seed}\0{rule}\0{identity}".encode("utf-8", "replace")
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")

    def leave(self, stage: str, size: int, digest: bytes) -> None:
        """A document of `size` bytes and SHA-256 `digest` left a stage."""
        self.left[stage] += 1
        self.left_bytes[stage] += size
        self.digests.setdefault(stage, bytearray()).extend(digest)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a file."""
        return self.__dict__ | {"digests": {stage: bytes(part).hex() for stage, part in self.digests.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Tally":
        """From the plain data of `to_dict`."""
        tally = cls()
        for name, value in data.items():
            setattr(tally, name, Counter(value) if isinstance(getattr(tally, name), Counter) else value)
        tally.examples = {rule: [(p, i, t) for p, i, t in sample] for rule, sample in tally.examples.items()}
        tally.digests = {stage: bytearray.fromhex(part) for stage, part in data["digests"].items()}
        tally.facts = {name: Counter(counts) for name, counts in tally.facts.items()}
        return tally


def shorten(text: str) -> str:
    """One line of at most 160 characters."""
    line = " ".join(text[: 4 * EXAMPLE_CHARACTERS].split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"


def digest_document(identity: str, text: str) -> bytes:
    """SHA-256 of the document's id, a NUL and its text, both as UTF-8."""
    return hashlib.sha256(
        identity.encode("utf-8", "replace") + b"\0" + text.encode("utf-8", "replace")
    ).digest()


class Waterfall:
    """Kept and dropped documents and bytes per rule, in the order in which the rules act.

    Rules act one after the other: what rule k keeps is what rule k+1 is given, so that every row adds up:
    `documents_in == documents_kept + documents_dropped` and
    `bytes_in + bytes_added == bytes_kept + bytes_dropped`, and each row's `in` is the row before's `kept`.

    The hash of a stage is the SHA-256 over the SHA-256 of (id, NUL, text) of every document that left it, in order.

    Args:
        seed: seed of the choice of examples.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.tally = Tally(seed)
        self.rules: list[tuple[str, str]] = []
        self.hashes: dict[str, Any] = {}

    def expect(self, rules: Sequence[tuple[str, str]]) -> None:
        """State the (stage, rule) pairs that will act, in order, so that a rule that dropped nothing is shown too."""
        self.rules = list(rules)
        self.hashes = {stage: hashlib.sha256() for stage, _ in rules}

    def add(self, tally: Tally) -> None:
        """Add what one piece of work saw. Pieces must be added in the order of their documents, stage by stage."""
        mine = self.tally
        mine.documents += tally.documents
        mine.size += tally.size
        for name in ("dropped", "dropped_bytes", "changed", "added_bytes", "left", "left_bytes"):
            getattr(mine, name).update(getattr(tally, name))
        for stage, digests in tally.digests.items():
            self.hashes[stage].update(digests)
        for rule, sample in tally.examples.items():
            mine.examples[rule] = sorted(mine.examples.get(rule, []) + sample)[:EXAMPLES]
        for name, counts in tally.facts.items():
            mine.facts.setdefault(name, Counter()).update(counts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: `rules` in order, `stages` with their hashes, totals in and out."""
        documents, size, tally = self.tally.documents, self.tally.size, self.tally
        rows: list[dict[str, Any]] = []
        for stage, rule in self.rules:
            kept = documents - tally.dropped[rule]
            kept_bytes = size + tally.added_bytes[rule] - tally.dropped_bytes[rule]
            samples = [{"id": identity, "text": text} for _, identity, text in tally.examples.get(rule, [])]
            rows.append(
                {"stage": stage, "rule": rule, "documents_in": documents, "documents_kept": kept}
                | {"documents_dropped": tally.dropped[rule], "documents_changed": tally.changed[rule]}
                | {"bytes_in": size, "bytes_added": tally.added_bytes[rule], "bytes_kept": kept_bytes}
                | {"bytes_dropped": tally.dropped_bytes[rule], "examples": samples}
            )
            documents, size = kept, kept_bytes
        stages = [
            {
                "stage": stage,
                "documents": tally.left[stage],
                "bytes": tally.left_bytes[stage],
                "sha256": sha.hexdigest(),
            }
            for stage, sha in self.hashes.items()
        ]
        facts = {name: dict(sorted(counts.items())) for name, counts in sorted(tally.facts.items())}
        totals = {
            "documents_in": tally.documents,
            "bytes_in": tally.size,
            "documents_out": documents,
            "bytes_out": size,
        }
        return {"format": 1, "seed": self.seed} | totals | {"rules": rows, "stages": stages, "facts": facts}

    def __repr__(self) -> str:
        report = self.to_dict()
        return f"Waterfall({json.dumps({key: report[key] for key in ('documents_in', 'documents_out')})})"
