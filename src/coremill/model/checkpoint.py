"""The checkpoint format: a `torch.save` archive of plain types and tensors; nothing else is unpickled."""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import msgspec
import torch
from torch import Tensor

from coremill.core.config import ModelConfig
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.core.documents import Document, from_builtins
from coremill.core.errors import (
    CheckpointContentError,
    CheckpointUnreadableError,
    UnsafeCheckpointError,
    VocabularyMismatchError,
)
from coremill.core.plain import Plain
from coremill.core.publish import replacing
from coremill.model.student import Student, parameter_shapes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_RETRAIN = "python -m coremill.training.run_toy_distill --help"
_TENSOR_NAMES = re.compile(r"torch\._utils\._rebuild_tensor_v2|torch\.\w+Storage|collections\.OrderedDict")
"""The names that the pickle of a plain tensor imports."""

_CHECKED_ELEMENTS = 1 << 20

IMPORTED_FROM = "imported_from"
"""The key of `training` that holds the origin of an imported checkpoint."""

Training = dict[str, Any]
"""How a checkpoint was made, in plain types: the losses, the seed, the dataset's digest and so on; or what it was
imported from."""


class CheckpointHead(Document):
    """The contents of a checkpoint without its tensors: the keys of the archive's dict, except `state_dict`."""

    model_type: str
    model_arch: ModelArch
    config: ModelConfig
    step: int
    """Optimizer steps taken by coremill; 0 for an untrained or an imported model."""
    tokenizer: TokenizerRef
    training: Training

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"`step` must not be negative, found {self.step}")
        if self.config.arch != self.model_arch:
            raise ValueError(f"`model_arch` is {self.model_arch}, `config.arch` is {self.config.arch}")
        # Rows beyond the tokens are padding, which makes the embedding a size that trains faster.
        if self.config.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"`config.vocab_size` is {self.config.vocab_size}, `tokenizer.vocab_size` is "
                f"{self.tokenizer.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model at one step of its training.

    Raises:
        CheckpointContentError: the parts contradict each other, a tensor is missing, unexpected, of the wrong
            shape or not of floats, or contains NaN or infinite values.
    """

    model_type: str
    model_arch: ModelArch
    config: ModelConfig
    step: int
    tokenizer: TokenizerRef
    state_dict: Mapping[str, Tensor]
    training: Training = field(default_factory=dict)
    where: InitVar[str] = "checkpoint"
    """The name of the checkpoint in errors, such as its path."""
    run: InitVar[str | None] = _RETRAIN
    """The command that errors suggest."""

    @property
    def imported(self) -> bool:
        """Whether the weights were trained elsewhere and imported; `step` is then 0."""
        return IMPORTED_FROM in self.training

    def __post_init__(self, where: str, run: str | None) -> None:
        _head(self, where=where)
        _check_tensors(self.state_dict, self.config, where=where, run=run)


class TokenizerLike(Protocol):
    @property
    def vocab_size(self) -> int: ...
    @property
    def digest(self) -> str: ...


def checkpoint_of(
    student: Student,
    *,
    model_type: str,
    step: int,
    tokenizer: TokenizerRef,
    training: Training | None = None,
) -> Checkpoint:
    """Return a checkpoint of `student` as it is now; later changes to the student do not affect it."""
    return Checkpoint(
        model_type=model_type,
        model_arch=student.config.arch,
        config=student.config,
        step=step,
        tokenizer=tokenizer,
        state_dict={name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()},
        training=training or {},
    )


def save_checkpoint(path: Path, ckpt: Checkpoint, *, before_replacing: Callable[[], None] | None = None) -> None:
    """Write `ckpt` to `path` atomically; equal checkpoints give equal bytes, whatever the file's name.

    Args:
        before_replacing: called when everything is written; if it raises, `path` is left unchanged.

    Raises:
        OutputError: `path` cannot be written; an existing file is left unchanged.
    """
    parts = msgspec.to_builtins(_head(ckpt, where=str(path)))
    head = {sys.intern(key): _canonical(parts[key]) for key in sorted(parts)}
    tensors = {sys.intern(name): _apart(ckpt.state_dict[name]) for name in sorted(ckpt.state_dict)}
    with replacing(path) as file:
        out = _Outlet(file)
        try:
            # Given a path, torch.save would write its stem into the archive.
            torch.save({**head, "state_dict": tensors}, out)
        except Exception:
            if out.failure is not None:  # torch reports a full disk as an unexpected position
                raise out.failure from None
            raise
        if before_replacing is not None:
            before_replacing()


class _Outlet(io.BytesIO):
    """Passes what is written to a file, and keeps the error if it cannot be written.

    Of io.BytesIO it only has the type, which torch.save declares.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return self._file.write(data)
        except OSError as failure:
            self.failure = failure
            raise


