"""Tables of captions in every usual form, and how their names of images lead to files. Images are never opened."""

import csv
import io
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.caption_table import open_table
from onceover.extract.dataset.cells import captions_in
from onceover.extract.dataset.delimited import KINDS, Delimited
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.table_files import split_of
from onceover.extract.import_sources import read_rows
from onceover.extract.layouts import read_dataset
from onceover.extract.listing import is_excluded
from onceover.extract.preview import preview

AB = ("a.jpg", "b.jpg")
HEADED = "CSV, images from `image`, captions from `caption`"


@pytest.mark.parametrize(
    ("file", "text", "form", "rows"),
    [
        (
            "photos.tsv",
            "filepath\ttitle\na.jpg\tA dog , running ; now .\nb.jpg\tA cat .\n",
            "TSV, images from `filepath`, captions from `title`",
            [("a.jpg", "A dog , running ; now ."), ("b.jpg", "A cat .")],
        ),
        (
            "photos.csv",
            'file_name;text\na.jpg;A dog, running .\nb.jpg;"A cat; it sits"\n',
            "table with semicolons, images from `file_name`, captions from `text`",
            [("a.jpg", "A dog, running ."), ("b.jpg", "A cat; it sits")],
        ),
        (
            "photos.csv",
            "image;caption\na.jpg;A dog; it runs\nb.jpg;A cat\n",
            "table with semicolons, images from `image`, captions from `caption`",
            [("a.jpg", "A dog; it runs"), ("b.jpg", "A cat")],
        ),
        (
            "photos.psv",
            "image|caption|split\na.jpg|A dog|train\nb.jpg|A cat|val\n",
            "table with bars, images from `image`, captions from `caption`, splits from `split`",
            [("a.jpg", "A dog", "train"), ("b.jpg", "A cat", "val")],
        ),
        (
            "x.csv",
            "image,caption\na.jpg,A\tdog; so | on\nb.jpg,B\n",
            HEADED,
            [("a.jpg", "A\tdog; so | on"), ("b.jpg", "B")],
        ),
        (
            "x.csv",
            'image, caption\na.jpg, "A dog, running"\nb.jpg, B\n',
            HEADED,
            [("a.jpg", "A dog, running"), ("b.jpg", "B")],
        ),
        ("x.csv", ",image,caption\n0,a.jpg,A dog\n1,b.jpg,B , c\n", HEADED, [("a.jpg", "A dog"), ("b.jpg", "B , c")]),
        ("x.csv", "sep=,\r\nimage,caption\r\na.jpg,A\r\n", HEADED, [("a.jpg", "A")]),
        (
            "x.csv",
            "sep=\t\nimage\tcaption\na.jpg\tA, b\n",
            "TSV, images from `image`, captions from `caption`",
            [("a.jpg", "A, b")],
        ),
        (
            "x.csv",
            "id,name,caption\n0,b.jpg,B\n1,a.jpg,A\n",
            "CSV, images from `name`, captions from `caption`",
            [("b.jpg", "B"), ("a.jpg", "A")],
        ),
        (
            "x.csv",
            "id,address,caption\n0,http://x.org/b.jpg,B\n1,http://x.org/a.jpg,A\n",
            "CSV, images from `id`, captions from `caption`",
            [("0", "B"), ("1", "A")],
        ),
        ("x.csv", '\n\nimage,caption,,\na.jpg,"A, b",,\n', HEADED, [("a.jpg", "A, b")]),
        (
            "X.CSV",
            "Image Name,Caption Text\na.jpg,A\n",
            "CSV, images from `Image Name`, captions from `Caption Text`",
            [("a.jpg", "A")],
        ),
        (
            "x.csv",
            "filename,caption_0,caption_1\na.jpg,A,B\nb.jpg,C,\n",
            "CSV, images from `filename`, captions from `caption_0` to `caption_1`",
            [("a.jpg", "A"), ("a.jpg", "B"), ("b.jpg", "C")],
        ),
        ("x.csv", 'image,caption\na.jpg,"[""A"", ""B""]"\n', HEADED, [("a.jpg", "A"), ("a.jpg", "B")]),
        ("x.csv", 'image,caption\na.jpg,"[\'A, b\', ""It\'s""]"\n', HEADED, [("a.jpg", "A, b"), ("a.jpg", "It's")]),
    ],
)
def test_a_table_with_a_header(laid, file, text, form, rows):
    table = open_table(laid({file: text}) / file)
    assert table.form == form
    read = [row._replace(caption=row.caption.strip()) for row in table.rows()]
    assert read == [Row(*row) for row in rows]


