"""RunConfig: everything that configs/*.toml may say. A knob that nothing reads does not exist."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from coremill.core.contract import ModelArch, ShapeSet
from coremill.core.documents import Document, Record, read_toml
from coremill.core.errors import ConfigError

TOY_MODEL_TYPES = frozenset({"magic-8-ball", "toy"})
"""Model types for which `--toy` may relax the version gate."""


MAX_VOCAB_SIZE = 1 << 20
"""Four times the largest vocabulary in use; far beyond it the tokenizer's trainer aborts the process."""


def _positive(record: Record, *names: str) -> None:
    for name in names:
        if not 0 < getattr(record, name) < math.inf:
            raise ValueError(f"`{name}` must be positive, found {getattr(record, name)}")


def _not_negative(record: Record, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(record, name) < math.inf:
            raise ValueError(f"`{name}` must not be negative, found {getattr(record, name)}")


def _share(record: Record, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(record, name) <= 1:
            raise ValueError(f"`{name}` must lie between 0 and 1, found {getattr(record, name)}")


class DatasetConfig(Record):
    kind: Literal["magic-8-ball", "toy"]
    n: int
    """Training rows."""
    heldout_n: int
    """Held-out rows; no question of theirs is among the training rows."""
    seed: int
    vocab_size: int = 512
    """Size of the byte-level BPE, special tokens and the 256 bytes included."""

    def __post_init__(self) -> None:
        _positive(self, "n", "heldout_n")
        _not_negative(self, "seed")
        if self.vocab_size < 300:
            raise ValueError(f"`vocab_size` must be at least 300, found {self.vocab_size}")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"`vocab_size` must be at most {MAX_VOCAB_SIZE}, found {self.vocab_size}")


class ModelConfig(Record):
    """A Llama-family decoder: GQA, rotate-half RoPE, RMSNorm, SwiGLU."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    max_seq_len: int
    """Positions that the rotary table covers."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    arch: ModelArch

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len")
        _positive(self, "rope_theta", "norm_eps")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"d_model {self.d_model}, n_heads {self.n_heads} and n_kv_heads {self.n_kv_heads} must each "
                "divide by the next"
            )
        if self.head_dim % 2:
            raise ValueError(f"the head size must be even for RoPE, found {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


class TrainingConfig(Record):
    epochs: int
    batch_size: int
    learning_rate: float
    """Peak, reached after the warm-up; decays by a cosine to a tenth."""
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    """Largest global gradient norm."""
    temperature: float
    """Of the distillation term; its KL is scaled by the square."""
    kd_weight: float
    """Share of the distillation term; the rest is cross entropy with the sampled answer."""
    halt_weight: float
    """Weight of the halt head's cross entropy."""
    seed: int

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "learning_rate", "grad_clip", "temperature")
        _not_negative(self, "warmup_steps", "weight_decay", "halt_weight", "seed")
        _share(self, "kd_weight")


class ConvertConfig(Record):
    deployment_target: Literal["iOS18", "macOS15"] = "iOS18"
    compute_precision: Literal["float16", "float32"] = "float16"


class VerifyConfig(Record):
    heldout_answers: int
    """Held-out questions answered through the package, greedily."""
    sampled_answers: int
    """Questions answered for the final table, sampled."""
    sampling_seed: int
    min_sqnr_db: float
    max_kl_nats: float
    """KL(checkpoint ‖ package) per position, mean over real prompts."""
    argmax_margin: float
    """Positions whose reference top-1 − top-2 gap is below this many logits are left out of the agreement."""
    max_excluded_share: float
    """Largest share of positions that may be left out."""
    min_right_mood: float
    max_teacher_kl_nats: float
    """KL(teacher ‖ package) per answer token on held-out questions."""
    min_distinct_sampled: int
    """Distinct answers among the sampled ones."""

    def __post_init__(self) -> None:
        _positive(self, "heldout_answers", "sampled_answers", "min_distinct_sampled")
        _not_negative(self, "sampling_seed", "min_sqnr_db", "max_kl_nats", "argmax_margin", "max_teacher_kl_nats")
        _share(self, "max_excluded_share", "min_right_mood")
        if self.min_distinct_sampled > self.sampled_answers:
            raise ValueError(
                f"`min_distinct_sampled` {self.min_distinct_sampled} is more than "
                f"`sampled_answers` {self.sampled_answers}"
            )


class RunConfig(Document):
    """One run, whole: `configs/<name>.toml`."""

    name: str
    """The run's folder under build/."""
    model_type: str
    dataset: DatasetConfig
    model: ModelConfig
    training: TrainingConfig
    shapes: ShapeSet
    convert: ConvertConfig
    verify: VerifyConfig

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ValueError(f"`name` must be lower case letters, digits, '-' and '.', found {self.name!r}")
        if self.is_toy and self.dataset.kind != self.model_type:
            raise ValueError(f"model_type {self.model_type!r} with a dataset of kind {self.dataset.kind!r}")
        if self.dataset.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"the tokenizer's vocab_size {self.dataset.vocab_size} is not the model's {self.model.vocab_size}"
            )
        if self.verify.heldout_answers > self.dataset.heldout_n:
            raise ValueError(
                f"verify.heldout_answers {self.verify.heldout_answers} is more than dataset.heldout_n "
                f"{self.dataset.heldout_n}"
            )
        if max(self.shapes.all) > self.model.max_seq_len:
            raise ValueError(
                f"shape {max(self.shapes.all)} is beyond the model's max_seq_len {self.model.max_seq_len}"
            )

    @property
    def is_toy(self) -> bool:
        return self.model_type in TOY_MODEL_TYPES


def read_config(path: Path) -> RunConfig:
    """Read and check a run's configuration.

    Raises:
        ConfigError: unreadable, an unknown key (the nearest name is suggested), or an impossible value.
    """
    return read_toml(path, RunConfig, error=ConfigError)
