"""Tables, settings and JSON of any content, given to the readers themselves."""

import csv
import io
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onceover.base.errors import OnceoverError
from onceover.base.files import read_json
from onceover.configs.schema import Config, load_config
from onceover.extract.dataset.alone import read_captions
from onceover.extract.layouts import read_dataset
from reliability.mutators import BYTE_MUTATORS
from reliability.text_mutators import alias_bomb, mutate_json, mutate_table, mutate_yaml

QUICK = settings(
    max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
captions = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]), min_size=1)


def read_or_refuse(read, *arguments):
    """What a reader gives; nothing where it refuses in one line."""
    try:
        return read(*arguments)
    except OnceoverError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 5000
        return None


@QUICK
@given(st.lists(captions, min_size=1, max_size=6))
def test_captions_come_back_as_they_were_written(tmp_path, texts):
    (tmp_path / "a.jpg").write_bytes(b"")
    table = io.StringIO()
    csv.writer(table).writerows([("image", "caption", "split"), *(("a.jpg", text, "train") for text in texts)])
    (tmp_path / "captions.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    assert read_dataset(tmp_path / "captions.csv").captions == texts


@QUICK
@given(st.integers(0, 2**32))
def test_damaged_tables_are_read_or_refused(tmp_path, seed):
    (tmp_path / "a.jpg").write_bytes(b"")
    text = "image,caption,split\na.jpg,one,train\na.jpg,two,train\n"
    (tmp_path / "captions.csv").write_bytes(mutate_table(text, random.Random(seed)))
    read_or_refuse(read_dataset, tmp_path / "captions.csv", 0)


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_as_captions_are_read_or_refused(tmp_path, data):
    (tmp_path / "captions.txt").write_bytes(data)
    read_or_refuse(read_captions, tmp_path / "captions.txt")


@QUICK
@given(st.integers(0, 2**32))
def test_damaged_json_is_read_or_refused(tmp_path, seed):
    path = tmp_path / "a.json"
    path.write_bytes(mutate_json('{"a": [1, "x", {"b": null}], "c": 2.5}', random.Random(seed)))
    value = read_or_refuse(read_json, path, "the file")
    assert value is None or isinstance(value, dict)


@QUICK
@given(st.integers(0, 2**32))
def test_damaged_settings_are_read_or_refused(tmp_path, seed):
    text = yaml.safe_dump(Config().to_dict())
    path = tmp_path / "config.yaml"
    path.write_bytes(mutate_yaml(text, random.Random(seed)))
    if path.stat().st_size < 2000 and b"&a0" in path.read_bytes():
        return  # test_aliases_do_not_multiply has these
    value = read_or_refuse(load_config, path, [])
    assert value is None or isinstance(value, Config)


def test_settings_come_back_as_they_were_written(tmp_path):
    config = load_config(None, ["model.embedding_dim=7", "training.learning_rate=0.125", "extract.views=2"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(path, []) == config


def test_aliases_do_not_multiply(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(alias_bomb(4))
    with pytest.raises(OnceoverError) as refused:
        load_config(path, [])
    assert len(str(refused.value)) < 2000


@given(st.binary(min_size=2, max_size=200), st.integers(0, 2**32), st.sampled_from(BYTE_MUTATORS))
def test_mutators_are_seeded(data, seed, mutator):
    assert mutator(data, random.Random(seed)) == mutator(data, random.Random(seed))


def test_every_part_of_the_net_is_short():
    for path in Path(__file__).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path.name