@pytest.mark.parametrize(
    ("text", "form", "rows"),
    [
        ("a.jpg,A dog\nb.jpg,A cat\n", "CSV {}, images from column 1, captions from column 2", "12"),
        ("a.jpg,A dog, running\nb.jpg,A cat, sitting\n", "CSV {}, images from column 1, captions from column 2", "12"),
        ("A dog,a.jpg\nA cat,b.jpg\n", "CSV {}, images from column 2, captions from column 1", "12"),
        ('a.jpg,"A dog, running"\nb.jpg,A cat\n', "CSV {}, images from column 1, captions from column 2", "12"),
        ("a.jpg\tA dog, running\nb.jpg\tA cat\n", "TSV {}, images from column 1, captions from column 2", "12"),
        ("a.jpg\t#0\tA dog\nb.jpg\t#1\tA cat\n", "TSV {}, images from column 1, captions from column 3", "12"),
        ("a.jpg,0,A dog, running\nb.jpg,1,A cat\n", "CSV {}, images from column 1, captions from column 3", "12"),
        ("a.jpg#0\tA dog\nb.jpg#0\tA cat\n", "TSV {}, images from column 1, captions from column 2", "12"),
        (
            "a.jpg;A dog, x\nb.jpg;A cat\n",
            "table with semicolons {}, images from column 1, captions from column 2",
            "12",
        ),
        ("a,A dog, running\nb,A cat\n", "CSV {}, images from column 1, captions from column 2", "ab"),
        ("a.jpg A dog\nb.jpg A cat\n", "text with blanks {}, images from column 1, captions from column 2", "12"),
        (
            "a.jpg,A dog,train\nb.jpg,A cat,test\n",
            "CSV {}, images from column 1, captions from column 2, splits from column 3",
            "12",
        ),
        (
            "A dog\tEin Hund da\ta.jpg\nA cat\tEine Katze\tb.jpg\n",
            "TSV {}, images from column 3, captions from column 1 to column 2",
            "1122",
        ),
    ],
)
def test_a_table_without_a_header(laid, text, form, rows):
    table = open_table(laid({"x.txt": text}) / "x.txt")
    assert table.form == form.format("without a header")
    read = list(table.rows())
    assert [row.image for row in read] == [{"1": "a.jpg", "2": "b.jpg"}.get(row, row) for row in rows]
    assert read[0].caption.startswith("A dog")
    if "running" in text:
        assert read[0].caption == "A dog, running"


def test_which_column_holds_ids_is_told_by_the_files_that_are_there(laid):
    images = ("images/0012.jpg", "images/0013.png")
    folder = laid({"x.tsv": "dog\t0012\ncat\t0013\n"}, images)
    with pytest.raises(DatasetError, match=r"holds single words, such as classes \(dog\), no captions; .*-column 1$"):
        read_dataset(folder)
    dataset = read_dataset(folder, options=ReadOptions(caption_columns=("1",)))
    assert dataset.taken == "TSV without a header, images from column 2, captions from column 1: 2 rows"
    assert (dataset.ids, dataset.paths) == (["0012", "0013"], list(images))
    assert dataset.captions == ["dog", "cat"]
    assert dataset.notes[0] == "images that are named without their suffix, taken: 2"


