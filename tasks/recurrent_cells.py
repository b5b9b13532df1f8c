"""The recurrent cells that a task may name."""

import haiku as hk

CELLS = {"gru": hk.GRU, "lstm": hk.LSTM, "vanilla": hk.VanillaRNN}
