"""`coremill mil run`: what it prints and writes, and what it says of bad input."""

from __future__ import annotations

import pickle
import random
import zipfile

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from PIL import Image

from coremill.core.errors import PredictionInputError
from coremill.mil import MLModel
from coremill.mil.commands.arrays import as_arrays, read_npz
from coremill.mil.commands.run import describe

SAVED = "  expected: an .npz file as numpy.savez writes it, with an array for each input by its name\n"


@pytest.fixture(scope="module")
def doubled(save_in, tmp_path_factory):
    inputs = {"x": np.ones(4, np.float16)}
    return save_in(
        tmp_path_factory.mktemp("doubled"), "doubled", inputs, lambda x: mb.mul(x=x, y=np.float16(2), name="y")
    )


@pytest.fixture(scope="module")
def painting(tmp_path_factory):
    """An image of 3 x 2 in, an array of its negative out."""
    specs = [mb.TensorSpec((1, 3, 2, 3), dtype=types.fp32)]
    program = mb.program(input_specs=specs)(lambda x: mb.sub(x=np.float32(255), y=x, name="y"))
    path = tmp_path_factory.mktemp("painting") / "painting.mlpackage"
    ct.convert(
        program,
        inputs=[ct.ImageType("x", shape=(1, 3, 2, 3))],
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    return path


def test_images_are_arrays_of_pixels(mil, painting, tmp_path):
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    out = tmp_path / "y.npz"
    ended = mil("run", painting, "--input", _npz(tmp_path / "x.npz", x=pixels), "--out", out)
    assert (ended.code, ended.err) == (0, "")
    with np.load(out) as written:
        np.testing.assert_array_equal(written["y"][0].transpose(1, 2, 0), 255.0 - pixels)
    assert "input   x     image RGB  3 x 2, width first\n" in mil("inspect", painting).out
    assert mil("compare", painting, painting, "--max-abs", "0").code == 0
    assert mil("bisect", painting).code == 0
    assert mil("lint", painting).code == 0


def test_images_and_classes_become_arrays():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    arrays = as_arrays({"image": image, "label": "cat", "index": 3, "by_label": {"cat": 0.75, "dog": 0.25}})
    np.testing.assert_array_equal(arrays["image"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(arrays["by_label"], [0.75, 0.25])
    assert describe("label", arrays["label"])[:3] == ("label", "string", "cat")
    assert describe("index", arrays["index"])[2:5] == ("[]", "3", "3")


def test_array_that_is_not_an_image_is_rejected(mil, painting, tmp_path):
    ended = mil("run", painting, "--input", _npz(tmp_path / "x.npz", x=np.zeros((1, 3, 2, 3), np.uint8)))
    assert (ended.code, ended.err) == (
        46,
        "prediction input error: image input 'x' is uint8 of shape [1, 3, 2, 3]\n"
        "  expected: uint8 (height, width, 3)\n",
    )


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_outputs_are_described(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.array([1, -2, 3, 5], np.float32))
    assert mil("run", doubled, "--input", given) == (
        0,
        "output  dtype    shape  min  max  mean  finite\n"
        "──────────────────────────────────────────────\n"
        "y       float16  [4]     -4   10   3.5  all\n",
        "",
    )


def test_values_that_are_not_finite_are_counted(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.array([np.nan, 60000, -60000, 1], np.float32))
    assert "y       float16  [4]      2    2     2  1 NaN, 2 inf\n" in mil("run", doubled, "--input", given).out
    given = _npz(tmp_path / "x.npz", x=np.full(4, np.nan, np.float32))
    assert mil("run", doubled, "--input", given).out.splitlines()[-1].split() == ["y", "float16", "[4]", "4", "NaN"]


def test_modes_and_out(mil, doubled, tmp_path):
    x = np.array([1, 40000, 3, 4], np.float32)
    given, out = _npz(tmp_path / "x.npz", x=x), tmp_path / "y.npz"
    for mode, dtype, second in (
        ("declared", np.float16, np.inf),
        ("oracle", np.float32, 2 * float(np.float16(40000))),
    ):
        assert mil("run", doubled, "--input", given, "--mode", mode, "--out", out).code == 0
        with np.load(out, allow_pickle=False) as written:
            assert written.files == ["y"]
            assert written["y"].dtype == dtype
            np.testing.assert_array_equal(written["y"], np.array([2, second, 6, 8], dtype))


def test_written_bytes_depend_on_the_arrays_alone(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.ones(4, np.float16))
    for name in ("a.npz", "b.npz"):
        mil("run", doubled, "--input", given, "--out", tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_state_is_new_in_each_run(mil, bundle, tmp_path):
    given = tmp_path / "x.npz"
    np.savez(given, input_ids=np.array([[3, 4]]), mask=np.zeros((1, 1, 2, 2), np.float16))
    texts = [mil("run", bundle / "cache.mlpackage", "--input", given) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].out.splitlines()[-1].split()[:5] == ["logits", "float16", "[1,", "2,", "48]"]


def test_names_are_checked(mil, doubled, tmp_path):
    ended = mil("run", doubled, "--input", _npz(tmp_path / "x.npz", z=np.ones(4)))
    assert (ended.code, ended.out, ended.err) == (
        46,
        "",
        "prediction input error: inputs missing ['x'] and unknown ['z']\n  expected: exactly ['x']\n",
    )


def test_a_shape_is_checked(mil, bundle, tmp_path):
    ended = mil(
        "run", bundle / "decoder.mlpackage", "--input", _npz(tmp_path / "x.npz", input_ids=np.ones((1, 9), int))
    )
    assert ended.code == 46
    assert ended.err == (
        "prediction input error: input 'input_ids' is of shape [1, 9]\n"
        "  expected: one of [1, 8], [1, 16], [1, 24]\n"
    )


def test_missing_input_file_is_rejected(mil, doubled, tmp_path):
    ended = mil("run", doubled, "--input", tmp_path / "x.npz")
    assert ended.code == 46
    assert (
        ended.err == f"prediction input error: cannot read {tmp_path / 'x.npz'}: No such file or directory\n{SAVED}"
    )


class _Trap:
    def __reduce__(self):
        return (_sprung, ())


_SPRUNG = []


def _sprung():
    _SPRUNG.append(True)


def test_nothing_is_unpickled(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.array([_Trap()], object))
    _SPRUNG.clear()
    ended = mil("run", doubled, "--input", given)
    assert ended.code == 46
    assert ended.err.startswith(f"prediction input error: {given} is not readable: Object arrays cannot be loaded")
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(_Trap()))
    assert mil("run", doubled, "--input", tmp_path / "bare.npz").code == 46
    assert _SPRUNG == []


@pytest.mark.parametrize("kept", [0, 1, 10, 60, 200])
def test_a_truncated_file(mil, doubled, tmp_path, kept):
    given = _npz(tmp_path / "x.npz", x=np.ones(4, np.float16))
    given.write_bytes(given.read_bytes()[:kept])
    ended = mil("run", doubled, "--input", given)
    assert ended.code == 46
    assert ended.err.startswith("prediction input error: ")
    assert ended.err.endswith(SAVED)


def _npz_of(path, header, compression=zipfile.ZIP_STORED):
    """An .npz file of one array of 16 zero bytes behind the header."""
    padded = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(16)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", content)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70},), }}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }",
        "{'descr': [('a',)], 'fortran_order': False, 'shape': (4,), }",
        "{'descr': (), 'fortran_order': False, 'shape': (4,), }",
        "{'descr': '<f4', 'fortran_order': False, 1: (4,), }",
        "{[]: '<f4', 'fortran_order': False, 'shape': (4,), }",
        "(" * 3000,
        " {\n\t1\n  2",
    ],
)
def test_invalid_header_is_rejected(mil, doubled, tmp_path, header):
    given = _npz_of(tmp_path / "x.npz", header)
    ended = mil("run", doubled, "--input", given)
    assert ended.code == 46
    assert ended.err.startswith(f"prediction input error: {given} is not readable: ")
    assert ended.err.endswith(SAVED)


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damaged_bytes_are_rejected(tmp_path, compression):
    """Whatever byte is wrong, and however it was packed: the arrays, or the one error."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"
    whole = _npz_of(tmp_path / "x.npz", header, compression).read_bytes()
    damaged, generator, errors = tmp_path / "damaged.npz", random.Random(0), []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        damaged.write_bytes(data)
        try:
            read_npz(damaged)
        except PredictionInputError as error:
            errors.append(str(error))
    assert len(errors) > 200
    assert all(str(damaged) in error for error in errors)


def test_one_array_without_a_name(mil, doubled, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(4))
    ended = mil("run", doubled, "--input", tmp_path / "x.npy")
    assert (ended.code, ended.err) == (
        46,
        f"prediction input error: {tmp_path / 'x.npy'} is not readable: File is not a zip file\n{SAVED}",
    )


def test_an_output_may_have_any_name(mil, save, tmp_path):
    """`file` is a parameter of numpy.savez."""
    package = save("named", {"x": np.ones(4, np.float32)}, lambda x: mb.sin(x=x, name="file"))
    given, out = _npz(tmp_path / "x.npz", x=np.zeros(4)), tmp_path / "y.npz"
    assert mil("run", package, "--input", given, "--out", out).code == 0
    with np.load(out) as written:
        assert written["file"].tolist() == [0, 0, 0, 0]


def test_the_input_is_not_overwritten(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.ones(4, np.float16))
    assert mil("run", doubled, "--input", given, "--out", given).code == 52


def test_unwritable_output_is_rejected(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.ones(4, np.float16))
    (tmp_path / "file").write_text("")
    ended = mil("run", doubled, "--input", given, "--out", tmp_path / "file" / "y.npz")
    assert ended.code == 52
    assert ended.err.startswith(f"output error: cannot write {tmp_path / 'file' / 'y.npz'}: ")


def test_an_unknown_function_and_mode(mil, doubled, tmp_path):
    given = _npz(tmp_path / "x.npz", x=np.ones(4, np.float16))
    ended = mil("run", doubled, "--input", given, "--function", "none")
    assert ended.code == 44
    assert "no function 'none'\n  expected: one of ['main']\n" in ended.err
    assert mil("run", doubled, "--input", given, "--mode", "exact").code == 2


def test_it_prints_what_the_library_predicts(mil, bundle, tmp_path):
    data = {"x": np.linspace(-3, 5, 96, dtype=np.float16).reshape(3, 32)}
    (expected,) = MLModel(bundle / "lut.mlpackage").predict(data).values()
    row = mil("run", bundle / "lut.mlpackage", "--input", _npz(tmp_path / "x.npz", **data)).out.splitlines()[-1]
    wide = expected.astype(np.float64)
    assert row.split()[-4:-1] == [f"{value:.4g}" for value in (wide.min(), wide.max(), wide.mean())]
