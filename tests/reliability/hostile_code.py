"""Malicious files that hold code: pickles, tokenizers, PostScript, settings."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np

from reliability.traps import CPU, QUERY, Commands, Evil, Trap, extract_command, fit_command
from reliability.trials import Command
from reliability.workspace import FIT, GRID, IMAGE_ENCODER

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) = showpage\n%%EOF\n"


def pickled_resume(trap: Trap) -> Commands:
    """An unfinished run whose state is a pickle with code."""
    trap.copied("run")
    (trap.folder / "run/run.json").unlink()
    (trap.folder / "run/resume.pt").write_bytes(trap.pickle())
    return [fit_command(trap, trap.base.store)]


def pickled_trial(trap: Trap) -> Commands:
    """A sweep whose waiting trials are pickles with code."""
    options = ("sweep", "--store", trap.base.store, "--out", trap.folder / "sweep", *GRID, *FIT, "--halving")
    command = Command(tuple(str(part) for part in options), skipped=("onceover.analysis.figures:plot_sweep",))
    trap.session.warm.run(command)
    for path in sorted((trap.folder / "sweep/trials").glob("*.json")):
        path.with_suffix(".pt").write_bytes(trap.pickle())
        path.unlink()
    return [options]


def pickled_weights(trap: Trap) -> Commands:
    """Weights of an image encoder that are a pickle with code."""
    (trap.folder / "w.pth").write_bytes(trap.pickle())
    spec = f"{IMAGE_ENCODER.partition('@')[0]}@{trap.folder / 'w.pth'}"
    return [extract_command(trap, trap.base.data, "--image-encoder", spec)]


def pickled_array(trap: Trap) -> Commands:
    """Features that are pickled objects."""
    np.save(trap.folder / "i.npy", np.array([Evil(trap.mark)] * 24, dtype=object), allow_pickle=True)
    features = ("--image-features", trap.folder / "i.npy", "--text-features", trap.base.imported / "texts.npy")
    captions = ("--captions", trap.base.imported / "captions.csv")
    return [("import", *features, *captions, "--store", trap.folder / "new.h5")]


def write_evil_tokenizer(trap: Trap, folder: Path) -> None:
    """Adds code, and a configuration that asks for it, to a tokenizer's folder."""
    (folder / "evil.py").write_text(trap.code())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Evil"
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tokenizer_of_run(trap: Trap) -> Commands:
    """A run whose tokenizer asks for code of its own."""
    trap.copied("run")
    write_evil_tokenizer(trap, trap.folder / "run/tokenizer")
    return [("search", "--run", trap.folder / "run", *QUERY)]


def tokenizer_of_store(trap: Trap) -> Commands:
    """A store whose tokenizer asks for code of its own."""
    trap.copied("s.h5", "run")
    write_evil_tokenizer(trap, trap.folder / "run/tokenizer")
    with h5py.File(trap.folder / "s.h5", "r+") as file:
        for path in (trap.folder / "run/tokenizer").iterdir():
            if path.name in file["tokenizer"]:
                del file["tokenizer"][path.name]
            file["tokenizer"][path.name] = np.frombuffer(path.read_bytes(), np.uint8)
    shutil.rmtree(trap.folder / "run")
    trap.sign(trap.folder / "s.h5")
    search = ("search", "--run", trap.folder / "run", *QUERY)
    return [fit_command(trap, trap.folder / "s.h5"), search]


def encoder_folder(trap: Trap) -> Commands:
    """A text encoder's folder that asks for code of its own."""
    trap.copied("bert")
    write_evil_tokenizer(trap, trap.folder / "bert")
    config = json.loads((trap.folder / "bert/config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    config["model_type"] = "evil"
    (trap.folder / "bert/config.json").write_text(json.dumps(config))
    return [extract_command(trap, trap.base.data, "--text-encoder", f"hf:{trap.folder / 'bert'}", "--limit", 4)]


def postscript(trap: Trap) -> Commands:
    """PostScript that is called .jpg, where a Ghostscript is on the path."""
    (trap.folder / "images").mkdir()
    shutil.copy2(trap.base.query, trap.folder / "images/good.jpg")
    for name in ("bad.jpg", "bad.tif", "bad.png"):
        (trap.folder / "images" / name).write_bytes(POSTSCRIPT)
    index = ("index", "--run", trap.base.run, "--images", trap.folder / "images", "--index", trap.folder / "i", *CPU)
    query = ("--query", trap.folder / "images/bad.jpg", "--mode", "image2text", *CPU)
    return [index, ("search", "--run", trap.base.run, *query)]


def python_in_settings(trap: Trap) -> Commands:
    """Settings that ask for a call."""
    evil = f"model:\n  temperature: !!python/object/apply:os.system ['touch {trap.mark}']\n"
    (trap.folder / "c.yaml").write_text(evil)
    trap.copied("run")
    (trap.folder / "run/config.yaml").write_text(evil)
    fit = (*fit_command(trap, trap.base.store)[:3], "--run", trap.folder / "new", "--config", trap.folder / "c.yaml")
    return [fit, ("info", trap.folder / "run")]
