"""`hf-rgm info`, `push` and `pull`."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard, HfApi

from hf_rgm import Attributor, Synset
from hf_rgm.hub import CardOptions
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("artefacts")
    result = Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(RUN.queries)
    return {
        "trajectory": RUN.trajectory.folder,
        "synset": tiny_synset().save_pretrained(root / "synset"),
        "attributions": result.save_pretrained(root / "attributions"),
    }


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("trajectory", ["adamw", "steps: 48", "training rows: 48", "distil it"]),
        ("synset", ["30 of pixel_values, 6 clusters", "fidelity: not measured", "pipeline(", "hf-rgm push"]),
        ("attributions", ["6 clusters, sizes not calibrated", "A positive score means", "objective: margin"]),
    ],
)
def test_info_says_what_it_is_and_what_to_do_with_it(invoke, folders, kind, words):
    result = invoke("info", folders[kind])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{kind} in {folders[kind]}\n")
    assert "whole: yes" in result.output
    assert len(result.output.splitlines()) <= 11
    for word in words:
        assert word in result.output
    told = json.loads(invoke("info", folders[kind], "--json").stdout)
    assert (told["kind"], told["whole"]) == (kind, True)


def test_info_warns_of_what_cannot_be_relied_upon(invoke, tmp_path):
    synset = tiny_synset()
    synset = dataclasses.replace(synset, residuals=0 * synset.residuals + 0.9)
    told = invoke("info", synset.save_pretrained(tmp_path / "synset")).output
    assert "caution: the matching error is high" in told
    result = Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(RUN.queries)
    result.metadata["drift"] = 146.0
    told = invoke("info", result.save_pretrained(tmp_path / "attributions")).output
    assert "caution: replays drifted by 146" in told


def test_info_names_what_a_folder_holds(invoke, folders, tmp_path):
    shutil.copytree(folders["synset"], tmp_path / "run" / "synset")
    told = invoke("info", tmp_path / "run")
    assert told.exit_code == 1
    assert "but holds synset: name one" in " ".join(told.output.split())


def test_info_says_what_is_missing(invoke, tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    (folder / "synset.safetensors").unlink()
    result = invoke("info", folder)
    assert result.exit_code == 1
    assert "whole: NO" in result.output
    assert "synset.safetensors" in result.output
    assert json.loads(invoke("info", folder, "--json").stdout)["whole"] is False
    nothing = invoke("info", tmp_path)
    assert nothing.exit_code == 1
    assert "Error: " in nothing.output
    assert "Traceback" not in nothing.output


def test_push_and_pull(invoke, hub_in_process, folders, tmp_path):
    pushed = invoke("push", folders["synset"], "me/synset", "--license", "mit", "--json")
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["commit"] == hub_in_process.commits("me/synset", "dataset")[0].oid
    assert DatasetCard.load("me/synset").data.license == "mit"
    assert "me/synset@" in invoke("info", "me/synset").output
    pulled = invoke("pull", "me/synset", tmp_path / "copy")
    assert pulled.exit_code == 0, pulled.output
    with hub_in_process.unreachable():
        copy = Synset.from_pretrained(tmp_path / "copy")
        assert copy.trajectory.state(copy.trajectory.state_steps[0]).step == 0
    assert (tmp_path / "copy" / "README.md").read_bytes() == hub_in_process.files("me/synset", "dataset")["README.md"]


def test_pull_leaves_nothing_of_an_older_one(invoke, hub_in_process, folders, tmp_path):
    copy = tmp_path / "copy"
    tiny_synset(2).save_pretrained(copy)
    assert (copy / "trajectories" / "1").is_dir()
    assert invoke("push", folders["synset"], "me/synset").exit_code == 0
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    refused = invoke("pull", "me/synset", copy)
    assert refused.exit_code == 1
    assert f"{copy} holds finished work already (synset.json)" in refused.stderr and "--overwrite" in refused.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert invoke("pull", "me/synset", copy, "--overwrite").exit_code == 0
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert names == set(hub_in_process.files("me/synset", "dataset")) - {".gitattributes"}
    assert len(Synset.from_pretrained(copy).trajectories) == 1


def test_pull_keeps_what_is_there_where_the_repository_is_not_whole(invoke, hub_in_process, folders, tmp_path):
    copy = tiny_synset().save_pretrained(tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert invoke("push", folders["synset"], "me/synset").exit_code == 0
    HfApi().delete_file("synset.safetensors", "me/synset", repo_type="dataset")
    result = invoke("pull", "me/synset", copy, "--overwrite")
    assert result.exit_code == 1
    assert "is not whole" in result.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert invoke("pull", "me/synset", tmp_path / "mine", "--overwrite").exit_code == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_pull_takes_one_commit_whatever_is_pushed_meanwhile(invoke, hub_in_process, folders, tmp_path, monkeypatch):
    assert invoke("push", folders["synset"], "me/synset").exit_code == 0
    pushed = hub_in_process.files("me/synset", "dataset")
    write_anew = Synset.write_anew

    def overtaken(source, *arguments, **options):
        tiny_synset(2).push_to_hub("me/synset")
        return write_anew(source, *arguments, **options)

    monkeypatch.setattr(Synset, "write_anew", overtaken)
    assert invoke("pull", "me/synset", tmp_path / "copy").exit_code == 0
    assert (tmp_path / "copy" / "synset.json").read_bytes() == pushed["synset.json"]
    assert not (tmp_path / "copy" / "trajectories" / "1").exists()


def test_push_uploads_the_files_of_the_artefact_and_no_others(invoke, hub_in_process, tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset", card=CardOptions(license="apache-2.0"))
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    (folder / "data" / "train.parquet").unlink()
    (folder / "data" / "train.parquet").symlink_to(secret)
    (folder / "keys").symlink_to(tmp_path, target_is_directory=True)
    (folder / "passwords.txt").write_text("PRIVATE")
    shutil.copytree(RUN.trajectory.folder, folder / "trajectories" / "1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "scratch").write_text("PRIVATE")
    pushed = invoke("push", folder, "me/synset")
    assert pushed.exit_code == 0, pushed.output
    files = hub_in_process.files("me/synset", "dataset")
    expected = tiny_synset().save_pretrained(tmp_path / "expected")
    names = {path.relative_to(expected).as_posix() for path in expected.rglob("*") if path.is_file()}
    assert set(files) - {".gitattributes"} == names
    assert not any(b"PRIVATE" in content for content in files.values())
    told = " ".join(pushed.stderr.split())
    assert "Uploading to me/synset: README.md, clusters/clusters.json" in told and "keys, passwords.txt" in told
    assert "trajectories/1/steps/part-00000000.safetensors" in told and "scratch" not in told
    assert Synset.from_pretrained("me/synset").samples_sha256 == tiny_synset().samples_sha256


def test_a_run_with_its_rows_is_pushed_without_them(invoke, hub_in_process, tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    RUN.trajectory.save(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "steps", folder / "trajectories" / "0" / "steps", dirs_exist_ok=True)
    assert invoke("push", folder, "me/synset").exit_code == 0
    assert Synset.from_pretrained("me/synset").trajectory.steps.rows is None


def test_a_card_is_written_anew_and_keeps_its_licence(invoke, hub_in_process, tmp_path):
    text = "\n<script>alert(1)</script> <img src=https://evil.example/pixel.png>\n"
    folder = tiny_synset().save_pretrained(tmp_path / "synset", card=CardOptions(license="apache-2.0"))
    with open(folder / "README.md", "a") as file:
        file.write(text)
    assert invoke("push", folder, "me/synset").exit_code == 0
    card = DatasetCard.load("me/synset")
    assert card.data.license == "apache-2.0"
    assert "evil.example" not in card.text
    assert 'synset="me/synset"' in card.text and "path/to/this/folder" not in card.text
    poisoned = hub_in_process.files("me/synset", "dataset")["README.md"] + text.encode()
    hub_in_process.commit("me/synset", {"README.md": poisoned}, "dataset")
    assert invoke("pull", "me/synset", tmp_path / "copy").exit_code == 0
    assert "evil.example" not in (tmp_path / "copy" / "README.md").read_text()


def test_a_table_with_texts_is_pushed_as_it_is(invoke, hub_in_process, tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    table = pq.read_table(folder / "data" / "train.parquet")
    table = table.append_column("text", pa.array(["a text"] * len(table)))
    pq.write_table(table, folder / "data" / "train.parquet")
    content = (folder / "data" / "train.parquet").read_bytes()
    assert invoke("push", folder, "me/synset").exit_code == 0
    assert hub_in_process.files("me/synset", "dataset")["data/train.parquet"] == content


def test_pull_fetches_nothing_that_is_no_part_of_it(invoke, hub_in_process, folders, tmp_path):
    assert invoke("push", folders["synset"], "me/synset").exit_code == 0
    junk = {f"{name}/junk.bin": b"x" * 1000 for name in ("data", "trajectories/0/states", "trajectories/9/states")}
    hub_in_process.commit("me/synset", junk, "dataset")
    assert invoke("pull", "me/synset", tmp_path / "copy").exit_code == 0
    assert not list((tmp_path / "copy").rglob("junk.bin"))
    assert not hub_in_process.count(".*junk.bin")


def test_the_current_folder_can_be_named(invoke, monkeypatch, folders):
    monkeypatch.chdir(folders["synset"])
    assert invoke("info", ".").exit_code == 0


def test_offline_nothing_is_said_of_what_is_there(invoke, hub_in_process):
    tiny_synset().push_to_hub("me/synset")
    with hub_in_process.unreachable():
        result = invoke("info", "me/synset")
    assert result.exit_code == 1
    assert "the Hub is not reached" in result.output


def test_what_is_in_the_cache_is_shown_and_copied_offline(invoke, hub_in_process, tmp_path):
    tiny_synset().push_to_hub("me/synset")
    assert invoke("pull", "me/synset", tmp_path / "first").exit_code == 0
    with hub_in_process.unreachable():
        told = invoke("info", "me/synset")
        assert told.exit_code == 0 and "whole: yes" in told.output, told.output
        assert invoke("pull", "me/synset", tmp_path / "second").exit_code == 0
    assert Synset.from_pretrained(tmp_path / "second").samples_sha256 == tiny_synset().samples_sha256


@pytest.mark.parametrize("command", ["info", "pull"])
def test_connections_that_are_cut_are_one_line(invoke, hub_in_process, tmp_path, command, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tiny_synset().push_to_hub("me/synset")
    hub_in_process.drop("GET (/objects/.*|.*resolve/.*clusters.json)", times=None)
    result = invoke(command, "me/synset", *([tmp_path / "copy"] if command == "pull" else []))
    hub_in_process.faults.clear()
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "Error: " in result.stderr and not (tmp_path / "copy").exists()


def test_what_goes_wrong_is_one_line(invoke, hub_in_process, folders, tmp_path, monkeypatch):
    assert invoke("push", tmp_path / "nowhere", "me/x").exit_code == 2
    for arguments, words in (
        (("push", folders["trajectory"], "me/x"), "which row was in which step"),
        (("pull", "me/nothing", tmp_path / "copy"), "Error: "),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert words in result.output
        assert "Traceback" not in result.output
    monkeypatch.setenv("HF_TOKEN", hub_in_process.read_token)
    refused = invoke("push", folders["synset"], "me/x")
    assert refused.exit_code == 1
    assert "403" in refused.output and "hf auth login" not in refused.output
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    unknown = invoke("push", folders["synset"], "me/x")
    assert unknown.exit_code == 1
    assert "401" in unknown.output and "Log in with `hf auth login`, or set HF_TOKEN" in unknown.output
