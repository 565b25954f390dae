import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "program",
    [
        "import hf_rgm; from transformers import pipeline",
        "from transformers import pipeline; import hf_rgm",
        "import hf_rgm; hf_rgm.AttributionPipeline; from transformers import pipeline",
        "import hf_rgm, importlib; importlib.reload(hf_rgm); import transformers.pipelines",
        "import hf_rgm, importlib.util as u; u.find_spec('transformers.pipelines'); import transformers.pipelines",
    ],
)
def test_importing_the_package_makes_the_task_known(program):
    check = "from transformers.pipelines import PIPELINE_REGISTRY as r; print(r.check_task('data-attribution')[0])"
    found = subprocess.run([sys.executable, "-c", f"{program}; {check}"], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == ["data-attribution"], found.stderr


def test_importing_the_package_or_the_commands_loads_nothing_heavy():
    program = "import sys, hf_rgm.cli; print(*{'torch', 'transformers', 'datasets', 'pandas'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == [], found.stderr


def test_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'hf_rgm' has no attribute 'Nothing'"):
        hf_rgm.Nothing  # noqa: B018
    assert {*hf_rgm.__all__} <= {*dir(hf_rgm)}
