"""Damage to the files of a directory, drawn by hypothesis: changed, swapped, replaced or removed."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.faults.conftest import Share


@dataclass(frozen=True)
class Damage:
    """One harm to one file of a directory. File and place are fractions: they are drawn before the files are known."""

    file: float
    harm: str
    place: float
    bit: int
    more: bytes

    def apply(self, files: Sequence[Path]) -> Path | None:
        """Harm one of `files`; return it, or None if its bytes have not changed."""
        path, other = files[int(self.file * len(files))], files[self.position(len(files))]
        before, theirs = path.read_bytes(), other.read_bytes()
        if self.harm in CHANGES:
            path.write_bytes(CHANGES[self.harm](self, before, self.position(len(before)), theirs))
        elif self.harm == "swapped with another":
            path.write_bytes(theirs)
            other.write_bytes(before)
        else:
            path.unlink()
        if self.harm == "a directory instead":
            path.mkdir()
        return None if path.is_file() and path.read_bytes() == before else path

    def position(self, length: int) -> int:
        """Return a place in `length` bytes."""
        return min(int(self.place * length), max(length - 1, 0))

    def flipped(self, data: bytes, at: int) -> bytes:
        """Return the bytes with one bit flipped at a place."""
        return data[:at] + bytes([data[at] ^ 1 << self.bit]) + data[at + 1 :] if data else data


# How each harm changes a file's bytes, given a place in them and the bytes of another file.
CHANGES: dict[str, Callable[[Damage, bytes, int, bytes], bytes]] = {
    "one bit flipped": lambda damage, data, at, other: damage.flipped(data, at),
    "cut": lambda damage, data, at, other: data[:at],
    "lengthened": lambda damage, data, at, other: data + damage.more,
    "bytes inserted": lambda damage, data, at, other: data[:at] + damage.more + data[at:],
    "bytes overwritten": lambda damage, data, at, other: (data[:at] + damage.more + data[at + len(damage.more) :])[
        : len(data)
    ],
    "zeroed from somewhere": lambda damage, data, at, other: data[:at] + bytes(len(data) - at),
    "replaced by another": lambda damage, data, at, other: other,
}
HARMS = (*CHANGES, "swapped with another", "removed", "a directory instead")
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
    """Call `look` few or many times, each time with a fresh copy of the directory `whole` and a damage."""

    @seed(share.seed)
    @settings(max_examples=share.of(*counts), database=None)
    @given(damage=DAMAGES)
    def run(damage: Damage) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        look(work, damage)

    run()
