"""The agreement matrix: every format of a model, on the same text, against the checkpoint's model.

A format is anything that gives logits for token ids. To add a row, add a :class:`Format` to :func:`groups_of` and a
line to `core.matrix.FORMATS`.

Legend: N tokens of a sequence, T the length that it is padded to, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import msgspec
import torch

from coremill.core.config import ConvertConfig, ExportConfig, GgufType, ImportedVerify, VerifyConfig
from coremill.core.contract import Contract, Frontend, ShapeSet, read_contract, shape_key
from coremill.core.digest import digest, file_digest
from coremill.core.documents import read_json
from coremill.core.errors import ConfigError, ContractMismatchError, CoremillError, DigestError
from coremill.core.gates import PlatformReason, most_of
from coremill.core.layout import parity_report
from coremill.core.matrix import (
    COREML,
    EAGER,
    FORMATS,
    GGUF,
    MIL_FLOAT32,
    MIL_REFERENCE,
    TORCH_EXPORT,
    TORCHSCRIPT,
    TRANSFORMERS,
    AgreementMatrix,
    FormatFailed,
    FormatMeasured,
    FormatNotRun,
    FormatRow,
    Measure,
    Tolerance,
    all_within,
    outside,
)
from coremill.core.parity import GgufParity, HuggingFaceParity, RelativeBound
from coremill.coreml.export import capture
from coremill.coreml.graph import Program, as_input, check_main, load_program, run_program
from coremill.coreml.package import check_package
from coremill.data.prompts import Compared, Prompts, load_prompts
from coremill.formats.gguf.parity import BOUNDS
from coremill.formats.huggingface.parity import load_model
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.measures import Comparison, Float32Array
from coremill.model.checkpoint import Checkpoint, check_vocabulary, load_checkpoint
from coremill.model.float32 import Float32Bounds
from coremill.model.reference import Reference
from coremill.model.student import LOGITS
from coremill.verification.backends import core_ml_runner, has_core_ml, reference_runner
from coremill.verification.main_checks import Outputs, perplexity_of
from coremill.verification.rounding import MIN_SQNR_DB, are_rounded, rounded_reference, wide_runner
from coremill.verification.verify import lane_of

log = logging.getLogger(__name__)

_FLOAT32 = "the checkpoint in float32"
_AGAIN = "coremill status"
_ROUNDED = "the checkpoint in float32, its weights rounded as the package's"

Run = Callable[[Sequence[int]], Mapping[str, Float32Array]]
"""The outputs by name, (N or T, …) each, for N ≤ T token ids; `logits` among them."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """The artifacts of one run that are compared."""

    run: str
    checkpoint: Path
    tokenizer: Path
    prompts: Path
    """What the model is run on: a directory with texts or with a held-out set."""
    contract: Path
    """Next to the program that it describes."""
    package: Path
    hf: Path | None
    """The Hugging Face directory; None if the run writes none."""
    hf_dtype: str
    """The dtype of its tensors."""
    gguf: Mapping[GgufType, Path]
    """The files that the run writes, by type."""


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """One format of the model."""

    name: str
    load: Callable[[], AbstractContextManager[Run]]
    """Called once, when its row is measured; the context is closed before the next row is measured."""
    is_float32: bool = False
    """Whether it computes in float32 with the reference's weights: then float32 rounding bounds its errors."""
    not_run: FormatNotRun | None = None
    """The reason why this machine cannot run it, or None."""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Formats that are compared with one reference."""

    reference: str
    make: Callable[[], Run]
    formats: tuple[Format, ...]


def agreement_matrix(
    subject: Subject,
    verify: VerifyConfig,
    convert: ConvertConfig,
    *,
    seq_len: int | None,
    chosen: Collection[str],
) -> AgreementMatrix:
    """Run the formats `chosen` on the inputs of verification, at one length, and compare them.

    Args:
        seq_len: the length at which every format runs; None for the contract's primary shape.
        chosen: names of formats; the rows of the others are `not_run`.

    Raises:
        DocumentError, SchemaVersionError: the contract is not valid.
        ContractMismatchError: the contract describes another checkpoint, program or package.
        ConfigError: the graph does not run at `seq_len`.
        PackageError, DigestError: the package is broken, or was altered after it was saved.
        CoremillError: the checkpoint, the tokenizer or the texts are unreadable or do not fit together.
    """
    contract = read_contract(subject.contract)
    check_main(contract)
    seq_len = _checked_length(contract, seq_len)
    reads_package = any(FORMATS[name].reads == "package" for name in chosen)
    _check_digests(subject, contract, reads_package=reads_package)
    checkpoint = load_checkpoint(subject.checkpoint)
    prompts = load_prompts(subject.tokenizer, subject.prompts, rows=verify.rows)
    check_vocabulary(checkpoint, prompts.tokenizer)
    compared = list(prompts.compared(seq_len))
    groups = groups_of(subject, contract, checkpoint, prompts, convert, seq_len)
    formats = [each for group in groups for each in group.formats]
    measured = _Measured(compared, verify)
    found = [row for group in groups for row in measured.rows(group, chosen)]
    judged = max((row.judged for row in found if isinstance(row, FormatMeasured)), default=0)
    errors = {row.format: row.max_abs_err for row in found if isinstance(row, FormatMeasured)}
    worst = max((errors.get(each.name, 0.0) for each in formats if each.is_float32), default=0.0)
    bounds = Float32Bounds(Reference.of(checkpoint), [each.ids for each in compared])
    float32 = bounds.bound(LOGITS, worst / measured.largest if measured.largest else 0.0)
    tolerances = _tolerances(formats, verify, float32, measured.largest, judged)
    rows = tuple(
        msgspec.structs.replace(row, outside=outside(row, tolerances)) if isinstance(row, FormatMeasured) else row
        for row in found
    )
    return AgreementMatrix(
        run=subject.run,
        lane=lane_of(contract),
        shape=shape_key(seq_len),
        sequences=len(compared),
        checkpoint_digest=contract.checkpoint_digest,
        contract_digest=file_digest(subject.contract),
        package_digest=digest(subject.package) if reads_package else None,
        argmax_margin=verify.argmax_margin,
        tolerances=tolerances,
        rows=rows,
        within=all_within(rows),
    )


def _checked_length(contract: Contract, seq_len: int | None) -> int:
    working = contract.working_lengths
    if seq_len is None or seq_len in working:
        return contract.shapes.primary if seq_len is None else seq_len
    raise ConfigError(
        f"the graph does not run at {shape_key(seq_len)}", expected=f"one of {', '.join(map(shape_key, working))}"
    )


def _check_digests(subject: Subject, contract: Contract, *, reads_package: bool) -> None:
    """Check that the contract describes these files, before anything is run."""
    graph = subject.contract.parent / contract.graph
    found = {
        f"{subject.checkpoint}": (file_digest(subject.checkpoint), contract.checkpoint_digest),
        f"{graph}": (file_digest(graph), contract.graph_digest),
    }
    if reads_package:
        facts = check_package(subject.package)
        found[f"the contract of {subject.package}"] = (facts.contract_digest, file_digest(subject.contract))
    for what, (is_digest, expected) in found.items():
        if is_digest != expected:
            raise ContractMismatchError(
                f"{what} is {is_digest}",
                expected=f"{expected}, as {subject.contract} records",
                run=_AGAIN,
            )


# The formats


def groups_of(
    subject: Subject,
    contract: Contract,
    checkpoint: Checkpoint,
    prompts: Prompts,
    convert: ConvertConfig,
    seq_len: int,
) -> tuple[Group, ...]:
    """Return the rows of the matrix."""

    def padded(run: Run) -> Run:
        return lambda ids: run([*ids, *[prompts.pad_id] * (seq_len - len(ids))])

    is_rounded = are_rounded(checkpoint, convert)
    is_float32 = convert.compute_precision == "float32"
    needs_mac = FormatNotRun(
        format=COREML, reason="Core ML runs on macOS only", platform_reason=PlatformReason.NEEDS_MACOS
    )
    no_directory = "the configuration's `formats` do not include it"
    unknown_rounding = FormatNotRun(
        format=MIL_FLOAT32,
        reason="a weight is outside float16's range, so the conversion does not round the weights",
    )

    def program(frontend: Frontend) -> Run:
        return padded(_program_run(_program(frontend, subject, contract, checkpoint), contract))

    return (
        Group(
            reference=_FLOAT32,
            make=lambda: Reference.of(checkpoint).run,
            formats=(
                Format(name=EAGER, is_float32=True, load=lambda: nullcontext(padded(Reference.of(checkpoint).run))),
                Format(name=TORCHSCRIPT, is_float32=True, load=lambda: nullcontext(program("torchscript"))),
                Format(name=TORCH_EXPORT, is_float32=True, load=lambda: nullcontext(program("torch-export"))),
                Format(
                    name=MIL_REFERENCE,
                    load=lambda: nullcontext(padded(reference_runner(subject.package, contract).run)),
                ),
                Format(
                    name=COREML,
                    load=lambda: nullcontext(padded(core_ml_runner(subject.package, contract).run)),
                    not_run=None if has_core_ml() else needs_mac,
                ),
                Format(
                    name=TRANSFORMERS,
                    is_float32=subject.hf_dtype == "float32",
                    load=lambda: nullcontext(padded(_transformers_run(subject.hf or Path(), contract))),
                    not_run=None if subject.hf else FormatNotRun(format=TRANSFORMERS, reason=no_directory),
                ),
                *_gguf_formats(subject, contract, seq_len),
            ),
        ),
        Group(
            reference=_ROUNDED,
            make=lambda: rounded_reference(checkpoint, convert).run,
            formats=(
                Format(
                    name=MIL_FLOAT32,
                    load=lambda: nullcontext(padded(wide_runner(subject.package, contract).run)),
                    not_run=None if is_rounded or is_float32 else unknown_rounding,
                ),
            ),
        ),
    )


def _gguf_formats(subject: Subject, contract: Contract, seq_len: int) -> Iterator[Format]:
    absent = "the configuration's `formats` or [gguf] types do not include it"
    for name, kind in GGUF.items():
        path = subject.gguf.get(kind, Path())
        yield Format(
            name=name,
            is_float32=kind == "f32" and kind in subject.gguf,
            load=functools.partial(_llama_cpp, path, contract, context=seq_len),
            not_run=None if kind in subject.gguf else FormatNotRun(format=name, reason=absent),
        )


def _check_proved(files: Iterable[Path], proof: HuggingFaceParity | GgufParity, contract: Contract) -> None:
    """Check that files are as verified, and were written from the checkpoint that is compared.

    Raises:
        ContractMismatchError, DigestError: they are not.
    """
    for path in files:
        if proof.checkpoint_digest != contract.checkpoint_digest:
            raise ContractMismatchError(
                f"{path} was made from {proof.checkpoint_digest}", expected=contract.checkpoint_digest, run=_AGAIN
            )
        if (found := file_digest(path)) != (expected := proof.digests.get(path.name)):
            raise DigestError(
                f"{path} is {found}, but {expected} was verified", expected="the file as written", run=_AGAIN
            )


def _transformers_run(folder: Path, contract: Contract) -> Run:
    proof = read_json(parity_report(folder), HuggingFaceParity)
    _check_proved([folder / name for name in proof.files], proof, contract)
    model = load_model(folder)

    def run(ids: Sequence[int]) -> dict[str, Float32Array]:
        with torch.no_grad():
            return {LOGITS: model(input_ids=as_input(ids).long(), use_cache=False).logits[0].numpy()}

    return run


@contextmanager
def _llama_cpp(path: Path, contract: Contract, *, context: int) -> Iterator[Run]:
    with LlamaCpp(path, context=context, threads=torch.get_num_threads()) as model:
        # After loading, which names the tensor at which a file is truncated.
        _check_proved([path], read_json(parity_report(path.parent), GgufParity), contract)
        yield lambda ids: {LOGITS: model.logits(ids)}


def _program(frontend: Frontend, subject: Subject, contract: Contract, checkpoint: Checkpoint) -> Program:
    """The run's own program, or one made from its checkpoint with the other front end."""
    if frontend == contract.frontend:
        return load_program(subject.contract.parent / contract.graph, frontend)
    working = contract.working_lengths
    shapes = ShapeSet(primary=contract.shapes.primary, all=tuple(working))
    with tempfile.TemporaryDirectory(prefix="coremill-") as folder:
        path = Path(folder) / "program"
        with path.open("wb") as file:
            capture(checkpoint, shapes, ExportConfig(frontend=frontend), file)
        return load_program(path, frontend, where=f"the {frontend} program of {subject.checkpoint}")


