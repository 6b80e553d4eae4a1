"""Prompts: the token ids of rows, of texts and of questions."""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from coremill.core.errors import DatasetError
from coremill.core.layout import answer_key_file, chat_prompts_file, heldout_file, texts_file
from coremill.data.prompts import (
    Chat,
    RowPrompts,
    TextPrompts,
    conversation,
    find_heldout,
    load_prompts,
    read_some,
)
from coremill.data.texts import ChatPrompt, Text
from coremill.text.model_tokenizer import TextTokenizer

PAD, BOS, END = 0, 1, 2


@pytest.fixture(scope="module")
def rows(pristine) -> RowPrompts:
    return RowPrompts(pristine.read_rows(), pristine.read_tokenizer(), answer_key_file(pristine.dataset))


@pytest.fixture(scope="module")
def texts(pristine_imported) -> TextPrompts:
    return pristine_imported.read_prompts()


# Rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(seq_len=st.integers(1, 300), count=st.integers(1, 5))
def test_packed_rows_are_consecutive_conversations(rows, seq_len, count):
    sequences = rows.packed(seq_len, count)
    assert [len(ids) for ids in sequences] == [seq_len] * count
    conversations = [conversation(row, rows.tokenizer) for row in rows.rows]
    index = 0
    for ids in sequences:
        stream: list[int] = []
        while len(stream) < seq_len:
            stream += conversations[index % len(conversations)]
            index += 1
        assert ids == stream[:seq_len]
        assert ids[0] == rows.tokenizer.bos_id


def test_a_conversation_is_the_prompt_and_the_teachers_answer(rows):
    row, tokenizer = rows.rows[0], rows.tokenizer
    ids = conversation(row, tokenizer)
    assert tokenizer.decode(ids) == f"<|bos|><|user|>{row.prompt}<|assistant|>{row.teacher_text}<|end|>"


def test_rows_are_compared_packed_and_then_as_conversations(rows):
    compared = list(rows.compared(40))
    assert [each.ids for each in compared[:4]] == rows.packed(40, 4)
    assert [each.judged for each in compared[:4]] == [slice(0, 0)] * 4
    assert not any(each.scored for each in compared)
    fitting = [row for row in rows.rows if len(conversation(row, rows.tokenizer)) <= 40]
    assert 0 < len(fitting) < len(rows.rows)
    for row, (ids, judged, _) in zip(fitting, compared[4:], strict=True):
        assert ids == conversation(row, rows.tokenizer)
        # The judged positions predict the tokens of the answer, including the end token.
        answer = [ids[index + 1] for index in range(*judged.indices(len(ids)))]
        assert answer == rows.tokenizer.encode_answer(row.teacher_text)


def test_probes_of_rows_change_the_quarters_and_the_last_position(rows):
    probes = rows.probes(80)
    assert [probe.ids for probe in probes] == rows.packed(80, 2)
    for ids, changes in probes:
        assert {index for index, _ in changes} <= {20, 40, 60, 79}
        assert {(index, END) for index in (20, 40, 60, 79) if ids[index] != END} <= set(changes)
        assert all(token != ids[index] for index, token in changes)
    assert all(index for probe in rows.probes(2) for index, _ in probe.changes)


def test_conversations_of_rows_are_padded_to_every_longer_length(rows):
    padded = rows.padded([20, 80, 128])
    assert list(padded) == [tuple(conversation(row, rows.tokenizer)) for row in rows.rows[:8]]
    assert all(lengths == [each for each in (20, 80, 128) if each > len(ids)] for ids, lengths in padded.items())


def test_prompts_have_the_pad_id_of_their_tokenizer(rows, texts):
    assert rows.pad_id == rows.tokenizer.pad_id == texts.pad_id == texts.tokenizer.pad_id == PAD


# Texts


def test_packed_texts_are_the_beginnings_of_the_texts(texts):
    for ids, text in zip(texts.packed(200, 3), texts.texts, strict=True):
        assert (len(ids), ids[0]) == (200, BOS)
        assert text.text.startswith(texts.tokenizer.decode(ids[1:]))
    assert texts.packed(16, 1)[0] == texts.packed(200, 1)[0][:16]


def test_packed_texts_continue_after_one_of_each_text(texts):
    several = texts.packed(30, 6)
    assert [several[0] + several[3]] == texts.packed(60, 1)
    assert len(set(map(tuple, several))) == 6


@given(seq_len=st.integers(1, 300), count=st.integers(1, 8))
def test_packed_texts_have_the_given_length(texts, seq_len, count):
    assert [len(ids) for ids in texts.packed(seq_len, count)] == [seq_len] * count


def test_a_text_that_is_too_short_is_named(texts):
    length = len(texts.tokenizer.encode(texts.texts[0].text)) + 1
    assert len(texts.packed(length, 1)[0]) == length
    with pytest.raises(DatasetError) as caught:
        texts.packed(length + 1, 1)
    assert str(caught.value) == (
        f"the text {texts.texts[0].id} has {length} tokens\n"
        f"  expected: at least {length + 1}; texts.max_characters limits how much of a text is read\n"
        "  run: nox -s texts -- --help"
    )


