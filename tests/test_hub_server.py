"""The Hub of `hub_server.py`, asked the way users ask the real one: through `huggingface_hub` and `transformers`."""

import hashlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import LFS_POINTER, HubServer, parse_range
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    file_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url, http_get

try:
    from huggingface_hub.utils import close_session as forget_sessions
except ImportError:  # huggingface_hub < 1.0
    from huggingface_hub.utils import reset_sessions as forget_sessions


REPO = "tester/slm"
WEIGHTS = bytes(range(256)) * 500  # 128,000 bytes
SCRIPT = str(Path(__file__).with_name("hub_server.py"))


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Lets `huggingface_hub` make requests, by plain HTTP, also in a test run that is offline or behind a proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    forget_sessions()
    yield
    forget_sessions()


@pytest.fixture
def start_hub(tmp_path, monkeypatch):
    """A function that starts a server in this process and returns it with an `HfApi` that talks to it."""
    servers = []

    def start(**options):
        hub = HubServer(tmp_path / "hub", **options).start()
        servers.append(hub)
        # `HF_ENDPOINT` is read once, at import. Nearly all of `huggingface_hub` takes an endpoint instead; not so the
        # `CommitInfo` of 0.36.2, which parses the address of a commit against the default one.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        return hub, HfApi(endpoint=hub.endpoint, token=hub.token)

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def hub_and_api(start_hub):
    hub, api = start_hub()
    api.create_repo(REPO)
    return hub, api


@pytest.fixture
def api(hub_and_api):
    return hub_and_api[1]


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "sub" / "ünïcode name.txt").write_text("text")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def download(api, filename, folder, **kwargs):
    """The content of a file, by way of a cache of its own."""
    return Path(api.hf_hub_download(REPO, filename, cache_dir=folder, **kwargs)).read_bytes()


# Repositories


def test_whoami(api):
    assert api.whoami()["name"] == "tester"


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_repository_is_created_filled_and_deleted(start_hub, tmp_path, repo_type):
    _, api = start_hub()
    options = {"space_sdk": "static"} if repo_type == "space" else {}
    url = api.create_repo("any-org/name.v1", repo_type=repo_type, **options)
    assert (url.repo_id, url.repo_type) == ("any-org/name.v1", repo_type)
    names = {"repo_id": "any-org/name.v1", "repo_type": repo_type}
    commit = api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="a/weights.bin", **names)
    assert commit.repo_url.repo_id == "any-org/name.v1"
    assert Path(api.hf_hub_download(filename="a/weights.bin", cache_dir=tmp_path, **names)).read_bytes() == WEIGHTS
    assert api.repo_info(**names).sha == commit.oid
    api.delete_repo(**names)
    assert not api.repo_exists(**names)


def test_repository_without_namespace_is_the_users(start_hub):
    _, api = start_hub()
    assert api.create_repo("slm").repo_id == "tester/slm"


def test_second_creation_is_refused_unless_it_may_exist(api):
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409


def test_same_name_of_another_type_is_another_repository(api):
    assert not api.repo_exists(REPO, repo_type="dataset")


def test_private_repository_needs_the_token(start_hub):
    hub, api = start_hub()
    api.create_repo(REPO, private=True)
    assert api.model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).model_info(REPO)


def test_public_repository_is_read_without_a_token(hub_and_api):
    hub, _ = hub_and_api
    assert not HfApi(endpoint=hub.endpoint, token=False).model_info(REPO).private


# Push and pull


@pytest.mark.parametrize("lfs", [True, False])
def test_folder_comes_back_as_it_was_pushed(start_hub, model_folder, tmp_path, lfs):
    hub, api = start_hub(lfs=lfs)
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=model_folder, commit_message="first")

    files = {str(path.relative_to(model_folder)) for path in model_folder.rglob("*") if path.is_file()}
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *files}
    snapshot = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert snapshot.name == commit.oid
    for name in files:
        assert (snapshot / name).read_bytes() == (model_folder / name).read_bytes()

    oid = hashlib.sha256(WEIGHTS).hexdigest()
    uploads = [request.path for request in hub.requests if request.method == "PUT"]
    assert uploads == ([f"/lfs/{oid}"] if lfs else [])
    assert any(request.path == f"/lfs/{oid}/verify" for request in hub.requests) == lfs
    assert (api.get_paths_info(REPO, "model.safetensors")[0].lfs is not None) == lfs
    assert all(request.status < 400 for request in hub.requests)


