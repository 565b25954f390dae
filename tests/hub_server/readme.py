"""The Hub's check of a README's YAML header, for the keys that matter here. Unknown keys pass, as on the Hub."""

from __future__ import annotations

import re
from typing import Any

import yaml

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0
    openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
_HEADER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLIT = re.compile(r"\w+(\.\w+)*")
_TEXTS = ("tags", "language", "metrics", "task_categories", "task_ids", "size_categories", "annotations_creators")
_IDS = {"base_model": "model", "datasets": "dataset"}


def card_data(content: str) -> dict[str, Any]:
    """The YAML header of a README; empty where there is none or it is broken."""
    header = _HEADER.match(content)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def check_readme(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """
    Checks a README as `POST /api/validate-yaml` does.

    Returns:
        `(errors, warnings)`: messages; a README with errors is refused.
    """
    header = _HEADER.match(content)
    if header is None:
        if re.match(r"\s*---", content):
            return ["The metadata block at the top of the README is not closed by a line of `---`."], []
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata is not valid: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"YAML metadata must be a mapping, got {type(data).__name__}"], []
    errors: list[str] = []
    for key in _TEXTS:
        if key in data and _texts(data[key]) is None:
            errors.append(f'"{key}" must be a string or a list of strings')
    for key in ("library_name", "pipeline_tag", "pretty_name", "license_name", "license_link"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for key, what in _IDS.items():
        values = _texts(data.get(key, []))
        if values is None:
            errors.append(f'"{key}" must be a {what} id or a list of {what} ids')
        errors += [
            f'"{key}" with value "{value}" is not valid. Use a {what} id from https://hf.co/{what}s.'
            for value in values or []
            if not _REPO_ID.fullmatch(value) or "--" in value or ".." in value
        ]
    errors += _license_errors(data)
    errors += _model_index_errors(data)
    if repo_type == "dataset":
        errors += _config_errors(data)
    return errors, []


def _texts(value: Any) -> list[str] | None:
    """The strings in `value`, a string or a list of strings; `None` if it is neither."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        return None
    return values


def _license_errors(data: dict[str, Any]) -> list[str]:
    if "license" not in data:
        return []
    licenses = _texts(data["license"])
    if not licenses or not LICENSES.issuperset(licenses):
        return [f'"license" must be one of [{", ".join(sorted(LICENSES))}], got {data["license"]!r}']
    return []


def _model_index_errors(data: dict[str, Any]) -> list[str]:
    entries = data.get("model-index", [])
    if not isinstance(entries, list):
        return ['"model-index" must be an array']
    return [
        f'"model-index[{index}]" must have a "name" and an array of "results"'
        for index, entry in enumerate(entries)
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and "results" in entry)
    ]


def _config_errors(data: dict[str, Any]) -> list[str]:
    configs = data.get("configs", [])
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        return ['"configs" must be an array of objects']
    errors = []
    names = [config.get("config_name", "default") for config in configs]
    for index, config in enumerate(configs):
        where = f'"configs[{index}]'
        if not isinstance(names[index], str):
            errors.append(f'{where}.config_name" must be a string')
        if not isinstance(config.get("default", False), bool):
            errors.append(f'{where}.default" must be a boolean')
        if "data_files" in config and not _data_files_fit(config["data_files"]):
            errors.append(
                f'{where}.data_files" must be a path, a list of paths, or a list of objects of split and path'
            )
    if len({str(name) for name in names}) != len(names):
        errors.append('"configs" must have unique values of "config_name"')
    if sum(config.get("default") is True for config in configs) > 1:
        errors.append('"configs" can have only one default')
    if not isinstance(data.get("dataset_info", {}), dict | list):
        errors.append('"dataset_info" must be an object or an array of objects')
    return errors


def _data_files_fit(data_files: Any) -> bool:
    if _texts(data_files):
        return True
    return (
        isinstance(data_files, list)
        and bool(data_files)
        and all(
            isinstance(item, dict)
            and isinstance(item.get("split"), str)
            and _SPLIT.fullmatch(item["split"]) is not None
            and bool(_texts(item.get("path")))
            for item in data_files
        )
    )
