"""The MLModel-like interface: names, types, shapes, states, and what it refuses."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import get_new_symbol, types

from coremill.core.digest import digest
from coremill.core.errors import DigestError, MachineError, PackageError, PredictionInputError
from coremill.mil import MLModel, TensorSpec
from coremill.mil.description import DefaultValue

RNG = np.random.default_rng(8)


class Scorer(torch.nn.Module):
    """Ids to scores: an embedding and a product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(16, 8)

    def forward(self, ids):
        return self.table(ids) @ self.table.weight.T


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return Scorer().eval()


@pytest.fixture(scope="module")
def converted(scorer):
    shapes = ct.EnumeratedShapes([(1, 4), (1, 8), (1, 12)], default=(1, 8))
    with torch.no_grad():
        traced = torch.jit.trace(scorer, torch.zeros(1, 8, dtype=torch.int32))
    return ct.convert(
        traced,
        inputs=[ct.TensorType("ids", shape=shapes, dtype=np.int32)],
        outputs=[ct.TensorType("scores")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


@pytest.fixture(scope="module")
def model(converted):
    return MLModel(converted)


IDS = np.arange(8, dtype=np.int32)[None]


def test_interface(model):
    assert model.function_name == "main"
    assert model.inputs == (TensorSpec("ids", "int32", (1, None), enumerated_shapes=((1, 8), (1, 4), (1, 12))),)
    assert model.outputs == (TensorSpec("scores", "float16", (1, None, 16)),)
    assert model.states == ()
    assert model.supported_shapes("ids") == [(1, 8), (1, 4), (1, 12)]
    with pytest.raises(PredictionInputError, match=r"^no input 'x'\n  expected: one of \['ids'\]$"):
        model.supported_shapes("x")


@pytest.mark.parametrize("length", [4, 8, 12])
def test_predicts_at_each_enumerated_shape(model, scorer, length):
    ids = RNG.integers(0, 16, (1, length)).astype(np.int32)
    scores = model.predict({"ids": ids})["scores"]
    assert scores.dtype == np.float16
    assert scores.shape == (1, length, 16)
    with torch.no_grad():
        expected = scorer(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-2)


def test_oracle_is_closer_to_torch(converted, model, scorer):
    oracle = MLModel(converted, mode="oracle").predict({"ids": IDS})["scores"]
    assert oracle.dtype == np.float32
    # The weights are stored in fp16: what is left is their rounding, not that of what is computed from them.
    table = scorer.table.weight.detach().half().float().numpy()
    np.testing.assert_allclose(oracle[0], table[:8] @ table.T, rtol=1e-5, atol=1e-5)
    declared = model.predict({"ids": IDS})["scores"]
    assert 0 < np.abs(declared - oracle).max() < 1e-2


@pytest.mark.parametrize("length", [1, 5, 16])
def test_unlisted_length_is_rejected(model, length):
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"ids": np.zeros((1, length), np.int32)})
    assert str(caught.value) == (
        f"input 'ids' is of shape [1, {length}]\n  expected: one of [1, 8], [1, 4], [1, 12]"
    )


def test_different_rank_is_rejected(model):
    with pytest.raises(PredictionInputError, match=r"^input 'ids' is of shape \[8\]\n  expected: one of \[1, 8\]"):
        model.predict({"ids": IDS[0]})


def test_missing_and_unknown_inputs_are_rejected(model):
    with pytest.raises(PredictionInputError, match=r"^inputs missing \['ids'\]\n  expected: exactly \['ids'\]$"):
        model.predict({})
    with pytest.raises(PredictionInputError, match=r"^inputs missing \['ids'\] and unknown \['id'\]\n"):
        model.predict({"id": IDS})
    with pytest.raises(PredictionInputError, match=r"^inputs unknown \['mask'\]\n"):
        model.predict({"ids": IDS, "mask": IDS})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.complex64, "U1"])
def test_different_kind_of_number_is_rejected(model, dtype):
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"ids": IDS.astype(dtype)})
    assert str(caught.value) == f"input 'ids' is of {np.dtype(dtype)}\n  expected: int32"


def test_input_that_is_not_an_array_is_rejected(model):
    with pytest.raises(PredictionInputError, match=r"^input 'ids' is a list\n  expected: a numpy array of int32$"):
        model.predict({"ids": IDS.tolist()})


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16, np.uint64])
def test_integers_that_fit_are_accepted(model, dtype):
    expected = model.predict({"ids": IDS})["scores"]
    np.testing.assert_array_equal(model.predict({"ids": IDS.astype(dtype)})["scores"], expected)