def test_lfs_file_is_a_pointer_in_git(hub_and_api, tmp_path):
    hub, api = hub_and_api
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id=REPO)
    git = ["git", "--git-dir", str(tmp_path / "hub" / "models" / f"{REPO}.git")]
    pointer = LFS_POINTER.format(oid=hashlib.sha256(WEIGHTS).hexdigest(), size=len(WEIGHTS))
    assert subprocess.check_output([*git, "show", "main:w.bin"], text=True) == pointer
    assert subprocess.check_output([*git, "fsck", "--strict"], stderr=subprocess.STDOUT) == b""


def test_known_lfs_content_is_not_uploaded_again(hub_and_api):
    hub, api = hub_and_api
    for name in ("a.bin", "b.bin"):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo=name, repo_id=REPO)
    assert len([request for request in hub.requests if request.method == "PUT"]) == 1


def test_unchanged_folder_makes_no_commit(api, model_folder):
    first = api.upload_folder(repo_id=REPO, folder_path=model_folder)
    again = api.upload_folder(repo_id=REPO, folder_path=model_folder)
    assert again.oid == first.oid
    assert len(api.list_repo_commits(REPO)) == 2  # "initial commit" and the first upload


def test_upload_from_file_object(api, tmp_path):
    api.upload_file(path_or_fileobj=io.BytesIO(WEIGHTS), path_in_repo="w.bin", repo_id=REPO)
    assert download(api, "w.bin", tmp_path) == WEIGHTS


def test_one_commit_adds_copies_and_deletes(api, model_folder, tmp_path):
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    api.create_commit(
        REPO,
        [
            CommitOperationAdd("new.txt", b"new"),
            CommitOperationCopy("model.safetensors", "copy/model.safetensors"),
            CommitOperationCopy("config.json", "copy/config.json"),
            CommitOperationDelete("model.safetensors"),
            CommitOperationDelete("sub/"),
        ],
        commit_message="title",
        commit_description="two\nlines",
    )
    expected = {".gitattributes", "config.json", "copy/config.json", "copy/model.safetensors", "new.txt"}
    assert set(api.list_repo_files(REPO)) == expected
    assert download(api, "copy/model.safetensors", tmp_path) == WEIGHTS
    assert download(api, "copy/config.json", tmp_path) == (model_folder / "config.json").read_bytes()
    last = api.list_repo_commits(REPO)[0]
    assert (last.title, last.message, last.authors) == ("title", "two\nlines", ["tester"])


def test_folder_may_take_the_place_of_a_file(api, tmp_path):
    api.upload_file(path_or_fileobj=b"file", path_in_repo="a", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"inner", path_in_repo="a/b", repo_id=REPO)
    assert api.list_repo_files(REPO) == [".gitattributes", "a/b"]


def test_concurrent_commits_all_arrive(api):
    with ThreadPoolExecutor(8) as pool:
        names = [f"{index}.bin" for index in range(8)]
        list(
            pool.map(
                lambda name: api.upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id=REPO), names
            )
        )
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *names}
    assert len(api.list_repo_commits(REPO)) == 1 + len(names)


# Reading


def test_tree_lists_folders_one_level_or_all(api, model_folder):
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    assert {item.path for item in api.list_repo_tree(REPO)} == {
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "sub",
    }
    assert [item.path for item in api.list_repo_tree(REPO, "sub")] == ["sub/ünïcode name.txt"]
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 5
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))


def test_paths_info_leaves_out_what_is_missing(api, model_folder):
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    weights, folder = api.get_paths_info(REPO, ["sub", "model.safetensors", "missing"])
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.size == weights.lfs.size == len(WEIGHTS)
    assert folder.path == "sub"


def test_info_tells_files_and_card(api):
    card = "---\nlanguage: en\npipeline_tag: text-generation\nlibrary_name: transformers\n---\n# Card"
    commit = api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=REPO)
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.sha) == (REPO, commit.oid)
    assert (info.pipeline_tag, info.library_name) == ("text-generation", "transformers")
    assert {file.rfilename: file.size for file in info.siblings}["README.md"] == len(card)
    assert info.last_modified >= info.created_at


@pytest.mark.parametrize("filename", ["model.safetensors", "config.json"])
def test_metadata_of_a_file(hub_and_api, model_folder, filename):
    hub, api = hub_and_api
    commit = api.upload_folder(repo_id=REPO, folder_path=model_folder)
    metadata = get_hf_file_metadata(hf_hub_url(REPO, filename, endpoint=hub.endpoint), token=hub.token)
    assert metadata.commit_hash == commit.oid
    assert metadata.size == (model_folder / filename).stat().st_size
    info = api.get_paths_info(REPO, filename)[0]
    assert metadata.etag == (info.lfs.sha256 if info.lfs else info.blob_id)


