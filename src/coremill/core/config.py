"""The configuration of a run: `configs/*.toml`.

There are two kinds of run. A :class:`DistilledRun` trains its model; an :class:`ImportedRun` converts an existing
one. Both have the same export, conversion and verification stages.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import ClassVar, Literal

from coremill.core.contract import ComputePrecision, Frontend, ModelArch, ShapeSet
from coremill.core.documents import Document, Record, from_builtins, toml_value
from coremill.core.errors import ConfigError

TOY_MODEL_TYPES = frozenset({"magic-8-ball", "toy"})
"""Model types for which `--toy` may relax the version gate."""

PACKAGE_SOURCE = "package:"
"""The prefix of a source of weights in an installed distribution."""

MAX_VOCAB_SIZE = 1 << 20
"""Four times the largest vocabulary in use; the tokenizer's trainer aborts the process far above it."""


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
            raise ValueError(f"`{name}` must be between 0 and 1, found {getattr(record, name)}")


class DatasetConfig(Record):
    kind: Literal["magic-8-ball", "toy"]
    n: int
    """Training rows."""
    heldout_n: int
    """Held-out rows; their questions are not among the training rows."""
    seed: int
    vocab_size: int = 512
    """Size of the byte-level BPE, including special tokens and the 256 bytes."""

    def __post_init__(self) -> None:
        _positive(self, "n", "heldout_n")
        _not_negative(self, "seed")
        if self.vocab_size < 300:
            raise ValueError(f"`vocab_size` must be at least 300, found {self.vocab_size}")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"`vocab_size` must be at most {MAX_VOCAB_SIZE}, found {self.vocab_size}")


class LinearScaling(Record, tag_field="kind", tag="linear"):
    """Interpolates all positions equally (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")


class Llama3Scaling(Record, tag_field="kind", tag="llama3"):
    """Llama 3.1: interpolates low frequencies, keeps high ones, and blends those in between."""

    factor: float
    low_freq_factor: float
    """Frequencies with fewer rotations than this in the original context are divided by `factor`."""
    high_freq_factor: float
    """Frequencies with more rotations than this in the original context are kept."""
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"`low_freq_factor` {self.low_freq_factor} must be less than `high_freq_factor` "
                f"{self.high_freq_factor}"
            )


class YarnScaling(Record, tag_field="kind", tag="yarn"):
    """YaRN: interpolation by parts, and an attention temperature (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    """Frequencies with more rotations than this in the original context are kept."""
    beta_slow: float = 1.0
    """Frequencies with fewer rotations than this in the original context are divided by `factor`."""
    attention_factor: float
    """Factor of the rotated queries and of the rotated keys."""
    truncate: bool = True
    """Whether the limits of the blended part are rounded outwards to whole dimensions."""

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor")
        if self.beta_slow > self.beta_fast:
            raise ValueError(f"`beta_slow` {self.beta_slow} must be at most `beta_fast` {self.beta_fast}")


class FrequencyFactors(Record, tag_field="kind", tag="factors"):
    """A divisor for each frequency, as in the tensor `rope_freqs.weight` of a GGUF file."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError("`factors` must all be positive")


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors
"""How RoPE's frequencies are scaled for contexts longer than the model was first trained with."""


class ModelConfig(Record):
    """A Llama-family decoder: GQA, rotate-half RoPE, RMSNorm, SwiGLU."""

    vocab_size: int
    """Rows of the embedding; a tokenizer may have fewer tokens."""
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int | None = None
    """Size of a head; None for d_model / n_heads."""
    d_ff: int
    max_seq_len: int
    """Positions in the rotary table."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    """The attention projections that have a bias."""
    mlp_bias: bool = False
    """Whether the three feed-forward projections have a bias."""
    qk_norm: bool = False
    """Whether each head of the queries and keys is normalised with an RMSNorm before RoPE."""
    arch: ModelArch

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len")
        _positive(self, "rope_theta", "norm_eps")
        if self.head_size is not None:
            _positive(self, "head_size")
            if self.n_heads % self.n_kv_heads:
                raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        elif self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"d_model {self.d_model}, n_heads {self.n_heads} and n_kv_heads {self.n_kv_heads} must each "
                "be a multiple of the next"
            )
        if self.head_dim % 2:
            raise ValueError(f"the head size must be even for RoPE, found {self.head_dim}")
        scaling = self.rope_scaling
        if isinstance(scaling, FrequencyFactors) and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"rope_scaling has {len(scaling.factors)} factors, and a head of size {self.head_dim} has "
                f"{self.head_dim // 2} frequencies"
            )
        if isinstance(scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(f"`rope_theta` must be more than 1 for YaRN, found {self.rope_theta}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads if self.head_size is None else self.head_size


class TrainingConfig(Record):
    epochs: int
    batch_size: int
    learning_rate: float
    """The peak, reached after the warm-up; a cosine decays it to a tenth."""
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    """The largest global norm of the gradient."""
    temperature: float
    """Of the distillation term, whose KL is multiplied by its square."""
    kd_weight: float
    """Weight of the distillation term; the rest is the cross entropy with the sampled answer."""
    halt_weight: float
    """Weight of the halt head's cross entropy."""
    seed: int

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "learning_rate", "grad_clip", "temperature")
        _not_negative(self, "warmup_steps", "weight_decay", "halt_weight", "seed")
        _share(self, "kd_weight")


