"""Compare coremill.mil with torch eager, on a decoder of 125 million parameters.

    python benchmarks/mil.py                    everything
    python benchmarks/mil.py speed int4 decode  some of it: speed, int4, decode, load, memory, attention

Each ratio compares declared mode with torch eager in fp32, with the same weights: medians of alternating runs in
one process with one thread count. Packages are made once, in build/bench-mil/. Run it in a convert environment, on
an idle machine; the load is printed.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import coremltools as ct
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coremill.core.command import exit_on_error
from coremill.core.config import ModelConfig
from coremill.core.contract import ModelArch
from coremill.core.digest import size_bytes
from coremill.coreml.decoder import Decoder, Main, decoder_weights
from coremill.mil import MLModel
from coremill.mil.plan import Step
from coremill.mil.values import Value
from coremill.model.student import Layer, Student, each, new_student

FOLDER = Path("build/bench-mil")
LENGTHS = (512, 1024, 2048)
CONTEXT = 512
"""Positions of the key/value cache."""
DECODED = 256
VOCAB = 32_000

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    d_model=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    d_ff=2560,
    max_seq_len=4096,
    arch=ModelArch(use_halt_head=False, tie_embeddings=True),
)
LONG = 4096


class CachedDecoder(nn.Module):
    """The student's layers for one new token at a time, with a key/value cache of CONTEXT positions.

    The length of the mask gives the position: input_ids (1, 1), mask (1, 1, 1, end).
    """

    keys: Tensor
    values: Tensor

    def __init__(self, student: Student, dtype: torch.dtype) -> None:
        super().__init__()
        config = student.config
        self.student = student
        shape = (config.n_layers, config.n_kv_heads, CONTEXT, config.head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=dtype))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        student = self.student
        end = mask.shape[-1]
        start = end - 1
        cos, sin = student.cos[start:end], student.sin[start:end]
        x = student.embed_tokens(input_ids)
        for number, layer in enumerate(each(Layer, student.layers)):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            q = rotate(attention._heads(attention.q_proj(y), attention.n_heads), cos, sin)
            k = rotate(attention._heads(attention.k_proj(y), attention.n_kv_heads), cos, sin)
            v = attention._heads(attention.v_proj(y), attention.n_kv_heads)
            self.keys[number : number + 1, :, start:end] = k.to(self.keys.dtype)
            self.values[number : number + 1, :, start:end] = v.to(self.values.dtype)
            mixed = nn.functional.scaled_dot_product_attention(
                q,
                self.keys[number : number + 1, :, :end].to(q.dtype),
                self.values[number : number + 1, :, :end].to(q.dtype),
                attn_mask=mask,
            )
            x = layer.transform(x + attention.o_proj(mixed.transpose(1, 2).flatten(2)))
        return nn.functional.linear(student.norm(x), student.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def student() -> Student:
    made = new_student(CONFIG, seed=1)
    made.eval()
    return made


def make_prefill(path: Path, lengths: Sequence[int]) -> None:
    listed = [(1, length) for length in lengths]
    shape = ct.EnumeratedShapes(listed, default=listed[0]) if len(listed) > 1 else listed[0]
    with torch.no_grad():
        decoder = Decoder(student().config, max(lengths))
        main = Main(decoder.set_weights(decoder_weights(student().config, student().state_dict()))).eval()
        traced = torch.jit.trace(main, torch.zeros(listed[0], dtype=torch.int32), check_trace=False)
    ct.convert(
        traced,
        inputs=[ct.TensorType("input_ids", shape=shape, dtype=np.int32)],
        outputs=[ct.TensorType("logits")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    ).save(str(path))


def make_int4(path: Path) -> None:
    model = ct.models.MLModel(str(package("prefill")), skip_model_load=True)
    settings = ct.optimize.coreml.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
    )
    ct.optimize.coreml.linear_quantize_weights(
        model, ct.optimize.coreml.OptimizationConfig(global_config=settings)
    ).save(str(path))


def make_decode(path: Path) -> None:
    module = CachedDecoder(student(), torch.float16).eval()
    end = ct.RangeDim(1, CONTEXT, default=1)
    with torch.no_grad():
        example = (torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 5))
        traced = torch.jit.trace(module, example, check_trace=False)
    ct.convert(
        traced,
        inputs=[
            ct.TensorType("input_ids", shape=(1, 1), dtype=np.int32),
            ct.TensorType("mask", shape=(1, 1, 1, end), dtype=np.float16),
        ],
        outputs=[ct.TensorType("logits")],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=tuple(module.keys.shape), dtype=np.float16), name=name)
            for name in ("keys", "values")
        ],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    ).save(str(path))


MAKERS: dict[str, Callable[[Path], None]] = {
    "prefill": lambda path: make_prefill(path, LENGTHS),
    "long": lambda path: make_prefill(path, (LONG,)),
    "int4": make_int4,
    "decode": make_decode,
}


def package(name: str) -> Path:
    """The package; it is made if it does not exist."""
    path = FOLDER / f"{name}.mlpackage"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        MAKERS[name](path)
        print(f"made {path}: {size_bytes(path):,} bytes in {time.perf_counter() - start:.0f} s")
    return path


def processor() -> str:
    """The name of the processor, and the instruction set that torch's kernels use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def take_turns(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median seconds of each, in alternating runs after a warm-up run."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for function, measured in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            if run:
                measured.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def ids(length: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(length).integers(0, VOCAB, (1, length)).astype(np.int32)


def report_ratio(what: str, ours_s: float, theirs_s: float, bound: float) -> None:
    ratio = ours_s / theirs_s
    verdict = "met" if ratio <= bound else "MISSED"
    print(f"{what:24} {ours_s:8.3f} s, eager {theirs_s:8.3f} s: {ratio:5.2f} (at most {bound}: {verdict})")


def prefill_speed(name: str, bound: float, runs: int) -> None:
    module = student()
    model = MLModel(package(name))
    for length in LENGTHS:
        tokens = ids(length)
        ours = functools.partial(model.predict, {"input_ids": tokens})
        with torch.inference_mode():
            measured = take_turns(ours, functools.partial(module, torch.from_numpy(tokens)), runs)
        report_ratio(f"{name}, T = {length}", *measured, bound)


def decode_speed(runs: int) -> None:
    module, model = CachedDecoder(student(), torch.float32).eval(), MLModel(package("decode"))
    tokens = ids(DECODED)

    def ours() -> None:
        state = model.make_state()
        for at in range(DECODED):
            mask = np.zeros((1, 1, 1, at + 1), np.float16)
            model.predict({"input_ids": tokens[:, at : at + 1], "mask": mask}, state)

    def theirs() -> None:
        with torch.inference_mode():
            given = torch.from_numpy(tokens)
            for at in range(DECODED):
                module(given[:, at : at + 1], torch.zeros(1, 1, 1, at + 1))

    report_ratio(f"decode, {DECODED} tokens", *take_turns(ours, theirs, runs), 1.4)


def load_time(runs: int) -> None:
    path = package("prefill")
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        MLModel(path)
        times.append(time.perf_counter() - start)
    found = statistics.median(times)
    print(f"{'load':24} {found:8.3f} s (at most 1: {'met' if found <= 1 else 'MISSED'})")


def largest_live_bytes(model: MLModel, tokens: npt.NDArray[np.int32]) -> int:
    """The peak size of the values of a run, without constants; shared memory is counted once."""
    plan = model.program.plan(model._target)
    constant = plan.general.constant_storages
    largest = 0

    def observe(step: Step, values: list[Value]) -> None:
        nonlocal largest
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in values
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in constant
        }
        largest = max(largest, sum(storages.values()))

    model.program.run([torch.from_numpy(tokens)], model._target, observe)
    return largest


