"""The README's commands run as printed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from hf_rgm import AttributionResult

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_commands(invoke, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in (
        (files.trajectory, "trajectory"),
        (files.model, "my-model"),
        (files.train, "train.parquet"),
        (files.queries, "queries.parquet"),
    ):
        (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, name)
    block = re.search(r"<!-- commands -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    by_rows, distill, attribute = (line.split()[1:] for line in block[1].splitlines())
    for command in (by_rows, [*distill, "--num-iterations", "5"], attribute):
        result = invoke(*command)
        assert result.exit_code == 0, result.output
    for folder in ("by-rows", "my-attributions"):
        assert AttributionResult.from_pretrained(folder).scores.shape == (4, 3)
    assert Path("report.html").stat().st_size > 10_000
    assert json.loads(invoke("info", "my-synset", "--json").stdout)["whole"]