class PackageFile(Record):
    """A file in an installed distribution."""

    distribution: str
    file: str
    """Its name, or its path in the distribution, with `/`."""


class WeightsConfig(Record):
    source: str
    """`package:DISTRIBUTION/FILE`, or the path of a GGUF file or of a Hugging Face directory."""

    def __post_init__(self) -> None:
        packaged = self.packaged
        if not self.source or (packaged is not None and not (packaged.distribution and packaged.file)):
            raise ValueError(f"`source` must be a path or {PACKAGE_SOURCE}DISTRIBUTION/FILE, found {self.source!r}")

    @property
    def packaged(self) -> PackageFile | None:
        """The file that `package:` names; None for a path."""
        if not self.source.startswith(PACKAGE_SOURCE):
            return None
        distribution, _, file = self.source.removeprefix(PACKAGE_SOURCE).partition("/")
        return PackageFile(distribution=distribution, file=file)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file or directory; empty for a file in a distribution."""
        return () if self.packaged else (Path(self.source),)


class TextsConfig(Record):
    """The text that export and verification run the model on."""

    files: tuple[str, ...] = ()
    """UTF-8 text files; by default those that coremill includes."""
    min_characters: int = 20_000
    """A shorter text is rejected: 4,096 of SmolLM2's tokens are about 17,500 characters of English prose."""
    max_characters: int = 100_000
    """A longer text is truncated to this length."""

    def __post_init__(self) -> None:
        _positive(self, "min_characters", "max_characters")
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"`min_characters` {self.min_characters} is more than `max_characters` {self.max_characters}"
            )
        if len(set(self.files)) != len(self.files):
            raise ValueError(f"`files` contains a file twice, found {list(self.files)}")

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(map(Path, self.files))


NamesFiles = WeightsConfig | TextsConfig
"""The parts with `paths`: files outside the build that make a stage stale when they change. Relative paths are
relative to the working directory."""


class ExportConfig(Record):
    frontend: Frontend = "torchscript"
    """How the graph is exported from torch: by tracing, or by `torch.export`."""
    stateful: bool = False
    """Whether `prefill` and `decode`, which share a key/value cache, are exported as well as `main`."""
    context: int | None = None
    """Positions of the key/value cache; by default the longest shape."""

    def __post_init__(self) -> None:
        if self.stateful and self.frontend == "torch-export":
            raise ValueError(
                "`stateful` with `frontend` torch-export, which cannot write a cache at a position that is an input"
            )
        if self.context is None:
            return
        if not self.stateful:
            raise ValueError(f"`context` {self.context} without `stateful`: there is no cache")
        _positive(self, "context")

    def cache_positions(self, shapes: ShapeSet) -> int:
        """Return the positions of the key/value cache of a graph with `shapes`."""
        return max(shapes.all) if self.context is None else self.context


