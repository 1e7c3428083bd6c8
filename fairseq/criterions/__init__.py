"""Training losses by name. Add your line here."""

from fairseq.criterions import configs as c
from fairseq.registry import Entry
from fairseq.user_dir import class_registrar

CRITERIONS: dict[str, Entry] = {
    "adaptive_loss": Entry(c.CriterionConfig, "fairseq.criterions.adaptive_loss:AdaptiveLoss"),
    "cross_entropy": Entry(c.CriterionConfig, "fairseq.criterions.cross_entropy:CrossEntropy"),
    "label_smoothed_cross_entropy": Entry(
        c.LabelSmoothingConfig, "fairseq.criterions.label_smoothed_cross_entropy:LabelSmoothedCrossEntropy"
    ),
}

register_criterion = class_registrar(CRITERIONS, "criterion")
