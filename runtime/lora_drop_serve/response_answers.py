"""What a client of `/v1/responses` is told: a row as items of output, whole or in events.

Enters: events. Leaves: the objects of OpenAI's Responses API. Beside its fields a delta has `lora_drop.step`, and the
usage has `lora_drop`, as those of chats have (answers.py).
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lora_drop_runtime.decoding.row import Event

from .answers import Answer, Piece, as_call, as_json
from .driver import Told
from .errors import ApiError


def _content(item: Mapping[str, Any]) -> dict[str, Any]:
    """The one part of a message or of reasoning."""
    part: dict[str, Any] = item["content"][0]
    return part


class ResponseAnswer(Answer):
    """Of /v1/responses: one row, whose reasoning, text and calls are items of `output`.

    Args:
        told: what it says of its request.
        options: of `Answer`, for one row.
    """

    prefix, whole_object, chunk_object = "resp_", "response", "response"
    format_field: ClassVar[str] = "text"
    end: ClassVar[bytes] = b""

    def __init__(self, *arguments: Any, told: Mapping[str, Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told = told
        self._output = list[dict[str, Any]]()
        self._is_open = False  # whether the last of them grows
        self._held = list[Event]()  # tokens whose text is not told yet
        self._events = 0

    def take(self, told: Told) -> Piece:
        piece = self.choices[told.row].take(told.event)
        self._grow(piece)
        return piece

    # ── in events ──────────────────────────────────────────────────────────────────────────────────────────

    def first_chunks(self) -> list[dict[str, Any]]:
        return [self._of_all("created", "in_progress"), self._of_all("in_progress", "in_progress")]

    def chunks(self, told: Told) -> list[dict[str, Any]]:
        return self._grow(self.choices[told.row].take(told.event))

    def last_chunks(self) -> list[dict[str, Any]]:
        return [self._of_all(self._status, self._status)]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        code = "invalid_prompt" if error.status < 500 else "server_error"
        said = {"code": code, "message": error.body["error"]["message"]}
        return [*self._close("incomplete"), self._of_all("failed", "failed", error=said)]

    def whole(self) -> Iterator[str]:
        yield as_json(self._response(self._status))

    # ── what a piece adds ──────────────────────────────────────────────────────────────────────────────────

    def _grow(self, piece: Piece) -> list[dict[str, Any]]:
        """To the output; the events that say so."""
        if piece.token is not None:
            self._held.append(piece.token)
        added = list[dict[str, Any]]()
        if piece.reasoning:
            added += self._more("reasoning", "reasoning_text", piece.reasoning)
        if piece.text:
            added += self._more("message", "output_text", piece.text)
        for call in piece.calls:
            added += self._called(as_call(call))
        if piece.finish is not None:
            added += [] if self._output else self._begin("message", "output_text")
            added += self._close("incomplete" if piece.finish == "length" else "completed")
        deltas = [event for event in added if event["type"].endswith(".delta")]
        if piece.token is not None and deltas:
            deltas[0]["lora_drop"] = {"step": piece.token.kind.value}
        return added

    def _more(self, kind: str, part: str, text: str) -> list[dict[str, Any]]:
        """Text of a message, or of reasoning."""
        is_same = self._is_open and self._output[-1]["type"] == kind
        added = [] if is_same else [*self._close("completed"), *self._begin(kind, part)]
        content, said = _content(self._output[-1]), {}
        content["text"] += text
        if kind == "message":
            said = {"logprobs": self._listed(self._held) if self._logprobs else []}
            content["logprobs"] += said["logprobs"]
        self._held = []
        return [*added, self._of_part(f"{part}.delta", delta=text, **said)]

    def _begin(self, kind: str, part: str) -> list[dict[str, Any]]:
        """An item that grows."""
        if kind == "message":
            content: dict[str, Any] = {"type": part, "text": "", "annotations": [], "logprobs": []}
            item: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant"}
        else:
            content = {"type": part, "text": ""}
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "summary": []}
        begun = {**item, "status": "in_progress", "content": []}
        self._output.append({**item, "status": "in_progress", "content": [content]})
        self._is_open = True
        place = len(self._output) - 1
        first = self._event("output_item.added", output_index=place, item=begun)
        return [first, self._of_part("content_part.added", part=copy.deepcopy(content))]

    def _close(self, status: str) -> list[dict[str, Any]]:
        """The item that grows, if there is one."""
        if not self._is_open:
            return []
        item = self._output[-1]
        self._is_open, item["status"] = False, status
        content = _content(item)
        said = {"logprobs": content["logprobs"]} if item["type"] == "message" else {}
        return [
            self._of_part(f"{content['type']}.done", text=content["text"], **said),
            self._of_part("content_part.done", part=content),
            self._event("output_item.done", output_index=len(self._output) - 1, item=item),
        ]

    def _called(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A call, which is told once it has ended."""
        added, self._held = self._close("completed"), []
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"], "name": name}
        done = {**item, "arguments": arguments, "status": "completed"}
        self._output.append(done)
        place = {"output_index": len(self._output) - 1}
        of_item = {**place, "item_id": item["id"]}
        return [
            *added,
            self._event("output_item.added", **place, item={**item, "arguments": "", "status": "in_progress"}),
            self._event("function_call_arguments.delta", **of_item, delta=arguments),
            self._event("function_call_arguments.done", **of_item, name=name, arguments=arguments),
            self._event("output_item.done", **place, item=done),
        ]

    # ── objects ────────────────────────────────────────────────────────────────────────────────────────────

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": f"response.{kind}", "sequence_number": self._events - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Of the one part of the last item."""
        place = {"output_index": len(self._output) - 1, "item_id": self._output[-1]["id"], "content_index": 0}
        return self._event(kind, **place, **fields)

    def _of_all(self, kind: str, status: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, response={**self._response(status), **fields})

    @property
    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        is_over = status in ("completed", "incomplete")
        return {
            "id": self._head["id"],
            "object": self.whole_object,
            "created_at": self._head["created"],
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._head["model"],
            **self._told,
            "output": [*self._output],
            "usage": self._counted() if is_over else None,
        }

    def _counted(self) -> dict[str, Any]:
        """The usage, in the words of this API."""
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoned()},
            "total_tokens": usage["total_tokens"],
            "lora_drop": usage["lora_drop"],
        }
