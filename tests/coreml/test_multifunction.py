"""A package of several functions: `main`, one `prefill` per length, and `decode`, with shared weights and cache."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coremill.conversion import convert_coreml, export_pytorch
from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract, read_contract
from coremill.core.digest import digest, file_digest
from coremill.core.errors import ContractMismatchError, ExportError, PackageError, PredictionInputError
from coremill.coreml.converter import convert_function, ct, prepared
from coremill.coreml.graph import as_input, check_contract, describe, load_program
from coremill.coreml.interface import differences, package_interfaces
from coremill.coreml.package import WEIGHT_FILE, check_package, read_spec
from coremill.data.prompts import conversation
from coremill.measures import sqnr_db
from coremill.mil import MLModel
from coremill.model.checkpoint import build_student, load_checkpoint

# From ct.convert: its `_cast` of traced sizes uses a conversion that numpy 2.4 removes.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)


class Cached(msgspec.Struct, frozen=True):
    """The toy, exported and converted with a cache of 128 positions."""

    folder: Path

    @property
    def graph(self):
        return self.folder / "tiny_ball.pt"

    @property
    def contract_file(self):
        return self.folder / "tiny_ball_contract.json"

    @property
    def contract(self) -> Contract:
        return read_contract(self.contract_file)

    @property
    def package(self):
        return self.folder / "tiny_ball.mlpackage"


def export_arguments(build, folder) -> list[str]:
    argv = ["--checkpoint", str(build.checkpoint), "--tokenizer", str(build.tokenizer), "--out", str(folder)]
    return [*argv, "--shapes", "80,96,128", "--primary", "96", "--stateful", "--toy"]


@pytest.fixture(scope="module")
def cached(pristine, tmp_path_factory) -> Cached:
    made = Cached(tmp_path_factory.mktemp("cached"))
    assert export_pytorch.main(export_arguments(pristine, made.folder)) == 0
    argv = ["--graph", str(made.graph), "--contract", str(made.contract_file), "--out", str(made.package), "--toy"]
    assert convert_coreml.main(argv) == 0
    return made


@pytest.fixture(scope="module")
def tokens(pristine) -> list[int]:
    """128 real tokens: held-out conversations, one after another."""
    tokenizer = pristine.read_tokenizer()
    return [token for row in pristine.read_rows() for token in conversation(row, tokenizer)][:128]


@pytest.fixture(scope="module")
def expected(pristine, tokens):
    """The checkpoint's own outputs (128, …) for the tokens."""
    student = build_student(load_checkpoint(pristine.checkpoint))
    with torch.no_grad():
        logits, halt_logits = student(as_input(tokens))
    return {"logits": logits[0].numpy(), "halt_logits": halt_logits[0].numpy()}


def test_the_contract_describes_all_functions(cached):
    contract = cached.contract
    assert describe(contract.inputs) == "input_ids int32 (1, T)"
    assert describe(contract.states) == (
        "key_cache float16 (2, 1, 2, 128, 16), value_cache float16 (2, 1, 2, 128, 16)"
    )
    assert contract.cache_positions == 128
    outputs = "logits float32 (1, 1, 512), halt_logits float32 (1, 1, 2)"
    assert {each.name: (describe(each.inputs), describe(each.outputs)) for each in contract.functions} == {
        "prefill": ("input_ids int32 (1, T), length int32 (1)", outputs),
        "decode": ("input_ids int32 (1, 1), position int32 (1)", outputs),
    }
    assert all(0 <= each.max_abs_err < 1e-4 for each in contract.functions)


def test_the_package_has_the_functions_of_the_contract(cached):
    interfaces = package_interfaces(read_spec(cached.package))
    assert [each.name for each in interfaces] == ["main", "prefill_T80", "prefill_T96", "prefill_T128", "decode"]
    assert differences(cached.contract.package_functions, interfaces) == ()
    assert describe(interfaces[1].inputs) == "input_ids int32 (1, 80), length int32 (1)"
    check_package(cached.package)


