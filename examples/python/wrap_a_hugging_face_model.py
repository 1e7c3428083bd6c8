"""Give a Hugging Face model a datastore: KNNSaver saves one, KNNWrapper mixes it into every prediction.

The model is a random GPT-2 of two layers, so the program needs no download; it knows nothing, and the store knows the
text. Replace it by ``AutoModelForCausalLM.from_pretrained(...)``. Needs ``pip install 'fairseq-memory[hf]'``.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fairseq.hf import KNNSaver, KNNWrapper, evaluate, save_datastore, windows_of

torch.manual_seed(0)
config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()
text = torch.randint(0, 100, (50,)).repeat(40)  # token ids from the model's tokenizer
windows = windows_of(text, size=64, stride=32)

with tempfile.TemporaryDirectory() as folder:
    with KNNSaver(dstore_dir=folder)(model) as saver:
        save_datastore(model, windows_of(text, size=64), saver)
    print(f"the model alone: perplexity {evaluate(model, windows).perplexity:.1f}")
    with KNNWrapper(dstore_dir=folder, k=16, lmbda=0.25)(model) as knn:
        print(f"with its store:  perplexity {evaluate(model, windows, knn).perplexity:.1f}")
        print(model.generate(text[None, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())
