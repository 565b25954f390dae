"""The reference page is made from the docstrings and has every public name."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import hf_rgm

ROOT = Path(__file__).parents[1]


class Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.found.update(value for name, value in attrs if name == "id" and value)


def test_every_public_name_and_method_is_there(tmp_path):
    command = [sys.executable, "-m", "pdoc", "-o", str(tmp_path), "-d", "google", "hf_rgm", r"!hf_rgm\."]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    text = (tmp_path / "hf_rgm.html").read_text(encoding="utf-8")
    page = Ids()
    page.feed(text)
    assert set(hf_rgm.__all__) <= page.found
    for name in hf_rgm.__all__:
        own = [member for member in vars(getattr(hf_rgm, name)) if not member.startswith("_")]
        methods = {f"{name}.{member}" for member in own if getattr(getattr(hf_rgm, name), member).__doc__}
        assert {m for m in methods if callable(getattr(getattr(hf_rgm, name), m.split(".")[1]))} <= page.found
    assert "score = f(with) - f(without)" in text
