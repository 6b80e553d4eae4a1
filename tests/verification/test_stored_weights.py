"""Constants that a package stores: all of them are compared, and a single wrong value is named."""

from __future__ import annotations

import re
import shutil

import coremltools as ct
import msgspec
import numpy as np
import pytest
import torch
from coremltools.optimize.coreml import get_weights_metadata

from coremill.conversion import convert_coreml, export_pytorch
from coremill.core.config import ConvertConfig, ExportConfig
from coremill.core.contract import ModelArch, ShapeSet
from coremill.coreml.decoder import decoder_weights
from coremill.coreml.package import WEIGHT_FILE, read_spec
from coremill.model.checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from coremill.model.student import new_student
from coremill.verification.stored_weights import StoredWeights, compare_stored_weights

# From ct.convert: its `_cast` of traced sizes uses a conversion that numpy 2.4 removes.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)

SHARED = "decode, main, prefill_T16, prefill_T24, prefill_T40"


def constants_of(build) -> dict[str, object]:
    """The constants of a package of one function, as coremltools itself reads them."""
    return get_weights_metadata(ct.models.MLModel(str(build.package), skip_model_load=True), 0)


def compared(build) -> StoredWeights:
    return compare_stored_weights(build.package, load_checkpoint(build.checkpoint))


# Packages without fault


def test_every_tensor_of_every_function_is_compared(pristine_imported, pristine):
    checkpoint = load_checkpoint(pristine_imported.checkpoint)
    values = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    assert compared(pristine_imported) == StoredWeights(tensors=20, values=values, functions=5)
    assert str(compared(pristine_imported)) == f"20 tensors, {values:,} values, in 5 functions"
    assert str(compared(pristine)) == "21 tensors, 106,944 values, in 1 function"


LONG, ONE = (16, 24), (24,)
CACHED, TRACED, CAPTURED = ExportConfig(stateful=True), ExportConfig(), ExportConfig(frontend="torch-export")
FLOAT16, FLOAT32 = ConvertConfig(), ConvertConfig(compute_precision="float32")
UNTIED = ModelArch(use_halt_head=True, tie_embeddings=False)


@pytest.fixture
def made(pristine_imported, tmp_path):
    """Makes the package of a model with random weights."""

    def make(
        *, dtype=torch.float32, shapes=LONG, export=CACHED, convert=FLOAT16, edit=lambda tensors: None, **model
    ):
        config = msgspec.structs.replace(
            pristine_imported.config, shapes=ShapeSet(primary=24, all=shapes), export=export, convert=convert
        )
        build = msgspec.structs.replace(pristine_imported, root=tmp_path, config=config)
        for folder in (pristine_imported.dataset, pristine_imported.model):
            shutil.copytree(folder, build.root / folder.name)
        known = load_checkpoint(build.checkpoint)
        student = new_student(msgspec.structs.replace(known.config, **model), seed=2).to(dtype)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.dim() == 1:  # norms and biases, which start at 1 and 0
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            edit(dict(student.named_parameters()))
        checkpoint = checkpoint_of(
            student, model_type="llama", step=0, tokenizer=known.tokenizer, training=known.training
        )
        save_checkpoint(build.checkpoint, checkpoint)
        export_pytorch.run_stage(build.context("export", "texts", "import"))
        convert_coreml.run_stage(build.context("convert", "export"))
        return build

    return make


@pytest.mark.parametrize(
    ("functions", "options"),
    [
        (4, {"attention_bias": "qkvo", "mlp_bias": True, "dtype": torch.bfloat16}),
        (3, {"qk_norm": True, "head_size": 10, "shapes": ONE, "convert": FLOAT32}),
        (4, {"arch": UNTIED, "n_kv_heads": 4, "dtype": torch.float16}),
        (1, {"arch": UNTIED, "n_kv_heads": 1, "shapes": ONE, "export": TRACED, "dtype": torch.float64}),
        (1, {"attention_bias": "qkv", "export": CAPTURED, "convert": FLOAT32, "dtype": torch.float64}),
        (1, {"qk_norm": True, "arch": UNTIED, "shapes": ONE, "export": CAPTURED}),
    ],
    ids=["biases", "norms of queries and keys", "untied", "untied, traced", "captured in float32", "captured"],
)
def test_every_option_of_the_family_passes(made, functions, options):
    found = compared(made(**options))
    assert (found.problem, found.functions) == (None, functions)


