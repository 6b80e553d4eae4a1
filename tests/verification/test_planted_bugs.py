"""The graph, broken on purpose: which check refuses each bug, at the export and, were the export blind, afterwards.

Each bug of a graph is planted twice. The first time the export meets it, which compares in float32 what it saved
with the checkpoint's model. The second time that comparison is switched off, so that the contract describes the
broken graph and the conversion is content with it: verification has nothing but what the package computes. The bugs
of a converter follow, and what is altered once a package was saved.

The model has random weights, a halt head and a cache.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import pytest
import torch
from tests.converted import prove_source

from coremill.conversion import convert_coreml, export_pytorch
from coremill.conversion.verify_contract import run_stage
from coremill.core import layout
from coremill.core.config import ExportConfig
from coremill.core.contract import PackageFunction, ShapeFailed, ShapeOk
from coremill.core.documents import read_json
from coremill.core.errors import ContractMismatchError, DigestError, ExportError
from coremill.core.gates import Outcome, Severity, must_gates_ok
from coremill.core.reports import Backend, StatefulMeasured, VerificationReport
from coremill.coreml import convert, decoder, export
from coremill.coreml.converter import convert_function
from coremill.coreml.decoder import Decode, Decoder, Main, Prefill
from coremill.coreml.package import WEIGHT_FILE
from coremill.measures import sqnr_db
from coremill.mil import MLModel
from coremill.model.checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from coremill.model.student import new_student
from coremill.verification.backends import StatefulRunner
from coremill.verification.cached_checks import MainRows, measure_stateful
from coremill.verification.rounding import MIN_SQNR_DB, are_rounded, rounded_reference, wide_runner

CACHED = ExportConfig(stateful=True, context=48)
STATELESS = ExportConfig()

CAUSALITY = "No position depends on a later token"
PADDING = "Padding does not change the logits"
SQNR = "SQNR at the primary shape"
KL = "KL divergence at the primary shape"
TOP1 = "Top-1 agreement at the primary shape"
PERPLEXITY = "Perplexity matches the checkpoint's"
ROUNDING = "Matches the checkpoint up to weight rounding"
WEIGHTS = "Every weight of the package is the checkpoint's"
PRIMARY = "Primary shape validation succeeds"
INTERFACE = "Inputs, outputs and shapes match the contract"
PREFILL = "Prefill matches main"
DECODE = "Decode from an empty cache matches main"
CONTINUED = "Decode after a prompt matches main"
PROMPT_PADDING = "Prompt padding has no effect"
MATTERS = "Decode depends on the cache"
ANSWERS = "Greedy answers match the checkpoint's"
OTHER_NUMBERS = frozenset({PADDING, ROUNDING, SQNR, KL, TOP1, PERPLEXITY})

Patch = pytest.MonkeyPatch


# The honest build


@pytest.fixture(scope="module")
def models() -> dict[str, object]:
    """The honest functions as the converter gave them, for builds in which another one is broken."""
    return {}


@pytest.fixture(scope="module")
def honest(pristine_imported, models, tmp_path_factory):
    """A finished build; tests only read it."""
    config = msgspec.structs.replace(pristine_imported.config, export=CACHED)
    build = msgspec.structs.replace(pristine_imported, root=tmp_path_factory.mktemp("honest"), config=config)
    for folder in (pristine_imported.dataset, pristine_imported.model):
        shutil.copytree(folder, build.root / folder.name)
    known = load_checkpoint(build.checkpoint)
    arch = msgspec.structs.replace(known.config.arch, use_halt_head=True)
    checkpoint = checkpoint_of(
        new_student(msgspec.structs.replace(known.config, arch=arch), seed=6),
        model_type=config.model_type,
        step=0,
        tokenizer=known.tokenizer,
        training=known.training,
    )
    save_checkpoint(build.checkpoint, checkpoint)
    prove_source(build.checkpoint)
    exported(build)
    with Patch.context() as patch:
        patch.setattr(convert, "convert_function", _recording(models))
        converted(build)
    return build


def _recording(models: dict[str, object]) -> Callable[..., object]:
    def convert_and_keep(program, function, settings):
        models[function.name] = convert_function(program, function, settings)
        return models[function.name]

    return convert_and_keep


def _reusing(models: Mapping[str, object], but: str) -> Callable[..., object]:
    """Converts the function `but` alone."""

    def convert_one(program, function, settings):
        return convert_function(program, function, settings) if function.name == but else models[function.name]

    return convert_one


@pytest.fixture
def build(honest, tmp_path):
    """A copy of the honest build that a test may break."""
    shutil.copytree(honest.root, tmp_path / "build")
    return msgspec.structs.replace(honest, root=tmp_path / "build")


def with_export(build, settings: ExportConfig):
    return msgspec.structs.replace(build, config=msgspec.structs.replace(build.config, export=settings))


def exported(build) -> None:
    export_pytorch.run_stage(build.context("export", "texts", "import"))


def converted(build) -> None:
    convert_coreml.run_stage(build.context("convert", "export"))


def verified(build) -> VerificationReport:
    run_stage(build.context("verify", *build.stages))
    return read_json(layout.verification_report(build.root / "verify"), VerificationReport)


def bad_gates(report: VerificationReport, severity: Severity = Severity.MUST) -> dict[str, str]:
    """The gates that failed, with their reasons; any other that did not pass would be here with none."""
    return {
        gate.name: gate.reason if gate.outcome is Outcome.FAILED else ""
        for gate in report.gates
        if gate.severity is severity and gate.outcome is not Outcome.PASSED and gate.platform_reason is None
    }


# Bugs of a graph


def _in_decoder(patch: Patch, change: Callable[[Decoder], None]) -> None:
    """`change` each decoder right after it was made."""
    make = Decoder.__init__

    def make_and_change(self, *args):
        make(self, *args)
        with torch.no_grad():
            change(self)

    patch.setattr(Decoder, "__init__", make_and_change)


def _in_weights(patch: Patch, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`change` the weight `name` as it is written into the program."""
    weights = export.decoder_weights

    def changed(config, tensors):
        return ((each, change(value) if each == name else value) for each, value in weights(config, tensors))

    patch.setattr(export, "decoder_weights", changed)


