import dataclasses
import hashlib
import io
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import metaopt
from metaopt import weights
from metaopt.optimizers import MLP, Fixed, Hyper, SmallFC
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import OPTIMIZERS, to_config
from metaopt.weights import bundle, store
from metaopt.weights.__main__ import main

SGD = Fixed("sgd", (("learning_rate", 0.5),))
ADAM = Hyper("adam")
RULES = [SGD, ADAM, MLP(), SmallFC(), SmallFC(widths=(3,))]


def saved(path, optimizer, **kwargs):
    theta = optimizer.init_theta(jax.random.key(0))
    weights.save_weights(path, theta, optimizer, **kwargs)
    return theta


def resave(path, **changes):
    """Writes a file whose checksum is right, so that only the content is at fault."""
    contents = store.read(path.read_bytes(), "file")
    tensors = changes.pop("tensors", contents.tensors)
    optimizer, info = contents.optimizer, contents.info
    record = {"format": 1, "optimizer": optimizer, "info": info, **changes}
    record["sha256"] = store._digest(tensors, record)
    metadata = {"metaopt": json.dumps(record)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


@pytest.mark.parametrize("optimizer", RULES, ids=repr)
def test_a_saved_optimizer_comes_back_the_same(tmp_path, optimizer):
    theta = saved(tmp_path / "a" / "theta.safetensors", optimizer)
    again, loaded = weights.load_weights(tmp_path / "a" / "theta.safetensors")
    assert again == optimizer
    assert jax.tree.structure(loaded) == jax.tree.structure(theta)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(theta), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


def test_provenance_is_kept(tmp_path):
    info = {"task": "digits", "steps": 2000, "seeds": [1, 2]}
    saved(tmp_path / "t", SGD, info=info)
    contents = store.read((tmp_path / "t").read_bytes(), "t")
    assert contents.info == info
    assert contents.optimizer == to_config(SGD)


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path / name, SmallFC(), info={"x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_plain_safetensors(tmp_path):
    saved(tmp_path / "t", SmallFC())
    tensors = safetensors.numpy.load((tmp_path / "t").read_bytes())
    assert {str(x.dtype) for x in tensors.values()} == {"float32"}
    assert tensors["network/linear_0/w"].shape == (39, 4)


# The names in files that users have: renaming a layer must fail here, not there.
NAMES = {
    SmallFC(): [
        *("decays/factored", "decays/momentum", "decays/square"),
        *(f"network/linear_{i}/{x}" for i in range(3) for x in "bw"),
    ],
    ADAM: ["learning_rate"],
}


@pytest.mark.parametrize("optimizer", NAMES, ids=repr)
def test_the_names_of_tensors_stay(tmp_path, optimizer):
    saved(tmp_path / "t", optimizer)
    contents = store.read((tmp_path / "t").read_bytes(), "t")
    assert sorted(contents.tensors) == NAMES[optimizer]


def test_every_single_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "t"
    saved(path, ADAM, info={"steps": 10})
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"^label "):
                store.read(bytes(flipped), "label")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "t"
    saved(path, ADAM)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a metaopt weights file"):
            weights.load_weights(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="not a metaopt weights file"):
        weights.load_weights(path)


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(3))
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


