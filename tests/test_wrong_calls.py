"""Wrong calls of the public API, as a new user makes them: each is one line, before any work."""

import functools
import math

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

import perplexity
from perplexity import Monitor, Perplexity, VocabularyShard
from perplexity.data_checks import Text, check_data
from perplexity.errors import InputError
from perplexity.evaluation import ReadOptions, compare_models, read_documents, read_result
from perplexity.integrations import tracking
from perplexity.monitor.trend import theil_sen
from perplexity.probe import GenerationSettings, Questioner
from perplexity.probe.prober import probe

HIDDEN, WEIGHT, LABELS = torch.ones(4, 3), torch.ones(7, 3), torch.zeros(4, dtype=torch.int64)
NLL = torch.ones(3)
FP8 = torch.float8_e4m3fn
NESTED = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)

linear_loss = functools.partial(perplexity.linear_cross_entropy, HIDDEN, WEIGHT, LABELS)
log_probabilities = functools.partial(perplexity.token_log_probabilities, HIDDEN, WEIGHT, LABELS)
Head = perplexity.LinearCrossEntropyLoss


@functools.cache
def model_and_tokenizer():
    tokenizer = build_tokenizer(bos=True)
    return build_model(len(tokenizer)), tokenizer


def unread():
    """Documents that a call must not come to."""
    raise AssertionError("a document was read before the arguments were checked")
    yield


def evaluate(documents=None, **options):
    return perplexity.evaluate(
        *model_and_tokenizer(), unread() if documents is None else documents, **options
    )


def compared(**options):
    model, tokenizer = model_and_tokenizer()
    return compare_models(model, model, tokenizer, unread(), **options)


def probed(prompts=("the cat",), **options):
    return probe(*model_and_tokenizer(), prompts, **options)


def asked(texts=("the cat",), **options):
    return Questioner(*model_and_tokenizer(), template="{text}").ask(texts, **options)


def checked(valid=TEXTS, train=None, **options):
    return check_data(unread() if train is None else train, valid, **options)


def closed(folder):
    monitor = Monitor(path=folder / "history.jsonl")
    monitor.close()
    monitor.log(1, train_loss=1.0)


