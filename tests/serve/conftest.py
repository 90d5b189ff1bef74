"""The server over a real port, in a thread of this process, with the packaged model; and clients of it."""

import contextlib
import threading

import openai
import pytest
from helpers_serve import MODEL, wait_until


@pytest.fixture(scope="session")
def tiny_engine(mesh):
    """An engine of four slots over the packaged model, whose layers are stacked and compile in the time of one."""
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.tiny import TINY_CHECKPOINT

    engine = Engine.from_pretrained(TINY_CHECKPOINT, num_slots=4, stacked=True)
    engine.reserve(256)
    return engine


@pytest.fixture(scope="session")
def serving(tiny_engine):
    """A context manager: a server with settings of its own; yields the service and the address."""
    from glm4v_jax.serve.server import Server, bind
    from glm4v_jax.serve.service import ServeSettings, Service

    @contextlib.contextmanager
    def serve(load=lambda: tiny_engine, **settings):
        defaults = dict(model=MODEL, max_model_len=256, max_logprobs=3, is_warmed=False, is_tiny=True, drain_seconds=0)
        service = Service(ServeSettings(**defaults | settings), load)
        listener = bind("127.0.0.1", 0)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield service, address
        finally:
            server.should_exit = True
            thread.join()

    return serve


@pytest.fixture(scope="module")
def server(serving):
    """A server that is ready, and waits for more than any test sends."""
    with serving() as (service, address):
        wait_until(lambda: service.state == "ready")
        yield service, address


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client of `server`."""
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client
