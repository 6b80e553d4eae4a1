"""Create the bundle of `coremill mil selftest`: small packages, inputs, and outputs computed by torch and numpy.

This is a script, not a test. Run it in a convert environment with the tests' packages:

    python tests/mil/commands/make_selftest.py src/coremill/mil/selftest

coremill.mil computes none of the outputs. `test_selftest.py` computes them again and compares.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb  # noqa: N813 - as every example of coremltools spells it
from coremltools.converters.mil.mil import types
from torch import nn

from coremill.coreml.package import MODEL, read_spec, write_manifest
from coremill.mil.commands.arrays import write_npz

Arrays = dict[str, np.ndarray]

HALF_DB, SINGLE_DB = 50.0, 100.0
"""Minimum SQNR of programs in fp16 and in fp32: far above that of a wrong operation, and below that of rounding."""

VOCAB, WIDTH, HEADS = 48, 32, 4
LENGTHS = (8, 16, 24)


@dataclass(frozen=True)
class Case:
    """A package and its calls, which run in order and share one state."""

    name: str
    covers: str
    min_sqnr_db: float
    model: Callable[[], Any]
    calls: Sequence[Arrays]
    expected: Callable[[], list[Arrays]] = field(repr=False)


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ids(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (1, length)).astype(np.int32)


# --- models in torch -------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One layer: layer norm, rotary embedding, causal attention with grouped heads, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        angles = torch.outer(torch.arange(LENGTHS[-1]).float(), 100 ** -(torch.arange(0, 8, 2) / 8))
        self.register_buffer("cos", torch.cat((angles, angles), 1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), 1).sin())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, T, V) of input_ids (1, T) int32."""
        length = input_ids.shape[1]
        x = self.embed(input_ids)
        y = self.norm(x)
        q = self._turn(self.q(y).view(1, length, HEADS, 8).transpose(1, 2), length)
        k = self._turn(self.k(y).view(1, length, 2, 8).transpose(1, 2), length)
        v = self.v(y).view(1, length, 2, 8).transpose(1, 2)
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(1, length, WIDTH))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)

    def _turn(self, x: torch.Tensor, length: int) -> torch.Tensor:
        half = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return x * self.cos[:length] + half * self.sin[:length]


def decoder_model() -> Any:
    shapes = ct.EnumeratedShapes([(1, length) for length in LENGTHS], default=(1, LENGTHS[0]))
    with torch.no_grad():
        traced = torch.jit.trace(Decoder().eval(), torch.zeros(1, LENGTHS[0], dtype=torch.int32))
    return ct.convert(
        traced,
        inputs=[ct.TensorType("input_ids", shape=shapes, dtype=np.int32)],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


def decoder_expected() -> list[Arrays]:
    module = Decoder().eval()
    with torch.no_grad():
        return [{"logits": module(torch.from_numpy(call["input_ids"])).numpy()} for call in DECODER_CALLS]


DECODER_CALLS = [{"input_ids": ids(length, seed=length)} for length in LENGTHS]

CACHE = 16


class Cached(nn.Module):
    """One layer of attention with a key/value cache; the width of the mask is the end of the written positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, CACHE, 8, dtype=torch.float16))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(1, -1, HEADS, 8).transpose(1, 2)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, q, V) of input_ids (1, q) with a mask (1, 1, q, end) of 0 and -30000."""
        x = self.embed(input_ids)
        end = mask.shape[-1]
        start = end - input_ids.shape[-1]
        self.keys[:, :, start:end] = self._heads(self.k(x)).half()
        self.values[:, :, start:end] = self._heads(self.v(x)).half()
        keys, values = self.keys[:, :, :end].float(), self.values[:, :, :end].float()
        mixed = F.scaled_dot_product_attention(self._heads(self.q(x)), keys, values, attn_mask=mask)
        return self.head(mixed.transpose(1, 2).flatten(2))


def cache_model() -> Any:
    query, end = ct.RangeDim(1, 8, default=1), ct.RangeDim(1, CACHE, default=1)
    with torch.no_grad():
        traced = torch.jit.trace(
            Cached().eval(), (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5)), check_trace=False
        )
    return ct.convert(
        traced,
        inputs=[
            ct.TensorType("input_ids", shape=(1, query), dtype=np.int32),
            ct.TensorType("mask", shape=(1, 1, query, end), dtype=np.float16),
        ],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=(1, HEADS, CACHE, 8), dtype=np.float16), name=name)
            for name in ("keys", "values")
        ],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