class ConvertConfig(Record):
    deployment_target: Literal["iOS18", "macOS15"] = "iOS18"
    compute_precision: ComputePrecision = "float16"


GgufType = Literal["f32", "f16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k"]
"""The type of the matrices in a GGUF file, by llama.cpp's name in lower case; vectors stay float32."""


FormatName = Literal["hf", "gguf"]
"""A format other than Core ML that a run's model is written in."""


class GgufConfig(Record):
    types: tuple[GgufType, ...] = ("f32", "f16", "q8_0", "q4_0")
    """One file is written per type; the Modelfile names the first."""

    def __post_init__(self) -> None:
        if not self.types:
            raise ValueError("`types` is empty")
        if len(set(self.types)) != len(self.types):
            raise ValueError(f"`types` contains a type twice, found {list(self.types)}")


class HuggingFaceConfig(Record):
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the tensors in model.safetensors."""
    license: str | None = None
    """The SPDX identifier in the model card."""


class VerifyConfig(Record):
    """The bounds for every package, whose outputs must match the checkpoint's."""

    @property
    def rows(self) -> int:
        """The maximum number of rows that are read from a held-out set."""
        return 1

    min_sqnr_db: float = 40.0
    max_kl_nats: float = 1e-3
    """Of KL(checkpoint ‖ package), mean over the positions of real prompts."""
    argmax_margin: float = 0.05
    """Positions whose reference top-1 − top-2 gap is below this many logits are excluded from the agreement."""
    max_excluded_share: float = 0.02
    """The largest share of positions that may be excluded; of few positions, more may be: `core.gates.most_of`."""

    def __post_init__(self) -> None:
        _not_negative(self, "min_sqnr_db", "max_kl_nats", "argmax_margin")
        _share(self, "max_excluded_share")


class DistilledVerify(VerifyConfig):
    """The bounds for a student, including right answers and its teacher's distribution."""

    heldout_answers: int = 64
    """Held-out questions that the package answers greedily."""
    sampled_answers: int = 24
    """Questions that the package answers by sampling, for the report."""
    sampling_seed: int = 8
    min_right_mood: float = 0.95
    max_teacher_kl_nats: float = 0.02
    """Of KL(teacher ‖ package), mean over the answer tokens of held-out questions."""
    min_distinct_sampled: int = 10
    """Distinct sampled answers."""

    @property
    def rows(self) -> int:
        return max(self.heldout_answers, self.sampled_answers)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "heldout_answers", "sampled_answers", "min_distinct_sampled")
        _not_negative(self, "sampling_seed", "max_teacher_kl_nats")
        _share(self, "min_right_mood")
        if self.min_distinct_sampled > self.sampled_answers:
            raise ValueError(
                f"`min_distinct_sampled` {self.min_distinct_sampled} is more than "
                f"`sampled_answers` {self.sampled_answers}"
            )