def _program_run(program: Program, contract: Contract) -> Run:
    def run(ids: Sequence[int]) -> dict[str, Float32Array]:
        outputs = run_program(program, ids)
        return {spec.name: tensor[0].numpy() for spec, tensor in zip(contract.outputs, outputs, strict=True)}

    return run


# The measures


class _Measured:
    """Runs formats on the same sequences, and keeps the logits of one format at a time."""

    def __init__(self, compared: Sequence[Compared], verify: VerifyConfig) -> None:
        self._compared = compared
        self._margin = verify.argmax_margin
        self.largest = 0.0
        """The largest magnitude of the first reference's logits."""

    def rows(self, group: Group, chosen: Collection[str]) -> list[FormatRow]:
        """Return the rows of a group; the reference runs only if a row does."""
        runnable = [each for each in group.formats if each.name in chosen and each.not_run is None]
        expected: list[Outputs] = []
        if runnable:
            reference = group.make()
            expected = [reference(each.ids) for each in self._compared]
            largest = max(float(max(logits[LOGITS].max(), -logits[LOGITS].min())) for logits in expected)
            self.largest = self.largest or largest
        return [self._row(each, group, expected, chosen) for each in group.formats]

    def _row(self, subject: Format, group: Group, expected: list[Outputs], chosen: Collection[str]) -> FormatRow:
        if subject.name not in chosen:
            return FormatNotRun(format=subject.name, reason="not selected by --formats")
        if subject.not_run is not None:
            return subject.not_run
        log.info("%s …", subject.name)
        try:
            return self._measure(subject, group, expected)
        except CoremillError as failure:
            error = failure.found
        except (RuntimeError, ValueError) as failure:  # from torch at this length, or because logits are not finite
            error = f"{type(failure).__name__}: {failure}"
        return FormatFailed(format=subject.name, error=error)

    def _measure(self, subject: Format, group: Group, expected: list[Outputs]) -> FormatMeasured:
        by_output: dict[str, Comparison] = {}
        with subject.load() as run:
            for (ids, judged, is_scored), wanted in zip(self._compared, expected, strict=True):
                found = run(ids)
                for name in wanted.keys() & found.keys():
                    comparison = by_output.setdefault(name, Comparison(margin=self._margin))
                    tokens = ids if is_scored and name == LOGITS else None
                    comparison.add(wanted[name], found[name][: len(ids)], judged=judged, tokens=tokens)
                del found  # it may take 800 MB; free it before the next one is computed
        if LOGITS not in by_output:
            raise ValueError(f"it has no output `{LOGITS}`")
        figures = {name: comparison.result() for name, comparison in by_output.items()}
        logits = figures[LOGITS]
        return FormatMeasured(
            format=subject.name,
            reference=group.reference,
            max_abs_err=max(each.max_abs_err for each in figures.values()),
            sqnr_db=min(each.sqnr_db for each in figures.values()),
            kl_nats=logits.kl_nats,
            top1_agreement=logits.top1_agreement,
            positions=logits.positions,
            judged=logits.judged,
            excluded=logits.excluded,
            perplexity=perplexity_of(logits),
            outside=(),
        )


