"""The search server over HTTP: answers, refusals, limits, hosts, batches, the client, and the command."""

import asyncio
import base64
import contextlib
import hashlib
import http.server
import io
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from conftest import serving
from PIL import Image

import onceover
from onceover.base.extras import Extra
from onceover.heads.searching import open_collection
from onceover.retrieval.search import Query, Term
from onceover.serve import connections, server
from onceover.serve.batching import Batcher, BusyError
from onceover.serve.bodies import BodyLimit
from onceover.serve.client import Client, ClientError
from onceover.serve.engine import Engine
from onceover.serve.hosts import host_name, is_open
from onceover.serve.limits import MAX_BODY, MAX_IMAGE_PIXELS
from onceover.serve.site import Site
from onceover.serve.vectors import Vectors

TEXT = "a red circle above a blue star"


@pytest.fixture(scope="module")
def collection(run_dir):
    return open_collection(run_dir, device="cpu")


def asked(address, *terms, **settings):
    return requests.post(f"{address}/api/search", json={"terms": list(terms), **settings}, timeout=20)


def hits_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"]


def refusal(answer, status):
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert "Traceback" not in answer.text
    return answer.json()["error"]


def in_base64(data):
    return base64.b64encode(data).decode()


def pairs(hits):
    return [(hit["id"], pytest.approx(hit["score"], abs=1e-5)) for hit in hits]


def test_info_names_the_encoders_and_the_sizes_of_the_galleries(served, run_dir, tiny_bert):
    info = requests.get(f"{served}/api/info", timeout=20).json()
    assert info["name"] == run_dir.name
    assert info["galleries"] == [{"kind": "image", "size": 60}, {"kind": "text", "size": 300}]
    assert info["splits"] == {"train": 36, "dev": 12, "test": 12}
    assert info["encoders"]["text"] == f"hf:{Path(tiny_bert).name}"
    assert info["dimension"] == 16
    assert info["takes"] == {"text": None, "image": None}
    assert len(info["sample"]) == 24
    assert len(info["examples"]) == 4


def test_a_text_finds_what_a_search_on_this_machine_finds(served, run_dir):
    hits = hits_of(asked(served, {"text": TEXT}, top_k=7))
    expected = onceover.search(run_dir, TEXT, top_k=7)
    assert pairs(hits) == [(hit.id, hit.score) for hit in expected]
    assert [hit["captions"] for hit in hits] == [hit.captions for hit in expected]
    assert [hit["image"] for hit in hits] == [hit.id for hit in expected]


def test_an_image_finds_captions_as_its_stored_vector_does(served, drawn):
    sent = hits_of(asked(served, {"image": in_base64((drawn / "images/0003.jpg").read_bytes())}, gallery="text"))
    stored = hits_of(asked(served, {"item": "images/0003.jpg", "kind": "image"}, gallery="text"))
    assert pairs(stored) == [(hit["id"], hit["score"]) for hit in sent]
    assert all(hit["image"] == hit["id"].partition("#")[0] for hit in stored)


def test_the_image_of_a_query_is_not_among_its_hits(served):
    ids = [hit["id"] for hit in hits_of(asked(served, {"item": "images/0003.jpg"}, top_k=60))]
    assert len(ids) == 59
    assert "images/0003.jpg" not in ids


def test_terms_are_added_and_subtracted_as_a_search_on_this_machine_does(served, collection):
    term = {"text": "a green ring"}
    hits = hits_of(asked(served, {"text": TEXT}, {**term, "weight": -0.5}, {"item": "images/0001.jpg"}, top_k=9))
    query = Query((Term(text=TEXT), Term(text="a green ring", weight=-0.5), Term(item="images/0001.jpg")))
    assert pairs(hits) == [(hit.id, hit.score) for hit in collection.searcher("image").search(query, 9)]


def test_hits_below_the_least_score_are_left_out(served):
    every = hits_of(asked(served, {"text": TEXT}, top_k=60))
    least = every[4]["score"] - 1e-4
    assert len(hits_of(asked(served, {"text": TEXT}, top_k=60, min_score=least))) == 5
    none = asked(served, {"text": TEXT}, min_score=2).json()
    assert none == {"hits": [], "best_score": pytest.approx(every[0]["score"], abs=1e-5), "note": None}


