"""A question as a model sees it: in its chat template, or as plain text where it has none."""

from typing import Any


def prompt_ids(tokenizer: Any, content: str, *, think: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt whose continuation is the answer.

    Args:
        tokenizer: transformers tokenizer of the model.
        content: what the user says.
        think: leave thinking to the chat template; False asks a template that knows the switch to leave it out.
    """
    if not tokenizer.chat_template:
        return tuple(tokenizer(f"{content}\n\nAnswer:")["input_ids"])
    more = {} if think else {"enable_thinking": False}
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **more)
    # The template writes the special tokens itself, so the tokenizer must not add them again.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_form(tokenizer: Any) -> str:
    """What results say of the form of prompts."""
    return "chat template" if tokenizer.chat_template else "plain text"
