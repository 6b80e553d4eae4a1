"""Recurrent layers, computed in fp32 over the whole sequence and rounded once.

Shapes: S steps, B sequences, I inputs, H hidden units, D directions (2 if bidirectional).

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.recurrent`, and of the same name `iOS17`
(fp16) and `iOS18` (`reset_after` and `input_bias` of `gru`). Where the text leaves a rule open or departs from it
(the order of a reversed sequence, where `gru` resets, what `clip` holds, the activations' constants), that of
coremltools' own operation tests, `coremltools.converters.mil.mil.ops.tests.iOS14.test_recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import OperationError, Tensors, op

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_sigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "linear": lambda x: x,
    "relu": torch.relu,
    # With constants of 1: a recurrent layer cannot set others.
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_SYNONYMS = {"sigmoid_hard": "hard_sigmoid"}
"""`rnn` and `lstm` document the same activation under two names."""


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    key = name.lower()  # The definitions accept any case.
    key = _SYNONYMS.get(key, key)
    if key not in _ACTIVATIONS:
        raise OperationError(f"activation {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[key]


def _in_order(x: Tensor, direction: str) -> Tensor:
    """Return the steps in processing order; a reversed layer's outputs keep that order."""
    if direction not in ("forward", "reverse"):
        raise OperationError(f"direction {direction!r}, expected forward or reverse")
    return x.flip(0) if direction == "reverse" else x


def _sequence(states: list[Tensor], initial: Tensor, *, all_steps: bool) -> Tensor:
    """Return (S, B, H) of all steps, or (1, B, H) of the last one; the initial state if there is no step."""
    if not all_steps:
        return (states[-1] if states else initial).unsqueeze(0)
    return torch.stack(states) if states else initial.new_empty((0, *initial.shape))


@op("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    *,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> Tensors:
    """rnn: h = activation(W_ih · x + W_hh · h + b) step by step.

    x (S, B, I), initial_h (B, H), weight_ih (H, I), weight_hh (H, H), bias (H,). Returns the states (S or 1, B, H)
    in the order in which they came, and the last (B, H).
    """
    activate = _activation(activation)
    h = initial_h
    states = []
    for inputs in F.linear(_in_order(x, direction), weight_ih, bias):
        h = activate(inputs + F.linear(h, weight_hh))
        states.append(h)
    return _sequence(states, h, all_steps=output_sequence), h


@op("gru", since=18)
@op("gru", fixed={"input_bias": None, "reset_after": False})
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    input_bias: Tensor | None = None,
    *,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
) -> Tensors:
    """gru: h = (1 - z) · o + z · h step by step, with a reset gate r, an output gate o and an update gate z.

    The weights hold r, o, z in this order. o is of W · x + W_ho · (r · h) + b or, reset after the product, of
    W · x + r · (W_ho · h + b), b being `bias`; `input_bias` is added to each gate's W · x.

    x (S, B, I), initial_h (B, H), weight_ih (3H, I), weight_hh (3H, H), bias and input_bias (3H,). Returns the
    states (S or 1, B, H) in the order in which they came, and the last (B, H).
    """
    gate, activate = _activation(recurrent_activation), _activation(activation)
    size = initial_h.shape[-1]
    of_reset, of_output, of_update = weight_hh.split(size)
    of_gates = torch.cat((of_reset, of_update))
    biases = weight_hh.new_zeros(3 * size) if bias is None else bias
    bias_reset, bias_output, bias_update = biases.split(size)
    bias_gates = torch.cat((bias_reset, bias_update))
    h = initial_h
    states = []
    for inputs in F.linear(_in_order(x, direction), weight_ih, input_bias):
        in_reset, in_output, in_update = inputs.split(size, -1)
        recurrent = F.linear(h, of_gates, bias_gates)
        reset = gate(in_reset + recurrent[..., :size])
        update = gate(in_update + recurrent[..., size:])
        if reset_after:
            candidate = reset * F.linear(h, of_output, bias_output)
        else:
            candidate = F.linear(reset * h, of_output, bias_output)
        h = (1 - update) * activate(in_output + candidate) + update * h
        states.append(h)
    return _sequence(states, h, all_steps=output_sequence), h


@op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    *,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> Tensors:
    """lstm: c = f · c + i · z and h = o · activation(c) step by step, with gates i, f, o and a cell gate z.

    The weights hold i, f, o, z in this order. A peephole adds its part of c to i and f, and of the new c to o.
    With `clip`, c is held within [-clip, clip].

    x (S, B, I), initial_h and initial_c (B, DH), weight_ih (4H, I), weight_hh (4H, H), bias (4H,), peephole (3H,).
    Returns the states (S or 1, B, DH), the last (B, DH) and the last cell (B, DH). A reversed layer's states are
    in the order in which they came; those of a bidirectional one are in the order of x.
    """
    activations = (_activation(recurrent_activation), _activation(cell_activation), _activation(activation))

    def run(steps: Tensor, h: Tensor, c: Tensor, weights: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        return _run_lstm(steps, h, c, weights, activations, clip=clip, all_steps=output_sequence)

    forward = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        return run(_in_order(x, direction), initial_h, initial_c, forward)
    if weight_ih_back is None or weight_hh_back is None:
        raise OperationError("a bidirectional layer without weight_ih_back and weight_hh_back")
    backward = (weight_ih_back, weight_hh_back, bias_back, peephole_back)
    h, h_back = initial_h.chunk(2, -1)
    c, c_back = initial_c.chunk(2, -1)
    there = run(x, h, c, forward)
    states_back, *last_back = run(x.flip(0), h_back, c_back, backward)
    back = (states_back.flip(0), *last_back)
    return tuple(torch.cat(pair, -1) for pair in zip(there, back, strict=True))


def _run_lstm(
    steps: Tensor,
    h: Tensor,
    c: Tensor,
    weights: tuple[Tensor | None, ...],
    activations: tuple[Callable[[Tensor], Tensor], ...],
    *,
    clip: float | None,
    all_steps: bool,
) -> tuple[Tensor, ...]:
    """One direction: the states (S or 1, B, H), the last (B, H) and the last cell (B, H)."""
    weight_ih, weight_hh, bias, peephole = weights
    assert weight_ih is not None
    assert weight_hh is not None
    gate, cell_activation, activation = activations
    size = h.shape[-1]
    zero = h.new_zeros(())
    peep_i, peep_f, peep_o = (zero, zero, zero) if peephole is None else peephole.split(size)
    states = []
    for inputs in F.linear(steps, weight_ih, bias):
        i, f, o, z = (inputs + F.linear(h, weight_hh)).split(size, -1)
        c = gate(f + peep_f * c) * c + gate(i + peep_i * c) * cell_activation(z)
        if clip is not None:
            c = torch.clamp(c, -clip, clip)
        h = gate(o + peep_o * c) * activation(c)
        states.append(h)
    return _sequence(states, h, all_steps=all_steps), h, c
