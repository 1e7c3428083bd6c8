"""Tasks by name. Add your line here."""

from fairseq.registry import Entry, registrar
from fairseq.tasks.configs import LanguageModelingConfig

TASKS: dict[str, Entry] = {
    "language_modeling": Entry(LanguageModelingConfig, "fairseq.tasks.language_modeling:LanguageModelingTask"),
}

register_task = registrar(TASKS, "task")
