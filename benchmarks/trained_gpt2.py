"""Small GPT-2s that are trained on a text for a while, so that their states lie as those of real models do."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT))

VOCABULARY = 8192
_TOKENS_PER_UPDATE = 2048


def fetch(name: str, folder: Path) -> Path:
    """The folder of a corpus's text or of a model, as get_data.sh makes it."""
    from fairseq_cli.data import get_data

    made = folder / f"{name}-data"
    if not made.exists():
        words = [name, str(made), "--download-dir", str(folder / "downloads")]
        get_data.main([*words, "--text-only", "--text-dir", str(made)] if name == "shakespeare" else words)
    return made


def encode(texts: Sequence[Path]) -> list[int]:
    """The tokens of texts by a byte-level BPE trained on them."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text) for text in texts], vocab_size=VOCABULARY, show_progress=False)
    return [number for text in texts for number in tokenizer.encode(text.read_text(encoding="utf-8")).ids]


def train(ids: Sequence[int], width: int, heads: int, positions: int, seconds: float) -> tuple[Any, str]:
    """A GPT-2 of 4 layers trained on tokens for so long, in evaluation mode, and the model in words."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": 4, "n_head": heads, "n_positions": positions, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).train()
    rate = 5e-4 * (1024 / width) ** 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    data, losses = torch.tensor(ids), []
    deadline = time.monotonic() + seconds
    while not losses or time.monotonic() < deadline:
        starts = torch.randint(0, len(data) - positions, (_TOKENS_PER_UPDATE // positions,)).tolist()
        ids_BT = torch.stack([data[start : start + positions] for start in starts])
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (len(losses) + 1) / 20)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    ending = sum(losses[-10:]) / len(losses[-10:])
    words = f"GPT-2 of 4 layers of width {width}, {len(losses)} updates of {_TOKENS_PER_UPDATE} tokens"
    return model.eval(), f"{words}, loss {ending:.2f}"
