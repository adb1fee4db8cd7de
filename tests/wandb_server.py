"""A small W&B server on loopback. It answers the calls that a run makes, and stores what it receives."""
# ruff: noqa: N802 (methods have the names of W&B's GraphQL operations)

import gzip
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
TIME = "2026-01-01T00:00:00"
Plain = dict[str, Any]

ANSWERS: dict[str, Plain] = {
    "Viewer": {"viewer": {
        "id": "u", "entity": "tester", "username": "tester", "email": "", "admin": False, "flags": "{}",
        "teams": {"edges": []}, "capabilities": [],
    }},
    "ServerInfo": {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": {"coreWeaveOrganizationId": None}}},
    "ArtifactType": {"project": {"artifact": None}},
}  # fmt: skip


@dataclass
class Run:
    """What the server has received about one run."""

    name: str
    fields: Plain = field(default_factory=dict)  # of UpsertBucket: displayName, config, groupName, tags ...
    history: list[Plain] = field(default_factory=list)
    summary: Plain = field(default_factory=dict)
    exit_code: int | None = None
    complete: bool = False
    preempting: bool = False

    @property
    def config(self) -> Plain:
        return {key: node["value"] for key, node in json.loads(self.fields["config"]).items() if key != "_wandb"}


class Sweep:
    """A grid over the nested `parameters` of a sweep's file. Each agent gets one run after the other.

    Attributes:
        given: parameters of each run that was started, in order, by the name of the run.
        stop: runs that the agent is asked to stop at its next heartbeat.
        again: preempted runs that are to be started again.
        reports: what the agents have reported about their runs, one entry per heartbeat.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        spaces = _leaves(yaml.safe_load(text)["parameters"])
        self.grid = [list(zip(spaces, values, strict=True)) for values in itertools.product(*spaces.values())]
        self.given: dict[str, Plain] = {}
        self.stop: set[str] = set()
        self.again: list[str] = []
        self.reports: list[dict[str, bool]] = []

    def commands(self, running: dict[str, bool]) -> list[Plain]:
        self.reports.append(running)
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


def _leaves(parameters: Plain, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[Any]]:
    leaves: dict[tuple[str, ...], list[Any]] = {}
    for key, rule in parameters.items():
        if "parameters" in rule:
            leaves |= _leaves(rule["parameters"], (*path, key))
        else:
            leaves[(*path, key)] = rule["values"] if "values" in rule else [rule["value"]]
    return leaves


def _project(name: str | None = None) -> Plain:
    return {"id": "p", "internalId": "p", "name": name or "alexlab", "entity": {"id": "e", "name": "tester"}}


class WandbServer(ThreadingHTTPServer):
    """
    Attributes:
        runs, sweeps: by name.
        files: content of each uploaded file, by path.
        downloads: names of the artifacts' files that were downloaded, in order.
        stored: content of each file of an artifact, and of its "manifest", by (number of the artifact, name).
        artifacts: the CreateArtifact calls; `uses` those that make an artifact an input of a run.
        views: saved views, as UpsertView2 sends them, each with an id.
        calls: the GraphQL operations in order; `unknown` those that have no answer here.
        refuses: message of the GraphQL error that an operation gets.
        fault: the answer to everything once the server is faulty: a status code, "hang" or "close".
        faulty_from: when it becomes faulty: at the "start", at the first metrics of a run ("history"), or when a run
            reports that it is complete ("end").
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.files: dict[str, bytes] = {}
        self.stored: dict[tuple[str, str], bytes] = {}
        self.downloads: list[str] = []
        self.artifacts: list[Plain] = []
        self.uses: list[Plain] = []
        self.views: list[Plain] = []
        self.calls: list[str] = []
        self.unknown: list[str] = []
        self.entity: str | None = "tester"  # the user's default
        self.projects = {"alexlab"}  # of this entity; they can hold views
        self.refuses: dict[str, str] = {}
        self.fault: int | str | None = None
        self.faulty_from, self.faulty = "", False
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def run_of(self, name: str) -> Run:
        """Return the run of the run directory with this name."""
        (run,) = (run for run in self.runs.values() if run.config["run"] == name)
        return run

    def artifact_of(self, collection: str) -> Plain:
        """Return the last artifact of this name; its metadata as values, its aliases as a set."""
        artifact = [made for made in self.artifacts if made["artifactCollectionName"] == collection][-1]
        aliases = {each["alias"] for each in artifact["aliases"]}
        return {**artifact, "metadata": json.loads(artifact["metadata"]), "aliases": aliases}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def env(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": ""}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients leave their connections open when they exit."""

    # -- GraphQL

    def answer(self, operation: str, v: Plain, query: str) -> Plain:
        if operation in ANSWERS:
            return ANSWERS[operation]
        if not hasattr(self, f"answer_{operation}"):
            self.unknown.append(f"{operation}: {query[:300]}")
            return {}
        return getattr(self, f"answer_{operation}")(v)

    def answer_GetDefaultEntity(self, v: Plain) -> Plain:
        return {"viewer": {"id": "u", "entity": self.entity}}

    def answer_UpsertBucket(self, v: Plain) -> Plain:
        run = self.runs.setdefault(v["name"], Run(v["name"]))
        run.fields.update({key: value for key, value in v.items() if value is not None})
        bucket = {
            "id": f"id-{v['name']}", "name": v["name"], "displayName": v.get("displayName") or v["name"],
            "description": "", "config": "{}", "sweepName": None, "historyLineCount": 0,
            "project": _project(v.get("project")),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def answer_RunResumeStatus(self, v: Plain) -> Plain:
        return {"model": {**_project(v.get("project")), "bucket": None}}

    def answer_CreateRunFiles(self, v: Plain) -> Plain:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def answer_Run(self, v: Plain) -> Plain:
        """Answer wandb.Api().run(path)."""
        run = self.runs.get(v["name"]) if (v["entity"], v["project"]) == ("tester", "alexlab") else None
        if run is None:
            return {"project": {"run": None}}
        return {"project": {"run": {
            "projectId": "1", "id": f"id-{run.name}", "tags": [], "name": run.name,
            "displayName": run.fields.get("displayName") or run.name, "sweepName": None,
            "state": "finished" if run.complete else "running", "config": run.fields["config"],
            "group": run.fields.get("groupName"), "jobType": "train", "commit": run.fields.get("commit"),
            "readOnly": False, "createdAt": TIME, "heartbeatAt": TIME, "description": "", "notes": None,
            "systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history),
            "user": {"name": "tester", "username": "tester"}, "historyKeys": None,
        }}}  # fmt: skip

    # artifacts

    def answer_CreateArtifact(self, v: Plain) -> Plain:
        self.artifacts.append(v)
        artifact = {"id": str(len(self.artifacts) - 1), "digest": v.get("digest"), "state": "PENDING", "aliases": []}
        sequence = {"id": "s", "name": "n", "latestArtifact": None}
        return {"createArtifact": {"artifact": {**artifact, "versionIndex": 0, "artifactSequence": sequence}}}

    def answer_CreateArtifactManifest(self, v: Plain) -> Plain:
        number = v.get("artifactID") or v["artifactManifestID"]  # of a new one, or of one that gets its content
        file = {"id": "f", "name": v.get("name"), "displayName": v.get("name"), **self._upload("manifest", number)}
        manifest = {"artifactManifest": {"id": number, "file": file}}
        return {"createArtifactManifest": manifest, "updateArtifactManifest": manifest}

    answer_UpdateArtifactManifest = answer_CreateArtifactManifest  # noqa: N815

    def _upload(self, path: str, number: str) -> Plain:
        return {"uploadUrl": f"{self.url}/put/{path}?of={number}", "uploadHeaders": []}

    def answer_CreateArtifactFiles(self, v: Plain) -> Plain:
        nodes = [
            {"id": str(i), "name": spec["name"], "displayName": spec["name"], "storagePath": f"x/{i}",
             **self._upload(f"artifact/{spec['name']}", spec["artifactID"]), "uploadMultipartUrls": None,
             "artifact": {"id": spec["artifactID"]}}
            for i, spec in enumerate(v["artifactFiles"])
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def answer_CommitArtifact(self, v: Plain) -> Plain:
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def answer_UseArtifact(self, v: Plain) -> Plain:
        self.uses.append(v)
        return {"useArtifact": {"artifact": {"id": v.get("artifactID")}}}

    def answer_ArtifactByID(self, v: Plain) -> Plain:
        """Answer what `Artifact.wait` asks after the upload."""
        return {"artifact": self._artifact(v["id"], 0)}

    def _artifact(self, number: str, version: int) -> Plain:
        made = self.artifacts[int(number)]
        sequence = {"__typename": "ArtifactSequence", "name": made["artifactCollectionName"]}
        return {
            "__typename": "Artifact", "id": number, "artifactSequence": {**sequence, "project": _project()},
            "versionIndex": version, "artifactType": {"name": made["artifactTypeName"]}, "description": None,
            "metadata": made["metadata"], "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [],
            "historyStep": None, "state": "COMMITTED", "size": 1, "digest": made["digest"], "digestAlgorithm": None,
            "commitHash": None, "fileCount": 1, "createdAt": TIME, "updatedAt": None, "aliases": [],
        }  # fmt: skip

    # artifacts that are downloaded

    def answer_ArtifactMembershipByName(self, v: Plain) -> Plain:
        """Answer wandb.Api().artifact(path)."""
        if (v["entity"], v["project"]) != ("tester", "alexlab"):
            return {"project": None}
        collection, _, alias = v["name"].partition(":")
        versions = self._versions(collection)
        wanted = [
            number for number, made in enumerate(versions)
            if alias in (f"v{number}", *(each["alias"] for each in self.artifacts[int(made)]["aliases"]))
        ]  # fmt: skip
        if not wanted:
            return {"project": {"artifactCollectionMembership": None}}
        return {"project": {"artifactCollectionMembership": {
            "__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": wanted[-1], "createdAt": TIME,
            "aliases": [{"__typename": "ArtifactAlias", "id": "a", "alias": alias}],
            "artifactCollection": {"__typename": "ArtifactSequence", "name": collection, "project": _project()},
            "artifact": self._artifact(versions[wanted[-1]], wanted[-1]),
        }}}  # fmt: skip

    def answer_FetchArtifactManifest(self, v: Plain) -> Plain:
        return {"artifact": {"currentManifest": {"file": {"directUrl": f"{self.url}/get/{v['id']}/manifest"}}}}

    def answer_GetArtifactMembershipFileUrls(self, v: Plain) -> Plain:
        number = self._versions(v["collection"])[int(v["alias"].removeprefix("v"))]
        names = [name for of, name in self.stored if of == number and name != "manifest"]
        nodes = [{"__typename": "File", "name": n, "directUrl": f"{self.url}/get/{number}/{n}"} for n in names]
        files = {
            "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False},
            "edges": [{"node": node} for node in nodes],
        }
        collection = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": collection}}

    def _versions(self, collection: str) -> list[str]:
        numbered = enumerate(self.artifacts)
        return [str(number) for number, made in numbered if made["artifactCollectionName"] == collection]

    # views: a new one has no id

    def answer_View(self, v: Plain) -> Plain:
        if v["entityName"] != self.entity or v["name"] not in self.projects:
            return {"project": None}
        asked = (v["name"], v["viewName"], v["viewType"])
        found = [view for view in self.views if (view["projectName"], view["name"], view["type"]) == asked]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def answer_UpsertView2(self, v: Plain) -> Plain:
        view = next((view for view in self.views if view["id"] == v.get("id")), None)
        inserted = view is None
        if view is None:
            view = {"id": f"view-{len(self.views)}"}
            self.views.append(view)
        view |= {key: v[key] for key in ("entityName", "projectName", "name", "displayName", "type", "spec")}
        return {"upsertView": {"view": {"id": view["id"], "name": view["name"]}, "inserted": inserted}}

    # sweeps

    def answer_UpsertSweep(self, v: Plain) -> Plain:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = Sweep(name, v["config"])
        sweep = {"name": name, "project": _project(v.get("projectName"))}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def answer_GetSweep(self, v: Plain) -> Plain:
        sweep = self.sweeps.get(v.get("sweep") or v["name"])
        found = sweep and {"id": sweep.name, "name": sweep.name, "config": sweep.text, "runs": {"edges": []}}
        return {"project": {"sweep": found}}

    answer_SweepWithRuns = answer_GetSweep  # noqa: N815

    def answer_CreateAgent(self, v: Plain) -> Plain:
        return {"createAgent": {"agent": {"id": v["sweep"]}}}

    def answer_Heartbeat(self, v: Plain) -> Plain:
        commands = self.sweeps[v["id"]].commands(json.loads(v["runState"]))
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body, server = self._body(), self.server
        is_stream = self.path.endswith("/file_stream")
        if server.fault is not None:
            sent = json.loads(body) if is_stream else {}
            history = "wandb-history.jsonl" in (sent.get("files") or {})
            server.faulty |= {"start": True, "history": history, "end": bool(sent.get("complete"))}[server.faulty_from]
        if server.faulty:
            self._fail()
        elif self.path.endswith("/graphql"):
            self._reply(self._graphql(json.loads(body)))
        elif is_stream:
            with server.lock:
                self._stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})
        else:
            self._reply({}, 404)

    def _graphql(self, asked: Plain) -> Plain:
        query, server = asked["query"], self.server
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = asked.get("operationName") or (named.group(1) if named else "?")
        if operation in server.refuses:
            return {"data": None, "errors": [{"message": server.refuses[operation]}]}
        variables = asked.get("variables") or {}
        with server.lock:
            server.calls.append(operation)
            try:
                return {"data": server.answer(operation, variables.get("input") or variables, query)}
            except Exception as error:  # a test looks at `unknown`; without an answer the client would retry for ever
                server.unknown.append(f"{operation}: {error!r} {variables}")
                return {"data": {}}

    def _fail(self) -> None:
        if self.server.fault == "hang":
            self.server.stopped.wait()
        if isinstance(self.server.fault, int):
            self._reply({"error": "no"}, self.server.fault)
        else:
            self.close_connection = True

    def do_PUT(self) -> None:
        path, _, number = self.path.removeprefix("/put/").partition("?of=")
        self.server.files[path] = body = self._body()
        if number:
            self.server.stored[number, path.removeprefix("artifact/")] = body
        self._reply({})

    def do_GET(self) -> None:
        if not self.path.startswith("/get/"):
            self._reply({})
            return
        number, _, name = self.path.removeprefix("/get/").partition("/")
        self.server.downloads.append(name)
        raw = self.server.stored.get((number, name))
        self._send(raw or b"", 404 if raw is None else 200, "application/octet-stream")

    def _stream(self, name: str, sent: Plain) -> None:
        run = self.server.runs.setdefault(name, Run(name))
        for file, chunk in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if file.endswith((".jsonl", ".json")) else []
            if file == "wandb-history.jsonl":
                run.history += lines
            elif file == "wandb-summary.json" and lines:
                run.summary = lines[-1]
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.complete, run.exit_code = True, sent["exitcode"]

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _reply(self, value: Any, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, "application/json")

    def _send(self, raw: bytes, code: int, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *words: Any) -> None:
        """Print nothing."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
