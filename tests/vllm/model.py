"""Makes a tiny Llama with random weights and a byte-level tokenizer, from nothing: model.py DIRECTORY"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

directory = sys.argv[1]

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
# Every byte is a token, so any text can be read and any answer be written; the sample adds some merges.
sample = ["The prefill server computes the prompt, the decode server writes the answer. "] * 50
specials = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(
    sample, trainers.BpeTrainer(vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>", model_max_length=4096
)
tokenizer.chat_template = (
    "{{ bos_token }}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
tokenizer.save_pretrained(directory)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    tie_word_embeddings=False,
    # Large, so that the text depends visibly on every token before it.
    initializer_range=0.3,
)
LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
