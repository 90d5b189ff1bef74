"""Snippets of the pages run, links lead somewhere, and examples in docstrings hold.

A fenced block is a snippet of its page. Python blocks of a page run in order in one namespace; lines of `sh` blocks run
as `glm4v` does. A comment before a block changes that: `<!-- not run: why -->` excludes it (its options of `glm4v` must
still exist), `<!-- file: NAME -->` makes it a file that the others find.
"""

import contextlib
import doctest
import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import threading
import tomllib
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import sphinx.cmd.build
from helpers_paths import ROOT
from helpers_serve import wait_until

import glm4v_jax
from bench import page as pages
from eval.metrics import METRICS
from glm4v_jax.checkpoints import load
from glm4v_jax.cli.main import main
from glm4v_jax.generate import engine, prefill_chunks, slots, warmup
from glm4v_jax.serve import server
from glm4v_jax.tiny import FAMILY_TEMPLATE, TINY_CHECKPOINT
from glm4v_jax.tiny.digits import held_out
from train import evaluate

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"))
)
NOT_RUN = 22
"""Blocks that cannot run here; a new one is to be justified."""

SMALL = {
    "steps = 1000": "steps = 2",
    "length = 8192": "length = 256",
    "vision_length = 16384": "vision_length = 512",
    "rows = 4": "rows = 2",
    "every = 200": "every = 2",
    "generate = 64": "generate = 1",
    "share = 0.02": "share = 0.25",
    "--slots 16": "--slots 8",
}
"""What a job or a command in a page says -> what it says here."""

PORT = 8000
"""At which `glm4v serve` listens."""

_BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>not run|file): (?P<note>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
_PATH = re.compile(r"`((?:glm4v_jax|convert|eval|train|bench|tools|tests|examples|docs)/[\w./-]*)`")


class Block(NamedTuple):
    """A fenced block: its language, its text, and what the comment before it says."""

    language: str
    text: str
    kind: str | None
    note: str | None


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page):
    return [
        Block(found["language"], found["text"], found["kind"], found["note"]) for found in _BLOCK.finditer(read(page))
    ]