def _tolerances(
    formats: Sequence[Format], verify: VerifyConfig, float32: RelativeBound, largest: float, judged: int
) -> tuple[Tolerance, ...]:
    """Return the bounds of each row, with their sources.

    Args:
        float32: the bound of float32's errors.
        largest: the largest magnitude of the reference's logits; 0 if it did not run.
        judged: the positions that the top-1 agreement considers; 0 if nothing was compared.
    """
    # GGUF files have their own bounds: [verify] is not meant for types of few bits.
    names = tuple(each.name for each in formats if each.name not in GGUF)
    in_float32 = tuple(each.name for each in formats if each.is_float32)
    configured = {
        Measure.KL_NATS: ("max_kl_nats", verify.max_kl_nats),
        Measure.EXCLUDED_SHARE: ("max_excluded_share", most_of(judged, verify.max_excluded_share) / max(judged, 1)),
    }
    if isinstance(verify, ImportedVerify):
        configured[Measure.PERPLEXITY_CHANGE] = ("max_perplexity_change", verify.max_perplexity_change)
    return (
        Tolerance(
            measure=Measure.MAX_ABS_ERR,
            bound=float32.limit * largest,
            rows=in_float32,
            source=f"{float32.reason or 'float32 rounding, as at export'}: {float32.limit:g} of the largest logit, "
            f"{largest:.4g}",
        ),
        Tolerance(
            measure=Measure.SQNR_DB,
            bound=verify.min_sqnr_db,
            rows=tuple(name for name in names if name != MIL_FLOAT32),
            source="min_sqnr_db in [verify]",
        ),
        Tolerance(
            measure=Measure.SQNR_DB,
            bound=MIN_SQNR_DB,
            rows=(MIL_FLOAT32,),
            source="float32 rounding; both sides have the same rounded weights",
        ),
        Tolerance(
            measure=Measure.TOP1_AGREEMENT,
            bound=1.0,
            rows=names,
            source=f"every position except ties, by argmax_margin in [verify]: {verify.argmax_margin:g} logits",
        ),
        *(
            Tolerance(measure=measure, bound=bound, rows=names, source=f"{key} in [verify]")
            for measure, (key, bound) in configured.items()
        ),
        *_gguf_tolerances(formats),
    )


def _gguf_tolerances(formats: Sequence[Format]) -> Iterator[Tolerance]:
    """Yield the bounds of the run's GGUF files; the bound for float32 rounding covers all rows."""
    for name, kind in GGUF.items():
        if not any(each.name == name and each.not_run is None for each in formats):
            continue
        if (kl := BOUNDS.get((kind, "kl_nats"))) is not None:
            yield Tolerance(measure=Measure.KL_NATS, bound=kl.limit, rows=(name,), source=kl.source)
