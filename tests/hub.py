"""A Hugging Face hub on this machine: the few routes of its HTTP API that its own client uses to push and to fetch.

Data sets are repositories whose id begins with ``datasets/``; they are read by `datasets.load_dataset`.

Branches are lists of commits, a commit is a mapping of paths to contents, and large files go through Git LFS, as on the
hub. Whoever gives the token may write in the account of its owner; private repositories are for that owner only.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import datasets
import pytest
from huggingface_hub import constants

TOKEN, OWNER = "hf_secret", "amos"
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(models|(?P<kind>datasets))/{ID}"
REVISION = r"(?P<revision>[^/?]+)"


class Refusal(Exception):
    """An answer other than 200, with the code that the client knows it by."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


class Repository:
    """A repository: its commits by their ids, and its branches."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.large: set[str] = set()
        """Paths that went through LFS."""
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        contents = b"".join(name.encode() + digest(files[name]).encode() for name in sorted(files))
        oid = hashlib.sha1(contents + f"{len(self.messages)}{message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def entry(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        """What a listing says of a file."""
        content = files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
        if path in self.large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def find(self, revision: str) -> str:
        oid = self.branches.get(unquote(revision), revision)
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid


def digest(content: bytes) -> str:
    """The id that Git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The state of the hub, and what it answers: one method for each route."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"{API}(/revision/{REVISION})?", "describe"),
        ("POST", rf"{API}/branch/{REVISION}", "make_branch"),
        ("POST", rf"{API}/preupload/{REVISION}", "preupload"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(?P<oid>\w+)", "put"),
        ("POST", rf"{API}/commit/{REVISION}", "take_commit"),
        ("GET", rf"{API}/tree/{REVISION}(/(?P<under>[^?]+))?(?P<recursive>\?.*recursive=true)?.*", "tree"),
        ("POST", rf"{API}/paths-info/{REVISION}", "find_paths"),
        ("HEAD|GET", rf"/((?P<kind>datasets)/)?{ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    )

    def answer(self, method: str, url: str, token: str | None, body: bytes) -> Any:
        """JSON, or the bytes of a file with its headers."""
        path = url.partition("?")[0]
        self.requests.append(f"{method} {path}")
        if token not in (None, TOKEN):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        for methods, pattern, name in self.routes:
            found = re.fullmatch(pattern, url if name == "tree" else path)
            if found and method in methods.split("|"):
                given = {key: value for key, value in found.groupdict().items() if value is not None}
                if kind := given.pop("kind", ""):
                    given["id"] = f"{kind}/{given['id']}"
                return getattr(self, name)(token, body, **given)
        raise Refusal(404, message=f"no route for {method} {path}")

    def put_dataset(self, id: str, files: dict[str, bytes]) -> None:
        """Make a commit that has these files, in a data set that is made if there is none."""
        repository = self.repositories.setdefault(f"datasets/{id}", Repository(private=False))
        repository.commit("main", files, "data")

    def open(self, id: str, token: str | None, write: bool = False) -> Repository:
        repository = self.repositories.get(id)
        if repository is None or (repository.private and token is None):
            raise Refusal(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if write:
            self.allow(id, token)
        return repository

    def allow(self, id: str, token: str | None) -> None:
        if token is None:
            raise Refusal(401, message="Invalid username or password.")
        if not id.startswith(f"{OWNER}/"):
            raise Refusal(403, message=f"You don't have the rights to write to {id}")

    def create(self, token: str | None, body: bytes) -> Any:
        asked = json.loads(body)
        id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        self.allow(id, token)
        if id in self.repositories:
            raise Refusal(409, message="You already created this model repo", url=f"{self.endpoint}/{id}")
        self.repositories[id] = Repository(asked.get("private") or asked.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{id}"}

    def validate(self, token: str | None, body: bytes) -> Any:
        content = json.loads(body)["content"]
        good = content.startswith("---\n") and "\n---\n" in content
        return {"errors": [] if good else [{"message": "no metadata"}], "warnings": []}

    def describe(self, token: str | None, body: bytes, id: str, revision: str = "main") -> Any:
        repository = self.open(id, token)
        sha = repository.find(revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return {"id": id, "modelId": id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}

    def make_branch(self, token: str | None, body: bytes, id: str, revision: str) -> Any:
        repository, name = self.open(id, token, write=True), unquote(revision)
        if name in repository.branches:
            raise Refusal(409, message="Reference already exists")
        repository.branches[name] = repository.branches["main"]
        return {}

    def preupload(self, token: str | None, body: bytes, id: str, revision: str) -> Any:
        files = self.open(id, token, write=True).commits[self.open(id, token).find(revision)]
        return {
            "files": [
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith((".safetensors", ".model")) else "regular",
                    "shouldIgnore": False,
                    "oid": digest(files[asked["path"]]) if asked["path"] in files else None,
                }
                for asked in json.loads(body)["files"]
            ]
        }

    def batch(self, token: str | None, body: bytes, id: str) -> Any:
        self.open(id, token, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.endpoint}/objects/{asked['oid']}"}
            objects.append(asked | ({} if asked["oid"] in self.objects else {"actions": {"upload": upload}}))
        return {"transfer": "basic", "objects": objects}

    def put(self, token: str | None, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, message="wrong content")
        self.objects[oid] = body
        return {}

    def take_commit(self, token: str | None, body: bytes, id: str, revision: str) -> Any:
        repository = self.open(id, token, write=True)
        files, summary = dict(repository.commits[repository.find(revision)]), ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del files[value["path"]]
                case "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                    repository.large.add(value["path"])
        oid = repository.commit(unquote(revision), files, summary)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{id}/commit/{oid}", "hookOutput": ""}

    def tree(self, token: str | None, body: bytes, id: str, revision: str, under: str = "", recursive: str = "") -> Any:
        repository = self.open(id, token)
        files, top = repository.commits[repository.find(revision)], f"{unquote(under)}/" if under else ""
        inside = [path for path in files if path.startswith(top)]
        if top and not inside:
            raise Refusal(404, "EntryNotFound", f"no {under}")
        parts = {path.removeprefix(top).partition("/")[::2] for path in inside}
        folders = [{"type": "directory", "path": top + name, "oid": "0"} for name, below in parts if below]
        return folders + [repository.entry(path, files) for path in inside if recursive or "/" not in path[len(top) :]]

    def find_paths(self, token: str | None, body: bytes, id: str, revision: str) -> Any:
        repository, asked = self.open(id, token), parse_qs(body.decode())["paths"]
        files = repository.commits[repository.find(revision)]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        found = [repository.entry(path, files) for path in asked if path in files]
        return found + [{"type": "directory", "path": path, "oid": "0"} for path in folders]

    def resolve(self, token: str | None, body: bytes, id: str, revision: str, path: str) -> Any:
        repository = self.open(id, token)
        oid = repository.find(revision)
        if path not in repository.commits[oid]:
            raise Refusal(404, "EntryNotFound", f"no {path}")
        content = repository.commits[oid][path]
        etag = hashlib.sha256(content).hexdigest() if path in repository.large else digest(content)
        return content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "X-Linked-Size": str(len(content))}


def point_client_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does in a process that has not yet imported the client."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def point_datasets_at(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do in a process that has not yet imported `datasets`."""
    point_client_at(endpoint, monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on a port of the loopback interface."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers = 200, {"Content-Type": "application/json"}
            try:
                answer = hub.answer(self.command, self.path, token if scheme else None, body)
            except Refusal as refusal:
                status, answer = refusal.status, {"error": refusal.message} | refusal.more
                headers |= {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            if isinstance(answer, tuple):
                content, headers = answer
            else:
                content = json.dumps(answer).encode()
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                first, last = int(found[1]), min(int(found[2]), len(content) - 1)
                status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
                content = content[first : last + 1]
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