@pytest.mark.parametrize(
    ("file", "text", "form", "rows"),
    [
        (
            "x.jsonl",
            '{"file": "a.jpg", "captions": ["A", "B"]}\n\n{"file": "b.jpg", "captions": "C"}\n',
            "JSON lines, images from `file`, captions from `captions`",
            [("a.jpg", "A"), ("a.jpg", "B"), ("b.jpg", "C")],
        ),
        (
            "x.json",
            '{"image": "a.jpg", "caption": "A"}\n{"image": "b.jpg", "caption": "B"}\n',
            "JSON lines, images from `image`, captions from `caption`",
            [("a.jpg", "A"), ("b.jpg", "B")],
        ),
        (
            "x.json",
            '[\n {"image": "a.jpg", "caption": ["A", "B"], "image_id": 1},\n {"image": "b.jpg", "caption": "C"}]',
            "JSON list, images from `image`, captions from `caption`",
            [("a.jpg", "A"), ("a.jpg", "B"), ("b.jpg", "C")],
        ),
        (
            "x.json",
            '{"version": 1, "data": [{"image": "a.jpg", "sentences": [{"raw": "A"}]}]}',
            "JSON list `data`, images from `image`, captions from `sentences`",
            [("a.jpg", "A")],
        ),
        (
            "x.json",
            '{"train": [{"image": "a.jpg", "caption": "A"}], "val": [{"image": "b.jpg", "caption": "B"}], "n": 7}',
            "JSON lists, images from `image`, captions from `caption`, splits by list",
            [("a.jpg", "A", "train"), ("b.jpg", "B", "val")],
        ),
        (
            "x.json",
            '{"annotations": [{"image_id": 12.0, "caption": "A"}, {"image_id": 13, "caption": NaN}]}',
            "JSON list `annotations`, images from `image_id`, captions from `caption`",
            [("12", "A"), ("13", "")],
        ),
        (
            "x.json",
            '{"a.jpg": ["A", "B"], "b.jpg": "C"}',
            "JSON object, captions by the image's name",
            [("a.jpg", "A"), ("a.jpg", "B"), ("b.jpg", "C")],
        ),
        (
            "x.json",
            '{"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"0": "A", "1": "B"}}',
            "JSON columns, images from `image`, captions from `caption`",
            [("a.jpg", "A"), ("b.jpg", "B")],
        ),
        (
            "x.json",
            '{"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"1": "B", "0": "A"}}',
            "JSON columns, images from `image`, captions from `caption`",
            [("a.jpg", "A"), ("b.jpg", "B")],
        ),
        (
            "x.json",
            '{"0": {"image": "b.jpg", "caption": "B"}, "1": {"image": "a.jpg", "caption": "A"}}',
            "JSON objects by number, images from `image`, captions from `caption`",
            [("b.jpg", "B"), ("a.jpg", "A")],
        ),
        (
            "x.json",
            '{"authors": [{"name": "A"}], "data": [{"image": "a.jpg", "caption": "A"}]}',
            "JSON list `data`, images from `image`, captions from `caption`",
            [("a.jpg", "A")],
        ),
        (
            "x.json",
            '{"train": [{"image": "a.jpg", "caption": "A"}], "extra": [{"image": "b.jpg", "caption": "B"}]}',
            "JSON lists, images from `image`, captions from `caption`, splits by list",
            [("a.jpg", "A", "train"), ("b.jpg", "", "", "in the list extra, which is called after no split")],
        ),
    ],
)
def test_captions_in_json(laid, file, text, form, rows):
    table = open_table(laid({file: text}) / file)
    assert table.form == form
    assert list(table.rows()) == [Row(*row) for row in rows]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("x.csv", "bild,de\na.jpg,Hund\nb.jpg,Katze\n", "it has `bild`, `de`: say which it is with --image-column"),
        (
            "x.csv",
            "id,width,height\n1,2,3\n",
            "no column that is known to hold captions; it has `id`, `width`, `height`",
        ),
        ("x.csv", "bild,de\n12,Ein Hund\n13,Eine Katze\n", "it has `bild`, `de`: say which it is with --image-column"),
        ("x.csv", "image,text,Text\na.jpg,A,B\n", "has several columns called text; leave one"),
        ("x.jsonl", '{"image": "a.jpg", "caption": "A"}\n{"image":\n', "line 2: no JSON object"),
        ("x.json", '[{"image": ["a.jpg", "b.jpg"], "caption": "A"}]', "entry 1: ['a.jpg', 'b.jpg'], a list of several"),
        ("x.json", '[{"image": "a.jpg", "caption": "A"}', "is not JSON as a whole"),
        ("x.json", '[{"image": "a.jpg", "caption": "A"}, 7]', "entry 2: 7 is no object with an image and a caption"),
        ("x.json", '{"name": "x"}', "is no list of captions that is understood"),
        ("x.json", '{"a\tb": ["A"]}', "is no list of captions that is understood"),
        ("x.json", '{"a": {"b": [{"image": "a.jpg", "caption": "A"}]}}', "has its list 'b' deeper within it"),
        ("x.json", '{"image": {"0": "a.jpg"}, "caption": {"1": "A"}}', "has columns of different lengths or rows"),
        ("x.tsv", "image\tcaption\tn\na.jpg\tA\n", "line 2: expected 3 fields (image,caption,n), and there are 2"),
        ("x.csv", "image,caption\n,A\n", "names no image; say which column does with --image-column"),
        ("x.tsv", "a bus\thttp://a.b/1.jpg\na car\thttp://c.d/2.jpg\n", "download them first"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_in_a_line(laid, file, text, message):
    with pytest.raises(DatasetError) as error:
        read_dataset(laid({file: text}, AB) / file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_that_the_user_names(laid):
    text = "bild;de;en;teil\na.jpg;Hund;dog;train\nb.jpg;Katze;cat;test\n"
    reading = ReadOptions("bild", ("de", "en"), "teil")
    dataset = read_dataset(laid({"x.csv": text}, AB), options=reading)
    assert dataset.taken == (
        "table with semicolons, images from `bild`, captions from `de` to `en`, splits from `teil`: 4 rows"
    )
    assert dataset.captions == ["Hund", "dog", "Katze", "cat"]
    assert dataset.splits == ["train", "test"]
    with pytest.raises(DatasetError, match="has no column 'fr'; it has `bild`, `de`, `en`, `teil`"):
        read_dataset(laid({}) / "x.csv", options=ReadOptions("bild", ("fr",)))
    plain = laid({"y.tsv": "A dog\tEin Hund\ta.jpg\nA cat\tEine Katze\tb.jpg\n"}) / "y.tsv"
    assert read_dataset(plain, options=ReadOptions(caption_columns=("2",))).captions == ["Ein Hund", "Eine Katze"]
    with pytest.raises(DatasetError, match="has no header, and no column 'de'; name its columns by number: 1 to 3"):
        read_dataset(plain, options=ReadOptions(caption_columns=("de",)))


def test_the_encodings_that_excel_writes(laid):
    text = "image\tcaption\r\na.jpg\tÜbel 犬\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
        folder = laid({"x.txt": mark + text.encode(encoding)}, AB)
        assert read_dataset(folder).captions == ["Übel 犬"]
    converts = r"x\.txt is not UTF-8 \(line 2\), .*: iconv -f WINDOWS-1252 -t UTF-8 x\.txt > NEW"
    with pytest.raises(DatasetError, match=converts):
        read_dataset(laid({"x.txt": "image\tcaption\r\na.jpg\tÜbel\r\n".encode("latin-1")}, AB))


def test_a_tables_form_is_told_by_its_beginning(laid):
    text = "image,caption\n" + "".join(f"{number}.jpg,A caption of words\n" for number in range(50_000)) + "broken"
    table = open_table(laid({"x.csv": text}) / "x.csv")
    assert table.form == HEADED
    with pytest.raises(DatasetError, match="line 50002: expected 2 fields"):
        list(table.rows())


_TEXT = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=30)
_CELL = _TEXT.filter(lambda text: text.strip() and not (text.strip()[0] == "[" and text.strip()[-1] == "]"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(_CELL, st.sampled_from(["train", "val"])), min_size=1, max_size=6),
    delimiter=st.sampled_from(",\t;|"),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_csv_writers_write_is_read_as_it_was(tmp_path_factory, rows, delimiter, ending, quoting):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerow(["image", "caption", "split"])
    for number, (caption, split) in enumerate(rows):
        one_line = caption.replace("\n", " ") if delimiter != "," else caption
        writer.writerow([f"{number}.jpg", one_line, split])
    path = tmp_path_factory.mktemp("table") / "x.csv"
    path.write_bytes(file.getvalue().encode())
    table = open_table(path)
    assert table.form.startswith(KINDS[delimiter])
    read = [(row.caption.strip().replace("\n", " "), row.split) for row in table.rows()]
    assert read == [(caption.strip().replace("\n", " "), split) for caption, split in rows]


@settings(max_examples=60, deadline=None)
@given(captions=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=4))
def test_lists_of_captions_in_a_cell_are_read_as_they_were(captions):
    assert captions_in(json.dumps(captions)) == captions
    assert captions_in(json.dumps(captions, ensure_ascii=False)) == captions
    assert captions_in(repr(captions)) == captions
    assert captions_in("[" + "\n ".join(map(repr, captions)) + "]") == captions


def test_a_cell_in_brackets_that_is_no_list_is_a_caption():
    for cell in ("[MUSIC]", "[1, 2]", "['a'", "[a, b]", "['a', 7]", "['\\x']", "[" * 2000 + "]" * 2000):
        assert captions_in(cell) == [cell]


def test_trap_a_row_of_digits_or_thousands_of_columns_take_no_time(laid):
    columns = ",".join(f"caption_{number}" for number in range(3000))
    start = time.perf_counter()
    for header, cells in ((f"image,caption,{'1' * 60_000}x", "a.jpg,A,x"), (f"image,{columns}", "a.jpg" + ",A" * 3000)):
        table = open_table(laid({"x.csv": f"{header}\n{cells}\n"}) / "x.csv")
        assert next(table.rows()) == Row("a.jpg", "A")
    assert time.perf_counter() - start < 20


def test_trap_a_pattern_of_many_folders_takes_no_time():
    start = time.perf_counter()
    assert not is_excluded("a/" * 40 + "b.jpg", ["**/a/" * 12 + "z"])
    assert is_excluded("a/" * 40 + "b.jpg", ["**/a/" * 12 + "b.jpg"])
    assert time.perf_counter() - start < 5


def test_trap_a_list_without_end_takes_no_time():
    start = time.process_time()
    for cell in ("[" + "'a'   " * 20_000 + "x]", "['" + "\\" * 50_000 + "]"):
        assert captions_in(cell) == [cell]
    assert time.process_time() - start < 2


def test_rows_of_tabs_are_told_from_lines_of_a_cell(tmp_path):
    lines = ['1\t"open', '2\tclosed"', '3\t"two', 'lines"', "4\tx"]
    rows = list(Delimited("\t", ["image", "caption"], 1).rows(lines, 0, tmp_path))
    assert rows == [["1", '"open'], ["2", 'closed"'], ["3", "two\nlines"], ["4", "x"]]


# several tables


def test_the_table_of_a_usual_name_is_taken_and_what_is_left_alone_is_said(laid):
    files = {
        "captions.csv": "image,caption\na.jpg,A\n",
        "photos.csv": "image,caption\na.jpg,3\n",
        "notes.txt": "Hi, you",
    }
    dataset = read_dataset(laid(files, AB))
    assert dataset.taken == f"{HEADED}, in captions.csv: 1 rows"
    left = "tables of captions that are left alone: photos.csv; to take one, name it with --data"
    assert left in dataset.notes
    assert dataset.captions == ["A"]


def test_tables_of_which_it_is_not_known_which_is_meant_are_named(laid):
    folder = laid({"x.csv": "image,caption\na.jpg,A\n", "y.tsv": "image\tcaption\na.jpg\t3\n"}, AB)
    with pytest.raises(DatasetError) as error:
        read_dataset(folder)
    assert str(error.value) == (
        f"{folder} holds 2 tables of captions (x.csv, y.tsv); name the one to take: --data {folder / 'x.csv'}"
    )
    assert read_dataset(folder / "y.tsv").captions == ["3"]


def test_a_table_that_is_none_of_captions_is_passed_over(laid):
    files = {
        "sizes.csv": "image,width\na.jpg,3\n",
        "package.json": '{"name": "x"}',
        "y.tsv": "image\tcaption\na.jpg\tA\n",
    }
    taken = "TSV, images from `image`, captions from `caption`, in y.tsv: 1 rows"
    assert read_dataset(laid(files, AB)).taken == taken


@pytest.mark.parametrize(
    ("file", "lines", "holds", "column"),
    [
        ("md5sum.txt", "{:032x}  images/{}.jpg", "checksums", 1),
        ("SHA256SUMS.txt", "{:064X} *images/{}.jpg", "checksums", 1),
        ("images.txt", "{} {}.jpg", "numbers", 1),
        ("boxes.txt", "{1}.jpg 1{0} 10 20.5 30", "numbers", 2),
        ("labels.txt", "{1}.jpg class_{0}", "single words, such as classes", 2),
        ("labels.csv", "{1}.jpg,Käfer-{0}", "single words, such as classes", 2),
    ],
)
def test_trap_lists_of_sums_numbers_and_classes_are_no_captions(laid, file, lines, holds, column):
    names = "abcdefghij"
    images = [f"images/{name}.jpg" for name in names]
    text = "".join(lines.format(number + 10, name) + "\n" for number, name in enumerate(names))
    folder = laid({file: text}, images)
    with pytest.raises(DatasetError) as error:
        read_dataset(folder)
    assert f"{file} has no header, and its column {column}, beside the images' names, holds {holds} (" in str(
        error.value
    )
    assert str(error.value).endswith(f"say so with --caption-column {column}")
    forced = read_dataset(folder, options=ReadOptions(caption_columns=(str(column),)))
    assert len(forced.captions) == 10
    table = "image,caption\n" + "".join(f"{name}.jpg,A dog {name}\n" for name in names)
    dataset = read_dataset(laid({"texts.csv": table}))
    assert dataset.taken == f"{HEADED}, in texts.csv: 10 rows"
    with pytest.raises(DatasetError, match=r"texts.csv has no column .* it has `image`, `Bild`: .*--caption-column"):
        read_dataset(laid({"texts.csv": table.replace("caption", "Bild")}))


def test_captions_of_a_script_without_blanks_need_no_header(laid):
    dataset = read_dataset(laid({"x.txt": "a.jpg\t犬が草原を走る\nb.jpg\t猫が座っている\n"}, AB))
    assert dataset.captions == ["犬が草原を走る", "猫が座っている"]


def test_a_table_whose_caption_column_is_unknown_is_not_passed_over_without_a_word(laid):
    folder = laid({"german.csv": "image,Bildtext\na.jpg,Ein Hund\n", "tags.txt": "a.jpg red dog\nb.jpg cat, x\n"}, AB)
    with pytest.raises(DatasetError, match=r"german.csv has no column .* say which it is with --caption-column"):
        read_dataset(folder)
    dataset = read_dataset(laid({"captions.csv": "image,caption\na.jpg,A dog\n"}))
    assert dataset.captions == ["A dog"]
    assert dataset.notes[0].startswith(f"passed over: {folder / 'german.csv'} has no column that is known to hold")


def test_tables_for_each_split_are_one_dataset(laid):
    files = {f"{name}.csv": f"image,caption\n{name}.jpg,{name}\n" for name in ("train", "val", "test")}
    dataset = read_dataset(laid(files, [f"images/{name}.jpg" for name in ("train", "val", "test")]))
    assert dataset.ids == ["images/train.jpg", "images/val.jpg", "images/test.jpg"]
    assert (dataset.captions, dataset.splits) == (["train", "val", "test"], ["train", "dev", "test"])
    assert dataset.taken == f"{HEADED}, in train.csv, val.csv, test.csv: 3 rows"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train_clean", "val", "test"), ["train", "dev", "test"]),
        (("train", "val", "test_public"), ["train", "dev", "test"]),
        (("train", "dev_seen", "dev_unseen", "test_seen"), ["train", "dev", "dev", "test"]),
        (("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen"), ["train", "dev", "dev", "test", "test"]),
        (("train_v2", "photos_val"), ["train", "dev"]),
    ],
)
def test_tables_of_the_same_columns_need_no_parallel_names_to_be_one_dataset(laid, names, splits):
    files = {f"{name}.csv": f"image,caption\n{name}.jpg,{name}\n" for name in names}
    dataset = read_dataset(laid(files, [f"images/{name}.jpg" for name in names]))
    assert dataset.captions == list(names)
    assert dataset.splits == splits


