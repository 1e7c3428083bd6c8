"""Translate, or continue text, by beam search or sampling, with a datastore (kNN-MT, kNN-LM) or without."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fairseq.config import FlagParser, build, ignored_flags
from fairseq.data.batching_config import DatasetConfig, with_default_batch
from fairseq.data.codecs import CodecConfig
from fairseq.generation.config import GenerateConfig, GenerationConfig, StepKnnConfig, StepMemoryConfig
from fairseq.generation.foreign_overrides import split_overrides
from fairseq.memory.combiners.learned_files import read_made_for
from fairseq.memory.datastore.config import SAVES_PAIRS, SAVES_TEXT
from fairseq.memory.index.sharded.early import begin_search
from fairseq.memory.proof.config import ProofConfig
from fairseq.metrics.word_loss import LossSums, loss_sums
from fairseq.options import TaskChoiceConfig, add_ignored, import_plugins, warn_ignored
from fairseq.registry import lookup
from fairseq.runtime.atomic_files import require_writable, writing
from fairseq.runtime.config import CommonConfig, RuntimeConfig
from fairseq.runtime.manifest import Command, write_manifest
from fairseq.tasks import TASKS
from fairseq.tasks.configs import TranslationConfig, overridden_limits
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from torch import Tensor

    from fairseq.data.types import LMBatch
    from fairseq.evaluation.prove_generation import GenerationProver
    from fairseq.generation.lines import Output, Wording
    from fairseq.generation.sequence_generator import Hypothesis
    from fairseq.generation.setup import StepMemorySettings

logger = logging.getLogger(__name__)

PROGRAM = "generate.py"
CONFIGS = (
    GenerateConfig,
    GenerationConfig,
    StepMemoryConfig,
    StepKnnConfig,
    RuntimeConfig,
    CommonConfig,
    DatasetConfig,
    ProofConfig,
)


@dataclass(frozen=True)
class GenerateConfigs:
    """Every config of one command, each validated before anything is loaded."""

    command: Command
    task_name: str
    task: Any
    generate: GenerateConfig
    generation: GenerationConfig
    memory: StepMemorySettings
    codec: CodecConfig
    runtime: RuntimeConfig
    common: CommonConfig
    data: DatasetConfig
    proof: ProofConfig
    overrides: dict[str, Any]
    """Settings of the model that replace the checkpoint's."""


def parse(argv: Sequence[str]) -> GenerateConfigs:
    """Parse and check the arguments. Raises: ValueError for what does not go together."""
    given, task = parsed(argv, PROGRAM)
    return configs_of(Command(PROGRAM, tuple(argv), given), given, task)


def parsed(argv: Sequence[str], program: str, more: Sequence[type] = ()) -> tuple[dict[str, Any], str]:
    """The values that the arguments give, and the task; plug-ins are imported first.

    Args:
        more: configs of the program besides those of all generation.
    """
    import_plugins(program, argv)
    parser = FlagParser(program, "Translate or continue text with a trained model.")
    parser.add_config(TaskChoiceConfig)
    task = str(parser.peek(argv).get("task", "translation"))
    for config in (lookup(TASKS, task, "--task").config, *CONFIGS, CodecConfig, *more):
        parser.add_config(config)
    add_ignored(parser, ignored_flags.GENERATE)
    given = with_default_batch(parser.parse(argv, ignored_flags.REJECTED_GENERATE))
    warn_ignored(parser, given, ignored_flags.GENERATE)
    return given, task


def configs_of(command: Command, given: dict[str, Any], task: str) -> GenerateConfigs:
    """Build every config. Raises: ValueError from their checks."""
    from fairseq.generation.setup import StepMemorySettings, require_checkpoints

    generate = build(GenerateConfig, given)
    of_store, of_model = split_overrides(generate.model_overrides or {})
    given = of_store | given
    step = build(StepMemoryConfig, given)
    knn = build(StepKnnConfig, of_combiner(step) | given)
    configs = GenerateConfigs(
        command=command,
        task_name=task,
        task=build(TASKS[task].config, overridden_limits(of_model) | given),
        generate=generate,
        generation=build(GenerationConfig, given),
        memory=StepMemorySettings(step, knn, store_command(task)),
        codec=build(CodecConfig, given),
        runtime=build(RuntimeConfig, given),
        common=build(CommonConfig, given),
        data=build(DatasetConfig, given),
        proof=build(ProofConfig, given),
        overrides=of_model,
    )
    generate.check_reference(configs.generation, step)
    generate.check_retrieval(step)
    if generate.save_retrieval:
        require_writable(os.path.dirname(os.path.abspath(generate.save_retrieval)), "--save-retrieval")
    require_checkpoints(generate)
    configs.memory.check()
    if generate.results_path:
        require_writable(generate.results_path, "--results-path")
    return configs


