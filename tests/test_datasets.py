"""Dataset layouts, splits and captions, the odd ones among them. Images are named here, never opened."""

import json
import os
import time
import unicodedata

import numpy as np
import pytest

from onceover.extract.dataset import DatasetError, text
from onceover.extract.dataset.alone import read_captions, read_images
from onceover.extract.dataset.caption_table import open_table
from onceover.extract.dataset.table import read_ids
from onceover.extract.layouts import read_dataset
from onceover.extract.listing import ImageSourceError, is_excluded, list_files
from onceover.extract.store import caption_ids


def make(folder, captions: str, names=("a.jpg", "b.jpg", "c.jpg"), pictures="Images", file="captions.txt"):
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / pictures / name).write_bytes(b"x")
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(captions, encoding="utf-8", newline="")
    return folder


def reasons(dataset):
    return {(failure.id, failure.stage): failure.reason for failure in dataset.failures}


def test_kaggle_layout_in_the_order_of_the_file(tmp_path):
    dataset = read_dataset(make(tmp_path, "image,caption\nb.jpg,one\na.jpg,two\nb.jpg,three\nc.jpg,four\n"))
    assert dataset.layout == "kaggle"
    assert dataset.ids == ["b.jpg", "a.jpg", "c.jpg"]
    assert dataset.paths == ["Images/b.jpg", "Images/a.jpg", "Images/c.jpg"]
    assert dataset.captions == ["one", "two", "three", "four"]
    assert dataset.image_index.tolist() == [0, 1, 0, 2]
    assert caption_ids(dataset.ids, dataset.image_index) == ["b.jpg#0", "a.jpg#0", "b.jpg#1", "c.jpg#0"]


def test_original_layout(tmp_path):
    text = "a.jpg#0\tA dog .\na.jpg#1\tA\tcat .\nb.jpg#0\tA bird .\n"
    dataset = read_dataset(make(tmp_path, text, ("a.jpg", "b.jpg"), "Flicker8k_Dataset", "Flickr8k.token.txt"))
    assert (dataset.layout, dataset.captions) == ("original", ["A dog .", "A\tcat .", "A bird ."])


def test_original_layout_in_the_folders_that_unpacking_makes(tmp_path):
    folder = "Flickr8k_Dataset/Flicker8k_Dataset"
    dataset = read_dataset(make(tmp_path, "a.jpg#0\tA dog .\n", ["a.jpg"], folder, "Flickr8k_text/Flickr8k.token.txt"))
    assert dataset.paths == [f"{folder}/a.jpg"]


def test_trap_the_line_of_a_picture_that_does_not_exist(tmp_path):
    text = "a.jpg#0\tA dog .\n2258277193_586949ec62.jpg.1#0\tsome people .\n"
    dataset = read_dataset(make(tmp_path, text, ["a.jpg"], "Flicker8k_Dataset", "Flickr8k.token.txt"))
    assert dataset.ids == ["a.jpg"]
    assert "no such picture" in reasons(dataset)["2258277193_586949ec62.jpg.1", "dataset"]


@pytest.mark.parametrize("given", ["folder", "file"])
def test_plain_csv_with_splits_and_subfolders(tmp_path, given):
    text = "split,image,caption\nval,x/a.jpg,one\ntrain,b.jpg,two\nval,x/a.jpg,three\ntest,c.jpg,four\n"
    make(tmp_path, text, ["b.jpg", "c.jpg"], ".", "set.csv")
    make(tmp_path, text, ["a.jpg"], "x", "set.csv")
    dataset = read_dataset(tmp_path if given == "folder" else tmp_path / "set.csv")
    assert (dataset.layout, dataset.ids) == ("csv", ["x/a.jpg", "b.jpg", "c.jpg"])
    assert dataset.splits == ["dev", "train", "test"]


def karpathy(folder, *pictures, file="dataset_flickr8k.json"):
    """Images as (filename, split, captions) or (filename, split, captions, filepath)."""
    images = []
    for name, split, captions, *path in pictures:
        (folder / "".join(path)).mkdir(parents=True, exist_ok=True)
        (folder / "".join(path) / name).write_bytes(b"x")
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        picture = {"filename": name, "split": split, "sentences": sentences, "imgid": len(images)}
        images.append(picture | ({"filepath": path[0]} if path else {}))
    (folder / file).write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return folder


