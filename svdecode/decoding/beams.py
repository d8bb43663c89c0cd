"""Beam search of the thin loop, with the rules of transformers' at its defaults (length penalty 1, no early stopping).

The score of a sequence is the sum of its steered log-probs; finished ones are ranked by the mean over their new tokens. Each
step takes the best tokens of each beam with `steer_topk`, which writes no (beams, V) result, and looks at the best of all
beams of a prompt together: those that end and are among the best `num_beams` are finished, the best `num_beams` that do not
end go on. A prompt is done when its best beam cannot beat the worst of as many finished ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdecode.decoding.state import DecodingState
from svdecode.ops.steer_topk import steer_topk


def beam_search(state: DecodingState, num_beams: int, new: int, stops: Tensor, pad: int) -> Tensor:
    """Decode the best sequence of each prompt.

    Args:
        state: (B, T) prompts.
        num_beams: beams of each prompt.
        new: at most so many tokens are added.
        stops: (E,) int64, tokens that end a sequence.
        pad: fills up shorter sequences.

    Returns:
        (B, T + longest) int64.
    """
    steered, batch = state.steered, len(state.tokens)
    finished: list[list[tuple[float, Tensor]]] = [[] for _ in range(batch)]
    done = [False] * batch
    scores = torch.zeros(batch, 1, dtype=torch.float32, device=state.tokens.device)
    keep = num_beams * max(2, 1 + len(stops))  # enough that `num_beams` of them do not end
    for step in range(1, new + 1):
        pre, ft = state.next_logits()
        count = min(keep, ft.shape[-1])
        tokens, logprobs = steer_topk(pre, ft, steered.settings.mu, k=count, **steered.settings.keywords)
        if logprobs.isnan().any():
            raise RuntimeError("a row's logits are NaN or +inf: no token can be chosen")
        beams = scores.shape[1]
        total = (logprobs.view(batch, beams, count) + scores[..., None]).flatten(1)
        best, where = total.topk(min(keep, total.shape[1]))
        beam, token = where // count, tokens.view(batch, -1).gather(1, where)
        ends = torch.isin(token, stops) if step < new else torch.ones_like(token, dtype=torch.bool)
        rows = beam + beams * torch.arange(batch, device=beam.device)[:, None]
        for i, j in ends[:, :num_beams].nonzero().tolist():
            if not done[i]:
                sequence = torch.cat([state.tokens[rows[i, j], : state.end], token[i, j : j + 1]])
                _add(finished[i], best[i, j].item() / step, sequence, num_beams)
        if step == new:
            break
        # The best that go on, in order: a stable sort puts the ended ones last.
        going_on = ends.int().argsort(dim=1, stable=True)[:, :num_beams]
        scores = best.gather(1, going_on)
        for i, running in enumerate((scores[:, 0] / step).tolist()):
            done[i] |= len(finished[i]) == num_beams and running <= finished[i][-1][0]
        if all(done):
            break
        state.reorder(rows.gather(1, going_on).flatten())  # after the first step each prompt has become its beams
        # A beam whose kept set is used up has token -1 and a score of -inf; it goes on with any token, and cannot win.
        state.append(token.gather(1, going_on).flatten().clamp_(min=0))
    chosen = [max(found, key=lambda pair: pair[0])[1] for found in finished]
    return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)


def _add(finished: list[tuple[float, Tensor]], score: float, sequence: Tensor, num_beams: int) -> None:
    """Keep the best `num_beams`; a prompt that is done takes no more."""
    finished.append((score, sequence))
    finished.sort(key=lambda pair: -pair[0])
    del finished[num_beams:]
