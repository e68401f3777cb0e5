"""Join splits that were made separately, for example by the tasks of a job array, into one data set.

    python data_prep/join_splits.py --src DIR --out DIR

Moves the shards of --src into --out, on the same file system, and adds its splits to dataset.json there. A run that was
stopped resumes.
"""

from pathlib import Path

from script_options import make_parser

from karat_scale.data.formats.shard_format import DATASET_FILE, read_dataset_record, write_dataset_record
from karat_scale.errors import DataError, run_script
from karat_scale.files import flush_to_disk


def join(src: Path, out: Path) -> list[str]:
    """Move the splits of `src` into `out`; returns their names. Raises DataError if the two do not fit together."""
    record = read_dataset_record(src)
    out.mkdir(parents=True, exist_ok=True)
    joined = read_dataset_record(out) if (out / DATASET_FILE).exists() else record.model_copy(update={"splits": {}})
    if record.root or joined.root:
        raise DataError(f"{src} and {out}: one lists tars that are elsewhere; run `karat index` on all tars at once")
    if joined.classes != record.classes:
        raise DataError(f"{src} has different classes than {out}; make both splits from the same images")
    if both := sorted(joined.splits.keys() & record.splits.keys()):
        raise DataError(f"{out} has a split {both[0]} already; use another --out")
    for split in record.splits.values():
        for file in (file for shard in split.shards for file in (shard, shard.index)):
            if (src / file.name).exists():  # else an earlier run moved it
                (src / file.name).rename(out / file.name)
    flush_to_disk(out)
    joined.splits.update(record.splits)
    write_dataset_record(out, joined)
    (src / DATASET_FILE).unlink()
    src.rmdir()
    return list(record.splits)


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Join splits that were made separately into one data set.", writes=False)
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the directory of the splits to add")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data set to add them to")
    options = parser.parse_args(arguments)
    print(f"{options.out} has {', '.join(join(options.src, options.out))} now")


if __name__ == "__main__":
    run_script(main)
