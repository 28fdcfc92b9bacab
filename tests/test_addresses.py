"""Addresses instead of paths: an object store (moto's, on this machine), memory, and a web server."""

import io
import pickle
import socket
import sys
import tarfile
import threading
import unicodedata
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import requests
from conftest import object_store, start_drivers_anew
from PIL import Image

from onceover.base import drivers
from onceover.base.addresses import Address, is_address, path_of, read_range
from onceover.base.drivers import AddressError
from onceover.base.files import FileError, read_bytes
from onceover.extract.address_images import AddressImages, image_folder
from onceover.extract.dataset.alone import read_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import read_dataset
from onceover.extract.listing import ImageSourceError, list_files
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore
from onceover.extract.verify import verify_sample
from onceover.heads.completion import check_completion, dataset_of

BUCKET = "s3://bucket"


@pytest.fixture(scope="module")
def server():
    """The address of an object store, whose credentials and address are in the environment."""
    with object_store("bucket") as endpoint:
        yield endpoint


@pytest.fixture
def put(server):
    """Puts objects into the bucket: the key and the content of each."""

    def write(contents: dict[str, bytes]) -> None:
        for key, content in contents.items():
            requests.put(f"{server}/bucket/{key}", data=content, timeout=10).raise_for_status()

    return write


@pytest.fixture(scope="module")
def dataset(server, drawn):
    """The address of the drawn dataset."""
    for path in sorted(drawn.rglob("*")):
        if path.is_file():
            key = f"drawn/{path.relative_to(drawn).as_posix()}"
            requests.put(f"{server}/bucket/{key}", data=path.read_bytes(), timeout=10).raise_for_status()
    return f"{BUCKET}/drawn"


@pytest.fixture
def calls(server, monkeypatch):
    """The requests to the object store by their kinds."""
    import s3fs

    counted: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def counting(driver, method, *given, **named):
        counted[method] += 1
        return await call(driver, method, *given, **named)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    return counted


@pytest.fixture
def anew(monkeypatch):
    """Drivers that are made anew, as a new process makes them."""
    start_drivers_anew()
    yield start_drivers_anew
    monkeypatch.undo()
    start_drivers_anew()


@pytest.fixture
def memory():
    """The address of an empty folder in memory."""
    driver = fsspec.filesystem("memory")
    yield "memory://data"
    driver.store.clear()
    driver.pseudo_dirs[:] = [""]


def write(address: str, content: bytes) -> None:
    with fsspec.open(address, "wb") as file:
        file.write(content)


def jpeg(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def web(tmp_path):
    """A web server: the folder that it serves, the address of that, and the paths that were asked for."""
    folder = tmp_path / "web"
    folder.mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, _format, *arguments):
            asked.append(str(arguments[0]))

        def end_headers(self):
            self.send_header("ETag", '"1"')
            super().end_headers()

        def list_directory(self, _path):
            self.send_error(403)

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()
    thread.join()
    running.server_close()


def values(path: Path) -> dict:
    """What a store holds of its dataset, whatever place that lies in."""
    with FeatureStore(path) as store:
        return {
            "images": store.image_features[:].tobytes(),
            "texts": store.text_features[:].tobytes(),
            "ids": store.image_ids,
            "paths": store.image_paths,
            "splits": store.image_splits,
            "captions": store.captions,
            "sha256": store.sha256,
            "fingerprints": store.fingerprints,
            "failures": [failure[:3] for failure in store.failures],
        }


def test_a_dataset_in_a_bucket_has_the_features_of_its_folder_by_one_request_an_image(
    dataset, store_file, extract_config, tmp_path, calls
):
    read = read_dataset(dataset)
    assert isinstance(read.images, AddressImages)
    path = tmp_path / "s.h5"
    looking = calls.total()
    assert looking <= 40
    extract(read, path, extract_config, device="cpu")
    assert calls["get_object"] <= 60 + 3  # the captions twice, and the first image to check the encoder
    assert calls.total() - looking <= 60 + 1
    assert values(path) == values(store_file)
    with FeatureStore(path) as store:
        assert (store.provenance["data"], store.provenance["named"]) == (dataset, dataset)
        assert verify_sample(store, 3, device="cpu")[1] == []
        check_completion(store, dataset, tmp_path / "out")
        again = dataset_of(store, dataset)
        assert again.images.stat(again.paths[0])[1] > 10**18
        assert str(again.root) == dataset
    calls.clear()
    assert extract(read_dataset(dataset), path, extract_config, device="cpu").up_to_date
    assert calls["get_object"] <= 2