def test_a_weight_beyond_float16_is_compared_in_float32_and_the_others_as_coremltools_rounds_them(made):
    def edit(tensors):
        tensors["layers.0.mlp.down_proj.weight"][0, 0] = 70_000.0
        # In a tensor of fewer than 400 values, coremltools rounds these away from 0; in a larger one, to 0.
        for name in ("norm.weight", "layers.1.mlp.down_proj.weight"):
            tensors[name].view(-1)[:3] = torch.tensor([1e-9, -1e-9, 3e-8])

    build = made(edit=edit, export=TRACED)
    constants = constants_of(build)
    assert constants["decoder_layers_0_down_weight"].val[0, 0] == 70_000.0
    assert constants["decoder_norm_weight_to_fp16"].val[:3].tolist() == [2.0**-24, -(2.0**-24), 2.0**-24]
    assert constants["decoder_layers_1_down_weight_to_fp16"].val[0, :2].tolist() == [0.0, 0.0]
    assert compared(build).problem is None


def test_tensors_that_are_equal_are_stored_once_and_found_under_one_name(made):
    def edit(tensors):
        tensors["layers.0.post_attention_layernorm.weight"].fill_(1.5)
        tensors["layers.1.input_layernorm.weight"].fill_(1.5)
        tensors["norm.weight"].fill_(1.5)
        # The smallest difference of two float16: coremltools calls that equal.
        for name, last in (("layers.1.input_layernorm.weight", 2.0**-24), ("norm.weight", 0.0)):
            tensors[name][127] = last
        tensors["layers.0.post_attention_layernorm.weight"][127] = 0.0

    build = made(edit=edit, export=TRACED, d_model=128)  # coremltools merges constants of 100 values and more
    assert [name for name in constants_of(build) if name.endswith("norm_weight")] == [
        "decoder_layers_0_input_norm_weight",
        "decoder_layers_0_post_norm_weight",
        "decoder_layers_1_post_norm_weight",
    ]
    assert compared(build).problem is None
    build.change_weight("layers_0_post_norm_weight", lambda values: values.__setitem__(3, 1.0))
    where = "stored as 'decoder_layers_0_post_norm_weight': 1 of 128 values differ, by up to 0.5"
    assert compared(build).problem == (
        f"main: layers.0.post_norm.weight, {where}; at [3] it has 1, expected 1.5; "
        "main: layers.1.input_norm.weight [128] is not stored; main: norm.weight [128] is not stored"
    )


@pytest.mark.parametrize(("convert", "dropped"), [(FLOAT16, True), (FLOAT32, False)], ids=["float16", "float32"])
def test_a_norm_that_changes_nothing_is_not_stored(made, convert, dropped):
    """Its weight is 1, or rounds to it, and coremltools drops the multiplication."""

    def edit(tensors):
        tensors["norm.weight"].fill_(1.0)[3] = 1.0001
        tensors["layers.0.input_layernorm.weight"].fill_(1.0)

    build = made(edit=edit, export=TRACED, convert=convert)
    names = constants_of(build).keys()
    assert "decoder_layers_0_input_norm_weight" not in names
    assert ("decoder_norm_weight" not in names) == dropped
    assert compared(build).problem is None
    checkpoint = load_checkpoint(build.checkpoint)
    checkpoint.state_dict["layers.0.input_layernorm.weight"][0] = 1.01
    assert compare_stored_weights(build.package, checkpoint).problem == (
        "main: layers.0.input_norm.weight [32] is not stored"
    )


def test_coremltools_own_reader_finds_the_same_values(pristine):
    """An independent reading, of values alone: those of the checkpoint, each as often as it has it."""
    constants = constants_of(pristine)
    checkpoint = load_checkpoint(pristine.checkpoint)
    weights = [each.val for name, each in constants.items() if name.endswith(("_weight", "_lm_head"))]
    found = np.sort(np.concatenate([np.ravel(each) for each in weights]))
    tensors = [tensor.numpy().astype(np.float16) for tensor in checkpoint.state_dict.values()]
    np.testing.assert_array_equal(found, np.sort(np.concatenate([np.ravel(each) for each in tensors])))
    assert found.size == compared(pristine).values
    expected = dict(decoder_weights(checkpoint.config, checkpoint.state_dict))
    joined = constants["decoder_layers_1_qkv_weight"].val
    np.testing.assert_array_equal(joined, expected["layers.1.qkv.weight"].numpy().astype(np.float16))


