"""kNN-LM in any transformers model: the nearest rows of a datastore mixed into what the model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq.config import in_python
from fairseq.hf.hooks.attachment import IGNORED, Attachment, ForwardCall, require_logits
from fairseq.hf.hooks.capture import Capture
from fairseq.hf.hooks.identity import model_type
from fairseq.hf.hooks.names import Dist, dist, key_type
from fairseq.hf.hooks.protocols import ModelOutput, Tokenizer
from fairseq.hf.hooks.seq2seq import shifted_labels
from fairseq.hf.hooks.taps import Tap
from fairseq.hf.knn.gradient import MixedScores, with_gradient
from fairseq.hf.knn.stores import MemorySettings, StorePlace, check_fits, open_memory, with_index
from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
from fairseq.memory.scoring import check_weight, interpolate
from fairseq.memory.sources.config import check_search_on
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Candidates

if TYPE_CHECKING:
    from fairseq.memory.retomaton.automaton import RetomatonStep

_ONE = (1, 1)  # sequences and positions
_QUERIES_AT_ONCE = 8192
"""Positions that are looked up together: their candidates take 13 bytes x k each."""

Record = Callable[[Tensor, "Candidates | RetomatonStep"], None]
"""Is given numbers of positions among those of a ``target_logp`` call, and what was found for them."""


class KNNWrapper(Attachment):
    """kNN-LM for a transformers model: mixes the k nearest rows of a datastore into every prediction.

    While it is attached, ``logits`` are log-probabilities: of the mixture where a position counts (its label is not
    -100; without labels, where the attention mask is not 0), of the model alone elsewhere. ``loss`` is the mixture's.
    Gradients flow into the language model; the neighbours' probabilities are constants. With ``lmbda`` 0 outputs are
    bit-identical to the model's own. ``generate`` works: greedy, sampling, beams.

    Source: arXiv 1911.00172, eq. 3.

    ```python
    with KNNWrapper(dstore_dir="gpt2-store", k=8, lmbda=0.25)(model):
        model.generate(ids_BT[:, :4], max_new_tokens=4, pad_token_id=0)
    ```
    """

    flattens_batches = False
    """The figures depend on how sequences are batched, as they do in an original program."""

    def __init__(
        self,
        dstore_size: int | None = None,
        dstore_dir: str | Path = ".",
        dimension: int | None = None,
        knn_sim_func: str | Enum | None = None,
        knn_keytype: str | Enum | None = None,
        no_load_keys: bool = False,
        move_dstore_to_mem: bool = False,
        knn_gpu: bool = True,
        recompute_dists: bool = False,
        k: int | None = None,
        lmbda: float = 0.25,
        knn_temp: float = 1.0,
        probe: int = 32,
        *,
        indexfile: str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        search_on: str | None = None,
        search_workers: int | None = None,
    ) -> None:
        """Args.

        dstore_size: rows of the store, checked if given; chooses among several in the folder.
        dstore_dir: folder of the store and its index, or the store's prefix. Without an index the search is exact.
        dimension: width of the keys, as ``dstore_size``.
        knn_sim_func: ``l2`` (default), or ``dot`` for the inner product with the full keys.
        knn_keytype: ``last_ffn_input`` (default), ``last_ffn_output`` or ``final_hidden``.
        no_load_keys: never read the full keys, which may then be missing.
        move_dstore_to_mem: read the store into RAM first.
        knn_gpu: candidates are mixed in on the model's device either way; the search runs where the index is.
        recompute_dists: compute distances from the full keys; the index's are those of its compressed keys.
        k: neighbours per position; by default 1024, or all rows of a smaller store.
        lmbda: their share of the probability, 0 to 1.
        knn_temp: divides their scores.
        probe: lists of the index that a search probes.
        indexfile: the index, if it has another name than the store's.
        tokenizer: the text's; a store saved with another one is then rejected.
        search_on: ``ray`` or ``ray://HOST:PORT`` searches by Ray actors; the neighbours are the same.
        search_workers: number of actors; by default one for each shard of the store or node of the cluster.
        Raises: ValueError when a number is impossible or settings exclude each other.
        """
        super().__init__(key_type(knn_keytype))
        similarity = dist(knn_sim_func)
        if no_load_keys and (recompute_dists or similarity is Dist.dot):
            what = "recompute_dists" if recompute_dists else "knn_sim_func='dot'"
            raise ValueError(f"{what} needs the full keys and no_load_keys forbids them; drop one")
        if probe < 1:
            raise ValueError(f"probe must be at least 1, got {probe}")
        for what, value in (("dstore_size", dstore_size), ("dimension", dimension)):
            if value is not None and value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}; drop it or correct it")
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_weight(lmbda, "lmbda")
        if not 0.0 < knn_temp < math.inf:
            raise ValueError(f"knn_temp {knn_temp} is not positive; 1 leaves the scores as they are")
        self.k, self.lmbda, self.knn_temp, self.knn_gpu = k, lmbda, knn_temp, knn_gpu
        self._mixer = VocabularyMixer(lmbda, knn_temp)
        self._place = dstore_dir, dstore_size, dimension, indexfile
        score = "dot" if similarity is Dist.dot else "recompute" if recompute_dists else None
        try:
            check_search_on(search_on, search_workers)
        except ValueError as error:
            raise ValueError(in_python(str(error))) from None
        self._settings = MemorySettings(
            k, probe, score, not no_load_keys, move_dstore_to_mem, search_on, search_workers
        )
        self._tokenizer = tokenizer
        self._memory: ExternalMemory | None = None
        self.record: Record | None = None

    @property
    def memory(self) -> ExternalMemory:
        """Store and index, open while this is attached to a model."""
        assert self._memory is not None, "not in a model"
        return self._memory

    def target_logp(
        self, key_ND: Tensor, lm_logp_N: Tensor, target_N: Tensor, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Log-probability of tokens by model and neighbours, (N,), float32 on the CPU.

        Collect the keys of many calls: a bulk is searched much faster than one position at a time.

        Args:
            key_ND: keys of the positions.
            lm_logp_N: the model's own log-probability of the tokens.
            target_N: the tokens.
            lengths_B: positions per sequence; ignored here.
        """
        key_ND, lm_logp_N, target_N = key_ND.cpu(), lm_logp_N.cpu(), target_N.cpu()
        found_N, memory_logp_N = self.memory.lookup_logp(key_ND, target_N, self.knn_temp, self.record)
        return torch.where(found_N, interpolate(lm_logp_N, memory_logp_N, self.lmbda), lm_logp_N)

    def _prepare(self, model: nn.Module, tap: Tap) -> None:
        folder, rows, dim, indexfile = self._place
        if dim is not None and dim != tap.dim:
            raise ValueError(f"the model's keys are of width {tap.dim}, dimension says {dim}; drop it")
        place = with_index(StorePlace.find(folder, model_type(model), rows, dim), indexfile)
        memory = open_memory(place, self._settings)
        if rows not in (None, len(memory.store)):
            raise ValueError(
                f"datastore {memory.store.prefix!r} has {len(memory.store)} rows, dstore_size is {rows}; drop it"
            )
        check_fits(memory.store, model, tap, self._tokenizer)
        # A forward that was replaced (trl, a user) may need the labels for a loss of its own.
        self._makes_own_loss = "forward" in vars(model)
        self._memory = memory

    def _end(self, *, failed: bool) -> None:
        self._memory = None

    def _is_idle(self) -> bool:
        return super()._is_idle() or self.lmbda == 0.0

    def _changed_call(self, named: dict[str, Any]) -> dict[str, Any]:
        """The call without labels: the model would copy all its logits to compute a loss that is not wanted."""
        labels = named.get("labels")
        if labels is None or self._makes_own_loss:
            return named
        if self.is_seq2seq and named.get("decoder_input_ids") is None and named.get("decoder_inputs_embeds") is None:
            ids = shifted_labels(self.model, labels)
            if ids is None:
                return named
            named["decoder_input_ids"] = ids
        named["labels"] = None
        return named

    def _see(self, call: ForwardCall, capture: Capture, output: ModelOutput) -> ModelOutput:
        own_BLV = require_logits(output, type(self).__name__)
        key_BTD = capture.take(len(own_BLV))
        if self._mix_step_(call, key_BTD, own_BLV):
            return output
        needs_grad = torch.is_grad_enabled() and own_BLV.requires_grad
        with torch.no_grad():
            logits_BLV = own_BLV.detach().clone() if needs_grad else own_BLV.detach().contiguous()
            mixed = self._mix(call, key_BTD, logits_BLV, output)
        logp_N = mixed.target_logp_N
        if needs_grad:
            logits_BLV, logp_N = with_gradient(own_BLV, mixed, self.lmbda)
        if logp_N is None:
            output.logits = logits_BLV
            return output
        count = call.named.get("num_items_in_batch")
        loss = -logp_N.sum() / (len(logp_N) if count is None else torch.as_tensor(count, device=logp_N.device))
        return type(output)(**(dict(output) | {"loss": loss, "logits": logits_BLV}))

    def _mix_step_(self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor) -> bool:
        """Mix into the scores of a step of generation, in place, without the operations that other calls need.

        Returns: False for other calls, and where it is not possible; the scores are then as they were.
        """
        if key_BTD.shape[:2] != _ONE or logits_BLV.shape[:2] != _ONE or logits_BLV.requires_grad:
            return False
        if call.named.get("labels") is not None or call.named.get("shift_labels") is not None:
            return False
        is_text_BT = call.is_text(1)
        if is_text_BT is not None and not is_text_BT:
            return False
        return self._mixer.mix_nearest_(logits_BLV[0], key_BTD[0], self.memory)

    def _mix(self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor, output: ModelOutput) -> MixedScores:
        """Turn logits into log-probabilities, in place.

        Positions are looked up in groups, so that there are never more than so many candidates.
        """
        scores_RV, key_RD, rows_N, target_R = self._flat(call, key_BTD, logits_BLV)
        if len(scores_RV) == 1 and rows_N is None and self._mixer.mix_nearest_(scores_RV, key_RD, self.memory):
            return MixedScores(logits_BLV, torch.ones(1, dtype=torch.bool))
        has_memory_R = torch.zeros(len(scores_RV), dtype=torch.bool, device=scores_RV.device)
        logp: list[Tensor] = []
        for part in _split(rows_N, len(scores_RV)):
            whole, some = (scores_RV[part], None) if isinstance(part, slice) else (scores_RV, part)
            target_N = None if target_R is None else target_R[part]
            found = self.memory.lookup(key_RD[part])
            mixed = self._mixer.mix_(whole, some, found, target_N)
            has_memory_R[part] = found.keep_NM.any(1)
            logp += [] if mixed is None else [mixed]
        if rows_N is not None:
            self._normalize_rest(scores_RV, rows_N)
        if target_R is None:
            return MixedScores(logits_BLV, has_memory_R)
        assert rows_N is not None
        logp_N = torch.cat(logp) if logp else torch.empty(0, device=scores_RV.device)
        return MixedScores(logits_BLV, has_memory_R, logp_N, rows_N, target_R[rows_N])

    def _flat(
        self, call: ForwardCall, key_BTD: Tensor, logits_BLV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Scores (R, V), keys (R, D), the rows that are looked up (None: all) and targets (R,), one position a row."""
        scores_RV = logits_BLV.view(-1, logits_BLV.shape[-1])
        num_scores = logits_BLV.shape[1]
        target_BT = call.target()
        target_R = None if target_BT is None else call.kept(target_BT, num_scores).reshape(-1).to(scores_RV.device)
        key_RD = call.kept(key_BTD, num_scores).reshape(len(scores_RV), -1)
        return scores_RV, key_RD, self._rows(call, key_BTD, target_R, num_scores), target_R

    def _normalize_rest(self, scores_RV: Tensor, rows_N: Tensor) -> None:
        """Turn the other rows into the model's own log-probabilities."""
        rest_R = torch.ones(len(scores_RV), dtype=torch.bool, device=scores_RV.device).index_fill_(0, rows_N, False)
        self._mixer.normalize_(scores_RV, rest_R.nonzero()[:, 0])

    def _rows(self, call: ForwardCall, key_BTD: Tensor, target_R: Tensor | None, num_scores: int) -> Tensor | None:
        """The rows of the flat logits that are looked up; None for all."""
        if target_R is not None:
            return (target_R != IGNORED).nonzero()[:, 0]
        is_text_BT = call.is_text(call.num_positions(num_scores))
        if is_text_BT is None:
            return None
        is_text_BL = call.kept(is_text_BT, num_scores)
        return None if bool(is_text_BL.all()) else is_text_BL.reshape(-1).nonzero()[:, 0].to(key_BTD.device)


def _split(rows_N: Tensor | None, count: int) -> Iterator[Tensor | slice]:
    """Groups of the rows, or of all; none for no rows, which there is nothing to search for."""
    if rows_N is not None:
        yield from torch.split(rows_N, _QUERIES_AT_ONCE) if len(rows_N) else ()
    else:
        yield from (slice(start, start + _QUERIES_AT_ONCE) for start in range(0, count, _QUERIES_AT_ONCE))
