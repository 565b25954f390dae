import re
from pathlib import Path

import hf_rgm

ROOT = Path(__file__).parents[1]


def test_version_is_the_one_in_pyproject():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert declared is not None
    assert hf_rgm.__version__ == declared[1]


def test_public_names_are_few_sorted_and_there():
    assert len(hf_rgm.__all__) <= 12
    assert list(hf_rgm.__all__) == sorted(hf_rgm.__all__)
    assert all(hasattr(hf_rgm, name) for name in hf_rgm.__all__)
