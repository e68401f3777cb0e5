"""Write the index files that DALI's webdataset reader needs (`index_paths`), for your own pipelines.

    python data_prep/make_dali_index.py --src DIR --out DIR

Each shard gets one text file, such as train-000000.idx, in the same folder below --out as the shard's own below --src.
Its format is v1.2 of DALI's wds2idx: a line `v1.2 <samples>`, then a line per sample with `<suffix> <offset> <bytes>
<name>` of each of its members.
"""

import tarfile
from pathlib import Path

from karat_scale.data.prepare.job import add_shard_options, make_parser
from karat_scale.data.shards.shard_format import ShardRecord, chosen_splits, read_dataset_record
from karat_scale.data.shards.shards import check_file
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError, run_script
from karat_scale.foundation.files import write_atomically

VERSION = "v1.2"


def dali_index(tar_path: Path) -> str:
    """Return the index of a shard. Raises DataError if a name has a blank, which the format cannot hold."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(tar_path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if any(letter.isspace() for letter in member.name):
                raise DataError(f"{tar_path}: the name {member.name!r} has a blank; make the shards again")
            folder, slash, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            part = f"{ending} {member.offset_data} {member.size} {member.name}"
            samples.setdefault(folder + slash + stem, []).append(part)
    return "\n".join([f"{VERSION} {len(samples)}", *(" ".join(parts) for parts in samples.values())]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Write index files for DALI's webdataset reader.")
    add_shard_options(parser)
    options = parser.parse_args(arguments)
    record = read_dataset_record(options.src)
    tars, splits = record.local_tars_of(options.src), chosen_splits(options.src, record, options.split)
    shards: list[ShardRecord] = [shard for split in splits.values() for shard in split.shards]
    if options.dry_run:
        print(f"would write {len(shards)} index files to {options.out}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with progress("indexing", len(shards), "shards") as advance:
        for shard in shards:
            check_file(tars, shard, by_hash=False)
            path = options.out / Path(shard.name).with_suffix(".idx")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, dali_index(tars / shard.name))
            advance(1)
    print(f"{len(shards)} index files are in {options.out}")


if __name__ == "__main__":
    run_script(main)