@pytest.mark.parametrize(
    "names",
    [
        ("train", "train_clean", "val", "test"),
        ("train_de", "train_en", "val_de", "val_en"),
        ("val", "val_small", "train_x"),
        ("val", "valid", "train"),
        ("eval", "train"),
    ],
)
def test_tables_of_a_split_that_may_be_two_forms_of_it_are_named(laid, names):
    files = {f"{name}.csv": f"image,caption\n{name}.jpg,{name}\n" for name in names}
    folder = laid(files, [f"images/{name}.jpg" for name in names])
    with pytest.raises(DatasetError) as error:
        read_dataset(folder)
    listed = ", ".join(f"{name}.csv" for name in sorted(names))
    assert f"{folder} holds {len(names)} tables of captions ({listed}); name the one to take" in str(error.value)


def test_a_table_of_other_columns_is_none_of_a_split(laid):
    files = {f"{name}.csv": f"image,caption\n{name}.jpg,{name}\n" for name in ("train", "val")}
    files["val_answers.csv"] = "image_id,text\nval,A dog\n"
    dataset = read_dataset(laid(files, ["train.jpg", "val.jpg"]))
    assert dataset.captions == ["train", "val"]
    assert "tables of captions that are left alone: val_answers.csv; to take one, name it with --data" in dataset.notes