def test_processes_that_were_forked_read_images_at_an_address_too(dataset, store_file, extract_config, tmp_path):
    read = read_dataset(dataset).first(16)
    assert pickle.loads(pickle.dumps(read.images)).open(read.paths[0]) == read.images.open(read.paths[0])
    extract(read, tmp_path / "s.h5", extract_config, device="cpu", engine="processes")
    with FeatureStore(tmp_path / "s.h5") as some, FeatureStore(store_file) as whole:
        assert some.sha256 == whole.sha256[:16]
        np.testing.assert_array_equal(some.image_features[:], whole.image_features[:16])


def test_images_of_a_bucket_are_indexed_and_searched_by_an_image_at_an_address(
    put, run, run_dir, drawn, tmp_path, calls
):
    names = sorted(path.name for path in (drawn / "images").glob("*.jpg"))[:4]
    images = {name: (drawn / "images" / name).read_bytes() for name in names}
    put({f"photos/in/{name}": content for name, content in images.items()})
    put({"photos/.hidden/a.jpg": b"x", "photos/._b.jpg": b"x", "photos/notes.md": b"x", "photos/in/": b""})
    index = tmp_path / "photos.index"
    call = ("index", "--run", run_dir, "--images", f"{BUCKET}/photos", "--index", index)
    run(*call)
    found = run("search", "--index", index, "--query", "a red circle", "--format", "jsonl")
    assert f'"path": "{BUCKET}/photos/in/' in found.stdout
    query = f"{BUCKET}/photos/in/{names[0]}"
    by_image = ("search", "--run", run_dir, "--mode", "image2text", "--query")
    hits = run(*by_image, query, "--out", tmp_path / "hits.png")
    assert hits.stdout == run(*by_image, drawn / "images" / names[0]).stdout
    assert (tmp_path / "hits.png").stat().st_size > 1000
    calls.clear()
    run(*call)
    assert calls["get_object"] == 0


def test_a_listing_leaves_out_what_is_hidden_and_the_entries_of_folders(put):
    put({"mixed/in/": b"", "mixed/": b"", "mixed/in/a.jpg": jpeg(), "mixed/@eaDir/a.jpg": b"x", "mixed/b.txt": b"x"})
    read = read_images(f"{BUCKET}/mixed")
    assert (read.ids, read.failures) == (["in/a.jpg"], [])
    assert read.notes == [
        f"files in {BUCKET}/mixed that are no images by their names, left alone: 1 .txt",
        f"hidden images and folders in {BUCKET}/mixed, left alone: 1 (as ._a.jpg and @eaDir)",
    ]
    assert read.images.stat("in/a.jpg")[0] == len(jpeg())


def test_patterns_exclude_at_an_address_what_they_exclude_in_a_folder(memory, tmp_path):
    names = ["a.jpg", "a.gif", "raw/b.jpg", "raw/.c.jpg", "2019/raw/d.jpg", "2019/e.jpg", ".f.jpg", "g.txt"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"x")
        write(f"{memory}/{name}", b"x")
    for exclude in ([], ["raw"], ["*.gif", "2019/**/d.jpg"], ["none", "2019"]):
        assert list_files(path_of(memory), exclude) == list_files(tmp_path / "data", exclude)


def test_near_names_are_taken_at_an_address_as_in_a_folder(memory, tmp_path):
    names = {"Images/A.JPG": "a.jpg", "Images/é.jpg": unicodedata.normalize("NFD", "é.jpg"), "Images/c.jpg": "c.jpg"}
    folder = tmp_path / "data"
    (folder / "Images").mkdir(parents=True)
    table = "\n".join(["image,caption", *(f"{name},A thing ." for name in [*names.values(), "gone.jpg"])]).encode()
    for name, content in {**dict.fromkeys(names, jpeg()), "captions.txt": table, "Images/d.jpg": jpeg()}.items():
        (folder / name).write_bytes(content)
        write(f"{memory}/{name}", content)
    here = read_dataset(folder)
    there = read_dataset(memory)
    assert there.paths == list(names) == here.paths
    assert (there.ids, there.failures) == (here.ids, here.failures)
    assert here.notes[0] == there.notes[0] == "images whose names differ in case, Unicode form or blanks, taken: 2"
    elsewhere = read_dataset(folder / "captions.txt", options=ReadOptions(images_root=path_of(f"{memory}/Images")))
    assert elsewhere.paths == [name.removeprefix("Images/") for name in names]
    assert elsewhere.images.open("A.JPG") == jpeg()