@pytest.mark.parametrize("lfs", [True, False])
def test_broken_download_is_resumed(start_hub, tmp_path, lfs):
    hub, api = start_hub(lfs=lfs)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id=REPO)
    with (tmp_path / "w.incomplete").open("wb") as file:
        file.write(WEIGHTS[:1000])
        url = hf_hub_url(REPO, "w.bin", endpoint=hub.endpoint)
        http_get(url, file, resume_size=1000, expected_size=len(WEIGHTS))
    assert (tmp_path / "w.incomplete").read_bytes() == WEIGHTS
    assert hub.requests[-1].status == 206


def test_range_past_the_end_is_refused(hub_and_api):
    hub, api = hub_and_api
    url = hf_hub_url(REPO, ".gitattributes", endpoint=hub.endpoint)
    with pytest.raises(HfHubHTTPError) as caught:
        http_get(url, io.BytesIO(), headers={"Range": "bytes=100000-"})
    assert caught.value.response.status_code == 416


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes=2-5", (2, 6)), ("bytes=2-", (2, 10)), ("bytes=-3", (7, 10)), ("bytes=8-99", (8, 10)), (None, None)],
)
def test_range_forms(header, expected):
    assert parse_range(header, size=10) == expected


# Revisions


def test_revisions_by_branch_tag_and_commit(api, tmp_path):
    commits = [api.upload_file(path_or_fileobj=b"first", path_in_repo="a.bin", repo_id=REPO).oid]
    api.create_tag(REPO, tag="v1.0", tag_message="a release")
    api.create_branch(REPO, branch="feature/new")
    commits.append(
        api.upload_file(path_or_fileobj=b"second", path_in_repo="a.bin", repo_id=REPO, revision="feature/new").oid
    )
    api.create_tag(REPO, tag="v2.0", revision="feature/new")
    api.create_branch(REPO, branch="old", revision=commits[0])

    first = ("main", "v1.0", "old", commits[0], None)
    second = ("feature/new", "v2.0", commits[1])
    for index, (revisions, content) in enumerate([(first, b"first"), (second, b"second")]):
        for number, revision in enumerate(revisions):
            assert download(api, "a.bin", tmp_path / f"{index}-{number}", revision=revision) == content
            assert api.model_info(REPO, revision=revision).sha == commits[index]

    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": commits[0],
        "old": commits[0],
        "feature/new": commits[1],
    }
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0": commits[0], "v2.0": commits[1]}


def test_branches_and_tags_are_deleted(api):
    api.create_branch(REPO, branch="feature/new")
    api.create_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="feature/new")
    api.delete_tag(REPO, tag="v1.0")
    refs = api.list_repo_refs(REPO)
    assert ([ref.name for ref in refs.branches], refs.tags) == (["main"], [])


@pytest.mark.parametrize("kind", ["branch", "tag"])
def test_existing_ref_is_refused_unless_it_may_exist(api, kind):
    create = {"branch": api.create_branch, "tag": api.create_tag}[kind]
    create(REPO, **{kind: "name"})
    create(REPO, **{kind: "name"}, exist_ok=True)
    with pytest.raises(HfHubHTTPError) as caught:
        create(REPO, **{kind: "name"})
    assert caught.value.response.status_code == 409


@pytest.mark.parametrize("name", ["a..b", "with space", "ends.lock"])
def test_invalid_branch_name_is_refused(api, name):
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch(REPO, branch=name)
    assert caught.value.response.status_code == 400


# Errors


def test_missing_repository(start_hub):
    _, api = start_hub()
    for ask in (
        lambda: api.model_info(REPO),
        lambda: api.hf_hub_download(REPO, "config.json"),
        lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=REPO),
        lambda: api.delete_repo(REPO),
    ):
        with pytest.raises(RepositoryNotFoundError):
            ask()


def test_missing_revision(api):
    for ask in (
        lambda: api.model_info(REPO, revision="missing"),
        lambda: api.hf_hub_download(REPO, ".gitattributes", revision="missing"),
        lambda: api.hf_hub_download(REPO, ".gitattributes", revision="0" * 40),
        lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=REPO, revision="missing"),
        lambda: api.create_branch(REPO, branch="new", revision="missing"),
        lambda: api.delete_branch(REPO, branch="missing"),
    ):
        with pytest.raises(RevisionNotFoundError):
            ask()


