"""
Writes the tables of README.md and docs/, and all of docs/benchmarks.md, from the JSON files under benchmarks/results/.

    python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import estimates, stopping, token_inputs
from benchmarks.formats import figure, markdown, ratio, size
from benchmarks.growth_plots import growth_table
from benchmarks.report import FORMAT_VERSION, RESULTS, ROOT
from benchmarks.uses.tables import uses_tables, vendors

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
COLUMNS = {"leave_cluster_out": "leave-cluster-out", "lds_clusters": "LDS clusters", "lds_rows": "LDS rows"}
ALL_COLUMNS = COLUMNS | {"leave_cluster_out_pearson": "leave-cluster-out, Pearson"}
DISTANCES = {"softmax_l2": "L2 of softmax", "cross_entropy": "cross entropy", "logits_l2": "L2 of logits"}
SINGLE_RUN = {
    "leave_cluster_out": "leave-cluster-out",
    "lds_removals": "LDS of 1% removals",
    "lds_halves": "LDS of half of the rows",
}
PARTS = {"leave_out": "one cluster left out", "halves": "half of the clusters"}

TASKS = ("digits", "fashion", "sentences", "lm")
BETWEEN = "(<!-- engines:begin -->).*?(<!-- engines:end -->)"

README_METHODS = {
    "without a synset": "**hf_rgm**, with the rows",
    "synset alone": "**hf_rgm**, a synset alone",
    "kronfluence EK-FAC": "EK-FAC (kronfluence)",
    "dattri influence, CG": "influence, CG (dattri)",
    "TRAK, 5 models": "TRAK, 5 models",
    "gradient cosine": "gradient cosine",
}
"""Methods in README.md, and what they are called there."""

DOCUMENTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "stopping": ("method.md", stopping.table),
    "token_inputs": ("choosing.md", token_inputs.table),
    "estimates": ("scaling.md", estimates.table),
}
"""Pages under docs/ that have a table of a result."""

INTRODUCTION = """\
<!-- Written by `python -m benchmarks.tables` from benchmarks/results/; do not edit. -->
# Benchmarks

How well attribution methods agree with retraining, and what they cost. How to run them, and what each figure is, is
told in [benchmarks/README.md](../benchmarks/README.md). Brackets are 95% bootstrap intervals over queries and clusters
or subsets. The *noise ceiling* is one seed's retraining scored against the other seeds. Where a method has several
settings, the one that is reported was chosen on other queries.

**In the sections by task, lines of this library are of its engines before the linear one
([CHANGELOG](../CHANGELOG.md)), and costs are wall time: both are to be measured anew. Those of `vendors_lora`
and `vendors_full` are of the present engine, in CPU time.**
"""

GROWTH = """
## Growth of costs

Fashion-MNIST: one quantity grows while the others stay at 10,000 rows, 50 clusters and 20,490 parameters. Times are
CPU time relative to one training of {num_steps} steps at the same point, whatever the number of rows; longer trainings
make these ratios smaller. Distilling is that of the default number of iterations; scoring is that of {num_queries}
queries by the default engine without the training rows. {which} measured in part and scaled up, see
[benchmarks/growth.py](../benchmarks/growth.py). Exponents are those of power laws fitted to all points, and the slopes
between the last two.

![Costs against rows, clusters and parameters, with fitted power laws](growth.png)

{table}
"""

Row = tuple[str, dict[str, Any]]


def scored(report: dict[str, Any]) -> list[Row]:
    """Names and entries of the methods that have figures."""
    return [(name, entry) for name, entry in report["methods"].items() if "error" not in entry]


def label(report: dict[str, Any], name: str, entry: dict[str, Any]) -> str:
    """A method's name, with its number of queries where it was not scored on all."""
    count = entry["num_queries"]
    return name if count == report["identity"]["num_queries"] else f"{name} ({count} queries)"


def fidelity(report: dict[str, Any], methods: Sequence[Row], columns: dict[str, str], *, costs: bool) -> str:
    """The table of some methods' agreement with retraining, the ceiling first."""
    titles = [f"{report['identity']['task']}, {report['identity']['num_queries']} queries", *columns.values()]
    ceiling = ["*noise ceiling*", *(figure(report["noise_ceiling"], key) for key in columns)]
    rows = [
        [label(report, name, entry), *(figure(entry["figures"], key) for key in columns)] for name, entry in methods
    ]
    if costs:
        titles += ["offline / training", "online / retraining"]
        ceiling += ["", ""]
        for row, (_, entry) in zip(rows, methods, strict=True):
            row += [ratio(entry["costs"][key]) for key in ("offline_over_training", "online_over_retraining")]
    return markdown(titles, [ceiling, *rows])