def store_command(task: str) -> str:
    """Command that makes the datastore of a task's models."""
    return SAVES_PAIRS if issubclass(TASKS[task].config, TranslationConfig) else SAVES_TEXT


def of_combiner(config: StepMemoryConfig) -> dict[str, Any]:
    """Options of the neighbours that the file of --combiner was trained with; the command's own ones come first."""
    if not config.combiner:
        return {}
    made_for = read_made_for(config.combiner)
    return {
        "num_neighbors": made_for.k,
        "temperature": made_for.temperature,
        "faiss_metric_type": made_for.metric,
    }


def begin_memory(settings: StepMemorySettings) -> None:
    """Start Ray, if it is to search, while the model is loaded."""
    if settings.memory.knnmt and not settings.memory.sentence_pairs:
        begin_search(settings.knn.search_on)


def main(argv: Sequence[str]) -> None:
    """Generate for a split and print fairseq's lines and scores."""
    configs = parse(argv)
    begin_memory(configs.memory)
    from fairseq.evaluation.run import set_determinism
    from fairseq.generation.setup import open_models

    set_determinism(configs.runtime)
    config = configs.generate
    task = TASKS[configs.task_name].load()(configs.task)
    wording = open_wording(configs, task)
    reads_target = config.score_reference or configs.generation.prefix_size > 0
    dataset = task.blocks(config.gen_subset, **({} if task.source is None else {"needs_target": reads_target}))
    models = open_models(config, task, configs.overrides, configs.runtime)
    dataset = task.for_models(dataset, models)
    longest = min(model.max_positions for model in models)
    batches = task.batches(dataset, configs.data, seed=configs.runtime.seed, max_positions=longest)
    batches = batches[config.shard_id :: config.num_shards]
    run_of = _Run(configs, task, wording, models)
    path = os.path.join(config.results_path, f"{config.results_name}.txt") if config.results_path else None
    with (
        writing(path) if path else contextlib.nullcontext(sys.stdout) as file,
        run_of.keeping_neighbors(dataset, batches),
    ):
        run_of.write(file, task.iterator(dataset, batches, num_workers=configs.data.num_workers), len(batches))
    if path:
        run_of.write_files(path, has_references=getattr(dataset, "target_side", None) is not None)


def open_wording(configs: GenerateConfigs, task: Any) -> Wording:
    """How numbers become text, in the languages of the task."""
    from fairseq.data.codecs import TextCodec
    from fairseq.generation.lines import Wording

    source, target = getattr(task, "source_lang", None), getattr(task, "target_lang", None)
    codec = TextCodec.of(dataclasses.replace(configs.codec, source_lang=source, target_lang=target))
    return Wording(task.source, task.dictionary, codec, configs.generate.remove_bpe)


