"""Real token ids, of exact lengths."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coremill.conversion.sequences import conversation, find_heldout, packed, read_some
from coremill.core.errors import DatasetError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(seq_len=st.integers(1, 300), count=st.integers(1, 5))
def test_packed_sequences_are_full_of_whole_conversations(pristine, seq_len, count):
    rows, tokenizer = pristine.read_rows(), pristine.read_tokenizer()
    sequences = packed(rows, tokenizer, seq_len, count)
    assert [len(ids) for ids in sequences] == [seq_len] * count
    said = [conversation(row, tokenizer) for row in rows]
    place = 0
    for ids in sequences:
        stream: list[int] = []
        while len(stream) < seq_len:
            stream += said[place % len(said)]
            place += 1
        assert ids == stream[:seq_len]
        assert ids[0] == tokenizer.bos_id


def test_a_conversation_is_the_prompt_and_the_teachers_answer(pristine):
    row, tokenizer = pristine.read_rows()[0], pristine.read_tokenizer()
    ids = conversation(row, tokenizer)
    assert tokenizer.decode(ids) == f"<|bos|><|user|>{row.prompt}<|assistant|>{row.teacher_text}<|end|>"


def test_read_some_reads_no_further(pristine, tmp_path):
    path = tmp_path / "heldout.jsonl"
    first = pristine.heldout.read_text().splitlines()[0]
    path.write_text(first + "\nnot JSON\n")
    assert [row.id for row in read_some(path, 1)] == [pristine.read_rows()[0].id]
    with pytest.raises(DatasetError, match=r"heldout\.jsonl:2: not JSON"):
        read_some(path, 2)


def test_the_held_out_set_of_a_folder_is_found_or_missed_by_name(pristine, tmp_path):
    assert find_heldout(pristine.dataset) == pristine.heldout
    with pytest.raises(DatasetError) as caught:
        find_heldout(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no held-out set\n"
        "  expected: one file *heldout.jsonl\n"
        "  run: python -m coremill.data.make_toy_kd --help"
    )
    for name in ("a.heldout.jsonl", "heldout.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=r"has 2 held-out sets a\.heldout\.jsonl heldout\.jsonl"):
        find_heldout(tmp_path)