def first_queries(report: dict[str, Any]) -> str:
    """All methods on the queries that even those with dear ones were scored on, if there are such methods."""
    if all(entry["num_queries"] == report["identity"]["num_queries"] for _, entry in scored(report)):
        return ""
    block = report["first_queries"]
    titles = [f"{report['identity']['task']}, first {block['num_queries']} queries", *COLUMNS.values()]
    rows = [["*noise ceiling*", *(figure(block["noise_ceiling"], key) for key in COLUMNS)]]
    for name, entry in scored(report):
        rows.append([name, *(figure(entry["first_queries"]["figures"], key) for key in COLUMNS)])
    return markdown(titles, rows)


def distances(report: dict[str, Any]) -> str:
    """Distances between the outputs of perturbed and of retrained models."""
    titles = ["outputs", *(f"{part}: {measure}" for part in PARTS.values() for measure in DISTANCES.values())]
    references = [
        ("*another seed's retraining*", report["noise_ceiling"]),
        ("*the trained model as it is*", report["unperturbed"]),
    ]
    methods = [(label(report, name, entry), entry["figures"]) for name, entry in scored(report)]
    rows = [
        [name, *(figure(values["distances"][part], key) for part in PARTS for key in DISTANCES)]
        for name, values in references + methods
        if values.get("distances")
    ]
    return markdown(titles, rows)


def single_run(report: dict[str, Any]) -> str:
    """Agreement with the recorded run itself, had it not seen some rows."""
    found = report.get("single_run")
    if found is None:
        return ""
    rows = [
        [label(found, name, entry), *(figure(entry["figures"], key) for key in SINGLE_RUN)]
        for name, entry in found["methods"].items()
    ]
    titles = [f"{found['identity']['task']}, {found['identity']['num_queries']} queries", *SINGLE_RUN.values()]
    return markdown(titles, rows)


def costs(report: dict[str, Any]) -> str:
    """What the methods cost."""
    titles = [
        "method",
        "offline / training",
        "online / retraining",
        "queries",
        "one model / retraining",
        "kept",
        "peak memory",
    ]
    rows = [
        [
            name,
            ratio(cost["offline_over_training"]),
            ratio(cost["online_over_retraining"]),
            str(entry["num_queries"]),
            ratio(cost["model_over_retraining"]),
            size(cost["kept_bytes"]),
            size(cost["peak_bytes"]),
        ]
        for name, entry in scored(report)
        for cost in (entry["costs"],)
    ]
    return markdown(titles, rows)


def grids(report: dict[str, Any]) -> str:
    """Every setting of the methods that were tuned, on the tuning queries."""
    rows = []
    for name, entry in report["methods"].items():
        tuning = entry.get("tuning")
        for setting, values in tuning["settings"].items() if tuning else ():
            chosen = "**" if setting == tuning["chosen"] else ""
            figures = (
                [f"{values['mean']:.3f}", *(figure(values, key) for key in COLUMNS)]
                if "mean" in values
                else [values["error"], "", "", ""]
            )
            rows.append([name, f"{chosen}{setting}{chosen}", str(tuning["num_queries"]), *figures])
    return markdown(["method", "setting", "tuning queries", "mean", *COLUMNS.values()], rows)


