"""Reads any image classification dataset of TFDS, once prepared, without TensorFlow.

What the dataset says of itself decides: its features of type `Image` and `ClassLabel`,
of several the one that it names in `supervised_keys`; the shape of the image; its
splits. The split "validation" is for validation if there is one, else every tenth image
of those for training. Classes without any image are left out.
"""

import io
import itertools
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from tasks.dataset_info import DataError, Recipe, Split, Splits, problem
from tasks.tfds_known import import_tfds, newest

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_HOLDOUT = 10
# Bytes of all images: they are read into memory, and a task holds them on its device.
_LARGEST = 2**33


class Chosen(NamedTuple):
    """What is read of a dataset.

    Attributes:
        image: name of the feature that is the image.
        label: name of the feature that is the class.
        shape: shape that images are brought to, `(H, W, C)`.
    """

    image: str
    label: str
    shape: tuple[int, int, int]


def choose(name: str, tfds_info: Any, recipe: Recipe) -> Chosen:
    """Returns what is read of a dataset, before or after it is prepared.

    Args:
        name: the dataset.
        tfds_info: the `info` of its builder.
        recipe: what was asked for.

    Raises:
        DataError: if it has no image or no class, or several and neither it nor the
            recipe says which; if images do not have 8 bits and 1, 3 or 4 channels; if
            their sizes differ and none was asked for.
    """
    kinds = import_tfds().features
    image = _only(name, tfds_info, kinds.Image, recipe)
    label = _only(name, tfds_info, kinds.ClassLabel, recipe, recipe.label)
    if tfds_info.features[label].num_classes is None:
        raise DataError(f"{name} does not tell how many classes it has.")
    feature = tfds_info.features[image]
    *sides, channels = feature.shape
    if feature.np_dtype != np.uint8 or len(sides) != 2 or channels not in _MODES:
        raise DataError(
            f"{name} must have images of shape (H, W, C) and type uint8 with 1, 3 or 4 "
            f"channels, got {feature.shape} and {np.dtype(feature.np_dtype)}."
        )
    height, width = sides if recipe.size is None else (recipe.size, recipe.size)
    if height is None or width is None:
        raise problem(
            name,
            f"{name} has images of different sizes, {feature.shape}: name the side of "
            "the square that they are resized to.",
            recipe._replace(size=32),
        )
    return Chosen(image, label, (height, width, channels))


def read(
    name: str, folder: pathlib.Path, recipe: Recipe
) -> tuple[Splits, tuple[str, ...]]:
    """Reads a prepared dataset.

    Args:
        name: the dataset, as TFDS calls it.
        folder: a folder that holds the folder of its version.
        recipe: splits, and the size that images are resized to. A new pixel is the
            mean of the area that it covers, whatever the aspect ratio was.

    Returns:
        The splits, and the names of the classes.

    Raises:
        DataError: if it is missing, damaged or not in array_record format; if it is not
            made of images with one class each (see `choose`); if a split is missing,
            shares images with another or has images without a class; if its images are
            too large to be held in memory.
    """
    version = newest(folder)
    if version is None:
        raise problem(name, f"{folder} holds no prepared dataset.", recipe)
    try:
        builder = import_tfds().builder_from_directory(version)
        found = builder.info.splits
    # TFDS raises whatever its parts make of damaged files.
    except Exception as error:
        raise problem(name, f"{version} is damaged ({error}).", recipe) from error
    chosen = choose(name, builder.info, recipe)
    parts = _splits(name, found, recipe)
    check_memory(name, chosen, sum(found[s].num_examples for s in parts.values()))
    try:
        made = {part: _decode(builder, split, chosen) for part, split in parts.items()}
    except NotImplementedError as error:
        raise problem(
            name,
            f"{version} is not in array_record format; let TFDS make it so, by "
            "tfds.builder(..., file_format='array_record').download_and_prepare().",
            recipe,
        ) from error
    except Exception as error:
        raise problem(name, f"{version} is damaged ({error}).", recipe) from error
    for part, split in made.items():
        if split.y.min() < 0:
            raise problem(
                name,
                f"{name} has images without a class in the split {parts[part]!r} for "
                f"{part}. Name another of {', '.join(found)}.",
                _other_test(recipe, found) if part == "test" else recipe,
            )
    return _numbered(made, builder.info.features[chosen.label])


