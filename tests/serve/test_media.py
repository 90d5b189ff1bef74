"""What a stranger may send, and that nothing else is ever opened or asked for."""

import base64
import http.server
import ipaddress
import itertools
import socket
import struct
import threading
import zlib

import httpx2 as httpx
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest
from helpers_media import PNG, png, write_video
from helpers_serve import wait_until
from hypothesis import given, settings

from glm4v_jax.errors import ConfigError, MediaError
from glm4v_jax.inputs.media import decode
from glm4v_jax.inputs.media.hosts import AllowedHosts, is_public
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.chat_template import choose_template
from glm4v_jax.inputs.text.messages import extract_media
from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.media import MediaPolicy, limit_videos, resolve
from glm4v_jax.tiny import TINY_CHECKPOINT

resolve_name = socket.getaddrinfo


def data_url(data=PNG, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(source, kind="image"):
    return [{"role": "user", "content": [{"type": f"{kind}_url", f"{kind}_url": {"url": source}}]}]


def media_of(messages):
    """What of resolved messages the processor would open."""
    return extract_media(messages, choose_template(PROCESSOR.chat_template))


PROCESSOR = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)


class Listener(http.server.BaseHTTPRequestHandler):
    heard: list = []  # noqa: RUF012

    def handle(self):
        self.heard.append(self.client_address)
        super().handle()

    def do_GET(self):
        self.heard[-1] = (self.path, self.headers["Host"])
        target = {
            "/loopback": "http://127.0.0.1:{}/",
            "/file": "file:///etc/hostname",
            "/far": "http://far.example:{}/",
        }
        if self.path in target:
            self.send_response(302)
            self.send_header("Location", target[self.path].format(self.server.server_port))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(bytes(20_000) if self.path == "/large" else PNG)

    def log_message(self, *args):
        pass


