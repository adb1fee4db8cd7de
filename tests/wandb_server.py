"""A small W&B server on loopback: it speaks the few calls that a run makes, and keeps what it is sent."""

import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

KEY = "0123456789" * 4


@dataclass
class Run:
    """What the server has been told about one run."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)  # of UpsertBucket: displayName, config, groupName, tags ...
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    complete: bool = False
    preempting: bool = False


class Sweep:
    """A grid over the nested `parameters` of a sweep's file, of which each agent is given one run after the other.

    Attributes:
        given: the parameters of each run that was given out, in order, by its name.
        stop: of runs, which the next heartbeat asks the agent to end.
        again: runs that were preempted, to be given out once more.
        told: what the agents have said of their runs, at each heartbeat.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        spaces = _leaves(yaml.safe_load(text)["parameters"])
        self.grid = [list(zip(spaces, values, strict=True)) for values in itertools.product(*spaces.values())]
        self.given: dict[str, dict[str, Any]] = {}
        self.stop: set[str] = set()
        self.again: list[str] = []
        self.told: list[dict[str, bool]] = []

    def commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        self.told.append(running)
        if running:
            return [{"type": "stop", "run_id": name} for name in running if name in self.stop]
        if self.again:
            name = self.again.pop(0)
            self.stop.discard(name)
            return [{"type": "resume", "run_id": name, "program": "train.py", "args": self.given[name]}]
        if len(self.given) == len(self.grid):
            return [{"type": "exit"}]
        name, args = f"{self.name}r{len(self.given)}", {}
        for path, value in self.grid[len(self.given)]:
            node = args
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value
        self.given[name] = {key: {"value": value} for key, value in args.items()}
        return [{"type": "run", "run_id": name, "program": "train.py", "args": self.given[name]}]


def _leaves(parameters: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[Any]]:
    found: dict[tuple[str, ...], list[Any]] = {}
    for key, rule in parameters.items():
        if "parameters" in rule:
            found |= _leaves(rule["parameters"], (*path, key))
        else:
            found[(*path, key)] = rule["values"] if "values" in rule else [rule["value"]]
    return found


