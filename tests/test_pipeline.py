"""Extraction end to end: kills, resume, reuse, failures, refusals, and one real run over photographs."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from onceover.base.files import FileError, only_writer
from onceover.base.hdf5 import sign_hdf5
from onceover.base.threads import in_order
from onceover.extract import begin, encode, image_source, pictures, pipeline, plan
from onceover.extract.engines import processes, threads
from onceover.extract.engines._forks import ForkError, deaths_told, in_processes
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore, StoreError, parts_folder
from onceover.extract.summary import shares
from onceover.extract.verify import verify_sample

ROOT = Path(__file__).resolve().parent.parent
KILLS = 3


def contents(path):
    """Every dataset's bytes by name, times of files aside."""
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, item: found.update({name: item.attrs["sha256"]}) if isinstance(item, h5py.Dataset) else None
        )
    return {name: value for name, value in found.items() if not name.endswith("mtime_ns")}


@pytest.fixture(scope="module")
def extract_config(extract_config, tiny_resnet):
    """An image encoder for 32 pixels a side: what is tested here does not depend on how much is computed."""
    return dataclasses.replace(extract_config, image_encoder=f"hf:{tiny_resnet}@random")


@pytest.fixture(scope="module")
def store_file(tmp_path_factory, drawn, extract_config):
    path = tmp_path_factory.mktemp("store") / "drawn.h5"
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    return path


