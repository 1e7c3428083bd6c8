"""Three facts nobody knows, answered from memory: demo.py MODEL

MODEL is the folder of any decoder that takes memories, with its tokenizer. Prints the answers without memory and with
2, 5 and 10 memories for each query of each head, and what of the text the last answers read.
"""

from __future__ import annotations

import sys

TEXT = (
    "The password of the Veltara castle is marigold. The queen of Omberly has a dog named Biscuit. The ship of captain "
    "Varnhem is painted purple. The castle stands on a hill, the harbour is deep, and winters are long. Nobody has "
    "ever counted the windows of the castle, and the garden behind it is closed to visitors until May."
)
QUESTIONS = (
    ("What is the password of the Veltara castle?", "The password of the Veltara castle is", "marigold"),
    ("What is the name of the dog of the queen of Omberly?", "The queen of Omberly has a dog named", "Biscuit"),
    ("What colour is the ship of captain Varnhem?", "The ship of captain Varnhem is painted", "purple"),
)


def main(words: list[str]) -> None:
    """Ask all questions with several numbers of memories."""
    if len(words) != 1:
        sys.exit("usage: demo.py MODEL")
    from experiments import greedy, is_correct, load_model

    from fairseq.hf.attention.wrapper import ExtendedMind

    model, tokenizer = load_model({"model": words[0]})
    prompts = [f"Question: {question}\nAnswer: {stem}" for question, stem, _ in QUESTIONS]
    with ExtendedMind(model, TEXT, tokenizer=tokenizer) as mind:
        for topk in (0, 2, 5, 10):
            answers = greedy(model, tokenizer, prompts, 7, topk=topk, output_retrieved_memory_idx=topk > 0)
            right = sum(is_correct(answer, said) for (_, _, answer), said in zip(QUESTIONS, answers))
            sys.stdout.write(f"topk {topk}: {right} of {len(QUESTIONS)} right: {[said.strip() for said in answers]}\n")
        for row, (question, _, _) in enumerate(QUESTIONS):
            read = ", ".join(f"{c.text.strip()!r} {c.weight:.0%}" for c in mind.citations(top=2, row=row) if c.text)
            sys.stdout.write(f"{question} read {read}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