def test_blips_lists_are_one_dataset(laid):
    train = [{"caption": "A dog .", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"}]
    val = [{"image": "val2014/COCO_val2014_000000184613.jpg", "caption": ["A child .", "A kid ."]}]
    files = {"coco_karpathy_train.json": json.dumps(train), "coco_karpathy_val.json": json.dumps(val)}
    dataset = read_dataset(laid(files, [train[0]["image"], val[0]["image"]]))
    assert dataset.ids == [train[0]["image"], val[0]["image"]]
    assert dataset.captions == ["A dog .", "A child .", "A kid ."]
    assert dataset.splits == ["train", "dev"]


def test_an_image_in_the_tables_of_two_splits_is_a_hard_error(laid):
    files = {"train.csv": "image,caption\na.jpg,A\n", "test.csv": "image,caption\na.jpg,B\n"}
    with pytest.raises(DatasetError, match="is in two splits"):
        read_dataset(laid(files, ["images/a.jpg"]))


def test_folders_for_each_split_with_equal_names(laid):
    files = {"train/labels.csv": "image,caption\na.jpg,A\n", "test/labels.csv": "image,caption\na.jpg,B\n"}
    dataset = read_dataset(laid(files, ["train/images/a.jpg", "test/images/a.jpg"]))
    assert dataset.ids == dataset.paths == ["train/images/a.jpg", "test/images/a.jpg"]
    assert (dataset.captions, dataset.splits) == (["A", "B"], ["train", "test"])


def test_trap_rows_whose_images_are_not_there_are_left_out_with_a_reason_each(laid):
    files = {"train.csv": "image,caption\na.jpg,A\n", "val.csv": "image,caption\nz.jpg,B\n/far/z.jpg,C\n"}
    folder = laid(files, ["train/a.jpg"])
    dataset = read_dataset(folder)
    assert dataset.ids == ["train/a.jpg"]
    assert dataset.notes[0] == (
        f"none of the 2 images that {folder / 'val.csv'} names is there; its rows (2) are left out "
        "(if they lie elsewhere, name the folder above all images with --images-root)"
    )
    assert dataset.notes[1] == "no split lists found: split by image with seed 0 (1 train, 0 dev, 0 test)"
    assert [failure[:3] for failure in dataset.failures] == [
        ("z.jpg", "dataset", "no such picture, nor any other of val.csv: 'B'"),
        ("/far/z.jpg", "dataset", "no such picture, nor any other of val.csv: 'C'"),
    ]
    (folder / "train/a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"none of the images that .*train\.csv names is there"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [("train_images", ""), ("train_images", "/data/im/"), ("all of them", ""), ("img", "/data/im/")],
)
def test_trap_the_images_of_all_splits_may_lie_in_one_folder(laid, prefix, folder):
    names = ("train", "val", "test")
    files = {f"{name}.csv": f"image,caption\n{prefix}{name}_1.jpg,{name}\n" for name in names}
    dataset = read_dataset(laid(files, [f"{folder}/{name}_1.jpg" for name in names]))
    assert dataset.paths == [f"{folder}/{name}_1.jpg" for name in names]
    assert (dataset.splits, dataset.failures) == (["train", "dev", "test"], [])


def test_a_row_in_two_tables_of_a_split_counts_once(laid):
    files = {"train.csv": "image,caption\na.jpg,A\n", "dev_seen.csv": "image,caption\nb.jpg,B\n"}
    files["dev_unseen.csv"] = "image,caption\nb.jpg,B\nb.jpg,C\n"
    dataset = read_dataset(laid(files, AB))
    assert dataset.captions == ["A", "B", "C"]
    assert [failure[:3] for failure in dataset.failures] == [
        ("b.jpg", "dataset", "the row is in dev_seen.csv too: 'B'")
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("captions_train2017", "train"),
        ("flickr30k_val", "dev"),
        ("Validation", "dev"),
        ("test_set", "test"),
        ("training", "train"),
        ("latest", ""),
        ("train_val", ""),
        ("trains", ""),
    ],
)
def test_the_split_that_a_name_tells_of(name, split):
    assert split_of(name) == split


# names of images


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("/home/x/data/", "/home/x/data/"),
        ("C:\\Users\\me\\", "C:/Users/me/"),
        ("../../project/", "../../project/"),
        ("datasets/mine/", "datasets/mine/"),
    ],
)
def test_paths_of_another_machine_are_taken_below_the_folder_and_said(laid, prefix, shown):
    text = f"image,caption\n{prefix}images/a.jpg,A\n{prefix}images/b.jpg,B\n,no name\n{prefix}images/c.jpg,C\n"
    folder = laid({"x.csv": text}, ["images/a.jpg", "images/b.jpg"])
    dataset = read_dataset(folder)
    assert dataset.ids == dataset.paths == ["images/a.jpg", "images/b.jpg"]
    assert dataset.notes[0] == f"images' names begin with {shown}, which is left out: taken from {folder}"
    assert [failure[:3] for failure in dataset.failures] == [
        ("row 3", "dataset", "no picture is named: 'no name'"),
        ("images/c.jpg", "dataset", "no such picture in ./: 'C'"),
    ]


