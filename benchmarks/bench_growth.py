"""Do time a record and memory stay the same when a dataset grows?

    python benchmarks/bench_growth.py [--out FILE.json]

A drawn dataset, and 4 and 16 times as many images, five captions each, are extracted with the smallest ShuffleNet and
a BERT of four narrow layers, untrained, so that encoding does not hide what grows with the dataset. Each size runs in
a process of its own, in several rounds; the medians of the milliseconds a record and of the peak memory are reported,
as a ratio to the smallest size.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TIMES = (1, 4, 16)


def main() -> None:
    """Parses the options and prints the result as JSON; or extracts one size and prints its own numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=600, help="of the smallest size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data:
        print(json.dumps(extract(options.data)))
        return
    from onceover.extract.synthetic import draw_dataset

    rounds: dict = {times: [] for times in TIMES}
    with tempfile.TemporaryDirectory() as folder:
        tenth = options.pictures // 10
        draw_dataset(Path(folder) / "drawn", 8 * tenth, tenth, tenth)
        small_bert(Path(folder) / "drawn", Path(folder) / "bert")
        for times in TIMES:
            multiply(Path(folder) / "drawn", Path(folder) / str(times), times)
        for _ in range(options.rounds):
            for times in TIMES:
                command = [sys.executable, __file__, f"--data={Path(folder) / str(times)}"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                rounds[times].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{times} times: {rounds[times][-1]}", file=sys.stderr, flush=True)
    result: dict = {"machine": {"processor": platform.machine(), "cores": os.cpu_count()}}
    result["pictures"] = {times: options.pictures * times for times in TIMES}
    for name in rounds[1][0]:
        found = {times: statistics.median(each[name] for each in rounds[times]) for times in TIMES}
        result[name] = {times: round(value, 3) for times, value in found.items()}
        result[f"{name}, of the smallest"] = {times: round(value / found[1], 3) for times, value in found.items()}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def small_bert(drawn: Path, folder: Path) -> None:
    """A text encoder that takes little time, random, with a vocabulary of the drawn captions."""
    from transformers import BertConfig, BertModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.layouts import read_dataset

    tokenizer = dataset_tokenizer(read_dataset(drawn).captions)
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def multiply(drawn: Path, folder: Path, times: int) -> None:
    """The drawn dataset several times over: files of their own, and captions that differ."""
    import csv

    from onceover.extract.layouts import read_dataset

    dataset = read_dataset(drawn)
    folder.mkdir()
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for copy in range(times):
            for path in dataset.paths:
                (folder / f"{copy}-{Path(path).name}").write_bytes((drawn / path).read_bytes())
            for caption, picture in zip(dataset.captions, dataset.image_index.tolist(), strict=True):
                name = f"{copy}-{Path(dataset.paths[picture]).name}"
                writer.writerow([name, f"{copy} : {caption}", dataset.splits[picture]])


def extract(data: Path) -> dict:
    """One extraction: milliseconds an image and a caption while encoding, a record in all, and peak memory."""
    from onceover import cli
    from onceover.configs.schema import ExtractConfig
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract as run

    assert cli
    config = ExtractConfig(
        image_encoder="torchvision:shufflenet_v2_x0_5@random",
        text_encoder=f"hf:{data.with_name('bert')}",
        views=1,
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = run(read_dataset(data), Path(folder) / "s.h5", config, device="cpu")
    status = Path("/proc/self/status").read_text().splitlines()
    encoding = sum(speed.seconds for speed in summary.speed.values())
    return {
        "ms an image": 1000 * summary.speed["image"].seconds / summary.speed["image"].rows,
        "ms a different caption": 1000 * summary.speed["text"].seconds / summary.speed["text"].rows,
        "ms a record beside encoding": 1000 * (summary.seconds - encoding) / (summary.images + summary.captions),
        "peak MiB": next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024,
    }


if __name__ == "__main__":
    main()
