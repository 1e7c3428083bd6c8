"""Explanations of eval_lm.py and eval_lm-trime.py at work: the same model, text, memories and figures.

Shapes: N scored positions, D key width, T positions of an input.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.evaluation.loop import bulks
from fairseq.evaluation.memories import open_reader
from fairseq.evaluation.readers import CandidateReader
from fairseq.evaluation.run import set_determinism
from fairseq.evaluation.setup import open_evaluation
from fairseq.explorer.explanation import Explanation, top_words
from fairseq.explorer.kinds.retomaton import StepRecord, look_up_text
from fairseq.explorer.live import Opened
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.reading import Found, ModelRun, TypedReader, local_candidates
from fairseq.explorer.rules import INTERPOLATION, JOINT, Rule, Setting
from fairseq.explorer.text_table import TableWriter
from fairseq.explorer.words import DictionaryWords, words_of
from fairseq.memory.retomaton.reader import RetomatonReader
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.sources.local import LocalMemory
from fairseq.memory.types import Candidates, LogSums, Passage, ScoredPositions
from fairseq.metrics.perplexity import PerplexityReport
from fairseq.metrics.word_loss import joined
from fairseq.sequence_scorer import Inspection, SequenceScorer, passages

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.evaluation.config import EvaluationConfigs
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.types import Array, MemoryReader

_BULK = 1024
"""Positions that are searched at once unless --knn-bulk says otherwise: the first ones are to be seen soon."""
_SHOWN_LOCAL, _BEFORE_LOCAL = 8, 8


def check(configs: EvaluationConfigs) -> None:
    """Raise ValueError for what cannot be explored, before anything is loaded."""
    config = configs.evaluation
    outputs = {
        "--eval-file": config.eval_file,
        "--scores-file": config.scores_file,
        "--results-path": config.results_path,
        "--output-word-probs": config.output_word_probs,
        "--output-word-stats": config.output_word_stats,
        "--output-position-stats": config.output_position_stats,
        "--prove": configs.proof.prove,
    }
    for name, given in outputs.items():
        if given:
            raise ValueError(f"{name} is eval_lm.py's; leave it out: --export FILE writes what is explored")
    if configs.memory.save_knnlm_dstore:
        raise ValueError("--save-knnlm-dstore is eval_lm.py's; save the datastore first, then explore it")
    if configs.bulk.save_retrieval:
        raise ValueError("--save-retrieval is eval_lm.py's; its file is explored by: fairseq-explore saved FILE")
    if configs.trime is None and not configs.memory.knnlm:
        raise ValueError("no memory is named, so that nothing can be explored; give --knnlm --dstore-filename PREFIX")
    trime = configs.trime
    if trime is not None and not (trime.use_local or trime.use_long or trime.use_external):
        raise ValueError("no memory is named; give --use-local, --use-long with --mem-size, or --use-external")


def open_lm(configs: EvaluationConfigs) -> Opened:
    """Open everything; scoring begins when the result is entered.

    Raises: ValueError or OSError when anything does not fit.
    """
    check(configs)
    set_determinism(configs.runtime)
    in_order = configs.trime.use_long if configs.trime is not None else configs.retomaton.retomaton_carry
    evaluation = open_evaluation(configs, in_order=in_order)
    return _LiveText(configs, evaluation).opened()


class _LiveText:
    """An evaluation whose results are kept token by token."""

    def __init__(self, configs: EvaluationConfigs, evaluation: Evaluation) -> None:
        self.configs, self.evaluation = configs, evaluation
        self.scorer, reader = open_reader(configs, evaluation)
        assert reader is not None, "a memory was asked for"
        self.reader: MemoryReader = reader
        self.lock = threading.Lock()
        self.external = _external_of(reader)
        trime = configs.trime
        self.local = LocalMemory() if trime is not None and trime.use_local else None
        self.sources = [] if trime is None else ["local"] * trime.use_local + ["long"] * trime.use_long
        self.bulk = configs.bulk.knn_bulk if "knn_bulk" in configs.command.given else _BULK
        blocks = np.sort(np.concatenate(evaluation.batches))
        sizes = evaluation.dataset.sizes
        self.start_B = np.full(len(sizes), -1, np.int64)
        self.start_B[blocks] = np.cumsum(sizes[blocks]) - sizes[blocks]
        more = ["mixed", *(["searched", "pointers"] if isinstance(reader, RetomatonReader) else [])]
        self.writer = TableWriter(evaluation.num_scored_tokens, _width(self.reader), more=more, sources=self.sources)
        self._mark(blocks)
        self.explanation = self._explanation()

    def opened(self) -> Opened:
        """The explanation with what fills it."""
        return Opened(self.explanation, self._fill)

    def _mark(self, blocks: Array) -> None:
        """The text itself, which is shown before it is scored, with block and document of each token."""
        evaluation, columns = self.evaluation, self.writer.table.columns
        columns["token"][:] = np.concatenate([evaluation.dataset.dataset.target(block) for block in blocks.tolist()])
        columns["block"][:] = np.repeat(blocks, evaluation.dataset.sizes[blocks])
        stream = evaluation.dataset.dataset.blocks
        document_B = np.searchsorted(stream.document_starts(), stream.starts[blocks], side="right") - 1
        columns["document"][:] = np.repeat(document_B, evaluation.dataset.sizes[blocks])

    def _explanation(self) -> Explanation:
        configs, evaluation, knn, trime = self.configs, self.evaluation, self.configs.knn, self.configs.trime
        external, retomaton = self.external, isinstance(self.reader, RetomatonReader)
        k = None if retomaton or external is None else external.k
        rule, opening = Rule(INTERPOLATION), Setting(k, knn.weight, knn.temperature)
        if trime is not None:
            dim = evaluation.models[0].key_dim(evaluation.key_tap)
            rule = Rule(JOINT, dim, with_external=external is not None and trime.mode != "li")
            interpolates = external is not None and trime.interpolates
            own = (knn.weight, trime.interp_temp) if interpolates else (None, None)
            opening = Setting(k, own[0], own[1], joint_temperature=knn.temperature)
        words = DictionaryWords(evaluation.task.dictionary)
        metric = "l2" if external is None else "ip" if external.score == "dot" else external.index.metric.value
        explanation = Explanation(
            kind="trime" if trime is not None else "retomaton" if retomaton else "knn",
            title=f"{configs.evaluation.gen_subset} of {os.path.basename(os.path.abspath(evaluation.task.folders[0]))}",
            table=self.writer.table,
            neighbors=NeighborTexts(words, None if external is None else external.store),
            rule=rule,
            opening=opening,
            metric=metric,
            facts={
                "split": configs.evaluation.gen_subset,
                "model": str(configs.evaluation.path),
                "datastore": "" if external is None else external.store.prefix,
            },
            position=self._position,
        )
        if not _reads_more_than_text(evaluation):
            explanation.reader = self._typed_reader(explanation)
        return explanation

    def _typed_reader(self, base: Explanation) -> TypedReader:
        model, dictionary = self.evaluation.models[0], self.evaluation.task.dictionary

        def encode(text: str) -> list[int]:
            line = dictionary.encode_line(text, append_eos=False, add_if_not_exist=False)
            return [int(token) for token in line]

        return TypedReader(
            base,
            encode,
            self._run,
            None if self.external is None else self._look_up,
            longest=min(model.longest_input or model.max_positions, model.max_positions) - 1,
            num_types=len(dictionary),
            local=None if self.local is None else self._look_up_local,
        )

    # Scoring

    def _fill(self, check: Callable[[], None]) -> None:
        """Score the whole text, as ``evaluate`` does, and keep everything."""
        report = PerplexityReport(self.evaluation.task.dictionary, self.configs.evaluation.remove_bpe)
        memory = self.scorer.text_memory
        if memory is not None:
            self.scorer.text_memory = dataclasses.replace(memory, record=self._keep_sums)
        scorer = _Polite(self.scorer, self.lock)
        for scored in bulks(scorer, self._batches(check), self.bulk, needs_keys=self.reader.needs_keys):
            with self.lock, torch.inference_mode():
                self._keep(scored, report)
            check()

    def _batches(self, check: Callable[[], None]) -> Iterator[LMBatch]:
        for batch in self.evaluation.iterator():
            check()
            yield batch

    def _keep_sums(self, passage: Passage, sums: list[LogSums]) -> None:
        for name, each in zip(self.sources, sums):
            rows = self.start_B[passage.number] + np.arange(len(each.hit_N))
            self.writer.write(rows, **{f"hit__{name}": each.hit_N.cpu(), f"whole__{name}": each.whole_N.cpu()})

    def _keep(self, scored: ScoredPositions, report: PerplexityReport) -> None:
        block_N, target_N = scored.block_N.numpy(), scored.target_N.cpu().numpy()
        begins_N = np.r_[True, block_N[1:] != block_N[:-1]]
        first_N = np.maximum.accumulate(np.where(begins_N, np.arange(len(block_N)), 0))
        places_N = self.start_B[block_N] + np.arange(len(block_N)) - first_N
        reader = self.reader
        if isinstance(reader, RetomatonReader):
            reader.record_step = StepRecord(self.writer, places_N)
        elif isinstance(reader, CandidateReader) and reader.source is not None:
            reader = reader.with_record(lambda _, found: self.writer.write_candidates(places_N, found))
        mixed_N = reader.logp(scored).float().cpu().numpy()
        counted_N = ~joined(block_N, report.continues[target_N])
        columns = {"norm": scored.norm_N.cpu().numpy(), "lm": scored.logp_N.float().cpu().numpy(), "mixed": mixed_N}
        self.writer.write(places_N, token=target_N, counted=counted_N, **columns)

    # One token

    @torch.inference_mode()
    def _position(self, at: int) -> dict[str, Any]:
        """The model's distribution at a scored token, and where the local memory looked."""
        table, scorer = self.writer.table, self.scorer
        block = int(table.columns["block"][at])
        batch = _batch_of(self.evaluation, np.array([block]))
        also = [int(table.columns["token"][at])]
        arrays = table.candidates(slice(at, at + 1))
        if arrays is not None:
            also += arrays.values_nK[0][np.isfinite(arrays.scores_nK[0])].tolist()
        content: dict[str, Any] = {}
        with self.lock:
            here = batch.to(scorer.device)
            place = scorer.places(batch)[at - self.start_B[block]]
            tap = self.evaluation.key_tap if self.local is not None else None
            seen = Inspection()
            for model in scorer.models:
                out = model(here.tokens_BT, key_tap=tap, **here.source)
                seen.hidden.append((model, out.hidden_BTD.flatten(0, 1)[place][None]))
            self._see_decoder(seen, here.tokens_BT, place[None])
            logp_V = scorer.vocab_logp(seen, 0).cpu()
            if tap is not None and out.key_BTD is not None:
                (passage,) = passages(batch, here, out.key_BTD)
                found = LocalMemory().lookup(passage)
                row = at - int(self.start_B[block])
                content["local_candidates"] = local_candidates(found, row)
                content["local"] = self._shown_local(passage, found, row, int(table.columns["token"][at]))
                also += found.values_NM[0].tolist()
        return content | {"lm": top_words(logp_V, np.array(also, np.int64))}

    def _shown_local(self, passage: Passage, found: Candidates, row: int, target: int) -> list[dict[str, Any]]:
        """The places of the input that the local memory weighed most."""
        temperature = self.configs.knn.temperature
        scores_T = (found.scores_NM[row].float() / temperature).masked_fill(~found.keep_NM[row], -torch.inf)
        if not bool(found.keep_NM[row].any()):
            return []
        best = scores_T.softmax(0).topk(min(_SHOWN_LOCAL, int(found.keep_NM[row].sum())))
        words, value_T = self.explanation.neighbors.words, passage.value_T.cpu().numpy()
        shown = []
        for weight, place in zip(best.values.tolist(), best.indices.tolist()):
            before = value_T[max(0, place - _BEFORE_LOCAL) : place]
            shown.append(
                {
                    "text": words.word(int(value_T[place])),
                    "before": words_of(words, before),
                    "weight": weight,
                    "back": passage.num_context + row - place,
                    "agrees": int(value_T[place]) == target,
                }
            )
        return shown

    # Typed text

    @torch.inference_mode()
    def _run(self, tokens: list[int]) -> ModelRun:
        model, dictionary = self.evaluation.models[0], self.evaluation.task.dictionary
        device = self.scorer.device
        inputs = torch.tensor([[dictionary.eos(), *tokens]], device=device)
        with self.lock:
            out = model(inputs, key_tap=self.evaluation.key_tap)
            seen = Inspection([(model, out.hidden_BTD[0])])
            self._see_decoder(seen, inputs, torch.arange(inputs.shape[1], device=device))
            targets = torch.tensor([*tokens, dictionary.eos()], device=device)
            norm_N = model.target_logp(out.hidden_BTD[0], targets)[1]
        assert out.key_BTD is not None

        @torch.inference_mode()
        def logp_at(position: int) -> Tensor:
            with self.lock:
                return self.scorer.vocab_logp(seen, position).cpu()

        lm_logp_T = torch.tensor([float(logp_at(position)[token]) for position, token in enumerate(tokens)])
        return ModelRun(lm_logp_T, norm_N.float().cpu(), out.key_BTD[0], logp_at)

    def _see_decoder(self, seen: Inspection, tokens_BT: Tensor, place_N: Tensor) -> None:
        """Add the states of --memory-decoder at some places, if there is one."""
        decoder = self.scorer.decoder
        if decoder is not None:
            seen.hidden.append((decoder.model, decoder.model(tokens_BT).hidden_BTD.flatten(0, 1)[place_N]))

    def _look_up(self, key_ND: Tensor, next_N: Tensor) -> Found:
        assert self.external is not None
        with self.lock, torch.inference_mode():
            if isinstance(self.reader, RetomatonReader):
                return look_up_text(self.reader.memory, key_ND, next_N)
            found = self.external.lookup(key_ND)
        assert found.rows_NM is not None
        return Found(found, found.rows_NM)

    def _look_up_local(self, key_ND: Tensor, next_N: Tensor) -> Candidates:
        return LocalMemory().lookup(Passage(0, key_ND, next_N.to(key_ND.device), 0))