# Packages with a fault; each is saved as if the converter had made it so


def test_a_row_of_the_embedding_that_is_scaled(imported):
    row = load_checkpoint(imported.checkpoint).state_dict["embed_tokens.weight"][299].numpy().astype(np.float16)
    scaled = (row * np.float16(1.1)).astype(np.float16)
    imported.change_weight("lm_head", lambda values: values.__setitem__(299, scaled))
    exact = load_checkpoint(imported.checkpoint).state_dict["embed_tokens.weight"][299]
    largest = float((torch.from_numpy(scaled).double() - exact.double()).abs().max())
    assert compared(imported).problem == (
        f"{SHARED}: embed_tokens.weight, stored as 'decoder_lm_head': 32 of 9,600 values differ, by up to "
        f"{largest:.3g}; at [299, 0] it has {scaled[0]:.8g}, expected {exact[0]:.8g}"
    )


def test_two_rows_that_are_swapped(imported):
    def swap(values):
        values[[270, 280]] = values[[280, 270]]

    imported.change_weight("lm_head", swap)
    assert "'decoder_lm_head': 64 of 9,600 values differ" in compared(imported).problem
    assert "; at [270, 0] it has " in compared(imported).problem


def test_one_bit_of_a_norm(build):
    """The last bit of one float16."""
    changed = []

    def flip(values):
        values.view(np.uint16)[7] ^= 1
        changed.append(values[7])

    build.change_weight("decoder_norm_weight", flip)
    exact = load_checkpoint(build.checkpoint).state_dict["norm.weight"][7].item()
    (found,) = changed
    assert compared(build).problem == (
        "main: norm.weight, stored as 'decoder_norm_weight': 1 of 64 values differ, "
        f"by up to {abs(float(found) - exact):.3g}; at [7] it has {found:.8g}, expected {exact:.8g}"
    )


def test_tensors_that_are_swapped_are_no_merged_ones(imported):
    """Both are there, each under the name of the other."""
    spec = read_spec(imported.package)
    for function in spec.mlProgram.functions.values():
        stored = {
            operation.outputs[0].name: operation.attributes["val"].blobFileValue
            for operation in function.block_specializations["CoreML8"].operations
            if operation.type == "const"
        }
        first, second = (stored[f"decoder_layers_{layer}_down_weight"] for layer in (0, 1))
        first.offset, second.offset = second.offset, first.offset
    imported.edit_spec(lambda saved: saved.CopyFrom(spec))
    problem = compared(imported).problem
    assert problem.startswith(f"{SHARED}: layers.0.down.weight, stored as 'decoder_layers_0_down_weight': 2,0")
    assert f"; {SHARED}: layers.1.down.weight, stored as 'decoder_layers_1_down_weight': 2,0" in problem


@pytest.mark.parametrize(
    ("function", "name", "problem"),
    [
        (
            "decode",
            "decoder_cos",
            "cos, stored as 'decoder_cos': 1 of 328 values differ, by up to 0.842; at [40, 2] it has ",
        ),
        ("main", "decoder_sin", "sin, stored as 'decoder_sin': 1 of 328 values differ, by up to "),
        (
            "prefill_T24",
            "cos",
            "'cos_1', float16 [24, 8], is no weight and no table; "
            "cos, stored as 'cos_1': 1 of 192 values differ, by up to ",
        ),
    ],
)
def test_one_angle_of_a_table(imported, function, name, problem):
    """The rows at the end, which no token of a full cache needs, too."""

    def turn(values):
        values[-1, 2] = -values[-1, 2] + 1

    imported.change_weight(name, turn, function=function, alone=True)
    # coremltools counts the names of a process.
    found = re.sub(r"'cos\d+_1'", "'cos_1'", compared(imported).problem)
    assert found.startswith(f"{function}: {problem}")


def test_a_constant_of_one_function_alone(imported):
    imported.change_weight(
        "layers_1_gate_up_weight", lambda values: values.__setitem__((5, 3), 0.0), function="decode", alone=True
    )
    problem = compared(imported).problem
    assert problem.startswith(
        "decode: layers.1.gate_up.weight, stored as 'decoder_layers_1_gate_up_weight': 1 of 4,096 values differ"
    )
    assert "; at [5, 3] it has 0, expected " in problem


