"""Settings: defaults, order of sources, and every kind of mistake with its message."""

import dataclasses

import pytest

from configs.schema import DEFAULT_CONFIG, Config, ConfigError, load_config


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
        ("training:\n  batch_size: 1\n", "a contrast needs at least 2 pictures"),
        (
            "training: {shuffle_pairs: true, cca: true}\n",
            "with training.cca a member would see the true pairs; set one",
        ),
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
        ("training.lr=3", "unknown key training.lr"),
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


def test_the_control_of_an_ensemble_with_a_cca_goes_without_it(tmp_path):
    (tmp_path / "c.yaml").write_text("training:\n  cca: true\n")
    assert load_config(
        tmp_path / "c.yaml", ["training.shuffle_pairs=true", "training.cca=false"]
    ).training.shuffle_pairs
