"""MODEL_CARD.md: what is known of one model, from the same facts. A figure without the hash of its data is refused.

So is a figure that belongs to another model. What was refused stands at the end with the reason, as does what nobody
has measured: a reader must not take silence for a good sign.
"""

import re
from collections import Counter

from reporting.facts import SECTIONS, Run

_HASHES = re.compile(r"[0-9a-f]{64}( \+ [0-9a-f]{64})*")  # of all that a figure stands on

# What a reader of a card looks for (Mitchell et al., "Model Cards for Model Reporting", 2019).
_EXPECTED = {
    "Verification": "lfw_eval.py",
    "Error rates by group": "lfw_eval.py --groups",
    "Identification": "identification.py",
    "IJB": "ijb_eval.py",
    "TinyFace": "tinyface_eval.py",
    "MegaFace": "megaface_eval.py",
    "Stress": "stress.py",
}


def card(run: Run) -> str:
    """The card of the model of a run, as Markdown."""
    name, sha = model_of(run)
    lines = [f"# Model card: {_plain(name)}", ""]
    lines += [f"- weights: SHA-256 `{sha}`" if sha else "- weights: no hash recorded"]
    if run.options:
        chosen = (
            "network",
            "embedding_size",
            "loss",
            "margin",
            "scale",
            "epochs",
            "batch_size",
            "lr",
            "schedule",
            "seed",
        )
        said = ", ".join(f"{key} {run.options[key]}" for key in chosen if run.options.get(key) is not None)
        lines.append(f"- training: {_plain(said)}")
    lines += [
        "- output: an embedding of an aligned 112x112 crop of one face; two crops are compared by the cosine",
        "",
        "Figures are of the data whose hash stands beside them, and of nothing else. Intervals are of 95 %, by "
        "person where known.",
    ]
    refused: list[str] = []
    for kind in SECTIONS:
        for source in (source for source in run.sources if source.kind == kind):
            others = [digest for _, digest in source.models if digest is not None]
            if kind not in ("Data", "Comparison") and sha is not None and others and sha not in others:
                refused.append(f"{kind}, {source.subject}: measured on another model ({others[0][:12]})")
                continue
            if kind not in ("Data", "Training") and not others:
                refused.append(f"{kind}, {source.subject}: nothing says which model was measured")
                continue
            good = [figure for figure in source.figures if _HASHES.fullmatch(figure.data_sha256 or "")]
            bad = [figure for figure in source.figures if figure not in good]
            if bad:
                named = ", ".join(figure.label for figure in bad[:3]) + (" ..." if len(bad) > 3 else "")
                refused.append(f"{kind}, {source.subject}: no hash of the data ({named})")
            if good:
                lines += ["", f"## {kind}: {_plain(source.subject)}", ""]
                hashes = list(dict.fromkeys(figure.data_sha256 for figure in good))
                several = len(hashes) > 1
                behind = [] if several else [(name, digest) for name, digest in source.data if digest]
                lines += [f"- data {_plain(name)}: `{digest}`" for name, digest in behind]
                lines += [f"- command: `{_plain(source.command)}`"] if source.command else []
                lines += ["", "| figure | value | 95 % interval |" + (" data |" if several else "")]
                lines.append("|---|---|---|" + ("---|" if several else ""))
                for figure in good:
                    row = f"| {_plain(figure.label)} | {_plain(figure.value)} | {figure.interval or '-'} |"
                    lines.append(row + (f" `{figure.data_sha256}` |" if several else ""))
                lines += [f"\n{_plain(text)}" for text in source.texts]
                lines += ["", *(f"- {_plain(note)}" for note in source.notes)] if source.notes else []
    kinds = {source.kind for source in run.sources}
    missing = [f"{kind} (`{tool}`)" for kind, tool in _EXPECTED.items() if kind not in kinds]
    if missing:
        lines += ["", "## Not measured", "", f"Nothing in this run says anything of: {', '.join(missing)}."]
    if refused or run.unread:
        lines += ["", "## Left out", "", *(f"- {_plain(text)}" for text in [*refused, *run.unread])]
    return "\n".join([*lines, ""])


def model_of(run: Run) -> tuple[str, str | None]:
    """Name and hash of the model that a run is about: what it trained, else the one that most results speak of."""
    counted = Counter(model for source in run.sources for model in source.models if source.kind != "Comparison")
    if run.embedding_sha256 is not None:
        named = [name for name, digest in counted if digest == run.embedding_sha256 and name != "embedding.pt"]
        return (named or ["embedding.pt"])[0], run.embedding_sha256
    known = [model for model, _ in counted.most_common() if model[1] is not None]
    return (known or list(counted) or [(run.label, None)])[0]


def _plain(text: str) -> str:
    """A text that cannot end a cell or a line, nor begin HTML."""
    flat = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return flat.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
