"""The only door to datasets: `load` returns uint8 arrays, whatever they come from.

"digits" is embedded: 1,797 real handwritten digits, 8x8 pixels of 0 to 16, from the
test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak
(UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0), in
its original order. Image `i` is for testing if `i % 7 == 0`, for validation if
`i % 7 == 1`, else for training.

Everything else is a TFDS dataset in array_record format, read without TensorFlow and
then cached as one npz file beside it: those of `DATASETS`, and any other for image
classification by its name in TFDS, as "stl10", "emnist/letters" or "cifar100:3.0.2".
`python -m experiments data prepare NAME` makes it, see `tasks.prepare`. The datasets
live in the folder that the environment variable METAOPT_DATA names, by default
~/.cache/metaopt/data.
"""

import os
import pathlib
import zipfile
from typing import Any, NamedTuple

import numpy as np

from tasks import tfds_known, tfds_others
from tasks.dataset_info import (
    DATASETS,
    DataError,
    DatasetInfo,
    Split,
    Splits,
    command,
    divide,
    folder_name,
    folder_of,
    info,
    prepared_others,
    problem,
    source,
)

__all__ = [
    "DATASETS",
    "DataError",
    "DatasetInfo",
    "Split",
    "Splits",
    "Status",
    "class_names",
    "command",
    "folder_name",
    "info",
    "load",
    "num_classes",
    "source",
    "status",
    "write_cache",
]


def load(name: str) -> Splits:
    """Loads a dataset.

    Omniglot, which comes as black ink on 105x105 white pixels, is inverted and reduced
    to 28x28; of the others, images change only where `prepare` was told a size.

    Args:
        name: a key of `DATASETS`, or any other dataset of TFDS that is prepared.

    Raises:
        ValueError: if there is no dataset of this name.
        DataError: if it is not prepared, or damaged; ends with the command to run.

    >>> digits = load("digits")
    >>> digits.train.x.shape, digits.train.x.dtype, len(digits.test.y)
    ((1283, 8, 8, 1), dtype('uint8'), 257)
    """
    if name == "digits":
        with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
            x, y = file["x"], file["y"].astype(np.int32)
        part = np.arange(len(y)) % 7
        return divide(x, y, (part > 1, part == 1, part == 0))
    return _cached(name)[0]


def class_names(name: str) -> tuple[str, ...]:
    """Returns what the classes are called; Omniglot's as "Alphabet/character01".

    >>> class_names("digits")[:3]
    ('0', '1', '2')
    """
    if name == "digits":
        return tuple(str(i) for i in range(10))
    return _cached(name)[1]


def num_classes(name: str) -> int:
    """Returns the number of classes; opens the dataset only where it depends on it."""
    return info(name).classes or len(class_names(name))


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
    """Lists `DATASETS` and whatever else is prepared."""
    lines = [Status("digits", "embedded", "part of the task zoo")]
    for name in [*DATASETS, *prepared_others()]:
        if name != "digits":
            ready = folder_of(name).is_dir()
            state = "prepared" if ready else "missing"
            detail = str(folder_of(name)) if ready else command(name)
            lines.append(Status(name, state, detail))
    return lines


def _cached(name: str) -> tuple[Splits, tuple[str, ...]]:
    known, folder = info(name), folder_of(name)
    if not folder.is_dir():
        raise problem(name, f"{name} is not prepared: there is no {folder}.")
    cache = folder / "cache.npz"
    try:
        return _read_cache(name, known.shape, cache)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        # Nothing is lost: the cache is made again from the dataset beside it.
        if known.recipe is None:
            result = tfds_known.read(name, folder)
        else:
            result = tfds_others.read(name, folder, known.recipe)
        write_cache(cache, *result)
        return result


def _read_cache(
    name: str, shape: tuple[int, int, int], path: pathlib.Path
) -> tuple[Splits, tuple[str, ...]]:
    # Opened here: np.load leaves a file open that is no zip file.
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        splits = Splits(
            *(Split(file[f"{part}_x"], file[f"{part}_y"]) for part in Splits._fields)
        )
        names = tuple(str(c) for c in file["class_names"])
    for x, y in splits:
        whole = x.shape == (len(y), *shape) and x.dtype == np.uint8
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
