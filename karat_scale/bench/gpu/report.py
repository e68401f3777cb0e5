"""What the sections told, on the terminal and in two files, each whole at any time."""

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from karat_scale import __version__
from karat_scale.bench.gpu.markdown import cell, markdown
from karat_scale.bench.gpu.sections import Section
from karat_scale.files import write_atomically


class Report:
    """Keeps `path`, JSON, and the Markdown beside it up to date."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self._begun = time.monotonic()
        self._section: Section | None = None
        self._data: dict[str, Any] = {
            "command": command,
            "karat_scale": __version__,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "finished": False,
            "machine": {},
            "sections": {},
        }

    def write(self) -> None:
        """Both files."""
        write_atomically(self._path, json.dumps(self._data, indent=2) + "\n")
        write_atomically(self._path.with_suffix(".md"), markdown(self._data))

    def begin(self, section: Section) -> None:
        """What is heard from now on belongs to this section."""
        self._section = section
        self._section_begun = time.monotonic()
        self._data["sections"][section.name] = {"rows": [], "notices": [], "left_out": [], "failed": []}

    def end(self) -> None:
        """The section is over."""
        self._now["seconds"] = round(time.monotonic() - self._section_begun, 1)
        self.write()

    def hear(self, kind: str, content: Any) -> None:
        """An event of a worker."""
        if kind == "machine":
            self._hear_machine(content)
        elif kind == "row":
            self._now["rows"].append(content)
            self._say(", ".join(self._figures(content)))
        elif kind == "notice":
            self._now["notices"].append(content)
            self._say(content)
        else:
            self._now[kind].append(content)
            self._say(f"{kind.replace('_', ' ')}: {content['what']}: {content['why']}")
        self.write()

    def finish(self) -> int:
        """Say where the files are; returns the command's exit code."""
        sections = self._data["sections"].values()
        checks = [row["right"] for section in sections for row in section["rows"] if "right" in row]
        failures = sum(len(section["failed"]) for section in sections)
        code = 0 if all(checks) and not failures else 1
        self._data.update(finished=True, exit=code)
        self.write()
        print(f"{sum(checks)} of {len(checks)} checks are right, {failures} failures", flush=True)
        print(f"{self._path} and {self._path.with_suffix('.md')}", flush=True)
        return code

    @property
    def _now(self) -> dict[str, Any]:
        assert self._section is not None
        section: dict[str, Any] = self._data["sections"][self._section.name]
        return section

    def _hear_machine(self, facts: dict[str, Any]) -> None:
        if not self._data["machine"]:
            self._data["machine"] = facts
            versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            print(f"{facts['card']}, {versions}", flush=True)

    def _figures(self, row: dict[str, Any]) -> list[str]:
        assert self._section is not None
        (first, _), *others = self._section.columns
        return [cell(row.get(first))] + [f"{heading} {cell(row[key])}" for key, heading in others if key in row]

    def _say(self, text: str) -> None:
        assert self._section is not None
        print(f"[{time.monotonic() - self._begun:4.0f} s] {self._section.name}: {text}", flush=True)
