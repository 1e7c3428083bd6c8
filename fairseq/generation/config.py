"""Options of generated text. No torch here: the flags are made from these."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fairseq.config import (
    LARGEST_COUNT,
    flag,
    literal_dict,
    require_at_least,
    require_shard,
    require_within,
    shard_suffix,
)
from fairseq.memory.combiners.config import KINDS
from fairseq.memory.sources.config import KnnConfig
from fairseq.metrics.bleu import SCORINGS


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of beam search and sampling."""

    beam: int = flag("--beam", default=5)
    """Hypotheses kept for each sentence, or drawn with --sampling."""
    nbest: int = flag("--nbest", default=1)
    """Hypotheses returned for each sentence."""
    max_len_a: float = flag("--max-len-a", default=0.0)
    """A text has at most A * (source tokens) + B tokens, </s> aside."""
    max_len_b: int = flag("--max-len-b", default=200)
    """B of --max-len-a. A language model counts the beginning that it was given."""
    min_len: int = flag("--min-len", default=1)
    """Smallest number of tokens, </s> aside."""
    match_source_len: bool = flag("--match-source-len", default=False)
    """Generate as many tokens as the source has."""
    unnormalized: bool = flag("--unnormalized", default=False)
    """Rank hypotheses by their log-probability alone, as --lenpen 0."""
    lenpen: float = flag("--lenpen", default=1.0)
    """Power of the length that log-probabilities are divided by; larger favours long text."""
    unkpen: float = flag("--unkpen", default=0.0)
    """Taken off the log-probability of <unk>."""
    logit_temperature: float = flag("--temperature", default=1.0)
    """Divides the model's scores before the softmax."""
    prefix_size: int = flag("--prefix-size", default=0)
    """Begin each text with so many tokens of the reference."""
    no_repeat_ngram_size: int = flag("--no-repeat-ngram-size", default=0)
    """No n-gram of this size occurs twice in a text; 0 for no such rule."""
    sampling: bool = flag("--sampling", default=False)
    """Draw tokens instead of searching."""
    sampling_topk: int = flag("--sampling-topk", default=-1)
    """Draw from so many most probable types; -1 for all."""
    sampling_topp: float = flag("--sampling-topp", default=-1.0)
    """Draw from the fewest types that hold this share of the probability (arXiv 1904.09751); -1 for all."""

    def __post_init__(self) -> None:
        require_within(1, LARGEST_COUNT, beam=self.beam, nbest=self.nbest)
        require_within(
            0,
            LARGEST_COUNT,
            max_len_a=self.max_len_a,
            max_len_b=self.max_len_b,
            min_len=self.min_len,
            prefix_size=self.prefix_size,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )
        # Beyond these limits float32 makes infinities of the scores, and no text has a finite one.
        require_within(-10.0, 10.0, hint="1 is the mean over the tokens, 0 the sum", lenpen=self.lenpen)
        require_within(-1e9, 1e9, hint="1e9 keeps <unk> out of every text", unkpen=self.unkpen)
        take_best = "--beam 1 takes the most probable token"
        require_within(1e-6, 1e6, hint=take_best, temperature=self.logit_temperature)
        if self.nbest > self.beam:
            raise ValueError(
                f"--nbest {self.nbest} is more than the {self.beam} hypotheses of --beam; give a larger one"
            )
        for name, value in (("--sampling-topk", self.sampling_topk), ("--sampling-topp", self.sampling_topp)):
            if value > 0 and not self.sampling:
                raise ValueError(f"{name} {value} belongs to --sampling: give it too, or leave {name} out")
        if self.sampling_topk != -1:
            require_within(1, LARGEST_COUNT, hint="-1 draws from all types", sampling_topk=self.sampling_topk)
        if self.sampling_topp != -1 and not 0 < self.sampling_topp <= 1:
            raise ValueError(
                f"--sampling-topp {self.sampling_topp} is no share of the probability; give one above 0 and at most 1, "
                "or -1 to draw from all types"
            )
        if self.sampling_topk > 0 and self.sampling_topp > 0:
            raise ValueError("--sampling-topk and --sampling-topp exclude each other; give one of them")
        if not self.max_len_a and self.prefix_size > self.max_len_b:
            raise ValueError(
                f"--prefix-size {self.prefix_size} begins texts that --max-len-b {self.max_len_b} ends before; raise "
                "--max-len-b"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of generate.py and interactive.py: checkpoint, text and report."""

    path: str | None = flag("--path", default=None)
    """Checkpoint; several separated by colons make an ensemble."""
    gen_subset: str = flag("--gen-subset", default="test")
    """Split whose sentences are translated, or whose texts are continued."""
    num_shards: int = flag("--num-shards", default=1)
    """Parts the split is cut into, for as many commands."""
    shard_id: int = flag("--shard-id", default=0)
    """Part that this command takes, from 0."""
    remove_bpe: str | None = flag("--remove-bpe", "--post-process", default=None, const="@@ ")
    """Join word pieces that this mark continues; "sentencepiece" for those of sentencepiece."""
    quiet: bool = flag("--quiet", default=False)
    """Print the scores only."""
    results_path: str | None = flag("--results-path", default=None)
    """Folder for the lines, in generate-SUBSET.txt, and plain texts; by default lines are printed. The files of a shard
    are called generate-SUBSET.shardIofN."""
    model_overrides: dict[str, Any] | None = flag("--model-overrides", default=None, parse=literal_dict)
    """Dictionary literal of model settings that replace the checkpoint's, and of a datastore's."""
    score_reference: bool = flag("--score-reference", default=False)
    """Score the references instead of generating; there is no BLEU then."""
    save_retrieval: str | None = flag("--save-retrieval", default=None)
    """File for the neighbours of every token of the references (with --knnmt --score-reference), from which
    fairseq-knn-sweep evaluates any --lmbda, --knn-temp and smaller --k without searching again."""
    scoring: str = flag("--scoring", default="bleu", choices=SCORINGS)
    """bleu of tokens as they are; sacrebleu (BLEU, chrF++, TER), chrf or ter of detokenised text."""
    sacrebleu: bool = flag("--sacrebleu", default=False)
    """As --scoring sacrebleu."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("give --path CHECKPOINT: which model generates is not known otherwise")
        require_shard(self.shard_id, self.num_shards)

    def check_reference(self, generation: GenerationConfig, memory: StepMemoryConfig) -> None:
        """Raise ValueError for options of generated texts where the references are scored."""
        if self.score_reference and memory.sentence_pairs:
            raise ValueError(
                "--sentence-pairs takes part in generation; leave out --score-reference, or take a datastore"
            )
        others = {
            f"--nbest {generation.nbest}": generation.nbest > 1,
            f"--prefix-size {generation.prefix_size}": generation.prefix_size > 0,
            "--sampling": generation.sampling,
        }
        for words, given in others.items():
            if self.score_reference and given:
                raise ValueError(
                    f"--score-reference scores the one reference of each sentence, {words} is about generated texts; "
                    "leave one of them out"
                )

    def check_retrieval(self, memory: StepMemoryConfig) -> None:
        """Raise ValueError for neighbours that are to be kept where none are found, or none that a sweep reads."""
        if not self.save_retrieval:
            return
        for words, given in (("--knnmt", memory.knnmt), ("--score-reference", self.score_reference)):
            if not given:
                raise ValueError(
                    f"--save-retrieval {self.save_retrieval} keeps the neighbours that --knnmt --score-reference finds "
                    f"for the references: give {words} too"
                )
        kind = f"--knn-lambda-type {memory.knn_lambda_type}"
        if memory.knn_lambda_type not in SWEPT:
            raise ValueError(
                f"--save-retrieval: {kind} has a share of its own for each token, a sweep is over fixed ones; give "
                f"--knn-lambda-type {' or '.join(SWEPT)}"
            )
        if memory.compat_trime_mass:
            raise ValueError("--save-retrieval: a sweep compares probabilities, leave out --compat-trime-mass")
        if os.path.isdir(self.save_retrieval):
            raise ValueError(f"--save-retrieval {self.save_retrieval} is a folder; give the name of a file")

    @property
    def paths(self) -> list[str]:
        """The checkpoints."""
        return str(self.path).split(":")

    @property
    def results_name(self) -> str:
        """Name of the files in --results-path, without their endings; each shard has one of its own."""
        return f"generate-{self.gen_subset}{shard_suffix(self.shard_id, self.num_shards)}"

    @property
    def scores_by(self) -> str:
        """Name of the scoring."""
        return "sacrebleu" if self.sacrebleu else self.scoring


SWEPT = ("fix", "trime")
"""Kinds of share that fairseq-knn-sweep evaluates."""
LAMBDA_TYPES = ("fix", "trime", "distance", *KINDS)


@dataclass(frozen=True, kw_only=True)
class StepKnnConfig(KnnConfig):
    """Neighbours from a datastore in every step of generation (kNN-MT, arXiv 2010.00710)."""

    num_neighbors: int = flag("--k", default=8)
    """Neighbours fetched in each step."""
    temperature: float = flag("--knn-temp", "--softmax-temp", default=1.0)
    """Divides the similarities before they become probabilities."""


@dataclass(frozen=True, kw_only=True)
class StepMemoryConfig:
    """Options of a datastore that takes part in every step of generation."""

    knnmt: bool = flag("--knnmt", "--knnlm", default=False)
    """Mix the nearest neighbours of a datastore into each step (kNN-MT, arXiv 2010.00710)."""
    knn_lambda_type: str = flag("--knn-lambda-type", default="fix", choices=LAMBDA_TYPES)
    """Share of the neighbours: fix takes --lmbda, trime normalises vocabulary and neighbours together, distance takes 1
    less the nearest's distance over --knn-temp (arXiv 2302.12188), the others what the network of --combiner says."""
    combiner: str | None = flag("--combiner", default=None)
    """File that fairseq-train-combiner wrote; --k and --knn-temp are then those it was trained with."""
    compat_trime_mass: bool = flag("--compat-trime-mass", default=False)
    """Add the neighbours' distribution whole, as TRIME's program for translation did: the sum is then above 1."""
    knn_keytype: str | None = flag("--knn-keytype", default=None)
    """Inner state that is the query; by default model_output of a translation model, else as the store says."""
    sentence_pairs: int = flag("--sentence-pairs", default=0)
    """Search, in place of a datastore, so many pairs whose sources are most like the sentence, found by BM25 and edit
    distance (SK-MT, arXiv 2302.12188); 0 for none."""
    sentence_subset: str = flag("--sentence-subset", default="train")
    """Split that --sentence-pairs takes them from."""

    def __post_init__(self) -> None:
        require_at_least(0, sentence_pairs=self.sentence_pairs)
        if self.sentence_pairs and not self.knnmt:
            raise ValueError(f"--sentence-pairs {self.sentence_pairs} is read with --knnmt only: give it too")
        if self.sentence_pairs and self.learned:
            raise ValueError(
                f"--sentence-pairs: --knn-lambda-type {self.knn_lambda_type} was trained for a datastore; give "
                "distance or fix"
            )
        if self.compat_trime_mass and self.knn_lambda_type != "trime":
            raise ValueError("--compat-trime-mass belongs to --knn-lambda-type trime: give both, or leave it out")
        if self.knn_lambda_type != "fix" and not self.knnmt:
            raise ValueError(f"--knn-lambda-type {self.knn_lambda_type} is read with --knnmt only: give it too")
        if self.learned and not self.combiner:
            raise ValueError(
                f"--knn-lambda-type {self.knn_lambda_type} needs --combiner FILE, which fairseq-train-combiner writes"
            )
        if self.combiner and not self.learned:
            raise ValueError(
                f"--combiner {self.combiner} is not read with --knn-lambda-type {self.knn_lambda_type}; give the kind "
                f"it was trained as: {', '.join(KINDS)}"
            )

    @property
    def learned(self) -> bool:
        """True if a trained network decides the share."""
        return self.knn_lambda_type in KINDS
