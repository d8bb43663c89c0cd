"""Batched answers of every system, with greedy, beam, top-k or top-p decoding."""

from __future__ import annotations

import torch

from svdecode.data.batches import pad_token_id, prompts_batch
from svdecode.evaluation.systems import System
from svdecode.models.adapters import causal_lm_of, pretrained_of

DECODINGS: dict[str, dict[str, object]] = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "beam": {"do_sample": False, "num_beams": 4},
    "top-k": {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0},
    "top-p": {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
}


class Generator:
    """Answers prompts under one system at a time. Every system meets the same batches and the same seeds."""

    def __init__(
        self,
        model: object,
        steered: object | None,
        tokenizer: object,
        *,
        pretrained: object | None = None,
        max_new_tokens: int = 32,
        one_line: bool = False,
    ) -> None:
        """Keep the models.

        Args:
            model: the adapted model, or the pre-trained one where `steered` is None.
            steered: what `svdecode.steer` made of it; its settings are changed for each system.
            tokenizer: theirs.
            pretrained: the pre-trained model, where it does not lie under the adapter.
            max_new_tokens: at most so many tokens per answer.
            one_line: an answer ends with its line.
        """
        base = causal_lm_of(model)
        self.pretrained = base if steered is None else pretrained_of(base) if pretrained is None else pretrained
        self.steered, self.tokenizer, self.max_new_tokens = steered, tokenizer, max_new_tokens
        self.pad = pad_token_id(tokenizer)
        self.ends = self._ends(base, one_line)
        self.tokens = 0

    @torch.inference_mode()
    def answers(self, system: System, decoding: str, prompts: list[list[int]], seed: int) -> list[str]:
        """One text per prompt (token ids), without the prompt. `seed` fixes what top-k and top-p draw."""
        ids, mask = prompts_batch(prompts, self.pad, self.pretrained.device)
        model = self._model(system)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.ends or None,
                pad_token_id=self.pad,
                **DECODINGS[decoding],
            )[:, ids.shape[1] :]
        self.tokens += tokens.numel()
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _model(self, system: System) -> object:
        if system.pretrained:
            return self.pretrained
        self.steered.settings = system.setting
        return self.steered

    def _ends(self, model: object, one_line: bool) -> list[int]:
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if self.tokenizer.eos_token_id is not None:
            ends.append(self.tokenizer.eos_token_id)
        line = self.tokenizer("\n", add_special_tokens=False).input_ids if one_line else []
        # A tokenizer without a token for the line's end goes on to max_new_tokens; the text is cut all the same.
        return sorted({*ends, *(line if len(line) == 1 and self.tokenizer.decode(line) == "\n" else [])})
