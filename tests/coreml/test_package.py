"""The package on disk: complete, canonical, and every change is detected."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.core.digest import digest, file_digest
from coremill.core.errors import DigestError, PackageError
from coremill.coreml.package import CONTRACT_KEY, MODEL, WEIGHT_FILE, WEIGHTS_KEY, check_package, read_spec

OTHER_HASHES = {**os.environ, "PYTHONHASHSEED": "random"}
"""Sets of strings have another order in each process."""


def test_a_package_records_the_digests_of_its_weights_and_contract(pristine):
    facts = check_package(pristine.package)
    assert facts.weights_digest == file_digest(pristine.package / "Data" / WEIGHT_FILE)
    assert facts.contract_digest == file_digest(pristine.contract)
    metadata = read_spec(pristine.package).description.metadata.userDefined
    assert sorted(metadata) == [
        CONTRACT_KEY,
        WEIGHTS_KEY,
        "com.github.apple.coremltools.source",
        "com.github.apple.coremltools.source_dialect",
        "com.github.apple.coremltools.version",
    ]


def test_another_process_gives_the_same_bytes_and_hides_the_converters_messages(pristine, tmp_path):
    """The package, the log and the diagnostics are the same; that process imports coremltools anew."""
    convert = [sys.executable, "-m", "coremill.conversion.convert_coreml", "--graph", str(pristine.graph)]
    convert += ["--contract", str(pristine.contract), "--toy"]
    convert += ["--out", str(tmp_path / "convert" / pristine.package.name)]
    done = subprocess.run(convert, check=True, env=OTHER_HASHES, capture_output=True, text=True)
    assert done.stdout == ""
    assert re.fullmatch(
        r"INFO coremill.coreml.convert: notices of coremltools: \d+ harmless, 1 compatibility, 0 warning, 0 error\n"
        r"INFO __main__: wrote .*/convert/tiny_ball\.mlpackage\n",
        done.stderr,
    )
    theirs, ours = tmp_path / "convert", pristine.package.parent
    assert (theirs / "conversion.log").read_text() == (ours / "conversion.log").read_text()
    assert digest(theirs) == digest(ours)


def test_two_processes_export_the_same_program(pristine, tmp_path):
    """Two new processes, because torch gives the modules of a second trace in a process other names."""
    programs = []
    for name in ("one", "two"):
        export = [
            sys.executable,
            "-m",
            "coremill.conversion.export_pytorch",
            "--checkpoint",
            str(pristine.checkpoint),
        ]
        export += ["--tokenizer", str(pristine.tokenizer), "--out", str(tmp_path / name), "--toy"]
        export += ["--shapes", "80,96,128", "--primary", "96"]
        subprocess.run(export, check=True, env=OTHER_HASHES)
        programs.append(tmp_path / name / pristine.graph.name)
    assert programs[0].read_bytes() == programs[1].read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_any_flipped_bit_of_weights_or_model_is_detected(pristine, tmp_path, data):
    package = tmp_path / "altered.mlpackage"
    if not package.exists():
        shutil.copytree(pristine.package, package)
    path = package / "Data" / data.draw(st.sampled_from([MODEL, WEIGHT_FILE]))
    original = path.read_bytes()
    offset = data.draw(st.integers(0, len(original) - 1))
    altered = bytearray(original)
    altered[offset] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(altered))
    try:
        with pytest.raises((DigestError, PackageError)):
            check_package(package)
    finally:
        path.write_bytes(original)


def test_a_changed_weight_is_an_error_with_both_digests(build):
    weights = build.package / "Data" / WEIGHT_FILE
    recorded = file_digest(weights)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(DigestError) as caught:
        check_package(build.package)
    assert str(caught.value) == (
        f"{weights}: found {file_digest(weights)}\n"
        f"  expected: {recorded}, which the package recorded when it was saved\n"
        "  run: python -m coremill.conversion.convert_coreml --help"
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("Manifest.json", "cannot read {package}/Manifest.json: No such file or directory"),
        (f"Data/{MODEL}", "{package} lacks Data/com.apple.CoreML/model.mlmodel"),
        (f"Data/{WEIGHT_FILE}", "{package} lacks Data/com.apple.CoreML/weights/weight.bin"),
    ],
)
def test_a_missing_part_is_an_error(build, part, message):
    (build.package / part).unlink()
    with pytest.raises(PackageError) as caught:
        check_package(build.package)
    assert caught.value.found == message.format(package=build.package)


def test_a_path_that_is_not_a_package_is_an_error(build, tmp_path):
    with pytest.raises(PackageError, match=r"absent\.mlpackage does not exist"):
        check_package(tmp_path / "absent.mlpackage")
    with pytest.raises(PackageError, match=r"tiny_ball\.pt is a file"):
        check_package(build.graph)
    (build.package / "Manifest.json").write_text('{"fileFormatVersion": "1.0.0"}')
    with pytest.raises(PackageError, match=r"Manifest\.json is not a package's manifest: .*itemInfoEntries"):
        check_package(build.package)


def test_a_package_saved_by_another_program_is_an_error(build, tmp_path):
    import coremltools

    model = coremltools.models.MLModel(str(build.package), skip_model_load=True)
    for key in (WEIGHTS_KEY, CONTRACT_KEY):
        del model.user_defined_metadata[key]
    model.save(str(tmp_path / "other.mlpackage"))
    with pytest.raises(PackageError, match=r"is not a package's manifest|has no `com\.coremill\.weights_sha256`"):
        check_package(tmp_path / "other.mlpackage")


def test_the_package_is_readable_by_everyone(pristine):
    modes = {stat.filemode(path.stat().st_mode) for path in (pristine.package, *pristine.package.rglob("*"))}
    assert modes == {"-rw-r--r--", "drwxr-xr-x"}