def test_concurrent_queries_get_the_answers_that_they_get_alone(served):
    texts = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "ring", "circle")]
    texts += ["blue", "a ring that lies to the left of a purple triangle which is further up, and is yellow " * 2]
    alone = [hits_of(asked(served, {"text": text}, top_k=60)) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: hits_of(asked(served, {"text": text}, top_k=60)), texts * 3))
    for number, hits in enumerate(together):
        scores = {hit["id"]: hit["score"] for hit in alone[number % len(texts)]}
        assert scores == pytest.approx({hit["id"]: hit["score"] for hit in hits}, abs=1e-5)


def test_questions_that_wait_are_answered_together_and_the_one_at_fault_fails_alone():
    batches = []
    is_free = threading.Event()

    def answer(questions):
        is_free.wait(10)
        batches.append(list(questions))
        if "bad" in questions:
            raise ValueError("a bad question")
        return [question.upper() for question in questions]

    batcher = Batcher(answer, at_once=3)
    first = batcher.ask("a")
    while batcher.waiting():
        pass  # until the thread has taken it
    others = [batcher.ask(question) for question in ("b", "bad", "c", "d")]
    others[3].cancel()
    is_free.set()
    assert first.result(10) == "A"
    assert [others[0].result(10), others[2].result(10)] == ["B", "C"]
    with pytest.raises(ValueError, match="a bad question"):
        others[1].result(10)
    batcher.close()
    assert batches == [["a"], ["b", "bad", "c"], ["b"], ["bad", "c"], ["bad"], ["c"]]


def test_light_questions_and_heavy_ones_take_turns():
    batches = []
    is_free = threading.Event()

    def answer(questions):
        is_free.wait(10)
        batches.append(len(questions))
        return questions

    batcher = Batcher(answer, is_heavy=lambda question: question == "image")
    futures = [batcher.ask("text")]
    while batcher.waiting():
        pass
    futures += [batcher.ask("image") for _ in range(20)] + [batcher.ask("text") for _ in range(70)]
    is_free.set()
    assert [future.result(10) for future in futures][-1] == "text"
    assert batches in ([1, 8, 64, 8, 6, 4], [1, 64, 8, 6, 8, 4])
    batcher.close()


def test_what_is_unanswered_is_refused_at_once_when_the_server_stops():
    is_free = threading.Event()
    batcher = Batcher(lambda questions: [is_free.wait(10) for _ in questions], at_once=1)
    futures = [batcher.ask(number) for number in range(5)]
    while batcher.waiting() == 5:
        pass  # until the thread has taken one
    assert not batcher.close(0.05)
    for future in futures:
        with pytest.raises(BusyError, match="the server is stopping"):
            future.result(0)
    with pytest.raises(BusyError, match="the server is stopping"):
        batcher.ask(1)
    is_free.set()
    assert batcher.close(10)


def test_a_question_too_many_is_refused():
    is_free = threading.Event()
    batcher = Batcher(lambda questions: [is_free.wait(10) for _ in questions], waiting=1)
    futures = [batcher.ask(1)]
    with pytest.raises(BusyError, match="too many queries wait"):
        for _ in range(3):
            futures.append(batcher.ask(1))
    is_free.set()
    assert all(future.result(10) for future in futures)
    batcher.close()


