"""Making data sets: the sources, and the code of the scripts in data_prep/, which `karat prepare` runs, too."""

SCRIPTS = {
    "webdataset": "karat_scale.data.prepare.make_webdataset:main",
    "ffcv": "karat_scale.data.prepare.make_ffcv:main",
    "verify": "karat_scale.data.prepare.finished:verify",
    "stage": "karat_scale.data.prepare.finished:stage",
    "dali-index": "karat_scale.data.prepare.finished:make_dali_index",
    "join": "karat_scale.data.prepare.finished:join_splits",
    "fetch": "karat_scale.data.prepare.fetch:main",
}
"""The scripts by the names that `karat prepare` has for them."""

DECODED_BELOW = 100_000
"""Below this number, all images are decoded by default: it takes a minute, and finds truncated photographs."""