@pytest.fixture
def data(drawn, tmp_path):
    """A copy of the drawn dataset to do harm to."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture
def counting(monkeypatch):
    """Counts the rows of images and captions that are encoded for the store: in threads, unlike trials."""
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder

    counts = {"image": 0, "text": 0}
    lock = threading.Lock()

    def counted(kind, begin):
        def count(self, records):
            with lock:
                counts[kind] += len(records) if threading.current_thread() is not threading.main_thread() else 0
            return begin(self, records)

        return count

    for kind, encoder in (("image", ImageEncoder), ("text", TextEncoder)):
        monkeypatch.setattr(encoder, "begin", counted(kind, encoder.begin))
    return counts


def test_a_second_extraction_is_up_to_date_and_opens_neither_pictures_nor_encoders(
    drawn, store_file, extract_config, monkeypatch
):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("nothing is to be read or loaded")

    dataset = read_dataset(drawn)
    monkeypatch.setattr("onceover.extract.encoding.image.ImageEncoder", forbidden)
    monkeypatch.setattr("onceover.extract.encoding.text.TextEncoder", forbidden)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    before = store_file.stat().st_mtime_ns
    assert extract(dataset, store_file, extract_config, device="cpu").up_to_date
    assert store_file.stat().st_mtime_ns == before


def test_views_are_cached_and_the_store_is_sound(store):
    assert store.image_features.shape == (60, 2, 16)
    assert store.text_features.shape == (300, 32)
    assert store.verify() == []
    assert not np.array_equal(store.image_features[:, 0], store.image_features[:, 1])


def test_new_pictures_and_captions_alone_are_encoded(data, tmp_path, extract_config, counting):
    path = tmp_path / "s.h5"
    whole = (data / "captions.csv").read_text()
    fewer = "".join(line for line in whole.splitlines(keepends=True) if not line.startswith("images/000"))
    (data / "captions.csv").write_text(fewer)
    extract(read_dataset(data), path, extract_config, device="cpu")
    assert counting == {"image": 50, "text": 250}
    (data / "captions.csv").write_text(whole + "images/0059.jpg,A new red circle .,test\n")
    summary = extract(read_dataset(data), path, extract_config, device="cpu")
    assert counting == {"image": 60, "text": 301}
    assert (summary.computed, summary.reused) == ({"image": 10, "text": 51}, {"image": 50, "text": 250})
    with FeatureStore(path) as store:
        assert store.image_ids == read_dataset(data).ids
        assert store.captions[-1] == "A new red circle ."
        assert store.verify() == []


def test_a_touched_or_renamed_picture_is_hashed_not_encoded_and_a_changed_one_is(
    data, tmp_path, extract_config, counting
):
    path = tmp_path / "s.h5"
    extract(read_dataset(data), path, extract_config, device="cpu")
    before = contents(path)
    os.utime(data / "images/0003.jpg", ns=(5, 5))
    assert not extract(read_dataset(data), path, extract_config, device="cpu").up_to_date
    assert counting["image"] == 60
    assert contents(path) == before
    Image.new("RGB", (64, 64), "red").save(data / "images/0003.jpg")
    extract(read_dataset(data), path, extract_config, device="cpu")
    assert counting["image"] == 61
    with FeatureStore(path) as store:
        assert store.verify() == []


def test_equal_captions_are_encoded_once(data, tmp_path, extract_config, counting):
    text = (data / "captions.csv").read_text()
    (data / "captions.csv").write_text(text + "".join(f"images/{n:04d}.jpg,the same words,train\n" for n in range(36)))
    extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert counting["text"] == 301


def test_trap_a_bad_picture_goes_into_the_ledger_and_rows_stay_aligned(data, tmp_path, extract_config, counting):
    bad = {"0000": b"", "0007": b"hello", "0011": (data / "images/0011.jpg").read_bytes()[:900]}
    for name, content in bad.items():
        (data / f"images/{name}.jpg").write_bytes(content)
    path = tmp_path / "s.h5"
    summary = extract(read_dataset(data), path, extract_config, device="cpu")
    images = {failure.id: failure.reason for failure in summary.failures if failure.stage == "image"}
    assert images["images/0000.jpg"] == "empty file"
    assert images["images/0007.jpg"] == "not an image in a known format"
    assert images["images/0011.jpg"].startswith("damaged image: image file is truncated")
    assert sum(failure.stage == "caption" for failure in summary.failures) == 15
    dataset = read_dataset(data)
    with FeatureStore(path) as store:
        assert (len(store.image_ids), len(store.captions)) == (57, 285)
        for row in (0, 100, 284):
            caption, picture = store.captions[row], store.image_ids[store.image_index[row]]
            assert dataset.ids[dataset.image_index[dataset.captions.index(caption)]] == picture
        lines, problems = verify_sample(store, 5, data=data, device="cpu")
        assert problems == []
        assert "5 encoded again" in lines[0]
    done = dict(counting)
    assert extract(read_dataset(data), path, extract_config, device="cpu").up_to_date
    extract(read_dataset(data), path, extract_config, device="cpu", retry_failures=True)
    assert counting == done | {"text": done["text"] + 15}  # tried again with their captions, failed again
    drawn_again = Image.new("RGB", (64, 64), "blue")
    drawn_again.save(data / "images/0007.jpg")
    summary = extract(read_dataset(data), path, extract_config, device="cpu")
    assert summary.images == 58
    assert counting["image"] == done["image"] + 1


def test_trap_a_batch_and_a_shard_in_which_everything_fails(data, tmp_path, extract_config, monkeypatch):
    for number in range(24):
        (data / f"images/{number:04d}.jpg").write_bytes(b"no")
    summary = extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert summary.images == 36
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.verify() == []


def test_when_everything_fails_the_first_reason_is_said_and_no_store_appears(data, tmp_path, extract_config):
    for file in (data / "images").iterdir():
        file.write_bytes(b"no")
    with pytest.raises(
        StoreError, match=r"none of the 60 images could be encoded; the first: images/0000\.jpg: not an image"
    ):
        extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert not (tmp_path / "s.h5").exists()


def test_odd_pictures_are_encoded(data, tmp_path, extract_config):
    Image.new("CMYK", (50, 40), (10, 200, 30, 4)).save(data / "images/0000.jpg")
    Image.new("RGBA", (50, 40), (10, 200, 30, 4)).save(data / "images/0001.jpg", "PNG")
    Image.new("RGB", (1, 1)).save(data / "images/0002.jpg", "PNG")
    Image.new("RGB", (6000, 4500), "red").save(data / "images/0003.jpg")
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(data / "images/0004.jpg", "PNG")
    Image.new("P", (50, 40)).save(data / "images/0005.jpg", "GIF")
    Image.new("RGB", (3000, 1)).save(data / "images/0006.jpg", "PNG")
    summary = extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert (summary.images, summary.failures) == (60, [])


def test_trap_other_features_under_the_same_name_are_refused(drawn, store_file, tmp_path, extract_config, counting):
    path = Path(shutil.copy(store_file, tmp_path / "s.h5"))
    dataset = read_dataset(drawn)
    changes = ({"views": 1}, "image"), ({"text_pooling": "cls"}, "text"), ({"seed": 1}, "image")
    changes += ({"image_layers": "last,encoder.stages.0"}, "image"), ({"text_layers": "last,words"}, "text")
    for change, kind in changes:
        other = dataclasses.replace(extract_config, **change)
        with pytest.raises(
            StoreError, match=rf"holds other {kind} features \(they differ in: .+\); name another --store"
        ):
            extract(dataset, path, other, device="cpu")
        assert contents(path) == contents(store_file)
        shutil.rmtree(parts_folder(path), ignore_errors=True)
    done = dict(counting)
    other = dataclasses.replace(extract_config, text_pooling="cls")
    summary = extract(dataset, path, other, device="cpu", force=True)
    assert counting == {"image": done["image"], "text": done["text"] + 300}  # the images' features still fit
    assert summary.computed == {"image": 0, "text": 300}


def test_an_unfinished_extraction_of_other_features_is_not_mixed_in(
    drawn, tmp_path, extract_config, monkeypatch, interrupt_after
):
    dataset, path = read_dataset(drawn), tmp_path / "s.h5"
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        extract(dataset, path, extract_config, device="cpu")
    monkeypatch.undo()
    other = dataclasses.replace(extract_config, views=1)
    with pytest.raises(StoreError, match="unfinished extraction of other image features"):
        extract(dataset, path, other, device="cpu")
    extract(dataset, path, other, device="cpu", force=True)
    with FeatureStore(path) as store:
        assert store.image_features.shape[1] == 1


def test_a_dataset_that_grows_while_unfinished_keeps_what_is_done(
    data, tmp_path, extract_config, monkeypatch, counting, interrupt_after
):
    path = tmp_path / "s.h5"
    text = (data / "captions.csv").read_text()
    (data / "captions.csv").write_text("".join(line for line in text.splitlines(keepends=True) if "0059" not in line))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(data), path, extract_config, device="cpu")
    (data / "captions.csv").write_text(text)
    counting["image"] = 0
    summary = extract(read_dataset(data), path, extract_config, device="cpu")
    assert counting["image"] == 60 - 16
    assert summary.images == 60


def test_a_resumed_extraction_keeps_batch_size_and_threads(
    drawn, tmp_path, extract_config, monkeypatch, interrupt_after, told
):
    dataset, path = read_dataset(drawn), tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            extract(dataset, path, extract_config, device="cpu")
    extract(dataset, path, dataclasses.replace(extract_config, batch_size=3), device="cpu")
    assert any("as it was begun: batches of 8" in line for line in told)
    with FeatureStore(path) as store:
        assert store.provenance["image"]["batch_size"] == 8


def test_trap_an_extraction_interrupted_before_its_first_shard_takes_another_batch_size(
    drawn, tmp_path, extract_config, monkeypatch, interrupt_after
):
    path = tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(drawn), path, dataclasses.replace(extract_config, batch_size=16), device="cpu")
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    with FeatureStore(path) as store:
        assert len(store.image_ids) == 60
        assert store.provenance["image"]["batch_size"] == 8


def test_pictures_that_join_are_planned_anew_once_the_store_they_joined_is_gone(
    data, tmp_path, extract_config, monkeypatch, counting, interrupt_after
):
    path, text = tmp_path / "s.h5", (data / "captions.csv").read_text()
    (data / "captions.csv").write_text("".join(line for line in text.splitlines(keepends=True) if "/005" not in line))
    extract(read_dataset(data), path, extract_config, device="cpu")
    (data / "captions.csv").write_text(text)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(data), path, extract_config, device="cpu")
    path.unlink()
    counting["image"] = 0
    assert extract(read_dataset(data), path, extract_config, device="cpu").images == 60
    assert counting["image"] == 50  # those that joined are in two shards


def test_finished_shards_of_a_larger_extraction_outlive_a_smaller_one(
    drawn, tmp_path, extract_config, monkeypatch, counting, interrupt_after, told
):
    path = tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(drawn), path, extract_config, device="cpu")
    for _ in range(2):  # made, and up to date
        extract(read_dataset(drawn).first(10), path, extract_config, device="cpu")
        assert "rows of another unfinished extraction stay in" in told[-1]
    counting["image"] = 0
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert counting["image"] <= 60 - 16
    assert not parts_folder(path).exists()


def test_parts_whose_removal_was_killed_are_no_obstacle(drawn, tmp_path, extract_config, monkeypatch, interrupt_after):
    path = tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(drawn), path, extract_config, device="cpu")
    (parts_folder(path) / "settings.json").unlink()
    assert extract(read_dataset(drawn), path, extract_config, device="cpu").images == 60


def test_verify_encodes_again_with_the_plain_models(store, monkeypatch):
    """So that it can see a fault in what makes them faster."""
    from onceover.extract.backends import eager

    def forbidden(*_):
        raise AssertionError("nothing is to be optimised")

    monkeypatch.setattr(eager, "fold_batch_norms", forbidden)
    lines, problems = verify_sample(store, 5, device="cpu")
    assert problems == []
    assert all("5 encoded again" in line for line in lines)


def test_an_extraction_that_other_hardware_began_is_gone_on_with_and_told(
    drawn, tmp_path, extract_config, monkeypatch, interrupt_after, told
):
    path = tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        patch.setattr("onceover.extract.begin.hardware", lambda _: "an abacus")
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(drawn), path, extract_config, device="cpu")
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert any(line.startswith("begun on an abacus; ") for line in told)
    with FeatureStore(path) as store:
        assert store.provenance["image"]["hardware"] == "an abacus"


def test_a_shard_is_written_as_soon_as_it_is_whole(drawn, tmp_path, extract_config, monkeypatch):
    """Before anything of the next one is waited for, so that what goes wrong there does not cost it."""
    from onceover.extract.encoding.image import ImageEncoder

    begin, begun = ImageEncoder.begin, []

    def failing(self, pixels):
        if len(pixels) == 8:
            begun.append(1)
        if len(begun) > 2:
            raise RuntimeError("the third batch")
        return begin(self, pixels)

    monkeypatch.setattr(ImageEncoder, "begin", failing)
    monkeypatch.setattr(threads, "workers", lambda _device: 1)
    monkeypatch.setattr(plan, "SHARDS_PER_WORKER", 3)  # two batches a shard
    with pytest.raises(RuntimeError, match="the third batch"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert len(list(parts_folder(tmp_path / "s.h5").glob("image-*.h5"))) == 1


def test_a_write_that_fails_ends_an_extraction_at_the_next_shard(
    drawn, tmp_path, extract_config, monkeypatch, counting
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "write_shard", full)
    monkeypatch.setattr(threads, "workers", lambda _device: 1)
    with pytest.raises(OSError, match="No space left"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert counting["image"] <= 8 * 6, "of 60: two batches are begun ahead, one waits to be encoded"


def test_thumbnails_that_are_wanted_later_need_no_encoding(drawn, tmp_path, extract_config, counting, told):
    path = tmp_path / "s.h5"
    extract(read_dataset(drawn), path, dataclasses.replace(extract_config, thumbnails=False), device="cpu")
    with FeatureStore(path) as store:
        features, done = np.array(store.image_features), dict(counting)
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert counting == done
    assert any("60 images have features already" in line for line in told)
    with FeatureStore(path) as store:
        np.testing.assert_array_equal(store.image_features, features)
        assert len(store.thumbnails()) == 60


def test_room_is_asked_for_what_another_encoder_gives_and_not_for_a_moved_ones_features(
    drawn, tmp_path, extract_config, tiny_bert, monkeypatch
):
    asked = []
    monkeypatch.setattr(pipeline, "check_disk", lambda _, needed: asked.append(needed))
    shutil.copytree(tiny_bert, tmp_path / "moved")
    config = dataclasses.replace(extract_config, text_encoder=f"hf:{tiny_bert}")
    moved = dataclasses.replace(config, text_encoder=f"hf:{tmp_path / 'moved'}")
    whole = read_dataset(drawn)
    extract(whole.first(30), tmp_path / "s.h5", config, device="cpu")
    extract(whole, tmp_path / "s.h5", moved, device="cpu")
    with FeatureStore(tmp_path / "s.h5") as store:
        other = dataclasses.replace(moved, text_pooling="cls")
        extract(whole, tmp_path / "t.h5", other, device="cpu", reuse=store)
    first_half, second_half, captions = asked  # shards, and the store that is put together of them
    assert second_half == 1.5 * first_half, "shards of the other 30 images, and a store of 60"
    assert first_half < captions < 2 * first_half, "shards of all captions and no image, and a store of 60"


def test_a_full_memory_is_one_line_whose_advice_can_be_followed(drawn, tmp_path, extract_config, monkeypatch):
    import torch

    path, dataset = tmp_path / "s.h5", read_dataset(drawn)

    def full(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("onceover.extract.encoding.text.TextEncoder.begin", full)
        patch.setattr(pipeline, "check_room", lambda *_: None)
        with pytest.raises(
            StoreError, match="memory of cpu is full; .* --batch-size 4 --force, which encodes all anew"
        ):
            extract(dataset, path, extract_config, device="cpu")
    smaller = dataclasses.replace(extract_config, batch_size=4)
    extract(dataset, path, smaller, device="cpu", force=True)
    with FeatureStore(path) as store:
        assert store.provenance["image"]["batch_size"] == 4


def test_a_store_with_a_longer_name_keeps_the_file_that_is_being_written(tmp_path):
    ours, theirs = tmp_path / ".a[1].4194305.aside.h5", tmp_path / ".a[1].b.4194305.aside.h5"
    ours.touch()
    theirs.touch()
    with only_writer(tmp_path / "a[1].h5", "the store"):
        assert theirs.exists()
        assert not ours.exists()


def test_two_writers_on_one_store_the_second_is_refused(drawn, tmp_path, extract_config):
    with (
        only_writer(tmp_path / "s.h5", "the store"),
        pytest.raises(FileError, match="another process is writing the store"),
    ):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")


def extract_alone(data, path, config):
    """What a process does that may be killed."""
    import torch

    torch.set_num_threads(1)
    extract(read_dataset(data), path, config, device="cpu")


def exit_code(process, seconds):
    """The exit code of a process that is killed after so many seconds: minus nine, unless it ended before."""
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def test_trap_kills_at_random_moments_lose_nothing_and_change_nothing(drawn, tmp_path, extract_config, forkserver):
    """Few kills, and no workers; ``benchmarks/bench_workers.py kills`` does many."""
    config = dataclasses.replace(extract_config, batch_size=4)
    whole, killed = tmp_path / "whole.h5", tmp_path / "killed.h5"
    start = time.monotonic()
    assert exit_code(forkserver.Process(target=extract_alone, args=(drawn, whole, config)), 300) == 0
    length = time.monotonic() - start
    generator = random.Random(0)
    seen = {}
    most = 0
    kills = 0
    for _ in range(10 * KILLS):
        if kills == KILLS:
            break
        process = forkserver.Process(target=extract_alone, args=(drawn, killed, config))
        code = exit_code(process, generator.uniform(0.3, 0.9) * length)
        if killed.exists():  # it was complete before the kill: start anew, so that each kill is one
            assert code in (0, -signal.SIGKILL)
            killed.unlink()
            seen = {}
            continue
        assert code == -signal.SIGKILL
        kills += 1
        now = {}
        for file in parts_folder(killed).glob("*.h5"):
            now[file.name] = (file.stat().st_ino, file.stat().st_mtime_ns)
        assert seen.items() <= now.items(), "a shard was computed twice, or is lost"
        seen = now
        most = max(most, len(seen))
    assert kills == KILLS
    assert most > 0, "no kill came after the first shard"
    assert exit_code(forkserver.Process(target=extract_alone, args=(drawn, killed, config)), 300) == 0
    assert contents(whole) == contents(killed)
    assert not parts_folder(killed).exists()


def test_a_full_disk_is_one_line_and_nothing_finished_is_lost(drawn, tmp_path, extract_config, run):
    """A limit on file size stands in for the full disk: both fail in the write."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    arguments = [
        "extract", "--data", str(drawn), "--store", str(tmp_path / "s.h5"), "--device", "cpu",
        "--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder,
    ]  # fmt: skip
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, most[1]))  # more than a shard takes, less than the store
    try:
        failed = run(*arguments, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "make room and run the same command again: what was finished is kept" in line
    assert not (tmp_path / "s.h5").exists()
    assert not list(tmp_path.glob(".*aside*"))
    assert "rows encoded: 0 image, 0 text in " in run(*arguments).stderr


def test_verify_sample_finds_features_of_another_encoder(store_file, tmp_path):
    path = Path(shutil.copy(store_file, tmp_path / "s.h5"))
    with h5py.File(path, "r+") as file:
        file["image/features"][...] = np.roll(file["image/features"][:], 1, axis=0)
    sign_hdf5(path)
    with FeatureStore(path) as store:
        _, problems = verify_sample(store, 4, device="cpu")
    assert len(problems) == 1
    assert "the image features differ from a new encoding" in problems[0]


def test_long_captions_are_cut_counted_and_reported(data, tmp_path, extract_config):
    with (data / "captions.csv").open("a") as file:
        file.write(f'images/0000.jpg,{"red " * 5000},train\nimages/0001.jpg,🐕 \t "quoted" end,train\n')
    summary = extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert (summary.truncated, summary.captions) == (1, 302)


def test_the_real_thing_on_photographs(shared, tmp_path):
    """100 photographs, the real encoders: extract, fit, evaluate, search, and neighbours that mean something."""
    import json

    from click.testing import CliRunner

    from onceover.cli import cli

    def run(*arguments):
        result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    store, folder = tmp_path / "s.h5", tmp_path / "run"
    run(
        "extract", "--data", shared / "flickr8k", "--store", store, "--limit", 100, "--views", 1,
        "--image-layers", "last",
        "--image-encoder", f"hf:{shared}/encoders/mobilenet_v2_1.0_224",
        "--text-encoder", f"hf:{shared}/encoders/minilm_l6_384",
    )  # fmt: skip
    run("verify", store, "--sample", 3)
    run("fit", "--store", store, "--run", folder, "--set", "training.batch_size=64", "--set", "training.num_epochs=15",
        "--set", "training.refit=false")  # fmt: skip
    result = json.loads(run("evaluate", "--run", folder, "--json"))
    assert result["split"] == "dev"
    for direction in ("image_to_text", "text_to_image"):
        model, guess = result["models"]["multimodal"][direction], result["models"]["chance"][direction]
        assert model["R@1"] > 3 * guess["R@1"]
        assert result["models"]["image_only"][direction]["R@5"] < 2 * guess["R@5"]
    hits = json.loads(run("search", "--run", folder, "--query", "a dog running through the grass", "--json"))["hits"]
    assert any("dog" in caption for hit in hits for caption in hit["captions"])
    picture = shared / "flickr8k" / hits[0]["path"]
    hits = json.loads(run("search", "--run", folder, "--query", picture, "--mode", "image2text", "--json"))["hits"]
    assert len(hits) == 5


def test_a_mistyped_device_or_encoder_leaves_nothing_that_blocks_the_next_try(
    drawn, tmp_path, extract_config, counting
):
    from onceover.extract.encoders import EncoderError

    path, dataset = tmp_path / "s.h5", read_dataset(drawn)
    with pytest.raises(EncoderError, match="cannot be used"):
        extract(dataset, path, extract_config, device="cuda:7")
    wrong = dataclasses.replace(extract_config, text_encoder=f"hf:{tmp_path}")
    with pytest.raises(EncoderError, match="holds no usable model"):
        extract(dataset, path, wrong, device="cpu")
    assert counting["image"] == 0  # said before the images are encoded, not after
    assert not parts_folder(path).exists()
    assert extract(dataset, path, extract_config, device="cpu").images == 60


def test_an_extraction_begun_without_thumbnails_goes_on_with_them(
    drawn, tmp_path, extract_config, monkeypatch, interrupt_after
):
    path, dataset = tmp_path / "s.h5", read_dataset(drawn)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            extract(dataset, path, dataclasses.replace(extract_config, thumbnails=False), device="cpu")
    extract(dataset, path, extract_config, device="cpu")
    with FeatureStore(path) as store:
        assert len(store.thumbnails()) == 60
        assert store.verify() == []


def test_a_new_entry_for_the_ledger_is_not_up_to_date(data, tmp_path, extract_config, counting):
    path = tmp_path / "s.h5"
    extract(read_dataset(data), path, extract_config, device="cpu")
    done = dict(counting)
    with (data / "captions.csv").open("a") as file:
        file.write("images/none.jpg,An image that is not there .,train\n")
    summary = extract(read_dataset(data), path, extract_config, device="cpu")
    assert not summary.up_to_date
    assert counting == done
    assert [failure.id for failure in summary.failures] == ["images/none.jpg"]


def test_what_a_killed_process_left_aside_is_removed(drawn, tmp_path, extract_config):
    leftover = tmp_path / ".s.99999.aside.h5"
    leftover.write_bytes(b"half a store")
    extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert not leftover.exists()


def test_recipes_are_the_same_read_back_so_that_a_difference_is_named_rightly(drawn, tmp_path, extract_config):
    three = dataclasses.replace(extract_config, views=3)
    extract(read_dataset(drawn).first(30), tmp_path / "s.h5", three, device="cpu")
    with pytest.raises(StoreError, match=r"\(they differ in: weights\)"):
        extract(read_dataset(drawn).first(30), tmp_path / "s.h5", dataclasses.replace(three, seed=5), device="cpu")


def test_verify_sample_compares_a_single_record_by_its_norm(drawn, tmp_path, extract_config):
    from onceover.extract.dataset.alone import read_captions

    (tmp_path / "s.txt").write_text("A red circle .\n")
    extract(read_captions(tmp_path / "s.txt"), tmp_path / "t.h5", extract_config, device="cpu")
    with FeatureStore(tmp_path / "t.h5") as store:
        (line,), problems = verify_sample(store, 3, device="cpu")
    assert "of their norm" in line
    assert problems == []
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file["text/features"][...] = -file["text/features"][:]
    sign_hdf5(tmp_path / "t.h5")
    with FeatureStore(tmp_path / "t.h5") as store:
        _, problems = verify_sample(store, 3, device="cpu")
    assert len(problems) == 1
    assert "differ from a new encoding by 2" in problems[0]


def test_verify_sample_says_where_pictures_or_encoders_are_missing(store, tmp_path):
    with pytest.raises(StoreError, match="the image encoder is not the one .* say where it is with --image-encoder"):
        verify_sample(store, 2, device="cpu", image_encoder="torchvision:shufflenet_v2_x1_0@random")
    store.provenance["data"] = str(tmp_path / "gone")
    with pytest.raises(StoreError, match="name their folder with --data"):
        verify_sample(store, 2, device="cpu")


def test_trap_encoded_rows_are_dropped_only_when_asked(drawn, tmp_path, extract_config):
    dataset = read_dataset(drawn)
    path = tmp_path / "s.h5"
    extract(dataset, path, extract_config, device="cpu")
    whole = contents(path)
    message = "holds 50 images and 250 different captions that .* would be dropped: name another --store, or drop"
    with pytest.raises(StoreError, match=message):
        extract(dataset.first(10), path, extract_config, device="cpu")
    assert contents(path) == whole
    assert extract(dataset.first(10), path, extract_config, device="cpu", prune=True).images == 10


def test_trap_images_that_cannot_be_read_for_a_while_are_not_dropped(drawn, tmp_path, extract_config, monkeypatch):
    """A stored image that the disk refuses ends the extraction; a new one goes into the ledger and is tried again."""
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    path = tmp_path / "s.h5"
    refused = {"images/0003.jpg"}
    read = image_source.read_bytes

    def reading(file, most):
        if str(Path(file).relative_to(data)) in refused:
            raise PermissionError(13, "Permission denied", str(file))
        return read(file, most)

    monkeypatch.setattr(image_source, "read_bytes", reading)
    made = extract(read_dataset(data), path, extract_config, device="cpu")
    assert made.images == 59
    assert [failure[:3] for failure in made.failures if failure.stage == "image"] == [
        ("images/0003.jpg", "image", "Permission denied")
    ]
    assert extract(read_dataset(data), path, extract_config, device="cpu").up_to_date
    refused.clear()
    made = extract(read_dataset(data), path, extract_config, device="cpu")
    assert (made.images, made.up_to_date, made.computed["image"]) == (60, False, 1)
    refused.add("images/0005.jpg")
    os.utime(data / "images/0005.jpg")
    message = "1 images of .* cannot be read now and would be dropped .the first: images/0005.jpg: Permission denied."
    with pytest.raises(StoreError, match=message):
        extract(read_dataset(data), path, extract_config, device="cpu")
    with FeatureStore(path) as store:
        assert len(store.image_ids) == 60


@pytest.mark.parametrize("data_now", [b"", b"\xff\xd8 cut short", b"<html>not found</html>"])
def test_trap_a_stored_image_that_is_damaged_later_is_not_dropped_without_a_word(
    drawn, tmp_path, extract_config, data_now
):
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    path = tmp_path / "s.h5"
    extract(read_dataset(data), path, extract_config, device="cpu")
    (data / "images/0003.jpg").write_bytes(data_now)
    with pytest.raises(StoreError, match=r"1 images of .* would be dropped \(the first: images/0003.jpg: .*\); mend"):
        extract(read_dataset(data), path, extract_config, device="cpu")
    with FeatureStore(path) as store:
        assert len(store.image_ids) == 60
    assert extract(read_dataset(data), path, extract_config, device="cpu", prune=True).images == 59


def test_trap_features_kept_of_vanished_images_do_not_excuse_losing_most_of_them(drawn, tmp_path, extract_config):
    from onceover.extract.dataset.alone import read_images

    folder = tmp_path / "images"
    shutil.copytree(drawn / "images", folder)
    path = tmp_path / "s.h5"
    options = {"device": "cpu", "keep_vanished": True}
    extract(read_images(folder), path, extract_config, **options)
    files = sorted(folder.iterdir())
    for file in files[:40]:
        file.write_bytes(b"")
    with pytest.raises(StoreError, match="40 images of .* cannot be read now and would be dropped"):
        extract(read_images(folder), path, extract_config, **options)
    for file in files[10:40]:
        shutil.copy(drawn / "images" / file.name, file)
    assert extract(read_images(folder), path, extract_config, **options).images == 50


def test_trap_an_image_that_failed_in_an_extraction_that_ended_is_tried_again(
    drawn, tmp_path, extract_config, monkeypatch
):
    """The shard with its failure is there, the file's size and time are what they were, and now it can be read."""
    path = tmp_path / "s.h5"
    extract(read_dataset(drawn).first(5), path, extract_config, device="cpu")
    refused = {"0007.jpg"}
    read = image_source.read_bytes

    def reading(file, most):
        if Path(file).name in refused:
            raise PermissionError(13, "Permission denied", str(file))
        return read(file, most)

    monkeypatch.setattr(image_source, "read_bytes", reading)
    sealing = monkeypatch.context()
    with sealing as patched:
        patched.setattr(pipeline, "seal", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(drawn), path, extract_config, device="cpu")
    refused.clear()
    made = extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert (made.images, made.failures) == (60, [])


def test_trap_kept_features_stay_until_they_are_pruned(drawn, tmp_path, extract_config, told):
    """Whatever encoder comes between, and whatever lies beside them."""
    from onceover.extract.dataset.alone import read_images

    folder = tmp_path / "images"
    shutil.copytree(drawn / "images", folder)
    path = tmp_path / "s.h5"
    options = {"device": "cpu", "keep_vanished": True}
    extract(read_images(folder), path, extract_config, **options)
    (folder / "0003.jpg").unlink()
    extract(read_images(folder), path, extract_config, **options)
    kept = sorted((tmp_path / "s.h5.kept").iterdir())
    assert len(kept) == 1
    (tmp_path / "s.h5.kept/image-0123456789ab-00000.h5").write_text("mine")
    other = dataclasses.replace(extract_config, views=1)
    extract(read_images(folder), path, other, **options, force=True)
    assert any(line.startswith("features that were kept are left alone: ") for line in told)
    assert kept[0].exists()
    extract(read_images(folder), path, other, **options, prune=True, retry_failures=True)
    assert [file.name for file in (tmp_path / "s.h5.kept").iterdir()] == ["image-0123456789ab-00000.h5"]


@pytest.mark.parametrize("name", ["settings.json", "image.plan.json", "text.plan.json"])
def test_trap_strangers_files_where_shards_are_kept_stay(drawn, tmp_path, extract_config, name):
    path = tmp_path / "s.h5"
    parts = parts_folder(path)
    parts.mkdir()
    (parts / name).write_text('{"mine": 1}')
    with pytest.raises(StoreError, match=f"holds something else .{name}.; move that elsewhere"):
        extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert (parts / name).read_text() == '{"mine": 1}'


def test_trap_no_link_is_followed_where_shards_are_kept(drawn, tmp_path, extract_config):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "settings.json").write_text("{}")
    for name in ("s.h5.parts", "s.h5.kept"):
        (tmp_path / name).symlink_to(theirs)
        with pytest.raises(StoreError, match=f"{name} is a link, and an extraction keeps"):
            extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
        (tmp_path / name).unlink()
    assert [file.name for file in theirs.iterdir()] == ["settings.json"]


