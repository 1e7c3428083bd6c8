"""Tasks by name. Add your line here."""

from fairseq.config.plugins import class_registrar
from fairseq.fairseq_names import lazy
from fairseq.registry import Entry
from fairseq.tasks.configs import GraphLanguageModelingConfig, LanguageModelingConfig, TranslationConfig

TASKS: dict[str, Entry] = {
    "language_modeling": Entry(LanguageModelingConfig, "fairseq.tasks.language_modeling:LanguageModelingTask"),
    "graph_language_modeling": Entry(
        GraphLanguageModelingConfig, "fairseq.tasks.graph_language_modeling:GraphLanguageModelingTask"
    ),
    "translation": Entry(TranslationConfig, "fairseq.tasks.translation:TranslationTask"),
}

register_task = class_registrar(TASKS, "task", "fairseq.compat.tasks:entry")
__getattr__, __dir__ = lazy(__name__)
