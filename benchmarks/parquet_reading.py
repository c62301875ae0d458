"""CPU time to read an image's bytes: parquet files with Hugging Face's row groups, tar shards, files.

    python benchmarks/parquet_reading.py [--rounds 5] [--images 1024] [--output FILE.json]

The images of data_throughput.py; 100 in a row group, snappy. The formats take turns in every round, read in
the order of a shuffled epoch and in the index's order; figures are medians over rounds. Decoding with Pillow
stands beside them, for scale.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from data_throughput import make_images, processor

from scalesnn.data.headers import decode_rgb
from scalesnn.data.index import ImageIndex
from scalesnn.data.listing import open_index
from scalesnn.data.loader import BadImages
from scalesnn.data.pack import pack_split
from scalesnn.data.sampling import random_permutation


def cpu_ms(work: Callable[[int], object], images: Iterable[int]) -> float:
    """CPU milliseconds an image."""
    chosen = list(images)
    start = time.process_time()
    for image in chosen:
        work(image)
    return 1000 * (time.process_time() - start) / len(chosen)


def indexes(root: Path) -> dict[str, ImageIndex]:
    """The same images in each format."""
    files = open_index(root / "train")
    structs = [{"bytes": files.read(image), "path": files.names[image]} for image in range(len(files))]
    (root / "parquet").mkdir()
    table = pa.table({"image": structs, "label": files.labels})
    pq.write_table(table, root / "parquet" / "0000.parquet", row_group_size=100)
    pack_split(BadImages(files, skip=True), root / "tar" / "train", 2**28)
    return {
        "files": files,
        "tar": open_index(root / "tar" / "train"),
        "parquet": open_index(root / "parquet"),
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/parquet_reading.json")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "claim": "CPU time to read an image's bytes, by format and order",
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0],
        },
        "versions": {"pyarrow": pa.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "images": args.images,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results["mean_bytes"] = make_images(root, args.images)
        formats = indexes(root)

        def decode(image: int) -> object:
            return decode_rgb(formats["files"].read(image))

        measured: dict[str, list[float]] = {}
        for number in range(args.rounds):
            shuffled = random_permutation(0, number, args.images).tolist()[:256]
            for name, index in formats.items():
                measured.setdefault(f"{name}, shuffled", []).append(cpu_ms(index.read, shuffled))
                measured.setdefault(f"{name}, in order", []).append(cpu_ms(index.read, range(len(index))))
            decoding = cpu_ms(decode, shuffled)
            measured.setdefault("decoding with Pillow", []).append(decoding)
        results["cpu_ms_per_image"] = {name: statistics.median(values) for name, values in measured.items()}
        for name, value in results["cpu_ms_per_image"].items():
            print(f"{name:24} {value:.3f} ms")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
