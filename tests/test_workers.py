"""Workers that share an extraction: the store of a single process, whoever dies, and refusals of what does not fit."""

import dataclasses
import errno
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from onceover.base import files
from onceover.base.files import place_folder, remove_asides, write_once
from onceover.base.outputs import Outputs
from onceover.base.worker import Worker, WorkerError, parse_worker
from onceover.extract import encode
from onceover.extract import shards as shard_files
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.share import extract_share
from onceover.extract.store import FeatureStore, StoreError, parts_folder
from onceover.extract.unfinished import Unfinished


def values(path):
    """All that a store holds but for what says how and when it was made."""
    with FeatureStore(path) as store:
        assert store.verify() == []
        return {
            "images": store.image_features[:].tobytes(),
            "texts": store.text_features[:].tobytes(),
            "ids": store.image_ids,
            "captions": store.captions,
            "index": store.image_index.tolist(),
            "fingerprints": store.fingerprints,
            "failures": store.failures,
        }


def shards(path):
    """The shards of an unfinished store: the file behind each name, and when it was written."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in parts_folder(path).glob("*.h5")}


@pytest.fixture
def data(drawn, tmp_path):
    """A copy of the drawn dataset in which two images are damaged."""
    folder = Path(shutil.copytree(drawn, tmp_path / "data"))
    (folder / "images/0003.jpg").write_bytes(b"no image")
    (folder / "images/0021.jpg").write_bytes(b"")
    return folder


def share(data, path, config, worker, **options):
    return extract_share(read_dataset(data), path, config, parse_worker(worker), device="cpu", **options)


def test_workers_that_die_and_come_again_make_the_store_of_a_single_process(
    data, tmp_path, extract_config, interrupt_after, monkeypatch
):
    alone = tmp_path / "alone.h5"
    path = tmp_path / "s.h5"
    extract(read_dataset(data), alone, extract_config, device="cpu")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            share(data, path, extract_config, "2/3")
    written = shards(path)
    assert len(written) == 1
    first = share(data, path, extract_config, "1/3")
    assert set(first.left) == {2, 3}
    second = share(data, path, extract_config, "2/3")
    assert share(data, path, extract_config, "2/3").computed == {"image": 0, "text": 0}
    last = share(data, path, extract_config, "3/3")
    assert last.left == {}
    assert first.computed["image"] + second.computed["image"] + last.computed["image"] == 60 - 8
    assert written.items() <= shards(path).items(), "what was written before the kill stayed"
    everything = shards(path)
    monkeypatch.setattr(encode, "write_shard", None)  # nothing is left to write
    made = extract(read_dataset(data), path, extract_config, device="cpu")
    assert made.computed == {"image": 0, "text": 0}
    assert len(everything) == 8 + 10
    assert values(path) == values(alone)
    with FeatureStore(path) as store:
        assert [failure.id for failure in store.failures if failure.stage == "image"] == [
            "images/0003.jpg",
            "images/0021.jpg",
        ]
        assert store.provenance["image"]["workers"] == 3
    assert not parts_folder(path).exists()
    assert share(data, path, extract_config, "1/3").sealed
    assert not parts_folder(path).exists()


@pytest.mark.parametrize("last", ["s.store", "s.h5"])
def test_workers_of_a_folder_make_the_store_of_a_single_process_and_extend_it(data, tmp_path, extract_config, last):
    alone = tmp_path / "alone.h5"
    path = tmp_path / last
    for limit in (20, None):
        dataset = read_dataset(data).first(limit)
        for worker in ("2/2", "1/2"):
            extract_share(dataset, path, extract_config, parse_worker(worker), device="cpu")
        inodes = {inode for inode, _ in shards(path).values()}
        made = extract(dataset, path, extract_config, device="cpu")
        assert made.computed == {"image": 0, "text": 0}
        extract(dataset, alone, extract_config, device="cpu")
        assert values(path) == values(alone)
        assert not parts_folder(path).exists()
        assert share_is_sealed(dataset, path, extract_config)
        if last == "s.store":
            assert inodes & {file.stat().st_ino for file in path.glob("image-*.h5")}, "shards were linked"
    assert path.is_dir() == (last == "s.store")


def share_is_sealed(dataset, path, config):
    return extract_share(dataset, path, config, parse_worker("1/2"), device="cpu").sealed


def test_of_workers_that_come_at_once_the_first_ones_plan_stands(
    drawn, tmp_path, extract_config, store_file, monkeypatch
):
    path = tmp_path / "s.h5"
    begin = Unfinished.begin
    waiting = [True]

    def late(self, settings, plans):
        if waiting.pop():
            waiting.append(False)
            share(drawn, path, dataclasses.replace(extract_config, batch_size=4), "1/2")  # comes before this one
        return begin(self, settings, plans)

    monkeypatch.setattr(Unfinished, "begin", late)
    chosen = dataclasses.replace(extract_config, batch_size=None)
    monkeypatch.setattr("onceover.extract.begin.BATCH_SIZE", {"cpu": 8})
    share(drawn, path, chosen, "2/2")
    assert Unfinished(path).settings()["batch_size"] == 4
    assert extract(read_dataset(drawn), path, extract_config, device="cpu").computed == {"image": 0, "text": 0}
    with FeatureStore(path) as store:
        assert store.image_ids == read_dataset(drawn).ids


def test_the_last_call_encodes_what_workers_have_left(drawn, tmp_path, extract_config, store_file):
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "2/2")
    made = extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert made.computed["image"] == 32
    assert values(path) == values(store_file)


def test_workers_extend_a_store_and_go_on_with_what_one_process_began(
    drawn, tmp_path, extract_config, store_file, interrupt_after, monkeypatch
):
    path = tmp_path / "s.h5"
    extract(read_dataset(drawn).first(10), path, extract_config, device="cpu")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(drawn), path, extract_config, device="cpu")
    computed = 0
    for worker in ("1/2", "2/2"):
        computed += share(drawn, path, extract_config, worker).computed["image"]
    assert computed == 50 - 8
    assert extract(read_dataset(drawn), path, extract_config, device="cpu").reused["image"] == 60
    with FeatureStore(path) as store:
        assert store.image_ids == read_dataset(drawn).ids
        assert store.verify() == []


@pytest.mark.parametrize("name", ["s.h5", "s.store"])
def test_a_worker_whose_store_was_sealed_meanwhile_ends_and_leaves_nothing(
    drawn, tmp_path, extract_config, store_file, monkeypatch, name
):
    path = tmp_path / name
    write = encode.write_shard

    def sealed_before(file, *rest):
        monkeypatch.setattr(encode, "write_shard", write)
        extract(read_dataset(drawn), path, extract_config, device="cpu")
        write(file, *rest)

    monkeypatch.setattr(encode, "write_shard", sealed_before)
    assert share(drawn, path, extract_config, "1/2").sealed
    assert values(path) == values(store_file)
    assert not parts_folder(path).exists()


def test_a_shard_that_a_folder_lost_while_workers_extend_it_is_planned_anew(
    drawn, tmp_path, extract_config, store_file
):
    path = tmp_path / "s.store"
    extract(read_dataset(drawn).first(20), path, extract_config, device="cpu")
    share(drawn, path, extract_config, "1/2")
    next(path.glob("image-*.h5")).unlink()
    with pytest.raises(WorkerError, match=r"the store that is extended\)"):
        share(drawn, path, extract_config, "2/2")
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    with FeatureStore(path) as store, FeatureStore(store_file) as whole:
        assert store.verify() == []
        assert store.image_ids == whole.image_ids
        assert store.captions == whole.captions
        np.testing.assert_allclose(store.image_features[:], whole.image_features[:], rtol=0, atol=1e-5)
        np.testing.assert_allclose(store.text_features[:], whole.text_features[:], rtol=0, atol=1e-5)


def test_a_worker_refuses_a_folder_that_is_no_store(drawn, tmp_path, extract_config):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds something else than a feature store \(mine.txt\)"):
        share(drawn, tmp_path, extract_config, "1/2")
    assert not parts_folder(tmp_path).exists()


def test_a_worker_encodes_its_own_damaged_shards_again_and_no_others(drawn, tmp_path, extract_config, told):
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "1/2")
    share(drawn, path, extract_config, "2/2")
    images = sorted(parts_folder(path).glob("image-*.h5"))
    for shard in images[:2]:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    assert share(drawn, path, extract_config, "2/2").computed == {"image": 8, "text": 0}
    assert sum(line.startswith("encoding a damaged shard again") for line in told) == 1
    assert extract(read_dataset(drawn), path, extract_config, device="cpu").computed == {"image": 8, "text": 0}


@pytest.mark.parametrize(
    ("change", "worker", "reason"),
    [
        ({}, "1/3", r"is shared by 2 workers, and this is worker 1/3; start workers 1/2 to 2/2"),
        ({"text_pooling": "cls"}, "1/2", r"\(text: the encoder or its settings\); give it the command of the others"),
        ({"thumbnails": False}, "1/2", r"\(image: thumbnails\)"),
        ({"limit": 50}, "2/2", r"\(image: images, captions, or the sizes and times of the images' files\)"),
    ],
    ids=["number", "encoder", "thumbnails", "dataset"],
)
def test_a_worker_that_does_not_fit_the_others_is_refused(drawn, tmp_path, extract_config, change, worker, reason):
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "2/2")
    written = shards(path)
    change = dict(change)
    dataset = read_dataset(drawn).first(change.pop("limit", None))
    config = dataclasses.replace(extract_config, **change)
    with pytest.raises(WorkerError, match=reason):
        extract_share(dataset, path, config, parse_worker(worker), device="cpu")
    assert shards(path) == written


def test_other_features_than_the_stores_are_refused_to_a_worker(drawn, store_file, tmp_path, extract_config):
    path = Path(shutil.copy(store_file, tmp_path / "s.h5"))
    with pytest.raises(StoreError, match="holds other image features"):
        share(drawn, path, dataclasses.replace(extract_config, views=1), "1/2")
    assert not parts_folder(path).exists()


def test_what_a_killed_removal_left_is_no_endless_wait_for_a_worker(drawn, tmp_path, extract_config):
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "1/2")
    for file in parts_folder(path).glob("[!.]*.json"):
        file.unlink()
    with pytest.raises(StoreError, match="what is left of an extraction that was ended; run the command without"):
        share(drawn, path, extract_config, "1/2")


def test_workers_say_what_comes_next(drawn, tmp_path, extract_config, run, fails, monkeypatch, tiny_resnet, tiny_bert):
    store = tmp_path / "s.h5"
    options = ["extract", "--data", drawn, "--store", store, "--image-encoder", f"hf:{tiny_resnet}"]
    options += ["--text-encoder", f"hf:{tiny_bert}", "--views", "1", "--batch-size", "8", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["onceover", "extract", "--worker", "1/2", "--store", "s.h5"])
    lines = run(*options, "--worker", "1/2").stderr.splitlines()
    assert lines[-2:] == [
        "worker 1/2 is done; when all are, run extract without --worker",
        "next: onceover extract --store s.h5",
    ]
    assert lines[-3].startswith("workers that have shards left: 2/2 (")
    assert run(*options, "--worker=2/2").stderr.splitlines()[-2] == (
        "worker 2/2 is done, and so are all others; run extract without --worker"
    )
    assert f"wrote {store}" in run(*options).stderr
    assert f"{store} is finished; there is nothing to do for worker 2/2" in run(*options, "--worker", "2/2").stderr
    assert "--force cannot be combined with --worker" in run(*options, "--worker", "1/2", "--force", code=2).stderr


@pytest.mark.parametrize("text", ["3/2", "0/2", "2", "a/b", "1/0", "-1/2"])
def test_a_worker_that_cannot_be_is_refused(text, run):
    with pytest.raises(WorkerError):
        parse_worker(text)
    assert "worker" in run("extract", "--data", "d", "--store", "s.h5", "--worker", text, code=2).stderr


def test_every_unit_belongs_to_one_worker():
    units = list(range(11))
    shared = [Worker(number, 3).own(units) for number in (1, 2, 3)]
    assert sorted(itertools.chain.from_iterable(shared)) == units
    assert max(map(len, shared)) - min(map(len, shared)) == 1


def test_trap_a_file_is_written_once_whoever_comes_later(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    write_once(path, b"first")
    write_once(path, b"second")

    def refused(*_):
        raise OSError(95, "no links here")

    monkeypatch.setattr(os, "link", refused)
    write_once(path, b"third")
    write_once(tmp_path / "b.h5", b"first")
    assert path.read_bytes() == (tmp_path / "b.h5").read_bytes() == b"first"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5", "b.h5"]
    with pytest.raises(FileNotFoundError):
        write_once(tmp_path / "gone" / "c.h5", b"first")


def test_trap_a_folder_appears_once_and_whole(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan").write_text(name)
    (tmp_path / "place").mkdir()  # an empty one is no obstacle
    assert place_folder(tmp_path / "first", tmp_path / "place")
    assert not place_folder(tmp_path / "second", tmp_path / "place")
    assert (tmp_path / "place" / "plan").read_text() == "first"


def test_two_machines_of_one_name_are_two_hosts(tmp_path, monkeypatch):
    names = set()
    for number in ("1", "2"):
        (tmp_path / "id").write_text(number)
        monkeypatch.setattr(files, "_MACHINE_ID", tmp_path / "id")
        files._host.cache_clear()
        names.add(files._host())
    files._host.cache_clear()
    assert len(names) == 2


def test_trap_what_another_host_is_writing_stays(tmp_path):
    theirs = tmp_path / ".a.4194305@01234567.aside.h5"
    earlier = tmp_path / ".a.4194305.aside.h5"
    for file in (theirs, earlier):
        file.touch()
    remove_asides(tmp_path)
    assert (theirs.exists(), earlier.exists()) == (True, False)
    remove_asides(tmp_path, "a.h5", everyones=True)
    assert not theirs.exists()


def test_trap_a_worker_that_is_busy_while_the_store_is_sealed_blocks_nothing(
    drawn, tmp_path, extract_config, monkeypatch
):
    """Its shards come while the folder of the unfinished extraction is being removed."""
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "1/2")
    late = next(parts_folder(path).glob("image-*.h5"))
    content = late.read_bytes()
    real = Outputs.remove
    moments = []

    def slow(self, choose):
        real(self, choose)
        late.write_bytes(content)
        moments.append(late)

    monkeypatch.setattr(Outputs, "remove", slow)
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert len(moments) == 2
    assert not parts_folder(path).exists()
    monkeypatch.undo()
    late.parent.mkdir()
    late.write_bytes(content)  # after the last look, by a worker that was about to
    (late.parent / ".a.aside").touch()
    assert extract(read_dataset(drawn), path, extract_config, device="cpu").up_to_date
    assert not late.exists()


def test_trap_a_plan_that_is_gone_is_no_end_where_the_store_lacks_images(drawn, tmp_path, extract_config, monkeypatch):
    path = tmp_path / "s.h5"
    grown = read_dataset(drawn)
    extract(grown.first(20), path, extract_config, device="cpu")
    real = encode.write_shard

    def removed(*arguments):
        Unfinished(path).remove()
        real(*arguments)

    monkeypatch.setattr(encode, "write_shard", removed)
    with pytest.raises(
        WorkerError, match="was removed while this worker was following it, and .* lacks what was planned"
    ):
        extract_share(grown, path, extract_config, parse_worker("1/2"), device="cpu")


def test_an_extraction_of_fewer_images_leaves_the_plan_of_workers(drawn, tmp_path, extract_config, told, monkeypatch):
    path = tmp_path / "s.h5"
    grown = read_dataset(drawn)
    extract(grown.first(20), path, extract_config, device="cpu")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "write_shard", killed)
        extract_share(grown, path, extract_config, parse_worker("1/2"), device="cpu")
    assert extract(grown.first(20), path, extract_config, device="cpu").up_to_date
    assert any(
        line.startswith(f"{parts_folder(path)} stays, since workers planned it for other images") for line in told
    )
    for worker in ("1/2", "2/2"):
        extract_share(grown, path, extract_config, parse_worker(worker), device="cpu")
    assert extract(grown, path, extract_config, device="cpu").computed == {"image": 0, "text": 0}
    assert not parts_folder(path).exists()


def test_trap_a_shard_that_cannot_be_read_for_a_moment_stays(drawn, tmp_path, extract_config, monkeypatch):
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "1/2")
    before = shards(path)

    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        patch.setattr(shard_files, "open_hdf5", stale)
        share(drawn, path, extract_config, "1/2")
    assert shards(path) == before


def test_workers_refuse_a_store_that_is_a_mounted_disk(drawn, tmp_path, extract_config, monkeypatch):
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    with pytest.raises(WorkerError, match=f"disk; name a store in it: {volume}/NAME.store"):
        share(drawn, f"{volume}/", extract_config, "1/2")
    assert sorted(tmp_path.iterdir()) == [volume]


def test_shards_that_an_engine_did_not_write_are_missed(drawn, tmp_path, extract_config, monkeypatch):
    monkeypatch.setattr(encode, "write_shard", lambda *_: None)
    with pytest.raises(StoreError, match="8 of 8 image shards are not in .*, although the engine threads has finished"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")


def test_a_late_worker_that_retries_failures_takes_a_sealed_store_for_the_end(
    data, tmp_path, extract_config, monkeypatch
):
    path = tmp_path / "s.h5"
    real = encode.write_shard

    def sealed(*arguments):
        monkeypatch.setattr(encode, "write_shard", real)
        extract(read_dataset(data), path, extract_config, device="cpu")
        real(*arguments)

    monkeypatch.setattr(encode, "write_shard", sealed)
    assert share(data, path, extract_config, "1/2", retry_failures=True).sealed


def test_a_damaged_plan_does_not_keep_a_finished_store_from_being_up_to_date(drawn, tmp_path, extract_config):
    path = tmp_path / "s.h5"
    extract(read_dataset(drawn).first(20), path, extract_config, device="cpu")
    share(drawn, path, extract_config, "1/2")
    for shard in parts_folder(path).glob("*.h5"):
        shard.unlink()
    (parts_folder(path) / "image.plan.json").write_text("{")
    assert extract(read_dataset(drawn).first(20), path, extract_config, device="cpu").up_to_date


def test_a_worker_begins_where_another_one_was_late(drawn, tmp_path, extract_config):
    path = tmp_path / "s.h5"
    share(drawn, path, extract_config, "1/2")
    late = next(parts_folder(path).glob("image-*.h5"))
    content = late.read_bytes()
    Unfinished(path).remove()
    late.parent.mkdir()
    late.write_bytes(content)
    assert set(share(drawn, path, extract_config, "1/2").left) == {2}
