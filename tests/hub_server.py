"""A model hub in this process: as much of the Hub's protocol as pushing and loading a model use.

    with HubServer() as server:
        subprocess.run(..., env=server.environment(tmp_path))
        server.files("user/name")["README.md"]

`server.fail("commit", 500)` makes one step answer with an error, `"drop"` closes the connection without doing the step and
`"drop after"` does it and closes the connection before answering.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.hf_api
import yaml

TOKEN = "hf_of_the_test_Zk3q"
_LFS = (".safetensors", ".bin", ".gguf", ".model", ".pt", ".pth")
_MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclass
class Repo:
    """`commits`: of every branch, the newest last; each maps a path to its bytes."""

    private: bool = False
    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)

    def head(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.commits:
            return self.commits[revision][-1]
        return next((one for many in self.commits.values() for one in many if one[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    """Repositories in memory. `requests` lists every `"METHOD step"` in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.refused: list[str] = []
        self._failing: dict[str, int | str] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is no news

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that knows no other hub, with a cache and a token of its own."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "CI": "1"}
        drop = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
        return {name: value for name, value in os.environ.items() if name not in drop} | ours

    def add(self, repo_id: str, folder: Path | str) -> None:
        """Put a folder into a repository, as if it had been pushed."""
        folder = Path(folder)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repo = self.repos.setdefault(repo_id, Repo(commits={"main": [(_oid("empty"), {})]}))
        self.commit(repo, "main", files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id].head(revision)[1]

    def fail(self, step: str, how: int | str) -> None:
        self._failing[step] = how

    def heal(self) -> None:
        self._failing.clear()

    def how(self, step: str) -> int | str | None:
        return self._failing.get(step)

    def commit(self, repo: Repo, branch: str, changes: dict[str, bytes | None]) -> str:
        files = {**repo.commits[branch][-1][1], **changes}
        files = {path: content for path, content in files.items() if content is not None}
        oid = _oid(f"{branch}{len(repo.commits[branch])}{sorted(files)}")
        repo.commits[branch].append((oid, files))
        return oid


