"""The report in a browser without a network: the map, tables that sort, both colour schemes, and print."""

import json
import re

import pytest
from test_report import evaluated, second, swept, whole  # noqa: F401

DARK = {"color_scheme": "dark"}
PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True}


@pytest.fixture
def opened(browser, whole):  # noqa: F811
    """Opens the report offline; what the browser complains of fails the test."""
    contexts = []
    complaints = []

    def open_page(**options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: None if request.url[:5] in ("file:", "data:") else complaints.append(request.url)
        )
        page.goto(whole.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def data(whole):  # noqa: F811
    text = whole.read_text(encoding="utf-8")
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


def test_every_figure_and_image_is_shown(opened):
    page = opened()
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert page.evaluate("[...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt)") == []
    assert page.locator(".paper img").count() == 7
    for alt in ("training: ", "ranks: ", "similarity-ordered: ", "models: "):
        assert page.locator(f'.paper img[alt^="{alt}"]').count() == 1
    colours = page.evaluate(
        """() => { const canvas = document.querySelector('.map-view canvas');
        const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let drawn = 0; for (let at = 3; at < all.length; at += 4) drawn += all[at] > 0; return drawn; }"""
    )
    assert colours > 500


def test_a_point_says_what_it_is(opened, data):
    page = opened()
    place(page, "image:0")
    chosen = alone(page, data["rows"])
    assert len(chosen) >= 3
    for number in chosen[:3]:
        row = data["rows"][number]
        page.mouse.move(*place(page, f"image:{number}"))
        card = page.locator(".map-card")
        assert card.locator("img").get_attribute("src") == data["thumbnails"][number]
        assert card.locator(".map-caption").inner_text() == row["caption"]
        rank = f", rank {row['ranks'][0]}" if row["ranks"][0] else ""
        assert card.locator(".map-facts").first.inner_text() == f"image, {row['split']}{rank}"
    page.mouse.move(5, 5)
    assert card.is_hidden()


def test_a_finger_opens_a_point(opened, data):
    page = opened(**PHONE)
    place(page, "image:0")
    number = alone(page, data["rows"])[0]
    page.touchscreen.tap(*place(page, f"image:{number}"))
    assert page.locator(".map-card .map-caption").inner_text() == data["rows"][number]["caption"]
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out of a phone


def test_the_map_zooms_by_wheel_button_and_key_and_goes_back(opened):
    page = opened()
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


def test_the_keyboard_goes_from_point_to_point_and_is_told_where_it_is(opened, data):
    page = opened()
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


def test_points_are_coloured_by_kind_split_rank_and_a_word(opened, data):
    page = opened()
    legend = page.locator(".map-legend")
    assert legend.inner_text().split() == ["image", "caption"]
    ways = page.get_by_label("Colour by")
    ways.select_option("split")
    assert legend.inner_text().split() == ["image", "caption", *sorted({row["split"] for row in data["rows"]})]
    ways.select_option("rank")
    worst = max(rank for row in data["rows"] for rank in row["ranks"] if rank)
    assert f"{worst:,} (logarithmic" in legend.inner_text()
    page.get_by_role("searchbox", name="Word").fill("re")
    count = sum(bool(re.search(r"(?<!\w)re", row["caption"].lower())) for row in data["rows"])
    assert 0 < count < len(data["rows"])
    assert f"{2 * count} points of {2 * len(data['rows'])} with “re”" in legend.inner_text()
    assert ways.input_value() == "word"
    page.get_by_label("Projection").select_option("pca")
    first, second_ = data["rows"][0]["pca"], data["rows"][1]["pca"]
    (ax, _), (bx, _) = place(page, "image:0"), place(page, "image:1")
    assert (bx - ax) * (second_[0] - first[0]) > 0


def test_tables_sort_by_click_and_by_key(opened):
    page = opened()
    table = page.locator("#results table")
    column = table.locator("thead th", has_text="mean rank")

    def numbers():
        place_of = [head.strip(" ↕") for head in table.locator("thead th").all_inner_texts()].index("mean rank")
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
    names = table.locator("tbody td:first-child").all_inner_texts()
    assert names == sorted(names)


@pytest.mark.parametrize("options", [{}, DARK], ids=["light", "dark"])
def test_axe_finds_nothing_serious(opened, options):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = opened(**options)
    violations = axe.Axe().run(page).response["violations"]
    assert [(found["id"], found["nodes"][0]["html"]) for found in violations] == []


def test_it_prints_with_all_its_folded_parts_open(opened):
    page = opened(**DARK)
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page\r") + pdf.count(b"/Type /Page ") > 2
    assert page.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)")
