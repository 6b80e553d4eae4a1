"""The decoding loop and its samplers, against models whose next token is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coremill.model.decoding import Sampler, TemperatureSampler, generate, greedy

VOCAB = 11
logit_vectors = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)


def next_is_sum(tokens: list[int]) -> np.ndarray:
    """Return the logits of a model whose next token is the sum of all tokens, modulo the vocabulary."""
    return np.eye(VOCAB, dtype=np.float32)[sum(tokens) % VOCAB]


@given(prompts, st.integers(1, 30), st.sets(st.integers(0, VOCAB - 1)))
def test_generate_follows_the_model_until_a_stop_id_or_the_limit(
    prompt: list[int], limit: int, stops: set[int]
) -> None:
    expected: list[int] = []
    while len(expected) < limit:
        expected.append(sum(prompt + expected) % VOCAB)
        if expected[-1] in stops:
            break
    before = list(prompt)
    new = generate(next_is_sum, prompt, stop_ids=stops, max_new_tokens=limit, sampler=greedy)
    assert new == expected
    assert prompt == before


def test_generate_passes_every_token_so_far_to_the_model() -> None:
    seen: list[list[int]] = []

    def next_logits(tokens: list[int]) -> np.ndarray:
        seen.append(list(tokens))
        return np.eye(VOCAB)[len(tokens)]

    assert generate(next_logits, [9, 9], stop_ids=(), max_new_tokens=3, sampler=greedy) == [2, 3, 4]
    assert seen == [[9, 9], [9, 9, 2], [9, 9, 2, 3]]


@pytest.mark.parametrize("limit", [0, -1])
def test_generate_rejects_a_limit_below_1(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"^max_new_tokens must be at least 1, found {limit}$"):
        generate(next_is_sum, [1], stop_ids=(), max_new_tokens=limit, sampler=greedy)


def test_generate_rejects_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match=r"^the prompt is empty$"):
        generate(next_is_sum, [], stop_ids=(), max_new_tokens=1, sampler=greedy)


@given(logit_vectors)
def test_greedy_returns_the_lowest_id_with_the_highest_logit(logits: np.ndarray) -> None:
    assert greedy(logits) == min(i for i, value in enumerate(logits) if value == max(logits))


@given(logit_vectors, st.floats(0.1, 5), st.integers(0, 2**32))
def test_a_sampler_is_deterministic_for_a_seed(logits: np.ndarray, temperature: float, seed: int) -> None:
    first, again = TemperatureSampler(temperature, seed), TemperatureSampler(temperature, seed)
    draws = [first(logits) for _ in range(5)]
    assert draws == [again(logits) for _ in range(5)]
    assert all(0 <= draw < len(logits) for draw in draws)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = np.array([0.0, 2.0, -np.inf, 1.0, -1.0], dtype=np.float32)
    weights = np.exp(logits.astype(np.float64) / temperature)
    sampler = TemperatureSampler(temperature, seed=3)
    n = 20_000
    shares = np.bincount([sampler(logits) for _ in range(n)], minlength=5) / n
    expected = weights / weights.sum()
    # Five standard deviations of a binomial share; the masked id has none.
    assert np.all(np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / n))


@pytest.mark.parametrize(("draw", "expected"), [(0.0, 1), (np.nextafter(1.0, 0.0), 2)])
def test_the_ends_of_the_unit_interval_never_draw_a_masked_id(
    monkeypatch: pytest.MonkeyPatch, draw: float, expected: int
) -> None:
    class Fixed:
        def random(self) -> float:
            return draw

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Fixed())
    logits = np.array([-np.inf, 0.25, -1.5, -np.inf])
    assert TemperatureSampler(1.0, seed=0)(logits) == expected


def test_a_sampler_at_a_low_temperature_is_greedy() -> None:
    logits = np.array([1.0, 1.5, 1.4], dtype=np.float32)
    assert {TemperatureSampler(1e-3, seed)(logits) for seed in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_rejected(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature must be positive, found"):
        TemperatureSampler(temperature, seed=0)


@pytest.mark.parametrize("sampler", [greedy, TemperatureSampler(1.0, 0)])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.array([0.0, np.nan, 1.0]), r"^logits contain NaN"),
        (np.array([0.0, np.inf]), r"^logits contain NaN or \+inf"),
        (np.array([-np.inf, -np.inf]), r"or are all -inf$"),
        (np.zeros((1, 4)), r"^logits must be a vector, found shape \(1, 4\)$"),
        (np.zeros(0), r"^logits must be a vector, found shape \(0,\)$"),
    ],
)
def test_invalid_logits_are_rejected(sampler: Sampler, logits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(logits)
