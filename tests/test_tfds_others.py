"""Any image dataset of TFDS: prepared by its name there, and loaded."""

import json
import sys

import numpy as np
import pytest

from tasks import data
from tasks.data import DataError
from tasks.prepare import prepare
from tests.made_up_images import MadeUpImages, made, pixels, rows


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def small():
    """A prepared dataset of two classes, 6x4 colour images."""
    prepare("made_up_images/small-6.4")
    return "made_up_images/small-6.4"


@pytest.mark.parametrize("version", ["", ":1.2.0"])
def test_what_tfds_yields_is_what_is_loaded(version, home, monkeypatch):
    name = f"made_up_images/small-6.4{version}"
    done = prepare(name)
    assert (done.counts, done.classes) == ((36, 4, 7), 2)
    folder = f"made_up_images-small-6.4{version.replace(':', '@')}"
    assert [path.name for path in home.iterdir()] == [folder]
    assert "tensorflow" not in sys.modules
    # From here on TFDS is not needed either.
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    splits = data.load(name)
    assert rows(splits.train, splits.valid) == made(range(40))
    assert rows(splits.test) == made(range(50, 57))
    assert data.class_names(name) == ("low", "high")
    assert (data.info(name).shape, data.info(name).version) == ((6, 4, 3), "1.2.0")
    assert data.num_classes(name) == 2
    assert (name, "prepared", str(home / folder)) in data.status()


def test_a_split_for_validation_is_used():
    done = prepare("made_up_images/grey")
    assert done.counts == (40, 5, 7)
    valid = data.load("made_up_images/grey").valid
    assert rows(valid) == made(range(40, 45), (28, 28, 1))


def test_images_of_different_sizes_are_averaged_to_one():
    name = "made_up_images/sizes"
    with pytest.raises(DataError, match=r"different sizes.*prepare \S+ --size 32$"):
        prepare(name)
    prepare(name, size=2)
    found = data.load(name).test.x
    assert found.shape == (40, 2, 2, 3)
    want = np.array(
        [
            pixels(i, (4, 6 + 2 * (i % 2), 3)).reshape(2, 2, 2, -1, 3).mean((1, 3))
            for i in range(40)
        ]
    )
    near = np.abs(found[:, None].astype(float) - want[None]).reshape(40, 40, -1).max(2)
    # TFDS shuffles: every image is one of those wanted, and the other way round. Pillow
    # rounds twice, after averaging the columns and after averaging the rows.
    assert (near.min(1) <= 1).all()
    assert (near.min(0) <= 1).all()


def test_of_several_labels_the_one_that_is_named_counts():
    prepare("made_up_images/extras")
    assert rows(data.load("made_up_images/extras").test) == made(range(40))
    name = "made_up_images/extras_unnamed"
    with pytest.raises(DataError, match=r"one of label, coarse.*--label label$"):
        prepare(name)
    with pytest.raises(DataError, match=r"one of label, coarse.*got label='id'"):
        prepare(name, label="id")
    assert prepare(name, label="coarse").classes == 1
    assert prepare(name, label="label").classes == 2


def test_grey_images_and_palettes_get_the_declared_channels():
    prepare("made_up_images/modes")
    found = {x.tobytes() for x in data.load("made_up_images/modes").test.x}
    want = {np.repeat(pixels(i, (6, 4))[..., None], 3, 2).tobytes() for i in range(20)}
    assert found == want


def test_splits_are_chosen_in_the_syntax_of_tfds():
    name = "made_up_images/train_only"
    remedy = r"--train 'train\[:80%\]' --test 'train\[80%:\]'$"
    with pytest.raises(DataError, match=f"no split 'test'.*it has train.*{remedy}"):
        prepare(name)
    with pytest.raises(DataError, match="must not share images"):
        prepare(name, test="train[38:]")
    with pytest.raises(DataError, match="no split 'train"):
        prepare(name, train="train[:", test="train[80%:]")
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        prepare(name, train="train[:39]", test="train[39:]")
    done = prepare(name, train="train[:80%]", test="train[80%:]")
    assert done.counts == (28, 4, 8)
    assert rows(*data.load(name)) == made(range(40))


