"""The text of a response while its tokens come in: as much of it as can be shown, and where it stops."""

import torch
from transformers.generation.streamers import BaseStreamer

from ..tokenization_llm2slm import LLM2SLMTokenizer


class ResponseText:
    r"""
    The text of one response, token after token.

    A token may end in the middle of a character, and a text in the middle of what may become a stop string: both are
    shown once it is known what they are. Of a stop string and what follows nothing is shown.

    Args:
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        stop (`list[str]`): The strings that end the response.
        streamed (`bool`): Whether its text is wanted before it is complete.
    """

    def __init__(self, tokenizer: LLM2SLMTokenizer, stop: list[str], streamed: bool):
        self.tokenizer, self.stop, self.read_at_once = tokenizer, stop, streamed or bool(stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._shown = 0  # characters
        self._start = self._read = 0  # tokens: the last ones whose text is known are decoded again with the new ones

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def add(self, token: int) -> None:
        """Adds a token; `stopped` says whether a stop string is complete."""
        self.ids.append(token)
        if not self.read_at_once:
            return
        known = self._decode(self.ids[self._start : self._read])
        text = self._decode(self.ids[self._start :])
        if len(text) > len(known) and not text.endswith("�"):
            self._append(text[len(known) :])
            self._start, self._read = self._read, len(self.ids)

    def _append(self, text: str) -> None:
        begin = len(self.text)
        self.text += text
        found = [self.text.find(string, max(0, begin - len(string) + 1)) for string in self.stop]
        if places := [place for place in found if place >= 0]:
            self.text, self.stopped = self.text[: min(places)], True

    def end(self) -> None:
        """Adds what was held back."""
        whole = self._decode(self.ids)
        if not self.stopped and whole.startswith(self.text):
            self._append(whole[len(self.text) :])
        self.stop = []

    def take(self) -> str:
        """The text that can be shown and was not taken yet."""
        end = len(self.text)
        if not self.stopped:
            end -= max((_begun(self.text, string) for string in self.stop), default=0)
        taken, self._shown = self.text[self._shown : end], max(self._shown, end)
        return taken


def _begun(text: str, string: str) -> int:
    """How many characters at the end of `text` are a beginning of `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


class PrintedResponse(BaseStreamer):
    r"""
    Prints a response while `generate` writes it, up to its stop string.

    Args:
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        stop (`list[str]`): The strings that end the response.
        skips_first (`bool`): Whether the first token is a start token.
    """

    def __init__(self, tokenizer: LLM2SLMTokenizer, stop: list[str], skips_first: bool):
        self.tokenizer, self.stop, self.skips_first = tokenizer, stop, skips_first
        self._begin()

    def _begin(self) -> None:
        self.text, self.skips = ResponseText(self.tokenizer, self.stop, streamed=True), self.skips_first

    def put(self, value: torch.Tensor) -> None:
        """Takes new tokens; the first are a decoder-only SLM's prompt, which is none, or a start token."""
        for token in value.flatten().tolist():
            if self.skips:
                self.skips = False
            elif not self.text.stopped:
                self.text.add(token)
        print(self.text.take(), end="", flush=True)

    def end(self) -> None:
        """Prints what was held back. The next tokens are another response's."""
        self.text.end()
        print(self.text.take(), flush=True)
        self._begin()
