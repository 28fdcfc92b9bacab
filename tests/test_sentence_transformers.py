"""Text encoders of sentence-transformers: their modules, prompts and limits, and what is refused."""

import itertools
import json
import shutil
import sys
import time
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import onceover
from onceover import workflows
from onceover.base.extras import MissingPackageError
from onceover.base.files import files_within
from onceover.configs.schema import Config, ExtractConfig, FinetuneConfig, ModelConfig, TrainingConfig
from onceover.extract.encoder_checks import check_vocabulary
from onceover.extract.encoders import EncoderError, change_stamp, parse_spec
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder
from onceover.heads import finetune_loop
from onceover.retrieval.metrics import quality
from onceover.retrieval.store_pairs import is_dual_encoder

pytestmark = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is missing")

CAPTIONS = ["A brown dog runs through the grass .", "Two children play football .", "A", "dog " * 300]
TYPE = "sentence_transformers.models."  # as models on the hub have it


@pytest.fixture
def made(tiny_bert, tmp_path):
    """Writes a model's folder: a tiny BERT, a pooling with some settings, and other modules behind it."""

    def make(*others, pooling=None, settings=None, limits=None, name="model"):
        folder = tmp_path / name
        shutil.copytree(tiny_bert, folder)
        pooling = {"word_embedding_dimension": 32, **(pooling or {"pooling_mode_mean_tokens": True})}
        modules = [("Transformer", limits or {}), ("Pooling", pooling), *others]
        entries = []
        for number, (kind, config) in enumerate(modules):
            path = f"{number}_{kind}" if number else ""
            (folder / path).mkdir(exist_ok=True)
            file = folder / path / "config.json" if number else folder / "sentence_bert_config.json"
            file.write_text(json.dumps(config))
            entries.append({"idx": number, "name": str(number), "path": path, "type": TYPE + kind})
        (folder / "modules.json").write_text(json.dumps(entries))
        if settings:
            (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        return folder

    return make


def dense(folder, number=2, suffix="safetensors", **config):
    """Settings of a dense layer, and its weights, 64 or 32 to 12."""
    import safetensors.torch

    torch.manual_seed(0)
    weights = {"linear.weight": torch.randn(12, config["in_features"]), "linear.bias": torch.randn(12)}
    file = folder / f"{number}_Dense" / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    if suffix == "safetensors":
        safetensors.torch.save_file(weights, file)
    else:
        torch.save(weights, file)


DENSE = {"in_features": 32, "out_features": 12, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def encoded(folder, captions=CAPTIONS, **options):
    """sentence-transformers' own vectors."""
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        return model.encode(captions, convert_to_numpy=True, show_progress_bar=False, **options)


def encoder_of(spec, **options):
    return TextEncoder(spec, device="cpu", **options)


def check_same(folder, **options):
    encoder = encoder_of(f"st:{folder}")
    features, _ = encoder.encode(CAPTIONS)
    np.testing.assert_allclose(features, encoded(folder, **options), rtol=1e-5, atol=1e-5)
    return encoder


def refusal(spec):
    with pytest.raises(EncoderError) as raised:
        encoder_of(spec)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "modes", [["cls_token"], ["mean_tokens"], ["max_tokens"], ["lasttoken"], ["weightedmean_tokens"],
              ["mean_sqrt_len_tokens"], ["cls_token", "mean_tokens", "max_tokens"]],
    ids=lambda modes: "+".join(modes),
)  # fmt: skip
def test_each_way_of_pooling(made, modes):
    folder = made(pooling={f"pooling_mode_{mode}": mode in modes for mode in {"mean_tokens", *modes}})
    encoder = check_same(folder)
    assert encoder.recipe["pooling"] == "own"
    assert encoder.encode(CAPTIONS)[0].shape == (4, 32 * len(modes))


def test_dense_layers_and_the_length_of_the_vector(made):
    folder = made(("Dense", DENSE), ("Normalize", {}))
    dense(folder, in_features=32)
    encoder = check_same(folder)
    features, truncated = encoder.encode(CAPTIONS)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert features.shape[1] == 12
    assert truncated.tolist() == [False, False, False, True]


def test_a_dense_layer_in_a_pickle_of_tensors_is_read_and_one_of_objects_is_not_run(made):
    folder = made(("Dense", DENSE))
    dense(folder, suffix="bin", in_features=32)
    check_same(folder)

    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"linear.weight": Trap()}, folder / "2_Dense" / "pytorch_model.bin")
    assert "the folder holds no usable model" in refusal(f"st:{folder}")


