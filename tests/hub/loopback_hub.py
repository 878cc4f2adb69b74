"""A Hub on loopback: what huggingface_hub's clients call, answered over HTTP from memory, with faults on order.

Repositories have branches, commits, pull requests and large files as on the Hub; commits are atomic; a token belongs
to an account that may write where it owns. No part of it knows what is being tested.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")
ACCOUNTS = {
    "hf_writer_token_of_the_tests": {"name": "writer", "orgs": [{"name": "lab"}]},
    "hf_stranger_token_of_the_tests": {"name": "stranger", "orgs": []},
    "hf_reader_token_of_the_tests": {"name": "writer", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
}


@dataclass
class Repository:
    """Commits are complete trees: file name to content."""

    private: bool
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)

    def commit(self, tree, parent):
        """Store a tree and return the commit's id."""
        names = [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(tree.items())]
        sha = hashlib.sha1(json.dumps([names, parent]).encode()).hexdigest()
        self.commits[sha] = tree
        return sha

    def resolve(self, revision):
        """Return the commit a branch, pull request or id stands for, or None."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def tree(self, revision="main"):
        """Return file name to content."""
        return self.commits[self.branches[revision]]


@dataclass
class Fault:
    """What goes wrong with the first `times` requests whose method and path match.

    `action` is a status code, `"hang"` (no answer), `"stall"` (half of the body is read, then nothing) or `"corrupt"`
    (the last byte of what is sent is another).
    """

    method: str
    path: str
    action: object
    times: int = 10**6
    seen: threading.Event = field(default_factory=threading.Event)


class LoopbackHub(ThreadingHTTPServer):
    """The server; `with LoopbackHub() as hub` serves in threads until the block ends."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.RLock()
        self.repositories, self.large, self.faults, self.calls = {}, {}, [], []
        self.private_by_default = set()  # owners
        self.stopped = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients are killed in these tests: say nothing."""

    def create(self, repo_id, *, private=False, files=None):
        """Make a repository with a first commit."""
        repository = self.repositories[repo_id] = Repository(private)
        tree = {".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {})
        repository.branches["main"] = repository.commit(tree, None)
        return repository

    def commit(self, repo_id, files):
        """Someone else's commit to the main branch."""
        repository = self.repositories[repo_id]
        repository.branches["main"] = repository.commit(repository.tree() | files, repository.branches["main"])

    def fault(self, method, path, action, times=10**6):
        """Order a fault; `seen` of what is returned is set when it strikes."""
        self.faults.append(Fault(method, path, action, times))
        return self.faults[-1]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions", "discussions"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/(?P<oid>\w+)/(?P<repo>.+)", "put"),
        ("POST", r"/large/verify/(?P<repo>.+)", "verify"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "file"),
    )

    def log_message(self, *_):
        """Nothing to standard error."""

    def do_GET(self):
        """Answer."""
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  http.server's names

    def _answer(self):
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        path, method = parts.path, "GET" if self.command == "HEAD" else self.command
        self.server.calls.append((self.command, path, self.headers.get("Authorization")))
        fault = next(
            (one for one in self.server.faults if one.times and one.method == method and re.search(one.path, path)),
            None,
        )
        self.corrupt = fault is not None and fault.action == "corrupt"
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None:
            fault.times -= 1
            if fault.action == "stall":
                self.rfile.read(length // 2)
            fault.seen.set()
            if fault.action in ("hang", "stall"):
                self.server.stopped.wait(60)
                self.close_connection = True
                return
            if isinstance(fault.action, int):
                self.rfile.read(length)
                self._send(fault.action, {"error": "so ordered"})
                return
        self.body = self.rfile.read(length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        # a Space has the addresses of a model below `spaces`; here it is the repository spaces/OWNER/NAME
        is_space = path.startswith(("/api/spaces/", "/spaces/"))
        path = path.replace("/api/spaces/", "/api/models/", 1).removeprefix("/spaces")
        for wanted, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                with self.server.lock:
                    groups = {key: unquote(value) for key, value in match.groupdict().items()}
                    if is_space:
                        groups["repo"] = f"spaces/{groups['repo']}"
                    getattr(self, f"_{name}")(**groups)
                return
        self._send(404, {"error": "no such call"})

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.corrupt and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        with contextlib.suppress(OSError):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    # who asks, and may they

    @property
    def _account(self):
        return ACCOUNTS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _owns(self, repo):
        account, owner = self._account, repo.removeprefix("spaces/").split("/")[0]
        return account and owner in [account["name"], *(one["name"] for one in account["orgs"])]

    def _repository(self, repo, *, write=False):
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self._owns(repo)):
            self._send(404 if self._account else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if write and not self._owns(repo) and not self.query.get("create_pr"):
            self._send(403, {"error": "no write access"}, {"X-Error-Message": "no write access"})
            return None
        return found

    def _at(self, repo, revision, **options):
        repository = self._repository(repo, **options)
        sha = repository and repository.resolve(revision)
        if repository and not sha:
            self._send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return repository, sha

    # the calls

    def _whoami(self):
        if self._account:
            self._send(200, self._account | {"type": "user"})
        else:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._send(401, {"error": "unauthorized"}, message)

    def _create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or (self._account or {}).get('name')}/{asked['name']}"
        if asked.get("type") == "space":
            assert asked["sdk"] == "docker"
            repo = f"spaces/{repo}"
        if not self._owns(repo):
            self._send(403, {"error": "no"}, {"X-Error-Message": "not your namespace"})
        elif repo in self.server.repositories:
            self._send(409, {"error": "exists", "url": f"{self.server.url}/{repo}"})
        else:
            given = asked.get("visibility") or {True: "private", False: "public"}.get(asked.get("private"))
            default = "private" if repo.split("/")[-2] in self.server.private_by_default else "public"
            self.server.create(repo, private=(given or default) == "private")
            self._send(200, {"url": f"{self.server.url}/{repo}"})

    def _validate(self):
        text = json.loads(self.body)["content"]
        errors: list[dict] = []
        try:
            front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
            lists = ("tags", "datasets", "metrics", "model-index")
            wrong = [key for key in lists if not isinstance(front.get(key, []), list)]
            errors += [{"message": f'"{key}" must be an array'} for key in wrong]
        except yaml.YAMLError:
            errors.append({"message": "not YAML"})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, repo, revision):
        repository, sha = self._at(repo, revision, write=True)
        if sha:
            tree = repository.commits[sha]
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(one["path"], tree[one["path"]]) if one["path"] in tree else None,
                }
                for one in json.loads(self.body)["files"]
            ]
            self._send(200, {"files": files})

    def _batch(self, repo):
        answers = []
        for one in json.loads(self.body)["objects"]:
            if (repo, one["oid"]) not in self.server.large:
                actions = {
                    "upload": {"href": f"{self.server.url}/large/{one['oid']}/{repo}"},
                    "verify": {"href": f"{self.server.url}/large/verify/{repo}"},
                }
                one = one | {"actions": actions}
            answers.append(one)
        self._send(200, {"transfer": "basic", "objects": answers})

    def _put(self, oid, repo):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._send(400, {"error": "another hash"})
        else:
            self.server.large[repo, oid] = self.body
            self._send(200, {})

    def _verify(self, repo):
        asked = json.loads(self.body)
        known = len(self.server.large.get((repo, asked["oid"]), b"")) == asked["size"]
        self._send(200 if known else 404, {})

    def _commit(self, repo, revision):
        repository, sha = self._at(repo, revision, write=True)
        if not sha:
            return
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit")
        as_request = self.query.get("create_pr") == "1"
        if parent and parent != sha and not as_request:
            self._send(412, {"error": "the branch has moved on"})
            return
        tree = dict(repository.commits[sha])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.large[repo, value["oid"]]
            else:
                del tree[value["path"]]
        new = repository.commit(tree, sha)
        answer = {"commitOid": new, "commitUrl": f"{self.server.url}/{repo}/commit/{new}"}
        if as_request:
            number = len(repository.requests) + 1
            repository.requests.append({"num": number, "title": header["value"]["summary"], "status": "open"})
            repository.branches[f"refs/pr/{number}"] = new
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        else:
            repository.branches[revision] = new
        self._send(200, answer)

    def _branch(self, repo, branch):
        asked = json.loads(self.body or b"{}")
        repository, sha = self._at(repo, asked.get("startingPoint", "main"), write=True)
        if sha:
            exists = branch in repository.branches
            repository.branches.setdefault(branch, sha)
            self._send(409 if exists else 200, {})

    def _discussions(self, repo):
        repository = self._repository(repo)
        if repository:
            about = {"repo": {"name": repo, "type": "model"}, "isPullRequest": True, "author": {"name": "writer"}}
            found = [one | about | {"createdAt": "2026-01-01T00:00:00.000Z"} for one in repository.requests]
            self._send(200, {"discussions": found, "count": len(found), "start": 0})

    def _info(self, repo, revision="main"):
        repository, sha = self._at(repo, revision)
        if sha:
            siblings = [{"rfilename": name} for name in repository.commits[sha]]
            self._send(200, {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings})

    def _tree(self, repo, revision):
        repository, sha = self._at(repo, revision)
        if sha:
            entries = []
            for name, content in repository.commits[sha].items():
                entry = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
                if name.endswith(LARGE):
                    entry["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self._send(200, entries)

    def _file(self, repo, revision, name):
        repository, sha = self._at(repo, revision)
        if not sha:
            return
        content = repository.commits[sha].get(name)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            self._send(404, {"error": "no such file"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers["ETag"] = f'"{_oid(name, content)}"'
        if name.endswith(LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        self._send(200, content, headers)


def _git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(name, content):
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else _git_hash(content)


def wait_for(event, timeout_s=60):
    """Return when the event is set, and fail if it is not in time."""
    deadline = time.monotonic() + timeout_s
    while not event.wait(0.1):
        assert time.monotonic() < deadline, "nothing came"
