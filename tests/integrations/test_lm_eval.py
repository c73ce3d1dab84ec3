"""lm-evaluation-harness with and without logits: the same answers to every request."""

import itertools
import json
import math

import pytest
import torch
from tiny_models import build_model, build_tokenizer

from perplexity.errors import InputError

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from perplexity.integrations.lm_eval import FusedHFLM  # noqa: E402

CHOICES = [" a", " the", " cat", " mat", " dog by the door"]


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


LIKELIHOODS = requests(
    "loglikelihood",
    *(("the cat sat on the", choice) for choice in CHOICES),
    ("", "the cat"),
    ("the dog " * 60, "lay by the door"),  # longer than the context
    ("the cat sat", " on the mat and the dog lay by the door"),
    ("the cat sat", " on the mat and the dog lay by the door"),
)
# No text that repeats itself: of windows with equal tokens, one of which scores fewer, the harness
# takes the logits of the wrong positions where a batch holds both (0.4.13).
PROSE = " ".join(
    f"the {a} sat by the {b}" for a, b in itertools.permutations(("cat", "dog", "mat"), 2)
)
ROLLING = requests("loglikelihood_rolling", (PROSE + PROSE[5:],), ("dog",), ("a" * 20,))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos=True)


@pytest.fixture(scope="module", params=["plain", "capped"])
def model(request, tokenizer):
    if request.param == "plain":
        return build_model(len(tokenizer))
    from transformers import Gemma2Config, Gemma2ForCausalLM  # a softcap, and tied weights

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        final_logit_softcapping=5.0,
    )
    return Gemma2ForCausalLM(config).eval()


def both(model, tokenizer, **options):
    return [kind(pretrained=model, tokenizer=tokenizer, **options) for kind in (HFLM, FusedHFLM)]


@pytest.mark.parametrize(("batch", "bos"), [(1, False), (3, False), (3, True), ("auto", True)])
def test_equal_answers(model, tokenizer, batch, bos):
    options = dict(batch_size=batch, max_batch_size=4, add_bos_token=bos, max_length=32)
    theirs, ours = both(model, tokenizer, **options)
    expected, got = (each.loglikelihood(LIKELIHOODS, disable_tqdm=True) for each in (theirs, ours))
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)
    sizes = [each.loglikelihood_rolling(ROLLING, disable_tqdm=True) for each in (theirs, ours)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)


def test_greedy_continuations_are_found(model, tokenizer):
    _, ours = both(model, tokenizer)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax().item()
    context = ids[0].tolist()
    (_, first), (_, other) = ours._loglikelihood_tokens(
        [(None, context, [best]), (None, context, [(best + 1) % len(tokenizer)])], disable_tqdm=True
    )
    assert first and not other


def test_a_task(model, tokenizer, tmp_path):
    """A task of multiple choices and a rolling one, by the harness's own evaluation."""
    docs = [
        {"q": "the cat sat on the", "a": n % 3, "text": "the dog lay. " * n} for n in range(1, 7)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
    }
    choices = base | {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": [" mat", " dog", " cat sat"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = base | {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    # Without the harness's own tasks, whose thousands of files take it ten seconds to list.
    own = TaskManager(include_defaults=False)
    results = [
        lm_eval.simple_evaluate(
            each, tasks=[choices, rolling], bootstrap_iters=0, task_manager=own
        )["results"]
        for each in both(model, tokenizer, batch_size=2, max_length=32)
    ]
    for task in ("choices", "rolling"):
        numbers = [
            {name: value for name, value in each[task].items() if isinstance(value, float)}
            for each in results
        ]
        assert numbers[0] and numbers[1] == pytest.approx(numbers[0], rel=1e-5)
        assert all(map(math.isfinite, numbers[1].values()))


def test_no_tensor_of_tokens_by_vocabulary(model, tokenizer, monkeypatch):
    """The model's own forward with logits is called to verify the head, and never again."""
    _, ours = both(model, tokenizer, batch_size=4, max_length=32)
    monkeypatch.setattr(ours.network, "logits", None)
    monkeypatch.setattr(model, "forward", None)
    ours.loglikelihood(LIKELIHOODS, disable_tqdm=True)
    ours.loglikelihood_rolling(ROLLING, disable_tqdm=True)


def test_other_models_are_refused(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(
        InputError, match="fused-hf: expected a causal model, got one of kind seq2s"
    ):
        FusedHFLM(T5ForConditionalGeneration(T5Config(**sizes)), tokenizer=tokenizer)
    with pytest.raises(InputError, match="backend"):
        FusedHFLM("no-model", loss_backend="cuda")
