"""Downloads from a server on loopback: whole, cut off and resumed, corrupted, malicious."""

import errno
import hashlib
import io
import os
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from onceover.base.outputs import OutputError
from onceover.extract import download
from onceover.extract.download import Archive, DownloadError, download_archives


def zipped(files: dict[str, bytes], links=()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o120777 if name in links else 0o100644) << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


PICTURES = zipped({f"Flicker8k_Dataset/{n}.jpg": bytes([n]) * 5000 for n in range(20)} | {"__MACOSX/junk": b"x"})
TEXTS = zipped({"Flickr8k.token.txt": b"0.jpg#0\ta dog\n", "Flickr_8k.testImages.txt": b"0.jpg\n"})


@pytest.fixture
def server(monkeypatch):
    """Serves ``files``; ``cut`` ends an answer early; ``asked`` lists the Range headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            self.server.asked.append((name, self.headers.get("Range")))
            if name not in self.server.files:
                self.send_error(404)
                return
            data = self.server.files[name]
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            if begin >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            self.wfile.write(data[begin : self.server.cut.pop(name, len(data))])

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.files, served.cut, served.asked = {"p.zip": PICTURES, "t.zip": TEXTS}, {}, []
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{served.server_port}/"

    def archive(name, proof):
        return Archive(base + name, hashlib.md5(served.files[name]).hexdigest(), proof)

    served.use = lambda **proofs: monkeypatch.setitem(
        download.ARCHIVES, "flickr8k", tuple(archive(f"{name}.zip", proof) for name, proof in proofs.items())
    )
    served.use(p="Flicker8k_Dataset", t="Flickr8k.token.txt")
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".unpack")]


def test_both_archives_become_a_dataset_that_can_be_read(server, tmp_path, told):
    folder = tmp_path / "f"
    download_archives("flickr8k", folder)
    assert visible(folder) == ["Flicker8k_Dataset", "Flickr8k.token.txt", "Flickr_8k.testImages.txt"]
    from onceover.extract.layouts import read_dataset

    assert read_dataset(folder).splits == ["test"]
    told.clear()
    asked = len(server.asked)
    download_archives("flickr8k", folder)
    assert all("is there already" in line for line in told)
    assert len(server.asked) == asked
    assert not [path for path in folder.iterdir() if path.suffix in (".zip", ".part")]


def test_a_download_that_was_cut_off_goes_on_where_it_ended(server, tmp_path):
    server.cut["p.zip"] = 40_000
    with pytest.raises(DownloadError, match="could not be downloaded .*run the same command again to go on"):
        download_archives("flickr8k", tmp_path / "f")
    assert visible(tmp_path / "f") == []
    download_archives("flickr8k", tmp_path / "f")
    assert ("p.zip", "bytes=32768-") in server.asked
    assert (tmp_path / "f/Flicker8k_Dataset/19.jpg").read_bytes() == bytes([19]) * 5000


def test_a_corrupted_archive_is_discarded_and_the_next_try_starts_anew(server, tmp_path):
    server.files["p.zip"] = PICTURES[:100] + b"X" + PICTURES[101:]
    with pytest.raises(DownloadError, match="wrong checksum and was discarded"):
        download_archives("flickr8k", tmp_path / "f")
    assert visible(tmp_path / "f") == []
    server.files["p.zip"] = PICTURES
    download_archives("flickr8k", tmp_path / "f")
    assert "Flicker8k_Dataset" in visible(tmp_path / "f")


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt", "link"]
)
def test_a_malicious_archive_writes_nothing(server, tmp_path, name):
    server.files["p.zip"] = zipped({"Flicker8k_Dataset/0.jpg": b"x", name: b"/etc/passwd"}, links=["link"])
    server.use(p="Flicker8k_Dataset")
    with pytest.raises(DownloadError, match="would write outside its folder; nothing was unpacked"):
        download_archives("flickr8k", tmp_path / "f")
    assert visible(tmp_path / "f") == leftovers(tmp_path / "f") == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_zip_bomb_is_refused_by_its_table(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED", 10_000)
    with pytest.raises(DownloadError, match="would unpack to"):
        download_archives("flickr8k", tmp_path / "f")
    assert visible(tmp_path / "f") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"no zip at all", "is a damaged zip file"), (zipped({"other/0.jpg": b"x"}), "holds no Flicker8k_Dataset")],
)
def test_an_archive_that_is_not_what_it_should_be(server, tmp_path, data, message):
    server.files["p.zip"] = data
    server.use(p="Flicker8k_Dataset")
    with pytest.raises(DownloadError, match=message):
        download_archives("flickr8k", tmp_path / "f")
    assert visible(tmp_path / "f") == []


def test_a_server_that_does_not_have_it_and_one_that_is_not_there(server, tmp_path):
    del server.files["p.zip"]
    with pytest.raises(DownloadError, match="the server answered 404"):
        download_archives("flickr8k", tmp_path / "f")
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="could not be downloaded"):
        download_archives("flickr8k", tmp_path / "g")


def with_field(data: bytes, offset: int, value: int) -> bytes:
    """The zip file with a 16-bit field of its last member's entry in the table changed."""
    place = data.rindex(b"PK\1\2") + offset
    return data[:place] + struct.pack("<H", value) + data[place + 2 :]


