"""`prepare` makes a TFDS dataset, from files on disk or from the network.

A dataset is made in a temporary folder and renamed when it is whole, so an interruption
at any moment leaves nothing half-made.
"""

import contextlib
import importlib.util
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

from metaopt import validate
from tasks import tfds_known, tfds_others, tfds_writing
from tasks.data import write_cache
from tasks.dataset_info import (
    DATASETS,
    DataError,
    DatasetInfo,
    Recipe,
    Splits,
    check_name,
    data_dir,
    folder_of,
    problem,
    write_facts,
)
from tasks.tfds_known import import_tfds

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


def prepare(
    name: str,
    from_dir: str | os.PathLike | None = None,
    *,
    size: int | None = None,
    train: str = "train",
    test: str = "test",
    label: str | None = None,
) -> Prepared:
    """Makes a TFDS dataset and its cache; replaces one that is already there.

    Args:
        name: a key of `tasks.data.DATASETS` other than "digits", or any other image
            classification dataset as TFDS calls it: "stl10", "emnist/letters",
            "cifar100:3.0.2".
        from_dir: for a key of `DATASETS`, folder with the raw files under their
            original names (`files` there); else a TFDS data directory, in which it is
            already prepared in array_record format. Without it the dataset is made by
            TFDS: a download needs a network and TensorFlow.
        size: side of the square that images are resized to, for a dataset outside of
            `DATASETS`; must be given where they differ in size.
        train: its split for training, in the syntax of TFDS.
        test: its split for testing.
        label: its feature that is the class, where it has several and does not say
            which of them counts.

    Raises:
        ValueError: if there is no dataset of this name, or an option does not apply.
        DataError: if a raw file is missing, damaged or of another dataset, if the
            download fails, or if the dataset cannot be used as it is (see
            `tasks.tfds_others.read`); ends with the command to run, if there is one.
    """
    if name == "digits":
        others = ", ".join(repr(n) for n in DATASETS if n != "digits")
        raise ValueError(
            f"dataset must be one of {others} or another of TFDS, got 'digits', which "
            "is embedded."
        )
    check_name(name)
    recipe = Recipe(size, train, test, label)
    if size is not None:
        validate.integer("size", size)
    if name in DATASETS and recipe != Recipe():
        raise ValueError(
            f"size, train, test and label must be left out for {name}, where they are "
            f"fixed, got {' '.join(recipe.options())}."
        )
    start = time.monotonic()
    origin = None if from_dir is None else pathlib.Path(from_dir)
    with _workplace(name) as work:
        if name in DATASETS:
            made, splits, names = _known(name, origin, work)
        else:
            made, splits, names = _other(name, origin, work, recipe)
        write_cache(made / "cache.npz", splits, names)
        target = folder_of(name)
        if target.exists():
            target.rename(work / "replaced")
        made.rename(target)
    counts = (len(splits.train.y), len(splits.valid.y), len(splits.test.y))
    return Prepared(name, target, counts, len(names), time.monotonic() - start)


@contextlib.contextmanager
def _workplace(name: str) -> Iterator[pathlib.Path]:
    """Gives a temporary folder beside the datasets; removes forgotten ones."""
    home = data_dir()
    home.mkdir(parents=True, exist_ok=True)
    prefix = f".preparing-{folder_of(name).name}-"
    for leftover in home.glob(f"{prefix}*"):
        if time.time() - leftover.stat().st_mtime > _DAY:
            shutil.rmtree(leftover)
    work = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        yield work
    finally:
        shutil.rmtree(work)


_Made = tuple[pathlib.Path, Splits, tuple[str, ...]]


def _known(name: str, origin: pathlib.Path | None, work: pathlib.Path) -> _Made:
    """Makes a dataset of `DATASETS`; returns its folder and what is in it."""
    if origin is None:
        _download(name, _builder_of(name, work))
    else:
        tfds_writing.write(name, origin, work)
    return work / name, *tfds_known.read(name, work / name)


def _other(
    name: str, origin: pathlib.Path | None, work: pathlib.Path, recipe: Recipe
) -> _Made:
    """Makes any other dataset; returns its folder and what is in it."""
    made = work / "made"
    made.mkdir()
    if origin is None:
        builder = _builder_of(name, work)
        # What cannot be used is told before the download.
        chosen = tfds_others.choose(name, builder.info, recipe)
        known = builder.info.splits
        used = {recipe.train, recipe.test} & set(known)
        tfds_others.check_memory(
            name, chosen, sum(known[split].num_examples for split in used)
        )
        _download(name, builder)
        prepared = pathlib.Path(builder.data_dir)
        prepared.rename(made / prepared.name)
    else:
        prepared = _find_prepared(name, origin)
        shutil.copytree(prepared, made / prepared.name)
    splits, names = tfds_others.read(name, made, recipe)
    height, width, channels = splits.train.x.shape[1:]
    known = DatasetInfo(
        (height, width, channels),
        classes=len(names),
        version=prepared.name,
        recipe=recipe,
    )
    write_facts(made, name, known)
    return made, splits, names


def _find_prepared(name: str, origin: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a version of a dataset in a TFDS data directory."""
    path, _, version = name.partition(":")
    folder = origin / path
    found = folder / version if version else tfds_known.newest(folder)
    if found is not None and (found / "dataset_info.json").is_file():
        return found
    there = sorted(
        str(info.parent.relative_to(origin))
        for info in (origin / path.partition("/")[0]).rglob("dataset_info.json")
    )
    raise DataError(
        f"{origin} must hold {path}/{version or 'VERSION'}/dataset_info.json, as a "
        "data directory of TFDS does; of this dataset it holds "
        f"{', '.join(there) or 'none'}."
    )


def _builder_of(name: str, work: pathlib.Path) -> Any:
    """Returns the TFDS builder of a dataset."""
    tfds = import_tfds()
    try:
        return tfds.builder(name, data_dir=work, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        there = [*DATASETS, *tfds.list_builders(with_community_datasets=False)]
        raise ValueError(
            f"dataset must be a name of TFDS, got dataset={name!r}."
            f"{validate.nearest(name, there)} One that it does not know, such as your "
            "own, is taken from where it is prepared, by --from DIR."
        ) from error
    # An unknown configuration or version, each with a class of its own.
    except Exception as error:
        # The message begins with our own arguments.
        reason = " ".join(str(error).rpartition('}": ')[2].split())
        raise ValueError(f"TFDS cannot make {name}: {reason}") from error


def _download(name: str, builder: Any) -> None:
    urls = builder.url_infos or ()
    hosts = {urllib.parse.urlsplit(url).hostname for url in urls}
    if hosts and importlib.util.find_spec("tensorflow") is None:
        raise _not_downloaded(name, "TensorFlow is not installed")
    try:
        # TFDS itself takes minutes of retries to find that there is no network.
        if not urllib.request.getproxies():
            for host in hosts:
                socket.getaddrinfo(host, 443)
        builder.download_and_prepare()
    # No network, a full disk, a changed file: each has a class of its own.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise _not_downloaded(name, reason) from error


def _not_downloaded(name: str, reason: str) -> DataError:
    either = "a network and TensorFlow (pip install tensorflow)"
    if name not in DATASETS:
        either = f"{either}, or --from DIR with a data directory of TFDS that holds it"
    elif files := DATASETS[name].files:
        either = f"{either}, or a folder DIR with the raw files {', '.join(files)}"
    return problem(name, f"{name} was not downloaded ({reason}). It takes {either}.")