def test_absolute_paths_below_the_folder(laid, tmp_path):
    text = f"image,caption\n{tmp_path}/images/a.jpg,A\n./images/b.jpg,B\n"
    dataset = read_dataset(laid({"x.csv": text}, ["images/a.jpg", "images/b.jpg"]))
    assert dataset.ids == ["images/a.jpg", "images/b.jpg"]
    assert (dataset.failures, len(dataset.notes)) == ([], 1)


def test_images_root_is_where_names_start(laid, tmp_path):
    folder = laid({"tables/x.csv": "image,caption\na.jpg,A\n"}, ["far/away/a.jpg"])
    dataset = read_dataset(folder / "tables/x.csv", options=ReadOptions(images_root=folder / "far/away"))
    assert dataset.images.describe(dataset.paths[0]) == str(folder / "far/away/a.jpg")


def test_the_one_folder_that_has_the_first_images(laid):
    folder = laid({"x.csv": "image,caption\na.jpg,A\nz.jpg,B\n"}, ["one/far/a.jpg", "two/c.jpg"])
    assert read_dataset(folder).paths == ["one/far/a.jpg"]
    laid({}, ["two/a.jpg"])
    with pytest.raises(DatasetError) as error:
        read_dataset(folder)
    assert str(error.value) == (
        f"images that {folder / 'x.csv'} names are in {folder / 'one/far'} and {folder / 'two'}; "
        "say which to take with --images-root"
    )


def test_of_folders_that_have_images_the_one_that_has_them_all_is_taken(laid):
    folder = laid({"x.csv": "image,caption\na.jpg,A\nb.jpg,B\n"}, ["pics/a.jpg", "pics/b.jpg", "pics/sub dir/a.jpg"])
    assert read_dataset(folder).paths == ["pics/a.jpg", "pics/b.jpg"]
    laid({}, ["pics/sub dir/b.jpg"])
    with pytest.raises(DatasetError, match="say which to take with --images-root"):
        read_dataset(folder)


def test_trap_names_that_differ_in_case_mean_the_only_file(laid):
    text = "image,caption,split\nphoto0.jpg,A,train\nPhoto0.JPG,B,train\nPHOTO1.jpg,C,dev\nphoto1.JPG,D,dev\n"
    folder = laid({"x.csv": text}, ["images/Photo0.JPG", "images/Photo1.jpg"])
    dataset = read_dataset(folder)
    assert (dataset.ids, dataset.paths) == (["Photo0.JPG", "PHOTO1.jpg"], ["images/Photo0.JPG", "images/Photo1.jpg"])
    assert (dataset.captions, dataset.image_index.tolist()) == (["A", "B", "C", "D"], [0, 0, 1, 1])
    assert (dataset.splits, dataset.failures) == (["train", "dev"], [])
    assert "images whose names are written in several ways, each taken as one image: 2" in dataset.notes
    with pytest.raises(DatasetError, match="is in two splits"):
        read_dataset(laid({"x.csv": text.replace("A,train", "A,test")}))


