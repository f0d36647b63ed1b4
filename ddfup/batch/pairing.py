"""Which depth belongs to which guide, and under what name the result goes into the output folder.

Files are never paired by their order: a missing one would shift all that follow.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import PurePosixPath
from typing import Literal

from ddfup import io
from ddfup.batch.places import Found
from ddfup.batch.remote import Location
from ddfup.errors import ArgumentError, DDFUpError, InputError

# Whole numbers of so many digits are time since 1970 in milli-, micro- and nanoseconds.
_EPOCH_DIGITS = {12: 3, 13: 3, 14: 3, 15: 6, 16: 6, 17: 6, 18: 9, 19: 9, 20: 9}


@dataclass(frozen=True)
class Rule:
    """How two files show that they belong together.

    Attributes:
        kind: By equal stem, by equal key of a regular expression, or by nearest time.
        pattern: Expression that finds the key in a file's name below its place; with ``time``, pictures of
            different keys are never compared.
        tolerance: Largest difference in seconds, with ``time``.
    """

    kind: Literal["stem", "regex", "time"]
    pattern: re.Pattern[str] | None = None
    tolerance: Decimal = Decimal(0)

    def __str__(self) -> str:
        return {"stem": "stem", "regex": f"regex {self.pattern and self.pattern.pattern!r}"}.get(
            self.kind, f"time within {self.tolerance} s"
        )


@dataclass(frozen=True)
class Pair:
    """Files that belong together.

    Attributes:
        name: Output below the output folder, ``/`` between parts.
        depth: Depth file.
        guide: Guide file.
        problem: Why the pair cannot be used, if that is known already.
        confidence: Confidence map of the depth, or None.
    """

    name: str
    depth: Location
    guide: Location
    problem: DDFUpError | None = None
    confidence: Location | None = None

    @property
    def sources(self) -> tuple[Location, ...]:
        """The files that are read: depth, guide and, where there is one, confidence."""
        files = (self.depth, self.guide)
        return files if self.confidence is None else (*files, self.confidence)


@dataclass
class Pairing:
    """What came of looking for pairs.

    Attributes:
        pairs: In the order of the depths' names.
        orphans: One sentence for each file without partner.
        conflicts: One sentence for each choice that is not clear; nothing is to be done if there are any.
    """

    pairs: list[Pair] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def parse_rule(text: str, regex: str | None) -> Rule:
    """Return the rule for ``stem``, ``regex`` or ``time:SECONDS``.

    Args:
        text: The rule.
        regex: Expression with the key as its named groups, else its first group, else the whole match.

    Raises:
        ArgumentError: If the text is none of them, or the expression is wrong or missing.
    """
    try:
        pattern = None if regex is None else re.compile(regex)
    except re.error as error:
        raise ArgumentError(f"--pair-regex must be a regular expression; got {regex!r}: {error}") from error
    kind, _, seconds = text.partition(":")
    if text == "stem" and pattern is None:
        return Rule("stem")
    if text == "regex" and pattern is not None:
        return Rule("regex", pattern)
    if text in ("stem", "regex"):
        raise ArgumentError(
            f"--pair-by {text} must{' not' if text == 'stem' else ''} come with --pair-regex",
            r"example: --pair-by regex --pair-regex '(\d+)\.\w+$'",
        )
    if kind == "time":
        try:
            tolerance = Decimal(seconds)
        except InvalidOperation:
            tolerance = Decimal("NaN")
        if tolerance.is_finite() and tolerance >= 0:
            return Rule("time", pattern, tolerance)
    raise ArgumentError(
        f"--pair-by must be stem, regex, time:SECONDS or manifest; got {text!r}", "example: --pair-by time:0.02"
    )


def stem_of(name: str) -> str:
    """Return a name without its last suffix: ``a/1305031102.17.png`` is ``a/1305031102.17``."""
    return str(PurePosixPath(name).with_suffix(""))


def time_of(name: str) -> Decimal | None:
    """Return the time in a file name, in seconds.

    That is the last number with a fraction, else the last whole number; the latter counts in milli-, micro- or
    nanoseconds if it has as many digits as the present time since 1970 in these units.

    Example:
        >>> time_of("rgb/41069021_3603.337.png"), time_of("1305031102175304.png")
        (Decimal('3603.337'), Decimal('1305031102.175304'))
    """
    stem = PurePosixPath(name).stem
    fractions = re.findall(r"[0-9]+\.[0-9]+", stem)
    if fractions:
        return Decimal(fractions[-1])
    whole = re.findall(r"[0-9]+", stem)
    if not whole:
        return None
    return Decimal(whole[-1]).scaleb(-_EPOCH_DIGITS.get(len(whole[-1]), 0))


def output_name(name: str, format_name: str | None) -> str:
    """Return the name of the output for a depth file's name: with the suffix of the format that was asked for.

    Without one, files keep theirs, and files without a header become NPY.
    """
    path = PurePosixPath(name)
    row = io.format_of(path)
    if row is None and format_name is None:
        format_name = "npy"
    if format_name is None or (row is not None and row.name == format_name):
        return str(path)
    return str(path.with_suffix(io.FORMATS[format_name].suffixes[0]))


def pair_files(
    depths: Sequence[Found], guides: Sequence[Found], rule: Rule, *, format_name: str | None = None
) -> Pairing:
    """Find each depth's guide.

    With stems and keys, one guide may serve several depths. With times it serves one: the nearest depth that has
    it as its own nearest guide; a second-nearest is never taken.

    Args:
        depths: Depth files.
        guides: Pictures; those that are depth files, too, are left out.
        rule: What makes a pair.
        format_name: Format of the outputs; None: as the depths.
    """
    own = {found.path.absolute() for found in depths}
    guides = [found for found in guides if found.path.absolute() not in own]
    result = Pairing()
    chosen = _match(depths, guides, rule, result, "guides")
    taken = set(chosen.values())
    for depth in depths:
        if depth in chosen:
            result.pairs.append(Pair(output_name(depth.name, format_name), depth.path, chosen[depth].path))
    if not result.conflicts:
        result.orphans += [f"{depth.path} has no guide" for depth in depths if depth not in chosen]
        result.orphans += [f"{guide.path} has no depth" for guide in guides if guide not in taken]
    result.conflicts += find_collisions(result.pairs)
    return result


def add_confidence(found: Pairing, depths: Sequence[Found], maps: Sequence[Found], rule: Rule) -> None:
    """Find each depth's confidence map, by the same rule as its guide; a pair without one fails alone.

    Args:
        found: The pairs, which are changed.
        depths: Depth files.
        maps: Confidence maps.
        rule: What makes a pair.
    """
    chosen = {depth.path: each.path for depth, each in _match(depths, maps, rule, found, "confidence maps").items()}
    taken = set(chosen.values())
    found.orphans += [f"{each.path} has no depth" for each in maps if each.path not in taken]
    for index, pair in enumerate(found.pairs):
        confidence = chosen.get(pair.depth)
        problem = pair.problem
        if confidence is None:
            problem = InputError(
                f"{pair.depth}: must have a confidence map, by {rule}; there is none",
                "a run without --confidence takes all its pixels",
            )
        found.pairs[index] = dataclasses.replace(pair, confidence=confidence, problem=problem)


def find_collisions(pairs: Iterable[Pair]) -> list[str]:
    """Return a sentence for each output that two pairs would write."""
    sources = defaultdict(list)
    for pair in pairs:
        if pair.problem is None:
            sources[pair.name].append(str(pair.depth))
    return [f"{_listed(files)} would all become {name}" for name, files in sources.items() if len(files) > 1]


def _composed(name: str) -> str:
    """Bring letters with marks to one form: macOS may store a mark as a character of its own."""
    return unicodedata.normalize("NFC", name)


def _key_function(rule: Rule) -> Callable[[str], Hashable | None]:
    pattern = rule.pattern
    if pattern is None:
        # Times are compared within one folder of the tree, stems as a whole.
        part = stem_of if rule.kind == "stem" else lambda name: str(PurePosixPath(name).parent)
        return lambda name: part(_composed(name))

    def key(name: str) -> Hashable | None:
        match = pattern.search(_composed(name))
        if match is None:
            return None
        named = match.groupdict()
        return tuple(sorted(named.items())) if named else match[1 if pattern.groups else 0]

    return key


def _match(
    depths: Sequence[Found], others: Sequence[Found], rule: Rule, result: Pairing, what: str
) -> dict[Found, Found]:
    """Find each depth's partner; choices that are not clear become conflicts of the result."""
    match = _match_times if rule.kind == "time" else _match_keys
    return match(depths, others, rule, result, what)


