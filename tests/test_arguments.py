"""Every bad argument is one error that names it, what was expected and what came."""

import pytest
import torch

import perplexity

HIDDEN, WEIGHT, LABELS = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)
GOOD = (HIDDEN, WEIGHT, LABELS)

SHARED = [  # of linear_cross_entropy, token_nll, token_statistics and token_log_probabilities alike
    (
        (HIDDEN, WEIGHT, torch.tensor([0, 1, 7, 2])),
        {},
        IndexError,
        ["target", "[0, 7)", "7 at position 2"],
    ),
    ((HIDDEN, WEIGHT, torch.tensor([0, -1, 3, 2])), {}, IndexError, ["target", "-1 at position 1"]),
    (
        (HIDDEN.view(2, 2, 3), WEIGHT, torch.tensor([[0, 9], [3, 2]])),
        {},
        IndexError,
        ["9 at position (0, 1)"],
    ),
    (
        (HIDDEN.view(2, 2, 3), WEIGHT, torch.tensor([[0, 9], [3, 2]])),
        {"shift": 1},
        IndexError,
        ["9 at position (0, 1)"],
    ),
    ((HIDDEN, WEIGHT, LABELS.bool()), {}, TypeError, ["target", "int64", "bool"]),
    ((HIDDEN, WEIGHT, LABELS[:3]), {}, ValueError, ["target", "(4,)", "(3,)"]),
    ((HIDDEN, WEIGHT, [0, 0, 0, 0]), {}, TypeError, ["target", "a tensor", "list"]),
    ((HIDDEN, WEIGHT, LABELS.to("meta")), {}, ValueError, ["target", "cpu", "meta"]),
    ((HIDDEN.tolist(), WEIGHT, LABELS), {}, TypeError, ["input", "a tensor", "list"]),
    ((HIDDEN, None, LABELS), {}, TypeError, ["linear_weight", "a tensor", "NoneType"]),
    ((HIDDEN, WEIGHT[:, :2], LABELS), {}, ValueError, ["linear_weight", "[V, 3]", "(7, 2)"]),
    ((HIDDEN, WEIGHT[0], LABELS), {}, ValueError, ["linear_weight", "[V, D]", "(3,)"]),
    ((HIDDEN, WEIGHT[:0], LABELS), {}, ValueError, ["linear_weight", "at least one row"]),
    (
        (HIDDEN[:, :0], WEIGHT[:, :0], LABELS),
        {},
        ValueError,
        ["input", "hidden size of 1 or more", "(4, 0)"],
    ),
    ((HIDDEN[0, 0], WEIGHT, LABELS), {}, ValueError, ["input", "[..., D]", "scalar"]),
    ((HIDDEN, WEIGHT.half(), LABELS), {}, TypeError, ["linear_weight", "float16", "float32"]),
    (
        (HIDDEN.half(), WEIGHT.bfloat16(), LABELS),
        {},
        TypeError,
        ["linear_weight", "float16", "bfloat16"],
    ),
    ((HIDDEN.long(), WEIGHT, LABELS), {}, TypeError, ["input", "floating", "int64"]),
    (GOOD, {"linear_bias": torch.zeros(6)}, ValueError, ["linear_bias", "(7,)", "(6,)"]),
    (GOOD, {"linear_bias": 0.5}, TypeError, ["linear_bias", "a tensor", "float"]),
    (GOOD, {"ignore_index": 1.5}, TypeError, ["ignore_index", "integer", "1.5"]),
    (GOOD, {"ignore_index": True}, TypeError, ["ignore_index", "integer", "True"]),
    (GOOD, {"ignore_index": 2**64}, ValueError, ["ignore_index", "64 bits"]),
    (GOOD, {"softcap": 0.0}, ValueError, ["softcap", "positive", "0.0"]),
    (GOOD, {"softcap": float("inf")}, ValueError, ["softcap", "finite", "inf"]),
    (GOOD, {"softcap": "30"}, TypeError, ["softcap", "positive", "str '30'"]),
    (GOOD, {"logit_scale": float("nan")}, ValueError, ["logit_scale", "finite", "nan"]),
    (GOOD, {"logit_scale": torch.ones(())}, TypeError, ["logit_scale", "finite number", "Tensor"]),
    (GOOD, {"logit_scale": None}, TypeError, ["logit_scale", "finite number", "NoneType"]),
    (GOOD, {"shift": -1}, ValueError, ["shift", "0 or more", "-1"]),
    (GOOD, {"shift": 1.0}, ValueError, ["shift", "number of positions", "1.0"]),
    ((HIDDEN[0], WEIGHT, LABELS[0]), {"shift": 1}, ValueError, ["shift", "without dimensions"]),
    (GOOD, {"memory_limit": 0}, ValueError, ["memory_limit", "positive", "0"]),
    (GOOD, {"memory_limit": 1e6}, TypeError, ["memory_limit", "bytes", "1000000.0"]),
    (GOOD, {"validate": "yes"}, TypeError, ["validate", "True, False or None", "'yes'"]),
    (GOOD, {"backend": "cuda"}, ValueError, ["backend", "triton, torch", "'cuda'"]),
    (
        (HIDDEN.double(), WEIGHT.double(), LABELS),
        {"backend": "triton"},
        TypeError,
        ["input", "float32", "float64"],
    ),
]
LOSS = [
    (GOOD, {"weight": torch.zeros(6)}, ValueError, ["weight", "(7,)", "(6,)"]),
    (GOOD, {"weight": torch.zeros(7).long()}, TypeError, ["weight", "floating"]),
    (GOOD, {"weight": torch.zeros(7, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
    (
        GOOD,
        {"weight": torch.zeros(7, requires_grad=True)},
        ValueError,
        ["weight", "without gradient"],
    ),
    (GOOD, {"reduction": "avg"}, ValueError, ["reduction", "none, mean, sum", "'avg'"]),
    (GOOD, {"reduction": None}, ValueError, ["reduction", "none, mean, sum", "None"]),
    (GOOD, {"label_smoothing": 1.5}, ValueError, ["label_smoothing", "[0, 1]", "1.5"]),
    (GOOD, {"label_smoothing": True}, TypeError, ["label_smoothing", "[0, 1]", "bool True"]),
    (GOOD, {"z_loss": -1.0}, ValueError, ["z_loss", "0 or more", "-1.0"]),
    (GOOD, {"options": object()}, ValueError, ["options", "memory_limit"]),
    (GOOD, {"round_logits": None}, TypeError, ["round_logits", "True or False", "None"]),
    (GOOD, {"round_logits": 1}, TypeError, ["round_logits", "True or False", "1"]),
    (
        (HIDDEN, WEIGHT, LABELS.float()),
        {},
        TypeError,
        ["target", "(4, 7) of class probabilities", "int64", "(4,)"],
    ),
    (
        (HIDDEN, WEIGHT, torch.rand(4, 6)),
        {},
        ValueError,
        ["target", "(4, 7) of class probabilities", "(4, 6)"],
    ),
    (
        (HIDDEN, WEIGHT, torch.rand(4, 7)),
        {"shift": 1},
        ValueError,
        ["shift", "class probabilities"],
    ),
    (
        (HIDDEN, WEIGHT, torch.rand(4, 7)),
        {"ignore_index": 3},
        ValueError,
        ["ignore_index", "class probabilities", "3"],
    ),
    (
        (HIDDEN, WEIGHT, torch.rand(4, 7)),
        {"backend": "triton"},
        TypeError,
        ["target", "'torch' takes both"],
    ),
]


def complains(function, arguments, keywords, error, words):
    with pytest.raises(error) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "function",
    [
        perplexity.linear_cross_entropy,
        perplexity.token_nll,
        perplexity.token_statistics,
        perplexity.token_log_probabilities,
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize(("arguments", "keywords", "error", "words"), SHARED)
def test_of_every_function_of_hidden_states(function, arguments, keywords, error, words):
    complains(function, arguments, keywords, error, words)


@pytest.mark.parametrize(("arguments", "keywords", "error", "words"), LOSS)
def test_of_the_loss(arguments, keywords, error, words):
    complains(perplexity.linear_cross_entropy, arguments, keywords, error, words)


@pytest.mark.parametrize(
    "function", [perplexity.token_statistics, perplexity.token_log_probabilities]
)
def test_statistics_take_indices(function):
    complains(
        function, (HIDDEN, WEIGHT, torch.rand(4, 7)), {}, TypeError, ["target", "class indices"]
    )


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        (
            (WEIGHT, torch.tensor([0, 3, 1, 1, 0, 0, 0])),
            {},
            IndexError,
            ["target", "[0, 3)", "3 at position 1"],
        ),
        ((HIDDEN, LABELS[:3]), {}, ValueError, ["target", "(4,)", "(3,)"]),
        (
            (HIDDEN[0, 0], LABELS[0]),
            {},
            ValueError,
            ["input", "[C], [N, C] or [N, C, d1, ...]", "scalar"],
        ),
        ((HIDDEN[:, :0], LABELS), {}, ValueError, ["input", "at least one class", "(4, 0)"]),
        ((HIDDEN.long(), LABELS), {}, TypeError, ["input", "floating", "int64"]),
        (([[0.0]], LABELS), {}, TypeError, ["input", "a tensor", "list"]),
        ((HIDDEN, LABELS, None, "yes"), {}, TypeError, ["size_average", "True or False", "'yes'"]),
        ((HIDDEN, LABELS), {"reduce": 0}, TypeError, ["reduce", "True or False", "0"]),
        ((torch.zeros(2, 3, 4), LABELS), {}, ValueError, ["target", "(2, 4)", "(4,)"]),
        ((HIDDEN, LABELS), {"weight": torch.zeros(4)}, ValueError, ["weight", "(3,)", "(4,)"]),
        (
            (HIDDEN.double(), LABELS),
            {"backend": "triton"},
            TypeError,
            ["input", "float32", "float64"],
        ),
        (
            (HIDDEN, torch.rand(4, 3)),
            {"backend": "triton"},
            TypeError,
            ["target", "'torch' takes both"],
        ),
        (
            (HIDDEN, LABELS),
            {"memory_limit": "1 GB"},
            TypeError,
            ["memory_limit", "bytes", "'1 GB'"],
        ),
    ],
)
def test_of_cross_entropy(arguments, keywords, error, words):
    complains(perplexity.cross_entropy, arguments, keywords, error, words)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT[:6]), {}, ValueError, ["weight_q", "7 rows", "6"]),
        ((HIDDEN, WEIGHT, HIDDEN[:3], WEIGHT), {}, ValueError, ["input_q", "(4, 'D')", "(3, 3)"]),
        (
            (HIDDEN, WEIGHT, HIDDEN, WEIGHT[:, :2]),
            {},
            ValueError,
            ["weight_q", "[V, 3]", "input_q", "(7, 2)"],
        ),
        (
            (HIDDEN, WEIGHT.half(), HIDDEN, WEIGHT),
            {},
            TypeError,
            ["weight_p", "float32", "input_p", "float16"],
        ),
        (
            (HIDDEN, WEIGHT, HIDDEN, WEIGHT),
            {"bias_q": torch.zeros(3)},
            ValueError,
            ["bias_q", "(7,)", "(3,)"],
        ),
        (
            (HIDDEN, WEIGHT, HIDDEN, WEIGHT),
            {"softcap_p": -1.0},
            ValueError,
            ["softcap", "positive", "-1.0"],
        ),
        (
            (HIDDEN, WEIGHT[:0], HIDDEN, WEIGHT[:0]),
            {},
            ValueError,
            ["weight_p", "at least one row"],
        ),
        ((HIDDEN, WEIGHT, None, WEIGHT), {}, TypeError, ["input_q", "a tensor", "NoneType"]),
        *(
            (
                heads,
                {"backend": "triton"},
                TypeError,
                ["backend", "'triton' takes", "got torch.float64"],
            )
            for heads in (
                (HIDDEN.double(), WEIGHT.double(), HIDDEN, WEIGHT),
                (HIDDEN, WEIGHT, HIDDEN.double(), WEIGHT.double()),
            )
        ),
    ],
)
def test_of_the_divergence(arguments, keywords, error, words):
    complains(perplexity.linear_kl_divergence, arguments, keywords, error, words)


