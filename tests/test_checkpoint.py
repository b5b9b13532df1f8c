import functools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from metaopt import checkpoint
from metaopt.sharding import replicated, sharded, task_mesh


class State(NamedTuple):
    theta: Any
    keys: Any
    count: Any


def make_state(seed=0):
    key = jax.random.key(seed)
    theta = {
        "net/~/linear": {"w": jax.random.normal(key, (5, 3)), "b": jnp.zeros(3)},
        "half": jnp.arange(7, dtype=jnp.bfloat16) / 3,
        "empty": jnp.zeros((0, 4)),
        "flags": jnp.array([True, False]),
    }
    return State(theta, (key, jax.random.split(key, 4)), jnp.int32(seed))


def raw(tree):
    def one(x):
        typed = isinstance(x, jax.Array) and jnp.issubdtype(
            x.dtype, jax.dtypes.prng_key
        )
        return np.asarray(jax.random.key_data(x) if typed else x)

    return jax.tree.map(one, tree)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
    jax.tree.map(np.testing.assert_array_equal, raw(tree), raw(expected))


def flip(path, position=None, bit=0):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_comes_back_bit_for_bit(tmp_path, abstract):
    state = make_state()
    checkpoint.save(tmp_path / "a" / "b", 12, state, meta={"preset": "x", "n": [1.5]})
    like = jax.eval_shape(lambda: state) if abstract else make_state(1)
    restored = checkpoint.restore(tmp_path / "a" / "b", like)
    assert restored[0] == checkpoint.latest(tmp_path / "a" / "b") == 12
    assert_same(restored.tree, state)
    assert restored.meta == {"preset": "x", "n": [1.5]}
    assert restored.notes == []


def test_keys_of_another_generator(tmp_path):
    key = jax.random.key(3, impl="rbg")
    checkpoint.save(tmp_path, 0, key)
    again = checkpoint.restore(tmp_path, jax.random.key(0, impl="rbg")).tree
    np.testing.assert_array_equal(jax.random.bits(again), jax.random.bits(key))
    with pytest.raises(ValueError, match=r"key<rbg>\[\], wanted key<fry>\[\]"):
        checkpoint.restore(tmp_path, jax.random.key(0))


@pytest.mark.parametrize("tree", [(), {"x": np.zeros((0, 2))}, [3, 2.5, np.int64(7)]])
def test_trees_without_device_arrays(tmp_path, tree):
    checkpoint.save(tmp_path, 1, tree)
    restored = checkpoint.restore(tmp_path, tree).tree
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))


def test_shardings_are_those_of_like(tmp_path):
    mesh = task_mesh()
    x = jax.device_put(jnp.arange(24.0).reshape(8, 3), sharded(mesh))
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8), sharded(mesh))
    empty = jax.device_put(jnp.zeros((4, 0)), sharded(mesh))
    checkpoint.save(tmp_path, 1, (x, keys, empty))
    half = task_mesh(jax.devices()[:2])
    across = NamedSharding(mesh, PartitionSpec(None, None))
    for shardings in ((sharded(mesh),) * 3, (replicated(half), sharded(half), across)):
        like = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
            for a, s in zip((x, keys, empty), shardings, strict=True)
        ]
        restored = checkpoint.restore(tmp_path, tuple(like)).tree
        assert_same(restored, (x, keys, empty))
        assert tuple(a.sharding for a in restored) == shardings


def test_donated_buffers(tmp_path):
    step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    state = step(jnp.arange(1000.0))
    expected = np.array(state)
    checkpoint.save(tmp_path, 1, state)
    state = step(state)
    like = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=state.sharding)
    for _ in range(2):
        restored = checkpoint.restore(tmp_path, like).tree
        np.testing.assert_array_equal(restored, expected)
        np.testing.assert_array_equal(step(restored), state)


