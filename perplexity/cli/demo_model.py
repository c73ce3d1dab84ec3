"""Text, tokenizer and model of ``ppl demo``: CPython's documentation and a small Llama."""

from __future__ import annotations

from collections.abc import Iterable

from ..data_checks import Text
from ..data_checks.index import Index
from ..data_checks.leakage import scan_texts, without_leaks, without_quotations
from ..data_checks.splits import goes_to_validation
from ..data_checks.texts import cut

VOCABULARY, CONTEXT = 2048, 256
VALIDATION_SHARE = 0.05


def corpus() -> dict[str, str]:
    """Return the text of each topic of CPython's documentation, as this interpreter ships it."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def split(documents: dict[str, str]) -> tuple[list[Text], list[Text], int, int]:
    """Split documents into training and validation by hash, without overlap between the two.

    Topics quote each other, so a split by document alone leaks. Training paragraphs that share an
    n-gram with validation are dropped.

    Returns:
        Training texts, validation texts, the number of paragraphs dropped from training, and the
        number of validation's n-grams that remain in training.
    """
    training, validation = [], []
    for name, text in documents.items():
        if goes_to_validation(text, VALIDATION_SHARE):
            validation.append(Text(name, text, "validation"))
        else:
            training.append(Text(name, text, "train"))
    index = Index(validation)
    kept = list(without_quotations(without_leaks(lambda: training, index), index))
    before, after = (sum(1 for _ in cut(texts, "paragraph")) for texts in (training, kept))
    return kept, validation, before - after, int(scan_texts(index, kept).seen.sum())


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY):
    """Train a byte-level BPE tokenizer of ``vocabulary`` entries with a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def build_model():
    """Build an untrained Llama of 2.2 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)
