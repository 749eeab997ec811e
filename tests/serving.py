"""A server with a tiny model, for the tests of `tokcom serve`."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator

import openai
import uvicorn

from tokcom.cli.serve import DrainingServer, build_app
from tokcom.cli.server_settings import ServerSettings

PROMPT = "Squinty was"


class Running:
    """The application on a free port of the loopback interface."""

    def __init__(self, pipe, grace: float = 10.0, **settings):
        self.app = build_app(pipe, ServerSettings(**settings))
        self.engine = self.app.state.engine
        self.server = DrainingServer(
            uvicorn.Config(self.app, port=0, log_level="error"), grace, "a model"
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def client(self, key: str = "key") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=30
        )

    def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
        """A request of the standard library's, which sends what the `openai` client would not."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def send(self, **body) -> http.client.HTTPConnection:
        """A request whose answer nobody reads yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@contextlib.contextmanager
def servers() -> Iterator[Callable[..., Running]]:
    """A function that starts servers, which end with the context."""
    running = []

    def start(pipe, **settings) -> Running:
        running.append(Running(pipe, **settings))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
