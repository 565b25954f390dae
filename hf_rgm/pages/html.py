"""One HTML file with text, tables and pictures inside it: nothing to fetch, nothing that runs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_rgm.files.reading import printable
from hf_rgm.files.writing import replacing

STYLE = """
.rgm { color: #1d232b; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
.rgm { max-width: 100%; min-width: 0; }
.rgm h1, .rgm h2, .rgm h3 { font-weight: 600; }
.rgm h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; color: inherit; }
.rgm h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .6rem; color: inherit; overflow-wrap: anywhere; }
.rgm h3 { font-size: 1rem; line-height: 1.3; margin: 0 0 .4rem; color: inherit; }
.rgm .lead { color: #4f5864; margin: 0 0 1.5rem; }
.rgm section { background: #fff; border: 1px solid #dde1e6; border-radius: 8px; padding: 1.25rem 1.5rem; }
.rgm section + section { margin-top: 1.25rem; }
.rgm p { margin: 0 0 .8rem; white-space: pre-line; overflow-wrap: anywhere; color: inherit; }
.rgm figure { margin: .5rem 0 1rem; text-align: center; }
.rgm figure img { max-width: 100%; height: auto; }
.rgm figcaption { color: #4f5864; font-size: .875rem; margin-top: .25rem; }
.rgm .scroll { overflow-x: auto; margin: .5rem 0 1rem; }
.rgm table { border-collapse: collapse; font-size: .925rem; }
.rgm caption { text-align: left; color: #4f5864; font-size: .875rem; padding-bottom: .25rem; }
.rgm th, .rgm td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid #e8ebee;
  vertical-align: top; color: inherit; }
.rgm td { overflow-wrap: anywhere; }
.rgm thead th { color: #4f5864; font-weight: 600; white-space: nowrap; }
.rgm strong { font-weight: 600; }
.rgm td.number, .rgm th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.rgm table.bars { width: 100%; table-layout: fixed; margin: 0 0 1rem; }
.rgm table.bars th[scope=row] { font-weight: 400; overflow-wrap: anywhere; }
.rgm table.bars th, .rgm table.bars td { padding: .3rem .75rem .3rem 0; vertical-align: middle; border: 0; }
.rgm table.bars col.name { width: 34%; } .rgm table.bars col.score { width: 6rem; }
.rgm table.bars td.more { color: #4f5864; font-style: italic; }
.rgm .track { position: relative; display: block; height: 1.1rem; background: #f1f3f5; }
.rgm .track span { position: absolute; top: 0; bottom: 0; }
.rgm .up { background: #0072B2; } .rgm .down { background: #D55E00; } .rgm .zero { width: 1px; background: #1d232b; }
.rgm .cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: .25rem 0 1rem; padding: 0; list-style: none; }
.rgm .cards li { margin: 0; padding: .5rem; border: 1px solid #dde1e6; border-radius: 6px; background: #fff; }
.rgm .cards li.picture { width: 6.5rem; }
.rgm .cards img { width: 6.5rem; height: 6.5rem; object-fit: contain; image-rendering: pixelated; display: block;
  margin: 0 auto .35rem; }
.rgm .cards strong, .rgm .cards span { display: block; max-width: 20rem; font-size: .85rem; line-height: 1.35;
  white-space: pre-line; overflow-wrap: anywhere; color: inherit; }
.rgm .cards span { color: #4f5864; }
.rgm .cards blockquote { margin: 0 0 .35rem; padding: 0; border: 0; max-width: 20rem; font-size: .9rem;
  line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; color: inherit; }
.rgm .beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0 1.5rem; }
@media (max-width: 40rem) {
  .rgm figure { overflow-x: auto; contain: inline-size; } .rgm figure img { max-width: 46rem; }
  .rgm section { padding: 1rem; }
  .rgm table.bars, .rgm table.bars tbody, .rgm table.bars caption { display: block; }
  .rgm table.bars thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .rgm table.bars tr { display: grid; grid-template-columns: 1fr auto; padding: .3rem 0; }
  .rgm table.bars th, .rgm table.bars td { padding: .1rem 0; }
  .rgm table.bars td.bar, .rgm table.bars td.more { grid-column: 1 / -1; }
  .rgm .cards { gap: .5rem; }
  .rgm .cards li.picture, .rgm .cards img { width: 5rem; } .rgm .cards img { height: 5rem; }
}
"""

PAGE_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
.rgm .banner { position: sticky; top: 0; z-index: 1; background: #f4f5f7; border-bottom: 1px solid #dde1e6;
  padding: .5rem 0; margin: 0 0 1.25rem; font-size: .875rem; line-height: 1.4; }
.rgm .banner p { margin: 0; }
@media (max-width: 40rem) { main { padding: 1rem .75rem 3rem; } }
"""

# Even if something slipped through the escaping, the browser would neither run nor fetch it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Card:
    """
    A picture or a text with what is said of it.

    Args:
        title (`str`): What it is.
        picture (`bytes`, *optional*): A PNG.
        text (`str`, *optional*): What it reads.
        note (`str`, *optional*): What is said of it.
    """

    title: str
    picture: bytes | None = None
    text: str = ""
    note: str = ""


class HtmlReport:
    """
    A page made of sections. Everything from data is escaped; pictures are inside the file.

    Args:
        title (`str`): Title of the page.
        lead (`str`, *optional*): A line below it.
        banner (`Sequence[str]`, *optional*): Lines that stay in sight when the page is scrolled.

    Example:

    ```python
    >>> from hf_rgm.pages.html import HtmlReport
    >>> report = HtmlReport("Digits", lead="Which training images made the model see a 3?")
    >>> report.section("Most helpful clusters").table(["cluster", "score"], [["digit 3 / cell 1", 0.52]])
    >>> report.save("report.html").name
    'report.html'

    ```
    """

    def __init__(self, title: str, *, lead: str = "", banner: Sequence[str] = ()) -> None:
        self.title = title
        self.lead = lead
        self.banner = banner
        self._sections: list[Section] = []

    def section(self, heading: str) -> Section:
        """Begins a section; add content to what it returns."""
        return self.add(Section(heading))

    def add(self, section: Section) -> Section:
        """Appends a section that was made elsewhere, and returns it."""
        self._sections.append(section)
        return section

    def to_html(self) -> str:
        """The whole page."""
        title, lead = _escaped(self.title), _escaped(self.lead)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n"
            f'<main class="rgm">\n<h1>{title}</h1>\n'
            + (f'<p class="lead">{lead}</p>\n' if self.lead else "")
            + (f'<div class="banner">{paragraphs(self.banner)}</div>\n' if self.banner else "")
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
        self._parts.append(paragraphs(text.split("\n\n")))

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
        head = "".join(f'<th scope="col"{m}>{_escaped(str(name))}</th>' for name, m in zip(columns, mark, strict=True))
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
        below = f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{_image(png, caption)}{below}</figure>")

    def bars(
        self, names: Sequence[Any], scores: np.ndarray, *, k: int = 8, what: str = "cluster", caption: str = ""
    ) -> None:
        """
        Adds the highest and the lowest scores as a table with bars, to the right of zero where they are positive.

        Args:
            names (`Sequence`): What the scores belong to.
            scores (`np.ndarray`): `(len(names),)`, in units of the objective.
            k (`int`, *optional*, defaults to `8`): Show this many of each end; all if there are no more than `2 * k`.
            what (`str`, *optional*, defaults to `"cluster"`): What has a name.
            caption (`str`, *optional*): Stands above.
        """
        order = np.argsort(-scores, kind="stable")
        shown = [*order[:k], *order[len(order) - k :]] if len(order) > 2 * k else list(order)
        low, high = min(0.0, float(scores[shown].min())), max(0.0, float(scores[shown].max()))
        percent = 100 / ((high - low) or 1.0)
        zero = -low * percent
        lines = []
        for position, index in enumerate(shown):
            if position == k and len(shown) < len(order):
                lines.append(f'<tr><td class="more" colspan="3">{len(order) - len(shown)} more between</td></tr>')
            value = float(scores[index])
            width = abs(value) * percent
            left, side = (zero, "up") if value >= 0 else (zero - width, "down")
            place = f"left:{left:.2f}%;width:{width:.2f}%"
            lines.append(
                f'<tr><th scope="row">{_escaped(str(names[index]))}</th><td class="number">{signed(value)}</td>'
                f'<td class="bar"><span class="track"><span class="{side}" style="{place}"></span>'
                f'<span class="zero" style="left:{zero:.2f}%"></span></span></td></tr>'
            )
        titled = f"<caption>{_escaped(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<table class="bars">{titled}<colgroup><col class="name"><col class="score"><col></colgroup><thead><tr>'
            f'<th scope="col">{_escaped(what)}</th><th scope="col" class="number">score</th>'
            '<th scope="col">lowers | raises</th></tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
        )

    def cards(self, cards: Sequence[Card], *, heading: str = "") -> None:
        """Adds pictures and texts that flow into lines, below a heading of their own."""
        self._parts.append(_cards(heading, cards))

    def beside(self, groups: Mapping[str, Sequence[Card]]) -> None:
        """Adds groups of cards beside each other where the page is wide enough, each below its heading."""
        columns = "".join(f"<div>{_cards(heading, cards)}</div>" for heading, cards in groups.items())
        self._parts.append(f'<div class="beside">{columns}</div>')

    def to_html(self) -> str:
        """The section as an HTML fragment."""
        return f"<section>\n<h2>{_escaped(self.heading)}</h2>\n" + "\n".join(self._parts) + "\n</section>"


def heading_html(title: str) -> str:
    """The title of a page as a fragment."""
    return f'<div class="rgm"><h1>{_escaped(title)}</h1></div>'


def banner_html(lines: Sequence[str]) -> str:
    """Lines that stay in sight as a fragment."""
    return f'<div class="rgm">{paragraphs(lines)}</div>'


def paragraphs(texts: Sequence[str]) -> str:
    """Texts as escaped paragraphs."""
    return "".join(f"<p>{_escaped(text)}</p>" for text in texts)


def signed(value: float) -> str:
    """A score in three digits, with its sign."""
    return f"{value:+.3g}".replace("-", "−")


def _cards(heading: str, cards: Sequence[Card]) -> str:
    above = f"<h3>{_escaped(heading)}</h3>" if heading else ""
    return f'{above}<ul class="cards">{"".join(map(_card, cards))}</ul>'


def _card(card: Card) -> str:
    picture = "" if card.picture is None else _image(card.picture, ", ".join([card.title, *card.note.splitlines()]))
    text = f"<blockquote>{_escaped(card.text)}</blockquote>" if card.text else ""
    note = f"<span>{_escaped(card.note)}</span>" if card.note else ""
    kind = "" if card.picture is None else ' class="picture"'
    return f"<li{kind}>{picture}{text}<strong>{_escaped(card.title)}</strong>{note}</li>"


def _image(png: bytes, description: str) -> str:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"`png` must be the bytes of a PNG file, got {png[:8]!r}. Convert the picture first.")
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img alt="{_escaped(description)}" src="data:image/png;base64,{encoded}">'


def _escaped(text: str) -> str:
    """Text without markup, and without characters that control anything but lines."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return _escaped(f"{value:.4g}")
    return _escaped(str(value))