def _only(
    name: str, tfds_info: Any, kind: type, recipe: Recipe, asked: str | None = None
) -> str:
    """Returns the name of the one feature that counts of a kind."""
    features = dict(getattr(tfds_info.features, "items", tuple)())
    # Segmentations are images too, by inheritance.
    found = [key for key, feature in features.items() if type(feature) is kind]
    if asked is not None:
        chosen = [key for key in found if key == asked]
    elif len(found) > 1:
        chosen = [key for key in found if key in (tfds_info.supervised_keys or ())]
    else:
        chosen = found
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(f"{k} ({type(f).__name__})" for k, f in features.items())
    complaint = f"{name} must have a feature of type {kind.__name__}"
    if not found:
        raise DataError(f"{complaint}, got {listed or 'none'}.")
    if kind is import_tfds().features.Image:
        raise DataError(f"{complaint}, got several: {', '.join(found)}.")
    raise problem(
        name,
        f"label must be one of {', '.join(found)}, features of {name}, got "
        f"label={asked!r}.",
        recipe._replace(label=found[0]),
    )


def _splits(name: str, found: Any, recipe: Recipe) -> dict[str, str]:
    """Returns the split for each part; without "valid" if it comes out of "train"."""
    parts = {"train": recipe.train, "test": recipe.test}
    for part, split in parts.items():
        try:
            count = found[split].num_examples
        # A split that is missing, and one that cannot be parsed.
        except (KeyError, ValueError) as error:
            raise problem(
                name,
                f"{name} has no split {split!r} for {part}; it has "
                f"{', '.join(found)}. Name another, or divide one.",
                _other_test(recipe, found) if part == "test" else recipe,
            ) from error
        if count < 2:
            raise problem(
                name,
                f"The split {split!r} of {name} must hold at least 2 images, got "
                f"{count}.",
                recipe,
            )
    if _overlap(found, recipe.train, recipe.test):
        raise problem(
            name,
            f"The splits for training and testing must not share images, got "
            f"train={recipe.train!r} and test={recipe.test!r}.",
            recipe,
        )
    if "validation" in found and found["validation"].num_examples:
        shared = [_overlap(found, "validation", split) for split in parts.values()]
        if not any(shared):
            parts["valid"] = "validation"
    return parts


def _overlap(found: Any, one: str, other: str) -> bool:
    """Whether two splits, whole or sliced, have an image in common."""
    pairs = itertools.product(
        found[one].file_instructions, found[other].file_instructions
    )
    return any(
        a.filename == b.filename
        and a.skip < b.skip + b.take
        and b.skip < a.skip + a.take
        for a, b in pairs
    )


def _other_test(recipe: Recipe, found: Any) -> Recipe:
    """Returns what to ask for instead where the split for testing cannot be used."""
    if "validation" in found:
        return recipe._replace(test="validation")
    return recipe._replace(train="train[:80%]", test="train[80%:]")


def check_memory(name: str, chosen: Chosen, count: int) -> None:
    """Raises DataError if `count` images do not fit into memory."""
    size = count * math.prod(chosen.shape)
    if size > _LARGEST:
        height, width, _ = chosen.shape
        side = math.isqrt(height * width * _LARGEST // size)
        raise DataError(
            f"{name} must fit into {_LARGEST / 2**30:.0f} GiB of memory, got "
            f"{size / 2**30:.0f} GiB for {count} images of {chosen.shape}. Prepare it "
            f"with --size {side} or less."
        )


def _decode(builder: Any, split: str, chosen: Chosen) -> Split:
    """Returns the images and the numbers of their classes, as TFDS counts them."""
    from PIL import Image

    tfds = import_tfds()
    # Pillow decodes, because TFDS without TensorFlow does not bring palettes and grey
    # images to the channels that the dataset declares.
    raw = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    source = builder.as_data_source(split, decoders=raw)
    height, width, channels = chosen.shape
    x = np.empty((len(source), height, width, channels), np.uint8)
    y = np.empty(len(source), np.int32)
    for i, example in enumerate(source):
        with Image.open(io.BytesIO(example[chosen.image])) as image:
            pixels = image.convert(_MODES[channels])
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.BOX)
        x[i] = np.asarray(pixels).reshape(chosen.shape)
        y[i] = example[chosen.label]
    return Split(x, y)


def _numbered(made: dict[str, Split], label: Any) -> tuple[Splits, tuple[str, ...]]:
    """Counts the classes that occur from 0 and makes the part for validation."""
    used = np.unique(np.concatenate([split.y for split in made.values()]))
    parts = {
        part: Split(x, np.searchsorted(used, y).astype(np.int32))
        for part, (x, y) in made.items()
    }
    if "valid" not in parts:
        x, y = parts["train"]
        held = np.arange(len(y)) % _HOLDOUT == 0
        parts["train"], parts["valid"] = (
            Split(x[~held], y[~held]),
            Split(x[held], y[held]),
        )
    names = tuple(label.int2str(int(i)) for i in used)
    return Splits(parts["train"], parts["valid"], parts["test"]), names
