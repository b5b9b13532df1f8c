"""Generated texts have their exact entropy, and language models approach it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from metaopt.evaluate import curves
from metaopt.optimizers import Fixed
from tasks import text
from tasks.text import CORPORA

KEY = jax.random.key(0)


def written(name, part="train"):
    codes = getattr(text.load(name), part)
    return "".join(CORPORA[name].alphabet[i] for i in codes)


def test_entropy_of_the_chain_from_its_eigenvector():
    p = text.transitions()
    chain = np.zeros((16, 16, 16, 16))
    for j in range(16):
        chain[:, j, j, :] = p[:, j, :]
    values, vectors = np.linalg.eig(chain.reshape(256, 256).T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary = (stationary / stationary.sum()).reshape(16, 16)
    entropies = -(p * np.log(p)).sum(-1)
    wanted = (stationary * entropies).sum()
    np.testing.assert_allclose(CORPORA["markov"].entropy, wanted, rtol=1e-9)


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_the_true_model_of_the_chain_pays_its_entropy(part):
    codes = getattr(text.load("markov"), part)
    paid = -np.log(text.transitions()[codes[:-2], codes[1:-1], codes[2:]])
    error = 4 * paid.std() / np.sqrt(len(paid))
    assert error < 0.05
    assert abs(paid.mean() - CORPORA["markov"].entropy) < error


def test_the_true_model_of_brackets_pays_their_entropy():
    stack, paid = [], []
    for bracket in written("brackets"):
        opens = bracket in text.OPENING
        if opens:
            coin = 0.5 if stack else 1.0
            paid.append(-math.log(coin / 4))
            stack.append(bracket)
        else:
            coin = 0.5 if len(stack) < text.MAX_DEPTH else 1.0
            paid.append(-math.log(coin))
            assert text.OPENING.index(stack.pop()) == text.CLOSING.index(bracket)
        assert len(stack) <= text.MAX_DEPTH
    np.testing.assert_allclose(np.mean(paid), CORPORA["brackets"].entropy, rtol=0.01)


def test_all_sums_are_right():
    lines = written("arithmetic").splitlines()
    assert len(lines) == 20_000
    for line in lines:
        assert len(line) == 9
        assert int(line[:2]) + int(line[3:5]) == int(line[6:])
    counts = np.bincount([int(line[:2]) for line in lines], minlength=100)
    # Chi-squared with 99 degrees of freedom: mean 99, standard deviation 14.1.
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * 14.1


def test_texts_stay_the_same():
    # The generator promises the same numbers on every platform and version.
    assert written("markov")[:30] == "dmiohonihlenjndem a dnbnneleno"
    assert written("brackets", "test") != written("brackets", "valid")
    manual = text.load("python-manual")
    assert len(manual.train) > 300_000
    assert len(manual.valid) == len(manual.test) > 15_000
    assert written("python-manual").count(" the ") > 2000


def test_windows_are_pieces_of_their_split():
    task = tasks.LanguageRecurrent("markov", length=20, batch_size=8)
    arrays = task.load()
    for split in ("train", "valid", "test"):
        whole = np.asarray(getattr(arrays, split)).tobytes()
        for window in np.asarray(task.batch((), arrays, KEY, split=split)):
            assert window.astype(np.uint8).tobytes() in whole


def test_a_transformer_does_not_see_the_future():
    task = tasks.LanguageTransformer(width=8, depth=2, length=6)
    params = task.init((), KEY)
    x = jax.random.randint(KEY, (1, 6), 0, 16)
    first = task._net.apply(params, x)
    later = task._net.apply(params, x.at[0, 4].add(1) % 16)
    np.testing.assert_array_equal(first[0, :4], later[0, :4])
    assert jnp.abs(first[0, 4:] - later[0, 4:]).min(axis=0).max() > 1e-3


def test_an_untrained_model_is_near_the_uniform_one():
    task = tasks.LanguageTransformer("python-manual", width=8, depth=1, batch_size=4)
    batch = task.batch((), task.load(), KEY)
    loss, metrics = task.loss(task.init((), KEY), batch, (), KEY)
    np.testing.assert_allclose(loss, math.log(96), rtol=0.2)
    np.testing.assert_allclose(metrics["bits_per_character"], loss / math.log(2))


@pytest.mark.slow
def test_an_lstm_uses_more_than_one_letter():
    adam = Fixed("adam", (("learning_rate", 1e-2),))
    task = tasks.LanguageRecurrent()
    result = curves(task, adam, (), KEY, num_steps=800, num_seeds=2, split="test")
    last = result.eval_loss[:, -1]
    codes = text.load("markov").train
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (codes[:-1], codes[1:]), 1)
    after_one = pairs / pairs.sum(1, keepdims=True)
    bigram = -(pairs / pairs.sum() * np.log(after_one)).sum()
    assert (last > CORPORA["markov"].entropy).all()
    assert (last < bigram - 0.8).all()
