"""A Hub in memory that speaks the protocol of huggingface_hub's clients over HTTP, and fails on request.

    with HubServer() as hub:
        hub.add("alice/model", {"config.json": b"{}"})  # a repository with one commit
        hub.fail("POST .*/commit/", status=503, times=2)  # the next two commits are refused
        ... clients at hub.url, with a token of hub.users ...
        hub.files("alice/model", "main")

Repositories, refs, pull requests, commits (all or nothing), uploads as LFS (basic, multipart) and as Xet
(hf_xet, where it is installed, writes into a folder instead of talking to a server), downloads with redirects
to a second origin. Not there: git itself, downloads as Xet, discussions, search.
"""

import base64
import hashlib
import json
import re
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx", ".zip")
GIT_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
).encode()
REPOSITORY = r"(?P<repo>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets|spaces)"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """A file of a commit: its content, and whether it is stored as LFS."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.data)}",
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @property
    def git_sha1(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1

    def listed(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_sha1, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    author: str
    files: dict[str, File]
    parent: "Commit | None"

    def history(self) -> Iterable["Commit"]:
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent


@dataclass
class Repository:
    name: str
    kind: str
    private: bool
    refs: dict[str, Commit] = field(
        default_factory=dict
    )  # by whole names, such as refs/heads/main, refs/pr/1

    def find(self, revision: str) -> Commit | None:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        return next((c for head in self.refs.values() for c in head.history() if c.oid == revision), None)

    def commit(
        self, ref: str, files: dict[str, File], title: str, author: str, parent: Commit | None
    ) -> Commit:
        listing = json.dumps(
            [parent.oid if parent else "", title, {path: file.etag for path, file in files.items()}]
        )
        new = Commit(
            hashlib.sha1(f"{time.time_ns()} {listing}".encode()).hexdigest(), title, author, files, parent
        )
        self.refs[ref] = new
        return new


@dataclass
class Fault:
    """A rule for requests that go wrong: by a status, or in one of the ways that `HubServer.fail` names."""

    pattern: str
    status: int | None
    kind: str | None
    times: int
    seconds: float
    headers: dict[str, str]
    message: str


class Refusal(Exception):
    """An error that ends a request with a status."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing when a client goes: it would mix with a tested program's words."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """The Hub's state, and two servers on the loopback address: the Hub and the storage of files."""

    def __init__(self):
        self.users = {
            "hf_alice": {"name": "alice", "role": "write", "orgs": ["kan-lab"]},
            "hf_reader": {"name": "alice", "role": "read", "orgs": []},
            "hf_bob": {"name": "bob", "role": "write", "orgs": []},
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet_folders: list[tempfile.TemporaryDirectory] = []  # one for each token to write as Xet
        self.part_size: int | None = None  # bytes of one part of an LFS upload; None: a request for each file
        self.page_size = 1000  # entries in one page of a listing
        self.requests: list[str] = []  # "METHOD /path", in the order of arrival
        self.faults: list[Fault] = []
        self.waits: list[float] = []  # seconds that clients in this process would have slept
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.servers = [QuietServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]
        # Another host, too: huggingface_hub 1 follows redirects to any port of the same, and then finds no
        # metadata.
        self.url = f"http://127.0.0.1:{self.servers[0].server_address[1]}"
        self.storage_url = f"http://localhost:{self.servers[1].server_address[1]}"

    def __enter__(self) -> "HubServer":
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for folder in self.xet_folders:
            folder.cleanup()

    def add(
        self, name: str, files: dict[str, bytes] | None = None, private: bool = False, kind: str = "models"
    ):
        """Add a repository with one commit on main."""
        content = {".gitattributes": GIT_ATTRIBUTES, **(files or {})}
        repository = Repository(name, kind, private)
        listing = {path: File(data, path.endswith(LFS_SUFFIXES)) for path, data in content.items()}
        repository.commit("refs/heads/main", listing, "initial commit", name.partition("/")[0], None)
        self.repositories[kind, name] = repository
        return repository

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return a revision's files; none if the repository or the revision does not exist."""
        repository = self.repositories.get((kind, name))
        commit = repository.find(revision) if repository else None
        return {path: file.data for path, file in commit.files.items()} if commit else {}

    def head(self, name: str, revision: str = "main", kind: str = "models") -> str:
        """Return the newest commit of a revision."""
        commit = self.repositories[kind, name].find(revision)
        assert commit, f"{name} has no {revision}"
        return commit.oid

    def titles(self, name: str, revision: str = "main", kind: str = "models") -> list[str]:
        """Return the titles of a revision's commits, newest first."""
        commit = self.repositories[kind, name].find(revision)
        return [c.title for c in commit.history()] if commit else []

    def fail(
        self,
        pattern: str,
        status: int | None = None,
        *,
        kind: str | None = None,
        times: int = 1,
        seconds: float = 0.0,
        message: str = "injected",
        **headers: str,
    ) -> None:
        """Let the next `times` requests whose "METHOD /path" contains a match of `pattern` go wrong.

        Args:
            pattern: a regular expression.
            status: answer with this status; the body and X-Error-Message hold `message`.
            kind: or "cut": the connection ends in the middle of the request's body, or of the answer if there
                is none; "lost": the request is carried out, but its answer is not sent; "slow": the answer
                takes `seconds`; "corrupt": one byte of the body, received or sent, is another.
            times: how often.
            seconds: of "slow".
            message: what the answer says.
            **headers: of the answer, with "_" for "-".
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, status, kind, times, seconds, named, message))

    def from_xet(self, sha256: str) -> None:
        """Store what hf_xet has written of this file, if it has."""
        for number, folder in enumerate(self.xet_folders):
            for shard in Path(folder.name).rglob("shards/*.mdb"):
                if xet := _xet_files(shard.read_bytes()).get(sha256):
                    from hf_xet import XetFileInfo, XetSession

                    target, address = Path(folder.name, "file"), f"{self.url}/xet-token/{number}"
                    with XetSession().new_file_download_group(token_refresh_url=address) as group:
                        group.start_download_file(XetFileInfo(*xet), str(target))
                    self.blobs[sha256] = target.read_bytes()
                    return

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def _xet_files(shard: bytes) -> dict[str, tuple[str, int]]:
    """Return Xet's hash and the size of each file in a shard, by the file's SHA-256.

    Records of 48 bytes: one for the file, one for each segment, as many to verify them, one with the SHA-256.
    """

    def text(raw: bytes) -> str:  # four integers of 64 bits
        return b"".join(raw[start : start + 8][::-1] for start in range(0, 32, 8)).hex()

    files, records = {}, [shard[start : start + 48] for start in range(48, len(shard), 48)]
    while records and records[0][:32] != b"\xff" * 32:
        flags, segments = struct.unpack("<II", records[0][32:40])
        size = sum(struct.unpack("<I", record[36:40])[0] for record in records[1 : 1 + segments])
        length = 1 + segments * (1 + (flags >> 31)) + (flags >> 30 & 1)
        files[text(records[length - 1][:32])] = text(records[0][:32]), size
        records = records[length:]
    return files


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": hub})


ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def route(methods: str, pattern: str):
    """Register a method of `_Handler` for requests whose raw path matches."""

    def register(function):
        ROUTES.append((methods, re.compile(pattern), function.__name__))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[HubServer]

    def log_message(self, *_) -> None:
        pass

    def answer_request(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        request = f"{self.command} {split.path}"
        self.fault = self.hub.next_fault(request)
        kind = self.fault.kind if self.fault else None
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "cut" and length:
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.rfile.read(length)
        if kind == "corrupt" and self.body:
            self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
            self.fault = None
        if self.fault and kind == "slow":
            self.hub.stopping.wait(self.fault.seconds)
        try:
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, self.fault.message, **self.fault.headers)
            for methods, pattern, name in ROUTES:
                if self.command in methods.split() and (match := pattern.fullmatch(split.path)):
                    arguments = {
                        key: unquote(value) for key, value in match.groupdict().items() if value is not None
                    }
                    return getattr(self, name)(**arguments)
            raise Refusal(404, f"no route for {request}")
        except Refusal as refusal:
            message = str(refusal)
            self.send(refusal.status, {"error": message}, {"X-Error-Message": message, **refusal.headers})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = self.fault.kind if self.fault else None
        if kind == "lost":
            return self.hang_up()
        if kind == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)
        if kind == "cut":
            self.wfile.flush()
            self.hang_up()
        return None

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    # who may do what

    def user(self) -> dict[str, Any] | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def belongs(self, namespace: str) -> bool:
        user = self.user()
        return bool(user) and namespace in (user["name"], *user["orgs"])

    def readable(self, kind: str, repo: str) -> Repository:
        repository = self.hub.repositories.get((kind, repo))
        if repository is None or (repository.private and not self.belongs(repo.partition("/")[0])):
            status = 404 if self.user() else 401
            raise Refusal(status, "Repository not found", X_Error_Code="RepoNotFound")
        return repository

    def writable(self, kind: str, repo: str, pull_request: bool = False) -> Repository:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repository = self.readable(kind, repo)
        if user["role"] == "read" or not (pull_request or self.belongs(repo.partition("/")[0])):
            raise Refusal(403, f"You don't have write access to {repo}")
        return repository

    def commit_at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return commit

    # accounts, repositories, refs

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user["role"], "createdAt": DATE}
        organizations = [
            {"type": "org", "name": name, "roleInOrg": "write"} for name in user.get("listed", user["orgs"])
        ]
        account = {"type": "user", "name": user["name"], "fullname": user["name"], "orgs": organizations}
        self.send(200, {**account, "auth": {"type": "access_token", "accessToken": token}})

    @route("POST", "/api/repos/create")
    def create(self):
        request, user = self.json(), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        kind, name = (
            f"{request.get('type') or 'model'}s",
            f"{request.get('organization') or user['name']}/{request['name']}",
        )
        url = f"{self.hub.url}/{name if kind == 'models' else f'{kind}/{name}'}"
        if user["role"] == "read" or not self.belongs(name.partition("/")[0]):
            raise Refusal(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}"
            )
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                return self.send(409, {"error": "You already created this model repo", "url": url})
            private = request.get("visibility") == "private" or request.get("private") is True
            self.hub.add(name, private=private, kind=kind)
        return self.send(200, {"url": url, "name": name, "id": name})

    @route("DELETE", "/api/repos/delete")
    def delete(self):
        request = self.json()
        kind, name = f"{request.get('type') or 'model'}s", f"{request['organization']}/{request['name']}"
        self.writable(kind, name)
        del self.hub.repositories[kind, name]
        self.send(200, {})

    @route("PUT", f"/api/{KIND}/{REPOSITORY}/settings")
    def settings(self, kind: str, repo: str):
        request = self.json()
        self.writable(kind, repo).private = (
            request.get("visibility") == "private" or request.get("private") is True
        )
        self.send(200, {"private": self.hub.repositories[kind, repo].private})

    @route("GET", f"/api/{KIND}/{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, repo: str, revision: str = "main"):
        repository = self.readable(kind, repo)
        commit = self.commit_at(repository, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling in siblings:
                file = commit.files[sibling["rfilename"]]
                sibling |= {"size": len(file.data), "blobId": file.git_sha1}
                if file.lfs:
                    sizes = {"size": len(file.data), "pointerSize": len(file.pointer)}
                    sibling["lfs"] = {"sha256": file.sha256, **sizes}
        about = {"_id": "0", "id": repo, "modelId": repo, "author": repo.partition("/")[0], "sha": commit.oid}
        flags = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        self.send(
            200, {**about, **flags, "lastModified": DATE, "createdAt": DATE, "tags": [], "siblings": siblings}
        )

    @route("GET", f"/api/{KIND}/{REPOSITORY}/refs")
    def list_refs(self, kind: str, repo: str):
        listing: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        places = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, commit in self.readable(kind, repo).refs.items():
            prefix = next(prefix for prefix in places if ref.startswith(prefix))
            listing[places[prefix]].append(
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit.oid}
            )
        self.send(200, listing)

    @route("POST DELETE", f"/api/{KIND}/{REPOSITORY}/(?P<ref_kind>branch|tag)/(?P<name>[^/]+)")
    def change_ref(self, kind: str, repo: str, ref_kind: str, name: str):
        repository = self.writable(kind, repo)
        request = self.json() if self.body else {}
        if ref_kind == "tag" and self.command == "POST":  # the path names what is tagged
            ref, commit = f"refs/tags/{request['tag']}", self.commit_at(repository, name)
        else:
            ref = f"refs/{'heads' if ref_kind == 'branch' else 'tags'}/{name}"
            commit = self.commit_at(repository, request.get("startingPoint") or "main")
        with self.hub.lock:
            if self.command == "DELETE":
                if ref not in repository.refs:
                    raise Refusal(404, f"no {ref}", X_Error_Code="RevisionNotFound")
                del repository.refs[ref]
            elif ref in repository.refs:
                raise Refusal(409, f"Reference {ref} already exists")
            else:
                repository.refs[ref] = commit
        self.send(200, {})

    @route("GET", f"/api/{KIND}/{REPOSITORY}/commits/(?P<revision>[^/]+)")
    def list_commits(self, kind: str, repo: str, revision: str):
        history = self.commit_at(self.readable(kind, repo), revision).history()
        listing = [
            {"id": c.oid, "title": c.title, "message": "", "authors": [{"user": c.author}]} for c in history
        ]
        self.send(200, [{**entry, "date": DATE} for entry in listing])

    # what a revision holds

    @route("GET", f"/api/{KIND}/{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, kind: str, repo: str, revision: str, folder: str = ""):
        commit = self.commit_at(self.readable(kind, repo), revision)
        prefix = f"{folder}/" if folder else ""
        files = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not files:
            raise Refusal(
                404, f"{folder} does not exist", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid
            )
        folders = {
            "/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)
        }
        entries = [file.listed(path) for path, file in files.items()]
        entries += [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)
        ]
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        start = int(self.query.get("cursor", ["0"])[0])
        page, headers = entries[start : start + self.hub.page_size], {}
        if start + len(page) < len(entries):
            query = "&".join(f"{key}={values[0]}" for key, values in self.query.items() if key != "cursor")
            address = f"{self.hub.url}{urlsplit(self.path).path}?{query}&cursor={start + len(page)}"
            headers["Link"] = f'<{address}>; rel="next"'
        self.send(200, page, headers)

    @route("POST", f"/api/{KIND}/{REPOSITORY}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo: str, revision: str):
        commit = self.commit_at(self.readable(kind, repo), revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.send(200, [commit.files[path].listed(path) for path in paths if path in commit.files])

    @route(
        "GET HEAD", f"/(?:(?P<kind>datasets|spaces)/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
    )
    def resolve(self, repo: str, revision: str, path: str, kind: str = "models"):
        commit = self.commit_at(self.readable(kind, repo), revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        if not file.lfs:
            return self.send_range(file.data, {**headers, "ETag": f'"{file.etag}"'})
        self.hub.blobs[file.sha256] = file.data
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return self.send(
            302, b"", {**headers, **linked, "Location": f"{self.hub.storage_url}/storage/{file.sha256}"}
        )

    @route("GET HEAD", "/storage/(?P<oid>[0-9a-f]{64})")
    def storage(self, oid: str):
        if oid not in self.hub.blobs:
            raise Refusal(404, "no such object")
        self.send_range(self.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, data: bytes, headers: dict[str, str]) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self.send(200, data, headers)
        start, end = int(span[1]), int(span[2] or len(data) - 1)
        if start >= len(data):
            raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{len(data)}")
        part = data[start : end + 1]
        return self.send(
            206, part, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
        )

    # uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        self.send(200, {"errors": [], "warnings": []})

    @route("POST", f"/api/{KIND}/{REPOSITORY}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo: str, revision: str):
        commit = self.commit_at(self.writable(kind, repo, "create_pr" in self.query), revision)
        answers = []
        for file in self.json()["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            lfs = path.endswith(LFS_SUFFIXES) or binary or file["size"] > 10_000_000
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in commit.files:
                answer["oid"] = commit.files[path].etag
            answers.append(answer)
        self.send(200, {"files": answers})

    @route("POST", f"/(?:(?P<kind>datasets|spaces)/)?{REPOSITORY}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str, kind: str = "models"):
        self.writable(kind, repo, pull_request=True)
        objects, transfer = [], "basic"
        for request in self.json()["objects"]:
            entry = {"oid": request["oid"], "size": request["size"]}
            if request["oid"] not in self.hub.blobs:
                href, header = f"{self.hub.storage_url}/upload/{request['oid']}", {}
                if self.hub.part_size and request["size"] > self.hub.part_size:
                    transfer = "multipart"
                    parts = -(-request["size"] // self.hub.part_size)
                    header = {str(part): f"{href}/{part}" for part in range(1, parts + 1)}
                    header["chunk_size"] = str(self.hub.part_size)
                    href = f"{self.hub.storage_url}/complete/{request['oid']}"
                verify = f"{self.hub.url}/{quote(repo)}.git/info/lfs/objects/verify"
                entry["actions"] = {"upload": {"href": href, "header": header}, "verify": {"href": verify}}
            objects.append(entry)
        self.send(200, {"transfer": transfer, "objects": objects})

    def store(self, oid: str, data: bytes) -> None:
        if (checksum := hashlib.sha256(data).hexdigest()) != oid:
            raise Refusal(400, f"checksum mismatch: {checksum} instead of {oid}")
        self.hub.blobs[oid] = data

    @route("PUT", "/upload/(?P<oid>[0-9a-f]{64})(?:/(?P<part>[0-9]+))?")
    def upload(self, oid: str, part: str = ""):
        if "Authorization" in self.headers:
            raise Refusal(400, "the token must not be sent to the storage")
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        else:
            self.store(oid, self.body)
        self.send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    @route("POST", "/complete/(?P<oid>[0-9a-f]{64})")
    def complete(self, oid: str):
        parts = self.hub.parts.pop(oid, {})
        self.store(oid, b"".join(parts.get(part["partNumber"], b"") for part in self.json()["parts"]))
        self.send(200, {})

    @route("POST", f"/(?:(?P<kind>datasets|spaces)/)?{REPOSITORY}\\.git/info/lfs/objects/verify")
    def verify(self, repo: str, kind: str = "models"):
        request = self.json()
        self.writable(kind, repo, pull_request=True)
        if len(self.hub.blobs.get(request["oid"], b"")) != request["size"]:
            raise Refusal(422, f"{request['oid']} is not stored")
        self.send(200, {})

    @route("GET", f"/api/{KIND}/{REPOSITORY}/xet-write-token/(?P<revision>[^/]+)")
    def xet_write_token(self, kind: str, repo: str, revision: str):
        self.writable(kind, repo, "create_pr" in self.query)
        with self.hub.lock:
            self.hub.xet_folders.append(tempfile.TemporaryDirectory(prefix="hub-xet-"))
            self.xet_token(str(len(self.hub.xet_folders) - 1))

    @route("GET", "/xet-token/(?P<number>[0-9]+)")
    def xet_token(self, number: str):
        folder = self.hub.xet_folders[int(number)].name
        self.send(200, {"accessToken": "x", "exp": int(time.time()) + 3600, "casUrl": f"local://{folder}"})

    @route("POST", f"/api/{KIND}/{REPOSITORY}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, repo: str, revision: str):
        pull_request = "create_pr" in self.query
        repository = self.writable(kind, repo, pull_request)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        for line in lines:
            if line["key"] == "lfsFile" and line["value"]["oid"] not in self.hub.blobs:
                self.hub.from_xet(line["value"]["oid"])
        with self.hub.lock:
            head = self.commit_at(repository, revision)
            if header.get("parentCommit") not in (None, head.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = self.changed(head.files, lines[1:])
            if pull_request:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
                ref = f"refs/pr/{number}"
            else:
                ref = next(
                    (name for name in (revision, f"refs/heads/{revision}") if name in repository.refs), None
                )
                if ref is None:
                    raise Refusal(400, f"{revision} is no branch")
            author = (self.user() or {})["name"]
            new = repository.commit(ref, files, header["summary"], author, head)
        url = f"{self.hub.url}/{repo if kind == 'models' else f'{kind}/{repo}'}"
        answer = {
            "success": True,
            "commitOid": new.oid,
            "commitUrl": f"{url}/commit/{new.oid}",
            "hookOutput": "",
        }
        if pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        self.send(200, answer)

    def changed(self, files: dict[str, File], lines: list[dict[str, Any]]) -> dict[str, File]:
        files = dict(files)
        for line in lines:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"LFS object {value['oid']} of {path} is not stored")
                files[path] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(
                        404, f"A file with this name doesn't exist: {path}", X_Error_Code="EntryNotFound"
                    )
            elif key == "deletedFolder":
                files = {
                    name: file for name, file in files.items() if not name.startswith(f"{path.rstrip('/')}/")
                }
            else:
                raise Refusal(400, f"unknown key {key}")
        return files
