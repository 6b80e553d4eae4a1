"""Two small models, exported and converted once for the tests of coreml, verification and conversion.

One is a student that is trained until it answers its questions. The other has random weights and stands for an
imported model, with real texts and with a key/value cache.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors

# Read when torch is imported. Threads that spin while they wait make a small model many times slower on a machine
# whose cores have other work as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.reading import shape_measured

from coremill.conversion import convert_coreml, export_pytorch
from coremill.core import layout
from coremill.core.config import (
    ConvertConfig,
    DatasetConfig,
    DistilledRun,
    DistilledVerify,
    ExportConfig,
    GgufType,
    ImportedRun,
    ImportedVerify,
    ModelConfig,
    TextsConfig,
    TrainingConfig,
    WeightsConfig,
)
from coremill.core.contract import Contract, ModelArch, ShapeSet, TokenizerRef, read_contract
from coremill.core.diagnostics import ConversionDiagnostics
from coremill.core.digest import digest, file_digest
from coremill.core.documents import read_json, write_json
from coremill.core.gates import Severity, passed
from coremill.core.parity import SourceParity
from coremill.core.reports import Answer, Backend, Perplexity, StatefulMeasured
from coremill.core.stage import StageContext
from coremill.coreml.graph import load_program, trace, write_traced
from coremill.coreml.package import MODEL, WEIGHT_FILE, WEIGHTS_KEY, Spec, read_spec, write_manifest
from coremill.data.corpora import bundled_texts
from coremill.data.lines import write_lines
from coremill.data.make_toy_kd import DatasetFiles, make_dataset
from coremill.data.prompts import Prompts, load_prompts
from coremill.data.rows import Row, read_rows
from coremill.data.texts import ChatPrompt
from coremill.formats.gguf.export import export_gguf
from coremill.formats.huggingface.export import export_hf
from coremill.model.checkpoint import IMPORTED_FROM, checkpoint_of, save_checkpoint
from coremill.model.student import new_student
from coremill.text.model_tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, TextTokenizer
from coremill.text.student_tokenizer import SPECIAL_TOKENS, Tokenizer
from coremill.training.batches import encode_rows
from coremill.training.distill import distill
from coremill.verification.evidence import Evidence, Facts, FileChecks
from coremill.verification.measurement import Measurement
from coremill.verification.stored_weights import StoredWeights

QUESTIONS = 10

CONFIG = DistilledRun(
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
    verify=DistilledVerify(
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


IMPORTED = ImportedRun(
    name="tiny-llama",
    model_type="llama",
    weights=WeightsConfig(source="models/tiny-llama"),
    texts=TextsConfig(min_characters=1000, max_characters=4000),
    shapes=ShapeSet(primary=24, all=(16, 24, 40)),
    export=ExportConfig(stateful=True),
    convert=ConvertConfig(),
    verify=ImportedVerify(
        min_sqnr_db=40.0,
        max_kl_nats=1e-3,
        argmax_margin=0.05,
        max_excluded_share=0.1,  # one of 16
        max_perplexity_change=0.005,
        decoded_tokens=20,
    ),
)
CHAT_TEMPLATE_TEXT = "{{ bos_token }}<|user|>{{ messages[0]['content'] }}<|assistant|>"
QUESTIONS_ASKED = ("Why?", "Who is it?", "What is a number that only one and itself divide, and why?", "And how?")


class Build(msgspec.Struct, frozen=True):
    """The folders of a finished build."""

    root: Path
    config: DistilledRun | ImportedRun = CONFIG

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that a verification reads."""
        return (self.config.prompts_stage, self.config.model_stage, "export", "convert")

    @property
    def dataset(self) -> Path:
        """What the model is run on."""
        return self.root / self.stages[0]

    @property
    def model(self) -> Path:
        return self.root / self.stages[1]

    @property
    def checkpoint(self) -> Path:
        return layout.checkpoint_file(self.model, self.config.name)

    @property
    def tokenizer(self) -> Path:
        return layout.tokenizer_file(self.root / self.config.tokenizer_stage)

    @property
    def heldout(self) -> Path:
        return layout.heldout_file(self.dataset)

    @property
    def graph(self) -> Path:
        return layout.program_file(self.root / "export", self.config.name, "torchscript")

    @property
    def contract(self) -> Path:
        return layout.contract_file(self.root / "export", self.config.name)

    @property
    def package(self) -> Path:
        return layout.package_dir(self.root / "convert", self.config.name)

    def context(self, out: str, *needs: str) -> StageContext:
        folder = self.root / out
        folder.mkdir(exist_ok=True)
        return StageContext(
            config=self.config, lane="2.9.1", inputs={need: self.root / need for need in needs}, out=folder
        )

    def read_contract(self) -> Contract:
        return read_contract(self.contract)

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer)

    def read_prompts(self, rows: int = 128) -> Prompts:
        return load_prompts(self.tokenizer, self.dataset, rows=rows)

    def read_rows(self) -> list[Row]:
        return list(read_rows(self.heldout))

    def edit_spec(self, change: Callable[[Spec], None]) -> None:
        """Change the package's specification, and record the change as if coremill had saved it so."""
        spec = read_spec(self.package)
        change(spec)
        (self.package / "Data" / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
        self.sign()

    def scale_weight(self, name: str, factor: float) -> None:
        """Scale one float16 tensor, the one of `main` with `name` in its name, as if coremill had saved it so."""

        def scale(values: np.ndarray) -> None:
            values[:] = (values * np.float16(factor)).astype(np.float16)

        self.change_weight(name, scale)

    def change_weight(
        self, name: str, change: Callable[[np.ndarray], None], *, function: str = "main", alone: bool = False
    ) -> None:
        """Change one float16 tensor, the one of `function` with `name` in its name, as if coremill had saved it so.

        Functions share it; `alone` gives this one a changed copy. Offsets in the weight file point to a record
        whose third and fourth fields are the data's size and place.
        """
        spec = read_spec(self.package)
        (operation,) = [
            operation
            for operation in spec.mlProgram.functions[function].block_specializations["CoreML8"].operations
            if operation.type == "const" and name in operation.outputs[0].name
        ]
        stored = operation.attributes["val"]
        path = self.package / "Data" / WEIGHT_FILE
        data = bytearray(path.read_bytes())
        sentinel, kind, size, start = struct.unpack_from("<IIQQ", data, stored.blobFileValue.offset)
        if alone:
            data += bytes(-len(data) % 64)
            stored.blobFileValue.offset = len(data)
            data += struct.pack("<IIQQ", sentinel, kind, size, len(data) + 64).ljust(64, b"\0")
            start, values = len(data), bytes(data[start : start + size])
            data += values
        shape = [each.constant.size for each in stored.type.tensorType.dimensions]
        change(np.frombuffer(data, np.float16, size // 2, start).reshape(shape))
        path.write_bytes(bytes(data))
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


def prove_source(checkpoint: Path) -> None:
    """Write the report of a comparison that passed; a random model has no source to compare it with."""
    gates = (passed(measured=0, threshold=0).gate("relative error of logits", Severity.MUST),)
    parity = SourceParity(checkpoint_digest=file_digest(checkpoint), program="none", positions=1, gates=gates)
    write_json(layout.source_parity(checkpoint.parent), parity)


@pytest.fixture(scope="session")
def pristine_imported(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A finished build of an imported model with a cache; tests only read it."""
    build = Build(tmp_path_factory.mktemp("imported"), IMPORTED)
    texts = bundled_texts(IMPORTED.texts)
    for folder in (build.dataset, build.model):
        folder.mkdir()
    write_lines(layout.texts_file(build.dataset), texts)
    chats = [ChatPrompt(id=str(number), text=text) for number, text in enumerate(QUESTIONS_ASKED)]
    write_lines(layout.chat_prompts_file(build.dataset), chats)
    Tokenizer.train((text.text for text in texts), 300).save(build.tokenizer)
    bos, end = SPECIAL_TOKENS[1], SPECIAL_TOKENS[2]
    backend = tokenizers.Tokenizer.from_file(str(build.tokenizer))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, Tokenizer.bos_id)]
    )
    backend.save(str(build.tokenizer))
    settings = {"bos_token": bos, "eos_token": end, "pad_token": SPECIAL_TOKENS[0], "add_bos_token": True}
    (build.model / TOKENIZER_CONFIG).write_bytes(msgspec.json.encode(settings))
    (build.model / CHAT_TEMPLATE).write_text(CHAT_TEMPLATE_TEXT)
    tokenizer = TextTokenizer.load(build.tokenizer)
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ff=64,
        max_seq_len=64,
        arch=ModelArch(use_halt_head=False, tie_embeddings=True),
    )
    checkpoint = checkpoint_of(
        new_student(model, seed=6),
        model_type=IMPORTED.model_type,
        step=0,
        tokenizer=TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest),
        training={IMPORTED_FROM: {"files": {"model.gguf": "sha256:0"}}},
    )
    save_checkpoint(build.checkpoint, checkpoint)
    prove_source(build.checkpoint)
    export_pytorch.run_stage(build.context("export", "texts", "import"))
    convert_coreml.run_stage(build.context("convert", "export"))
    return build


@pytest.fixture
def imported(pristine_imported: Build, tmp_path: Path) -> Build:
    """A copy of that build that a test may break."""
    shutil.copytree(pristine_imported.root, tmp_path / "imported")
    return Build(tmp_path / "imported", IMPORTED)


class Exports(msgspec.Struct, frozen=True):
    """A model in other formats."""

    hf: Path
    gguf: dict[GgufType, Path]


def write_exports(build: Build, folder: Path) -> Exports:
    """The build's model as a Hugging Face directory and as GGUF, as the stages write and verify them."""
    sources = (build.checkpoint, build.tokenizer, build.dataset)
    name, types = build.config.name, build.config.gguf.types
    hf, gguf = folder / "hf", folder / "gguf"
    for out in (hf, gguf):
        out.mkdir(parents=True)
    export_hf(*sources, hf, name=name, settings=build.config.hf)
    export_gguf(*sources, gguf, name=name, types=types)
    return Exports(hf, {kind: layout.gguf_file(gguf, name, kind) for kind in types})


@pytest.fixture(scope="session")
def exports(
    pristine: Build, pristine_imported: Build, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exports]:
    """By the run's name."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        build.config.name: write_exports(build, folder / build.config.name)
        for build in (pristine, pristine_imported)
    }


@pytest.fixture(scope="session")
def good_imported(pristine_imported: Build) -> Evidence:
    """Evidence of an imported model's package without fault, on a machine without Core ML."""
    contract = pristine_imported.read_contract()
    perplexity = Perplexity(reference=20.0, measured=20.01, tokens=23)
    return Evidence(
        subject=Facts(model_type="llama", imported=True, stateful=True, has_halt_head=False, asks_moods=False),
        contract=contract,
        config=IMPORTED.verify,
        files=FileChecks(
            graph_problem=None,
            checkpoint_problem=None,
            source_problem=None,
            contract_problem=None,
            diagnostics=read_json(layout.diagnostics_file(pristine_imported.package.parent), ConversionDiagnostics),
            diagnostics_problem=None,
            interface_problems=(),
            weights=StoredWeights(tensors=20, values=100, functions=1),
            parameters=100,
            package_bytes=400,
        ),
        measured=Measurement(
            load_problem=None,
            operations=100,
            shapes={key: shape_measured(perplexity=perplexity) for key in contract.shape_validation},
            leak=0.0,
            rounding_db=120.0,
            rounding_problem=None,
            padding_sqnr_db=60.0,
            stateful=StatefulMeasured(
                backend=Backend.MIL_REFERENCE,
                cache_positions=40,
                prefills=6,
                prefill_sqnr_db=58.0,
                decoded=20,
                decode_sqnr_db=57.0,
                continued=11,
                continued_sqnr_db=56.0,
                padding_err=0.0,
                emptied_sqnr_db=9.0,
            ),
            heldout=None,
            sampled=tuple(Answer(prompt=text, answer="So.", mood=None, right=True) for text in QUESTIONS_ASKED),
            has_core_ml=False,
            core_ml_sqnr_db=None,
            core_ml_problem=None,
        ),
    )


def saved_and_loaded(model: torch.nn.Module, names: list[str], length: int = 6) -> torch.jit.ScriptModule:
    """Trace a model, save it and load it again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.pt"
        with path.open("wb") as file:
            write_traced(trace(model, list(range(length)), names), (), file)
        return load_program(path, where="test")
