"""The student: compared with transformers' Llama, causality, and the shapes of its outputs and parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coremill.core.config import ModelConfig, read_config
from coremill.core.contract import ModelArch
from coremill.core.plain import Plain
from coremill.model.student import Student, new_student, output_names, parameter_shapes

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
GOLDEN = json.loads((HERE / "llama_golden.json").read_text())


def config(*, halt: bool = True, tied: bool = True, **changes: Plain) -> ModelConfig:
    sizes = {
        "vocab_size": 40,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_ff": 32,
        "max_seq_len": 32,
    }
    return ModelConfig(**{**sizes, **changes}, arch=ModelArch(use_halt_head=halt, tie_embeddings=tied))


def random_ids(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(0, 40, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def formula_weight(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """As in make_llama_golden.py."""
    count = int(torch.tensor(shape).prod())
    values = torch.sin((torch.arange(count, dtype=torch.float64) + 1) * (0.37 + 0.11 * index)).reshape(shape)
    return (1 + 0.3 * values if len(shape) == 1 else 0.4 * values).float()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tied", {"vocab_size": 48, "d_model": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "d_ff": 40}),
        (
            "untied",
            {"vocab_size": 40, "d_model": 16, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "d_ff": 20}
            | {"rope_theta": 500.0, "norm_eps": 1e-3},
        ),
    ],
)
def test_logits_match_those_of_transformers_llama(name: str, changes: dict[str, Plain]) -> None:
    model = Student(config(halt=False, tied=name == "tied", **changes)).eval()
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(formula_weight(index, tuple(parameter.shape)))
        golden = torch.tensor(GOLDEN[name]["logits"])
        ids = torch.tensor([[(7 * i * i + 3 * i + 1) % changes["vocab_size"] for i in range(golden.shape[0])]])
        (logits,) = model(ids)
    assert logits.dtype == torch.float32
    assert golden.abs().max() > 0.8
    assert (logits[0] - golden).abs().max() <= 1e-5


def test_the_toy_has_about_600_000_parameters() -> None:
    model = Student(read_config(CONFIGS / "magic-8-ball.toml").model)
    assert 500_000 <= model.n_parameters <= 700_000


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("halt", [True, False])
def test_outputs_have_the_documented_names_and_shapes(halt: bool, dtype: torch.dtype) -> None:
    outputs = new_student(config(halt=halt), seed=0).eval()(random_ids(3, 7, dtype=dtype))
    expected = {"logits": (3, 7, 40)} | ({"halt_logits": (3, 7, 2)} if halt else {})
    names = output_names(config(halt=halt))
    assert {name: tuple(value.shape) for name, value in zip(names, outputs, strict=True)} == expected


def test_the_state_dict_contains_only_weights() -> None:
    state = new_student(config(), seed=0).state_dict()
    assert sorted(name for name in state if not name.startswith("layers.")) == [
        "embed_tokens.weight",
        "halt_head.weight",
        "norm.weight",
    ]
    assert "lm_head.weight" in new_student(config(tied=False), seed=0).state_dict()


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (new_student(config(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def leak_backwards(model: Student, ids: torch.Tensor, index: int) -> float:
    """Return the largest change of any output before `index` when the token at `index` changes."""
    changed = ids.clone()
    changed[:, index] = (ids[:, index] + 1) % 40
    with torch.no_grad():
        return max(
            float((before[:, :index] - after[:, :index]).abs().max())
            for before, after in zip(model(ids), model(changed), strict=True)
        )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_token_does_not_affect_the_positions_before_it(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 32))
    index = data.draw(st.integers(1, length - 1))
    model = new_student(config(), seed=data.draw(st.integers(0, 5))).eval()
    ids = random_ids(2, length, seed=data.draw(st.integers(0, 5)))
    assert leak_backwards(model, ids, index) <= 1e-6


def test_the_causality_check_finds_a_missing_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, *, is_causal, enable_gqa: attention(q, k, v, enable_gqa=True),
    )
    assert leak_backwards(new_student(config(), seed=0).eval(), random_ids(1, 16), 8) > 1e-2


def test_every_token_affects_the_last_position() -> None:
    model = new_student(config(), seed=0).eval()
    ids = random_ids(1, 12)
    with torch.no_grad():
        last = model(ids)[0][0, -1]
        for index in range(12):
            changed = ids.clone()
            changed[:, index] = (ids[:, index] + 1) % 40
            assert (model(changed)[0][0, -1] - last).abs().max() > 1e-5, index


def test_right_padding_does_not_change_the_outputs_before_it() -> None:
    model = new_student(config(), seed=0).eval()
    ids = random_ids(1, 9)
    padded = torch.cat((ids, torch.zeros(1, 23, dtype=torch.int32)), dim=1)
    with torch.no_grad():
        for short, long in zip(model(ids), model(padded), strict=True):
            assert (short - long[:, :9]).abs().max() <= 1e-5


def test_the_order_of_tokens_matters() -> None:
    """Without positions, the last output would be the same for any order of the tokens before it."""
    model = new_student(config(), seed=0).eval()
    with torch.no_grad():
        forward = model(torch.tensor([[3, 1, 4, 15, 9, 2, 6]]))[0][0, -1]
        swapped = model(torch.tensor([[1, 3, 4, 15, 9, 2, 6]]))[0][0, -1]
    assert (forward - swapped).abs().max() > 1e-3


@pytest.mark.parametrize("halt", [True, False])
def test_score_at_matches_forward(halt: bool) -> None:
    model = new_student(config(halt=halt), seed=0).eval()
    ids, positions = random_ids(3, 10), torch.tensor([29, 0, 7, 10, 7])
    with torch.no_grad():
        whole, some = model(ids), model.score_at(ids, positions)
    assert len(whole) == len(some) == 1 + halt
    for expected, found in zip(whole, some, strict=True):
        assert (expected.flatten(0, 1)[positions] - found).abs().max() <= 1e-6


def test_a_sequence_beyond_max_seq_len_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^33 tokens exceed the model's max_seq_len of 32$"):
        new_student(config(), seed=0)(random_ids(1, 33))


def test_rotary_angles_match_the_paper() -> None:
    model = Student(config(d_model=24, n_heads=6, rope_theta=100.0))  # D = 4: frequencies 1 and 1/10
    position = 7
    expected = torch.tensor([7.0, 0.7, 7.0, 0.7], dtype=torch.float64)
    assert torch.allclose(model.cos[position], expected.cos().float(), atol=1e-7)
    assert torch.allclose(model.sin[position], expected.sin().float(), atol=1e-7)
    assert model.cos.shape == (33, 4)


@pytest.mark.parametrize("halt", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", ["none", "qkv", "qkvo"])
@pytest.mark.parametrize("others", [{}, {"mlp_bias": True}, {"qk_norm": True}, {"head_size": 10, "d_model": 25}])
def test_parameter_shapes_match_the_state_dict(halt: bool, tied: bool, bias: str, others: dict[str, Plain]) -> None:
    options = config(halt=halt, tied=tied, attention_bias=bias, **others)
    state = Student(options).state_dict()
    assert list(parameter_shapes(options).items()) == [(name, tuple(value.shape)) for name, value in state.items()]


def test_parameter_shapes_import_nothing_slow() -> None:
    """torch's "meta" device imports sympy and 800 other modules, which takes two seconds."""
    script = (
        "import sys, torch; from coremill.core.config import read_config; from pathlib import Path;"
        "from coremill.model.student import Student, parameter_shapes;"
        f"config = read_config(Path({str(CONFIGS / 'magic-8-ball.toml')!r})).model;"
        "parameter_shapes(config); Student(config); print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