def test_features_of_vanished_images_are_kept_beside_the_store_until_they_are_pruned(
    drawn, tmp_path, extract_config, counting
):
    from onceover.extract.dataset.alone import read_images

    folder = tmp_path / "images"
    shutil.copytree(drawn / "images", folder)
    path, kept = tmp_path / "i.h5", tmp_path / "i.h5.kept"
    options = {"device": "cpu", "keep_vanished": True}
    extract(read_images(folder), path, extract_config, **options)
    whole = contents(path)
    assert not kept.exists()
    (folder / "0003.jpg").rename(tmp_path / "away.jpg")
    assert extract(read_images(folder), path, extract_config, **options).images == 59
    assert len(list(kept.iterdir())) == 1
    (folder / "0004.jpg").rename(tmp_path / "away2.jpg")
    assert extract(read_images(folder), path, extract_config, **options).images == 58
    (tmp_path / "away.jpg").rename(folder / "0003.jpg")
    made = extract(read_images(folder), path, extract_config, **options)
    assert (made.images, made.computed, made.reused) == (59, {"image": 0}, {"image": 59})
    (tmp_path / "away2.jpg").rename(folder / "0004.jpg")
    assert extract(read_images(folder), path, extract_config, **options).computed == {"image": 0}
    assert contents(path) == whole
    assert not kept.exists()
    (folder / "0003.jpg").unlink()
    extract(read_images(folder), path, extract_config, **options)
    assert kept.exists()
    extract(read_images(folder), path, extract_config, **options, prune=True)
    assert not kept.exists()


