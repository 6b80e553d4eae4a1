"""Proves an import against its source: what the program that others load the source with computes.

A Hugging Face directory runs in transformers, a GGUF file in llama.cpp. Compared with the imported model are the
logits of real and unusual text, and of every added token; the ids of a thousand texts; and the chat template. The
texts are those in this package, so that an import needs no other input.

Every other check compares an export with the checkpoint; only this one compares the checkpoint with anything else.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from pathlib import Path

from coremill.core.config import TextsConfig
from coremill.core.errors import ParityError
from coremill.core.gates import Outcome, must_gates_ok
from coremill.core.parity import SourceParity
from coremill.data.corpora import bundled_texts, chat_prompts
from coremill.data.prompts import TextPrompts
from coremill.formats.gguf import parity as gguf
from coremill.formats.huggingface import parity as huggingface
from coremill.formats.parity import ODD_TEXTS
from coremill.formats.weights import GgufWeights, HuggingFaceWeights
from coremill.model.checkpoint import Checkpoint
from coremill.model.reference import Reference
from coremill.text.model_tokenizer import TextTokenizer

_POSITIONS = 512
"""Positions of running text whose logits are compared; a wrong weight or option changes all of them."""
_LENGTH = 256
"""The most tokens of a sequence."""


def compare_with_source(
    source: GgufWeights | HuggingFaceWeights, checkpoint: Checkpoint, tokenizer: TextTokenizer, *, digest: str
) -> SourceParity:
    """Run the source in the program that it is made for, and compare it with the imported model and tokenizer.

    Args:
        digest: of the checkpoint's file.

    Raises:
        GgufError: llama.cpp does not load the source.
    """
    prompts = TextPrompts(bundled_texts(TextsConfig()), chat_prompts(), tokenizer)
    compared = _compared(prompts, tokenizer, checkpoint.config.max_seq_len)
    reference = Reference.of(checkpoint)
    if isinstance(source, GgufWeights):
        program = f"llama.cpp of xllamacpp {importlib.metadata.version('xllamacpp')}"
        gates = gguf.compare_source(source, reference, prompts, compared)
    else:
        program = f"transformers {importlib.metadata.version('transformers')}"
        outputs = huggingface.ExpectedOutputs(
            config=checkpoint.config, reference=reference, tokenizer=tokenizer, prompts=prompts, halt_head=None
        )
        gates = huggingface.compare_source(source.path, outputs, compared)
    return SourceParity(checkpoint_digest=digest, program=program, positions=sum(map(len, compared)), gates=gates)


def require_source_parity(parity: SourceParity, source: Path) -> None:
    """Check that every gate passed.

    Raises:
        ParityError: names each figure that is outside its bound.
    """
    if must_gates_ok(parity.gates):
        return
    failed = [f"{gate.name}: {gate.reason}" for gate in parity.gates if gate.outcome is not Outcome.PASSED]
    raise ParityError(
        f"the imported model differs from {source} in {parity.program}: {'; '.join(failed)}",
        expected="the same logits, token ids and chat template; this is a defect of the importer or of the source",
        run="coremill import --help",
    )


def _compared(prompts: TextPrompts, tokenizer: TextTokenizer, context: int) -> list[list[int]]:
    """Return sequences of token ids: running text, unusual text, added tokens, and tokens of all the vocabulary."""
    length = min(_LENGTH, context)
    running = prompts.packed_up_to(length, -(-_POSITIONS // length))  # none of a tokenizer of whole words
    odd = tokenizer.encode(" ".join(ODD_TEXTS))
    others = itertools.cycle(running[0] if running else range(tokenizer.vocab_size))
    added = [token for pair in zip(sorted(tokenizer.added_tokens), others) for token in pair]  # noqa: B905 - endless
    spread = list(range(0, tokenizer.vocab_size, -(-tokenizer.vocab_size // length)))
    return [*running, *(ids[:length] for ids in (odd, added, spread) if ids)]
