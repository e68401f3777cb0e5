"""What can happen to the bytes of a file, or to which file has them, drawn by hypothesis."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.faults.conftest import Share


@dataclass(frozen=True)
class Damage:
    """One harm to one of the files of a directory. Fractions, since it is drawn before the files are known."""

    file: float
    harm: str
    place: float
    bit: int
    more: bytes

    def apply(self, files: Sequence[Path]) -> Path | None:
        """Harm one of `files`; returns it, or None where its bytes are what they were."""
        path = files[int(self.file * len(files))]
        before = path.read_bytes()
        HARMS[self.harm](self, path, files)
        return None if path.is_file() and path.read_bytes() == before else path

    def position(self, length: int) -> int:
        """A place in so many bytes."""
        return min(int(self.place * length), max(length - 1, 0))


def _flip(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[damage.position(len(data))] ^= 1 << damage.bit
    path.write_bytes(data)


def _cut(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: damage.position(len(data))])


def _lengthen(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    path.write_bytes(path.read_bytes() + damage.more)


def _insert(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    data = path.read_bytes()
    at = damage.position(len(data))
    path.write_bytes(data[:at] + damage.more + data[at:])


def _overwrite(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    data = bytearray(path.read_bytes())
    at = damage.position(len(data))
    data[at : at + len(damage.more)] = damage.more[: len(data) - at]
    path.write_bytes(data)


def _zero_the_rest(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    data = path.read_bytes()
    at = damage.position(len(data))
    path.write_bytes(data[:at] + bytes(len(data) - at))


def _swap(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    other = files[damage.position(len(files))]
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _replace(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    other = files[damage.position(len(files))].read_bytes()
    path.write_bytes(other)


def _remove(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    path.unlink()


def _directory(damage: Damage, path: Path, files: Sequence[Path]) -> None:
    path.unlink()
    path.mkdir()


HARMS: dict[str, Callable[[Damage, Path, Sequence[Path]], None]] = {
    "one bit flipped": _flip,
    "cut": _cut,
    "lengthened": _lengthen,
    "bytes inserted": _insert,
    "bytes overwritten": _overwrite,
    "zeroed from somewhere": _zero_the_rest,
    "swapped with another": _swap,
    "replaced by another": _replace,
    "removed": _remove,
    "a directory instead": _directory,
}
FRACTIONS = st.floats(0, 1, exclude_max=True)
DAMAGES = st.builds(
    Damage,
    FRACTIONS,
    st.sampled_from(sorted(HARMS)),
    FRACTIONS,
    st.integers(0, 7),
    st.one_of(st.binary(min_size=1, max_size=40), st.text(min_size=1, max_size=10).map(lambda text: text.encode())),
)


def try_damages(
    share: Share, counts: tuple[int, int], whole: Path, work: Path, look: Callable[[Path, Damage], None]
) -> None:
    """Call `look` with a fresh copy of the directory `whole` and a damage, few or many times."""

    @seed(share.seed)
    @settings(max_examples=share.of(*counts), deadline=None, database=None)
    @given(damage=DAMAGES)
    def run(damage: Damage) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        look(work, damage)

    run()