def test_every_position_of_one_packed_text_is_compared(texts):
    ((ids, judged, scored),) = texts.compared(24)
    assert (ids, judged, scored) == (texts.packed(24, 1)[0], slice(0, 24), True)
    assert texts.export_count == 1


def test_the_probe_of_a_text_changes_the_token_in_the_middle(texts):
    ((ids, ((index, token),)),) = texts.probes(24)
    assert (ids, index) == (texts.packed(24, 1)[0], 12)
    assert token != ids[12]
    assert token in ids
    assert texts.probes(1)[0].changes == ()


def test_questions_are_in_the_models_chat_format(texts):
    first = texts.chats[0]
    assert first.text == "Why?"
    assert texts.tokenizer.decode(first.ids) == "<|bos|><|user|>Why?<|assistant|>"
    assert [chat.text for chat in texts.chats] == [prompt.text for prompt in texts.chat_prompts]


def test_questions_are_unchanged_without_a_chat_template(texts, pristine_imported, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pristine_imported.model / name).read_bytes())
    plain = load_prompts(tmp_path / "tokenizer.json", pristine_imported.dataset, rows=1)
    assert plain.chats[0] == Chat("Why?", [BOS, *texts.tokenizer.encode("Why?")])


def test_two_questions_are_padded_to_the_shortest_length_that_is_longer(texts):
    padded = texts.padded([40, 16, 24])
    assert padded == {tuple(chat.ids): [16] for chat in texts.chats if chat.text in ("Why?", "Who is it?")}
    shortest = len(texts.chats[0].ids)
    assert texts.padded([40, shortest])[tuple(texts.chats[0].ids)] == [40]
    assert texts.padded([3]) == {}


def test_a_text_of_one_repeated_token_has_no_probe(pristine_imported, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(pristine_imported.tokenizer))
    backend.post_processor = processors.ByteLevel()  # without bos
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    same = TextPrompts([Text(id="a", source="", licence=None, text="@@@@")], [], tokenizer)
    assert len(set(same.packed(4, 1)[0])) == 1
    assert same.probes(4)[0].changes == ()


# Reading a directory


def test_load_prompts_reads_rows_or_texts(pristine, pristine_imported):
    rows = load_prompts(pristine.tokenizer, pristine.dataset, rows=3)
    assert isinstance(rows, RowPrompts)
    assert [row.id for row in rows.rows] == [row.id for row in itertools.islice(pristine.read_rows(), 3)]
    assert isinstance(load_prompts(pristine.tokenizer, pristine.heldout, rows=1), RowPrompts)
    texts = load_prompts(pristine_imported.tokenizer, pristine_imported.dataset, rows=1)
    assert isinstance(texts, TextPrompts)
    assert [text.id for text in texts.texts] == ["king-james-bible", "jargon-file", "devils-dictionary"]
    assert texts.chat_prompts[0] == ChatPrompt(id="0", text="Why?")


def test_a_directory_with_both_is_rejected(pristine, tmp_path):
    for path in (texts_file(tmp_path), heldout_file(tmp_path)):
        path.touch()
    with pytest.raises(DatasetError) as caught:
        load_prompts(pristine.tokenizer, tmp_path, rows=1)
    assert str(caught.value) == f"{tmp_path} has texts.jsonl and heldout.jsonl\n  expected: one of them"


def test_texts_without_questions_are_rejected(pristine_imported, tmp_path):
    texts_file(tmp_path).write_bytes(texts_file(pristine_imported.dataset).read_bytes())
    with pytest.raises(DatasetError, match=rf"^cannot read {chat_prompts_file(tmp_path)}: No such file"):
        load_prompts(pristine_imported.tokenizer, tmp_path, rows=1)


def test_read_some_stops_after_the_last_row(pristine, tmp_path):
    path = tmp_path / "heldout.jsonl"
    first = pristine.heldout.read_text().splitlines()[0]
    path.write_text(first + "\nnot JSON\n")
    assert [row.id for row in read_some(path, 1)] == [pristine.read_rows()[0].id]
    with pytest.raises(DatasetError, match=r"heldout\.jsonl:2: not JSON"):
        read_some(path, 2)


def test_a_missing_or_ambiguous_held_out_set_is_rejected(pristine, tmp_path):
    assert find_heldout(pristine.dataset) == pristine.heldout
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DatasetError) as caught:
            load_prompts(pristine.tokenizer, missing, rows=1)
        assert str(caught.value) == (
            f"{missing} has no held-out set\n"
            "  expected: one file *heldout.jsonl\n"
            "  run: python -m coremill.data.make_toy_kd --help"
        )
    for name in ("a.heldout.jsonl", "heldout.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=r"has 2 held-out sets a\.heldout\.jsonl heldout\.jsonl"):
        find_heldout(tmp_path)
