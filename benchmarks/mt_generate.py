"""Translation with beam 4: the tokens/s of kNN-MT are at least so much of plain translation's.

With ``--data`` and ``--checkpoint`` a trained model translates its test set, alone and over ``--store`` (with an index,
``--index``); by default random weights write 20 tokens for each of 256 sentences over 453,207 clustered keys.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

NUM_KEYS, WIDTH, VOCABULARY, TOKENS, SENTENCES, BEAM = 453_207, 128, 3016, 20, 256, 4


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(__doc__)
    made.add_argument("--data", help="folder of preprocess.py")
    made.add_argument("--checkpoint", help="model of that data")
    made.add_argument("--store", help="folder of save_datastore.py")
    made.add_argument("--index", help="index over it, built with 64 to 4,096 lists")
    made.add_argument("--probes", default="8,32", help="lists that are searched, separated by commas")
    made.add_argument("--k", type=int, default=8)
    return made


def shape() -> dict[str, Any]:
    """Settings of encoder and decoder: two layers of width 128."""
    one = {"layers": 2, "embed_dim": WIDTH, "ffn_embed_dim": 256, "attention_heads": 4}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in one.items()}
    return both | {"share_decoder_input_output_embed": True, "decoder_normalize_before": True, "dropout": 0.0}


def made_up_dictionary(size: int) -> Any:
    """A dictionary of so many types."""
    from fairseq.data.dictionary import Dictionary

    dictionary = Dictionary()
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def random_source() -> Any:
    """int64 (sentences, tokens) that end with </s>."""
    import torch

    torch.manual_seed(0)
    source = torch.randint(4, VOCABULARY, (SENTENCES, 16))
    source[:, -1] = 2
    return source


def random_setting(beam: int = BEAM) -> tuple[Any, Any, list[Any], Any]:
    """Model, dictionary, batches and options of the setting without files."""
    import torch

    from fairseq.generation.config import GenerationConfig
    from fairseq.models.architectures import build_model_config
    from fairseq.models.transformer import TransformerModel

    torch.manual_seed(0)
    config = build_model_config("transformer_iwslt_de_en", shape())
    model = TransformerModel.build(config, VOCABULARY, 1, source_size=VOCABULARY).eval()
    batches = [({"source_BS": random_source()}, [16] * SENTENCES)]
    options = GenerationConfig(beam=beam, min_len=TOKENS - 1, max_len_b=TOKENS - 1)
    return model, made_up_dictionary(VOCABULARY), batches, options


def trained_setting(options: argparse.Namespace) -> tuple[Any, Any, list[Any], Any]:
    """Model, dictionary, batches and options of a trained model's test set."""
    from fairseq.checkpoint_utils import load_checkpoint
    from fairseq.generation.config import GenerationConfig
    from fairseq.runtime.config import RuntimeConfig
    from fairseq.tasks.configs import TranslationConfig
    from fairseq.tasks.translation import TranslationTask

    task = TranslationTask(TranslationConfig(data=options.data))
    model = task.load_model(load_checkpoint(options.checkpoint), options.checkpoint, None, RuntimeConfig(cpu=True))
    dataset = task.blocks("test")
    numbers = task.training_batches(dataset, max_tokens=4096, max_sentences=None, multiple=8, seed=1, shuffle=False)
    batches = [(batch.source, (batch.source_BS != 1).sum(1).tolist()) for batch in task.iterator(dataset, numbers)]
    return model, task.dictionary, batches, GenerationConfig(beam=BEAM, lenpen=0.6, max_len_a=1.2, max_len_b=10)


def random_store(folder: Path) -> tuple[Any, Any]:
    """A store of clustered keys and an index of 64 lists over it."""
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.datastore.writer import DatastoreWriter
    from fairseq.memory.index.build.build import build_index
    from fairseq.memory.index.build.config import BuildConfig

    draw = np.random.default_rng(0)
    centres = draw.standard_normal((2000, WIDTH), np.float32) * 2
    with DatastoreWriter(folder / "store", NUM_KEYS, WIDTH, "float16") as writer:
        for start in range(0, NUM_KEYS, 1 << 16):
            count = min(1 << 16, NUM_KEYS - start)
            noise = draw.standard_normal((count, WIDTH), np.float32)
            keys = centres[draw.integers(len(centres), size=count)] + noise
            writer.append(keys.astype(np.float16), draw.integers(4, VOCABULARY, count))
        writer.finish()
    settings = {"dstore_mmap": str(folder / "store"), "faiss_index": str(folder / "index"), "ncentroids": 64}
    build_index(BuildConfig(**settings, no_report=True))
    return Datastore.open(folder / "store"), folder / "index"


def main() -> None:
    """Translate plainly and with neighbours, in turn."""
    options = parser().parse_args()
    import torch

    from fairseq.generation.next_token import NeighborMemory
    from fairseq.generation.sequence_generator import SequenceGenerator
    from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.sources.external import ExternalMemory

    trained = bool(options.data)
    model, dictionary, batches, config = trained_setting(options) if trained else random_setting()

    def runner(memory: Any) -> Any:
        generator = SequenceGenerator([model], dictionary, config, memory)

        def run() -> None:
            for source, lengths in batches:
                generator.generate(source, lengths)

        return run

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        plain = runner(None)
        if options.store:
            store, index = Datastore.open(options.store), options.index
        else:
            store, index = random_store(Path(folder))
        for probe, wanted in zip(options.probes.split(","), (">= 0.5", ">= 0.35")):
            memory = ExternalMemory.open(store, index, k=options.k, score="index", probe=int(probe))
            with_memory = runner(NeighborMemory(memory, VocabularyMixer(0.2, 10.0), "model_output"))
            own, near = common.in_turn(plain, with_memory, options.repeats)
            details = {"plain_seconds": own, "knn_seconds": near, "keys": len(store), "k": options.k}
            ratio = common.median_ratio(own, near)
            name = f"mt_generate_probe{probe}"
            common.tell(name, f"kNN-MT's speed over plain, probe {probe}", ratio, wanted, details, options.out)


if __name__ == "__main__":
    main()
