"""A W&B server small enough to read: it keeps the history lines of each run by their offset, as the real one
does.
"""

from __future__ import annotations

import argparse
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalesnn.tracking import add_tracking_arguments

API_KEY = "0123456789abcdef0123456789abcdef01234567"


class WandbServer:
    """Runs by id: history (offset → row), config, artifacts, states, alerts."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict]] = {}
        self.config: dict[str, dict] = {}
        self.upserts: list[dict] = []
        self.alerts: list[dict] = []
        self.queries: list[str] = []
        self.preempting: list[str] = []
        self.streams: list[tuple[str, int, int]] = []  # run, offset, lines of each history upload
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def _body(self) -> bytes:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def _reply(self, answer: dict) -> None:
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._reply({})

            def do_PUT(self) -> None:
                self._body()
                self._reply({})

            def do_POST(self) -> None:
                body = json.loads(self._body())
                if self.path.endswith("/graphql"):
                    self._reply({"data": server.answer(body["query"], body.get("variables") or {})})
                else:
                    server.take_lines(self.path.split("/")[-2], body)
                    self._reply({"exitcode": None, "limits": {}})

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def take_lines(self, run: str, body: dict) -> None:
        stream = body.get("files", {}).get("wandb-history.jsonl")
        if stream:
            self.streams.append((run, stream["offset"], len(stream["content"])))
            for place, line in enumerate(stream["content"], stream["offset"]):
                self.history.setdefault(run, {})[place] = json.loads(line)
        if body.get("preempting"):
            self.preempting.append(run)

    def answer(self, query: str, variables: dict) -> dict:
        self.queries.append(query)
        run = variables.get("name") or variables.get("runName") or ""
        bucket = {
            "id": "bucket",
            "name": run,
            "displayName": variables.get("displayName") or run,
            "description": "",
            "config": "{}",
            "sweepName": "",
            "historyLineCount": len(self.history.get(run, {})),
            "project": {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}},
        }
        if "upsertBucket" in query:
            self.upserts.append(variables)
            if variables.get("config"):
                self.config[run] = json.loads(variables["config"])
            known = run in self.history
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if "RunResumeStatus" in query:
            rows = self.history.get(run)
            model = {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}}
            if not rows:
                return {"model": {**model, "bucket": None}}
            last = rows[max(rows)]
            summary = {key: value for place in sorted(rows) for key, value in rows[place].items()}
            bucket.update(
                summaryMetrics=json.dumps(summary),
                logLineCount=0,
                eventsLineCount=0,
                historyTail=json.dumps([json.dumps(last)]),
                eventsTail="[]",
                tags=[],
                notes=None,
                wandbConfig='{"t": 1}',
            )
            return {"model": {**model, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": files}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "viewer" in query:
            viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"features": []}}
        return {}

    def rows(self, run: str) -> list[dict]:
        """The history of a run in order."""
        return [self.history[run][place] for place in sorted(self.history.get(run, {}))]

    def stop(self) -> None:
        """Be gone, as a machine is that loses its network."""
        if self.thread.is_alive():
            self.http.shutdown()
            self.thread.join()
            self.http.server_close()


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A running server that wandb is pointed at, with a key."""
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield server
    server.stop()


@pytest.fixture
def tracking_args(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The defaults of the tracking flags, with W&B off."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    parser = argparse.ArgumentParser()
    add_tracking_arguments(parser)
    return parser.parse_args([])
