"""A stand-in for the Hub on the loopback interface: enough of its interface to create, upload, list
and download.

Repositories live in memory, each revision whole. Large and binary files travel as LFS objects
("basic" transfer), everything else inside the commit, as on the Hub. Private repositories and all
writing need the token.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_tester"
USER = "tester"


class StandInHub:
    """`repos` maps an id to `{"private", "revisions": {sha: {path: bytes}}, "branches": {name:
    sha}}`."""

    def __init__(self):
        self.repos, self.objects, self.requests = {}, {}, []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes] | None:
        repo = self.repos[repo_id]
        return repo["revisions"].get(repo["branches"].get(revision, revision))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _answer(
        self, status: int, body: object = None, error: str | None = None, **headers: str
    ) -> None:
        data = (
            body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        )
        self.send_response(status)
        headers.setdefault("Content_Type", "application/json")
        headers.setdefault("Content_Length", str(len(data)))
        if error:
            headers |= {"X_Error_Code": error, "X_Error_Message": error}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), unquote(urlparse(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        if "Authorization" in self.headers and not self._known:
            return self._answer(401, {"error": "Invalid user token."})
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return getattr(self, name)(body, *match.groups())
        return self._answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _find(self, repo_id: str) -> dict | None:
        """The repository, or None after an answer that says why not."""
        repo = self.state.repos.get(repo_id)
        if repo is None or (repo["private"] and not self._known):
            self._answer(
                401 if not self._known else 404, {"error": "Repository not found"}, "RepoNotFound"
            )
            return None
        return repo

    def whoami(self, body: bytes) -> None:
        if not self._known:
            return self._answer(401, {"error": "Invalid credentials"})
        self._answer(
            200,
            {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}},
        )

    def validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        if not self._known:
            return self._answer(401, {"error": "Invalid username or password."})
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = {"url": f"{self.state.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.state.repos:
            return self._answer(409, url | {"error": "You already created this model repo"})
        private = bool(wanted.get("private") or wanted.get("visibility") == "private")
        first = hashlib.sha1(repo_id.encode()).hexdigest()
        self.state.repos[repo_id] = {
            "private": private,
            "revisions": {first: {}},
            "branches": {"main": first},
        }
        self._answer(200, url)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if not self._known:
            return self._answer(401, {"error": "no token"})
        if self._find(repo_id) is None:
            return
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs"
                if f["path"].endswith((".safetensors", ".png")) or f["size"] > 10e6
                else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = [
            {
                **{"oid": o["oid"], "size": o["size"]},
                "actions": {"upload": {"href": f"{self.state.endpoint}/lfs/{o['oid']}"}},
            }
            for o in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "checksum"})
        self.state.objects[oid] = body
        self._answer(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._find(repo_id)
        if repo is None:
            return
        files = dict(self.state.files(repo_id, revision))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = hashlib.sha1(
            repr(sorted(files.items())).encode() + str(len(repo["revisions"])).encode()
        ).hexdigest()
        repo["revisions"][sha], repo["branches"][revision] = files, sha
        url = f"{self.state.endpoint}/{repo_id}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        repo = self._find(repo_id)
        if repo is None:
            return
        sha = repo["branches"].get(revision or "main", revision)
        if sha not in repo["revisions"]:
            return self._answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(repo["revisions"][sha])]
        facts = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo["private"],
            "siblings": siblings,
        }
        self._answer(200, facts | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        if self._find(repo_id) is None:
            return
        files = self.state.files(repo_id, revision) or {}

        def entry(p, d):
            return {
                "type": "file",
                "path": p,
                "size": len(d),
                "oid": hashlib.sha1(d).hexdigest(),
            }

        self._answer(200, [entry(path, data) for path, data in sorted(files.items())])

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self._find(repo_id)
        if repo is None:
            return
        sha = repo["branches"].get(revision, revision)
        if sha not in repo["revisions"]:
            return self._answer(404, b"", "RevisionNotFound")
        if path not in repo["revisions"][sha]:
            return self._answer(404, b"", "EntryNotFound", X_Repo_Commit=sha)
        data = repo["revisions"][sha][path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._answer(
            200, data, X_Repo_Commit=sha, ETag=etag, Content_Type="application/octet-stream"
        )


_ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), rf"/api/models/{_ID}/preupload/([^/]+)", "preupload"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/lfs/(\w+)", "upload"),
    (("POST",), rf"/api/models/{_ID}/commit/([^/]+)", "commit"),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", "tree"),
    ("GET", rf"/api/models/{_ID}/revision/([^/]+)", "info"),
    ("GET", rf"/api/models/{_ID}", "info"),
    (("GET", "HEAD"), rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
]
