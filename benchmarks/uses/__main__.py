"""
Uses of attributions, measured by retraining.

    python -m benchmarks.uses --task digits                          # mislabels, brittleness, mixture
    python -m benchmarks.uses --task vendors_lora --uses vendors --methods "kronfluence EK-FAC"
    python -m benchmarks.uses --task digits --uses mixture

Writes benchmarks/results/uses-<task>.json; a use that is run again replaces its part. Settings of methods that have
several are those that `benchmarks.run` chose on the tuning queries.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import transformers

from benchmarks import truth as ground_truth
from benchmarks.methods import METHODS
from benchmarks.recorded import Recorded
from benchmarks.report import RESULTS, environment, versions
from benchmarks.uses import brittleness, mislabels, mixture, vendors
from hf_rgm.files.writing import write_json

FORMAT_VERSION = 1
USES = {"mislabels": mislabels.run, "brittleness": brittleness.run, "mixture": mixture.run, "vendors": vendors.run}
DEFAULT_METHODS = ("adjoint", "gradient cosine")


def main(task_name: str, uses: list[str], method_names: list[str]) -> None:
    """Measures the uses and writes each as soon as it is done."""
    task = ground_truth.load_task(task_name)
    path = RESULTS / f"uses-{task.name}.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    report |= {"format_version": FORMAT_VERSION, "task": task.name}
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded(task, Path(folder) / "trajectory")
        for use in uses:
            print(f"{task.name}, {use}:", flush=True)
            start = time.perf_counter()
            figures = USES[use](recorded, method_names)
            report[use] = {
                "figures": figures,
                "seconds": time.perf_counter() - start,
                "environment": environment(),
                "versions": versions(),
            }
            write_json(path, report)
    print(f"Written to {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--uses", nargs="+", default=["mislabels", "brittleness", "mixture"], choices=USES)
    parser.add_argument("--methods", nargs="*", default=list(DEFAULT_METHODS), choices=METHODS, metavar="METHOD")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    main(arguments.task, arguments.uses, arguments.methods)
