"""Tables, sheets and the page of an audit."""

import base64
import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

import plotting
import utils
from auditing.measures import RejectCurve

_CELL, _GAP, _TEXT, _MARGIN, _HEAD = 112, 6, 34, 16, 46
PER_PAGE = 200  # findings of a kind on the page

Picture = tuple[np.ndarray, str]  # uint8 RGB [112, 112, 3], what stands below it


def draw_sheet(path: Path, title: str, rows: Sequence[tuple[str, Sequence[Picture]]]) -> None:
    """A PNG: for each finding its reason, and below it some pictures with a line of text each."""
    across = max([len(pictures) for _, pictures in rows] + [4])
    width = 2 * _MARGIN + across * (_CELL + _GAP)
    each = 20 + _CELL + _TEXT
    sheet = Image.new("RGB", (width, _HEAD + max(1, len(rows)) * each + _MARGIN), "white")
    plotting.draw_text(sheet, (_MARGIN, 12), title, size=16, bold=True, width=width - 2 * _MARGIN)
    for number, (reason, pictures) in enumerate(rows):
        top = _HEAD + number * each
        plotting.draw_text(sheet, (_MARGIN, top), reason, size=12, width=width - 2 * _MARGIN)
        for column, (rgb, text) in enumerate(pictures):
            left = _MARGIN + column * (_CELL + _GAP)
            sheet.paste(Image.fromarray(rgb), (left, top + 18))
            plotting.draw_text(sheet, (left, top + 20 + _CELL), text, size=11, width=_CELL)
    plotting.save_png(path, sheet)


def draw_rejects(path: Path, curves: Sequence[RejectCurve], subject: str) -> None:
    """Error versus reject, a line for each sign of quality."""
    with plotting.drawing(path, 7, 4.5) as figure:
        axes = figure.add_subplot(xlabel="share of genuine pairs rejected", ylabel="false non-match rate of the others")
        for curve in curves:
            axes.plot(curve.rejected, curve.fnmr, label=f"{curve.sign} ({curve.gain:+.0%})")
        axes.set_ylim(bottom=0)
        best = max(curves, key=lambda curve: curve.gain)
        plotting.title(axes, subject, f"best: {best.sign}, {best.gain:.0%} fewer errors on average")
        figure.legend(loc="outside lower center", ncols=3)


def _image(rgb: np.ndarray) -> str:
    data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title> <style> body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70em; padding:
1em; color: #222; background: #fff }} h2 {{ margin-top: 2em; border-bottom: 1px solid #ccc }} .finding {{ border: 1px
solid #ddd; border-radius: 6px; padding: .5em .8em; margin: .6em 0 }} .finding.confirm {{ border-color: #009e73;
background: #f0faf6 }} .finding.reject {{ border-color: #d55e00; background: #fdf3ec }} figure {{ display: inline-block;
margin: .3em; width: 112px; vertical-align: top }} figcaption {{ font-size: 11px; overflow-wrap: anywhere }} .bar {{
position: sticky; top: 0; background: #fff; padding: .5em 0; border-bottom: 1px solid #ccc }} button, label {{ font:
inherit; margin-right: .8em }} table {{ border-collapse: collapse }} td, th {{ padding: .1em .8em; text-align: left }}
@media print {{ .bar, label {{ display: none }} }} </style></head><body> <h1>{title}</h1><p>{summary}</p>{counts} <div
class="bar"><button onclick="save()">Save decisions.tsv</button><span id="left"></span></div> {sections} <script> const
key = {key}; let decisions = JSON.parse(localStorage.getItem(key) || "{{}}"); function show() {{
  for (const box of document.querySelectorAll(".finding")) {{
    const decided = decisions[box.dataset.id];
    box.classList.toggle("confirm", decided === "confirm"); box.classList.toggle("reject", decided === "reject");
    for (const input of box.querySelectorAll("input")) input.checked = input.value === decided;
  }}
  document.getElementById("left").textContent = Object.keys(decisions).length + " decided";
}}
document.addEventListener("change", event => {{
  const box = event.target.closest(".finding"); if (box) {{ decisions[box.dataset.id] = event.target.value; try {{
  localStorage.setItem(key, JSON.stringify(decisions)) }} catch {{}} show(); }}
}});
function save() {{
  const lines = ["finding\\tdecision\\t" + key, ...Object.entries(decisions).map(([id, what]) => id + "\\t" + what)];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {{type: "text/tab-separated-values"}}));
  link.download = "decisions.tsv"; link.click();
}}
show();
</script></body></html>
"""


def write_page(
    path: Path,
    title: str,
    summary: str,
    counts: dict[str, int],
    sections: Iterable[tuple[str, Sequence[tuple[str, str, Sequence[Picture]]]]],
    key: str,
) -> None:
    """A page that opens from a disk: sections of findings (id, reason, pictures), each to be confirmed or rejected.

    Its button saves `decisions.tsv`, which `audit.py --decisions` reads (see decisions.py for what an id is); `key`
    tells this set's decisions from others'.
    """
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{count:,}</td></tr>" for name, count in counts.items())
    parts = []
    for name, findings in sections:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for identifier, reason, pictures in findings[:PER_PAGE]:
            shown = "".join(
                f'<figure><img src="{_image(rgb)}" width="112" height="112" alt="{html.escape(text, quote=True)}">'
                f"<figcaption>{html.escape(text)}</figcaption></figure>"
                for rgb, text in pictures
            )
            choice = "".join(
                f'<label><input type="radio" name="{html.escape(identifier, quote=True)}" value="{value}">'
                f" {value}</label>"
                for value in ("confirm", "reject")
            )
            parts.append(
                f'<div class="finding" data-id="{html.escape(identifier, quote=True)}"><div>{html.escape(reason)}</div>'
                f"{shown}<div>{choice}</div></div>"
            )
        if len(findings) > PER_PAGE:
            parts.append(f"<p>and {len(findings) - PER_PAGE:,} more, in the tables</p>")
    text = _PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary),
        counts=f"<table>{rows}</table>",
        sections="\n".join(parts),
        key=json.dumps(key).replace("<", "\\u003c"),
    )
    utils.write_bytes(path, text.encode("utf-8", "replace"))


def pictures_of(
    read: Callable[[int], np.ndarray], crops: Iterable[int], text: Callable[[int], str], most: int = 6
) -> list[Picture]:
    """Some crops with what stands below each; a crop that cannot be decoded is grey."""
    shown = []
    for index in list(crops)[:most]:
        try:
            shown.append((read(index), text(index)))
        except (ValueError, OSError, utils.InputError):
            shown.append((np.full((112, 112, 3), 200, np.uint8), f"{text(index)} (unreadable)"))
    return shown


def summary_table(counts: dict[str, Any]) -> str:
    """Counts as lines of text."""
    width = max(len(name) for name in counts)
    return "\n".join(f"{name:<{width}}  {count:>12,}" for name, count in counts.items())
