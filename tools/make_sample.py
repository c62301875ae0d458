"""Make the image folder that ships with scalesnn from the original Fashion-MNIST files.

    python tools/make_sample.py DIR_WITH_THE_FOUR_GZ_FILES [scalesnn/data/sample/fashion-mnist]

Takes the first 600 images of each class of the train file and the first 100 of each class of the t10k file,
in file order, and writes them as grey 28 x 28 JPEGs of quality 95 in ImageNet's layout: train/CLASS/NNNNN.jpg
and val/CLASS/NNNNN.jpg, NNNNN being the image's position in its original file.

Fashion-MNIST: Xiao, Rasul and Vollgraf 2017, MIT licence; the original files are at
https://github.com/zalandoresearch/fashion-mnist. Its LICENSE.txt is copied beside the images.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    "t_shirt_top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
)
SPLITS = (("train", "train", 600), ("val", "t10k", 100))  # folder, original file, images a class
QUALITY = 95


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes into an array of the shape that its header states."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of the four .gz files and LICENSE.txt")
    parser.add_argument(
        "target",
        type=Path,
        nargs="?",
        default=Path(__file__).parents[1] / "scalesnn/data/sample/fashion-mnist",
    )
    args = parser.parse_args()
    for folder, stem, images_a_class in SPLITS:
        images = read_idx(args.source / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(args.source / f"{stem}-labels-idx1-ubyte.gz")
        for label, name in enumerate(CLASSES):
            class_folder = args.target / folder / name
            class_folder.mkdir(parents=True, exist_ok=True)
            for position in np.flatnonzero(labels == label)[:images_a_class]:
                Image.fromarray(images[position]).save(class_folder / f"{position:05d}.jpg", quality=QUALITY)
    shutil.copyfile(args.source / "LICENSE.txt", args.target / "LICENSE.txt")


if __name__ == "__main__":
    main()
