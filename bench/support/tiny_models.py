"""Tiny Llama and its tokenizer."""

import torch

TEXTS = [
    "the cat sat on the mat and the dog lay by the door",
    "a loss of three nats is a choice among twenty",
    "caf\u00e9, na\u00efve, \u4f60\u597d: bytes are not characters",
]


def build_tokenizer(bos: bool, eos: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"] if eos else ["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    special = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_small_model(folder):
    """Save a tiny Llama with its tokenizer into a folder."""
    tokenizer = build_tokenizer(bos=True)
    build_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_model(vocabulary: int, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval()
