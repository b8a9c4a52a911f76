"""The report as one HTML file: no network, no script, pictures inside; for a screen of any width, and for paper."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from reporting.curves import training_curves
from reporting.facts import SECTIONS, Run, Source

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WIDEST = 1400  # pixels of a picture; wider ones are shrunk

_STYLE = """
:root { color-scheme: light dark; --line: #d0d4d9; --soft: #f4f6f8; --ink: #1b1f24; --faint: #5b6570; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a424b; --soft: #20262c; --ink: #e6e9ec; --faint: #a3adb8; --paper: #14181c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h2 { border-bottom: 2px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p, li, td, th, code { overflow-wrap: anywhere; }
.faint, .interval { color: var(--faint); font-size: .87rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { background: var(--soft); } tbody th { font-weight: normal; width: 34%; min-width: 8rem; }
td { min-width: 7rem; } .interval { display: block; }
figure { margin: .8rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
.side { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.side figure:only-child img[src^="data:image/png"] { max-width: min(100%, 50rem); }
figcaption { font-size: .85rem; color: var(--faint); }
details { margin: .6rem 0; background: var(--soft); padding: .4rem .7rem; border-radius: .3rem; }
summary { cursor: pointer; } pre, code { font-size: .83rem; white-space: pre-wrap; }
blockquote { margin: .6rem 0; padding: .3rem .8rem; border-left: 4px solid #0072B2; background: var(--soft); }
.warn { border-left-color: #D55E00; }
nav a { margin-right: .9rem; white-space: nowrap; display: inline-block; } a { color: inherit; }
@media (max-width: 40rem) { body { font-size: 15px; padding: 1rem .7rem; } th, td { padding: .3rem .35rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #f4f4f4; --faint: #444; --line: #bbb; }
  body { max-width: none; font-size: 10pt; padding: 0; } nav { display: none; }
  details > *, details::details-content { display: block !important; content-visibility: visible !important; }
  tr, figure, blockquote { break-inside: avoid; } h2, h3 { break-after: avoid; }
  figure img { max-height: 20cm; max-width: 100%; object-fit: contain; }
}
"""


def page(runs: Sequence[Run], title: str, command: str) -> str:
    """The whole file."""
    kinds = [kind for kind in SECTIONS if any(source.kind == kind for run in runs for source in run.sources)]
    anchors = "".join(f'<a href="#{_anchor(kind)}">{_text(kind)}</a>' for kind in kinds)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is fetched, whatever a name in the results may contain.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="faint">{_text(" | ".join(str(run.folder) for run in runs))}<br>{_text(command)}</p>',
        '<p class="faint">In small print: 95 % intervals, by person where the result has them.</p>',
        f"<nav>{anchors}</nav>",
    ]
    unread = [text for run in runs for text in run.unread]
    if unread:
        parts.append(
            '<blockquote class="warn">Not in this report:<ul>' + "".join(f"<li>{_text(t)}</li>" for t in unread)
        )
        parts.append("</ul></blockquote>")
    for kind in kinds:
        parts.append(f'<h2 id="{_anchor(kind)}">{_text(kind)}</h2>')
        subjects = list(dict.fromkeys(s.subject for run in runs for s in run.sources if s.kind == kind))
        for subject in subjects:
            parts += _subject(runs, kind, subject)
        if kind == "Training":
            drawn = [_picture(data, name, "image/png") for name, data in training_curves(runs).items()]
            parts.append(f'<div class="side">{"".join(drawn)}</div>')
            parts += _options(runs)
    return "\n".join([*parts, "</body></html>\n"])


def _subject(runs: Sequence[Run], kind: str, subject: str) -> list[str]:
    """One table for everything of one kind measured on one thing; a column for each results file that has it."""
    columns = [
        (run.label, source)
        for run in runs
        for source in run.sources
        if (source.kind, source.subject) == (kind, subject)
    ]
    labels = list(dict.fromkeys(figure.label for _, source in columns for figure in source.figures))
    heads = "".join(f"<th>{_text(_column_name(label, source, columns))}</th>" for label, source in columns)
    parts = [f"<h3>{_text(subject)}</h3>"]
    datasets = {tuple(digest for _, digest in source.data) for _, source in columns}
    if len(datasets) > 1:
        parts.append(
            '<blockquote class="warn">Not the same data in all columns (see the hashes): do not compare.</blockquote>'
        )
    elif len({source.protocol for _, source in columns}) > 1:
        parts.append(
            '<blockquote class="warn">Not measured in the same way in all columns (how faces are found, folds, '
            "galleries, lists; see the commands): do not compare.</blockquote>"
        )
    parts.append(f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>')
    for label in labels:
        cells = []
        for _, source in columns:
            figure = next((figure for figure in source.figures if figure.label == label), None)
            interval = f'<span class="interval">{_text(figure.interval)}</span>' if figure and figure.interval else ""
            cells.append(f"<td>{_text(figure.value) if figure else '-'}{interval}</td>")
        parts.append(f"<tr><th>{_text(label)}</th>{''.join(cells)}</tr>")
    parts.append("</tbody></table></div>")
    for label, source in columns:
        parts += [f"<blockquote>{_name(label, columns)}{_text(text)}</blockquote>" for text in source.texts]
    for note in dict.fromkeys(note for _, source in columns for note in source.notes):
        who = [_column_name(label, source, columns) for label, source in columns if note in source.notes]
        said = "" if len(who) == len(columns) else f"<b>{_text(', '.join(who))}:</b> "
        parts.append(f'<p class="faint">{said}{_text(note)}</p>')
    pictures = [(path, _column_name(label, source, columns)) for label, source in columns for path in source.pictures]
    if len(columns) > 1:  # the same picture of all columns side by side
        names = list(dict.fromkeys(path.name for path, _ in pictures))
        rows = [[shown for shown in pictures if shown[0].name == name] for name in names]
    else:
        rows = [[shown for shown in pictures if _is_sheet(shown[0]) == sheet] for sheet in (False, True)]
    for row in rows:
        parts.append(f'<div class="side">{"".join(_picture_file(*shown) for shown in row)}</div>' if row else "")
    parts.append("<details><summary>Where this is from: commands and hashes</summary>")
    parts += [_provenance(label, source) for label, source in columns]
    return [*parts, "</details>"]


def _column_name(label: str, source: Source, columns: Sequence[tuple[str, Source]]) -> str:
    """The run; the file's folder where a run has several of one kind, and the model where a file speaks of several."""
    own = [other for name, other in columns if name == label]
    elsewhere = [other.path.parent.name for other in own if other.path != source.path]
    parts = [label]
    if elsewhere:
        folder = source.path.parent
        parts.append("/".join(folder.parts[-2:]) if folder.name in elsewhere else folder.name)
    if len(own) - len(elsewhere) > 1:
        parts.append(source.models[0][0])
    return ", ".join(parts)


def _name(label: str, columns: Sequence[tuple[str, Source]]) -> str:
    return f"<b>{_text(label)}:</b> " if len(columns) > 1 else ""


def _provenance(label: str, source: Source) -> str:
    rows = [("results", str(source.path)), ("command", source.command or "not recorded")]
    rows += [(f"model {name}", digest or "no hash recorded") for name, digest in source.models]
    rows += [(f"data {name}", digest or "no hash recorded") for name, digest in source.data]
    lines = "".join(f"<li>{_text(key)}: <code>{_text(value)}</code></li>" for key, value in rows)
    return f"<p><b>{_text(label)}</b></p><ul>{lines}</ul>"


def _options(runs: Sequence[Run]) -> list[str]:
    """The options of the trainings: those in which the runs differ first, then all."""
    known = [run for run in runs if run.options]
    if not known:
        return []
    names = list(dict.fromkeys(name for run in known for name in run.options))
    differing = [name for name in names if len({str(run.options.get(name)) for run in known}) > 1]
    heads = "".join(f"<th>{_text(run.label)}</th>" for run in known)

    def rows(chosen: Sequence[str]) -> str:
        body = "".join(
            f"<tr><th>--{_text(name.replace('_', '-'))}</th>"
            + "".join(f"<td>{_text(str(run.options.get(name)))}</td>" for run in known)
            + "</tr>"
            for name in chosen
        )
        return f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'

    parts = [f"<h3>Options in which the trainings differ</h3>{rows(differing)}"] if len(known) > 1 and differing else []
    return [*parts, f"<details><summary>All options of the training</summary>{rows(names)}</details>"]


def _picture_file(path: Path, caption: str) -> str:
    """A picture inside the file; photographs as JPEG, drawings as PNG."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return f'<p class="faint">{_text(f"{path}: not a picture ({error})")}</p>'
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    photographs = _is_sheet(path)
    buffer = io.BytesIO()
    if photographs:
        picture.save(buffer, "JPEG", quality=82)
    else:
        picture.quantize(128).save(buffer, "PNG", optimize=True)
    return _picture(buffer.getvalue(), f"{caption}: {path.stem}", "image/jpeg" if photographs else "image/png")


def _is_sheet(path: Path) -> bool:
    """Whether a picture is a sheet of photographs and no drawing."""
    return any(word in path.stem for word in ("errors", "worst", "misses", "people"))


def _picture(data: bytes, caption: str, kind: str) -> str:
    encoded = base64.b64encode(data).decode()
    said = _text(caption)
    return f'<figure><img alt="{said}" src="data:{kind};base64,{encoded}"><figcaption>{said}</figcaption></figure>'


def _anchor(kind: str) -> str:
    return kind.lower().replace(" ", "-")


def _text(value: str) -> str:
    return html.escape(value.encode("utf-8", "backslashreplace").decode(), quote=True)
