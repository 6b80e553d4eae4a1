"""llama.cpp with a small model's GGUF file: logits and tokens match torch; broken files are reported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.formats.toy_gguf import CONFIG, Toy, untrained_toy, write_toy

from coremill.core.errors import GgufError, OutOfMemoryError
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.model.checkpoint import build_student

IDS = [1, 3, 100, 201, 302, 4, 54, 88]
CONTEXT = 160
REMAKE = "\n  run: python -m coremill.conversion.export_gguf --help"
EXPECTED = "\n  expected: a complete GGUF file of a model that llama.cpp runs" + REMAKE


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    torch.set_num_threads(1)
    return untrained_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def path(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("gguf") / "toy.gguf", toy)


@pytest.fixture(scope="module")
def llamacpp(path: Path):
    with LlamaCpp(path, context=CONTEXT) as opened:
        yield opened


def torch_logits(toy: Toy, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return build_student(toy.checkpoint)(torch.tensor([ids]))[0][0].numpy()


def test_the_logits_after_every_token_match_torch(llamacpp: LlamaCpp, toy: Toy) -> None:
    found = llamacpp.logits(IDS)
    assert found.shape == (8, 512)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch_logits(toy, IDS), atol=2e-5)


def test_a_request_does_not_depend_on_earlier_ones(llamacpp: LlamaCpp) -> None:
    first = llamacpp.logits(IDS)
    llamacpp.logits([7, 7, 7])
    llamacpp.generate(IDS, 5, ())
    np.testing.assert_array_equal(llamacpp.logits(IDS), first)


def test_the_whole_context_is_read(llamacpp: LlamaCpp, toy: Toy) -> None:
    ids = IDS * 20
    np.testing.assert_allclose(llamacpp.logits(ids), torch_logits(toy, ids), atol=5e-5)
    with pytest.raises(ValueError, match=r"^161 tokens and 0 new ones, the context has 160 positions$"):
        llamacpp.logits([*ids, 1])


def test_tokens_that_are_read_in_parts_are_one_sequence(
    llamacpp: LlamaCpp, toy: Toy, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coremill.formats.llamacpp.process._BATCH", 3)
    with LlamaCpp(path, context=CONTEXT) as by_three:
        np.testing.assert_allclose(by_three.logits(IDS), torch_logits(toy, IDS), atol=2e-5)
        assert by_three.generate(IDS, 9, ()) == llamacpp.generate(IDS, 9, ())


def test_greedy_tokens_have_the_largest_logits(llamacpp: LlamaCpp, toy: Toy) -> None:
    ids = list(IDS)
    for _ in range(12):
        ids.append(int(torch_logits(toy, ids)[-1].argmax()))
    tokens = ids[len(IDS) :]
    assert llamacpp.generate(IDS, 12, ()) == tokens
    assert llamacpp.generate(IDS, 12, {tokens[3]}) == tokens[: tokens.index(tokens[3]) + 1]
    assert llamacpp.generate(IDS, 1, ()) == tokens[:1]


def test_an_end_token_of_the_file_does_not_stop_generation(tmp_path: Path, toy: Toy, llamacpp: LlamaCpp) -> None:
    tokens = llamacpp.generate(IDS, 6, ())
    with LlamaCpp(write_toy(tmp_path / "ends.gguf", toy, end=tokens[0]), context=CONTEXT) as ends:
        assert ends.generate(IDS, 6, ()) == tokens
        assert ends.generate(IDS, 6, {tokens[0]}) == tokens[:1]


def test_tokens_that_are_part_of_a_character_are_generated(tmp_path: Path, toy: Toy) -> None:
    byte = toy.tokenizer.encode("é")[0]
    with LlamaCpp(write_toy(tmp_path / "byte.gguf", toy, always=byte), context=CONTEXT) as opened:
        assert opened.generate(IDS, 5, ()) == [byte] * 5
        assert opened.logits(IDS)[-1].argmax() == byte


def test_the_whole_context_can_be_filled(llamacpp: LlamaCpp) -> None:
    assert len(llamacpp.generate(IDS, CONTEXT - len(IDS), ())) == CONTEXT - len(IDS)
    with pytest.raises(ValueError, match=r"^8 tokens and 153 new ones, the context has 160 positions$"):
        llamacpp.generate(IDS, CONTEXT - len(IDS) + 1, ())


@pytest.mark.parametrize("text", ["Will it rain?", "  naïve 漢字\t🎱\x00 ", "", "<|end|>"])
def test_the_ids_of_a_text_match_our_tokenizers(llamacpp: LlamaCpp, toy: Toy, text: str) -> None:
    assert llamacpp.tokenize(text, allow_special=False) == toy.tokenizer.encode(text)


def test_a_special_token_in_a_text_is_recognised_if_allowed(llamacpp: LlamaCpp, toy: Toy) -> None:
    assert llamacpp.tokenize("<|end|>", allow_special=True) == [toy.tokenizer.end_id]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda it: it.logits([]), "there are no tokens"),
        (lambda it: it.logits([512]), "token id 512 is not in a vocabulary of 512"),
        (lambda it: it.generate([-1], 2, ()), "token id -1 is not in a vocabulary of 512"),
        (lambda it: it.generate(IDS, 0, ()), "max_new_tokens must be at least 1, found 0"),
        (lambda it: it.tokenize("\ud800", allow_special=False), ".*surrogates not allowed"),
        (lambda it: LlamaCpp(it.path, context=161), "context 161, the model of .* has 160 positions"),
        (lambda it: LlamaCpp(it.path, context=0), "context 0, the model of .* has 160 positions"),
    ],
)
def test_an_invalid_argument_is_a_value_error(llamacpp: LlamaCpp, call, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        call(llamacpp)


def broken(data: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "cut": (data[:300_000], " is truncated: "),
        "cut in its header": (data[:100], " is truncated: 100 bytes end within its header"),
        "another format": (b"PK\x03\x04" + data[4:], r" is not a GGUF file: it begins with b'PK\\x03\\x04'"),
        "empty": (b"", " is empty"),
    }


@pytest.mark.parametrize("what", broken(b""))
def test_an_incomplete_file_is_rejected(path: Path, tmp_path: Path, what: str) -> None:
    data, problem = broken(path.read_bytes())[what]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(GgufError, match=rf"^{bad}{problem}") as caught:
        LlamaCpp(bad, context=CONTEXT)
    assert str(caught.value).endswith(EXPECTED)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(GgufError) as caught:
        LlamaCpp(tmp_path / "none.gguf", context=CONTEXT)
    assert str(caught.value) == f"cannot read {tmp_path}/none.gguf: No such file or directory" + EXPECTED


def test_the_error_for_a_file_that_does_not_load_has_llama_cpps_reason(tmp_path: Path, toy: Toy) -> None:
    bad = write_toy(tmp_path / "no_norm.gguf", toy, without="output_norm.weight")
    with pytest.raises(GgufError) as caught:
        LlamaCpp(bad, context=CONTEXT)
    reason = "llama_model_load: error loading model: check_tensor_dims: tensor 'output_norm.weight' not found"
    assert str(caught.value) == f"llama.cpp does not load {bad}: {reason}" + EXPECTED


def test_a_file_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    bad = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(bad, "llama")
    writer.add_context_length(CONFIG.max_seq_len)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GgufError) as caught:
        LlamaCpp(bad, context=CONTEXT)
    assert str(caught.value) == f"{bad} has no tokenizer in its metadata" + EXPECTED


def test_nan_is_an_error(tmp_path: Path, toy: Toy) -> None:
    with (
        LlamaCpp(write_toy(tmp_path / "nan.gguf", toy, nan=True), context=CONTEXT) as opened,
        pytest.raises(GgufError) as caught,
    ):
        opened.logits(IDS)
    assert (
        str(caught.value) == f"llama.cpp computes NaN or infinity after 1 tokens of {tmp_path}/nan.gguf" + EXPECTED
    )


def test_the_end_of_llama_cpps_process_is_an_error(path: Path) -> None:
    with LlamaCpp(path, context=CONTEXT) as opened:
        opened._worker._process.kill()
        opened._worker._process.wait()
        with pytest.raises(OutOfMemoryError) as caught:
            opened.logits(IDS)
    assert caught.value.found.startswith(
        f"llama.cpp with {path} was killed (SIGKILL), most likely because memory ran out; "
    )


def test_the_process_is_closed_if_an_answer_is_not_read_to_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of it would be taken for the next answer."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with LlamaCpp(path, context=CONTEXT) as opened:
        monkeypatch.setattr(opened._worker, "_read_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened.logits(IDS)
        with pytest.raises(ValueError, match=f"^llama.cpp with {path} is closed$"):
            opened.logits(IDS)


def test_several_threads_can_send_requests(llamacpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coremill.formats.llamacpp.process._BATCH", 2)
    expected = {length: llamacpp.logits(IDS[:length]) for length in range(1, 9)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda length: (length, llamacpp.logits(IDS[:length])), [*expected] * 4))
    for length, logits in found:
        np.testing.assert_array_equal(logits, expected[length])


def test_ids_may_be_a_numpy_array(llamacpp: LlamaCpp) -> None:
    np.testing.assert_array_equal(llamacpp.logits(np.array(IDS)), llamacpp.logits(IDS))


def test_closing_ends_the_process(path: Path) -> None:
    opened = LlamaCpp(path, context=CONTEXT)
    process = opened._worker._process
    opened.close()
    opened.close()
    assert process.returncode == -9
    with pytest.raises(ValueError, match=f"^llama.cpp with {path} is closed$"):
        opened.logits(IDS)


def test_an_object_that_is_collected_is_closed(path: Path) -> None:
    opened = LlamaCpp(path, context=CONTEXT)
    process = opened._worker._process
    del opened
    gc.collect()
    assert process.returncode == -9


def test_the_process_ends_with_the_interpreter(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from coremill.formats.llamacpp.process import LlamaCpp\n"
        f"opened = LlamaCpp(Path({str(path)!r}), context=32); print(opened._worker._process.pid)"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)
