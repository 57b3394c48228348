"""A Hub for tests: the calls of the Hub's HTTP API that `huggingface_hub` makes to push and pull a model, on loopback.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("adapter")

Repositories are private or public, have branches and pull requests, and keep every commit. Weights go through Git LFS,
in one part or several, everything else inside the commit. `hub.received` is every byte that clients sent. `hub.fail`
makes chosen requests fail: with a status, by cutting the connection while the body is read, or by never answering.
Xet storage is not spoken: clients run with HF_HUB_DISABLE_XET=1, or upload small files only (`lfs_suffixes=()`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_card_rules import card_problems

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet", ".msgpack")  # as in a new repo's attributes
TOKEN = "hf_" + "TestOnlyAda" * 3 + "X"  # of the Hub's form, and of no account
READ_TOKEN = "hf_" + "TestOnlyBob" * 3 + "X"
EPOCH = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub calls the file: sha256 of the content in LFS, git's sha1 otherwise."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(f"blob {len(self.data)}\0".encode() + self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)  # "main", other branches, "refs/pr/1"
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)  # titles

    def commit(self, ref: str, message: str, files: dict[str, Blob]) -> Commit:
        made = Commit(secrets.token_hex(20), message, files)
        self.commits[made.oid] = self.refs[ref] = made
        return made

    def at(self, revision: str) -> Commit:
        found = self.refs.get(revision) or self.commits.get(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def open_pull_request(self, title: str, at: str) -> str:
        self.pull_requests.append(title)
        ref = f"refs/pr/{len(self.pull_requests)}"
        self.refs[ref] = self.at(at)
        return ref


@dataclass
class Failure:
    """Requests whose "METHOD /path" matches fail so many times: `how` is a status, "cut" or "silence"."""

    request: str
    how: int | str
    times: int
    headers: dict[str, str]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """State of the Hub, and the server that speaks for it."""

    def __init__(self, lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES, part_size: int | None = None) -> None:
        self.lfs_suffixes = lfs_suffixes
        self.part_size = part_size  # above it LFS uploads come in several parts
        self.users = {TOKEN: "ada", READ_TOKEN: "bob"}
        self.read_only = {READ_TOKEN}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.received: list[bytes] = []  # bodies, and files as they were before base64
        self.lock = threading.RLock()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"  # another host, as the Hub's storage is

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = Repo(repo_id, private)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in self.lfs_suffixes)
        blobs = {".gitattributes": Blob(rules.encode(), lfs=False)}
        for path, data in (files or {}).items():
            blobs[path] = Blob(data, lfs=self.is_lfs(path))
            self.lfs[blobs[path].oid] = data
        repo.commit("main", "initial commit", blobs)
        self.repos[repo_id] = repo
        return repo

    def fail(self, request: str, how: int | str, times: int = 1, **headers: str) -> Failure:
        """The next `times` requests that match the regular expression `request` fail."""
        self.failures.append(Failure(request, how, times, headers))
        return self.failures[-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        blobs = self.repos[repo_id].at(revision).files
        return {path: blob.data for path, blob in blobs.items() if path != ".gitattributes"}

    def is_lfs(self, path: str) -> bool:
        return path.endswith(self.lfs_suffixes)

    def wait_while_silent(self) -> None:
        self._stopped.wait(60)

    def count(self, request: str) -> int:
        """How many requests matched so far."""
        return sum(re.search(request, made) is not None for made in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *args: Any) -> None:
        """Nothing: tests look at stderr."""

    def _serve(self) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(name)
        try:
            if self._fails(name):
                return
            self.body = self._read(int(self.headers.get("Content-Length") or 0))
            self.hub.received.append(self.body)
            for method, pattern, action, needs_user in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split("|"):
                    self.user = self._user(required=needs_user)
                    with self.hub.lock:
                        action(self, **{key: unquote(value) for key, value in match.groupdict("").items()})
                    return
            raise Refusal(404, f"Not found: {name}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message.replace("\n", " ")}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json({"error": refusal.message, **refusal.body}, refusal.status, headers)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read(self, size: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while length := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(size)

    def _fails(self, name: str) -> bool:
        with self.hub.lock:
            failure = next((f for f in self.hub.failures if f.times > 0 and re.search(f.request, name)), None)
            if failure is None:
                return False
            failure.times -= 1
        size = int(self.headers.get("Content-Length") or 0)
        if failure.how == "cut":
            self.hub.received.append(self._read(size // 2))
            # linger 0: a reset, as when a router dies, not a polite end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return True
        if failure.how == "silence":
            self.hub.wait_while_silent()
            self.close_connection = True
            return True
        self.hub.received.append(self._read(size))
        self._json({"error": f"status {failure.how}"}, int(failure.how), failure.headers)
        return True

    def _user(self, required: bool) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise Refusal(401, "Invalid username or password.")
        if required and self.command != "GET" and token in self.hub.read_only:
            raise Refusal(403, "You don't have the required permissions: this token is read-only")
        return self.hub.users.get(token)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Request-Id", secrets.token_hex(4))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repo(self, repo: str) -> Repo:
        """A private repository does not exist for whoever does not own it; without a token the Hub says 401."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.user != repo.split("/")[0]):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return found

    def _own(self, repo: str) -> Repo:
        found = self._repo(repo)
        if self.user != repo.split("/")[0]:
            raise Refusal(403, "You don't have the required permissions to write to this repository")
        return found

    # --- accounts and repositories ---

    def whoami(self) -> None:
        self._json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": {"type": "access"}})

    def telemetry(self) -> None:
        self._json({})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        if owner != self.user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repos:
            raise Refusal(409, "You already created this model repo", **url)
        self.hub.add_repo(repo, private=asked.get("visibility") == "private")
        self._json(url)

    def validate(self) -> None:
        asked = json.loads(self.body)
        errors, warnings = card_problems(asked["content"])
        said = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        self._json(said, 400 if errors else 200)

    def info(self, repo: str, revision: str = "") -> None:
        found = self._repo(repo)
        commit = found.at(revision or "main")
        self._json(
            {
                "_id": "0" * 24,
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.oid,
                "private": found.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "createdAt": EPOCH,
                "lastModified": EPOCH,
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    def refs(self, repo: str) -> None:
        named = {
            name: {"name": name, "ref": name, "targetCommit": commit.oid}
            for name, commit in self._repo(repo).refs.items()
        }
        branches = [ref for name, ref in named.items() if not name.startswith("refs/pr/")]
        self._json({"branches": branches, "converts": [], "tags": []})

    def branch(self, repo: str, branch: str) -> None:
        found = self._own(repo)
        if branch in found.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        found.refs[branch] = found.at(json.loads(self.body or b"{}").get("startingPoint") or "main")
        self._json({})

    def open_discussion(self, repo: str) -> None:
        asked = json.loads(self.body)
        found = self._repo(repo)
        assert asked["pullRequest"] is True
        ref = found.open_pull_request(asked["title"], "main")
        self._json({"num": int(ref.rsplit("/", 1)[1])})

    def discussion(self, repo: str, number: str) -> None:
        self._json(
            {
                "title": self._repo(repo).pull_requests[int(number) - 1],
                "num": int(number),
                "author": {"name": self.user or "someone"},
                "createdAt": EPOCH,
                "status": "draft",
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
            }
        )

    # --- upload ---

    def preupload(self, repo: str, revision: str) -> None:
        found = self._repo(repo) if "create_pr" in self.query else self._own(repo)
        files = found.at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            known = files.get(asked["path"])
            mode = "lfs" if self.hub.is_lfs(asked["path"]) else "regular"
            answer = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": known.oid} if known else {}))
        self._json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self._repo(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if oid in self.hub.lfs:
                objects.append({"oid": oid, "size": size})
                continue
            upload: dict[str, Any] = {"href": f"{self.hub.cdn}/lfs/{oid}"}
            step = self.hub.part_size
            if step is not None and size > step:
                parts = {f"{n + 1}": f"{self.hub.cdn}/lfs/{oid}/{n + 1}" for n in range(-(-size // step))}
                upload = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(step), **parts}}
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, part: str = "") -> None:
        if part:
            self.hub.parts[oid, int(part)] = self.body
        else:
            self._store(oid, self.body)
        self._bytes(b"", headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def lfs_complete(self, oid: str) -> None:
        asked = json.loads(self.body)["parts"]
        parts = [self.hub.parts[oid, part["partNumber"]] for part in asked]
        if [hashlib.md5(part).hexdigest() for part in parts] != [part["etag"] for part in asked]:
            raise Refusal(400, "wrong etag of a part")
        self._store(oid, b"".join(parts))
        self._json({})

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.hub.lfs[oid] = data

    def lfs_verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "no such object")
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        in_new_pr = "create_pr" in self.query
        found = self._repo(repo) if in_new_pr or revision.startswith("refs/pr/") else self._own(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = dict(found.at(revision).files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                self.hub.received.append(files[value["path"]].data)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.hub.lfs[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        errors, _ = card_problems(files["README.md"].data.decode()) if "README.md" in files else ([], [])
        if errors:
            raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
        if revision not in found.refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        ref = found.open_pull_request(header["summary"], revision) if in_new_pr else revision
        made = found.commit(ref, header["summary"], files)
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}"}
        number = ref.rsplit("/", 1)[-1]
        self._json(answer | ({"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"} if in_new_pr else {}))

    # --- download ---

    def tree(self, repo: str, revision: str) -> None:
        self._json([_entry(path, blob) for path, blob in self._repo(repo).at(revision).files.items()])

    def paths_info(self, repo: str, revision: str) -> None:
        files = self._repo(repo).at(revision).files
        self._json([_entry(path, files[path]) for path in json.loads(self.body)["paths"] if path in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._repo(repo).at(revision)
        blob = commit.files.get(path)
        about = {"X-Repo-Commit": commit.oid}
        if blob is None:
            self._json({"error": "Entry not found"}, 404, {**about, "X-Error-Code": "EntryNotFound"})
            return
        about |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.oid}"', "ETag": f'"{blob.oid}"'}
        if blob.lfs:
            self._bytes(b"", 302, {**about, "Location": f"{self.hub.cdn}/lfs/{blob.oid}"})
        else:
            self._bytes(blob.data, headers=about)

    def lfs_get(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")  # what storage says to a token sent along
        self._bytes(self.hub.lfs[oid])


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    return entry | ({"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}} if blob.lfs else {})


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_ID}"
_ROUTES: list[tuple[str, str, Callable[..., None], bool]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami, True),
    ("GET|HEAD", "/api/telemetry/.*", _Handler.telemetry, False),
    ("POST", "/api/repos/create", _Handler.create, True),
    ("POST", "/api/validate-yaml", _Handler.validate, False),
    ("GET", _API, _Handler.info, False),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _Handler.info, False),
    ("GET", rf"{_API}/refs", _Handler.refs, False),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)/?", _Handler.tree, False),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info, False),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", _Handler.branch, True),
    ("POST", rf"{_API}/discussions", _Handler.open_discussion, True),
    ("GET", rf"{_API}/discussions/(?P<number>\d+)", _Handler.discussion, False),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload, True),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit, True),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch, True),
    ("POST", rf"/{_ID}\.git/info/lfs/verify", _Handler.lfs_verify, True),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)(/(?P<part>\d+))?", _Handler.lfs_put, False),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]+)/complete", _Handler.lfs_complete, False),
    ("GET|HEAD", r"/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_get, False),
    ("GET|HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve, False),
]
