"""The report in a browser without a network: the map, tables that sort, both colour schemes, and print."""

import json
import re

import pytest

PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True}


@pytest.fixture(scope="module")
def complaints():
    """What the browser complains of, of all pages of this module."""
    return []


@pytest.fixture(autouse=True)
def nothing_is_complained_of(complaints):
    yield
    assert complaints == []


def opened(browser, report, complaints, **options):
    """A page with the report, without a network."""
    page = browser.new_context(offline=True, **options).new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: None if request.url[:5] in ("file:", "data:") else complaints.append(request.url)
    )
    page.goto(report.as_uri())
    return page


@pytest.fixture(scope="module")
def desktop(browser, report_file, complaints):
    page = opened(browser, report_file, complaints)
    yield page
    page.context.close()


@pytest.fixture
def page(desktop):
    """The report on a desktop, loaded once for all tests, its map as it is at first."""
    desktop.mouse.move(5, 5)
    desktop.get_by_label("Projection").select_option("tsne")
    desktop.get_by_role("searchbox", name="Word").fill("")
    desktop.get_by_label("Colour by").select_option("kind")
    desktop.locator(".map-view").press("0")
    return desktop


@pytest.fixture
def data(report_file):
    text = report_file.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="map-data">(.*?)</script>', text, re.DOTALL)[1])


def place(page, point):
    """Scrolls to the map and returns where in the window a point of it is."""
    page.locator(".map-view").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.map-view canvas').width > 0")
    at = page.evaluate("id => reportMap.position(id)", point)
    return at["x"], at["y"]


