"""Few-shot learners against PyTorch: `python -m experiments.benchmarks.few_shot`.

Needs the extra `bench`. Two questions, each a ratio within one run on one machine:

- Tokens per second of training a transformer on prompts of linear functions, against
  `transformers.GPT2Model` of the same size, fed as by Garg et al., 2022: embeddings in,
  no dropout, Adam; both in float32 and in bfloat16.
- Tasks per second of MAML on sinusoids, one inner step, against TorchOpt's `MetaSGD`
  with its loop over tasks, and against the same by hand with `torch.func.vmap`.

All draw their data as they go. They take turns, so that a busy machine slows all of
them; the ratios are of medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments import backend

POINTS, DIM, BATCH = 41, 20, 64
SIZES = {"tiny": (3, 2, 64), "small": (6, 4, 128), "standard": (12, 8, 256)}
TASKS, SHOTS, RATE = 32, 10, 0.01


def main() -> None:
    """Times everything in turns, prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--out", default=None, help="JSON file to write")
    args = parser.parse_args()
    backend.prepare()
    place_torch()
    rows = []
    for size in args.sizes:
        steps = {
            "metaopt": transformer_step(*SIZES[size], "float32"),
            "metaopt, bfloat16": transformer_step(*SIZES[size], "bfloat16"),
            "transformers GPT-2": gpt2_step(*SIZES[size], "float32"),
            "GPT-2, bfloat16": gpt2_step(*SIZES[size], "bfloat16"),
        }
        tokens = BATCH * (2 * POINTS - 1)
        rows += _race(f"transformer, {size}", "tokens/s", steps, tokens, args.rounds, 1)
    steps = {
        "metaopt": maml_step(),
        "TorchOpt": torchopt_step(),
        "torch.func": torch_func_step(),
    }
    rows += _race("MAML, sinusoids", "tasks/s", steps, TASKS, args.rounds, 20)
    for row in rows:
        print(
            f"{row['what']:24s}{row['who']:22s}{row['rate']:12,.0f} {row['unit']:10s}"
            f"{row['ratio']:8.2f}"
        )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=1)


def place_torch() -> None:
    """Lets PyTorch use what JAX uses: all cores, or the GPU, with products in TF32."""
    import jax
    import torch

    torch.set_num_threads(backend.cores())
    if jax.default_backend() == "gpu":
        torch.set_default_device("cuda")
        torch.set_float32_matmul_precision("high")


def _finish_torch() -> None:
    import torch

    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def _race(
    what: str,
    unit: str,
    steps: dict[str, Callable[[], Any]],
    items: int,
    rounds: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Times every step in turns; `ratio` is how much faster the first is.

    Of `repeats` steps in a row the last is waited for, as in training.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = step()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(median.values()))
    return [
        {
            "what": what,
            "who": name,
            "unit": unit,
            "rate": items / value,
            "fastest": items / min(seconds[name]),
            "ratio": value / first,
        }
        for name, value in median.items()
    ]


