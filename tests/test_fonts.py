"""Captions in any script: drawn with an installed font that has them, else a note names the script; never a warning."""

import shutil
import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from onceover.analysis import fonts
from onceover.analysis.drawing import draw_all, save_figure
from onceover.analysis.fonts import families_for, font_note, needs_shaping, scripts_of

HINDI = "कुत्ता दौड़ता है"
CHINESE = "一只狗在草地上奔跑"
SCRIPTS = [CHINESE, HINDI, "개가 달린다", "שלום עולם", "كلب", "𓃡", "\ue000\uffff", "a\u200db\ufe0f"]


@pytest.fixture
def installed(monkeypatch):
    """Takes fonts in place of those that are installed: by name the characters that each has."""

    def install(**charmaps):
        charmaps = {name.replace("_", " "): set(characters) for name, characters in charmaps.items()}
        own = fonts._covered

        def covered(family, characters):
            if family == fonts.DEFAULT:
                return own(family, characters)
            return frozenset(characters & charmaps[family])

        monkeypatch.setattr(fonts, "_files", lambda: dict.fromkeys([fonts.DEFAULT, *charmaps], FILES[fonts.DEFAULT]))
        monkeypatch.setattr(fonts, "_covered", covered)
        fonts._families_for.cache_clear()

    yield install
    fonts._families_for.cache_clear()


FILES = fonts._files()


def figure_of(text):
    figure = Figure(figsize=(4, 2))
    figure.add_subplot().set_title(text)
    figure.axes[0].set_xticks([0, 1], [text, "Latin"])
    return figure


def family(figure):
    return figure.axes[0].title.get_fontfamily()


def test_texts_that_matplotlibs_own_font_has_are_left_alone(told):
    figure = figure_of("Ein Hund springt über “die” Hürde → ± Собака")
    fonts.use_fonts(figure)
    assert family(figure) == matplotlib.rcParams["font.family"]
    assert told == []


def test_a_caption_gets_the_installed_font_that_has_most_of_it(installed, told):
    installed(Deva_Serif=HINDI[:3], Deva_Sans=HINDI, Han_JP=CHINESE, Han_SC=CHINESE)
    assert families_for(frozenset(HINDI)) == ("Deva Sans",)
    assert families_for(frozenset("一狗")) == ("Han SC",)
    assert families_for(frozenset("狗が一")) == ("Han JP",)
    figure = figure_of(f"{HINDI} {CHINESE}")
    fonts.use_fonts(figure)
    assert family(figure) == [fonts.DEFAULT, "Deva Sans", "Han SC"]
    assert figure.axes[0].get_xticklabels()[0].get_fontfamily() == [fonts.DEFAULT, "Deva Sans", "Han SC"]
    assert figure.axes[0].get_xticklabels()[1].get_fontfamily() == matplotlib.rcParams["font.family"]
    assert [note for note in told if "no installed font" in note] == []


def test_trap_a_script_without_a_font_is_named_once_with_the_mend_and_there_is_no_warning(installed, told, tmp_path):
    installed(Han_SC=CHINESE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = draw_all({"a": lambda: figure_of(f"{CHINESE[0]} สุนัข 🐕")}, tmp_path)
    assert [path.suffix for path in written] == [".png", ".svg", ".pdf"]
    assert told[1:] == [
        "no installed font has the characters of Thai, emoji and symbols, which are drawn as boxes; install one that "
        "has them, such as Google's Noto fonts (Debian and Ubuntu: fonts-noto, fonts-noto-cjk), and draw again"
    ]
    assert "สุนัข" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_with_the_fonts_of_this_machine_no_caption_is_a_warning_or_an_error(told, tmp_path):
    for number, text in enumerate(SCRIPTS):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_figure(figure_of(text), tmp_path / f"{number}.png")
        assert (font_note(text) is None) == (not any("no installed font" in note for note in told)), text
        told.clear()


@pytest.mark.skipif("Noto Sans CJK SC" not in FILES, reason="fonts-noto-cjk is not installed")
def test_chinese_is_drawn_and_embedded(tmp_path, told):
    save_figure(figure_of(CHINESE), tmp_path / "a.pdf")
    save_figure(figure_of("□" * len(CHINESE)), tmp_path / "boxes.png")
    save_figure(figure_of(CHINESE), tmp_path / "a.png")
    assert told == []
    assert (tmp_path / "a.pdf").stat().st_size > 5000
    with Image.open(tmp_path / "a.png") as drawn, Image.open(tmp_path / "boxes.png") as boxes:
        assert len(drawn.tobytes()) and drawn.convert("L").tobytes() != boxes.convert("L").tobytes()


def test_scripts_are_named_as_people_name_them():
    assert scripts_of(CHINESE) == ["CJK"]
    assert scripts_of("कु") == ["Devanagari"]
    assert scripts_of("개ひカ") == ["Hangul", "Hiragana", "Katakana"]
    assert scripts_of("ቋขא") == ["Ethiopic", "Hebrew", "Thai"]
    assert scripts_of("🐕©") == ["emoji and symbols"]
    assert scripts_of("\ue000") == ["private or unassigned characters"]


def test_a_matplotlib_that_does_not_shape_text_says_so(monkeypatch, told):
    monkeypatch.setattr(matplotlib, "__version_info__", (3, 10, 0, "final", 0))
    fonts.use_fonts(figure_of("שלום"))
    assert len(told) == 1
    assert told[0].startswith("this Matplotlib draws letters one by one, from left to right")
    assert not needs_shaping("Ein Hund é 狗 Собака")
    assert needs_shaping("كلب")
    assert needs_shaping("कु") or needs_shaping("कि")


def test_a_damaged_font_and_one_of_bitmaps_are_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"\x00\x01\x00\x00" + b"x" * 100)
    path = Path(shutil.copy(FILES[fonts.DEFAULT], tmp_path / "fine.ttf"))
    fonts._files.cache_clear()
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: [str(broken), str(path)])
    files = fonts._files()
    fonts._files.cache_clear()
    assert str(broken) not in files.values()
    assert files[fonts.DEFAULT]
    assert not any("Last Resort" in name or name.startswith("cmr") for name in files)
    monkeypatch.setattr(fonts, "_files", lambda: {"Broken": str(broken)})
    assert fonts._covered("Broken", frozenset("a")) == frozenset()
