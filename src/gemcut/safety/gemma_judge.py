"""A Gemma as the judge: ShieldGemma, or the model that is served. P(Yes) against P(No) as the first token it says.

    prompt = <bos> + task + a turn with the text + the policy + the question
             `------- the same for all policies ------´  computed once, by the engine's prefix cache

What is judged is encoded without control tokens, so it cannot end its turn; what it says about policies, or an answer
that it gives itself, stands inside that turn like any other text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gemcut.errors import ParameterError
from gemcut.safety.judge import JudgeError, check_policy
from gemcut.safety.policies import Policy, builtin_policies

if TYPE_CHECKING:
    from gemcut.gemma import Gemma

Form = Literal["shieldgemma", "self"]
#: The four that ShieldGemma was trained on.
SHIELD_POLICIES = ("sexual-content", "dangerous-content", "hate", "harassment")
#: Tokens of a text that are judged at most; of a longer one its end.
MOST_TOKENS = 3072


class GemmaJudge:
    """A judge that asks a Gemma. It may be asked from several threads at once."""

    def __init__(
        self, gemma: Gemma, policies: Mapping[str, Policy] | None = None, *, form: Form = "shieldgemma"
    ) -> None:
        """``form``: "shieldgemma" puts the text into a turn of its own, as that model was trained; "self" puts the
        whole question into a user's turn, as a model that chats reads it.

        Raises ParameterError where the tokenizer has no one token for Yes or No, or no marks of turns.
        """
        known = builtin_policies()
        self._policies = dict(policies) if policies else {name: known[name] for name in SHIELD_POLICIES}
        self._gemma, self._form = gemma, form
        tokenizer = gemma.tokenizer
        self._answers = tuple(self._one_token(word) for word in ("Yes", "No"))
        start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
        if start is None or end is None:
            raise ParameterError(
                "this model's tokenizer has no turn markers, so it cannot judge; take a Gemma that has"
            )
        self._start, self._end = start, end

    @property
    def policies(self) -> Sequence[str]:
        return tuple(self._policies)

    def score(self, text: str, policy: str) -> float:
        """See ``Judge``."""
        return self.score_all(text, [policy])[policy]

    def score_all(self, text: str, policies: Sequence[str], prompt: str | None = None) -> dict[str, float]:
        """See ``ExchangeJudge``. All policies go through the network in one batch behind one prefill of the text.

        Raises JudgeError where the engine fails.
        """
        from gemcut.engine import SamplingParams
        from gemcut.engine.results import run_together

        for policy in policies:
            check_policy(policy, self.policies)
        params = SamplingParams(max_new_tokens=1, temperature=0, logprobs=0, ignore_eos=True)
        front = self.front(text, prompt)
        prompts = [front + self.back(policy, prompt is not None) for policy in policies]
        asked = [
            self._gemma.prepare_stream(ids, params, logprobs_of=self._answers, cache_salt=b"judge", watch=False)
            for ids in prompts
        ]
        # The first alone: what all begin with is in the cache when the others come.
        results = [*run_together(asked[:1]), *run_together(asked[1:])]
        found: dict[str, float] = {}
        for policy, result in zip(policies, results, strict=True):
            if result.error is not None or not result.logprobs:
                raise JudgeError(f"the judging model failed: {result.error or 'it gave no token'}")
            yes, no = result.logprobs[0].asked
            found[policy] = 1 / (1 + math.exp(min(700.0, no - yes)))
        return found

    def front(self, text: str, prompt: str | None) -> list[int]:
        """Token ids of what is the same for all policies, ``<bos>`` included."""
        what = "question of a person" if prompt is None else "answer of a chatbot to a person's question"
        task = f"You check texts for a safety team. Decide whether the {what} breaks the rule below.\n\n"
        said = self._plain(f"Human Question: {(text if prompt is None else prompt).strip()}\n")
        if prompt is not None:
            half = MOST_TOKENS // 2
            said = said[-half:] + self._plain(f"\nChatbot Response: {text.strip()}\n")[-half:]
        said = said[-MOST_TOKENS:]
        bos = self._gemma.bos_id
        if self._form == "shieldgemma":
            return [bos, *self._plain(task), self._start, *self._plain("\n"), *said, self._end]
        return [bos, self._start, *self._plain(f"user\n{task}<<<\n"), *said, *self._plain(">>>")]

    def back(self, policy: str, response: bool) -> list[int]:
        """Token ids of one policy and the question."""
        what = "Chatbot Response" if response else "Human Question"
        words = (
            f"\n\nThe rule:\n\n* {self._policies[policy].definition}\n\n"
            f"Does the {what} break this rule? Begin your answer with 'Yes' or 'No'.\n\n"
        )
        if self._form == "shieldgemma":
            return self._plain(words)
        return [*self._plain(words.rstrip()), self._end, *self._plain("\n"), self._start, *self._plain("model\n")]

    def _plain(self, text: str) -> list[int]:
        return self._gemma.tokenizer.encode(text, add_bos=False, parse_special=False)

    def _one_token(self, word: str) -> int:
        ids = self._plain(word)
        if len(ids) != 1:
            raise ParameterError(f"this model's tokenizer has no one token for {word!r}, so it cannot judge")
        return ids[0]


def load_judge(path: str, policies: Mapping[str, Policy] | None = None, **load: Any) -> GemmaJudge:
    """ShieldGemma, or another judging Gemma, from a checkpoint. ``load`` is for `Gemma.load`."""
    from gemcut.gemma import Gemma

    return GemmaJudge(Gemma.load(path, **load), policies)
