"""Texts put before captions and before queries, as the models of E5's kind want them."""

import json

import numpy as np
import pytest

from onceover.configs.schema import load_config
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import load_run
from onceover.heads.embed import text_embeddings
from onceover.heads.query import QueryEmbedder


def test_prefixes_are_put_before_captions_and_queries_and_are_part_of_the_recipe(tiny_bert):
    plain = TextEncoder(f"hf:{tiny_bert}", device="cpu")
    both = TextEncoder(f"hf:{tiny_bert}", device="cpu", caption_prefix="a blue ", query_prefix="a red ")
    texts = ["circle", "star above a ring"]
    captions, _ = both.encode(texts)
    queries, _ = both.encode(texts, are_queries=True)
    np.testing.assert_allclose(captions, plain.encode([f"a blue {text}" for text in texts])[0], atol=1e-6)
    np.testing.assert_allclose(queries, plain.encode([f"a red {text}" for text in texts])[0], atol=1e-6)
    assert both.recipe == plain.recipe | {"caption_prefix": "a blue ", "query_prefix": "a red "}
    one = TextEncoder(f"hf:{tiny_bert}", device="cpu", caption_prefix="a blue ")
    assert one.recipe == plain.recipe | {"caption_prefix": "a blue "}
    np.testing.assert_array_equal(one.encode(texts, are_queries=True)[0], captions)
    bare = TextEncoder(f"hf:{tiny_bert}", device="cpu", caption_prefix="a blue ", query_prefix="")
    assert bare.recipe == one.recipe | {"query_prefix": ""}
    np.testing.assert_array_equal(bare.encode(texts, are_queries=True)[0], plain.encode(texts)[0])
    assert TextEncoder(f"hf:{tiny_bert}", device="cpu", query_prefix="").recipe == plain.recipe


@pytest.mark.parametrize("value", ["query: ", "'query: '", '"query: "'])
def test_a_prefix_with_a_colon_can_be_set_at_the_command_line(value):
    config = load_config(None, [f"extract.query_prefix={value}"])
    assert config.extract.query_prefix == "query: "


def test_a_run_puts_its_own_prefix_before_queries(run, drawn, tmp_path, extract_config):
    store, folder = tmp_path / "s.h5", tmp_path / "run"
    settings = ("--set", "extract.caption_prefix=a photo of: ", "--set", "extract.query_prefix='a red '")
    encoders = ("--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder)
    views = ("--views", 1, "--device", "cpu")
    run("extract", "--data", drawn, "--store", store, *encoders, *settings, *views)
    again = run("extract", "--data", drawn, "--store", store, *encoders, *settings, *views).stderr
    assert "encoding" not in again
    few = ("--set", "training.num_epochs=1", "--set", "model.embedding_dim=8", "--set", "training.refit=false")
    run("fit", "--store", store, "--run", folder, *few, "--device", "cpu")
    with FeatureStore(store) as opened:
        recipe = opened.recipes["text"]
        sample = opened.text_features[:3]
        captions = opened.captions[:3]
    assert (recipe["caption_prefix"], recipe["query_prefix"]) == ("a photo of: ", "a red ")
    loaded = load_run(folder)
    encoder = loaded.load_encoder("text", None, "cpu")
    np.testing.assert_allclose(encoder.encode(captions)[0], sample, atol=1e-5)
    features, _ = encoder.encode(["circle"], are_queries=True)
    (vector,) = QueryEmbedder(loaded, device="cpu").embed_texts(["circle"])
    np.testing.assert_allclose(vector, text_embeddings(loaded.heads, features)[0], atol=1e-6)
    hits = run("search", "--run", folder, "--query", "circle", "--json", "--device", "cpu")
    assert len(json.loads(hits.stdout)["hits"]) == 5
