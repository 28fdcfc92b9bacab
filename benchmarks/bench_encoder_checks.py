"""How long does the check of an encoder take, before a store is made, and how many forward passes?

    python benchmarks/bench_encoder_checks.py [--image-encoder SPEC] [--text-encoder SPEC] [--backend NAME] [--out FILE]

Checks both encoders, by default ResNet50 and DistilBERT with random weights, with the records of a small drawn dataset,
in several rounds, the first one cold. Passes are counted by a hook of the network, and by the check itself where a
backend goes past the network's own code. The medians of the seconds and of the processors' seconds are reported.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_fit import machine


def main() -> None:
    """Parses the options and prints seconds and passes of each check, and of both together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-encoder", default="torchvision:resnet50@random")
    parser.add_argument("--text-encoder", default="hf:distilbert-base-uncased@random")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from onceover.extract.encoder_checks import check_captions, check_images
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder
    from onceover.extract.layouts import read_dataset
    from onceover.extract.synthetic import draw_dataset

    result: dict[str, Any] = {"machine": machine(), "backend": options.backend}
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(Path(folder) / "drawn", 24, 3, 3)
        dataset = read_dataset(Path(folder) / "drawn")
        common = {"backend": options.backend, "device": "cpu"}
        image = ImageEncoder(options.image_encoder, layers="auto", views=4, **common)
        text = TextEncoder(options.text_encoder, layers="auto", captions=dataset.captions, **common)
        checks: dict[str, Callable[[], dict]] = {
            "image": lambda: check_images(image, options.image_encoder, dataset.images, dataset.paths),
            "text": lambda: check_captions(text, options.text_encoder, dataset.captions, {}),
        }
        for kind, encoder in (("image", image), ("text", text)):
            result[kind] = measured(encoder, checks[kind], options.rounds)
    for name in ("seconds", "seconds, cold", "processors' seconds"):
        result[f"both: {name}"] = round(result["image"][name] + result["text"][name], 2)
    written = json.dumps(result, indent=2)
    print(written)
    if options.out:
        options.out.write_text(written + "\n")


def measured(encoder: Any, check: Callable[[], dict], rounds: int) -> dict[str, float]:
    """Passes and seconds of a check of an encoder."""
    passes = []
    seconds = []
    processors = []
    hook = encoder.model.register_forward_hook(lambda *_: passes.append(1))
    findings: dict = {}
    for _ in range(rounds):
        begun = time.perf_counter()
        begun_on_processors = time.process_time()
        findings = check()
        seconds.append(time.perf_counter() - begun)
        processors.append(time.process_time() - begun_on_processors)
    hook.remove()
    return {
        "passes": findings["passes"],
        "passes of the network's own code": len(passes) // rounds,
        "seconds": round(statistics.median(seconds), 2),
        "seconds, cold": round(seconds[0], 2),
        "processors' seconds": round(statistics.median(processors), 2),
    }


if __name__ == "__main__":
    main()
