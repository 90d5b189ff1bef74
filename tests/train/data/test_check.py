"""`train check`: counts, bad rows, printed report, histogram and exit status."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise, save_video

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs.processor import Glm4vProcessor
from train import commands
from train.data.check import check
from train.data.histogram import bins, draw_histogram, percentile
from train.data.lengths import TokenCounter
from train.data.records import read_records

CONFIG = Glm4vConfig.from_dict(json.loads((RANDOM_CHECKPOINT / "config.json").read_text()))


def row(question="?", answer="!", **fields):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **fields,
    }


@pytest.fixture
def data(tmp_path):
    """Five good rows: two pictures of real cameras, one film, text, and boxes."""
    skimage_data = pytest.importorskip("skimage.data")
    PIL.Image.fromarray(skimage_data.chelsea()).save(tmp_path / "cat.png")
    PIL.Image.fromarray(skimage_data.coffee()).save(tmp_path / "cup.jpg")
    save_video(tmp_path / "film.gif")
    rows = [
        row("<image>What is it?", "<think>Ears.</think><answer>A cat.</answer>", images=["cat.png"]),
        row("<image><image>Which is the cup?", "The second.", images=["cat.png", "cup.jpg"]),
        row("<video>What is it?", "It gets brighter.", videos=["film.gif"]),
        row("2 + 2?", "4"),
        row("<image>Where?", "[<bbox>]", images=["cup.jpg"], objects={"ref": [], "bbox": [[150, 100, 450, 300]]}),
    ]
    write(tmp_path / "data.jsonl", rows)
    return tmp_path / "data.jsonl"


def write(path, rows):
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))


def add(path, *lines):
    with open(path, "a") as file:
        file.writelines(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)


def run(capfd, *arguments):
    status = commands.main(["check", *map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_good_data_are_counted(data):
    report = check(read_records(data))
    assert (report.total, report.checked, report.bad, report.problems) == (5, 5, 0, [])
    assert report.formats == {"openai": 4, "swift": 1}
    assert (report.messages, report.learned, report.pictures, report.videos) == (10, 5, 4, 1)
    assert (report.text_only, report.remote) == (1, 0)
    # "2 + 2?4"; the longest is the first.
    assert report.summary["min"] == 7
    assert report.summary["max"] == len("What is it?<think>Ears.</think><answer>A cat.</answer>")
    assert report.longest == f"{data}:1"
    assert report.summary["sum"] == sum(report.lengths)
    # Of several as long as each other it is the first.
    add(data, json.loads(data.read_text().splitlines()[0]))
    assert check(read_records(data)).longest == f"{data}:1"


def test_bad_rows_are_reported_and_not_counted(data):
    directory = data.parent
    (directory / "text.png").write_text("no picture")
    add(
        data,
        "{bad",
        row("<image>?", images=["none.png"]),
        row("<image>?", images=["text.png"]),
        row("<image>?", images=["."]),
        row("<video>?", videos=["none.mp4"]),
        row("<video>?", videos=[["cat.png", "none.png"]]),
        row("<image>?", images=[]),
        row("<image>Where?", "<bbox>", images=["none.png"], objects={"ref": [], "bbox": [[1, 1, 2, 2]]}),
    )
    report = check(read_records(data))
    assert (report.checked, report.bad, report.pictures) == (13, 8, 4)
    told = [(problem.place, problem.reason) for problem in report.problems]
    assert [place for place, _ in told] == [f"{data}:{line}" for line in range(6, 14)]
    assert "invalid JSON" in told[0][1]
    assert told[1][1] == f"{directory}/none.png: found no such file; expected an image or a video"
    assert told[2][1] == f"{directory}/text.png: found no readable image (text); expected an image"
    assert told[3][1] == f"{directory}: found a directory; expected an image; a directory of frames is a video"
    assert told[4][1] == f"{directory}/none.mp4: found no such file; expected an image or a video"
    assert told[5][1] == f"{directory}/none.png: found no such file; expected an image or a video"
    assert told[6][1] == "images: found 0 for 1 <image> marker; expected as many"
    assert told[7][1] == f"{directory}/none.png: found no such file; expected an image or a video"


def test_only_the_first_bad_rows_are_kept(data):
    add(data, *["{bad"] * 30)
    report = check(read_records(data))
    assert report.bad == 30
    assert [problem.place for problem in report.problems] == [f"{data}:{line}" for line in range(6, 26)]


def test_truncated_files_are_found_by_decoding(data):
    directory = data.parent
    whole = (directory / "cat.png").read_bytes()
    (directory / "cut.png").write_bytes(whole[: len(whole) // 2])
    save_noise(directory / "still.png")
    add(data, row("<image>?", images=["cut.png"]), row("<video>?", videos=["still.png"]))
    assert check(read_records(data)).bad == 0
    report = check(read_records(data), decode=True)
    assert [problem.place for problem in report.problems] == [f"{data}:6", f"{data}:7"]
    assert "cut.png: found a truncated or corrupt image" in report.problems[0].reason


def test_remote_images_are_checked_only_with_decode(data):
    add(data, row("<image>?", images=["http://127.0.0.1:9/a.png"]))
    report = check(read_records(data))
    assert (report.bad, report.remote, report.pictures) == (0, 1, 5)
    report = check(read_records(data), decode=True)
    assert report.bad == 1
    assert report.problems[0].reason.startswith("http://127.0.0.1:9/a.png: ")


def test_a_limit_checks_the_first_rows(data):
    told = []
    report = check(read_records(data), limit=2, progress=lambda done, total: told.append((done, total)))
    assert (report.total, report.checked, report.pictures) == (5, 2, 3)
    assert told == [(1, 2), (2, 2)]
    assert check(read_records(data), limit=50).checked == 5
    with pytest.raises(DataError, match="limit: found 0; expected at least 1"):
        check(read_records(data), limit=0)


def test_token_counts_are_those_of_samples(data):
    samples = pytest.importorskip("train.data.samples")
    thoughts = "<think>So.</think><answer>{}</answer>"
    messages = [
        message
        for n in range(3)
        for message in row(f"<image>and {n}?" if n == 1 else f"and {n}?", thoughts.format(n))["messages"]
    ]
    add(data, {"messages": [{"role": "system", "content": "Be short."}, *messages], "images": ["cup.jpg"]})
    frames = [{"type": "video", "video": ["cup.jpg"] * 8, "fps": 0.01}, {"type": "text", "text": "?"}]
    add(data, {"messages": [{"role": "user", "content": frames}, {"role": "assistant", "content": "!"}]})
    (data.parent / "frames").mkdir()
    for index in range(8):
        save_noise(data.parent / f"frames/{index}.png", seed=index)
    for video in ({"path": "film.gif", "fps": 1}, {"video": "frames"}, {"path": "frames", "fps": 0.01}):
        content = [{"type": "video", **video}, {"type": "text", "text": "?"}]
        add(data, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "!"}]})
    add(data, row("<video>?", videos=["frames"]))
    add(data, row("<video>?", videos=[f"frames/{index}.png" for index in range(8)]))
    processor = Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)
    records = read_records(data)
    count = TokenCounter(processor)
    assert len(records) == 12
    found = [samples.encode(record, processor, CONFIG, samples.EncodeOptions()) for record in records]
    assert [count(record) for record in records] == [len(sample.input_ids) for sample in found]
    # A directory of frames, and a list of them, is a video in every format; with its rate, where the row has one.
    times = [processor.decode(sample.input_ids).split("<|end_of_image|>")[-4:] for sample in found[-4:]]
    assert [[int(re.match(r"\d+", part)[0]) for part in parts] for parts in times] == [
        [0, 1, 2, 3], [0, 200, 400, 600], [0, 1, 2, 3], [0, 1, 2, 3],
    ]  # fmt: skip
    assert check(records, decode=True).bad == 0
    (data.parent / "frames/8.png").write_text("no image")
    assert "8.png: found no readable image" in check(records).problems[0].reason


def test_images_are_not_decoded_to_count_tokens(data, monkeypatch):
    records = read_records(data)
    count = TokenCounter(Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT))
    expected = [count(records[i]) for i in (0, 1, 4)]
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
    assert [count(records[i]) for i in (0, 1, 4)] == expected


def test_a_damaged_video_is_a_bad_row_when_tokens_are_counted(data):
    (data.parent / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    add(data, row("<video>?", videos=["bad.mp4"]))
    assert check(read_records(data)).bad == 0
    report = check(read_records(data), measure=TokenCounter(Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)))
    assert [problem.place for problem in report.problems] == [f"{data}:6"]
    assert "bad.mp4" in report.problems[0].reason
    assert not report.problems[0].reason.startswith(str(data))


def test_the_command_prints_a_table(capfd, data):
    status, out, err = run(capfd, data)
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "rows 5: 5 good, 0 bad",
        "formats openai 4, swift 1",
        "messages 10, of which 5 contribute to the loss",
        "media images 4, videos 1; not decoded: pass --decode to find damaged ones",
        "text only 1",
        f"characters min 7, median 28, p95 54, max 54, sum 142; longest at {data}:1",
    ]


def test_bad_rows_are_listed_with_exit_status_1(capfd, data):
    add(data, row("<image>?", images=["\x1b[31mnone.png"]))
    status, out, err = run(capfd, data)
    assert (status, err) == (1, "")
    assert out.splitlines()[0].split() == ["rows", "6:", "5", "good,", "1", "bad"]
    assert out.splitlines()[-2:] == [
        "bad rows:",
        f"  {data}:6: {data.parent}/\\x1b[31mnone.png: found no such file; expected an image or a video",
    ]
    add(data, *["{bad"] * 20)
    assert "bad rows, 20 of them shown:" in run(capfd, data)[1]


def test_the_report_as_json(capfd, data):
    status, out, err = run(capfd, data, "--json", "--model", RANDOM_CHECKPOINT, "--limit", 4)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["total"], report["checked"], report["good"], report["bad"]) == (5, 4, 4, 0)
    assert report["unit"] == "tokens"
    assert set(report["lengths"]) == {"min", "median", "p95", "max", "sum"}
    assert report["longest"] == f"{data}:2"


def test_a_histogram_replaces_no_other_picture(capfd, data, tmp_path):
    picture = tmp_path / "mine.png"
    PIL.Image.new("RGB", (8, 8)).save(picture)
    status, _, err = run(capfd, data, "--histogram", picture)
    assert status == 2 and err.endswith(
        "found a file that is not a drawing of this command; expected none; choose another name\n"
    )
    assert PIL.Image.open(picture).size == (8, 8)


def test_a_histogram_is_drawn_unless_there_is_no_good_row(capfd, data, tmp_path):
    picture = tmp_path / "lengths.png"
    assert run(capfd, data, "--histogram", picture)[0] == 0
    with PIL.Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (960, 540))
    write(data, [])
    add(data, "{bad")
    status, _, err = run(capfd, data, "--histogram", tmp_path / "none.png")
    assert status == 1
    assert err == f"train: {tmp_path}/none.png: not drawn, because there is no good row\n"
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.jsonl"], "none.jsonl: found no such file or directory; expected one"),
        (["data.txt"], "data.txt: found the suffix '.txt'; expected .json, .jsonl, .ndjson, .csv"),
        ([], "DATA: found no file; expected at least one"),
        (["data.jsonl", "--model", "none"], "--model: found none"),
        (["data.jsonl", "--limit", "0"], "limit: found 0; expected at least 1"),
        (["data.jsonl", "--histogram", "none/a.png"], "none: found no such file or directory; expected one"),
    ],
)
def test_errors_are_one_line_with_exit_status_2(capfd, data, monkeypatch, arguments, says):
    monkeypatch.chdir(data.parent)
    (data.parent / "data.txt").write_text("a,b\n")
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"train: error: {says}")
    assert len(err.splitlines()) == 1


def test_files_share_a_format_and_a_media_directory(capfd, data):
    elsewhere = data.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(data, elsewhere / "again.jsonl")
    assert run(capfd, data, elsewhere)[0] == 1
    status, out, _ = run(capfd, data, elsewhere, "--media-dir", data.parent)
    assert status == 0
    assert out.splitlines()[0].split()[:3] == ["rows", "10:", "10"]
    assert run(capfd, data, "--format", "sharegpt")[0] == 1
    with pytest.raises(SystemExit) as error:
        run(capfd, data, "--format", "csv")
    assert error.value.code == 2


def test_percentiles_are_values_of_the_data():
    assert [percentile(range(1, 101), share) for share in (50, 95, 100)] == [50, 95, 100]
    assert percentile([7], 50) == 7


@pytest.mark.parametrize("values", [[0], [5, 5, 5], [1, 1000], list(range(500)), [3, 70_000]])
def test_bins_hold_every_value(values):
    width, counts = bins(values)
    assert counts.sum() == len(values)
    assert (len(counts) - 1) * width <= max(values) < len(counts) * width
    assert len(counts) <= 48
    assert str(width).rstrip("0") in ("1", "2", "5")
    for value in set(values):
        assert counts[value // width] > 0


def test_bars_are_as_high_as_their_counts():
    pixels = np.asarray(draw_histogram([10] * 4 + [90] * 2, "tokens", "x"))
    blue = (pixels == np.array([0x44, 0x77, 0xAA])).all(axis=2)
    columns = blue.sum(axis=0)
    left, right = columns[: len(columns) // 2].max(), columns[len(columns) // 2 :].max()
    assert left == pytest.approx(2 * right, abs=3)
    # The whole height of the axes, 540 - 64 - 64.
    assert left == pytest.approx(412, abs=2)