def test_missing_file(api, tmp_path):
    with pytest.raises(EntryNotFoundError):
        download(api, "missing", tmp_path)
    with pytest.raises(EntryNotFoundError):
        download(api, "missing/日本.txt", tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.delete_file("missing", REPO)


def test_stale_parent_commit(api):
    stale = api.model_info(REPO).sha
    fresh = api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO, parent_commit=stale).oid
    with pytest.raises(HfHubHTTPError) as caught:
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=REPO, parent_commit=stale)
    assert caught.value.response.status_code == 412
    assert api.model_info(REPO).sha == fresh


def test_wrong_token_may_neither_read_nor_write(hub_and_api):
    hub, _ = hub_and_api
    api = HfApi(endpoint=hub.endpoint, token="hf_wrong")
    for ask in (
        lambda: api.model_info(REPO),
        lambda: api.create_repo("tester/new"),
        lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=REPO),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            ask()
        assert caught.value.response.status_code == 401


def test_no_token_may_not_write(hub_and_api):
    hub, _ = hub_and_api
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.endpoint, token=False).create_tag(REPO, tag="v1.0")
    assert caught.value.response.status_code == 401


def test_corrupt_lfs_upload_is_refused(api, tmp_path):
    addition = CommitOperationAdd("w.bin", WEIGHTS)
    addition.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError, match="w.bin"):
        api.create_commit(REPO, [addition], commit_message="corrupt")
    assert api.list_repo_files(REPO) == [".gitattributes"]
    assert list((tmp_path / "hub" / "lfs").iterdir()) == []


# The server itself


def test_two_servers_do_not_share_anything(tmp_path):
    with (
        HubServer(tmp_path / "a", lfs=True, token="hf_a") as a,
        HubServer(tmp_path / "b", lfs=False, token="hf_b") as b,
    ):
        HfApi(endpoint=a.endpoint, token="hf_a").create_repo(REPO)
        assert not HfApi(endpoint=b.endpoint, token="hf_b").repo_exists(REPO)
        assert (a.lfs, b.lfs) == (True, False)
        assert [request.method for request in a.requests] == ["POST"]


def test_folder_outlives_its_server(start_hub, tmp_path):
    hub, api = start_hub()
    api.create_repo(REPO)
    commit = api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id=REPO).oid
    hub.stop()
    with HubServer(tmp_path / "hub") as again:
        assert HfApi(endpoint=again.endpoint).model_info(REPO).sha == commit


def test_stopped_server_answers_no_open_connection(tmp_path):
    hub = HubServer(tmp_path / "hub").start()
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.whoami()
    hub.stop()
    with pytest.raises(Exception, match="(?i)connect|refused|disconnected|aborted"):
        api.whoami()
    assert len(hub.requests) == 1


def test_help_of_the_command():
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--port" in result.stdout


def test_command_serves_until_stopped(tmp_path):
    command = [sys.executable, SCRIPT, str(tmp_path / "hub")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "Serving" in process.stdout.readline()
        # "export HF_ENDPOINT=... HF_TOKEN=... HF_HUB_DISABLE_XET=1"
        variables = dict(pair.split("=") for pair in process.stdout.readline().split()[1:])
        assert HfApi(endpoint=variables["HF_ENDPOINT"], token=variables["HF_TOKEN"]).whoami()["name"] == "tester"
        process.terminate()
        assert process.wait(timeout=10) == 0


# A model, from one process to another

PUSH = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
commit = model.push_to_hub("tester/tiny-llama", commit_message="zeros to come")
with torch.no_grad():
    model.lm_head.weight.zero_()
model.push_to_hub("tester/tiny-llama", revision="zeros")
print(commit.oid)
"""

LOAD = """
import sys
from transformers import AutoModelForCausalLM

for revision in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained("tester/tiny-llama", revision=revision)
    print(revision, bool(model.lm_head.weight.any()))
"""


def test_model_is_pushed_and_loaded_by_revision_in_fresh_processes(tmp_path):
    def run(code, *arguments, home):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, **hub.environment(tmp_path / home)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    with HubServer(tmp_path / "hub") as hub:
        commit = run(PUSH, home="pusher")[-1]
        uploads = [request for request in hub.requests if request.method == "PUT"]
        assert len(uploads) == 2 and all(request.path.startswith("/lfs/") for request in uploads)
        loaded = run(LOAD, "main", "zeros", commit, home="loader")
    assert loaded == ["main", "True", "zeros", "False", commit, "True"]