@pytest.mark.parametrize("given", ["folder", "file"])
def test_karpathys_split_files_of_flickr_and_coco(tmp_path, given):
    pictures = [
        ("b.jpg", "train", ["A dog.", "Two\ndogs. "], "train2014"),
        ("a.jpg", "val", ["A cat."], "val2014"),
        ("c.jpg", "restval", ["A bird."], "val2014"),
        ("d.jpg", "test", [], "val2014"),
        ("e.jpg", "test", ["A fish."], "val2014"),
    ]
    karpathy(tmp_path, *pictures)
    (tmp_path / "val2014/other.jpg").write_bytes(b"x")  # of the archive, and not of the dataset
    dataset = read_dataset(tmp_path if given == "folder" else tmp_path / "dataset_flickr8k.json")
    assert (dataset.layout, dataset.splits) == ("karpathy", ["train", "dev", "train", "test"])
    assert dataset.ids == ["train2014/b.jpg", "val2014/a.jpg", "val2014/c.jpg", "val2014/e.jpg"]
    assert dataset.captions == ["A dog.", "Two\ndogs.", "A cat.", "A bird.", "A fish."]
    assert dataset.image_index.tolist() == [0, 0, 1, 2, 3]
    assert [(each.id, each.reason) for each in dataset.failures] == [
        ("val2014/d.jpg", "empty caption: ''"),
        ("val2014/d.jpg", "no usable caption"),
    ]


def test_karpathys_file_brings_its_splits_to_a_folder_in_another_layout(tmp_path):
    make(tmp_path, "image,caption\na.jpg,one\nb.jpg,two\n", ("a.jpg", "b.jpg"))
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n")  # Flickr30k's own
    karpathy(tmp_path, ("a.jpg", "val", ["A dog."]), ("b.jpg", "test", ["A cat."]))
    for name in "ab":
        (tmp_path / f"{name}.jpg").unlink()
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.splits, dataset.notes) == ("karpathy", ["dev", "test"], [])
    assert dataset.paths == ["Images/a.jpg", "Images/b.jpg"]
    assert read_dataset(tmp_path / "captions.txt").captions == ["one", "two"]


def test_half_a_character_in_a_caption_or_a_name_goes_into_the_ledger(tmp_path):
    sentences = [{"raw": "\ud83d"}, {"raw": "A dog."}]
    images = [{"filename": name, "split": "train", "sentences": sentences} for name in ("a.jpg", "\ud83d.jpg")]
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "dataset_coco.json").write_text("\ufeff" + json.dumps({"images": images}), encoding="utf-8")
    dataset = read_dataset(tmp_path)
    assert dataset.captions == ["A dog."]
    reasons = [failure.reason for failure in dataset.failures]
    assert [reason.partition(":")[0] for reason in reasons] == ["caption with half a character"] + 2 * [
        "a name with half a character"
    ]


