"""What the readers of weights share: the interface of a source, its checks, and the names of tensors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from coremill.core.config import ModelConfig
from coremill.core.errors import CheckpointContentError, CheckpointUnreadableError
from coremill.model.student import parameter_shapes

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""The names of a layer's modules in GGUF, by the student's names; layer i is `blk.i` in GGUF."""
_ENDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def huggingface_name(name: str) -> str:
    """Return the name of the student's tensor `name` in Hugging Face's models of the Llama family."""
    return name if name == "lm_head.weight" else f"model.{name}"


def gguf_name(name: str) -> str:
    """Return the name of the student's tensor `name` in GGUF."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if layer := _LAYER.fullmatch(module):
        return f"blk.{layer[1]}.{_PARTS[layer[2]]}.{kind}"
    return f"{_ENDS[module]}.{kind}"


class TensorsOnDemand(Mapping[str, Tensor]):
    """Tensors by name, each made when it is looked up, so that one at a time is in memory.

    Args:
        make: returns the tensor of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WeightsSource(ABC):
    """An existing model, opened: its configuration and the names of its tensors, but not their values.

    Raises:
        CheckpointUnreadableError: a file is missing, truncated or damaged.
        CheckpointContentError: tensors are missing, unexpected or of other shapes than the configuration requires.
        UnsupportedModelError: an architecture or an option that coremill does not compute.
        UnsafeCheckpointError: the weights are a pickle.
    """

    format: ClassVar[str]
    path: Path
    model_type: str
    """`llama`, `mistral`, `qwen2` or `qwen3`."""
    config: ModelConfig
    notes: tuple[str, ...]
    """Where the importer deviates from the source, and the weights that it ignores."""

    def __init__(self) -> None:
        self._opened_as: dict[Path, _FileState] = {}

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that were read."""

    @property
    @abstractmethod
    def dtypes(self) -> tuple[str, ...]:
        """The types of the source's tensors, the one with the most elements first."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """The size of the tensors that :meth:`read` yields."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the student's tensors by name, contiguous; those stored as floats are memory-mapped.

        Raises:
            CheckpointUnreadableError: a file changed since the source was opened; see :meth:`check_unchanged`.
        """
        self.check_unchanged()
        for name, tensor in self._read():
            self.check_unchanged()
            yield name, tensor
            self.check_unchanged()

    @abstractmethod
    def _read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what :meth:`read` yields, without the check of the files."""

    def check_unchanged(self) -> None:
        """Check that no file was rewritten, truncated or replaced since it was opened.

        The values of a mapped tensor are those that the file has when they are used, not when it was opened: other
        weights if the file is rewritten, and the end of the process (SIGBUS) if it is truncated. Check before and
        after the values are used.

        Raises:
            CheckpointUnreadableError: a file changed; names it.
        """
        for path, state in self._opened_as.items():
            if (found := _file_state(path)) != state:
                raise CheckpointUnreadableError(
                    f"{path} changed while it was read: {_difference(state, found)}",
                    expected="files that no other program writes until the import has ended",
                    run=f"ls -lL {path}",
                )

    def _open(self, path: Path) -> None:
        """Record the state of the file at `path`, which is read next; a missing file is the reader's error."""
        if (state := _file_state(path)) is not None:
            self._opened_as[path] = state


@dataclass(frozen=True, kw_only=True)
class _FileState:
    """What differs between a file and a changed one."""

    file: tuple[int, int]
    """Device and inode: another file has the name if they differ."""
    size_bytes: int
    mtime_ns: int


def _file_state(path: Path) -> _FileState | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _FileState(file=(found.st_dev, found.st_ino), size_bytes=found.st_size, mtime_ns=found.st_mtime_ns)


def _difference(opened: _FileState, found: _FileState | None) -> str:
    if found is None:
        return "it was removed"
    if found.file != opened.file:
        return "another file replaced it"
    if found.size_bytes != opened.size_bytes:
        return f"it had {opened.size_bytes} bytes and has {found.size_bytes}"
    return "it was rewritten"


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Check that the tensors `found`, by the student's names, are those of a model of `config`.

    Raises:
        CheckpointContentError: some are missing, unexpected or of another shape; the error names them.
    """

    def refuse(what: str) -> CheckpointContentError:
        return CheckpointContentError(f"{where}: {what}", expected="the tensors of the model in the configuration")

    if config.n_layers > len(found):  # before parameter_shapes builds a module for each layer
        raise refuse(f"{len(found)} tensors, fewer than {config.n_layers} layers")
    expected = parameter_shapes(config)
    if missing := [name for name in expected if name not in found]:
        raise refuse(f"{_named(missing)} missing")
    if unexpected := [name for name in found if name not in expected]:
        raise refuse(f"{_named(unexpected)} not part of the model")
    for name, shape in found.items():
        if shape != expected[name]:
            raise refuse(f"{name} has shape {shape}, and the configuration requires {expected[name]}")


def _named(names: list[str]) -> str:
    some = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{some}{more} {'is' if len(names) == 1 else 'are'}"


def by_elements(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names of types, the one with the most elements first."""
    return tuple(sorted(counts, key=lambda name: (-counts[name], name)))


def same_values(first: Tensor, second: Tensor) -> bool:
    """Return whether two memory-mapped tensors are equal. Parts are compared, so that neither is copied."""
    return first.shape == second.shape and all(
        bool(torch.equal(a, b)) for a, b in zip(first.split(1024), second.split(1024), strict=True)
    )