class _Run:
    """One command at work: lines out, scores at the end."""

    def __init__(self, configs: GenerateConfigs, task: Any, wording: Wording, models: list[Any]) -> None:
        from fairseq.generation.next_token import NeighborMemory
        from fairseq.generation.scoring import ReferenceScorer
        from fairseq.generation.sequence_generator import SequenceGenerator
        from fairseq.generation.setup import open_memory

        self.configs, self.task, self.wording = configs, task, wording
        memory = open_memory(configs.memory, configs.generate, task, models[0])
        self.reference_scorer = None
        if configs.generate.score_reference:
            assert memory is None or isinstance(memory, NeighborMemory), "sentence pairs were rejected"
            combine = configs.memory.combiner(models[0].key_dim(memory.key_tap), memory) if memory else None
            self.reference_scorer = ReferenceScorer(models, memory, combine)
        self.generator = SequenceGenerator(models, task.dictionary, configs.generation, memory)
        self.hypotheses: dict[int, str] = {}
        self.references: dict[int, str] = {}
        self.figures: dict[str, Any] = {}
        self.num_tokens, self.seconds = 0, 0.0
        self.loss = LossSums()
        self.prover: GenerationProver | None = None
        self._targets: dict[int, Any] = {}

    @contextlib.contextmanager
    def keeping_neighbors(self, dataset: Any, batches: list[Any]) -> Iterator[None]:
        """The neighbours of the references are in the file of --save-retrieval when the block ends."""
        configs, scorer = self.configs, self.reference_scorer
        path = configs.generate.save_retrieval
        if not path:
            yield
            return
        from fairseq.generation.next_token import NeighborMemory
        from fairseq.generation.save_retrieval import keeping_neighbors

        assert scorer is not None, "it was asked for with --score-reference"
        assert isinstance(scorer.memory, NeighborMemory), "--knnmt was asked for too"
        with keeping_neighbors(
            configs.generate,
            configs.memory,
            self.task,
            scorer.memory,
            (dataset, batches),
            model=self.generator.models[0],
            overrides=configs.overrides,
            program=configs.command.program,
        ) as scorer.kept:
            yield
        self._write_manifest(f"{path}.run.json")

    def write(self, file: Any, batches: Iterator[LMBatch], count: int) -> None:
        """Write the lines of all batches, and the scores."""
        from tqdm import tqdm

        config = self.configs.generate
        if self.configs.proof.is_on:
            from fairseq.evaluation.prove_generation import GenerationProver

            self.prover = GenerationProver(
                self.configs.proof, self.generator, self.task.dictionary, count, self.configs.runtime.seed
            )
        bar = tqdm(batches, total=count, disable=True if self.configs.common.no_progress_bar else None)
        for batch in bar:
            for output in self._outputs(batch):
                if not config.quiet:
                    file.writelines(f"{line}\n" for line in output.lines())
            bar.set_postfix(tokens_per_s=f"{self.num_tokens / max(self.seconds, 1e-9):.0f}")
        logger.info("NOTE: hypothesis and token scores are output in base 2")
        sentences, tokens, seconds = len(self.hypotheses), self.num_tokens, max(self.seconds, 1e-9)
        logger.info(
            "Translated %s sentences (%s tokens) in %.1fs (%.2f sentences/s, %.2f tokens/s)",
            f"{sentences:,}", f"{tokens:,}", seconds, sentences / seconds, tokens / seconds,
        )  # fmt: skip
        self.figures |= {"sentences": sentences, "tokens": tokens, "tokens_per_second": tokens / seconds}
        if self.reference_scorer is not None:
            loss = {"loss_base2": self.loss.loss_base2, "perplexity": self.loss.perplexity}
            logger.info("Loss (base 2): %.4f, Perplexity: %.2f", *loss.values())
            self.figures |= loss
        for line in self._scores():
            file.write(f"{line}\n")
        if self.prover is not None:
            proof = self.prover.finish([self._targets[number] for number in sorted(self._targets)])
            self.figures["proof"] = proof.to_dict()
            for line in proof.lines():
                logger.log(logging.INFO if proof.passed else logging.WARNING, "%s", line)

    def _scores(self) -> list[str]:
        """The lines of the scores; none without references, or where they are the texts themselves."""
        from fairseq.metrics.bleu import score_texts

        if not self.references or self.reference_scorer is not None:
            return []
        config, order = self.configs.generate, sorted(self.references)
        scores = score_texts(config.scores_by, [self.hypotheses[i] for i in order], [self.references[i] for i in order])
        self.figures |= scores.figures
        first, *more = scores.lines
        return [f"Generate {config.gen_subset} with beam={self.configs.generation.beam}: {first}", *more]

    def _outputs(self, batch: LMBatch) -> Iterator[Output]:
        """What was generated for each row of a batch."""
        from fairseq.generation.lines import Output

        if self.prover is not None:
            self.prover.begin()
        started = time.perf_counter()
        if self.reference_scorer is not None:
            found = [[hypothesis] for hypothesis in self.reference_scorer.score(batch)]
            self.loss = self.loss.plus(_loss_of([hypothesis for (hypothesis,) in found]))
        else:
            found = self._generated(batch)
        self.seconds += time.perf_counter() - started
        if self.prover is not None:
            self.prover.check(batch, found)
        plain = self.configs.generate.scores_by == "bleu"
        for row, hypotheses in enumerate(found):
            number = int(batch.ids_B[row])
            joined = [self.wording.of_hypothesis(hypothesis.tokens) for hypothesis in hypotheses]
            texts = [self.wording.codec.decode(text) for text in joined]
            self.num_tokens += len(hypotheses[0].tokens)
            target = batch.target_BT[row][batch.scored_BT[row]]
            self.hypotheses[number] = joined[0] if plain else texts[0]
            reference = self.wording.of_reference(target) if len(target) else None
            if self.prover is not None and reference is not None:
                self._targets[number] = target.cpu().numpy()
            if reference is not None and self.wording.source is not None:
                self.references[number] = self.wording.joined_reference(target) if plain else reference
            source = self._source_text(batch, row)
            yield Output(number, source, reference, list(zip(hypotheses, joined, texts)))

    def _source_text(self, batch: LMBatch, row: int) -> str | None:
        if self.wording.source is None:
            return None
        tokens = batch.source["source_BS"][row]
        return self.wording.of_source(tokens[tokens != self.task.source.pad()])

    def _generated(self, batch: LMBatch) -> list[list[Any]]:
        """Hypotheses of each row. Rows whose given beginnings are of one length are generated together."""
        import torch

        beginnings = [self._beginning(batch, row) for row in range(len(batch.ids_B))]
        groups: dict[tuple[int, bool], list[int]] = {}
        for row, (tokens, ends) in enumerate(beginnings):
            groups.setdefault((len(tokens), ends), []).append(row)
        found: list[list[Any]] = [[] for _ in beginnings]
        device = next(self.generator.models[0].parameters()).device
        for (length, ends), rows in groups.items():
            source = {name: rows_BS[rows].to(device) for name, rows_BS in batch.source.items()}
            prefix_BT = torch.stack([beginnings[row][0] for row in rows])
            lengths = [length + 1] * len(rows)
            if self.task.source is not None:
                lengths = (source["source_BS"] != self.task.source.pad()).sum(1).tolist()
            limits = [length] * len(rows) if ends else None
            for row, hypotheses in zip(rows, self.generator.generate(source, lengths, prefix_BT, limits)):
                found[row] = hypotheses
        return found

    def _beginning(self, batch: LMBatch, row: int) -> tuple[Tensor, bool]:
        """Tokens a row's text begins with, and True if </s> follows them."""
        size = self.configs.generation.prefix_size
        words = batch.target_BT[row][batch.scored_BT[row]]
        words = words[:-1] if len(words) and words[-1] == self.task.dictionary.eos() else words
        if self.task.source is None and not size:  # a language model continues the whole line
            return words, False
        return words[:size], size > len(words)

    def write_files(self, path: str, *, has_references: bool) -> None:
        """Write the texts alone, a sentence a line, for other scorers, and the run manifest.

        Files of an earlier command that this one has no texts for are removed.
        """
        folder, name = os.path.split(path.removesuffix(".txt"))
        hypotheses = None if self.reference_scorer is not None else self.hypotheses
        for kind, texts in (("hyp", hypotheses), ("ref", self.references if has_references else None)):
            if texts is None:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, f"{name}.{kind}"))
                continue
            with writing(os.path.join(folder, f"{name}.{kind}")) as file:
                file.writelines(f"{texts[number]}\n" for number in sorted(texts))
        self._write_manifest(os.path.join(folder, f"{name}.run.json"))

    def _write_manifest(self, path: str) -> None:
        command = self.configs.command
        write_manifest(
            path,
            program=command.program,
            argv=command.argv,
            config={"given": dict(command.given)},
            figures=self.figures,
            inputs=[*self.configs.generate.paths],
            seed=self.configs.runtime.seed,
        )


def _loss_of(scored: list[Hypothesis]) -> LossSums:
    """The loss of some references, per token."""
    import numpy as np

    logp_N = np.concatenate([hypothesis.logp.double().cpu().numpy() for hypothesis in scored])
    return loss_sums(np.zeros(len(logp_N)), np.zeros(len(logp_N), dtype=bool), logp_N)


def cli_main() -> None:
    """Entry point of generate.py and fairseq-generate."""
    run("generate.py", main)


if __name__ == "__main__":
    cli_main()
