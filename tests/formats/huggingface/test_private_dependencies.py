"""Each private dependency of the package is as the code expects; see docs/private-dependencies.md."""

from __future__ import annotations

import tokenizers
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

ADVICE = "VERY_LARGE_INTEGER of transformers changed; docs/private-dependencies.md explains what to do"


def test_a_transformers_tokenizer_without_a_limit_reports_the_very_large_integer() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    expected = getattr(tokenization_utils_base, "VERY_LARGE_INTEGER", None)
    assert plain.model_max_length == expected, ADVICE