@pytest.mark.parametrize(
    ("message", "status", "error"),
    [
        ({}, 422, "the query is missing"),
        ({"terms": []}, 422, "the query is empty; give at least one term"),
        ({"terms": [{}]}, 422, "term 1: a term has one of text, item and image"),
        ({"terms": [{"text": "a", "item": "b"}]}, 422, "term 1: a term has one of text, item and image"),
        (
            {"terms": [{"text": "x" * 10_001}]},
            422,
            "term 1: the text has more than 10,000 characters; shorten it",
        ),
        ({"terms": [{"text": "a", "path": "/etc/passwd"}]}, 422, "term 1: the path is no setting"),
        ({"terms": [{"text": "a"}] * 17}, 422, "the query has more than 16 terms; remove some"),
        ({"terms": [{"text": "a"}], "top_k": 0}, 422, "top_k is below 1; raise it"),
        ({"terms": [{"text": "a"}], "top_k": 10**400}, 422, "top_k"),
        ({"terms": [{"text": "a"}], "gallery": "video"}, 422, "the gallery has to be 'image' or 'text'"),
        ({"terms": [{"text": "  \n "}]}, 422, "the text is empty; write one"),
        ({"terms": [{"item": "../../etc/passwd"}]}, 404, "no item of this kind"),
        ({"terms": [{"text": "a", "weight": 0}]}, 400, "have the weight 0"),
        ({"terms": [{"text": "a", "weight": 1e-320}]}, 400, "have the weight 0"),
        ({"terms": [{"text": "a", "weight": True}]}, 422, "term 1: the weight is no number"),
        ({"terms": [{"text": "a", "weight": 101}]}, 422, "term 1: the weight is above 100.0; lower it"),
        ({"terms": [{"text": "a"}], "top_k": True}, 422, "top_k is no whole number"),
        ({"terms": [{"text": "a"}], "min_score": False}, 422, "min_score is no number"),
        ({"terms": [{"text": "a"}, {"text": "a", "weight": -1}]}, 400, "cancel each other"),
        ({"terms": [{"image": "/etc/passwd"}]}, 400, "not in base64"),
        ({"terms": [{"image": "/etc/passwd+"}]}, 400, "this is no usable image"),
        ({"terms": [{"image": "é"}]}, 400, "not in base64"),
        ({"terms": [{"image": in_base64(b"GIF89a, or so it says")}]}, 400, "this is no usable image"),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:40],
)
def test_a_wrong_query_is_refused_in_a_line(served, message, status, error):
    text = refusal(requests.post(f"{served}/api/search", json=message, timeout=20), status)
    assert error in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"terms": [{"text": "\\ud800"}]}',
        b'{"terms": [{"text": "a", "weight": NaN}]}',
    ],
    ids=["empty", "open", "no UTF-8", "deep", "half a character", "NaN"],
)
def test_a_body_that_is_no_query_is_refused(served, body):
    answer = requests.post(f"{served}/api/search", data=body, headers={"Content-Type": "application/json"}, timeout=20)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "text", ["😀", "שלום עולם", "<script>alert(1)</script>", "\0", "x" * 10_000, "../../etc/passwd"]
)
def test_any_text_is_a_query(served, text):
    assert len(hits_of(asked(served, {"text": text}, top_k=3))) == 3