def _apart(tensor: Tensor) -> Tensor:
    """Return the tensor, contiguous and with its own storage of the same size; not a copy if it is that already.

    A view would write its whole storage into the archive, and two views of one storage would be written once.
    """
    value = tensor.detach().cpu().contiguous()
    return torch.from_numpy(value.reshape(-1).view(torch.uint8).numpy()).view(value.dtype).view(value.shape)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check the checkpoint at `path`; its tensors are memory-mapped, in the dtypes they were saved in.

    The file must not change while they are used. They may be written to; that does not reach the file.

    Raises:
        CheckpointUnreadableError: the file is missing, truncated, damaged, or not a checkpoint.
        UnsafeCheckpointError: it contains more than plain types and tensors; none of that was executed.
        SchemaVersionError: its major version is unknown.
        CheckpointContentError: a part is missing, or contradicts the others.
    """
    value = _read_plain(Path(path))
    if not isinstance(value, dict):
        raise CheckpointContentError(
            f"{path}: found {type(value).__name__}", expected="a dict as coremill saves it", run=_RETRAIN
        )
    tensors = value.pop("state_dict", None)
    where = str(path)
    head = from_builtins(value, CheckpointHead, where=where, error=CheckpointContentError, run=_RETRAIN)
    return Checkpoint(
        model_type=head.model_type,
        model_arch=head.model_arch,
        config=head.config,
        step=head.step,
        tokenizer=head.tokenizer,
        state_dict=tensors,
        training=head.training,
        where=where,
    )


def build_student(ckpt: Checkpoint) -> Student:
    """Return the checkpoint's model in float32 and evaluation mode, with copies of the weights."""
    student = Student(ckpt.config)
    student.load_state_dict(ckpt.state_dict)
    student.eval()
    return student


def check_vocabulary(ckpt: Checkpoint, tokenizer: TokenizerLike) -> None:
    """Check that `tokenizer` is the one that the model was trained with.

    Raises:
        VocabularyMismatchError: its size or its digest differs.
    """
    if tokenizer.vocab_size != ckpt.tokenizer.vocab_size:
        raise VocabularyMismatchError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {ckpt.tokenizer.vocab_size}",
            expected="the tokenizer.json that the model was trained with",
            run=_RETRAIN,
        )
    if tokenizer.digest != ckpt.tokenizer.digest:
        raise VocabularyMismatchError(
            f"the tokenizer is {tokenizer.digest}, the model was trained with {ckpt.tokenizer.digest}",
            expected="the tokenizer.json that the model was trained with",
            run=_RETRAIN,
        )


def _head(ckpt: Checkpoint, *, where: str) -> CheckpointHead:
    """Return the checkpoint's head, checked as if it had been read."""
    value = {
        "schema_version": CheckpointHead.format_version,
        "model_type": ckpt.model_type,
        "model_arch": msgspec.to_builtins(ckpt.model_arch),
        "config": msgspec.to_builtins(ckpt.config),
        "step": ckpt.step,
        "tokenizer": msgspec.to_builtins(ckpt.tokenizer),
        "training": dict(ckpt.training),
    }
    return from_builtins(value, CheckpointHead, where=where, error=CheckpointContentError)


