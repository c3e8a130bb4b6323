"""What a data set holds, before anything is trained on it: counts, captions, sizes, and what cannot be used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ldm.data.buckets import Buckets
from ldm.data.sources import Example, Source, Stream
from ldm.data.transforms import BadImage

EXAMPLES = 5
NO_CAPTION = ": no caption"
"""What the reason of every sample without a caption holds."""


@dataclass(frozen=True)
class TokenCounter:
    """How a text encoder counts: `count` gives the tokens of a text with its start and end, `limit` are read."""

    name: str
    count: Callable[[str], int]
    limit: int = 77


@dataclass
class Inspection:
    """Collects the facts, one sample after another; memory grows with the number of distinct captions, not pictures."""

    buckets: Buckets
    tokens: TokenCounter
    samples: int = 0
    unreadable: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    captions: Counter[bytes] = field(default_factory=Counter)
    pictures: Counter[bytes] = field(default_factory=Counter)
    repeated: dict[bytes, str] = field(default_factory=dict)
    long: Counter[str] = field(default_factory=Counter)
    longest: int = 0

    def add(self, item: Example | BadImage) -> None:
        """Counts one sample."""
        self.samples += 1
        if isinstance(item, BadImage):
            self.unreadable.append(str(item))
            return
        self.sizes[item.image.size] += 1
        self.pictures[_digest(item.image.tobytes() + repr(item.image.size).encode())] += 1
        for caption in item.captions:
            self._add_caption(caption)

    def _add_caption(self, caption: str) -> None:
        digest = _digest(caption.encode())
        self.captions[digest] += 1
        if self.captions[digest] == 2 and len(self.repeated) < 10_000:
            self.repeated[digest] = caption
        length = self.tokens.count(caption)
        self.longest = max(self.longest, length)
        if length > self.tokens.limit:
            self.long[caption] += 1

    def report(self, name: str, left_out: Iterable[str]) -> dict[str, Any]:
        """The facts as JSON can hold them."""
        without = [reason for reason in self.unreadable if NO_CAPTION in reason]
        return {
            "source": name,
            "samples": self.samples,
            "usable": sum(self.sizes.values()),
            "unreadable": [reason for reason in self.unreadable if NO_CAPTION not in reason],
            "without_caption": without,
            "left_out": list(left_out),
            "captions": self._captions(),
            "duplicate_pictures": _surplus(self.pictures),
            "sizes": self._sizes(),
            "buckets": self._buckets(),
            "tokens": self._tokens(),
        }

    def _captions(self) -> dict[str, Any]:
        common = sorted(self.repeated, key=lambda digest: -self.captions[digest])[:EXAMPLES]
        return {
            "count": self.captions.total(),
            "distinct": len(self.captions),
            "duplicates": _surplus(self.captions),
            "most_common": [[self.repeated[digest], self.captions[digest]] for digest in common],
        }

    def _sizes(self) -> dict[str, Any]:
        small = sum(n for size, n in self.sizes.items() if min(size) < self.buckets.resolution)
        sides = [Counter[int](), Counter[int]()]
        for size, count in self.sizes.items():
            for side, counter in zip(size, sides, strict=True):
                counter[side] += count
        names = ("width", "height")
        spread = {name: _spread(counter) for name, counter in zip(names, sides, strict=True) if counter}
        return {**spread, "smaller_than_resolution": small, "resolution": self.buckets.resolution}

    def _buckets(self) -> dict[str, int]:
        found: Counter[tuple[int, int]] = Counter()
        for size, count in self.sizes.items():
            found[self.buckets.fit(*size)] += count
        return {
            f"{width}x{height}": found[(width, height)]
            for width, height in self.buckets.sizes
            if found[(width, height)]
        }

    def _tokens(self) -> dict[str, Any]:
        examples = [caption[:200] for caption, _ in self.long.most_common(EXAMPLES)]
        facts = {"tokenizer": self.tokens.name, "limit": self.tokens.limit, "longest": self.longest}
        return {**facts, "over_limit": self.long.total(), "examples": examples}


def inspect(source: Source | Stream, buckets: Buckets, tokens: TokenCounter, items: Iterable[Any]) -> dict[str, Any]:
    """The report of a source, whose samples `items` gives (see `ldm.data.sources.every_sample`)."""
    inspection = Inspection(buckets, tokens)
    for item in items:
        inspection.add(item)
    return inspection.report(source.name, getattr(source, "left_out", ()))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _surplus(counts: Counter[bytes]) -> int:
    """How many are left when one of each kind is taken away."""
    return counts.total() - len(counts)


def _spread(counter: Counter[int]) -> dict[str, int]:
    values, half = sorted(counter), counter.total() / 2
    seen, median = 0, values[0]
    for value in values:
        if seen >= half:
            break
        seen, median = seen + counter[value], value
    return {"min": values[0], "median": median, "max": values[-1]}


def as_text(report: dict[str, Any], listed: int = 20) -> str:
    """The report for a person; `listed` names of each kind of unusable sample."""
    captions, sizes, tokens = report["captions"], report["sizes"], report["tokens"]
    lines = [f"{report['source']}: {report['usable']} of {report['samples']} samples can be used"]
    for title, key in UNUSABLE.items():
        lines += _listed(title, report[key], listed)
    lines.append(f"captions: {captions['count']}, {captions['distinct']} distinct, {captions['duplicates']} duplicates")
    lines += [f"    {count} x {caption[:100]}" for caption, count in captions["most_common"]]
    lines.append(f"duplicate pictures: {report['duplicate_pictures']}")
    for side in ("width", "height"):
        if side in sizes:
            lines.append(f"{side}: {sizes[side]['min']} to {sizes[side]['max']}, median {sizes[side]['median']}")
    lines.append(f"smaller than {sizes['resolution']}: {sizes['smaller_than_resolution']}")
    lines.append("buckets: " + ", ".join(f"{name} {count}" for name, count in report["buckets"].items()))
    lines.append(
        f"tokens ({tokens['tokenizer']}): at most {tokens['longest']}, {tokens['over_limit']} captions over "
        f"{tokens['limit']}"
    )
    return "\n".join(lines)


UNUSABLE = {
    "unreadable": "unreadable",
    "without a caption": "without_caption",
    "in no row of the metadata": "left_out",
}
"""What samples that cannot be used are called, and their key in the report."""


def _listed(title: str, names: list[str], most: int) -> list[str]:
    rest = [f"    and {len(names) - most} more"] if len(names) > most else []
    return [f"  {len(names)} {title}:", *(f"    {name}" for name in names[:most]), *rest] if names else []
