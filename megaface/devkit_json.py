"""The devkit's two results files, byte for byte.

The devkit writes them with an old jsoncpp (`StyledStreamWriter` with a tab): keys sorted, a newline before and after
the document, arrays on one line when short, and floats as `%#.16g` of the float32 with trailing zeros cut to one.
"""

from collections.abc import Sequence

import numpy as np

from megaface.protocol import Identification, subsample

RIGHT_MARGIN = 74  # an array of this many characters, or a third as many elements, goes over several lines


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
        return "[]"
    if 3 * len(items) < RIGHT_MARGIN:
        line = f"[ {', '.join(items)} ]"
        if len(line) < RIGHT_MARGIN:
            return line
    lines = f",\n{indent}\t".join(items)
    return f"\n{indent}[\n{indent}\t{lines}\n{indent}]"


def cmc_text(result: Identification) -> str:
    """The text of `cmc_*.json`: the three curves, subsampled."""
    accept_rates, verification_rates = result.roc.subsampled()
    curves = {
        "cmc": _rank_curve(result.cmc),
        "roc": (_floats(accept_rates), _floats(verification_rates)),
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
    # Printed all at once: a call per probe would take longer than the printing.
    mates, ranks = _integers(result.pairs[:, 0]), _integers(result.ranks)
    best, scores = _integers(result.best_index.ravel()), _floats(result.best_score.ravel())
    starts = np.searchsorted(result.pairs[:, 1], np.arange(len(result.ids) + 1)).tolist()
    listed = (result.best_index >= 0).sum(axis=1).tolist()
    width = result.best_index.shape[1]
    entries = []
    for probe in range(len(result.ids)):
        some = slice(probe * width, probe * width + listed[probe])
        distractors = _object({"idx": best[some], "score": scores[some]})
        some = slice(starts[probe], starts[probe + 1])
        probes = _object({"idx": mates[some], "rank": ranks[some]}) if mates[some] else " null"
        entries.append(f'\t\n\t{{\n\t\t"distractors" :{distractors},\n\t\t"probes" :{probes}\n\t}}')
    return "\n[\n" + ",\n".join(entries) + "\n]\n"


def _object(arrays: dict[str, list[str]]) -> str:
    members = ",\n".join(f'\t\t\t"{name}" : {array_text(items, chr(9) * 3)}' for name, items in arrays.items())
    return f" \n\t\t{{\n{members}\n\t\t}}"


def _rank_curve(curve: np.ndarray) -> tuple[list[str], list[str]]:
    kept = subsample(curve)
    return _integers(kept), _floats(curve[kept])


def _integers(values: Sequence[int] | np.ndarray) -> list[str]:
    values = np.asarray(values)
    numbers = values.tolist()
    if len(numbers) and values.min() >= 0 and values.max() < len(numbers):
        texts = list(map(str, range(int(values.max()) + 1)))  # many are equal: a look into a table is faster
        return [texts[number] for number in numbers]
    return list(map(str, numbers))


def _floats(values: np.ndarray) -> list[str]:
    return [float_text(value) for value in np.asarray(values, np.float64).tolist()]
