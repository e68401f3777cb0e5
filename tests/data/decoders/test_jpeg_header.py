import pytest

from karat_scale.data.decoders.jpeg_header import Frame, read_frame
from tests.data.conftest import encode, photo


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 3000}])
def test_dimensions_and_components(encode_jpeg, options):
    assert read_frame(encode_jpeg(37, 21, **options)) == Frame(37, 21, 3)
    assert read_frame(encode_jpeg(8, 9, mode="L", **options)) == Frame(8, 9, 1)
    assert read_frame(encode_jpeg(8, 9, mode="CMYK", **options)) == Frame(8, 9, 4)


def test_what_is_no_ordinary_jpeg_has_no_frame(encode_jpeg):
    whole = encode_jpeg(20, 20)
    junk = whole[:2] + b"junk" + whole[2:]
    assert [read_frame(data) for data in (encode(photo(1), "PNG"), b"", junk)] == [None, None, None]


def test_a_header_cut_anywhere_has_a_frame_or_none(encode_jpeg):
    whole = encode_jpeg(20, 20)
    found = [read_frame(whole[:end]) for end in range(len(whole))]
    assert set(found) == {None, Frame(20, 20, 3)}