def _canonical(value: Plain) -> Plain:
    """Return `value` with sorted keys, interned strings and no shared containers.

    Pickle writes an object that it has seen before as a reference, so that without this, equal values that consist
    of different objects would have different bytes.
    """
    if isinstance(value, dict):
        return {sys.intern(key): _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


def _read_plain(path: Path) -> Any:
    """Return the contents of the archive at `path`, which are plain types and tensors."""
    try:
        file = path.open("rb")
    except OSError as failure:
        raise CheckpointUnreadableError(
            f"cannot read {path}: {failure.strerror}", expected="a readable checkpoint", run=_RETRAIN
        ) from failure
    # The file is opened once, so that torch reads what was checked even if the path is replaced meanwhile.
    with file:
        pickled = _pickle_in_archive(path, file)
        # torch's reader refuses these names too, but this check handles every pickle protocol and lists them all.
        if names := [name for name in _names_in(pickled) if not _TENSOR_NAMES.fullmatch(name)]:
            raise _unsafe(path, f"names {', '.join(names)}")
        if pickled[:2] != b"\x80\x02":
            raise _unreadable(path, "is not a checkpoint: its pickle is not of protocol 2, which torch.save writes")
        try:
            # torch maps only what it opens by a path; this path is the open file's, even if it was replaced.
            return torch.load(f"/dev/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as failure:
            raise _unsafe(path, str(failure).splitlines()[0]) from failure
        except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError) as failure:
            # torch's unpickler also raises these on a pickle that torch.save did not write.
            raise _unreadable(path, f"is not a checkpoint: {type(failure).__name__}: {failure}") from failure


def _pickle_in_archive(path: Path, file: BinaryIO) -> bytes:
    """Return the pickle of a complete `torch.save` archive; every checksum is compared, which torch does not do."""
    try:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            if names := _names_in(file):
                raise _unsafe(path, f"is a bare pickle that names {', '.join(names)}")
            file.seek(0)
            what = "is truncated" if file.read(4) == b"PK\x03\x04" else "is not a checkpoint"
            raise _unreadable(path, f"{what}: {file.seek(0, os.SEEK_END)} bytes")
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise _unreadable(path, f"is damaged: the checksum of {damaged} is wrong")
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise _unreadable(path, "is a TorchScript program, not a checkpoint")
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise _unreadable(path, "is a zip archive, not a checkpoint")
            # torch treats an entry with the directory attribute as empty and leaves its tensor uninitialised.
            if odd := [entry.filename for entry in archive.infolist() if entry.external_attr]:
                raise _unreadable(path, f"is damaged: {odd[0]} has attributes that torch.save does not write")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as failure:
        # zipfile raises these for an invalid header, compression or offset of an entry.
        raise _unreadable(path, f"is damaged: {failure}") from failure


def _unreadable(path: Path, found: str) -> CheckpointUnreadableError:
    return CheckpointUnreadableError(f"{path} {found}", expected="an archive that coremill saved", run=_RETRAIN)


def _unsafe(path: Path, found: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} {found}", expected="only plain types and tensors; nothing in the file was executed", run=_RETRAIN
    )


def _names_in(pickled: bytes | BinaryIO) -> list[str]:
    """Return each `module.name` that the pickle would import, read from its opcodes; [] if it is not a pickle."""
    names: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))  # pushed just before, module then name
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        return []
    return list(dict.fromkeys(names))


def _check_tensors(
    tensors: Mapping[str, Tensor] | None, config: ModelConfig, *, where: str, run: str | None
) -> None:
    """Check that `tensors` are finite floats, and exactly those of a model of `config`."""

    def refuse(found: str) -> CheckpointContentError:
        return CheckpointContentError(
            f"{where}: {found}", expected="the tensors of a model of the checkpoint's `config`", run=run
        )

    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise refuse(
            "`state_dict` is missing" if tensors is None else "`state_dict` contains something other than tensors"
        )
    if config.n_layers > len(tensors):  # before `parameter_shapes`, whose cost grows with the layers
        raise refuse(f"`state_dict` contains {len(tensors)} tensors, fewer than `config` has layers")
    expected = parameter_shapes(config)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise refuse(f"`state_dict` lacks {', '.join(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise refuse(f"`state_dict` contains {', '.join(map(str, unexpected))}, which the model does not have")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise refuse(f"`state_dict[{name!r}]` has shape {tuple(tensor.shape)}, not {expected[name]}")
        if not tensor.is_floating_point():
            raise refuse(f"`state_dict[{name!r}]` is {tensor.dtype}, not of floats")
        if bad := _not_finite(tensor):
            raise refuse(f"`state_dict[{name!r}]` has {bad} NaN or infinite values")


def _not_finite(tensor: Tensor) -> int:
    """Count the values that are NaN or infinite, in parts, so that no second tensor of that size is needed."""
    parts = tensor.reshape(-1).split(_CHECKED_ELEMENTS)
    # A finite sum shows that all values are finite, in a fifth of the time; a sum of large values may overflow.
    return sum(
        int((~torch.isfinite(part)).sum())
        for part in parts
        if not math.isfinite(part.sum(dtype=torch.promote_types(part.dtype, torch.float32)))
    )
