"""The drawn dataset: unique captions, no scene twice, splits of the promised size, reproducible."""

from collections import Counter

import numpy as np
from PIL import Image

from onceover.extract.layouts import read_dataset
from onceover.extract.synthetic import all_scenes, draw_dataset


def test_the_demo_dataset_is_what_the_demo_promises(tmp_path):
    sentence, picture = draw_dataset(tmp_path / "d")
    dataset = read_dataset(tmp_path / "d")
    assert len(dataset.ids) == 540
    assert dataset.splits.count("test") == 200
    assert set(Counter(dataset.image_index.tolist()).values()) == {5}
    assert len(set(dataset.captions)) == len(dataset.captions)  # no caption belongs to two images
    assert sentence not in dataset.captions
    with Image.open(picture) as image:
        assert image.size == (224, 224)


def test_no_caption_of_one_scene_can_be_another_scenes():
    owners = {}
    for number, scene in enumerate(all_scenes()):
        for caption in scene.captions(np.random.default_rng(0), count=7):
            assert owners.setdefault(caption, number) == number
    assert len(owners) == 7 * len(all_scenes())


def test_the_same_seed_draws_the_same_and_what_is_there_is_left_alone(tmp_path):
    for name in "ab":
        draw_dataset(tmp_path / name, 4, 2, 2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    (tmp_path / "a" / "mark").touch()
    draw_dataset(tmp_path / "a", 4, 2, 2)
    assert (tmp_path / "a" / "mark").exists()
