"""Names of clusters and queries: how long they may be, and which look like others."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from hf_rgm.files.reading import printable, shortened

logger = logging.getLogger(__name__)

MAX_NAME = 20_000
INVISIBLE = dict.fromkeys([0x34F, 0x200C, 0x200D, *range(0xFE00, 0xFE10)]) | dict.fromkeys(
    [0x115F, 0x1160, 0x2800, 0x3164, 0xFFA0], " "
)
"""What shows nothing, or a space, and is neither a control character nor a space."""

LOOK_ALIKE = str.maketrans(
    "АВЕЅІЈКМНОРСТУХаесоруѕіјхԁһԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧονρ", "ABESIJKMHOPCTYXaecopysijxdhqwABEZHIKMNOPTYXovp"
)
"""Cyrillic and Greek letters, and the Latin ones that they look like."""


def checked_names(names: Iterable[object], what: str) -> list[str]:
    """Names without control characters; refuses those that are longer than any page can show."""
    texts = list(map(str, names))
    for name in texts:
        if len(name) > MAX_NAME:
            raise ValueError(
                f"A name of {what} has {len(name)} characters, {shortened(name, 40)!r}; it may have {MAX_NAME}. "
                "Shorten it."
            )
    return list(map(printable, texts))


def warn_of_names(names: Sequence[str], source: object) -> None:
    """Warns of names that show nothing, and of names that look like others."""
    shapes: dict[str, str] = {}
    odd = [ascii(name) for name in names if shapes.setdefault(_shape(name), name) != name or not _shape(name)]
    if odd:
        logger.warning(
            "The names %s of clusters in %s show nothing, or look like those of others. Rename them.",
            *(", ".join(odd[:5])[:1000], source),
        )


def _shape(name: str) -> str:
    """What a name looks like: spaces, letters and invisible characters that look alike are the same."""
    if not name.isascii():
        name = unicodedata.normalize("NFKC", name.translate(INVISIBLE)).translate(LOOK_ALIKE)
    return " ".join(name.split())