FOREIGN = {
    "a zip archive such as NumPy's .npz": npz(),
    "a pickle": pickle.dumps(Bomb()),
    "a gzip archive": b"\x1f\x8b" + bytes(100),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "junk": bytes(range(256)) * 4,
    "cut short": b"",
    "without the metadata": safetensors.numpy.save({"w": np.ones(3)}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "thing.bin"
    path.write_bytes(FOREIGN[kind])
    for load in (weights.load_weights, weights.load):
        with pytest.raises(ValueError, match=re.escape(kind)) as caught:
            load(path)
        assert "thing.bin is not a metaopt weights file" in str(caught.value)


def test_all_misfits_are_listed_at_once(tmp_path):
    path = tmp_path / "t"
    saved(path, SmallFC())
    tensors = dict(store.read(path.read_bytes(), "t").tensors)
    del tensors["network/linear_0/b"]
    tensors["network/linear_9/b"] = np.zeros(2, np.float32)
    tensors["network/linear_1/w"] = np.zeros((4, 5), np.float32)
    resave(path, tensors=tensors)
    with pytest.raises(ValueError) as caught:
        weights.load_weights(path)
    for part in (
        f"{path} does not fit SmallFC",
        "missing network/linear_0/b (4,)",
        "unexpected network/linear_9/b (2,)",
        "network/linear_1/w has shape (4, 5), needs (4, 4)",
    ):
        assert part in str(caught.value)


def test_other_dtypes_are_refused(tmp_path):
    path = tmp_path / "t"
    saved(path, ADAM)
    resave(path, tensors={"learning_rate": np.zeros((), np.float64)})
    with pytest.raises(ValueError, match="float32 only: learning_rate is F64"):
        weights.load_weights(path)


def test_a_newer_format_says_so(tmp_path):
    path = tmp_path / "t"
    saved(path, SGD)
    resave(path, format=2)
    with pytest.raises(ValueError, match="has format 2, this version of metaopt reads"):
        weights.load_weights(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "SmalFC"}, "Did you mean 'SmallFC'"),
        ({"type": "SmallFC", "width": [4]}, "unknown 'width' Did you mean 'widths'"),
        ({"type": "SmallFC", "widths": [-4]}, "widths"),
        ([], "config must be a dict"),
    ],
)
def test_an_optimizer_that_cannot_be_rebuilt(tmp_path, config, message):
    path = tmp_path / "t"
    saved(path, SGD)
    resave(path, optimizer=config)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load_weights(path)
    assert f"{path}: its optimizer cannot be rebuilt" in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Mine(LearnedOptimizer):
    def init_theta(self, key):
        return {"empty": jnp.zeros((0, 3)), "rate": jnp.float32(0.5)}

    def init(self, theta, params, *, num_steps=None, key=None):
        return ()

    def update(self, theta, grads, state, params, *, value=None, **extra):
        return jax.tree.map(lambda g: -theta["rate"] * g, grads), state


def test_rules_of_the_users_own(tmp_path):
    saved(tmp_path / "t", Mine())
    with pytest.raises(ValueError, match=r"'Mine'.*classes="):
        weights.load_weights(tmp_path / "t")
    classes = {**OPTIMIZERS, "Mine": Mine}
    optimizer, theta = weights.load_weights(tmp_path / "t", classes=classes)
    assert optimizer == Mine()
    assert theta["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        ({}, r"missing learning_rate \(\)"),
        ({"learning_rate": jnp.ones(2)}, r"shape \(2,\), needs \(\)"),
        ({"learning_rate": jnp.bfloat16(1)}, "dtype bfloat16, needs float32"),
        ({"learning_rate": jnp.float32(jnp.nan)}, "learning_rate is not finite"),
        ({"learning_rate": jnp.float32(1), "b1": jnp.float32(1)}, "unexpected b1"),
    ],
)
def test_theta_that_does_not_fit_is_not_saved(tmp_path, theta, message):
    with pytest.raises(ValueError, match=f"theta must fit Hyper: .*{message}"):
        weights.save_weights(tmp_path / "t", theta, ADAM)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(TypeError, match="info must hold JSON"):
        weights.save_weights(tmp_path / "t", (), SGD, info={"x": np.ones(2)})
    with pytest.raises(TypeError, match="optimizer must be a LearnedOptimizer"):
        weights.save_weights(tmp_path / "t", (), optax.sgd(0.5))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write: .*file/t'"):
        weights.save_weights(tmp_path / "file" / "t", (), SGD)


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    saved(tmp_path / "t", SGD)
    before = (tmp_path / "t").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        saved(tmp_path / "t", ADAM)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t").read_bytes() == before


def test_load_gives_the_bound_optimizer(tmp_path):
    theta = saved(tmp_path / "t", ADAM)
    params, grads = jnp.arange(3.0), jnp.ones(3)
    updates = []
    for tx in (weights.load(tmp_path / "t"), ADAM.as_optax(theta)):
        updates.append(tx.update(grads, tx.init(params), params)[0])
    np.testing.assert_array_equal(*updates)


