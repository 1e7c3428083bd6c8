"""Hugging Face models with this project's memories: kNN-LM, RetoMaton and Extended Mind around any of them.

The names below are the public interface; everything else may change without notice. They are imported when used.
"""

from typing import TYPE_CHECKING

from fairseq.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from fairseq.hf.attention.original_api import from_pretrained
    from fairseq.hf.attention.wrapper import ExtendedMind, extended_mind
    from fairseq.hf.knn.batches import SentencePair, windows_of
    from fairseq.hf.knn.evaluation import evaluate, save_datastore
    from fairseq.hf.knn.prove import prove
    from fairseq.hf.knn.retomaton import RetomatonWrapper
    from fairseq.hf.knn.saver import KNNSaver
    from fairseq.hf.knn.wrapper import KNNWrapper

__all__ = [
    "ExtendedMind",
    "KNNSaver",
    "KNNWrapper",
    "RetomatonWrapper",
    "SentencePair",
    "evaluate",
    "extended_mind",
    "from_pretrained",
    "prove",
    "save_datastore",
    "windows_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExtendedMind": "fairseq.hf.attention.wrapper",
        "KNNSaver": "fairseq.hf.knn.saver",
        "KNNWrapper": "fairseq.hf.knn.wrapper",
        "RetomatonWrapper": "fairseq.hf.knn.retomaton",
        "SentencePair": "fairseq.hf.knn.batches",
        "evaluate": "fairseq.hf.knn.evaluation",
        "extended_mind": "fairseq.hf.attention.wrapper",
        "from_pretrained": "fairseq.hf.attention.original_api",
        "prove": "fairseq.hf.knn.prove",
        "save_datastore": "fairseq.hf.knn.evaluation",
        "windows_of": "fairseq.hf.knn.batches",
    },
)
