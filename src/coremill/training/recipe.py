"""What to train and how: from a run's configuration, or the defaults of the command."""

from __future__ import annotations

from coremill.core.config import DistilledRun, ModelConfig, TrainingConfig
from coremill.core.contract import ModelArch
from coremill.core.documents import Record


class Recipe(Record):
    """A model and its training."""

    model_type: str
    model: ModelConfig
    training: TrainingConfig


def recipe_of(config: DistilledRun) -> Recipe:
    """The recipe in the configuration of a run."""
    return Recipe(model_type=config.model_type, model=config.model, training=config.training)


def default_recipe(model_type: str, *, vocab_size: int) -> Recipe:
    """The settings of `run_toy_distill` without `--config`: 128 rows, 2 epochs and batches of 4 give 64 steps."""
    return Recipe(
        model_type=model_type,
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=128,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_ff=448,
            max_seq_len=256,
            arch=ModelArch(use_halt_head=True, tie_embeddings=True),
        ),
        training=TrainingConfig(
            epochs=2,
            batch_size=4,
            learning_rate=2e-3,  # the best of five for 64 steps; see benchmarks/training.py seed
            warmup_steps=6,
            weight_decay=0.01,
            grad_clip=1.0,
            temperature=1.0,
            kd_weight=0.9,
            halt_weight=0.1,
            seed=8,
        ),
    )
