"""The data door: raw files in, a TFDS dataset and uint8 arrays out, damage named."""

import gzip
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from tasks import data, raw
from tasks.data import DataError
from tasks.prepare import prepare

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def _idx(array, magic=b"\0\0\x08"):
    header = magic + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """A folder with 30 training and 12 test images in the format of MNIST."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = data.DATASETS["mnist"].files
    for images, labels, count in ((*files[:2], 30), (*files[2:], 12)):
        (folder / images).write_bytes(_idx(rng.integers(0, 256, (count, 28, 28))))
        (folder / labels).write_bytes(_idx(np.arange(count) % 10))
    return folder


def _png(seed):
    pixels = np.random.default_rng(seed).random((105, 105)) > 0.1
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png")
    return stream.getvalue()


@pytest.fixture
def omniglot(tmp_path):
    """A folder with 2 + 1 alphabets of 2 characters by 20 drawers."""
    folder = tmp_path / "raw"
    folder.mkdir()
    alphabets = {
        "images_background_small1": ("Greek", "Latin"),
        "images_background_small2": ("Latin",),
        "images_evaluation": ("Tengwar",),
    }
    for name, members in alphabets.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for alphabet in members:
                for seed in range(40):
                    path = f"{alphabet}/character{seed // 20 + 1:02d}/{seed}.png"
                    archive.writestr(f"{name}/{path}", _png(seed))
    return folder


def _rows(*parts):
    return sorted(
        (np.asarray(x).tobytes(), int(y))
        for part in parts
        for x, y in zip(*part, strict=True)
    )


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    digits = data.load("digits")
    assert [len(part.y) for part in digits] == [1283, 257, 257]
    rows = _rows(*digits)
    assert rows == _rows((original.images.astype(np.uint8)[..., None], original.target))
    np.testing.assert_array_equal(digits.test.y, original.target[::7])
    for x, y in digits:
        assert (x.dtype, y.dtype, x.max()) == (np.uint8, np.int32, 16)
        assert np.bincount(y).min() >= 0.06 * len(y)


def test_mnist_goes_through_tfds_unchanged(mnist, home):
    tfds = pytest.importorskip("tensorflow_datasets")
    done = prepare("mnist", mnist)
    assert (done.counts, done.classes) == ((25, 5, 12), 10)
    assert "25 train, 5 valid and 12 test" in str(done)
    splits = data.load("mnist")
    train = raw.read_mnist("mnist", mnist)["train"]
    test = raw.read_mnist("mnist", mnist)["test"]
    assert _rows(splits.train, splits.valid) == _rows(train)
    assert _rows(splits.test) == _rows(test)
    source = tfds.data_source("mnist", split="test", data_dir=home)
    images = [example["image"] for example in source]
    np.testing.assert_array_equal(np.stack(images), splits.test.x)
    assert [p.name for p in home.iterdir()] == ["mnist"]
    assert "tensorflow" not in sys.modules


def test_preparing_again_replaces(mnist, home):
    prepare("mnist", mnist)
    files = data.DATASETS["mnist"].files
    (mnist / files[2]).write_bytes(_idx(np.zeros((13, 28, 28))))
    (mnist / files[3]).write_bytes(_idx(np.zeros(13)))
    assert prepare("mnist", mnist).counts == (25, 5, 13)
    assert len(data.load("mnist").test.y) == 13
    assert [p.name for p in home.iterdir()] == ["mnist"]


def test_omniglot_keeps_its_alphabets_and_counts_no_drawing_twice(omniglot):
    done = prepare("omniglot", omniglot)
    assert (done.counts, done.classes) == ((84, 18, 18), 6)
    names = data.class_names("omniglot")
    assert names[1:5] == (
        "Greek/character02",
        "Latin/character01",
        "Latin/character02",
        "Tengwar/character01",
    )
    assert data.num_classes("omniglot") == 6
    splits = data.load("omniglot")
    assert splits.train.x.shape == (84, 28, 28, 1)
    assert (np.bincount(splits.valid.y) == 3).all()
    # Nine pixels in ten are white paper, which becomes the background 0.
    np.testing.assert_allclose(splits.train.x.mean(), 25.5, rtol=0.1)


def _cifar(folder, names, records):
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = records.nbytes
            tar.addfile(member, io.BytesIO(records.tobytes()))


def test_cifar10_is_read_channel_by_channel(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (20, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    _cifar(tmp_path / "raw", [*batches, "test_batch.bin"], records)
    parts = raw.read_cifar10("cifar10", tmp_path / "raw")
    x, y = parts["train"]
    assert x.shape == (100, 32, 32, 3)
    np.testing.assert_array_equal(y[20:40], records[:, 0])
    # A record is the label, then the planes red, green and blue, row by row.
    assert x[3, 5, 7, 1] == records[3, 1 + 1024 + 5 * 32 + 7]
    _cifar(tmp_path / "short", batches, records)
    with pytest.raises(DataError, match=r"must contain test_batch.bin.*--from DIR$"):
        raw.read_cifar10("cifar10", tmp_path / "short")


def _truncate(path, cut=40):
    path.write_bytes(path.read_bytes()[:-cut])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def _zip(path, member, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)


_IMAGES, _LABELS = data.DATASETS["mnist"].files[:2]


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda d: (d / _IMAGES).unlink(), f"must hold also {_IMAGES}"),
        (lambda d: _truncate(d / _IMAGES), "no whole gzip file"),
        (lambda d: _flip(d / _IMAGES), "no whole gzip file"),
        (lambda d: (d / _IMAGES).write_bytes(b"<html>"), "no whole gzip file"),
        (lambda d: (d / _IMAGES).write_bytes(b""), "bytes 00000803"),
        (lambda d: (d / _LABELS).write_bytes((d / _IMAGES).read_bytes()), "00000801"),
        (
            lambda d: (d / _LABELS).write_bytes(_idx(np.zeros(30), b"\0\0\x0d")),
            "must start with the bytes 00000801",
        ),
        (
            lambda d: (d / _IMAGES).write_bytes(
                gzip.compress(gzip.decompress((d / _IMAGES).read_bytes())[:-1])
            ),
            r"must hold \(30, 28, 28\) bytes by its header, got 23519",
        ),
        (
            lambda d: (d / _IMAGES).write_bytes(_idx(np.zeros((30, 8, 8)))),
            r"must hold images \(28, 28, 1\), got \(8, 8, 1\)",
        ),
        (
            lambda d: (d / _LABELS).write_bytes(_idx(np.zeros(29))),
            "30 images for 29 labels",
        ),
        (
            lambda d: (d / _LABELS).write_bytes(_idx(np.arange(30))),
            "below 10, got 29",
        ),
    ],
)
def test_damaged_idx_files_are_named(mnist, home, harm, complaint):
    harm(mnist)
    with pytest.raises(DataError, match=f"{complaint}.*prepare mnist --from DIR$"):
        prepare("mnist", mnist)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (_truncate, "no whole Omniglot file"),
        (lambda p: p.write_bytes(b"<html>"), "no whole Omniglot file"),
        (
            lambda p: _zip(p, "a/b/c.png", _png(0)),
            "is not FOLDER/ALPHABET/characterNN",
        ),
        (
            lambda p: _zip(p, "a/b/character01/c.png", b"x"),
            "cannot identify image",
        ),
        (lambda p: _zip(p, "readme", b"x"), "contain PNG"),
    ],
)
def test_damaged_zip_files_are_named(omniglot, harm, complaint):
    harm(omniglot / "images_evaluation.zip")
    with pytest.raises(DataError, match=f"{complaint}.*prepare omniglot --from DIR$"):
        prepare("omniglot", omniglot)


def test_wrong_directories_are_named(mnist, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a directory"):
        prepare("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold any of images_background"):
        prepare("omniglot", mnist)
    with pytest.raises(DataError, match="can only be downloaded"):
        prepare("svhn_cropped", mnist)


def test_files_of_another_dataset_are_refused(mnist, monkeypatch):
    import hashlib

    tfds = pytest.importorskip("tensorflow_datasets")
    infos = tfds.builder_cls("fashion_mnist").url_infos
    info = next(iter(infos.values()))
    content = (mnist / _LABELS).read_bytes()
    known = type(info)(info.size, hashlib.sha256(content).hexdigest(), info.filename)
    monkeypatch.setitem(infos, next(iter(infos)), known)
    with pytest.raises(DataError, match="belongs to fashion_mnist, not to mnist"):
        prepare("mnist", mnist)


def test_without_network_or_tensorflow_the_remedy_is_named():
    with pytest.raises(
        DataError, match=r"not downloaded.*data prepare kmnist --from DIR$"
    ):
        prepare("kmnist")


def test_names_are_checked():
    with pytest.raises(ValueError, match="Did you mean 'mnist'"):
        data.load("mnits")
    with pytest.raises(ValueError, match="dataset must be one of 'mnist'"):
        prepare("digits")


def test_missing_and_present_datasets(mnist, home):
    command = "python -m experiments data prepare mnist --from DIR"
    with pytest.raises(DataError, match=f"mnist is not prepared.*{command}$"):
        data.load("mnist")
    states = {line.name: line.state for line in data.status()}
    assert states.pop("digits") == "embedded"
    assert set(states.values()) == {"missing"}
    prepare("mnist", mnist)
    assert ("mnist", "prepared", str(home / "mnist")) in data.status()


def _array_record(home):
    return next((home / "mnist").glob("*/*test.array_record*"))


@pytest.mark.parametrize("harm", [_truncate, _flip, lambda p: p.write_bytes(b"junk")])
def test_a_damaged_cache_is_made_again(mnist, home, harm):
    prepare("mnist", mnist)
    before = data.load("mnist")
    harm(home / "mnist" / "cache.npz")
    for _ in range(2):
        np.testing.assert_array_equal(data.load("mnist").train.x, before.train.x)


@pytest.mark.parametrize(
    "harm",
    [
        lambda home: _truncate(_array_record(home)),
        lambda home: _array_record(home).write_bytes(b""),
        lambda home: _array_record(home).unlink(),
        lambda home: _array_record(home).with_name("features.json").unlink(),
        lambda home: _array_record(home).with_name("dataset_info.json").unlink(),
    ],
)
def test_a_damaged_dataset_is_named(mnist, home, harm):
    prepare("mnist", mnist)
    (home / "mnist" / "cache.npz").unlink()
    harm(home)
    with pytest.raises(DataError, match=r"prepare mnist --from DIR$"):
        data.load("mnist")


def test_a_killed_preparation_leaves_nothing_half_made(mnist, home):
    # The process dies at the last moment before the dataset gets its name.
    program = (
        "import os, signal, tasks.prepare as p\n"
        "p.write_cache = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"p.prepare('mnist', {str(mnist)!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True
    )
    assert killed.returncode == -9
    with pytest.raises(DataError, match="mnist is not prepared"):
        data.load("mnist")
    (leftover,) = home.iterdir()
    os.utime(leftover, (0, 0))
    prepare("mnist", mnist)
    assert [p.name for p in home.iterdir()] == ["mnist"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the raw files are not there")
def test_real_files():
    x, y = raw.read_mnist("mnist", REAL / "mnist")["test"]
    assert x.shape == (10_000, 28, 28, 1)
    assert np.bincount(y).tolist()[:3] == [980, 1135, 1032]
    done = prepare("omniglot", REAL / "omniglot")
    assert (done.counts, done.classes) == ((1904, 408, 408), 136)
