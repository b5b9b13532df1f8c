"""Readers of the raw files that datasets are published as; every damage is named."""

import gzip
import io
import pathlib
import tarfile
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from tasks.dataset_info import DATASETS, problem


class Drawing(NamedTuple):
    """One Omniglot image.

    Attributes:
        alphabet: its alphabet.
        character: number of the character in its alphabet, from 1.
        image: pixels, `[105, 105, 1]` uint8.
    """

    alphabet: str
    character: int
    image: np.ndarray


def find_files(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the raw files of a dataset in `folder`; Omniglot needs only one of its.

    Raises:
        DataError: if the folder does not exist or lacks a file.
    """
    files = DATASETS[name].files
    if not folder.is_dir():
        raise problem(name, f"{folder} is not a directory.")
    missing = [f for f in files if not (folder / f).is_file()]
    enough = len(missing) < len(files) if name == "omniglot" else not missing
    if not enough:
        wanted = "any of" if name == "omniglot" else "also"
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise problem(
            name, f"{folder} must hold {wanted} {', '.join(missing)}; it holds {there}."
        )
    return [folder / f for f in files if f not in missing]


def read_idx(name: str, path: pathlib.Path, ndim: int) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes with `ndim` axes.

    Raises:
        DataError: if it is not gzip, damaged, no such idx file or of the wrong length.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise problem(
            name, f"{path} is no whole gzip file ({error}); fetch it again."
        ) from error
    # Two zero bytes, the type (8: unsigned byte), the number of axes.
    magic = bytes((0, 0, 8, ndim))
    if raw[:4] != magic:
        raise problem(
            name,
            f"{path} must start with the bytes {magic.hex()} of an idx file with "
            f"{ndim} axes, got {raw[:4].hex()}.",
        )
    shape = tuple(np.frombuffer(raw, ">u4", ndim, offset=4).astype(int).tolist())
    payload = len(raw) - 4 - 4 * ndim
    if payload != np.prod(shape):
        raise problem(
            name, f"{path} must hold {shape} bytes by its header, got {payload} bytes."
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_mnist(name: str, folder: pathlib.Path) -> dict[str, tuple]:
    """Reads MNIST or a dataset in its format.

    Returns:
        For "train" and "test": images `[N, 28, 28, 1]` and labels `[N]`, both uint8.

    Raises:
        DataError: if a file is missing, damaged or of another dataset.
    """
    paths = find_files(name, folder)
    result = {}
    for split, (images, labels) in zip(
        ("train", "test"), (paths[:2], paths[2:]), strict=True
    ):
        x, y = read_idx(name, images, 3)[..., None], read_idx(name, labels, 1)
        _check(name, images, x, y)
        result[split] = (x, y)
    return result


def read_cifar10(name: str, folder: pathlib.Path) -> dict[str, tuple]:
    """Reads the binary version of CIFAR-10, a tar file of records of 3,073 bytes.

    Returns:
        For "train" and "test": images `[N, 32, 32, 3]` and labels `[N]`, both uint8.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    (path,) = find_files(name, folder)
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    try:
        with tarfile.open(path) as tar:
            content = {
                pathlib.PurePath(member.name).name: stream.read()
                for member in tar
                if (stream := tar.extractfile(member)) is not None
            }
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise problem(
            name, f"{path} is no whole tar.gz file ({error}); fetch it again."
        ) from error
    result = {}
    for split, members in (("train", batches), ("test", ["test_batch.bin"])):
        if missing := [m for m in members if m not in content]:
            raise problem(name, f"{path} must contain {', '.join(missing)}.")
        raw = np.frombuffer(b"".join(content[m] for m in members), np.uint8)
        if len(raw) % 3073:
            raise problem(name, f"{path} must hold records of 3073 bytes in {members}.")
        records = raw.reshape(-1, 3073)
        x = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        _check(name, path, x, records[:, 0])
        result[split] = (x, records[:, 0])
    return result


def read_omniglot(name: str, folder: pathlib.Path) -> dict[str, dict[str, Drawing]]:
    """Reads whichever of the four zip files are there; drawings in several count once.

    Returns:
        For "train" (background) and "test" (evaluation), if there: the drawings by
        their path inside the zip file.

    Raises:
        DataError: if there is no file, or a damaged one.
    """
    result: dict[str, dict[str, Drawing]] = {}
    for path in find_files(name, folder):
        split = "test" if path.name == "images_evaluation.zip" else "train"
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.namelist() if m.endswith(".png")]
                drawings = {
                    m.partition("/")[2]: _drawing(m, archive.read(m)) for m in members
                }
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            raise problem(
                name, f"{path} is no whole Omniglot file ({error}); fetch it again."
            ) from error
        if not drawings:
            raise problem(name, f"{path} must contain PNG images, got none.")
        result.setdefault(split, {}).update(drawings)
    return result


def _drawing(member: str, png: bytes) -> Drawing:
    """Decodes FOLDER/ALPHABET/characterNN/FILE.png."""
    from PIL import Image

    parts = member.split("/")
    if len(parts) != 4 or not parts[2].startswith("character"):
        raise ValueError(f"{member} is not FOLDER/ALPHABET/characterNN/FILE.png")
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("L"))[..., None]
    if pixels.shape != (105, 105, 1):
        raise ValueError(f"{member} has shape {pixels.shape}, not (105, 105, 1)")
    return Drawing(parts[1], int(parts[2].removeprefix("character")), pixels)


def _check(name: str, path: pathlib.Path, x: np.ndarray, y: np.ndarray) -> None:
    info = DATASETS[name]
    if x.shape[1:] != info.shape:
        raise problem(name, f"{path} must hold images {info.shape}, got {x.shape[1:]}.")
    if len(x) != len(y):
        raise problem(name, f"{path} has {len(x)} images for {len(y)} labels.")
    if len(y) < 2 * info.holdout:
        raise problem(
            name, f"{path} must hold at least {2 * info.holdout} images, got {len(y)}."
        )
    if y.max() >= info.classes:
        raise problem(
            name, f"The labels of {path} must be below {info.classes}, got {y.max()}."
        )
