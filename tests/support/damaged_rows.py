"""More than a hundred damaged files of training rows, each with a part of what the error must say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.support import damaged_bytes
from tests.support.damaged_bytes import ANSWER, CHAT, USER, Damaged, json_row


def damaged_files() -> Iterator[Damaged]:
    """The files, which get names of their own."""
    kinds = (_turns, _sharegpt, _pairs, _preferences, _columns, *damaged_bytes.KINDS)
    for kind in kinds:
        for number, (name, content, expected) in enumerate(kind()):
            yield f"{kind.__name__.strip('_')}-{number}-{name}", content, expected


def _turns() -> Iterator[Damaged]:
    """Lists of messages."""
    cases: dict[str, tuple[Any, str]] = {
        "null": (None, "messages: found null, expected a list"),
        "number": (7, "messages: found the number 7, expected a list"),
        "text": ("Hello.", "messages: found 'Hello.', expected a list of at least one message; write lists as JSON"),
        "python": (str(CHAT), "messages: found \"[{'role': 'user', 'content': 'Do you ope\"…, expected a list of at"),
        "object": (USER, "messages: found an object with 'role', 'content', expected a list"),
        "empty": ([], "messages: found a list of 0, expected a list of at least one message"),
        "nested": ([CHAT], "messages[0]: found a list of 2, expected an object with role and content"),
        "strings": (["Hi", "Hello"], "messages[0]: found 'Hi', expected an object with role and content"),
        "null-turn": ([USER, None], "messages[1]: found null, expected an object with role and content"),
        "no-role": ([{"content": "Hi"}], "messages[0].role: is missing, expected text; the message has 'content'"),
        "no-content": ([USER, {"role": "assistant"}], "messages[1].content: is missing, expected text"),
        "no-keys": ([{}], "messages[0].role: is missing, expected text; the message has no keys"),
        "null-role": ([{**USER, "role": None}], "messages[0].role: found null, expected system, user or assistant"),
        "number-role": ([{**USER, "role": 1}], "messages[0].role: found the number 1, expected system, user"),
        "list-role": ([{**USER, "role": ["user"]}], "messages[0].role: found a list of 1, expected system, user"),
        "human": ([{**USER, "role": "human"}], "messages[0].role: found 'human', expected system, user or assistant"),
        "capital": ([{**USER, "role": "User"}], "messages[0].role: found 'User', expected system, user or assistant"),
        "tool": ([*CHAT, {"role": "tool", "content": "4"}], "messages[2].role: found 'tool', expected system, user or "
                 "assistant: only text turns are trained here; use TRL's SFTTrainer"),
        "function": ([{**USER, "role": "function"}], "messages[0].role: found 'function', expected system, user"),
        "tool-calls": ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
                       "messages[1].tool_calls: found a list of 1, expected none: tool calls are not trained here"),
        "tool-calls-alone": ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}], "messages[1].tool_calls: found"),
        "function-call": ([USER, {**ANSWER, "function_call": {"name": "f"}}], "messages[1].function_call: found"),
        "thinking": ([USER, {**ANSWER, "thinking": "Hm."}], "messages[1].thinking: found 'Hm.', expected none"),
        "reasoning": ([USER, {**ANSWER, "reasoning_content": "Hm."}], "messages[1].reasoning_content: found 'Hm.'"),
        "weight": ([USER, {**ANSWER, "weight": 0}], "messages[1].weight: found the number 0, expected 1"),
        "null-content": ([USER, {**ANSWER, "content": None}], "messages[1].content: found null, expected text"),
        "number-content": ([USER, {**ANSWER, "content": 42}], "messages[1].content: found the number 42, expected"),
        "huge-number": ([USER, {**ANSWER, "content": 10**400}], "messages[1].content: found a large number, expected"),
        "boolean-content": ([USER, {**ANSWER, "content": True}], "messages[1].content: found true, expected text"),
        "object-content": ([USER, {**ANSWER, "content": {"a": 1}}], "messages[1].content: found an object with 'a'"),
        "empty-content": ([USER, {**ANSWER, "content": ""}], "messages[1].content: is blank, expected text"),
        "blank-content": ([USER, {**ANSWER, "content": " \n"}], "messages[1].content: is blank, expected text"),
        "blank-user": ([{**USER, "content": ""}, ANSWER], "messages[0].content: is blank, expected text"),
        "half": ([USER, {**ANSWER, "content": "Yes \ud83d"}], "messages[1].content: holds '\\ud83d', half of a char"),
        "no-parts": ([USER, {**ANSWER, "content": []}], "messages[1].content: found a list of 0, expected text"),
        "image": ([{**USER, "content": [{"type": "image"}]}, ANSWER], "messages[0].content[0].type: found 'image', "
                  "expected 'text': only text is trained here; use TRL's SFTTrainer with SmoaConfig"),
        "bare-part": ([{**USER, "content": ["Hi"]}, ANSWER], "messages[0].content[0]: found 'Hi', expected {"),
        "null-part": ([{**USER, "content": [{"type": "text", "text": None}]}], "messages[0].content[0]: found an obj"),
        "blank-part": ([{**USER, "content": [{"type": "text", "text": ""}]}], "messages[0].content: is blank, expec"),
        "user-twice": ([USER, USER, ANSWER], "messages[1]: user follows user; expected user and assistant in alt"),
        "answer-twice": ([USER, ANSWER, ANSWER], "messages[2]: assistant follows assistant; expected user and"),
        "answer-first": ([ANSWER, USER], "messages[0]: assistant comes first; expected user and assistant"),
        "answer-after-system": ([{**USER, "role": "system"}, ANSWER], "messages[1]: assistant follows system; exp"),
        "late-system": ([*CHAT, {**USER, "role": "system"}], "messages[2]: system follows assistant; expected sys"),
        "two-systems": ([{**USER, "role": "system"}] * 2, "messages[1]: system follows system; expected system"),
        "no-answer": ([USER], "messages: has no assistant turn; expected at least one"),
    }  # fmt: skip
    for name, (value, expected) in cases.items():
        yield f"{name}.jsonl", json_row(messages=value), f"row 2: {expected}"


def _sharegpt() -> Iterator[Damaged]:
    cases: dict[str, tuple[Any, str]] = {
        "null": (None, "conversations: found null, expected a list"),
        "empty": ([], "conversations: found a list of 0, expected a list of at least one message"),
        "texts": (["Hi"], "conversations[0]: found 'Hi', expected an object with from and value"),
        "no-value": ([{"from": "human"}], "conversations[0].value: is missing, expected text"),
        "narrator": ([{"from": "narrator", "value": "x"}], "conversations[0].from: found 'narrator', expected system, "
                     "human, user, gpt"),
        "tool": ([{"from": "observation", "value": "x"}], "conversations[0].from: found 'observation', expected"),
        "gpt-first": ([{"from": "gpt", "value": "x"}], "conversations[0]: assistant comes first; expected"),
        "number": ([{"from": "human", "value": 3}], "conversations[0].value: found the number 3, expected text"),
        "roles": ([USER], "conversations: has no assistant turn; expected at least one"),
    }  # fmt: skip
    for name, (value, expected) in cases.items():
        yield f"{name}.json", json.dumps([{"conversations": value}]).encode(), f"row 1: {expected}"


def _pairs() -> Iterator[Damaged]:
    """Prompts with completions."""
    cases: dict[str, tuple[Any, Any, str]] = {
        "null": (None, "Yes.", "prompt: found null, expected text"),
        "null-completion": ("Open?", None, "completion: found null, expected text"),
        "numbers": ("2 + 2", 4, "completion: found the number 4, expected text"),
        "blank": ("Open?", " ", "completion: is blank, expected text"),
        "blank-prompt": ("", "Yes.", "prompt: is blank, expected text"),
        "mixed": ("Open?", [ANSWER], "prompt: found 'Open?', expected a list of at least one message"),
        "mixed-other": ([USER], "Yes.", "completion: found 'Yes.', expected a list of at least one message"),
        "empty": ([USER], [], "completion: found a list of 0, expected a list of at least one message"),
        "no-answer": ([USER, ANSWER], [USER], "completion: has no assistant turn; expected at least one"),
        "order": ([USER], [USER, ANSWER], "completion[0]: user follows user; expected user and assistant"),
        "answer-first": ([ANSWER], CHAT, "prompt[0]: assistant comes first; expected user and assistant"),
        "role": ([{"role": "bot", "content": "x"}], [ANSWER], "prompt[0].role: found 'bot', expected system, user"),
    }
    for name, (prompt, completion, expected) in cases.items():
        yield f"{name}.jsonl", json_row(prompt=prompt, completion=completion), f"row 1: {expected}"
    marked = json_row(prompt="Open?", completion="Yes.", label=False)
    yield "label.jsonl", marked, "row 1: label: found true or false, expected no label"


def _preferences() -> Iterator[Damaged]:
    other = {"role": "assistant", "content": "No."}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "null": ({"chosen": None, "rejected": "No."}, "chosen: found null, expected text"),
        "blank": ({"chosen": "Yes.", "rejected": ""}, "rejected: is blank, expected text"),
        "number": ({"prompt": 1, "chosen": "a", "rejected": "b"}, "prompt: found the number 1, expected text"),
        "mixed": ({"chosen": CHAT, "rejected": "No."}, "rejected: found 'No.', expected a list of at least one"),
        "turns-for-texts": ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "prompt: found a list of 1, expected"),
        "same": ({"chosen": CHAT, "rejected": CHAT}, "rejected: is the same as chosen, expected a worse answer"),
        "unrelated": ({"chosen": CHAT, "rejected": [{**USER, "content": "Hi"}, other]},
                      "chosen[0]: is where chosen and rejected differ, a user turn; expected an assistant turn"),
        "short": ({"chosen": CHAT, "rejected": [USER]}, "rejected: has no assistant turn; expected at least one"),
        "prompt-twice": ({"prompt": [USER], "chosen": CHAT, "rejected": [USER, other]},
                         "chosen[0]: user follows user; expected user and assistant"),
        "scores": ({"chosen": [USER, {"content": "x"}], "rejected": [USER, other]}, "chosen[1].role: is missing"),
    }  # fmt: skip
    for name, (row, expected) in cases.items():
        yield f"{name}.jsonl", json_row(**row), f"row 1: {expected}"


def _columns() -> Iterator[Damaged]:
    """Other columns than those of a format, or values that are not text in them."""
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "none": ({}, "found the columns of an empty object, expected those of a format: messages; prompt and"),
        "unknown": ({"question": "a", "answer": "b"}, "found the columns 'question', 'answer', expected those of"),
        "half": ({"prompt": "a"}, "found the columns 'prompt', expected those of a format"),
        "capitals": ({"Text": "a"}, "found the columns 'Text', expected those of a format"),
        "many": (
            {f"a{i}": i for i in range(99)},
            "found the columns 'a0', 'a1', 'a2', 'a3', 'a4', 'a5', 'a6', 'a7', 'a8', 'a9', …, expected",
        ),
        "tools": ({"messages": CHAT, "tools": [{"name": "f"}]}, "tools: found a list of 1, expected none: tools are"),
        "images": ({"prompt": "a", "completion": "b", "images": ["x"]}, "images: found a list of 1, expected none"),
        "system": ({"messages": CHAT, "system": "Be kind."}, "system: found 'Be kind.', expected none: make it the"),
        "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history: found a list of 1, expec"),
        "null-text": ({"text": None}, "text: found null, expected text"),
        "texts": ({"text": ["a", "b"]}, "text: found a list of 2, expected text"),
        "blank-text": ({"text": "\t"}, "text: is blank, expected text"),
        "null-output": ({"instruction": "a", "output": None}, "output: found null, expected text"),
        "blank-instruction": ({"instruction": "", "output": "b"}, "instruction: is blank, expected text"),
        "number-input": ({"instruction": "a", "input": 5, "output": "b"}, "input: found the number 5, expected text"),
    }
    for name, (row, expected) in cases.items():
        yield f"{name}.json", json.dumps([row]).encode(), f"row 1: {expected}"
    rows = [{"text": "a"}, {"messages": CHAT}]
    yield "mixed.json", json.dumps(rows).encode(), "row 2: text: is missing, expected in each row of the format text"
