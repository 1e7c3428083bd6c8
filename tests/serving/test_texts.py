"""Text piece by piece, and the strings that end it, against the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from fairseq.serving.texts import Codec, StopText, TextStream  # noqa: E402


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; 0 is special."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(token for token in ids if token or not skip_special_tokens).decode(errors="replace")


@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_the_pieces_are_the_text(before, text):
    stream = TextStream(Codec(Bytes()), list(before.encode()))
    pieces = [stream.add(token) for token in text.encode()]
    # NUL is this tokenizer's special token.
    assert "".join(pieces) + stream.end() == text.replace("\0", "")
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_what_is_no_character_at_the_end_is_sent_at_the_end():
    stream = TextStream(Codec(Bytes()), [])
    assert stream.add(0xE2) == ""
    assert stream.end() == "\ufffd"


@given(st.lists(st.text(alphabet="ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3)))
def test_the_text_ends_before_the_first_stop_string(pieces, stops):
    """And nothing of a stop string was sent before it was whole."""
    stop, sent, wanted = StopText(stops), "", None
    for count, piece in enumerate(pieces, 1):
        sent += stop.add(piece)
        whole = "".join(pieces[:count])
        places = [whole.find(each) for each in stops if each in whole]
        if places and wanted is None:
            wanted = whole[: min(places)]
        assert wanted is not None or not any(each in sent for each in stops)
    sent += stop.end()
    assert sent == ("".join(pieces) if wanted is None else wanted)
    assert stop.is_stopped == (wanted is not None)


BYTES = ["<|end|>", "a", "\u00c3", "\u00a9", "<0xE2>", "\u00c3\u00a9b", "\u4e16"]


def test_tokens_within_a_character_are_shown_as_their_bytes():
    """The bytes of byte-level BPE and of SentencePiece; whole characters are shown as they are."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(BYTES)}, unk_token="a"))
    made.decoder = decoders.ByteLevel()
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=made))
    assert [codec.show(number) for number in (1, 2, 3, 5)] == ["a", "bytes:\\xc3", "bytes:\\xa9", "\u00e9b"]
    assert b"".join(map(codec.bytes_of, (1, 2, 3, 1))).decode() == "a\u00e9a"
    made.decoder = decoders.ByteFallback()
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=made))
    assert [codec.show(4), codec.show(6)] == ["bytes:\\xe2", "\u4e16"]


def test_special_tokens_are_skipped():
    stream = TextStream(Codec(Bytes()), list(b"ab"))
    assert [stream.add(0), stream.add(ord("c"))] == ["", "c"]
