"""What a person decides about findings, and the names by which findings are spoken of for that.

A name is JSON, so that it fits any table, page and name of a person, and says all that the finding would do:
`["wrong person", CROP, LABEL]`, `["stranger", CROP]`, `["unusable", CROP]`, `["duplicate", KEPT, DROPPED]`,
`["two labels, one person", LABEL, LABEL]`, `["one label, two people", LABEL, [CROP, ...]]`,
`["in the test set", LABEL, PERSON]`. Crops and labels are numbers.

A rejected finding is not acted on, also when a later audit finds it anew, perhaps with another label or another half
of an identity (`subject` says what counts as the same). A confirmed one is acted on even if a later audit does not
find it: a network that has learned from it may not, and a stricter rate of error neither.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import utils
from auditing.duplicates import Duplicate
from auditing.findings import DUPLICATE, KEEP, MERGE, SPLIT, STRANGER, TEST, UNUSABLE, WRONG, Findings, PairFinding
from utils import InputError

CONFIRM, REJECT = "confirm", "reject"
CONFIRMED = "confirmed by a person"


def name_of_crop(kind: str, crop: int, to: int | None = None) -> str:
    """The name of a finding about a single crop; `to` is the label of a wrong person."""
    return json.dumps([kind, crop] if kind != WRONG else [kind, crop, to])


def name_of_duplicate(kept: int, dropped: int) -> str:
    """The name of a photo that is there twice."""
    return json.dumps([DUPLICATE, kept, dropped])


def name_of_pair(finding: PairFinding) -> str:
    """The name of a finding about identities."""
    if finding.kind == SPLIT:
        return json.dumps([SPLIT, finding.first, list(finding.crops)])
    return json.dumps([finding.kind, finding.first, int(finding.second) if finding.kind == MERGE else finding.second])


def subject(name: str) -> tuple[Any, ...]:
    """What a finding is about: the same for two findings of which a person who decided one has decided the other."""
    kind, first, *rest = json.loads(name)
    if kind in (WRONG, STRANGER):
        return "who is it", first
    if kind in (DUPLICATE, MERGE):
        return kind, *sorted((first, rest[0]))
    return (kind, first, rest[0]) if kind == TEST else (kind, first)


class Decisions:
    """Names that were confirmed, and the subjects of all that was decided, as {subject: CONFIRM or REJECT}.

    Of several decisions about one subject the last one counts.
    """

    def __init__(self, decided: dict[str, str]) -> None:
        last = {subject(name): name for name in decided}
        self.confirmed = [json.loads(name) for name in last.values() if decided[name] == CONFIRM]
        self._decided = {about: decided[name] for about, name in last.items()}

    def __len__(self) -> int:
        return len(self._decided)

    def rejected(self, name: str) -> bool:
        """Whether a person rejected this finding."""
        return self._decided.get(subject(name)) == REJECT

    def about_nothing(self, found: Sequence[str]) -> int:
        """How many rejected findings are not among these any more."""
        known = {subject(name) for name in found}
        return sum(what == REJECT and about not in known for about, what in self._decided.items())


def read_decisions(path: Path, key: str, crops: int, identities: int) -> Decisions:
    """What the page's decisions.tsv says; `InputError` naming the line if it is none, speaks of other crops than those
    of `key` (see `report.write_page`), or of a crop or an identity that the set has not."""
    try:
        lines = utils.read_bytes(path).decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text'}") from error
    head = lines[0].removesuffix("\r").split("\t")
    if head[:2] != ["finding", "decision"] or len(head) != 3:
        raise InputError(f"{path}: not saved by an audit's page (its first line must be finding decision KEY)")
    if head[2] != key:
        raise InputError(f"{path}: decisions about other crops ({head[2][:40]} instead of {key})")
    decided = {}
    for number, line in enumerate(lines[1:], 2):
        name, _, what = line.removesuffix("\r").rpartition("\t")
        if what not in (CONFIRM, REJECT) or not _is_name(name, crops, identities):
            raise InputError(f"{path}, line {number}: expected a finding and {CONFIRM} or {REJECT}")
        decided[name] = what
    return Decisions(decided)


def _is_name(text: str, crops: int, identities: int) -> bool:
    try:
        name = utils.parse_json(text)
    except ValueError:
        return False

    def crop(value: Any) -> bool:
        return type(value) is int and 0 <= value < crops

    def label(value: Any) -> bool:
        return type(value) is int and 0 <= value < identities

    def several(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(crop, value))

    parts: dict[str, list[Any]] = {
        WRONG: [crop, label],
        STRANGER: [crop],
        UNUSABLE: [crop],
        DUPLICATE: [crop, crop],
        MERGE: [label, label],
        SPLIT: [label, several],
        TEST: [label, lambda value: isinstance(value, str)],
    }
    if not isinstance(name, list) or not name or not isinstance(name[0], str) or name[0] not in parts:
        return False
    checks = parts[name[0]]
    return len(name) == len(checks) + 1 and all(check(part) for check, part in zip(checks, name[1:], strict=True))


def decide(
    decisions: Decisions, found: Findings, nearest: np.ndarray, duplicates: Sequence[tuple[Duplicate, int]]
) -> None:
    """What training does with each finding, a person's decisions honoured; says how many found nothing to decide."""
    names = {
        index: name_of_crop(kind, index, int(nearest[index]))
        for index, kind in enumerate(found.kinds)
        if kind not in (KEEP, DUPLICATE)
    }
    copies = {name_of_duplicate(pair.first + pair.second - drop, drop): drop for pair, drop in duplicates}
    if gone := decisions.about_nothing([*names.values(), *copies, *map(name_of_pair, found.pairs)]):
        print(f"{gone} of {len(decisions)} decisions reject what is not found now")
    for index, name in names.items():
        if decisions.rejected(name):
            found.reasons[index] += "; rejected by a person"
        elif found.kinds[index] == WRONG:
            found.action[index], found.to[index] = "move", int(nearest[index])
        else:
            found.action[index] = "drop"
    times = Counter(copies.values())
    confirmed = {name_of_duplicate(*names) for kind, *names in decisions.confirmed if kind == DUPLICATE}
    for name, drop in list(copies.items()):
        _, kept, _ = json.loads(name)
        if found.kinds[drop] == DUPLICATE and times[drop] == 1 and name_of_duplicate(drop, kept) in confirmed:
            # Of the two it was the other one that was to go.
            found.set(drop, KEEP, "", "keep")
            found.score[drop] = np.nan
            del copies[name]
    dropped = {drop for name, drop in copies.items() if not decisions.rejected(name)}
    for drop in copies.values():
        if found.action[drop] == "keep" or found.kinds[drop] == DUPLICATE:
            found.action[drop] = "drop" if drop in dropped else "keep"
        if drop not in dropped:
            found.reasons[drop] += "; rejected by a person"
    usual = {MERGE: "merge", SPLIT: "split", TEST: "drop"}
    for pair in found.pairs:
        name = name_of_pair(pair)
        found.pair_actions[name] = "keep" if decisions.rejected(name) else usual[pair.kind]
    confirm(decisions, found, usual)


