"""The learned optimizers that come with the package."""

import dataclasses
import hashlib
import json
import os
import pathlib
from importlib import resources
from typing import Any

import chex
import jax
import optax

from metaopt import validate
from metaopt._files import write_atomically
from metaopt.optimizers.base import LearnedOptimizer
from metaopt.registry import OPTIMIZERS
from metaopt.weights.store import Contents, read, rebuild

_FOLDER = resources.files("metaopt.weights")


def available() -> dict[str, str]:
    """Returns the bundled learned optimizers, each with a line of provenance.

    >>> for name, line in available().items():
    ...     assert name and line
    """
    return {name: entry["summary"] for name, entry in sorted(_index().items())}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    num_steps: int | None = None,
    key: jax.Array | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns a pretrained learned optimizer as an optax transformation.

    Args:
        name_or_path: a name from `available()`, or a file that `save_weights` wrote.
        num_steps: length of the run in steps; needed by rules that plan ahead.
        key: randomness of stochastic rules; fixed if not given.
        **settings: fields of the rule that are to differ from those it was trained
            with, such as `learning_rate` and `weight_decay` of `Celo2`.

    Raises:
        ValueError: if there is no such name or file, with the nearest name and all
            that are available; if the file is damaged; if `num_steps` is needed; if
            the rule has no such field.

    >>> import pathlib, tempfile
    >>> import jax.numpy as jnp
    >>> from metaopt.optimizers import Fixed
    >>> from metaopt.weights import save_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "sgd.safetensors")
    ...     save_weights(path, (), Fixed("sgd", (("learning_rate", 0.5),)))
    ...     tx = load(path)
    >>> params = jnp.ones(2)
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
    >>> updates.tolist()
    [-0.5, -0.5]
    """
    optimizer, theta, _ = load_with_info(name_or_path)
    fields = [field.name for field in dataclasses.fields(optimizer)]
    for name in settings:
        validate.one_of("setting", name, fields)
    optimizer = dataclasses.replace(optimizer, **settings)
    return optimizer.as_optax(theta, num_steps=num_steps, key=key)


def load_with_info(
    name_or_path: str | os.PathLike[str],
) -> tuple[LearnedOptimizer, chex.ArrayTree, dict[str, Any]]:
    """Returns a pretrained learned optimizer, its theta, and its provenance.

    Args:
        name_or_path: a name from `available()`, or a file that `save_weights` wrote.

    Raises:
        ValueError: as `load`.

    >>> optimizer, theta, info = load_with_info("digits-small-fc")
    >>> type(optimizer).__name__, info["git"] != ""
    ('SmallFC', True)
    """
    if name_or_path in _index():
        label, data = _bundled(str(name_or_path))
    elif pathlib.Path(name_or_path).is_file():
        label, data = str(name_or_path), pathlib.Path(name_or_path).read_bytes()
    else:
        raise ValueError(_unknown(os.fspath(name_or_path)))
    contents = read(data, label)
    return *rebuild(contents, label, OPTIMIZERS), contents.info


def add(name: str, path: pathlib.Path, *, folder: pathlib.Path, summary: str) -> None:
    """Bundles the weights file `path` as `name`: for the maintainers of the package.

    Copies the file into `folder`, records it in `index.json`, and writes a model card
    from its provenance, to be completed by hand.

    Args:
        name: what users will pass to `load`.
        path: a file that `save_weights` wrote.
        folder: the folder `metaopt/weights` of a checkout.
        summary: one line that `available` shows.

    Raises:
        ValueError: if the file does not load, or the name or the summary is unfit.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(
            f"name must be made of letters, digits, - and _, got name={name!r}."
        )
    if not summary or "\n" in summary:
        raise ValueError(f"summary must be one line of text, got summary={summary!r}.")
    data = path.read_bytes()
    contents = read(data, str(path))
    rebuild(contents, str(path), OPTIMIZERS)
    file = f"{name}.safetensors"
    entry = {
        "file": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "summary": summary,
        "optimizer": contents.optimizer,
        "info": contents.info,
    }
    index_path = folder / "index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    index[name] = entry
    write_atomically(folder / file, data)
    write_atomically(folder / f"{name}.md", _card(name, summary, contents).encode())
    text = json.dumps(dict(sorted(index.items())), indent=2)
    write_atomically(index_path, f"{text}\n".encode())


def _index() -> dict[str, dict[str, Any]]:
    return json.loads(_FOLDER.joinpath("index.json").read_text())


def _bundled(name: str) -> tuple[str, bytes]:
    """Returns the name of a file of the package, and its verified bytes."""
    entry = _index()[name]
    data = _FOLDER.joinpath(entry["file"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(
            f"The bundled weights {name!r} are damaged: {entry['file']} differs from "
            "the package's index. Install metaopt-jax again."
        )
    return entry["file"], data


def _unknown(name: str) -> str:
    names = sorted(_index())
    listed = ", ".join(names) if names else "none in this version"
    return (
        f"name_or_path must be a bundled name or an existing file, "
        f"got {name!r}.{validate.nearest(name, names)} Bundled: {listed}."
    )


def _card(name: str, summary: str, contents: Contents) -> str:
    number = sum(x.size for x in contents.tensors.values())
    rows = "\n".join(
        f"- {key}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in contents.info.items()
    )
    return f"""# {name}

{summary}

```python
tx = metaopt.load("{name}", num_steps=1000)
```

## Rule
`{json.dumps(contents.optimizer)}`, {number} weights.

## Provenance
{rows or "Not recorded."}

## Limits
Tried only on what stands above. An optimizer can fail on tasks unlike those it was
trained on: compare it with a tuned Adam before relying on it.
"""
