"""How text is generated: stated in full, since repetition and self-perplexity mean nothing without
it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import checks
from ..errors import InputError

LEAST_TEMPERATURE = 0.01  # below it logits overflow
MOST = 128  # tokens of a text, where nothing else is said


@dataclass(frozen=True)
class GenerationSettings:
    """What a model's own generation settings say is not used, so that two models are asked the same
    way.

    max_new_tokens: a text ends there, or at the end-of-text token (None: 128, or half of a smaller
    context); samples: texts a prompt; temperature: 0 is greedy; top_p, top_k: 1 and 0 leave nothing
    out; seed: of the sampling; prompt_tokens: how much of a document is prompt; chat: prompts go
    through the tokenizer's chat template; batch_size: texts at a time.

    The defaults sample from the model's own distribution, unchanged: greedy decoding and sharp
    sampling loop in nearly every model (Holtzman et al. 2020, arXiv:1904.09751), and only under the
    model's own distribution does its perplexity on its own text compare with that on others'.
    """

    max_new_tokens: int | None = None
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    prompt_tokens: int = 32
    chat: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        least = dict(samples=1, prompt_tokens=1, batch_size=1, top_k=0, seed=0)
        if self.max_new_tokens is not None:
            least["max_new_tokens"] = 1
        for name, lowest in least.items():
            expected = f"a whole number, at least {lowest}"
            value = checks.integer(name, getattr(self, name), expected, lowest)
            object.__setattr__(self, name, value)
        if self.seed >= 1 << 63:
            raise InputError(f"seed: expected less than 2⁶³, got {self.seed}")
        expected = f"0 (greedy) or {LEAST_TEMPERATURE} and more"
        checks.number("temperature", self.temperature, expected, 0)
        if self.temperature:
            checks.number("temperature", self.temperature, expected, LEAST_TEMPERATURE)
        checks.number("top_p", self.top_p, "above 0 and at most 1", most=1, above=0)
        checks.flag("chat", self.chat)
        if self.greedy and self.samples > 1:
            raise InputError(
                f"samples: expected 1 with temperature 0, which gives the same text again, got {self.samples}"
            )

    def of(self, context_length: int | None) -> GenerationSettings:
        """With ``max_new_tokens`` a number, for a model that reads ``context_length`` tokens (None:
        any).
        """
        if self.max_new_tokens is not None:
            return self
        return replace(self, max_new_tokens=min(MOST, max(1, (context_length or 2 * MOST) // 2)))

    @property
    def most(self) -> int:
        """Return the most new tokens of a text: ``max_new_tokens``, or 128 before ``of`` settles
        None.
        """
        return MOST if self.max_new_tokens is None else self.max_new_tokens

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def sharp(self) -> bool:
        """Likely tokens come more often than the model holds them likely enough to make texts
        loop.
        """
        return self.temperature < 0.9 or 0 < self.top_k < 20 or self.top_p < 0.8

    @property
    def unchanged(self) -> bool:
        """Texts are drawn from the model's own distribution."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0

    def __str__(self) -> str:
        how = (
            "greedy"
            if self.greedy
            else f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"
        )
        how += f", top-k {self.top_k}" if self.top_k else ""
        how += ", as chat" if self.chat else ""
        return f"{how}, at most {self.max_new_tokens} tokens, {self.samples} a prompt"