def test_a_value_that_is_not_finite(imported):
    imported.change_weight("layers_0_out_weight", lambda values: values.__setitem__((0, 1), np.nan))
    assert ", by up to inf; at [0, 1] it has nan, expected " in compared(imported).problem


def test_infinity_is_no_rounding_of_a_weight_beyond_float16(imported):
    checkpoint = load_checkpoint(imported.checkpoint)
    checkpoint.state_dict["layers.0.mlp.down_proj.weight"][0, 0] = 65_520.0
    imported.change_weight("layers_0_down_weight", lambda values: values.__setitem__((0, 0), np.inf))
    assert compare_stored_weights(imported.package, checkpoint).problem.endswith(
        "1 of 2,048 values differ, by up to inf; at [0, 0] it has inf, expected 65520"
    )
    checkpoint.state_dict["layers.0.mlp.down_proj.weight"][0, 0] = 65_519.0
    imported.change_weight("layers_0_down_weight", lambda values: values.__setitem__((0, 0), 65_504.0))
    assert compare_stored_weights(imported.package, checkpoint).problem is None


def test_zeros_are_a_bias_where_nothing_is_named_and_nowhere_else(build):
    build.change_weight("decoder_norm_weight", lambda values: values.fill(0.0))
    assert "norm.weight, stored as 'decoder_norm_weight': 64 of 64 values differ" in compared(build).problem
    build.change_weight("linear_0_bias_0", lambda values: values.__setitem__(0, 0.5), alone=True)
    assert compared(build).problem.endswith("; main: 'linear_0_bias_0', float16 [128], is no weight and no table")


def _constants(spec, name: str) -> list:
    return [
        operation
        for function in spec.mlProgram.functions.values()
        for operation in function.block_specializations["CoreML8"].operations
        if operation.type == "const" and operation.outputs[0].name == name
    ]


def test_a_constant_that_the_model_does_not_have(imported):
    """A second embedding, in one function, that differs from the one with the name."""

    def add(spec):
        main = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
        other = main.operations.add()
        other.CopyFrom(_constants(spec, "decoder_lm_head")[0])
        other.outputs[0].name = "other"

    imported.edit_spec(add)
    assert compared(imported).problem is None  # it is the embedding
    imported.change_weight("other", lambda values: values.__setitem__((9, 9), 0.0), alone=True)
    assert compared(imported).problem == "main: 'other', float16 [300, 32], is no weight and no table"


def test_another_shape_is_named_and_another_name_is_no_fault(imported):
    def plant(spec):
        for each in _constants(spec, "decoder_layers_0_qkv_weight"):
            rows, columns = each.attributes["val"].type.tensorType.dimensions
            rows.constant.size, columns.constant.size = columns.constant.size, rows.constant.size
        for each in _constants(spec, "decoder_layers_1_qkv_weight"):
            each.outputs[0].name = "nameless"

    imported.edit_spec(plant)
    assert compared(imported).problem == (
        f"{SHARED}: layers.0.qkv.weight, stored as 'decoder_layers_0_qkv_weight', "
        "is of shape [32, 64], expected [64, 32]"
    )


def test_a_package_without_constants_fails(imported):
    def plant(spec):
        for function in spec.mlProgram.functions.values():
            operations = function.block_specializations["CoreML8"].operations
            kept = [operation for operation in operations if operation.type != "const"]
            del operations[:]
            operations.extend(kept)

    imported.edit_spec(plant)
    assert compared(imported).problem == (
        f"{SHARED}: embed_tokens.weight [300, 32] is not stored; "
        f"{SHARED}: layers.0.qkv.weight [64, 32] is not stored; "
        f"{SHARED}: layers.0.out.weight [32, 32] is not stored; and 6 more"
    )


def test_a_package_without_functions_fails(imported):
    imported.edit_spec(lambda spec: spec.mlProgram.functions.clear())
    assert compared(imported).problem == "the package has no functions"


def test_a_weight_file_that_is_too_short_is_a_problem_and_no_crash(imported):
    path = imported.package / "Data" / WEIGHT_FILE
    path.write_bytes(path.read_bytes()[:1000])
    found = compared(imported)
    assert found.functions == 0
    assert found.problem.endswith("the blob at offset 320 ends at byte 1040; the file has 1000")
