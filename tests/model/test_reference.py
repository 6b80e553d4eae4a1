"""The reference model: shared by threads, and what it remembers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from coremill.core.config import ModelArch, ModelConfig
from coremill.model.reference import Reference
from coremill.model.student import new_student

CONFIG = ModelConfig(
    vocab_size=96, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=64,
    arch=ModelArch(use_halt_head=False, tie_embeddings=True),
)  # fmt: skip


def a_reference() -> Reference:
    return Reference(CONFIG, dict(new_student(CONFIG, seed=3).state_dict()))


def test_threads_share_a_reference() -> None:
    """Two files are compared at a time, with one model: a layer must keep its weights while it runs."""
    sequences = [[number, *range(1, 24)] for number in range(64)]
    expected = [a_reference().logits(ids) for ids in sequences]
    shared = a_reference()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(shared.logits, sequences))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_sequence_that_begins_a_known_one_is_not_run_again() -> None:
    reference = a_reference()
    long = list(range(40))
    whole = reference.logits(long)
    reference._hidden = None
    np.testing.assert_array_equal(reference.logits(long[:24]), whole[:24])