def causal(query: int, end: int) -> np.ndarray:
    return np.where(np.tril(np.ones((query, end), np.bool_), end - query), 0, -3e4).astype(np.float16)[None, None]


CACHE_CALLS = [
    {"input_ids": ids(query, seed=query), "mask": causal(query, end)}
    for query, end in [(5, 5), (1, 6), (1, 7), (4, 11)]
]


def cache_expected() -> list[Arrays]:
    module = Cached().eval()
    with torch.no_grad():
        return [
            {"logits": module(torch.from_numpy(call["input_ids"]), torch.from_numpy(call["mask"]).float()).numpy()}
            for call in CACHE_CALLS
        ]


# --- programs built operation by operation ----------------------------------------------------------

_MIL_TYPES = {np.dtype(np.float16): types.fp16, np.dtype(np.float32): types.fp32, np.dtype(np.int32): types.int32}


def program(inputs: Mapping[str, np.ndarray], body: Callable[..., Any], ios: int = 18) -> Callable[[], Any]:
    """Return a function that converts `body` to a model; no pass of the converter changes the program."""
    target = getattr(ct.target, f"iOS{ios}")

    def make() -> Any:
        specs = [mb.TensorSpec(each.shape, dtype=_MIL_TYPES[each.dtype]) for each in inputs.values()]
        function = eval(f"lambda {', '.join(inputs)}: body({', '.join(inputs)})", {"body": body})
        return ct.convert(
            mb.program(input_specs=specs, opset_version=target)(function),
            minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )

    return make


X_HALF = {"x": random(3, 32, seed=10).astype(np.float16)}

INT4 = np.random.default_rng(11).integers(-8, 8, (24, 32)).astype(np.int8)
INT4_SCALE = (np.abs(random(24, 4, seed=12)) / 8 + 0.01).astype(np.float16)
INT4_OFFSET = np.random.default_rng(13).integers(-3, 4, (24, 4)).astype(np.int8)


def int4_body(x: Any) -> Any:
    narrow = types.np_int4_dtype
    weight = mb.constexpr_blockwise_shift_scale(
        data=INT4.astype(narrow), scale=INT4_SCALE, offset=INT4_OFFSET.astype(narrow)
    )
    return mb.linear(x=x, weight=weight, name="y")


def int4_expected() -> list[Arrays]:
    steps = INT4.astype(np.float32) - np.repeat(INT4_OFFSET, 8, 1)
    weight = steps * np.repeat(INT4_SCALE.astype(np.float32), 8, 1)
    return [{"y": X_HALF["x"].astype(np.float32) @ weight.T}]


INT8 = np.random.default_rng(14).integers(-128, 128, (24, 32)).astype(np.int8)
INT8_SCALE = (np.abs(random(24, seed=15)) / 64 + 0.001).astype(np.float16)


def int8_body(x: Any) -> Any:
    weight = mb.constexpr_affine_dequantize(
        quantized_data=INT8, zero_point=np.int8(3), scale=INT8_SCALE, axis=np.int32(0)
    )
    return mb.linear(x=x, weight=weight, name="y")


def int8_expected() -> list[Arrays]:
    weight = (INT8.astype(np.float32) - 3) * INT8_SCALE.astype(np.float32)[:, None]
    return [{"y": X_HALF["x"].astype(np.float32) @ weight.T}]


LUT_INDICES = np.random.default_rng(16).integers(0, 16, (24, 32)).astype(np.uint8)
LUT = random(2, 16, seed=17).astype(np.float16)
"""One table for each block of 12 rows."""


