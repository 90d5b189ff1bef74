"""What tests of the server share."""

import base64
import io
import time

import httpx2

MODEL = "glm4v-tiny"

http = httpx2.Client(timeout=120)
"""A client that waits while programs are compiled."""


def wait_until(condition, seconds=60.0):
    """Wait for something that happens in another thread; fails if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def data_url(image):
    """A Pillow image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
