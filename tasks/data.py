"""The only door to datasets: `load` returns uint8 arrays, whatever they come from.

"digits" is embedded: 1,797 real handwritten digits, 8x8 pixels of 0 to 16, from the
test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak
(UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0), in
its original order. Image `i` is for testing if `i % 7 == 0`, for validation if
`i % 7 == 1`, else for training.

Everything else is a TFDS dataset in array_record format, read without TensorFlow and
then cached as one npz file beside it. `python -m experiments data prepare NAME` makes
it, see `tasks.prepare`. The datasets live in the folder that the environment variable
METAOPT_DATA names, by default ~/.cache/metaopt/data.
"""

import dataclasses
import os
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import validate


class DataError(ValueError):
    """A dataset is missing, damaged or not what it should be."""


class Split(NamedTuple):
    """Labelled images.

    Attributes:
        x: pixels, `[N, H, W, C]` uint8.
        y: classes, `[N]` int32.
    """

    x: np.ndarray | jax.Array
    y: np.ndarray | jax.Array


class Splits(NamedTuple):
    """The three parts of a dataset; also what an image task carries as its `data`."""

    train: Split
    valid: Split
    test: Split


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset before it is opened.

    Attributes:
        shape: image shape `(H, W, C)`.
        peak: the largest pixel value.
        classes: number of classes; None if it depends on the files at hand.
        holdout: one in `holdout` images of TFDS's train split, the last ones, is for
            validation; 0 if all images are pooled and every class is divided into 70 %
            for training, 15 % for validation and 15 % for testing.
        files: what `prepare` looks for in a folder of raw files; none if it cannot.
    """

    shape: tuple[int, int, int]
    peak: int = 255
    classes: int | None = 10
    holdout: int = 6
    files: tuple[str, ...] = ()


_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_OMNIGLOT = (
    "images_background.zip",
    "images_background_small1.zip",
    "images_background_small2.zip",
    "images_evaluation.zip",
)

DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo((8, 8, 1), peak=16),
    "mnist": DatasetInfo((28, 28, 1), files=_IDX),
    "fashion_mnist": DatasetInfo((28, 28, 1), files=_IDX),
    "kmnist": DatasetInfo((28, 28, 1), files=_IDX),
    "cifar10": DatasetInfo((32, 32, 3), holdout=10, files=("cifar-10-binary.tar.gz",)),
    "svhn_cropped": DatasetInfo((32, 32, 3), holdout=10),
    "omniglot": DatasetInfo((28, 28, 1), classes=None, holdout=0, files=_OMNIGLOT),
}


def load(name: str) -> Splits:
    """Loads a dataset.

    Omniglot, which comes as black ink on 105x105 white pixels, is inverted and reduced
    to 28x28; nothing else is changed.

    Args:
        name: a key of `DATASETS`.

    Raises:
        ValueError: if there is no dataset of this name.
        DataError: if it is not prepared, or damaged; ends with the command to run.

    >>> digits = load("digits")
    >>> digits.train.x.shape, digits.train.x.dtype, len(digits.test.y)
    ((1283, 8, 8, 1), dtype('uint8'), 257)
    """
    validate.one_of("dataset", name, DATASETS)
    if name == "digits":
        with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
            x, y = file["x"], file["y"].astype(np.int32)
        part = np.arange(len(y)) % 7
        return _divide(x, y, (part > 1, part == 1, part == 0))
    return _cached(name)[0]


def class_names(name: str) -> tuple[str, ...]:
    """Returns what the classes are called; Omniglot's as "Alphabet/character01".

    >>> class_names("digits")[:3]
    ('0', '1', '2')
    """
    validate.one_of("dataset", name, DATASETS)
    if name == "digits":
        return tuple(str(i) for i in range(10))
    return _cached(name)[1]


def num_classes(name: str) -> int:
    """Returns the number of classes; opens the dataset only where it depends on it."""
    validate.one_of("dataset", name, DATASETS)
    return DATASETS[name].classes or len(class_names(name))


def data_dir() -> pathlib.Path:
    """Returns the folder of the prepared datasets."""
    default = pathlib.Path("~/.cache/metaopt/data")
    return pathlib.Path(os.environ.get("METAOPT_DATA") or default).expanduser()


class Status(NamedTuple):
    """One line of `status`.

    Attributes:
        name: the dataset.
        state: "embedded", "prepared" or "missing".
        detail: where it is, or the command that makes it.
    """

    name: str
    state: str
    detail: str


def status() -> list[Status]:
    """Lists which datasets are there."""
    lines = [Status("digits", "embedded", "part of the task zoo")]
    for name in DATASETS:
        if name != "digits":
            ready = (data_dir() / name).is_dir()
            state = "prepared" if ready else "missing"
            detail = str(data_dir() / name) if ready else command(name)
            lines.append(Status(name, state, detail))
    return lines


def command(name: str) -> str:
    """Returns the command that prepares the dataset."""
    origin = " --from DIR" if DATASETS[name].files else ""
    return f"python -m experiments data prepare {name}{origin}"


def problem(name: str, complaint: str) -> DataError:
    """Returns a `DataError` that ends with the command to run."""
    return DataError(f"{complaint} Run: {command(name)}")


def read_tfds(name: str, folder: pathlib.Path) -> tuple[Splits, tuple[str, ...]]:
    """Reads a prepared TFDS dataset, whatever its version, without TensorFlow.

    Args:
        name: a key of `DATASETS`.
        folder: the folder `name` of a TFDS data directory.

    Returns:
        The splits, and the names of the classes.

    Raises:
        DataError: if the folder holds no such dataset, or a damaged one.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name} is read by tensorflow-datasets: install the extra 'data', "
            "as in pip install 'metaopt-jax[data]'."
        ) from error
    versions = sorted(p.parent for p in folder.glob("*/dataset_info.json"))
    if not versions:
        raise problem(name, f"{folder} holds no prepared dataset.")
    try:
        builder = tfds.builder_from_directory(versions[-1])
        features = builder.info.features
        parts = {}
        for split in ("train", "test"):
            if split in builder.info.splits:
                source = builder.as_data_source(split)
                parts[split] = _decode(name, source, features)
    # The readers below raise whatever their C++ parts make of damaged bytes.
    except Exception as error:
        raise problem(name, f"{versions[-1]} is damaged ({error}).") from error
    if DATASETS[name].classes:
        label = features["label"]
        names = [label.int2str(i) for i in range(label.num_classes)]
    else:
        names = sorted({c for _, classes in parts.values() for c in classes})
    index = {c: i for i, c in enumerate(names)}
    labelled = {
        split: (x, np.array([index[c] for c in classes], np.int32))
        for split, (x, classes) in parts.items()
    }
    return _split(name, labelled), tuple(names)


