"""Runs the examples in the package's docstrings."""

import doctest
import importlib
import pkgutil
import re

import pytest

import hf_rgm

MODULES = [hf_rgm.__name__, *(module.name for module in pkgutil.walk_packages(hf_rgm.__path__, "hf_rgm."))]


class FencedParser(doctest.DocTestParser):
    """Examples stand in Markdown fences, which doctest would take for expected output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^\s*```.*$", "", string, flags=re.MULTILINE), name)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(parser=FencedParser(), exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in finder.find(importlib.import_module(name)):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