def test_only_the_newest_are_kept(tmp_path):
    for step in (0, 5, 10, 200):
        checkpoint.save(tmp_path, step, jnp.float32(step), keep=2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000010", "step-000000200"]
    checkpoint.save(tmp_path, 200, jnp.float32(7), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert checkpoint.restore(tmp_path, jnp.float32(0)).tree == 7


def test_going_back_never_deletes_what_was_just_saved(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, jnp.float32(step))
    flip(tmp_path / "step-000000020" / "manifest.json")
    checkpoint.save(tmp_path, 15, jnp.float32(15), keep=1)
    restored = checkpoint.restore(tmp_path, jnp.float32(0))
    assert (restored.step, restored.tree) == (15, 15)


DAMAGES = {
    "flipped": flip,
    "flipped first bit": functools.partial(flip, position=0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_falls_back_to_the_last_good_one(tmp_path, damage):
    old, new = make_state(1), make_state(2)
    checkpoint.save(tmp_path / "good", 1, old, meta={"a": 1})
    checkpoint.save(tmp_path / "good", 2, new, meta={"a": 2})
    newest = pathlib.Path("step-000000002")
    files = [p for p in (tmp_path / "good" / newest).rglob("*") if p.is_file()]
    assert len(files) > 3
    for file in files:
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", folder)
        name = file.relative_to(tmp_path / "good" / newest)
        damage(folder / newest / name)
        restored = checkpoint.restore(folder, make_state())
        assert (restored.step, restored.meta) == (1, {"a": 1})
        assert_same(restored.tree, old)
        (note,) = restored.notes
        assert f"step 2 in {folder} is damaged" in note
        assert str(name) in note
        shutil.rmtree(folder)


def test_flipped_bits_of_the_manifest_are_noticed(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)}, meta={"rate": 0.1, "name": "é"})
    folder = tmp_path / "step-000000001"
    manifest = folder / "manifest.json"
    data = manifest.read_bytes()
    body = checkpoint._verified(folder)
    for position in range(0, len(data), 3):
        flip(manifest, position, position % 8)
        try:  # an escaped letter may change its case without changing its meaning
            assert checkpoint._verified(folder) == body
        except checkpoint._Damaged as damage:
            assert "manifest.json" in str(damage)
        manifest.write_bytes(data)


def test_if_all_are_damaged_all_are_named(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, jnp.ones(3))
    (tmp_path / "step-000000001" / "manifest.json").unlink()
    flip(next((tmp_path / "step-000000002" / "arrays").glob("_METADATA")))
    with pytest.raises(ValueError, match="No checkpoint can be used") as caught:
        checkpoint.restore(tmp_path, jnp.ones(3))
    assert "step 1" in str(caught.value)
    assert "manifest.json is missing" in str(caught.value)
    assert "step 2" in str(caught.value)
    assert "the checksum of arrays/_METADATA differs" in str(caught.value)


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in {folder}"):
            checkpoint.restore(folder, ())


def test_another_structure_lists_every_difference(tmp_path):
    checkpoint.save(tmp_path, 3, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)})
    like = {"a": jnp.ones(3), "c": jnp.ones(2, jnp.int32), "d": jnp.ones(())}
    with pytest.raises(ValueError, match="step 3") as caught:
        checkpoint.restore(tmp_path, like)
    for part in (
        "it lacks ['d'] float32[]",
        "it has ['b'] float32[2]",
        "['a'] is float32[2], wanted float32[3]",
        "['c'] is float32[2], wanted int32[2]",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="and 13 more"):
        checkpoint.restore(tmp_path, {f"x{i}": jnp.ones(1) for i in range(30)})