def test_captions_of_an_import_can_lie_at_an_address(memory, run, tmp_path, fails):
    np.save(tmp_path / "i.npy", np.eye(3, 8, dtype=np.float32))
    write(f"{memory}/captions.csv", b"image,caption\na.jpg,A dog .\nb.jpg,A cat .\nc.jpg,A cow .\n")
    features = ("--image-features", tmp_path / "i.npy", "--text-features", tmp_path / "i.npy")
    run("import", *features, "--captions", f"{memory}/captions.csv", "--store", tmp_path / "s.h5")
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.image_ids == ["a.jpg", "b.jpg", "c.jpg"]
        assert store.provenance["data"] == "memory://data"


@pytest.mark.parametrize("option", ["--text-features", "--image-features"])
def test_what_needs_a_path_refuses_an_address(run, tmp_path, option):
    options = {"--store": "s.h5", "--image-features": "i.npy", "--text-features": "t.npy", "--captions": "c.csv"}
    options[option] = "s3://bucket/x"
    result = run("import", *(part for pair in options.items() for part in pair), code=2)
    assert "'s3://bucket/x' is an address, and a path of this machine is needed; download it" in result.stderr


def test_a_web_server_gives_images_by_the_very_names_in_the_table(web, run, tmp_path):
    folder, address, asked = web
    names = ["a b.jpg", "ü#1.jpg", "sub/c.jpg"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg())
    lines = ["image,caption", *(f"{name},A thing ." for name in [*names, "B.jpg"])]
    (folder / "captions.csv").write_text("\n".join(lines))
    read = read_dataset(f"{address}/captions.csv")
    assert read.ids == names
    assert [failure[:3] for failure in read.failures] == [("B.jpg", "dataset", "no such picture in ./: 'A thing .'")]
    size, mtime_ns = read.images.stat("ü#1.jpg")
    assert (size, mtime_ns > 0) == (len(jpeg()), True)
    assert read.images.open("ü#1.jpg") == jpeg()
    assert sum("HEAD /a%20b.jpg" in line for line in asked) == 1
    shown = run("info", "--data", f"{address}/captions.csv")
    assert "images    3" in shown.stdout


def test_a_web_server_that_gives_no_parts_of_files_is_told_of(web):
    folder, address, _ = web
    (folder / "x.tar").write_bytes(bytes(100))
    assert read_range(f"{address}/x.tar", 0, 10) == bytes(10)
    with pytest.raises(OSError, match="gives files only as a whole; download it"):
        read_range(f"{address}/x.tar", 10, 10)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_range(f"{address}/none.tar", 0, 10)


def test_a_web_address_that_is_no_file_is_refused_in_a_line(web, fails):
    _, address, _ = web
    assert fails("info", "--data", f"{address}/none") == (
        f"{address}/none is no file of a known form; web servers list no folders: name the captions file"
    )
    assert fails("info", "--data", f"{address}/none.csv").startswith(f"{address}/none.csv is no file")


def test_parts_of_a_file_are_downloaded_and_not_the_whole(put, calls, tmp_path):
    content = bytes(range(256)) * 4
    put({"parts/x.bin": content, "parts/empty": b""})
    (tmp_path / "x.bin").write_bytes(content)
    for at in (f"{BUCKET}/parts/x.bin", str(tmp_path / "x.bin")):
        assert read_range(at, 255, 3) == b"\xff\x00\x01"
        assert read_range(at, 1020, 100) == content[1020:]
        assert read_range(at, 5000, 10) == b""
        assert read_bytes(at, 1024) == content
        with pytest.raises(FileError, match="1,02[34]"):
            read_bytes(at, 1023)
    assert read_bytes(f"{BUCKET}/parts/empty", 10) == b""


