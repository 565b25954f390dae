"""Artefacts that were tampered with: each is refused by name, or harmless."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_rgm import Synset
from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.hub.repository import open_artefact
from tests.hub.hostile.artefacts import ARTEFACTS, Artefact, attribute, is_refusal
from tests.hub.hostile.bounds import MEGABYTES, measured
from tests.hub.hostile.cases import CASES, VALUES
from tests.hub.hostile.damage import RUN, Case
from tests.hub.hostile.edits import replaced, routes

ADDRESS = "stranger/artefact"
KEPT = ("config", "versions", "recording")
"""Nobody computes with what is below these keys."""


def tampered(case: Case, folder: Path) -> Path:
    shutil.copytree(ARTEFACTS[case.artefact].pristine, folder)
    case.edit(folder)
    return folder


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def tried(case: Case, folder: ArtefactFolder, target: Path) -> str:
    """What comes of loading an artefact, and of using it if it loads."""
    artefact = ARTEFACTS[case.artefact]
    if case.message is not None:
        with pytest.raises(case.error, match=case.message) as caught:
            _used(artefact, folder, target)
        assert is_refusal(caught.value), repr(caught.value)
        found = re.search(case.message, str(caught.value))
        assert found is not None
        return f"{caught.type.__name__}: … {found.group().replace(str(folder), case.artefact)} …"
    content = _used(artefact, folder, target)
    if isinstance(content, Synset):
        return f"loads; attributing gives {_told(attribute(content))}"
    return "harmless"


def _used(artefact: Artefact, folder: ArtefactFolder, target: Path) -> Any:
    try:
        with measured() as taken:
            content = artefact.read(folder)
            if artefact.name == "Trajectory":
                for step in content.state_steps:
                    content.state(step)
    finally:
        assert taken.megabytes < MEGABYTES
    artefact.look(content)
    artefact.save(content, target / "copy")
    return content


def _told(outcomes: list[str]) -> str:
    """Which engines diverge is left open: it depends on their settings, and in the end on rounding."""
    return " or ".join(sorted({"scores", *outcomes} if "DivergenceError" in outcomes else set(outcomes)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.artefact}: {case.done}")
def test_a_folder_that_was_tampered_with(case, tmp_path, nothing_outside, outcome_of):
    folder = tampered(case, tmp_path / "folder" / case.artefact)
    before = listing(tmp_path / "folder")
    outcome = tried(case, ArtefactFolder(folder), nothing_outside)
    assert listing(tmp_path / "folder") == before
    outcome_of(case.artefact, case.done, outcome)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.on_hub], ids=lambda case: f"{case.artefact}: {case.done}"
)
def test_the_same_from_the_hub(case, hub_in_process, tmp_path, nothing_outside, outcome_of):
    folder = tampered(case, tmp_path / "folder" / case.artefact)
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub_in_process.commit(ADDRESS, content, "dataset")
    if case.error is FileNotFoundError:
        # The Hub's words are others than those for a folder.
        case = replace(case, message="has no .* at revision [0-9a-f]|is missing")
    outcome = tried(case, open_artefact(ADDRESS, ARTEFACTS[case.artefact].marker), nothing_outside)
    outcome = re.sub(r"revision [0-9a-f]+", "revision", outcome)
    outcome_of(case.artefact, f"{case.done} (on the Hub)", outcome)


@pytest.mark.parametrize("name", list(ARTEFACTS))
def test_what_nobody_tampered_with_loads(name, hub_in_process, tmp_path, nothing_outside, outcome_of):
    artefact = ARTEFACTS[name]
    hub_in_process.commit(ADDRESS, contents(artefact.pristine), "dataset")
    folder = open_artefact(ADDRESS, artefact.marker)
    # In the cache every file is a link to a blob, out of the snapshot.
    assert folder.file(artefact.marker).is_symlink()
    _used(artefact, folder, nothing_outside)
    _used(artefact, ArtefactFolder(folder.root), nothing_outside)
    outcome_of(name, "nothing (from the Hub, and from the folder of its cache)", "loads")


NAMES_THAT_LEAD_OUT = (
    "trajectories/../../../evil",
    "/etc/evil",
    "clusters/..\\..\\evil",
    "data/../synset.json",
    "clusters/\x1b[2J",
    ".git/config",
)


def test_names_that_lead_out_in_the_list_of_files(hub_in_process, nothing_outside, outcome_of):
    """Files are asked for by names of our own, so that what else a repository lists is never fetched."""
    artefact = ARTEFACTS["Synset"]
    content = contents(artefact.pristine)
    hub_in_process.commit("me/set", content | dict.fromkeys(NAMES_THAT_LEAD_OUT, b"evil"), "dataset")
    synset = artefact.read(open_artefact("me/set", artefact.marker))
    _used(artefact, open_artefact("me/set", artefact.marker), nothing_outside)
    assert not hub_in_process.count("GET .*evil")
    synset.push_to_hub("me/set")
    assert hub_in_process.commits("me/set", "dataset")[0].author == "me"
    outcome_of("Synset", "the repository lists names that lead out of it", "harmless, also to push over")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def every_file() -> Iterator[tuple[str, str]]:
    for name, artefact in ARTEFACTS.items():
        yield name, artefact.marker
    yield "Synset", f"{RUN}/trajectory.json"


@pytest.mark.parametrize(("name", "file"), list(every_file()))
def test_values_of_other_types_in_the_place_of_every_node(name, file, tmp_path, nothing_outside, outcome_of):
    artefact = ARTEFACTS[name]
    folder = Path(shutil.copytree(artefact.pristine, tmp_path / "folder"))
    whole = json.loads((folder / file).read_text())
    for route in routes(whole, depth=4):
        if route[0] in KEPT and len(route) > 1:
            continue
        outcomes: dict[str, list[str]] = {}
        for what, value in VALUES.items():
            (folder / file).write_text(json.dumps(replaced(whole, route, value)))
            try:
                content = artefact.read(ArtefactFolder(folder))
            except Exception as error:
                assert is_refusal(error), f"{route} as {what}: {error!r}"
                assert file.rpartition("/")[2] in str(error) or str(folder) in str(error), repr(error)
                outcomes.setdefault(f"{type(error).__name__} for", []).append(what)
            else:
                artefact.look(content)
                outcomes.setdefault("harmless for", []).append(what)
        shown = "; ".join(f"{outcome} {', '.join(values)}" for outcome, values in outcomes.items())
        outcome_of(name, f"{file}: `{'.'.join(map(str, route))}` of other types", shown)