PROMPTS = {"prompts": {"query": "dog : ", "passage": "two children : "}, "default_prompt_name": None}


def test_the_default_prompt_is_put_before_each_text_and_another_one_can_be_named(made):
    folder = made(settings=PROMPTS)
    plain = check_same(folder)
    assert plain.recipe["prompt"] == ""
    query = encoder_of(f"st:{folder}@query")
    np.testing.assert_allclose(query.encode(CAPTIONS)[0], encoded(folder, prompt_name="query"), rtol=1e-5, atol=1e-5)
    assert query.recipe["prompt"] == "dog : "
    assert query.recipe != plain.recipe
    with_default = made(settings=PROMPTS | {"default_prompt_name": "passage"}, name="default")
    assert check_same(with_default).recipe["prompt"] == "two children : "
    assert "has no prompt 'title'; its prompts are query, passage" in refusal(f"st:{folder}@title")
    assert "it has none; write st:" in refusal(f"st:{made(name='none')}@query")


def test_a_prompt_that_is_left_out_of_the_pooling(made):
    folder = made(
        pooling={"pooling_mode_mean_tokens": True, "include_prompt": False},
        settings=PROMPTS | {"default_prompt_name": "query"},
    )
    check_same(folder)


def test_limits_of_the_folder(made):
    folder = made(limits={"max_seq_length": 7, "do_lower_case": True})
    encoder = check_same(folder)
    assert encoder.recipe["max_length"] == 7
    assert encoder.encode(CAPTIONS[:2])[1].tolist() == [True, False]


def test_trap_positions_behind_the_paddings_row_are_no_tokens(made):
    from transformers import RobertaConfig, RobertaModel

    folder = made()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, vocab_size=2000, max_position_embeddings=22, pad_token_id=1)
    RobertaModel(config).save_pretrained(folder)
    encoder = encoder_of(f"st:{folder}")
    assert encoder.recipe["max_length"] == 20
    assert encoder.encode(CAPTIONS)[1].tolist() == [False, False, False, True]


def test_unknown_tokens_are_counted_and_a_tokenizer_of_too_few_entries_is_refused(made):
    encoder = encoder_of(f"st:{made(settings=PROMPTS)}")
    assert encoder.vocabulary == encoder.tokenizer.size
    unknown, tokens = encoder.unknown_tokens(encoder.tokenize(["a dog 狗", "a"])[0])
    assert unknown.tolist() == [1, 0]
    assert tokens.tolist() == [3, 1]
    check_vocabulary(encoder, "st:x")
    encoder.vocabulary *= 3
    with pytest.raises(EncoderError, match="almost every word would be unknown"):
        check_vocabulary(encoder, "st:x")


def test_the_recipe_tells_apart_what_the_weights_do_not(made):
    recipes = [
        encoder_of(f"st:{made(pooling={f'pooling_mode_{mode}': True}, name=mode)}").recipe
        for mode in ("mean_tokens", "max_tokens")
    ]
    assert recipes[0]["weights"] == recipes[1]["weights"]
    assert recipes[0] != recipes[1]


