"""Few threads for many requests."""

import asyncio
import gc
import threading
import weakref

import pytest

from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.workers import Workers


class Body(bytearray):
    """What a client has sent."""


async def turn():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.slow
def test_what_clients_that_leave_have_sent_is_forgotten_while_all_threads_are_busy():
    async def check():
        workers, end = Workers(1, 2), threading.Event()
        slow = asyncio.create_task(workers.run(end.wait))
        await turn()
        bodies = [Body(10) for _ in range(2)]
        left = [asyncio.create_task(workers.run(len, body)) for body in bodies]
        kept = [weakref.ref(body) for body in bodies]
        await turn()
        with pytest.raises(ApiError, match="found 3 requests") as caught:
            await workers.run(len, b"")
        assert caught.value.status == 429
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        del bodies, left, task
        await turn()
        gc.collect()
        assert [body() for body in kept] == [None, None]
        assert workers.is_busy
        end.set()
        await slow
        assert await workers.run(len, b"ab") == 2
        await turn()
        assert not workers.is_busy

    asyncio.run(check())


def test_work_whose_client_leaves_keeps_its_place_until_it_ends():
    async def check():
        workers, end, begun = Workers(1, 2), threading.Event(), []
        slow = asyncio.create_task(workers.run(end.wait))
        await turn()
        slow.cancel()
        following = asyncio.create_task(workers.run(begun.append, 1))
        await turn()
        assert workers.is_busy and not begun
        end.set()
        await following
        assert begun == [1]

    asyncio.run(check())


def test_nothing_is_begun_after_the_end():
    async def check():
        workers, end = Workers(1, 2), threading.Event()
        slow = asyncio.create_task(workers.run(end.wait))
        waiting = asyncio.create_task(workers.run(len, b""))
        await turn()
        workers.close()
        assert workers.is_busy  # the process need not wait for it
        end.set()
        await slow
        with pytest.raises(ApiError, match="ending"):
            await waiting

    asyncio.run(check())


def test_work_of_a_loop_that_was_closed_holds_no_place_in_the_next():
    workers, end = Workers(1, 2), threading.Event()

    async def leave():
        task = asyncio.create_task(workers.run(end.wait))
        await turn()
        assert not task.done()

    asyncio.run(leave())
    end.set()

    async def check():
        return await asyncio.wait_for(asyncio.gather(*(workers.run(len, "ab") for _ in range(3))), 10)

    assert asyncio.run(check()) == [2, 2, 2]
    workers.close()
