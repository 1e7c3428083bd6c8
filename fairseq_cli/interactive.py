"""Translate, or continue, lines as they are typed or piped in."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from fairseq.config import LARGEST_COUNT, build, flag, require_within
from fairseq.runtime.manifest import Command
from fairseq.tasks import TASKS
from fairseq_cli.entry import run
from fairseq_cli.generate import GenerateConfigs, begin_memory, configs_of, open_wording, parsed

if TYPE_CHECKING:
    from fairseq.generation.lines import Wording
    from fairseq.generation.sequence_generator import Hypothesis, SequenceGenerator

logger = logging.getLogger(__name__)

PROGRAM = "interactive.py"


@dataclass(frozen=True, kw_only=True)
class InteractiveConfig:
    """Options of the lines that are read."""

    input: str = flag("--input", default="-")
    """File to read; - for standard input."""
    buffer_size: int = flag("--buffer-size", default=1)
    """Lines that are read before they are translated together; larger is faster."""

    def __post_init__(self) -> None:
        require_within(1, LARGEST_COUNT, buffer_size=self.buffer_size)


def main(argv: Sequence[str]) -> None:
    """Print fairseq's lines for every line that is read."""
    given, task = parsed(argv, PROGRAM, (InteractiveConfig,))
    configs = configs_of(Command(PROGRAM, tuple(argv), given), given, task)
    config = build(InteractiveConfig, given)
    if configs.generate.score_reference or configs.generation.prefix_size:
        raise ValueError(
            "--score-reference and --prefix-size need references, which typed lines have not; leave them out"
        )
    if configs.generate.results_path:
        logger.warning("--results-path %s: lines are printed, nothing is kept there", configs.generate.results_path)
    begin_memory(configs.memory)
    session = _Session(configs)
    with _opened(config.input) as lines:
        if config.input == "-" and sys.stdin.isatty():
            logger.info("NOTE: hypothesis and token scores are output in base 2")
            logger.info("Type the input sentence and press return:")
        session.run(lines, config.buffer_size)


class _Session:
    """Models that wait for lines."""

    def __init__(self, configs: GenerateConfigs) -> None:
        from fairseq.generation.setup import open_generator, open_models

        self.configs = configs
        self.task: Any = TASKS[configs.task_name].load()(configs.task)
        self.wording: Wording = open_wording(configs, self.task)
        models = open_models(configs.generate, self.task, configs.overrides, configs.runtime)
        longest = [getattr(model.config, "max_source_positions", model.max_positions) for model in models]
        self.longest = min(*longest, getattr(configs.task, "max_source_positions", longest[0]))
        self.generator: SequenceGenerator = open_generator(
            configs.generation, configs.memory, configs.generate, self.task, models
        )

    def run(self, lines: TextIO, buffer_size: int) -> None:
        """Translate until the lines end, ``buffer_size`` at a time."""
        first = 0
        while group := list(itertools.islice(lines, buffer_size)):
            self._translate([line.rstrip("\n") for line in group], first)
            first += len(group)
            sys.stdout.flush()

    def _translate(self, lines: Sequence[str], first: int) -> None:
        from fairseq.generation.lines import Output

        dictionary = self.wording.source or self.wording.target
        encode = self.wording.codec.encode
        texts = [dictionary.encode_line(encode(line), add_if_not_exist=False).long() for line in lines]
        for number, text in enumerate(texts, start=first):
            if len(text) > self.longest:
                raise ValueError(
                    f"line {number + 1} has {len(text)} tokens, the model reads at most {self.longest}; make it shorter"
                )
        started = time.perf_counter()
        found: list[list[Hypothesis]] = [[] for _ in lines]
        for group in self._groups(texts):
            for row, hypotheses in zip(group, self._generated([texts[row] for row in group])):
                found[row] = hypotheses
        seconds = time.perf_counter() - started
        for number, (text, hypotheses) in enumerate(zip(texts, found), start=first):
            joined = [self.wording.of_hypothesis(hypothesis.tokens) for hypothesis in hypotheses]
            shown = [(h, words, self.wording.codec.decode(words)) for h, words in zip(hypotheses, joined)]
            source = (self.wording.source or self.wording.target).string(text, self.configs.generate.remove_bpe)
            output = [*Output(number, source, None, shown).lines()]
            for line in (output[0], f"W-{number}\t{seconds:.3f}\tseconds", *output[1:]):
                sys.stdout.write(f"{line}\n")

    def _groups(self, texts: Sequence[Any]) -> Iterator[list[int]]:
        """Lines that are read together: of like length, within --max-tokens and --max-sentences."""
        from fairseq.data.batching import batch_by_size

        data, sizes = self.configs.data, np.array([len(text) for text in texts])
        if self.task.source is None:  # beginnings of one length alone can be continued together
            for length in np.unique(sizes):
                yield np.flatnonzero(sizes == length).tolist()
            return
        order = np.argsort(sizes, kind="stable")
        for batch in batch_by_size(order, sizes, max(data.max_tokens or 0, int(sizes.max())), data.max_sentences):
            yield batch.tolist()

    def _generated(self, texts: Sequence[Any]) -> list[list[Hypothesis]]:
        import torch

        from fairseq.data.language_pair_dataset import pad_sentences

        lengths = [len(text) for text in texts]
        if self.task.source is None:
            return self.generator.generate({}, lengths, torch.stack([text[:-1] for text in texts]))
        left = self.configs.task.left_pad_source
        source_BS = pad_sentences([text.numpy() for text in texts], self.task.source.pad(), left)
        device = next(self.generator.models[0].parameters()).device
        return self.generator.generate({"source_BS": source_BS.to(device)}, lengths)


def _opened(path: str) -> TextIO:
    if path == "-":
        return sys.stdin
    return open(path, encoding="utf-8", newline="\n")


def cli_main() -> None:
    """Entry point of interactive.py and fairseq-interactive."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()
