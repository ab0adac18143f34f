"""What is small is parsed at once, what is large on a thread, and what is too large not at all."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from eps_deploy.serving.protocol import ApiError, Parser, Request

LIMIT = 1 << 20


def test_where_it_is_parsed() -> None:
    threads: list[threading.Thread] = []

    def work() -> Request:
        threads.append(threading.current_thread())
        return Request(images=np.zeros((1, 1, 2, 2), np.uint8))

    async def body() -> None:
        with ThreadPoolExecutor(1) as workers:
            parser = Parser(workers, LIMIT, ("of JSON", "elsewhere"))
            assert (await parser.parse(100, work)).id == ""
            assert (await parser.parse(LIMIT, work)).id == ""
            with pytest.raises(ApiError) as caught:
                await parser.parse(LIMIT + 1, work)
        assert caught.value.status == 413
        assert str(caught.value) == (
            "1048577 bytes of JSON; at most 1048576 are accepted: send the tensor elsewhere"
        )

    asyncio.run(body())
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()
    assert len(threads) == 2