def lut_body(x: Any) -> Any:
    weight = mb.constexpr_lut_to_dense(
        indices=LUT_INDICES.astype(types.np_uint4_dtype), lut=LUT.reshape(2, 1, 16, 1)
    )
    return mb.linear(x=x, weight=weight, name="y")


def lut_expected() -> list[Arrays]:
    weight = LUT.astype(np.float32)[np.arange(24)[:, None] // 12, LUT_INDICES]
    return [{"y": X_HALF["x"].astype(np.float32) @ weight.T}]


BIASES = random(2, 16, seed=18)
CONTROL_CALLS = [
    {"x": random(16, seed=19) - 2, "limit": np.array([40], np.float32)},
    {"x": random(16, seed=20) + 2, "limit": np.array([900], np.float32)},
]


def control_body(x: Any, limit: Any) -> Any:
    """Add one of two biases to x by the sign of its sum, then double x while its magnitudes are within a limit."""
    is_positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0], keep_dims=False), y=np.float32(0))
    biased = mb.cond(
        pred=is_positive,
        _true_fn=lambda: mb.add(x=x, y=BIASES[0]),
        _false_fn=lambda: mb.add(x=mb.mul(x=x, y=np.float32(-1)), y=BIASES[1]),
    )

    def within(value: Any, count: Any) -> Any:
        greatest = mb.reduce_max(x=mb.abs(x=value), axes=[0], keep_dims=True)
        return mb.squeeze(x=mb.less(x=greatest, y=limit), axes=[0])

    def doubled(value: Any, count: Any) -> Any:
        return mb.mul(x=value, y=np.float32(2)), mb.add(x=count, y=np.int32(1))

    value, count = mb.while_loop(
        _cond=within, _body=doubled, loop_vars=(biased, mb.identity(x=np.array([0], np.int32)))
    )
    return mb.identity(x=value, name="y"), mb.identity(x=count, name="count")


def control_expected() -> list[Arrays]:
    results = []
    for call in CONTROL_CALLS:
        value = call["x"] + BIASES[0] if call["x"].sum() > 0 else BIASES[1] - call["x"]
        count = 0
        while np.abs(value).max() < call["limit"][0]:
            value, count = value * 2, count + 1
        results.append({"y": value, "count": np.array([count], np.int32)})
    return results


TABLE = random(12, 5, seed=21)
INDEX_CALLS = [
    {
        "rows": np.array([[3, 0], [11, 3]], np.int32),
        "columns": np.array([[1, 1, 4], [0, 2, 2]], np.int32),
        "updates": random(2, 3, seed=22),
    }
]


def index_body(rows: Any, columns: Any, updates: Any) -> Any:
    picked = mb.gather(x=TABLE, indices=rows, axis=0, name="gathered")  # (2, 2, 5)
    along = mb.gather_along_axis(x=TABLE[:2], indices=columns, axis=1, name="along")  # (2, 3)
    nd = mb.gather_nd(x=TABLE, indices=np.array([[0, 4], [7, 1]], np.int32), batch_dims=0)
    added = mb.scatter_along_axis(
        data=TABLE[:2], indices=columns, updates=updates, axis=1, mode="add", name="scattered_along"
    )
    scattered = mb.scatter_nd(
        data=TABLE, indices=mb.expand_dims(x=rows, axes=[2]), updates=picked, mode="max", name="scattered_nd"
    )
    return picked, along, mb.identity(x=nd, name="nd"), added, scattered


def index_expected() -> list[Arrays]:
    (call,) = INDEX_CALLS
    picked = TABLE[call["rows"]]
    added = TABLE[:2].copy()
    np.add.at(added, (np.arange(2)[:, None], call["columns"]), call["updates"])
    scattered = TABLE.copy()
    np.maximum.at(scattered, call["rows"], picked)
    return [
        {
            "gathered": picked,
            "along": np.take_along_axis(TABLE[:2], call["columns"], 1),
            "nd": TABLE[[0, 7], [4, 1]],
            "scattered_along": added,
            "scattered_nd": scattered,
        }
    ]


GAMMA, BETA = random(16, seed=23), random(16, seed=24)
NORM_CALLS = [{"x": random(2, 6, 16, seed=25), "y": random(2, 6, 16, seed=26)}]