def test_load_passes_the_length_of_the_run(tmp_path):
    saved(tmp_path / "t", SGD)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        weights.load(tmp_path / "t", num_steps=0)


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    saved(tmp_path / "t", SmallFC(), info={"task": "digits", "steps": 3})
    monkeypatch.setattr(bundle, "_FOLDER", folder)
    summary = "197 weights, meta-trained on digits"
    bundle.add("small-digits", tmp_path / "t", folder=folder, summary=summary)
    return folder


def test_a_bundled_file_is_listed_and_loads(bundled):
    lines = weights.available()
    assert lines == {"small-digits": "197 weights, meta-trained on digits"}
    tx = weights.load("small-digits", num_steps=10)
    params = {"w": jnp.ones((2, 3))}
    updates, _ = tx.update(params, tx.init(params), params, value=jnp.float32(1))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    card = (bundled / "small-digits.md").read_text()
    for part in ('metaopt.load("small-digits"', "197 weights", "- task: digits"):
        assert part in card


def test_an_unknown_name_lists_what_there_is(bundled):
    with pytest.raises(ValueError) as caught:
        weights.load("small-digit")
    assert "Did you mean 'small-digits'?" in str(caught.value)
    assert "Bundled: small-digits." in str(caught.value)


def test_a_damaged_bundled_file_is_refused(bundled):
    path = bundled / "small-digits.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="'small-digits' are damaged"):
        weights.load("small-digits", num_steps=10)


def test_only_fit_files_are_bundled(bundled, tmp_path):
    before = (bundled / "index.json").read_text()
    (tmp_path / "junk").write_bytes(b"junk")
    for name, file, summary in (
        ("../up", "t", "line"),
        ("x", "junk", "line"),
        ("x", "t", ""),
        ("x", "t", "two\nlines"),
    ):
        with pytest.raises(ValueError):
            bundle.add(name, tmp_path / file, folder=bundled, summary=summary)
    assert (bundled / "index.json").read_text() == before


def test_the_command_names_what_it_cannot_add(bundled, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["add", "x", str(tmp_path / "no-such-file"), "--summary", "s"])
    assert "no-such-file" in capsys.readouterr().err


def test_the_command_lists(bundled, capsys):
    main(["list"])
    assert capsys.readouterr().out.startswith("small-digits: 197 weights")


@pytest.mark.parametrize("name", weights.available())
def test_every_file_of_the_package_is_intact(name):
    entry = bundle._index()[name]
    data = bundle._FOLDER.joinpath(entry["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert len(data) == entry["size"]
    contents = store.read(data, name)
    assert (contents.optimizer, contents.info) == (entry["optimizer"], entry["info"])
    params = {"w": jnp.ones((2, 3))}
    metaopt.load(name, num_steps=10).init(params)


@pytest.mark.parametrize("name", weights.available())
def test_every_card_tells_how_it_was_made_where_it_fails_and_how_stable_it_is(name):
    card = bundle._FOLDER.joinpath(f"{name}.md").read_text()
    head, *parts = re.split(r"^## ", card, flags=re.MULTILINE)
    sections = dict(part.split("\n", 1) for part in parts)
    assert f'metaopt.load("{name}"' in head
    assert re.search(r"python -m experiments [a-z]", sections["Provenance"])
    (cases,) = (body for title, body in sections.items() if "it fails" in title)
    assert cases.strip()
    assert "Stability" in sections, "run `python -m experiments stability` on it"
    assert f"python -m experiments stability {name}" in sections["Stability"]
    assert re.search(r"^\| S\d+ .*\| (PASS|WARN|FAIL) \|", sections["Stability"], re.M)


def test_files_of_the_package_without_an_entry():
    files = {
        p.name for p in bundle._FOLDER.iterdir() if p.name.endswith(".safetensors")
    }
    assert files == {entry["file"] for entry in bundle._index().values()}
