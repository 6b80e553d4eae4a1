"""A small model that answers, and correct and defective GGUF files of it, not written by coremill's writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import msgspec
import numpy as np
import torch
import torch.nn.functional as F

from coremill.core.config import DatasetConfig, ModelConfig
from coremill.core.contract import ModelArch, TokenizerRef
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.prompts import RowPrompts, conversation
from coremill.data.rows import Row, read_rows
from coremill.formats.gguf_file import Value
from coremill.formats.source import gguf_name
from coremill.model.checkpoint import Checkpoint, checkpoint_of
from coremill.model.student import Student, new_student
from coremill.text.model_tokenizer import STUDENT_TEMPLATE
from coremill.text.student_tokenizer import SPECIAL_TOKENS, Tokenizer

Kind = gguf.GGMLQuantizationType

CONFIG = ModelConfig(
    vocab_size=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=160,
    arch=ModelArch(use_halt_head=True, tie_embeddings=True),
)  # fmt: skip
STEPS = 70
LENGTH = 64
BATCH = 4
RATE = 4e-3


@dataclass(frozen=True, kw_only=True)
class Toy:
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    prompts: RowPrompts
    rows: list[Row]


def untrained_toy(folder: Path) -> Toy:
    """An untrained model, with a real dataset and its tokenizer."""
    files = DatasetFiles(
        train=folder / "magic_8_ball.jsonl",
        heldout=folder / "magic_8_ball.heldout.jsonl",
        tokenizer=folder / "tokenizer.json",
    )
    make_dataset(DatasetConfig(kind="magic-8-ball", n=128, heldout_n=16, seed=8), files)
    tokenizer = Tokenizer.load(files.tokenizer)
    rows = list(read_rows(files.train))
    checkpoint = _checkpoint(new_student(CONFIG, seed=3), tokenizer, step=0)
    heldout = RowPrompts(list(read_rows(files.heldout)), tokenizer, files.answers)
    return Toy(checkpoint=checkpoint, tokenizer=tokenizer, prompts=heldout, rows=rows)


def train_toy(folder: Path) -> Toy:
    """The same model, trained for a few seconds to give every question the same answer."""
    toy = untrained_toy(folder)
    answer = next(row.teacher_text for row in toy.rows if row.mood is not None)
    student = new_student(CONFIG, seed=3)
    weights = [weight for name, weight in student.named_parameters() if "halt" not in name]
    sure_rows = [msgspec.structs.replace(row, teacher_text=answer, answers={answer: 1.0}) for row in toy.rows]
    conversations = [conversation(row, toy.tokenizer)[:LENGTH] for row in sure_rows]
    pad_id = toy.tokenizer.pad_id
    for step in range(STEPS):
        batch = [conversations[(BATCH * step + number) % len(conversations)] for number in range(BATCH)]
        ids = torch.tensor([[*each, *[pad_id] * (LENGTH - len(each))] for each in batch])
        logits = student(ids)[0][:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad_id)
        # The signs of the gradients suffice; the first step of one of torch's optimizers imports for four seconds.
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient.sign(), alpha=RATE * (1 - step / STEPS))
    return replace(toy, checkpoint=_checkpoint(student, toy.tokenizer, step=STEPS))


def _checkpoint(student: Student, tokenizer: Tokenizer, *, step: int) -> Checkpoint:
    ref = TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    return checkpoint_of(student, model_type="magic-8-ball", step=step, tokenizer=ref)


def write_toy(
    path: Path,
    toy: Toy,
    kind: gguf.GGMLQuantizationType = Kind.F32,
    *,
    permute: bool = True,
    rope_theta: float | None = None,
    merges: float = 1.0,
    scaled: str | None = None,
    nan: bool = False,
    without: str | None = None,
    end: int = Tokenizer.end_id,
    metadata: Mapping[str, Value] | None = None,
    always: int | None = None,
    sure: float = 30.0,
) -> Path:
    """The toy as GGUF.

    Args:
        permute: whether the rows of Q and K are reordered for llama.cpp's RoPE.
        rope_theta: written instead of the model's.
        merges: the share of the tokenizer's merges that are written.
        scaled: a tensor, by llama.cpp's name, whose values are multiplied by 1.1.
        nan: whether one value is NaN.
        without: a tensor that is omitted.
        end: the id of the end token in the file.
        metadata: keys to add or replace; those that do not begin with `general.` get the prefix `tokenizer.`.
        always: a token that is always the likeliest, by about `sure` logits.
    """
    config = toy.checkpoint.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta if rope_theta is None else rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    _add_tokenizer(writer, toy.tokenizer, merges, end, metadata or {})
    for theirs, value in _tensors(toy.checkpoint, permute=permute, always=always, sure=sure):
        if theirs == without:
            continue
        changed = value * np.float32(1.1) if theirs == scaled else value
        if nan and theirs == "blk.1.ffn_up.weight":
            changed = np.where(np.arange(value.size).reshape(value.shape) == 7, np.float32("nan"), value)
        if value.ndim == 2 and kind != Kind.F32:
            stored = Kind.F16 if kind == Kind.Q8_0 and "attn_v" in theirs else kind
            writer.add_tensor(theirs, gguf.quants.quantize(changed, stored), raw_dtype=stored)
        else:
            writer.add_tensor(theirs, changed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(
    checkpoint: Checkpoint, *, permute: bool, always: int | None, sure: float
) -> list[tuple[str, np.ndarray]]:
    config, found = checkpoint.config, []
    for name, tensor in checkpoint.state_dict.items():
        if name == "halt_head.weight":  # GGUF files have none
            continue
        value = tensor.numpy()
        if permute and (".q_proj." in name or ".k_proj." in name):
            heads = config.n_heads if ".q_proj." in name else config.n_kv_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if always is not None and name == "embed_tokens.weight":
            # Every embedding is large in one direction, in which only the unembedding of that token is not zero.
            value = np.concatenate([np.full((len(value), 1), 1e4, np.float32), value[:, 1:]], axis=1)
            unembedding = np.zeros_like(value)
            unembedding[always, 0] = sure / config.d_model**0.5
            found.append(("output.weight", unembedding))
        found.append((gguf_name(name), np.ascontiguousarray(value)))
    return found


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, share: float, end: int, metadata: Mapping[str, Value]
) -> None:
    model = json.loads(tokenizer.data)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys: dict[str, Value] = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token < len(SPECIAL_TOKENS) else 1 for token in range(len(tokens))],
        "ggml.merges": merges[: int(len(merges) * share)],
        "ggml.bos_token_id": tokenizer.bos_id,
        "ggml.eos_token_id": end,
        "ggml.padding_token_id": tokenizer.pad_id,
        "ggml.add_bos_token": False,
        "chat_template": STUDENT_TEMPLATE,
        **metadata,
    }
    for key, value in keys.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key if key.startswith("general.") else f"tokenizer.{key}", value)
