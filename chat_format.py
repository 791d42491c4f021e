"""How a chat template writes a conversation, token by token.

A rollout must not encode a conversation anew every turn: sampled tokens stay as they are, and an
observation is encoded as one text with the markup around it. ChatFormat finds the pieces of any
template that is regular enough, and refuses the others with the reason.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import tokenizers

TINY_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m.content + '<|assistant|>' }}{% endif %}{% endfor %}")
THOUGHT = re.compile(r"<think>.*?(</think>\s*|\Z)", re.DOTALL)  # one that was cut has no end
NOWHERE = "\U0010ffff"  # a character that no text of the policy has


class Opening(NamedTuple):
    """What stands before an observation: markup, then text that belongs to the same words."""

    ids: list[int]  # up to the last special token
    text: str  # after it, for example "user\n"
    strips: bool  # whether this special token swallows the spaces that follow


def plain_tokenizer(tokenizer) -> tuple[tokenizers.Tokenizer, dict[int, tokenizers.AddedToken]]:
    """A copy of the tokenizer to which markup is ordinary text, and the markup by token.

    Nor does it put a space before a text that is not the first of a row.
    """
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer is not one of the tokenizers library")
    blank = re.compile(r"[\s▁]*")  # runs of spaces are added tokens in some tokenizers
    markup = {number: token for number, token in tokenizer.added_tokens_decoder.items()
              if not blank.fullmatch(token.content)}
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    core, kept = json.loads(tokenizer.backend_tokenizer.to_str()), []
    for token in core["added_tokens"]:
        if token["id"] not in markup:
            kept.append(token)
        elif token["content"] not in words:  # keeps its place, so that the others keep theirs
            kept.append(token | {"content": f"{NOWHERE}{token['id']}"})
    core["added_tokens"] = kept
    core["truncation"] = core["padding"] = None
    text = json.dumps(core).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    plain = tokenizers.Tokenizer.from_str(text)
    for number, token in markup.items():
        if number in plain.encode(token.content, add_special_tokens=False).ids:
            raise ValueError(f"its tokenizer makes markup of a text that quotes {token.content}")
    return plain, markup


class ChatFormat:
    r"""How a chat template writes a conversation.

    In tokens a conversation is: head, observation, tail, ANSWER, end_id, between, observation,
    tail, ANSWER, ... where only ANSWER and (normally) its end are sampled. It is append-only:
    what was sampled is never decoded and encoded again. An answer ends at any token of end_ids.
    With ChatML, in text (an observation is encoded as one piece with the ordinary text around it):

        head      <|im_start|>system\nPlay well.<|im_end|>\n<|im_start|>  and then  user\n
        tail      <|im_end|>\n<|im_start|>assistant\n
        end_id    <|im_end|>
        between   \n<|im_start|>  and then  user\n

    A template or tokenizer whose rows would be wrong raises ValueError with the reason.
    """

    def __init__(self, tokenizer, instructions: str, ends: set, template_kwargs: dict):
        """ends: what the model's config declares to end an answer, besides the tokenizer's."""
        self.tokenizer, (self.plain, self.markup) = tokenizer, plain_tokenizer(tokenizer)

        def render(*messages: tuple[str, str]) -> str:
            chat = [{"role": role, "content": content} for role, content in messages]
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True,
                                                 **template_kwargs)

        # 1. a first prompt in text: head, question, tail
        question, answer, first = "Question_Mark", "Answer_Mark", ""
        if instructions:
            with contextlib.suppress(Exception):  # some templates raise on a system role, ..
                first = render(("system", instructions), ("user", question))
            if instructions.strip() not in first:  # .. others skip it: it opens the first message
                first = render(("user", f"{instructions}\n\n{question}"))
        else:
            first = render(("user", question))
        if first.count(question) != 1:
            raise ValueError("its chat template does not show the user's message once, as it is")
        head, _, tail = first.partition(question)
        self.thinks = "<think>" in tail and "</think>" not in tail.rpartition("<think>")[2]
        self.head, start = self.opening(head), self.opening(tail)
        encoded = tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        marks = [n for n, token in enumerate(ids) if token in self.markup]
        self.tail_text = tail[: spans[marks[0]][0]] if marks else tail  # before its first markup
        self.tail = ids[marks[0] :] if marks else []

        # 2. a dialogue in text: .. question, tail, lead, answer, end of the answer, between, ..
        dialogue = render(("user", question), ("assistant", answer), ("user", question))
        asked, _, between = dialogue.partition(answer)
        asked = asked.rpartition(question)[2]
        self.cue = start.text  # of the tail, after its markup: "assistant\n"
        # the template may put more before an answer than the tail: a space, or an empty thought,
        # whose markup is self.lead; self.lead_text is what follows the last markup
        begun = self.opening(asked) if asked.startswith(tail) else start
        given = len(start.ids) + len(self.encode(self.cue))  # tokens of the tail
        self.lead = begun.ids[given:] if begun.ids != start.ids else []
        self.lead_text = begun.text
        ids, text, strips = self.opening(between.partition(question)[0].lstrip(" "))
        if not ids or ids[0] not in self.markup:
            raise ValueError("its chat template does not end an answer with a special token")
        self.end_id, self.between = ids[0], Opening(ids[1:], text, strips)

        # 3. the tokens at which the model stops
        declared = {tokenizer.eos_token_id, *ends} & self.markup.keys()
        if declared and self.end_id not in declared:
            end, others = tokenizer.decode([self.end_id]), tokenizer.decode(sorted(declared))
            raise ValueError(f"its chat template ends an answer with {end}, but its "
                             f"generation_config.json declares only {others} as ends")
        self.end_ids = [self.end_id, *sorted(declared - {self.end_id})]

    def opening(self, text: str) -> Opening:
        """The markup of a text that stands before an observation, and the rest of the text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        marks = [n for n, token in enumerate(ids) if token in self.markup]
        if not marks:  # some tokenizers put a space before the first word of a row
            same = self.encode(text) == ids
            return Opening([], text, False) if same else Opening(ids, "", False)
        last, end = marks[-1], encoded["offset_mapping"][marks[-1]][1]
        return Opening(ids[: last + 1], text[end:], self.markup[ids[last]].rstrip)

    def pieces(self, text: str) -> tokenizers.Encoding:
        """Outside text in tokens, with their places in the text."""
        text = text.replace(NOWHERE, "\ufffd")
        return self.plain.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """The tokens of outside text, which cannot contain a special token."""
        return self.pieces(text).ids

    def tokens_of(self, text: str) -> list[int]:
        """The tokens with which the model writes a text that may be markup, such as </think>."""
        whole = [number for number, token in self.markup.items() if token.content == text]
        return whole or self.encode(text)

    def show(self, opening: Opening, observation: str) -> list[int]:
        """The tokens of an observation and of the markup around it."""
        text = opening.text + observation + self.tail_text
        return [*opening.ids, *self.encode(text.lstrip() if opening.strips else text), *self.tail]

    def spell(self, answer: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of an answer as the template writes it, and their places in the answer.

        The template may put a space or an empty thought before it.
        """
        encoded, before = self.pieces(self.lead_text + answer), len(self.lead_text)
        cue = 0 if self.lead else len(self.encode(self.cue))  # these tokens are in the prompt
        spans = [(first - before, last - before) for first, last in encoded.offsets[cue:]]
        return self.lead + encoded.ids[cue:], [(-1, -1)] * len(self.lead) + spans

    def action(self, token_ids: list[int]) -> str:
        """What an answer says to the environment: all but its end and what it thinks in tags."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.end_ids else token_ids
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return THOUGHT.sub("", "<think>" * self.thinks + text)


def is_tiny(model: str) -> bool:
    """Whether --model is the tiny model, or a folder with a trained one."""
    template = Path(model) / "chat_template.jinja"
    return model == "tiny" or template.is_file() and template.read_text() == TINY_TEMPLATE