def test_a_tar_at_an_address_is_read_by_few_requests(put, calls):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(40):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes([number]) * 1000))
    put({"tars/x.tar": buffer.getvalue()})
    at = path_of(f"{BUCKET}/tars/x.tar")
    with at.open("rb") as file, tarfile.open(fileobj=file) as tar:
        members = {member.name: member.offset_data for member in tar}
    assert len(members) == 40
    assert calls["get_object"] <= 2
    assert read_range(at, members["7.jpg"], 1000) == bytes([7]) * 1000


def test_tars_at_an_address_are_a_dataset_by_their_folder_a_name_or_a_pattern(memory):
    contents = {}
    for number, color in enumerate(("red", "green", "blue")):
        contents[f"{number}.jpg"] = jpeg(color)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in ((f"{number}.jpg", jpeg(color)), (f"{number}.txt", f"all {color}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        write(f"{memory}/00{number}.tar", buffer.getvalue())
    for name, count in (("", 3), ("{000..002}.tar", 3), ("00[01].tar", 2), ("001.tar", 1)):
        dataset = read_dataset(f"{memory}/{name}")
        assert len(dataset.ids) == count, name
        for key in dataset.paths:
            assert dataset.images.open(key) == contents[key.rpartition("/")[2]]
        assert dataset.captions[0] == ("all green" if name == "001.tar" else "all red")


def test_the_methods_of_an_address_are_those_of_a_path(memory):
    write(f"{memory}/a/one.csv", b"1")
    write(f"{memory}/a/b/two.CSV", b"two\n")
    at = path_of(memory)
    assert isinstance(at, Address)
    one = at / "a" / "one.csv"
    assert (str(one), one.name, one.stem, one.suffix) == ("memory://data/a/one.csv", "one.csv", "one", ".csv")
    assert (one.parent, one.parent.parent / ".", one.with_name("x")) == (at / "a", at, at / "a/x")
    assert one.relative_to(at).as_posix() == "a/one.csv"
    assert at.relative_to(at).as_posix() == "."
    assert (one.is_file(), one.is_dir(), one.exists()) == (True, False, True)
    assert (at.is_file(), at.is_dir(), (at / "none").exists()) == (False, True, False)
    assert [str(path) for path in (at / "a").iterdir()] == [f"{memory}/a/b", f"{memory}/a/one.csv"]
    assert [path.name for path in at.glob("a/*.csv")] == ["one.csv"]
    assert sorted(path.name for path in at.glob("**/*.*")) == ["one.csv", "two.CSV"]
    assert (at / "a/b/two.CSV").read_text() == "two\n"
    assert one.stat().st_size == 1
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(OSError, match="only read"):
        one.open("wb")
    web = Address("https://host/data/x.csv?key=1")
    assert (web.name, str(web.parent / "a b.jpg")) == ("x.csv", "https://host/data/a%20b.jpg?key=1")
    assert (web.parent / "a b.jpg").name == "a b.jpg"
    assert path_of("MEMORY://Data/X") == Address("memory://Data/X")
    assert path_of("file:///tmp/x") == Path("/tmp/x")
    assert not is_address("C:\\data") and not is_address("a/b")


def test_files_that_cannot_be_listed_are_asked_for_one_by_one(put, monkeypatch):
    put({"private/a.jpg": jpeg(), "private/captions.csv": b"image,caption\na.jpg,A .\nb.jpg,B .\n"})

    def refused(*_given):
        raise PermissionError(13, "access is refused")

    monkeypatch.setattr(Address, "entries", refused)
    images = image_folder(path_of(f"{BUCKET}/private"))
    keys, reasons = images.resolve(["a.jpg", "b.jpg"])
    assert reasons == {"a.jpg": None, "b.jpg": "no such picture in ./"}
    assert images.open(keys["a.jpg"]) == jpeg()
    assert images.images_beside(set()) == []
    monkeypatch.setattr(Address, "files", refused)
    with pytest.raises(ImageSourceError, match="s3://bucket/private cannot be listed: access is refused"):
        images.listing()


# What cannot be opened: a line, within seconds.


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nope://x/y", "nope://x/y: no kind of address is called nope://; some are s3://"),
        ("zip://a.csv::s3://b/x.zip", "an address within another one, which is not read; download and unpack it"),
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x: there is no bucket of that name; check the network, and AWS"),
        ("s3://bucket/no/such/folder", "s3://bucket/no/such/folder does not exist; name the dataset's folder or file"),
        ("memory://none", "memory://none does not exist"),
    ],
)
def test_an_address_without_anything_is_refused_in_a_line(server, fails, address, reason):
    assert reason in fails("info", "--data", address)


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [("s3", "s3fs", "s3fs"), ("gs", "gcsfs", "gcsfs"), ("az", "adlfs", "adlfs"), ("https", "aiohttp", "aiohttp")],
)
def test_an_address_without_its_driver_names_the_package(fails, monkeypatch, kind, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, kind, raising=False)
    line = fails("info", "--data", f"{kind}://host/data")
    assert line == f"{kind}://host/data: the package that reads {kind}:// is missing: pip install {package}"