# The call and its line; a call with one parameter is given an empty folder.
CALLS = [
    (
        lambda: perplexity.linear_cross_entropy(HIDDEN.numpy(), WEIGHT, LABELS),
        "input: expected a tensor, got ndarray",
    ),
    (
        lambda: perplexity.linear_cross_entropy(HIDDEN.to(FP8), WEIGHT.to(FP8), LABELS),
        "input: expected float32, float64, bfloat16 or float16 (dequantise it first), "
        "got torch.float8",
    ),
    (
        lambda: perplexity.token_nll(HIDDEN, WEIGHT.to_sparse(), LABELS),
        "linear_weight: expected a dense tensor (to_dense(), or padding), got torch.sparse_coo",
    ),
    (
        lambda: perplexity.token_nll(NESTED, WEIGHT, LABELS),
        "input: expected a dense tensor (to_dense(), or padding), ",
    ),
    (lambda: linear_loss(shard="x"), "shard: expected a VocabularyShard or None, got str 'x'"),
    (
        lambda: linear_loss(shard=VocabularyShard(0, 7)),
        "shard: expected an initialised torch.distributed ",
    ),
    (
        lambda: linear_loss(reduction="maen"),
        "reduction: expected one of none, mean, sum, got 'maen'; did you mean 'mean'?",
    ),
    (
        lambda: linear_loss(backend=np.zeros(2)),
        "backend: expected one of triton, torch or None, got ndarray",
    ),
    (lambda: linear_loss(validate=1), "validate: expected True, False or None, got int 1"),
    (lambda: linear_loss(weight=[1.0] * 7), "weight: expected a tensor, got list"),
    (
        lambda: linear_loss(memory_limit="1GB"),
        "memory_limit: expected None or a positive number of bytes, got str '1GB'",
    ),
    (
        lambda: log_probabilities(with_entropy="yes"),
        "with_entropy: expected True or False, got str 'yes'",
    ),
    (
        lambda: perplexity.token_statistics(HIDDEN, WEIGHT, LABELS, with_confidence=None),
        "with_confidence: expected True or False, got NoneType",
    ),
    (
        lambda: perplexity.linear_kl_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT, softcap_q="30"),
        "softcap_q: expected None or a positive finite value, got str '30'",
    ),
    (
        lambda: perplexity.cross_entropy(HIDDEN, LABELS, "mean"),
        "weight: expected a tensor, got str",
    ),
    (lambda: VocabularyShard("0", 7), "start: expected a whole number, got str '0'"),
    (
        lambda: perplexity.CrossEntropyLoss(backend="trition"),
        "backend: expected one of triton, torch or None, got 'trition'; did you mean 'triton'?",
    ),
    (
        lambda: perplexity.CrossEntropyLoss(softcaps=3.0),
        "softcaps: expected a keyword of CrossEntropyLoss ",
    ),
    (lambda: Head(3.0, 7), "in_features: expected a whole number, at least 1, got float 3.0"),
    (lambda: Head(3, 7, dtype=torch.int64), "dtype: expected one of torch.float32, "),
    (lambda: Head(3, 7, device="gpu0"), "device: expected one that torch can use, got 'gpu0'"),
    (
        lambda: Head(3, 7, weight=torch.ones(7).long()),
        "weight: expected a floating dtype, got torch.int64",
    ),
    (
        lambda: Head(3, 7, shift="x"),
        "shift: expected False, True or a number of positions, 0 or more, got str 'x'",
    ),
    (
        lambda: Perplexity().update(NLL, bytes="5"),
        "bytes: expected a whole number, at least 0, got str '5'",
    ),
    (lambda: Perplexity().update(NLL, words=-5), "words: expected at least 0, got -5"),
    (
        lambda: Perplexity().update(NLL.to("meta"), mask=True),
        "token_nll: expected a tensor with values, got one on ",
    ),
    (
        lambda: Perplexity().update(NLL, target=LABELS[:3], ignore_index=1.5),
        "ignore_index: expected an integer or None, got float 1.5",
    ),
    (
        lambda: Perplexity().merge_state([{"nll": 1}]),
        "others: expected Perplexity metrics, got dict {'nll': 1}",
    ),
    (
        lambda: Perplexity().load_state_dict({"nll": 1.0, "tokens": 1.5, "bytes": 0, "words": 0}),
        "state: tokens: expected a whole number, at least 0, got float 1.5",
    ),
    (
        lambda: Monitor(vocabulary_size="50k"),
        "vocabulary_size: expected a whole number, at least 2, got str '50k'",
    ),
    (
        lambda: Monitor(total_steps=math.nan),
        "total_steps: expected a whole number, at least 1, got float nan",
    ),
    (
        lambda: Monitor(unit="bit"),
        "unit: expected one of nats, bits, perplexity, got 'bit'; did you mean 'bits'?",
    ),
    (
        lambda: Monitor(settings={"rise": 1}),
        "settings: expected monitor Settings or None, got dict {'rise': 1}",
    ),
    (
        lambda: Monitor(on_finding="print"),
        "on_finding: expected a function or None, got str 'print'",
    ),
    (
        lambda: Monitor().log(1, lr="1e-4"),
        "lr: expected a number or a tensor with one element, got str '1e-4'",
    ),
    (
        lambda: Monitor().log(1, train_loss=torch.ones(2)),
        "train_loss: expected a number or a tensor with one element, got Tensor of torch.float32",
    ),
    (closed, "log: expected a monitor whose file is open, got one after close()"),
    (
        lambda: Monitor().evaluate_every(lambda: 1.0, 10),
        "steps: expected a whole number, at least 1, got function",
    ),
    (
        lambda: evaluate(context_length=8.0),
        "context_length: expected a whole number, got float 8.0",
    ),
    (
        lambda: evaluate(batch_size="4"),
        "batch_size: expected a whole number, at least 1, got str '4'",
    ),
    (
        lambda: evaluate(context_length=8, stride=True),
        "stride: expected a whole number, got bool True",
    ),
    (lambda: evaluate({"a": "the cat"}), "documents: expected a sequence of them, got one dict"),
    (
        lambda: evaluate(score_special="no"),
        "score_special: expected True, False or None, got str 'no'",
    ),
    (lambda: evaluate(per_document=""), "per_document: expected a path, got an empty one"),
    (lambda: evaluate(journal=5), "journal: expected a path (str or Path), got int 5"),
    (
        lambda: evaluate(protocol="slidding"),
        "protocol: expected one of sliding, lm-eval, llama.cpp, got 'slidding'; did you mean ",
    ),
    (lambda: compared(progress=3), "progress: expected a function or None, got int 3"),
    (
        lambda: perplexity.compare({}, {}),
        "a: expected the JSON of an Evaluation, got one without loss, tokens, ",
    ),
    (
        lambda: perplexity.compare(Monitor().diagnose(), {}),
        "a: expected an Evaluation, its JSON or a file of it, got Diagnosis",
    ),
    (lambda: read_result(None), "path: expected a path (str or Path), got NoneType"),
    (lambda: read_documents("x.txt"), "paths: expected a sequence of them, got one str"),
    (lambda: ReadOptions(text_column=5), "text_column: expected a text (str), got int 5"),
    (lambda: checked(valid="the cat"), "valid: expected a sequence of texts, got one str"),
    (lambda: checked(valid=[Text(5, 5)]), "valid: expected strings or Texts of them, got int at 0"),
    (lambda: checked(workers=1.5), "workers: expected a whole number, at least 1, got float 1.5"),
    (
        lambda: checked(memory_limit="1GB"),
        "memory_limit: expected a whole number, at least 1, got str '1GB'",
    ),
    (
        lambda: checked(tokenizer="gpt2"),
        "tokenizer: expected a transformers tokenizer, a tokenizers.Tokenizer",
    ),
    (
        lambda: probed(settings={"samples": 1}),
        "settings: expected GenerationSettings or None, got dict {'samples': 1}",
    ),
    (
        lambda: probed(diagnosis={}),
        "diagnosis: expected the keys of Diagnosis.to_dict(), got none for verdict",
    ),
    (
        lambda: GenerationSettings(temperature="1"),
        "temperature: expected 0 (greedy) or 0.01 and more, got str '1'",
    ),
    (lambda: asked(batch_size=0), "batch_size: expected at least 1, got 0"),
    (
        lambda: list(asked(["the", "cat"], prompts=["a"])),
        "prompts: expected one prompt for each text, got none at 1",
    ),
    (
        lambda: tracking.TensorBoardTracker("runs"),
        "writer: expected a SummaryWriter, got str 'runs'",
    ),
    (
        lambda: tracking.scalars({"train_los": 1.0}),
        "log: expected measures of train_loss, val_loss, train_eval_loss, lr, grad_norm, tokens, "
        "got 'train_los'; did you mean 'train_loss'?",
    ),
]


