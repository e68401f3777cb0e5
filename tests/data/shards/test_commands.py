"""Tests of the commands for a data set at a URL: index, verify, stage, data, show, plan, doctor, train and resume."""

import shutil
import subprocess

import pytest

from karat_scale.commands.cli import main
from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe.loading import load_recipe
from tests.conftest import karat, karat_done, karat_environment, run_script, summary
from tests.servers import FaultyProxy
from tests.training.runs import kill_all, start, wait_for_checkpoint
from tests.warm import run_program

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")


@pytest.fixture
def tars(shards, tmp_path):
    """Return a directory with only the tars of our shards, as others would have made them."""
    directory = tmp_path / "tars"
    directory.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "hashes"),
    [
        ("nginx", []),
        ("s3", ["--hash"]),
        pytest.param("s3", [], marks=pytest.mark.slow),
        pytest.param("nginx", ["--hash"], marks=pytest.mark.slow),
    ],
)
def test_tars_at_a_url_are_indexed_as_on_disk(kind, hashes, tars, tmp_path, request):
    serve = request.getfixturevalue(kind)
    url = serve(tars) if kind == "s3" else f"http://127.0.0.1:{serve(tars)}"
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(["index", str(tars), "--out", str(here), *hashes]) == 0
    assert main(["index", url, "--out", str(there), *hashes]) == 0
    local, remote = read_dataset_record(here), read_dataset_record(there)
    assert remote.root == url
    assert all(shard.etag for shard in remote.splits["train"].shards)
    for split in remote.splits.values():
        for shard in split.shards:
            shard.etag = None
    assert remote.splits == local.splits
    one, other = (ShardSplit(directory, "train", 4) for directory in (here, there))
    assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]
    assert other.file_of(0).startswith(f"{url}/train-")


def test_indexing_asks_for_large_parts_and_forks_no_process(tars, tmp_path, nginx, monkeypatch):
    with FaultyProxy(nginx(tars)) as proxy:
        monkeypatch.delattr("os.fork")
        assert main(["index", proxy.url, "--out", str(tmp_path / "index")]) == 0
        assert len(proxy.gets()) == len(list(tars.glob("*.tar"))) + 1  # the first tar is also read for the label rule
        assert main(["index", proxy.url, "--out", str(tmp_path / "hashed"), "--hash"]) == 0


def test_indexing_says_what_is_wrong(tmp_path, nginx, capsys):
    (tmp_path / "empty").mkdir()
    url = f"http://127.0.0.1:{nginx(tmp_path / 'empty')}"
    for arguments, line in {
        (url,): f"add --out DIR, a directory for the indexes of {url}",
        (url, "--out", str(tmp_path / "out")): f"{url} has no *.tar, and nothing to index",
        ("ftp://host/x", "--out", str(tmp_path / "out")): "ftp:// is not supported; use s3://",
    }.items():
        assert main(["index", *arguments]) == 2
        assert f"error: {line}" in capsys.readouterr().err


def test_https(tars, tmp_path, nginx):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    certificate = tmp_path / "certificate.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-nodes", "-days", "2")
    files = ("-keyout", str(certificate), "-out", str(tmp_path / "public.pem"))
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", *subject, *files], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + (tmp_path / "public.pem").read_text())
    url = f"https://127.0.0.1:{nginx(tars, certificate)}"
    strict = karat_environment()
    trusting = {**strict, "SSL_CERT_FILE": str(certificate)}
    refused, done = (
        run_program("karat_scale", ["index", url, "--out", str(tmp_path / "index")], [environment], 120, tmp_path)
        for environment in (strict, trusting)
    )
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"error: {url}: ClientConnectorCertificateError; check the name, the credentials, the endpoint and the "
        "certificates"
    )
    assert done.returncode == 0, done.stderr
    assert "64 samples of 4 classes" in done.stdout


@pytest.mark.slow
def test_verify_stage_and_data(shards, tmp_path, nginx, capsys, monkeypatch):
    url = f"http://127.0.0.1:{nginx(shards)}"
    assert "64 samples of 4 classes" in run_script("data_prep/verify.py", "--src", url).stdout
    run_script("data_prep/stage.py", "--src", url, "--out", str(tmp_path / "staged"))
    assert len(ShardSplit(tmp_path / "staged", "train", 4, verify="hash")) == 64
    monkeypatch.chdir(tmp_path)
    assert main(["data", url, "--out", str(tmp_path / "page.html")]) == 0
    assert "train: 64 images of 4 classes" in capsys.readouterr().out
    damaged = run_script("data_prep/make_dali_index.py", "--src", url, "--out", str(tmp_path / "dali"), check=False)
    assert damaged.stderr.strip() == f"error: the tars are at {url}; this needs them on a file system"


def test_a_credential_in_a_url_is_refused_and_not_repeated(recipe_file):
    for url in ("https://me:hunter2@host/set", "https://host/set?X-Amz-Signature=hunter2"):
        with pytest.raises(RecipeError, match="which may be a credential") as error:
            load_recipe(recipe_file, [f"data.path={url}"])
        assert "hunter2" not in str(error.value)
    with pytest.raises(RecipeError, match="only shards can be at a URL, with data"):
        load_recipe(recipe_file, ["data.path=s3://bucket/set", "data.backend=folder"])


@pytest.mark.slow
def test_plan_show_and_doctor(recipe_file, tmp_path, shards, nginx, capsys):
    url = f"data.path=http://127.0.0.1:{nginx(shards)}"
    assert main(["show", str(recipe_file), url, "--out", str(tmp_path / "batch.png")]) == 0
    assert "ImageNet-1K's" not in karat_done("plan", str(recipe_file), url).stdout
    capsys.readouterr()
    assert main(["submit", str(recipe_file), url, f"run.dir={tmp_path / 'run'}", "--print"]) == 0
    script, notes = capsys.readouterr()
    assert f"SHARDS={url.removeprefix('data.path=')}" in script.splitlines()
    assert "is not on this machine" not in notes
    done = karat("doctor", str(recipe_file), url, "--seconds", "4")
    assert "of data at a URL, data.cache_gb = 20: fetched only in the first epoch" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("order", ["full", "block"])
def test_a_run_that_is_killed_and_resumed_saw_what_a_run_from_disk_saw(
    order, recipe_file, shards, tmp_path, s3, s3_port
):
    """The store has faults before and after the kill, and the second start has another number of ranks."""
    settings = [f"data.order={order}", "data.block_samples=8", "data.window_blocks=2", "checkpoint.every_steps=2"]
    karat_done("train", str(recipe_file), f"run.dir={tmp_path / 'disk'}", *settings)
    spoilt = {3: "503", 7: "cut", 11: "short", 13: "slow", 17: "cut", 29: "503"}
    with FaultyProxy(s3_port, latency=0.05, spoil=lambda number, asked: spoilt.get(number)) as proxy:
        url = f"data.path={s3(shards, proxy.port)}"
        run = tmp_path / "bucket"
        process = start(recipe_file, run, url, *settings)
        wait_for_checkpoint(run, 4, process)
        kill_all(process)
        karat_done("train", str(recipe_file), f"run.dir={run}", url, *settings, processes=2)
        assert len(proxy.requests) < 500
    digests = [summary(tmp_path / name)["data_digest"] for name in ("disk", "bucket")]
    assert digests[0] == digests[1]
    for file in run.rglob("*"):
        assert not file.is_file() or b"secret-of-the-test" not in file.read_bytes()