def _hide_nothing(self, hidden):
    return hidden.type_as(self.masked) * 0.0


def no_mask(patch: Patch) -> None:
    patch.setattr(Decoder, "mask", _hide_nothing)


def swapped_outputs(patch: Patch) -> None:
    heads = Decoder.heads
    patch.setattr(Decoder, "heads", lambda self, x: heads(self, x)[::-1])


def scaled_weight(patch: Patch) -> None:
    _in_weights(patch, "layers.1.down.weight", lambda weight: weight * 1.01)


def interleaved_rope(patch: Patch) -> None:
    """Rows of queries and keys ordered for pairs (0, 1), (2, 3), …, and a graph that turns (i, i + D/2)."""

    make = decoder.decoder_weights

    def reordered(config, tensors):
        n_rows = (config.n_heads + config.n_kv_heads) * config.head_dim
        for name, weight in make(config, tensors):
            if name.endswith("qkv.weight"):
                pairs = weight[:n_rows].clone().view(-1, config.head_dim // 2, 2, weight.shape[1])
                weight[:n_rows] = pairs.transpose(1, 2).reshape(n_rows, -1)
            yield name, weight

    patch.setattr(export, "decoder_weights", reordered)


def other_epsilon(patch: Patch) -> None:
    """1e-3 in one norm, where the checkpoint has 1e-5; the norm keeps its square root."""
    _in_decoder(patch, lambda made: made.layers[0].input_norm.root_eps.fill_(1e-3**0.5))


def heads_ungrouped(patch: Patch) -> None:
    """Query heads in the checkpoint's order, and keys and values repeated for another."""
    patch.setattr(decoder, "_by_group", lambda rows, attention: rows)


def cache_ignored(patch: Patch) -> None:
    """`decode` writes the cache and attends to its own token alone: what tracing with an empty cache gives."""

    def forward(self, input_ids, position):
        shared = self.decoder
        cos, sin = shared.cos.index_select(0, position), shared.sin.index_select(0, position)
        x = shared.embed_tokens(input_ids)
        for number, layer in enumerate(shared.layers):
            q, k, v = layer.project(x, cos, sin)
            self.write(number, position[0], position[0] + 1, k, v)
            x = layer.finish(x, layer.attend(q, k, v, shared.masked * 0.0))
        return shared.heads(x)

    patch.setattr(Decode, "forward", forward)


def late_angle(patch: Patch) -> None:
    """`decode` turns its token by the angle of the next position; it writes and hides where it should."""
    make = Decode.__init__

    def make_late(self, shared, context):
        make(self, shared, context)
        self.late = torch.nn.Module()
        self.late.register_buffer("cos", shared.cos.roll(-1, 0))
        self.late.register_buffer("sin", shared.sin.roll(-1, 0))

    def forward(self, input_ids, position):
        shared = self.decoder
        cos, sin = self.late.cos.index_select(0, position), self.late.sin.index_select(0, position)
        mask = shared.mask((shared.positions[: self.context] > position).unsqueeze(0))
        x = shared.embed_tokens(input_ids)
        for number, layer in enumerate(shared.layers):
            q, k, v = layer.project(x, cos, sin)
            self.write(number, position[0], position[0] + 1, k, v)
            x = layer.finish(x, self._attend(layer, number, q, mask))
        return shared.heads(x)

    patch.setattr(Decode, "__init__", make_late)
    patch.setattr(Decode, "forward", forward)


def row_after_the_last(patch: Patch) -> None:
    """`prefill` scores the token at `length`, which is padding."""
    forward = Prefill.forward

    def late(self, input_ids, length):
        n = input_ids.shape[1]
        return forward(self, input_ids, torch.minimum(length + 1, self.decoder.positions[n : n + 1]))

    patch.setattr(Prefill, "forward", late)


def padding_seen(patch: Patch) -> None:
    forward = Prefill.forward

    def seeing(self, input_ids, length):
        with Patch.context() as inner:
            inner.setattr(Decoder, "mask", _hide_nothing)
            return forward(self, input_ids, length)

    patch.setattr(Prefill, "forward", seeing)


def shifted_rows(patch: Patch) -> None:
    """`prefill` writes each row of the cache one place late."""
    write = Prefill.write

    def late(self, layer, start, end, k, v):
        write(self, layer, start + 1, end + 1, k, v)

    patch.setattr(Prefill, "write", late)


class Bug(msgspec.Struct, frozen=True):
    plant: Callable[[Patch], None]
    refused: str
    """How the export's error begins."""
    gates: frozenset[str]
    """The must-gates that fail where the export is blind."""
    function: str | None = None
    """The function of the package that has it; None where it is in all of them, which then agree with one another:
    `main` has to show it, and is alone there."""


WRONG = "the primary shape T24 failed: differs from the model by "
BUGS = {
    bug.plant.__name__: bug
    for bug in (
        Bug(no_mask, WRONG, OTHER_NUMBERS | {CAUSALITY}),
        Bug(
            swapped_outputs,
            "the primary shape T24 failed: the program returns [1, 24, 2], the model [1, 24, 300]",
            OTHER_NUMBERS | {PRIMARY, CAUSALITY},
        ),
        Bug(interleaved_rope, WRONG, OTHER_NUMBERS | {WEIGHTS}),
        Bug(heads_ungrouped, WRONG, OTHER_NUMBERS | {WEIGHTS}),
        # Float16's own noise is as large.
        Bug(scaled_weight, WRONG, frozenset({ROUNDING, WEIGHTS})),
        Bug(other_epsilon, WRONG, frozenset({ROUNDING, WEIGHTS})),
        Bug(
            cache_ignored,
            "`decode` at position 12 differs",
            frozenset({ROUNDING, DECODE, CONTINUED, MATTERS}),
            "decode",
        ),
        # From an empty cache on, all tokens are late alike, and RoPE is about distances.
        Bug(late_angle, "`decode` at position 12 differs", frozenset({ROUNDING, CONTINUED, WEIGHTS}), "decode"),
        Bug(
            row_after_the_last,
            "`prefill` at position 11 differs",
            frozenset({ROUNDING, PREFILL, PROMPT_PADDING}),
            "prefill_T16",
        ),
        Bug(
            padding_seen,
            "`prefill` at position 11 differs",
            frozenset({ROUNDING, PREFILL, CONTINUED, PROMPT_PADDING}),
            "prefill_T16",
        ),
        # The next token writes over the row that is one place late; the first place is a key of zeros.
        Bug(shifted_rows, "`decode` at position 12 differs", frozenset({ROUNDING, CONTINUED}), "prefill_T16"),
    )
}


@pytest.fixture
def broken(build, models):
    """A build with a bug, exported by an export that compares nothing, then converted as ever."""

    def made(bug: Bug):
        subject = with_export(build, STATELESS) if bug.function is None else build
        with Patch.context() as patch:
            bug.plant(patch)
            patch.setattr(export, "validate", lambda *_: ShapeOk(max_abs_err=0.0))
            patch.setattr(export, "_too_far", lambda *_: None)
            exported(subject)
        with Patch.context() as patch:
            if bug.function is not None:
                patch.setattr(convert, "convert_function", _reusing(models, but=bug.function))
            converted(subject)
        return subject

    return made


def test_the_honest_build_passes_everything(honest):
    report = verified(honest)
    assert bad_gates(report) == bad_gates(report, Severity.SHOULD) == {}
    assert report.gates_ok
    assert all(isinstance(result, ShapeOk) for result in honest.read_contract().shape_validation.values())
    assert rounding_aside_db(honest) > 120


@pytest.mark.parametrize("name", BUGS)
def test_the_export_refuses_it(build, name, monkeypatch):
    before = build.graph.read_bytes()
    BUGS[name].plant(monkeypatch)
    with pytest.raises(ExportError) as caught:
        exported(build)
    assert caught.value.found.startswith(BUGS[name].refused)
    assert build.graph.read_bytes() == before


@pytest.mark.parametrize("name", BUGS)
def test_verification_alone_catches_it(broken, name):
    bug = BUGS[name]
    report = verified(broken(bug))
    bad = bad_gates(report)
    if PRIMARY in bad:  # nothing was measured, and what was not measured did not pass
        assert bug.gates <= bad.keys()
        assert bad.pop(PRIMARY) == "T24: ValueError: logits of shape (24, 2) cannot be compared with (24, 300)"
        assert set(bad.values()) == {""}
        return
    assert bad.keys() - {ANSWERS} == bug.gates  # an answer may come out the same all the same
    assert all(bad.values())
    assert must_gates_ok(report.gates) == (not bug.gates)


# Bugs as small as the noise of float16


def rounding_aside_db(build) -> float:
    """The SQNR of the package's `main` where both sides have the same rounded weights, in float32."""
    contract = build.read_contract()
    checkpoint = load_checkpoint(build.checkpoint)
    assert are_rounded(checkpoint, build.config.convert)
    (ids,) = build.read_prompts().packed(contract.shapes.primary, 1)
    expected = rounded_reference(checkpoint, build.config.convert).run(ids)
    found = wide_runner(build.package, contract).run(ids)
    return min(sqnr_db(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("name", ["scaled_weight", "other_epsilon"])
def test_what_hides_in_the_noise_of_float16_stands_out_with_rounding_aside(broken, name):
    assert 30 < rounding_aside_db(broken(BUGS[name])) < 60 < MIN_SQNR_DB


def cached_rounding_aside(build) -> StatefulMeasured:
    """`prefill` and `decode` against `main`, all with their arithmetic in float32."""
    contract = build.read_contract()
    prompts = build.read_prompts()
    (ids,) = prompts.packed(40, 1)
    main = MainRows(ids, wide_runner(build.package, contract).run(ids), (16, 24, 40), decoded=20)
    models = {
        function.name: MLModel(build.package, function_name=function.name, mode="oracle")
        for function in contract.package_functions
        if function.states
    }
    return measure_stateful(StatefulRunner(models, Backend.MIL_REFERENCE, contract, pad_id=prompts.pad_id), main)


def test_the_honest_functions_with_a_cache_are_main_with_rounding_aside(honest):
    found = cached_rounding_aside(honest)
    assert min(found.prefill_sqnr_db, found.decode_sqnr_db, found.continued_sqnr_db) > 110


@pytest.mark.parametrize("name", ["scaled_weight", "other_epsilon"])
def test_so_it_does_where_decode_alone_has_it(broken, name):
    build = broken(msgspec.structs.replace(BUGS[name], function="decode"))
    assert bad_gates(verified(build)).keys() == {ROUNDING, WEIGHTS}
    found = cached_rounding_aside(build)
    assert found.prefill_sqnr_db > 110
    assert 30 < found.decode_sqnr_db < 60
    assert 30 < found.continued_sqnr_db < 60


# Weights that no prompt of the verification reads


@pytest.fixture(scope="module")
def untied(pristine_imported, tmp_path_factory):
    """A finished build whose embedding is not its unembedding: a row of it changes one token alone."""
    config = msgspec.structs.replace(pristine_imported.config, export=STATELESS)
    build = msgspec.structs.replace(pristine_imported, root=tmp_path_factory.mktemp("untied"), config=config)
    for folder in (pristine_imported.dataset, pristine_imported.model):
        shutil.copytree(folder, build.root / folder.name)
    known = load_checkpoint(build.checkpoint)
    arch = msgspec.structs.replace(known.config.arch, tie_embeddings=False)
    student = new_student(msgspec.structs.replace(known.config, arch=arch), seed=6)
    save_checkpoint(
        build.checkpoint,
        dataclasses.replace(known, model_arch=arch, config=student.config, state_dict=student.state_dict()),
    )
    prove_source(build.checkpoint)
    exported(build)
    converted(build)
    return build


def scaled_row(build, unread: list[int]) -> str:
    def scale(rows: np.ndarray) -> None:
        rows[unread[0]] *= np.float16(1.1)

    build.change_weight("embed_tokens", scale)
    return (
        "main: embed_tokens.weight, stored as 'decoder_embed_tokens_weight': 32 of 9,600 values differ, by up to "
    )


def swapped_rows(build, unread: list[int]) -> str:
    def swap(rows: np.ndarray) -> None:
        rows[unread] = rows[unread[::-1]]

    build.change_weight("embed_tokens", swap)
    return (
        "main: embed_tokens.weight, stored as 'decoder_embed_tokens_weight': 64 of 9,600 values differ, by up to "
    )


def turned_angle(build, unread: list[int]) -> str:
    def turn(rows: np.ndarray) -> None:
        rows[40, 0] = 0.5  # no length is over 40 tokens

    build.change_weight("decoder_cos", turn)
    return "main: cos, stored as 'decoder_cos': 1 of 328 values differ, by up to "


def test_the_untied_build_passes(untied):
    report = verified(untied)
    assert bad_gates(report) == {}
    (gate,) = [gate for gate in report.gates if gate.name == WEIGHTS]
    assert gate.measured == "21 tensors, 37,792 values, in 1 function"


@pytest.mark.parametrize("plant", [scaled_row, swapped_rows, turned_angle])
def test_what_no_prompt_reads_is_caught_by_the_comparison_of_constants_alone(untied, tmp_path, plant):
    build = msgspec.structs.replace(untied, root=tmp_path / "build")
    shutil.copytree(untied.root, build.root)
    prompts = build.read_prompts()
    read = {token for length in (16, 24, 40) for each in prompts.compared(length) for token in each.ids}
    reason = plant(build, sorted(set(range(300)) - read)[-2:])
    bad = bad_gates(verified(build))
    assert bad.keys() == {WEIGHTS}
    assert bad[WEIGHTS].startswith(reason)


# Bugs of the export's and the converter's own work


def test_a_length_at_which_the_graph_fails_is_recorded_and_fails_its_gates(build, monkeypatch):
    """A graph for 24 tokens and fewer: the primary shape works, and the longest does not."""
    subject = with_export(build, STATELESS)
    forward = Main.forward
    with monkeypatch.context() as patch:
        patch.setattr(Main, "forward", lambda self, input_ids: forward(self, input_ids[:, :24]))
        exported(subject)
    error = "the program returns [1, 24, 300], the model [1, 40, 300]"
    assert subject.read_contract().shape_validation["T40"] == ShapeFailed(error=error)
    converted(subject)
    report = verified(subject)
    assert bad_gates(report) == {}
    bad = bad_gates(report, Severity.SHOULD)
    assert bad.pop("All shape enumerations succeed") == f"T40: {error}"
    assert bad.pop("Secondary shapes validate") == f"T40: skipped, because it failed at export: {error}"
    assert bad.keys() == {"Verification shows all gates OK"}
    assert not report.gates_ok


def _without_t16(functions: tuple[PackageFunction, ...]) -> list[PackageFunction]:
    """`main` does not admit T16."""
    main, *others = functions
    return [msgspec.structs.replace(main, lengths=(24, 40)), *others]


def _without_prefill_t16(functions: tuple[PackageFunction, ...]) -> list[PackageFunction]:
    return [function for function in functions if function.name != "prefill_T16"]


def _renamed_outputs(functions: tuple[PackageFunction, ...]) -> list[PackageFunction]:
    """`main`'s outputs have each other's names."""
    main, *others = functions
    return [msgspec.structs.replace(main, outputs=main.outputs[::-1]), *others]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (_without_t16, "lengths: the contract has [16, 24, 40]; the package has [24, 40]"),
        (
            _without_prefill_t16,
            "functions: the contract has main, prefill_T16, prefill_T24, prefill_T40, decode; "
            "the package has main, prefill_T24, prefill_T40, decode",
        ),
        (
            _renamed_outputs,
            "outputs: the contract has logits float32 (1, T, 300), halt_logits float32 (1, T, 2); "
            "the package has halt_logits float32 (1, T, 300), logits float32 (1, T, 2)",
        ),
    ],
)
def test_the_conversion_refuses_what_is_not_the_contracts(build, models, monkeypatch, change, difference):
    honestly = convert._converted
    monkeypatch.setattr(
        convert, "_converted", lambda program, functions, settings: honestly(program, change(functions), settings)
    )
    monkeypatch.setattr(convert, "convert_function", _reusing(models, but="main"))
    with pytest.raises(ContractMismatchError) as caught:
        converted(build)
    assert caught.value.found == f"the converted package differs from {build.contract}: {difference}"


def _drop_length(spec) -> None:
    (main,) = [function for function in spec.description.functions if function.name == "main"]
    listed = main.input[0].type.multiArrayType.enumeratedShapes.shapes
    (place,) = [place for place, shape in enumerate(listed) if shape.shape[-1] == 16]
    del listed[place]


def _drop_function(spec) -> None:
    (place,) = [place for place, each in enumerate(spec.description.functions) if each.name == "prefill_T16"]
    del spec.description.functions[place]
    del spec.mlProgram.functions["prefill_T16"]


def test_verification_alone_catches_a_dropped_length(build):
    build.edit_spec(_drop_length)
    report = verified(build)
    assert bad_gates(report) == {
        INTERFACE: "lengths: the contract has [16, 24, 40]; the package has [24, 40]",
        ROUNDING: "in float32 arithmetic: input 'input_ids' is of shape [1, 16]",
    }
    assert bad_gates(report, Severity.SHOULD)["Secondary shapes validate"].startswith("T16: ")


def test_verification_alone_catches_a_dropped_function(build):
    build.edit_spec(_drop_function)
    report = verified(build)
    bad = bad_gates(report)
    assert bad.pop(INTERFACE).startswith("functions: the contract has main, prefill_T16, ")
    assert bad.keys() >= {PREFILL, DECODE, CONTINUED, PROMPT_PADDING, MATTERS}
    assert "no function 'prefill_T16'" in bad.pop(ROUNDING)
    assert set(bad.values()) == {report.stateful.error}
    assert "prefill_T16" in report.stateful.error


def test_a_weight_that_changes_once_the_package_was_saved_is_refused_before_anything_is_run(build):
    path = build.package / "Data" / WEIGHT_FILE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1  # the last bit of a float16: 1 part in 1,000 of one weight
    path.write_bytes(bytes(data))
    with pytest.raises(DigestError) as caught:
        verified(build)
    assert caught.value.found.startswith(f"{path}: found sha256:")
