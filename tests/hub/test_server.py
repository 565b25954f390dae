"""The local Hub, through the clients it is made for. Nothing of hf_rgm is tested here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, metadata_update, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import BertConfig, BertModel

from tests.hub_server.readme import check_readme

CARD = """---
license: mit
tags: [synset]
configs:
- config_name: samples
  default: true
  data_files: data/samples.parquet
- config_name: clusters
  data_files:
  - split: train
    path: data/clusters.parquet
---
# A dataset
"""
TENSORS = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a dataset repository may hold: text in git, tables and tensors in LFS."""
    path = tmp_path / "folder"
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "synset.json").write_text('{"name": "é"}')
    (path / "tensors.safetensors").write_bytes(TENSORS)
    for name, values in {"samples": [1, 2, 3], "clusters": [4, 5]}.items():
        pq.write_table(pa.table({name: values}), path / "data" / f"{name}.parquet")
    return path


def contents(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def push(folder, repo_id="me/set", **options):
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset", **options)


def test_a_folder_becomes_one_commit_and_comes_back(hub_in_process, folder):
    hub, api = hub_in_process, HfApi()
    pushed = push(folder)
    assert hub.files("me/set", "dataset") == contents(folder)
    assert [commit.oid for commit in hub.commits("me/set", "dataset")][:1] == [pushed.oid]
    assert [commit.author for commit in hub.commits("me/set", "dataset")] == ["me", "me"]
    assert hub.count("PUT /objects/") == 3
    assert contents(snapshot_download("me/set", repo_type="dataset")) == contents(folder)

    tree = {entry.path: entry for entry in api.list_repo_tree("me/set", recursive=True, repo_type="dataset")}
    assert {path for path, entry in tree.items() if getattr(entry, "lfs", None)} == {
        "data/clusters.parquet",
        "data/samples.parquet",
        "tensors.safetensors",
    }
    assert "data" in tree and len(tree) == 7
    assert [entry.path for entry in api.list_repo_tree("me/set", "data", repo_type="dataset")] == [
        "data/clusters.parquet",
        "data/samples.parquet",
    ]
    info = api.dataset_info("me/set", files_metadata=True)
    assert info.sha == pushed.oid and info.tags == ["synset", "license:mit"]
    assert info.card_data is not None and info.card_data["license"] == "mit" and info.siblings is not None
    assert {sibling.rfilename: sibling.size for sibling in info.siblings}["tensors.safetensors"] == len(TENSORS)

    # What has not changed is not sent again, and makes no commit.
    push(folder)
    assert len(hub.commits("me/set", "dataset")) == 2 and hub.count("PUT /objects/") == 3
    (folder / "synset.json").write_text("{}")
    (folder / "tensors.safetensors").unlink()
    push(folder, delete_patterns="*.safetensors")
    assert hub.files("me/set", "dataset") == contents(folder)
    assert hub.count("PUT /objects/") == 3


def test_repositories_are_made_once_listed_and_deleted(hub_in_process):
    api = HfApi()
    url = api.create_repo("me/set", repo_type="dataset")
    assert (url.repo_id, url.repo_type, str(url)) == ("me/set", "dataset", f"{api.endpoint}/datasets/me/set")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("me/set", repo_type="dataset")
    assert api.create_repo("me/set", repo_type="dataset", exist_ok=True).repo_id == "me/set"
    api.create_repo("model")
    assert [info.id for info in api.list_models(author="me")] == ["me/model"]
    assert [info.id for info in api.list_datasets(author="me", search="SE")] == ["me/set"]
    assert list(api.list_datasets(author="stranger")) == []
    assert api.whoami()["name"] == "me"
    api.delete_repo("me/set", repo_type="dataset")
    assert not api.repo_exists("me/set", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("me/set", repo_type="dataset")


def test_revisions_are_pinned_by_commit_tag_and_branch(hub_in_process, folder):
    api = HfApi()
    first = push(folder).oid
    api.create_tag("me/set", tag="v1", repo_type="dataset")
    api.create_branch("me/set", branch="fixes/of me", repo_type="dataset")
    (folder / "synset.json").write_text("2")
    second = push(folder).oid
    (folder / "synset.json").write_text("3")
    push(folder, revision="fixes/of me")

    def read(revision):
        return Path(hf_hub_download("me/set", "synset.json", repo_type="dataset", revision=revision)).read_text()

    assert [read(revision) for revision in (None, "main", second, "fixes/of me")] == ["2", "2", "2", "3"]
    assert read("v1") == read(first) == '{"name": "é"}'
    assert api.dataset_info("me/set", revision=first[:7]).sha == first
    refs = api.list_repo_refs("me/set", repo_type="dataset")
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert {ref.name for ref in refs.branches} == {"main", "fixes/of me"}
    with pytest.raises(RevisionNotFoundError):
        read("v2")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/set", "absent.json", repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_tag("me/set", tag="v1", repo_type="dataset")
    assert [commit.commit_id for commit in api.list_repo_commits("me/set", repo_type="dataset")][:2] == [second, first]


def test_datasets_loads_the_configs_of_the_card(hub_in_process, folder):
    old = push(folder).oid
    assert load_dataset("me/set", split="train")["samples"][:] == [1, 2, 3]
    assert load_dataset("me/set", "clusters", split="train")["clusters"][:] == [4, 5]
    streamed = load_dataset("me/set", "clusters", split="train", streaming=True)
    assert [row["clusters"] for row in streamed] == [4, 5]
    pq.write_table(pa.table({"samples": [6]}), folder / "data" / "samples.parquet")
    push(folder)
    assert load_dataset("me/set", split="train")["samples"][:] == [6]
    assert load_dataset("me/set", split="train", revision=old)["samples"][:] == [1, 2, 3]


def test_transformers_pushes_and_loads_a_model(hub_in_process, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    model = BertModel(config)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/tiny", private=True)
    assert {"config.json", "model.safetensors"} <= set(hub_in_process.files("me/tiny"))
    loaded = BertModel.from_pretrained("me/tiny")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(OSError, match="me/tiny"):
        BertModel.from_pretrained("me/tiny", token=False, cache_dir=tmp_path / "clean")
    metadata_update("me/tiny", {"datasets": ["me/set"], "license": "mit"})
    assert HfApi().model_info("me/tiny").tags == ["license:mit", "dataset:me/set"]
    with pytest.raises(ValueError, match="license"):
        metadata_update("me/tiny", {"license": "mine"}, overwrite=True)


def test_tokens_decide_who_reads_and_who_writes(hub_in_process, folder, tmp_path):
    hub = hub_in_process
    api = HfApi(token=hub.token)
    api.create_repo("me/secret", private=True)
    api.upload_file(repo_id="me/secret", path_in_repo="tensors.safetensors", path_or_fileobj=TENSORS)
    stranger, reader, nobody = HfApi(token=hub.other_token), HfApi(token=hub.read_token), HfApi(token=False)
    wrong = HfApi(token="hf_wrong")

    with pytest.raises(RepositoryNotFoundError, match="401"):
        nobody.model_info("me/secret")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        stranger.model_info("me/secret")
    assert list(stranger.list_models(author="me")) == []
    assert Path(reader.hf_hub_download("me/secret", "tensors.safetensors")).read_bytes() == TENSORS
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.upload_file(repo_id="me/secret", path_in_repo="a.txt", path_or_fileobj=b"a")
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        stranger.create_repo("me/theirs")

    # A token nobody has is refused even where none is needed.
    api.update_repo_settings("me/secret", private=False)
    assert nobody.model_info("me/secret").private is False
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        wrong.model_info("me/secret")
    assert not isinstance(caught.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="write access"):
        stranger.upload_file(repo_id="me/secret", path_in_repo="a.txt", path_or_fileobj=b"a")


def test_an_interrupted_upload_leaves_nothing_and_is_taken_up_again(hub_in_process, folder):
    hub = hub_in_process
    # Broken off half-way, which the client mends by itself; then two refusals, which it does not.
    hub.drop("PUT /objects/")
    hub.fail("PUT /objects/", 403, times=2)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        push(folder)
    assert hub.files("me/set", "dataset") == {}
    stored = hub.count("PUT /objects/")
    hub.faults.clear()
    push(folder)
    assert hub.files("me/set", "dataset") == contents(folder)
    assert hub.count("PUT /objects/") == 3 and stored < 3


def test_a_download_broken_off_goes_on_where_it_was(hub_in_process, folder, monkeypatch):
    hub = hub_in_process
    push(folder)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.drop("GET /objects/")
    path = hf_hub_download("me/set", "tensors.safetensors", repo_type="dataset")
    assert Path(path).read_bytes() == TENSORS
    assert [status for line, status in hub.requests if line.startswith("GET /objects/")] == [200, 206]


def test_ranges_and_signed_addresses(hub_in_process):
    hub = hub_in_process
    hub.commit("stranger/open", {"tensors.safetensors": TENSORS, "note.txt": "0123456789"})
    note = f"{hub.endpoint}/stranger/open/resolve/main/note.txt"
    for asked, status, body in (
        ("bytes=2-4", 206, b"234"),
        ("bytes=8-", 206, b"89"),
        ("bytes=-3", 206, b"789"),
        ("bytes=20-30", 416, None),
    ):
        answer = httpx2.get(note, headers={"Range": asked})
        assert answer.status_code == status
        assert body in (None, answer.content)
    moved = httpx2.get(f"{hub.endpoint}/stranger/open/resolve/main/tensors.safetensors")
    assert moved.status_code == 302 and moved.headers["Location"].startswith(hub.storage)
    assert hub.storage != hub.endpoint
    location = moved.headers["Location"]
    assert httpx2.get(location).content == TENSORS
    assert httpx2.get(location, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400
    assert httpx2.get(location.replace("signature=", "signature=0")).status_code == 403


def test_offline_and_unreachable_need_a_warm_cache(hub_in_process, folder, monkeypatch):
    hub = hub_in_process
    push(folder)
    push(folder, "me/other")
    kept = snapshot_download("me/set", repo_type="dataset")
    for settle in (hub.unreachable, monkeypatch.context):
        with settle() as patch:
            if patch is not None:
                patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            assert snapshot_download("me/set", repo_type="dataset") == kept
            assert Path(hf_hub_download("me/set", "synset.json", repo_type="dataset")).is_relative_to(kept)
            with pytest.raises(LocalEntryNotFoundError):
                snapshot_download("me/other", repo_type="dataset")
    assert contents(snapshot_download("me/other", repo_type="dataset")) == contents(folder)


def test_a_stale_parent_is_refused_and_so_are_broken_commits(hub_in_process, folder):
    hub, api = hub_in_process, HfApi()
    first = push(folder).oid
    hub.commit("me/set", {"theirs.txt": "x"}, "dataset")
    mine = CommitOperationAdd("mine.txt", b"mine")
    with pytest.raises(HfHubHTTPError, match="commit has happened since") as caught:
        api.create_commit("me/set", [mine], commit_message="Mine", repo_type="dataset", parent_commit=first)
    assert caught.value.response.status_code == 412
    assert "mine.txt" not in hub.files("me/set", "dataset") and "theirs.txt" in hub.files("me/set", "dataset")
    head = hub.commits("me/set", "dataset")[0].oid
    api.create_commit("me/set", [mine], commit_message="Mine", repo_type="dataset", parent_commit=head)
    assert {"mine.txt", "theirs.txt"} <= set(hub.files("me/set", "dataset"))
    with pytest.raises(RevisionNotFoundError):
        push(folder / "data", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("absent.txt", "me/set", repo_type="dataset")
    hub.fail("POST .*/commit/", 503)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.upload_file(repo_id="me/set", path_in_repo="b.txt", path_or_fileobj=b"b", repo_type="dataset")
    # An answer that gets lost is no commit to the client, but it is one.
    hub.lose("POST .*/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(repo_id="me/set", path_in_repo="c.txt", path_or_fileobj=b"c", repo_type="dataset")
    files = hub.files("me/set", "dataset")
    assert "b.txt" not in files and files["c.txt"] == b"c"


@pytest.mark.parametrize("with_parent", [False, True])
def test_pushes_at_the_same_time(hub_in_process, with_parent):
    hub, api = hub_in_process, HfApi()
    head = hub.commit("me/set", {"start.txt": "start"}, "dataset")
    ready = threading.Barrier(2, timeout=30)
    hub.before("POST .*/commit/main", ready.wait, times=2)

    def add(name):
        api.create_commit(
            "me/set",
            [CommitOperationAdd(name, name.encode())],
            commit_message=f"Add {name}",
            repo_type="dataset",
            parent_commit=head if with_parent else None,
        )

    with ThreadPoolExecutor(2) as threads:
        errors = [future.exception() for future in [threads.submit(add, name) for name in ("one.txt", "two.txt")]]
    landed = {"one.txt", "two.txt"} & set(hub.files("me/set", "dataset"))
    if with_parent:
        refused = [error for error in errors if error is not None]
        assert len(refused) == len(landed) == 1
        assert isinstance(refused[0], HfHubHTTPError) and refused[0].response.status_code == 412
    else:
        assert errors == [None, None] and landed == {"one.txt", "two.txt"}
        titles = [commit.title for commit in hub.commits("me/set", "dataset")]
        assert sorted(titles[:2]) == ["Add one.txt", "Add two.txt"]


def test_a_pull_request_is_a_revision_of_its_own(hub_in_process, folder):
    hub, api = hub_in_process, HfApi()
    before = push(folder).oid
    (folder / "synset.json").write_text("proposed")
    proposed = push(folder, create_pr=True)
    assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
    assert proposed.pr_url == f"{hub.endpoint}/datasets/me/set/discussions/1"
    assert hub.commits("me/set", "dataset")[0].oid == before
    path = hf_hub_download("me/set", "synset.json", repo_type="dataset", revision="refs/pr/1")
    assert Path(path).read_text() == "proposed"
    refs = api.list_repo_refs("me/set", repo_type="dataset", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", proposed.oid)]
    more = api.upload_file(
        repo_id="me/set", path_in_repo="a.txt", path_or_fileobj=b"a", repo_type="dataset", revision="refs/pr/1"
    )
    assert [commit.oid for commit in hub.commits("me/set", "dataset", "refs/pr/1")][:3] == [
        more.oid,
        proposed.oid,
        before,
    ]


def test_a_repository_changed_under_way_gives_one_revision(hub_in_process, folder):
    hub = hub_in_process
    first = push(folder).oid
    before = contents(folder)
    hub.before("HEAD .*/synset.json", lambda: hub.commit("me/set", {"synset.json": "new", "more.txt": "x"}, "dataset"))
    snapshot = snapshot_download("me/set", repo_type="dataset")
    assert Path(snapshot).name == first and contents(snapshot) == before
    newer = snapshot_download("me/set", repo_type="dataset")
    assert contents(newer) == {**before, "synset.json": b"new", "more.txt": b"x"}


def test_too_many_requests_are_waited_out(hub_in_process, folder):
    hub = hub_in_process
    push(folder)
    hub.fail("GET .*/tree/", 429, Retry_After="0")
    assert contents(snapshot_download("me/set", repo_type="dataset")) == contents(folder)
    assert hub.count("GET .*/tree/", failed=True) == 1


HEADERS = {
    "none at all": ("# Only text", 0),
    "good": (CARD, 0),
    "not closed": ("---\nlicense: mit\n# Title", 1),
    "not YAML": ("---\nlicense: [mit\n---\n", 1),
    "a list": ("---\n- license\n---\n", 1),
    "unknown licence": ("---\nlicense: mine\n---\n", 1),
    "nothing listed": ("---\ntags: []\ndatasets: []\n---\n", 0),
    "tags of numbers": ("---\ntags: [1, 2]\n---\n", 1),
    "a folder for a model": ("---\nbase_model: /home/me/model\n---\n", 1),
    "two defaults": ("---\nconfigs: [{config_name: a, default: true}, {config_name: b, default: true}]\n---\n", 1),
    "one name twice": ("---\nconfigs: [{config_name: a}, {config_name: a}]\n---\n", 1),
    "data files by split": ("---\nconfigs: [{config_name: a, data_files: {train: x.parquet}}]\n---\n", 1),
    "unnamed model-index": ("---\nmodel-index: [{results: []}]\n---\n", 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_readme_headers_are_checked(name):
    content, num_errors = HEADERS[name]
    errors, warnings = check_readme(content, "dataset")
    assert len(errors) == num_errors
    assert warnings == (["empty or missing yaml metadata in repo card"] if name == "none at all" else [])


def test_a_bad_readme_is_refused_before_and_at_the_commit(hub_in_process, folder, monkeypatch):
    hub = hub_in_process
    bad = CARD.replace("mit", "mine")
    (folder / "README.md").write_text(bad)
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push(folder)
    with pytest.raises(ValueError, match="license"):
        ModelCard(bad).validate(repo_type="dataset")
    ModelCard(CARD).validate(repo_type="dataset")
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *arguments, **options: None)
    with pytest.raises(HfHubHTTPError, match="Invalid metadata"):
        push(folder)
    assert hub.files("me/set", "dataset") == {}
    # What an owner got past the checks does not stop the server.
    hub.commit("me/set", {"README.md": "---\n[\n---\n", "../é\n": "x"}, "dataset")
    assert HfApi().dataset_info("me/set").card_data is None


def test_commands_and_scripts_in_processes_of_their_own(hub_shell, folder):
    hub, home = hub_shell.hub, hub_shell.home
    hub_shell.command("hf", "upload", "me/set", str(folder), "--repo-type", "dataset")
    assert hub.files("me/set", "dataset") == contents(folder)
    hub_shell.command(
        "hf", "download", "me/set", "--repo-type", "dataset", "--local-dir", "here", token=hub.read_token
    )
    here = contents(hub_shell.folder / "here")
    assert {path: content for path, content in here.items() if not path.startswith(".cache/")} == contents(folder)
    with pytest.raises(RuntimeError, match="Invalid credentials|[Ii]nvalid user token"):
        hub_shell.command("hf", "upload", "me/set", str(folder), "--repo-type", "dataset", token="hf_wrong")
    with pytest.raises(RuntimeError, match="not logged in|Not logged in|401"):
        hub_shell.command("hf", "upload", "me/set", str(folder), "--repo-type", "dataset", token=None)

    script = (
        "import sys; from huggingface_hub import snapshot_download; from datasets import load_dataset\n"
        "print(snapshot_download(sys.argv[1], repo_type='dataset'))\n"
        "print(load_dataset(sys.argv[1], 'clusters', split='train')['clusters'][:])"
    )
    path, values = hub_shell.python(script, "me/set", token=None).split("\n")[:2]
    assert Path(path).is_relative_to(home) and contents(path) == contents(folder) and values == "[4, 5]"
    assert hub_shell.python(script, "me/set", offline=True).split("\n")[:2] == [path, values]
    hub_shell.home = hub_shell.folder / "another_home"
    with pytest.raises(RuntimeError, match="LocalEntryNotFoundError"):
        hub_shell.python(script, "me/set", offline=True)
