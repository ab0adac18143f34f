from __future__ import annotations

import threading

import pytest

from eps_deploy.engines.trt.plan import Message, collect_messages, logger_of
from tests.deploy.engines.trt.contract import VERSIONS, Version, make_fake


@pytest.mark.parametrize("version", VERSIONS)
def test_there_is_one_logger_in_the_process(version: Version) -> None:
    trt = make_fake(version, {})
    assert logger_of(trt) is logger_of(trt)
    assert trt.count("ILogger", "__init__") == 1


def test_it_collects_while_it_listens_from_any_thread() -> None:
    trt = make_fake("11.4", {})
    logger, severity = logger_of(trt), trt.ILogger.Severity
    said: list[Message] = []
    logger.log(severity.ERROR, "before")
    with collect_messages(trt, said.append) as log:
        logger.log(severity.VERBOSE, "noise")
        thread = threading.Thread(target=logger.log, args=(severity.INFO, "two\n  lines"))
        thread.start()
        thread.join()
        logger.log(severity.INTERNAL_ERROR, "the cause")
        logger.log(severity.ERROR, "what came of it")
    logger.log(severity.ERROR, "after")
    assert log == said
    assert list(map(str, log[-2:])) == ["internal error: the cause", "error: what came of it"]
    assert str(log[0]) == "info: two lines"
    assert log.reason() == "the cause"


def test_two_can_listen_at_once() -> None:
    trt = make_fake("11.4", {})
    with collect_messages(trt) as outer, collect_messages(trt) as inner:
        logger_of(trt).log(trt.ILogger.Severity.WARNING, "both")
    assert outer == inner == [Message("WARNING", "both")]


def test_no_error_no_reason() -> None:
    with collect_messages(make_fake("11.4", {})) as log:
        pass
    assert log.reason() == "TensorRT gave no reason"