def alone(page, rows):
    """The numbers of the images that have no other point so near that it could be meant."""
    at = [
        page.evaluate("id => reportMap.position(id)", f"{kind}:{n}")
        for n in range(len(rows))
        for kind in ("image", "caption")
    ]
    chosen = []
    for number in range(0, len(at), 2):
        gaps = [abs(a["x"] - at[number]["x"]) + abs(a["y"] - at[number]["y"]) for n, a in enumerate(at) if n != number]
        if min(gaps) > 3:
            chosen.append(number // 2)
    return chosen


def test_every_figure_and_image_is_shown(page):
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert page.evaluate("[...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt)") == []
    assert page.locator("figure.drawing img").count() == 7
    for alt in ("training: ", "ranks: ", "similarity-ordered: ", "models: "):
        assert page.locator(f'figure.drawing img[alt^="{alt}"]').count() == 1
    colours = page.evaluate(
        """() => { const canvas = document.querySelector('.map-view canvas');
        const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let drawn = 0; for (let at = 3; at < all.length; at += 4) drawn += all[at] > 0; return drawn; }"""
    )
    assert colours > 500


def test_a_point_says_what_it_is(page, data):
    place(page, "image:0")
    chosen = alone(page, data["rows"])
    assert len(chosen) >= 3
    for number in chosen[:3]:
        row = data["rows"][number]
        page.mouse.move(*place(page, f"image:{number}"))
        card = page.locator(".map-card")
        assert card.locator("img").get_attribute("src") == data["thumbnails"][number]
        assert card.locator(".map-caption").inner_text() == row["caption"]
        rank = f", rank {row['ranks'][0]} of {data['galleries'][0]:,}" if row["ranks"][0] else ""
        assert card.locator(".map-facts").first.inner_text() == f"image, {row['split']}{rank}"
    page.mouse.move(5, 5)
    assert card.is_hidden()


def test_on_a_phone_a_finger_opens_a_point_and_all_can_be_read(browser, report_file, complaints, data):
    page = opened(browser, report_file, complaints, **PHONE)
    place(page, "image:0")
    number = alone(page, data["rows"])[0]
    page.touchscreen.tap(*place(page, f"image:{number}"))
    assert page.locator(".map-card .map-caption").inner_text() == data["rows"][number]["caption"]
    x, y = place(page, f"image:{number}")
    card = page.locator(".map-card").bounding_box()
    assert not (card["x"] <= x <= card["x"] + card["width"] and card["y"] <= y <= card["y"] + card["height"])
    assert "linear-gradient" in page.locator(".drawing").first.evaluate("box => getComputedStyle(box).backgroundImage")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out of a phone
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    shrunk = "[...document.querySelectorAll('.drawing img')].filter((image) => image.width < image.naturalWidth - 1)"
    assert page.evaluate(f"{shrunk}.map((image) => image.alt)") == []
    table = page.locator("#comparison .scroll").first
    first = table.locator("tbody th").first
    before = first.bounding_box()
    table.evaluate("box => { box.scrollLeft = 200; }")
    assert table.evaluate("box => box.scrollLeft") > 50
    assert first.bounding_box() == before  # what names the row stays
    page.context.close()


def test_the_map_zooms_by_wheel_button_and_key_and_goes_back(page):
    before = place(page, "image:0"), place(page, "image:1")
    box = page.locator(".map-view").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def gap():
        (ax, ay), (bx, by) = place(page, "image:0"), place(page, "image:1")
        return ((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5

    start = gap()
    page.mouse.move(*middle)
    page.mouse.wheel(0, 1)
    page.locator(".map-view").focus()
    page.mouse.wheel(0, -200)
    page.wait_for_timeout(100)
    wheel = gap()
    assert wheel > 1.3 * start
    page.get_by_role("button", name="Zoom in").click()
    assert gap() == pytest.approx(1.5 * wheel, rel=0.01)
    page.locator(".map-view").press("-")
    assert gap() == pytest.approx(wheel, rel=0.01)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 50, middle[1] + 20, steps=4)
    page.mouse.up()
    page.locator(".map-view").press("0")
    after = place(page, "image:0"), place(page, "image:1")
    assert after[0] == pytest.approx(before[0], abs=1)
    assert after[1] == pytest.approx(before[1], abs=1)


def test_the_keyboard_goes_from_point_to_point_and_is_told_where_it_is(page, data):
    view = page.locator(".map-view")
    view.focus()
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        view.press(key)
        said.append(page.locator(".map-spoken").inner_text())
    assert len(set(said)) >= 3
    captions = {row["caption"] for row in data["rows"]}
    assert all(text.split(": ", 1)[1] in captions for text in said)
    view.press("Escape")
    assert page.locator(".map-card").is_hidden()


def test_points_are_coloured_by_kind_split_rank_and_a_word(page, data):
    legend = page.locator(".map-legend")
    assert legend.inner_text().split() == ["image", "caption"]
    ways = page.get_by_label("Colour by")
    ways.select_option("split")
    assert legend.inner_text().split() == ["image", "caption", *sorted({row["split"] for row in data["rows"]})]
    ways.select_option("rank")
    shares = [
        rank / gallery
        for row in data["rows"]
        for rank, gallery in zip(row["ranks"], data["galleries"], strict=True)
        if rank
    ]
    least = f"{100 / min(data['galleries']):.2g}"
    assert f"rank in the first {least}\u00a0%" in legend.inner_text()
    assert f"{float(f'{100 * max(shares):.2g}'):g}\u00a0% of the items searched (logarithmic" in legend.inner_text()
    word = page.get_by_role("searchbox", name="Word")
    word.fill("re")
    assert f"0 of {len(data['rows'])} captions with the word “re”" in legend.inner_text()
    word.fill("red")
    count = sum(bool(re.search(r"\breds?\b", row["caption"].lower())) for row in data["rows"])
    assert 0 < count < len(data["rows"])
    assert f"{count} of {len(data['rows'])} captions with the word “red”" in legend.inner_text()
    assert ways.input_value() == "word"
    word.fill("")
    assert ways.input_value() == "rank"
    page.get_by_label("Projection").select_option("pca")
    first, second_ = data["rows"][0]["pca"], data["rows"][1]["pca"]
    (ax, _), (bx, _) = place(page, "image:0"), place(page, "image:1")
    assert (bx - ax) * (second_[0] - first[0]) > 0


def test_tables_sort_by_click_and_by_key(page):
    table = page.locator("#results table").first
    column = table.locator("thead th", has_text="median rank")

    def numbers():
        place_of = [head.strip(" ↕↑↓") for head in table.locator("thead th").all_inner_texts()].index("median rank")
        return [float(text) for text in table.locator(f"tbody td:nth-child({place_of + 1})").all_inner_texts()]

    unsorted = numbers()
    column.get_by_role("button").click()
    assert column.get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(unsorted) != unsorted
    column.get_by_role("button").press("Enter")
    assert column.get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(unsorted, reverse=True)
    model = table.locator("thead th").first
    model.get_by_role("button").press("Space")
    assert column.get_attribute("aria-sort") is None
    names = table.locator("tbody th").all_inner_texts()
    assert names == sorted(names)


def test_axe_finds_nothing_serious_in_light_and_dark(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        violations = axe.Axe().run(page).response["violations"]
        assert [(found["id"], found["nodes"][0]["html"]) for found in violations] == [], scheme
    assert "brightness" in page.locator(".drawing").first.evaluate("figure => getComputedStyle(figure).filter")


def test_it_prints_in_the_colours_of_paper_with_its_folded_parts_open_at_the_end(page):
    page.get_by_label("Colour by").select_option("rank")
    page.evaluate(
        """() => { window.printed = [];
        const canvas = document.querySelector('.map-view canvas');
        matchMedia('print').addEventListener('change', ({ matches }) => {
          if (!matches) return;
          const text = getComputedStyle(document.body).color;
          const open = [...document.querySelectorAll('details')].every((part) => part.open);
          const blank = Object.assign(document.createElement('canvas'), { width: canvas.width, height: canvas.height });
          window.printed.push([canvas.toDataURL(), canvas.toDataURL() !== blank.toDataURL(), text, open]);
        }); }"""
    )
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", pdf)) > 2
    light, dark = page.evaluate("window.printed")
    assert light == dark  # the map, too, which is drawn before it is printed
    assert dark[1:] == [True, "rgb(0, 0, 0)", True]
    assert not page.evaluate("[...document.querySelectorAll('details')].some((part) => part.open)")
    assert page.evaluate("[...document.querySelectorAll('section')].at(-1).querySelectorAll('details').length") >= 5
    assert page.locator("details").count() == page.locator("section#details details").count()
