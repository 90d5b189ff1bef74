"""Streams of text: whole characters, the same text for every split, and stop strings across any border."""

import random
from itertools import pairwise

import pytest
import tokenizers
from helpers_checkpoints import RANDOM_CHECKPOINT
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax.errors import CheckpointError, GenerationError, Glm4vError
from glm4v_jax.generate.text.stream import StopStrings, TextStream
from glm4v_jax.generate.text.thinking import TAGS
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

TEXT = "<think>naïve 猫 🐈‍⬛</think>\n<answer>日本語: <|begin_of_box|>½<|end_of_box|> “ok” 👩‍👩‍👧"


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture(scope="module")
def boxed_tokenizer():
    """One in which the box tags are special, as in later tokenizers, and an added token is not of the alphabet."""
    tokenizer = Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT)
    added = [tokenizers.AddedToken(tag, special=True) for tag in TAGS[-2:]]
    tokenizer.backend_tokenizer.add_tokens([*added, tokenizers.AddedToken("<a b é>", special=False)])
    return tokenizer


def _text(tokenizer, ids):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content not in TAGS}
    return tokenizer.decode([i for i in ids if i not in special], skip_special_tokens=False)


def _pieces(stream, ids, cuts):
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [stream.push(ids[start:end]) for start, end in pairwise(bounds)]
    return [*pieces, stream.finish()]


class TestTextStream:
    def test_every_single_split_of_a_text(self, tokenizer):
        ids = tokenizer.encode(TEXT)
        assert len(ids) > 40
        for cut in range(len(ids) + 1):
            assert "".join(_pieces(TextStream(tokenizer), ids, [cut])) == TEXT
        one_by_one = _pieces(TextStream(tokenizer), ids, range(len(ids)))
        assert "".join(one_by_one) == TEXT
        assert not any("\ufffd" in piece for piece in one_by_one)

    @given(data=st.data())
    def test_random_ids(self, boxed_tokenizer, data):
        size = len(boxed_tokenizer)
        # Ids of bytes more often than their share, so that half characters and broken ones abound; and ids of nothing.
        some_byte = st.integers(0, 255)
        ids = data.draw(st.lists(st.one_of(some_byte, some_byte, st.integers(0, size + 40)), max_size=60))
        cuts = data.draw(st.lists(st.integers(0, 60), max_size=10))
        stream = TextStream(boxed_tokenizer)
        pieces = _pieces(stream, ids, cuts)
        assert "".join(pieces) == _text(boxed_tokenizer, ids)

    def test_many_random_ids(self, boxed_tokenizer):
        draw = random.Random(0)
        for _ in range(100):
            ids = [draw.randrange(len(boxed_tokenizer) + 20) for _ in range(100)]
            cuts = [draw.randrange(100) for _ in range(draw.randrange(20))]
            assert "".join(_pieces(TextStream(boxed_tokenizer), ids, cuts)) == _text(boxed_tokenizer, ids)

    def test_every_pair_and_some_triples_of_bytes(self, tokenizer):
        byte_ids = [tokenizer.convert_tokens_to_ids(token) for token in sorted(_alphabet())]
        draw = random.Random(1)
        rows = [[one, other] for one in byte_ids for other in byte_ids[::5]]
        rows += [draw.choices(byte_ids, k=4) for _ in range(4000)]
        for ids in rows:
            assert "".join(_pieces(TextStream(tokenizer), ids, range(len(ids)))) == tokenizer.decode(ids)

    def test_special_tokens_are_hidden_and_tags_shown(self, boxed_tokenizer):
        text = "[gMASK]<sop><|assistant|>\n" + TEXT + "<a b é></answer><|endoftext|><|user|>"
        stream = TextStream(boxed_tokenizer)
        shown = stream.push(boxed_tokenizer.encode(text)) + stream.finish()
        assert shown == "\n" + TEXT + "<a b é></answer>"

    def test_a_character_is_shown_when_its_last_byte_comes(self, tokenizer):
        ids = tokenizer.encode("🐈")
        assert len(ids) > 1
        stream = TextStream(tokenizer)
        assert stream.push(ids[:-1]) == ""
        assert stream.push(ids[-1:]) == "🐈"
        assert stream.push(ids[:-1]) == ""
        assert stream.finish() == "\ufffd"

    def test_no_more_than_a_character_is_held_back(self, tokenizer):
        """A window method decodes a run of continuation bytes again and again."""
        broken = tokenizer.encode("🐈")[1]
        stream = TextStream(tokenizer)
        shown = "".join(stream.push([broken]) for _ in range(5_000))
        held, _ = stream._decoder.getstate()
        assert len(held) < 4 and shown + stream.finish() == "\ufffd" * 5_000

    def test_errors(self, tokenizer):
        with pytest.raises(Glm4vError, match="found -100; expected integers"):
            TextStream(tokenizer).push([-100])
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.decoder = tokenizers.decoders.Metaspace()
        with pytest.raises(CheckpointError, match="found the decoder Metaspace; expected ByteLevel"):
            TextStream(Glm4vTokenizer(backend))


def _alphabet():
    return tokenizers.pre_tokenizers.ByteLevel.alphabet()


def _stop(strings, text, cuts):
    stops = StopStrings(strings)
    shown, hit = "", None
    for start, end in pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        piece, hit = stops.push(text[start:end])
        shown += piece
    return (shown + stops.finish(), hit) if hit is None else (shown, hit)


def _expected_stop(strings, text):
    """The definition: the shortest beginning of the text that ends in a stop string, and the longest such string."""
    for end in range(len(text) + 1):
        hits = [string for string in strings if text[:end].endswith(string)]
        if hits:
            hit = max(hits, key=len)
            return text[: end - len(hit)], hit
    return text, None


class TestStopStrings:
    def test_holds_back_only_what_may_be_a_beginning(self):
        stops = StopStrings(["\nUser:", "STOP"])
        assert stops.push("Hello\n") == ("Hello", None)
        assert stops.push("Us") == ("", None)
        assert stops.push("ed S") == ("\nUsed ", None)
        assert stops.finish() == "S"

    def test_hit_across_pushes(self):
        stops = StopStrings("STOP")
        assert stops.push("a ST") == ("a ", None)
        assert stops.push("SSTO") == ("STS", None)
        assert stops.push("P b") == ("", "STOP")
        assert stops.push("more") == ("", "STOP")
        assert stops.finish() == ""

    @pytest.mark.parametrize(
        ("strings", "text", "expected"),
        [
            (["abc", "b"], "xabc", ("xa", "b")),  # complete first
            (["bc", "abc"], "xabc", ("x", "abc")),  # complete together: the longest
            (["aab"], "aaab", ("a", "aab")),
            (["ab", "ab"], "ab", ("", "ab")),
            ([], "text", ("text", None)),
        ],
    )
    def test_which_is_first(self, strings, text, expected):
        for cuts in ([], range(len(text))):
            assert _stop(strings, text, cuts) == expected

    @given(
        st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
        st.text("abc", max_size=30),
        st.lists(st.integers(0, 30), max_size=8),
    )
    def test_is_the_definition_for_every_split(self, strings, text, cuts):
        assert _stop(strings, text, cuts) == _stop(strings, text, range(len(text))) == _expected_stop(strings, text)

    @pytest.mark.parametrize("strings", ["", ["a", ""], [1]])
    def test_errors(self, strings):
        with pytest.raises(GenerationError, match="stop_strings: found"):
            StopStrings(strings)
