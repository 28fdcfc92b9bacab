"""Downloads from a server on loopback: whole, cut off and resumed, corrupted, malicious."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from extract import download
from extract.download import Archive, DownloadError, download_archives


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


def test_both_archives_become_a_dataset_that_can_be_read(server, tmp_path):
    folder = tmp_path / "f"
    download_archives("flickr8k", folder)
    assert visible(folder) == ["Flicker8k_Dataset", "Flickr8k.token.txt", "Flickr_8k.testImages.txt"]
    from extract.datasets import read_dataset

    assert read_dataset(folder).splits == ["test"]
    told, asked = [], len(server.asked)
    download_archives("flickr8k", folder, told.append)
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
    with pytest.raises(DownloadError, match="would write outside its folder .*nothing was unpacked"):
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