def test_images_without_a_class_are_refused():
    name = "made_up_images/unlabelled"
    with pytest.raises(DataError, match=r"without a class.*--test validation$"):
        prepare(name)
    assert prepare(name, test="validation").counts == (36, 4, 5)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("two_images", "type Image, got several: image, other"),
        ("no_label", r"type ClassLabel, got image \(Image\)"),
        ("no_image", r"type Image, got id \(Text\)"),
        ("deep", r"type uint8 .*, got \(6, 4, 1\) and uint16"),
        ("broken", r"ZeroDivisionError.*prepare made_up_images/broken$"),
    ],
)
def test_what_cannot_be_used_is_refused(kind, complaint, home):
    with pytest.raises(DataError, match=complaint):
        prepare(f"made_up_images/{kind}")
    assert list(home.iterdir()) == []


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("tasks.tfds_others._LARGEST", 47 * 3 * 3 * 3)
    with pytest.raises(DataError, match=r"47 images of \(6, 6, 3\).*--size 3 or less"):
        prepare("made_up_images/small-6.4", size=6)
    assert prepare("made_up_images/small-6.4", size=3).counts == (36, 4, 7)


def test_names_are_checked(home):
    with pytest.raises(ValueError, match="Did you mean 'made_up_images'"):
        prepare("made_up_image")
    with pytest.raises(ValueError, match=r"TFDS cannot make.* BuilderConfig nothing"):
        prepare("made_up_images/nothing")
    for name in ("../elsewhere", "a/b/c", "mnist:latest", ""):
        with pytest.raises(
            ValueError, match=r"dataset must be .*emnist/letters.* got "
        ):
            data.load(name)
    with pytest.raises(TypeError, match="dataset must be a str"):
        data.load(7)
    with pytest.raises(ValueError, match=r"left out for mnist.*got --size 8"):
        prepare("mnist", size=8)
    with pytest.raises(ValueError, match="size must be at least 1"):
        prepare("made_up_images/small-6.4", size=0)
    command = "python -m experiments data prepare made_up_images/grey"
    with pytest.raises(DataError, match=f"that is prepared, got .*{command}$"):
        data.load("made_up_images/grey")


def test_published_datasets_are_understood_before_their_download(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"TensorFlow.*data prepare cifar100$"):
        prepare("cifar100")
    with pytest.raises(DataError, match=r"prepare tf_flowers --size 32$"):
        prepare("tf_flowers")


def test_a_dataset_that_tfds_has_prepared_elsewhere_is_taken(tmp_path):
    there = tmp_path / "tensorflow_datasets"
    builder = MadeUpImages(
        config="small-6.4", data_dir=there, file_format="array_record"
    )
    builder.download_and_prepare()
    # TFDS does not know the code of what has another name.
    (there / "made_up_images").rename(there / "own_images")
    assert prepare("own_images/small-6.4", there).counts == (36, 4, 7)
    assert rows(data.load("own_images/small-6.4").test) == made(range(50, 57))
    assert prepare("own_images/small-6.4:1.2.0", there).counts == (36, 4, 7)
    with pytest.raises(DataError, match=r"it holds own_images/small-6.4/1.2.0\.$"):
        prepare("own_images", there)
    with pytest.raises(DataError, match=r"must hold stl10/VERSION.*holds none\.$"):
        prepare("stl10", there)
    facts = there / "own_images" / "small-6.4" / "1.2.0" / "dataset_info.json"
    content = json.loads(facts.read_text())
    facts.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="not in array_record format"):
        prepare("own_images/small-6.4", there)


def test_what_is_damaged_is_made_again_or_named(small, home):
    before, folder = data.load(small), home / "made_up_images-small-6.4"
    (folder / "cache.npz").write_bytes(b"junk")
    np.testing.assert_array_equal(data.load(small).train.x, before.train.x)
    (folder / "cache.npz").unlink()
    record = next(folder.glob("*/*test.array_record*"))
    record.write_bytes(record.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"damaged.*prepare {small}$"):
        data.load(small)
    (folder / "images.json").write_text("{")
    with pytest.raises(DataError, match=rf"images.json is damaged.*prepare {small}$"):
        data.info(small)
    prepare(small)
    np.testing.assert_array_equal(data.load(small).train.x, before.train.x)