def test_integers_that_do_not_fit_are_rejected(model):
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"ids": IDS.astype(np.int64) + (1 << 32)})
    assert str(caught.value) == ("input 'ids' holds 4294967296\n  expected: -2147483648 to 2147483647, as int32")


@pytest.mark.parametrize("wrong", [16, -17, 65536 + 3, 1 << 30])
def test_an_id_outside_the_embedding_is_an_error(model, wrong):
    """Not clamped, and not wrapped by the cast to uint16 that the converter puts before the gather.

    (-1 is no error here: in this graph the converter adds the table's length to ids below 0, as torch indexes.)
    """
    ids = IDS.copy()
    ids[0, 3] = wrong
    with pytest.raises(PredictionInputError, match=r"operation '.*' \((gather|cast)\): (index|the value) -?\d+ "):
        model.predict({"ids": ids})


def test_arrays_of_any_layout(model):
    expected = model.predict({"ids": IDS})["scores"]
    strided = np.repeat(IDS, 2, axis=1)[:, ::2]
    assert not strided.flags.c_contiguous or strided.base is not None
    read_only = IDS.copy()
    read_only.flags.writeable = False
    backwards = IDS[:, ::-1].copy()[:, ::-1]
    for each in (strided, read_only, backwards, np.asfortranarray(IDS)):
        np.testing.assert_array_equal(model.predict({"ids": each})["scores"], expected)


def test_modes(converted):
    with pytest.raises(ValueError, match="'exact' is not a valid Numerics"):
        MLModel(converted, mode="exact")


def test_results_are_copies(build):
    """Writing to what a prediction gave changes neither the input nor the next prediction."""
    table = np.arange(4, dtype=np.float32)
    x = np.ones(4, np.float32)
    model = MLModel(
        build({"x": x}, lambda x: (mb.identity(x=x, name="same"), mb.identity(x=table, name="constant")))
    )
    for _ in range(2):
        found = model.predict({"x": x})
        assert found["same"].tolist() == [1, 1, 1, 1]
        assert found["constant"].tolist() == [0, 1, 2, 3]
        for each in found.values():
            each += 5
    assert x.tolist() == [1, 1, 1, 1]


def _capturing(x):
    """One branch gives a constant of its own."""
    table = np.arange(4, dtype=np.float32)
    positive = mb.greater(x=mb.reduce_sum(x=x), y=np.float32(0))
    return mb.cond(pred=positive, _true_fn=lambda: mb.const(val=table), _false_fn=lambda: mb.identity(x=x))


def _following_from_the_shape(x):
    return mb.sub(x=mb.cumsum(x=mb.fill(shape=mb.shape(x=x), value=np.float32(1))), y=np.float32(1))


@pytest.mark.parametrize("body", [_capturing, _following_from_the_shape])
def test_results_that_later_runs_use_are_copies(build, body):
    x = np.ones(4, np.float32)
    model = MLModel(build({"x": x}, body))
    for _ in range(3):
        (found,) = model.predict({"x": x}).values()
        assert found.tolist() == [0, 1, 2, 3]
        found += 5


