"""Registries: items of a folder, items of other packages, and clear errors."""

import pytest

from onceover.base.registry import Registry, RegistryError

LOSSES = Registry("onceover.heads.losses", "onceover.losses", "loss")


def test_the_items_of_a_folder_are_its_modules():
    assert LOSSES.names() == ["contrastive", "sigmoid"]
    assert LOSSES.load("sigmoid").__name__ == "onceover.heads.losses.sigmoid"


def test_an_unknown_name_is_answered_with_a_near_one_or_with_all():
    with pytest.raises(RegistryError, match="there is no loss 'contrastiv'; did you mean 'contrastive'"):
        LOSSES.load("contrastiv")
    with pytest.raises(RegistryError, match="there is no loss 'x'; use one of contrastive, sigmoid"):
        LOSSES.load("x")


def test_another_package_adds_an_item_and_cannot_take_the_place_of_ours(outside):
    outside("onceover.losses", "mine", "answer = 42")
    outside("onceover.losses", "sigmoid", "answer = 43")
    assert LOSSES.names() == ["contrastive", "mine", "sigmoid"]
    assert LOSSES.load("mine").answer == 42
    assert LOSSES.load("sigmoid").__name__ == "onceover.heads.losses.sigmoid"


def test_a_broken_or_ambiguous_package_is_named_when_its_item_is_asked_for(outside):
    outside("onceover.losses", "broken", "import no_such_module_at_all")
    outside("onceover.losses", "twice", "")
    outside("onceover.losses", "twice", "")
    assert "broken" in LOSSES.names()
    with pytest.raises(RegistryError, match="'broken' of the package outside-0 cannot be imported .*no_such_module"):
        LOSSES.load("broken")
    with pytest.raises(RegistryError, match=r"'twice' is claimed by several packages \(outside-1, outside-2\)"):
        LOSSES.load("twice")