def confirm(decisions: Decisions, found: Findings, usual: dict[str, str]) -> None:
    """Act on what a person confirmed as it was then, whether or not it is found now."""
    known = {subject(name_of_pair(pair)) for pair in found.pairs}
    for kind, first, *rest in sorted(decisions.confirmed, key=lambda name: name[0] == DUPLICATE):
        if kind in usual:
            crops = tuple(rest[0]) if kind == SPLIT else ()
            if any(found.labels[crop] != first for crop in crops):
                raise InputError(f"--decisions: crops {rest[0]} of {SPLIT} are not all of label {first}")
            pair = PairFinding(kind, first, "" if kind == SPLIT else str(rest[0]), np.nan, CONFIRMED, crops)
            name = name_of_pair(pair)
            if subject(name) not in known:
                found.pairs.append(pair)
                found.pair_actions[name] = usual[kind]
            continue
        if kind == DUPLICATE and found.action[first] == "drop" and found.kinds[first] != DUPLICATE:
            continue  # the one to be kept goes for a reason of its own, so the other one is no second one any more
        crop, to = (rest[0], None) if kind == DUPLICATE else (first, rest[0] if rest else None)
        # Whose the second photo is matters more than that it is the second: it may be moved.
        if (found.kinds[crop], found.to[crop]) != (kind, to) and (kind != DUPLICATE or found.action[crop] == "keep"):
            reason = f"{found.reasons[crop]}; {CONFIRMED}".removeprefix("; ")
            found.set(crop, kind, reason, "drop" if to is None else "move", to)
