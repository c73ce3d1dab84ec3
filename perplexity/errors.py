"""The one error the command line turns into a line on stderr and exit status 2."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what was expected and what came."""


def check_unicode(name: str, text: str) -> None:
    """InputError naming ``name`` where ``text`` holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: expected Unicode text, got a lone surrogate at character {error.start}")
