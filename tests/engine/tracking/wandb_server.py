"""A server with the part of W&B's API that its client uses for a run's figures, in memory."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.servers import Answering, serving


class Account:
    """What the server holds of runs, by their ids.

    Attributes:
        rows: the history.
        summaries: the last values.
        configs: the settings.
        files: the names of uploaded files.
        ended: the exit codes of runs that have ended.
        lost: whether the server refuses all figures, so that they never arrive.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.summaries: dict[str, str] = {}
        self.configs: dict[str, str] = {}
        self.files: set[str] = set()
        self.ended: list[int] = []
        self.lost = False
        self.url = ""

    def history(self, run: str, kind: str) -> list[dict[str, Any]]:
        """Return the rows of one kind of event, in order."""
        rows = self.rows.get(run, {})
        return [rows[line] for line in sorted(rows) if f"{kind}/step" in rows[line]]


class _Handler(Answering):
    account: Account

    def _body(self) -> bytes:
        body = super()._body()
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def get(self) -> None:
        self._answer({})

    def put(self) -> None:
        self._body()
        self.account.files.add(self.path.partition("/upload/")[2])
        self._answer({})

    def post(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answers = {
                "RunResumeStatus": self._resume,
                "UpsertBucket": self._upsert,
                "CreateRunFiles": self._create_files,
                "Viewer": lambda _: {"viewer": {"id": "1", "entity": "owls", "username": "owls", "flags": "{}"}},
            }
            answer = answers.get(asked.get("operationName"), lambda _: {})
            self._answer({"data": answer(asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(body))
        else:
            self._answer({})

    def _stream(self, run: str, sent: dict[str, Any]) -> None:
        if self.account.lost:
            self._answer({}, 503)
            return
        if sent.get("complete"):
            self.account.ended.append(sent["exitcode"])
        files = sent.get("files", {})
        if history := files.get("wandb-history.jsonl"):
            rows = self.account.rows.setdefault(run, {})
            for number, line in enumerate(history["content"], history["offset"]):
                rows[number] = json.loads(line)
        if summary := files.get("wandb-summary.json"):
            self.account.summaries[run] = summary["content"][-1]
        self._answer({"exitcode": None, "limits": {}})

    def _resume(self, variables: dict[str, Any]) -> dict[str, Any]:
        run, account = variables["name"], self.account
        if run not in account.configs:
            return {"model": None}
        rows = account.rows.get(run, {})
        last = [json.dumps(rows[max(rows)])] if rows else []
        bucket = {
            **self._bucket(run),
            "summaryMetrics": account.summaries.get(run, "{}"),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "m", "name": "karat", "entity": {"id": "e", "name": "owls"}, "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        is_new = run not in self.account.configs
        self.account.configs[run] = variables.get("config") or self.account.configs.get(run, "{}")
        return {"upsertBucket": {"bucket": {**self._bucket(run), "historyLineCount": 0}, "inserted": is_new}}

    def _bucket(self, run: str) -> dict[str, Any]:
        project = {"id": "m", "name": "karat", "entity": {"id": "e", "name": "owls"}}
        return {"id": run, "name": run, "displayName": run, "config": self.account.configs[run], "project": project}

    def _create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.account.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}


@contextmanager
def serve() -> Iterator[Account]:
    """Run the server on a port of this machine; yield its account."""
    account = Account()
    with serving(_Handler, account=account) as account.url:
        yield account
