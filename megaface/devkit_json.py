"""The devkit's two results files, byte for byte.

The devkit writes them with an old jsoncpp (`StyledStreamWriter` with a tab): keys sorted, a newline before and after
the document, arrays on one line when short, and floats as `%#.16g` of the float32 with trailing zeros cut to one.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from megaface import kernels
from megaface.protocol import Identification, subsample

RIGHT_MARGIN = 74  # an array of this many characters goes over several lines
LONG_ARRAY = -(-RIGHT_MARGIN // 3)  # and so does one of this many elements
NO_ITEMS = "[]"
INDENT = 3 * "\t"  # of the arrays of matches
SEPARATOR = f",\n{INDENT}\t"


def float_text(value: float) -> str:
    """A number as the devkit prints it: 16 significant digits, trailing zeros cut to one after the last other digit.

    A number with an exponent keeps its zeros, since the cut starts at the text's end.
    """
    text = f"{value:#.16g}"
    if not text.endswith("0") or "e" in text:
        return text
    return text.rstrip("0") + "0"


def array_text(items: Sequence[str], indent: str) -> str:
    """A JSON array of printed scalars, as it stands after `"key" : ` or on a line of its own."""
    if not items:
        return NO_ITEMS
    if len(items) < LONG_ARRAY:
        line = f"[ {', '.join(items)} ]"
        if len(line) < RIGHT_MARGIN:
            return line
    return _long_array_text(f",\n{indent}\t".join(items), indent)


def _long_array_text(lines: str, indent: str) -> str:
    return f"\n{indent}[\n{indent}\t{lines}\n{indent}]"


def cmc_text(result: Identification) -> str:
    """The text of `cmc_*.json`: the three curves, subsampled."""
    accept_rates, verification_rates = result.roc.subsampled()
    curves = {
        "cmc": _rank_curve(result.cmc),
        "roc": (printed_floats(accept_rates), printed_floats(verification_rates)),
        "traditional_cmc": _rank_curve(result.traditional_cmc),
    }
    members = []
    for name, axes in curves.items():
        # jsoncpp breaks the line before every element of an array of arrays, and again before a long element.
        inner = ",\n".join("\t\t" + array_text(axis, "\t\t") for axis in axes)
        members.append(f'\n\t"{name}" : \n\t[\n{inner}\n\t]')
    return "\n{" + ",".join(members) + "\n}\n"


def matches_text(result: Identification) -> str:
    """The text of `matches_*.json`: for every probe its best distractors, and the ranks of its mates."""
    of_probe = np.searchsorted(result.pairs[:, 1], np.arange(len(result.ids) + 1))
    listed = result.best_index >= 0
    of_best = np.append(0, listed.sum(axis=1).cumsum())
    printed = printed_floats(result.best_score[listed])
    scores = (array_text(printed[start:end], INDENT) for start, end in pairwise(of_best.tolist()))
    best = integer_arrays(result.best_index[listed], of_best)
    mates, ranks = integer_arrays(result.pairs[:, 0], of_probe), integer_arrays(result.ranks, of_probe)
    entries = []
    for best_of, scores_of, mates_of, ranks_of in zip(best, scores, mates, ranks, strict=True):
        distractors = _object("idx", best_of, "score", scores_of)
        probes = " null" if mates_of == NO_ITEMS else _object("idx", mates_of, "rank", ranks_of)
        entries.append(f'\t\n\t{{\n\t\t"distractors" :{distractors},\n\t\t"probes" :{probes}\n\t}}')
    return "\n[\n" + ",\n".join(entries) + "\n]\n"


def _object(first: str, one: str, second: str, other: str) -> str:
    return f' \n\t\t{{\n\t\t\t"{first}" : {one},\n\t\t\t"{second}" : {other}\n\t\t}}'


def integer_arrays(values: np.ndarray, bounds: np.ndarray) -> Iterator[str]:
    """The texts of the arrays values[bounds[k] : bounds[k + 1]] of numbers >= 0.

    All are printed at once, as if every array were long: those that are need only be cut out.
    """
    separator = np.frombuffer(SEPARATOR.encode(), np.uint8)
    text, ends = np.empty((20 + len(separator)) * len(values), np.uint8), np.empty(len(values) + 1, np.int64)
    ends[0] = -len(separator)
    kernels.join_integers(values.astype(np.uint64), separator, text, ends[1:])
    lines = text[: max(0, ends[-1])].tobytes().decode()
    starts, ends = (ends[bounds] + len(separator)).tolist(), ends[bounds].tolist()
    for number, count in enumerate(np.diff(bounds).tolist()):
        some = lines[starts[number] : ends[number + 1]]
        if count >= LONG_ARRAY:
            yield _long_array_text(some, INDENT)
        else:
            yield array_text(some.split(SEPARATOR) if count else [], INDENT)


def _rank_curve(curve: np.ndarray) -> tuple[list[str], list[str]]:
    kept = subsample(curve)
    return list(map(str, kept)), printed_floats(curve[kept])


def printed_floats(values: np.ndarray) -> list[str]:
    """`float_text` of each of the float32 values [N]."""
    text, odd = np.empty(21 * len(values), np.uint8), np.empty(len(values), bool)
    length = kernels.join_scores(np.asarray(values, np.float32), ord(" "), text, odd)
    items = text[:length].tobytes().decode().split(" ")[: len(values)]
    for number in np.flatnonzero(odd):
        items[number] = float_text(float(values[number]))
    return items