def test_a_damaged_shard_is_encoded_again(drawn, tmp_path, extract_config, interrupt_after, monkeypatch, told):
    path = tmp_path / "s.h5"
    extract(read_dataset(drawn), tmp_path / "whole.h5", extract_config, device="cpu")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_after(patched, 3)
        extract(read_dataset(drawn), path, extract_config, device="cpu")
    shard = sorted(parts_folder(path).glob("image-*.h5"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    extract(read_dataset(drawn), path, extract_config, device="cpu")
    assert any(line.startswith("encoding a damaged shard again: ") for line in told)
    assert contents(path) == contents(tmp_path / "whole.h5")


def test_trap_a_strangers_folder_of_shards_is_refused(drawn, tmp_path, extract_config):
    parts = tmp_path / "s.h5.parts"
    parts.mkdir()
    (parts / "image-1.h5").write_text("mine")
    with pytest.raises(StoreError, match="holds something else .image-1.h5.; move that elsewhere"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert (parts / "image-1.h5").read_text() == "mine"


def test_a_link_to_a_store_is_followed(drawn, tmp_path, extract_config):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "s.h5"
    link.symlink_to(tmp_path / "disk/real.h5")
    extract(read_dataset(drawn).first(12), link, extract_config, device="cpu")
    assert link.is_symlink()
    with FeatureStore(tmp_path / "disk/real.h5") as store:
        assert len(store.image_ids) == 12


def test_pictures_alone_and_captions_alone_need_only_their_own_encoder(drawn, tmp_path, extract_config, counting):
    from onceover.extract.dataset.alone import read_captions, read_images

    made = extract(read_images(drawn / "images"), tmp_path / "i.h5", extract_config, device="cpu")
    assert (made.images, made.captions, counting["text"]) == (60, 0, 0)
    with FeatureStore(tmp_path / "i.h5") as store:
        assert store.verify() == []
        assert store.image_features.shape[:2] == (60, 2)
        assert (len(store.text_features), store.recipes["text"], store.tokenizer_files) == (0, {}, {})
        lines, problems = verify_sample(store, 2, device="cpu")
        assert (len(lines), problems) == (1, [])
        assert lines[0].startswith("image features")
        store.recipes["image"] = {}
        with pytest.raises(StoreError, match="holds no features that could be encoded again"):
            verify_sample(store, 2, device="cpu")
    again = extract(read_images(drawn / "images"), tmp_path / "i.h5", extract_config, device="cpu")
    assert again.up_to_date
    (tmp_path / "s.txt").write_text("A red circle .\nA blue star .\nA red circle .\n")
    before = counting["image"]
    made = extract(read_captions(tmp_path / "s.txt"), tmp_path / "t.h5", extract_config, device="cpu")
    assert (made.images, made.captions, made.computed) == (0, 3, {"text": 2})
    assert counting["image"] == before
    with FeatureStore(tmp_path / "t.h5") as store:
        assert store.verify() == []
        assert store.image_index.tolist() == [-1, -1, -1]
        np.testing.assert_array_equal(store.text_features[0], store.text_features[2])
        lines, problems = verify_sample(store, 2, device="cpu")
        assert (len(lines), problems) == (1, [])
        assert lines[0].startswith("caption features")
    (tmp_path / "s.txt").write_text("A red circle .\nA green ring .\n")
    with pytest.raises(StoreError, match="holds 1 different captions that .* has no more, or that were not asked for"):
        extract(read_captions(tmp_path / "s.txt"), tmp_path / "t.h5", extract_config, device="cpu")
    made = extract(read_captions(tmp_path / "s.txt"), tmp_path / "t.h5", extract_config, device="cpu", prune=True)
    assert (made.computed, made.reused) == ({"text": 1}, {"text": 1})


def test_tasks_run_in_threads_of_one_thread_and_come_back_in_order():
    import torch

    before = torch.get_num_threads()
    generator = np.random.default_rng(0)

    def work(task):
        time.sleep(task[1])
        return task[0], threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    tasks = [(number, float(generator.uniform(0, 0.01))) for number in range(40)]
    assert list(in_order(work, tasks, 3)) == [(number, False, 1) for number in range(40)]
    assert torch.get_num_threads() == before
    taken = []
    results = in_order(lambda task: task, (taken.append(number) or number for number in range(100)), 2)
    assert next(results) == 0
    results.close()
    assert len(taken) == 5  # a little ahead, not all

    def fails(task):
        raise ValueError(task)

    with pytest.raises(ValueError, match="0"):
        list(in_order(fails, range(9), 2))


def test_the_number_of_cores_changes_nothing(drawn, tmp_path, extract_config, monkeypatch):
    """Nor does the size of shards, which is chosen by it."""
    monkeypatch.setattr(plan, "SHARDS_PER_WORKER", 1)
    for count in (1, 3):
        monkeypatch.setattr(threads, "workers", lambda _device, count=count: count)
        extract(read_dataset(drawn), tmp_path / f"{count}.h5", extract_config, device="cpu")
    assert contents(tmp_path / "1.h5") == contents(tmp_path / "3.h5")


@pytest.fixture
def apart(monkeypatch):
    """Has processes decode, as where a GPU encodes."""
    monkeypatch.setattr("onceover.extract.engines.engine_for", lambda _name, _device: ("processes", processes))
    monkeypatch.setattr(processes, "workers", lambda _device: 2)
    monkeypatch.setattr(processes, "PIECE", 3)


def test_a_gpu_is_fed_by_processes_and_the_store_is_the_same(data, tmp_path, extract_config, request, told):
    whole = (data / "images/0007.jpg").read_bytes()
    (data / "images/0007.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "images/0040.jpg").unlink()
    threads = extract(read_dataset(data), tmp_path / "threads.h5", extract_config, device="cpu")
    request.getfixturevalue("apart")
    processes = extract(read_dataset(data), tmp_path / "processes.h5", extract_config, device="cpu")
    assert [line for line in told if "2 processes decode, batches of 8" in line]
    assert contents(tmp_path / "processes.h5") == contents(tmp_path / "threads.h5")
    assert processes.failures == threads.failures
    assert ("images/0007.jpg", "image") in [(failure.id, failure.stage) for failure in threads.failures]
    assert set(processes.speed["image"].stages) == {"decode", "encode", "write"}


def test_shards_are_written_at_the_same_time(data, tmp_path, extract_config, apart, monkeypatch):
    """A write that waits for the disk holds up neither the next ones nor the encoder."""
    met = threading.Barrier(processes.WRITERS, timeout=30)
    written, write = [], encode.write_shard

    def slow(file, kind, *rest):
        if kind == "image" and len(written) < processes.WRITERS:
            written.append(file)
            met.wait()  # broken, and so an error, unless all writers come
        write(file, kind, *rest)

    monkeypatch.setattr(encode, "write_shard", slow)
    extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert len(written) == processes.WRITERS > 1
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.verify() == []


def test_trap_pieces_of_which_nothing_is_encoded_pass_through_processes(data, tmp_path, extract_config, apart):
    """A whole piece of broken images, and images that only get thumbnails."""
    names = sorted((data / "images").iterdir())
    for path in names[-5:]:
        path.write_bytes(b"no image")
    bare = dataclasses.replace(extract_config, thumbnails=False)
    summary = extract(read_dataset(data), tmp_path / "s.h5", bare, device="cpu")
    assert [failure.stage for failure in summary.failures].count("image") == 5
    again = extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    assert (again.images, again.computed["image"]) == (55, 55)
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.verify() == []
        assert len(list(store.thumbnails())) == 55


def test_trap_processes_end_with_the_one_they_work_for_however_that_ends(tmp_path):
    """Results are larger than a pipe holds, so that they wait to be taken."""
    script = textwrap.dedent("""
        import itertools, os, signal, sys, time
        from onceover.extract.engines._forks import in_processes
        results = in_processes(lambda task: (os.getpid(), bytes(200_000)), itertools.count(), 3)
        print(*{next(results)[0] for _ in range(9)}, flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 3
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline, "processes go on without the one that they worked for"
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_error_of_the_work_itself_is_not_told_as_a_killed_process():
    def work(task):
        raise RuntimeError("stack expects each tensor to be equal size")

    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"), deaths_told():
        list(in_processes(work, range(9), 2))


def test_a_process_that_is_killed_while_it_decodes_is_told_of_and_nothing_finished_is_lost(
    drawn, tmp_path, extract_config, monkeypatch, apart
):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds, for the others to end
    decode, seen = pictures.decode, []

    def dies(*given):
        seen.append(1)
        if len(seen) > 24:
            os.kill(os.getpid(), 9)
        return decode(*given)

    monkeypatch.setattr(pictures, "decode", dies)
    with pytest.raises(
        ForkError, match="a process that works for this one was killed .* run the command again, and it goes on"
    ):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert list(parts_folder(tmp_path / "s.h5").glob("image-*.h5"))
    monkeypatch.setattr(pictures, "decode", decode)
    summary = extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert summary.reused["image"] > 0


def test_a_picture_is_decoded_once_whatever_the_number_of_views(drawn, tmp_path, extract_config, monkeypatch):
    decoded, decode = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *given: decoded.append(1) or decode(*given))
    extract(read_dataset(drawn), tmp_path / "s.h5", dataclasses.replace(extract_config, views=6), device="cpu")
    assert len(decoded) == 60


def test_the_dtype_is_chosen_by_a_sample_and_stays_with_the_store(data, tmp_path, extract_config, monkeypatch, told):
    """Errors of bfloat16 lie between the two bounds that are tried; on a processor without it nothing is tried."""
    config = dataclasses.replace(extract_config, dtype="auto")
    monkeypatch.setattr("onceover.extract.encoding.devices.native_bfloat16", lambda device: True)
    chosen = {}
    for bound in (1e-9, 1e9):
        monkeypatch.setattr(begin, "AUTO_ERROR", bound)
        path = tmp_path / f"{bound}.h5"
        extract(read_dataset(data), path, config, device="cpu")
        with FeatureStore(path) as store:
            chosen[bound] = [recipe["dtype"] for recipe in store.recipes.values()]
            assert verify_sample(store, 12, data=data, device="cpu")[1] == []
    assert chosen == {1e-9: ["float32", "float32"], 1e9: ["bfloat16", "bfloat16"]}
    assert any("text: bfloat16 would move the features by" in line for line in told)
    text = (data / "captions.csv").read_text()
    (data / "captions.csv").write_text(text + "images/0059.jpg,A new red circle .,test\n")
    monkeypatch.setattr(begin, "AUTO_ERROR", 1e-9)
    summary = extract(read_dataset(data), path, config, device="cpu")
    assert summary.computed == {"image": 0, "text": 1}  # in bfloat16, like what is there
    monkeypatch.setattr("onceover.extract.encoding.devices.native_bfloat16", lambda device: False)
    monkeypatch.setattr(begin, "AUTO_ERROR", 1e9)
    extract(read_dataset(data), tmp_path / "none.h5", config, device="cpu")
    with FeatureStore(tmp_path / "none.h5") as store:
        assert store.recipes["text"]["dtype"] == "float32"


def test_half_precision_on_the_disk_is_half_the_size_and_within_its_rounding(drawn, tmp_path, extract_config, store):
    path = tmp_path / "s.h5"
    extract(read_dataset(drawn), path, dataclasses.replace(extract_config, store_dtype="float16"), device="cpu")
    with FeatureStore(path) as half:
        assert half.image_features.dtype == half.text_features.dtype == np.float16
        np.testing.assert_allclose(half.text_features, store.text_features, rtol=1e-3, atol=1e-4)
        assert half.verify() == []
        lines, problems = verify_sample(half, 12, data=drawn, device="cpu")
        assert problems == []
        assert "stored as float16" in lines[0]
        assert "of the 10 nearest neighbours are the same" in lines[1]
        assert half.fingerprints["image"] != store.fingerprints["image"]


def test_what_does_not_fit_the_disk_is_not_begun(drawn, tmp_path, extract_config, monkeypatch, counting):
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FileError, match=r"s\.h5 needs about .* free; make room"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert counting == {"image": 0, "text": 0}
    assert not (tmp_path / "s.h5").exists()


def test_a_batch_size_that_fits_is_found_by_trying_and_kept(drawn, tmp_path, extract_config, monkeypatch, told):
    import torch

    tried = []

    def peak(trial):
        size = trial.args[0]
        tried.append(size)
        if size > 8:
            raise torch.OutOfMemoryError
        return 10 * size

    monkeypatch.setattr(begin, "peak_memory", peak)
    config = dataclasses.replace(extract_config, batch_size=None)
    monkeypatch.setattr(threads, "workers", lambda _device: 1)
    monkeypatch.setattr(begin, "total_memory", lambda: 100)
    extract(read_dataset(drawn), tmp_path / "s.h5", config, device="cpu")
    assert tried == [16, 8, 8, 4, 4]  # images, then captions
    assert "batches of 16 would not fit the memory of cpu: trying 8" in told
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.provenance["image"]["batch_size"] == 4


def test_a_summary_says_how_fast_it_went_and_what_limited_it(drawn, tmp_path, extract_config):
    summary = extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    assert set(summary.speed) == {"image", "text"}
    assert summary.speed["image"].rows == 60
    assert set(summary.speed["image"].stages) == {"decode", "encode", "write"}
    assert shares({"decode": 1.0, "encode": 3.0}) == "encode 75 %, decode 25 %"
    assert re.fullmatch(r"[\d.]+ rows a second \(\w+ \d+ %, \w+ \d+ %, \w+ \d+ %\)", str(summary.speed["image"]))