def test_a_drives_letter_may_be_written_in_both_cases(laid):
    text = "path,text\nd:\\Fotos\\01\\a.jpg,A\nD:\\Fotos\\02\\a.jpg,B\n"
    folder = laid({"x.csv": text}, ["Fotos/01/a.jpg", "Fotos/02/a.jpg"])
    assert read_dataset(folder).ids == ["Fotos/01/a.jpg", "Fotos/02/a.jpg"]
    dataset = read_dataset(folder, options=ReadOptions(images_root=folder / "Fotos"))
    assert dataset.paths == ["01/a.jpg", "02/a.jpg"]


def test_names_without_a_suffix_mean_the_only_file_of_that_stem_or_number(laid):
    text = "image_id,caption\nx,A\ny,B\n42,C\n0007,D\n7,E\n"
    images = ["images/x.jpg", "images/y.jpg", "images/y.png", "images/000042.jpg", "images/0007.jpg"]
    dataset = read_dataset(laid({"x.csv": text}, images))
    assert dict(zip(dataset.ids, dataset.paths, strict=True)) == {"x": "images/x.jpg", "42": "images/000042.jpg"}
    assert [failure[:3] for failure in dataset.failures] == [
        ("y", "dataset", "no such picture in images/ (near is y.jpg): 'B'"),
        ("0007", "dataset", "no such picture in images/ (near is 0007.jpg): 'D'"),
        ("7", "dataset", "no such picture in images/ (near is 0007.jpg): 'E'"),
    ]


def test_names_that_are_quoted_as_in_addresses(laid):
    dataset = read_dataset(laid({"x.csv": "image,caption\na%20b.jpg,A\nc%20d.jpg,C\n"}, ["a b.jpg", "c%20d.jpg"]))
    assert dataset.paths == ["a b.jpg", "c%20d.jpg"]
    assert dataset.notes[0] == "images whose names are quoted as in addresses, taken: 1"


def test_a_table_in_a_folder_of_annotations(laid):
    folder = laid({"annotations/x.csv": "image,caption\na.jpg,A\n"}, ["images/a.jpg"])
    assert read_dataset(folder).paths == ["images/a.jpg"]
    assert read_dataset(folder / "annotations/x.csv").paths == ["images/a.jpg"]
    laid({}, ["annotations/a.jpg"])
    assert read_dataset(folder / "annotations/x.csv").paths == ["a.jpg"]


def test_folders_that_hold_nothing_but_a_folder_are_entered(laid):
    folder = laid({"archive/photos/x.csv": "image,caption\na.jpg,A\n"}, ["archive/photos/a.jpg"])
    dataset = read_dataset(folder)
    assert (dataset.root, dataset.named) == (folder / "archive/photos", folder)


# what is not understood


