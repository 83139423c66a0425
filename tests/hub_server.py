"""
A Hugging Face Hub on this machine, so that pushing and pulling are tested without the network.

From a test, where `huggingface_hub` talks to it over real HTTP:

    with HubServer(tmp_path) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)

or by hand, to try `push_to_hub` from any other shell:

    python tests/hub_server.py /tmp/hub --port 8000

Choices:

- Each Hub repository is one bare git repository, so commits, branches and tags are git's own and nothing here imitates
  them. Large files are git LFS pointers in those commits; their content lies in one folder, named by its SHA-256.
- It answers what `huggingface_hub` asks in push and pull, in the shapes that versions 0.36.2 and 2.4.0 read, and fails
  as the Hub does on a missing repository, revision or file, a stale parent commit and a wrong token.
- There is one user, who may write to every namespace. Xet storage, pull requests, `.gitignore` filtering, multi-part
  uploads, `git clone` and listing or searching repositories are not served.

A client process started for it needs the variables of `HubServer.environment`, before it imports `huggingface_hub`.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class HubError(Exception):
    """
    An answer that is not a success.

    Args:
        status (`int`): HTTP status.
        message (`str`): for the user; `huggingface_hub` appends it to its exception.
        code (`str`, *optional*): the `X-Error-Code` by which `huggingface_hub` chooses the class of that exception.
        headers (`dict`, *optional*): further headers.
        body (`dict`, *optional*): further fields of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict | None = None,
        body: dict | None = None,
    ):
        super().__init__(message)
        self.status = status
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()  # as headers must be
        self.headers = {"X-Error-Message": one_line, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **(body or {})}


KINDS = ("models", "datasets", "spaces")
REPO = r"\w[\w.-]*/\w[\w.-]*"  # no dot in front, so that no repository is named `..`

# What the Hub's own default `.gitattributes` sends to LFS, cut to the formats of this ecosystem.
LFS_SUFFIXES = ("bin", "gguf", "model", "npz", "onnx", "parquet", "pt", "pth", "safetensors", "zip")
LFS_THRESHOLD = 10 * 1024 * 1024  # bytes; larger files go to LFS whatever their name
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
LFS_POINTER_PATTERN = re.compile(LFS_POINTER.format(oid="([0-9a-f]{64})", size="([0-9]+)").encode())
LFS_POINTER_SIZES = range(120, 150)  # bytes; a blob of another size is no pointer and need not be read

# The one format of dates that `huggingface_hub` parses, in the words of git and of strftime.
DATE_FORMAT = "%Y-%m-%dT%H:%M:%S.000Z"

NO_OBJECT = "0" * 40  # git's name for "nothing there"
GIT_ENVIRONMENT = {
    # Without the caller's GIT_* variables (a test started by a git hook has GIT_DIR set) and git configuration.
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_LITERAL_PATHSPECS": "1",
    "TZ": "UTC",
}


# ---------------------------------------------------------------------------------------------------------------------
# Storage: git for commits, a folder for LFS objects
# ---------------------------------------------------------------------------------------------------------------------


class LfsInfo(NamedTuple):
    """What an LFS pointer says about the file it stands for."""

    oid: str  # SHA-256 of the content, 64 hexadecimal digits
    size: int  # bytes of the content


class Entry(NamedTuple):
    """One file or directory of a commit."""

    path: str
    type: str  # "file" or "directory"
    oid: str  # git object id, 40 hexadecimal digits
    blob_size: int  # bytes in git: of an LFS file, of its pointer
    lfs: LfsInfo | None = None

    @property
    def size(self) -> int:
        return self.lfs.size if self.lfs else self.blob_size

    @property
    def etag(self) -> str:
        return self.lfs.oid if self.lfs else self.oid

    def to_json(self) -> dict:
        """The entry as `/tree` and `/paths-info` write it."""
        data: dict = {"type": self.type, "path": self.path, "oid": self.oid, "size": self.size}
        if self.lfs:
            data["lfs"] = {"oid": self.lfs.oid, "size": self.lfs.size, "pointerSize": self.blob_size}
        return data

    def to_sibling(self, with_blobs: bool) -> dict:
        """The entry as the repository's info writes it, where LFS fields have other names."""
        data: dict = {"rfilename": self.path}
        if with_blobs:
            data.update(size=self.size, blobId=self.oid)
            if self.lfs:
                data["lfs"] = {"sha256": self.lfs.oid, "size": self.lfs.size, "pointerSize": self.blob_size}
        return data


