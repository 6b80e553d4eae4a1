"""Llama-style decoders, converted in each way that the pipeline has or will have, against torch eager."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
from torch import nn

from coremill.core.config import ModelConfig
from coremill.core.contract import ModelArch
from coremill.core.errors import PredictionInputError
from coremill.coreml.decoder import Decoder, Main, decoder_weights
from coremill.mil import MLModel
from coremill.mil.plan import Step, Target
from coremill.mil.values import Numerics
from coremill.model.student import new_student

SHAPES = (16, 24, 40)
VOCAB = 96

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    d_model=32,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    d_ff=64,
    max_seq_len=64,
    arch=ModelArch(use_halt_head=True, tie_embeddings=True),
)


class SpelledOut(nn.Module):
    """One layer as public implementations often write it: tables sliced to T, expand(), softmax by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, size, bias=False) for size in (32, 16, 16, 32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCAB)
        angles = torch.outer(torch.arange(64).float(), 100 ** -(torch.arange(0, 8, 2) / 8))
        self.register_buffer("cos", torch.cat((angles, angles), 1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), 1).sin())
        self.register_buffer("mask", torch.full((64, 64), float("-inf")).triu(1))

    def _turn(self, x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, input_ids):
        batch, length = input_ids.shape
        x = self.embed(input_ids)
        y = self.norm(x)
        cos, sin = self.cos[:length], self.sin[:length]
        q = self._turn(self.q(y).view(batch, length, 4, 8).transpose(1, 2), cos, sin)
        k = self._turn(self.k(y).view(batch, length, 2, 8).transpose(1, 2), cos, sin)
        v = self.v(y).view(batch, length, 2, 8).transpose(1, 2)
        k, v = (each[:, :, None].expand(batch, 2, 2, length, 8).reshape(batch, 4, length, 8) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / 8**0.5 + self.mask[:length, :length]
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, length, 32)
        return (self.head(nn.functional.gelu(x + self.o(mixed))),)


def _pipelines():
    weights = decoder_weights(CONFIG, new_student(CONFIG, seed=1).state_dict())
    return Main(Decoder(CONFIG, CONFIG.max_seq_len).set_weights(weights)).eval()


def _spelled_out():
    torch.manual_seed(1)
    return SpelledOut().eval()


MODELS = {"the pipeline's": _pipelines, "spelled out": _spelled_out}


def _convert(module, kind, precision):
    shapes = ct.EnumeratedShapes([(1, length) for length in SHAPES], default=(1, SHAPES[0]))
    ids = torch.zeros(1, SHAPES[0], dtype=torch.int32)
    with torch.no_grad():
        if kind == "traced":
            program = torch.jit.trace(module, ids)
        else:
            length = torch.export.Dim("T", min=2, max=48)
            program = torch.export.export(module, (ids,), dynamic_shapes=({1: length},)).run_decompositions({})
    names = ["logits", "halt_logits"][: len(module(ids))]
    return ct.convert(
        program,
        inputs=[ct.TensorType("input_ids", shape=shapes, dtype=np.int32)],
        outputs=[ct.TensorType(name) for name in names],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=getattr(ct.precision, precision),
        skip_model_load=True,
    )


# Both from inside ct.convert: its reader of exported programs calls a function that coremltools deprecates, and its
# `_cast` of traced sizes does what numpy refuses from 2.4 on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


@pytest.fixture(
    scope="module",
    params=[
        ("the pipeline's", "traced", "FLOAT16"),
        ("the pipeline's", "exported", "FLOAT32"),
        ("spelled out", "traced", "FLOAT32"),
        ("spelled out", "exported", "FLOAT16"),
    ],
    ids="-".join,
)
def case(request):
    name, kind, precision = request.param
    module = MODELS[name]()
    return module, _convert(module, kind, precision), precision


def _ids(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (1, length)).astype(np.int32)


@pytest.mark.parametrize("length", SHAPES)
def test_outputs_match_torch(case, length):
    module, converted, precision = case
    ids = _ids(length)
    with torch.no_grad():
        expected = [each.numpy() for each in module(torch.from_numpy(ids))]
    for mode in ("declared", "oracle"):
        found = list(MLModel(converted, mode=mode).predict({"input_ids": ids}).values())
        assert [each.shape for each in found] == [each.shape for each in expected]
        for mine, reference in zip(found, expected, strict=True):
            tolerance = 2e-5 if precision == "FLOAT32" else 2e-2 if mode == "declared" else 4e-3
            np.testing.assert_allclose(mine, reference, rtol=0, atol=tolerance * np.abs(reference).max())


def test_outputs_are_causal(case):
    """Changing a token leaves every earlier row as it was, bit for bit, and changes its own."""
    _, converted, _ = case
    model = MLModel(converted)
    ids = _ids(SHAPES[1])
    before = model.predict({"input_ids": ids})["logits"]
    ids[0, 10] = (ids[0, 10] + 1) % VOCAB
    after = model.predict({"input_ids": ids})["logits"]
    np.testing.assert_array_equal(after[:, :10], before[:, :10])
    assert (after[:, 10] != before[:, 10]).any()