def _match_keys(
    depths: Sequence[Found], guides: Sequence[Found], rule: Rule, result: Pairing, what: str
) -> dict[Found, Found]:
    key_of = _key_function(rule)
    by_key: dict[Hashable, list[Found]] = defaultdict(list)
    for guide in guides:
        by_key[key_of(guide.name)].append(guide)
    by_key.pop(None, None)
    chosen = {}
    for depth in depths:
        candidates = by_key.get(key_of(depth.name), [])
        if len(candidates) == 1:
            chosen[depth] = candidates[0]
        elif candidates:
            result.conflicts.append(f"{depth.path} has {len(candidates)} {what}: {_listed(candidates)}")
    return chosen


def _match_times(
    depths: Sequence[Found], guides: Sequence[Found], rule: Rule, result: Pairing, what: str
) -> dict[Found, Found]:
    key_of = _key_function(rule)
    groups: dict[Hashable, list[tuple[Decimal, Found]]] = defaultdict(list)
    for guide in guides:
        time = time_of(guide.name)
        if time is not None:
            groups[key_of(guide.name)].append((time, guide))
    groups.pop(None, None)
    for group in groups.values():
        group.sort(key=lambda timed: timed[0])
    # Guide -> the depths whose nearest it is, with the differences.
    claims: dict[Found, list[tuple[Decimal, Found]]] = defaultdict(list)
    for depth in depths:
        time = time_of(depth.name)
        nearest = [] if time is None else _nearest(time, groups.get(key_of(depth.name), []), rule.tolerance)
        if len(nearest) == 1:
            difference, guide = nearest[0]
            claims[guide].append((difference, depth))
        elif nearest:
            files = _listed(guide for _, guide in nearest)
            result.conflicts.append(f"{depth.path} is {nearest[0][0]} s from {len(nearest)} {what}: {files}")
    chosen = {}
    for guide, claimants in claims.items():
        least = min(difference for difference, _ in claimants)
        nearest_depths = [depth for difference, depth in claimants if difference == least]
        if len(nearest_depths) == 1:
            chosen[nearest_depths[0]] = guide
        else:
            result.conflicts.append(
                f"{guide.path} is {least} s from {len(nearest_depths)} depths: {_listed(nearest_depths)}"
            )
    return chosen


def _nearest(time: Decimal, group: Sequence[tuple[Decimal, Found]], tolerance: Decimal) -> list[tuple[Decimal, Found]]:
    """Return the guides of a sorted group that are nearest to a time, with their difference."""
    first, last = 0, len(group)
    while first < last:
        middle = (first + last) // 2
        first, last = (middle + 1, last) if group[middle][0] < time else (first, middle)
    around = [abs(group[index][0] - time) for index in (first - 1, first) if 0 <= index < len(group)]
    if not around or min(around) > tolerance:
        return []
    least, found = min(around), []
    for step, begin in ((-1, first - 1), (1, first)):
        index = begin
        # Equal times stand side by side; nothing farther away is looked at.
        while 0 <= index < len(group) and abs(group[index][0] - time) <= least:
            found.append((least, group[index][1]))
            index += step
    return found


def _listed(files: Iterable[Found | str], most: int = 4) -> str:
    names = [str(file.path) if isinstance(file, Found) else file for file in files]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
