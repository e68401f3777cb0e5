"""Puts the compiled libraries into a wheel for one kind of machine, named by KARAT_WHEEL: x86_64 or aarch64.

`make release` sets it. Otherwise the wheel has the sources alone, and each is compiled at its first use.
"""

import os
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Of libjpeg-turbo, which auditwheel copies into the wheel.
COPYRIGHT = "/usr/share/doc/libjpeg62-turbo/copyright"


class CompiledLibraries(BuildHookInterface):
    """One library for each source and instruction set, beside the source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        machine = os.environ.get("KARAT_WHEEL")
        if machine is None or version == "editable":
            return
        root = Path(self.root)
        native = runpy.run_path(str(root / "karat_scale" / "foundation" / "native_build.py"))
        self.folder = tempfile.TemporaryDirectory()
        for source in sorted((root / "karat_scale").rglob("*.cpp")):
            arguments, portable = native["build_arguments"](source)
            known = native["INSTRUCTION_SETS"]
            sets = {isa: known[isa] for isa in known if (isa == "neon") == (machine == "aarch64")}
            for isa, flags in {**sets, **({native["PLAIN"]: ()} if portable else {})}.items():
                library = native["in_the_package"](source, isa)
                built = Path(self.folder.name) / library.name
                # Linked without OpenMP's library: the functions are found in the one that torch has loaded.
                compiler = [f"{machine}-linux-gnu-g++", *native["FLAGS"], *flags]
                subprocess.run([*compiler, *arguments, "-c", source, "-o", f"{built}.o"], check=True)
                link = [compiler[0], "-shared", "-s", f"{built}.o", *arguments]
                subprocess.run([*link, "-o", built], check=True)
                build_data["force_include"][str(built)] = str(library.relative_to(root))
        build_data["extra_metadata"][COPYRIGHT] = "libjpeg-turbo.txt"
        build_data.update(pure_python=False, tag=f"py3-none-linux_{machine}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