def only_hub(server: HubServer, monkeypatch, cache: Path) -> None:
    """Make this process take a server for the only hub. (`HF_ENDPOINT` is read when the library is imported.)"""
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its tries


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def etag(content: bytes, path: str) -> str:
    """Git's hash of a small file, sha256 of a large one."""
    if path.endswith(_LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the Hub's validation finds wrong with a card's metadata."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", content, re.DOTALL)
    if not found:
        return []
    try:
        data = yaml.safe_load(found.group(1)) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    errors = []
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not _MODEL_ID.fullmatch(base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for name in ("library_name", "pipeline_tag"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    return errors + _model_index_errors(data.get("model-index", []))


def _model_index_errors(index) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        errors += _missing(model, {"name": str, "results": list}, f"model-index[{i}]")
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            errors += _missing(result, {"task": dict, "dataset": dict, "metrics": list}, where)
            errors += _missing(result.get("task") or {}, {"type": str}, f"{where}.task")
            dataset = result.get("dataset") or {}
            errors += _missing(dataset, {"type": str, "name": str}, f"{where}.dataset")
            for name in ("config", "split", "revision"):
                if name in dataset and not isinstance(dataset[name], str):
                    errors.append(f'"{where}.dataset.{name}" must be a string')
            if "source" in result:
                errors += _missing(result["source"], {"url": str}, f"{where}.source")
            for k, metric in enumerate(result.get("metrics") or []):
                errors += _missing(metric, {"type": str, "value": object}, f"{where}.metrics[{k}]")
    return errors


def _missing(values: dict, wanted: dict[str, type], where: str) -> list[str]:
    return [
        f'"{where}.{name}" {"is required" if name not in values else f"must be a {kind.__name__}"}'
        for name, kind in wanted.items()
        if not isinstance(values.get(name), kind) or values.get(name) is None
    ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        self.body = self._read()
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        fitting = ((re.fullmatch(pattern, path), step, act) for pattern, step, act in _ROUTES)
        found, step, act = next((route for route in fitting if route[0]), (None, None, None))
        if found is None:
            self.server.refused.append(f"{self.command} {self.path}")
            return self._json(404, {"error": "no such page"})
        self.server.requests.append(f"{self.command} {step}")
        how = self.server.how(step)
        if isinstance(how, int):
            return self._json(how, {"error": f"the test's {how}"}, {"X-Error-Message": f"the test's {how}"})
        if how == "drop":
            return self._hang_up()
        writes = self.command in ("POST", "PUT") and step not in ("validate", "upload", "paths")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"error": "Invalid credentials in Authorization header"})
        with self.server.lock:
            answer = act(self, **found.groupdict())
        if how == "drop after":
            return self._hang_up()
        return self._send(*answer)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _json(self, status: int, content, headers: dict | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------ what each page does: (status, bytes, headers)

    def create(self) -> tuple:
        asked = json.loads(self.body)
        owner = asked.get("organization") or "user"
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            return _as_json(409, {"error": "You already created this model repo", **url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(bool(private), {"main": [(_oid("empty"), {})]})
        return _as_json(200, url)

    def whoami(self) -> tuple:
        return _as_json(200, {"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def validate(self) -> tuple:
        errors = metadata_errors(json.loads(self.body)["content"])
        found = {"errors": [{"message": error} for error in errors], "warnings": []}
        return _as_json(400 if errors else 200, {**found, **({"error": errors[0]} if errors else {})})

    def branch(self, repo: str, revision: str) -> tuple:
        commits = self.server.repos[repo].commits
        if revision in commits:
            return _as_json(409, {"error": "Reference already exists"})
        commits[revision] = list(commits["main"])
        return _as_json(200, {})

    def preupload(self, repo: str, revision: str) -> tuple:
        if repo not in self.server.repos:
            return _missing_repo()
        head = self.server.repos[repo].head(revision)
        if head is None:
            return _as_json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        answer = []
        for file in json.loads(self.body)["files"]:
            path, before = file["path"], head[1].get(file["path"])
            mode = "lfs" if path.endswith(_LFS) else "regular"
            oid = {} if before is None else {"oid": etag(before, path)}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return _as_json(200, {"files": answer})

    def lfs_batch(self, repo: str) -> tuple:
        stored, objects = self.server.repos[repo].stored, []
        for wanted in json.loads(self.body)["objects"]:
            place = f"{self.server.url}/_lfs/{repo}/{wanted['oid']}"
            actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append({**wanted, **({} if wanted["oid"] in stored else {"actions": actions})})
        return _as_json(200, {"transfer": "basic", "objects": objects})

    def upload(self, repo: str, oid: str) -> tuple:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return _as_json(422, {"error": "the bytes are not those announced"})
        self.server.repos[repo].stored[oid] = self.body
        return _as_json(200, {})

    def verify(self, repo: str, oid: str) -> tuple:
        return _as_json(200 if oid in self.server.repos[repo].stored else 404, {})

    def commit(self, repo: str, revision: str) -> tuple:
        held = self.server.repos[repo]
        changes: dict[str, bytes | None] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in held.stored:
                    return _as_json(400, {"error": f"LFS pointer to a missing file: {value['path']}"})
                changes[value["path"]] = held.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
        card = changes.get("README.md")
        if card is not None and (errors := metadata_errors(card.decode())):
            return _as_json(400, {"error": errors[0]})
        answer = {"success": True}
        if self.query.get("create_pr"):
            number = sum(branch.startswith("refs/pr/") for branch in held.commits) + 1
            held.commits[f"refs/pr/{number}"] = list(held.commits[revision])
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        oid = self.server.commit(held, revision, changes)
        return _as_json(200, {**answer, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo: str, revision: str, file: str) -> tuple:
        if not self._may_read(repo):
            return _missing_repo()
        head = self.server.repos[repo].head(revision)
        if head is None:
            return _as_json(404, {}, {"X-Error-Code": "RevisionNotFound"})
        oid, files = head
        if file not in files:
            return _as_json(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        content, status = files[file], 200
        headers = {"ETag": f'"{etag(content, file)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part.group(1)), min(int(part.group(2) or len(content)), len(content) - 1)
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(content)}", 206
            content = content[first : last + 1]
        return status, content, headers

    def info(self, repo: str, revision: str | None = None) -> tuple:
        if not self._may_read(repo):
            return _missing_repo()
        head = self.server.repos[repo].head(revision or "main")
        if head is None:
            return _as_json(404, {}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in head[1]]
        known = {"id": repo, "modelId": repo, "sha": head[0], "private": self.server.repos[repo].private}
        return _as_json(200, {**known, "tags": [], "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> tuple:
        if not self._may_read(repo):
            return _missing_repo()
        start = f"{folder}/" if folder else ""
        files = {path: content for path, content in self.server.files(repo, revision).items() if path.startswith(start)}
        if folder and not files:
            return _as_json(404, {}, {"X-Error-Code": "EntryNotFound"})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": etag(content, path)}
            for path, content in files.items()
        ]
        return _as_json(200, entries)

    def paths(self, repo: str, revision: str) -> tuple:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        _, content, _ = self.tree(repo, revision)
        return _as_json(200, [entry for entry in json.loads(content) if entry["path"] in wanted])

    def _may_read(self, repo: str) -> bool:
        held = self.server.repos.get(repo)
        return held is not None and (not held.private or self.headers.get("Authorization") == f"Bearer {TOKEN}")


def _as_json(status: int, content, headers: dict | None = None) -> tuple:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}


def _missing_repo() -> tuple:
    return _as_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
_ROUTES = [
    ("/api/repos/create", "create", _Handler.create),
    ("/api/whoami-v2", "whoami", _Handler.whoami),
    ("/api/validate-yaml", "validate", _Handler.validate),
    (rf"/api/models/{_REPO}/branch/(?P<revision>.+)", "branch", _Handler.branch),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload", _Handler.preupload),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs", _Handler.lfs_batch),
    (rf"/_lfs/{_REPO}/(?P<oid>[0-9a-f]+)", "upload", _Handler.upload),
    (rf"/_lfs/{_REPO}/(?P<oid>[0-9a-f]+)/verify", "verify", _Handler.verify),
    (rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit", _Handler.commit),
    (rf"/{_REPO}/resolve/{_REVISION}/README\.md", "card", lambda self, **at: self.resolve(**at, file="README.md")),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", "resolve", _Handler.resolve),
    (rf"/api/models/{_REPO}", "info", _Handler.info),
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "info", _Handler.info),
    (rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", "tree", _Handler.tree),
    (rf"/api/models/{_REPO}/paths-info/(?P<revision>.+)", "paths", _Handler.paths),
]
