"""`info --data`: what of a dataset would be taken, without encoding or opening an image."""

import json

import pytest

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions, read_options
from onceover.extract.layouts import read_dataset
from onceover.extract.preview import preview


def test_a_preview_says_what_is_taken_and_what_is_left_out(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"never opened")
    lines = ["image,caption,split", "a.jpg,A dog .,train", "a.jpg,A brown dog .,train", "b.jpg,A cat .,test"]
    lines += ["gone.jpg,A bird .,test", "lost.jpg,A fish .,test", "b.jpg,,test"]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    text = preview(tmp_path)
    assert "images    2 (1 train, 1 test)" in text
    assert "captions  3, 1 to 2 per image" in text
    assert "6 rows" in text
    assert "  a.jpg: A dog .\n  a.jpg: A brown dog .\n  b.jpg: A cat .\n" in text
    assert "left out: 3 rows and images\n  2 × no such picture in ./; the first: gone.jpg" in text
    assert "  1 × empty caption; the first: b.jpg" in text


def test_a_preview_of_a_sound_dataset_leaves_out_nothing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"never opened")
    (tmp_path / "table.csv").write_text(f"image,caption\na.jpg,{'long ' * 40}\n")
    text = preview(tmp_path)
    assert text.endswith("left out: nothing")
    assert "captions  1, 1 per image" in text
    assert max(map(len, text.splitlines()[-2:])) < 100


def test_the_command_previews_a_dataset_and_writes_nothing(run, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"never opened")
    (tmp_path / "table.csv").write_text("image,caption\na.jpg,A dog .\n")
    before = sorted(tmp_path.iterdir())
    shown = run("info", "--data", tmp_path)
    assert "a.jpg: A dog ." in shown.stdout
    assert f"next: onceover extract --data {tmp_path} --store store.h5" in shown.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert "name one of FILE_OR_DIR and --data DATA" in run("info", code=2).stderr
    assert "name one of" in run("info", tmp_path / "table.csv", "--data", tmp_path, code=2).stderr


def test_a_store_keeps_how_its_dataset_was_read(drawn, tmp_path, extract_config):
    from onceover import workflows
    from onceover.extract.store import FeatureStore

    reading = ReadOptions(caption_columns=("caption",), exclude=("*.gif",), images_root=drawn)
    assert read_options(json.loads(json.dumps(reading.given()))) == reading
    workflows.extract(drawn, tmp_path / "s.h5", extract_config, limit=4, reading=reading, device="cpu")
    with FeatureStore(tmp_path / "s.h5") as store:
        assert read_options(store.provenance["reading"]) == reading
        assert store.provenance["named"] == str(drawn)


def test_excluded_images_are_left_out_of_a_table_and_counted(tmp_path):
    for name in ("a.jpg", "b.jpg", "draft-c.jpg"):
        (tmp_path / name).write_bytes(b"never opened")
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,A dog .\ndraft-c.jpg,A cat .\nb.jpg,A bird .\n")
    dataset = read_dataset(tmp_path, options=ReadOptions(exclude=("draft-*", "*.gif")))
    assert dataset.ids == ["a.jpg", "b.jpg"]
    assert dataset.failures == []
    assert dataset.notes[:2] == [
        "images left out by --exclude draft-*: 1",
        "images left out by --exclude *.gif: 0",
    ]
    with pytest.raises(DatasetError, match="--exclude \\*.jpg leaves out all images"):
        read_dataset(tmp_path, options=ReadOptions(exclude=("*.jpg",)))