class ImportedVerify(VerifyConfig):
    """The bounds for an imported model, including the perplexity of text."""

    max_excluded_share: float = 0.05
    """In running text, up to 1 position in 25 is that close to a tie."""
    max_perplexity_change: float = 0.005
    """The largest relative difference from the perplexity of the float32 checkpoint, on one text."""
    decoded_tokens: int = 32
    """Tokens that are decoded one by one and compared with `main`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "max_perplexity_change")
        _positive(self, "decoded_tokens")


class BaseRun(Document):
    """The parts that every kind of run has."""

    model_stage: ClassVar[str]
    """The stage that writes the checkpoint."""
    tokenizer_stage: ClassVar[str]
    """The stage that writes tokenizer.json."""
    prompts_stage: ClassVar[str]
    """The stage that writes what the model is run on."""

    name: str
    """The run's directory under build/."""
    model_type: str
    shapes: ShapeSet
    export: ExportConfig = ExportConfig()
    convert: ConvertConfig
    formats: tuple[FormatName, ...] = ("hf", "gguf")
    """The formats that are written besides Core ML: a Hugging Face directory and GGUF files. `[]` for none."""
    gguf: GgufConfig = GgufConfig()
    hf: HuggingFaceConfig = HuggingFaceConfig()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ValueError(f"`name` must be lower-case letters, digits, '-' and '.', found {self.name!r}")
        if len(set(self.formats)) != len(self.formats):
            raise ValueError(f"`formats` contains a format twice, found {list(self.formats)}")
        if self.export.cache_positions(self.shapes) < max(self.shapes.all):
            raise ValueError(
                f"export.context {self.export.context} is less than the longest shape, {max(self.shapes.all)}"
            )

    @property
    def gguf_types(self) -> tuple[GgufType, ...]:
        """The types of the GGUF files that are written."""
        return self.gguf.types if "gguf" in self.formats else ()

    @property
    def is_toy(self) -> bool:
        return self.model_type in TOY_MODEL_TYPES


class DistilledRun(BaseRun):
    """`configs/<name>.toml` of a run that generates a dataset and distils its model from a teacher."""

    model_stage = "training"
    tokenizer_stage = prompts_stage = "dataset"

    dataset: DatasetConfig
    model: ModelConfig
    training: TrainingConfig
    verify: DistilledVerify = DistilledVerify()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_toy and self.dataset.kind != self.model_type:
            raise ValueError(f"model_type {self.model_type!r} with a dataset of kind {self.dataset.kind!r}")
        if self.dataset.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"dataset.vocab_size {self.dataset.vocab_size} is not model.vocab_size {self.model.vocab_size}"
            )
        if self.verify.heldout_answers > self.dataset.heldout_n:
            raise ValueError(
                f"verify.heldout_answers {self.verify.heldout_answers} is more than dataset.heldout_n "
                f"{self.dataset.heldout_n}"
            )
        for what, positions in (
            ("shape", max(self.shapes.all)),
            ("export.context", self.export.cache_positions(self.shapes)),
        ):
            if positions > self.model.max_seq_len:
                raise ValueError(f"{what} {positions} is more than model.max_seq_len {self.model.max_seq_len}")


class ImportedRun(BaseRun):
    """`configs/<name>.toml` of a run that converts an existing model. The architecture is read from the weights."""

    model_stage = tokenizer_stage = "import"
    prompts_stage = "texts"

    weights: WeightsConfig
    texts: TextsConfig = TextsConfig()
    verify: ImportedVerify = ImportedVerify()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_toy:
            raise ValueError(f"model_type {self.model_type!r} is a toy, which cannot be imported")


RunConfig = DistilledRun | ImportedRun


def read_config(path: Path) -> RunConfig:
    """Read a run's configuration; one without training tables imports its model.

    Raises:
        ConfigError: it is unreadable, or has an unknown key or an invalid value.
    """
    value = toml_value(path, expected="a run's configuration", error=ConfigError)
    trained = [table for table in ("dataset", "model", "training") if table in value]
    if trained and "weights" in value:
        raise ConfigError(
            f"{path}: both [weights] and [{trained[0]}]",
            expected="[weights] to import a model, or [dataset], [model] and [training] to train one",
        )
    if not trained:
        return from_builtins(value, ImportedRun, where=str(path), error=ConfigError)
    return from_builtins(value, DistilledRun, where=str(path), error=ConfigError)


def read_distilled_config(path: Path) -> DistilledRun:
    """Read the configuration of a run that trains its model.

    Raises:
        ConfigError: as :func:`read_config`, or the run imports its model.
    """
    config = read_config(path)
    if isinstance(config, ImportedRun):
        raise ConfigError(
            f"{path}: the model is imported from {config.weights.source}",
            expected="a configuration with [dataset], [model] and [training]",
        )
    return config
