"""`prepare` makes a TFDS dataset, from raw files on disk or from the network.

Neither TensorFlow nor a network is needed to make one from raw files: the builder below
writes what `tfds.load` would have written, in array_record format, and
`tfds.data_source` reads it back. A dataset is made in a temporary folder and renamed
when it is whole, so an interruption at any moment leaves nothing half-made.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import pathlib
import shutil
import socket
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from metaopt import validate
from tasks import raw
from tasks.data import (
    DATASETS,
    DataError,
    data_dir,
    problem,
    read_tfds,
    write_cache,
)

_DAY = 24 * 3600.0


class Prepared(NamedTuple):
    """What `prepare` has made.

    Attributes:
        name: the dataset.
        path: its folder, which `tfds.builder_from_directory` reads.
        counts: images for training, validation and testing.
        classes: number of classes.
        seconds: time it took.
    """

    name: str
    path: pathlib.Path
    counts: tuple[int, int, int]
    classes: int
    seconds: float

    def __str__(self):
        train, valid, test = self.counts
        return (
            f"{self.name}: {train} train, {valid} valid and {test} test images of "
            f"{self.classes} classes in {self.path} ({self.seconds:.0f} s)"
        )


def prepare(name: str, from_dir: str | os.PathLike | None = None) -> Prepared:
    """Makes a TFDS dataset and its cache; replaces one that is already there.

    Args:
        name: a key of `tasks.data.DATASETS` other than "digits".
        from_dir: folder with the raw files under their original names (`files` in
            `DATASETS`); without it they are downloaded by TFDS, which needs a network
            and TensorFlow.

    Raises:
        ValueError: if there is no dataset of this name.
        DataError: if a raw file is missing, damaged or of another dataset, or if the
            download fails; ends with the command to run.
    """
    validate.one_of("dataset", name, [n for n in DATASETS if n != "digits"])
    start = time.monotonic()
    home = data_dir()
    home.mkdir(parents=True, exist_ok=True)
    for leftover in home.glob(f".preparing-{name}-*"):
        if time.time() - leftover.stat().st_mtime > _DAY:
            shutil.rmtree(leftover)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".preparing-{name}-", dir=home))
    try:
        if from_dir is None:
            _download(name, work)
        else:
            _convert(name, pathlib.Path(from_dir), work)
        splits, names = read_tfds(name, work / name)
        write_cache(work / name / "cache.npz", splits, names)
        target = home / name
        if target.exists():
            target.rename(work / "replaced")
        (work / name).rename(target)
    finally:
        shutil.rmtree(work)
    counts = (len(splits.train.y), len(splits.valid.y), len(splits.test.y))
    return Prepared(name, target, counts, len(names), time.monotonic() - start)


def _download(name: str, work: pathlib.Path) -> None:
    tfds = _tfds()
    if importlib.util.find_spec("tensorflow") is None:
        raise _not_downloaded(name, "TensorFlow is not installed")
    hosts = {
        urllib.parse.urlsplit(url).hostname for url in tfds.builder_cls(name).url_infos
    }
    try:
        # TFDS itself takes minutes of retries to find that there is no network.
        if not urllib.request.getproxies():
            for host in hosts:
                socket.getaddrinfo(host, 443)
        builder = tfds.builder(name, data_dir=work, file_format="array_record")
        builder.download_and_prepare()
    # No network, a full disk, a changed file: each has a class of its own.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise _not_downloaded(name, reason) from error


def _not_downloaded(name: str, reason: str) -> DataError:
    files = DATASETS[name].files
    either = "a network and TensorFlow (pip install tensorflow)"
    if files:
        either = f"{either}, or a folder DIR with the raw files {', '.join(files)}"
    return problem(name, f"{name} was not downloaded ({reason}). It takes {either}.")


def _convert(name: str, folder: pathlib.Path, work: pathlib.Path) -> None:
    """Writes the raw files as the TFDS dataset `name` under `work`."""
    if not DATASETS[name].files:
        raise problem(name, f"{name} can only be downloaded, not read from raw files.")
    paths = raw.find_files(name, folder)
    tfds = _tfds()
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


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "Datasets are written by tensorflow-datasets: install the extra 'data', "
            "as in pip install 'metaopt-jax[data]'."
        ) from error
    return tensorflow_datasets


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
