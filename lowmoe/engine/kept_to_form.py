"""Which tokens may come next in one answer that must have a form.

Knows:        when the answer begins after the model's thinking, which tokens its form allows then.
Ignorant of:  how likely tokens are, how a form is compiled.
"""

import numpy as np
import torch
from torch import Tensor

from lowmoe.engine.forms import Form
from lowmoe.engine.spelling import Spelling
from lowmoe.errors import LowMoeError


class KeptToForm:
    """Follows one answer.  spelling: of the same answer, None where it is nothing but the answer.

    What the model thinks before may be anything, but an end.
    """

    def __init__(self, form: Form, spelling: Spelling | None) -> None:
        self._form, self._matcher = form, form.matcher()
        self._spelling = None if form.from_start else spelling
        self._begun = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow but an end."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """The ids of the tokens that may come next, [A] int64, ascending.

        Raises LowMoeError where finding them takes too much.
        """
        if self._begun or self._spelling is None:
            return self._by_form()
        if not self._spelling.may_answer:
            return self._form.not_end_ids
        opener = self._spelling.opener
        ids = self._by_form()
        return ids if opener is None else torch.cat([ids, torch.tensor([opener])]).unique()

    def may_take(self, token_id: int) -> bool:
        """Whether it is the answer or none of it: a token may end the thinking and go on."""
        if self._begun or self._spelling is None or self._spelling.may_answer:
            return True
        return not self._spelling.answers_with(
            self._form.tokens[token_id].decode("utf-8", "replace")
        )

    def take(self, token_id: int) -> None:
        """One that is allowed was chosen; before `spelling` hears of it."""
        if not self._begun and self._spelling is not None:
            if not self._spelling.may_answer or token_id == self._spelling.opener:
                return
            self._spelling.begin_answer()
        self._begun = True
        self._matcher.consume_token(token_id)
        self._require_sound()

    def _by_form(self) -> Tensor:
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_sound()
        allowed = np.unpackbits(mask, bitorder="little")[: self._form.n_tokens]
        ids = torch.from_numpy(allowed.nonzero()[0])
        if not len(ids):
            raise LowMoeError(
                "no token can follow that keeps the answer to its form. Make the form less narrow."
            )
        return ids

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            fault = " ".join(self._matcher.get_error().split())
            raise LowMoeError(
                f"the answer's form became too complex to follow ({fault[:200]}). Simplify it."
            )
