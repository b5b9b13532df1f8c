"""Reads the datasets of `DATASETS` as TFDS has prepared them, without TensorFlow."""

import pathlib
from typing import Any

import numpy as np

from tasks.dataset_info import DATASETS, Split, Splits, divide, problem


def import_tfds() -> Any:
    """Returns tensorflow-datasets; raises ImportError with the remedy."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "Datasets are read and written by tensorflow-datasets: install the extra "
            "'data', as in pip install 'metaopt-jax[data]'."
        ) from error
    return tensorflow_datasets


def newest(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the highest version that is prepared, if there is one."""
    found = [path.parent for path in folder.glob("*/dataset_info.json")]
    number = lambda path: [int(n) for n in path.name.split(".") if n.isdecimal()]
    return max(found, key=number, default=None)


def read(name: str, folder: pathlib.Path) -> tuple[Splits, tuple[str, ...]]:
    """Reads a prepared TFDS dataset, whatever its version, without TensorFlow.

    Args:
        name: a key of `DATASETS`.
        folder: the folder `name` of a TFDS data directory.

    Returns:
        The splits, and the names of the classes.

    Raises:
        DataError: if the folder holds no such dataset, or a damaged one.
    """
    tfds = import_tfds()
    version = newest(folder)
    if version is None:
        raise problem(name, f"{folder} holds no prepared dataset.")
    try:
        builder = tfds.builder_from_directory(version)
        features = builder.info.features
        parts = {}
        for split in ("train", "test"):
            if split in builder.info.splits:
                source = builder.as_data_source(split)
                parts[split] = _decode(name, source, features)
    # The readers below raise whatever their C++ parts make of damaged bytes.
    except Exception as error:
        raise problem(name, f"{version} is damaged ({error}).") from error
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
    return divide(x, y, masks)