def run_conditions(report: dict[str, Any]) -> str:
    """Commits, machines and versions."""
    seeds = ", ".join(str(seed) for seed in report["seeds"]["truth"])
    recorded = f"seed {report['seeds']['recorded']}, {report['num_states']} states"
    lines = [f"Recorded run: {recorded}; truth: mean of seeds {seeds}."]
    by_environment: dict[str, list[str]] = {}
    for name, entry in report["methods"].items():
        where = entry["environment"]
        commit = (where["commit"] or "unknown")[:12] + (
            " with uncommitted changes" if where["uncommitted_changes"] else ""
        )
        description = f"commit {commit}, {where['processor']}, {where['threads']} of {where['cores']} cores"
        by_environment.setdefault(description, []).append(name)
    for description, names in by_environment.items():
        which = "All methods" if len(by_environment) == 1 else "; ".join(names)
        lines.append(f"{which}: {description}.")
    lines.append("Versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".")
    return "\n\n".join(lines)


def failures(report: dict[str, Any]) -> str:
    """Methods without figures, and why."""
    return "\n".join(f"- {name}: {entry['error']}" for name, entry in report["methods"].items() if "error" in entry)


def page(
    reports: Sequence[dict[str, Any]],
    growth: dict[str, Any] | None = None,
    found_vendors: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """All of docs/benchmarks.md: vendors that mislabel, a section for each task, and the growth of costs."""
    sections: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
        ("Agreement with retraining", "Spearman correlations, unless it says Pearson.", _all_methods),
        ("First queries", "All methods on the queries that those with dear queries were scored on.", first_queries),
        (
            "Single-run truth",
            "Against retraining from the same initial parameters with the same batches in the same order.",
            single_run,
        ),
        (
            "Uses",
            "What the scores are good for, each checked by retraining.",
            lambda report: uses_tables(report["uses"]) if "uses" in report else "",
        ),
        (
            "Outputs of perturbed models",
            "Mean distance between the outputs of a perturbed model and of a retrained one, for methods that give "
            "models; smaller is better.",
            distances,
        ),
        (
            "Costs",
            "Times relative to one training in the same run; online: all scores of these queries for one objective; "
            "kept: what is stored between the offline and the online part beside the model and the training rows; "
            "peak memory: beyond what the process held before.",
            costs,
        ),
        ("Settings", "Chosen by the mean of the figures on tuning queries (bold).", grids),
        ("Failed", "Methods that did not run.", failures),
        ("Conditions", "", run_conditions),
    ]
    text = INTRODUCTION
    if found_vendors:
        text += f"\n## A vendor that mislabels\n\n{vendors(found_vendors)}\n"
    for report in reports:
        text += f"\n## {report['identity']['task']}\n"
        for title, explanation, render in sections:
            content = render(report)
            if not content:
                continue
            text += f"\n### {title}\n\n" + (f"{explanation}\n\n" if explanation else "") + content + "\n"
    table = growth_table(growth) if growth else ""
    if not growth or not table:
        return text
    # Replays of earlier results were too dear to follow whole.
    which = "Both were" if "rewind" in growth["identity"] else "Distilling was"
    return text + GROWTH.format(**growth["identity"], which=which, table=table)


def _all_methods(report: dict[str, Any]) -> str:
    return fidelity(report, scored(report), ALL_COLUMNS, costs=False)


def readme_table(reports: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> str:
    """Agreement and cost of a few methods on all tasks; †: from earlier runs, whose costs are wall time."""
    tasks = [report["identity"]["task"] for report in reports]
    known = {report["identity"]["task"]: report for report in earlier}
    rows = [["*noise ceiling*", *(_agreement(report["noise_ceiling"]) for report in reports)]]
    for method, title in README_METHODS.items():
        cells = []
        for task, report in zip(tasks, reports, strict=True):
            sources = ((report, ""), (known[task], "†")) if task in known else ((report, ""),)
            entries = [(found, mark) for source, mark in sources if (found := dict(scored(source)).get(method))]
            cells.append(_agreement_and_cost(*entries[0]) if entries else "")
        rows.append([title, *cells])
    return markdown(["", *tasks], rows)


def _agreement(figures: dict[str, Any]) -> str:
    return " / ".join(f"{figures[key]['value']:.2f}" if figures.get(key) else "–" for key in COLUMNS)


def _agreement_and_cost(entry: dict[str, Any], mark: str) -> str:
    costs = entry["costs"]
    trainings = (costs["offline_over_training"] or 0.0) + (costs["online_over_retraining"] or 0.0)
    return f"{_agreement(entry['figures'])} for {ratio(trainings)}{mark}"


def read(folder: Path) -> list[dict[str, Any]]:
    """
    The reports on reported queries, by task, each with what else is known of the task, if it was measured:
    single-run truth as `"single_run"`, uses of attributions as `"uses"`.

    Raises:
        ValueError: If one was written in another format; says how to write it again.
    """
    reports = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report.get("identity", report).get("queries") != "reported":
            continue
        if report.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {report.get('format_version')}, not {FORMAT_VERSION}. Write it again with "
                f"python -m benchmarks.run --task {path.stem} --anew."
            )
        for key, prefix in (("single_run", "single-run"), ("uses", "uses")):
            found = read_if_there(folder / f"{prefix}-{path.stem}.json")
            if found is not None:
                report[key] = found
        reports.append(report)
    return reports


def read_vendors(folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of vendors that mislabel, by task."""
    reports = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("uses-*.json")))
    return {report["task"]: report["vendors"]["figures"] for report in reports if "vendors" in report}


def read_engines(folder: Path) -> list[dict[str, Any]]:
    """The reports of the present engines, in the order of README.md."""
    return sorted(read(folder), key=lambda report: TASKS.index(report["identity"]["task"]))


def read_if_there(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or `None`."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def fill(text: str, name: str, table: str) -> str:
    """A page with a table between `<!-- name -->` and `<!-- end -->`."""
    begin, end = f"<!-- {name} -->", "<!-- end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    found = read(RESULTS)
    readme = README.read_text(encoding="utf-8")
    engines = readme_table(read_engines(RESULTS / "engines"), found)
    readme = re.sub(BETWEEN, lambda match: f"{match[1]}\n{engines}\n{match[2]}", readme, flags=re.DOTALL)
    README.write_text(readme, encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found, read_if_there(RESULTS / "growth.json"), read_vendors(RESULTS)), encoding="utf-8")
    for name, (document, table) in DOCUMENTS.items():
        measured = read_if_there(RESULTS / f"{name}.json")
        if measured is not None:
            path = PAGE.with_name(document)
            text = fill(path.read_text(encoding="utf-8"), name, table(measured["methods"]))
            path.write_text(text, encoding="utf-8")
