"""Recipes: all that changes a feature, as plain values, whose digest is the features' fingerprint."""

import hashlib
import json

import torch
from torch import nn

from onceover.base.files import digest


def as_stored(recipe: dict) -> dict:
    """``recipe`` as it will be read back from JSON: lists instead of tuples."""
    return json.loads(json.dumps(recipe))


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def hash_tokenizer(files: dict[str, bytes]) -> str:
    """A digest of all of a tokenizer's files that change its token ids."""
    names = sorted(files)
    if "tokenizer.json" in files:
        names = ["tokenizer.json"]  # tokenizer_config.json repeats library versions and paths
    return digest({name: hashlib.sha256(files[name]).hexdigest() for name in names})
