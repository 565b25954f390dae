"""One HTML file with text, tables and pictures inside it: nothing to fetch, nothing that runs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_rgm.artefacts import printable
from hf_rgm.files import replacing

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; color: #1d232b; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
.lead { color: #5b6470; margin: 0 0 2rem; }
section { background: #fff; border: 1px solid #dde1e6; border-radius: 8px; padding: 1.25rem 1.5rem; }
section + section { margin-top: 1.25rem; }
p { margin: 0 0 .8rem; }
figure { margin: .5rem 0 1rem; text-align: center; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #5b6470; font-size: .875rem; margin-top: .25rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .925rem; }
caption { text-align: left; color: #5b6470; font-size: .875rem; padding-bottom: .25rem; }
th, td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid #e8ebee; vertical-align: top; }
th { color: #5b6470; font-weight: 600; white-space: nowrap; }
td { overflow-wrap: break-word; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
"""

# Even if something slipped through the escaping, the browser would neither run nor fetch it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class HtmlReport:
    """
    A page made of sections. Everything from data is escaped; pictures are inside the file.

    Args:
        title (`str`): Title of the page.
        lead (`str`, *optional*): A line below it.

    Example:

    ```python
    >>> from hf_rgm.explorer.html import HtmlReport
    >>> report = HtmlReport("Digits", lead="Which training images made the model see a 3?")
    >>> report.section("Most helpful clusters").table(["cluster", "score"], [["digit 3 / cell 1", 0.52]])
    >>> report.save("report.html").name
    'report.html'

    ```
    """

    def __init__(self, title: str, *, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._sections: list[Section] = []

    def section(self, heading: str) -> Section:
        """Begins a section; add content to what it returns."""
        section = Section(heading)
        self._sections.append(section)
        return section

    def to_html(self) -> str:
        """The whole page."""
        title, lead = _escaped(self.title), _escaped(self.lead)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
            f'<p class="lead">{lead}</p>\n'
            + "\n".join(section.to_html() for section in self._sections)
            + "\n</main>\n"
            "</body>\n</html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Writes the page (replaces an older one) and returns where."""
        path = Path(path)
        with replacing(path) as temporary:
            temporary.write_text(self.to_html(), encoding="utf-8")
        return path


class Section:
    """A part of an [`HtmlReport`], made by [`HtmlReport.section`]. Content appears in the order it is added."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self._parts: list[str] = []

    def text(self, text: str) -> None:
        """Adds a paragraph; empty lines divide it into several."""
        for paragraph in text.split("\n\n"):
            self._parts.append(f"<p>{_escaped(paragraph)}</p>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> None:
        """
        Adds a table; numbers are shown with four digits.

        Raises:
            ValueError: If a row has more or fewer cells than there are columns.
        """
        lines = [list(row) for row in rows]
        for line in lines:
            if len(line) != len(columns):
                raise ValueError(f"A row has {len(line)} cells for {len(columns)} columns: {line}. Pass one for each.")
        numeric = [bool(lines) and all(_is_number(line[i]) for line in lines) for i in range(len(columns))]
        mark = [' class="number"' if flag else "" for flag in numeric]
        head = "".join(f"<th{m}>{_escaped(str(name))}</th>" for name, m in zip(columns, mark, strict=True))
        body = "\n".join(
            "<tr>" + "".join(f"<td{m}>{_cell(v)}</td>" for v, m in zip(line, mark, strict=True)) + "</tr>"
            for line in lines
        )
        titled = f"<caption>{_escaped(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="scroll"><table>{titled}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
            "</tbody></table></div>"
        )

    def frame(self, frame: pd.DataFrame, *, caption: str = "") -> None:
        """Adds the columns of a data frame as a table."""
        self.table([str(name) for name in frame.columns], frame.itertuples(index=False), caption=caption)

    def figure(self, drawing: Axes | Figure, *, caption: str = "", dpi: int = 110) -> None:
        """Adds a matplotlib figure, or the figure of some axes."""
        figure = drawing.figure if isinstance(drawing, Axes) else drawing
        while not isinstance(figure, Figure):
            figure = figure.figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        self.image(buffer.getvalue(), caption=caption)

    def image(self, png: bytes, *, caption: str = "") -> None:
        """
        Adds a PNG.

        Raises:
            ValueError: If the bytes are no PNG.
        """
        if not png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"`png` must be the bytes of a PNG file, got {png[:8]!r}. Convert the picture first.")
        text = _escaped(caption)
        encoded = base64.b64encode(png).decode("ascii")
        below = f"<figcaption>{text}</figcaption>" if caption else ""
        self._parts.append(f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}">{below}</figure>')

    def to_html(self) -> str:
        """The section as an HTML fragment."""
        return f"<section>\n<h2>{_escaped(self.heading)}</h2>\n" + "\n".join(self._parts) + "\n</section>"


def _escaped(text: str) -> str:
    """Text without markup, and without characters that control anything but lines."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return _escaped(f"{value:.4g}")
    return _escaped(str(value))
