"""Terms beside the token loss, read from source code."""

import re

import pytest
import torch

from perplexity.integrations.loss_terms import extra_terms


class Parts:
    """Attributes that the forwards below use."""

    some, none, loss_fct = 1e-4, 0.0, torch.nn.CrossEntropyLoss()

    def loss_function(self, logits, labels):
        return self.loss_fct(logits, labels)

    def more_loss(self, loss):
        return loss + 1.0


class Plain(Parts):
    def forward(self, logits, labels=None, **given):
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels)
            loss = loss.to(logits.dtype)
        # written as in transformers
        return (loss,) + logits if loss is not None else logits  # noqa: RUF005


class Added(Parts):
    def forward(self, logits, labels):
        loss = self.loss_function(logits, labels)
        z_loss = logits.logsumexp(-1).to(loss.dtype).pow(2).mean()
        loss += self.some * z_loss
        return loss


class Nothing(Parts):
    def forward(self, logits, labels):
        loss = self.loss_function(logits, labels)
        return loss + self.none * logits.logsumexp(-1).pow(2).mean()


class InTraining(Parts):
    def forward(self, logits, labels):
        loss = self.loss_function(logits, labels)
        if self.training:
            loss = torch.stack([loss, logits.mean()]).sum()
        return loss


class Routed(Parts):
    def forward(self, logits, labels, output_router_logits=False):
        loss = self.loss_function(logits, labels)
        if output_router_logits:
            loss += self.some * logits.sum()
        return loss


class Inherits(Added):
    def forward(self, *args, **given):
        return super().forward(*args, **given)


class OfAnotherMethod(Parts):
    def forward(self, logits, labels):
        loss = self.loss_function(logits, labels)
        return self.more_loss(loss)


class Keyword(Parts):
    def forward(self, logits, labels):
        found = self.loss_function(logits, labels)
        return dict(loss=found.loss * 2)


class Smoothed(Parts):
    def forward(self, logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


class Averaged(Parts):
    def forward(self, logits, labels, num_items_in_batch=None):
        loss = self.loss_function(logits, labels)
        loss = loss / num_items_in_batch
        return loss


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Plain, None),
        (Nothing, None),
        (Routed, None),
        (Averaged, None),
        (Added, "some: expected 0, got 0.0001: Added adds to its token loss by `loss \\+="),
        (Inherits, "some: expected 0, got 0.0001"),
        (
            InTraining,
            "model: expected the mean loss of next tokens alone, "
            "InTraining has `loss = torch.stack",
        ),
        (OfAnotherMethod, "has `return loss \\+ 1.0`"),
        (Keyword, "has `return dict\\(loss=found.loss \\* 2\\)`"),
        (Smoothed, "label_smoothing"),
    ],
)
def test_terms_are_read_from_the_code(kind, message):
    found = list(extra_terms(kind()))
    assert len(found) == (message is not None), found
    assert message is None or re.search(message, found[0])
