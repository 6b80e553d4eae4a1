"""One small student, trained until it answers its questions, exported and converted once for the room's tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

# Read when torch is imported. Threads that spin while they wait make a small model many times slower on a machine
# whose cores have other work as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from coremill.conversion import convert_coreml, export_pytorch
from coremill.conversion.package import MODEL, WEIGHT_FILE, WEIGHTS_KEY, Spec, read_spec, write_manifest
from coremill.core import layout
from coremill.core.config import (
    ConvertConfig,
    DatasetConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    VerifyConfig,
)
from coremill.core.contract import Contract, ModelArch, ShapeSet, TokenizerRef, read_contract
from coremill.core.diagnostics import ConversionDiagnostics
from coremill.core.digest import digest, file_digest
from coremill.core.documents import read_json, write_json
from coremill.core.stage import StageContext
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.rows import Row, read_rows
from coremill.data.tokenizer import Tokenizer
from coremill.model.checkpoint import checkpoint_of, save_checkpoint
from coremill.training.batches import encode_rows
from coremill.training.distill import distill

QUESTIONS = 10

CONFIG = RunConfig(
    name="tiny-ball",
    model_type="magic-8-ball",
    dataset=DatasetConfig(kind="magic-8-ball", n=512, heldout_n=QUESTIONS, seed=4, vocab_size=512),
    model=ModelConfig(
        vocab_size=512,
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ff=128,
        max_seq_len=128,
        arch=ModelArch(use_halt_head=True, tie_embeddings=True),
    ),
    training=TrainingConfig(
        epochs=16,
        batch_size=32,
        learning_rate=1e-2,
        warmup_steps=10,
        weight_decay=0.0,
        grad_clip=1.0,
        temperature=1.0,
        kd_weight=1.0,
        halt_weight=0.3,
        seed=3,
    ),
    shapes=ShapeSet(primary=96, all=(80, 96, 128)),
    convert=ConvertConfig(),
    verify=VerifyConfig(
        heldout_answers=QUESTIONS,
        sampled_answers=QUESTIONS,
        sampling_seed=3,
        min_sqnr_db=40.0,
        max_kl_nats=1e-3,
        argmax_margin=0.05,
        max_excluded_share=0.02,
        min_right_mood=0.95,
        max_teacher_kl_nats=0.02,
        min_distinct_sampled=5,
    ),
)
"""It is trained on its held-out questions: what is tested is whether the package says what the student learned."""


class Build(msgspec.Struct, frozen=True):
    """The folders of a finished build."""

    root: Path

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def checkpoint(self) -> Path:
        return layout.checkpoint_file(self.root / "training", CONFIG.name)

    @property
    def tokenizer(self) -> Path:
        return layout.tokenizer_file(self.dataset)

    @property
    def heldout(self) -> Path:
        return layout.heldout_file(self.dataset)

    @property
    def graph(self) -> Path:
        return layout.torchscript_file(self.root / "export", CONFIG.name)

    @property
    def contract(self) -> Path:
        return layout.contract_file(self.root / "export", CONFIG.name)

    @property
    def package(self) -> Path:
        return layout.package_dir(self.root / "convert", CONFIG.name)

    def context(self, out: str, *needs: str, config: RunConfig = CONFIG) -> StageContext:
        folder = self.root / out
        folder.mkdir(exist_ok=True)
        return StageContext(
            config=config, lane="2.9.1", inputs={need: self.root / need for need in needs}, out=folder
        )

    def read_contract(self) -> Contract:
        return read_contract(self.contract)

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer)

    def read_rows(self) -> list[Row]:
        return list(read_rows(self.heldout))

    def edit_spec(self, change: Callable[[Spec], None]) -> None:
        """Change the package's specification, and record the change as if coremill had saved it so."""
        spec = read_spec(self.package)
        change(spec)
        (self.package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
        self.sign()

    def sign(self) -> None:
        """Record the package's content, as it is now, in the package and in its diagnostics.

        What a test plants is then found by what the package computes, and not by a digest.
        """
        spec = read_spec(self.package)
        spec.description.metadata.userDefined[WEIGHTS_KEY] = file_digest(self.package / "Data" / WEIGHT_FILE)
        (self.package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
        write_manifest(self.package)
        path = layout.diagnostics_file(self.package.parent)
        diagnostics = read_json(path, ConversionDiagnostics)
        write_json(path, msgspec.structs.replace(diagnostics, package_digest=digest(self.package)))


class Surgery:
    """Changes to a specification that leave it well formed."""

    @staticmethod
    def rename_output(spec: Spec, old: str, new: str) -> None:
        """Rename an output wherever the specification names it."""
        function = spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        for operation in block.operations:
            for output in operation.outputs:
                output.name = new if output.name == old else output.name
        names = [new if name == old else name for name in block.outputs]
        del block.outputs[:]
        block.outputs.extend(names)
        for feature in spec.description.output:
            feature.name = new if feature.name == old else feature.name

    @classmethod
    def swap_outputs(cls, spec: Spec) -> None:
        """Give the logits the halt head's name, and the other way round."""
        cls.rename_output(spec, "logits", "set aside")
        cls.rename_output(spec, "halt_logits", "logits")
        cls.rename_output(spec, "set aside", "halt_logits")

    @staticmethod
    def drop_length(spec: Spec, seq_len: int) -> None:
        """Take one sequence length out of those that the input admits."""
        (feature,) = spec.description.input
        listed = feature.type.multiArrayType.enumeratedShapes.shapes
        kept = [type(shape).FromString(shape.SerializeToString()) for shape in listed if shape.shape[-1] != seq_len]
        assert len(kept) == len(listed) - 1
        del listed[:]
        listed.extend(kept)


@pytest.fixture(scope="session")
def surgery() -> type[Surgery]:
    return Surgery


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A finished build; tests only read it."""
    build = Build(tmp_path_factory.mktemp("build"))
    make_dataset(
        CONFIG.dataset,
        DatasetFiles(train=layout.dataset_file(build.dataset), heldout=build.heldout, tokenizer=build.tokenizer),
    )
    tokenizer = build.read_tokenizer()
    # Every answer that the teacher may give, because greedy decoding may take any of them.
    rows = [
        msgspec.structs.replace(row, teacher_text=text) for row in build.read_rows() for text in sorted(row.answers)
    ]
    examples = encode_rows(rows, tokenizer, max_seq_len=CONFIG.model.max_seq_len)
    trained = distill(examples, [], model=CONFIG.model, recipe=CONFIG.training, pad_id=tokenizer.pad_id)
    save_checkpoint(
        build.checkpoint,
        checkpoint_of(
            trained.student,
            model_type=CONFIG.model_type,
            step=trained.steps,
            tokenizer=TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest),
        ),
    )
    export_pytorch.run_stage(build.context("export", "dataset", "training"))
    convert_coreml.run_stage(build.context("convert", "export"))
    return build


@pytest.fixture
def build(pristine: Build, tmp_path: Path) -> Build:
    """A copy of the finished build that a test may break."""
    shutil.copytree(pristine.root, tmp_path / "build")
    return Build(tmp_path / "build")