def commands_of(block):
    """Words of each line of a shell block that calls `glm4v`."""
    lines = (shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def write_video(path):
    """Two seconds of a moving square."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 56
        for number in range(16):
            pixels = np.zeros((56, 56, 3), np.uint8)
            pixels[20:36, 2 * number : 2 * number + 16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Prompts, caches and images of few sizes: nearly all the time of this file is compiling for one more.

    And one layer in each, around which there is a loop, as on every other platform than a CPU.
    """
    read = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *given, **options: read(*given, **options | {"stacked": True}))
    monkeypatch.setattr(evaluate, "platform", lambda: "gpu")
    for name, module in (("MIN_CAPACITY", slots), ("MIN_CAPACITY", engine), ("MIN_CAPACITY", warmup)):
        monkeypatch.setattr(module, name, 256)
    for module in (prefill_chunks, warmup):
        monkeypatch.setattr(module, "MIN_LENGTH", 64)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with the files that snippets name; the tiny model stands where a released one would."""
    monkeypatch.chdir(tmp_path)
    model = Path("path/to/GLM-4.1V-9B-Thinking")
    model.parent.mkdir(parents=True)
    model.symlink_to(TINY_CHECKPOINT)
    shutil.copytree(TINY_CHECKPOINT, "path/to/GLM-4.6V-Flash")
    shutil.copy(FAMILY_TEMPLATE, "path/to/GLM-4.6V-Flash/chat_template.jinja")
    digit = held_out("reading")[0].media
    for name in ("digit.png", "photo.jpg", "other.jpg", "holiday/beach.png"):
        Path(name).parent.mkdir(exist_ok=True)
        digit.save(name)
    write_video("clip.mp4")
    row = {
        "messages": [
            {"role": "user", "content": "<image>What digit is this?"},
            {"role": "assistant", "content": "<think>One digit.</think><answer>7</answer>"},
        ],
        "images": ["digit.png"],
    }
    Path("data.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    return tmp_path


def in_small(block, more):
    """A block with the numbers of `SMALL`, and some more."""
    text = block.text
    for said, small in (SMALL | more).items():
        text = text.replace(said, small)
    return block._replace(text=text)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def serving(words, port):
    """Run `glm4v serve ...` in a thread until the page ends; yields when it answers."""
    servers = []

    def run(service, listener):
        servers.append(server.Server(service))
        servers[0].run(sockets=[listener])

    small = ["--port", str(port), "--slots", "1", "--max-model-len", "256", "--no-warmup"]
    thread = threading.Thread(target=main, args=([*words[1:], *small, "--model", str(TINY_CHECKPOINT)],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "run", run)
        thread.start()
        try:
            wait_until(lambda: servers and servers[0].started and servers[0]._service.state == "ready")
            yield
        finally:
            servers[0].should_exit = True
            thread.join()


def run_command(words, monkeypatch):
    """Run one line of a shell block in this process, with the packaged model where it names none.

    In tests $GLM4V_MODEL, read when the commands are imported, is a random model, which hardly ever stops.
    """
    if words[0] == "curl":
        if shutil.which("curl") is not None:
            assert os.system(shlex.join(words)) == 0
        return
    assert words[0] == "glm4v", f"{shlex.join(words)}: cannot be run here; put <!-- not run: why --> before its block"
    if "--model" not in words and words[1] in ("generate", "chat", "describe", "inspect", "eval"):
        words = [*words, *(() if words[2:3] in (["compare"], ["tasks"]) else ("--model", str(TINY_CHECKPOINT)))]
    with monkeypatch.context() as patch:
        if words[1] == "cache":  # of the user, and not that of the tests
            patch.setenv("JAX_COMPILATION_CACHE_DIR", "programs")
        patch.setattr("sys.stdin", io.StringIO("What digit is this?\n"))
        assert not main(words[1:]), shlex.join(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES  # tests/train/test_finetune_examples.py runs those of examples/finetune
        if not page.startswith("examples/") and any(b.language in ("sh", "python") for b in blocks_of(page))
    ],
)
def test_snippets_run(page, workplace, monkeypatch):
    port = free_port()
    blocks = [in_small(block, {f"127.0.0.1:{PORT}": f"127.0.0.1:{port}"}) for block in blocks_of(page)]
    for block in blocks:
        if block.kind == "file":
            Path(block.note).write_text(block.text)
    namespace = {"__name__": "snippets"}
    with contextlib.ExitStack() as running:
        for block in blocks:
            if block.kind is None and block.language == "sh":
                for words in commands_of(block):
                    if words[:2] == ["glm4v", "serve"]:
                        running.enter_context(serving(words, port))
                    else:
                        run_command(words, monkeypatch)
            elif block.kind is None and block.language == "python":
                exec(compile(block.text, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_data_blocks_parse(page):
    for block in blocks_of(page):
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        elif block.language == "toml":
            tomllib.loads(block.text)
        else:
            assert block.language in ("sh", "python", "text"), block.language


def test_few_snippets_are_not_run():
    found = [(page, block.note) for page in PAGES for block in blocks_of(page) if block.kind == "not run"]
    assert len(found) <= NOT_RUN, found
    assert all(note for _, note in found)


def glm4v_lines():
    """Lines of blocks that are not run, and `glm4v ...` between backticks in the text."""
    for page in PAGES:
        for block in blocks_of(page):
            if block.kind == "not run":
                for words in commands_of(block):
                    for word in (shlex.join(words), *words):  # `... --command 'glm4v generate ...'`
                        if word.startswith("glm4v "):
                            yield page, word
        for found in re.finditer(r"`(glm4v [^`\n]+)`", read(page)):
            yield page, found[1]


@pytest.mark.parametrize(("page", "line"), sorted(set(glm4v_lines())))
def test_options_exist(page, line, capfd):
    options = set(re.findall(r"(?<!\S)--[a-z-]+", line))
    words = shlex.split(line)[1:]
    if options <= {"--help", "--version", "--tyro-print-completion", "--tyro-write-completion"}:
        return
    subcommands = {"convert", "train", "eval"}
    command = words[
        : 2 if words[0] in subcommands and not words[1].startswith("-") and not words[1].endswith(".toml") else 1
    ]
    if words[0] in subcommands and len(command) == 1:
        command.append("run")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert not ended.value.code
    known = set(re.findall(r"--[a-z-]+", capfd.readouterr().out))
    assert options <= known


def anchors(page):
    """Anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in _LINK.findall(read(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.resolve().relative_to(ROOT)), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    assert not [path for path in _PATH.findall(read(page)) if not (ROOT / path).exists()]


def test_the_architecture_page_lists_every_room():
    listed = set(re.findall(r"^\| \d+ \| (.+?) \|", read("docs/architecture.md"), re.M))
    listed = {
        name.removeprefix("glm4v_jax/").removesuffix("/").removesuffix(".py")
        for line in listed
        for name in re.findall(r"`(.+?)`", line)
    }
    from test_architecture import FLOOR

    assert listed == set(FLOOR)


def test_the_evaluation_page_lists_every_metric():
    section = read("docs/guides/evaluate.md").partition("## Metrics\n")[2].partition("\n## ")[0]
    listed = [name for cell in re.findall(r"^\| (`.+?) \|", section, re.M) for name in re.findall(r"`(.+?)`", cell)]
    assert sorted(listed) == sorted(METRICS)


def test_cited_traps_are_explained():
    sources = (
        path
        for folder in ("glm4v_jax", "convert", "eval", "train", "tests", "tools")
        for path in (ROOT / folder).rglob("*.py")
    )
    cited = {
        found for path in sources for found in re.findall(r"\btraps? (T\d+)", path.read_text(encoding="utf-8"), re.I)
    }
    explained = set(re.findall(r"^### (T\d+)$", read("docs/differences.md"), re.M))
    assert cited, "nothing cites a trap any more"
    assert cited <= explained


def test_api_pages_have_every_exported_name():
    text = "".join(read(page) for page in PAGES if page.startswith("docs/api/"))
    assert set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.M)) == set(glm4v_jax.__all__)


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    arguments = ["-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    assert sphinx.cmd.build.build_main(arguments) == 0
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:link|script|img)[^>]+(?:href|src)=\"(https?://[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert not loaded, page


@pytest.mark.parametrize("name", pages.PAGES)
def test_generated_pages_are_what_their_program_writes(name):
    assert pages.PAGES[name].read_text(encoding="utf-8") == pages.page(name)


def doctests():
    """Examples in docstrings of the packages."""
    for folder in ("glm4v_jax", "convert", "eval", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                yield from (
                    test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples
                )


@pytest.mark.slow
@pytest.mark.parametrize("example", list(doctests()), ids=lambda example: example.name)
def test_examples_in_docstrings(example, workplace):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    runner.run(example, out=report.write)
    assert not runner.failures, report.getvalue()
