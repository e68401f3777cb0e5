"""Tests of the lanes' shards and samples: which come in which order, from any place on, and which are unusable."""

from itertools import islice
from pathlib import Path

import pytest

from karat_scale.data.plan import LanePlace
from karat_scale.data.streams import StreamSample, StreamShards, StreamSource
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import UntrustedError
from tests.data.tars import image, sample, write_tar

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def source(tars: Path, stream_config):
    def make(stream: object = None, **fields: object) -> StreamSource:
        return StreamSource(stream_config(stream or f"{tars}/{{0..3}}.tar", **fields), 5, CLASSES)

    return make


def lane(source: StreamSource, count: int, place: LanePlace, lanes: int = 1) -> list[tuple[object, ...]]:
    found = islice(source.lane(place, lanes, lambda shard: None), count)
    return [(one.sample, one.cycle, one.shard, one.place) for one in found]


def shards(stream_config, stream: str) -> StreamShards:
    return StreamShards(stream_config(stream), 5)


def refused(stream_config, stream: str) -> str:
    with pytest.raises(DataError) as caught:
        shards(stream_config, stream)
    return str(caught.value)


def test_each_cycle_has_all_shards_in_its_own_order(stream_config) -> None:
    found = shards(stream_config, "a-{00..09}.tar::b.tar")
    assert found.names == [*(f"a-{number:02d}.tar" for number in range(10)), "b.tar"]
    cycles = [[found.at(11 * cycle + place) for place in range(11)] for cycle in range(3)]
    assert [sorted(cycle) for cycle in cycles] == [list(range(11))] * 3
    assert len({tuple(cycle) for cycle in cycles}) == 3


def test_a_variable_is_opened_by_its_value_and_named_by_its_name(stream_config, monkeypatch) -> None:
    monkeypatch.setenv("WDS_PLACE", "https://host/secret")
    found = shards(stream_config, "${PLACE}/{0..1}.tar")
    assert found.urls == ["https://host/secret/0.tar", "https://host/secret/1.tar"]
    assert found.names == ["${PLACE}/0.tar", "${PLACE}/1.tar"]
    monkeypatch.setenv("WDS_PLACE", "https://host/${WORD}/x")
    monkeypatch.setenv("WDS_WORD", "secret")
    assert shards(stream_config, "${PLACE}/0.tar").names == ["${PLACE}/0.tar"]
    monkeypatch.delenv("WDS_WORD")
    assert "${WORD} is the variable WDS_WORD" in refused(stream_config, "${PLACE}/0.tar")
    assert "${WDS_PLACE} is the variable WDS_WDS_PLACE" in refused(stream_config, "${WDS_PLACE}/0.tar")


def test_what_the_library_cannot_open_and_fewer_shards_than_lanes_are_one_line(stream_config) -> None:
    for stream, said in {
        "${NOWHERE}/a.tar": "${NOWHERE} is the variable WDS_NOWHERE of the environment, which is not set",
        "a-{0..3.tar": "has a { without its }",
        "a.tar::": "an empty name between two ::",
        "-": "the standard input",
        "https://[host/a.tar": "https://[host/a.tar is not a URL: ",
        "s3://bucket/a.tar": "the webdataset library opens no s3:; use pipe:",
    }.items():
        assert said in refused(stream_config, stream)
    found = shards(stream_config, "a-{0..3}.tar")
    found.check_lanes(2, 2)
    with pytest.raises(DataError, match=r"4 tars, fewer than 6 = 3 ranks x 2 data workers.*name at least 6"):
        found.check_lanes(3, 2)


def test_lanes_share_a_cycle_and_each_sample_comes_once(source) -> None:
    stream = source()
    found = []
    for number in range(2):
        for one, cycle, _, _ in lane(stream, 100, LanePlace(number), lanes=2):
            found += [one.key] if cycle == 0 else []
    assert sorted(found) == sorted(f"s{number}" for number in range(24))


def test_samples_are_shuffled_anew_in_each_cycle_and_a_lane_goes_on_from_any_place(source):
    stream = source(stream_buffer=100)
    found = lane(stream, 48, LanePlace(0))
    orders = [[one.key for one, cycle, shard, _ in found if (cycle, shard) == (wanted, 1)] for wanted in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"s{number}" for number in range(5, 14))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    whole = lane(source(), 60, LanePlace(1), lanes=2)
    for used in range(40):
        assert lane(source(), 20, whole[used][3], lanes=2) == whole[used + 1 : used + 21]