def norm_body(x: Any, y: Any) -> Any:
    normed = mb.layer_norm(x=x, axes=[-1], gamma=GAMMA, beta=BETA, epsilon=np.float32(1e-5), name="layer_norm")
    attended = mb.scaled_dot_product_attention(query=normed, key=y, value=y, name="attention")
    soft = mb.softmax(x=mb.gelu(x=attended, mode="EXACT", name="gelu"), axis=-1, name="softmax")
    spread = mb.reduce_log_sum_exp(x=attended, axes=[-1], keep_dims=False, name="log_sum_exp")
    return normed, attended, soft, spread


def norm_expected() -> list[Arrays]:
    (call,) = NORM_CALLS
    x, y = (torch.from_numpy(call[name]) for name in ("x", "y"))
    normed = F.layer_norm(x, (16,), torch.from_numpy(GAMMA), torch.from_numpy(BETA), 1e-5)
    attended = torch.softmax(normed @ y.transpose(1, 2) / math.sqrt(16), -1) @ y
    outputs = {
        "layer_norm": normed,
        "attention": attended,
        "softmax": torch.softmax(F.gelu(attended), -1),
        "log_sum_exp": torch.logsumexp(attended, -1),
    }
    return [{name: value.numpy() for name, value in outputs.items()}]


CASES = (
    Case("decoder", "a decoder converted from torch; enumerated shapes", HALF_DB,
         decoder_model, DECODER_CALLS, decoder_expected),
    Case("cache", "attention with a key/value cache: states, range shapes", HALF_DB,
         cache_model, CACHE_CALLS, cache_expected),
    Case("int4", "int4 weights in blocks, with offsets (iOS18)", HALF_DB,
         program(X_HALF, int4_body), [X_HALF], int4_expected),
    Case("int8", "int8 weights, a scale a channel (iOS16)", HALF_DB,
         program(X_HALF, int8_body, 16), [X_HALF], int8_expected),
    Case("lut", "weights of 4-bit indices into two tables (iOS18)", HALF_DB,
         program(X_HALF, lut_body), [X_HALF], lut_expected),
    Case("control_flow", "cond and while_loop", SINGLE_DB,
         program(CONTROL_CALLS[0], control_body), CONTROL_CALLS, control_expected),
    Case("indexing", "gathers and scatters", SINGLE_DB,
         program(INDEX_CALLS[0], index_body), INDEX_CALLS, index_expected),
    Case("normalization", "layer norm, attention, gelu, softmax, log-sum-exp", SINGLE_DB,
         program(NORM_CALLS[0], norm_body), NORM_CALLS, norm_expected),
)  # fmt: skip


# --- the bundle -------------------------------------------------------------------------------------


def save_package(model: Any, package: Path) -> None:
    """Save a model reproducibly: the manifest's ids are derived from the content, and metadata are removed."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "saved.mlpackage"
        model.save(str(saved))
        shutil.copytree(saved, package)
    spec = read_spec(package)
    spec.description.ClearField("metadata")
    spec.mlProgram.attributes.clear()
    (package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    write_manifest(package)
    for path in (package, *package.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def arrays_of(case: Case) -> Arrays:
    """Return the inputs and expected outputs of all calls by name: `0.input.x`, `0.output.y`, `1.input.x`, …"""
    arrays = {}
    for position, (call, expected) in enumerate(zip(case.calls, case.expected(), strict=True)):
        arrays |= {f"{position}.input.{name}": array for name, array in call.items()}
        arrays |= {f"{position}.output.{name}": array for name, array in expected.items()}
    return arrays


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for case in CASES:
        save_package(case.model(), folder / f"{case.name}.mlpackage")
        write_npz(folder / f"{case.name}.npz", arrays_of(case))
    listed = [{"name": case.name, "covers": case.covers, "min_sqnr_db": case.min_sqnr_db} for case in CASES]
    (folder / "bundle.json").write_text(json.dumps({"cases": listed}, indent=2) + "\n")


if __name__ == "__main__":
    main()