def peak_in_child(name: str, length: int) -> int:
    """Bytes that a process allocates after its imports to load a package and run it once."""
    command = [sys.executable, __file__, "child", name, str(length)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str, length: int) -> None:
    before = status_bytes("VmRSS")
    MLModel(package(name)).predict({"input_ids": ids(length)})
    print(status_bytes("VmHWM") - before)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status; getrusage's figure would include the parent's memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def weights_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("weight.bin"))


def memory(name: str, lengths: Sequence[int]) -> None:
    path = package(name)
    model = MLModel(path)
    for length in lengths:
        allowed = weights_bytes(path) + largest_live_bytes(model, ids(length))
        peak = peak_in_child(name, length)
        verdict = "met" if peak <= 1.3 * allowed else "MISSED"
        print(
            f"{f'memory, T = {length}':24} {peak / 2**20:8.0f} MiB, weights and live values "
            f"{allowed / 2**20:.0f} MiB: {peak / allowed:.2f} (at most 1.3: {verdict})"
        )


def attention() -> None:
    """The peak of a whole process, which includes memory inside a kernel."""
    rest = peak_in_child("long", LONG) - weights_bytes(package("long")) - LONG * VOCAB * 2
    scores = CONFIG.n_heads * LONG * LONG * 2
    verdict = "met" if rest < scores else "MISSED"
    print(
        f"{f'attention, T = {LONG}':24} {rest / 2**20:8.0f} MiB besides weights and logits; the scores of all "
        f"heads at once would be {scores / 2**20:.0f} MiB in fp16: {verdict}"
    )
    memory("long", [LONG])


PARTS: dict[str, Callable[[int], None]] = {
    "speed": lambda runs: prefill_speed("prefill", 1.0, runs),
    "int4": lambda runs: prefill_speed("int4", 1.2, runs),
    "decode": lambda runs: decode_speed(max(1, runs // 2)),
    "load": load_time,
    "memory": lambda runs: memory("prefill", LENGTHS),
    "attention": lambda runs: attention(),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["child"]:
        child(arguments[1], int(arguments[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{student().n_parameters:,} parameters; torch {torch.__version__}, {options.threads} threads")
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for part in options.parts or PARTS:
        PARTS[part](options.runs)
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
