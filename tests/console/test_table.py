"""Tables, and text for a terminal."""

from glm4v_jax.console.table import print_table, printable


def test_control_characters_are_escaped():
    assert printable("a\x1b[2Jb\x07\tc\r\nd\x9b\ud800") == "a\\x1b[2Jb\\x07\tc\nd\\x9b\\ud800"


def test_off_a_terminal_a_row_is_an_aligned_line(capsys):
    print_table(("name", "size"), [("a" * 300, "1 B"), ("[bold]\x1b", "10 B")], right=["size"], bold=[0])
    assert capsys.readouterr().out.splitlines() == [
        f"{'name':300}  size",
        f"{'a' * 300}   1 B",
        f"{'[bold]' + chr(92) + 'x1b':300}  10 B",
    ]


def test_a_terminal_folds_text_and_keeps_numbers_whole(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    print_table(("name", "size"), [("a" * 30, "123456789 B")], right=["size"])
    out = capsys.readouterr().out
    assert "123456789 B" in out and max(map(len, out.splitlines()[1:])) <= 20 and out.count("a") >= 30
