"""A real S3 server on loopback (SeaweedFS), and a proxy before it that can fail in the ways networks and servers do."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from obstore.store import S3Store

KEY, SECRET = "test-key", "test-secret-" + "0" * 8  # pragma: allowlist secret


def weed() -> str | None:
    """Return the program of the server; None if it is not installed (wheels are for Linux only)."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def variables(port: int, host: str = "127.0.0.1") -> dict[str, str]:
    """Return the environment of a client of the server, or of a proxy."""
    return {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Return free ports. Those 10,000 above them are free too: the server uses these for gRPC."""
    found: list[int] = []
    start = 20000 + os.getpid() % 2000 * 10
    for port in range(start, 50000):
        with suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10000))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1", before: Sequence[str] = ()) -> Iterator[int]:
    """Run the server, and yield its port.

    Args:
        host: the address that it listens on.
        before: a command that starts the server, such as one that enters a network namespace.
    """
    program = weed()
    assert program is not None
    actions = ["Admin", "Read", "Write", "List"]
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identities = {"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(identities))
    master, volume, filer, port = free_ports(4)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*before, program, "server", f"-dir={folder}", f"-ip={host}", f"-ip.bind={host}", f"-master.port={master}",
             f"-volume.port={volume}", f"-filer.port={filer}", "-volume.max=100", "-master.volumeSizeLimitMB=64", "-s3",
             f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
             f"-s3.config={folder / 's3.json'}"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not answers(host, port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        config = {"access_key_id": KEY, "secret_access_key": SECRET, "region": "us-east-1"}
        config["endpoint"] = f"http://{host}:{port}"
        S3Store("tests", config=config, client_options={"allow_http": True}).put(".keep", b"")  # creates the bucket
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(host: str, port: int) -> bool:
    """Check whether the server takes objects."""
    try:
        connection = http.client.HTTPConnection(host, port, timeout=5)
        connection.request("GET", "/healthz")
        return connection.getresponse().status < 500
    except OSError:
        return False


@dataclass
class Faults:
    """What the proxy does with requests whose path contains `of`, as long as `left` is above 0.

    Attributes:
        kind: "refuse" (the connection is closed), "hang", "500", "503", "cut" (half the body), "wrong" (a byte of the
            body is another), or "slow" (`rate` bytes per second).
        seen: (method, path) of all requests.
        sent: bytes of the answers to GET, by path.
    """

    kind: str = ""
    of: str = ""
    left: int = 0
    rate: int = 1 << 20
    seen: list[tuple[str, str]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def set(self, kind: str, of: str = "", count: int = 1 << 30) -> None:
        self.kind, self.of, self.left = kind, of, count

    def now(self, method: str, path: str) -> str:
        with self.lock:
            self.seen.append((method, path))
            if self.left <= 0 or self.of not in path:
                return ""
            self.left -= 1
            return self.kind


@contextmanager
def faulty_proxy(server: int) -> Iterator[tuple[int, Faults]]:
    """Run a proxy before the server, and yield its port and its faults."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = faults.now(self.command, self.path)
            if kind == "hang":
                faults.over.wait()
            if kind in ("refuse", "hang"):
                self.close_connection = True
                return
            if kind in ("500", "503"):
                self.answer(int(kind), {}, b"<Error><Message>We encountered an error.</Message></Error>")
                return
            connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():  # with the Host that is signed
                connection.putheader(key, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content, headers = response.read(), dict(response.getheaders())
            connection.close()
            if self.command == "GET":
                with faults.lock:
                    faults.sent[self.path.partition("?")[0]] += len(content)
            if kind == "wrong" and content:
                middle = len(content) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            self.answer(response.status, headers, content, kind)

        def answer(self, status: int, headers: dict[str, str], content: bytes, kind: str = "") -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(key, value)
            is_head = self.command == "HEAD"
            length = next((value for key, value in headers.items() if key.lower() == "content-length"), "0")
            self.send_header("Content-Length", length if is_head else str(len(content)))
            self.end_headers()
            if is_head:
                return
            if kind == "cut":
                content, self.close_connection = content[: len(content) // 2], True
            step = faults.rate // 20 if kind == "slow" else len(content) or 1
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                if kind == "slow" and faults.over.wait(0.05):
                    break

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):
                super().handle()

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy.server_address[1], faults
    finally:
        faults.over.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