@pytest.mark.parametrize(
    ("module", "arguments", "keywords", "words"),
    [
        (perplexity.CrossEntropyLoss, (), {"reduction": "avg"}, ["reduction", "'avg'"]),
        (perplexity.CrossEntropyLoss, (None, 1), {}, ["size_average"]),
        (
            perplexity.LinearCrossEntropyLoss,
            (3, 7),
            {"out_features": 2},
            ["out_features", "tuple of sizes"],
        ),
        (
            perplexity.LinearCrossEntropyLoss,
            (3, 7),
            {"out_features": (2, 0)},
            ["out_features", "at least 1"],
        ),
        (perplexity.LinearCrossEntropyLoss, (3, 7), {"options": 1}, ["options", "memory_limit"]),
        (
            perplexity.LinearCrossEntropyLoss,
            (3, 7),
            {"weight": torch.zeros(6)},
            ["weight", "(7,)", "(6,)"],
        ),
        (perplexity.LinearCrossEntropyLoss, (3, 7), {"softcap": -1.0}, ["softcap", "-1.0"]),
    ],
)
def test_modules_complain_when_they_are_made(module, arguments, keywords, words):
    complains(module, arguments, keywords, ValueError, words)


def test_a_module_refuses_to_round_a_little():
    complains(
        perplexity.LinearCrossEntropyLoss,
        (3, 7),
        {"round_logits": "x"},
        TypeError,
        ["round_logits", "'x'"],
    )


def test_a_module_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="no_such_option"):
        perplexity.CrossEntropyLoss(no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"):
        perplexity.LinearCrossEntropyLoss(3, 7, no_such_option=1)


def test_the_environment_chooses_a_backend(monkeypatch):
    monkeypatch.setenv("PERPLEXITY_BACKEND", "nonsense")
    with pytest.raises(
        ValueError,
        match="PERPLEXITY_BACKEND: expected one of triton, torch or None, got 'nonsense'",
    ):
        perplexity.linear_cross_entropy(*GOOD)
    perplexity.linear_cross_entropy(*GOOD, backend="torch")  # an argument overrides it