def test_unlisted_length_is_rejected(case):
    _, converted, _ = case
    with pytest.raises(PredictionInputError) as caught:
        MLModel(converted).predict({"input_ids": _ids(17)})
    assert str(caught.value) == (
        "input 'input_ids' is of shape [1, 17]\n  expected: one of [1, 16], [1, 24], [1, 40]"
    )


def test_values_have_their_declared_types(case):
    """Each operation of the graph leaves values of the types and known sizes that the program declares."""
    _, converted, _ = case
    program = MLModel(converted).program
    types = program.graph.types
    seen = []

    def observe(step: Step, values: list) -> None:
        for slot in step.outputs:
            declared = types[slot]
            assert values[slot].dtype == declared.element.storage, step.node
            assert values[slot].dim() == len(declared.shape), step.node
            for found, size in zip(values[slot].shape, declared.shape, strict=True):
                assert size in (None, found), step.node
        seen.append(step)

    program.run([torch.from_numpy(_ids(SHAPES[2]))], Target(Numerics.DECLARED), observe)
    assert seen == program.plan(Target(Numerics.DECLARED)).general.steps


def test_repeated_runs_give_the_same_bits(case):
    """The first run at a length, later ones, and runs at other lengths in between."""
    _, converted, _ = case
    model = MLModel(converted)
    first = {length: model.predict({"input_ids": _ids(length)})["logits"] for length in SHAPES}
    for length in reversed(SHAPES):
        np.testing.assert_array_equal(model.predict({"input_ids": _ids(length)})["logits"], first[length])


class CachedAttention(nn.Module):
    """One layer with a key/value cache: writes q positions, attends to all up to the last written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.head = nn.Linear(32, VOCAB)
        self.register_buffer("keys", torch.zeros(1, 4, 48, 8, dtype=torch.float16))
        self.register_buffer("values", torch.zeros(1, 4, 48, 8, dtype=torch.float16))

    def _heads(self, x):
        return x.view(1, -1, 4, 8).transpose(1, 2)

    def forward(self, input_ids, mask):
        """input_ids (1, q), mask (1, 1, q, end): 0 where a position may be seen."""
        x = self.embed(input_ids)
        end = mask.shape[-1]
        start = end - input_ids.shape[-1]
        self.keys[:, :, start:end] = self._heads(self.k(x)).half()
        self.values[:, :, start:end] = self._heads(self.v(x)).half()
        mixed = nn.functional.scaled_dot_product_attention(
            self._heads(self.q(x)), self.keys[:, :, :end].float(), self.values[:, :, :end].float(), attn_mask=mask
        )
        return self.head(mixed.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def cached():
    module = CachedAttention().eval()
    query, end = ct.RangeDim(1, 16, default=1), ct.RangeDim(1, 48, default=1)
    with torch.no_grad():
        traced = torch.jit.trace(module, (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5)))
    states = [
        ct.StateType(wrapped_type=ct.TensorType(shape=(1, 4, 48, 8), dtype=np.float16), name=name)
        for name in ("keys", "values")
    ]
    converted = ct.convert(
        traced,
        inputs=[
            ct.TensorType("input_ids", shape=(1, query), dtype=np.int32),
            ct.TensorType("mask", shape=(1, 1, query, end), dtype=np.float16),
        ],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=states,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    return CachedAttention().eval(), converted


def _causal(query, end):
    return np.where(np.tril(np.ones((query, end), np.bool_), end - query), 0, -3e4).astype(np.float16)[None, None]


def test_decoding_with_a_state(cached):
    """A prompt of 6, then tokens one at a time, as torch with its own cache and as one forward over all."""
    module, converted = cached
    ids = _ids(14, seed=5)
    model = MLModel(converted)
    state = model.make_state()
    assert [spec.name for spec in model.states] == ["keys", "values"]
    parts = []
    for start, end in [(0, 6), *((at, at + 1) for at in range(6, 14))]:
        mask = _causal(end - start, end)
        found = model.predict({"input_ids": ids[:, start:end], "mask": mask}, state)["logits"]
        with torch.no_grad():
            expected = module(torch.from_numpy(ids[:, start:end].copy()), torch.from_numpy(mask).float()).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-2)
        parts.append(found)
    whole = model.predict({"input_ids": ids, "mask": _causal(14, 14)}, model.make_state())["logits"]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-2)
    assert (state.read("keys")[:, :, :14] != 0).any(axis=(1, 3)).all()
    assert (state.read("keys")[:, :, 14:] == 0).all()


def test_decoding_without_its_state_differs(cached):
    """The state is really read: the same token on an empty cache scores otherwise."""
    _, converted = cached
    model = MLModel(converted)
    ids = _ids(3, seed=6)
    state = model.make_state()
    model.predict({"input_ids": ids[:, :2], "mask": _causal(2, 2)}, state)
    last = {"input_ids": ids[:, 2:], "mask": _causal(1, 3)}
    with_state = model.predict(last, state)["logits"]
    without = model.predict(last, model.make_state())["logits"]
    assert np.abs(with_state.astype(np.float32) - without).max() > 0.05
