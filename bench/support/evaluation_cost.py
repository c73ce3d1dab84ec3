"""Cost of an evaluation: ``python evaluation_cost.py PROVIDER MODEL [WINDOWS]``.

It prints bytes, seconds, loss, tokens and the seconds of what is done once. The text is the
standard library's sources, in windows of 1,024 tokens. A run on two windows and a run on so many
more are timed: seconds and tokens are the difference, without what a run does once, such as a check
of the model; this is the last figure. Bytes are the rise of the high-water mark of resident memory
over the longer run. Before both a short text is scored, which loads libraries and starts threads.
"""

import sys
import time

import torch
from corpus import sources
from peak_memory import high_water, reset_high_water, small_pages

CONTEXT = 1024
SHORT = 2  # windows of the shorter run
# A vocabulary that is large beside its body, and a body that is large beside its head.
MODELS = {
    "large-head": dict(vocab_size=128_256, hidden_size=256, num_hidden_layers=2),
    "large-body": dict(vocab_size=4096, hidden_size=512, num_hidden_layers=12),
}


def build(name: str):
    """Return a model and its tokenizer, whose tokens are fewer than the head's columns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(sources()[:100], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    torch.manual_seed(0)
    sizes = MODELS[name]
    config = LlamaConfig(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def text_of(tokenizer, windows: int) -> str:
    """Return text of about ``windows`` × 1,024 tokens."""
    text = "\n".join(sources()[100:200])
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text[: offsets[windows * CONTEXT - 1][1]]


def window_ids(tokenizer, text: str) -> list[torch.Tensor]:
    """Return the ids of disjoint windows, each with the token before it: 1,025, of the last less."""
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]])
    return [ids[at : at + CONTEXT + 1] for at in range(0, len(ids) - 1, CONTEXT)]


def ours(model, tokenizer, text: str) -> tuple[float, int]:
    from perplexity import evaluate

    evaluation = evaluate(model, tokenizer, [text], protocol="lm-eval", context_length=CONTEXT)
    return evaluation.loss, evaluation.tokens


@torch.no_grad()
def alone(model, tokenizer, text: str) -> tuple[float, int]:
    """Return the mean of ``token_nll`` over the body's hidden states, and nothing else."""
    from perplexity import token_nll

    total, tokens = 0.0, 0
    *full, last = window_ids(tokenizer, text)
    for batch in [full[at : at + 2] for at in range(0, len(full), 2)] + [[last]]:
        rows = torch.stack(batch)
        hidden = model.model(rows[:, :-1]).last_hidden_state
        nll = token_nll(hidden, model.lm_head.weight, rows[:, 1:])
        total, tokens = total + nll.double().sum().item(), tokens + nll.numel()
    return total / tokens, tokens


@torch.inference_mode()
def plain(model, tokenizer, text: str) -> tuple[float, int]:
    """Return the mean of ``model(input_ids, labels=input_ids).loss`` over windows."""
    losses = [
        model(input_ids=row[None, :-1], labels=row[None, :-1]).loss.item()
        for row in window_ids(tokenizer, text)
    ]
    return sum(losses) / len(losses), len(losses) * (CONTEXT - 1)


@torch.no_grad()
def guide(model, tokenizer, text: str) -> tuple[float, int]:
    """Return the mean over windows as Hugging Face's guide to perplexity finds it, stride 1,024."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    length, end_before, total, tokens = ids.shape[1], 0, 0.0, 0
    for begin in range(0, length, CONTEXT):
        end = min(begin + CONTEXT, length)
        window = ids[:, begin:end]
        target = window.clone()
        target[:, : -(end - end_before)] = -100
        valid = int((target != -100).sum()) - target.shape[0]
        if valid:
            total += model(window, labels=target).loss.item() * valid
        tokens, end_before = tokens + valid, end
    return total / tokens, tokens


def rolling(batch_size: int):
    """Return lm-evaluation-harness's rolling log-likelihood with this batch size."""

    def run(model, tokenizer, text: str) -> tuple[float, int]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        scorer = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=CONTEXT
        )
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        total = -scorer.loglikelihood_rolling([request], disable_tqdm=True)[0]
        tokens = len(tokenizer(text, verbose=False)["input_ids"])
        return total / tokens, tokens

    return run


PROVIDERS = {
    "ours": ours,
    "alone": alone,
    "plain": plain,
    "guide": guide,
    "lm-eval-1": rolling(1),
    "lm-eval-2": rolling(2),
}


def measure(provider: str, name: str, windows: int) -> tuple[int, float, float, int, float]:
    model, tokenizer = build(name)
    run = PROVIDERS[provider]
    run(model, tokenizer, text_of(tokenizer, 1))
    seconds, scored, loss = [], [], 0.0
    before = 0
    for count in (SHORT, SHORT + windows):
        text = text_of(tokenizer, count)
        reset_high_water()
        before = high_water()
        start = time.perf_counter()
        loss, tokens = run(model, tokenizer, text)
        seconds.append(time.perf_counter() - start)
        scored.append(tokens)
    more_seconds, more_tokens = seconds[1] - seconds[0], scored[1] - scored[0]
    fixed = seconds[0] - more_seconds * scored[0] / more_tokens
    return high_water() - before, more_seconds, loss, more_tokens, fixed


if __name__ == "__main__":
    small_pages()
    print(*measure(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 4))