class BothFamilies(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


@pytest.fixture(scope="module")
def port():
    with BothFamilies(("::", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def heard():
    Listener.heard.clear()
    return Listener.heard


@pytest.fixture
def names(monkeypatch):
    """Host name -> addresses, one list for each time it is asked for; the last one stays."""
    known = {}

    def answer(host, port, *args, **kwargs):
        if host not in known:
            return resolve_name(host, port, *args, **kwargs)
        addresses = known[host].pop(0) if len(known[host]) > 1 else known[host][0]
        return list(
            itertools.chain.from_iterable(resolve_name(address, port, *args, **kwargs) for address in addresses)
        )

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return known


def refused(messages, policy=None):
    with pytest.raises(ApiError) as caught:
        resolve(messages, policy or MediaPolicy())
    assert caught.value.status == 400
    return caught.value.message


PATH = __file__
PLACES = [PATH, f"file://{PATH}", f"FILE://{PATH}", f"file://localhost{PATH}", "../conftest.py", "~/x.png", "/dev/zero"]
ADDRESSES = [
    "http://127.0.0.1:{}/", "HTTP://127.0.0.1:{}/", "http://[::1]:{}/", "http://[::ffff:127.0.0.1]:{}/",
    "http://localhost:{}/", "http://localhost.:{}/", "http://127.0.0.1.:{}/", "http://2130706433:{}/",
    "http://0x7f000001:{}/", "http://0177.0.0.1:{}/", "http://127.1:{}/", "http://0:{}/", "http://[::]:{}/",
    "http://①②⑦.⓪.⓪.①:{}/", "http://１２７.0.0.1:{}/", "http://127。0。0。1:{}/",
    "http://good.example@127.0.0.1:{}/", "http://good.example:80@127.0.0.1:{}/", "http://127.0.0.1:{}/@good.example",
    "http://127.0.0.1:{}#@good.example/", "http://127.0.0.1:{}\\@good.example/", "http://good.example\\@127.0.0.1:{}/",
    "http://good.example.127.0.0.1.nip.io:{}/", "http://127.0.0.1:{}?good.example", "http://user:pw@good.example:{}/",
    "http://169.254.169.254/latest/meta-data/", "http://good.example%00.127.0.0.1:{}/", "//127.0.0.1:{}/x.png",
    "ftp://127.0.0.1:{}/x.png", "gopher://127.0.0.1:{}/x", "rtsp://127.0.0.1:{}/x", "concat:http://127.0.0.1:{}/x",
    "http:127.0.0.1:{}/", "http:///127.0.0.1:{}/", " http://127.0.0.1:{}/", "url:http://127.0.0.1:{}/", "http://",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("policy", [MediaPolicy(), MediaPolicy(hosts=AllowedHosts(("good.example",)))])
def test_nothing_but_allowed_hosts_is_asked(policy, kind, port, heard, names):
    names["good.example"] = [["127.0.0.1"]]
    for source in (*PLACES, *ADDRESSES):
        source = source.format(port)
        message = refused(shown(source, kind), policy)
        assert "127.0.0.1" not in message and "good.example" not in message and PATH not in message, message
    assert not heard


# Every shape in which a message of OpenAI's clients, of transformers or of this package can name an image or a video.
def _shapes(source):
    for kind in ("image", "video"):
        urls = [{"url": source}, source]
        for field, value in itertools.product((f"{kind}_url", kind, "url", "path", "base64", "file"), urls):
            yield {"type": kind, field: value}
            yield {"type": f"{kind}_url", field: value}
            yield {"type": f"input_{kind}", field: value}
            yield {field: value}
        yield {"type": kind, kind: [source, source]}
        yield {"type": kind, kind: [{"url": source}]}
        yield {"type": f"{kind}_url", f"{kind}_url": [source]}
        yield {"type": f"{kind}_url", f"{kind}_url": {"url": [source]}}
        yield {"type": f"{kind}_url", f"{kind}_url": {"url": {"url": source}}}
        yield {"type": f"{kind}_url", f"{kind}_url": {"url": data_url(), "path": source}}
        yield {"type": f"{kind}_url", f"{kind}_url": {"url": data_url()}, kind: source}
        yield {"type": kind, kind: data_url(), "url": source}
        yield {"type": "text", "text": "Look", kind: source}
        yield {"type": kind.upper(), kind: source}
    yield {"type": "file", "file": {"file_data": source}}
    yield {"type": "tool_result", "content": [{"type": "image", "image": source}]}
    yield {"type": "input_image", "file_id": source}
    yield source


@pytest.mark.parametrize("role", ["user", "tool", "assistant", "system"])
def test_paths_and_loopback_are_refused_wherever_they_stand(role, port, heard):
    for source in (PATH, f"file://{PATH}", f"http://127.0.0.1:{port}/", base64.b64encode(PNG).decode()):
        for item in _shapes(source):
            assert source not in refused([{"role": role, "content": [item]}]), item
    assert not heard


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"type": "pic"}, "messages[0].content[0].type: found 'pic'; expected 'text', "),
        ({"type": "my secret"}, "messages[0].content[0].type: found a string of 9 characters; "),
        ({"type": "text", "text": "a", "my secret": 1}, "messages[0].content[0]: found an unknown field; "),
        ({**shown(data_url())[0]["content"][0], "my secret": 1}, "messages[0].content[0]: found an unknown field; "),
    ],
)
def test_only_plain_words_come_back(item, message):
    assert refused([{"role": "user", "content": [item]}]).startswith(message)


_KEYS = ["type", "text", "image", "image_url", "video", "video_url", "url", "path", "base64", "input_image", "fps"]
_VALUES = st.recursive(
    st.sampled_from(["image", "video", "image_url", "video_url", "text", PATH, data_url(), 7, None]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150)
@given(st.lists(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4), max_size=2))
def test_whatever_passes_has_bytes_alone(items):
    try:
        messages = resolve([{"role": "user", "content": items}], MediaPolicy())
        images, videos = media_of(messages)
    except (ApiError, ValueError):  # the second from the processor, as a malformed message
        return
    for medium in (*images, *videos):
        source = getattr(medium, "source", medium)
        source = getattr(source, "frames", source)
        assert all(isinstance(one, bytes) for one in (source if isinstance(source, list) else [source]))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "168.63.129.16", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:53aa:64c:0:0:80ff:fffe", "2001:db8::1", "fec0::1",
        "100::1", "3fff::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::"]
)
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["169.254.169.254"], ["0.0.0.0"], ["1.1.1.1", "127.0.0.1"],
        ["64:ff9b::7f00:1"], ["2002:7f00:1::"],
    ],
)  # fmt: skip
def test_an_allowed_name_at_a_private_address_is_refused(addresses, port, heard, names):
    names["good.example"] = [addresses]
    policy = MediaPolicy(hosts=AllowedHosts(("good.example",)))
    assert "not public" in refused(shown(f"http://good.example:{port}/"), policy)
    assert not heard


