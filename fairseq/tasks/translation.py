"""Translation: from a folder of two languages to batches of sentence pairs."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fairseq.checkpoint_utils import vocabulary_size
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.language_pair_dataset import LanguagePairDataset, Sentences, Side
from fairseq.tasks.configs import TranslationConfig
from fairseq.tasks.data_folder import DataFolderTask

if TYPE_CHECKING:
    from fairseq.checkpoint_utils import Checkpoint
    from fairseq.models.transformer_lm import TransformerLanguageModel
    from fairseq.runtime.config import RuntimeConfig

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<split>.+)\.(?P<pair>[^.]+-[^.]+)\.(?P<lang>[^.]+)\.idx")


class TranslationTask(DataFolderTask):
    """A data folder of two languages and their dictionaries."""

    config: TranslationConfig
    way_out = "raise --max-source-positions and --max-target-positions"

    def __init__(self, config: TranslationConfig) -> None:
        """Read the dictionaries.

        Raises: ValueError or FileNotFoundError when the data folder is not one of these languages.
        """
        super().__init__(config)
        self.source_lang, self.target_lang = self._languages()
        # A checkpoint keeps the config: it then says which direction its model translates.
        self.config = dataclasses.replace(config, source_lang=self.source_lang, target_lang=self.target_lang)
        self.source: Dictionary = self._dictionary(self.source_lang)
        self.dictionary = self._dictionary(self.target_lang)
        if self.source.pad() != self.dictionary.pad():
            raise ValueError("source and target dictionary have padding at different places; run preprocess.py again")
        for lang, dictionary in ((self.source_lang, self.source), (self.target_lang, self.dictionary)):
            logger.info("[%s] dictionary: %d types", lang, len(dictionary))

    def _languages(self) -> tuple[str, str]:
        """Source and target: as asked for, or those of the folder's files."""
        pairs = _pairs_in(self.folders[0])
        source, target = self.config.source_lang, self.config.target_lang
        if source and target:
            wanted = [f"{source}-{target}", f"{target}-{source}"]
            if pairs and not any(pair in pairs for pair in wanted):
                raise ValueError(
                    f"--source-lang {source} --target-lang {target}: {self.folders[0]!r} holds {', '.join(pairs)}; "
                    "name languages of it"
                )
            return source, target
        fitting = [pair for pair in pairs if (source or target) in (None, *pair.split("-"))]
        if len(fitting) != 1:
            raise ValueError(
                f"{self.folders[0]!r} holds {', '.join(pairs) or 'no text of two languages'}; "
                + ("give --source-lang and --target-lang" if pairs else "preprocess.py makes such a folder")
            )
        first, _, second = fitting[0].partition("-")
        turned = source == second or target == first
        return (second, first) if turned else (first, second)

    def _dictionary(self, lang: str) -> Dictionary:
        path = self._dictionary_path(lang)
        if not os.path.exists(path):
            raise ValueError(f"{self.folders[0]!r} holds no dict.{lang}.txt; preprocess.py writes it")
        return Dictionary.load(path)

    @property
    def src_dict(self) -> Dictionary:
        """Dictionary of the source, by fairseq's name."""
        return self.source

    @property
    def tgt_dict(self) -> Dictionary:
        """Dictionary of the target, by fairseq's name."""
        return self.dictionary

    def _dictionary_path(self, lang: str) -> str:
        return os.path.join(self.folders[0], f"dict.{lang}.txt")

    @property
    def dictionary_path(self) -> str:
        """See the base class."""
        return self._dictionary_path(self.target_lang)

    @property
    def max_positions(self) -> int:
        """Longest target sentence, in tokens."""
        return self.config.max_target_positions

    def model_limits(self) -> dict[str, int]:
        """See the base class."""
        limits = {"max_source_positions": self.config.max_source_positions}
        return super().model_limits() | limits

    def for_models(self, dataset: Any, models: Sequence[TransformerLanguageModel]) -> Any:
        """The same pairs, of which those fit whose source all models read."""
        longest = min(getattr(model.config, "max_source_positions", sys.maxsize) for model in models)
        return dataset.with_source_limit(longest) if isinstance(dataset, LanguagePairDataset) else dataset

    def load_model(
        self, checkpoint: Checkpoint, path: str, overrides: Mapping[str, Any] | None, runtime: RuntimeConfig
    ) -> TransformerLanguageModel:
        """See the base class. Raises: ValueError too for a model of the other direction."""
        self._require_direction(checkpoint, path)
        return super().load_model(checkpoint, path, overrides, runtime)

    def _require_direction(self, checkpoint: Checkpoint, path: str) -> None:
        """Raise ValueError for a model that translates the other way round; a warning where its dictionaries fit."""
        trained, source, target = checkpoint.config.get("task", {}), self.source_lang, self.target_lang
        names = ("source_dictionary_digest", "dictionary_digest")
        saved, own = [trained.get(name) for name in names], [self.source.digest(), self.dictionary.digest()]
        turned = (trained.get("source_lang"), trained.get("target_lang")) == (target, source)
        if not turned and (own[0] == own[1] or saved != own[::-1]):
            return
        sizes = [vocabulary_size(checkpoint.model, side) for side in ("encoder", "decoder")]
        text = (
            f"{path} translates {target}-{source}, {source}-{target} is asked for; give --source-lang {target} "
            f"--target-lang {source}, or a model of {source}-{target}"
        )
        if sizes != [len(self.source), len(self.dictionary)] or any(a not in (None, b) for a, b in zip(saved, own)):
            raise ValueError(text)
        logger.warning("%s (the dictionaries fit, as they are the same for both languages)", text)

    def has_split(self, split: str) -> bool:
        """See the base class."""
        return any(os.path.exists(f"{path}.idx") for path in self._sources_of(split, self.folders[0]))

    def _sources_of(self, split: str, folder: str) -> list[str]:
        """Places where the source of a split may be: folders are made for either direction."""
        source, target = self.source_lang, self.target_lang
        return [
            os.path.join(folder, f"{split}.{pair}.{source}") for pair in (f"{source}-{target}", f"{target}-{source}")
        ]

    def prefixes(self, split: str, epoch: int = 1) -> list[str]:
        """Paths of a split's source and, where there is one, target, without ``.bin``.

        Raises: ValueError naming the splits that exist when this one does not.
        """
        folder = self.folders[(epoch - 1) % len(self.folders)]
        for source in self._sources_of(split, folder):
            target = f"{source[: -len(self.source_lang)]}{self.target_lang}"
            if os.path.exists(f"{source}.idx"):
                return [source, target] if os.path.exists(f"{target}.idx") else [source]
        here = sorted({hit["split"] for name in os.listdir(folder) if (hit := _NAME.fullmatch(name))})
        raise ValueError(
            f"no split {split!r} of {self.source_lang}-{self.target_lang} in {folder!r}, which holds: "
            f"{', '.join(here) or 'no text of two languages'}"
        )

    def blocks(
        self, split: str, epoch: int = 1, *, combine: bool = False, needs_target: bool = True
    ) -> LanguagePairDataset:
        """The sentence pairs of a split.

        Args:
            combine: the splits numbered after it (``split1``, ...) follow.
            needs_target: False if sources alone will do.
        Raises: ValueError when there is no text, its sides do not fit, or it holds tokens a dictionary has not.
        """
        parts = [
            self.prefixes(split, epoch),
            *(self.prefixes(s) for s in (self.numbered_after(split) if combine else ())),
        ]
        if needs_target and any(len(part) == 1 for part in parts):
            raise ValueError(f"split {split!r} has no {self.target_lang} side: {parts[0][0]} stands alone")
        limit = self.config.max_source_positions if self.config.truncate_source else None
        sides = [
            self._side([part[number] for part in parts], lang, dictionary, None if number else limit)
            for number, (lang, dictionary) in enumerate(
                [(self.source_lang, self.source), (self.target_lang, self.dictionary)][: min(map(len, parts))]
            )
        ]
        for part, *texts in zip(parts, *(side.sentences.texts for side in sides)):
            if len({len(text) for text in texts}) > 1:
                source, target = map(len, texts)
                raise ValueError(
                    f"{part[0]} has {source} sentences, {part[1]} has {target}; they must be translations of each "
                    "other, line by line: run preprocess.py on both again"
                )
        dataset = LanguagePairDataset(
            sides[0],
            sides[1] if len(sides) > 1 else None,
            left_pad_source=self.config.left_pad_source,
            max_source_positions=self.config.max_source_positions,
        )
        if not len(dataset):
            raise ValueError(f"split {split!r} is empty: {parts[0][0]}.bin holds no sentence; name another split")
        logger.info(
            "%s %s %s-%s %d examples", self.config.data, split, self.source_lang, self.target_lang, len(dataset)
        )
        return dataset

    def _side(self, paths: list[str], lang: str, dictionary: Dictionary, longest: int | None) -> Side:
        texts = [MMapIndexedDataset(path) for path in paths]
        sentences = Sentences(texts, longest)
        name = self._dictionary_path(lang)
        self.require_known_tokens(sentences.largest_token, paths[0], name, len(dictionary))
        return Side(sentences, dictionary.pad(), dictionary.eos())

    def read_split(self, split: str, epoch: int, combine: bool) -> LanguagePairDataset:
        """See the base class."""
        return self.blocks(split, epoch, combine=combine)


def _pairs_in(folder: str) -> list[str]:
    """Language pairs of the binarised text in a folder."""
    return sorted({hit["pair"] for name in os.listdir(folder) if (hit := _NAME.fullmatch(name))})