def test_ids_are_stable_and_differ_and_images_and_labels_are_those_of_the_tar(source) -> None:
    ids = {one.key: one.id for one, *_ in lane(source(), 24, LanePlace(0))}
    again = {one.key: one.id for one, *_ in lane(source(stream_buffer=1), 24, LanePlace(0))}
    assert ids == again
    assert len(set(ids.values())) == 24
    assert all(0 <= number < 2**63 for number in ids.values())
    for one, *_ in lane(source(), 24, LanePlace(0)):
        number = int(one.key[1:])
        assert one == StreamSample(one.id, one.key, image(number), number % 3)


@pytest.mark.parametrize(
    ("label", "members", "expected"),
    [
        ("cls", [("a.cls", b"bee")], 1),
        ("txt", [("a.txt", b"cat\n")], 2),
        ("json:meta.label", [("a.json", b'{"meta": {"label": 2}}')], 2),
        ("path", [], "its class 'x' is none of data.path's 3"),
        ("cls", [("a.cls", b"dog")], "its class 'dog' is none of data.path's 3"),
        ("cls", [("a.cls", b"3")], "its label is 3, but data.path has 3 classes"),
        ("cls", [("a.cls", b"-1")], "its label is -1, but data.path has 3 classes"),
        ("cls", [], "no label: .cls is missing"),
        ("json:label", [("a.json", b"{")], "no label: .json is damaged"),
        ("json:label", [("a.json", b'{"label": null}')], "no label: json:label is null, neither a number nor a name"),
    ],
)
def test_labels(source, tmp_path: Path, label: str, members, expected: object) -> None:
    write_tar(tmp_path / "t.tar", [("x/a.png", image(0)), *((f"x/{name}", data) for name, data in members)])
    ((one, *_),) = lane(source(tmp_path / "t.tar", stream_label=label), 1, LanePlace(0))
    assert (one.problem or one.label) == expected


def test_an_image_that_prepare_stores_as_it_is_is_read(source, tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [("x/a.bmp", image(0)), ("x/a.cls", b"bee")])
    ((one, *_),) = lane(source(tmp_path / "t.tar", stream_label="cls"), 1, LanePlace(0))
    assert (one.problem, one.label, one.image) == ("", 1, image(0))


def test_unusable_samples_say_why_and_a_tar_with_too_few_ends_the_run(source, tmp_path: Path):
    for members, said in (
        ([("a.cls", b"1")], "no image (jpg, jpeg, png, webp)"),
        ([("a.jpg", b""), ("a.cls", b"1")], "the image is empty"),
        ([*sample(1), *sample(1)], "a suffix occurs twice"),
        ([("a.tar", b"x")], "no image (jpg, jpeg, png, webp)"),
    ):
        write_tar(tmp_path / "t.tar", members)
        ((one, *_),) = lane(source(tmp_path / "t.tar"), 1, LanePlace(0))
        assert one.problem == said
    write_tar(tmp_path / "t.tar", [])
    with pytest.raises(DataError, match=r"t.tar has no sample"):
        lane(source(tmp_path / "t.tar"), 1, LanePlace(0))
    with pytest.raises(DataError, match=r"tar has \d samples, and the run has used 50"):
        lane(source(), 1, LanePlace(0, 50))


@pytest.mark.parametrize("spelled", ["https:/{/me:s3cr@host,}/a.tar", "pipe:get --to{ken,x} s3cr"])
def test_a_credential_is_found_in_what_is_opened(spelled: str, stream_config) -> None:
    with pytest.raises(DataError, match="has a user, a query or a secret in it") as caught:
        StreamShards(stream_config(spelled), 5)
    assert "s3cr" not in str(caught.value)


def test_what_the_environment_rewrites_is_what_is_checked(stream_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "s3:=pipe:cat ")
    monkeypatch.delenv("KARAT_TRUST", raising=False)
    data = stream_config("s3:a.tar")
    assert StreamShards(data, 5).urls == ["s3:a.tar"]
    with pytest.raises(UntrustedError, match=r"RUN/recipe.yaml: data.stream = s3:a.tar runs a command"):
        StreamShards(data.of("RUN/recipe.yaml"), 5)
