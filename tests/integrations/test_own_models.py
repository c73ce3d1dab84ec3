"""A user's own PreTrainedModels under the fused loss: equal to their own loss, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from perplexity.errors import InputError
from perplexity.integrations.transformers import use_fused_loss

transformers = pytest.importorskip("transformers")
VOCABULARY, SIZE, PAD = 40, 16, 30


class Config(transformers.PretrainedConfig):
    model_type = "own"
    hidden_size, vocab_size = SIZE, VOCABULARY


class Body(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.recurrence = nn.GRU(SIZE, SIZE, batch_first=True)
        self.post_init()

    def _init_weights(self, module):
        """Keep torch's."""

    def forward(self, input_ids):  # no keywords, a tuple
        return (3 * self.recurrence(self.embedding(input_ids))[0],)


class Model(transformers.PreTrainedModel):
    config_class, base_model_prefix = Config, "body"

    def __init__(self, config):
        super().__init__(config)
        self.body, self.lm_head = Body(config), nn.Linear(SIZE, VOCABULARY, bias=False)
        self.post_init()

    _init_weights = Body._init_weights

    def get_output_embeddings(self):
        return self.lm_head

    def logits_of(self, hidden):
        return self.lm_head(hidden)

    def loss_of(self, logits, labels):
        return mean_loss(logits, labels)

    def outputs_of(self, loss, logits):
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    def forward(self, input_ids, labels=None):
        logits = self.logits_of(self.body(input_ids)[0])
        return self.outputs_of(None if labels is None else self.loss_of(logits, labels), logits)


def mean_loss(logits, labels, **given):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **given)


def own(**methods):
    torch.manual_seed(0)
    return type("Own", (Model,), methods)(Config(pad_token_id=PAD))


def halves(self, hidden):
    return torch.cat([self.lm_head(hidden[:, :4]), self.lm_head(hidden[:, 4:])], 1)


def dropped(self, hidden):
    return self.lm_head(F.dropout(hidden, 0.5, self.training))


def as_tuple(self, loss, logits):
    return (logits,) if loss is None else (loss, logits)


def as_dict(self, loss, logits):
    return dict(logits=logits) if loss is None else dict(loss=loss, logits=logits)


def loss_of(output):
    return output[0] if isinstance(output, tuple) else output["loss"]


def loss_and_gradients(model, ids, labels):
    torch.manual_seed(1)
    model.zero_grad()
    loss = loss_of(model(input_ids=ids, labels=labels))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


EQUAL = {
    "tuple": dict(outputs_of=as_tuple),
    "dictionary": dict(outputs_of=as_dict),
    "dropout between body and head": dict(logits_of=dropped),
    "a head called by parts": dict(logits_of=halves),
    "a head called on other axes": dict(
        logits_of=lambda self, h: self.lm_head(h.transpose(0, 1)).transpose(0, 1)
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("methods", EQUAL.values(), ids=EQUAL)
def test_equal_to_their_own_loss(methods, training):
    model = own(**methods).train(training)
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, 3] = labels[1, :5] = -100
    expected, gradients = loss_and_gradients(model, ids, labels)
    kind = type(model(input_ids=ids, labels=labels))
    with use_fused_loss(model):
        loss, found = loss_and_gradients(model, ids, labels)
        assert issubclass(type(model(input_ids=ids, labels=labels)), tuple) == (kind is tuple)
    assert model.training is training
    # Float32 sums in another order: 1e-6 of the loss, 1e-5 of a gradient.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def of_sequences(self, logits, labels):
    """Return the mean of the sequences' means, which counts a short one's tokens more."""
    return torch.stack(
        [mean_loss(one[None], two[None]) for one, two in zip(logits, labels, strict=True)]
    ).mean()


def without(token):
    def ignoring(self, logits, labels):
        return mean_loss(logits, labels.masked_fill(labels == token, -100))

    return ignoring


REFUSED = {
    "a mean of sequences' means": (dict(loss_of=of_sequences), "the mean loss of next tokens, "),
    "padding's id left out": (dict(loss_of=without(PAD)), "the mean loss of next tokens, "),
    "id 0 left out": (dict(loss_of=without(0)), "the mean loss of next tokens, "),
    "a factor on the loss in training": (
        dict(
            loss_of=lambda self, logits, labels: (
                mean_loss(logits, labels) * (1.3 if self.training else 1.0)
            )
        ),
        "the mean loss of next tokens in training",
    ),
    "a factor on the logits in training": (
        dict(logits_of=lambda self, hidden: self.lm_head(hidden) * (2 if self.training else 1)),
        "the mean loss of next tokens in training",
    ),
    "dropout of the logits": (
        dict(logits_of=lambda self, hidden: F.dropout(self.lm_head(hidden), 0.1, self.training)),
        "the mean loss of next tokens in training",
    ),
    "no loss": (
        dict(forward=lambda self, input_ids, labels=None: Model.forward(self, input_ids)),
        "expected a loss",
    ),
}


@pytest.mark.parametrize(("methods", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_where_their_loss_is_another(methods, message):
    """All of these models passed a check of one sequence in evaluation, without special tokens."""
    model = own(**methods)
    with pytest.raises(InputError, match=message):
        use_fused_loss(model)
    assert "forward" not in vars(model)


def test_the_check_leaves_the_model_and_the_random_numbers_alone():
    model = own()
    model.body.norm = nn.BatchNorm1d(SIZE)
    model.body.forward = lambda input_ids: (
        model.body.norm(
            3 * model.body.recurrence(model.body.embedding(input_ids))[0].transpose(1, 2)
        ).transpose(1, 2),
    )
    model.body.norm.eval()
    before, state = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )
    use_fused_loss(model).undo()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


HEADS = {
    "a norm last": lambda: nn.Sequential(nn.Linear(SIZE, VOCABULARY), nn.LayerNorm(VOCABULARY)),
    "nothing last": lambda: nn.Sequential(nn.Linear(SIZE, VOCABULARY), nn.Identity()),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_that_end_in_another_layer(head):
    """A norm's one-dimensional weight was an IndexError; an Identity was a small vocabulary."""
    model = own()
    model.lm_head = head()
    with pytest.raises(
        InputError, match=r"model: expected a last linear layer with a weight \[V, D\]"
    ):
        use_fused_loss(model)


def test_an_input_embedding_that_is_the_head():
    """The layer is called with ids, which are no hidden states."""
    model = own(logits_of=lambda self, hidden: F.linear(hidden, self.body.embedding.weight))
    model.get_output_embeddings = lambda: model.body.embedding
    ids = torch.arange(24).view(2, 12)
    expected = model(input_ids=ids, labels=ids).loss
    with use_fused_loss(model):
        torch.testing.assert_close(
            model(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-5
        )