@pytest.mark.parametrize(("call", "line"), CALLS, ids=[line[:40] for _, line in CALLS])
def test_a_wrong_call_is_one_line(call, line, tmp_path):
    with pytest.raises(InputError) as caught:
        call(*[tmp_path] * call.__code__.co_argcount)
    message = str(caught.value)
    assert message.startswith(line), message
    assert "\n" not in message and len(message) < 300


def metric_state(bytes) -> dict:
    metric = Perplexity()
    metric.update(NLL, bytes=bytes)
    return metric.state_dict()


@pytest.mark.parametrize(
    ("plain", "others", "use"),
    [
        (
            0,
            [np.int32(0), torch.tensor(0)],
            lambda value: linear_loss(ignore_index=value).isnan().item(),
        ),
        (
            0.5,
            [np.float32(0.5), torch.tensor(0.5)],
            lambda value: linear_loss(label_smoothing=value).item(),
        ),
        (1, [True, np.int64(1)], lambda value: linear_loss(shift=value).item()),
        (30.0, [30, np.float64(30)], lambda value: linear_loss(softcap=value).item()),
        (5, [np.int64(5), torch.tensor(5)], metric_state),
        (50, [np.int64(50), torch.tensor(50)], lambda value: Monitor(value).vocabulary_size),
        (2, [np.int16(2)], lambda value: repr(GenerationSettings(samples=value))),
    ],
    ids=[
        "ignore_index",
        "label_smoothing",
        "shift",
        "softcap",
        "bytes",
        "vocabulary_size",
        "samples",
    ],
)
def test_what_means_a_number_is_one(plain, others, use):
    for other in others:
        assert use(other) == use(plain), type(other)


def test_a_refused_merge_or_state_changes_nothing():
    metric = Perplexity()
    for call in (
        lambda: metric.merge_state([Perplexity(), "x"]),
        lambda: metric.load_state_dict({"nll": 2.0, "tokens": -1, "bytes": 0, "words": 0}),
    ):
        with pytest.raises(InputError):
            call()
    assert metric.state_dict() == Perplexity().state_dict()


def test_python_suggests_lazy_names():
    """``perplexity.evalute`` is answered from what ``dir`` lists."""
    assert set(perplexity.__all__) <= set(dir(perplexity))


def test_the_slopes_of_pairs_are_scipys():
    import scipy.stats

    generator = np.random.default_rng(0)
    for case in range(60):
        count = generator.integers(5, 64)
        x = np.log2(1 + generator.permutation(2 * count)[:count] // (1 + case % 2))
        y = [generator.normal(size=count), generator.integers(0, 4, count) / 4, np.ones(count)][
            case % 3
        ]
        expected = scipy.stats.theilslopes(y, x, 0.95)
        wanted = expected.slope, expected.low_slope, expected.high_slope
        # The same pairs are chosen from the same quotients: equal to the bit.
        np.testing.assert_array_equal(theil_sen(x, y), wanted)
