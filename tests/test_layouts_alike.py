"""The same images in every registered layout: the same bytes and pixels, and the captions and splits that it holds."""

import importlib.util
from pathlib import Path

import pytest

from onceover.extract.layouts import LAYOUTS

CHECK = Path(__file__).resolve().parent.parent / "benchmarks" / "check_layouts.py"
IMAGES = 20


@pytest.fixture(scope="module")
def check_layouts():
    spec = importlib.util.spec_from_file_location("check_layouts", CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LAYOUTS.names())
def test_drawn_images_are_the_same_in_each_layout(name, check_layouts, drawn, tmp_path):
    check_layouts.check_layout(name, check_layouts.real_images(drawn, IMAGES), tmp_path)


@pytest.mark.parametrize("name", LAYOUTS.names())
def test_real_images_are_the_same_in_each_layout(name, check_layouts, shared, tmp_path):
    check_layouts.check_layout(name, check_layouts.real_images(shared / "flickr8k", IMAGES), tmp_path)
