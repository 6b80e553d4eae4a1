"""Recurrent layers, against torch's modules and, for what torch lacks, the published equations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.mil.ops.registry import OperationError, find

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 2
RNG = np.random.default_rng(41)
CASES = [(direction, every) for direction in ("forward", "reverse") for every in (False, True)]
TOLERANCE = {np.float32: {"rtol": 1e-5, "atol": 1e-6}, np.float16: {"rtol": 2e-3, "atol": 2e-3}}


def _random(*shape, dtype=np.float32):
    return RNG.uniform(-1, 1, shape).astype(dtype)


def _module(kind, **options):
    """Return a torch layer and its parameters, with the gates in torch's order."""
    torch.manual_seed(3)
    return getattr(torch.nn, kind)(INPUTS, HIDDEN, **options).requires_grad_(False)


def _gates(module, name, order, dtype=np.float32, suffix=""):
    """Return a parameter with its gates reordered; `order` contains their indices in torch's order."""
    parts = np.split(getattr(module, f"{name}_l0{suffix}").numpy().astype(dtype), len(order))
    return np.concatenate([parts[place] for place in order])


def _data(states, dtype, directions=1):
    x = _random(STEPS, BATCH, INPUTS, dtype=dtype)
    return {"x": x} | {name: _random(BATCH, directions * HIDDEN, dtype=dtype) for name in states}


def _run_torch(module, data, direction):
    """Return the outputs in the order of processing, because torch's layers are not reversed."""
    x, *states = (torch.from_numpy(each).float() for each in data.values())
    states = tuple(torch.stack(each.chunk(2 if module.bidirectional else 1, -1)) for each in states)
    states = states if len(states) > 1 else states[0]
    sequence, last = module(x.flip(0) if direction == "reverse" else x, states)
    last = last if isinstance(last, tuple) else (last,)
    return [sequence.numpy(), *(torch.cat(tuple(each), -1).numpy() for each in last)]


