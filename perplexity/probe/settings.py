"""Settings of text generation, stated in full: the measures of a probe depend on all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import checks
from ..errors import InputError

LEAST_TEMPERATURE = 0.01  # below it logits overflow
MOST = 128  # tokens of a text, by default


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of the generation of texts, the same for every model that is probed.

    A model's own generation settings are ignored, so that the measures of two models compare. The
    defaults sample from the model's unchanged distribution. Greedy decoding and sharp sampling loop
    in nearly every model (Holtzman et al. 2020, arXiv:1904.09751). A model's perplexity on its own
    texts compares with its perplexity on references only under the unchanged distribution.

    Args:
        max_new_tokens: Tokens at which a text is cut off, unless the end-of-text token comes
            before. None: 128, or half of a smaller context.
        samples: Texts of each prompt, 4 by default.
        temperature: Of sampling, 1 by default; 0 is greedy decoding.
        top_p: Probability that is sampled from, 0 to 1; 1, the default, leaves no token out.
        top_k: Number of tokens that are sampled from; 0, the default, leaves no token out.
        seed: Of sampling, 0 by default.
        prompt_tokens: Tokens of a document that are its prompt, 32 by default.
        chat: Whether prompts are user's messages in the tokenizer's chat template.
        batch_size: Texts generated at a time, 64 by default.

    Raises:
        InputError: A value is out of its range; the message names it.

    Example:
        >>> str(GenerationSettings(max_new_tokens=96, samples=2))
        'temperature 1, top-p 1, seed 0, at most 96 tokens, 2 a prompt'
        >>> GenerationSettings(temperature=0)
        Traceback (most recent call last):
        perplexity.errors.InputError: samples: expected 1 with temperature 0, \
which gives the same text again, got 4
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
                "samples: expected 1 with temperature 0, which gives the same text again, "
                f"got {self.samples}"
            )

    def of(self, context_length: int | None) -> GenerationSettings:
        """Return the settings for a model, with a number for ``max_new_tokens``.

        Args:
            context_length: The most tokens that the model reads; None: any number.

        Example:
            >>> GenerationSettings().of(64).max_new_tokens
            32
        """
        if self.max_new_tokens is not None:
            return self
        return replace(self, max_new_tokens=min(MOST, max(1, (context_length or 2 * MOST) // 2)))

    @property
    def most(self) -> int:
        """Return the most new tokens of a text: ``max_new_tokens``, or 128 for None."""
        return MOST if self.max_new_tokens is None else self.max_new_tokens

    @property
    def greedy(self) -> bool:
        """Return whether decoding is greedy."""
        return self.temperature == 0

    @property
    def sharp(self) -> bool:
        """Return whether likely tokens are favoured so much that sound models loop, too."""
        return self.temperature < 0.9 or 0 < self.top_k < 20 or self.top_p < 0.8

    @property
    def unchanged(self) -> bool:
        """Return whether texts are drawn from the model's own distribution."""
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