def test_link_local_addresses_are_refused_even_where_private_ones_are_allowed(names):
    policy = MediaPolicy(hosts=AllowedHosts(("*.example",), allow_private=True))
    for address in ("169.254.169.254", "fe80::1", "0.0.0.0", "::ffff:169.254.169.254", "224.0.0.1"):
        names["some.example"] = [[address]]
        assert "not public" in refused(shown("http://some.example/"), policy)


@pytest.fixture
def private():
    return MediaPolicy(hosts=AllowedHosts(("good.example", "127.0.0.1"), allow_private=True), max_download_bytes=10_000)


def test_an_allowed_host_is_looked_up_once_and_asked_by_its_name(port, heard, names, private, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    names["good.example"] = [["127.0.0.1"], ["203.0.113.7"]]
    messages = resolve(shown(f"http://GOOD.example.:{port}/an image.png"), private)
    assert media_of(messages)[0] == [PNG]
    assert heard == [("/an%20image.png", f"good.example.:{port}")]


def test_what_is_connected_to_is_what_was_checked(names, monkeypatch):
    asked = []

    def connect(self, address):
        asked.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    # A resolver that lies from the second time on.
    names["good.example"] = [["93.184.215.14", "2606:4700::1111"], ["127.0.0.1"]]
    for scheme in ("http", "https"):
        asked.clear()
        policy = MediaPolicy(hosts=AllowedHosts(("good.example",)))
        names["good.example"] = [["93.184.215.14", "2606:4700::1111"], ["127.0.0.1"]]
        message = refused(shown(f"{scheme}://good.example/"), policy)
        assert message == "messages[0].content[0].image_url: found an unreachable address; expected a file"
        assert asked == ["93.184.215.14", "2606:4700::1111"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/far", "not allowed"),
        ("/loopback", "not allowed"),
        ("/file", "expected an http or https address"),
        ("/missing", "404"),
        ("/large", "10000"),
    ],
)
def test_redirects_and_bad_answers(path, message, port, heard, names):
    names["good.example"] = [["127.0.0.1"]]
    hosts = AllowedHosts(("good.example",), allow_private=True)
    found = refused(shown(f"http://good.example:{port}{path}"), MediaPolicy(hosts=hosts, max_download_bytes=10_000))
    assert message in found and "good.example" not in found and "/etc" not in found
    assert [path for path, _ in heard] == [path]


def test_a_redirect_to_an_allowed_name_at_a_private_address_is_refused(port, heard, names):
    names |= {"good.example": [["127.0.0.1"]], "far.example": [["169.254.169.254"]]}
    policy = MediaPolicy(hosts=AllowedHosts(("*.example",), allow_private=True))
    assert "not public" in refused(shown(f"http://good.example:{port}/far"), policy)
    assert len(heard) == 1


def test_downloads_of_a_request_share_their_limits(port, heard, names, private):
    assert media_of(resolve(shown(f"http://127.0.0.1:{port}/"), private))[0] == [PNG]
    two = shown(f"http://127.0.0.1:{port}/") * 2
    assert "more than" in refused(two, private)


def test_a_resolver_that_does_not_answer_meets_the_deadline(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: threading.Event().wait(5))
    policy = MediaPolicy(hosts=AllowedHosts(("good.example",)), download_seconds=0.05)
    assert "no answer within" in refused(shown("http://good.example/"), policy)


@pytest.mark.parametrize("name", ["", "*", "a b", "http://x", "x/y", "x:80", "*.", "a@b", "x?y", "*.*.com"])
def test_names_of_hosts_are_checked(name):
    with pytest.raises(ConfigError, match="expected a host such as"):
        AllowedHosts((name,))


def test_names_of_hosts_are_compared_in_one_form():
    hosts = AllowedHosts(("Example.COM.", "*.bücher.example", "::1"))
    assert hosts.names == ("example.com", "*.xn--bcher-kva.example", "::1")
    allowed = ["example.com", "EXAMPLE.com.", "a.b.xn--bcher-kva.example", "[::1]"]
    assert all(map(hosts.allows, allowed))
    assert not any(map(hosts.allows, ["a.example.com", "xn--bcher-kva.example", "example.com.evil", "", "."]))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,", "no data"),
        ("data:image/png;base64,!!!!", "invalid base64"),
        ("data:image/png;base64,aaaaa", "invalid base64"),
        ("data:image/png;base64, aaaa", "invalid base64"),
        ("data:image/png;base64,aaa\u00e9", "invalid base64"),
        ("data:image/png,hello", "another data URL"),
        ("data:image/png;base64", "another data URL"),
        (f"data:{'x' * 300};base64,aaaa", "another data URL"),
        ("data:text/plain;base64,aGVsbG8=", "no readable image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no readable image"),
        (data_url(bytes(2**16)), "too many bytes"),
    ],
)
def test_bad_data(url, message):
    assert message in refused(shown(url), MediaPolicy(max_bytes=30_000))