def transformer_step(
    layers: int, heads: int, width: int, dtype: str
) -> Callable[[], Any]:
    """Returns a function that takes one step of our transformer."""
    from metaopt.estimators import FullUnroll
    from metaopt.fewshot import InContext, Interleaved, Transformer
    from tasks.linear_families import Linear

    family = Linear(num_examples=POINTS - 1, num_queries=1, dim=DIM)
    model = Transformer(layers, heads, width, dtype=dtype)
    learner = InContext(family, model, Interleaved(), batch_size=BATCH // 2)
    return _meta_step(FullUnroll(learner, num_tasks=2, block=1), 1e-4)


def maml_step() -> Callable[[], Any]:
    """Returns a function that takes one step of our MAML, on one device.

    For steps as short as these a second one costs more than it gives.
    """
    import jax

    from metaopt.estimators import FullUnroll
    from metaopt.fewshot import MAML, Network
    from tasks.function_families import Sinusoids

    family = Sinusoids(num_examples=SHOTS, num_queries=SHOTS)
    learner = MAML(family, Network(widths=(40, 40)), learning_rate=RATE)
    estimator = FullUnroll(learner, num_tasks=TASKS, block=TASKS)
    return _meta_step(estimator, 1e-3, jax.devices()[:1])


def _meta_step(
    estimator: Any, rate: float, devices: list[Any] | None = None
) -> Callable[[], Any]:
    import jax
    import optax

    from metaopt.sharding import task_mesh
    from metaopt.train import make_trainer

    mesh = task_mesh(devices)
    trainer = make_trainer(estimator, optax.adam(rate), estimator.load(), mesh=mesh)
    state = [trainer.init(jax.random.key(0))]

    def step():
        state[0], metrics = trainer.step(state[0])
        return metrics

    return step


def gpt2_step(layers: int, heads: int, width: int, dtype: str) -> Callable[[], Any]:
    """Returns a function that takes one step of a GPT-2 of PyTorch.

    Its products and activations are in bfloat16 by `torch.autocast`, if asked for.
    """
    import torch
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_positions=2 * POINTS,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    read_in, model = torch.nn.Linear(DIM, width), GPT2Model(config)
    read_out = torch.nn.Linear(width, 1)
    parts = torch.nn.ModuleList([read_in, model, read_out])
    adam = torch.optim.Adam(parts.parameters(), lr=1e-4)
    half = dtype == "bfloat16"

    def step():
        x = torch.randn(BATCH, POINTS, DIM)
        y = (x @ torch.randn(BATCH, DIM, 1))[..., 0]
        wide = torch.zeros(BATCH, POINTS, DIM)
        wide[..., 0] = y
        tokens = torch.stack([x, wide], dim=2).view(BATCH, 2 * POINTS, DIM)[:, :-1]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            stream = model(inputs_embeds=read_in(tokens)).last_hidden_state
            read = read_out(stream)
        loss = (read[:, ::2, 0].float() - y).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        _finish_torch()

    return step


def _waves() -> tuple[Any, Any, Any, Any]:
    """Draws the points of all tasks, each `[tasks, points, 1]`."""
    import torch

    amplitude = 0.1 + 4.9 * torch.rand(TASKS, 1, 1)
    phase = torch.pi * torch.rand(TASKS, 1, 1)
    points = lambda: 10 * torch.rand(TASKS, SHOTS, 1) - 5
    x, asked = points(), points()
    value = lambda x: amplitude * torch.sin(x - phase)
    return x, value(x), asked, value(asked)


def _network() -> Any:
    from torch import nn

    layers = [nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(40, 1))


def torchopt_step() -> Callable[[], Any]:
    """Returns a function that takes one step of MAML by TorchOpt."""
    import torch
    import torchopt

    net = _network()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    inner = torchopt.MetaSGD(net, lr=RATE)
    loss_of = torch.nn.functional.mse_loss

    def step():
        start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        start_inner = torchopt.extract_state_dict(inner, by="reference")
        losses = []
        for x, y, asked, answer in zip(*_waves(), strict=True):
            inner.step(loss_of(net(x), y))
            losses.append(loss_of(net(asked), answer))
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, start_inner)
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
        _finish_torch()

    return step


def torch_func_step() -> Callable[[], Any]:
    """Returns a function that takes one step of MAML, vectorised over the tasks."""
    import torch
    from torch.func import functional_call, grad, vmap

    net = _network()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)

    def loss(params, x, y):
        return torch.nn.functional.mse_loss(functional_call(net, params, (x,)), y)

    def episode(params, x, y, asked, answer):
        gradient = grad(loss)(params, x, y)
        adapted = {name: p - RATE * gradient[name] for name, p in params.items()}
        return loss(adapted, asked, answer)

    over_tasks = vmap(episode, in_dims=(None, 0, 0, 0, 0))

    def step():
        value = over_tasks(dict(net.named_parameters()), *_waves()).mean()
        adam.zero_grad()
        value.backward()
        adam.step()
        _finish_torch()

    return step


if __name__ == "__main__":
    main()
