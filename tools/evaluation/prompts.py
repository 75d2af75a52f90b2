"""A question as a model sees it: in its chat template, or as plain text where it has none."""

from typing import Any


def prompt_ids(tokenizer: Any, content: str, *, begin: str | None = None) -> tuple[int, ...]:
    """Token ids of a prompt whose continuation is the answer.

    Args:
        tokenizer: transformers tokenizer of the model.
        content: what the user says.
        begin: words that the answer begins with, which leave the model nothing but to go on; a template that knows the
            switch then leaves thinking out.
    """
    if not tokenizer.chat_template:
        return tuple(tokenizer(f"{content}\n\nAnswer:" + (f" {begin}" if begin else ""))["input_ids"])
    more = {} if begin is None else {"enable_thinking": False}
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **more)
    text += begin or ""
    # The template writes the special tokens itself, so the tokenizer must not add them again.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_form(tokenizer: Any) -> str:
    """What results say of the form of prompts."""
    return "chat template" if tokenizer.chat_template else "plain text"
