"""Files that are too large are refused by the size that the Hub tells, before any of their bytes are fetched."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from hf_rgm import Synset
from hf_rgm.files.reading import MAX_HEADER_BYTES
from hf_rgm.files.writing import MAX_JSON_BYTES
from hf_rgm.hub.artefact import MAX_CARD_BYTES
from hf_rgm.hub.repository import open_artefact
from hf_rgm.synset.responses import RESPONSES_FILE
from hf_rgm.testing import tiny_synset
from hf_rgm.trajectory.description import MAX_METADATA_BYTES
from tests.responses import with_responses

FINAL = "trajectories/0/states/step-00000048.safetensors"
BUDGETS = {
    "synset.json": MAX_JSON_BYTES,
    "clusters/clusters.json": MAX_JSON_BYTES,
    "clusters/clusters.safetensors": MAX_HEADER_BYTES,
    "synset.safetensors": MAX_HEADER_BYTES,
    "trajectories/0/trajectory.json": MAX_METADATA_BYTES,
    FINAL: MAX_HEADER_BYTES,
    RESPONSES_FILE: MAX_HEADER_BYTES,
}
"""Bytes that files may have; those of tensors as many more as are announced, which are few here."""


@pytest.fixture
def hub(hub_in_process):
    with_responses().push_to_hub("me/synset")
    return hub_in_process


def times_fetched(hub, name):
    """How often the content of a file was sent, by its own address or by that of a large file."""
    digest = hashlib.sha256(hub.files("me/synset", "dataset")[name]).hexdigest()
    return hub.count(f"GET .*resolve/.*{name}") + hub.count(f"GET /objects/{digest}")


def grow(hub, name, size):
    hub.commit("me/synset", {name: hub.files("me/synset", "dataset")[name] + b" " * size}, "dataset")


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_beyond_its_budget_is_not_fetched(hub, name):
    grow(hub, name, BUDGETS[name] + 100_000)
    with pytest.raises(ValueError, match=f"^{name} of the dataset repository me/synset has .* such a file may have"):
        Synset.from_pretrained("me/synset").responses.decode()
    assert not times_fetched(hub, name)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_within_its_budget_is_fetched_once(hub, name):
    Synset.from_pretrained("me/synset").responses.decode()
    assert times_fetched(hub, name) == 1


def test_json_is_fetched_as_long_as_all_of_it_is_within_one_budget(hub, monkeypatch):
    sizes = {name: len(content) for name, content in hub.files("me/synset", "dataset").items()}
    # Read, it takes at least twice its size.
    monkeypatch.setattr("hf_rgm.files.reading.JSON_BUDGET", 2 * sizes["synset.json"] + 20_000)
    grow(hub, "clusters/clusters.json", 20_000)
    with pytest.raises(ValueError, match=r"clusters/clusters.json of the dataset .* such a file may have"):
        Synset.from_pretrained("me/synset")
    assert times_fetched(hub, "synset.json") and not times_fetched(hub, "clusters/clusters.json")


def test_a_card_beyond_its_budget_is_not_pulled(hub, tmp_path):
    grow(hub, "README.md", MAX_CARD_BYTES)
    with pytest.raises(ValueError, match="README.md of the dataset repository"):
        Synset.write_anew(open_artefact("me/synset", "synset.json"), tmp_path / "copy")
    assert not times_fetched(hub, "README.md")


@pytest.mark.parametrize(
    ("module", "measure", "error", "message"),
    [
        ("psutil", "virtual_memory", MemoryError, "only 1.0 kB of memory are free"),
        ("shutil", "disk_usage", OSError, "only 1.0 kB are free in .* Make room, or pass another `cache_dir`"),
    ],
)
def test_what_fits_into_neither_memory_nor_disk_is_not_fetched(hub, monkeypatch, module, measure, error, message):
    told = SimpleNamespace(available=1000, free=1000)
    monkeypatch.setattr(f"hf_rgm.files.reading.{module}.{measure}", lambda *arguments: told)
    with pytest.raises(error, match=f"synset.json of the dataset repository me/synset .*{message}"):
        Synset.from_pretrained("me/synset")
    assert not times_fetched(hub, "synset.json")


def test_a_warm_cache_asks_for_the_first_file_only_once(hub):
    tiny_synset().push_to_hub("me/synset")
    Synset.from_pretrained("me/synset")
    asked, requests = hub.count("HEAD .*resolve/main/synset.json"), len(hub.requests)
    Synset.from_pretrained("me/synset")
    assert hub.count("HEAD .*resolve/main/synset.json") == asked + 1 and len(hub.requests) == requests + 1
    with hub.unreachable():
        assert Synset.from_pretrained("me/synset").samples_sha256 == tiny_synset().samples_sha256


def test_a_larger_file_that_is_committed_later_is_not_fetched_either(hub):
    Synset.from_pretrained("me/synset")
    grow(hub, "synset.json", MAX_JSON_BYTES)
    before = hub.count("GET .*")
    with pytest.raises(ValueError, match="such a file may have"):
        Synset.from_pretrained("me/synset")
    assert hub.count("GET .*") == before