def test_a_body_over_the_limit_is_refused_whether_its_length_is_told_or_not(served):
    headers = {"Content-Type": "application/json"}
    chunks = (b" " * 2**20 for _ in range(MAX_BODY // 2**20 + 2))
    chunked = requests.post(f"{served}/api/search", data=chunks, headers=headers, timeout=20)
    assert refusal(chunked, 413) == "the request has more than 12 MiB; send a smaller image"
    with socket.create_connection(("127.0.0.1", int(served.rpartition(":")[2]))) as connection:
        lines = f"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
        connection.sendall(lines.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")  # though nothing of it was sent


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(served):
    file = io.BytesIO()
    Image.new("1", (MAX_IMAGE_PIXELS // 1000 + 1, 1000)).save(file, "PNG")
    text = refusal(asked(served, {"image": in_base64(file.getvalue())}), 400)
    assert text.startswith("the image has 16,001,000 pixels, more than 16,000,000; make it smaller")


def test_images_are_fetched_by_id_and_nothing_else_is(served, drawn):
    address = f"{served}/api/items/image"
    small = requests.get(f"{address}/thumbnail", params={"id": "images/0003.jpg"}, timeout=20)
    assert small.headers["Content-Type"] == "image/jpeg"
    assert small.headers["Cache-Control"] == "no-cache"
    assert max(Image.open(io.BytesIO(small.content)).size) == 112
    large = requests.get(f"{address}/view", params={"id": "images/0003.jpg"}, timeout=20)
    assert Image.open(io.BytesIO(large.content)).size == (224, 224)  # the dataset's own file
    stamp = requests.get(f"{served}/api/info", timeout=20).json()["stamp"]
    kept = requests.get(f"{address}/thumbnail", params={"id": "images/0003.jpg", "stamp": stamp}, timeout=20)
    assert "immutable" in kept.headers["Cache-Control"]
    path = str(drawn / "images" / "0003.jpg")
    for name in (
        "nobody.jpg",
        path,
        "../captions.csv",
        "/etc/passwd",
        "images/../images/0003.jpg",
        "images/0003.jpg\0",
    ):
        for place in ("", "/thumbnail", "/view"):
            assert "no item of this kind" in refusal(
                requests.get(address + place, params={"id": name}, timeout=20), 404
            )
    caption = requests.get(f"{served}/api/items/text", params={"id": "images/0003.jpg#1"}, timeout=20).json()
    assert (caption["image"], caption["split"]) == ("images/0003.jpg", "train")


def test_a_run_that_was_removed_is_still_served_or_said_to_be_gone(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    with serving(server.open_site(copy, device="cpu")) as address:
        shutil.rmtree(copy)
        assert len(hits_of(asked(address, {"text": TEXT}))) == 20
        for path in ("api/items/image/thumbnail", "api/items/image/view", "api/items/image"):
            answer = requests.get(f"{address}/{path}", params={"id": "images/0003.jpg"}, timeout=20)
            assert answer.ok or "start the server again" in refusal(answer, 404)
        assert requests.get(f"{address}/api/map", timeout=20).ok


def test_the_stamp_tells_other_contents_of_the_same_items(collection, run_dir):
    image = collection.galleries["image"]
    other = replace(image, contents=["0" * 64, *image.contents[1:]])
    sites = [Site(collection, [run_dir]), Site(collection, [run_dir])]
    sites.append(Site(replace(collection, galleries={**collection.galleries, "image": other}), [run_dir]))
    first, same, changed = [site.stamp for site in sites]
    assert first == same != changed
    for site in sites:
        site.close()


def test_a_question_is_answered_alike_by_an_upload_and_by_the_embedder(collection, drawn):
    engine = Engine(collection)
    data = (drawn / "images/0003.jpg").read_bytes()
    (expected,) = collection.embedder.embed_images([data])
    (found,) = Vectors(collection.embedder).embed_images([engine.upload(data)])
    assert found == pytest.approx(expected, abs=1e-6)
    engine.close()


def test_a_file_that_was_replaced_since_is_not_shown(collection, run_dir, tmp_path):
    path = collection.galleries["image"].item(0)["path"]
    name = collection.galleries["image"].ids[0]
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (900, 900), "red").save(tmp_path / path)
    site = Site(collection, [run_dir], roots=[tmp_path])
    assert Image.open(io.BytesIO(site.items.view(name))).size == (224, 224)  # the image itself, in its own place
    site.close()


def test_only_names_of_this_machine_are_answered(served):
    port = served.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "192.168.0.7", ""):
        answer = requests.get(f"{served}/api/info", headers={"Host": host}, timeout=20)
        assert "does not answer under that name" in refusal(answer, 400)
    for host in ("localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert requests.get(f"{served}/api/info", headers={"Host": host}, timeout=20).ok


def test_a_host_is_open_or_of_this_machine():
    assert [host_name(header) for header in ("[::1]:80", "a.b:80", "A", "a.b.")] == ["::1", "a.b", "a", "a.b"]
    for header in ("[::1]evil", "[::1]:x", "a:b", "a:80:80", "a b", "user@a", "[a"):
        assert host_name(header) == ""
    assert [is_open(host) for host in ("127.0.0.1", "::1", "localhost", "localhost.")] == [False] * 4
    assert [is_open(host) for host in ("0.0.0.0", "::", "", "192.168.0.7", "box.example")] == [True] * 5


def test_an_open_server_answers_under_addresses_and_still_under_no_foreign_name(collection, run_dir):
    with serving(Site(collection, [run_dir]), "0.0.0.0") as address:
        assert requests.get(f"{address}/api/info", headers={"Host": "192.168.0.7:8000"}, timeout=20).ok
        assert requests.get(f"{address}/api/info", headers={"Host": socket.gethostname()}, timeout=20).ok
        assert requests.get(f"{address}/api/info", headers={"Host": "evil.example"}, timeout=20).status_code == 400


def test_every_answer_bounds_what_a_browser_may_do(served):
    for path in ("/", "/page.js", "/page.css", "/map.js", "/map.css", "/api/info", "/nowhere"):
        answer = requests.get(served + path, timeout=20)
        policy = answer.headers["Content-Security-Policy"]
        assert "script-src 'self';" in policy
        assert "unsafe-inline" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Set-Cookie" not in answer.headers
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert "nothing under this address" in refusal(requests.get(f"{served}/nowhere", timeout=20), 404)
    assert requests.get(f"{served}/docs", timeout=20).status_code == 404
    assert requests.put(f"{served}/api/info", timeout=20).status_code == 405


def test_connections_without_a_request_are_closed(collection, run_dir, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_TIME", 0.5)
    with serving(Site(collection, [run_dir])) as address:
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        with socket.create_connection(place) as idle, socket.create_connection(place) as half:
            half.sendall(b"GET / HTT")
            for connection in (idle, half):
                connection.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
        assert requests.get(f"{address}/api/info", timeout=20).ok


def test_bodies_are_bounded_together_and_in_time():
    async def app(scope, receive, send):
        raise AssertionError("the request is refused")

    async def statuses(limit, messages):
        sent = []

        async def receive():
            return messages.pop(0) if messages else await asyncio.sleep(10)

        async def send(message):
            sent.append(message)

        await limit({"type": "http", "headers": []}, receive, send)
        return sent[0]["status"]

    part = {"type": "http.request", "body": b"123", "more_body": True}
    assert asyncio.run(statuses(BodyLimit(app, together=5), [dict(part), dict(part)])) == 503
    assert asyncio.run(statuses(BodyLimit(app, seconds=0.05), [dict(part)])) == 408


def test_the_map_has_each_image_with_a_caption_and_becomes_complete(served):
    while not (answer := requests.get(f"{served}/api/map", timeout=20).json())["is_complete"]:
        time.sleep(0.05)
    assert (answer["images"], answer["of"]) == (60, 60)
    kinds = [point["kind"] for point in answer["points"]]
    assert [kinds.count(kind) for kind in ("image", "caption")] == [60, 60]
    point = next(point for point in answer["points"] if point["id"] == "caption:images/0003.jpg#0")
    assert set(point["x"]) == set(point["y"]) == {"pca", "tsne"}
    assert point["split"] == "train"
    assert requests.get(f"{served}/{point['image']}", timeout=20).headers["Content-Type"] == "image/jpeg"


@pytest.fixture(scope="module")
def odd_index(tmp_path_factory, run_dir):
    """An index of three images with names that have to be escaped, and no captions."""
    folder = tmp_path_factory.mktemp("odd")
    for name, colour in (("a b/ü#1?&.jpg", "red"), ("100%25 +.jpg", "blue"), ("图.jpg", "green")):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1600, 800), colour).save(folder / "photos" / name)
    return onceover.index(run_dir, folder / "index", images=folder / "photos")


def test_an_index_of_images_alone_is_served_under_whatever_names(odd_index, run_dir):
    with serving(server.open_site(None, odd_index, device="cpu")) as address:
        info = requests.get(f"{address}/api/info", timeout=20).json()
        assert info["galleries"] == [{"kind": "image", "size": 3}]
        assert (info["splits"], info["examples"]) == ({}, [])
        hits = hits_of(asked(address, {"text": "red"}))
        assert {hit["id"] for hit in hits} == {"a b/ü#1?&.jpg", "100%25 +.jpg", "图.jpg"}
        for hit in hits:
            assert hit["path"] == hit["id"]  # nothing says where the folder lies
            view = requests.get(f"{address}/api/items/image/view", params={"id": hit["id"]}, timeout=20)
            assert Image.open(io.BytesIO(view.content)).size == (1024, 512)
        assert "there are no captions here to search" in refusal(asked(address, {"text": "red"}, gallery="text"), 400)
        answer = requests.get(f"{address}/api/map", timeout=20).json()
        assert (answer["images"], answer["is_complete"]) == (3, True)


def test_an_index_of_several_folders_does_not_tell_where_they_lie(run_dir, tmp_path):
    folders = [tmp_path / "summer", tmp_path / "winter"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        Image.new("RGB", (64, 64), (200 * number, 0, 0)).save(folder / "a.png")
    index = onceover.index(run_dir, tmp_path / "index", images=folders)
    with serving(server.open_site(None, index, device="cpu")) as address:
        hits = hits_of(asked(address, {"text": "red"}))
        assert sorted(hit["path"] for hit in hits) == ["summer/a.png", "winter/a.png"]
        item = requests.get(f"{address}/api/items/image", params={"id": hits[0]["id"]}, timeout=20).json()
        assert item["path"] == hits[0]["path"]
        points = requests.get(f"{address}/api/map", timeout=20).json()["points"]
        assert sorted(point["caption"] for point in points) == ["summer/a.png", "winter/a.png"]


def test_an_index_of_captions_alone_is_served(run_dir, tmp_path):
    (tmp_path / "lines.txt").write_text("a red circle\na blue star\na green ring\n")
    folder = onceover.index(run_dir, tmp_path / "index", captions=tmp_path / "lines.txt")
    with serving(server.open_site(None, folder, device="cpu")) as address:
        info = requests.get(f"{address}/api/info", timeout=20).json()
        assert (info["galleries"], info["sample"]) == ([{"kind": "text", "size": 3}], [])
        assert sorted(info["examples"]) == ["a blue star", "a green ring", "a red circle"]
        hits = hits_of(asked(address, {"text": "a red circle"}, gallery="text"))  # itself is no hit
        assert sorted(hit["captions"][0] for hit in hits) == ["a blue star", "a green ring"]
        assert {hit["image"] for hit in hits} == {None}
        assert "there are no images here to search" in refusal(asked(address, {"text": "red"}), 400)
        refusal(requests.get(f"{address}/api/items/image/view", params={"id": hits[0]["id"]}, timeout=20), 404)
        assert requests.get(f"{address}/api/map", timeout=20).json()["points"] == []


def test_an_encoder_that_cannot_be_loaded_is_told_and_its_queries_are_refused(collection, run_dir):
    class TextAlone:
        space = collection.embedder.space
        embed_texts_with_notes = collection.embedder.embed_texts_with_notes

        def pixels(self, _image):
            raise onceover.OnceoverError("the image features were imported")

    site = Site(replace(collection, embedder=TextAlone()), [run_dir])
    site.engine.warm_up()
    with serving(site) as address:
        assert requests.get(f"{address}/api/info", timeout=20).json()["takes"] == {
            "text": None,
            "image": "the image features were imported",
        }
        file = io.BytesIO()
        Image.new("RGB", (9, 9)).save(file, "PNG")
        text = refusal(asked(address, {"image": in_base64(file.getvalue())}), 400)
        assert text == "queries by image cannot be embedded here: the image features were imported"
        assert hits_of(asked(address, {"item": "images/0003.jpg"}))


def test_the_client_finds_what_a_search_on_this_machine_finds(served, run_dir, drawn, collection):
    client = onceover.Client(served + "/")
    assert client.info()["galleries"][0]["size"] == 60
    same = [replace(hit, score=pytest.approx(hit.score, abs=1e-5)) for hit in onceover.search(run_dir, TEXT)]
    assert client.search(TEXT) == same
    path = str(drawn / collection.galleries["image"].paths[2])
    by_path = client.search(Query((Term(image=path),)), top_k=3, gallery="text")
    by_bytes = client.search(Query((Term(image=(drawn / path).read_bytes()),)), top_k=3, gallery="text")
    assert [hit.id for hit in by_path] == [hit.id for hit in by_bytes]
    assert client.search(Query((Term(item="images/0003.jpg#1"),)), top_k=1, gallery="text")[0].id != "images/0003.jpg#1"
    assert client.search(TEXT, min_score=2.0) == []
    found = client.search(TEXT, top_k=2)
    assert [image.size for image in found.images(160)] == [(112, 112)] * 2
    assert [image.size for image in found.images(1024)] == [(224, 224)] * 2
    assert found._repr_html_().count("data:image/jpeg") == 2


def test_the_client_says_what_is_wrong_in_a_line(served, tmp_path):
    client = Client(served)
    with pytest.raises(ClientError, match="the text is empty"):
        client.search(" ")
    with pytest.raises(onceover.OnceoverError, match="nobody.jpg"):
        client.search(Query((Term(image=str(tmp_path / "nobody.jpg")),)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with pytest.raises(ClientError, match="does not answer .* start it: onceover serve --run DIR"):
        Client(f"http://127.0.0.1:{free}").info()
    with pytest.raises(ClientError, match="is no search server"):
        Client(f"{served}/page.js?x=").info()
    with pytest.raises(ClientError, match="'127.0.0.1:8000' is no address of a server"):
        Client("127.0.0.1:8000")
    for query, settings, text in [
        (None, {}, "a query is a text or an onceover Query; this one is NoneType"),
        (Query(("red",)), {}, "the terms of a query are Terms; this one is str"),
        ("red", {"top_k": 2.5}, "top_k is 2.5; give a whole number"),
        ("red", {"min_score": "high"}, "min_score is 'high'; give a number"),
        ("red", {"min_score": float("nan")}, "min_score is nan; give a number"),
        (Query((Term(text="red", weight=10**400),)), {}, "weight is 1000"),
        ("red", {"gallery": "video"}, "the gallery has to be 'image' or 'text'"),
    ]:
        with pytest.raises(ClientError, match=text):
            client.search(query, **settings)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b"[]", "is no search server"),
        (200, b"{}", "its answer has no hits"),
        (200, b'{"hits": [1]}', "a hit lacks what belongs to it"),
        (200, b'{"hits": [{"rank": 1, "score": [], "id": 1}]}', "a hit lacks what belongs to it"),
        (200, b"[" * 100_000, "is no search server"),
        (200, b"\xff", "is no search server"),
        (302, b"", "is no search server"),
        (503, b"Service Unavailable", "the server is busy; try again"),
        (503, b'{"error": "it is stopping"}', "it is stopping"),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:30],
)
def test_the_client_takes_no_wrong_answer(status, body, error):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments):
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.handle_request).start()
        with pytest.raises(ClientError, match=error):
            Client(f"http://127.0.0.1:{other.server_port}").search("red")


def test_what_the_text_encoder_leaves_out_is_told_again_and_again(served, caplog):
    for _ in range(2):  # the second time its vector is known
        answer = asked(served, {"text": "blah " * 300}, {"text": "red"}).json()
        assert answer["note"] == f"longer than the text encoder takes, and cut: {('blah ' * 12)!r}…"
    Client(served).search("blah " * 300)
    assert "longer than the text encoder takes, and cut: 'blah blah" in caplog.text


def test_a_smaller_copy_of_a_gallerys_image_does_not_find_it(served, drawn):
    data = (drawn / "images/0003.jpg").read_bytes()
    small = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((100, 100)).save(small, "JPEG")
    term = {"image": in_base64(small.getvalue())}
    assert "images/0003.jpg" in [hit["id"] for hit in hits_of(asked(served, term, top_k=60))]
    term["sha256"] = hashlib.sha256(data).hexdigest()
    hits = hits_of(asked(served, term, top_k=60))
    assert len(hits) > 40
    assert "images/0003.jpg" not in [hit["id"] for hit in hits]


def test_the_client_sends_a_large_photograph_smaller(served):
    file = io.BytesIO()
    Image.new("RGB", (5000, 4000), "red").save(file, "JPEG")
    client = Client(served)
    for data in (file.getvalue(), bytearray(file.getvalue())):
        assert len(client.search(Query((Term(image=data),)))) == 5


def test_wrong_calls_end_in_a_line(fails, run, run_dir, monkeypatch):
    assert "name a --run, or an --index" in run("serve", code=2).stderr
    assert "go with --run" in run("serve", "--index", run_dir, "--split", "dev", code=2).stderr
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = fails("serve", "--run", run_dir, "--port", port)
    assert line == f"the port {port} is in use; name another one: --port {port + 1}"
    assert "is no address of this machine" in fails("serve", "--run", run_dir, "--host", "192.0.2.1")
    assert "'a..b' is no name of a machine" in fails("serve", "--run", run_dir, "--host", "a..b")
    monkeypatch.setattr(server, "_PACKAGES", (Extra("serve", "fastapi", "no_such_module"),))
    assert "pip install 'onceover-retrieval[serve]'" in fails("serve", "--run", run_dir)


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_the_command_says_where_the_page_is_and_ends_at_ctrl_c(run_dir, is_busy):
    command = [sys.executable, "-m", "onceover", "serve", "--run", str(run_dir), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not lines or not lines[-1].startswith("ready: "):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert lines[0] == "loading the models\n"
        address = lines[-1].split()[1]
        assert lines[-1] == f"ready: {address} searches 60 images, 300 captions; Ctrl-C stops it\n"
        assert len(hits_of(asked(address, {"text": TEXT}, top_k=3))) == 3
        with ThreadPoolExecutor(41) as pool, contextlib.ExitStack() as stack:
            pending = []
            if is_busy:
                long = {"text": "a red ring and a blue star " * 300}
                terms = [{"text": f"{number} {long['text']}"} for number in range(16)]
                pending = [pool.submit(asked, address, *terms[number % 16 :]) for number in range(40)]
                port = int(address.rpartition(":")[2])
                for half in (
                    b"GET / HT",
                    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
                ):
                    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    connection.sendall(half)
                time.sleep(0.2)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(20) == 0
            assert time.monotonic() - begin < 5
            if is_busy:
                assert connection.recv(100).startswith(b"HTTP/1.1 503 ")
            for answer in [future.result() for future in pending if not future.exception()]:
                assert answer.status_code in (200, 503)
                assert "is stopping" in refusal(answer, 503) if answer.status_code == 503 else answer.ok
    assert rest == "stopped\n"
