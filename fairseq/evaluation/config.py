"""Options of evaluation."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.config import flag, require_at_least, require_shard, require_within
from fairseq.data.batching_config import DatasetConfig
from fairseq.memory.proof.config import ProofConfig
from fairseq.memory.retomaton.config import RetomatonConfig
from fairseq.memory.sources.config import TEMPERATURES, KnnConfig
from fairseq.runtime.atomic_files import require_writable
from fairseq.runtime.config import RuntimeConfig
from fairseq.runtime.manifest import Command


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Options of scoring: checkpoint, text and report."""

    path: str | None = flag("--path", default=None)
    """Checkpoint to evaluate; several separated by colons make an ensemble."""
    gen_subset: str = flag("--gen-subset", default="test")
    """Split to score."""
    num_shards: int = flag("--num-shards", default=1)
    """Parts the split is cut into, to be scored by as many commands."""
    shard_id: int = flag("--shard-id", default=0)
    """Part that this command scores, from 0."""
    context_window: int = flag("--context-window", default=0)
    """Tokens of the text before each block that the model reads but that are not scored again."""
    softmax_batch: int = flag("--softmax-batch", default=sys.maxsize)
    """Positions whose vocabulary scores are held at once."""
    remove_bpe: str | None = flag("--remove-bpe", "--post-process", default=None, const="@@ ")
    """Report per word, joining the pieces that this mark continues."""
    model_overrides: dict[str, Any] | None = flag("--model-overrides", default=None)
    """Dictionary literal of model settings that replace the checkpoint's."""
    results_path: str | None = flag("--results-path", default=None)
    """Folder for the report, the scores and the run manifest."""
    eval_file: str | None = flag("--eval-file", default=None)
    """JSON file for the figures."""
    scores_file: str | None = flag("--scores-file", default=None)
    """NumPy .npz file for the log-probability of every scored token."""
    output_word_probs: bool = flag("--output-word-probs", default=False)
    """Print every word with its natural log-probability."""
    output_position_stats: bool = flag("--output-position-stats", default=False)
    """Print the perplexity by the token's place in its block: the first ones have read less."""
    output_word_stats: bool = flag("--output-word-stats", default=False)
    """Print six columns per word: the word, its count, the sum of its natural log-probabilities, whether it was joined
    from pieces, the sum for the words after it, and their number."""
    quiet: bool = flag("--quiet", default=False)
    """Print the report only."""
    score_all: bool = flag("--score-all", default=False)
    """Cut blocks longer than the model's positions instead of leaving them out."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("give --path CHECKPOINT: which model is evaluated is not known otherwise")
        require_at_least(0, context_window=self.context_window)
        require_at_least(1, softmax_batch=self.softmax_batch)
        require_shard(self.shard_id, self.num_shards)


@dataclass(frozen=True, kw_only=True)
class MemoryEvaluationConfig:
    """Options of eval_lm.py for saving a datastore or scoring with one."""

    knnlm: bool = flag("--knnlm", default=False)
    """Interpolate with the nearest neighbours in a datastore (kNN-LM, arXiv 1911.00172)."""
    save_knnlm_dstore: bool = flag("--save-knnlm-dstore", default=False)
    """Write the key and the next token of every position into a datastore."""
    knn_neighbors: str | None = flag("--knn-neighbors", default=None)
    """File of fairseq-neighbors for the split: its neighbours are taken instead of a search, and compared by the keys
    of --dstore-filename, which may be of another model or layer."""
    dstore_mmap: str | None = flag("--dstore-mmap", default=None)
    """Prefix of the datastore that is written."""
    score_while_saving: bool = flag("--score-while-saving", default=False)
    """Compute the perplexity too while saving (costs the softmax, which saving does not need)."""
    all_tokens: bool = flag("--dstore-all-tokens", default=False)
    """Save the first --context-window tokens of the split too, which the model reads with less context than others."""
    overwrite_dstore: bool = flag("--overwrite-dstore", default=False)
    """Replace a complete datastore, also one of another split, model, key or text."""

    def __post_init__(self) -> None:
        if self.knnlm and self.save_knnlm_dstore:
            raise ValueError("--knnlm and --save-knnlm-dstore exclude each other; save first, then evaluate")
        if self.save_knnlm_dstore and not self.dstore_mmap:
            raise ValueError("--save-knnlm-dstore needs --dstore-mmap PREFIX: where the datastore goes")
        if self.knn_neighbors and not self.knnlm:
            raise ValueError(f"--knn-neighbors {self.knn_neighbors} are neighbours for --knnlm: give it too")
        if self.score_while_saving and not self.save_knnlm_dstore:
            raise ValueError("--score-while-saving goes with --save-knnlm-dstore")
        for name, given in (("--overwrite-dstore", self.overwrite_dstore), ("--dstore-all-tokens", self.all_tokens)):
            if given and not self.save_knnlm_dstore:
                raise ValueError(f"{name} goes with --save-knnlm-dstore")
        if self.dstore_mmap and not self.save_knnlm_dstore:
            raise ValueError(
                f"--dstore-mmap {self.dstore_mmap} is where --save-knnlm-dstore writes: give both or neither"
            )


@dataclass(frozen=True, kw_only=True)
class MemoryDecoderEvaluationConfig:
    """A decoder that was trained on neighbours, mixed into the language model (Memory Decoder, arXiv 2508.09874)."""

    memory_decoder: str | None = flag("--memory-decoder", default=None)
    """Checkpoint of train.py --criterion memory_decoder_loss."""
    decoder_weight: float | None = flag("--decoder-weight", default=None)
    """Its share in the probability, 0 to 1; what other memories add is mixed into both together."""

    def __post_init__(self) -> None:
        if (self.memory_decoder is None) != (self.decoder_weight is None):
            raise ValueError("--memory-decoder CHECKPOINT and --decoder-weight SHARE belong together; give both")
        require_within(0, 1, hint="0 is the language model alone", decoder_weight=self.decoder_weight)
        if self.memory_decoder is not None and not os.path.isfile(self.memory_decoder):
            raise ValueError(f"--memory-decoder: no checkpoint at {self.memory_decoder!r}")


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """Options for bulk retrieval and for keeping its results."""

    knn_bulk: int = flag("--knn-bulk", default=65536)
    """Scored positions whose neighbours are searched at once."""
    save_retrieval: str | None = flag("--save-retrieval", default=None)
    """File for the neighbours of every scored token, from which fairseq-knn-sweep evaluates any --lmbda, temperature
    and smaller --k without searching again."""

    def __post_init__(self) -> None:
        require_at_least(1, knn_bulk=self.knn_bulk)


@dataclass(frozen=True, kw_only=True)
class TrimeEvaluationConfig:
    """Options for the memories of eval_lm-trime.py (TRIME, arXiv 2205.12674)."""

    use_local: bool = flag("--use-local", default=False)
    """Local memory: what the model has read of its own input."""
    use_long: bool = flag("--use-long", default=False)
    """Long-term memory: the scored tokens of the inputs before."""
    mem_size: int = flag("--mem-size", default=0)
    """Tokens the long-term memory holds."""
    dedup_memory: bool = flag("--dedup-memory", default=False)
    """Hold each token once: the long-term memory leaves out what the context of the input repeats."""
    use_external: bool = flag("--use-external", default=False)
    """External memory: the nearest rows of a datastore."""
    use_interp: bool = flag("--use-interp", default=False)
    """Mix in the external memory's own distribution, with the share --lmbda."""
    interp_temp: float = flag("--interp-temp", default=1.0)
    """Divides the similarities (inner products) in that distribution."""
    mode: str = flag("--mode", default="gn", choices=("gn", "li", "gnli"))
    """Use of the external memory: gn in the joint normalisation, li in the interpolation alone (implies --use-interp),
    gnli in both (gn with --use-interp)."""
    fix_tail_pads: bool = flag("--fix-tail-pads", default=False)
    """Score the second type of each tail of an adaptive softmax as any other. TRIME's evaluation takes it for padding
    there and counts the tail's probability alone; the published perplexities have that in them."""

    def __post_init__(self) -> None:
        if self.use_long and self.mem_size < 1:
            raise ValueError(f"--use-long needs --mem-size TOKENS of at least 1, got {self.mem_size}")
        if self.mem_size and not self.use_long:
            raise ValueError(f"--mem-size {self.mem_size} is the size of the long-term memory: give --use-long too")
        if self.dedup_memory and not (self.use_local and self.use_long):
            raise ValueError("--dedup-memory is about tokens in both --use-local and --use-long; give both")
        for flag_name, given in (("--use-interp", self.use_interp), (f"--mode {self.mode}", self.mode != "gn")):
            if given and not self.use_external:
                raise ValueError(f"{flag_name} mixes in the external memory: give --use-external and its datastore")
        require_within(*TEMPERATURES, hint="1 changes nothing", interp_temp=self.interp_temp)

    @property
    def interpolates(self) -> bool:
        """True if the external memory's own distribution is mixed in."""
        return self.use_interp or self.mode != "gn"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfigs:
    """Every config of one evaluation command, each validated before anything is loaded."""

    command: Command
    evaluation: EvaluationConfig
    bulk: BulkConfig
    knn: KnnConfig
    runtime: RuntimeConfig
    data: DatasetConfig
    task_options: Mapping[str, Any]
    """Task options that the user gave; the others come from the checkpoint."""
    key_tap: str | None = None
    """Inner state that the user named as key; None leaves the choice to the checkpoint."""
    memory: MemoryEvaluationConfig = MemoryEvaluationConfig()
    retomaton: RetomatonConfig = RetomatonConfig()
    trime: TrimeEvaluationConfig | None = None
    """Memories of eval_lm-trime.py; None for eval_lm.py."""
    proof: ProofConfig = ProofConfig()
    decoder: MemoryDecoderEvaluationConfig = MemoryDecoderEvaluationConfig()

    def require_files(self) -> None:
        """Raise ValueError for a checkpoint that is missing or a place that takes no output."""
        config = self.evaluation
        for path in str(config.path).split(":"):
            if not os.path.exists(path):
                raise ValueError(f"--path: no checkpoint at {path!r}")
            if os.path.isdir(path):
                raise ValueError(f"--path {path} is a folder; name one of its checkpoints, such as checkpoint_best.pt")
        files = (("--eval-file", config.eval_file), ("--scores-file", config.scores_file))
        for flag_name, name in (*files, ("--save-retrieval", self.bulk.save_retrieval)):
            if name and os.path.isdir(name):
                raise ValueError(f"{flag_name} {name} is a folder; give the name of a file")
            if name:
                require_writable(os.path.dirname(os.path.abspath(name)), flag_name)
        if config.results_path:
            require_writable(config.results_path, "--results-path")