def _decode(name: str, source: Any, features: Any) -> tuple[np.ndarray, list[str]]:
    """Returns the images `[N, H, W, C]` and the names of their classes."""
    images, classes = [], []
    for example in source:
        if name == "omniglot":
            alphabet = features["alphabet"].int2str(int(example["alphabet"]))
            classes.append(f"{alphabet}/character{example['alphabet_char_id']:02d}")
            images.append(_ink(example["image"]))
        else:
            classes.append(features["label"].int2str(int(example["label"])))
            images.append(example["image"])
    shape = (len(images), *DATASETS[name].shape)
    return np.stack(images).astype(np.uint8).reshape(shape), classes


def _ink(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width, _ = DATASETS["omniglot"].shape
    ink = Image.fromarray(255 - image[..., 0].astype(np.uint8))
    return np.asarray(ink.resize((width, height), Image.Resampling.BOX))


def _split(name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> Splits:
    if DATASETS[name].holdout:
        x, y = parts["train"]
        held = np.arange(len(y)) >= len(y) - len(y) // DATASETS[name].holdout
        train, valid = (Split(x[i], y[i]) for i in (~held, held))
        return Splits(train, valid, Split(*parts["test"]))
    x, y = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    rank = np.empty(len(y))
    for label in np.unique(y):
        members = np.flatnonzero(y == label)
        rank[members] = np.arange(len(members)) / len(members)
    masks = (rank < 0.7, (rank >= 0.7) & (rank < 0.85), rank >= 0.85)
    return _divide(x, y, masks)


def _divide(x: np.ndarray, y: np.ndarray, masks: tuple[np.ndarray, ...]) -> Splits:
    return Splits(*(Split(x[mask], y[mask]) for mask in masks))


def _cached(name: str) -> tuple[Splits, tuple[str, ...]]:
    folder = data_dir() / name
    if not folder.is_dir():
        raise problem(name, f"{name} is not prepared: there is no {folder}.")
    cache = folder / "cache.npz"
    try:
        return _read_cache(name, cache)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        # Nothing is lost: the cache is made again from the dataset beside it.
        result = read_tfds(name, folder)
        write_cache(cache, *result)
        return result


def _read_cache(name: str, path: pathlib.Path) -> tuple[Splits, tuple[str, ...]]:
    # Opened here: np.load leaves a file open that is no zip file.
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        splits = Splits(
            *(Split(file[f"{part}_x"], file[f"{part}_y"]) for part in Splits._fields)
        )
        names = tuple(str(c) for c in file["class_names"])
    for x, y in splits:
        whole = x.shape == (len(y), *DATASETS[name].shape) and x.dtype == np.uint8
        if not (whole and y.dtype == np.int32 and y.max() < len(names)):
            raise ValueError(f"{path} does not hold {name}.")
    return splits, names


def write_cache(path: pathlib.Path, splits: Splits, names: tuple[str, ...]) -> None:
    """Writes the arrays as one npz file; a reader never sees half of it."""
    arrays: dict[str, Any] = {"class_names": np.array(names)}
    for part, (x, y) in splits._asdict().items():
        arrays |= {f"{part}_x": x, f"{part}_y": y}
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)
