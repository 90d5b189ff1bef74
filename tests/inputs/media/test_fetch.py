"""What is an address and what a path, the same wherever that is asked."""

import base64
import socket
import time
import urllib.parse

import pytest
from helpers_media import NAMED, PNG

from eval.data.questions import _file
from glm4v_jax.cli.chat.attachments import places
from glm4v_jax.console.options import check_files
from glm4v_jax.data.media import is_remote, located, media_item
from glm4v_jax.errors import MediaError
from glm4v_jax.generate.offline.prompts import BatchPrompt, _place, asks_network
from glm4v_jax.inputs.media import fetch
from glm4v_jax.inputs.media.fetch import is_address, open_source
from glm4v_jax.inputs.media.load import load_image

ADDRESSES = [
    "http://x/y.png", "HTTP://x/y.png", "https://x/y.png", "HttpS://x/y.png", "file:///x/y.png", "File:///x/y.png",
    "data:image/png;base64,aa", "DATA:image/png;base64,aa",
]  # fmt: skip
PATHS = ["x/y.png", "http/y.png", "data/y.png", "file.png", "", "/http://x", "httpx://x/y.png"]


@pytest.mark.parametrize("place", ADDRESSES)
def test_an_address_is_one_in_capitals_too(place):
    in_net = place.lower().startswith("http")
    assert is_address(place)
    check_files("FILE", [place])
    assert _place(place, "somewhere") == place
    assert places(place) == [place]
    item = media_item("image", place, "image")
    assert item == {"type": "image", "url": place} and is_remote(item) == in_net
    frames = {"type": "video", "video": [place]}
    assert located(frames, "somewhere") == frames
    assert asks_network(BatchPrompt(0, [{"role": "user", "content": [item]}], {})) == in_net
    if not place.lower().startswith("file"):
        assert _file(place) is None


@pytest.mark.parametrize("place", PATHS)
def test_a_path_is_not_an_address(place):
    assert not is_address(place) and not is_address(None)
    with pytest.raises(MediaError, match=r"FILE: found .*, no such file; expected"):
        check_files("FILE", [place])
    assert located({"type": "video", "video": [place]}, "d")["video"][0].startswith("d/" if place[:1] != "/" else "/")


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/png;BASE64,"])
def test_data_of_an_address_are_read_however_it_is_written(head):
    assert open_source(head + base64.b64encode(b"content").decode()) == b"content"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "404"),
        ("/huge", "1000000000 bytes; expected at most 100000"),
        ("/endless", "more than 100000 bytes"),
        ("/drip", "within 0.3 seconds; expected"),
        ("/silent", "within 0.3 seconds; expected"),
        ("/short", "found the end after"),
        ("/to/file", "expected an http or https address"),
        ("/to/loop", "redirect"),
        ("/bomb", "more than 100000 bytes"),
        ("/unzipped", "found a body that does not decompress"),
        ("/unknown", "found the content encoding 'morse'; expected none, or one of gzip"),
    ],
)
def test_bad_answers_name_the_address(server, path, message):
    begun = time.monotonic()
    with pytest.raises(MediaError, match=message) as caught:
        fetch.read_url(server + path, max_bytes=100_000, timeout=0.3)
    assert server in str(caught.value)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("path", [NAMED, urllib.parse.quote(NAMED, safe="/?="), f"{NAMED}#part", "/to/named"])
def test_addresses_are_fetched_as_people_write_them(server, path):
    assert fetch.read_url(server + path) == PNG
    assert fetch.read_url(f" {server}{path}\n") == PNG


def test_names_of_hosts_may_be_of_any_script(server, monkeypatch):
    asked = []
    resolve = socket.getaddrinfo

    def resolved(host, port, *rest):
        asked.append(host)
        return resolve("127.0.0.1", port, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    assert fetch.read_url(server.replace("127.0.0.1", "bücher.example") + "/good") == PNG
    assert asked == ["xn--bcher-kva.example"]


def test_a_compressed_body_is_decompressed(server):
    assert fetch.read_url(server + "/gzip") == PNG


def test_a_name_and_a_password_of_the_address_are_sent(server):
    with pytest.raises(MediaError, match="401"):
        fetch.read_url(server + "/private")
    assert fetch.read_url(server.replace("//", "//me:p%40ss@") + "/private") == PNG


def test_the_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch.read_url(server + "/good") == PNG
    # A proxy is asked for the whole address.
    assert fetch.read_url("http://elsewhere.example/good") == b"by proxy"


def test_a_page_is_not_an_image(server):
    with pytest.raises(MediaError, match=f"{server}/html: found no readable image"):
        load_image(server + "/html")


def test_unreachable_server():
    with pytest.raises(MediaError, match=r"http://127\.0\.0\.1:9/x: found an unreachable address"):
        fetch.read_url("http://127.0.0.1:9/x", timeout=2)


def test_file_address_of_another_machine():
    with pytest.raises(MediaError, match="elsewhere"):
        load_image("file://elsewhere/etc/hostname")


def test_images_have_a_lower_limit_than_videos(server):
    assert fetch.MAX_IMAGE_BYTES < 10**9 < fetch.MAX_DOWNLOAD_BYTES
    with pytest.raises(MediaError, match=f"1000000000 bytes; expected at most {fetch.MAX_IMAGE_BYTES}"):
        load_image(server + "/huge")
