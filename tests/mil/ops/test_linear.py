"""Matrix products and attention, against numpy in float64 and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813

from coremill.mil.ops import transformer

RNG = np.random.default_rng(5)


def _array(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def test_linear(evaluate, inferred):
    x, weight, bias = _array(2, 5, 8), _array(3, 8), _array(3)
    (found,) = evaluate({"x": x}, lambda x: mb.linear(x=x, weight=weight, bias=bias))
    np.testing.assert_allclose(found, x @ weight.T + bias, rtol=1e-5, atol=1e-6)
    expected = inferred({"x": x}, lambda x: mb.linear(x=x, weight=weight, bias=bias))
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-6)


def test_linear_of_halves_accumulates_in_fp32(evaluate):
    """1,024 products of 1 and 3: a sum in fp16 would stop growing at 2,048 times a term."""
    x = np.ones((1, 4096), np.float16)
    weight = np.full((2, 4096), 3.0, np.float16)
    weight[1] = 1 + 2**-10
    (found,) = evaluate({"x": x}, lambda x: mb.linear(x=x, weight=weight, bias=np.zeros(2, np.float16)))
    assert found.dtype == np.float16
    assert found.tolist() == [[12288.0, 4100.0]]


def test_linear_of_halves_is_rounded_once_after_the_bias(evaluate):
    x = np.array([[2048.0]], np.float16)
    weight, bias = np.ones((1, 1), np.float16), np.array([1.5], np.float16)
    (found,) = evaluate({"x": x}, lambda x: mb.linear(x=x, weight=weight, bias=bias))
    assert found.tolist() == [[2050.0]]  # 2049.5 is between 2048 and 2050


MATMULS = [
    ((4, 3), (3, 2), False, False),
    ((10, 4, 3), (5, 10, 3, 2), False, False),
    ((2, 3, 4), (2, 3, 5), True, False),
    ((2, 4, 3), (2, 5, 3), False, True),
    ((2, 3, 4), (2, 5, 3), True, True),
    ((3,), (2, 3, 4), False, False),
]


@pytest.mark.parametrize(("x_shape", "y_shape", "transpose_x", "transpose_y"), MATMULS)
def test_matmul(evaluate, inferred, x_shape, y_shape, transpose_x, transpose_y):
    x, y = _array(*x_shape), _array(*y_shape)
    body = lambda x, y: mb.matmul(x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y)  # noqa: E731
    (found,) = evaluate({"x": x, "y": y}, body)
    expected = inferred({"x": x, "y": y}, body)
    assert found.shape == expected[0].shape
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-6)


def test_matmul_of_integers(evaluate):
    x, y = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(12, dtype=np.int32).reshape(3, 4)
    (found,) = evaluate({"x": x, "y": y}, lambda x, y: mb.matmul(x=x, y=y))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, x @ y)


def test_einsum_broadcasts(evaluate):
    x, y = _array(1, 3, 4, 5), _array(2, 5, 1, 6)
    (found,) = evaluate({"x": x, "y": y}, lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"))
    expected = np.einsum("nchw,nwhu->nchu", np.broadcast_to(x, (2, 3, 4, 5)), np.broadcast_to(y, (2, 5, 4, 6)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _attention(query, key, value, mask):
    """softmax(Q · Kᵀ / sqrt(E) + mask) · V in float64."""
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value.astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_scaled_dot_product_attention(evaluate, kind, dtype):
    query, key, value = (_array(1, 2, length, 8, dtype=dtype) for length in (3, 5, 5))
    causal = np.tril(np.ones((3, 5), np.bool_))
    mask = {"none": None, "float": np.where(causal, 0, -3e4).astype(dtype), "bool": causal}[kind]
    inputs = {"query": query, "key": key, "value": value}

    def body(query, key, value):
        extra = {} if mask is None else {"attn_mask": mask}
        return mb.scaled_dot_product_attention(query=query, key=key, value=value, **extra)

    (found,) = evaluate(inputs, body)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == np.float32 else 2e-3
    np.testing.assert_allclose(found, _attention(query, key, value, mask), rtol=tolerance, atol=tolerance)


def test_attention_follows_its_mask(evaluate):
    """The mask leaves the first row one key, so its result is exactly that key's value."""
    query, key, value = (_array(1, 1, 4, 8) for _ in range(3))
    mask = np.where(np.tril(np.ones((4, 4), np.bool_)), 0, -np.inf).astype(np.float32)
    (found,) = evaluate(
        {"query": query, "key": key, "value": value},
        lambda query, key, value: mb.scaled_dot_product_attention(
            query=query, key=key, value=value, attn_mask=mask
        ),
    )
    np.testing.assert_array_equal(found[0, 0, 0], value[0, 0, 0])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(each) for each in (query, key, value)), is_causal=True
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


# Keys that no query of a block sees are left out

LONG = 1024


def _causal(kind):
    seen = torch.ones(LONG, LONG, dtype=torch.bool).tril()
    return seen if kind == "bool" else torch.where(seen, 0.0, float(kind))


