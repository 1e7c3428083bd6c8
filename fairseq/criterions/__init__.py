"""Training losses by name. Add your line here."""

from fairseq.config.plugins import class_registrar
from fairseq.criterions import configs as c
from fairseq.fairseq_names import lazy
from fairseq.registry import Entry

CRITERIONS: dict[str, Entry] = {
    "adaptive_loss": Entry(c.CriterionConfig, "fairseq.criterions.adaptive_loss:AdaptiveLoss"),
    "cross_entropy": Entry(c.CriterionConfig, "fairseq.criterions.cross_entropy:CrossEntropy"),
    "label_smoothed_cross_entropy": Entry(
        c.LabelSmoothingConfig, "fairseq.criterions.label_smoothed_cross_entropy:LabelSmoothedCrossEntropy"
    ),
    "memory_decoder_loss": Entry(c.MemoryDecoderConfig, "fairseq.criterions.memory_decoder_loss:MemoryDecoderLoss"),
    "trime_ext_loss": Entry(c.TrimeExternalConfig, "fairseq.criterions.trime_loss:external_loss"),
    "trime_long_loss": Entry(c.TrimeGatheredConfig, "fairseq.criterions.trime_loss:long_loss"),
    "trime_long_loss_same_device": Entry(c.TrimeConfig, "fairseq.criterions.trime_loss:long_loss_same_device"),
    "trime_loss": Entry(c.TrimeConfig, "fairseq.criterions.trime_loss:local_loss"),
    "trime_mt_loss": Entry(c.TrimeTranslationConfig, "fairseq.criterions.trime_mt_loss:TrimeTranslationLoss"),
}

register_criterion = class_registrar(CRITERIONS, "criterion", "fairseq.compat.criterion:entry")
__getattr__, __dir__ = lazy(__name__)