def test_scalars_are_arrays_of_one_element(build):
    """Core ML's arrays have at least one dimension, whatever the program has."""
    inputs = {"x": np.ones(1, np.float32), "y": np.ones(3, np.float32)}
    model = build(inputs, lambda x, y: mb.reduce_sum(x=mb.mul(x=x, y=y), name="sum"))
    spec = model.get_spec()
    (x,) = (each for each in spec.mlProgram.functions["main"].inputs if each.name == "x")
    x.type.tensorType.rank = 0
    del x.type.tensorType.dimensions[:]
    model = MLModel(ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True))
    graph = model.program.graph
    assert {graph.names[slot]: graph.types[slot].shape for slot in graph.inputs} == {"x": (), "y": (3,)}
    assert model.supported_shapes("x") == [(1,)]
    found = model.predict({"x": np.float32([2]), "y": np.arange(3, dtype=np.float32)})["sum"]
    assert (found.tolist(), found.shape) == ([6], (1,))
    with pytest.raises(PredictionInputError, match=r"^input 'x' is of shape \[\]\n  expected: \[1\]$"):
        model.predict({"x": np.array(2, np.float32), "y": np.ones(3, np.float32)})


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("value", [3, 0])
def test_an_optional_input_has_a_default(dtype, value):
    kind = {np.float32: types.fp32, np.int32: types.int32}[dtype]
    specs = [mb.TensorSpec((2,), dtype=kind), mb.TensorSpec((get_new_symbol(),), dtype=kind)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS17)
    def program(x, step):
        return mb.add(x=x, y=mb.reduce_sum(x=step, keep_dims=True), name="y")

    default = np.full((3,), value, dtype)
    model = MLModel(
        ct.convert(
            program,
            inputs=[
                ct.TensorType("x", (2,)),
                ct.TensorType("step", (ct.RangeDim(1, 4, default=3),), default_value=default),
            ],
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
    )
    assert [spec.default for spec in model.inputs] == [None, DefaultValue((3,), value)]
    x = np.array([1, 2], dtype)
    assert model.predict({"x": x})["y"].tolist() == (x + default.sum()).tolist()
    assert model.predict({"x": x, "step": np.array([4], dtype)})["y"].tolist() == [5, 6]
    with pytest.raises(PredictionInputError) as caught:
        model.predict({"step": x})
    assert str(caught.value) == (
        "inputs missing ['x']\n  expected: exactly ['x', 'step'], of which ['step'] are optional"
    )


def test_arrays_of_int8():
    """Since iOS 26 an input or output may be one."""

    class Transposed(torch.nn.Module):
        def forward(self, x):
            return x.transpose(0, 1)

    traced = torch.jit.trace(Transposed(), torch.zeros((1, 3), dtype=torch.int8))
    model = MLModel(
        ct.convert(
            traced,
            inputs=[ct.TensorType("x", (1, 3), dtype=types.int8)],
            outputs=[ct.TensorType("y", dtype=types.int8)],
            minimum_deployment_target=ct.target.iOS26,
            skip_model_load=True,
        )
    )
    assert (model.inputs[0].dtype, model.outputs[0].dtype) == ("int8", "int8")
    x = np.array([[-128, 5, 127]])
    for kind in (np.int8, np.int32, np.int64):
        found = model.predict({"x": x.astype(kind)})["y"]
        assert (found.dtype, found.tolist()) == (np.int8, x.T.tolist())
    with pytest.raises(PredictionInputError, match=r"^input 'x' holds 128\n  expected: -128 to 127, as int8$"):
        model.predict({"x": x + 1})


def test_nan_and_infinity_are_returned(build):
    x = np.array([np.nan, np.inf, -np.inf, 0.0], np.float32)
    model = MLModel(build({"x": x}, lambda x: mb.mul(x=x, y=np.float32(2), name="y")))
    np.testing.assert_array_equal(model.predict({"x": x})["y"], x)


def test_ranges(build):
    model = MLModel(build({"x": ((2, (3, 6)), np.float32)}, lambda x: mb.square(x=x, name="y")))
    assert model.inputs == (TensorSpec("x", "float32", (2, None), size_ranges=((2, 2), (3, 6))),)
    assert model.supported_shapes("x") is None
    assert model.predict({"x": np.full((2, 5), 3, np.float64)})["y"].tolist() == [[9.0] * 5] * 2
    for shape in ((2, 2), (2, 7), (1, 4), (2, 4, 1)):
        with pytest.raises(PredictionInputError) as caught:
            model.predict({"x": np.zeros(shape, np.float32)})
        assert str(caught.value) == (
            f"input 'x' is of shape {list(shape)}\n  expected: rank 2 with sizes [2, 3 to 6]"
        )


def test_a_fixed_shape(build):
    model = MLModel(build({"x": np.zeros((2, 3), np.float16)}, lambda x: mb.square(x=x, name="y")))
    assert model.supported_shapes("x") == [(2, 3)]
    with pytest.raises(PredictionInputError, match=r"input 'x' is of shape \[3, 2\]\n  expected: \[2, 3\]"):
        model.predict({"x": np.zeros((3, 2), np.float16)})


class Counter(torch.nn.Module):
    """A state that every call adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, dtype=torch.float16))

    def forward(self, x):
        self.total.add_(x)
        return self.total * 2


@pytest.fixture(scope="module")
def counter():
    with torch.no_grad():
        traced = torch.jit.trace(Counter().eval(), torch.zeros(3))
    return ct.convert(
        traced,
        inputs=[ct.TensorType("x", shape=(3,), dtype=np.float16)],
        outputs=[ct.TensorType("y", dtype=np.float16)],
        states=[ct.StateType(wrapped_type=ct.TensorType(shape=(3,), dtype=np.float16), name="total")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


class TestStates:
    def test_a_state_lasts_between_predictions(self, counter):
        model = MLModel(counter)
        assert model.states == (TensorSpec("total", "float16", (3,)),)
        state, other = model.make_state(), model.make_state()
        x = np.array([1, 2, 3], np.float16)
        first = model.predict({"x": x}, state)["y"]
        assert first.tolist() == [2, 4, 6]
        assert model.predict({"x": x}, state)["y"].tolist() == [4, 8, 12]
        assert first.tolist() == [2, 4, 6]
        assert state.read("total").tolist() == [2, 4, 6]
        assert other.read("total").tolist() == [0, 0, 0]
        assert model.predict({"x": x}, other)["y"].tolist() == [2, 4, 6]

    def test_in_oracle_mode_a_state_is_not_rounded(self, counter):
        x = np.array([2048, 1, 1], np.float16)
        sums = {}
        for mode in ("declared", "oracle"):
            model = MLModel(counter, mode=mode)
            state = model.make_state()
            for _ in range(2):
                model.predict({"x": x}, state)
            model.predict({"x": np.array([1, 0, 0], np.float16)}, state)
            sums[mode] = float(state.read("total")[0])
        assert sums == {"declared": 4096.0, "oracle": 4097.0}

    def test_missing_and_unexpected_states_are_rejected(self, counter, model):
        stateful = MLModel(counter)
        x = np.zeros(3, np.float16)
        with pytest.raises(PredictionInputError) as caught:
            stateful.predict({"x": x})
        assert str(caught.value) == (
            "no state for function 'main', which has ['total']\n"
            "  expected: predict(data, state) with the result of make_state()"
        )
        with pytest.raises(PredictionInputError, match=r"^a state for function 'main', which has none$"):
            model.predict({"ids": IDS}, stateful.make_state())
        with pytest.raises(
            PredictionInputError, match=r"^the state object has no state 'total'\n  expected: one of \[\]$"
        ):
            stateful.predict({"x": x}, model.make_state())
        with pytest.raises(PredictionInputError, match="the state object has no state 'sum'"):
            stateful.make_state().read("sum")

    def test_a_failed_prediction_leaves_the_state_as_it_was(self):
        """The state is written before an operation fails."""

        @mb.program(
            input_specs=[mb.TensorSpec((1,), dtype=types.int32), mb.StateTensorSpec((1,), dtype=types.fp16)],
            opset_version=ct.target.iOS18,
        )
        def program(index, kept):
            before = mb.read_state(input=kept)
            after = mb.coreml_update_state(state=kept, value=mb.add(x=before, y=np.float16(1)))
            table = np.arange(4, dtype=np.float16)
            return mb.add(x=mb.gather(x=table, indices=index), y=after, name="y")

        model = MLModel(
            ct.convert(
                program,
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
            )
        )
        state = model.make_state()
        assert model.predict({"index": np.array([3], np.int32)}, state)["y"].tolist() == [4.0]
        with pytest.raises(PredictionInputError, match="index 9 is out of bounds"):
            model.predict({"index": np.array([9], np.int32)}, state)
        assert state.read("kept").tolist() == [1.0]


def test_a_state_of_another_mode_is_refused(counter):
    declared, oracle = MLModel(counter), MLModel(counter, mode="oracle")
    with pytest.raises(PredictionInputError) as caught:
        declared.predict({"x": np.array([1, 2, 3], np.float16)}, oracle.make_state())
    assert str(caught.value) == (
        "state 'total' is float32[3] on cpu\n"
        "  expected: float16[3] on cpu, from make_state() of a model of this mode and device"
    )


def test_outputs_share_no_memory(build):
    """Two outputs of one tensor: writing to one leaves the other."""
    inputs = {"x": np.arange(4, dtype=np.float32)}

    def body(x):
        y = mb.mul(x=x, y=np.float32(2), name="y")
        return y, mb.reshape(x=y, shape=[2, 2], name="z")

    outputs = MLModel(build(inputs, body)).predict(inputs)
    assert not np.shares_memory(outputs["y"], outputs["z"])
    outputs["y"][:] = -1
    assert outputs["z"].tolist() == [[0, 2], [4, 6]]


def test_caller_settings_do_not_change_results(build):
    """Autocast and reduced precision of products are the caller's, and come back."""
    rng = np.random.default_rng(5)
    inputs = {"x": rng.standard_normal((8, 64)).astype(np.float32)}
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    model = MLModel(build(inputs, lambda x: mb.matmul(x=x, y=weight, name="y")))
    expected = model.predict(inputs)["y"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(model.predict(inputs)["y"], expected)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_functions_of_one_package(tmp_path, build):
    """Two functions saved together; one by default, each by name."""
    for name, factor in (("double", np.float32(2)), ("triple", np.float32(3))):
        single = build({"x": np.ones(4, np.float32)}, lambda x, by=factor: mb.mul(x=x, y=by, name="y"))
        single.save(str(tmp_path / f"{name}.mlpackage"))
    description = ct.utils.MultiFunctionDescriptor()
    for name in ("double", "triple"):
        description.add_function(
            str(tmp_path / f"{name}.mlpackage"), src_function_name="main", target_function_name=name
        )
    description.default_function_name = "triple"
    path = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(description, str(path))
    x = np.arange(4, dtype=np.float32)
    assert MLModel(path).function_name == "triple"
    assert MLModel(path).predict({"x": x})["y"].tolist() == [0, 3, 6, 9]
    assert MLModel(path, function_name="double").predict({"x": x})["y"].tolist() == [0, 2, 4, 6]
    with pytest.raises(PackageError, match=r"no function 'main'\n  expected: one of \['double', 'triple'\]"):
        MLModel(path, function_name="main")


def test_the_wide_oracle_computes_in_fp64(converted, scorer):
    scores = MLModel(converted, mode="oracle-fp64").predict({"ids": IDS})["scores"]
    table = scorer.table.weight.detach().half().double().numpy()  # the program's weights are of fp16
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, table[IDS] @ table.T, rtol=1e-14)


def test_missing_device_is_rejected(converted):
    with pytest.raises(MachineError) as caught:
        MLModel(converted, device="cuda:99")
    assert caught.value.found.endswith("has no device 'cuda:99' here")
    with pytest.raises(MachineError, match="has no device 'mps' here"):
        MLModel(converted, device="mps")


@pytest.mark.needs_cuda
def test_gpu_matches_cpu(converted):
    on_cpu, on_gpu = (
        MLModel(converted, mode="oracle-fp64", device=device).predict({"ids": IDS})["scores"]
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-12)


def test_digest_detects_a_flipped_bit_of_a_weight(converted, tmp_path):
    package = tmp_path / "scorer.mlpackage"
    converted.save(str(package))
    recorded = digest(package)
    MLModel(package, expected_digest=recorded)
    (weights,) = package.rglob("weight.bin")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    MLModel(package)  # the format itself has nothing that would tell
    with pytest.raises(DigestError) as caught:
        MLModel(package, expected_digest=recorded)
    assert str(caught.value) == (f"{package}: found {digest(package)}\n  expected: {recorded}, as it was recorded")
    with pytest.raises(DigestError, match="found nothing"):
        MLModel(tmp_path / "absent.mlpackage", expected_digest=recorded)
    with pytest.raises(ValueError, match="this model is in memory"):
        MLModel(converted, expected_digest=recorded)


def test_one_state_passes_between_functions(tmp_path):
    """As prefill and decode share a cache: one function adds to the state, the other adds it twice."""

    def save(name, factor):
        @mb.program(
            input_specs=[mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)],
            opset_version=ct.target.iOS18,
        )
        def program(x, total):
            summed = mb.add(x=mb.read_state(input=total), y=mb.mul(x=x, y=np.float16(factor)))
            return mb.identity(x=mb.coreml_update_state(state=total, value=summed), name="y")

        path = tmp_path / f"{name}.mlpackage"
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).save(str(path))
        return str(path)

    description = ct.utils.MultiFunctionDescriptor()
    for name, factor in (("once", 1), ("twice", 2)):
        description.add_function(save(name, factor), src_function_name="main", target_function_name=name)
    description.default_function_name = "once"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(description, str(both))
    once, twice = (MLModel(both, function_name=name) for name in ("once", "twice"))
    state = once.make_state()
    x = {"x": np.array([1, 10], np.float16)}
    assert once.predict(x, state)["y"].tolist() == [1, 10]
    assert twice.predict(x, state)["y"].tolist() == [3, 30]
    assert once.predict(x, state)["y"].tolist() == [4, 40]
    assert state.read("total").tolist() == [4, 40]