def test_other_layers_are_pooled_as_the_settings_say(made, tiny_bert):
    folder = made(pooling={"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False})
    features, _ = encoder_of(f"st:{folder}", layers="last,1,words").encode(CAPTIONS[:3])
    np.testing.assert_allclose(features[:, :32], encoded(folder, CAPTIONS[:3]), rtol=1e-5, atol=1e-5)
    others, _ = encoder_of(f"hf:{tiny_bert}", layers="1,words").encode(CAPTIONS[:3])
    np.testing.assert_allclose(features[:, 32:], others, rtol=1e-5, atol=1e-5)


def test_stored_files_of_the_tokenizer_are_enough_and_what_is_saved_is_read_by_the_library_too(made, tmp_path):
    folder = made(("Dense", DENSE), settings=PROMPTS, limits={"max_seq_length": 20})
    dense(folder, in_features=32)
    encoder = encoder_of(f"st:{folder}@query", plain=True)
    again = encoder_of(f"st:{folder}@query", plain=True, tokenizer_files=encoder.tokenizer_files)
    assert again.recipe == encoder.recipe
    assert encoder.save(tmp_path / "saved") == f"st:{tmp_path / 'saved'}"
    features, _ = encoder.encode(CAPTIONS)
    np.testing.assert_array_equal(encoder_of(f"st:{tmp_path / 'saved'}").encode(CAPTIONS)[0], features)
    np.testing.assert_allclose(encoded(tmp_path / "saved"), features, rtol=1e-5, atol=1e-5)


def test_trap_code_that_a_folder_names_is_never_imported(made, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = made()
    entries = json.loads((folder / "modules.json").read_text())
    for name in ("evil_module.Thing", "os.system", "sentence_transformers.util.misc.import_from_string"):
        (folder / "modules.json").write_text(json.dumps([entries[0], entries[1] | {"type": name}]))
        assert f"modules.json names '{name}', code of its own, which is never run" in refusal(f"st:{folder}")
    for path in ("../elsewhere", "/tmp/elsewhere"):
        (folder / "modules.json").write_text(json.dumps([entries[0], entries[1] | {"path": path}]))
        assert "outside of the folder" in refusal(f"st:{folder}")
    other = made(("Dense", DENSE | {"activation_function": "evil_module.Thing"}), name="dense")
    dense(other, in_features=32)
    assert "names the activation 'evil_module.Thing', code of its own, which is never run" in refusal(f"st:{other}")
    config = json.loads((made(name="remote") / "config.json").read_text())
    config |= {"model_type": "unknown-kind", "auto_map": {"AutoConfig": "evil_module.Thing"}}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    assert "the folder holds no usable model" in refusal(f"st:{tmp_path / 'remote'}")


def test_modules_that_are_not_read_are_named(made):
    assert "its module 3 is a CNN; st: takes a Transformer and, behind it, Pooling" in refusal(
        f"st:{made(('CNN', {}), name='cnn')}"
    )
    folder = made()
    entries = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(entries[:1]))
    assert "lists no pooling" in refusal(f"st:{folder}")
    clip = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": f"{TYPE}CLIPModel"}]
    (folder / "modules.json").write_text(json.dumps(clip))
    assert f"write hf:{folder}/0_CLIPModel" in refusal(f"st:{folder}")
    (folder / "modules.json").write_text("{")
    assert "modules.json cannot be read" in refusal(f"st:{folder}")
    (folder / "modules.json").unlink()
    assert f"write hf:{folder}, whose feature is the mean over tokens" in refusal(f"st:{folder}")
    assert "has no random weights; use hf:" in refusal(f"st:{folder}x@random")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps(entries))
    assert "is an adapter of another model" in refusal(f"st:{folder}")


def test_trap_a_folder_whose_model_is_more_than_a_mean_is_refused_by_hf(made):
    assert encoder_of(f"hf:{made(('Normalize', {}), name='plain')}").recipe["pooling"] == "mean"
    cls = made(pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, name="cls")
    message = refusal(f"hf:{cls}")
    assert message == f"hf:{cls}: the model has pooling by cls, which hf: leaves out; write st:{cls}"
    wide = made(("Dense", DENSE), settings=PROMPTS | {"default_prompt_name": "query"}, name="wide")
    assert "has the prompt 'dog : ', the module Dense, which hf: leaves out" in refusal(f"hf:{wide}")
    files = encoder_of(f"st:{cls}").tokenizer_files
    stored = encoder_of(f"hf:{cls}", tokenizer_files=files)  # features that an earlier version stored are searched on
    assert stored.recipe["pooling"] == "mean"


def test_trap_a_model_of_the_hub_that_is_more_than_a_mean_is_refused_by_hf_too(made, cached_file):
    folder = made(pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    for name in files_within(folder):
        cached_file("owner/tiny", name, (folder / name).read_bytes())
    assert refusal("hf:owner/tiny") == (
        "hf:owner/tiny: the model has pooling by cls, which hf: leaves out; write st:owner/tiny"
    )


def test_a_model_that_is_not_here_is_an_error_within_seconds(unplugged):
    start = time.monotonic()
    message = refusal("st:all-MiniLM-L6-v2")
    assert "not in the Hugging Face cache, and sentence-transformers/all-MiniLM-L6-v2 cannot be downloaded" in message
    assert message.endswith("name a local copy (st:FOLDER)")
    assert "BAAI/bge-small-en-v1.5 cannot be downloaded" in refusal("st:BAAI/bge-small-en-v1.5#main@query")
    assert "no model can have that name" in refusal("st:a/b/c")
    assert time.monotonic() - start < 10


def test_a_model_in_the_cache_needs_no_network(made, cached_file):
    folder = made()
    for name in files_within(folder):
        cached_file("sentence-transformers/tiny", name, (folder / name).read_bytes())
    features, _ = encoder_of("st:tiny").encode(CAPTIONS)
    np.testing.assert_array_equal(features, encoder_of(f"st:{folder}").encode(CAPTIONS)[0])
    assert change_stamp(parse_spec("st:tiny"), 0)["commit"] == "0" * 40


def test_a_changed_dense_layer_changes_the_stamp(made):
    folder = made(("Dense", DENSE))
    dense(folder, in_features=32)
    before = change_stamp(parse_spec(f"st:{folder}"), 0)
    assert change_stamp(parse_spec(f"st:{folder}"), 0) == before
    (folder / "2_Dense" / "model.safetensors").touch()
    assert change_stamp(parse_spec(f"st:{folder}"), 0) != before


def test_without_sentence_transformers_one_line_says_what_to_install(made, monkeypatch):
    folder = made()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingPackageError) as raised:
        encoder_of(f"st:{folder}")
    assert str(raised.value).startswith(f"st:{folder} needs the package sentence-transformers (")
    assert str(raised.value).endswith("pip install 'onceover-retrieval[sentence-transformers]'")


def test_it_is_no_image_encoder(made):
    with pytest.raises(EncoderError, match="is no image encoder; use hf:NAME_OR_FOLDER, timm:NAME or open_clip:NAME"):
        ImageEncoder(f"st:{made()}", device="cpu")


def test_a_dataset_is_encoded_searched_and_fine_tuned(drawn, made, tmp_path, monkeypatch):
    better = itertools.count(1.0)
    monkeypatch.setattr(finetune_loop, "quality", lambda *vectors: quality(*vectors) | {"rsum": next(better)})
    folder = made(("Dense", DENSE), ("Normalize", {}), settings=PROMPTS)
    dense(folder, in_features=32)
    encoders = {"image_encoder": "timm:test_resnet@random", "text_encoder": f"st:{folder}@query"}
    extract = ExtractConfig(**encoders, views=1, text_layers="last", batch_size=8)
    training = TrainingConfig(num_epochs=5, batch_size=16, refit=False)
    tuning = FinetuneConfig(num_epochs=1, batch_size=16)
    config = Config(extract, ModelConfig(embedding_dim=16), training, finetune=tuning)
    store = onceover.extract_features(drawn, tmp_path / "s.h5", config=extract, device="cpu")
    assert not is_dual_encoder(store)
    run = onceover.fit(store, tmp_path / "run", config, device="cpu")
    assert len(onceover.search(run, "a red circle", device="cpu")) == 5
    for _ in range(2):  # the second time it replaces the first, folders within and all
        out = tmp_path / "tuned"
        workflows.finetune(run, drawn, store, out, config, unfreeze="text.last1", device="cpu", force=True)
        names = files_within(tmp_path / "tuned" / "encoders" / "text")
        assert {"model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} < set(names)
    tuned = encoder_of(f"st:{tmp_path / 'tuned' / 'encoders' / 'text'}")
    assert tuned.recipe["prompt"] == "dog : "
    assert tuned.recipe["weights"] != store.recipes["text"]["weights"]
