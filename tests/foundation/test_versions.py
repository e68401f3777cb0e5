"""The versions that a run records."""

import subprocess
import sys

PROGRAM = """
import errno, os, resource
from karat_scale.foundation.versions import library_versions

resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    library_versions()
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_a_lack_of_descriptors_is_not_taken_for_a_missing_package() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout == "EMFILE\n", done.stderr
