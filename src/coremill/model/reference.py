"""The reference model: what every exported format of a model is compared with.

The checkpoint's weights stay where they are, memory-mapped in their stored type. Each layer's weights are widened
when the layer runs, so that one layer is in memory in float32, not the model. Of a sequence, only the hidden states
are kept; logits, of which one sequence may have 800 MB, are computed from them a few positions at a time.

Legend: N tokens of a sequence, C d_model, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from coremill.core.config import ModelConfig
from coremill.measures import Comparison, Float32Array
from coremill.model.checkpoint import Checkpoint
from coremill.model.rope import rotary_tables
from coremill.model.student import Layer, RMSNorm, output_names

_ROWS_BYTES = 32 << 20
"""Logits that are computed at a time (at least one row)."""
_UNEMBEDDED = 1 << 24
"""Elements of the unembedding that are widened at a time."""


class Scores:
    """The outputs of the model for one sequence of N tokens, computed on request.

    Args:
        hidden: the last hidden states after the final norm, (N, C).
        heads: computes the outputs by name from rows of `hidden`.
        names: the outputs' names; the first is the logits.
        rows: how many rows are computed at a time.
    """

    def __init__(
        self, hidden: Tensor, heads: Callable[[Tensor], dict[str, Float32Array]], names: Sequence[str], rows: int
    ) -> None:
        self._hidden, self._heads, self._rows = hidden, heads, rows
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self._hidden)

    def at(self, rows: slice) -> dict[str, Float32Array]:
        """Return the outputs by name of some positions: (rows, V) and (rows, 2)."""
        return self._heads(self._hidden[rows])

    def all(self) -> dict[str, Float32Array]:
        """Return the outputs of every position: (N, V) and (N, 2)."""
        return self.at(slice(None))

    def chunks(self) -> Iterator[tuple[slice, dict[str, Float32Array]]]:
        """Yield all positions, a few at a time, with their outputs by name."""
        for start in range(0, len(self), self._rows):
            rows = slice(start, min(start + self._rows, len(self)))
            yield rows, self.at(rows)

    def compare(
        self,
        found: Mapping[str, Float32Array],
        by_output: Mapping[str, Comparison],
        *,
        judged: slice = slice(None),
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Add each output of `found`, (N, …), to its comparison; see :meth:`Comparison.add`.

        Args:
            judged: the positions that top-1 agreement considers.
            tokens: the sequence's N tokens, to measure the logits' perplexity.

        Raises:
            ValueError: an output has another shape, or a value is NaN or infinite.
        """
        for name, array in found.items():
            if name in by_output and len(array) != len(self):
                raise ValueError(f"`{name}` of shape {array.shape} cannot be compared with {len(self)} positions")
        is_judged = np.zeros(len(self), bool)
        is_judged[judged] = True
        for rows, expected in self.chunks():
            for name, comparison in by_output.items():
                following = None if tokens is None or name != self.names[0] else tokens[rows.start : rows.stop + 1]
                comparison.add(expected[name], found[name][rows], judged=is_judged[rows], tokens=following)