class _Polite:
    """A scorer that leaves the model to others between two batches."""

    def __init__(self, scorer: SequenceScorer, lock: threading.Lock) -> None:
        self._scorer, self._lock = scorer, lock

    def score(self, batch: LMBatch) -> ScoredPositions:
        """See ``Scorer``."""
        with self._lock:
            return self._scorer.score(batch)


def _external_of(reader: MemoryReader) -> ExternalMemory | None:
    if isinstance(reader, RetomatonReader):
        return reader.memory.external
    source = getattr(reader, "source", None)
    return source if isinstance(source, ExternalMemory) else None


def _width(reader: MemoryReader) -> int:
    """Candidates of a token at most."""
    external = _external_of(reader)
    if external is None:
        return 0
    return external.k + reader.memory.max_knns if isinstance(reader, RetomatonReader) else external.k


def _reads_more_than_text(evaluation: Evaluation) -> bool:
    """True for a model that reads neighbours or a source besides its own text, and for an ensemble."""
    return bool(_batch_of(evaluation, evaluation.batches[0][:1]).source) or len(evaluation.models) > 1


def _batch_of(evaluation: Evaluation, blocks: Array) -> LMBatch:
    """A batch as the task makes it: of a GNN-LM with its neighbours."""
    batch: LMBatch = next(iter(evaluation.task.iterator(evaluation.dataset, [blocks])))
    return batch
