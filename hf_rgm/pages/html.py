"""Pages as one HTML file each: text, tables and pictures, without scripts or anything to fetch."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_rgm.files.reading import printable
from hf_rgm.files.writing import replacing

STYLE, PAGE_STYLE = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "page.css"))

# Markup that slips through the escaping is neither run nor fetched by the browser.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Card:
    """A picture (PNG) or a text, with a title above a note."""

    title: str
    picture: bytes | None = None
    text: str = ""
    note: str = ""


class HtmlReport:
    """A page made of sections: data is escaped, pictures are inside the file, `banner` stays in sight."""

    def __init__(self, title: str, *, lead: str = "", banner: Sequence[str] = ()) -> None:
        self.title = title
        self.lead = lead
        self.banner = banner
        self._sections: list[Section] = []

    def section(self, heading: str) -> Section:
        """Appends an empty section and returns it, to be filled."""
        return self.add(Section(heading))

    def add(self, section: Section) -> Section:
        """Appends a section and returns it."""
        self._sections.append(section)
        return section

    def to_html(self) -> str:
        """The whole page."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_escaped(self.title)}</title>\n<style>{STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n"
            f'<main class="rgm">\n{heading(self.title)}\n'
            + (f'<p class="lead">{_escaped(self.lead)}</p>\n' if self.lead else "")
            + (f'<div class="banner">{paragraphs(self.banner)}</div>\n' if self.banner else "")
            + "\n".join(section.to_html() for section in self._sections)
            + "\n</main>\n"
            "</body>\n</html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Writes the page, replacing an older one; returns the path."""
        path = Path(path)
        with replacing(path) as temporary:
            temporary.write_text(self.to_html(), encoding="utf-8")
        return path


class Section:
    """A part of an [`HtmlReport`]; content appears in the order it is added."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self._parts: list[str] = []

    def text(self, text: str) -> None:
        """Adds a paragraph, or several divided by empty lines."""
        self._parts.append(paragraphs(text.split("\n\n")))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> None:
        """Adds a table; numbers get four digits."""
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
        self._parts.append(
            f'<div class="scroll"><table>{_tagged("caption", caption)}<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )

    def frame(self, frame: pd.DataFrame, *, caption: str = "") -> None:
        """Adds a data frame as a table."""
        self.table([str(name) for name in frame.columns], frame.itertuples(index=False), caption=caption)

    def figure(self, drawing: Axes | Figure, *, caption: str = "") -> None:
        """Adds a matplotlib figure, or that of some axes."""
        figure: Any = drawing.figure
        buffer = io.BytesIO()
        figure.figure.savefig(buffer, format="png", dpi=110)  # of a subfigure, the whole figure
        self.image(buffer.getvalue(), caption=caption)

    def image(self, png: bytes, *, caption: str = "") -> None:
        """Adds a PNG."""
        self._parts.append(f"<figure>{_image(png, caption)}{_tagged('figcaption', caption)}</figure>")

    def bars(
        self, names: Sequence[Any], scores: np.ndarray, *, k: int = 8, what: str = "cluster", caption: str = ""
    ) -> None:
        """Adds the `k` highest and lowest scores, `(len(names),)`, as a table with bars; right of zero is positive."""
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
        self._parts.append(
            f'<table class="bars">{_tagged("caption", caption)}<colgroup><col class="name"><col class="score"><col>'
            f'</colgroup><thead><tr><th scope="col">{_escaped(what)}</th><th scope="col" class="number">score</th>'
            '<th scope="col">lowers | raises</th></tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
        )

    def cards(self, cards: Sequence[Card], *, heading: str = "") -> None:
        """Adds cards that flow into lines below a heading."""
        self._parts.append(_cards(heading, cards))

    def beside(self, groups: Mapping[str, Sequence[Card]]) -> None:
        """Adds groups of cards beside each other, each below its heading."""
        columns = "".join(f"<div>{_cards(heading, cards)}</div>" for heading, cards in groups.items())
        self._parts.append(f'<div class="beside">{columns}</div>')

    def to_html(self) -> str:
        """The section as an HTML fragment."""
        return f"<section>\n<h2>{_escaped(self.heading)}</h2>\n" + "\n".join(self._parts) + "\n</section>"


def fragment(content: str) -> str:
    """HTML in the style of the pages, for other pages."""
    return f'<div class="rgm">{content}</div>'


def heading(title: str) -> str:
    """The escaped title of a page."""
    return f"<h1>{_escaped(title)}</h1>"


def paragraphs(texts: Sequence[str]) -> str:
    """Texts as escaped paragraphs."""
    return "".join(f"<p>{_escaped(text)}</p>" for text in texts)


def signed(value: float) -> str:
    """A score in three digits, with its sign."""
    return f"{value:+.3g}".replace("-", "−")


def _cards(heading: str, cards: Sequence[Card]) -> str:
    return f'{_tagged("h3", heading)}<ul class="cards">{"".join(map(_card, cards))}</ul>'


def _card(card: Card) -> str:
    picture = "" if card.picture is None else _image(card.picture, ", ".join([card.title, *card.note.splitlines()]))
    kind = "" if card.picture is None else ' class="picture"'
    title = f"<strong>{_escaped(card.title)}</strong>"
    return f"<li{kind}>{picture}{_tagged('blockquote', card.text)}{title}{_tagged('span', card.note)}</li>"


def _image(png: bytes, description: str) -> str:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"`png` must be the bytes of a PNG file, got {png[:8]!r}. Convert the picture first.")
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img alt="{_escaped(description)}" src="data:image/png;base64,{encoded}">'


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>{_escaped(text)}</{tag}>" if text else ""


def _escaped(text: str) -> str:
    """Text without markup and control characters; line breaks stay."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return _escaped(f"{value:.4g}")
    return _escaped(str(value))
