"""Flickr30k as it is published and as it is copied. Images are never opened."""

import csv
import io
import json

import pytest

from onceover.extract.layouts import read_dataset

RESULTS = """image_name| comment_number| comment
1000092795.jpg| 0| Two young guys with shaggy hair look at their hands , outside .
1000092795.jpg| 1| "Two" men | in green shirts .
2199200615.jpg| 3| A "brown" dog .
2199200615.jpg| 4   A dog runs across the grass .
"""
TOKEN = (
    "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands , outside .\n"
    '1000092795.jpg#1\t"Two" men | in green shirts .\n'
    '2199200615.jpg#3\tA "brown" dog .\n'
    "2199200615.jpg#4\tA dog runs across the grass .\n"
)
CAPTIONS = [
    "Two young guys with shaggy hair look at their hands , outside .",
    '"Two" men | in green shirts .',
    'A "brown" dog .',
    "A dog runs across the grass .",
]
NAMES = ("1000092795.jpg", "2199200615.jpg")


@pytest.mark.parametrize(
    ("table", "images"),
    [
        ("results.csv", "flickr30k-images"),
        ("results.csv", "flickr30k_images"),
        ("results.csv", "Images"),
        ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images"),
        ("flickr30k/results.csv", "flickr30k-images"),
    ],
)
def test_the_table_with_bars_wherever_the_images_lie(laid, table, images):
    dataset = read_dataset(laid({table: RESULTS, "readme.txt": "Hello, you"}, [f"{images}/{name}" for name in NAMES]))
    assert dataset.layout == "flickr30k"
    assert dataset.taken == "table with bars, images from `image_name`, captions from `comment`: 4 rows"
    assert (dataset.ids, dataset.captions) == (list(NAMES), CAPTIONS)
    assert dataset.paths == [f"{images}/{name}" for name in NAMES]
    assert dataset.image_index.tolist() == [0, 0, 1, 1]
    assert dataset.failures == []


@pytest.mark.parametrize("above", ["archive", "data/archive"])
def test_the_folder_that_kaggle_ships_below_others(laid, above):
    base = f"{above}/flickr30k_images"
    dataset = read_dataset(
        laid({f"{base}/results.csv": RESULTS}, [f"{base}/flickr30k_images/{name}" for name in NAMES])
    )
    assert (dataset.layout, dataset.captions) == ("flickr30k", CAPTIONS)


@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_token_file_whose_quotes_are_the_captions_own(laid, given):
    text = TOKEN + '2199200615.jpg#0\t"All quoted"\n2199200615.jpg#1\t"open\n'
    folder = laid({"results_20130124.token": text}, [f"flickr30k-images/{name}" for name in NAMES])
    dataset = read_dataset(folder if given == "folder" else folder / "results_20130124.token")
    assert (dataset.layout, dataset.captions) == ("flickr30k", [*CAPTIONS, '"All quoted"', '"open'])
    assert dataset.taken == "TSV without a header, images from column 1, captions from column 2: 6 rows"


def test_the_annotations_of_the_hub_bring_their_splits(laid):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
    writer.writerow([json.dumps(CAPTIONS[:2]), "[0, 1]", "train", NAMES[0], 0])
    writer.writerow([json.dumps(CAPTIONS[2:]), "[2, 3]", "test", NAMES[1], 1])
    images = [f"flickr30k-images/{name}" for name in NAMES]
    dataset = read_dataset(laid({"flickr_annotations_30k.csv": file.getvalue()}, images))
    assert (dataset.layout, dataset.captions) == ("flickr30k", CAPTIONS)
    assert (dataset.image_index.tolist(), dataset.splits) == ([0, 0, 1, 1], ["train", "test"])


def test_the_row_that_lacks_a_bar_is_read_in_any_file(laid):
    dataset = read_dataset(laid({"captions.psv": RESULTS}, NAMES))
    assert (dataset.layout, dataset.captions) == ("csv", CAPTIONS)


def test_another_results_file_is_a_plain_table(laid):
    dataset = read_dataset(laid({"results.csv": "image,caption\n1000092795.jpg,A\n"}, NAMES))
    assert (dataset.layout, dataset.captions) == ("csv", ["A"])


def test_images_without_captions_go_into_the_ledger(laid):
    dataset = read_dataset(laid({"results.csv": RESULTS}, [f"flickr30k-images/{name}" for name in (*NAMES, "x.jpg")]))
    assert [failure[:3] for failure in dataset.failures] == [("x.jpg", "dataset", "picture without captions")]
