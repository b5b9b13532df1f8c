"""Writes the raw files of a dataset as the dataset that TFDS would make of them.

Neither TensorFlow nor a network is needed: the builder below writes what `tfds.load`
would have written, in array_record format, and `tfds.data_source` reads it back.
"""

import contextlib
import hashlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tasks import raw
from tasks.dataset_info import DATASETS, problem
from tasks.tfds_known import import_tfds


def write(name: str, folder: pathlib.Path, work: pathlib.Path) -> None:
    """Writes the raw files as the TFDS dataset `name` under `work`."""
    if not DATASETS[name].files:
        raise problem(name, f"{name} can only be downloaded, not read from raw files.")
    paths = raw.find_files(name, folder)
    tfds = import_tfds()
    _check_origin(tfds, name, paths)
    if name == "omniglot":
        features, examples = _omniglot(tfds, raw.read_omniglot(name, folder))
    else:
        read = raw.read_cifar10 if name == "cifar10" else raw.read_mnist
        features, examples = _classified(tfds, name, read(name, folder))
    builder = _builder(tfds, name, features, examples)
    # TFDS announces a download, which this is not.
    with contextlib.redirect_stdout(io.StringIO()):
        builder(data_dir=work, file_format="array_record").download_and_prepare()


def _check_origin(tfds: Any, name: str, paths: list[pathlib.Path]) -> None:
    """Raises if a file is known to be another dataset's: their names are the same."""
    known = {
        info.checksum: other
        for other, facts in DATASETS.items()
        if facts.files
        for info in tfds.builder_cls(other).url_infos.values()
    }
    for path in paths:
        owner = known.get(hashlib.sha256(path.read_bytes()).hexdigest(), name)
        if owner != name:
            raise problem(name, f"{path} belongs to {owner}, not to {name}.")


def _classified(
    tfds: Any, name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[dict[str, Any], dict[str, Iterator]]:
    """Returns the TFDS features and the examples of images with one label each."""
    info = DATASETS[name]
    features = {
        "image": tfds.features.Image(shape=info.shape),
        "label": tfds.features.ClassLabel(num_classes=info.classes),
    }

    def examples(x, y):
        for i in range(len(y)):
            yield i, {"image": _pillow(x[i]), "label": int(y[i])}

    return features, {split: examples(*part) for split, part in parts.items()}


def _omniglot(
    tfds: Any, parts: dict[str, dict[str, raw.Drawing]]
) -> tuple[dict[str, Any], dict[str, Iterator]]:
    """Returns the TFDS features and the examples of Omniglot, alphabets included."""
    drawings = [d for part in parts.values() for d in part.values()]
    alphabets = sorted({d.alphabet for d in drawings})
    characters = sorted({(d.alphabet, d.character) for d in drawings})
    label = {character: i for i, character in enumerate(characters)}
    features = {
        "image": tfds.features.Image(shape=(105, 105, 1)),
        "alphabet": tfds.features.ClassLabel(names=alphabets),
        "alphabet_char_id": np.int64,
        "label": tfds.features.ClassLabel(num_classes=len(characters)),
    }

    def examples(part):
        for path, (alphabet, character, image) in part.items():
            yield (
                path,
                {
                    "image": _pillow(image),
                    "alphabet": alphabet,
                    "alphabet_char_id": character,
                    "label": label[alphabet, character],
                },
            )

    return features, {split: examples(part) for split, part in parts.items()}


def _pillow(image: np.ndarray) -> Any:
    # TFDS encodes Pillow images by itself, but arrays only with TensorFlow.
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _builder(
    tfds: Any, name: str, features: dict[str, Any], examples: dict[str, Iterator]
) -> Any:
    """Returns a TFDS builder class of the dataset's own name and version."""
    official = tfds.builder_cls(name)

    class Converted(  # type: ignore[call-arg]
        tfds.core.GeneratorBasedBuilder, skip_registration=True
    ):
        VERSION = official.VERSION

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return examples

        def _generate_examples(self):
            raise NotImplementedError("the splits carry their generators")

    Converted.name = name
    return Converted
