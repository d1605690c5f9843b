"""One record's conversation with the model: a request, its replies, and what follows from them.

Everything here is pure, so a live call and the replay of a journal are the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelcall_assets.llm.answer import Answer, AnswerParser, Usage, correction
from modelcall_assets.llm.classify import Answered, BadRecord, Refused, classify
from modelcall_assets.llm.request import ChatRequest
from modelcall_assets.llm.transport import Reply
from modelcall_assets.records.outcome import FORMAT_MISTAKES, Failure, Outcome, Reason, Success

REPAIRABLE = FORMAT_MISTAKES | {Reason.TRUNCATED}


Said = Answer | Failure
"""A reply that counts: an answer, or the final refusal of the request."""


def said(verdict: Answered | BadRecord) -> Said:
    """What a reply's verdict says to its record."""
    return verdict.answer if isinstance(verdict, Answered) else verdict.failure


def replayed(status: int, body: bytes) -> Said | None:
    """The same from a journalled reply. None for one that does not count: it is judged otherwise
    than it was, and would be asked again today."""
    match classify(Reply(status, {}, body)):
        case Answered(answer):
            return answer
        case BadRecord(failure) | Refused(record=Failure() as failure):
            return failure
        case _:
            return None


@dataclass(slots=True)
class Finished:
    """The outcome, the last answer (None when the request itself was refused), the whole usage."""

    outcome: Outcome
    answer: Answer | None
    usage: Usage


@dataclass(frozen=True)
class Rules:
    """How answers are judged and how often a model may mend one."""

    parser: AnswerParser
    max_repair_turns: int

    def judge(self, turns: Sequence[Said]) -> Finished | None:
        """The outcome of the replies so far; None while the dialogue has to go on."""
        usage = Usage()
        for number, answer in enumerate(turns):
            if isinstance(answer, Failure):
                return Finished(answer, None, usage)
            usage = answer.usage if number == 0 else usage + answer.usage
            outcome = self.parser.parse(answer)
            if isinstance(outcome, Success) or not self._mendable(outcome, number):
                return Finished(outcome, answer, usage)
        return None

    def next_request(self, request: ChatRequest, turns: Sequence[Said]) -> ChatRequest:
        """The request to send after `turns`, for which `judge` gave None."""
        for answer in turns:
            assert isinstance(answer, Answer)
            mistake = self.parser.parse(answer)
            assert isinstance(mistake, Failure)
            request = request.followed_by(
                answer.text or "(empty answer)", correction(mistake, self.parser.keys)
            )
        return request

    def _mendable(self, mistake: Failure, turn: int) -> bool:
        return (
            mistake.reason in REPAIRABLE
            and self.parser.schema is not None
            and turn < self.max_repair_turns
        )