class Reference:
    """A model of the student's architecture, run eagerly in float32; several threads may share it.

    Args:
        config: the model's configuration.
        weights: its tensors by the student's names, in any type. They are read at each run and not changed.
        rounded_to: round the weights and the rotary tables to this type first, as a package stores them.
        dtype: the type of the arithmetic, `torch.float64` to measure the error of float32's. Outputs are float32
            in either case.
        angles: the type of the rotary angles.
        channels: a permutation of the C channels, (C,) int64, in which the model keeps them. The model is the same,
            but its sums are taken in another order. None for the checkpoint's own.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        rounded_to: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        angles: torch.dtype = torch.float64,
        channels: Tensor | None = None,
    ) -> None:
        self._config, self._weights, self._rounded_to, self._dtype = config, weights, rounded_to, dtype
        self._angles, self._channels = angles, channels
        self.names = output_names(config)
        with torch.device("meta"):
            self._layer = Layer(config).eval()
            self._norm = RMSNorm(config.d_model, config.norm_eps)
        self._running = threading.Lock()
        """Held while `_layer` and `_norm` have weights: a module has one set at a time, whatever the thread."""
        self._known: list[tuple[tuple[int, ...], Tensor]] = []
        """The sequences that were run, with their hidden states (N, C)."""
        self._layer_names = [name for name, _ in self._layer.named_parameters()]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Reference:
        """Return the checkpoint's model, with its weights as they are."""
        return cls(checkpoint.config, checkpoint.state_dict)

    def in_float64(self) -> Reference:
        """Return the same model with its arithmetic in float64."""
        return Reference(self._config, self._weights, rounded_to=self._rounded_to, dtype=torch.float64)

    def reordered(self, seed: int, *, angles: torch.dtype) -> Reference:
        """Return the same model with its channels in a random order, and with the rotary angles in that type."""
        channels = torch.randperm(self._config.d_model, generator=torch.Generator().manual_seed(seed))
        return Reference(self._config, self._weights, rounded_to=self._rounded_to, angles=angles, channels=channels)

    def score(self, ids: Sequence[int]) -> Scores:
        """Return the outputs for `ids` (N,)."""
        (scores,) = self.score_all([ids])
        return scores

    def score_all(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """Return the outputs for each sequence; all of them pass through a layer while its weights are widened.

        The model is causal: a sequence that begins another one, or an earlier one, is not run again.

        Raises:
            ValueError: a sequence is longer than the model's context.
        """
        with self._running:
            new: list[tuple[int, ...]] = []
            for ids in sorted({tuple(ids) for ids in sequences}, key=len, reverse=True):
                if self._known_hidden(ids) is None and not any(longer[: len(ids)] == ids for longer in new):
                    new.append(ids)
            if new:
                self._known += zip(new, self._hidden(new), strict=True)
        rows = max(1, _ROWS_BYTES // (4 * self._config.vocab_size))
        found = [self._known_hidden(tuple(ids)) for ids in sequences]
        return [Scores(hidden, self._heads, self.names, rows) for hidden in found if hidden is not None]

    def _known_hidden(self, ids: tuple[int, ...]) -> Tensor | None:
        """Return the hidden states (N, C) for `ids`, if they begin a sequence that was run."""
        known = (hidden[: len(ids)] for other, hidden in self._known if other[: len(ids)] == ids)
        return next(known, None)

    def _hidden(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the hidden states (N, C) of each sequence, after the final norm."""
        longest = max(map(len, sequences))
        if longest > self._config.max_seq_len:
            raise ValueError(f"{longest} tokens exceed the model's max_seq_len of {self._config.max_seq_len}")
        with torch.no_grad():
            tables = [
                self._wide(table)
                for table in rotary_tables(self._config, torch.arange(longest), dtype=self._angles)
            ]
            name = "embed_tokens.weight"
            embedded = (F.embedding(torch.tensor([list(ids)]), self._weights[name]) for ids in sequences)
            states = [self._ordered(name, self._wide(x)) for x in embedded]
            for index in range(self._config.n_layers):
                weights = {name: self._weight(f"layers.{index}.{name}") for name in self._layer_names}
                for number, x in enumerate(states):
                    inputs = (x, *(table[: x.shape[1]] for table in tables))
                    states[number] = functional_call(self._layer, weights, inputs)
            norm = {"weight": self._weight("norm.weight")}
            return [functional_call(self._norm, norm, (x,))[0] for x in states]

    def run(self, ids: Sequence[int]) -> dict[str, Float32Array]:
        """Return the outputs by name for `ids` (N,), without the batch dimension: (N, V) and (N, 2)."""
        return self.score(ids).all()

    def logits(self, ids: Sequence[int]) -> Float32Array:
        """Return the logits (N, V) for `ids` (N,)."""
        return self.run(ids)[self.names[0]]

    def next_logits(self, ids: list[int]) -> Float32Array:
        """Return the logits (V,) of the token after `ids`."""
        last: Float32Array = self.score(ids).at(slice(-1, None))[self.names[0]][0]
        return last

    def _heads(self, hidden: Tensor) -> dict[str, Float32Array]:
        """Map hidden states (rows, C) to the outputs by name."""
        with torch.no_grad():
            outputs = {self.names[0]: self._logits(hidden)}
            if self._config.arch.use_halt_head:
                outputs[self.names[1]] = F.linear(hidden, self._weight("halt_head.weight"))
        return {name: tensor.float().numpy() for name, tensor in outputs.items()}

    def _logits(self, hidden: Tensor) -> Tensor:
        name = "embed_tokens.weight" if self._config.arch.tie_embeddings else "lm_head.weight"
        unembedding = self._weights[name]  # (V, C)
        if unembedding.dtype is self._dtype and self._rounded_to is None and self._channels is None:
            return F.linear(hidden, unembedding)
        logits = hidden.new_empty(len(hidden), len(unembedding))
        step = max(1, _UNEMBEDDED // unembedding.shape[1])
        for start in range(0, len(unembedding), step):
            part = self._ordered(name, self._wide(unembedding[start : start + step]))
            torch.mm(hidden, part.T, out=logits[:, start : start + len(part)])
        return logits

    def _weight(self, name: str) -> Tensor:
        return self._ordered(name, self._wide(self._weights[name]))

    def _ordered(self, name: str, value: Tensor) -> Tensor:
        """Return a weight, or rows of it, with the channels in this model's order."""
        axis = _channel_axis(name)
        if self._channels is None or axis is None:
            return value
        return value.index_select(axis, self._channels)

    def _wide(self, value: Tensor) -> Tensor:
        """Return `value` in the type of the arithmetic, rounded first if the weights are."""
        return (value if self._rounded_to is None else value.to(self._rounded_to)).to(self._dtype)


def _channel_axis(name: str) -> int | None:
    """Return the axis of a parameter that the C channels are on, or None if it has none."""
    module, parameter = name.split(".")[-2:]
    if module in ("q_norm", "k_norm"):
        return None
    if module in ("o_proj", "down_proj") or module.endswith("norm"):
        return 0
    return -1 if parameter == "weight" else None