def test_leftovers_of_killed_saves_are_swept(tmp_path):
    for name in ("partial-000000007", "partial-old-step-000000001"):
        (tmp_path / name / "arrays").mkdir(parents=True)
    checkpoint.save(tmp_path, 7, jnp.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000007"]
    (tmp_path / "partial-000000008").mkdir()
    checkpoint.restore(tmp_path, jnp.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000007"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="step must be at least 0"):
        checkpoint.save(tmp_path, -1, ())
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoint.save(tmp_path, 1, (), keep=0)
    with pytest.raises(TypeError, match="meta must hold JSON values only"):
        checkpoint.save(tmp_path, 1, (), meta={"x": object()})
    assert not list(tmp_path.iterdir())


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for call in (checkpoint.save, lambda *_: checkpoint.restore(tmp_path, ())):
        with pytest.raises(ImportError, match=r"metaopt-jax\[checkpoint\]"):
            call(tmp_path, 1, ())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=f"not be written to {tmp_path}/file/run"):
        checkpoint.save(tmp_path / "file" / "run", 1, ())


def _processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metaopt.checkpoint", "orbax.checkpoint"])
    return context


def _save_on_full_disk(folder, connection):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    noise = np.random.default_rng(0).normal(size=100_000)
    try:
        checkpoint.save(folder, 2, {"w": noise})
    except OSError as error:
        connection.send(str(error))
    connection.close()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    tree = {"w": np.ones(100_000)}
    checkpoint.save(tmp_path, 1, tree)
    receiver, sender = _processes().Pipe(duplex=False)
    child = _processes().Process(target=_save_on_full_disk, args=(tmp_path, sender))
    child.start()
    sender.close()
    message = receiver.recv()
    child.join()
    assert f"step 2 could not be written to {tmp_path}" in message
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    assert checkpoint.restore(tmp_path, tree).step == 1


def _numbered(step):
    return {"x": np.full(2000, step), "y": {"z": np.full((3, 5), -step)}}


def _save_forever(folder, step, connection):
    while True:
        checkpoint.save(folder, step, _numbered(step), meta={"n": step}, keep=2)
        connection.send(step)
        step += 1


def test_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path):
    pause = random.Random(0)
    step = 0
    for _ in range(8):
        receiver, sender = _processes().Pipe(duplex=False)
        child = _processes().Process(
            target=_save_forever, args=(tmp_path, step + 1, sender)
        )
        child.start()
        sender.close()
        finished = receiver.recv()
        time.sleep(pause.uniform(0.0, 0.2))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        try:
            while True:
                finished = receiver.recv()
        except EOFError:
            pass
        restored = checkpoint.restore(tmp_path, _numbered(0))
        assert restored.notes == []
        assert restored.step in (finished, finished + 1)
        assert restored.meta == {"n": restored.step}
        jax.tree.map(
            np.testing.assert_array_equal, restored.tree, _numbered(restored.step)
        )
        step = restored.step
        assert not list(tmp_path.glob("partial-*"))


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_crash_between_any_two_file_operations(tmp_path, monkeypatch, again):
    folder, snapshots = tmp_path / "run", []
    for step in (1, 2) if again else (1,):
        checkpoint.save(folder, step, _numbered(step), meta={"n": step})
    watched = False

    def snapshot_before(operation):
        def call(*args, **kwargs):
            nonlocal watched
            if watched:
                watched = False
                snapshots.append(tmp_path / f"crash{len(snapshots)}")
                shutil.copytree(folder, snapshots[-1])
                watched = True
            return operation(*args, **kwargs)

        return call

    def while_watched(function):
        def call(*args):
            nonlocal watched
            watched = True
            function(*args)
            watched = False

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, snapshot_before(getattr(os, name)))
    for name in ("_prepare", "_commit"):
        monkeypatch.setattr(checkpoint, name, while_watched(getattr(checkpoint, name)))
    checkpoint.save(folder, 2, _numbered(2), meta={"n": 2}, keep=1)
    monkeypatch.undo()
    assert len(snapshots) >= 10
    found = []
    for crashed in snapshots:
        restored = checkpoint.restore(crashed, _numbered(0))
        assert restored.notes == []
        assert restored.meta == {"n": restored.step}
        expected = _numbered(restored.step)
        jax.tree.map(np.testing.assert_array_equal, restored.tree, expected)
        found.append(restored.step)
    assert set(found) == {1, 2}
    assert checkpoint.restore(folder, _numbered(0)).step == 2


TWO_PROCESSES = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
folder, port, number = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
from metaopt import checkpoint
from metaopt.sharding import replicated, sharded, task_mesh

mesh = task_mesh()
assert len(mesh.devices) == 4

def make(seed):
    def build(key):
        keys = jax.random.split(key, 8)
        rows = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
        return {"rows": rows, "keys": keys, "key": key, "none": rows[:, :0]}
    split, whole = sharded(mesh), replicated(mesh)
    shardings = {"rows": split, "keys": split, "key": whole, "none": split}
    tree = jax.jit(build, out_shardings=shardings)(jax.random.key(seed))
    return tree | {"local": np.arange(3) + seed}

def same(a, b):
    def one(x, y):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return x.dtype == y.dtype and bool(jnp.array_equal(x, y))
    return all(one(a[k], b[k]) for k in b)

like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    if isinstance(x, jax.Array) else x, make(0))
result = {}
for step in (1, 2):
    checkpoint.save(folder, step, make(step), meta={"step": step})
restored = checkpoint.restore(folder, like)
result["whole"] = restored.step == 2 and same(restored.tree, make(2))
result["split"] = restored.tree["rows"].sharding == sharded(mesh)
if number == 0:
    file = next((folder / "step-000000002" / "arrays").glob("_METADATA"))
    file.write_bytes(b"x")
restored = checkpoint.restore(folder, like)
result["fallback"] = restored.step == 1 and same(restored.tree, make(1))
result["notes"] = restored.notes
errors = {}
for name, call in {
    "absent": lambda: checkpoint.restore(folder / "absent", like),
    "unwritable": lambda: checkpoint.save(folder / "file" / "x", 1, make(1)),
    "other": lambda: checkpoint.restore(folder, {**like, "more": np.ones(1)}),
}.items():
    try:
        call()
    except (OSError, ValueError) as error:
        errors[name] = str(error)
result["errors"] = errors
print(json.dumps(result))
jax.distributed.shutdown()
"""


def test_two_processes_share_one_checkpoint(tmp_path):
    (tmp_path / "file").write_text("x")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    root = str(pathlib.Path(__file__).resolve().parents[1])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": root}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(port), str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        result = json.loads(out.splitlines()[-1])
        assert result["whole"] and result["split"] and result["fallback"], result
        assert "step 2" in result["notes"][0]
        assert "no checkpoint" in result["errors"]["absent"]
        assert "could not be written" in result["errors"]["unwritable"]
        assert "it lacks ['more']" in result["errors"]["other"]
