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
from matplotlib.axes import Axes

from hf_rgm.files.reading import printable
from hf_rgm.files.writing import replacing

STYLE, PAGE_STYLE = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "page.css"))

# Markup that slips through the escaping is neither run nor fetched by the browser.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main class="rgm">
<h1>{title}</h1>
<div class="banner">{banner}</div>
{sections}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Card:
    """A picture (PNG) or a text, with a title above a label and notes."""

    title: str = ""
    picture: bytes | None = None
    text: str = ""
    label: str | None = None
    notes: Sequence[str] = ()

    @property
    def note(self) -> str:
        """Label and notes, a line each."""
        return "\n".join([*([] if self.label is None else [f"label {self.label}"]), *self.notes])

    def to_html(self) -> str:
        """The card as an item of a list."""
        words = f"<strong>{escaped(self.title)}</strong>{_tagged('span', self.note)}</li>"
        if self.picture is None:
            return f"<li>{_tagged('blockquote', self.text)}{words}"
        return f'<li class="picture">{_image(self.picture, ", ".join([self.title, *self.note.splitlines()]))}{words}'


class HtmlReport:
    """A page made of `sections`: data is escaped, pictures are inside the file, `banner` stays in sight."""

    def __init__(self, title: str, *, banner: Sequence[str] = ()) -> None:
        self.title = title
        self.banner = banner
        self.sections: list[Section] = []

    def section(self, heading: str) -> Section:
        """Appends an empty section and returns it, to be filled."""
        self.sections.append(Section(heading))
        return self.sections[-1]

    def to_html(self) -> str:
        """The whole page."""
        return PAGE.format(
            policy=POLICY,
            title=escaped(self.title),
            style=STYLE + PAGE_STYLE,
            banner=paragraphs(self.banner),
            sections="\n".join(section.to_html() for section in self.sections),
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

    def table(self, columns: Iterable[Any], rows: Iterable[Sequence[Any]], *, caption: str = "") -> None:
        """Adds a table; numbers get four digits, columns of numbers are aligned."""
        columns, lines = list(columns), [list(row) for row in rows]
        numeric = [bool(lines) and all(isinstance(line[i], Real) for line in lines) for i in range(len(columns))]
        mark = [' class="number"' if flag else "" for flag in numeric]

        def cells(tag: str, scope: str, values: Sequence[Any]) -> str:
            texts = [f"{v:.4g}" if isinstance(v, float | np.floating) else str(v) for v in values]
            return "".join(f"<{tag}{scope}{m}>{escaped(v)}</{tag}>" for v, m in zip(texts, mark, strict=True))

        head = cells("th", ' scope="col"', columns)
        body = "\n".join(f"<tr>{cells('td', '', line)}</tr>" for line in lines)
        self._parts.append(
            f'<div class="scroll"><table>{_tagged("caption", caption)}<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )

    def figure(self, axes: Axes, *, caption: str = "") -> None:
        """Adds the figure of matplotlib axes."""
        buffer = io.BytesIO()
        drawn: Any = axes.figure
        drawn.savefig(buffer, format="png", dpi=110)
        self._parts.append(f"<figure>{_image(buffer.getvalue(), caption)}{_tagged('figcaption', caption)}</figure>")

    def bars(self, names: Sequence[Any], scores: np.ndarray, *, k: int, caption: str, maximize: bool = True) -> None:
        """Adds the `k` highest and lowest scores, `(len(names),)`, as a table with bars: right of zero, blue helps."""
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
            left = zero if value >= 0 else zero - width
            side = "helps" if (value >= 0) == maximize else "harms"
            place = f"left:{left:.2f}%;width:{width:.2f}%"
            lines.append(
                f'<tr><th scope="row">{escaped(str(names[index]))}</th><td class="number">{signed(value)}</td>'
                f'<td class="bar"><span class="track"><span class="{side}" style="{place}"></span>'
                f'<span class="zero" style="left:{zero:.2f}%"></span></span></td></tr>'
            )
        self._parts.append(
            f'<table class="bars">{_tagged("caption", caption)}<colgroup><col class="name"><col class="score"><col>'
            '</colgroup><thead><tr><th scope="col">cluster</th><th scope="col" class="number">score</th>'
            '<th scope="col">lowers | raises</th></tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
        )

    def cards(self, groups: Mapping[str, Sequence[Card]]) -> None:
        """Adds groups of cards beside each other, each below its heading."""
        columns = "".join(
            f'<div>{_tagged("h3", heading)}<ul class="cards">{"".join(card.to_html() for card in cards)}</ul></div>'
            for heading, cards in groups.items()
        )
        self._parts.append(f'<div class="beside">{columns}</div>')

    def to_html(self) -> str:
        """The section as an HTML fragment."""
        return f"<section>\n<h2>{escaped(self.heading)}</h2>\n" + "\n".join(self._parts) + "\n</section>"


def fragment(content: str) -> str:
    """HTML in the style of the pages, for other pages."""
    return f'<div class="rgm">{content}</div>'


def paragraphs(texts: Sequence[str]) -> str:
    """Texts as escaped paragraphs."""
    return "".join(f"<p>{escaped(text)}</p>" for text in texts)


def signed(value: float) -> str:
    """A score in three digits, with its sign."""
    return f"{value:+.3g}".replace("-", "−")


def escaped(text: str) -> str:
    """Text without markup and control characters; line breaks stay."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def _image(png: bytes, description: str) -> str:
    return f'<img alt="{escaped(description)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>{escaped(text)}</{tag}>" if text else ""
