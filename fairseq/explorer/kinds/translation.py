"""Explanations of translation with a memory (kNN-MT, SK-MT): beams, and what the memory did to the best one.

Shapes: S source tokens, T tokens of a translation, D key width, V vocabulary, K candidates.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.explorer.explanation import Explanation, top_words
from fairseq.explorer.export import content_of
from fairseq.explorer.live import Opened
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.rules import GIVEN, INTERPOLATION, JOINT, Rule, Setting
from fairseq.explorer.text_table import TableWriter
from fairseq.explorer.words import DictionaryWords
from fairseq.generation.next_token import NeighborMemory
from fairseq.generation.sentence_memory import SentenceMemory
from fairseq.generation.sequence_generator import Hypothesis, SequenceGenerator
from fairseq.generation.setup import open_memory, open_models
from fairseq.memory.combiners.vocab_mixing import FixedWeighting, JointWeighting, VocabularyMixer
from fairseq.memory.types import Array, Candidates

if TYPE_CHECKING:
    from fairseq.generation.config import GenerateConfig, GenerationConfig
    from fairseq.generation.lines import Wording
    from fairseq.generation.setup import StepMemorySettings
    from fairseq.runtime.config import RuntimeConfig
    from fairseq.tasks.translation import TranslationTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TranslationSettings:
    """What a translation is opened from; the configs are those of generate.py."""

    generate: GenerateConfig
    generation: GenerationConfig
    memory: StepMemorySettings
    runtime: RuntimeConfig
    overrides: dict[str, Any]
    num_sentences: int
    """Sentences of the split that are translated, from the first."""


@dataclass(frozen=True)
class _Scored:
    """A translation, read once more as it stands."""

    lm_logp_T: Tensor
    norm_T: Tensor
    mixed_T: Tensor
    hidden_TD: Tensor
    found: Candidates
    rows_TK: Tensor


def open_translation(settings: TranslationSettings, task: TranslationTask, wording: Wording) -> Opened:
    """Open models, memory and sentences; translation begins when the result is entered.

    Raises: ValueError or OSError when anything does not fit.
    """
    if not settings.memory.memory.knnmt:
        raise ValueError("no memory is named, so that nothing can be explored; give --knnmt --dstore-filename PREFIX")
    if settings.generate.score_reference or settings.generation.prefix_size:
        raise ValueError(
            "--score-reference and --prefix-size are generate.py's; leave them out: translations are shown"
        )
    if settings.generate.results_path:
        raise ValueError("--results-path is for generate.py; leave it out: --export FILE writes what is explored")
    models = open_models(settings.generate, task, settings.overrides, settings.runtime)
    memory = open_memory(settings.memory, settings.generate, task, models[0])
    assert memory is not None, "--knnmt was given"
    generation = dataclasses.replace(settings.generation, nbest=settings.generation.beam)
    generator = SequenceGenerator(models, task.dictionary, generation, memory)
    return _LiveTranslation(settings, task, wording, generator, memory).opened()


class _LiveTranslation:
    """Sentences that are translated one after the other."""

    def __init__(
        self,
        settings: TranslationSettings,
        task: TranslationTask,
        wording: Wording,
        generator: SequenceGenerator,
        memory: NeighborMemory | SentenceMemory,
    ) -> None:
        self.task, self.wording, self.generator, self.memory = task, wording, generator, memory
        self.model, self.lock = generator.models[0], threading.Lock()
        self.dataset = task.blocks(settings.generate.gen_subset, needs_target=False)
        fits = np.flatnonzero(self.dataset.fits(self.model.max_positions))
        self.numbers = fits[: settings.num_sentences].tolist()
        if not self.numbers:
            raise ValueError(
                f"--gen-subset {settings.generate.gen_subset}: no sentence is within the model's positions"
            )
        self.longest = int(min(self.model.max_positions, self.dataset.max_source_positions))
        self.k = settings.memory.knn.num_neighbors
        capacity = len(self.numbers) * (self.model.max_positions + 1)
        self.writer = TableWriter(capacity, self.k, more=["mixed"], length=0)
        self.beams: dict[int, list[Hypothesis]] = {}
        self.explanation = self._explanation(settings)

    def opened(self) -> Opened:
        """The explanation with what fills it."""
        return Opened(self.explanation, self._fill)

    def _explanation(self, settings: TranslationSettings) -> Explanation:
        knn, weighting = settings.memory.knn, self.memory.mixer.weighting
        rule, opening = Rule(GIVEN), Setting(self.k)
        if isinstance(weighting, FixedWeighting):
            rule = Rule(INTERPOLATION, only_where_found=True)
            opening = Setting(self.k, weighting.weight, weighting.temperature)
        elif isinstance(weighting, JointWeighting) and weighting.adds_up:
            rule = Rule(JOINT, weighting.dim)
            opening = Setting(self.k, None, None, weighting.temperature)
        store = self.memory.memory.store if isinstance(self.memory, NeighborMemory) else None
        metric = "l2"
        if isinstance(self.memory, NeighborMemory):
            metric = "ip" if self.memory.memory.score == "dot" else self.memory.memory.index.metric.value
        words = DictionaryWords(self.task.dictionary)
        return Explanation(
            kind="translation",
            title=f"{settings.generate.gen_subset}, translated",
            table=self.writer.table,
            neighbors=NeighborTexts(words, store, self._source_of(), has_rows=store is not None),
            rule=rule,
            opening=opening,
            metric=metric,
            unit="sentence",
            facts={
                "split": settings.generate.gen_subset,
                "model": settings.generate.paths[0],
                "datastore": str(knn.dstore_filename or f"{settings.memory.memory.sentence_pairs} pairs a sentence"),
            },
            position=self._position,
            reader=self,
        )

    def _source_of(self) -> Callable[[int], str] | None:
        """The source sentence of a pair of the store, whose documents are the pairs of a split."""
        if not isinstance(self.memory, NeighborMemory):
            return None
        store = self.memory.memory.store
        try:
            pairs = self.task.blocks(str(store.metadata.get("subset")), needs_target=False)
        except (ValueError, OSError) as error:
            logger.info("the pairs of the datastore are not at hand (%s): neighbours are shown without sources", error)
            return None
        if len(pairs) != store.metadata.get("num_documents"):
            return None
        return lambda document: self._source_text(pairs.source(document))

    def _source_text(self, tokens: Array) -> str:
        return self.wording.of_source(torch.from_numpy(np.array(tokens)))

    def _fill(self, check: Callable[[], None]) -> None:
        for number in self.numbers:
            source_S = torch.from_numpy(np.array(self.dataset.source(number), np.int64))
            hypotheses = self._translated(source_S)
            self.beams[number] = hypotheses
            scored = self._scored(source_S, hypotheses[0].tokens)
            self._append(self.writer, number, hypotheses[0].tokens, scored)
            check()

    @torch.inference_mode()
    def _translated(self, source_S: Tensor) -> list[Hypothesis]:
        """The beams of a sentence, the best first."""
        device = next(self.model.parameters()).device
        with self.lock:
            return self.generator.generate({"source_BS": source_S[None].to(device)}, [len(source_S)])[0]

    @torch.inference_mode()
    def _scored(self, source_S: Tensor, tokens_T: Tensor) -> _Scored:
        """Read a translation as it stands, with and without the memory."""
        device = next(self.model.parameters()).device
        source = {"source_BS": source_S[None].to(device)}
        tokens_T = tokens_T.to(device)
        inputs_BT = torch.cat([tokens_T.new_tensor([self.task.dictionary.eos()]), tokens_T[:-1]])[None]
        with self.lock:
            out = self.model(inputs_BT, key_tap=self.memory.key_tap, **source)
            assert out.key_BTD is not None, "a key was asked for"
            hidden_TD, key_TD = out.hidden_BTD[0], out.key_BTD[0]
            lm_logp_T, norm_T = self.model.target_logp(hidden_TD, tokens_T)
            mixer = _RecordingMixer(self.memory.mixer, tokens_T)
            self._mix(mixer, self.model.vocab_scores(hidden_TD), key_TD, source)
        found = mixer.found
        rows_TK = found.rows_NM if found.rows_NM is not None else torch.zeros_like(found.values_NM)
        lm_logp_T, norm_T, mixed_T, hidden_TD = (x.float().cpu() for x in (lm_logp_T, norm_T, mixer.logp_N, hidden_TD))
        return _Scored(lm_logp_T, norm_T, mixed_T, hidden_TD, found, rows_TK)

    def _mix(self, mixer: _RecordingMixer, scores_TV: Tensor, key_TD: Tensor, source: dict[str, Tensor]) -> None:
        """Let the memory mix its candidates in, by a mixer that keeps them."""
        if isinstance(self.memory, NeighborMemory):
            mixer.mix_(scores_TV, None, self.memory.find(key_TD))
            return
        stores = dataclasses.replace(self.memory.begin(source), mixer=mixer)  # type: ignore[arg-type]
        stores.mix_(scores_TV, key_TD, torch.zeros(len(key_TD), dtype=torch.int64))

    def _append(self, writer: TableWriter, number: int, tokens_T: Tensor, scored: _Scored) -> None:
        first = len(writer.table)
        places = first + np.arange(len(tokens_T))
        writer.write_candidates(places, scored.found, scored.rows_TK)
        columns = {"token": tokens_T.cpu().numpy(), "block": number, "document": number, "counted": True}
        columns |= {"norm": scored.norm_T.numpy(), "mixed": scored.mixed_T.numpy(), "lm": scored.lm_logp_T.numpy()}
        writer.write(places, **columns)
        writer.extend(len(tokens_T))

    def _position(self, at: int) -> dict[str, Any]:
        table = self.writer.table
        number = int(table.columns["block"][at])
        rows = table.block_rows(at)
        source_S = torch.from_numpy(np.array(self.dataset.source(number), np.int64))
        tokens_T = torch.from_numpy(np.array(table.columns["token"][rows]))
        content = self._shown(source_S, tokens_T, at - rows.start)
        return content | {"sentence": self._sentence(number, source_S, self.beams[number])}

    def _shown(self, source_S: Tensor, tokens_T: Tensor, place: int) -> dict[str, Any]:
        """Distributions at one token of a translation."""
        scored = self._scored(source_S, tokens_T)
        hidden_D = scored.hidden_TD[place].to(next(self.model.parameters()))
        keep_K = scored.found.keep_NM[place].cpu()
        also = np.append(scored.found.values_NM[place].cpu()[keep_K].numpy(), int(tokens_T[place]))
        with self.lock, torch.inference_mode():
            scores_V = self.model.vocab_scores(hidden_D[None]).float()
            lm = top_words(scores_V[0].log_softmax(0).cpu(), also)
            content = {"lm": lm}
            if self.explanation.rule.kind == GIVEN:
                self.memory.mixer.mix_(scores_V, None, scored.found.rows(slice(place, place + 1)))
                content["mixed"] = top_words(scores_V[0].cpu(), also)
        return content

    def _sentence(self, number: int, source_S: Tensor, beams: Sequence[Hypothesis]) -> dict[str, Any]:
        """A sentence and its beams as the schema has them."""
        texts = [self.wording.codec.decode(self.wording.of_hypothesis(beam.tokens.cpu())) for beam in beams]
        shown: dict[str, Any] = {
            "number": number,
            "source": self._source_text(source_S.numpy()),
            "beams": [{"score": beam.score, "text": text} for beam, text in zip(beams, texts)],
        }
        if number >= 0 and self.dataset.target_side is not None:
            shown["reference"] = self.wording.of_reference(torch.from_numpy(np.array(self.dataset.target(number))))
        if isinstance(self.memory, SentenceMemory):
            shown["pairs"] = self._pairs(source_S)
        return shown

    def _pairs(self, source_S: Tensor) -> list[dict[str, str]]:
        """The pairs that a sentence's own store is made of."""
        assert isinstance(self.memory, SentenceMemory)
        dataset = self.memory.dataset
        numbers = self.memory.similar.nearest(source_S.numpy(), self.memory.num_pairs)
        return [
            {
                "source": self._source_text(dataset.source(number)),
                "target": self.wording.of_reference(torch.from_numpy(np.array(dataset.target(number)))),
            }
            for number in map(int, numbers)
        ]

    # Of a Reader

    def encode(self, text: str) -> list[int]:
        """Tokens of a sentence to translate."""
        assert self.task.source is not None
        line = self.task.source.encode_line(self.wording.codec.encode(text), add_if_not_exist=False)
        return [int(token) for token in line]

    def read(self, tokens: list[int], *, only_next: bool) -> dict[str, Any]:
        """See ``Reader``: the tokens are a source, the explanation is of its translation; nothing comes next.

        Raises: ValueError for a sentence without words.
        """
        assert self.task.source is not None
        if len(tokens) < 2 or not all(0 <= token < len(self.task.source) for token in tokens):
            raise ValueError("there is no sentence to translate; type one in the language of the source")
        source_S = torch.tensor(tokens)
        beams = self._translated(source_S)
        content: dict[str, Any] = {"ids": tokens, "next": None}
        if only_next:
            return content
        tokens_T = beams[0].tokens.cpu()
        writer = TableWriter(len(tokens_T), self.k, more=["mixed"], length=0)
        self._append(writer, -1, tokens_T, self._scored(source_S, tokens_T))

        def position(at: int) -> dict[str, Any]:
            return self._shown(source_S, tokens_T, at) | {"sentence": self._sentence(-1, source_S, beams)}

        typed = dataclasses.replace(
            self.explanation, title="typed text", table=writer.table, notes=(), position=position, reader=None
        )
        return content | content_of(typed, slice(0, len(tokens_T)))


class _RecordingMixer:
    """A mixer that keeps the candidates it is given, and the log-probability of a token in each row."""

    def __init__(self, mixer: VocabularyMixer, target_N: Tensor) -> None:
        self._mixer, self._target_N = mixer, target_N
        nothing_N0 = torch.empty(len(target_N), 0)
        self.found = Candidates(nothing_N0.long(), nothing_N0, nothing_N0.bool())
        self.logp_N = torch.empty(0)

    def normalize_(self, scores_RV: Tensor) -> None:
        """Where there is nothing to mix in."""
        self._mixer.normalize_(scores_RV)
        self.logp_N = scores_RV.gather(1, self._target_N[:, None])[:, 0]

    def mix_(self, scores_RV: Tensor, rows_N: Tensor | None, found: Candidates) -> None:
        """See ``VocabularyMixer``."""
        self.found = found
        logp_N = self._mixer.mix_(scores_RV, rows_N, found, self._target_N)
        assert logp_N is not None, "targets were given"
        self.logp_N = logp_N
