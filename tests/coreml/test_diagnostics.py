"""The converter's messages are recorded, hidden from the terminal, and sorted."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest
from tqdm import tqdm

from coremill.core.diagnostics import ConversionDiagnostics, Notice, NoticeKind, count_notices
from coremill.coreml.diagnostics import Message, Recorder, as_log, recording, sort_messages

UNTESTED = (
    "Torch version 2.9.1+cu128 has not been tested with coremltools. You may run into unexpected errors. "
    "Torch 2.7.0 is the most recent version that has been tested."
)


def test_all_messages_are_recorded_in_order_and_hidden(capfd):
    recorder = Recorder()
    with recording(recorder):
        logging.getLogger("coremltools").warning("logged %d", 1)
        logging.getLogger("coremltools").info("progress")
        warnings.warn("warned", FutureWarning, stacklevel=1)
        sys.stdout.write("printed\nwith lines\n")
        sys.stderr.write("printed to stderr\n")
        sys.stdout.write("no end of line")
    assert [str(message) for message in recorder.messages] == [
        "logging:coremltools WARNING: logged 1",
        "warnings:FutureWarning WARNING: warned",
        "stdout: printed",
        "stdout: with lines",
        "stderr: printed to stderr",
        "stdout: no end of line",
    ]
    assert capfd.readouterr() == ("", "")
    assert as_log(recorder.messages).count("\n") == 6


def test_warnings_for_developers_are_ignored(recwarn):
    recorder = Recorder()
    with recording(recorder):
        compile(r"'\_'", "a new module", "eval")
        warnings.warn("an interface of numpy will be removed", DeprecationWarning, stacklevel=1)
        warnings.warn("a value overflows", RuntimeWarning, stacklevel=1)
    assert [message.text for message in recorder.messages] == ["a value overflows"]
    assert not recwarn.list


def _print_and_raise():
    sys.stdout.write("before")
    raise OSError("from inside")


def test_streams_and_handlers_are_restored_if_the_block_raises(capsys):
    handlers, show = logging.getLogger().handlers, warnings.showwarning
    recorder = Recorder()
    with pytest.raises(OSError, match=r"^from inside$"), recording(recorder):
        _print_and_raise()
    sys.stdout.write("after\n")
    assert logging.getLogger().handlers is handlers
    assert warnings.showwarning is show
    assert capsys.readouterr().out == "after\n"
    assert [message.text for message in recorder.messages] == ["before"]


def test_of_a_progress_bar_the_last_state_is_recorded_without_rates():
    recorder = Recorder()
    with recording(recorder):
        for _ in tqdm(range(95), desc="Running MIL default pipeline", unit=" passes"):
            pass
        sys.stderr.write("a line\n")
    assert [str(message) for message in recorder.messages] == [
        "stderr: Running MIL default pipeline: 95/95 passes",
        "stderr: a line",
    ]
    (bar, _) = sort_messages(recorder.messages)
    assert (bar.kind, bar.why) == (NoticeKind.HARMLESS, "a progress bar")


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Message("logging:coremltools", "WARNING", UNTESTED), NoticeKind.COMPATIBILITY),
        (
            Message("logging:coremltools", "WARNING", "Failed to load _MLModelProxy: No module named 'x'"),
            NoticeKind.HARMLESS,
        ),
        (
            Message("logging:coremltools", "WARNING", "Recklessly broadcast {is16, is22} to is16"),
            NoticeKind.HARMLESS,
        ),
        (Message("logging:coremltools", "WARNING", "Saturation of an fp16 constant"), NoticeKind.WARNING),
        (Message("warnings:FutureWarning", "WARNING", "soon gone"), NoticeKind.WARNING),
        (Message("stderr", "", "segment fault imminent"), NoticeKind.WARNING),
        (Message("logging:coremltools", "ERROR", "ERROR - converting 'svd' op"), NoticeKind.ERROR),
        (Message("logging:coremltools", "CRITICAL", "Failed to load _MLModelProxy: fatal"), NoticeKind.ERROR),
    ],
)
def test_messages_are_sorted_and_unknown_ones_are_warnings(message, kind):
    (notice,) = sort_messages([message])
    assert (notice.kind, notice.source, notice.text, notice.count) == (kind, message.source, message.text, 1)
    assert (notice.why is not None) == (kind is NoticeKind.HARMLESS)


def test_equal_messages_are_one_notice_with_a_count():
    first, second = Message("stderr", "", "a"), Message("stderr", "", "b")
    notices = sort_messages([first, second, first, first])
    assert [(notice.text, notice.count) for notice in notices] == [("a", 3), ("b", 1)]
    assert count_notices(notices) == {"harmless": 0, "compatibility": 0, "warning": 4, "error": 0}


def test_contradictory_documents_are_an_error(pristine):
    with pytest.raises(ValueError, match="is harmless without a reason"):
        Notice(kind=NoticeKind.HARMLESS, source="stderr", text="x", count=1)
    with pytest.raises(ValueError, match=r"`counts` is .*, and the notices are"):
        ConversionDiagnostics(
            package="x.mlpackage",
            package_digest="sha256:0",
            toolchain=pristine.read_contract().toolchain,
            deployment_target="iOS18",
            compute_precision="float16",
            notices=(),
            counts={"harmless": 1, "compatibility": 0, "warning": 0, "error": 0},
        )
