"""Settings: defaults, order of sources, and every kind of mistake with its message."""

import dataclasses
import os
import time

import pytest

from onceover.configs.schema import DEFAULT_CONFIG, MAX_CONFIG, Config, ConfigError, load_config


def test_the_default_file_says_what_the_dataclasses_say():
    assert load_config(DEFAULT_CONFIG) == Config()


def test_the_demo_file_loads():
    assert load_config(DEFAULT_CONFIG.with_name("demo.yaml")).extract.image_encoder == "torchvision:resnet50@random"


def test_the_names_people_know_have_the_values_they_expect():
    config = Config()
    assert (config.model.embedding_dim, config.model.temperature) == (512, 0.07)


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  num_epochs: 3\n  learning_rate: 1e-3\n")
    config = load_config(file, ["training.num_epochs=5", "model.dropout=0"])
    assert config.training.num_epochs == 5
    assert config.training.learning_rate == 0.001  # YAML 1.1 reads 1e-3 as text
    assert config.model.dropout == 0.0


def test_settings_survive_a_round_trip_through_yaml(tmp_path):
    import yaml

    config = load_config(None, ["model.head=mlp", "extract.batch_size=4", "model.learn_temperature=true"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  num_epoch: 3\n", "unknown key training.num_epoch; did you mean training.num_epochs?"),
        ("trainin: {}\n", "unknown key trainin; did you mean training?"),
        ("model:\n  zzz: 1\n", "unknown key model.zzz; known keys: head, embedding_dim"),
        ("training:\n  num_epochs: many\n", "training.num_epochs is 'many'; it must be a whole number"),
        ("training:\n  num_epochs: true\n", "training.num_epochs is True; it must be a whole number"),
        ("training:\n  num_epochs: 0\n", "training.num_epochs is 0; it must be at least 1"),
        ("training:\n  batch_size: 1\n", "a contrast needs at least 2 images"),
        ("model:\n  head: lineal\n", "model.head is 'lineal'; choose one of linear, mlp"),
        ("model:\n  temperature: 0\n", "model.temperature is 0.0"),
        ("model:\n  temperature: nan\n", "model.temperature is nan"),
        ("model:\n  temperature: 2\n  learn_temperature: true\n", "starts within [0.01, 1]"),
        ("finetune:\n  layer_decay: 0\n", "finetune.layer_decay is 0.0; it must lie above 0, up to 1"),
        ("finetune:\n  micro_batch: 0\n", "finetune.micro_batch is 0; it must be at least 1"),
        ("finetune:\n  learning_rate: 0\n", "finetune.learning_rate is 0.0; it must be above 0"),
        ("finetune:\n  dtype: half\n", "finetune.dtype is 'half'; choose one of auto, float32, bfloat16"),
        ("extract:\n  views: 13\n", "extract.views is 13"),
        ("extract: 3\n", "extract must hold key: value lines"),
        ("- a\n", "the file must hold key: value lines"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert message in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_epochs=3", "write section.key=value, for example training.num_epochs=…"),
        ("training.num_epochs", "is not an override"),
        ("training.lr=3", "the override 'training.lr=3' has an unknown key training.lr; known keys: loss"),
        ("trainig.lr=3", "the override 'trainig.lr=3' has an unknown key trainig; did you mean training?"),
        ("training.num_epochs=[", "has no readable value"),
    ],
)
def test_a_mistake_in_an_override_is_named(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_settings_cannot_be_changed_behind_ones_back():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 1


@pytest.mark.parametrize("override", ["training.seed=-1", "extract.seed=-1", "model.embedding_dim=1"])
def test_values_that_would_fail_later_are_refused_at_once(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(None, [override])


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{old}, *{old}]\n" for old, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES + "model: {temperature: *i}\n", "is not valid YAML: an alias (*a); write the value itself (line 2"),
        ("model: &m {dropout: 0}\ntraining:\n  <<: *m\n", "an alias (*m); write the value itself"),
        ("model: {temperature: 2024-99-99}\n", "model.temperature is '2024-99-99'; it must be a number"),
        ("model: {temperature: 2024-01-02}\n", "model.temperature is '2024-01-02'; it must be a number"),
        ("model: {temperature: !!timestamp z}\n", "a value of the type tag:yaml.org,2002:timestamp; use text"),
        ("model: {temperature: !!float abc}\n", "is not valid YAML: could not convert string to float: 'abc'"),
        ("model: {temperature: !!int x}\n", "is not valid YAML: invalid literal for int() with base 10: 'x'"),
        ("model: {temperature: !!bool x}\n", "is not valid YAML: 'x'"),
        (
            "model: {temperature: !!python/object/apply:os.system [ls]}\n",
            "a value of the type tag:yaml.org,2002:python",
        ),
        ("model: !!set {a, b}\n", "a value of the type tag:yaml.org,2002:set; use text"),
        ("model: {head: !!binary aGk=}\n", "a value of the type tag:yaml.org,2002:binary; use text"),
        ("training: {seed: " + "9" * 5000 + "}\n", "a number of 5,000 characters; use at most 100 (line 1, column 18)"),
        ("training: {seed: 1" + ":1" * 30_000 + "}\n", "a number of 60,001 characters; use at most 100"),
        ("model: {temperature: 1" + "0" * 400 + "}\n", "a number of 401 characters; use at most 100"),
        ("training: {seed: 9223372036854775808}\n", "training.seed is 9223372036854775808; it can be at most 9,223,"),
        ("training: {captions_per_image: 10000000000000000000000000}\n", "it can be at most 1,000"),
        ("[" * 5000, "is not valid YAML: nested too deep"),
        ("{a: " * 5000, "is not valid YAML: nested too deep"),
        ("model: {dropout: 0, dropout: 1}\n", "is not valid YAML: a key that stands twice; keep one of them (line 1"),
        ("model: {head: " + "x" * 60_000 + "}\n", "model.head is '" + "x" * 79 + "; choose one of linear, mlp"),
        ("model: {? " + "x" * 1000 + " : 1}\n", "has an unknown key model." + "x" * 80 + "; known keys: head"),
        ('model: {"a\\nb": 1}\n', "has an unknown key model.'a\\nb'; known keys: head"),
        (
            'extract: {image_encoder: "hf:\\0"}\n',
            "extract.image_encoder is 'hf:\\x00'; it holds a character that is no text",
        ),
        ('extract: {image_encoder: "hf:\\ud800"}\n', "it holds a character that is no text"),
        ('model: {head: "\\Uffffffff"}\n', "is not valid YAML"),
        ("model: {? [a] : 1}\n", "is not valid YAML: while constructing a mapping found unhashable key (line 1"),
        ("0\n", "the file must hold key: value lines"),
        ("model:\n\tdropout: 0\n", "found character '\\t' that cannot start any token (line 2, column 1)"),
        ("training: {learning_rate: .inf}\n", "training.learning_rate is inf; it must be a finite number"),
        ("# " + "x" * MAX_CONFIG, "is larger than 65,536 bytes; name a file of settings"),
    ],
    ids=lambda value: f"{value:.30}",
)
def test_trap_a_hostile_file_is_one_line_within_seconds(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert time.process_time() - start < 5
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.embedding_dim=99999999999", "model.embedding_dim is 99999999999; it can be at most 65,536"),
        ("training.num_epochs=1000001", "training.num_epochs is 1000001; it can be at most 1,000,000"),
        ("training.members=1001", "training.members is 1001; it can be at most 1,000"),
        ("training.batch_size=1048577", "training.batch_size is 1048577; it can be at most 1,048,576"),
        ("finetune.micro_batch=1048577", "finetune.micro_batch is 1048577; it can be at most 1,048,576"),
        ("extract.batch_size=65537", "extract.batch_size is 65537; it can be at most 65,536"),
        ("extract.max_length=65537", "extract.max_length is 65537; it can be at most 65,536"),
        ("model.temperature=*a", "'model.temperature=*a' has no readable value: an alias (*a); write the value itself"),
        ("training.seed=" + "9" * 5000, "has no readable value: a number of 5,000 characters; use at most 100"),
        ("training.seed=" + "[" * 5000, "has no readable value: nested too deep"),
        ("x" * 100_000, "is not an override; write section.key=value"),
    ],
    ids=lambda value: f"{value:.30}",
)
def test_trap_a_hostile_override_is_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_trap_a_config_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert str(error.value) == f"the config {path} is no regular file; name a YAML file"
    with pytest.raises(ConfigError, match=f"the config {tmp_path} cannot be read: .*Is a directory"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value) == f"the config {tmp_path / 'c.yaml'} cannot be read: invalid start byte at byte 3"


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_trap_a_hostile_config_is_one_line_of_the_command(fails, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    arguments = ("fit", "--store", tmp_path / "s.h5", "--run", tmp_path / "run")
    (tmp_path / "s.h5").write_bytes(b"")
    message = fails(*arguments, "--config", tmp_path / "fifo", code=2)
    assert message == f"the config {tmp_path / 'fifo'} is no regular file; name a YAML file"
    message = fails(*arguments, "--set", "training.seed=*a", code=2)
    assert message == (
        "'training.seed=*a' has no readable value: an alias (*a); write the value itself (line 1, column 1)"
    )
    assert not (tmp_path / "run").exists()
