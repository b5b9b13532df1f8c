"""What is known of a dataset before it is opened, where it is, and how to make it.

The facts of `DATASETS` are written here. Those of any other dataset of TFDS are written
into its folder when it is prepared: see `tasks.prepare`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
from typing import NamedTuple

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


class Recipe(NamedTuple):
    """What was asked for when a dataset outside of `DATASETS` was prepared.

    Attributes:
        size: side of the square that the images are resized to; None leaves them alone.
        train: the split for training, in the syntax of TFDS, as "train[:80%]".
        test: the split for testing.
        label: the feature that is the class; None leaves it to the dataset.
    """

    size: int | None = None
    train: str = "train"
    test: str = "test"
    label: str | None = None

    def options(self) -> list[str]:
        """Returns the options of `data prepare` that ask for it.

        >>> Recipe(32, test="validation").options()
        ['--size', '32', '--test', 'validation']
        """
        wanted = self._asdict().items()
        usual = Recipe()._asdict()
        changed = [(name, value) for name, value in wanted if value != usual[name]]
        return [word for name, value in changed for word in (f"--{name}", str(value))]


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
        version: that of the TFDS dataset, where it decides what is known.
        recipe: how it was prepared; None for those of `DATASETS`.
    """

    shape: tuple[int, int, int]
    peak: int = 255
    classes: int | None = 10
    holdout: int = 6
    files: tuple[str, ...] = ()
    version: str = ""
    recipe: Recipe | None = None


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

# NAME, NAME/CONFIG, either with :VERSION, as in TFDS.
_TFDS_NAME = re.compile(r"[a-zA-Z]\w*(/[\w+.-]+)?(:\d+\.\d+\.\d+)?", re.ASCII)
_FACTS = "images.json"


def info(name: str) -> DatasetInfo:
    """Returns what is known of a dataset, without opening it.

    Args:
        name: a key of `DATASETS`, prepared or not, or any other dataset of TFDS that is
            prepared.

    Raises:
        ValueError: if there is no dataset of this name.
        DataError: if it is not in `DATASETS` and not prepared, or damaged; ends with
            the command to run.

    >>> info("cifar10").shape
    (32, 32, 3)
    """
    if name in DATASETS:
        return DATASETS[name]
    check_name(name)
    path = folder_of(name) / _FACTS
    try:
        found = json.loads(path.read_text())
        recipe = Recipe(**found["recipe"])
        shape = tuple(found["shape"])
        return DatasetInfo(
            shape, classes=found["classes"], version=found["version"], recipe=recipe
        )
    except FileNotFoundError as error:
        options = sorted({*DATASETS, *prepared_others()})
        raise problem(
            name,
            f"dataset must be one of {', '.join(DATASETS)} or a dataset of TFDS that "
            f"is prepared, got dataset={name!r}: there is no {path}."
            f"{validate.nearest(name, options)}",
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise problem(name, f"{path} is damaged ({error}).") from error


def check_name(name: str) -> None:
    """Raises ValueError unless `name` could be that of a dataset."""
    validate.instance("dataset", name, str, "'mnist'")
    if name not in DATASETS and not _TFDS_NAME.fullmatch(name):
        raise ValueError(
            f"dataset must be one of {', '.join(DATASETS)} or a name of TFDS such as "
            f"'stl10', 'emnist/letters' or 'cifar100:3.0.2', got dataset={name!r}."
        )


def folder_name(name: str) -> str:
    """Returns the name of a dataset as part of a file name, different for each.

    >>> folder_name("emnist/letters:3.1.0")
    'emnist-letters@3.1.0'
    """
    return name.replace("/", "-").replace(":", "@")


def source(name: str) -> str:
    """Returns what a dataset has in common with its other versions and configurations.

    >>> source("emnist/letters:3.1.0")
    'emnist'
    """
    return re.split("[/:]", name)[0]


def data_dir() -> pathlib.Path:
    """Returns the folder of the prepared datasets."""
    default = pathlib.Path("~/.cache/metaopt/data")
    return pathlib.Path(os.environ.get("METAOPT_DATA") or default).expanduser()


def folder_of(name: str) -> pathlib.Path:
    """Returns the folder of one dataset."""
    return data_dir() / folder_name(name)


def prepared_others() -> list[str]:
    """Returns the prepared datasets that are not in `DATASETS`."""
    names = []
    for path in sorted(data_dir().glob(f"[!.]*/{_FACTS}")):
        # `info` tells of a damaged one when it is asked for.
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            names.append(json.loads(path.read_text())["name"])
    return names


def command(name: str, recipe: Recipe | None = None) -> str:
    """Returns the command that prepares the dataset."""
    words = ["python", "-m", "experiments", "data", "prepare", name]
    if name in DATASETS and DATASETS[name].files:
        words += ["--from", "DIR"]
    return shlex.join(words + (recipe or Recipe()).options())


def problem(name: str, complaint: str, recipe: Recipe | None = None) -> DataError:
    """Returns a `DataError` that ends with the command to run."""
    return DataError(f"{complaint} Run: {command(name, recipe)}")


def divide(x: np.ndarray, y: np.ndarray, masks: tuple[np.ndarray, ...]) -> Splits:
    """Returns the images and labels under each of three masks `[N]`."""
    return Splits(*(Split(x[mask], y[mask]) for mask in masks))


def write_facts(folder: pathlib.Path, name: str, known: DatasetInfo) -> None:
    """Writes what `info` returns of a dataset outside of `DATASETS`."""
    facts = {
        "name": name,
        "shape": known.shape,
        "classes": known.classes,
        "version": known.version,
        "recipe": (known.recipe or Recipe())._asdict(),
    }
    (folder / _FACTS).write_text(f"{json.dumps(facts, indent=2)}\n")