def test_wrong_and_missing_credentials_are_told_with_what_to_set(server, anew, fails, monkeypatch, put, tmp_path):
    put({"secret/captions.csv": b"image,caption\na.jpg,A .\n"})
    requests.post(f"{server}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()
    try:
        for data in (f"{BUCKET}/secret", f"{BUCKET}/secret/captions.csv"):
            anew()
            line = fails("info", "--data", data)
            assert "access is refused" in line
            assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; for public data FSSPEC_S3_" in line
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        anew()
        line = fails("info", "--data", f"{BUCKET}/secret")
        assert "credentials" in line
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line
    finally:
        requests.post(f"{server}/moto-api/reset-auth", data=str(2**31), timeout=10).raise_for_status()


def test_a_host_that_is_down_or_does_not_answer_is_told_within_seconds(server, anew, fails, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(drivers, "WAIT", 3.0)
    line = fails("info", "--data", f"{BUCKET}/drawn")
    assert line.startswith(f"{BUCKET}/drawn cannot be reached (")
    assert line.endswith("check the network, and AWS_ENDPOINT_URL where the store is not Amazon's")
    monkeypatch.setattr(drivers, "WAIT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x.csv"
        line = fails("info", "--data", address)
    mend = "check the network and the name of the host"
    assert line == f"{address} cannot be reached (no answer within 0 seconds); {mend}"


def test_a_host_that_is_lost_on_the_way_ends_the_extraction_which_goes_on_later(
    dataset, store_file, extract_config, tmp_path, monkeypatch
):
    read = read_dataset(dataset).first(16)
    opened = AddressImages.open

    def lost(images, key):
        if key in read.paths[8:]:
            raise AddressError("cannot be reached")
        return opened(images, key)

    monkeypatch.setattr(AddressImages, "open", lost)
    with pytest.raises(AddressError, match="cannot be reached"):
        extract(read, tmp_path / "s.h5", extract_config, device="cpu", engine="threads")
    assert not (tmp_path / "s.h5").exists()
    monkeypatch.setattr(AddressImages, "open", opened)
    made = extract(read, tmp_path / "s.h5", extract_config, device="cpu", engine="threads")
    assert made.reused["image"] == 8
    with FeatureStore(tmp_path / "s.h5") as some, FeatureStore(store_file) as whole:
        np.testing.assert_array_equal(some.image_features[:], whole.image_features[:16])


def test_images_of_a_batch_are_downloaded_several_at_a_time(dataset, monkeypatch):
    images = image_folder(path_of(dataset))
    keys = sorted(f"images/{name}" for name in images.names_in("images"))[:6]
    meeting = threading.Barrier(6, timeout=10)  # which all of them have to reach

    def opened(_images, key):
        meeting.wait()
        if key == keys[1]:
            raise FileNotFoundError(2, "no such file")
        return key.encode()

    monkeypatch.setattr(AddressImages, "open", opened)
    contents = []
    for read in images.reads(keys):
        try:
            contents.append(read().decode())
        except FileNotFoundError:
            contents.append("gone")
    assert contents == [keys[0], "gone", *keys[2:]]


def test_an_image_that_is_gone_is_an_error_of_that_image(dataset):
    images = image_folder(path_of(dataset))
    with pytest.raises(FileNotFoundError, match="no such file"):
        images.open("images/none.jpg")
    assert images.stat("images/none.jpg") == (-1, -1)
    with pytest.raises(AddressError, match="no bucket of that name"):
        image_folder(path_of("s3://no-such-bucket/x")).open("a.jpg")
