"""What every client is given: a tiny random model with its tokenizer, a memory for it, and what it must give with that.

The mixture of kNN-LM is computed here by brute force, from the paper's formula and hooks of its own. RetoMaton and
Extended Mind are compared with the same model called directly, one sequence at a time.

Shapes: T positions, N rows of the datastore, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.hf import KNNSaver, KNNWrapper, RetomatonWrapper, extended_mind

KINDS = ("knn", "retomaton", "extended_mind")
SETTINGS: dict[str, Any] = {"k": 6, "lmbda": 0.4, "knn_temp": 2.0}
VOCABULARY = 64
_FIRST = 4
"""The tokens before it are special: padding, beginning, end, unknown."""


@dataclass(frozen=True)
class Check:
    """One number that a client gave, against what it must be."""

    what: str
    difference: float
    """Largest absolute difference."""
    allowed: float = 1e-4

    @property
    def passes(self) -> bool:
        """True if the client gave what it must; a difference that is no number is one that is too large."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Refusal:
    """A call that a wrapper must reject, and how it did."""

    what: str
    message: str
    """The error's text; empty if there was none."""
    wanted: str
    """A part of it."""

    @property
    def passes(self) -> bool:
        """True if the call was rejected for the right reason."""
        return self.wanted in self.message


def tiny_model(seed: int = 0) -> Any:
    """A random Llama of two layers, whose weights are large enough for a memory to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # so that every generation is as long as it is asked to be
    model.generation_config.pad_token_id = 0
    return model


def tiny_tokenizer() -> Any:
    """A tokenizer whose words are w4 to w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{number}" for number in range(_FIRST, VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_ids(*shape: int, seed: int) -> Tensor:
    """Tokens that are words."""
    return torch.randint(_FIRST, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def words_of(ids: Sequence[int] | Tensor) -> str:
    """The text of some tokens."""
    return " ".join(f"w{int(number)}" for number in ids)


STORED_BT = random_ids(6, 16, seed=10)
"""The text of the datastore, six sequences."""
MEMORY = random_ids(40, seed=11).tolist()
"""The text of the external memory."""


def save_store(model: Any, folder: Path) -> None:
    """Save the datastore of a model in a folder, and beside it the same keys by a hook of this file."""
    with torch.no_grad(), KNNSaver(dstore_dir=folder, dtype="float32")(model):
        model(input_ids=STORED_BT, labels=STORED_BT)
    with torch.no_grad():
        torch.save(torch.cat([key_and_logits(model, row_T)[0][:-1] for row_T in STORED_BT]), folder / "keys.pt")


@contextlib.contextmanager
def with_memory(kind: str, model: Any, folder: Path, **more: Any) -> Iterator[Any]:
    """While the block runs, a model has the memory of a kind."""
    if kind == "extended_mind":
        with extended_mind(model, MEMORY, topk=4, **more) as mind:
            yield mind
        return
    wrapper = {"knn": KNNWrapper, "retomaton": RetomatonWrapper}[kind]
    with wrapper(dstore_dir=folder, **SETTINGS, **more)(model) as knn:
        yield knn


def key_and_logits(model: Any, ids_T: Tensor, call: Any = None) -> tuple[Tensor, Tensor]:
    """The input of the last feed-forward block, (T, D), and the logits, (T, V), of a model without a memory.

    Args:
        call: what is called, where that is not the model but something around it.
    """
    held: list[Tensor] = []
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    handle = norm.register_forward_hook(lambda *given: held.append(given[2]))
    logits_TV = (call or model)(input_ids=ids_T[None], use_cache=False).logits[0]
    handle.remove()
    return held[0][0], logits_TV


def mixture(model: Any, folder: Path, ids_T: Tensor, call: Any = None) -> Tensor:
    """Log-probabilities of kNN-LM by brute force, (T, V), with a gradient where one is recorded.

    Source: arXiv 1911.00172, eq. 3; the neighbours' probabilities are constants.
    """
    keys_ND = torch.load(folder / "keys.pt", weights_only=True)
    query_TD, logits_TV = key_and_logits(model, ids_T, call)
    nearest = torch.cdist(query_TD.detach().double(), keys_ND.double()).square().topk(SETTINGS["k"], largest=False)
    share_TK = (-nearest.values / SETTINGS["knn_temp"]).softmax(1).float()
    token_TK = STORED_BT[:, 1:].flatten()[nearest.indices]
    memory_TV = torch.zeros(len(query_TD), VOCABULARY).scatter_add_(1, token_TK, share_TK)
    return ((1 - SETTINGS["lmbda"]) * logits_TV.softmax(-1) + SETTINGS["lmbda"] * memory_TV).log()


def expected(kind: str, model: Any, folder: Path, ids_T: Tensor) -> Tensor:
    """Log-probabilities of the next tokens that a model with the memory must give, (T, V)."""
    if kind == "knn":
        return mixture(model, folder, ids_T)
    with with_memory(kind, model, folder):
        return model(input_ids=ids_T[None], use_cache=False).logits[0].log_softmax(-1)


def expected_text(kind: str, model: Any, folder: Path, ids_T: Tensor, count: int) -> list[int]:
    """The likeliest continuation: of the whole text at every step, or by ``generate`` for RetoMaton.

    RetoMaton begins with a search at the end of a prompt of which only the last position is scored, and has a state.
    """
    with torch.no_grad():
        if kind == "retomaton":
            with with_memory(kind, model, folder):
                whole_1T = model.generate(ids_T[None], max_new_tokens=count, do_sample=False)
            return whole_1T[0, len(ids_T) :].tolist()  # type: ignore[no-any-return]
        for _ in range(count):
            ids_T = torch.cat([ids_T, expected(kind, model, folder, ids_T)[-1:].argmax(-1)])
    return ids_T[-count:].tolist()


def target_logp(logp_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Log-probabilities of the tokens of a text but the first, (T - 1,)."""
    return logp_TV[:-1].gather(1, ids_T[1:, None])[:, 0]


def difference(found: Any, wanted: Any) -> float:
    """Largest absolute difference of two arrays of the same shape."""
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max())


def refusal(what: str, wanted: str, call: Any) -> Refusal:
    """Make a call that must be rejected."""
    try:
        call()
    except ValueError as error:
        return Refusal(what, str(error), wanted)
    return Refusal(what, "", wanted)
