"""The search page in headless Chromium: queries, hits, one item, the address, keys, narrow windows, the map."""

import re
import time
from functools import partial

import pytest
from conftest import serving
from PIL import Image

from onceover.serve import server

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe tells whether a page is accessible")
REFUSED = "the server responded with a status of "  # which Chromium itself says of every such answer
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 375, "height": 700}
TEXT = "a red circle above a blue star"


@pytest.fixture
def open_page(browser, served):
    """Opens the page in a window of its own; nothing may be said on its console."""
    contexts = []
    said = []

    def open_at(address="", size=DESKTOP, scheme="light", server=served):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if REFUSED not in message.text else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{server}/{address}")
        page.wait_for_selector("#results button, #error:not([hidden]), #map canvas, dialog[open]")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def page(open_page):
    return open_page()


def until(page, expression, arg=None):
    """Waits until an expression is true; Playwright's own way needs what the page's security policy forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(expression, arg):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def answered(page):
    """Waits until the answer to the query is shown."""
    page.wait_for_selector("#status:not(:empty)")
    until(page, "!document.body.classList.contains('busy')")


def ask(page, text):
    """Types a query and waits for its answer."""

    def is_its(answer):
        return answer.url.endswith("/api/search") and answer.request.post_data_json["terms"][0]["text"] == text

    with page.expect_response(is_its) as answer:
        page.fill("#text", text)
    assert answer.value.ok
    answered(page)


def ids(page):
    return page.eval_on_selector_all("#results button", "buttons => buttons.map(button => button.dataset.id)")


def chips(page):
    return page.eval_on_selector_all("#chips .chip", "chips => chips.map(chip => chip.innerText.replace(/\\s+/g, ' '))")


def found(served, *terms, **settings):
    import requests

    message = {"terms": list(terms), "top_k": 24, **settings}
    return [hit["id"] for hit in requests.post(f"{served}/api/search", json=message, timeout=20).json()["hits"]]


def test_results_come_as_one_types_with_scores_and_images_that_are_there(page, served):
    assert page.inner_text("#name") == "run · 60 images, 300 captions"
    assert len(ids(page)) == 24  # a sample of the gallery
    ask(page, TEXT)
    assert ids(page) == found(served, {"text": TEXT})
    assert re.fullmatch(r"24 images, score −?\d\.\d{3} to −?\d\.\d{3}", page.inner_text("#status"))
    until(page, "[...document.querySelectorAll('#results img')].every(image => image.naturalWidth > 0)")
    shown = page.eval_on_selector_all(".number", "numbers => numbers.map(number => number.textContent)")
    scores = [float(text.replace("−", "-")) for text in shown]
    assert scores == sorted(scores, reverse=True)
    assert page.inner_text("#status").endswith(f", score {shown[0]} to {shown[-1]}")
    page.fill("#text", "")
    page.wait_for_selector("#start:not([hidden])")


def test_only_the_last_of_several_answers_is_shown(page, served):
    held = []
    page.route(
        "**/api/search",
        lambda route: held.append(route) if "slow" in route.request.post_data else route.continue_(),
    )
    page.fill("#text", "slow")
    end = time.monotonic() + 10
    while not held:
        assert time.monotonic() < end
        page.wait_for_timeout(20)
    ask(page, TEXT)
    assert ids(page) == found(served, {"text": TEXT})
    assert page.inner_text("#error") == ""


def test_an_example_is_searched_for(page, served):
    example = page.inner_text("#examples button >> nth=0")
    page.click("#examples button >> nth=0")
    answered(page)
    assert page.input_value("#text") == example
    assert ids(page) == found(served, {"text": example})


def test_an_image_file_is_searched_by_and_is_not_in_the_address(page, drawn):
    with page.expect_response("**/api/search") as answer:
        page.set_input_files("#file", drawn / "images" / "0007.jpg")
    assert answer.value.ok
    answered(page)
    assert len(ids(page)) == 24
    assert "images/0007.jpg" not in ids(page)  # though it was sent as another JPEG
    assert chips(page) == ["+ 0007.jpg ×"]
    assert "not part of the address" in page.inner_text("#note")
    assert "term" not in page.url
    page.click(".chip .sign")
    until(page, "document.querySelector('.chip.minus') !== null")
    page.go_back()
    until(page, "document.querySelector('.chip.minus') === null")
    assert chips(page) == ["+ 0007.jpg ×"]
    page.reload()
    page.wait_for_selector("#results button")
    assert chips(page) == []
    assert page.inner_text("#note").startswith("This query had an image of your own")


def test_an_image_can_be_dropped_and_pasted(page, drawn):
    import base64

    data = base64.b64encode((drawn / "images" / "0007.jpg").read_bytes()).decode()
    make = (
        "data => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));"
        "const transfer = new DataTransfer();"
        "transfer.items.add(new File([bytes], 'mine.jpg', {type: 'image/jpeg'})); return transfer; }"
    )
    for number, kind in enumerate(("drop", "paste"), 1):
        transfer = page.evaluate_handle(make, data)
        with page.expect_response("**/api/search") as answer:
            if kind == "drop":
                page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
                assert page.is_visible("#drop")
                page.dispatch_event("body", "drop", {"dataTransfer": transfer})
                assert page.is_hidden("#drop")
            else:
                page.evaluate(
                    "files => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files}))", transfer
                )
        assert answer.value.ok
        until(page, f"document.querySelectorAll('.chip').length === {number}")
        answered(page)
        assert "images/0007.jpg" not in ids(page)


def test_a_file_that_is_no_image_is_refused_in_words(page, tmp_path):
    (tmp_path / "letter.jpg").write_text("Dear all")
    page.set_input_files("#file", tmp_path / "letter.jpg")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == (
        "this is no usable image: not an image in a known format; send another file, such as a JPEG or PNG"
    )

    page.fill("#text", "a red star")
    page.wait_for_selector(".number")
    assert chips(page) == []


def test_an_image_that_the_server_refuses_is_taken_out_of_the_query(page):
    def refuse_images(route):
        if "image" not in route.request.post_data_json["terms"][-1]:
            route.continue_()
            return
        route.fulfill(status=400, body='{"error": "no such image"}')

    page.route("**/api/search", refuse_images)
    ask(page, "a red star")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    until(page, "document.getElementById('error').textContent === 'no such image'")
    until(page, "!document.body.classList.contains('busy')")
    assert chips(page) == []
    assert len(ids(page)) == 24
    page.unroute("**/api/search")
    ask(page, "a blue star")
    assert page.is_hidden("#error")


def test_the_back_button_keeps_a_query_that_was_typed_after_it(page):
    ask(page, "a red circle")
    page.click("#gallery label:last-of-type")
    until(page, "document.getElementById('results').className === 'lines'")
    page.go_back()
    until(page, "document.getElementById('results').className === 'grid'")
    ask(page, "a red circle above")
    page.go_back()
    until(page, "document.getElementById('text').value === 'a red circle'")


def test_an_address_with_too_many_terms_says_so(open_page):
    page = open_page("?" + "&".join(f"term=%2Btext:star{number}" for number in range(20)))
    answered(page)
    assert len(chips(page)) == 15
    assert page.inner_text("#note") == "The address has 20 terms; a query takes the first 15."


def test_an_opened_hit_has_its_rank_when_it_is_opened_by_its_address(page, open_page, served):
    name = found(served, {"text": TEXT})[2]
    again = open_page(f"?q={TEXT.replace(' ', '+')}&open=image:{name}")
    again.wait_for_selector("dialog[open]")
    until(again, "document.getElementById('item-facts').textContent.startsWith('hit 3 · score ')")


def fulfilled(route, _request, status, body):
    route.fulfill(status=status, body=body)


def test_wrong_and_busy_answers_are_told_in_words(page):
    for status, body, text in [
        (503, "Service Unavailable", "The server is busy; try again."),
        (200, '{"hits": [', "The answer was cut off; try again."),
    ]:
        page.route("**/api/search", partial(fulfilled, status=status, body=body))
        page.fill("#text", f"a query that gets {status}")
        until(page, "text => document.getElementById('error').textContent === text", arg=text)
        page.unroute("**/api/search")


def test_a_server_that_does_not_answer_at_first_is_asked_again(open_page, browser, served):
    context = browser.new_context()
    page = context.new_page()
    page.route("**/api/info", lambda route: route.abort())
    page.goto(served)
    page.wait_for_selector("#error:not([hidden])")
    page.keyboard.type("/red")
    page.unroute("**/api/info")
    page.wait_for_selector("#results button")
    assert page.is_hidden("#error")
    context.close()


def test_a_click_shows_an_image_with_its_captions_and_searches_by_it(page, served):
    ask(page, TEXT)
    name = ids(page)[2]
    page.click("#results li:nth-child(3) button")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#item-title") == name.rpartition("/")[2]
    assert page.locator("#item-captions li").count() == 5
    until(page, "document.getElementById('item-image').naturalWidth === 224")  # the file, no thumbnail
    assert page.inner_text("#item-facts").startswith("hit 3 · score ")
    with page.expect_response("**/api/search"):
        page.click("#search-by")
    until(page, "name => document.querySelector('#results button')?.dataset.id !== name", arg=name)
    assert page.is_hidden("dialog")
    assert ids(page) == found(served, {"item": name})
    assert name not in ids(page)
    assert page.input_value("#text") == ""


def test_terms_are_combined_turned_round_and_removed(page, served):
    ask(page, "a red circle")
    page.click("#subtract")
    assert chips(page) == ["+ a red circle ×"]  # what was found goes on
    assert page.is_visible("#sign")
    ask(page, "a yellow square")
    assert ids(page) == found(served, {"text": "a red circle"}, {"text": "a yellow square", "weight": -0.5})
    page.click("#add")
    assert chips(page) == ["+ a red circle ×", "− a yellow square ×"]
    ask(page, "a star")
    terms = [{"text": "a star", "weight": 0.5}, {"text": "a red circle", "weight": 0.5}]
    terms.append({"text": "a yellow square", "weight": -0.5})
    assert ids(page) == found(served, *terms)
    page.click("#results button >> nth=5")
    page.wait_for_selector("dialog[open]")
    name = found(served, *terms)[5]
    with page.expect_response("**/api/search"):
        page.click("#item-subtract")
    assert chips(page)[2] == f"− {name} ×"
    with page.expect_response("**/api/search"):
        page.click(".chip:nth-child(2) .sign")
    assert chips(page)[1] == "+ a yellow square ×"
    with page.expect_response("**/api/search"):
        page.click(".chip:nth-child(1) .remove")
    until(page, "document.querySelectorAll('.chip').length === 2")
    expected = [{"text": "a star"}, {"text": "a yellow square"}, {"item": name, "weight": -1}]
    until(page, "id => document.querySelector('#results button').dataset.id === id", arg=found(served, *expected)[0])
    assert ids(page) == found(served, *expected)


def test_the_sliders_and_the_switch_change_what_is_found(page, served):
    ask(page, TEXT)
    best = page.locator(".number").first.inner_text()
    page.fill("#top-k", "7")
    until(page, "document.querySelectorAll('#results button').length === 7")
    page.fill("#min-score", str(min(1, round(float(best) + 0.02, 2))))
    until(page, "document.getElementById('status').textContent.startsWith('No image scores ')")
    assert f"the best scores {best}. Lower the minimum score." in page.inner_text("#status")
    page.fill("#min-score", "-0.01")
    until(page, "document.querySelectorAll('#results button').length === 7")
    page.click("#gallery label:last-of-type")
    until(page, "document.getElementById('status').textContent.startsWith('7 captions')")
    assert ids(page) == found(served, {"text": TEXT}, gallery="text", top_k=7)
    page.click("#results button")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#item-title")
    until(page, "document.getElementById('item-image').naturalWidth === 224")
    page.click("#search-by")
    page.wait_for_selector(".chip")
    assert ids(page)


def test_absurd_queries_are_answered_and_come_back_from_the_address(page, served):
    script = "<script>document.title = 'hacked'</script><img src=x onerror=document.title='hacked'>"
    for text in ("x " * 5000, "👩‍👩‍👧 😀", "שלום עולם مرحبا", script, "\\ % & + # ?", "+text:-image:"):
        ask(page, text)
        page.click("#add")
        page.wait_for_selector(".chip")
        assert page.inner_text(".chip .label").strip() == text.strip()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        until(page, "!document.body.classList.contains('busy')")
        before = ids(page)
        assert before == found(served, {"text": text.strip()})
        is_cut = "longer than the text encoder takes, and cut: " in page.inner_text("#status")
        assert is_cut or not text.startswith("x x")
        page.reload()
        answered(page)
        assert ids(page) == before
        assert page.title().endswith(" · onceover")
        page.click(".chip .remove")


def test_a_text_that_is_too_long_or_blank_is_no_error_of_the_page(page):
    page.fill("#text", "x" * 10_001)
    page.wait_for_selector("#error:not([hidden])")
    assert "the text has more than 10,000 characters" in page.inner_text("#error")
    page.fill("#text", "   ")
    page.wait_for_selector("#start:not([hidden])")
    assert page.is_hidden("#error")
    assert page.is_disabled("#add")


def test_the_address_holds_the_whole_query_and_the_back_button_goes_through_it(page, open_page, served):
    ask(page, "a red circle")
    page.click("#add")
    page.click(".chip .sign")
    until(page, "document.getElementById('status').textContent.includes('all terms are subtracted')")
    ask(page, "a star")
    page.fill("#top-k", "5")
    page.click("#gallery label:last-of-type")
    until(page, "document.getElementById('status').textContent.startsWith('5 captions')")
    assert page.url == f"{served}/?q=a+star&term=-text%3Aa+red+circle&in=captions&k=5"
    assert page.title() == "a star + −a red circle · onceover"
    shared = open_page("?q=a+star&term=-text%3Aa+red+circle&in=captions&k=5")
    answered(shared)
    assert ids(shared) == ids(page)
    page.click("#results button")
    page.wait_for_selector("dialog[open]")
    assert "open=caption%3A" in page.url
    page.go_back()
    page.wait_for_selector("dialog", state="hidden")
    page.go_back()
    until(page, "document.getElementById('status').textContent.startsWith('5 images')")
    page.go_back()
    until(page, "document.getElementById('status').textContent.startsWith('24 images')")
    assert page.input_value("#text") == "a star"
    page.go_back()
    until(page, "document.getElementById('text').value === ''")
    assert chips(page) == ["− a red circle ×"]
    page.go_forward()
    until(page, "document.getElementById('text').value === 'a star'")


def test_a_wrong_address_is_shown_as_far_as_it_goes(page, served):
    for address in ("?open=image%3Anobody.jpg", "?term=%2Bimage%3Anobody.jpg"):
        page.goto(f"{served}/{address}")
        page.wait_for_selector("#error:not([hidden])")
        assert "no item of this kind" in page.inner_text("#error")
    page.goto(f"{served}/?k=-1&least=x&in=videos&term=?&view=list")
    page.wait_for_selector("#results button")
    assert page.is_hidden("#error")
    assert len(ids(page)) == 24


def test_the_keyboard_alone_is_enough(page, served):
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    assert page.inner_text(":focus") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement === document.querySelector('#results button')")
    page.keyboard.press("/")
    page.keyboard.type("a red star")
    page.wait_for_selector("#status:not(:empty)")
    expected = found(served, {"text": "a red star"})
    until(page, "id => document.querySelector('#results button').dataset.id === id", arg=expected[0])
    page.keyboard.press("ArrowDown")
    row = page.evaluate("getComputedStyle(document.getElementById('results')).gridTemplateColumns.split(' ').length")
    for key, index in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + row),
        ("ArrowLeft", row),
        ("ArrowUp", 0),
        ("End", 23),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.id") == expected[index], key
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text(":focus") == "Search by it"
    page.keyboard.press("ArrowRight")
    until(
        page, "name => document.getElementById('item-title').textContent === name", arg=expected[2].rpartition("/")[2]
    )
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert page.evaluate("document.activeElement.dataset.id") == expected[2]
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Escape")
    assert page.input_value("#text") == ""


def test_a_narrow_window_shows_all_of_it(open_page):
    page = open_page("?q=a+red+star&term=-text:" + "long" * 30, PHONE)
    answered(page)
    for changed in ("#results button", "#close", "#gallery label:last-of-type", "#show-map"):
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        page.click(changed)
        page.wait_for_timeout(50)
    page.wait_for_selector("#map canvas")
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_the_map_shows_the_items_and_opens_one(page):
    asked = []

    def leave_out_tsne_at_first(route):
        answer = route.fetch()
        data = answer.json()
        if not asked:
            for point in data["points"]:
                point["x"].pop("tsne", None)
                point["y"].pop("tsne", None)
            data["is_complete"] = False
        asked.append(data)
        route.fulfill(response=answer, json=data)

    page.route("**/api/map", leave_out_tsne_at_first)
    page.click("#show-map")
    page.wait_for_selector("#map canvas")
    page.get_by_role("searchbox", name="Word").fill("red")
    page.get_by_role("button", name="Zoom in").click()
    page.focus(".map-view")
    page.keyboard.press("ArrowRight")
    before = page.inner_text(".map-card"), page.inner_text(".map-legend")
    until(page, "document.querySelectorAll('.map-bar select')[0].length === 2")  # t-SNE has come
    assert (page.inner_text(".map-card"), page.inner_text(".map-legend")) == before
    assert page.get_by_label("Projection").input_value() == "pca"  # as it was zoomed
    assert page.get_by_role("searchbox", name="Word").input_value() == "red"
    assert page.locator(".map-view").count() == 1
    pairs = {point["id"]: point["pair"] for point in asked[-1]["points"]}
    assert all(pairs[pairs[name]] == name for name in pairs)
    assert "second tap" in page.inner_text(".map-help")
    page.keyboard.press("Escape")
    assert page.eval_on_selector_all(".map-bar select >> nth=1 >> option", "all => all.map(one => one.value)") == [
        "kind",
        "split",
        "word",
    ]
    until(page, "document.querySelector('#map-status').textContent === '60 images, with a caption each.'")
    page.focus(".map-view")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".map-card:not([hidden])")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert page.evaluate("document.activeElement.className").startswith("map-view")
    page.go_back()
    page.wait_for_selector("dialog[open]")
    page.go_back()
    page.go_back()
    page.wait_for_selector("#search-view:not([hidden])")


def test_axe_finds_nothing_serious_in_any_view(open_page):
    page = open_page("?q=a+red+star&term=-text:grass&term=%2Bimage:images/0003.jpg")
    answered(page)
    ways = {"results": [], "captions": ["#gallery label:last-of-type"], "item": ["#results button"]}
    for view, clicks in {**ways, "map": ["#close", "#show-map"]}.items():
        for click in clicks:
            page.click(click)
        if view == "map":
            page.wait_for_selector("#map canvas")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(250)  # until nothing fades any more
            problems = axe.Axe().run(page).response["violations"]
            serious = [problem for problem in problems if problem["impact"] in ("serious", "critical")]
            assert [(view, problem["id"], problem["nodes"][0]["html"]) for problem in serious] == []


def test_what_cannot_be_done_is_not_offered(open_page, tmp_path, run_dir):
    import onceover

    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (50 * number, 0, 0)).save(tmp_path / "photos" / f"{number} #?.png")
    folder = onceover.index(run_dir, tmp_path / "index", images=tmp_path / "photos")
    site = server.open_site(None, folder, device="cpu")
    site.engine.takes["text"] = "the text features were imported"
    with serving(site) as address:
        page = open_page(server=address)
        assert page.is_disabled("#text")
        assert page.is_hidden("#gallery")
        assert page.is_hidden("#subtract")
        assert len(ids(page)) == 5
        page.click("#results button")
        page.wait_for_selector("dialog[open]")
        page.click("#search-by")
        page.wait_for_selector(".number")
        assert len(ids(page)) == 4
        page.close()
