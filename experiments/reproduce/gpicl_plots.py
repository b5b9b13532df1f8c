"""The figure of general-purpose in-context learning."""

import itertools
import pathlib

import numpy as np

from experiments.reproduce.figure import COLOURS, figure

_MARKERS = {"-": "o", "--": "^", ":": "s"}


def draw(
    path: pathlib.Path,
    curves: dict[str, dict[str, np.ndarray]],
    losses: dict[str, tuple[np.ndarray, np.ndarray]],
    states: dict[str, tuple[int, float]],
) -> None:
    """Plots accuracy over the context, the loss, and what the state is good for.

    Args:
        path: the file.
        curves: accuracy by place, by test, by setting.
        losses: steps and loss of meta-training, by setting.
        states: size and last accuracy on unseen tasks, of models trained on any.
    """
    # More settings than colours: the next round has another line and another marker.
    styles = itertools.cycle(itertools.product(_MARKERS, COLOURS))
    with figure(path, 1, 4, panel=(5.5, 4)) as (seen, unseen, state, training):
        for (name, found), (line, colour) in zip(curves.items(), styles, strict=False):
            look = {"color": colour, "linestyle": line, "label": name}
            for axis, test in ((seen, "seen"), (unseen, "unseen")):
                axis.plot(found[test], **look)
            training.plot(*losses[name], **look)
            if name in states:
                state.plot(*states[name], _MARKERS[line], color=colour)
                note = {"xytext": (0, 6), "textcoords": "offset points"}
                short = name.removeprefix("transformer that ")
                state.annotate(short, states[name], fontsize=7, ha="center", **note)
        for axis, title in ((seen, "seen tasks"), (unseen, "unseen tasks and images")):
            axis.set(title=title, xlabel="examples before", ylabel="accuracy")
            axis.set(ylim=(0, 1))
        state.margins(x=0.2)
        state.set(xscale="log", xlabel="numbers in the state", ylim=(0, 1))
        state.set(title="unseen tasks; trained on any number", ylabel="last answer")
        training.set(xlabel="outer step", ylabel="loss")
        training.set(title="own tasks; free ones of biased distributions")
        training.legend(
            frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
        )