class WandbServer(ThreadingHTTPServer):
    """`runs` and `sweeps` by name; `calls` are the GraphQL operations in order; `files` the paths put.

    Attributes:
        refuses: the message of the GraphQL error that an operation meets.
        fault: what every answer is from the moment that `faulty_from` asks for: a status code, "hang" or "close".
        faulty_from: "start", "history" (the first numbers of a run have come) or "end" (it says that it is complete).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.calls: list[str] = []
        self.unknown: list[str] = []
        self.files: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.uses: list[dict[str, Any]] = []  # of artifacts, as what a run came from
        self.entity: str | None = "tester"  # the user's own
        self.projects = {"alexlab"}  # of it, that views can be in
        self.views: list[dict[str, Any]] = []  # of UpsertView2, with an id
        self.refuses: dict[str, str] = {}  # what is answered as an error, by operation
        self.lock = threading.Lock()
        self.fault: int | str | None = None
        self.faulty_from, self.faulty = "", False
        self.ended = threading.Event()

    def run_of(self, name: str) -> Run:
        """By the name of its directory, which our config has."""
        (run,) = (run for run in self.runs.values() if json.loads(run.fields["config"])["run"]["value"] == name)
        return run

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def env(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": ""}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: clients leave their connections open when they end."""

    def answer(self, operation: str, v: dict[str, Any], query: str) -> dict[str, Any]:
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "tester", "username": "tester", "email": "", "admin": False,
                               "flags": "{}", "teams": {"edges": []}, "capabilities": []}}  # fmt: skip
        if operation == "UpsertBucket":
            run = self.runs.setdefault(v["name"], Run(v["name"]))
            run.fields.update({key: value for key, value in v.items() if value is not None})
            project = {"id": "p", "name": v.get("project") or "alexlab", "entity": {"id": "e", "name": "tester"}}
            bucket = {"id": f"id-{v['name']}", "name": v["name"], "displayName": v.get("displayName") or v["name"],
                      "description": "", "config": "{}", "sweepName": None, "historyLineCount": 0,
                      "project": project}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "RunResumeStatus":
            return {
                "model": {"id": "p", "name": v.get("project"), "entity": {"id": "e", "name": "tester"}, "bucket": None}
            }
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in v["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.artifacts.append(v)
            sequence = {"id": "s", "name": "n", "latestArtifact": None}
            artifact = {"id": "art", "digest": v.get("digest"), "state": "PENDING", "aliases": [], "versionIndex": 0}
            return {"createArtifact": {"artifact": {**artifact, "artifactSequence": sequence}}}
        if operation == "CreateArtifactManifest":
            upload = {"uploadUrl": f"{self.url}/put/manifest", "uploadHeaders": []}
            file = {"id": "f", "name": v.get("name"), "displayName": v.get("name"), **upload}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation in ("UpdateArtifactManifest",):
            file = {"id": "f", "name": "m", "uploadUrl": f"{self.url}/put/manifest", "uploadHeaders": []}
            return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation == "CreateArtifactFiles":
            edges = [
                {"node": {"id": str(i), "name": spec["name"], "displayName": spec["name"], "storagePath": f"x/{i}",
                          "uploadUrl": f"{self.url}/put/artifact/{spec['name']}", "uploadHeaders": [],
                          "uploadMultipartUrls": None, "artifact": {"id": "art"}}}
                for i, spec in enumerate(v["artifactFiles"])
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "art", "digest": "d"}}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
        if operation == "GetDefaultEntity":
            return {"viewer": {"id": "u", "entity": self.entity}}
        if operation == "UseArtifact":
            self.uses.append(v)
            return {"useArtifact": {"artifact": {"id": v.get("artifactID")}}}
        if operation == "Run":  # of wandb.Api().run(path)
            run = self.runs.get(v["name"]) if (v["entity"], v["project"]) == ("tester", "alexlab") else None
            return {"project": {"run": self.told_of(run)} if run is not None else None}
        if operation in ("View", "UpsertView2"):
            return self.answer_view(operation, v)
        if operation == "UpsertSweep":
            name = f"sweep{len(self.sweeps)}"
            self.sweeps[name] = Sweep(name, v["config"])
            project = {"id": "p", "name": v.get("projectName"), "entity": {"id": "e", "name": "tester"}}
            return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}
        if operation in ("SweepWithRuns", "GetSweep"):  # the second of wandb.Api().sweep(path)
            sweep = self.sweeps.get(v.get("sweep") or v["name"])
            told = sweep and {"id": sweep.name, "name": sweep.name, "config": sweep.text, "runs": {"edges": []}}
            return {"project": {"sweep": told}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": v["sweep"]}}}
        if operation == "Heartbeat":
            commands = self.sweeps[v["id"]].commands(json.loads(v["runState"]))
            return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}
        self.unknown.append(f"{operation}: {query[:300]}")
        if operation == "ServerInfo":
            return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return {}

    def told_of(self, run: Run) -> dict[str, Any]:
        """What the public API is told of a run."""
        name = run.fields.get("displayName") or run.name
        return {
            "projectId": "1", "id": f"id-{run.name}", "tags": [], "name": run.name, "displayName": name,
            "sweepName": None, "state": "finished" if run.complete else "running", "config": run.fields["config"],
            "group": run.fields.get("groupName"), "jobType": "train", "commit": run.fields.get("commit"),
            "readOnly": False, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "description": "", "notes": None, "systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history), "user": {"name": "tester", "username": "tester"}, "historyKeys": None,
        }  # fmt: skip

    def answer_view(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        """Saved views: one is asked for by its project and name, and written anew where its id is given."""
        if operation == "View":
            if v["entityName"] != self.entity or v["name"] not in self.projects:
                return {"project": None}
            found = [
                view
                for view in self.views
                if (view["projectName"], view["name"], view["type"]) == (v["name"], v["viewName"], v["viewType"])
            ]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        told = {key: v[key] for key in ("entityName", "projectName", "name", "displayName", "type", "spec")}
        view = next((view for view in self.views if view["id"] == v.get("id")), None)
        inserted = view is None
        if view is None:
            view = {"id": f"view-{len(self.views)}"}
            self.views.append(view)
        view.update(told)
        return {"upsertView": {"view": {"id": view["id"], "name": view["name"]}, "inserted": inserted}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream") and self.server.fault is not None:
            told = json.loads(body)
            history = "wandb-history.jsonl" in (told.get("files") or {})
            due = {"start": True, "history": history, "end": bool(told.get("complete"))}[self.server.faulty_from]
            self.server.faulty |= due
        if self.server.faulty or (self.server.fault is not None and self.server.faulty_from == "start"):
            self.server.faulty = True
            self._fail()
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            query = asked["query"]
            found = re.search(r"(?:query|mutation)\s+(\w+)", query)
            operation = asked.get("operationName") or (found.group(1) if found else "?")
            if operation in self.server.refuses:
                self._reply({"data": None, "errors": [{"message": self.server.refuses[operation]}]})
                return
            with self.server.lock:
                self.server.calls.append(operation)
                variables = asked.get("variables") or {}
                try:
                    data = self.server.answer(operation, variables.get("input") or variables, query)
                except Exception as error:  # a test looks at `unknown`; the client would try again for ever
                    self.server.unknown.append(f"{operation}: {error!r} {variables}")
                    data = {}
            self._reply({"data": data})
        elif self.path.endswith("/file_stream"):
            with self.server.lock:
                self._stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})
        else:
            self._reply({}, 404)

    def _fail(self) -> None:
        if self.server.fault == "hang":
            self.server.ended.wait()
        if isinstance(self.server.fault, int):
            self._reply({"error": "no"}, self.server.fault)
        else:
            self.close_connection = True

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/put/")] = self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _stream(self, name: str, told: dict[str, Any]) -> None:
        run = self.server.runs.setdefault(name, Run(name))
        for file, chunk in (told.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if file.endswith((".jsonl", ".json")) else []
            if file == "wandb-history.jsonl":
                run.history += lines
            elif file == "wandb-summary.json":
                for line in lines:
                    run.summary = line
        run.preempting |= bool(told.get("preempting"))
        if told.get("complete"):
            run.complete, run.exit_code = True, told["exitcode"]

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            raw = gzip.decompress(raw)
        return raw

    def _reply(self, value: Any, code: int = 200) -> None:
        raw = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *words: Any) -> None:
        """Quiet."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