class GitRepository:
    """A bare git repository, driven through the `git` command. A revision is a branch, a tag or a full commit hash."""

    def __init__(self, path: Path, user: str):
        self.path = path
        self.user = user

    def git(self, *arguments: str, data: bytes = b"", index: Path | None = None, check: bool = True) -> bytes:
        """Runs one git command with `data` on its input and returns its output, empty if it failed unchecked."""
        identity = {
            f"GIT_{role}_{field}": value
            for role in ("AUTHOR", "COMMITTER")
            for field, value in (("NAME", self.user), ("EMAIL", f"{self.user}@localhost"))
        }
        process = subprocess.run(
            ["git", "--git-dir", str(self.path), *arguments],
            input=data,
            capture_output=True,
            env={**GIT_ENVIRONMENT, **identity, **({"GIT_INDEX_FILE": str(index)} if index else {})},
        )
        if check and process.returncode != 0:
            raise RuntimeError(f"git {' '.join(arguments)} failed: {process.stderr.decode()}")
        return process.stdout if process.returncode == 0 else b""

    # Refs

    def find(self, name: str) -> str | None:
        """The commit hash that a full ref name or a commit hash stands for, or None."""
        return self.git("rev-parse", "--quiet", "--verify", f"{name}^{{commit}}", check=False).decode().strip() or None

    def resolve(self, revision: str) -> str:
        """The commit hash of a branch, a tag or a full commit hash."""
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if re.fullmatch("[0-9a-f]{40}", revision):
            names.insert(0, revision)
        for name in names:
            commit = self.find(name)
            if commit is not None:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create_ref(self, ref: str, revision: str, message: str | None = None) -> None:
        """Creates `refs/heads/...` or `refs/tags/...`; a tag with a message is an annotated one."""
        if not self.git("check-ref-format", "--normalize", ref, check=False):
            raise HubError(400, f"Invalid reference name: {ref}")
        commit = self.resolve(revision)
        if self.find(ref) is not None:
            raise HubError(409, f"Reference already exists: {ref}")
        if message and ref.startswith("refs/tags/"):
            self.git("tag", "--annotate", f"--message={message}", ref[len("refs/tags/") :], commit)
        else:
            self.git("update-ref", ref, commit, NO_OBJECT)

    def delete_ref(self, ref: str) -> None:
        if self.find(ref) is None:
            raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
        if ref == "refs/heads/main":
            raise HubError(403, "The default branch cannot be deleted")
        self.git("update-ref", "-d", ref)

    def refs(self, prefix: str) -> list:
        """Branches (`refs/heads/`) or tags (`refs/tags/`) as `/refs` writes them."""
        # An annotated tag's %(objectname) is the tag itself, and %(*objectname) the commit; the latter is else empty.
        rows = self.git("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", prefix).decode()
        return [
            {"name": ref[len(prefix) :], "ref": ref, "targetCommit": commit[-1]}
            for ref, *commit in (row.split() for row in rows.splitlines())
        ]

    # Reading

    def tree(self, commit: str, folder: str = "", recursive: bool = True) -> list:
        """The entries under a folder of a commit; with `recursive`, those of its sub-folders too."""
        flags = ["-r", "-t"] if recursive else []
        return self._list(*flags, commit, *([f"{folder}/"] if folder else []))

    def entry(self, commit: str, path: str) -> Entry | None:
        """The file or directory at `path`, or None."""
        return next((entry for entry in self._list(commit, "--", path) if entry.path == path), None)

    def _list(self, *arguments: str) -> list:
        entries = []
        for row in self.git("ls-tree", "--long", "-z", *arguments).decode().split("\0")[:-1]:
            meta, path = row.split("\t", 1)
            _mode, kind, oid, size = meta.split()  # size is "-" for a directory
            is_file = kind == "blob"
            entries.append(Entry(path, "file" if is_file else "directory", oid, int(size) if is_file else 0))
        pointers = self._read_pointers(entries)
        return [entry._replace(lfs=pointers.get(entry.oid)) for entry in entries]

    def _read_pointers(self, entries: list) -> dict:
        """The LFS pointers among the entries, by their git object ids; one git process for all of them."""
        candidates = [entry.oid for entry in entries if entry.blob_size in LFS_POINTER_SIZES]
        if not candidates:
            return {}
        # One "<oid> blob <size>\n<content>\n" for each id.
        output = io.BytesIO(self.git("cat-file", "--batch", data="\n".join(candidates).encode()))
        pointers = {}
        for oid in candidates:
            size = int(output.readline().split()[-1])
            match = LFS_POINTER_PATTERN.fullmatch(output.read(size + 1)[:-1])
            if match:
                pointers[oid] = LfsInfo(match[1].decode(), int(match[2]))
        return pointers

    def read(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def log(self, commit: str) -> list:
        """The history from a commit backwards as `/commits` writes it."""
        fields = ("%H", "%an", "%ad", "%s", "%b")
        output = self.git("log", "-z", f"--format={'%x01'.join(fields)}", f"--date=format-local:{DATE_FORMAT}", commit)
        commits = []
        for row in output.decode().rstrip("\0").split("\0"):
            oid, author, date, title, message = row.split("\x01")
            commits.append(
                {"id": oid, "authors": [{"user": author}], "date": date, "title": title, "message": message.strip()}
            )
        return commits

    # Writing

    def commit(self, branch: str, message: str, changes: list, parent: str | None = None) -> str:
        """
        Commits `(path, content)` pairs on top of a branch, where a content of None deletes the path.

        Returns:
            `str`: The new commit's hash, which the branch now points to.
        """
        # "<mode> <oid>\t<path>\0" for `git update-index`; mode 0 removes.
        rows = []
        for path, content in changes:
            if content is None:
                rows.append(f"0 {NO_OBJECT}\t{path}\0")
            else:
                oid = self.git("hash-object", "-w", "--stdin", data=content).decode().strip()
                rows.append(f"100644 {oid}\t{path}\0")
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index"
            if parent is not None:
                self.git("read-tree", parent, index=index)
            self.git("update-index", "-z", "--replace", "--index-info", data="".join(rows).encode(), index=index)
            tree = self.git("write-tree", index=index).decode().strip()
        parents = ["-p", parent] if parent else []
        commit = self.git("commit-tree", tree, *parents, data=message.encode()).decode().strip()
        self.git("update-ref", f"refs/heads/{branch}", commit, parent or NO_OBJECT)
        return commit


class HubStorage:
    """
    The folder behind a server: `models/`, `datasets/` and `spaces/` hold `<namespace>/<name>.git`, and `lfs/` the LFS
    objects of all of them. A lock keeps writers apart; readers need none, as git's objects never change.
    """

    def __init__(self, root: Path, user: str):
        self.root = Path(root)
        self.user = user
        self.lock = threading.Lock()
        self.lfs_folder = self.root / "lfs"
        self.lfs_folder.mkdir(parents=True, exist_ok=True)

    def repository(self, kind: str, repo: str) -> GitRepository:
        path = self.root / kind / f"{repo}.git"
        if not path.is_dir():
            raise HubError(404, f"Repository not found: {kind}/{repo}", "RepoNotFound")
        return GitRepository(path, self.user)

    def create(self, kind: str, repo: str, private: bool) -> None:
        path = self.root / kind / f"{repo}.git"
        path.parent.mkdir(parents=True, exist_ok=True)
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            # Made aside and moved, so that no reader sees half a repository.
            repository = GitRepository(Path(folder) / "new.git", self.user)
            repository.git("init", "--quiet", "--bare", "--initial-branch=main")
            repository.git("config", "hub.private", str(private).lower())
            repository.commit("main", "initial commit", [(".gitattributes", attributes.encode())])
            repository.path.rename(path)

    def is_private(self, repository: GitRepository) -> bool:
        return repository.git("config", "hub.private", check=False).strip() == b"true"

    def lfs_path(self, oid: str) -> Path:
        return self.lfs_folder / oid

    def add_lfs_object(self, oid: str, content) -> None:
        """Stores the content of a binary file object, unless it does not hash to `oid`."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.lfs_folder, delete=False) as file:
            for chunk in iter(partial(content.read, 2**20), b""):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != oid:
            os.unlink(file.name)
            raise HubError(400, f"The content's SHA-256 is {digest.hexdigest()}, not {oid}")
        os.replace(file.name, self.lfs_path(oid))


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A request as the server logged it."""

    method: str
    path: str  # without the query, still percent-encoded
    status: int  # of the answer


def parse_range(header: str | None, size: int) -> tuple | None:
    """`bytes=2-5`, `bytes=2-` or `bytes=-3` as the first byte and the one past the last; None to send everything."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match[0] == "bytes=-":
        return None
    if match[1] == "":  # the last bytes
        start, stop = max(size - int(match[2]), 0), size
    else:
        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


class HubHandler(BaseHTTPRequestHandler):
    """
    One connection. Each method below "Handlers" answers one row of `ROUTES`; its arguments are the parts of the path
    in braces there. Arrows in the comments show the wire: `->` from the client, `<-` to it.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers and body, two small writes, wait 40 ms for each other

    def __init__(self, hub: "HubServer", *arguments):
        self.hub = hub
        self.storage = hub.storage
        super().__init__(*arguments)  # handles the whole connection

    def do_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # The body is read whole before the answer: one left unread would be taken for the connection's next request.
        with tempfile.SpooledTemporaryFile(max_size=2**20) as self.body:
            self.read_body()
            try:
                self.route(url.path)
            except HubError as error:
                self.send_json(error.body, error.status, error.headers)
            except ConnectionError:  # the client left
                raise
            except Exception as error:
                self.send_json({"error": f"{type(error).__name__}: {error}"}, 500)
                raise  # the server prints it

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def route(self, path: str) -> None:
        self.authenticate()
        for route in ROUTES:
            match = route.pattern.fullmatch(path)
            if match and self.command in route.methods:
                if route.needs_token and not self.authenticated:
                    raise HubError(401, "Invalid username or password.")
                # Parts are decoded after the match, since a revision or a path may hold an encoded slash.
                return route.handler(self, **{name: unquote(part or "") for name, part in match.groupdict().items()})
        raise HubError(404, f"This test server has no route {self.command} {path}")

    def authenticate(self) -> None:
        """Sets `authenticated`. Reading needs no token, but a wrong one is refused, as on the Hub."""
        header = self.headers.get("Authorization")
        if header not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        self.authenticated = header is not None

    def repository(self, kind: str, repo: str) -> GitRepository:
        """The repository; `kind` is "models", ... or the prefix of an address outside of the API, "" for models."""
        kind = kind.rstrip("/") or "models"
        repository = self.storage.repository(kind, repo)
        if not self.authenticated and self.storage.is_private(repository):
            raise HubError(401, f"Repository not found: {kind}/{repo}", "RepoNotFound")
        return repository

    def read_body(self) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            # "<size in hexadecimal>\r\n<bytes>\r\n", again and again; size 0 ends it
            size = -1
            while size != 0:
                size = int(self.rfile.readline().split(b";")[0], 16)
                self.body.write(self.rfile.read(size))
                self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left > 0:
                chunk = self.rfile.read(min(left, 2**20))
                if not chunk:
                    raise ConnectionResetError("The client closed the connection within a body")
                self.body.write(chunk)
                left -= len(chunk)
        self.body.seek(0)

    def read_json(self) -> dict:
        return json.loads(self.body.read() or b"{}")

    def start_answer(self, status: int, headers: dict) -> None:
        self.hub.requests.append(Request(self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_json(self, data=None, status: int = 200, headers: dict | None = None) -> None:
        content = json.dumps({} if data is None else data).encode()
        self.start_answer(
            status, {"Content-Type": "application/json", "Content-Length": len(content), **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_content(self, content: BinaryIO, size: int, headers: dict) -> None:
        """Sends `size` bytes, or those the client's `Range` asks for."""
        requested = parse_range(self.headers.get("Range"), size)
        start, stop = requested or (0, size)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": stop - start,
            "Accept-Ranges": "bytes",
            **headers,
        }
        if requested:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.start_answer(206 if requested else 200, headers)
        if self.command != "HEAD":
            content.seek(start)
            while start < stop:
                start += self.wfile.write(content.read(min(stop - start, 2**20)))

    def log_message(self, *arguments) -> None:
        """Prints nothing: `HubServer.requests` is the log."""

    # Handlers: the account and its repositories

    def whoami(self) -> None:
        role = {"accessToken": {"role": "write", "displayName": "test"}}
        name = self.hub.user
        self.send_json({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": role})

    def create_repository(self) -> None:
        # -> {"name", "organization"?, "type"?, "private"? (0.x) or "visibility"? (2.x)}
        data = self.read_json()
        kind, repo = self.named_repository(data)
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo}"
        if not re.fullmatch(REPO, repo):
            raise HubError(400, f"Invalid repository name: {repo}")
        with self.storage.lock:
            if (self.storage.root / kind / f"{repo}.git").exists():
                raise HubError(409, f"You already created this repository: {repo}", body={"url": url})
            self.storage.create(kind, repo, private=bool(data.get("private")) or data.get("visibility") == "private")
        # <- the URL, of which the client makes its `RepoUrl`
        self.send_json({"url": url, "name": repo})

    def delete_repository(self) -> None:
        # -> {"name", "organization"?, "type"?}
        with self.storage.lock:
            shutil.rmtree(self.repository(*self.named_repository(self.read_json())).path)
        self.send_json()

    def named_repository(self, data: dict) -> tuple:
        """The kind ("models", ...) and the id of the repository that the JSON of creating and deleting names."""
        kind = f"{data.get('type') or 'model'}s"
        if kind not in KINDS:
            raise HubError(400, f"Invalid repository type: {data.get('type')}")
        return kind, f"{data.get('organization') or self.hub.user}/{data['name']}"

    def validate_yaml(self) -> None:
        # -> {"content": a README's text, "repoType"}. Without a YAML parser in the standard library, all is valid.
        self.send_json({"errors": [], "warnings": []})

    # Handlers: reading a repository

    def info(self, kind: str, repo: str, revision: str) -> None:
        repository = self.repository(kind, repo)
        commit = repository.resolve(revision or "main")
        files = [entry for entry in repository.tree(commit) if entry.type == "file"]
        history = repository.log(commit)
        self.send_json(
            {
                "_id": hashlib.sha256(repo.encode()).hexdigest()[:24],
                "id": repo,
                "author": repo.split("/")[0],
                "sha": commit,
                "createdAt": history[-1]["date"],
                "lastModified": history[0]["date"],
                "private": self.storage.is_private(repository),
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                **self.card_fields(repository, files),
                "siblings": [file.to_sibling(with_blobs="blobs" in self.query) for file in files],
            }
        )

    def card_fields(self, repository: GitRepository, files: list) -> dict:
        """
        The fields of README.md's metadata that `transformers.pipeline(model=...)` chooses its task by. Only these two,
        and only in the form `name: value`, as the standard library has no YAML parser.
        """
        readme = next((file for file in files if file.path == "README.md" and not file.lfs), None)
        text = repository.read(readme.oid).decode(errors="replace") if readme else ""
        metadata = re.match(r"---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
        return dict(re.findall(r"^(library_name|pipeline_tag): *(\S+) *$", metadata[1] if metadata else "", re.M))

    def tree(self, kind: str, repo: str, revision: str, path: str) -> None:
        # <- [{"type": "file" or "directory", "path", "oid", "size", "lfs"?: {"oid", "size", "pointerSize"}}, ...]
        repository = self.repository(kind, repo)
        commit = repository.resolve(revision)
        folder = path.strip("/")
        if folder:
            entry = repository.entry(commit, folder)
            if entry is None or entry.type != "directory":
                raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries = repository.tree(commit, folder, recursive)
        self.send_json(
            # With `recursive`, git also lists the folder itself and those above it.
            [entry.to_json() for entry in entries if not folder or entry.path.startswith(f"{folder}/")],
            headers={"X-Repo-Commit": commit},
        )

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        # -> paths=a&paths=b/c, form-encoded. <- as for the tree; paths that do not exist are left out
        repository = self.repository(kind, repo)
        paths = set(parse_qs(self.body.read().decode()).get("paths", []))
        entries = repository.tree(repository.resolve(revision))
        self.send_json([entry.to_json() for entry in entries if entry.path in paths])

    def commits(self, kind: str, repo: str, revision: str) -> None:
        repository = self.repository(kind, repo)
        self.send_json(repository.log(repository.resolve(revision)))

    def refs(self, kind: str, repo: str) -> None:
        repository = self.repository(kind, repo)
        branches, tags = repository.refs("refs/heads/"), repository.refs("refs/tags/")
        self.send_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        """A file's content (GET) or what the cache needs to know of it (HEAD)."""
        repository = self.repository(kind, repo)
        commit = repository.resolve(revision)
        # Sent with "not found" too: the client caches that the file is missing from this commit.
        headers: dict = {"X-Repo-Commit": commit}
        entry = repository.entry(commit, path)
        if entry is None or entry.type != "file":
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{entry.etag}"'
        if entry.lfs:
            # The Hub redirects to its file store at this point, with these headers about the file that is found there.
            # Here there is no other host, and huggingface_hub 2.x would take the redirect for one within the Hub.
            headers.update({"X-Linked-ETag": headers["ETag"], "X-Linked-Size": entry.size})
            with self.storage.lfs_path(entry.lfs.oid).open("rb") as content:
                self.send_content(content, entry.size, headers)
        else:
            self.send_content(io.BytesIO(repository.read(entry.oid)), entry.size, headers)

    # Handlers: writing to a repository

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        """Tells which of the files to be committed must be uploaded to LFS beforehand."""
        # -> {"files": [{"path", "size", "sample": its first 512 bytes in base64}, ...], "gitIgnore"?}
        repository = self.repository(kind, repo)
        present = {entry.path: entry for entry in repository.tree(repository.resolve(revision))}
        files = []
        for file in self.read_json()["files"]:
            path = file["path"]
            to_lfs = self.hub.lfs and (file["size"] > LFS_THRESHOLD or path.split(".")[-1] in LFS_SUFFIXES)
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if to_lfs else "regular",
                    "shouldIgnore": False,
                    # The client compares it with its own file, and leaves unchanged files out of the commit.
                    "oid": present[path].etag if path in present else None,
                }
            )
        # <- {"files": [{"path", "uploadMode": "lfs" or "regular", "shouldIgnore", "oid"}, ...]}
        self.send_json({"files": files})

    def lfs_batch(self, kind: str, repo: str) -> None:
        """git LFS's batch API: where to upload which objects."""
        # -> {"operation": "upload", "transfers": ["basic", ...], "objects": [{"oid", "size"}, ...], "hash_algo"}
        self.repository(kind, repo)
        objects = []
        for item in self.read_json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not self.storage.lfs_path(item["oid"]).exists():  # no "actions": nothing to upload
                url = self.lfs_url(item["oid"])
                answer["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(answer)
        # <- {"transfer", "objects": [{"oid", "size", "actions"?: {"upload": {"href"}, "verify": {"href"}}}, ...]}
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_url(self, oid: str) -> str:
        return f"{self.hub.endpoint}/lfs/{oid}"

    def lfs_upload(self, oid: str) -> None:
        # No token: to the client it is a pre-signed URL of another host's.
        self.storage.add_lfs_object(oid, self.body)
        self.send_json()

    def lfs_verify(self, oid: str) -> None:
        # -> {"oid", "size"}
        path = self.storage.lfs_path(oid)
        if not path.exists() or path.stat().st_size != self.read_json()["size"]:
            raise HubError(422, f"LFS object {oid} was not uploaded completely")
        self.send_json()

    def commit(self, kind: str, repo: str, revision: str) -> None:
        # -> one JSON object a line, {"key", "value"}: first a "header", then the operations
        if "create_pr" in self.query:
            raise HubError(400, "This test server has no pull requests")
        repository = self.repository(kind, repo)
        header, *operations = (json.loads(line) for line in self.body)
        header = header["value"]  # {"summary", "description", "parentCommit"?}
        message = f"{header['summary']}\n\n{header.get('description') or ''}".strip()
        with self.storage.lock:
            parent = repository.find(f"refs/heads/{revision}")
            if parent is None:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if not parent.startswith(header.get("parentCommit") or ""):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            changes = self.changes(operations, [entry.path for entry in repository.tree(parent)])
            commit = repository.commit(revision, message, changes, parent)
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.hub.endpoint}/{prefix}{repo}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def changes(self, operations: list, present: list) -> list:
        """The operations of a commit request as the `(path, content)` pairs of `GitRepository.commit`."""
        changes: list = []
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":  # {"path", "content", "encoding": "base64"}
                changes.append((path, base64.b64decode(value["content"])))
            elif key == "lfsFile":  # {"path", "algo": "sha256", "oid", "size"?}; no size if copied from another file
                oid = value["oid"]
                if not self.storage.lfs_path(oid).exists():
                    raise HubError(400, f"LFS object {oid} of {path} was never uploaded")
                size = self.storage.lfs_path(oid).stat().st_size
                changes.append((path, LFS_POINTER.format(oid=oid, size=size).encode()))
            elif key in ("deletedFile", "deletedFolder"):  # {"path"}
                folder = f"{path.rstrip('/')}/"
                deleted = [name for name in present if name == path or name.startswith(folder)]
                if not deleted or (key == "deletedFile" and deleted != [path]):
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes.extend((name, None) for name in deleted)
            else:
                raise HubError(400, f"Unknown operation {key}")
        return changes

    def create_branch(self, kind: str, repo: str, name: str) -> None:
        # -> {"startingPoint"?: a revision}
        repository = self.repository(kind, repo)
        with self.storage.lock:
            repository.create_ref(f"refs/heads/{name}", self.read_json().get("startingPoint") or "main")
        self.send_json()

    def delete_branch(self, kind: str, repo: str, name: str) -> None:
        with self.storage.lock:
            self.repository(kind, repo).delete_ref(f"refs/heads/{name}")
        self.send_json()

    def create_tag(self, kind: str, repo: str, name: str) -> None:
        # Here the path's last part is the revision to be tagged. -> {"tag": its name, "message"?}
        repository, data = self.repository(kind, repo), self.read_json()
        with self.storage.lock:
            repository.create_ref(f"refs/tags/{data['tag']}", name, data.get("message"))
        self.send_json()

    def delete_tag(self, kind: str, repo: str, name: str) -> None:
        with self.storage.lock:
            self.repository(kind, repo).delete_ref(f"refs/tags/{name}")
        self.send_json()


class Route:
    """A row of the routing table: `{name}` in the path is what the handler gets as `name`."""

    PARTS = {
        "kind": f"(?P<kind>{'|'.join(KINDS)})",
        "prefix": "(?P<kind>(?:datasets/|spaces/)?)",  # models have no prefix in addresses outside of the API
        "repo": f"(?P<repo>{REPO})",
        "revision": "(?P<revision>[^/]+)",
        "name": "(?P<name>.+)",
        "path": "(?P<path>.+)",
        "oid": "(?P<oid>[0-9a-f]{64})",
    }

    def __init__(self, methods: str, path: str, handler, needs_token: bool = False):
        self.methods = methods.split()
        self.pattern = re.compile(re.sub(r"\{(\w+)\}", lambda match: self.PARTS[match[1]], path))
        self.handler = handler
        self.needs_token = needs_token


ROUTES = [
    Route("GET", "/api/whoami-v2", HubHandler.whoami, needs_token=True),
    Route("POST", "/api/repos/create", HubHandler.create_repository, needs_token=True),
    Route("DELETE", "/api/repos/delete", HubHandler.delete_repository, needs_token=True),
    Route("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    # Reading
    Route("GET", "/api/{kind}/{repo}(?:/revision/{revision})?", HubHandler.info),
    Route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?", HubHandler.tree),
    Route("POST", "/api/{kind}/{repo}/paths-info/{revision}", HubHandler.paths_info),
    Route("GET", "/api/{kind}/{repo}/commits/{revision}", HubHandler.commits),
    Route("GET", "/api/{kind}/{repo}/refs", HubHandler.refs),
    Route("GET HEAD", "/{prefix}{repo}/resolve/{revision}/{path}", HubHandler.resolve),
    # Writing
    Route("POST", "/api/{kind}/{repo}/preupload/{revision}", HubHandler.preupload, needs_token=True),
    Route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch", HubHandler.lfs_batch, needs_token=True),
    Route("PUT", "/lfs/{oid}", HubHandler.lfs_upload),
    Route("POST", "/lfs/{oid}/verify", HubHandler.lfs_verify, needs_token=True),
    Route("POST", "/api/{kind}/{repo}/commit/{revision}", HubHandler.commit, needs_token=True),
    Route("POST", "/api/{kind}/{repo}/branch/{name}", HubHandler.create_branch, needs_token=True),
    Route("DELETE", "/api/{kind}/{repo}/branch/{name}", HubHandler.delete_branch, needs_token=True),
    Route("POST", "/api/{kind}/{repo}/tag/{name}", HubHandler.create_tag, needs_token=True),
    Route("DELETE", "/api/{kind}/{repo}/tag/{name}", HubHandler.delete_tag, needs_token=True),
]


class ClosingHTTPServer(ThreadingHTTPServer):
    """A thread for each connection, and `close_connections` to end those that clients keep open for later requests."""

    daemon_threads = True
    request_queue_size = 128  # the default of 5 delays a client with more threads by a second

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.connections: set = set()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may leave, as when a download is cancelled
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it was closed meanwhile
                pass


class HubServer:
    """
    A Hub in this process, in threads of its own and on 127.0.0.1 only: a context manager, or call `start` and `stop`.

    Args:
        root (`str` or `Path`):
            Folder of the repositories and LFS objects. Created if missing; what it already holds is served.
        lfs (`bool`, *optional*, defaults to `True`):
            Whether clients must upload weights (`LFS_SUFFIXES`) and files over `LFS_THRESHOLD` to LFS, as on the Hub.
            They need `HF_HUB_DISABLE_XET=1` then, as there is no Xet storage. With `False` all files are regular ones.
        port (`int`, *optional*, defaults to 0):
            Port to listen on; 0 for any free one.
        user (`str`, *optional*, defaults to `"tester"`):
            Name of the one account, and the default namespace.
        token (`str`, *optional*, defaults to `"hf_test"`):
            The account's token, with write access.

    Attributes:
        endpoint (`str`): Base URL, known once the server has started.
        requests (`list[Request]`): What was asked so far, oldest first: `(method, path, status)`.
    """

    def __init__(self, root, lfs: bool = True, port: int = 0, user: str = "tester", token: str = "hf_test"):
        self.storage = HubStorage(root, user)
        self.lfs = lfs
        self.port = port
        self.user = user
        self.token = token
        self.endpoint = ""
        self.requests: list = []

    def start(self) -> "HubServer":
        self._server = ClosingHTTPServer(("127.0.0.1", self.port), partial(HubHandler, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends open connections too, so that a client finds no Hub from here on."""
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *exception) -> None:
        self.stop()

    def environment(self, home) -> dict:
        """
        The variables, to be added to `os.environ`, of a fresh process that takes this server for the Hub.

        Args:
            home (`str` or `Path`): Folder for that process's cache; an empty one makes it download everything.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_MODULES_CACHE": str(Path(home) / "modules"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",  # a test run may be offline as a whole
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serve a folder as a Hugging Face Hub on 127.0.0.1.")
    parser.add_argument("folder", help="where the repositories are kept; created if missing")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--no-lfs", action="store_true", help="take weights as regular files, not through LFS")
    return parser


def main(arguments=None) -> None:
    options = make_parser().parse_args(arguments)
    for stop in (signal.SIGINT, signal.SIGTERM):  # also where a shell started it in the background, without SIGINT
        signal.signal(stop, signal.default_int_handler)
    with HubServer(options.folder, lfs=not options.no_lfs, port=options.port) as hub:
        print(f"Serving {options.folder}; Ctrl+C stops. In another shell:")
        print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nStopped.")


if __name__ == "__main__":
    main()