def _queries_and_keys(scale=1.0):
    generator = torch.Generator().manual_seed(7)
    return [scale * torch.randn(1, 2, LONG, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def keys_read(monkeypatch):
    """The number of keys in each call of torch's attention."""
    counts = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, **options):
        counts.append(key.shape[-2])
        return whole(query, key, value, **options)

    monkeypatch.setattr(transformer.F, "scaled_dot_product_attention", counted)
    return counts


@pytest.mark.parametrize("kind", ["bool", "-inf", "-3e4"])
def test_each_block_of_queries_reads_the_keys_that_it_sees(kind, keys_read):
    query, key, value = _queries_and_keys()
    arrays = (each.numpy() for each in (query, key, value, _causal(kind)))
    found = transformer.scaled_dot_product_attention(query, key, value, _causal(kind)).numpy()
    assert keys_read == [256, 512, 768, 1024]
    np.testing.assert_allclose(found, _attention(*arrays), rtol=1e-4, atol=1e-5)


def test_one_query_reads_the_keys_of_the_cache_that_it_sees(keys_read):
    """Of several heads that share keys, whose queries are rows; the rest of the cache has other numbers."""
    query, key, value = (each.half() for each in _queries_and_keys())
    mask = torch.where(torch.arange(LONG) > 9, -3e4, 0.0).half()[None]
    found = transformer.scaled_dot_product_attention(query[:, :, :3], key, value, mask)
    assert keys_read == [256]
    assert found.dtype is torch.float16
    arrays = (each.numpy() for each in (query[:, :, :3], key, value, mask))
    np.testing.assert_allclose(found.numpy(), _attention(*arrays), rtol=1e-3, atol=1e-3)


def test_padding_changes_no_bit_of_what_comes_before_it():
    """As in the prefill of a prompt of 300 tokens: later rows see no key after it."""
    query, key, value = _queries_and_keys()
    padded = _causal("-3e4")
    padded[:, 300:] = -3e4
    found = transformer.scaled_dot_product_attention(query, key, value, padded)
    expected = transformer.scaled_dot_product_attention(query, key, value, _causal("-3e4"))
    assert torch.equal(found[:, :, :300], expected[:, :, :300])
    shorter = [each[:, :, :512] for each in (query, key, value)]
    alone = transformer.scaled_dot_product_attention(*shorter, _causal("-3e4")[:512, :512])
    assert torch.equal(alone, expected[:, :, :512])


@pytest.mark.parametrize(("what", "number"), [("key", np.nan), ("value", np.inf)])
def test_a_hidden_number_that_is_not_finite_is_read(what, number, keys_read):
    """0 times infinity is not 0, on a device either."""
    query, key, value = _queries_and_keys()
    {"key": key, "value": value}[what][0, 0, -1] = number
    found = transformer.scaled_dot_product_attention(query, key, value, _causal("-3e4"))
    assert keys_read == [1024]
    assert found[0, 0, :-1].isnan().all()  # the last query sees it
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize("row", [1, 255, 256, 700, LONG - 1])
@pytest.mark.parametrize("change", ["one seen key hidden", "one later key seen", "a bias on one seen key"])
def test_mask_with_one_different_value_is_followed(row, change):
    query, key, value = _queries_and_keys()
    mask = _causal("-3e4")
    place, number = {
        "one seen key hidden": (row // 2, -3e4),
        "one later key seen": (row + 1, 0.0),
        "a bias on one seen key": (row, 0.25),
    }[change]
    if place == LONG:
        row, place = row - 1, place - 1
    mask[row, place] = number
    found = transformer.scaled_dot_product_attention(query, key, value, mask).numpy()
    arrays = (each.numpy() for each in (query, key, value, mask))
    np.testing.assert_allclose(found, _attention(*arrays), rtol=1e-4, atol=1e-5)
    causal = _attention(query.numpy(), key.numpy(), value.numpy(), _causal("bool").numpy())
    assert np.abs(found[0, :, row] - causal[0, :, row]).max() > 1e-5  # otherwise the change would not be visible


@pytest.mark.parametrize(("scale", "hidden"), [(1.0, "-5"), (300.0, "-3e4")])
def test_mask_too_weak_for_the_scores_is_added(scale, hidden):
    query, key, value = _queries_and_keys(scale)
    found = transformer.scaled_dot_product_attention(query, key, value / scale, _causal(hidden))
    arrays = [each.numpy() for each in (query, key, value / scale)]
    expected = _attention(*arrays, _causal(hidden).numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected - _attention(*arrays, _causal("bool").numpy())).max() > 0.1


def test_mask_per_head_or_broadcast_is_added():
    query, key, value = _queries_and_keys()
    each_head = torch.stack([_causal("-3e4"), torch.zeros(LONG, LONG)])[None]  # (1, 2, L, L)
    for mask in (each_head, torch.zeros(1, LONG)):
        found = transformer.scaled_dot_product_attention(query, key, value, mask).numpy()
        arrays = (each.numpy() for each in (query, key, value, mask))
        np.testing.assert_allclose(found, _attention(*arrays), rtol=1e-4, atol=1e-5)