@pytest.mark.parametrize(
    ("files", "images", "message"),
    [
        ({}, (), "{} is empty; name the folder or file of a dataset"),
        (
            {},
            AB,
            "{0} holds images without captions (a.jpg, b.jpg); index them with "
            "onceover index --run RUN --images {0}, or write their captions "
            "into captions.csv, a line for each: image,caption",
        ),
        (
            {"README.txt": "Hello, you.\n"},
            [f"photos/{number}.jpg" for number in range(1200)],
            "{} holds no captions in a form that is understood; there is README.txt, 1,200 .jpg in photos/. "
            "The nearest form is a table of images and captions beside the images (.csv, .tsv, .txt, .json, .jsonl): "
            "image,caption and below it a.jpg,A dog runs over a meadow . (docs/data.md has all forms)",
        ),
        (
            {"photos.csv": "name,width\na.jpg,3\n"},
            AB,
            "{}/photos.csv has no column that is known to name the images; it has `name`, `width`: "
            "say which it is with --image-column",
        ),
    ],
)
def test_what_is_not_understood_is_listed_with_the_nearest_form(laid, tmp_path, files, images, message):
    laid(files, images, tmp_path)
    with pytest.raises(DatasetError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == message.format(tmp_path)


def test_info_shows_what_is_taken(laid, tmp_path):
    shown = preview(laid({"x.tsv": "filepath\ttitle\na.jpg\tA dog .\nb.jpg\tA cat .\n"}, AB))
    assert "taken     TSV, images from `filepath`, captions from `title`: 2 rows" in shown.splitlines()
    assert "  a.jpg: A dog ." in shown.splitlines()


def test_import_reads_tables_of_all_forms(laid):
    folder = laid(
        {"x.tsv": "bild\ten\na.jpg\tA\n", "y.jsonl": '{"image": "a.jpg", "caption": ["A", "B"], "split": "val"}\n'}
    )
    assert read_rows(folder / "x.tsv", ReadOptions("bild", ("en",))) == [Row("a.jpg", "A")]
    assert read_rows(folder / "y.jsonl") == [Row("a.jpg", "A", "val"), Row("a.jpg", "B", "val")]


@pytest.mark.parametrize(
    ("file", "text", "form"),
    [
        ("x.csv", "image,title,description\na.jpg,a.jpg,A dog .\nb.jpg,b.jpg,A cat .\n", "CSV"),
        ("x.tsv", "image\tcomments\tcaption_text\na.jpg\t3\tA dog .\nb.jpg\t\tA cat .\n", "TSV"),
        (
            "x.jsonl",
            '{"image": "a.jpg", "title": null, "caption_0": "A dog ."}\n{"image": ["b.jpg"], "caption_0": "A cat ."}\n',
            "JSON lines",
        ),
    ],
)
def test_a_column_without_texts_holds_no_captions(laid, file, text, form):
    dataset = read_dataset(laid({file: text}, AB))
    assert dataset.captions == ["A dog .", "A cat ."]
    assert dataset.taken.startswith(f"{form}, images from `image`, captions from `")


def test_columns_with_other_texts_are_told(laid):
    text = "image,title,description,alt\na.jpg,Dog,A dog .,Dog\nb.jpg,Cat,A cat .,Cat\n"
    folder = laid({"x.csv": text}, AB)
    told = "captions from `title`, not taken: `description`; name what to take with --caption-column: 2 rows"
    assert read_dataset(folder).taken.endswith(told)
    chosen = read_dataset(folder, options=ReadOptions(caption_columns=("description",)))
    assert chosen.taken == "CSV, images from `image`, captions from `description`: 2 rows"


def test_captions_that_may_be_several_are_told_and_tuples_are_several(laid):
    rows = [["image", "caption"], ["a.jpg", "A dog .\nDogs ."], ["b.jpg", "A cat . | Cats ."]]
    rows.append(["b.jpg", "('A cat .', \"A cat's .\", 'A cat .')"])
    rows.append(["b.jpg", "(a cat)"])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    dataset = read_dataset(laid({"x.csv": text.getvalue()}, AB))
    assert dataset.captions == ["A dog .\nDogs .", "A cat . | Cats .", "A cat .", "A cat's .", "A cat .", "(a cat)"]
    several = 'each is taken as one; where it is several, write a row for each, or a list: ["A dog runs .", "A dog ."]'
    assert dataset.notes[:3] == [
        f"captions with line breaks in them: 1; {several}",
        f"captions with bars in them: 1; {several}",
        "captions that repeat one of the same image, taken all the same: 1",
    ]


def test_objects_by_the_images_name(laid):
    content = {"a.jpg": {"url": "x", "captions": ["A dog .", "Dog ."], "split": "train"}}
    content["b.jpg"] = {"url": "y", "captions": "A cat .", "split": "val"}
    dataset = read_dataset(laid({"x.json": json.dumps(content)}, AB))
    assert (dataset.captions, dataset.splits) == (["A dog .", "Dog .", "A cat ."], ["train", "dev"])
    with pytest.raises(DatasetError, match="`url`, `said`: say which it is with --caption-column"):
        read_dataset(laid({"x.json": json.dumps({"a.jpg": {"url": "x", "said": "A dog ."}})}, AB))


def test_numbers_with_a_point_are_the_names_of_images(laid):
    dataset = read_dataset(laid({"x.csv": "image_id,caption\n1.0,A dog .\n20.0,A cat .\n"}, ("001.jpg", "20.jpg")))
    assert dataset.paths == ["001.jpg", "20.jpg"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t.json": '{"data": [{"image": "a.jpg", "said": "A dog ."}]}', "v.json": "{}"}, "`image`, `said`: say which"),
        ({f"{name}.json": '[{"label": "dog"}]' for name in range(9)}, "holds no captions in a form that is understood"),
        ({"captions.xlsx": "x"}, "holds captions.xlsx, which is not read as it is; save the sheet as CSV"),
        ({"captions.csv.gz": "x"}, "holds captions.csv.gz, which is not read as it is; unpack it"),
        ({"train.txt": "images/a.jpg 0\nimages/b.jpg 1\n"}, "and there are 2: 'images/a.jpg 0'; each row needs"),
    ],
)
def test_a_folder_of_nearly_captions_says_what_to_do(laid, files, message):
    with pytest.raises(DatasetError, match=message):
        read_dataset(laid(files, AB))


def test_an_address_in_an_error_is_as_it_is_written(laid):
    with pytest.raises(DatasetError, match=r"by their addresses \(https://a\.b/1\.jpg\); download them"):
        read_dataset(laid({"x.tsv": "A dog .\thttps://a.b/1.jpg\nA cat .\thttps://a.b/2.jpg\n"}, ("images/3.jpg",)))


@pytest.mark.parametrize("folder", ["images", "mine"])
def test_a_few_images_that_lie_elsewhere_do_not_choose_the_folder(laid, folder):
    names = [f"{number}.jpg" for number in range(4)]
    table = "image,caption\n" + "".join(f"{name},Of {name}\n" for name in names)
    dataset = read_dataset(laid({"x.csv": table}, ["0.jpg", *(f"{folder}/{name}" for name in names)]))
    assert dataset.paths == [f"{folder}/{name}" for name in names]
    assert dataset.failures == []


def test_rows_without_an_image_are_in_no_split(laid):
    table = "image,caption,split\na.jpg,A,train\n,B,train\n,C,test\nb.jpg,D,test\n"
    dataset = read_dataset(laid({"x.csv": table}, AB))
    assert (dataset.ids, dataset.splits) == (list(AB), ["train", "test"])
    assert [failure.id for failure in dataset.failures] == ["row 2", "row 3"]


def test_a_text_beside_an_image_is_no_table(laid):
    dataset = read_dataset(laid({"a.txt": "photo, text, girl", "b.txt": "photo, text\n"}, AB))
    assert (dataset.layout, dataset.captions) == ("text beside", ["photo, text, girl", "photo, text"])


@pytest.mark.parametrize("content", [b"", b"\x1f\x8bpacked", b"PAR1 damaged"])
@pytest.mark.parametrize("name", ["old/backup.tar", "old/features.parquet"])
def test_files_of_another_kind_that_cannot_be_read_do_not_hide_a_dataset(laid, name, content):
    texts = laid({"annotations/x.csv": "image,caption\na.jpg,A dog .\n", "old/note.md": ""}, AB)
    (texts / name).write_bytes(content)
    assert read_dataset(texts).captions == ["A dog ."]