def test_the_functions_share_their_weights(cached, pristine):
    """Five functions; only the rotary tables of their lengths are not shared."""
    alone = (pristine.package / "Data" / WEIGHT_FILE).stat().st_size
    assert (cached.package / "Data" / WEIGHT_FILE).stat().st_size < 1.1 * alone


def predict(package, name, state, **inputs):
    arrays = {key: np.asarray(value, dtype=np.int32) for key, value in inputs.items()}
    return MLModel(package, function_name=name).predict(arrays, state)


@pytest.mark.parametrize(
    ("n", "function", "seq_len"), [(1, "prefill_T80", 80), (63, "prefill_T80", 80), (96, "prefill_T96", 96)]
)
def test_prefill_and_decode_match_the_checkpoint(cached, tokens, expected, n, function, seq_len):
    state = MLModel(cached.package, function_name="decode").make_state()
    padded = [*tokens[:n], *[3] * (seq_len - n)]
    outputs = predict(cached.package, function, state, input_ids=[padded], length=[n])
    assert sqnr_db(expected["logits"][n - 1], outputs["logits"][0, 0]) > 45
    np.testing.assert_allclose(outputs["halt_logits"][0, 0], expected["halt_logits"][n - 1], atol=0.02)
    decode = MLModel(cached.package, function_name="decode")
    for position in range(n, n + 12):
        inputs = {"input_ids": np.array([[tokens[position]]], np.int32), "position": np.array([position], np.int32)}
        outputs = decode.predict(inputs, state)
        assert sqnr_db(expected["logits"][position], outputs["logits"][0, 0]) > 45, position
        np.testing.assert_allclose(outputs["halt_logits"][0, 0], expected["halt_logits"][position], atol=0.02)


def test_decode_fills_the_cache_and_fails_beyond_it(cached, tokens, expected):
    decode = MLModel(cached.package, function_name="decode")
    state = decode.make_state()
    for position, token in enumerate(tokens):
        inputs = {"input_ids": np.array([[token]], np.int32), "position": np.array([position], np.int32)}
        outputs = decode.predict(inputs, state)
    assert sqnr_db(expected["logits"][127], outputs["logits"][0, 0]) > 45
    with pytest.raises(PredictionInputError, match=r"slice_update.*for a slice of shape \[1, 1, 2, 0, 16\]"):
        decode.predict({**inputs, "position": np.array([128], np.int32)}, state)


