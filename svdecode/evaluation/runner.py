"""From questions to records: what every system makes of them, on one process and on several."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from svdecode.common import distributed
from svdecode.data.batches import pad_token_id
from svdecode.decoding.answers import first_line
from svdecode.evaluation.generation import Generator
from svdecode.evaluation.items import Item
from svdecode.evaluation.records import Records
from svdecode.evaluation.scoring import Alone, Scorer, common_prefix
from svdecode.evaluation.systems import System
from svdecode.evaluation.tasks.base import CHOICES, TEXT, Task
from svdecode.models.adapters import causal_lm_of
from svdecode.models.steer import steer


class Runner:
    """Runs chunks of items and makes records of them."""

    def __init__(
        self,
        task: Task,
        model: object,
        pretrained: object | None,
        tokenizer: object,
        names: dict[str, tuple[System, str]],
        items: list[Item],
        *,
        batch_size: int,
        seed: int,
        max_new_tokens: int,
        shared_prompt: bool,
    ) -> None:
        """Arguments as in `svdecode.evaluation.run.evaluate`; `names` gives each compared system and its decoding."""
        self.task, self.names, self.seed = task, names, seed
        self.scorer = self.generator = None
        systems = [system for system, _ in names.values()]
        steered = None
        if len(systems) > 1:
            steered = steer(model, pretrained=pretrained, mu=0.0, penalty=systems[-1].setting.penalty)
        if task.how == TEXT:
            self.generator = Generator(
                model, steered, tokenizer,
                pretrained=pretrained, max_new_tokens=max_new_tokens, one_line=task.one_line,
            )  # fmt: skip
            return
        share = shared_prompt and task.how == CHOICES
        self.scorer = Scorer(
            steered or Alone(causal_lm_of(model)),
            systems,
            prefix=common_prefix([item.prompt for item in items]) if share else [],
            batch_size=batch_size,
            pad=pad_token_id(tokenizer),
        )

    @property
    def tokens(self) -> int:
        """Tokens that went through the models, or were generated, so far."""
        return (self.scorer or self.generator).tokens

    def run(self, chunk: list[Item]) -> list[dict]:
        """A record for each item of a chunk."""
        if self.task.how == CHOICES:
            return [self._scored(item) for item in chunk]
        return self._generated(chunk) if self.task.how == TEXT else self._nll(chunk)

    def _scored(self, item: Item) -> dict:
        logprobs = {
            name: (-row).tolist()
            for name, row in zip(self.names, self.scorer.score(item.prompt, item.answers), strict=True)
        }
        values = {name: self.task.grade(item.question, row) for name, row in logprobs.items()}
        return {**_record(item), "values": values, "choices": list(item.question.answers), "logprobs": logprobs}

    def _nll(self, chunk: list[Item]) -> list[dict]:
        nll = self.scorer.score_rows([(item.prompt, item.answers[0]) for item in chunk])
        found = []
        for column, item in enumerate(chunk):
            count = len(item.answers[0])
            values = {
                name: {"NLL": total / count} for name, total in zip(self.names, nll[:, column].tolist(), strict=True)
            }
            found.append({**_record(item), "weight": count, "values": values})
        return found

    def _generated(self, chunk: list[Item]) -> list[dict]:
        seed = self.seed * 1_000_003 + chunk[0].index  # a batch's own, however the run was shared out or resumed
        prompts = [item.prompt for item in chunk]
        texts = {
            name: self.generator.answers(system, decoding, prompts, seed)
            for name, (system, decoding) in self.names.items()
        }
        found = []
        for row, item in enumerate(chunk):
            answers = {name: self._cut(rows[row]) for name, rows in texts.items()}
            grade = self.task.grade
            values = {} if grade is None else {name: grade(item.question, text) for name, text in answers.items()}
            found.append(
                {**_record(item), "values": values, "answers": answers, "gold": item.question.completion.strip()}
            )
        return found

    def _cut(self, text: str) -> str:
        return first_line(text) if self.task.one_line else text.strip()


def run_all(runner: Runner, mine: Sequence[list[Item]], records: Records, progress: bool) -> list[dict]:
    """The new records of all processes; this one's are on disk as soon as they are there."""
    found = []
    total = sum(len(chunk) for chunk in mine)
    start = time.perf_counter()
    show = progress and distributed.is_main()
    with tqdm(total=total, desc=f"eval {runner.task.name}", unit="question", disable=not show) as bar:
        for chunk in mine:
            new = runner.run(chunk)
            records.add(new)
            found.append(new)
            bar.set_postfix({"tokens/s": f"{runner.tokens / (time.perf_counter() - start):.0f}"}, refresh=False)
            bar.update(len(chunk))
    return [record for chunk in distributed.gather(found) for record in chunk]


def _record(item: Item) -> dict:
    return {"index": item.index, "question": item.question.text}
