"""The samples of one tar: which member is the image, and which tells the class.

A key is a member's path up to the first dot of its last part, as in WebDataset. Members with one key are a sample,
also if others stand between them.
"""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from karat_scale.data.indexing.labels import Label, LabelRule, NoLabelError, class_name_in, guess_rule
from karat_scale.data.indexing.tars import Tar
from karat_scale.data.shards.shard_format import index_bytes
from karat_scale.data.shards.tar_headers import Member, scan_members

IMAGES = ("jpg", "jpeg", "png", "webp")
_LARGEST_LABEL = 1 << 20


@dataclass
class TarSamples:
    """What one tar holds. The lists go in step; `crcs` is empty unless the images were read."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    names: dict[Label, str] = field(default_factory=dict)
    """The names of numbered classes, where .json has them as timm's tars do; else an empty text."""
    tar_bytes: int = 0
    etag: str = ""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Members and samples that are not used, with the reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """How many samples are unusual in a way, and used."""

    def index(self, labels: list[int]) -> bytes:
        """Return the index file of the tar, with the classes' numbers of its samples."""
        rows = zip(self.offsets, self.sizes, labels, self.crcs or [0] * len(labels), strict=True)
        return index_bytes(list(rows), self.keys)


@dataclass
class _Sample:
    key: str
    members: dict[str, Member] = field(default_factory=dict)


def read_samples(tar: Tar, rule: LabelRule, with_crc: bool = False) -> TarSamples:
    """Return the samples of a tar.

    Args:
        with_crc: also read each image, for its CRC-32.

    Raises:
        DataError: the tar cannot be read, or is damaged.
    """
    found = TarSamples(tar_bytes=tar.size, etag=tar.etag)
    for sample in _group(scan_members(tar.read, tar.size, tar.name), rule, found):
        _add(sample, tar, rule, with_crc, found)
    return found


def _group(members: Iterator[Member], rule: LabelRule, found: TarSamples) -> list[_Sample]:
    """Return the samples in the order of their first members; members that belong to none are skipped."""
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    for member in members:
        key, suffix = rule.split_name(member.name)
        if member.kind != "file":
            found.skipped.append((member.name, f"it is no plain file but a {member.kind} member"))
        elif not key:
            found.skipped.append((member.name, "a hidden file, or one without a suffix"))
        elif suffix == "tar":
            found.skipped.append((member.name, "a tar inside the tar; index it by itself"))
        else:
            sample = latest.get(key)
            if sample is None or suffix in sample.members:
                found.notes["keys that repeat"] += sample is not None
                sample = latest[key] = _Sample(key)
                samples.append(sample)
            sample.members[suffix] = member
    return samples


def _add(sample: _Sample, tar: Tar, rule: LabelRule, with_crc: bool, found: TarSamples) -> None:
    images = [member for suffix, member in sample.members.items() if suffix in IMAGES]
    if not images:
        found.skipped.append((sample.key, f"no image ({', '.join(IMAGES)}), only {', '.join(sample.members)}"))
        return
    image = images[0]
    if not image.size:
        found.skipped.append((sample.key, "the image is empty"))
        return
    try:
        source = rule.source(sample.members)
        content = b"" if source is None else tar.read(source.offset, min(source.size, _LARGEST_LABEL))
        label = rule.label(image.name, content)
    except NoLabelError as error:
        found.skipped.append((sample.key, str(error)))
        return
    if isinstance(label, int) and label not in found.names:
        beside = sample.members.get("json")
        text = b"" if beside is None else tar.read(beside.offset, min(beside.size, _LARGEST_LABEL))
        found.names[label] = class_name_in(text)
    found.notes["samples with several images, of which the first is used"] += len(images) > 1
    found.keys.append(sample.key)
    found.offsets.append(image.offset)
    found.sizes.append(image.size)
    found.labels.append(label)
    if with_crc:
        found.crcs.append(zlib.crc32(tar.read(image.offset, image.size)))


def guess_label_rule(tar: Tar) -> LabelRule:
    """Return where the samples of a tar have their class, judged by its members. Raises DataError."""
    content: bytes | None = None
    suffixes: Counter[str] = Counter()
    for member in scan_members(tar.read, tar.size, tar.name):
        suffix = LabelRule("cls").split_name(member.name)[1]
        suffixes[suffix] += 1
        if suffix == "json" and content is None:
            content = tar.read(member.offset, min(member.size, _LARGEST_LABEL))
    return guess_rule(suffixes, content, tar.name)
