"""A TFDS dataset of random images in every form that one may have, made on the spot.

Importing it makes `made_up_images/...` a name that TFDS knows.
"""

import dataclasses

import numpy as np
import pytest
from PIL import Image

tfds = pytest.importorskip("tensorflow_datasets")
kinds = tfds.features

# What the labels of the made-up dataset are called; no image has the class "none".
NAMES = ("none", "low", "high")


def pixels(seed, shape=(6, 4, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labelled(*, start=0, count=40, shape=(6, 4, 3), unknown=False):
    """Yields random images; the classes "low" and "high" in turn."""
    for i in range(start, start + count):
        x = pixels(i, shape)
        image = Image.fromarray(x[..., 0] if shape[-1] == 1 else x)
        yield i, {"image": image, "label": -1 if unknown else 1 + i % 2}


def features(shape=(6, 4, 3), **more):
    image, label = kinds.Image(shape=shape), kinds.ClassLabel(names=NAMES)
    return {"image": image, "label": label, **more}


def two_sizes():
    for i in range(40):
        image = Image.fromarray(pixels(i, (4, 6 + 2 * (i % 2), 3)))
        yield i, {"image": image, "label": i % 2}


def with_extras():
    for i, example in labelled():
        mask = Image.fromarray(pixels(i, (4, 4)))
        yield i, example | {"coarse": 0, "mask": mask, "id": str(i)}


def grey_and_palette():
    for i in range(20):
        grey = Image.fromarray(pixels(i, (6, 4)))
        yield i, {"image": grey if i % 2 else grey.convert("P"), "label": 1}


def both(**fields):
    return lambda: {"train": labelled(**fields), "test": labelled(start=50, count=7)}


@dataclasses.dataclass
class Kind(tfds.core.BuilderConfig):
    """One dataset of the family below: its features and what makes its splits."""

    features: object = None
    splits: object = None
    keys: tuple | None = None


EXTRAS = {
    "coarse": kinds.ClassLabel(num_classes=2),
    "mask": kinds.LabeledImage(labels=256, shape=(None, None, 1)),
    "id": kinds.Text(),
}
KINDS = (
    Kind(name="small-6.4", features=features, splits=both()),
    Kind(
        name="grey",
        features=lambda: features((28, 28, 1)),
        splits=lambda: {
            "train": labelled(shape=(28, 28, 1)),
            "validation": labelled(start=40, count=5, shape=(28, 28, 1)),
            "test": labelled(start=50, count=7, shape=(28, 28, 1)),
        },
    ),
    Kind(
        name="sizes",
        features=lambda: features((None, None, 3)),
        splits=lambda: {"train": two_sizes(), "test": two_sizes()},
    ),
    Kind(
        name="extras",
        features=lambda: features(**EXTRAS),
        splits=lambda: {"train": with_extras(), "test": with_extras()},
        keys=("image", "label"),
    ),
    Kind(
        name="extras_unnamed",
        features=lambda: features(**EXTRAS),
        splits=lambda: {"train": with_extras(), "test": with_extras()},
    ),
    Kind(
        name="modes",
        features=features,
        splits=lambda: {"train": grey_and_palette(), "test": grey_and_palette()},
    ),
    Kind(name="train_only", features=features, splits=lambda: {"train": labelled()}),
    Kind(
        name="unlabelled",
        features=features,
        splits=lambda: {
            "train": labelled(),
            "validation": labelled(start=40, count=5),
            "test": labelled(start=50, count=7, unknown=True),
        },
    ),
    Kind(
        name="two_images",
        features=lambda: features(other=kinds.Image(shape=(2, 2, 3))),
        splits=both(),
    ),
    Kind(name="no_label", features=lambda: {"image": kinds.Image()}, splits=both()),
    Kind(name="no_image", features=lambda: {"id": kinds.Text()}, splits=both()),
    Kind(
        name="deep",
        features=lambda: features(
            image=kinds.Image(shape=(6, 4, 1), dtype=np.uint16, encoding_format="png")
        ),
        splits=both(),
    ),
    Kind(name="broken", features=features, splits=lambda: 1 / 0),
)


class MadeUpImages(tfds.core.GeneratorBasedBuilder):
    """Random images in every form that a dataset may have; TFDS finds it by name."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = KINDS

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=kinds.FeaturesDict(self.builder_config.features()),
            supervised_keys=self.builder_config.keys,
        )

    def _split_generators(self, dl_manager):
        return self.builder_config.splits()

    def _generate_examples(self):
        raise NotImplementedError


def rows(*parts):
    return sorted(
        (np.asarray(x).tobytes(), int(y))
        for part in parts
        for x, y in zip(*part, strict=True)
    )


def made(seeds, shape=(6, 4, 3)):
    """What `labelled` yields, without a class that no image has."""
    return rows(([pixels(i, shape) for i in seeds], [i % 2 for i in seeds]))
