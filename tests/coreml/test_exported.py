"""The front end `torch.export`: the same interface and numbers as the traced program, and its own errors."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from coremill.core.config import ConvertConfig, ExportConfig
from coremill.core.contract import ShapeOk, ShapeSet, read_contract
from coremill.core.digest import file_digest
from coremill.core.errors import TorchScriptError
from coremill.coreml import export
from coremill.coreml.convert import convert
from coremill.coreml.graph import describe, load_program, read_interface, run_program
from coremill.coreml.interface import differences, package_interfaces
from coremill.coreml.package import read_spec
from coremill.mil import MLModel

# coremltools' reader of exported programs calls a deprecated function of coremltools.
pytestmark = pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning")

SHAPES = ShapeSet(primary=96, all=(80, 96, 128))
SETTINGS = ExportConfig(frontend="torch-export")


def export_here(build, folder):
    source = export.Source(checkpoint=build.checkpoint, tokenizer=build.tokenizer, prompts=build.dataset, toy=True)
    program, contract = folder / "tiny.pt2", folder / "tiny_contract.json"
    export.export(source, SHAPES, SETTINGS, program=program, contract=contract)
    return program, contract


@pytest.fixture(scope="module")
def exported(pristine, tmp_path_factory):
    return export_here(pristine, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def package(exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny.mlpackage"
    convert(*exported, out, ConvertConfig(), toy=True)
    return out


def test_the_contract_names_the_front_end(exported, pristine):
    contract = read_contract(exported[1])
    traced = pristine.read_contract()
    assert (contract.frontend, traced.frontend) == ("torch-export", "torchscript")
    assert (contract.inputs, contract.outputs, contract.shapes) == (traced.inputs, traced.outputs, traced.shapes)
    assert all(isinstance(result, ShapeOk) for result in contract.shape_validation.values())


def test_both_front_ends_give_the_same_outputs(exported, pristine):
    ours, theirs = load_program(exported[0], "torch-export"), load_program(pristine.graph)
    for length in (1, 2, 80, 97, 128):
        ids = list(range(20, 20 + length))
        for found, expected in zip(run_program(ours, ids), run_program(theirs, ids), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    interface = read_interface(ours, [[0] * 80, [0] * 96])
    assert describe(interface.outputs) == "logits float32 (1, T, 512), halt_logits float32 (1, T, 2)"


def test_the_packages_of_both_front_ends_agree(package, pristine, exported):
    assert differences(read_contract(exported[1]).package_functions, package_interfaces(read_spec(package))) == ()
    ours, theirs = MLModel(package), MLModel(pristine.package)
    for length in SHAPES.all:
        ids = {"input_ids": np.arange(30, 30 + length, dtype=np.int32)[None]}
        found, expected = ours.predict(ids), theirs.predict(ids)
        for name in ("logits", "halt_logits"):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=0.05)


def test_another_process_exports_the_same_bytes_without_local_paths(pristine, exported, tmp_path):
    script = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as N\n"
        "from coremill.coreml import export\n"
        "from coremill.core.config import ExportConfig; from coremill.core.contract import ShapeSet\n"
        "checkpoint, tokenizer, dataset, out = map(Path, sys.argv[1:])\n"
        "source = export.Source(checkpoint=checkpoint, tokenizer=tokenizer, prompts=dataset, toy=True)\n"
        "export.export(source, ShapeSet(primary=96, all=(80, 96, 128)), ExportConfig(frontend='torch-export'),\n"
        "                 program=out / 'tiny.pt2', contract=out / 'tiny_contract.json')\n"
    )
    paths = [str(path) for path in (pristine.checkpoint, pristine.tokenizer, pristine.dataset, tmp_path)]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    assert file_digest(tmp_path / "tiny.pt2") == file_digest(exported[0])
    with zipfile.ZipFile(exported[0]) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"decoder.py" not in everything
    assert b"site-packages" not in everything


def test_a_length_beyond_the_exported_ones_is_an_error(exported):
    with pytest.raises(RuntimeError, match="128"):
        run_program(load_program(exported[0], "torch-export"), [0] * 129)


def test_a_file_of_another_format_is_an_error(exported, pristine, tmp_path):
    with pytest.raises(TorchScriptError) as caught:
        load_program(pristine.graph, "torch-export")
    assert caught.value.found == f"{pristine.graph} is a TorchScript program, not a torch.export program"
    with pytest.raises(TorchScriptError, match=r"tiny\.pt2 is a torch\.export program, not a TorchScript program"):
        load_program(exported[0])
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(exported[0].read_bytes()[:1000])
    with pytest.raises(TorchScriptError, match=r"cut\.pt2 is not a torch\.export program: File is not a zip file"):
        load_program(cut, "torch-export")
