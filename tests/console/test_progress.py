"""The progress bar, and its plain lines."""

from glm4v_jax.console.progress import Programs, Progress


def clock(*times):
    return iter(times).__next__


def test_off_a_terminal_there_is_a_line_every_ten_seconds(capsys):
    with Progress("to Orbax", clock=clock(0.0, 3.0, 12.0, 15.0, 30.0)) as progress:
        for done in (0, 1, 4, 6):
            progress.update(done * 10**9, 8 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "to Orbax: 1.00 GB of 8.00 GB",
        "to Orbax: 6.00 GB of 8.00 GB, 277.78 MB/s, 0:00:07 left",
    ]


def test_rates_leave_out_an_earlier_run_and_the_first_thing_done(capsys):
    with Progress("answering", "prompts", clock=clock(*(4.0 * n for n in range(5)))) as progress:
        progress.update(1010, 4000)
        for done in range(1011, 1014):
            progress.update(done, 4000, tokens=20)
    line = "answering: 1,012 of 4,000 prompts, 0.25 prompts/s, 5.0 tokens/s, 3:19:12 left"
    assert capsys.readouterr().err.splitlines() == [line]


def test_rates_leave_out_compilation(capsys):
    with Progress("answering", "prompts", clock=clock(*(6.0 * n for n in range(5)))) as progress:
        for done, compiled in enumerate((0.0, 3.0, 3.0, 10.0)):
            progress.update(done, 8, tokens=3, compiled=compiled)
    line = "answering: 3 of 8 prompts, 0.40 prompts/s, 1.2 tokens/s, 0:00:12 left"
    assert line in capsys.readouterr().err.splitlines()


def test_programs_are_counted_as_they_are_compiled():
    shown = []
    note = Programs({"encode": "vision encoder", "prefill": "prefill"}, shown.append, "running")
    for name in ("add", None, "encode", None, "prefill", None, "prefill", None):
        note(name)
    compiled = [f"compiling {text}" for text in ("1 of 2: vision encoder", "2 of 2: prefill", "3 of 3: prefill")]
    assert shown == [text for line in compiled for text in (line, "running")]


def test_a_terminal_shows_a_bar_with_lines_above_it(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("answering", "prompts") as progress:
        progress.log("before")
        progress.update(0, 2)
        progress.doing("compiling 1 of 2: prefill")
        progress.log("a\x1b[2Jb")
        progress.update(2, 2)
    out = capsys.readouterr().err
    assert out.startswith("before\n") and "a\\x1b[2Jb" in out
    assert "0 of 2 prompts, compiling 1 of 2: prefill" in out and "2 of 2 prompts" in out