def sized_png(width, height):
    """A PNG that says it is large, and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (2**31 - 1, 1), (100_000, 1000)])
def test_large_images_are_refused_before_they_are_decoded(size):
    assert "pixels" in refused(shown(data_url(sized_png(*size))))
    refused(shown(data_url(sized_png(*size)), "video"))


def test_images_are_counted_in_all_messages():
    messages = shown(data_url()) * 3
    frames = [{"role": "user", "content": [{"type": "video", "video": [data_url()] * 3}]}]
    for three in (messages, frames):
        assert len(resolve(three, MediaPolicy(max_images=3))) == len(three)
        assert "more than 2 images" in refused(three, MediaPolicy(max_images=2))
        assert "decoded" in refused(three, MediaPolicy(max_decoded_bytes=2 * 3 * 48 * 64))
    assert "more than 0 videos" in refused(frames, MediaPolicy(max_videos=0))


def test_images_and_options_arrive_as_they_are_in_every_shape():
    for item in (
        {"type": "image_url", "image_url": {"url": data_url(), "detail": "high"}},
        {"type": "image_url", "image_url": data_url()},
        {"type": "input_image", "image_url": data_url(), "detail": "auto", "path": None},
        {"type": "image", "image": data_url()},
        {"image": data_url()},
        {"type": "image", "url": data_url()},
    ):
        messages = [
            {"role": "user", "content": [item, {"type": "text", "text": "?"}, {"type": "input_text", "text": "!"}]}
        ]
        assert media_of(resolve(messages, MediaPolicy())) == ([PNG], [])
    item = {"type": "image_url", "image_url": {"url": data_url(), "max_pixels": 10_000}}
    ((image,), _) = media_of(resolve([{"role": "user", "content": [item]}], MediaPolicy()))
    assert (image.source, image.options) == (PNG, {"max_pixels": 10_000})
    assert (
        resolve(text := [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], MediaPolicy())
        == text
    )


def test_images_of_too_many_tokens_are_refused_before_they_are_decoded():
    large = shown(data_url(sized_png(5600, 5600)))
    assert resolve(large, MediaPolicy(), PROCESSOR, 10**6)
    tokens = PROCESSOR.image_processor.get_number_of_image_patches(5600, 5600) // 4
    with pytest.raises(ApiError, match=f"found images of {2 * tokens:,} tokens; expected at most {tokens:,}") as caught:
        resolve(large * 2, MediaPolicy(), PROCESSOR, tokens)
    assert caught.value.code == "context_length_exceeded"
    small = {"type": "image_url", "image_url": {"url": data_url(sized_png(5600, 5600)), "max_pixels": 10_000}}
    resolve([{"role": "user", "content": [small] * 2}], MediaPolicy(), PROCESSOR, tokens)


@pytest.mark.parametrize("options", [{"fps": "x" * 100}, {"max_pixels": [1]}, {"x" * 100: 1}, {"a b": 1}])
def test_what_is_no_option_is_not_repeated(options):
    item = {"type": "video_url", "video_url": {"url": data_url()}, **options}
    assert "xxx" not in refused([{"role": "user", "content": [item]}])


@pytest.mark.parametrize(
    "options", [{"max_pixels": 10**9}, {"min_pixels": 10**5}, {"resized_height": 10**400}, {"fps": 1e300}]
)
def test_options_that_would_cost_memory_are_refused(options):
    item = {"type": "video_url", "video_url": {"url": data_url()}, **options}
    assert "too large a number" in refused([{"role": "user", "content": [item]}])


def animation(frames, size=(32, 32)):
    images = [PIL.Image.new("RGB", size, (index % 256, index // 256, 0)) for index in range(frames)]
    return png(images[0], format="GIF", save_all=True, append_images=images[1:], duration=20)


def test_videos_are_videos(tmp_path):
    clip = np.zeros((4, 32, 32, 3), np.uint8)
    sources = [animation(3)] + [
        write_video(tmp_path / name, clip, codec=codec).read_bytes()
        for name, codec in (("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.webm", "libsvtav1"), ("a.mkv", "libx264"))
    ]
    for source in sources:
        assert media_of(resolve(shown(data_url(source), "video"), MediaPolicy())) == ([], [source])


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#\x01\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n\x01",
        b"v=0\nftypisom\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n\x01",
        b"\0\0\0\x0cftypjp2 \r\n",
        b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff\x42\x82\x84webm\nc=IN IP4 127.0.0.1\n",
        b"\x1a\x45\xdf\xa3\x82\x42\x82\x84webm\nc=IN IP4 127.0.0.1\n",
        b"RIFF\x10\0\0\0AVI LIST",
        b"%PDF-1.7",
        bytes(1000),
    ],
)
def test_files_that_a_decoder_might_follow_elsewhere_are_refused(data):
    assert "no readable video" in refused(shown(data_url(data), "video"))


def test_animations_are_bounded_before_they_are_composed():
    gif = data_url(animation(40))
    assert "more than" in refused(shown(gif, "video"), MediaPolicy(max_decoded_bytes=39 * 32 * 32 * 3))
    resolve(shown(gif, "video"), MediaPolicy(max_decoded_bytes=40 * 32 * 32 * 3))


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 1000}, {"max_decoded_bytes": 3 * 32 * 32 * 3}, {"max_video_seconds": 1.5}]
)
def test_videos_are_bounded_before_their_frames_are_decoded(limits, tmp_path, monkeypatch):
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    source = write_video(tmp_path / "a.mp4", np.zeros((20, 32, 32, 3), np.uint8)).read_bytes()
    limit_videos(processor, MediaPolicy())
    assert len(processor.video_processor(source).video_grid_thw) == 1
    limit_videos(processor, MediaPolicy(**limits))
    monkeypatch.setattr(decode._DecordReader, "read", None)
    monkeypatch.setattr(decode._PyavReader, "read", None)
    with pytest.raises(MediaError, match="expected at most"):
        processor.video_processor(source)


def test_videos_of_too_many_tokens_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    source = write_video(tmp_path / "a.mp4", np.zeros((20, 64, 64, 3), np.uint8)).read_bytes()
    tokens = len(processor.video_processor(source).pixel_values_videos) // 4
    limit_videos(processor, MediaPolicy(), tokens)
    processor.video_processor(source)
    limit_videos(processor, MediaPolicy(), tokens - 1)
    monkeypatch.setattr(decode._DecordReader, "read", None)
    with pytest.raises(
        MediaError, match=rf"video 0: .*found {tokens} tokens of 4 frames; expected at most {tokens - 1}"
    ):
        processor.video_processor(source)


@pytest.mark.slow
def test_a_server_takes_nothing_else_from_strangers(serving, port, heard, names):
    names["good.example"] = [["127.0.0.1"]]
    policy = MediaPolicy(hosts=AllowedHosts(("good.example",), allow_private=True))
    headers = {"Content-Type": "application/json"}
    with (
        serving(media=policy) as (service, address),
        httpx.Client(base_url=address, headers=headers, timeout=120) as client,
    ):
        wait_until(lambda: service.state == "ready")

        def post(messages):
            return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, "temperature": 0})

        by_address, by_data = post(shown(f"http://good.example:{port}/")), post(shown(data_url()))
        assert by_address.status_code == by_data.status_code == 200
        assert by_address.json()["choices"] == by_data.json()["choices"]
        assert len(heard) == 1
        heard.clear()
        bad = [shown(source.format(port)) for source in (*PLACES, *ADDRESSES)]
        bad += [shown(data_url(sized_png(20_000, 20_000))), shown(data_url()) * 9, shown(data_url(PNG[:2000]))]
        for messages in bad:
            answer = post(messages)
            assert answer.status_code == 400, messages
            assert (
                "127.0.0.1" not in answer.text
                and "good.example" not in answer.text
                and PATH not in answer.text
                and "base64,iVBOR" not in answer.text
            )
        for content, status in ((b'{"a": ' * 10**6, 400), (b'{"a": "\xff"}', 400), (b" " * (65 * 2**20), 413)):
            assert client.post("/v1/chat/completions", content=content).status_code == status
        assert not heard
        assert post(shown(data_url())).json()["choices"] == by_data.json()["choices"]