def test_karpathys_file_beside_the_folder_of_pictures(tmp_path):
    karpathy(tmp_path, ("a.jpg", "train", ["A dog."]))
    (tmp_path / "Images").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "Images/a.jpg")
    assert read_dataset(tmp_path).paths == ["Images/a.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"tokens": []}]}]}', "image 0 of images"),
        ('{"images": [{"file_name": "a.jpg", "id": 7}]}', "needs filename, split and sentences"),
        ('{"images": [7]}', "needs filename, split and sentences"),
        ('{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": null}]}]}', "image 0 of images"),
        ('{"images": 7}', "no list of images"),
        ('{"annotations": []}', "no list of images"),
        ('{"images": []}', "holds no captions"),
        ("[]", "no list of images"),
        ("{", "no list of images"),
    ],
)
def test_a_json_file_of_another_kind(tmp_path, content, message):
    (tmp_path / "dataset_coco.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('a.jpg,"A dog , running ."', "A dog , running ."),
        ("a.jpg,A dog , running .", "A dog , running ."),
        ('a.jpg,"He said ""hi"" ."', 'He said "hi" .'),
        ('a.jpg,"Hi" he said .', '"Hi" he said .'),
        ('a.jpg,"Hi, you" he said .', '"Hi, you" he said .'),
        ('a.jpg,a 5" wheel', 'a 5" wheel'),
        ('a.jpg,"an open quote', '"an open quote'),
        ("a.jpg,see b.jpg, it is there", "see b.jpg, it is there"),
        ("a.jpg,tab\there", "tab\there"),
        ("a.jpg,form\x0cfeed and\u2028separator", "form\x0cfeed and\u2028separator"),
        ("a.jpg,Ein Übel 🐕 犬", "Ein Übel 🐕 犬"),
        ('a.jpg,"two\nlines"', "two\nlines"),
        ('"a.jpg",quoted name', "quoted name"),
        ("a.jpg,   spaces   ", "spaces"),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_trap_captions_with_commas_quotes_tabs_and_other_letters(tmp_path, line, caption, ending):
    dataset = read_dataset(make(tmp_path, ending.join(["image,caption", line, "b.jpg,after", ""]), ("a.jpg", "b.jpg")))
    assert dataset.captions == [caption.replace("\n", "\n"), "after"]
    assert dataset.failures == []


def test_a_broken_quote_never_swallows_the_next_record(tmp_path):
    text = 'image,caption\na.jpg,"open\nb.jpg,"open too\nc.jpg,closed"\n'
    assert read_dataset(make(tmp_path, text)).captions == ['"open', '"open too', 'closed"']


def test_trap_never_five_captions_contiguous_and_sorted(tmp_path):
    text = "image,caption\n" + "".join(f"{name}.jpg,{number}\n" for number, name in enumerate("cabacca"))
    dataset = read_dataset(make(tmp_path, text))
    assert dataset.ids == ["c.jpg", "a.jpg", "b.jpg"]
    assert dataset.image_index.tolist() == [0, 1, 2, 1, 0, 0, 1]


def test_captions_without_pictures_and_pictures_without_captions_go_into_the_ledger(tmp_path):
    dataset = read_dataset(make(tmp_path, "image,caption\na.jpg,one\nz.jpg,two\nz.jpg,three\nb.jpg,  \n"))
    assert dataset.ids == ["a.jpg"]
    assert [failure.id for failure in dataset.failures] == ["z.jpg", "z.jpg", "b.jpg", "b.jpg", "c.jpg"]
    assert "no such picture in Images/: 'two'" in [failure.reason for failure in dataset.failures]
    assert reasons(dataset)["b.jpg", "caption"].startswith("empty caption")
    assert reasons(dataset)["b.jpg", "dataset"] == "no usable caption"
    assert reasons(dataset)["c.jpg", "dataset"] == "picture without captions"


def test_a_path_that_leaves_the_folder_is_left_out(tmp_path):
    (tmp_path / "out.jpg").write_bytes(b"x")
    data = make(tmp_path / "d", "image,caption\n../out.jpg,one\n/etc/passwd,two\na.jpg,three\n")
    dataset = read_dataset(data)
    assert dataset.ids == ["a.jpg"]
    assert sum("leaves the data folder" in failure.reason for failure in dataset.failures) == 2


def test_official_lists_decide_and_what_they_leave_out_has_no_split(tmp_path):
    make(tmp_path, "image,caption\na.jpg,1\nb.jpg,2\nc.jpg,3\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (tmp_path / "Flickr_8k.testImages.txt").write_text("c.jpg\nghost.jpg\n\n")
    dataset = read_dataset(tmp_path)
    assert dataset.splits == ["train", "", "test"]
    assert reasons(dataset)["ghost.jpg", "split"] == "listed in test, but not a usable picture"
    assert dataset.notes == ["splits from Flickr_8k.trainImages.txt, Flickr_8k.testImages.txt"]


def test_trap_a_picture_in_two_lists_is_a_hard_error(tmp_path):
    make(tmp_path, "image,caption\na.jpg,1\nb.jpg,2\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\nb.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    with pytest.raises(DatasetError, match=r"b\.jpg is in the list of train too"):
        read_dataset(tmp_path)


def test_trap_one_picture_with_rows_in_two_splits_is_a_hard_error(tmp_path):
    make(tmp_path, "image,caption,split\na.jpg,1,train\na.jpg,2,test\n", pictures=".", file="d.csv")
    with pytest.raises(DatasetError, match="two splits"):
        read_dataset(tmp_path)


def test_trap_the_seeded_split_is_by_picture_announced_and_stable_when_pictures_join(tmp_path):
    names = [f"{number}.jpg" for number in range(400)]
    text = "image,caption\n" + "".join(f"{name},{word}\n" for name in names for word in ("x", "y"))
    dataset = read_dataset(make(tmp_path / "all", text, names))
    assert "not the published split" in dataset.notes[0]
    shares = {split: dataset.splits.count(split) / 400 for split in ("train", "dev", "test")}
    assert shares["train"] == pytest.approx(0.8, abs=0.07)
    assert shares["dev"] == pytest.approx(0.1, abs=0.05)
    few = "\n".join([text.split("\n")[0], *text.split("\n")[1:401]])
    half = read_dataset(make(tmp_path / "half", few, names))
    assert half.splits == dataset.splits[:200]
    assert read_dataset(tmp_path / "all", seed=1).splits != dataset.splits


def test_limit_keeps_the_map_right(tmp_path):
    dataset = read_dataset(make(tmp_path, "image,caption\na.jpg,1\nb.jpg,2\na.jpg,3\nc.jpg,4\n")).first(2)
    assert (dataset.ids, dataset.captions) == (["a.jpg", "b.jpg"], ["1", "2", "3"])
    np.testing.assert_array_equal(dataset.image_index, [0, 1, 0])
    assert dataset.notes[-1] == "limited to the first 2 of 3 images"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("captions.txt", "", "needs a first line with the columns image,caption"),
        ("captions.txt", "image,caption\n", "holds no captions"),
        ("captions.txt", "A dog runs .\nA cat .\n", "needs a first line"),
        ("captions.txt", "image,caption,Caption\na.jpg,one,two\n", "has several columns called caption; leave one"),
        ("captions.txt", "image,caption\nz.jpg,one\n", "none of the images"),
        ("captions.txt", "image,caption\na.jpg,\n", "no image is usable"),
        ("captions.txt", "image,caption\na.jpg\n", "line 2: expected 2 fields"),
        ("d.csv", "image,caption,split\na.jpg,one,two,train\n", "quote captions that contain commas"),
        ("d.csv", "image,caption,split\na.jpg,one,other\n", "use train, dev or test"),
        ("Flickr8k.token.txt", "a.jpg A dog\n", "line 1: expected name.jpg#0, a tab and a caption"),
        (
            "notes.md",
            "hello",
            "holds no captions in a form that is understood; there is notes.md, 3 .jpg in Images/. The",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, file, text, message):
    with pytest.raises(DatasetError) as error:
        read_dataset(make(tmp_path, text, file=file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_a_wrong_file_and_a_wrong_encoding(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        read_dataset(tmp_path / "none")
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(
        DatasetError, match=r"x\.h5 holds no captions in a form that is understood; there is x\.h5\. The"
    ):
        read_dataset(tmp_path / "x.h5")
    make(tmp_path, "image,caption\n")
    (tmp_path / "captions.txt").write_bytes("image,caption\na.jpg,Übel\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"is not UTF-8 \(line 2\)"):
        read_dataset(tmp_path)


def test_several_tables_ask_for_one(tmp_path):
    make(tmp_path, "image,caption\n", file="a.csv")
    make(tmp_path, "image,caption\n", file="b.csv")
    with pytest.raises(DatasetError, match=r"2 tables of captions \(a.csv, b.csv\); name the one"):
        read_dataset(tmp_path)


def test_the_dataset_is_plain_data(tmp_path):
    dataset = read_dataset(make(tmp_path, "image,caption\na.jpg,one\n"))
    assert json.dumps([*dataset.ids, *dataset.captions, *dataset.image_index.tolist()])


def test_the_photographs_have_their_official_splits(shared):
    dataset = read_dataset(shared / "flickr8k")
    assert (len(dataset.ids), len(dataset.captions)) == (7091, 35455)
    assert [dataset.splits.count(split) for split in ("train", "dev", "test", "")] == [6000, 1000, 0, 91]
    assert dataset.failures == []


@pytest.mark.parametrize("line", ['train,a.jpg,A 6" pipe', 'train,a.ppm,A 6" pipe', 'train,a.jpg,"a 6"" pipe"'])
def test_trap_a_stray_quote_never_swallows_the_rows_after_it(tmp_path, line):
    text = f"split,image,caption\n{line}\ntrain,b.jpg,two\ndev,c.jpg,three\n"
    make(tmp_path, text, ["a.jpg", "a.ppm", "b.jpg", "c.jpg"], ".", "d.csv")
    dataset = read_dataset(tmp_path)
    assert len(dataset.ids) == 3
    assert dataset.captions[1:] == ["two", "three"]
    assert "pipe" in dataset.captions[0]
    assert dataset.failures == []


def test_an_open_quote_among_several_columns_is_an_error_with_its_line(tmp_path):
    text = 'split,image,caption\ntrain,a.jpg,"open\ntrain,b.jpg,two\n'
    make(tmp_path, text, ["a.jpg", "b.jpg"], ".", "d.csv")
    with pytest.raises(DatasetError, match="line 2: expected 3 fields"):
        read_dataset(tmp_path)


def test_pictures_in_subfolders_are_told_from_those_without_captions(tmp_path):
    data = make(tmp_path, "image,caption\nsub/a.jpg,one\n", [])
    (data / "Images/sub").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (data / "Images/sub" / name).write_bytes(b"x")
    assert [failure.id for failure in read_dataset(data).failures] == ["sub/b.jpg"]


def test_a_folder_of_pictures_is_a_dataset_without_captions(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "b/a.png", "notes.txt", "b/movie.mp4"):
        (tmp_path / name).write_bytes(b"x")
    dataset = read_images(tmp_path)
    assert dataset.ids == dataset.paths == ["b/a.png", "z.JPG"]
    assert (dataset.captions, len(dataset.image_index), dataset.splits) == ([], 0, ["", ""])
    assert dataset.notes == [f"files in {tmp_path} that are no images by their names, left alone: 1 .mp4, 1 .txt"]
    with pytest.raises(DatasetError, match="is no folder"):
        read_images(tmp_path / "z.JPG")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (tmp_path / "caf\u00e9\u200b.jpg").write_bytes(b"x")
    odd = read_images(tmp_path)
    assert odd.ids == ["b/a.png", "caf\u00e9\u200b.jpg", "z.JPG"]
    assert [failure.reason for failure in odd.failures] == ["its name is not UTF-8"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no images"):
        read_images(tmp_path / "empty")


def test_a_file_of_sentences_is_a_dataset_without_pictures(tmp_path):
    file = tmp_path / "s.txt"
    file.write_text("\ufeffA dog .\r\n\r\nEine Katze .\n  \nA dog .\n\n", encoding="utf-8")
    dataset = read_captions(file)
    assert dataset.captions == ["A dog .", "Eine Katze .", "A dog ."]
    assert dataset.image_index.tolist() == [-1, -1, -1]
    assert [(failure.id, failure.reason) for failure in dataset.failures] == [
        ("line 2", "empty caption"),
        ("line 4", "empty caption"),
    ]
    file.write_text("A dog .\nno\0thing\n")
    assert [failure.reason for failure in read_captions(file).failures] == ["caption with a NUL character"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(DatasetError, match="is not UTF-8"):
        read_captions(file)


def test_line_ends_of_the_classic_mac(tmp_path):
    dataset = read_dataset(make(tmp_path, 'image,caption\ra.jpg,one\rb.jpg,"two, three"\r'))
    assert dataset.captions == ["one", "two, three"]
    (tmp_path / "ids.txt").write_bytes(b"a.jpg\rb.jpg\r")
    assert read_ids(tmp_path / "ids.txt") == ["a.jpg", "b.jpg"]
    (tmp_path / "s.txt").write_bytes(b"A dog .\rA cat .\r")
    assert read_captions(tmp_path / "s.txt").captions == ["A dog .", "A cat ."]


def test_trap_a_carriage_return_within_a_caption_cuts_nothing_off(tmp_path):
    dataset = read_dataset(make(tmp_path, 'image,caption\na.jpg,one\rtwo\nb.jpg,"three\rfour"\n'))
    assert dataset.captions == ["one\rtwo", "three\rfour"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * 200_000, f"needs a first line with the columns image,caption[,split]; it has '{'x' * 79}"),
        (
            'image,caption\r"a.jpg,\n',
            "needs a first line with the columns image,caption[,split]; it has 'image,caption",
        ),
        (f"image,caption,{'x' * 5000}\na.jpg\n", f"line 2: expected 3 fields (image,caption,{'x' * 66}), and there"),
        ('image,caption,split\n"a\nb",one,other\na.jpg,1,\n', "'a\\nb' has the split 'other'; use train, dev or test"),
        (f"image,caption\n{'n' * 5000}.jpg,one\n", f"names is there (the first: {'n' * 80}); looked in"),
    ],
)
def test_trap_a_giant_or_broken_table_is_one_line(tmp_path, text, message):
    with pytest.raises(DatasetError) as error:
        read_dataset(make(tmp_path, text))
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


def test_trap_giant_cells_go_into_the_ledger(tmp_path):
    text = f"split,image,caption\ntrain,{'n' * 200_000}.jpg,one\ntrain,a.jpg,{'x' * 200_000}\ntrain,a.jpg,two\n"
    dataset = read_dataset(make(tmp_path, text, pictures=".", file="d.csv"))
    assert dataset.captions == ["two"]
    assert [failure[:3] for failure in dataset.failures] == [
        ("n" * 300, "dataset", "File name too long: 'one'"),
        ("a.jpg", "caption", f"caption of 200,000 characters, more than 100,000: {'x' * 60!r}"),
    ]


def test_trap_a_name_that_cannot_be_looked_up_never_ends_the_run(tmp_path, monkeypatch):
    text = (
        f"image,caption\na.jpg,one\n{'n' * 256}.jpg,two\n{'d/' * 3000}a.jpg,three\nloop/a.jpg,four\nfolder.jpg,five\n"
    )
    make(tmp_path, text + "fifo.jpg,six\n..b.jpg,seven\n", ["a.jpg", "..b.jpg"])
    (tmp_path / "Images/loop").symlink_to("loop")
    (tmp_path / "Images/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "Images/fifo.jpg")
    dataset = read_dataset(tmp_path)
    assert dataset.ids == ["a.jpg", "..b.jpg"]
    assert [failure.reason for failure in dataset.failures if failure.stage == "dataset"][:5] == [
        "File name too long: 'two'",
        "File name too long: 'three'",
        "Too many levels of symbolic links: 'four'",
        "no regular file: 'five'",
        "no regular file: 'six'",
    ]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("dataset_coco.json", "has no list of images; name a split file such as dataset_flickr8k.json, or a CSV"),
        (
            "set.json",
            "is no list of captions that is understood; it needs objects such as "
            '{"image": "a.jpg", "caption": "A dog runs ."}, one a line or in a list',
        ),
    ],
)
def test_trap_json_nested_without_end_is_one_line(tmp_path, file, message):
    (tmp_path / file).write_text("[" * 100_000)
    with pytest.raises(DatasetError) as error:
        read_dataset(tmp_path / file)
    assert str(error.value) == f"{tmp_path / file} {message}"


def test_trap_special_files_are_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "d.csv")
    for read in (read_dataset, read_captions, read_ids):
        with pytest.raises(DatasetError) as error:
            read(tmp_path if read is read_dataset else tmp_path / "d.csv")
        assert str(error.value) == f"{tmp_path / 'd.csv'} is a FIFO; a regular file is needed; name another file"
    with pytest.raises(DatasetError, match="/dev/zero is a device; a regular file is needed"):
        read_captions("/dev/zero")
    monkeypatch.setattr(text, "MAX_TEXT", 100)
    (tmp_path / "s.txt").write_text("x" * 101)
    with pytest.raises(DatasetError) as error:
        read_captions(tmp_path / "s.txt")
    assert str(error.value) == f"{tmp_path / 's.txt'} has 101 bytes; at most 100 are read; name another file"


def test_trap_open_quotes_without_end_take_no_time(tmp_path):
    lines = 'x,"open\n' + '""\n' * 50_000 + 'x,"open\n' + "words\n" * 50_000
    (tmp_path / "d.csv").write_text("image,caption\n" + lines.replace("\n", ",\n"))
    start = time.process_time()
    assert len(list(open_table(tmp_path / "d.csv").rows())) == 100_002
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("row", "file"),
    [
        (unicodedata.normalize("NFC", "Käse/é.jpg"), unicodedata.normalize("NFD", "Käse/é.jpg")),
        (unicodedata.normalize("NFD", "Käse/é.jpg"), unicodedata.normalize("NFC", "Käse/é.jpg")),
        ("a.JPG", "a.jpg"),
        ("sub/a.jpg", "Sub/A.Jpg"),
        ("a.jpg", " a.jpg"),
    ],
    ids=["composed", "decomposed", "case", "case of a folder", "blank"],
)
def test_trap_a_name_that_differs_in_form_means_the_only_file_it_can(tmp_path, row, file):
    (tmp_path / "Images" / file).parent.mkdir(parents=True)
    dataset = read_dataset(make(tmp_path, f"image,caption\n{row},one\n", [file]))
    assert (dataset.ids, dataset.paths, dataset.failures) == ([row], [f"Images/{file}"], [])
    assert dataset.notes[0] == "images whose names differ in case, Unicode form or blanks, taken: 1"


def test_trap_a_name_that_may_mean_two_files_is_left_out_and_names_of_one_file_are_one_image(tmp_path):
    make(tmp_path, "image,caption\nx.JPG,one\na.jpg,two\nA.jpg,three\nC.jpg,four\nc.JPG,five\n", ["x.jpg", "X.jpg"])
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / "Images" / name).write_bytes(b"x")
    dataset = read_dataset(tmp_path)
    assert (dataset.ids, dataset.paths) == (["a.jpg", "C.jpg"], ["Images/a.jpg", "Images/c.jpg"])
    assert (dataset.captions, dataset.image_index.tolist()) == (["two", "three", "four", "five"], [0, 0, 1, 1])
    assert dataset.failures[0].reason == "no such picture in Images/ (near is X.jpg): 'one'"
    assert sorted(failure.id for failure in dataset.failures[1:]) == ["X.jpg", "x.jpg"]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_hidden_and_system_files_are_no_images(tmp_path):
    names = ["a.jpg", "._a.jpg", ".b.jpg", "@eaDir/a.jpg", "__MACOSX/._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg"]
    names += [".thumbnails/1.png", ".Trash-1000/files/b.jpg", "sub/.DS_Store", "sub/c.jpg", "notes.txt"]
    names += ["lost+found/1.jpg", "$RECYCLE.BIN/x.jpg", "$Recycle.Bin/y.jpg", "sub/Thumbs.db", "sub/desktop.ini"]
    touch(tmp_path, *names)
    dataset = read_images(tmp_path)
    assert dataset.ids == ["a.jpg", "sub/c.jpg"]
    assert dataset.notes == [
        f"files in {tmp_path} that are no images by their names, left alone: 1 .txt",
        f"hidden images and folders in {tmp_path}, left alone: 10 (as ._a.jpg and @eaDir)",
    ]


def test_hidden_and_system_files_are_no_images_without_captions_either_and_no_tables(tmp_path):
    touch(tmp_path, "a.jpg", "._a.jpg", "@eaDir/a.jpg")
    (tmp_path / "data.csv").write_text("image,caption\na.jpg,one\n")
    (tmp_path / "._data.csv").write_bytes(b"\0\5\x16\7")
    assert read_dataset(tmp_path).ids == ["a.jpg"]
    touch(tmp_path, "Images/._b.jpg", "Images/.thumbnails/b.jpg")
    make(tmp_path, "image,caption\na.jpg,one\n", ["a.jpg", "b.jpg"])
    assert [failure.id for failure in read_dataset(tmp_path).failures] == ["b.jpg"]


def test_files_left_alone_are_counted_by_suffix(tmp_path):
    touch(tmp_path, "a.jfif", "b.JPE", "c.mpo", "d.avif", "e.jp2", "f.HEIC", "g.dib", "h.apng", "i.pgm", "j.qoi")
    touch(tmp_path, *(f"{number}.DNG" for number in range(8)), *(f"sub/{number}.txt" for number in range(4)))
    touch(tmp_path, "x.dng", "LICENSE", "NOTES", "README", *(f"v.{suffix}" for suffix in ("a", "b", "c", "d", "e")))
    dataset = read_images(tmp_path)
    assert len(dataset.ids) == 10
    assert dataset.notes == [
        f"files in {tmp_path} that are no images by their names, left alone: "
        "9 .dng, 4 .txt, 3 without suffix, 1 .a, 1 .b, 1 .c and 2 others"
    ]


def test_linked_folders_are_followed_and_each_folder_is_listed_once(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    touch(data, "a.jpg", "z/b.jpg")
    touch(outside, "c.jpg", "deep/d.jpg")
    (outside / "deep/back").symlink_to(data)  # a loop over two links
    (data / "0-to-z").symlink_to("z")  # z stays z
    (data / "m").symlink_to(outside / "deep")
    (data / "n").symlink_to(outside)
    (data / "o").symlink_to(outside)
    (data / "link.jpg").symlink_to(outside / "c.jpg")
    (data / "unmounted").symlink_to("/nowhere/at/all")
    (data / ".hidden").symlink_to(outside)
    dataset = read_images(data)
    assert dataset.ids == ["a.jpg", "link.jpg", "m/d.jpg", "n/c.jpg", "z/b.jpg"]
    assert [failure[:3] for failure in dataset.failures] == [("unmounted", "dataset", "a link that leads nowhere")]
    assert all(dataset.images.open(path) == b"x" for path in dataset.paths)
    assert read_images(data / "m").ids == ["back/a.jpg", "back/link.jpg", "back/n/c.jpg", "back/z/b.jpg", "d.jpg"]


def test_linked_folders_of_a_dataset_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "data/Images").mkdir(parents=True)
    (tmp_path / "data/Images/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/captions.txt").write_text("image,caption\nsub/a.jpg,one\n")
    dataset = read_dataset(tmp_path / "data")
    assert (dataset.ids, dataset.paths) == (["sub/a.jpg"], ["Images/sub/a.jpg"])
    assert [failure[:3] for failure in dataset.failures] == [("sub/b.jpg", "dataset", "picture without captions")]


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("*.gif", {"a.gif", "2019/raw/b.gif"}),
        ("raw", {"2019/raw/b.gif", "2019/raw/c.jpg", "raw/d.jpg"}),
        ("raw/", {"2019/raw/b.gif", "2019/raw/c.jpg", "raw/d.jpg"}),
        ("/raw", {"raw/d.jpg"}),
        ("./raw", {"raw/d.jpg"}),
        ("2019/*", {"2019/raw/b.gif", "2019/raw/c.jpg", "2019/e.jpg"}),
        ("2019/*.jpg", {"2019/e.jpg"}),
        ("2019/**/*.jpg", {"2019/raw/c.jpg", "2019/e.jpg"}),
        ("**/c.jpg", {"2019/raw/c.jpg"}),
        ("20??", {"2019/raw/b.gif", "2019/raw/c.jpg", "2019/e.jpg"}),
        ("[ac].*", {"a.gif", "2019/raw/c.jpg"}),
        (unicodedata.normalize("NFC", "Käse"), {unicodedata.normalize("NFD", "Käse/f.jpg")}),
        ("RAW", set()),
        ("9/raw", set()),
        ("", set()),
    ],
)
def test_patterns_leave_out_what_they_match_and_what_lies_below(tmp_path, pattern, excluded):
    names = {"a.gif", "2019/raw/b.gif", "2019/raw/c.jpg", "raw/d.jpg", "2019/e.jpg", "g.jpg"}
    names.add(unicodedata.normalize("NFD", "Käse/f.jpg"))
    touch(tmp_path, *names)
    assert {name for name in names if is_excluded(name, [pattern])} == excluded
    listing = list_files(tmp_path, [pattern])
    assert set(listing.names) == names - excluded
    assert listing.excluded == len(excluded)
    assert listing.unmatched == ([] if excluded else [pattern])


def test_what_is_excluded_is_counted_and_a_pattern_without_effect_is_told(tmp_path):
    touch(tmp_path, "a.jpg", "raw/b.jpg", "raw/.c.jpg", "raw/more/d.jpg", "raw/notes.txt", "e.gif")
    (tmp_path / "raw/link").symlink_to(tmp_path)
    dataset = read_images(tmp_path, ["raw", "*.gif", "holiday"])
    assert dataset.ids == ["a.jpg"]
    assert dataset.notes == [
        f"excluded images in {tmp_path}, left alone: 3",
        f"nothing in {tmp_path} matches the pattern 'holiday' to exclude",
    ]
    with pytest.raises(DatasetError, match=r"holds no images \(.*\); excluded: 4"):
        read_images(tmp_path, ["*.*", "raw"])
    touch(tmp_path, "Images/raw/c.jpg")
    make(tmp_path, "image,caption\na.jpg,one\n", ["a.jpg", "b.jpg"])
    images = read_dataset(tmp_path).images
    assert [failure.id for failure in images.images_beside({"Images/a.jpg"}, ["raw"])] == ["b.jpg"]


def test_trap_links_in_circles_and_odd_entries_among_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    dataset = read_images(tmp_path)
    assert dataset.ids == ["a.jpg"]
    assert [failure[:3] for failure in dataset.failures] == [
        ("fifo.jpg", "dataset", "no regular file"),
        ("gone.jpg", "dataset", "no such file"),
        ("self.jpg", "dataset", "Too many levels of symbolic links"),
    ]


def test_trap_a_folder_that_cannot_be_listed_goes_into_the_ledger(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"x")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [failure[:3] for failure in read_images(tmp_path).failures] == [
        ("closed", "dataset", "a folder that cannot be read: Permission denied")
    ]
    with pytest.raises(ImageSourceError) as error:
        read_images(tmp_path / "closed")
    assert str(error.value) == f"{tmp_path / 'closed'} cannot be read: Permission denied"