def test_coremltools_reads_the_joined_program_without_changing_it(cached):
    from coremltools.converters.mil.frontend.milproto.load import load

    before = digest(cached.package)
    model = ct.models.MLModel(str(cached.package), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    assert sorted(program.functions) == ["decode", "main", "prefill_T128", "prefill_T80", "prefill_T96"]
    assert digest(cached.package) == before


def test_another_process_gives_the_same_bytes(cached, pristine, tmp_path):
    export = [sys.executable, "-m", "coremill.conversion.export_pytorch", *export_arguments(pristine, tmp_path)]
    subprocess.run(export, check=True)
    second = tmp_path / "second"
    subprocess.run([*export[:3], *export_arguments(pristine, second)], check=True)
    assert file_digest(second / "tiny_ball.pt") == file_digest(tmp_path / "tiny_ball.pt")
    convert = [sys.executable, "-m", "coremill.conversion.convert_coreml", "--graph", str(cached.graph), "--toy"]
    out = tmp_path / "convert" / "tiny_ball.mlpackage"
    subprocess.run([*convert, "--contract", str(cached.contract_file), "--out", str(out)], check=True)
    assert digest(out) == digest(cached.package)


# coremltools leaves its temporary directories to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in")
def test_the_excluded_passes_change_nothing(cached, tokens, monkeypatch):
    """coremltools' default pipeline gives the same operations and the same numbers."""
    contract, settings = cached.contract, ConvertConfig()
    ready = prepared(load_program(cached.graph), settings)
    for function in contract.package_functions:
        chosen = convert_function(ready, function, settings)
        with monkeypatch.context() as patched:
            patched.setattr("coremill.coreml.converter.decoder_passes", lambda: ct.PassPipeline.DEFAULT)
            everything = convert_function(ready, function, settings)
        counts = [collections.Counter(_operations(model)) for model in (chosen, everything)]
        assert counts[0] == counts[1], function.name
        if function.name == "main":
            ids = {"input_ids": np.array([tokens[:96]], np.int32)}
            np.testing.assert_array_equal(
                MLModel(chosen).predict(ids)["logits"], MLModel(everything).predict(ids)["logits"]
            )


def _operations(model) -> list[str]:
    function = model.get_spec().mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    return [operation.type for operation in block.operations if operation.type != "const"]


def test_a_program_with_weights_beyond_float16_stays_float32(cached):
    program = load_program(cached.graph)
    with torch.no_grad():
        program.main.decoder.norm.weight[3] = 70_000.0
    assert prepared(program, ConvertConfig()).main.decoder.norm.weight.dtype == torch.float32
    program = load_program(cached.graph)
    assert (
        prepared(program, ConvertConfig(compute_precision="float32")).main.decoder.norm.weight.dtype
        == torch.float32
    )
    assert prepared(program, ConvertConfig()).main.decoder.norm.weight.dtype == torch.float16


def test_a_contract_with_other_functions_than_the_program_is_an_error(cached, pristine):
    contract, sequences = cached.contract, [[0] * 80, [0] * 96]
    check_contract(contract, load_program(cached.graph), graph_digest=contract.graph_digest, sequences=sequences)
    fewer = msgspec.structs.replace(contract, functions=contract.functions[:1])
    with pytest.raises(
        ContractMismatchError, match=r"^the contract's functions are prefill, the graph's are prefill, d"
    ):
        check_contract(fewer, load_program(cached.graph), graph_digest=contract.graph_digest, sequences=sequences)
    with pytest.raises(
        ContractMismatchError, match=r"^the contract's states are key_cache .*, the graph's are none\n"
    ):
        check_contract(
            contract, load_program(pristine.graph), graph_digest=contract.graph_digest, sequences=sequences
        )


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda spec: spec.description.functions.pop(),
            None,
        ),
        (
            lambda spec: setattr(spec.description.functions[4].input[1].type.multiArrayType, "dataType", 65568),
            "decode: inputs: the contract has input_ids int32 (1, 1), position int32 (1); "
            "the package has input_ids int32 (1, 1), position float32 (1)",
        ),
        (
            lambda spec: spec.description.functions[1].ClearField("state"),
            "prefill_T80: states: the contract has key_cache float16 (2, 1, 2, 128, 16), value_cache float16 "
            "(2, 1, 2, 128, 16); the package has none",
        ),
    ],
)
def test_each_difference_of_a_function_is_described(cached, change, difference):
    spec = read_spec(cached.package)
    change(spec)
    if difference is None:
        with pytest.raises(
            PackageError, match=r"^the description and the program differ in the functions decode\n"
        ):
            package_interfaces(spec)
        return
    assert differences(cached.contract.package_functions, package_interfaces(spec)) == (difference,)


def test_a_missing_function_is_a_difference(cached):
    interfaces = package_interfaces(read_spec(cached.package))
    assert differences(cached.contract.package_functions, interfaces[:4]) == (
        "functions: the contract has main, prefill_T80, prefill_T96, prefill_T128, decode; "
        "the package has main, prefill_T80, prefill_T96, prefill_T128",
    )


def test_a_cache_beyond_the_context_of_the_model_is_an_error_before_any_work(pristine, tmp_path):
    from coremill.core.config import ExportConfig
    from coremill.core.contract import ShapeSet
    from coremill.coreml import export

    source = export.Source(
        checkpoint=pristine.checkpoint, tokenizer=pristine.tokenizer, prompts=pristine.dataset, toy=True
    )
    shapes, settings = ShapeSet(primary=96, all=(96,)), ExportConfig(stateful=True, context=129)
    with pytest.raises(ExportError) as caught:
        export.export(source, shapes, settings, program=tmp_path / "x.pt", contract=tmp_path / "x_contract.json")
    assert caught.value.found == "a key/value cache of 129 positions is beyond the model's context of 128 tokens"