def refused(server, folder, data: bytes) -> str:
    """The message with which an archive is refused; nothing of it is there then."""
    server.files["p.zip"] = data
    server.use(p="Flicker8k_Dataset")
    with pytest.raises(DownloadError) as error:
        download_archives("flickr8k", folder)
    assert visible(folder) == leftovers(folder) == []
    assert str(error.value).isprintable()
    return str(error.value)


PROOF = {"Flicker8k_Dataset/0.jpg": b"x" * 1000}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["."], "p.zip: '.' is no name of a file; nothing was unpacked"),
        (["./"], "p.zip: './' is no name of a file; nothing was unpacked"),
        (["a", "./a"], "p.zip: './a' stands twice; nothing was unpacked"),
        (["a", "a/b"], "p.zip: 'a' is a file and a folder at once; nothing was unpacked"),
        (["n" * 300], f"p.zip: '{'n' * 79} has too long a name; nothing was unpacked"),
        (["d/" * 3000 + "x"], f"p.zip: '{'d/' * 39}d has too long a name; nothing was unpacked"),
        (["//x"], "p.zip: '//x' would write outside its folder; nothing was unpacked"),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_trap_a_member_that_is_no_plain_file_is_refused(server, tmp_path, names, message):
    assert refused(server, tmp_path / "f", zipped(PROOF | dict.fromkeys(names, b"x"))) == message


def test_trap_a_name_that_stands_twice_or_holds_a_nul_is_refused(server, tmp_path):
    data = zipped(PROOF | {"aaaaa": b"1", "aaaab": b"2"})
    twice = refused(server, tmp_path / "f", data.replace(b"aaaab", b"aaaaa"))
    assert twice == "p.zip: 'aaaaa' stands twice; nothing was unpacked"
    nul = refused(server, tmp_path / "f", data.replace(b"aaaab", b"a\0aab"))
    assert nul == "p.zip: 'a\\x00aab' is no name of a file; nothing was unpacked"


def test_trap_what_cannot_be_unpacked_is_one_line(server, tmp_path):
    data = zipped(PROOF)
    assert refused(server, tmp_path / "f", with_field(data, 8, 1)) == (
        "p.zip: 'Flicker8k_Dataset/0.jpg' is encrypted; nothing was unpacked"
    )
    assert refused(server, tmp_path / "f", with_field(data, 10, 97)) == (
        "p.zip: 'Flicker8k_Dataset/0.jpg' is compressed in an unknown way; nothing was unpacked"
    )


def test_trap_flipped_bytes_of_an_archive_are_one_line(server, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (PROOF | {"b.txt": bytes(range(256)) * 9}).items():
            archive.writestr(name, data)
    whole = buffer.getvalue()
    file = tmp_path / ".p.zip"
    for place in range(0, len(whole), 3):
        folder = tmp_path / f"f{place}"
        folder.mkdir()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            download._unpack(file, folder, "Flicker8k_Dataset")
        except DownloadError as error:
            assert str(error).startswith("p.zip")
            assert str(error).isprintable()
            assert list(folder.iterdir()) == []


def test_trap_a_bomb_is_stopped_by_what_it_writes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED", 500)
    monkeypatch.setattr(download, "_refuse_unsafe", lambda *_: None)  # as if its table had been believed
    assert "p.zip would unpack to 0 GiB or more" in refused(server, tmp_path / "f", zipped(PROOF))
    monkeypatch.undo()


def test_trap_a_strangers_folder_is_left_as_it_is(server, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "Flickr_8k.testImages.txt").write_text("mine")
    with pytest.raises(OutputError) as error:
        download_archives("flickr8k", folder)
    assert str(error.value) == f"{folder} is not empty, and was not made by this program; name a new folder"
    assert server.asked == []
    assert visible(folder) == ["Flickr_8k.testImages.txt"]


def test_trap_a_file_in_the_way_is_not_replaced(server, tmp_path):
    folder = tmp_path / "f"
    (folder / "Flicker8k_Dataset").mkdir(parents=True)  # the dataset's own; the texts are not there yet
    (folder / "Flickr_8k.testImages.txt").write_text("mine")
    with pytest.raises(DownloadError) as error:
        download_archives("flickr8k", folder)
    target = folder / "Flickr_8k.testImages.txt"
    assert str(error.value) == f"{target} is there already, and is not replaced; move it, or name another folder"
    assert target.read_text() == "mine"
    assert visible(folder) == ["Flicker8k_Dataset", "Flickr_8k.testImages.txt"]


def test_what_a_killed_process_left_is_finished_and_cleared_away(server, tmp_path):
    folder = tmp_path / "f"
    download_archives("flickr8k", folder)
    (folder / "Flickr8k.token.txt").unlink()  # killed between the renames of the two texts
    (folder / ".unpack-abc/files").mkdir(parents=True)
    (folder / ".unpack-abc/.onceover-unpack").touch()
    (folder / ".unpack-empty").mkdir()
    (folder / ".unpack-mine").mkdir()
    (folder / ".unpack-mine/x").touch()
    download_archives("flickr8k", folder)
    assert visible(folder) == ["Flicker8k_Dataset", "Flickr8k.token.txt", "Flickr_8k.testImages.txt"]
    assert leftovers(folder) == [".unpack-mine"]


def test_a_full_disk_stays_the_systems_error(server, tmp_path, monkeypatch):
    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "_blocks", replace)
    with pytest.raises(OSError, match="No space left"):
        download_archives("flickr8k", tmp_path / "f")
    assert visible(tmp_path / "f") == leftovers(tmp_path / "f") == []
