"""Tokenizers and word pieces, and the ways back."""

import json

import pytest

from fairseq.data.codecs import CodecConfig, TextCodec


def codec(**given):
    return TextCodec.of(CodecConfig(**given))


def test_without_names_text_stays_as_it_is():
    plain = codec()
    assert plain.encode("a  b") == "a  b"
    assert plain.decode("a  b") == "a  b"


def test_space_joins_blanks():
    assert codec(tokenizer="space").encode(" a \t b  c ") == "a b c"


def test_moses_splits_by_source_and_joins_by_target():
    moses = codec(tokenizer="moses", source_lang="de", target_lang="en")
    assert moses.encode('Er sagt: "ja & nein".') == "Er sagt : &quot; ja &amp; nein &quot; ."
    assert moses.decode("he says : &quot; yes &amp; no &quot; .") == 'he says: "yes & no".'
    bare = codec(tokenizer="moses", source_lang="de", moses_no_escape=True, moses_no_dash_splits=True)
    assert bare.encode("das U-Boot & wir") == "das U-Boot & wir"
    assert moses.encode("das U-Boot") == "das U @-@ Boot"


def test_pieces_of_subword_nmt(tmp_path):
    pytest.importorskip("subword_nmt")
    (tmp_path / "codes").write_text("#version: 0.2\nh a\nha u\ns </w>\n")
    pieces = codec(bpe="subword_nmt", bpe_codes=str(tmp_path / "codes"))
    encoded = pieces.encode("haus maus")
    assert encoded.split()[0] == "hau@@"
    assert pieces.decode(encoded) == "haus maus"


def test_pieces_of_gpt2_are_numbers(tmp_path):
    pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "b": 1, "ab": 2, "\u0120": 3, "\u0120ab": 4}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n\u0120 ab\n")
    names = {"gpt2_encoder_json": str(tmp_path / "encoder.json"), "gpt2_vocab_bpe": str(tmp_path / "vocab.bpe")}
    pieces = codec(bpe="gpt2", **names)
    assert pieces.encode("ab ab") == "2 4"
    assert pieces.decode("2 4") == "ab ab"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": "mose"}, "unknown --tokenizer 'mose' \\(did you mean 'moses'"),
        ({"bpe": "gpt3"}, "unknown --bpe 'gpt3'"),
        ({"bpe": "sentencepiece"}, "--bpe sentencepiece needs --sentencepiece-model FILE; give it"),
        ({"bpe": "fastbpe", "bpe_codes": "nothing"}, "--bpe-codes: no such file: nothing"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        codec(**given)
