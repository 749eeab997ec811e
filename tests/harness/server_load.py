"""Load that a server must survive: clients that die, one that asks for too much, and ones that send
nonsense.

    python tests/harness/server_load.py                       # the checkout that holds this file
    python tests/harness/server_load.py --package_parent OLD  # another one: OLD/tokcom

It starts `tokcom serve` of the checkout with its shipped model in a process of its own and speaks
plain HTTP, so that any commit with a server can be measured. Clients have addresses of their own in
127.0.0.0/8. Prints one JSON object.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PROMPT = "Once upon a time there was a little girl"
ENDLESS = 2.0  # a temperature at which the end of a text is too rare to save the server work
PARTS = ("dead", "hostile", "nonsense", "sigterm")
HOSTILE = "127.0.0.2"
MODEST = "127.0.0.3"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(package_parent: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """The server of `package_parent/tokcom` with its own model: port and process, which is ended
    afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "tokcom.cli.main", "serve", "--port", str(port), *options]
    environment = os.environ | {"PYTHONPATH": str(package_parent)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start (status {process.poll()}).")
            with contextlib.suppress(OSError):
                health(port)
                break
            time.sleep(0.1)
        yield port, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def send(
    port: int, client: str = "127.0.0.1", path: str = "/v1/completions", **body
) -> http.client.HTTPConnection:
    """A connection from the address `client` over which a request has been sent."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=600, source_address=(client, 0)
    )
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def ask(port: int, client: str = "127.0.0.1", **body) -> tuple[int, dict]:
    """Status and answer of a completion."""
    connection = send(port, client, **body)
    answer = connection.getresponse()
    result = answer.status, json.loads(answer.read())
    connection.close()
    return result


def health(port: int) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    result = json.loads(connection.getresponse().read())
    connection.close()
    return result


def seconds_busy(port: int, started: float, limit: float = 300.0) -> float:
    """Seconds since `started` until nothing waits or runs."""
    while time.monotonic() - started < limit:
        state = health(port)
        if not state["waiting"] and not state["running"]:
            return time.monotonic() - started
        time.sleep(0.02)
    return float("inf")


def cpu_seconds(process: subprocess.Popen) -> float:
    """Processor time of a process so far, which does not depend on what else the machine does."""
    fields = (
        Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    )
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def dead_clients(
    port: int, process: subprocess.Popen, stream: bool, count: int = 8, tokens: int = 2048
) -> dict[str, float]:
    """Seconds that the server stays busy after `count` clients asked for `tokens` tokens each and
    left."""
    connections = [
        send(
            port,
            HOSTILE,
            prompt=PROMPT,
            max_tokens=tokens,
            temperature=ENDLESS,
            stream=stream,
            seed=i,
        )
        for i in range(count)
    ]
    while not health(port)["running"]:
        time.sleep(0.01)
    time.sleep(0.5)
    for connection in connections:
        connection.close()
    spent = cpu_seconds(process)
    busy = seconds_busy(port, time.monotonic())
    return {"seconds": busy, "cpu_seconds": cpu_seconds(process) - spent}


def small_requests(port: int, seconds: float, every: float = 2.0, tokens: int = 16) -> list[float]:
    """Latencies of small requests of one client, one begun `every` seconds, in seconds; infinite
    for one that failed."""
    latencies: list[float] = []

    def measure(seed: int) -> None:
        started = time.monotonic()
        status, _ = ask(port, MODEST, prompt=PROMPT, max_tokens=tokens, seed=seed)
        latencies.append(time.monotonic() - started if status == 200 else float("inf"))

    threads = []
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        threads.append(threading.Thread(target=measure, args=(len(threads),)))
        threads[-1].start()
        time.sleep(max(0.0, begun + every * len(threads) - time.monotonic()))
    for thread in threads:
        thread.join()
    return latencies


@contextlib.contextmanager
def hostile_client(
    port: int, tokens: int = 2048, texts: int = 16, outstanding: int = 2
) -> Iterator[None]:
    """One client that always has `outstanding` requests of `texts` x `tokens` tokens, each with
    settings of its own."""
    over = threading.Event()
    connections: dict[int, http.client.HTTPConnection] = {}

    def keep_asking(index: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                body = {
                    "prompt": PROMPT,
                    "max_tokens": tokens,
                    "n": texts,
                    "temperature": ENDLESS - 0.1 * index,
                }
                connections[index] = send(port, HOSTILE, **body)
                connections[index].getresponse().read()

    threads = [
        threading.Thread(target=keep_asking, args=(i,), daemon=True) for i in range(outstanding)
    ]
    for thread in threads:
        thread.start()
    while not health(port)["running"]:
        time.sleep(0.01)
    time.sleep(0.5)
    try:
        yield
    finally:
        over.set()
        for connection in list(connections.values()):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def percentiles(latencies: list[float]) -> dict:
    ordered = sorted(latencies)
    place = max(0, -(-95 * len(ordered) // 100) - 1)
    return {
        "count": len(ordered),
        "p50": statistics.median(ordered),
        "p95": ordered[place],
        "max": ordered[-1],
    }


def beside_hostile(port: int, seconds: float) -> dict:
    """Percentiles of the latency of small requests alone, and beside one hostile client."""
    alone = small_requests(port, seconds / 2)
    with hostile_client(port):
        beside = small_requests(port, seconds)
    return {"alone": percentiles(alone), "beside": percentiles(beside)}


NONSENSE = [
    b"",
    b"{",
    b"[" * 50_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": ["a", 1]}',
    b'{"prompt": "x", "max_tokens": 1e999}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "n": -3}',
    b'{"prompt": "x", "stop": [[]]}',
    b'{"prompt": "x", "stream_options": 3, "stream": true}',
    json.dumps({"prompt": "x" * 500_000}).encode(),
    json.dumps({"prompt": ["x"] * 5000}).encode(),
    json.dumps({"prompt": [[10**30]]}).encode(),
    json.dumps({"prompt": "x", "max_tokens": 2048, "n": 16, "num_inference_steps": 128}).encode(),
]
RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET /\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000,
    b"\x00" * 1000,
]


def nonsense(port: int) -> dict:
    """Statuses that malformed bodies get, and whether each is explained in OpenAI's form; broken
    connections are only sent."""
    statuses = []
    explained = 0
    for body in NONSENSE:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        statuses.append(answer.status)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            explained += bool(json.loads(answer.read())["error"]["message"])
        connection.close()
    for data in RAW:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as raw:
            raw.sendall(data)
    status, _ = ask(port, prompt=PROMPT, max_tokens=4)
    return {"statuses": statuses, "explained": explained, "answers_afterwards": status == 200}


def end_of(process: subprocess.Popen, port: int) -> dict:
    """SIGTERM during a request: its status, and the status and seconds with which the server
    ends."""
    outcome = {}

    def run() -> None:
        try:
            outcome["request"], _ = ask(
                port, prompt=PROMPT, max_tokens=128, seed=0, temperature=0.9
            )
        except (OSError, http.client.HTTPException) as error:
            outcome["request"] = type(error).__name__

    asking = threading.Thread(target=run)
    asking.start()
    while not health(port)["running"]:
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    outcome["exit"] = process.wait(120)
    outcome["seconds"] = time.monotonic() - started
    asking.join()
    return outcome


def measure(package_parent: Path, seconds: float, parts: tuple[str, ...] = PARTS) -> dict:
    """The figures of one checkout."""
    results = {}
    with serving(package_parent) as (port, process):
        ask(port, prompt=PROMPT, max_tokens=8)  # what is slow only once
        if "dead" in parts:
            for name, stream in (("streamed", True), ("whole", False)):
                results[f"dead_clients_{name}"] = dead_clients(port, process, stream)
        if "hostile" in parts:
            results["small_requests"] = beside_hostile(port, seconds)
            seconds_busy(port, time.monotonic())
        if "nonsense" in parts:
            results["nonsense"] = nonsense(port)
            seconds_busy(port, time.monotonic())
        if "sigterm" in parts:
            results["sigterm"] = end_of(process, port)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[3]
    parser.add_argument(
        "--package_parent",
        type=Path,
        default=here,
        help="directory that holds the checkout `tokcom`",
    )
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long small requests are sent (default: 20)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)"
    )
    args = parser.parse_args()
    print(json.dumps(measure(args.package_parent, args.seconds, tuple(args.parts)), indent=1))


if __name__ == "__main__":
    main()