def _assert_matches(found, expected, every, dtype=np.float32):
    sequence = expected[0] if every else expected[0][-1:]
    assert found[0].shape == sequence.shape
    for mine, theirs in zip(found, [sequence, *expected[1:]], strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype(np.float32), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize(("ios", "dtype"), [(15, np.float32), (17, np.float16)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("direction", "every"), CASES)
def test_rnn(evaluate, ios, dtype, activation, direction, every):
    module = _module("RNN", nonlinearity=activation)
    data = _data(["h"], dtype)

    def body(x, h):
        return mb.rnn(
            x=x,
            initial_h=h,
            weight_ih=module.weight_ih_l0.numpy().astype(dtype),
            weight_hh=module.weight_hh_l0.numpy().astype(dtype),
            bias=(module.bias_ih_l0 + module.bias_hh_l0).numpy().astype(dtype),
            direction=direction,
            output_sequence=every,
            activation=activation,
        )

    _assert_matches(evaluate(data, body, ios=ios), _run_torch(module, data, direction), every, dtype)


IFOZ = (0, 1, 3, 2)
ROZ = (0, 2, 1)


@pytest.mark.parametrize(("ios", "dtype"), [(15, np.float32), (17, np.float16)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("direction", "every"), CASES)
def test_lstm(evaluate, ios, dtype, has_bias, direction, every):
    module = _module("LSTM", bias=has_bias)
    data = _data(["h", "c"], dtype)

    def body(x, h, c):
        bias = {}
        if has_bias:
            bias["bias"] = sum(_gates(module, name, IFOZ) for name in ("bias_ih", "bias_hh")).astype(dtype)
        return mb.lstm(
            x=x,
            initial_h=h,
            initial_c=c,
            weight_ih=_gates(module, "weight_ih", IFOZ, dtype),
            weight_hh=_gates(module, "weight_hh", IFOZ, dtype),
            direction=direction,
            output_sequence=every,
            **bias,
        )

    _assert_matches(evaluate(data, body, ios=ios), _run_torch(module, data, direction), every, dtype)


@pytest.mark.parametrize("has_bias", [False, True])
def test_lstm_of_both_directions(evaluate, has_bias):
    """All steps are in the order of x; the backward half of the last output belongs to the first step."""
    module = _module("LSTM", bias=has_bias, bidirectional=True)
    data = _data(["h", "c"], np.float32, directions=2)

    def body(x, h, c):
        arguments = {}
        for suffix, name in (("", ""), ("_reverse", "_back")):
            for weight in ("weight_ih", "weight_hh"):
                arguments[weight + name] = _gates(module, weight, IFOZ, suffix=suffix)
            if has_bias:
                both = (_gates(module, each, IFOZ, suffix=suffix) for each in ("bias_ih", "bias_hh"))
                arguments["bias" + name] = sum(both)
        arguments |= {"x": x, "initial_h": h, "initial_c": c, "direction": "bidirectional"}
        return *mb.lstm(output_sequence=True, **arguments), mb.lstm(output_sequence=False, **arguments)[0]

    *found, ends = evaluate(data, body)
    expected = _run_torch(module, data, "forward")
    _assert_matches(found, expected, every=True)
    np.testing.assert_allclose(ends[0, :, :HIDDEN], expected[0][-1, :, :HIDDEN], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ends[0, :, HIDDEN:], expected[0][0, :, HIDDEN:], rtol=1e-5, atol=1e-6)


ACTIVATIONS = {
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    "names",
    [("sigmoid", "tanh", "hard_sigmoid"), ("hard_sigmoid", "linear", "scaled_tanh"), ("tanh", "relu", "linear")],
)
def test_lstm_with_peepholes(evaluate, names, clip):
    """Gers, Schraudolph and Schmidhuber, Learning Precise Timing with LSTM Recurrent Networks, 2002."""
    data = _data(["h", "c"], np.float32, directions=2)
    sizes = {"weight_ih": (4 * HIDDEN, INPUTS), "weight_hh": (4 * HIDDEN, HIDDEN), "bias": (4 * HIDDEN,)}
    sizes["peephole"] = (3 * HIDDEN,)
    there = {name: _random(*shape) for name, shape in sizes.items()}
    back = {name: _random(*shape) for name, shape in sizes.items()}

    def body(x, h, c):
        return mb.lstm(
            x=x,
            initial_h=h,
            initial_c=c,
            **there,
            **{f"{name}_back": value for name, value in back.items()},
            direction="bidirectional",
            output_sequence=True,
            recurrent_activation=names[0],
            cell_activation=names[1],
            activation=names[2],
            clip=None if clip is None else np.float32(clip),
        )

    gate, cell, output = (ACTIVATIONS[name] for name in names)

    def reference(x, h, c, weights):
        p_i, p_f, p_o = np.split(weights["peephole"], 3)
        states = []
        for step in x:
            sums = step @ weights["weight_ih"].T + h @ weights["weight_hh"].T + weights["bias"]
            i, f, o, z = np.split(sums, 4, axis=-1)
            c = gate(f + p_f * c) * c + gate(i + p_i * c) * cell(z)
            c = c if clip is None else np.clip(c, -clip, clip)
            h = gate(o + p_o * c) * output(c)
            states.append(h)
        return np.stack(states), h, c

    halves = {name: np.split(data[name], 2, axis=-1) for name in ("h", "c")}
    forward = reference(data["x"], halves["h"][0], halves["c"][0], there)
    backward = reference(data["x"][::-1], halves["h"][1], halves["c"][1], back)
    expected = [np.concatenate([forward[0], backward[0][::-1]], -1)]
    expected += [np.concatenate(pair, -1) for pair in zip(forward[1:], backward[1:], strict=True)]
    found = evaluate(data, body)
    _assert_matches(found, expected, every=True)
    assert (np.abs(found[2]).max() <= 0.1 + 1e-7) == (clip is not None)


@pytest.mark.parametrize(("direction", "every"), CASES)
def test_gru_with_reset_after_the_product(evaluate, direction, every):
    """torch's layer does the same."""
    module = _module("GRU")
    data = _data(["h"], np.float32)

    def body(x, h):
        return mb.gru(
            x=x,
            initial_h=h,
            weight_ih=_gates(module, "weight_ih", ROZ),
            weight_hh=_gates(module, "weight_hh", ROZ),
            bias=_gates(module, "bias_hh", ROZ),
            input_bias=_gates(module, "bias_ih", ROZ),
            reset_after=True,
            direction=direction,
            output_sequence=every,
        )

    _assert_matches(evaluate(data, body), _run_torch(module, data, direction), every)


@pytest.mark.parametrize(("ios", "dtype"), [(15, np.float32), (17, np.float16), (18, np.float32)])
@pytest.mark.parametrize("names", [("sigmoid", "tanh"), ("tanh", "sigmoid")])
@pytest.mark.parametrize(("direction", "every"), CASES)
def test_gru(evaluate, ios, dtype, names, direction, every):
    """Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014: the state is reset first."""
    data = _data(["h"], dtype)
    w, u = _random(3 * HIDDEN, INPUTS, dtype=dtype), _random(3 * HIDDEN, HIDDEN, dtype=dtype)
    biases = {"bias": _random(3 * HIDDEN, dtype=dtype)}
    if ios >= 18:
        biases["input_bias"] = _random(3 * HIDDEN, dtype=dtype)

    def body(x, h):
        return mb.gru(
            x=x,
            initial_h=h,
            weight_ih=w,
            weight_hh=u,
            **biases,
            direction=direction,
            output_sequence=every,
            recurrent_activation=names[0],
            activation=names[1],
        )

    gate, activation = (ACTIVATIONS[name] for name in names)
    w_r, w_o, w_z = np.split(w.astype(np.float64), 3)
    u_r, u_o, u_z = np.split(u.astype(np.float64), 3)
    b_r, b_o, b_z = np.split(sum(each.astype(np.float64) for each in biases.values()), 3)
    h = data["h"].astype(np.float64)
    states = []
    for x in data["x"][:: -1 if direction == "reverse" else 1].astype(np.float64):
        r = gate(x @ w_r.T + h @ u_r.T + b_r)
        z = gate(x @ w_z.T + h @ u_z.T + b_z)
        o = activation(x @ w_o.T + (r * h) @ u_o.T + b_o)
        h = (1 - z) * o + z * h
        states.append(h)
    _assert_matches(evaluate(data, body, ios=ios), [np.stack(states), h], every, dtype)


def test_every_activation(evaluate):
    """One step without a recurrent part is the activation. `rnn` has a different name for one of them."""
    x = np.linspace(-4, 4, 9, dtype=np.float32).reshape(1, 9, 1)
    names = {**{name: name for name in ACTIVATIONS}, "sigmoid_hard": "hard_sigmoid", "TANH": "tanh"}

    def body(x):
        zero, one = np.zeros((9, 1), np.float32), np.ones((1, 1), np.float32)
        return tuple(
            mb.rnn(x=x, initial_h=zero, weight_ih=one, weight_hh=one, activation=name)[1] for name in names
        )

    for found, name in zip(evaluate({"x": x}, body), names.values(), strict=True):
        np.testing.assert_allclose(found, ACTIVATIONS[name](x[0]), rtol=1e-5, atol=1e-7)


def test_unsupported_options_are_rejected():
    x, h = torch.zeros(2, 1, 4), torch.zeros(1, 2)
    weights = torch.zeros(8, 4), torch.zeros(8, 2)
    with pytest.raises(
        OperationError, match="activation 'softplus', expected one of hard_sigmoid, linear, relu, scaled_tanh"
    ):
        find("rnn", 18).kernel(x, h, weights[0][:2], weights[1][:2], activation="softplus")
    with pytest.raises(OperationError, match="direction 'bidirectional', expected forward or reverse"):
        find("gru", 18).kernel(x, h, weights[0][:6], weights[1][:6], direction="bidirectional")
    with pytest.raises(OperationError, match="a bidirectional layer without weight_ih_back and weight_hh_back"):
        find("lstm", 18).kernel(x, h, h, *weights, direction="bidirectional")
